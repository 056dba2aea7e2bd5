"""Triton kernels in Triton's interpreter, on machines without a GPU.

The interpreter is chosen when triton is imported, so that it needs a process of its own. In a test file:

    test_in_the_interpreter = under_interpreter(__file__)       # runs this file's tests below in such a process

    @interpreted
    def test_kernel() -> None: ...                              # only runs there; float16 or float32 (bf16 `tl.dot` is wrong there)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside test_in_the_interpreter")


def under_interpreter(file: str, seconds: int = 120) -> Callable[[], None]:
    """A test that runs the `interpreted` tests of `file` in a process with the interpreter and without a GPU; all must pass."""

    @pytest.mark.skipif(INTERPRETING, reason="runs in the interpreter already")
    def test() -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]
        run = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]

    return test
