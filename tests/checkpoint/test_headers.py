"""The header parser against a table of hostile headers, and against the safetensors package on generated ones."""

# ruff: noqa: UP031  (headers are full of braces; str.format would double them all)

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mxconv.checkpoint import Header, parse_header
from mxconv.errors import MxconvError
from tests.checkpoint.raw import entry, file_bytes

GOOD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def problems_of(header: str | bytes) -> list[MxconvError]:
    """What the parser says against a header; [] when it is accepted."""
    try:
        return list(parse_header(header.encode() if isinstance(header, str) else header, "x.safetensors").problems)
    except MxconvError as error:
        return [error]


def accepted(raw: bytes) -> Header | None:
    """The header of a whole file's bytes as our reader accepts it, None when it does not."""
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or not 0 < length <= len(raw) - 8:
        return None
    try:
        header = parse_header(raw[8 : 8 + length], "x.safetensors")
    except MxconvError:
        return None
    return None if header.problems or 8 + length + header.data_bytes != len(raw) else header


def package_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except Exception:
        return False
    return True


HOSTILE = {
    "duplicate tensor": ('{"a":%s,"a":%s}' % (GOOD, GOOD), "'a'", "twice"),
    "duplicate field": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "'a'", "twice"),
    "duplicate metadata": ('{"__metadata__":{"k":"1","k":"2"},"a":%s}' % GOOD, "__metadata__", "twice"),
    "unknown field": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"z":1}}', "'a'", "unknown field 'z'"),
    "missing field": ('{"a":{"dtype":"F32","shape":[1]}}', "'a'", "missing field 'data_offsets'"),
    "metadata number": ('{"__metadata__":{"k":1},"a":%s}' % GOOD, "", "expected a string"),
    "float offset": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}}', "'a'", "data_offsets"),
    "negative offset": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "'a'", "data_offsets"),
    "negative zero": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', "'a'", "data_offsets"),
    "true as a size": ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "'a'", "shape"),
    "float shape": ('{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "'a'", "shape"),
    "negative shape": ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "'a'", "shape"),
    "three offsets": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}', "'a'", "data_offsets"),
    "backward offsets": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', "'a'", "data_offsets"),
    "wrong size": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "'a'", "8 bytes"),
    "overflowing product": (
        '{"a":{"dtype":"F32","shape":[1099511627776,1099511627776,0],"data_offsets":[0,0]}}',
        "'a'",
        "overflow",
    ),
    "overflowing bits": ('{"a":{"dtype":"F64","shape":[4611686018427387904],"data_offsets":[0,4]}}', "'a'", "overflow"),
    "size of 2^64": ('{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}', "'a'", "shape"),
    "a number of 5000 digits": ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("1" * 5000), "'a'", "JSON"),
    "rank 65": ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ",".join("1" * 65), "'a'", "axes"),
    "unknown dtype": ('{"a":{"dtype":"F42","shape":[1],"data_offsets":[0,4]}}', "'a'", "unknown dtype"),
    "dtype list": ('{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}', "'a'", "unknown dtype"),
    "entry list": ('{"a":["F32",[1],[0,4]]}', "'a'", "flat"),
    "nested entry": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":{"0":0}}}', "'a'", "flat"),
    "deep nesting": ('{"a":{"dtype":%s}}' % ("[" * 60000), "'a'", "JSON"),
    "deep nesting of everything": ("[" * 100000, "", "brace"),
    "overlap": (json.dumps({"a": entry("U8", (4,), 0, 4), "b": entry("U8", (4,), 2, 6)}), "'b'", "overlaps"),
    "hole": (json.dumps({"a": entry("U8", (4,), 0, 4), "b": entry("U8", (4,), 5, 9)}), "'b'", "hole"),
    "first byte unused": (json.dumps({"a": entry("U8", (4,), 1, 5)}), "'a'", "hole"),
    "zero-size inside another": (json.dumps({"a": entry("U8", (4,), 0, 4), "b": entry("U8", (0,), 2, 2)}), "'b'", "overlaps"),
    "escape character": (json.dumps({"\x1b[31m": entry()}), "\\x1b", "control"),
    "bidirectional override": (json.dumps({"a\u202eb": entry()}), "\\u202e", "control"),
    "newline": (json.dumps({"a\nb": entry()}), "\\n", "control"),
    "half a surrogate": ('{"\\ud800":%s}' % GOOD, "", "surrogate"),
    "raw control character": ('{"a\x01":%s}' % GOOD, "", "JSON"),
    "not UTF-8": (b'{"a\xff":' + GOOD.encode() + b"}", "", "UTF-8"),
    "NaN": ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "'a'", "JSON"),
    "blank first": (' {"a":%s}' % GOOD, "", "brace"),
    "two documents": ('{"a":%s}{}' % GOOD, "", "follows"),
    "a zero byte after it": ('{"a":%s}\0' % GOOD, "", "follows"),
    "trailing comma": ('{"a":%s,}' % GOOD, "", "expected a string"),
    "missing brace": ('{"a":%s' % GOOD, "", "JSON"),
    "list": ("[]", "", "brace"),
    "byte order mark": ('\ufeff{"a":%s}' % GOOD, "", "brace"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_malformed_and_named(case: str) -> None:
    header, name, words = HOSTILE[case]
    problems = problems_of(header)
    assert problems and {problem.exit_code for problem in problems} == {3}
    text = "\n".join(problem.render() for problem in problems)
    assert name in text and words in text
    assert text.replace("\n", "").isprintable()


ACCEPTED = {
    "scalar": ({"a": entry("F32", (), 0, 4)}, 4),
    "zero size": ({"a": entry("F32", (0, 7), 0, 0), "b": entry("F32", (1,), 0, 4)}, 4),
    "zero size in the middle": ({"b": entry("F32", (1,), 4, 8), "z": entry("F32", (0,), 4, 4), "a": entry()}, 8),
    "zero before huge": ({"a": entry("F32", (0, 1 << 63, 4), 0, 0)}, 0),
    "no tensor": ({}, 0),
    "metadata": ({"__metadata__": {"format": "pt", "note": "line\nbreak {}"}, "a": entry()}, 4),
    "null metadata": ({"__metadata__": None, "a": entry()}, 4),
    "braces in a name": ({'x{y}"[]': entry()}, 4),
    "another script": ({"gewichtß.重み": entry()}, 4),
    "empty name": ({"": entry()}, 4),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_unusual_but_right_header_is_accepted(case: str) -> None:
    header, size = ACCEPTED[case]
    raw = file_bytes(header, b"\0" * size)
    assert package_accepts(raw)
    parsed = accepted(raw)
    assert parsed is not None and {e.name for e in parsed.entries} == header.keys() - {"__metadata__"}


def test_escapes_and_blanks_are_json() -> None:
    text = ' \n{ "\\u0061" : {"\\u0064type":"F32" ,\t"shape":[ 1 ], "data_offsets" :[0,4] } } \n\t'.lstrip()
    raw = file_bytes(text, b"\0" * 4)
    header = accepted(raw)
    assert header is not None and header.entries[0].name == "a" and package_accepts(raw)


def test_every_wrong_tensor_is_listed_up_to_a_limit() -> None:
    many = {f"t{i}": entry("F99") for i in range(30)}
    assert len(problems_of(json.dumps({"a": entry("F99"), "b": entry("F32", (3,))}))) == 2
    listed = problems_of(json.dumps(many))
    assert len(listed) == 21 and "10 more" in listed[-1].render()


NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
SIZES = st.one_of(st.integers(0, 5), st.sampled_from([-1, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, 1.0, True, None, "1"]))
DTYPES = st.one_of(
    st.sampled_from(["BF16", "F32", "U8", "I8", "F8_E4M3", "I64", "C64", "BOOL"]), st.sampled_from(["f32", "", None, 1])
)
FIELDS = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": st.lists(SIZES, max_size=4), "data_offsets": st.lists(SIZES, min_size=1, max_size=3)},
    optional={"extra": st.none()},
)
METADATA = st.one_of(st.none(), st.dictionaries(NAMES, st.one_of(NAMES, st.integers()), max_size=3))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, FIELDS, max_size=3), METADATA, st.integers(0, 40), st.booleans())
@example({"a": entry("F32", (1 << 40, 1 << 40, 0), 0, 0)}, None, 0, True)
def test_never_accepts_what_the_package_rejects(tensors: dict[str, Any], metadata: Any, data: int, ascii_only: bool) -> None:
    header = {**tensors} if metadata is None else {"__metadata__": metadata, **tensors}
    raw = file_bytes(json.dumps(header, ensure_ascii=ascii_only), b"\0" * data)
    if accepted(raw) is not None:
        assert package_accepts(raw)


