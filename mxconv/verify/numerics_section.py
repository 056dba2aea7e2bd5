"""The `numerics` section: what the pass over the weights measured, in words."""

from __future__ import annotations

from collections.abc import Sequence

from mxconv.draw import plural
from mxconv.runtime.loader import split_expert
from mxconv.verify.findings import Section, status_of
from mxconv.verify.limits import Limits
from mxconv.verify.weights_pass import Measured, Outcome

CHECKS = (
    "unquantized weights", "usable weights", "decay rates", "weight codes", "weight scale", "weight rounding", "weight noise",
    "activation scales",
)  # fmt: skip


def numerics_section(outcome: Outcome, limits: Limits, factor: float | None) -> Section:
    """`factor`: the largest between a stored activation scale and the absmax gathered again; None without any."""
    figures: dict[str, object] = {"weights": outcome.weights, "activation_factor": factor}
    quantized = {(measured.layer, measured.name) for measured in outcome.measured}
    lines = [f"{outcome.weights:,} weights in every rank, of which {len(quantized):,} quantized"]
    summary, limit = "every weight equal to its source, bit for bit", ""
    if outcome.numerics:
        first = outcome.numerics[0]
        summary = f"{plural(len(outcome.numerics), 'finding')} in {outcome.weights:,} weights: {first.where or first.what}"
    if outcome.measured:
        worst = max(outcome.measured, key=lambda m: m.deviation.rel_rms / max(m.deviation.bound, 1e-300))
        if not outcome.numerics:
            summary = f"worst rel-rms {worst.deviation.rel_rms:.3f}  {words(worst)}"
            limit = f"{worst.deviation.bound * limits['rounding']:.3f}"
        projections = _by_projection(outcome.measured)
        figures |= {"worst": _document(worst), "projections": projections, "layers": _by_layer(outcome.measured)}
        lines += [_line(name, values) for name, values in projections.items()]
        lines.append(f"largest distance of a weight: {max(m.deviation.peak for m in outcome.measured):.4f} half steps")
    if factor is not None:
        bar = limits["activation_factor"]
        lines.append(f"activation scales within a factor of {factor:.3f} of the absmax gathered again (limit {bar:g})")
    return Section(
        name="numerics", status=status_of(outcome.numerics), summary=summary, limit=limit, lines=tuple(lines),
        findings=tuple(outcome.numerics), checks=CHECKS, figures=figures,
    )  # fmt: skip


def words(measured: Measured) -> str:
    """`layers.7 expert 12 down rank 3`."""
    projection, expert = split_expert(measured.name)
    return f"layers.{measured.layer} expert {expert} {projection} rank {measured.rank}"


def _document(measured: Measured) -> dict[str, object]:
    deviation = measured.deviation
    return {
        "layer": measured.layer, "name": measured.name, "rank": measured.rank, "rel_rms": deviation.rel_rms,
        "bound": deviation.bound, "peak": deviation.peak,
    }  # fmt: skip


def _by_projection(measured: Sequence[Measured]) -> dict[str, dict[str, float]]:
    """up_gate and down → mean, largest rel-rms and its mean share of the bound."""
    found: dict[str, list[Measured]] = {}
    for each in measured:
        found.setdefault(split_expert(each.name)[0], []).append(each)
    return {
        name: {
            "mean": sum(m.deviation.rel_rms for m in values) / len(values),
            "max": max(m.deviation.rel_rms for m in values),
            "share_of_bound": sum(m.deviation.rel_rms / max(m.deviation.bound, 1e-300) for m in values) / len(values),
        }
        for name, values in found.items()
    }


def _by_layer(measured: Sequence[Measured]) -> dict[str, float]:
    """Layer → largest rel-rms."""
    found: dict[str, float] = {}
    for each in measured:
        found[str(each.layer)] = max(found.get(str(each.layer), 0.0), each.deviation.rel_rms)
    return found


def _line(name: str, values: dict[str, float]) -> str:
    share = f"{values['share_of_bound']:.2f} of the bound"
    return f"{name}: rel-rms {values['mean']:.4f} on average, {values['max']:.4f} at most, {share}"
