"""What two models' next-token distributions say about each other, as numbers.

For each scored token: p the reference's distribution over the vocabulary, q the other's, t the token that really follows.

    KL            Σ p·(log p − log q), in nats; never below 0
    Δp            q(t) − p(t)
    top-1, top-5  whether both have the same most probable token; the share of p's five most probable tokens among q's five
    perplexity    exp(mean −log p(t)); its change is perplexity(q)/perplexity(p) − 1

Means come with a standard error over *windows*, since tokens of a window depend on each other (over tokens when there is one
window). Quantiles are over tokens, linearly interpolated.

METRICS_VERSION, raised whenever a number would come out otherwise on the same logits:
    1   the first
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

METRICS_VERSION = 1
QUANTILES = (0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    def document(self) -> dict[str, float]:
        """JSON values."""
        return {"mean": self.mean, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A quantity over all scored tokens. `quantiles`: share of tokens at or below → value."""

    mean: Estimate
    rms: float
    largest: float
    smallest: float
    quantiles: Mapping[float, float]

    @property
    def median(self) -> float:
        """Half of the tokens are at or below it."""
        return self.quantiles[0.5]

    def document(self) -> dict[str, Any]:
        """JSON values; quantiles in percent."""
        return {
            **self.mean.document(), "rms": self.rms, "max": self.largest, "min": self.smallest,
            "quantiles": {f"{100 * share:g}%": value for share, value in self.quantiles.items()},
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Float64 [windows, tokens] of one pair of models: what is known of each scored token."""

    kl: Tensor
    reference_logp: Tensor
    """log p(t)."""
    other_logp: Tensor
    top1: Tensor
    """1.0 where both have the same most probable token."""
    top5: Tensor
    """Share of the reference's five most probable tokens among the other's five."""
    error_squares: Tensor
    """Σ over the vocabulary of (logit − reference logit)²."""
    reference_squares: Tensor
    """Σ over the vocabulary of the reference's logits squared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """A pair of models on the scored tokens."""

    windows: int
    tokens: int
    kl: Distribution
    delta_p: Distribution
    top1: Estimate
    top5: Estimate
    reference_perplexity: float
    perplexity: float
    perplexity_change: Estimate
    logits_l2: float
    """Relative L2 distance of all logits."""
    window_l2: tuple[float, ...]

    def document(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "windows": self.windows, "tokens": self.tokens, "kl": self.kl.document(), "delta_p": self.delta_p.document(),
            "top1": self.top1.document(), "top5": self.top5.document(), "reference_perplexity": self.reference_perplexity,
            "perplexity": self.perplexity, "perplexity_change": self.perplexity_change.document(), "logits_l2": self.logits_l2,
        }  # fmt: skip


def estimate(values: Tensor) -> Estimate:
    """Mean of float64 [windows, tokens] with its standard error over windows (over tokens for a single window)."""
    means = values.mean(1) if len(values) > 1 else values.flatten()
    count = len(means)
    error = float(means.std(correction=1)) / count**0.5 if count > 1 else 0.0
    return Estimate(mean=float(values.mean()), error=error)


def distribution(values: Tensor) -> Distribution:
    """Of float64 [windows, tokens]; everything is NaN when one value is."""
    flat = values.flatten().sort().values
    position = torch.tensor(QUANTILES, dtype=torch.float64) * (len(flat) - 1)
    low = position.floor().long()
    high = position.ceil().long()
    found = torch.lerp(flat[low], flat[high], position - low) + (flat.sum() * 0)
    return Distribution(
        mean=estimate(values), rms=float(flat.square().mean().sqrt()), largest=float(flat.max()), smallest=float(flat.min()),
        quantiles=dict(zip(QUANTILES, found.tolist(), strict=True)),
    )  # fmt: skip


def summarize(scores: TokenScores) -> Metrics:
    """The numbers of one pair."""
    reference, other = scores.reference_logp, scores.other_logp
    change = estimate(reference - other)  # of log perplexity
    growth = float(torch.tensor(change.mean, dtype=torch.float64).expm1())
    window = (scores.error_squares.sum(1) / scores.reference_squares.sum(1)).sqrt()
    return Metrics(
        windows=scores.kl.shape[0], tokens=scores.kl.numel(), kl=distribution(scores.kl),
        delta_p=distribution(other.exp() - reference.exp()), top1=estimate(scores.top1), top5=estimate(scores.top5),
        reference_perplexity=float((-reference.mean()).exp()), perplexity=float((-other.mean()).exp()),
        perplexity_change=Estimate(mean=growth, error=(1 + growth) * change.error),
        logits_l2=float((scores.error_squares.sum() / scores.reference_squares.sum()).sqrt()), window_l2=tuple(window.tolist()),
    )  # fmt: skip
