"""Artifacts to be spoiled: a folder's tensors and config in memory, the mistakes that a converter could make in them, and a seal
that makes manifest and hashes match whatever was done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mxconv.artifact.manifest import FileFact, TensorFact, build_manifest
from tests.oracle.fastdeploy_writer import butterfly, cut, int4, pack

# Two groups to a rank's inputs everywhere, a square out_proj, a padded vocabulary, KV heads that rank pairs share at TP 4.
SHAPE: dict[str, Any] = {
    "layers": "lsl", "hidden": 256, "intermediate": 512, "heads": 8, "kv_heads": 2, "head_dim": 64, "rotary_dim": 32, "experts": 4,
    "vocab": 200, "files": 1, "seed": 3,
}  # fmt: skip
DTYPE_CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8", torch.float16: "F16"}
MOE = "model.layers.{}.block_sparse_moe."


class Folder:
    """An artifact to be spoiled: config and tensors of each rank in memory, written back by `save`."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root, self.source = root, source
        self.config: dict[str, Any] = json.loads((root / "config.json").read_text())
        self.tp: int = self.config["mxconv"]["tp"]
        self.files = [next((root / f"rank{r}").glob("*.safetensors")) for r in range(self.tp)]
        self.ranks: list[dict[str, Tensor]] = [load_file(file) for file in self.files]

    def save(self) -> None:
        """Write config and tensors, then seal."""
        (self.root / "config.json").write_text(json.dumps(self.config, indent=2))
        for file, tensors in zip(self.files, self.ranks, strict=True):
            save_file({name: x.contiguous().clone() for name, x in tensors.items()}, file, metadata={"format": "pt"})
            index = {
                "metadata": {"total_size": sum(x.nbytes for x in tensors.values())},
                "weight_map": dict.fromkeys(tensors, file.name),
            }
            (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
        seal(self.root)

    def source_tensors(self) -> dict[str, Tensor]:
        """The checkpoint."""
        return load_file(self.source / "model.safetensors")


def seal(root: Path) -> None:
    """Make manifest.json match what lies in the folder."""
    body = json.loads((root / "manifest.json").read_text())
    files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() or name in ("manifest.json", "run.log"):
            continue
        tensors = load_file(path) if path.suffix == ".safetensors" else {}
        facts = {
            key: TensorFact(
                dtype=DTYPE_CODES[x.dtype], shape=tuple(x.shape),
                sha256=hashlib.sha256(x.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest(),
            )
            for key, x in tensors.items()
        }  # fmt: skip
        data = path.read_bytes()
        files[name] = FileFact(path=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), tensors=facts)
    extra = {key: value for key, value in body.items() if key not in ("schema", "plan_digest", "files", "sha256")}
    (root / "manifest.json").write_bytes(build_manifest(plan_digest=body["plan_digest"], files=files, extra=extra))


def expert(layer: int, number: int, projection: str) -> str:
    """Stem of an expert's tensors."""
    return f"{MOE.format(layer)}experts.{number}.{projection}_proj."


def in_ranks(change: Callable[[dict[str, Tensor], int], None], ranks: tuple[int, ...] | None = None) -> Callable[[Folder], None]:
    """`change(tensors, rank)` in all ranks, or some."""

    def spoil(folder: Folder) -> None:
        for rank in ranks or range(folder.tp):
            change(folder.ranks[rank], rank)

    return spoil


def on(name: str, change: Callable[[Tensor], Tensor], ranks: tuple[int, ...] | None = None) -> Callable[[Folder], None]:
    """Replace tensor `name` by `change` of it."""

    def apply(tensors: dict[str, Tensor], rank: int) -> None:
        tensors[name] = change(tensors[name].clone())

    return in_ranks(apply, ranks)


def swapped(a: str, b: str, ranks: tuple[int, ...] | None = None) -> Callable[[Folder], None]:
    """Exchange the tensors whose names begin with stems `a` and `b`."""

    def apply(tensors: dict[str, Tensor], rank: int) -> None:
        for name in [name for name in tensors if name.startswith(a)]:
            other = b + name.removeprefix(a)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return in_ranks(apply, ranks)


def configured(**keys: Any) -> Callable[[Folder], None]:
    """Set config.json keys; a function gets the old value, `...` removes the key."""

    def spoil(folder: Folder) -> None:
        for key, value in keys.items():
            if value is ...:
                del folder.config[key]
            else:
                folder.config[key] = value(folder.config[key]) if callable(value) else value

    return spoil


def exchange_halves(axis: int) -> Callable[[Tensor], Tensor]:
    """[a | b] → [b | a]."""
    return lambda x: torch.cat(x.chunk(2, axis)[::-1], axis)


def gate_and_up(folder: Folder) -> None:
    for tensors in folder.ranks:
        stem = expert(0, 1, "up_gate")
        tensors[f"{stem}quant_weight"] = exchange_halves(1)(tensors[f"{stem}quant_weight"])
        tensors[f"{stem}weight_scale"] = exchange_halves(0)(tensors[f"{stem}weight_scale"])


def doubled_block(x: Tensor) -> Tensor:
    x[128:256, :128] *= 2
    return x


def scaled_group(factor: float) -> Callable[[Tensor], Tensor]:
    """128 outputs × one group of a w4afp8 scale [out, groups]."""

    def change(scale: Tensor) -> Tensor:
        scale[:128, 1] *= factor
        return scale

    return change


def one_group_shifted(packed: Tensor) -> Tensor:
    """One group of one output: every code one further (7 stays)."""
    codes = torch.stack(((packed[:64, 5] << 4) >> 4, packed[:64, 5] >> 4), 1).flatten().clamp(max=6) + 1
    packed[:64, 5] = torch.from_numpy(pack(codes.numpy()[:, None]))[:, 0]
    return packed


def one_code_negated(packed: Tensor) -> Tensor:
    """The largest code of one column, with the other sign."""
    low = (packed[:, 9] << 4) >> 4
    row = int(low.abs().argmax())
    packed[row, 9] = (packed[row, 9] & -16) | (-int(low[row]) & 15)
    return packed


def nibbles_swapped(packed: Tensor) -> Tensor:
    bytes_ = packed.view(torch.uint8)
    return ((bytes_ >> 4) | (bytes_ << 4)).view(torch.int8)


def minus_eight(packed: Tensor) -> Tensor:
    packed[3, 4] = (packed[3, 4] & -16) | 8
    return packed


def interleaved_qkv(folder: Folder) -> None:
    """The source's rows (head, {q, k, v}, dim), cut into ranks and transposed, and never reordered."""
    name = "model.layers.0.self_attn.qkv_proj.weight"
    rows = folder.source_tensors()[name].chunk(folder.tp)
    for rank, tensors in enumerate(folder.ranks):
        tensors[name] = rows[rank].T


def keys_for_queries(layer: int, width: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat((x[:, width : 2 * width], x[:, :width], x[:, 2 * width :]), 1)


def unrotated(folder: Folder) -> None:
    """down_proj of one expert encoded without the rotation that the config promises."""
    stem = expert(1, 2, "down")
    w = folder.source_tensors()[f"{MOE.format(1)}experts.2.w2.weight"].float().numpy()
    coded = int4(w, 128, 0)
    for rank, tensors in enumerate(folder.ranks):
        codes = np.ascontiguousarray(cut(coded.codes, rank, folder.tp, 1).T)
        tensors[f"{stem}quant_weight"] = torch.from_numpy(pack(codes))
        tensors[f"{stem}weight_scale"] = torch.from_numpy(np.ascontiguousarray(cut(coded.scale, rank, folder.tp, 1)))


def rotated_up_gate(folder: Folder) -> None:
    """up_gate rotated as if it were down_proj."""
    stem = expert(0, 3, "up_gate")
    t = folder.source_tensors()
    w = torch.cat([t[f"{MOE.format(0)}experts.3.{n}.weight"] for n in ("w1", "w3")]).float().numpy()
    coded = int4(butterfly(w, 128) / np.float32(128**0.5), 128, 0)
    for rank, tensors in enumerate(folder.ranks):
        codes = np.ascontiguousarray(cut(coded.codes, rank, folder.tp, 0, halves=True).T)
        tensors[f"{stem}quant_weight"] = torch.from_numpy(pack(codes))
        tensors[f"{stem}weight_scale"] = torch.from_numpy(cut(coded.scale, rank, folder.tp, 0, halves=True))


def other_rotation(folder: Folder) -> None:
    """The files hold H_128, the config says H_256."""
    folder.config["mxconv"]["rotation"]["down_proj"] = 256
    folder.config["quantization_config"]["hadamard_block_size"] = 256


def own_scales(folder: Folder) -> None:
    """w4a8 down_proj quantized rank by rank: each has the absmax of its own slice."""
    stem = expert(2, 0, "down")
    w = folder.source_tensors()[f"{MOE.format(2)}experts.0.w2.weight"].float().numpy()
    for rank, tensors in enumerate(folder.ranks):
        coded = int4(np.ascontiguousarray(cut(w, rank, folder.tp, 1)), None, 128)
        tensors[f"{stem}quant_weight"] = torch.from_numpy(pack(np.ascontiguousarray(coded.codes.T)))
        tensors[f"{stem}weight_scale"] = torch.from_numpy(coded.scale)


def rank_twice(folder: Folder) -> None:
    folder.ranks[1] = dict(folder.ranks[0])


def ranks_exchanged(folder: Folder) -> None:
    folder.ranks.reverse()


def norm_of_rank_0(folder: Folder) -> None:
    name = "model.layers.2.self_attn.norm.weight"
    folder.ranks[1][name] = folder.ranks[0][name]


def kv_of_neighbour(folder: Folder) -> None:
    """Rank 1 of 4 gets the KV head of ranks 2 and 3."""
    name = "model.layers.1.self_attn.qkv_proj.weight"
    width = 64 * SHAPE["heads"] // folder.tp
    folder.ranks[1][name] = torch.cat((folder.ranks[1][name][:, :width], folder.ranks[2][name][:, width:]), 1)


def padding_filled(folder: Folder) -> None:
    folder.ranks[1]["model.embed_tokens.weight"][-3] = 1.0


def experts_of_rank_1(folder: Folder) -> None:
    """One expert's down_proj of rank 0 is rank 1's."""
    stem = expert(1, 0, "down")
    for name in [name for name in folder.ranks[0] if name.startswith(stem)]:
        folder.ranks[0][name] = folder.ranks[1][name]


def other_seed(folder: Folder) -> None:
    """Layer 1's experts hold those of layer 2."""
    for tensors in folder.ranks:
        for name in [name for name in tensors if name.startswith(f"{MOE.format(1)}experts")]:
            tensors[name] = tensors[name.replace("layers.1", "layers.2")]


def kept_unquantized(folder: Folder) -> None:
    """One expert's projection stored as .weight, which the config does not mention."""
    stem = expert(1, 1, "down")
    w = folder.source_tensors()[f"{MOE.format(1)}experts.1.w2.weight"]
    for rank, tensors in enumerate(folder.ranks):
        for name in [name for name in tensors if name.startswith(stem)]:
            del tensors[name]
        tensors[f"{stem}weight"] = w.chunk(folder.tp, 1)[rank].T


def gone(name: str) -> Callable[[Folder], None]:
    def apply(tensors: dict[str, Tensor], rank: int) -> None:
        del tensors[name]

    return in_ranks(apply, (1,))


def extra(folder: Folder) -> None:
    folder.ranks[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def slopes_kept(folder: Folder) -> None:
    folder.config["mxconv"]["slopes"] = {"0": [(0.5).hex()] * SHAPE["heads"]}


def eos_beyond(folder: Folder) -> None:
    folder.config["eos_token_id"] = SHAPE["vocab"] + 5


def half_precision_norm(folder: Folder) -> None:
    for tensors in folder.ranks:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float16)
