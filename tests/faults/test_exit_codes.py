"""Each exit code of docs/exit-codes.md, produced by the command line, and the table against the code."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from mxconv import errors
from mxconv.errors import Interrupted, MxconvError
from tests.conftest import REPOSITORY
from tests.faults.inprocess import run
from tests.synthetic import make_checkpoint

PAGE = (REPOSITORY / "docs" / "exit-codes.md").read_text()
KINDS = (Interrupted, *(kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MxconvError)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", hidden=128, intermediate=128, layers="ls", experts=2)


def test_the_page_lists_every_code_and_kind() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert listed == {0, errors.EXIT_SIGINT, errors.EXIT_SIGTERM, *errors.PRECEDENCE}
    assert {kind.exit_code for kind in KINDS} <= listed
    assert ", ".join(map(str, errors.PRECEDENCE)) in PAGE
    for kind in KINDS:
        assert f"`{kind.kind}`" in PAGE


def raising(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, ZeroDivisionError("x")), (6, MemoryError()), (130, KeyboardInterrupt()),
        (143, Interrupted("stopped", exit_code=errors.EXIT_SIGTERM)), (7, errors.NumericError("NaN")),
        (8, errors.IntegrityError("x")),
        (3, errors.Problems([errors.UsageError("u"), errors.IncompleteInput("i"), errors.MalformedInput("m")])),
        (4, errors.Problems([errors.IntegrityError("u"), errors.IncompleteInput("i")])),
    ],
)  # fmt: skip
def test_what_goes_wrong_inside_has_its_code(
    code: int, error: BaseException, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mxconv.artifact

    monkeypatch.setattr(mxconv.artifact, "check_folder", raising(error))
    result = run("check", source, "--json")
    assert result.code == code
    document = json.loads(result.out)
    assert document["schema"] == "mxconv.error" and document["exit_code"] == code and document["problems"]
    assert ("Traceback" in result.err) == (code == 1)


def test_codes_by_what_a_user_does(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", source, out).code == 0
    assert run("convert", source, out).code == 5
    assert run("convert", source, tmp_path / "x", "--tp", "3").code == 2
    assert run("convert", source, tmp_path / "x", "--memory", "1K").code == 6
    assert run("convert", tmp_path / "nowhere", tmp_path / "x").code == 4
    (out / "config.json").write_text("{}")
    assert run("check", out).code == 8
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("[")
    assert run("inspect", tmp_path / "bad").code == 3


def test_sigterm_inside_a_command_is_143(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mxconv.artifact

    monkeypatch.setattr(mxconv.artifact, "check_folder", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert run("check", source).code == 143
