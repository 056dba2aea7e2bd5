"""`mxconv generate`: text from a checkpoint or an artifact."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from mxconv.commands.common import PATH, options, session
from mxconv.errors import UsageError

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
    """Generate text from the checkpoint or artifact in FOLDER, token by token as it is known."""
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
        began, made = time.monotonic(), []
        decoder = tokenizer.stream()
        for token in generate(
            model, ids, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, eos_ids=tokenizer.eos_ids or None,
            activations=activations,
        ):  # fmt: skip
            made.append(token)
            console.fragment(decoder.push(token))
        console.fragment(decoder.flush())
        console.line()
        seconds = time.monotonic() - began
        console.note(f"{len(made)} tokens after {len(ids)} in {seconds:.1f} s, {len(made) / max(seconds, 1e-9):.0f} tokens/s")
        console.document(
            "generate",
            {"prompt": text, "text": tokenizer.decode(made), "ids": made, "prompt_ids": ids, "seconds": seconds},
        )  # fmt: skip
        return 0
