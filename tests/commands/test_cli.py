"""The command line as a user types it: what it prints, where, and the exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mxconv.cli import COMMANDS
from tests.synthetic import make_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def mxconv(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mxconv", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False, cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "model", hidden=128, intermediate=256)


def test_help_names_every_command_and_imports_none() -> None:
    result = mxconv("--help")
    assert result.returncode == 0
    for word in (*COMMANDS, "Exit codes"):
        assert word in result.stdout
    code = (
        "import sys; from mxconv.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(m.startswith('mxconv.commands.') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "command", ["inspect", "convert", "quantize", "calibrate", "verify", "check", "diff", "generate", "bench", "demo", "completion"]
)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = mxconv(command, "--help")
    assert result.returncode == 0 and "Example" in result.stdout


def test_inspect_says_what_it_is(source: Path) -> None:
    result = mxconv("inspect", source, "--scheme", "w4afp8", "--tp", "2")
    assert result.returncode == 0
    assert "3 layers (2 lightning, 1 softmax)" in result.stdout and "→ int4 g128" in result.stdout
    assert "tp 1 2 ok" in result.stdout
    document = json.loads(mxconv("inspect", source, "--scheme", "w4afp8", "--tp", "2", "--json").stdout)
    assert document["schema"] == "mxconv.inspect" and document["plan"]["tp"] == 2
    assert document["summary"]["tensors"] == sum(group["tensors"] for group in document["groups"])


def test_inspect_of_a_tp_that_does_not_divide_names_those_that_do(source: Path) -> None:
    result = mxconv("inspect", source, "--scheme", "w4afp8", "--tp", "4")
    assert result.returncode == 2 and "tp 1 or 2" in result.stderr


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    result = mxconv("quantize", source, tmp_path / "out", "--dry-run", "--plan", plan)
    assert result.returncode == 0 and not (tmp_path / "out").exists()
    document = json.loads(plan.read_text())
    assert document["placement"]["tp"] == 1 and document["units"]


@pytest.mark.parametrize(("command", "memory"), [("quantize", "398"), ("convert", "182")])
def test_a_run_says_what_it_needs_before_its_first_byte(source: Path, tmp_path: Path, command: str, memory: str) -> None:
    told = mxconv(command, source, tmp_path / "out", "--workers", "1", "--json").stdout
    events = [json.loads(line) for line in told.splitlines()]
    kinds = [event["event"] for event in events]
    said = [event["text"] for event in events[: kinds.index("start")] if event["event"] == "note"]
    needs = next(text for text in said if text.startswith("needs: "))
    assert f"memory about {memory}." in needs and "with 1 workers" in needs and "(free: " in needs and "disk " in needs


def test_a_run_reports_and_refuses_to_repeat_itself(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = mxconv("quantize", source, out, "--tp", "2", "--json")
    events = [json.loads(line) for line in first.stdout.splitlines()]
    assert first.returncode == 0 and events[-1]["event"] == "result" and events[-1]["units"] == 46
    assert {event["event"] for event in events} >= {"start", "file", "result"}
    again = mxconv("quantize", source, out, "--tp", "2")
    assert again.returncode == 5 and "--resume" in again.stderr
    assert mxconv("quantize", source, out, "--tp", "2", "--resume").returncode == 0
    assert mxconv("quantize", source, out, "--tp", "1", "--resume").returncode == 5
    assert mxconv("quantize", source, out, "--tp", "1", "--overwrite").returncode == 0
    assert mxconv("check", out).returncode == 0


def test_quiet_is_quiet_and_errors_are_not(source: Path, tmp_path: Path) -> None:
    result = mxconv("convert", source, tmp_path / "out", "-q")
    assert result.returncode == 0 and result.stderr == ""
    result = mxconv("convert", source, tmp_path / "out", "-q")
    assert result.returncode == 5 and "error:" in result.stderr


def test_settings_come_from_file_and_environment(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mxconv.toml").write_text('[quantize]\nscheme = "block_wise_fp8"\ntp = 2\n')
    document = json.loads(mxconv("quantize", source, "out", "--dry-run", "--json", cwd=tmp_path).stdout)
    assert document["plan"]["scheme"] == "block_wise_fp8" and document["plan"]["tp"] == 2
    document = json.loads(mxconv("quantize", source, "out", "--dry-run", "--json", cwd=tmp_path, MXCONV_TP="1").stdout)
    assert document["plan"]["tp"] == 1
    result = mxconv("quantize", source, "out", "--dry-run", cwd=tmp_path, MXCONV_TP="two")
    assert result.returncode == 2 and "MXCONV_TP" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["frobnicate"], 2, "frobnicate"),
        (["quantize", "{source}", "{out}", "--scheme", "w3"], 2, "w4afp8"),
        (["quantize", "{source}", "{out}", "--tp", "x"], 2, "tp"),
        (["quantize", "{source}", "{out}", "--group-size", "100"], 2, "multiple of 128"),
        (["quantize", "{source}", "{out}", "--memory", "1M"], 6, "--memory"),
        (["quantize", "{source}", "{out}", "--memory", "lots"], 2, "memory"),
        (["quantize", "{source}", "{out}", "--calibration", "x.npy"], 2, "calibration"),
        (["quantize", "{source}", "{out}", "--scheme", "w4a8"], 2, "--calibration ids.npy"),
        (["quantize", "{source}", "{out}", "--ignore", "nothing*"], 2, "nothing*"),
        (["quantize", "{source}", "{out}", "--ignore", "*experts.0.*"], 2, "whole layers"),
        (["quantize", "{source}", "{source}/out"], 2, "inside the source"),
        (["convert", "{source}", "{out}", "--layout", "gguf"], 2, "fastdeploy"),
        (["convert", "{source}", "{out}", "--layout", "minimax", "--tp", "2"], 2, "no tensor-parallel ranks"),
        (["convert", "{out}", "{out}2"], 4, "config.json"),
        (["inspect", "{out}"], 4, "config.json"),
        (["check", "{out}"], 4, "missing"),
        (["quantize", "{source}", "{out}", "--dry-run", "--resume"], 2, "--dry-run"),
        (["generate", "{source}", "--prompt", "x"], 2, "tokenizer"),
    ],
)
def test_mistakes_get_their_exit_code_and_a_useful_message(
    source: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    result = mxconv(*(a.replace("{source}", str(source)).replace("{out}", str(tmp_path / "out")) for a in arguments))
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_json_errors_are_documents(tmp_path: Path) -> None:
    result = mxconv("inspect", tmp_path / "nothing", "--json")
    document = json.loads(result.stdout)
    assert result.returncode == 4 and document["schema"] == "mxconv.error" and document["problems"][0]["exit_code"] == 4


def test_a_static_scheme_calibrates_on_ids_and_takes_statistics(source: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(0, 128, (2, 100)))
    assert mxconv("quantize", source, tmp_path / "direct", "--scheme", "w4a8", "--calibration", ids).returncode == 0
    assert mxconv("calibrate", source, tmp_path / "statistics", "--calibration", ids).returncode == 0
    result = mxconv("quantize", source, tmp_path / "given", "--scheme", "w4a8", "--statistics", tmp_path / "statistics")
    assert result.returncode == 0, result.stderr
    for name in ("statistics.json", "calibration.npy", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "direct" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    other = make_checkpoint(tmp_path / "other", hidden=128, intermediate=256, layers="sl", experts=2)
    result = mxconv("quantize", other, tmp_path / "wrong", "--scheme", "w4a8", "--statistics", tmp_path / "statistics")
    assert result.returncode == 3 and "another checkpoint" in result.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_within_seconds_and_it_resumes_to_the_same_bytes(tmp_path: Path, number: int, code: int) -> None:
    shape: dict[str, Any] = {"hidden": 256, "intermediate": 1024, "layers": "lslsls", "experts": 8}
    source = make_checkpoint(tmp_path / "source", **shape)
    arguments = ["quantize", str(source), "--scheme", "block_wise_fp8", "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true"}
    process = subprocess.Popen(
        [sys.executable, "-m", "mxconv", *arguments, str(tmp_path / "out"), "--json"], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    journal = tmp_path / "out" / ".mxconv.journal"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size > 2000):
        time.sleep(0.01)
    process.send_signal(number)
    began = time.monotonic()
    _, chatter = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code, chatter
    assert "--resume" in chatter
    assert not (tmp_path / "out" / "manifest.json").exists()
    result = mxconv(*arguments, tmp_path / "out", "--resume", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["done_before"] > 0
    clean = mxconv(*arguments, tmp_path / "clean")
    assert clean.returncode == 0
    names = sorted(
        p.relative_to(tmp_path / "clean") for p in (tmp_path / "clean").rglob("*") if p.name != "run.log" and p.is_file()
    )
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes(), name
