"""The exception tree: codes, order of the message, precedence, nothing raw on a terminal."""

from __future__ import annotations

import pytest

from mxconv import errors
from mxconv.errors import (
    IncompleteInput,
    Listed,
    MalformedInput,
    MxconvError,
    NumericError,
    Problems,
    ResourceError,
    UsageError,
    printable,
    raise_all,
)

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


def test_listed_keeps_twenty_of_a_kind_and_counts_the_rest() -> None:
    found = Listed()
    assert not found
    for i in range(30):
        found.add(MalformedInput, "tensor {} is wrong", f"t\x1b{i}")
        found.add(IncompleteInput, "tensor is missing", where=f"m{i}")
    found.add(IncompleteInput, "tensor {} is wrong", "other kind")
    told = [problem.render() for problem in found.problems()]
    assert len(told) == 43 and told[0] == "tensor t\\x1b0 is wrong" and told[1] == "m0: tensor is missing"
    assert told[-2:] == ["tensor … and 10 more is wrong", "tensor is missing: 10 more"]
    assert [type(problem) for problem in found.problems()[-2:]] == [MalformedInput, IncompleteInput]
    found.extend([ResourceError("x")] * 2000)
    assert len(found.problems()) == 1003 and found.problems()[-1].render() == "1041 more problems of this kind"
