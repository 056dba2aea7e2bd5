"""The strict safetensors header parser.

Format (huggingface/safetensors): 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes:

    {"__metadata__": {"key": "text", ...}, "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header; together the tensors cover every byte once. What this parser accepts, the
safetensors package (0.8) accepts. It refuses more: duplicate and unknown keys, names with control characters, tensor
entries that are not flat objects, blanks before the first brace, ranks above 64, dtypes of less than a byte.

Members are scanned one by one and never nested: memory is bounded by the header's own length times a small factor, and
each message names its tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from mxconv.errors import MalformedInput, MxconvError, printable
from mxconv.tensors import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 64
MAX_LISTED = 20
_U64 = 1 << 64

_BLANK = re.compile(r"[ \t\n\r]*")
_FLAT_OBJECT = re.compile(r"\{[^{}]{0,65536}\}")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tensor of a header; `begin` and `end` are bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header: entries by offset, metadata, bytes of data that the entries cover, and per-tensor problems."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_bytes: int
    problems: tuple[MxconvError, ...]


class _Wrong(Exception):
    """What is wrong at this point of the header; `parse_header` adds file and tensor."""

    def __init__(self, what: str, *, expected: object = None, got: object = None) -> None:
        self.what, self.expected, self.got = what, expected, got
        super().__init__(what)

    def at(self, where: str, tensor: str | None = None) -> MalformedInput:
        """The error that a user sees, with file and tensor named."""
        subject = "" if tensor in (None, "__metadata__") else f"tensor {printable(repr(tensor), 160)}: "
        return MalformedInput(subject + self.what, where=where, expected=self.expected, got=self.got)


def _integer(digits: str) -> int | float:
    # serde reads "-0" as a float and so refuses it as a size; as a float it is refused here too
    return float(digits) if digits.startswith("-") else int(digits)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=list, parse_int=_integer, parse_constant=_no_constant)


class _Scanner:
    """A cursor over the header's text that reads one member at a time."""

    __slots__ = ("position", "text")

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0

    def peek(self) -> str:
        """The next character that is no blank, "" at the end; blanks are passed over."""
        blank = _BLANK.match(self.text, self.position)
        self.position = blank.end() if blank else self.position
        return self.text[self.position : self.position + 1]

    def take(self, char: str) -> None:
        """Pass over blanks and `char`, which must come next."""
        if self.peek() != char:
            raise _Wrong("header is not valid JSON", expected=f"{char} at character {self.position}", got=repr(self.peek()))
        self.position += 1

    def value(self) -> Any:
        """The JSON value at the cursor."""
        try:
            result, self.position = _DECODER.raw_decode(self.text, self.position)
        except (ValueError, RecursionError) as error:
            raise _Wrong(f"header is not valid JSON at character {self.position}: {error}") from None
        return result

    def string(self) -> str:
        """The string that comes next; it must be text that UTF-8 can hold."""
        if self.peek() != '"':
            raise _Wrong(
                "header is not as the format says", expected=f"a string at character {self.position}", got=repr(self.peek())
            )
        text: str = self.value()
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Wrong("a string holds half of a surrogate pair, which is no Unicode text", got=ascii(text)) from None
        return text

    def members(self) -> Iterator[str]:
        """Keys of the object at the cursor; the caller reads each value before it asks for the next key."""
        self.take("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            key = self.string()
            self.take(":")
            self.peek()
            yield key
            if self.peek() == "}":
                self.position += 1
                return
            self.take(",")

    def flat_object(self) -> list[tuple[str, Any]]:
        """The pairs of the object at the cursor, which holds no object and is no longer than a tensor's entry can be."""
        found = _FLAT_OBJECT.match(self.text, self.position)
        if found is None:
            got = self.text[self.position : self.position + 24]
            raise _Wrong("its entry is no flat JSON object", expected="dtype, shape and data_offsets", got=repr(got))
        pairs: list[tuple[str, Any]] = self.value()
        return pairs


def _metadata(scanner: _Scanner) -> dict[str, str]:
    if scanner.text.startswith("null", scanner.position):
        scanner.position += 4
        return {}
    metadata: dict[str, str] = {}
    for key in scanner.members():
        value = scanner.string()
        if key in metadata:
            raise _Wrong("__metadata__ holds a key twice", got=repr(key))
        metadata[key] = value
    return metadata


def _size_bytes(dtype: str, shape: list[Any]) -> int:
    """Bytes of a tensor, with the overflow checks of the safetensors package in its order."""
    if len(shape) > MAX_RANK:
        raise _Wrong("shape has too many axes", expected=f"at most {MAX_RANK}", got=len(shape))
    elements = 1
    for n in shape:
        if type(n) is not int or not 0 <= n < _U64:
            raise _Wrong("shape holds something other than a non-negative integer", got=repr(shape))
        elements *= n
        if elements >= _U64:
            raise _Wrong("the product of its shape overflows 64 bits", got=repr(shape))
    if elements * DTYPE_BYTES[dtype] * 8 >= _U64:
        raise _Wrong("its size in bits overflows 64 bits", got=f"{dtype} {shape!r}")
    return elements * DTYPE_BYTES[dtype]


def _entry(name: str, pairs: list[tuple[str, Any]]) -> Entry:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Wrong("a field appears twice", got=", ".join(key for key, _ in pairs))
    if fields.keys() != _FIELDS:
        strange = sorted(fields.keys() - _FIELDS) or sorted(_FIELDS - fields.keys())
        word = "unknown field" if fields.keys() - _FIELDS else "missing field"
        raise _Wrong(f"{word} {printable(', '.join(map(repr, strange)))}", expected="dtype, shape, data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _Wrong("unknown dtype", expected=" ".join(DTYPE_BYTES), got=repr(dtype))
    if not isinstance(shape, list):
        raise _Wrong("shape is no list", got=repr(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or not 0 <= n < _U64 for n in offsets):
        raise _Wrong("data_offsets are not two non-negative integers", got=repr(offsets))
    begin, end = offsets
    size = _size_bytes(dtype, shape)
    if end - begin != size:
        raise _Wrong(
            "data_offsets do not fit dtype and shape", expected=f"{size} bytes", got=f"[{begin}, {end}], {end - begin} bytes"
        )
    return Entry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _check_cover(entries: list[Entry], where: str) -> tuple[int, list[MxconvError]]:
    """Bytes that the sorted entries cover, and the places where they leave a hole or overlap."""
    problems: list[MxconvError] = []
    position = 0
    for entry in entries:
        if entry.begin != position:
            word = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            got = f"[{entry.begin}, {entry.end}]"
            problems.append(_Wrong(f"{word} in the data", expected=f"a begin of {position}", got=got).at(where, entry.name))
        position = max(position, entry.end)
    return position, problems


def _parse_members(scanner: _Scanner, where: str, problems: list[MxconvError]) -> tuple[list[Entry], dict[str, str]]:
    """Entries and metadata; what is wrong with one tensor goes to `problems`, what breaks the header is raised."""
    seen: set[str] = set()
    entries: list[Entry] = []
    metadata: dict[str, str] = {}
    key: str | None = None
    try:
        for key in scanner.members():
            if key in seen:
                raise _Wrong("appears twice in the header")
            seen.add(key)
            if not key.isprintable():
                raise _Wrong("its name holds control or escape characters")
            if key == "__metadata__":
                metadata = _metadata(scanner)
                continue
            pairs = scanner.flat_object()
            try:
                entries.append(_entry(key, pairs))
            except _Wrong as wrong:
                problems.append(wrong.at(where, key))
        key = None
        if scanner.peek():
            raise _Wrong("something follows the header's JSON", got=repr(scanner.text[scanner.position : scanner.position + 16]))
    except _Wrong as wrong:
        raise wrong.at(where, key) from None
    return entries, metadata


def parse_header(header: bytes, where: str) -> Header:
    """The header JSON `header` (without its 8-byte length) of the file `where`.

    Raises MalformedInput when the text is no header at all; what is wrong with single tensors is in `problems`.
    """
    try:
        scanner = _Scanner(header.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedInput("header is not UTF-8", where=where, got=f"byte {header[error.start]:#04x} at {error.start}") from None
    if not header.startswith(b"{"):
        raise MalformedInput("header does not begin with a brace", where=where, got=repr(scanner.text[:16]))
    problems: list[MxconvError] = []
    entries, metadata = _parse_members(scanner, where, problems)
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    data_bytes, holes = _check_cover(entries, where) if not problems else (0, [])
    found = problems + holes
    if len(found) > MAX_LISTED:
        more = MalformedInput(f"{len(found) - MAX_LISTED} more tensors of this header are wrong", where=where)
        found = [*found[:MAX_LISTED], more]
    return Header(entries=tuple(entries), metadata=metadata, data_bytes=data_bytes, problems=tuple(found))
