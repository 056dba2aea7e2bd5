"""Judging what the passes measured, in words: the sections `logits` and `parallel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from mxconv import draw
from mxconv.draw import Column
from mxconv.verify import parallel
from mxconv.verify.findings import Finding, Section, skipped, status_of
from mxconv.verify.limits import Limits
from mxconv.verify.logits import FLOOR, MERGED_SERVED, MERGED_WEIGHTS_ONLY, SERVED, SOURCE, WEIGHTS_ONLY, LogitsOutcome
from mxconv.verify.metrics import Distribution, Estimate, Metrics
from mxconv.verify.prompts import Prompts

PARALLEL_WINDOWS = 16
"""KL between TP sizes is held to its limit over at least this many windows; below it is reported."""
BLOCK = 256
UNINFORMED_SHARE = 0.5
"""Perplexity of the source as a share of its vocabulary above which its predictions are noise."""
JUMP = 4.0
"""A layer that adds this many times a middling layer's error is the one to look at."""
NEGLIGIBLE_KL = 1e-7


def judge_logits(outcome: LogitsOutcome, prompts: Prompts, limits: Limits, vocabulary: int) -> Section:
    """The `logits` section: KL gates (for unquantized weights the relative L2 too), the rest is reported.

    A source whose perplexity is above half its `vocabulary` predicts nothing on these prompts: KL has a wider limit there.
    """
    exact = limits.scheme is None
    served = outcome.against_source(WEIGHTS_ONLY if exact else SERVED)
    # Unquantized weights are held to the source at one rank; what several ranks' sums differ by is the parallel section's.
    gated = outcome.against_source(MERGED_WEIGHTS_ONLY) if exact else None
    gated = gated or served
    if served is None or gated is None:
        return skipped("logits", "nothing to compare with")
    floor = outcome.against_source(FLOOR)
    informed = gated.reference_perplexity < UNINFORMED_SHARE * vocabulary
    limit = limits.kl(None if floor is None else floor.kl.mean.mean, informed=informed)
    bar = limits.l2("exact_l2", None if floor is None else floor.logits_l2)
    beyond, note = _windows_beyond(gated, bar, "exact_l2", "logits of unquantized weights are not the source's")
    findings = [*_kl(gated, limit), *(beyond if exact else ())]
    errors = outcome.layers.get(WEIGHTS_ONLY if exact else SERVED, ())
    worst = first_bad_layer(errors, outcome.layers.get(FLOOR, ()), limits["layer_floor_factor"])
    if findings and worst is not None:
        got = f"relative error {errors[worst]:.3g}, bfloat16 makes {outcome.layers[FLOOR][worst]:.2g}"
        what = "the first layer whose hidden states are off"
        findings.append(Finding(check="layers", what=what, place=f"layer {worst}", got=got))
    return Section(
        name="logits", status=status_of(findings), summary=_summary(served, prompts),
        limit=f"KL {limit:.3g}" + (f", L2 {bar:.2g}" if exact else ""),
        lines=(*_lines(outcome, prompts), *((note,) if exact and note else ())),
        warnings=tuple(_warnings(floor, prompts, limits, informed)), findings=tuple(findings),
        checks=("kl_mean", *(("exact_l2",) if exact else ())), figures=_figures(outcome, prompts, worst),
    )  # fmt: skip


def _warnings(floor: Metrics | None, prompts: Prompts, limits: Limits, informed: bool) -> Iterator[str]:
    if not informed:
        yield "the source predicts nothing on these prompts (untrained, or random ids): kl_uninformed_factor, a wide limit, holds"
    if prompts.ids.shape[1] <= BLOCK:
        yield f"windows of {prompts.ids.shape[1]} tokens do not leave the first block of {BLOCK} of lightning attention"
    if floor is not None and not floor.kl.mean.mean <= limits["floor"]:
        yield (
            f"bfloat16 alone moves this model's predictions by KL {floor.kl.mean.mean:.2g} (trained models: below 1e-3): "
            "its logits say little about an artifact, the numerics say it all"
        )


def _kl(gated: Metrics, limit: float) -> Sequence[Finding]:
    if gated.kl.mean.mean <= limit:
        return ()
    what = "mean KL of the source's distribution against the artifact's"
    got = f"{gated.kl.mean.mean:.3g} ± {gated.kl.mean.error:.1g}"
    return (Finding(check="kl_mean", what=what, expected=f"at most {limit:.3g}", got=got),)