@st.composite
def right_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that the format allows, its tensors in any order, and the bytes of its data."""
    sizes = {"U8": 1, "BF16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1}
    printable = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), max_size=8)
    names = draw(st.lists(printable, unique=True, max_size=6).map(lambda found: [n for n in found if n != "__metadata__"]))
    entries, position = [], 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(sizes)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = sizes[dtype]
        for n in shape:
            size *= n
        entries.append((name, entry(dtype, tuple(shape), position, position + size)))
        position += size
    return dict(draw(st.permutations(entries))), position


@settings(max_examples=200, deadline=None)
@given(right_headers())
def test_accepts_every_right_header_and_reads_it_as_the_package_does(case: tuple[dict[str, Any], int]) -> None:
    header, size = case
    raw = file_bytes(header, bytes(i % 251 for i in range(size)))
    parsed = accepted(raw)
    assert parsed is not None
    start = 8 + int.from_bytes(raw[:8], "little")
    ours = {e.name: (e.dtype, list(e.shape), raw[start + e.begin : start + e.end]) for e in parsed.entries}
    theirs = {name: (info["dtype"], info["shape"], bytes(info["data"])) for name, info in safetensors.deserialize(raw)}
    assert ours == theirs


def _mutate(raw: bytes, random_: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(random_.randint(1, 3)):
        kind, at = random_.randrange(5), random_.randrange(len(data))
        if kind == 0:
            data[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            data[at] = random_.choice(b'0123456789{}[]",:-.eE\\ \n\0\xff')
        elif kind == 2:
            del data[at : at + random_.randint(1, 6)]
        elif kind == 3:
            data[at:at] = data[max(0, at - random_.randint(1, 30)) : at]
        else:
            data[at:at] = random_.choice([b'"', b"{", b"1e2", b"-0", b"null", b"\\ud800", b"00"])
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_mutated_headers_end_in_an_answer_that_the_package_shares(count: int) -> None:
    base = json.dumps({"__metadata__": {"format": "pt"}, "a.b": entry("BF16", (2, 3), 0, 12), "c": entry("F32", (), 12, 16)})
    random_ = random.Random(20260)
    survived = 0
    for _ in range(count):
        text = _mutate(base.encode(), random_)
        raw = struct.pack("<Q", len(text)) + text + b"\0" * 16
        if accepted(raw) is not None:
            survived += 1
            assert package_accepts(raw), text
    assert 0 < survived < count
    print(f"proof: {count:,} mutated headers, {survived:,} accepted, all by the safetensors package too")
