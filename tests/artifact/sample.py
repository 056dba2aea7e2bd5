"""A small plan for the store's tests: two ranks, units that span both, tensors cut by rows and by columns."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors

from mxconv.artifact import ArtifactWriter, Manifest, Region, find_artifact, open_output, publish
from mxconv.errors import IncompleteInput
from mxconv.placement import PlacedFile, place_file
from mxconv.tensors import DTYPE_BYTES, TensorSpec, whole

PLAN = hashlib.sha256(b"sample plan").hexdigest()
OTHER_PLAN = hashlib.sha256(b"other plan").hexdigest()
LAYERS = 6


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def files() -> tuple[PlacedFile, ...]:
    """Two files in each of two rank folders: layers dealt to them, embedding and head in the first, a scalar and an empty one."""
    placed = []
    for rank in range(2):
        groups = [
            [spec("embed", "BF16", 40, 16), spec("head", "BF16", 16, 40), spec("empty", "F32", 0, 3)],
            [spec("scalar", "F32")],
        ]
        for layer in range(LAYERS):
            groups[layer % 2] += [spec(f"l{layer}.codes", "I8", 24, 10), spec(f"l{layer}.scale", "F32", 10, 3)]
        for i, group in enumerate(groups, 1):
            placed.append(place_file(f"rank{rank}/model-{i:05d}-of-00002.safetensors", group))
    return tuple(placed)


def units() -> dict[str, list[Region]]:
    """Embedding in row blocks, head in column blocks, codes and scales of both ranks in one unit a layer."""
    found: dict[str, list[Region]] = {}
    for start in range(0, 40, 10):
        rows, columns = ((start, start + 10), (0, 16)), ((0, 16), (start, start + 10))
        found[f"embed.{start}"] = [Region(file=rank * 2, tensor="embed", box=rows) for rank in range(2)]
        found[f"head.{start}"] = [Region(file=rank * 2, tensor="head", box=columns) for rank in range(2)]
    for layer in range(LAYERS):
        found[f"layer.{layer}"] = [
            Region(file=rank * 2 + layer % 2, tensor=f"l{layer}.{part}", box=whole(shape))
            for rank in range(2)
            for part, shape in (("codes", (24, 10)), ("scale", (10, 3)))
        ]
    found["scalar"] = [Region(file=rank * 2 + 1, tensor="scalar", box=()) for rank in range(2)]
    return found


def tensor_bytes(path: str, tensor: TensorSpec) -> np.ndarray:
    """What a tensor must hold: uint8 of shape [*shape, itemsize], drawn from its name and its file's."""
    shape = (*tensor.shape, DTYPE_BYTES[tensor.dtype])
    seed = int.from_bytes(hashlib.sha256(f"{path} {tensor.name}".encode()).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def region_bytes(placed: Sequence[PlacedFile], region: Region) -> np.ndarray:
    """The C-contiguous bytes of a region."""
    file = placed[region.file]
    tensor = next(t for t in file.tensors if t.name == region.tensor)
    return np.ascontiguousarray(tensor_bytes(file.path, tensor)[tuple(slice(a, b) for a, b in region.box)]).reshape(-1)


INDEXES = {f"rank{rank}/model.safetensors.index.json": json.dumps({"rank": rank}).encode() for rank in range(2)}
SIDECARS = {"tokenizer.json": b'{"model": {}}', "chat_template.jinja": b"{{ messages }}"}
CONFIG = b'{"model_type": "minimax_m1", "mxconv": {"scheme": null}}'
OTHERS = (*INDEXES, *SIDECARS, "config.json")
EXTRA = {
    "tool": {"name": "mxconv", "version": "test"}, "layout": "fastdeploy", "tp": 2, "scheme": None, "numeric_conventions": None,
    "plan": {"numerics_digest": "0", "source_digest": "0"}, "ignored_layers": [], "dropped": {}, "statistics": None, "warnings": {},
    "source": {
        "dialect": "minimax-m1", "config": {}, "config_text": "{}", "dtypes": {"a": "BF16"}, "index_metadata": {},
        "weight_map": {"a": "model.safetensors"}, "with_index": False,
    },
}  # fmt: skip


def run(
    root: Path,
    *,
    plan: str = PLAN,
    resume: bool = False,
    overwrite: bool = False,
    order: random.Random | None = None,
    on_unit: Callable[[str], None] = lambda _: None,
    mapper: Callable[..., object] = map,
    source: Mapping[str, object] | None = None,
) -> tuple[Manifest, list[str]]:
    """One whole run, as an executor would do it; the manifest and the units that were computed."""
    computed: list[str] = []
    with open_output(root, plan_digest=plan, resume=resume, overwrite=overwrite) as output:
        if output.finished is not None:
            return output.finished, computed
        placed = files()
        with ArtifactWriter(output, files=placed, units=units(), others=OTHERS, source=source) as writer:
            todo = [unit for unit in units() if unit not in writer.done]
            if order is not None:
                order.shuffle(todo)

            def work(unit: str) -> None:
                on_unit(unit)
                digests = [writer.write(region, region_bytes(placed, region)) for region in units()[unit]]
                writer.commit(unit, source_sha256="0" * 64, outputs=digests, facts={"name": unit})
                computed.append(unit)

            list(mapper(work, todo))  # type: ignore[call-overload]
            assert {writer.facts(unit)["name"] for unit in units()} == set(units())
            manifest = publish(writer, indexes=INDEXES, sidecars=SIDECARS, config=CONFIG, manifest=EXTRA)
    return manifest, computed


def wrong_files(root: Path) -> list[str]:
    """Shards under a final name in `root` that the safetensors package does not open or that hold wrong values."""
    wrong = []
    for file in files():
        path = root / file.path
        if not os.path.lexists(path):
            continue
        try:
            stored = {name: bytes(info["data"]) for name, info in safetensors.deserialize(path.read_bytes())}
        except safetensors.SafetensorError:
            wrong.append(file.path)
            continue
        if stored != {t.name: tensor_bytes(file.path, t).tobytes() for t in file.tensors}:
            wrong.append(file.path)
    return wrong


def assert_nothing_wrong(root: Path, *, published: bool) -> None:
    """What a reader may find after a crash: final names that are right, no artifact before the manifest, no parsing part."""
    assert wrong_files(root) == []
    for part in root.rglob(".*.safetensors.*.part"):
        final = part.with_name(part.name[1:].rsplit(".", 2)[0])
        try:
            safetensors.deserialize(part.read_bytes())
        except safetensors.SafetensorError:
            continue
        part_root = root.parent / "parsed"
        target = part_root / final.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(part, target)
        assert wrong_files(part_root) == []  # the length came last: whatever parses is whole
        shutil.rmtree(part_root)
    if published:
        assert find_artifact(root) is not None
    elif list(root.rglob("*")):
        with pytest.raises(IncompleteInput):
            find_artifact(root)
