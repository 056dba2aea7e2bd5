"""`mxconv generate`: text from a checkpoint or an artifact."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.draw import plural
from mxconv.errors import UsageError

if TYPE_CHECKING:
    from mxconv.console import Console
    from mxconv.runtime import Model

EPILOG = """\b
Examples:
  mxconv generate MiniMax-M1 --prompt "def fibonacci(n):"
  mxconv generate out --device cuda --prompt "def fibonacci(n):"
  mxconv generate out --chat --prompt "Why is the sky blue?" --temperature 0.8 --top-p 0.95 --seed 1
  cat prompt.txt | mxconv generate out --prompt -
"""


@click.command("generate", epilog=EPILOG)
@click.argument("folder", type=PATH)
@click.option("--prompt", required=True, help="The text to continue; - reads it from stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt through the chat template, as a user's message.")
@click.option("--max-tokens", type=click.IntRange(min=0), default=128, show_default=True, help="New tokens at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the fewest tokens that reach this probability.")
@click.option("--seed", type=int, default=None, help="Make the draws repeatable.")
@click.option(
    "--activations", type=click.Choice(["quantized", "none"]), default="quantized", show_default=True,
    help="Compute as serving kernels do, or with dequantized weights alone.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default=None,
    help="What is computed in (default: bfloat16 on cuda, as served; float32 on cpu).",
)
@click.option("--stream-weights", is_flag=True, help="Hold one layer and one expert at a time: for models larger than memory.")
@options("tp", "device")
def command(
    folder: Path, prompt: str, chat: bool, max_tokens: int, temperature: float, top_p: float, seed: int | None, activations: Any,
    dtype: str | None, stream_weights: bool, **flags: Any,
) -> int:  # fmt: skip
    """Generate text from the checkpoint or artifact in FOLDER, token by token as it is known.

    At the end stand the seconds until the first token, and the speed from the second on, when all is compiled: tokens a second, and
    the GB/s of weights and past that these read at least. -v also measures how fast the device copies: what part of that it is.
    """
    with session("generate", flags) as (settings, console):
        from mxconv.text import Tokenizer

        tokenizer = Tokenizer.open(folder)
        if tokenizer is None:
            raise UsageError("no tokenizer.json beside the model", where=folder, hint="copy the tokenizer files into the folder")
        text = sys.stdin.read() if prompt == "-" else prompt
        if chat:
            if tokenizer.chat is None:
                raise UsageError("the model has no chat template", where=folder, hint="leave out --chat")
            text = tokenizer.chat.render([{"role": "user", "content": text}])
        import torch

        from mxconv.runtime import generate, load

        chosen = getattr(torch, dtype or ("float32" if settings.device == "cpu" else "bfloat16"))
        model = load(folder, tp=settings.tp, device=settings.device, dtype=chosen, stream=stream_weights)
        ids = tokenizer.encode(text, special=not chat)
        made: list[int] = []
        decoder, pace = tokenizer.stream(), Pace(prompt_tokens=len(ids))
        for token in generate(
            model, ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, eos_ids=tokenizer.eos_ids or None,
            activations=activations,
        ):  # fmt: skip
            pace.came.append(time.monotonic())
            made.append(token)
            console.fragment(decoder.push(token))
        console.fragment(decoder.flush())
        console.line()
        seconds = time.monotonic() - pace.began
        console.document(
            "generate",
            {
                "prompt": text, "text": tokenizer.decode(made), "ids": made, "prompt_ids": ids, "seconds": seconds,
                **pace.tell(model, console),
            },
        )  # fmt: skip
        return 0


@dataclass(slots=True, kw_only=True)
class Pace:
    """When the tokens after a prompt came.

    The prompt is over with the first. Steps are timed from the second on: the first step compiles kernels and captures a graph.
    """

    prompt_tokens: int
    began: float = field(default_factory=time.monotonic)
    came: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float | None:
        """The mean of the steps behind the second token; None without any."""
        return (self.came[-1] - self.came[1]) / (len(self.came) - 2) if len(self.came) > 2 else None

    def tell(self, model: Model, console: Console) -> dict[str, float | None]:
        """Say it in a note, and give it for JSON; seconds, tokens and bytes a second."""
        first = self.came[0] - self.began if self.came else None
        words = f"{plural(len(self.came), 'token')} after {self.prompt_tokens}"
        words += "" if first is None else f": the first in {first:.2f} s"
        rates: dict[str, float | None] = {"first_token_seconds": first, "tokens_per_second": None, "bytes_per_second": None}
        step = self.step_seconds
        if not step:
            console.note(words)
            return rates
        from mxconv.bench.ceilings import copy_rate
        from mxconv.bench.costs import Cut

        context = self.prompt_tokens + len(self.came) // 2
        moved = len(model.group.ranks) * Cut.of(model).step_bytes(1, context) / step
        console.note(f"{words}, then {1 / step:,.0f} tokens/s, {moved / 1e9:,.1f} GB/s")
        rates |= {"tokens_per_second": 1 / step, "bytes_per_second": moved}
        if console.verbose:
            try:
                copy = copy_rate(model.device)
            except MemoryError:
                console.detail("there is no memory left to measure a copy with")
                return rates
            console.detail(f"{moved / copy:.2f} of a copy's {copy / 1e9:,.0f} GB/s")
            rates |= {"copy_bytes_per_second": copy, "of_copy": moved / copy}
        return rates
