"""Generation for one sequence: prefill once, then a token at a time from the caches. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from mxconv.errors import UsageError
from mxconv.runtime.decoder import Decoder
from mxconv.runtime.linear import Activations
from mxconv.runtime.model import Model

FIRST_ROOM = 1024
"""Tokens that a slot has room for behind its prompt at first."""


def generate(
    model: Model, ids: Sequence[int], *, max_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0,
    seed: int | None = None, eos_ids: Collection[int] | None = None, activations: Activations = "quantized",
) -> Iterator[int]:  # fmt: skip
    """Yield up to `max_tokens` new token ids after the prompt `ids`, each as soon as it is known.

    `temperature` 0 takes the likeliest token; otherwise one is drawn from softmax(logits/temperature), cut to the fewest
    tokens whose probability reaches `top_p`. `seed` makes the draws repeatable. A token of `eos_ids` (None: the config's)
    ends the sequence and is not yielded. Raises UsageError for an empty prompt or a parameter out of range.
    """
    _check(ids, max_tokens, temperature, top_p)
    ends = frozenset(model.config.eos_token_ids if eos_ids is None else eos_ids)
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return _tokens(model, ids, max_tokens, ends, temperature, top_p, random, activations)


def _check(ids: Sequence[int], max_tokens: int, temperature: float, top_p: float) -> None:
    if not ids:
        raise UsageError("the prompt has no tokens")
    for name, value, good, expected in (
        ("max_tokens", max_tokens, max_tokens >= 0, "at least 0"),
        ("temperature", temperature, 0.0 <= temperature < float("inf"), "a finite number of at least 0"),
        ("top_p", top_p, 0.0 < top_p <= 1.0, "above 0 and at most 1"),
    ):
        if not good:
            raise UsageError(f"{name} is out of range", expected=expected, got=value)


def _tokens(
    model: Model, ids: Sequence[int], max_tokens: int, ends: frozenset[int], temperature: float, top_p: float,
    random: torch.Generator, activations: Activations,
) -> Iterator[int]:  # fmt: skip
    if model.capturable and temperature == 0.0:
        tokens = _likeliest(model, ids, activations)
    else:
        tokens = _chosen(model, ids, activations, lambda logits: choose(logits, temperature, top_p, random))
    for token in islice(tokens, max_tokens):
        if token in ends:
            return
        yield token


def _likeliest(model: Model, ids: Sequence[int], activations: Activations) -> Iterator[int]:
    """Greedy tokens on a GPU: they stay there from step to step, and each step runs while the caller has the token before it."""
    decoder = Decoder(model, room=len(ids) + FIRST_ROOM, activations=activations)
    decoder.start(0, ids)
    while True:
        token = int(decoder.tokens[0])
        decoder.step()
        yield token


def _chosen(model: Model, ids: Sequence[int], activations: Activations, choice: Callable[[Tensor], int]) -> Iterator[int]:
    """Tokens that `choice` makes of the logits [V]: over slots on a GPU, where a step is one graph, else over a cache."""
    logits = _by_slots(model, ids, activations) if model.capturable else _by_cache(model, ids, activations)
    token: int | None = None
    while True:
        token = choice(logits.send(token))
        yield token


def _by_cache(model: Model, ids: Sequence[int], activations: Activations) -> Generator[Tensor, int | None, None]:
    """Logits [V] after the prompt, then after each token that is sent."""
    cache = model.cache()
    step = torch.tensor([list(ids)], dtype=torch.int64)
    while True:
        with torch.inference_mode():
            logits = model(step, cache=cache, last=1, activations=activations)[0, -1]
        step = torch.tensor([[(yield logits)]], dtype=torch.int64)


def _by_slots(model: Model, ids: Sequence[int], activations: Activations) -> Generator[Tensor, int | None, None]:
    """The same over a slot."""
    decoder = Decoder(model, room=len(ids) + FIRST_ROOM, activations=activations)
    logits = decoder.start(0, ids)
    while True:
        token = yield logits
        if token is not None:
            decoder.tokens[0] = token
        logits = decoder.step()[0]


def choose(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """One token id from float32 `logits` [V]; draws on the CPU, so that a seed gives the same tokens on every device."""
    if temperature == 0.0:
        return int(logits.argmax())
    shares = torch.softmax(logits.cpu().to(torch.float64) / temperature, dim=-1)
    if top_p < 1.0:
        ordered, order = shares.sort(descending=True)
        # Kept: every token before which less than top_p has been gathered, so that at least one stays.
        kept = ordered.cumsum(0) - ordered < top_p
        shares = torch.zeros_like(shares).index_put((order[kept],), ordered[kept])
    return int(torch.multinomial(shares, 1, generator=random))
