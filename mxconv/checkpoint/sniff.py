"""Naming what lies under a `.safetensors` name when it is no safetensors file."""

from __future__ import annotations

import re

from mxconv.errors import IncompleteInput, MalformedInput, MxconvError

SNIFF_BYTES = 512

_LFS_SIZE = re.compile(rb"^size (\d{1,19})$", re.MULTILINE)

# First bytes → what such a file is. None of them is ever opened as what it is.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (a pickle); it is never unpickled"),
    (b"GGUF", "a GGUF file (llama.cpp)"),
    (b"\x80\x02", "a pickle; it is never unpickled"),
    (b"\x80\x03", "a pickle; it is never unpickled"),
    (b"\x80\x04", "a pickle; it is never unpickled"),
    (b"\x80\x05", "a pickle; it is never unpickled"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
)


def sniff(head: bytes, size_bytes: int, where: str) -> MxconvError | None:
    """The error that says what a file beginning with `head` is, None when nothing is recognised."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        size = _LFS_SIZE.search(head)
        missing = int(size.group(1)) if size else 0
        return IncompleteInput(
            f"git-lfs pointer, {missing} bytes missing; run git lfs pull", where=where, got=f"{size_bytes} bytes of pointer"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        lowered = text.lower()
        web = lowered.startswith((b"<!doctype html", b"<html", b"<head", b"<!--"))
        return MalformedInput(
            f"not a safetensors file: it is {'an HTML page' if web else 'an XML or HTML document'}", where=where,
            hint="the download saved an error page; download the file again",
        )  # fmt: skip
    if text[:1] in (b"{", b"["):
        return MalformedInput("not a safetensors file: it is JSON text", where=where)
    for magic, words in _MAGIC:
        if head.startswith(magic):
            return MalformedInput(f"not a safetensors file: it is {words}", where=where)
    return None
