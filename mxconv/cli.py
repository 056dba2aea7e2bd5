"""The command line: parse → call → render. Importing this costs a click import; everything else waits for its command."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping

import click

from mxconv.version import VERSION

# command → (module of `mxconv.commands`, one line of help), in the order in which a user meets them
COMMANDS: Mapping[str, tuple[str, str]] = {
    "inspect": ("inspect", "Say what a checkpoint is, whether it fits, and what a conversion would do."),
    "convert": ("convert", "Write a checkpoint in another layout, every value kept; or take an artifact back."),
    "quantize": ("quantize", "Write tensor-parallel shards with the routed experts quantized."),
    "calibrate": ("calibrate", "Measure activation scales for the static schemes, as a file."),
    "verify": ("verify", "Run an artifact against its source; exits 8 when it is wrong."),
    "check": ("check", "Check the integrity of an artifact or checkpoint against its manifest or headers."),
    "diff": ("diff", "Compare two checkpoints or artifacts weight by weight, across layouts; exits 8 when they differ."),
    "generate": ("generate", "Generate text from a checkpoint or an artifact."),
    "bench": ("bench", "Measure decode, prefill, experts or the quantizer beside the machine's ceilings."),
    "demo": ("demo", "Inspect, quantize, verify and generate with the bundled model, in under a minute."),
    "completion": ("completion", "Print the shell completion script."),
}

EPILOG = """\b
Examples:
  mxconv inspect  MiniMax-M1 --scheme w4afp8 --tp 8
  mxconv quantize MiniMax-M1 out --scheme w4afp8 --tp 8
  mxconv verify   out --source MiniMax-M1
  mxconv convert  out-bf16 MiniMax-M1-again
\b
Exit codes: 0 ok, 1 our bug, 2 usage, 3 malformed input, 4 incomplete input, 5 output conflict, 6 resource,
7 numeric failure, 8 integrity or verification failed, 130/143 interrupted.
"""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for; the help text needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported; None for a name that is not in the table."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"mxconv.commands.{COMMANDS[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])


@click.group(
    cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)  # fmt: skip
@click.version_option(VERSION, prog_name="mxconv")
def cli() -> None:
    """Convert MiniMax-M1 checkpoints to low-bit tensor-parallel shards, and prove the result right."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    if "_MXCONV_COMPLETE" in os.environ:
        cli(prog_name="mxconv")
    try:
        outcome = cli.main(args=arguments, prog_name="mxconv", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2 if isinstance(error, click.UsageError) else error.exit_code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: interrupted", err=True)
        sys.exit(130)
    sys.exit(outcome if isinstance(outcome, int) else 0)
