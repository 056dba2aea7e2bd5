"""No code of a checkpoint runs and no path of it leads out: every job watched by an audit hook in a process of its own."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.synthetic import make_checkpoint

MARKER = "canary_5f1c0de"
INDEX = "model.safetensors.index.json"


def watched(tmp_path: Path, source: Path, jobs: list[list[str]]) -> list[dict[str, Any]]:
    """What each of `jobs` did that it must not; output and temporary files may go to `tmp_path`/work."""
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"jobs": jobs, "source": str(source), "write": [str(work)], "marker": MARKER}))
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(work), "PYTHONDONTWRITEBYTECODE": "1", "CI": "true",
        "TORCHINDUCTOR_CACHE_DIR": str(work), "TRITON_CACHE_DIR": str(work),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.audited", str(spec)], capture_output=True, text=True, timeout=300, check=False,
        cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


class Bomb:
    """What a hostile pickle holds: unpickling it calls os.system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch /tmp/{MARKER}",)


def booby_trapped(demo: Path, folder: Path) -> Path:
    """The demo model with remote code, pickles, a sitecustomize and the marker in everything that might be run by mistake."""
    root = Path(shutil.copytree(demo, folder))
    for path in root.iterdir():
        path.chmod(0o644)
    code = f"raise SystemExit('{MARKER}')\n"
    for name in ("modeling_minimax_m1", "configuration_minimax_m1", "__init__", "sitecustomize", "torch", "numpy"):
        (root / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "statistics.pkl"):
        (root / name).write_bytes(pickle.dumps(Bomb()))
    config = json.loads((root / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_minimax_m1.C", "AutoModelForCausalLM": "modeling_minimax_m1.M"}
    (root / "config.json").write_text(json.dumps(config))
    return root


def test_every_job_stays_inside_and_runs_nothing(demo: Path, tmp_path: Path) -> None:
    source, work = booby_trapped(demo, tmp_path / "source"), tmp_path / "work"
    verify = ["--source", str(source), "--windows", "1", "--window", "16"]
    jobs = [
        ["inspect", str(source)],
        ["check", str(source)],
        ["convert", str(source), str(work / "converted"), "--tp", "2"],
        ["convert", str(work / "converted"), str(work / "again")],
        ["convert", str(source), str(work / "hf"), "--layout", "minimax"],
        ["quantize", str(source), str(work / "quantized")],
        ["calibrate", str(source), str(work / "statistics")],
        ["quantize", str(source), str(work / "static"), "--scheme", "w4a8", "--statistics", str(work / "statistics")],
        ["check", str(work / "quantized")],
        ["diff", str(source), str(work / "quantized")],
        ["verify", str(work / "quantized"), *verify],
        ["generate", str(source), "--prompt", "def f(", "--max-tokens", "2"],
    ]
    for arguments, result in zip(jobs, watched(tmp_path, source, jobs), strict=True):
        assert result["violations"] == [], (arguments, result["violations"][:5])
        assert result["code"] == (8 if arguments[0] == "diff" else 0), (arguments, result)
        assert result["events"] > 10
    assert not Path(f"/tmp/{MARKER}").exists()


def strings(count: int) -> list[str]:
    """Paths that lead out of a folder, or try to: parts that mean something to somebody, put together in any order."""
    draw = random.Random(200)
    parts = [
        "..", ".", "", "/", "//", "\\", "..\\", "~", "~root", "C:", "%2e%2e", "%2f", "\0", "\n", "\x1b[2J", "etc", "passwd", "proc",
        "self", "mem", "dev", "zero", "a" * 300, "\u202e", "\u2215", "\uff0e\uff0e", "file:", "http:", "$HOME", "`id`", "*", " ",
    ]  # fmt: skip
    fixed = ["/etc/passwd", "../../../../etc/passwd", "/dev/zero", "/proc/self/mem", "//host/share", "file:///etc/passwd", ".."]
    made = ["/".join(draw.choices(parts, k=draw.randrange(1, 6))) for _ in range(10 * count)]
    return list(dict.fromkeys([*fixed, *made]))[:count]


@pytest.mark.parametrize("count", [200, pytest.param(2_000, marks=pytest.mark.thorough)])
def test_no_path_string_of_an_index_leads_out(count: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=64, intermediate=64, layers="l", experts=2, files=2)
    right = json.loads((source / INDEX).read_text())
    name = sorted(right["weight_map"])[3]
    folders, jobs = tmp_path / "source" / "variants", []
    for number, path in enumerate(strings(count)):
        folder = folders / str(number)
        folder.mkdir(parents=True)
        for file in source.glob("*.*"):
            if file.is_file() and file.name != INDEX:
                os.link(file, folder / file.name)
        (folder / INDEX).write_text(json.dumps({**right, "weight_map": {**right["weight_map"], name: path}}))
        jobs.append(["convert", str(folder), str(tmp_path / "work" / "out")])
    results = watched(tmp_path, source, jobs)
    assert len(results) == count
    for arguments, result, path in zip(jobs, results, strings(count), strict=True):
        assert result["violations"] == [], (path, result["violations"])
        # 4: a name that stays inside and that no file has
        inside = path.isprintable() and os.path.normpath(f"/f/{path}") == f"/f/{path}" and not path.startswith("/")
        assert result["code"] == 3 or (inside and result["code"] == 4), (path, arguments, result)
    assert sum(result["code"] == 3 for result in results) > 0.7 * count
    assert not (tmp_path / "work" / "out").exists()
    print(f"proof: {count:,} path strings, none led out")


def test_the_hook_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Each kind of violation is reported when it happens."""
    code = """
import json, os, pickle, socket, sys
from pathlib import Path
from tests.faults.audited import Watch
root = Path(sys.argv[1]); source = root / "source"; work = root / "work"
source.mkdir(); work.mkdir(); (source / "m.py").write_text("x = 'canary'"); (root / "outside").write_text("x")
watch = Watch(str(source), [str(work)], "canary"); sys.addaudithook(watch); watch.on = True
open(root / "outside").close(); open(source / "new", "w").close(); open(work / "fine", "w").close(); open(source / "m.py").close()
exec(compile("x = 'canary'", "<string>", "exec"))
pickle.loads(pickle.dumps(os.getcwd)); socket.socket().close(); os.rename(work / "fine", root / "moved"); os.system("true")
sys.path.insert(0, str(source)); import m
watch.on = False
print(json.dumps([event for event, _ in watch.violations]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    seen = json.loads(done.stdout)
    expected = {"open", "open for writing", "compile", "exec", "pickle.find_class", "socket.__new__", "os.rename", "os.system"}
    assert expected <= set(seen), seen
    assert seen.count("open") == 1 and seen.count("open for writing") == 1
