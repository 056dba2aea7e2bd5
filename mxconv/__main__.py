"""`python -m mxconv`: the command line, also under `torchrun`."""

from __future__ import annotations

from mxconv.cli import main

if __name__ == "__main__":
    main()
