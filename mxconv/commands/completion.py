"""`mxconv completion`: the script that a shell evaluates."""

from __future__ import annotations

import click

from mxconv.completion import SHELLS, completion_script


@click.command("completion", epilog='\b\nExample:\n  eval "$(mxconv completion bash)"')
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> int:
    """Print the completion script for SHELL."""
    group = click.get_current_context().find_root().command
    click.echo(completion_script(group, shell))
    return 0
