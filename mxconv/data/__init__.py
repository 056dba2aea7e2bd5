"""What the package brings along: a small trained model and two texts.

`demo/` is a 6.3 M parameter MiniMax-M1-style model (4 layers, 4 experts, 13 MB), trained on permissively licensed Python source.
`calibration.txt` (prose, code, lists, numbers, several languages) gathers activation scales when no file is given;
`evaluation.txt` (Python modules) is what perplexity is measured on. Both texts were written for mxconv.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mxconv.errors import IncompleteInput


def demo_model() -> Path:
    """The folder of the bundled model. Raises IncompleteInput when the package does not lie in a folder (a zip archive)."""
    folder = files(__name__) / "demo"
    if not isinstance(folder, Path):
        raise IncompleteInput("the bundled model is inside an archive", where=folder, hint="install mxconv with pip")
    return folder


def calibration_text() -> str:
    """The built-in calibration text."""
    return (files(__name__) / "calibration.txt").read_text("utf-8")


def evaluation_text() -> str:
    """The built-in held-out text for perplexity."""
    return (files(__name__) / "evaluation.txt").read_text("utf-8")
