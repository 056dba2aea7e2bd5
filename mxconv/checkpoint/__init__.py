"""Checkpoints on disk: hostile-safe headers and indexes, and `pread` of byte ranges (no torch)."""

from mxconv.checkpoint.folder import INDEX_NAME, SINGLE_NAME, rank_folders, read_shards
from mxconv.checkpoint.headers import MAX_HEADER_BYTES, Entry, Header, parse_header
from mxconv.checkpoint.reader import ByteReader
from mxconv.checkpoint.stored import Shards, StoredFile, StoredTensor

__all__ = [
    "INDEX_NAME", "MAX_HEADER_BYTES", "SINGLE_NAME", "ByteReader", "Entry", "Header", "Shards", "StoredFile", "StoredTensor",
    "parse_header", "rank_folders", "read_shards",
]  # fmt: skip
