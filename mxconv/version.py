"""Versions: of the tool, and of the arithmetic that shapes bytes."""

VERSION = "0.1.0"

# Raised when the same plan would give other bytes than before.
# 1: round to nearest with absmax scales (formats.md §2 and §5).
NUMERICS_VERSION = 1
