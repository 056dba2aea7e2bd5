"""mxconv: MiniMax-M1 checkpoints to low-bit tensor-parallel shards, proved right.

    import mxconv
    mxconv.quantize_checkpoint("MiniMax-M1", "out", scheme="w4afp8", tp=8)
    report = mxconv.verify_artifact("out", mxconv.VerifyOptions(source="MiniMax-M1"))

Importing this package imports nothing else; each name is looked up when it is used. The functions are not called `quantize` and
`verify`, since those are the packages that they come from.
"""

from __future__ import annotations

from mxconv.version import VERSION as __version__

TYPE_CHECKING = False  # typing's own would cost its import, in which a Ctrl-C is a traceback
if TYPE_CHECKING:
    from typing import Any

# public name → (module, its name there)
_PUBLIC = {
    "Plan": ("mxconv.plan", "Plan"),
    "Request": ("mxconv.plan", "Request"),
    "RunOptions": ("mxconv.execute", "RunOptions"),
    "VerifyOptions": ("mxconv.verify", "Options"),
    "build_plan": ("mxconv.plan", "build_plan"),
    "check_folder": ("mxconv.artifact", "check_folder"),
    "compare": ("mxconv.comparison", "compare"),
    "convert_checkpoint": ("mxconv.execute", "convert"),
    "load": ("mxconv.runtime", "load"),
    "open_source": ("mxconv.source", "open_source"),
    "quantize_checkpoint": ("mxconv.execute", "quantize"),
    "verify_artifact": ("mxconv.verify", "verify"),
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """The public object `name`, imported now."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mxconv' has no attribute {name!r}")
    import importlib

    module, there = _PUBLIC[name]
    return getattr(importlib.import_module(module), there)


def __dir__() -> list[str]:
    return list(__all__)
