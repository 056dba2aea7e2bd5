"""A broken disk under the source or the output: any system call may fail with EIO, and it is exit code 6 with a way to go on."""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from mxconv.artifact import tree_digest
from mxconv.cli import main
from tests.faults.conftest import Clean
from tests.faults.faulty import CALLS, FaultyLayer
from tests.faults.processes import assert_nothing_wrong, command


def job(arguments: list[str], layer: FaultyLayer) -> int:
    """The exit code of the command line's entry over `layer`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        layer.install(patch)
        main(arguments)
    return int(done.value.code or 0)


@pytest.mark.parametrize("places", [3, pytest.param(25, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("side", ["source", "output"])
@pytest.mark.parametrize("name", CALLS)
def test_input_output_errors(
    name: str, side: str, places: int, model: Path, clean: Mapping[str, Clean], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = clean["convert"]
    folder = model if side == "source" else tmp_path / "out"
    counting = FaultyLayer(folder)
    assert job(command("convert", model, folder if side == "output" else tmp_path / "out"), counting) == 0
    total = counting.counts[name]
    if total == 0:
        pytest.skip(f"no {name} on the {side} side")
    random_ = random.Random(f"{name} {side}")
    chosen = sorted({1, total, *(random_.randint(1, total) for _ in range(places - 2))})
    for at in chosen:
        for lasting in (False, True):
            root = tmp_path / f"out-{at}-{lasting}"
            layer = FaultyLayer(model if side == "source" else root, name=name, at=at, code=errno.EIO, lasting=lasting)
            capsys.readouterr()
            code = job(command("convert", model, root), layer)
            said = capsys.readouterr()
            assert_nothing_wrong(root, wanted.files)
            assert code == 6 or (code == 0 and tree_digest(root) == wanted.digest), (name, at, layer.failed, code, said.err)
            assert "Traceback" not in said.err
            if code:
                assert layer.failed and json.loads(said.out.splitlines()[-1])["event"] == "error"
            with pytest.raises(SystemExit) as done:
                main(command("convert", model, root, "--resume"))
            assert not done.value.code and tree_digest(root) == wanted.digest
    print(f"proof: {2 * len(chosen)} errors of {name} on the {side} side, each clean and resumed")
