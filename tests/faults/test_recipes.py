"""The pipeline recipes: the shell one run for real on the demo model, the workflow read as what it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import REPOSITORY
from tests.faults.inprocess import run as in_process

PIPELINE = REPOSITORY / "recipes" / "pipeline.sh"


def pipeline(source: Path, out: Path, reports: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PIPELINE), str(source), str(out), str(reports)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CI": "true", "MXCONV": f"{sys.executable} -m mxconv",
             "VERIFY": "--windows 1 --window 64", **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def released(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(root, artifact, reports) of a pipeline that passed and uploaded."""
    root = tmp_path_factory.mktemp("released")
    upload = root / "upload.sh"
    upload.write_text('#!/bin/sh\ncp -r "$1" "$2" "$(dirname "$0")/uploaded/"\n')
    upload.chmod(0o755)
    (root / "uploaded").mkdir()
    (root / "reports").mkdir()
    for name in ("verify.xml", "manifest.sig", "SHA256SUMS", "mine.txt"):
        (root / "reports" / name).write_text("of an earlier run")
    result = pipeline(demo, root / "out", root / "reports", UPLOAD=str(upload), SCHEME="block_wise_fp8")
    assert result.returncode == 0, result.stderr
    return root, root / "out", root / "reports"


def test_it_leaves_manifest_and_reports(released: tuple[Path, Path, Path]) -> None:
    root, out, reports = released
    assert (reports / "manifest.json").read_bytes() == (out / "manifest.json").read_bytes()
    assert json.loads((reports / "check.json").read_text())["ok"] is True
    assert json.loads((reports / "verify.json").read_text())["schema"] == "mxconv.verify"
    report = ElementTree.parse(reports / "verify.xml")
    assert len(report.findall(".//testcase")) > 3 and not report.findall(".//failure")
    assert json.loads((reports / "run.jsonl").read_text().splitlines()[-1])["event"] == "result"
    sums = dict(reversed(line.split("  ./")) for line in (reports / "SHA256SUMS").read_text().splitlines())
    stated = {path: fact["sha256"] for path, fact in json.loads((out / "manifest.json").read_text())["files"].items()}
    assert sums == {**stated, "manifest.json": hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()}
    assert not (reports / "manifest.sig").exists() and (reports / "mine.txt").exists(), "only an earlier run's reports go"
    assert (out / "run.log").exists() and not (root / "uploaded" / "out" / "run.log").exists(), "run.log names the machine"
    assert in_process("check", root / "uploaded" / "out").code == 0 and not list(root.glob(".*"))
    assert (root / "uploaded" / "out" / "manifest.json").exists() and (root / "uploaded" / "reports" / "verify.xml").exists()


def test_a_source_that_is_not_whole_ends_it_with_its_code_and_uploads_nothing(demo: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo, tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size - 1)
    result = pipeline(source, tmp_path / "out", tmp_path / "reports", UPLOAD=f"touch {tmp_path}/uploaded")
    assert result.returncode == 4 and "truncated" in result.stderr
    assert not (tmp_path / "uploaded").exists() and not (tmp_path / "out").exists()
    assert "truncated" in json.loads((tmp_path / "reports" / "inspect.json").read_text())["problems"][0]["what"]


def test_a_spoiled_artifact_ends_it_with_8(released: tuple[Path, Path, Path], demo: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(released[1], tmp_path / "out"))
    shard = next(out.rglob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    shutil.copytree(released[2], tmp_path / "reports")
    result = pipeline(demo, out, tmp_path / "reports", UPLOAD=f"touch {tmp_path}/uploaded", SCHEME="block_wise_fp8")
    assert result.returncode == 8 and not (tmp_path / "uploaded").exists()
    assert not (tmp_path / "reports" / "verify.xml").exists(), "an earlier run's verdict must not stand beside a failure"


def test_the_workflow_runs_the_same_script() -> None:
    text = (REPOSITORY / "recipes" / "github-actions.yml").read_text()
    assert 'recipes/pipeline.sh "$SOURCE" "$OUTPUT" "$REPORTS"' in text and "upload-artifact" in text
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["release"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step), "pinned by commit"
    assert "pipeline.sh" in text.split("name: release")[0], "the script that a step runs must be copied too"
    assert workflow["permissions"] == {"contents": "read"}
    # what a user types reaches the shell as an environment variable, never as text of the script
    assert not any("${{ inputs" in step.get("run", "") for step in steps)
