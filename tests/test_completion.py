"""Completion scripts are what the shells take."""

from __future__ import annotations

import shutil
import subprocess

import click
import pytest

from mxconv.completion import SHELLS, completion_script
from mxconv.errors import UsageError


@click.group()
def tree() -> None:
    """A command tree."""


@pytest.mark.parametrize("shell", SHELLS)
def test_script(shell):
    script = completion_script(tree, shell)
    assert "_MXCONV_COMPLETE" in script and "mxconv" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_unknown_shell():
    with pytest.raises(UsageError, match="bash or zsh or fish"):
        completion_script(tree, "tcsh")
