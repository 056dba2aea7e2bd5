"""Calibration: a pass over the source through the runtime, its statistics as a file."""

from mxconv.calibrate.statistics import FILE_NAME, TOKENS_NAME, Statistics, read_statistics

__all__ = ["FILE_NAME", "TOKENS_NAME", "Statistics", "read_statistics"]
