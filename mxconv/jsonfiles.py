"""Reading JSON and other small files that nobody vouches for: regular files only, of bounded size, no key twice."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from mxconv.errors import IncompleteInput, MalformedInput, reading_failed

MAX_JSON_BYTES = 256 << 20


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return keys


def read_regular(path: Path, limit_bytes: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of the regular file `path`, at most `limit_bytes`; a FIFO or a device is not waited for.

    Raises IncompleteInput when it is absent, MalformedInput when it is no such file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise IncompleteInput("file is missing", where=path, hint="give the folder of a Hugging Face checkpoint") from None
    except OSError as error:
        raise reading_failed(error, path) from None
    try:
        info = os.fstat(fd)  # before fdopen, which refuses a directory in its own words
        if not stat.S_ISREG(info.st_mode):
            raise MalformedInput("not a regular file", where=path)
        if info.st_size > limit_bytes:
            raise MalformedInput("file is too large", where=path, expected=f"at most {limit_bytes} bytes", got=info.st_size)
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(info.st_size)  # the limit itself would set 256 MiB aside
    finally:
        os.close(fd)


def read_json(path: Path) -> Any:
    """The JSON value in the regular file `path`, at most 256 MiB, without duplicate keys.

    Raises IncompleteInput when it is absent, MalformedInput when it is no such file or no such JSON.
    """
    return parse_json(read_regular(path), path)


def parse_json(text: bytes, path: Path) -> Any:
    """The JSON value of `text`, the content of `path`. Raises MalformedInput when it is no JSON, or has a key twice."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        if b"\\ud" in text or b"\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text that UTF-8 can hold
        return value
    except RecursionError:
        raise MalformedInput("JSON is nested too deeply", where=path) from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise MalformedInput("a string holds half of a surrogate pair, which is no Unicode text", where=path, got=half) from None
    except ValueError as error:
        raise MalformedInput(f"not valid JSON: {error}", where=path) from None
