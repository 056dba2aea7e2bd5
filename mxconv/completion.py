"""Shell completion: the script that a shell evaluates, made by click for our command tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mxconv.errors import UsageError

if TYPE_CHECKING:
    import click

SHELLS = ("bash", "zsh", "fish")


def completion_script(command: click.Command, shell: str, *, program: str = "mxconv") -> str:
    """The completion script of `program` for `shell`: `eval "$(mxconv completion bash)"`. Raises UsageError for another shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell) if shell in SHELLS else None
    if kind is None:
        raise UsageError(f"no completion for shell {shell!r}", expected=" or ".join(SHELLS))
    return kind(command, {}, program, f"_{program.upper()}_COMPLETE").source()
