"""Every weight of every rank, decoded and held against its source.

Unquantized tensors must be equal bit for bit (a router widened to float32 by value). Quantized ones are compared in the space
that was rounded, element by element against half a step of their code and tile by tile against the absmax that their scale must
be (bounds.py): both hold for every distribution of weights, so that one wrong block of 128 × 128, one group off by one or one
exchanged expert is named, and no right artifact is. For other methods than rounding to nearest (the manifest says which), rms
errors of tensor, rows, columns and blocks are held to `noise` and `noise_local` instead.

The source is loaded by the runtime's own statement of names, orders and cuts; nothing of the converter is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxconv.quantize.schemes import FP8_BLOCK, Scheme
from mxconv.runtime.coded import PROJECTION, Coded, rotated_weight
from mxconv.verify import bounds
from mxconv.verify.deviations import Deviation, Sums, Totals
from mxconv.verify.findings import Finding
from mxconv.verify.limits import Limits

CHUNK_ELEMENTS = 1 << 22
"""Weights are widened this many at a time."""
ROUND_TO_NEAREST = "rtn"
SLACK = 1e-3
"""Of a bound, for float32 on both sides; decisions lie half a step away from it."""
MAX_PLACES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Holds the quantized projections of one artifact to their source."""

    scheme: Scheme
    method: str
    limits: Limits
    device: torch.device

    def tiles(self, weight: Tensor, name: str) -> Tensor:
        """absmax tiles of one rank's source weight [out, in]."""
        block = self.scheme.rotation[PROJECTION[name]]
        return self._joined([bounds.absmax(self._u(weight[a:b], block), self.scheme) for a, b in row_chunks(*weight.shape)])

    def _joined(self, tiles: Sequence[Tensor]) -> Tensor:
        return torch.stack(tuple(tiles)).amax(0) if self.scheme.granularity == "tensor" else torch.cat(tuple(tiles))

    def _u(self, rows: Tensor, block: int) -> Tensor:
        return bounds.rotated(rows.to(device=self.device, dtype=torch.float32), block)

    def weight(
        self, coded: Coded, source: Tensor, largest: Tensor | None, name: str, names: tuple[str, ...], rank: int
    ) -> tuple[Deviation, list[Finding]]:
        """`source` [out, in] of that rank; `largest` the absmax tiles of all ranks where they share a scale, else None.

        `names` are those of the stored codes and scales.
        """
        coded = coded.to(self.device)
        block = self.scheme.rotation[PROJECTION[name]]
        shared = largest
        totals, tiles = Totals(), []
        for start, stop in row_chunks(*source.shape):
            u, error, half, mine = self._compared(coded, source, shared, block, start, stop)
            totals.add(u, error, half)
            tiles.append(mine)
        largest = self._joined(tiles) if shared is None else shared
        findings = [*self._codes(coded, names[0], rank), *self._scale(coded, largest, block, name, names[1], rank)]
        nearest = self.method == ROUND_TO_NEAREST
        if nearest and totals.peak <= self.limits["rounding"] * (1 + SLACK):
            return totals.deviation(), findings
        sums = Sums(len(source), source.shape[1], float(largest.max()), self.device)
        for start, stop in row_chunks(*source.shape):
            _, error, half, _ = self._compared(coded, source, shared, block, start, stop)
            sums.add(start, error.flatten(1), half.expand_as(error).flatten(1), self.limits["rounding"] * (1 + SLACK))
        findings += self._rounding(totals, sums, name, names[0], rank) if nearest else []
        return totals.deviation(), findings or self._noise(sums, name, names[0], rank)

    def _compared(
        self, coded: Coded, source: Tensor, shared: Tensor | None, block: int, start: int, stop: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output rows [start, stop): (u, error beyond the noise of a rotation, half steps, absmax tiles).

        The first three are [rows, n, in/n], n the tiles that lie beside each other.
        """
        flat = self._u(source[start:stop], block)
        tiles = bounds.absmax(flat, self.scheme) if shared is None else bounds.tile_rows(shared, self.scheme, start, stop)
        u = bounds.runs(flat, tiles)
        decoded = rotated_weight(bounds.coded_rows(coded, self.scheme, start, stop), self.scheme)
        error = bounds.runs(decoded, tiles).sub_(u).abs_()
        if block:
            error.sub_(bounds.ROTATION_NOISE * tiles.amax()).clamp_(min=0)
        return u, error, bounds.half_steps(u, bounds.spread(tiles, self.scheme, len(flat)), self.scheme), tiles

    def _codes(self, coded: Coded, tensor: str, rank: int) -> Iterator[Finding]:
        if self.scheme.weight == "int4" and int(coded.codes.min()) == -8:
            count = int((coded.codes == -8).sum())
            yield Finding(
                check="weight codes", what=f"{count} codes are -8, which one consumer reads as 0", tensor=tensor, rank=rank,
                expected="-7 … 7",
            )  # fmt: skip

    def _scale(self, coded: Coded, largest: Tensor, block: int, name: str, tensor: str, rank: int) -> Iterator[Finding]:
        stored = bounds.stored_tiles(coded, self.scheme)
        usable = (stored > 0) & stored.isfinite()
        if not bool(usable.all()):
            what = f"{int((~usable).sum())} of {usable.numel()} scales are not above 0 and finite"
            yield Finding(check="weight scale", what=what, tensor=tensor, rank=rank)
        elif self.method == ROUND_TO_NEAREST:
            expected = bounds.absmax_scale(largest, self.scheme, block)
            wrong = ~((stored - expected).abs() <= self.limits["scale"] * expected)
            if bool(wrong.any()):
                row, column = (int(i) for i in wrong.nonzero()[0])
                yield Finding(
                    check="weight scale", what=f"{int(wrong.sum())} of {wrong.numel()} scales are not the absmax of their source",
                    tensor=tensor, rank=rank, place=self._tile_words(row, column, largest.shape, name),
                    expected=f"{float(expected[row, column]):.8g}", got=f"{float(stored[row, column]):.8g}",
                )  # fmt: skip

    def _tile_words(self, row: int, column: int, shape: torch.Size, name: str) -> str:
        rows, group = {"group": (1, self.scheme.group_size), "channel": (1, None), "block": (FP8_BLOCK, FP8_BLOCK)}.get(
            self.scheme.granularity, (0, None)
        )
        if not rows:
            return ""
        words = row_words(row * rows, (row + 1) * rows, shape[0] * rows, name)
        return f"{words}, inputs {column * group}-{(column + 1) * group - 1}" if group else words

    def _rounding(self, totals: Totals, sums: Sums, name: str, tensor: str, rank: int) -> Iterator[Finding]:
        out, inner = sums.rows.shape[1], sums.columns.shape[1]
        share = totals.deviation()
        yield Finding(
            check="weight rounding", tensor=tensor, rank=rank, place=tile_words(sums.beyond, out, name),
            what=f"{sums.count} of {out * inner} weights lie further from the source than rounding can put them",
            expected=f"at most {self.limits['rounding']:g} half steps",
            got=f"{share.peak:.3g}, rel-rms {share.rel_rms:.3g} where {share.bound:.3g} is the bound",
        )  # fmt: skip

    def _noise(self, sums: Sums, name: str, tensor: str, rank: int) -> list[Finding]:
        """The first of blocks, rows, columns, tensor whose rms error is beyond its limit."""
        out = sums.rows.shape[1]
        views: tuple[tuple[str, Tensor, Callable[[Tensor], str]], ...] = (
            ("noise_local", sums.tiles, lambda hit: tile_words(hit, out, name)),
            ("noise_local", sums.rows, lambda hit: row_words(_first(hit), _first(hit) + 1, out, name)),
            ("noise_local", sums.columns, lambda hit: f"input {_first(hit)}"),
            ("noise", sums.rows.sum(1)[:, None], lambda hit: ""),
        )
        for limit, (error, half), words in views:
            ratio = torch.where(error == 0, 0.0, (error / half).sqrt())
            hit = ~(ratio <= self.limits[limit])
            if bool(hit.any()):
                what = f"rms error in {int(hit.sum())} of {hit.numel()} places"
                expected = f"at most {self.limits[limit]:g} rms half steps"
                return [
                    Finding(
                        check="weight noise", what=what, tensor=tensor, rank=rank, place=words(hit), expected=expected,
                        got=f"{float(ratio.max()):.3g}",
                    )
                ]
        return []


def row_chunks(out_features: int, in_features: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks of about `CHUNK_ELEMENTS`, multiples of 128."""
    step = max(1, CHUNK_ELEMENTS // in_features // FP8_BLOCK) * FP8_BLOCK
    for start in range(0, out_features, step):
        yield start, min(start + step, out_features)


def _first(hit: Tensor) -> int:
    return int(hit.nonzero()[0, 0])


def row_words(start: int, stop: int, out_features: int, name: str) -> str:
    """Output rows in words: `rows 0-127`, for up_gate `gate rows …` or `up rows …`."""
    half = out_features // 2
    which, base = ("", 0) if not name.endswith("up_gate") else ("gate ", 0) if start < half else ("up ", half)
    first, last = start - base, stop - base - 1
    return f"{which}row {first}" if first == last else f"{which}rows {first}-{last}"


def tile_words(hit: Tensor, out_features: int, name: str) -> str:
    """Which blocks of 128 × 128 are hit."""
    found = hit.nonzero().tolist()
    if len(found) > MAX_PLACES and len(found) > hit.numel() // 2:
        return f"{len(found)} of {hit.numel()} blocks of 128 × 128"
    words = [
        f"{row_words(r * FP8_BLOCK, min((r + 1) * FP8_BLOCK, out_features), out_features, name)} × inputs "
        f"{c * FP8_BLOCK}-{(c + 1) * FP8_BLOCK - 1}"
        for r, c in found[:MAX_PLACES]
    ]
    more = f" and {len(found) - MAX_PLACES} more blocks" if len(found) > MAX_PLACES else ""
    return "; ".join(words) + more


def equal_finding(
    artifact: Tensor, source: Tensor, *, widened: bool, tensor: str, rank: int, place: str | None = None
) -> Finding | None:
    """What keeps an unquantized tensor from being its source, bit for bit; None when nothing does.

    `widened`: the artifact may hold the source's values in float32. `place` stands before the rows that differ.
    """
    if artifact.shape != source.shape:
        return Finding(
            check="unquantized weights", what="another shape than the source", tensor=tensor, rank=rank,
            expected=str(list(source.shape)), got=str(list(artifact.shape)),
        )  # fmt: skip
    if artifact.dtype != source.dtype and not (widened and artifact.dtype == torch.float32):
        return Finding(
            check="unquantized weights", what="stored in another dtype than the source", tensor=tensor, rank=rank,
            expected=str(source.dtype).removeprefix("torch."), got=str(artifact.dtype).removeprefix("torch."),
        )  # fmt: skip
    a, b = same_bits(artifact, source.to(artifact.dtype))
    if torch.equal(a, b):
        return None
    differ = a != b
    rows = differ.reshape(len(differ), -1).any(1).nonzero().flatten().tolist()
    words = f"{len(rows)} of {len(differ)} rows, the first {rows[0]}, the last {rows[-1]}" if len(rows) > 1 else f"row {rows[0]}"
    distance = (artifact.to(torch.float64) - source.to(torch.float64)).abs().max()
    return Finding(
        check="unquantized weights", what=f"{int(differ.sum())} of {differ.numel()} elements are not the source's", tensor=tensor,
        rank=rank, place=f"{place}: {words}" if place else words, expected="the same bits",
        got=f"differences up to {float(distance):.3g}",
    )  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one dtype as integers of their bits, in which a NaN equals itself and −0 is not 0."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(kind), b.contiguous().view(kind)
