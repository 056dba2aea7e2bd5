"""Journal lines: canonical, checked, cut at the first that is damaged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxconv.artifact.journal import Journal, decode_line, encode_line, read_records, read_remains
from mxconv.artifact.names import JOURNAL_NAME
from mxconv.errors import OutputConflict
from tests.artifact.sample import OTHER_PLAN, PLAN

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), JSON, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(RECORDS, max_size=5), st.integers(0, 1 << 30))
def test_records_survive_and_a_cut_leaves_a_prefix(records: list[dict], cut: int) -> None:
    data = b"".join(encode_line(record) for record in records)
    assert read_records(data) == (records, len(data))
    part = data[: cut % (len(data) + 1)]
    kept, size = read_records(part)
    assert kept == records[: len(kept)] and part[:size] == b"".join(encode_line(record) for record in kept)
    assert len(part) - size < len(encode_line(records[len(kept)])) if len(kept) < len(records) else size == len(part)


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    records = [{"kind": "unit", "unit": f"layer.{i}", "outputs": ["ab" * 32]} for i in range(4)]
    data = b"".join(encode_line(record) for record in records)
    lines = data.splitlines(keepends=True)
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            kept, _ = read_records(bytes(damaged))
            number = sum(at >= sum(map(len, lines[: i + 1])) for i in range(4))
            assert kept == records[:number]


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"null\n", b"[]\n", b'{"crc32":"00000000"}\n', b'{"crc32":"0","record":[]}\n', b"\xff\n"]
)
def test_what_is_no_line(line: bytes) -> None:
    assert decode_line(line) is None
    assert decode_line(b"[" * 100_000 + b"\n") is None


def test_append_after_a_cut_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path, PLAN)
    journal.append({"kind": "unit", "unit": "a"})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes() + b'{"crc32":"torn')
    journal = Journal(tmp_path, PLAN)
    assert journal.records == [{"kind": "unit", "unit": "a"}]
    journal.append({"kind": "unit", "unit": "b"})
    journal.close()
    assert Journal(tmp_path, PLAN).records == [{"kind": "unit", "unit": "a"}, {"kind": "unit", "unit": "b"}]


def test_one_holder_one_plan(tmp_path: Path) -> None:
    assert read_remains(tmp_path) is None
    journal = Journal(tmp_path, PLAN)
    remains = read_remains(tmp_path)
    assert remains is not None and remains.plan == PLAN and remains.whole and not remains.files
    with pytest.raises(OutputConflict, match="another run"):
        Journal(tmp_path, PLAN)
    journal.close()
    with pytest.raises(OutputConflict, match="another plan"):
        Journal(tmp_path, OTHER_PLAN)


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    from mxconv.errors import ResourceError

    journal = Journal(tmp_path, PLAN)
    journal.append({"kind": "unit", "unit": "a"})
    write = os.write
    calls = random.Random(0)

    def full(fd: int, data: bytes) -> int:
        if len(data) < 20 or calls.random() < 0.5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(ResourceError, match="disk is full"):
            journal.append({"kind": "unit", "unit": "b" * 50})
    journal.append({"kind": "unit", "unit": "c"})
    journal.close()
    assert [record["unit"] for record in Journal(tmp_path, PLAN).records] == ["a", "c"]
