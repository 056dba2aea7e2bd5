"""Operations on decay buffers and tied heads: comparing what a source stores beside the weights, and writing the buffers."""

from __future__ import annotations

import numpy as np

from mxconv.errors import MalformedInput
from mxconv.execute.job import Done, Job
from mxconv.execute.rawbits import to_float32
from mxconv.execute.reading import Findings
from mxconv.mapping.decay import compare_decay, decay_buffer, layer_slopes
from mxconv.plan.pieces import BLOCK_BYTES
from mxconv.plan.values import Unit
from mxconv.source import TIED_HEAD


def run_check_decay(unit: Unit, job: Job, findings: Findings) -> Done:
    """Compare a layer's stored decay buffers with the formula; with `keep_decay` hand back the stored slopes instead.

    The facts are {"slopes": [hex floats]} when stored slopes are to be kept. Raises MalformedInput (3).
    """
    reader, plan = job.reader, job.plan
    config, layer = reader.source.config, unit.layer or 0
    slopes = layer_slopes(config.num_attention_heads, layer, config.num_layers)
    facts: dict[str, object] = {}
    for rank, name in unit.reads:
        spec = reader.source.specs[rank][name]
        raw = reader.raw(rank, name)
        findings.sha256.update(raw.data)
        buffer = name.rsplit(".", 1)[1]
        if raw.size != decay_buffer(buffer, slopes, config.block_size).size:
            raise MalformedInput("decay buffer has another size than heads and block_size say", where=name, got=list(spec.shape))
        values = to_float32(raw, spec.dtype)
        problem = compare_decay(buffer, values, slopes, config.block_size, where=name, layer=layer)
        if problem is None:
            continue
        if not plan.request.keep_decay:
            raise problem
        if buffer == "slope_rate":
            facts["slopes"] = [float(value).hex() for value in values.reshape(-1)]
    return Done(facts=facts)


def run_check_tied(unit: Unit, job: Job, findings: Findings) -> Done:
    """A head stored beside tied embeddings must be the embedding. Raises MalformedInput (3) with the first row that differs."""
    reader = job.reader
    (rank, embedding), (_, head) = unit.reads
    shapes = [reader.source.stored(rank, name) for name in (embedding, head)]
    if shapes[0].shape != shapes[1].shape or shapes[0].dtype != shapes[1].dtype:
        raise MalformedInput(
            "lm_head is stored beside tied embeddings in another shape or dtype", where=TIED_HEAD,
            expected=f"{shapes[0].dtype} {list(shapes[0].shape)}", got=f"{shapes[1].dtype} {list(shapes[1].shape)}",
        )  # fmt: skip
    rows, columns = shapes[0].shape
    step = max(1, BLOCK_BYTES // max(1, shapes[0].size_bytes // rows))
    for start in range(0, rows, step):
        box = ((start, min(start + step, rows)), (0, columns))
        a, b = reader.raw(rank, embedding, box), reader.raw(rank, head, box)
        findings.sha256.update(a.data)
        findings.sha256.update(b.data)
        if not np.array_equal(a, b):
            row = start + int(np.argmax((a != b).any(axis=1)))
            raise MalformedInput(
                "tie_word_embeddings is true, but a different lm_head is stored", where=TIED_HEAD, expected="the embedding",
                got=f"first difference in row {row}",
                hint="if the head is meant, set tie_word_embeddings to false in a copy of config.json",
            )  # fmt: skip
    return Done()


def run_decay(unit: Unit, job: Job, findings: Findings) -> Done:
    """The buffers of a lightning layer, float32, for unpatched transformers: from the formula, or from slopes once kept."""
    config, layer = job.plan.target, unit.layer or 0
    kept = (job.reader.source.config.artifact or {}).get("slopes", {}).get(str(layer))
    slopes = layer_slopes(config.num_attention_heads, layer, config.num_layers)
    if kept is not None:
        slopes = np.array([float.fromhex(value) for value in kept])
    buffers = [output.spec.name.rsplit(".", 1)[1] for output in unit.outputs]
    return Done(arrays=[decay_buffer(buffer, slopes, config.block_size) for buffer in buffers])
