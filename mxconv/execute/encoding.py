"""The `quantize` operation: one projection of one expert, encoded row block by row block into whole outputs of every rank.

Stored matrices are [in, out] and the source is [out, in], so that a block of source rows is a block of output columns: the
outputs are held whole, the source never is on the host. A tensor-wide scale takes two passes, and on the CPU two readings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mxconv.calibrate import Statistics
from mxconv.errors import MxconvError, NumericError
from mxconv.execute.job import Done, Job
from mxconv.execute.places import Place, Places
from mxconv.execute.rawbits import Raw, raw_dtype, to_float32
from mxconv.execute.reading import Findings, SourceReader
from mxconv.mapping.parameters import Parameter
from mxconv.plan.experts import streams
from mxconv.plan.pieces import BLOCK_BYTES
from mxconv.plan.values import Unit
from mxconv.quantize.finite import fp16_subnormal_scales, require_fp16_scales
from mxconv.quantize.packing import store_scale
from mxconv.quantize.reference import scale_shape
from mxconv.quantize.schemes import FP8_BLOCK, Scheme
from mxconv.tensors import TORCH_NAMES, whole


def run_quantize(unit: Unit, job: Job, findings: Findings) -> Done:
    """The stored tensors of `unit` in the order of its outputs, and how many scales its consumer will hold as subnormals."""
    scheme, reader = job.plan.request.scheme, job.reader
    if scheme is None or job.places is None or unit.projection is None or unit.layer is None or unit.expert is None:
        raise MxconvError("a quantize unit names no projection or scheme", where=unit.id)
    params = {param.name: param for param in reader.source.parameters if param.name in unit.sources}
    sources = [params[name] for name in unit.sources]
    codes, scales = _encoded(unit, scheme, job.places, sources, reader, findings)
    facts: dict[str, object] = {}
    if scheme.weight == "int4":
        for scale in scales:
            require_fp16_scales(scale, unit.id)
    if scheme.weight == "int4" and (small := sum(fp16_subnormal_scales(scale) for scale in scales)):
        facts["subnormal_scales"] = small
    activation = None
    if scheme.static:
        if job.statistics is None:
            raise MxconvError("a static scheme has no calibration statistics", where=unit.id)
        activation = _activation_scale(unit.layer, unit.expert, unit.projection, scheme, job.statistics)
    arrays: list[Raw] = []
    for coded, rank_codes in zip(unit.coded, codes, strict=True):
        arrays += [rank_codes.numpy(), _rank_scale(scheme, unit.projection, scales, coded.rank, len(unit.coded)).numpy()]
        if activation is not None:
            arrays.append(activation)
    return Done(arrays=arrays, facts=facts)


def _encoded(
    unit: Unit, scheme: Scheme, places: Places, sources: list[Parameter], reader: SourceReader, findings: Findings
) -> tuple[list[Tensor], list[Tensor]]:
    """Codes of each rank in stored orientation, and the canonical scale of each source over all ranks, on the host.

    Encoding notices by itself when a weight is not finite. Then, and when a GPU does not vouch for what it did, the unit is read
    again, looked at and encoded on the CPU, which names what is wrong with it.
    """
    projection, shape = unit.projection or "", sources[0].shape
    dtypes = {container.dtype for param in sources for container, _ in reader.source.bound.holders[param.name]}
    findings.scan = False
    try:
        first = places.place(scheme, projection, shape, _torch_dtype(dtypes.pop())) if len(dtypes) == 1 else None
        found = _encode(unit, first or places.host(scheme, projection, shape), scheme, sources, reader, findings)
    except NumericError:
        found = None
    if found is None:
        findings.begin_again()
        found = _encode(unit, places.host(scheme, projection, shape), scheme, sources, reader, findings)
    if found is None:
        raise MxconvError("weights were not encoded", where=unit.id)
    return found


def _encode(
    unit: Unit, place: Place, scheme: Scheme, sources: list[Parameter], reader: SourceReader, findings: Findings
) -> tuple[list[Tensor], list[Tensor]] | None:
    """What `_encoded` gives, by `place`; None when it does not vouch for it."""
    codes = _code_buffers(unit, place)
    scales = [place.empty(scale_shape(scheme, *param.shape), torch.float32) for param in sources]
    ranks = len(unit.coded)
    rows_each = sources[0].shape[0] // ranks if unit.projection == "up_gate_proj" else sources[0].shape[0]
    for slot, start, rows in _all_rows(place, sources, reader, findings):
        for first, last in _split(start, start + rows.shape[0], rows_each):
            rank, column = divmod(first, rows_each)
            column += slot * rows_each
            target = codes[rank][:, column : column + last - first]
            place.encode_into(rows[first - start : last - start], target, _scale_rows(scheme, scales[slot], first, last))
    findings.raise_bad()
    found = place.fetch([*codes, *scales])
    if found is None:
        return None
    codes, scales = found[: len(codes)], found[len(codes) :]
    return (list(codes[0].chunk(ranks, dim=0)) if unit.projection == "down_proj" else codes), scales


def _all_rows(
    place: Place, sources: list[Parameter], reader: SourceReader, findings: Findings
) -> Iterator[tuple[int, int, Tensor]]:
    """(index of the source, first row, rows) to be encoded; before them, where a scale is a whole tensor's, a pass to find it.

    Once a bad weight is found nothing more comes: the rest is read only to count all that are in the tensor.
    """
    kept: list[tuple[int, int, Tensor]] = []
    if place.passes == 2:
        for slot, start, rows in _read(place, sources, reader, findings):
            if not findings.bad:
                rows = place.put(rows)
                place.observe(rows)
                kept += [(slot, start, rows)] if place.keeps else []
        findings.raise_bad()
        if place.keeps:
            yield from kept
            return
    for slot, start, rows in _read(place, sources, reader, Findings(scan=False) if place.passes == 2 else findings):
        if not findings.bad:
            yield slot, start, place.put(rows)


def _read(place: Place, sources: list[Parameter], reader: SourceReader, findings: Findings) -> Iterator[tuple[int, int, Tensor]]:
    for slot, param in enumerate(sources):
        for start, rows in _row_blocks(param, place, reader, findings):
            yield slot, start, rows


def _code_buffers(unit: Unit, place: Place) -> list[Tensor]:
    """up_gate: a tensor a rank. down: one over all ranks, whose row blocks are the ranks' tensors (the input axis is cut)."""
    shape = unit.coded[0].codes.shape
    if unit.projection == "up_gate_proj":
        return [place.empty(shape, torch.int8) for _ in unit.coded]
    return [place.empty((shape[0] * len(unit.coded), shape[1]), torch.int8)]


