"""Sizes, columns and bars as text."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxconv import draw
from mxconv.draw import Column


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), ((1 << 20) - 1, "1.0 MiB"),
        (912_210_767_872, "849.6 GiB"), (1 << 62, "4096.0 PiB"),
    ],
)  # fmt: skip
def test_size(value, text):
    assert draw.size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B/s"), (999, "999 B/s"), (1.2e9, "1.2 GB/s"), (999_960_000, "1.0 GB/s")])
def test_rate(value, text):
    assert draw.rate(value) == text


@pytest.mark.parametrize(("value", "text"), [(8243, "8,243"), (999_999, "999,999"), (15_728_640, "15.7 M"), (456e9, "456.0 B")])
def test_count(value, text):
    assert draw.count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"),
        (math.inf, "?"),
    ],
)  # fmt: skip
def test_duration(seconds, text):
    assert draw.duration(seconds) == text


@given(st.floats(0, 1e6, allow_nan=False))
def test_duration_never_prints_sixty(seconds):
    words = draw.duration(seconds).split()
    assert not any(number == "60" and unit in ("s", "min") for number, unit in pairwise(words))


def test_table_aligns_wide_and_combining_characters():
    rows = [["世界", "1"], ["e\N{COMBINING ACUTE ACCENT}x", "22"], ["abcd", "333"]]
    assert draw.table([Column("name"), Column("n", "right")], rows, indent=0) == [
        "name    n", "世界    1", "e\N{COMBINING ACUTE ACCENT}x     22", "abcd  333"
    ]  # fmt: skip


def test_table_without_headings_and_rows():
    assert draw.table([Column(), Column()], [["a", "b"]], indent=1) == [" a  b"]
    assert draw.table([Column(), Column()], []) == []


def test_table_refuses_ragged_rows():
    with pytest.raises(ValueError, match="zip"):
        draw.table([Column("a"), Column("b")], [["only one"]])


def test_bar_lengths():
    assert draw.bar(1, 1, 8) == "█" * 8
    assert draw.bar(0.5, 1, 8) == "█" * 4
    assert draw.bar(1e-9, 1, 8) == "▏"
    assert draw.bar(0, 1, 8) == ""
    assert draw.bar(3, 1, 8) == "█" * 8
    assert draw.bar(math.nan, 1, 3) == "!!!"
    assert draw.bar(1e-9, 1, 8, ascii_only=True) == "#"


@given(st.floats(0, 1), st.integers(1, 60))
def test_bar_is_monotonic_and_fits(share, width):
    assert draw.cells(draw.bar(share, 1.0, width)) <= width
    assert len(draw.bar(share / 2, 1.0, width, ascii_only=True)) <= len(draw.bar(share, 1.0, width, ascii_only=True))


def test_sparkline():
    assert draw.sparkline([0, 1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇██"
    assert draw.sparkline([1, 1], top=2) == "▅▅"
    assert draw.sparkline([0, math.nan, 1], ascii_only=True) == "_!#"
    assert draw.sparkline([0, 0]) == "▁▁"
    assert draw.sparkline([]) == ""


def test_bar_chart_says_what_is_above_the_limit():
    lines = draw.bar_chart(["layer 0", "layer 10"], [0.1, 0.3], limit=0.2, width=10)
    assert lines[0].startswith("  layer 0   ███▍") and lines[0].endswith("0.1")
    assert lines[1].endswith("0.3  FAIL")
    assert draw.bar_chart(["x"], [math.nan], limit=1.0, width=2)[0].endswith("nan  FAIL")


def test_encodable():
    assert draw.encodable("→ 3 × ä", "utf-8") == "→ 3 × ä"
    assert draw.encodable("→ 3 × ä", "ascii") == "-> 3 x \\xe4"
    assert draw.encodable("a\ud800", "utf-8") == "a\\ud800"
    assert draw.encodable("a→", "no such codec") == "a->"