def first_bad_layer(errors: Sequence[float], floor: Sequence[float], factor: float) -> int | None:
    """The first layer whose hidden-state error is not finite or more than `factor` times bfloat16's at that layer.

    Where none is, the first that adds `JUMP` times what a middling layer does: errors of layers are nearly independent, so that
    their squares add up, and layer l adds √(e_l² − e_(l−1)²).
    """
    beyond = (layer for layer, (error, noise) in enumerate(zip(errors, floor, strict=True)) if not error <= factor * noise)
    first = next(beyond, None)
    if first is not None or not errors:
        return first
    squares = [error * error for error in errors]
    steps = [max(square - before, 0.0) ** 0.5 for square, before in zip(squares, [0.0, *squares], strict=False)]
    middling = sorted(steps)[(len(steps) - 1) // 2]
    return next((layer for layer, step in enumerate(steps) if step > JUMP * middling), None)


def _summary(served: Metrics, prompts: Prompts) -> str:
    words = f"KL {served.kl.mean.mean:.3g} (p99 {served.kl.quantiles[0.99]:.3g}) · top-1 {100 * served.top1.mean:.1f} %"
    return f"{words} · Δppl {100 * served.perplexity_change.mean:+.2g} %" if prompts.natural else words


def _lines(outcome: LogitsOutcome, prompts: Prompts) -> tuple[str, ...]:
    lanes = [lane for lane in (SERVED, WEIGHTS_ONLY, FLOOR) if outcome.against_source(lane) is not None]
    columns = [Column(""), *(Column(f"{lane} of the source" if lane == FLOOR else lane, "right") for lane in lanes)]
    metrics = [found for lane in lanes if (found := outcome.against_source(lane)) is not None]
    first = metrics[0]
    lines = [
        f"{first.windows} windows of {prompts.ids.shape[1]} tokens from {prompts.words}, {first.tokens:,} scored; "
        + ("float32 against the source of the reference file" if outcome.from_reference else "float32 against the source"),
        *draw.table(columns, [[label, *(cell(m) for m in metrics)] for label, cell in _ROWS], indent=0),
    ]
    for lane in lanes:
        errors = outcome.layers.get(lane, [])
        if errors:
            words = "bf16 of the source" if lane == FLOOR else lane
            figures = f"last {errors[-1]:.3g}, max {max(errors):.3g}"
            lines.append(f"hidden-state error by layer, {words}: {draw.sparkline(errors)} {figures}")
    return tuple(lines)


def _estimate(value: Estimate, factor: float = 1.0, digits: str = ".3g") -> str:
    return f"{factor * value.mean:{digits}} ± {factor * value.error:.1g}"


def _spread(values: Distribution, shares: Sequence[float], factor: float = 1.0) -> str:
    return " · ".join(f"{factor * values.quantiles[share]:.2g}" for share in shares)


_UPPER, _LOWER = (0.9, 0.95, 0.99, 0.999), (0.1, 0.05, 0.01, 0.001)
_ROWS: tuple[tuple[str, Callable[[Metrics], str]], ...] = (
    ("KL mean", lambda m: _estimate(m.kl.mean)),
    ("KL median, max", lambda m: f"{m.kl.median:.2g} · {m.kl.largest:.2g}"),
    ("KL 90 · 95 · 99 · 99.9 %", lambda m: _spread(m.kl, _UPPER)),
    ("KL 10 · 5 · 1 · .1 %", lambda m: _spread(m.kl, _LOWER)),
    ("same top-1, %", lambda m: _estimate(m.top1, 100)),
    ("shared top-5, %", lambda m: _estimate(m.top5, 100)),
    ("Δp of the true token: mean, rms, %", lambda m: f"{_estimate(m.delta_p.mean, 100, '+.2g')} · {100 * m.delta_p.rms:.2g}"),
    ("Δp max, min, %", lambda m: f"{100 * m.delta_p.largest:+.2g} · {100 * m.delta_p.smallest:+.2g}"),
    ("Δp 90 · 95 · 99 · 99.9 %, %", lambda m: _spread(m.delta_p, _UPPER, 100)),
    ("Δp 10 · 5 · 1 · .1 %, %", lambda m: _spread(m.delta_p, _LOWER, 100)),
    ("perplexity (source)", lambda m: f"{m.perplexity:.5g} ({m.reference_perplexity:.5g})"),
    ("change of perplexity, %", lambda m: _estimate(m.perplexity_change, 100, "+.3g")),
    ("relative L2 of logits", lambda m: f"{m.logits_l2:.2g}"),
)


def _figures(outcome: LogitsOutcome, prompts: Prompts, worst: int | None) -> dict[str, object]:
    return {
        "tokens_from": prompts.words, "tokens_sha256": prompts.digest, "window": prompts.ids.shape[1],
        "from_reference": outcome.from_reference, "first_jump_layer": worst, "layers": dict(outcome.layers),
        "lanes": {lane: metrics.document() for (reference, lane), metrics in outcome.metrics.items() if reference == SOURCE},
    }  # fmt: skip


def judge_parallel(
    outcome: LogitsOutcome | None, consistency: Sequence[Finding], ranks: int, limits: Limits, why: str = ""
) -> Section:
    """The `parallel` section: `consistency` of stored tensors, and TP n against TP 1; `why` there are no logits."""
    findings = list(consistency)
    words = f"{ranks} ranks reassemble bit for bit" if not findings else f"{ranks} ranks do not reassemble"
    lines: list[str] = []
    figures: dict[str, object] = {}
    checks = list(parallel.CHECKS)
    plain = None if outcome is None else outcome.metrics.get((MERGED_WEIGHTS_ONLY, WEIGHTS_ONLY))
    limit = ""
    if plain is not None and outcome is not None:
        floor = outcome.against_source(FLOOR)
        bar = limits.l2("parallel_l2", None if floor is None else floor.logits_l2)
        found, note = _windows_beyond(plain, bar, "parallel_l2", f"logits of tp {ranks} and tp 1 differ, activations unquantized")
        findings += found
        spread = f"windows {min(plain.window_l2):.2g} … {max(plain.window_l2):.2g}"
        lines.append(f"activations unquantized: relative L2 {plain.logits_l2:.2g}, {spread}")
        lines += [note] if note else []
        checks.append("parallel_l2")
        figures["logits_l2"] = plain.logits_l2
        words += f"; tp {ranks} = tp 1 to {plain.logits_l2:.1e} unquantized" if not found else f"; tp {ranks} is not tp 1"
        limit = f"{bar:.2g}"
        found, line, share = _share(outcome, limits)
        findings += found
        lines += [line] if line else []
        checks += ["parallel_kl_share"] if line else []
        figures |= {"kl_share": share} if share is not None else {}
    elif why:
        lines.append(f"logits of tp {ranks} and tp 1 were not compared: {why}")
    return Section(
        name="parallel", status=status_of(findings), summary=words, limit=limit, lines=tuple(lines), findings=tuple(findings),
        checks=tuple(checks), figures=figures,
    )  # fmt: skip


def _windows_beyond(metrics: Metrics, limit: float, check: str, what: str) -> tuple[list[Finding], str]:
    """(findings, note): windows whose logits differ by more than float32 summation explains.

    A token whose second and third expert are equal to the last bit may go to either; that changes its window and is no fault.
    It happens once in 10⁵ to 10⁶ decisions, so one window in eight may be beyond the limit, not all.
    """
    beyond = [index for index, value in enumerate(metrics.window_l2) if not value <= limit]
    allowed = max(1, metrics.windows // 8) if metrics.windows > 1 else 0
    if len(beyond) > allowed or any(math.isnan(value) for value in metrics.window_l2):
        got = f"{metrics.logits_l2:.3g}, in {len(beyond)} of {metrics.windows} windows"
        return [Finding(check=check, what=what, expected=f"relative L2 of at most {limit:.2g}", got=got)], ""
    note = f"window {', '.join(map(str, beyond))} is beyond {limit:.2g}: a router near-tie" if beyond else ""
    return [], note


def _share(outcome: LogitsOutcome, limits: Limits) -> tuple[list[Finding], str, float | None]:
    between = outcome.metrics.get((MERGED_SERVED, SERVED))
    own = outcome.against_source(SERVED)
    if between is None or own is None:
        return [], "", None
    kl, whole = between.kl.mean.mean, own.kl.mean.mean
    share = kl / whole if whole else math.inf
    line = f"activations quantized: KL {kl:.3g} between the two, {share:.2f} of the scheme's own ({whole:.3g})"
    floor = outcome.against_source(FLOOR)
    if floor is not None and not floor.kl.mean.mean <= limits["floor"]:
        return [], f"{line}; not held to a limit, since bfloat16 alone makes KL {floor.kl.mean.mean:.2g}", share
    if between.windows < PARALLEL_WINDOWS:
        return [], f"{line}; held to {limits['parallel_kl_share']:g} over at least {PARALLEL_WINDOWS} windows only", share
    if share <= limits["parallel_kl_share"] or kl <= NEGLIGIBLE_KL:
        return [], f"{line}, limit {limits['parallel_kl_share']:g}", share
    what = f"KL between TP n and TP 1 with activations quantized, as a share of the scheme's own {whole:.3g}"
    expected = f"at most {limits['parallel_kl_share']:g}"
    return [Finding(check="parallel_kl_share", what=what, expected=expected, got=f"{share:.3g}")], line, share
