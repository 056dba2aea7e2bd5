"""The exception tree: codes, order of the message, precedence, nothing raw on a terminal."""

from __future__ import annotations

import pytest

from mxconv import errors
from mxconv.errors import MalformedInput, MxconvError, NumericError, Problems, UsageError, printable, raise_all

CODES = {
    "MxconvError": 1, "UsageError": 2, "MalformedInput": 3, "IncompleteInput": 4, "OutputConflict": 5, "ResourceError": 6,
    "NumericError": 7, "IntegrityError": 8,
}  # fmt: skip


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes_are_the_documented_ones(name: str, code: int) -> None:
    assert getattr(errors, name)("x").exit_code == code


def test_a_message_says_what_where_expected_got_and_next() -> None:
    error = MalformedInput("wrong shape", where="file: t", expected=[2, 3], got=[3, 2], hint="transpose it")
    assert error.render() == "file: t: wrong shape (expected [2, 3], got [3, 2])\nhint: transpose it" == str(error)


@pytest.mark.parametrize("character", ["\x1b", "\x00", "\n", "\u202e", "\u200b", "\ud800", "\x7f"])
def test_control_characters_are_escaped(character: str) -> None:
    assert printable(f"a{character}b").isprintable()
    assert MalformedInput("x", where=f"a{character}b", got=character).render().isprintable()


def test_long_names_are_cut() -> None:
    assert len(printable("x" * 1000)) == 200


def test_the_first_of_3_4_7_2_decides() -> None:
    assert Problems([UsageError("a"), NumericError("b"), MalformedInput("c")]).exit_code == 3
    assert Problems([UsageError("a"), NumericError("b")]).exit_code == 7
    assert Problems([UsageError("a")]).exit_code == 2
    rendered = Problems([UsageError("a"), MalformedInput("c")]).render()
    assert rendered.index("c") < rendered.index("  - a")


def test_raise_all_raises_what_there_is() -> None:
    raise_all([])
    with pytest.raises(UsageError, match="alone"):
        raise_all([UsageError("alone")])
    with pytest.raises(Problems, match="one") as caught:
        raise_all(iter([UsageError("one"), MxconvError("two")]))
    assert len(caught.value.problems) == 2
