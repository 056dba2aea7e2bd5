"""Data flows one way: lower rooms do not import upper ones, and what must be light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mxconv"

# A room may import rooms of its own level and below. A new file at the top must be put somewhere on purpose.
LEVELS = {
    "errors": 0, "version": 0, "apart": 0,
    "tensors": 1, "progress": 1, "jsonfiles": 1, "config": 1, "checkpoint": 1, "parsing": 1, "draw": 1, "documents": 1, "data": 1,
    "placement": 2, "mapping": 2, "dispatch": 2, "membership": 2,
    "quantize": 3, "runtime": 3, "artifact": 3, "text": 3, "chat": 3, "meter": 3,
    "source": 4, "plan": 4, "calibrate": 4, "settings": 4,
    "execute": 5,
    "verify": 6, "inspection": 6, "comparison": 6,
    "console": 6, "completion": 6, "demo": 7, "bench": 7, "commands": 8, "cli": 9, "__main__": 10, "__init__": 10,
}  # fmt: skip
# The judge and what it judges do not share code.
FORBIDDEN = {"runtime": {"mapping", "plan", "execute", "artifact", "source"}, "verify": {"mapping", "plan", "execute", "source"}}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "mxconv" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mxconv.")}
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_lies_below(path: Path) -> None:
    room = room_of(path)
    assert room in LEVELS, f"{room} has no level"
    for other in imported_rooms(path) - {room}:
        assert LEVELS[other] <= LEVELS[room], f"{room} imports {other}, a room above it"
        assert other not in FORBIDDEN.get(room, set()), f"{room} must not know {other}"


def test_the_runtime_knows_of_quantize_only_the_scheme_table() -> None:
    for path in [p for p in FILES if room_of(p) in ("runtime", "verify")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mxconv.quantize"):
                assert node.module == "mxconv.quantize.schemes", f"{path}: {node.module}"


@pytest.mark.parametrize("module", ["mxconv", "mxconv.cli", "mxconv.plan", "mxconv.source", "mxconv.checkpoint"])
def test_planning_and_help_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(int(any(m in sys.modules for m in ('torch', 'transformers', 'triton'))))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, timeout=60, check=False).returncode == 0