def _split(start: int, stop: int, each: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at multiples of `each`: the rows of one rank at a time."""
    while start < stop:
        end = min(stop, (start // each + 1) * each)
        yield start, end
        start = end


def _scale_rows(scheme: Scheme, scale: Tensor, first: int, last: int) -> Tensor:
    """The part of a canonical scale that belongs to rows [first, last)."""
    if scheme.granularity == "tensor":
        return scale
    step = FP8_BLOCK if scheme.granularity == "block" else 1
    return scale[first // step : last // step]


def _rank_scale(scheme: Scheme, projection: str, scales: list[Tensor], rank: int, ranks: int) -> Tensor:
    """`weight_scale` of one rank in stored orientation: gate and up rows cut by out, down by in."""
    if scheme.granularity == "tensor":
        return scales[0].clone()
    if projection == "up_gate_proj":
        return store_scale(torch.cat([scale.chunk(ranks, dim=0)[rank] for scale in scales]), scheme)
    scale = scales[0] if scheme.granularity == "channel" else scales[0].chunk(ranks, dim=1)[rank]
    return store_scale(scale, scheme).clone()


def _row_blocks(param: Parameter, place: Place, reader: SourceReader, findings: Findings) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, in]) of `param`, in order and in multiples of the encoder's rows; good until the next but one."""
    holders = reader.source.bound.holders[param.name]
    if all(streams(container, part) for container, part in holders):
        for block in reader.blocks(param.name, whole(param.shape), findings, place.rows_multiple, place.room):
            yield block.box[0][0], _as_torch(block.values, block.dtype)
        return
    dtype = holders[0][0].dtype
    matrix = np.empty(param.shape, raw_dtype(dtype))
    for block in reader.blocks(param.name, whole(param.shape), findings):
        matrix[tuple(slice(*bounds) for bounds in block.box)] = block.values
    step = max(1, BLOCK_BYTES // matrix[:1].nbytes // place.rows_multiple) * place.rows_multiple
    for start in range(0, param.shape[0], step):
        yield start, _as_torch(matrix[start : start + step], dtype)


def _as_torch(values: Raw, dtype: str) -> Tensor:
    """Raw values as a float tensor of their dtype (float64, which no kernel takes, as float32)."""
    if dtype == "F64":
        return torch.from_numpy(to_float32(values, dtype))
    signed = np.ascontiguousarray(values).view({2: np.int16, 4: np.int32}[values.itemsize])
    tensor: Tensor = torch.from_numpy(signed).view(_torch_dtype(dtype))
    return tensor


def _torch_dtype(dtype: str) -> torch.dtype:
    """What `_as_torch` makes of a stored dtype."""
    found: torch.dtype = getattr(torch, TORCH_NAMES["F32" if dtype == "F64" else dtype])
    return found


def _activation_scale(layer: int, expert: int, projection: str, scheme: Scheme, statistics: Statistics) -> Raw:
    """float32 [1]: the calibrated absmax of the projection's (rotated) input, divided where the scheme stores it so."""
    absmax = np.float32(statistics.absmax(layer, expert, projection, scheme.rotation[projection]))
    value = absmax / np.float32(scheme.activation.divisor) if scheme.activation.stored_divided else absmax
    return np.array([value if value > 0 else np.float32(1.0)], dtype=np.float32)
