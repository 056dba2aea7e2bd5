"""A run over MiniMax-M1's true layer shapes, beside `cp` of the same bytes, in one go: seconds and peak resident memory.

    python benchmarks/true_shapes.py SOURCE [--tp 8] [--schemes w4afp8 block_wise_fp8] [--data-limit MIB]

SOURCE is what benchmarks/make_layer.py writes (one lightning layer, 8 experts: 3.3 GB). Both sides read from a page cache that one
read has filled, and both are synced. `--data-limit` runs mxconv under RLIMIT_DATA.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(command: list[str], data_limit: int | None = None) -> tuple[float, int]:
    """Seconds, `sync` included, and peak RSS in bytes of one process; exits when it fails."""

    def limit() -> None:
        if data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))

    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=limit)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{command} exited {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, usage.ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--tp", default="8")
    parser.add_argument("--schemes", nargs="*", default=["w4afp8", "block_wise_fp8"])
    parser.add_argument("--data-limit", type=int, metavar="MIB")
    a = parser.parse_args()
    total = sum(file.stat().st_size for file in a.source.iterdir())
    limit = None if a.data_limit is None else a.data_limit << 20
    with tempfile.TemporaryDirectory(dir=a.source.parent) as folder:
        subprocess.run(["cat", *map(str, sorted(a.source.iterdir()))], stdout=subprocess.DEVNULL, check=True)
        for round_ in range(2):
            seconds, _ = timed(["cp", "-r", str(a.source), f"{folder}/copy"])
            print(f"{round_}: cp -r and sync of {total / 1e9:.2f} GB: {seconds:.1f} s", flush=True)
            shutil.rmtree(f"{folder}/copy")
            for scheme in a.schemes:
                out = f"{folder}/{scheme}"
                command = [sys.executable, "-m", "mxconv", "quantize", str(a.source), out, "--scheme", scheme, "--tp", a.tp]
                seconds, memory = timed(command, limit)
                print(f"{round_}: quantize {scheme} --tp {a.tp}: {seconds:.1f} s, peak RSS {memory >> 20} MiB", flush=True)
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
