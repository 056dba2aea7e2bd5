"""Comparison: which weights differ between two checkpoints or artifacts and by how much, whatever their layouts and ranks."""

from mxconv.comparison.measure import Difference, Measure
from mxconv.comparison.models import Comparison, compare

__all__ = ["Comparison", "Difference", "Measure", "compare"]
