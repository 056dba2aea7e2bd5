"""Executing plans: the operations of units, the run, and the jobs made of them."""

from mxconv.execute.jobs import Prepared, convert, execute, prepare, quantize
from mxconv.execute.run import RunOptions, RunResult

__all__ = ["Prepared", "RunOptions", "RunResult", "convert", "execute", "prepare", "quantize"]
