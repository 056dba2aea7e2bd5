"""fastdeploy artifacts written by an independent hand from formats.md §2: whole tensors are encoded, then cut into ranks.

numpy for the arithmetic, the safetensors package for the files. Nothing here comes from the converter; only the name of a
scheme's fields is taken from the scheme table, for the `mxconv` block of config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mxconv.quantize.schemes import get_scheme
from tests.oracle.forward import read

Absmax = Mapping[tuple[int, int, str], float]
"""(layer, expert, projection) → max |x| of the projection's input after the rotation."""

F32 = np.float32


def butterfly(x: np.ndarray, block: int) -> np.ndarray:
    """Unnormalised natural-order Walsh-Hadamard transform of runs of `block` along the last axis, float32, stages 1, 2, 4 …"""
    shape = x.shape
    x = x.astype(F32).reshape(-1, block)
    step = 1
    while step < block:
        pairs = x.reshape(-1, block // (2 * step), 2, step)
        x = np.concatenate([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2).reshape(-1, block)
        step *= 2
    return x.reshape(shape)


def e4m3(x: np.ndarray) -> np.ndarray:
    """e4m3 bytes as int8 of float32 values, clamped first."""
    return torch.from_numpy(np.clip(x, F32(-448), F32(448))).to(torch.float8_e4m3fn).view(torch.int8).numpy()


@dataclass(frozen=True)
class Projection:
    """A whole projection, encoded: codes int8 [out, in], scale [out, in/g] | [out] | [out/128, in/128] | [1]."""

    codes: np.ndarray
    scale: np.ndarray


def int4(w: np.ndarray, group: int | None, block: int) -> Projection:
    """`w` float32 [out, in]; `group` None is one scale an output; `block` is the Hadamard block, 0 for none."""
    root = np.sqrt(F32(block)) if block else F32(1)
    if block:
        w = butterfly(w, block) / root
    runs = w.reshape(len(w), -1, group or w.shape[1])
    absmax = np.abs(runs).max(-1)
    absmax = np.where(absmax == 0, F32(1), absmax)
    codes = np.clip(np.rint((runs / absmax[..., None]) * F32(7)), -7, 7).astype(np.int8).reshape(w.shape)
    scale = absmax / root if block else absmax
    return Projection(codes, scale if group else scale[:, 0])


def fp8_block(w: np.ndarray) -> Projection:
    blocks = w.reshape(len(w) // 128, 128, -1, 128)
    absmax = np.abs(blocks).max((1, 3))
    scale = np.where(absmax == 0, F32(1), absmax / F32(448))
    return Projection(e4m3(blocks / scale[:, None, :, None]).reshape(w.shape), scale)


def fp8_tensor(w: np.ndarray) -> Projection:
    w = butterfly(w, 32) / F32(32)
    absmax = np.abs(w).max()
    scale = F32(1) if absmax == 0 else absmax / F32(448)
    return Projection(e4m3(w / scale), np.array([scale], F32))


def encode(name: str, w: np.ndarray, projection: str, group: int | None, block: int) -> Projection:
    """`w` float32 [out, in] of up_gate (gate rows, then up rows) or down, whole."""
    kinds: dict[str, Callable[[], Projection]] = {
        "w4a8": lambda: int4(w, None, block if projection == "down_proj" else 0),
        "w4afp8": lambda: int4(w, group, block if projection == "down_proj" else 0),
        "w4afp8_static": lambda: int4(w, group, block if projection == "down_proj" else 0),
        "block_wise_fp8": lambda: fp8_block(w),
        "tensor_wise_fp8": lambda: fp8_tensor(w),
    }
    return kinds[name]()


def pack(codes: np.ndarray) -> np.ndarray:
    """[in, out] int4 codes → bytes [in/2, out], low nibble the even input."""
    low, high = codes[0::2].astype(np.uint8) & 15, codes[1::2].astype(np.uint8) & 15
    return (low | (high << 4)).view(np.int8)


def cut(x: np.ndarray, rank: int, ranks: int, axis: int, halves: bool = False) -> np.ndarray:
    """A rank's share along `axis`; with `halves` its share of each half (gate, up)."""
    if not halves:
        return np.split(x, ranks, axis)[rank]
    return np.concatenate([np.split(half, ranks, axis)[rank] for half in np.split(x, 2, axis)], axis)


class Writer:
    """Holds the source and writes one artifact."""

    def __init__(
        self, source: Path, *, tp: int, scheme: str | None, group: int | str | None, hadamard: int, absmax: Absmax | None,
        ignore: Collection[int],
    ) -> None:  # fmt: skip
        self.c, self.t = read(source)
        self.tp, self.scheme, self.absmax, self.ignore = tp, scheme, absmax, set(ignore)
        self.group = None if scheme == "w4a8" or group == "channel" else int(group or 128)
        self.hadamard = hadamard
        self.row = None
        if scheme:
            int4_scheme = scheme.startswith("w4a")
            self.row = get_scheme(
                scheme, group_size=group if scheme.startswith("w4afp8") else None,  # type: ignore[arg-type]
                hadamard_block=hadamard if int4_scheme else None,
            )
        self.heads, self.kv = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        self.dim = self.c.get("head_dim") or self.c["hidden_size"] // self.heads

    def rank(self, r: int) -> dict[str, Tensor]:
        """All tensors of rank `r`."""
        out = self.top(r)
        for layer in range(self.c["num_hidden_layers"]):
            p = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                out[f"{p}{name}.weight"] = self.t[f"{p}{name}.weight"]
            out |= self.attention(p, r) | self.feed_forward(p, layer, r)
        return {name: tensor.contiguous() for name, tensor in out.items()}

    def top(self, r: int) -> dict[str, Tensor]:
        vocab = self.c["vocab_size"]
        padding = -vocab % 64
        embed = torch.nn.functional.pad(self.t["model.embed_tokens.weight"], (0, 0, 0, padding))
        out = {
            "model.embed_tokens.weight": embed.chunk(self.tp)[r], "model.norm.weight": self.t["model.norm.weight"],
        }  # fmt: skip
        if not self.c.get("tie_word_embeddings"):
            head = self.t["lm_head.weight"]
            if vocab % self.tp:
                head = torch.nn.functional.pad(head, (0, 0, 0, padding))
            out["lm_head.weight"] = head.chunk(self.tp)[r].T
        return out

    def attention(self, p: str, r: int) -> dict[str, Tensor]:
        a, each = f"{p}self_attn.", self.heads // self.tp
        mine = slice(r * each, (r + 1) * each)
        if f"{a}qkv_proj.weight" in self.t:
            qkv = self.t[f"{a}qkv_proj.weight"].view(self.heads, 3, self.dim, -1)[mine]
            fused = qkv.transpose(0, 1).reshape(3 * each * self.dim, -1)
            gate = self.t[f"{a}output_gate.weight"].view(self.heads, self.dim, -1)[mine].flatten(0, 1)
            out = self.t[f"{a}out_proj.weight"].view(-1, self.heads, self.dim)[:, mine].flatten(1)
            norm = self.t[f"{a}norm.weight"].view(self.heads, self.dim)[mine].flatten()
            return {
                f"{a}qkv_proj.weight": fused.T, f"{a}output_gate.weight": gate.T, f"{a}norm.weight": norm,
                f"{a}out_proj.weight": out.T,
            }  # fmt: skip
        kv = self.kv // self.tp if self.tp <= self.kv else 1
        first = r * self.kv // self.tp
        q = self.t[f"{a}q_proj.weight"].view(self.heads, self.dim, -1)[mine].flatten(0, 1)
        k, v = (self.t[f"{a}{n}_proj.weight"].view(self.kv, self.dim, -1)[first : first + kv].flatten(0, 1) for n in "kv")
        out = self.t[f"{a}o_proj.weight"].view(-1, self.heads, self.dim)[:, mine].flatten(1)
        return {f"{a}qkv_proj.weight": torch.cat((q, k, v)).T, f"{a}o_proj.weight": out.T}

    def swiglu(self, gate: str, up: str, down: str, r: int) -> tuple[Tensor, Tensor]:
        g, u = (self.t[name].chunk(self.tp)[r] for name in (gate, up))
        return torch.cat((g, u)).T, self.t[down].chunk(self.tp, dim=1)[r].T

    def feed_forward(self, p: str, layer: int, r: int) -> dict[str, Tensor]:
        out = {}
        for place in ("mlp", "shared_mlp"):
            if f"{p}{place}.gate_proj.weight" in self.t:
                names = (f"{p}{place}.{n}_proj.weight" for n in ("gate", "up", "down"))
                out[f"{p}{place}.up_gate_proj.weight"], out[f"{p}{place}.down_proj.weight"] = self.swiglu(*names, r)
        if f"{p}coefficient.weight" in self.t:
            out[f"{p}coefficient.weight"] = self.t[f"{p}coefficient.weight"].T
        router = f"{p}block_sparse_moe.gate.weight"
        if router in self.t:
            out[router] = self.t[router].float().T
            for e in range(self.c["num_local_experts"]):
                out |= self.expert(f"{p}block_sparse_moe.experts.{e}.", layer, e, r)
        return out

    def expert(self, p: str, layer: int, e: int, r: int) -> dict[str, Tensor]:
        if self.scheme is None or layer in self.ignore:
            up_gate, down = self.swiglu(f"{p}w1.weight", f"{p}w3.weight", f"{p}w2.weight", r)
            return {f"{p}up_gate_proj.weight": up_gate, f"{p}down_proj.weight": down}
        w1, w2, w3 = (self.t[f"{p}w{i}.weight"].float().numpy() for i in (1, 2, 3))
        out = {}
        for projection, w in (("up_gate_proj", np.concatenate((w1, w3))), ("down_proj", w2)):
            coded = encode(self.scheme, w, projection, self.group, self.hadamard)
            halves = projection == "up_gate_proj"
            codes = np.ascontiguousarray(cut(coded.codes, r, self.tp, 0 if halves else 1, halves).T)
            stored = pack(codes) if self.scheme.startswith("w4a") else codes
            out[f"{p}{projection}.quant_weight"] = torch.from_numpy(stored)
            out[f"{p}{projection}.weight_scale"] = torch.from_numpy(np.ascontiguousarray(self.scale(coded.scale, halves, r)))
            if self.absmax is not None:
                value = self.absmax[layer, e, projection] / (448.0 if self.scheme == "tensor_wise_fp8" else 1.0)
                out[f"{p}{projection}.activation_scale"] = torch.tensor([value], dtype=torch.float32)
        return out

    def scale(self, scale: np.ndarray, up_gate: bool, r: int) -> np.ndarray:
        """A rank's stored scale."""
        if scale.shape == (1,):
            return scale
        if scale.ndim == 1:
            return cut(scale, r, self.tp, 0, halves=True) if up_gate else scale
        mine = cut(scale, r, self.tp, 0, halves=True) if up_gate else cut(scale, r, self.tp, 1)
        return mine if self.scheme == "w4afp8" else mine.T

    def config(self) -> dict[str, Any]:
        """config.json of the artifact."""
        c = {key: value for key, value in self.c.items() if key not in ("transformers_version", "torch_dtype", "auto_map")}
        c |= {"dtype": "bfloat16", "norm_topk_prob": True, "moe_num_experts": c["num_local_experts"]}
        c["mxconv"] = {"version": 1, "layout": "fastdeploy", "tp": self.tp, "scheme": None}
        if self.row is not None:
            c["mxconv"] |= self.row.block()
            kind = "w4afp8" if self.scheme == "w4afp8_static" else self.scheme
            quant: dict[str, Any] = {"quantization": "mix_quant", "moe_quant_type": kind, "is_permuted": self.row.is_permuted}
            if self.scheme != "block_wise_fp8":
                quant |= {"moe_dynamic_quant": self.scheme == "w4afp8"}
                quant["hadamard_block_size"] = 32 if self.scheme == "tensor_wise_fp8" else self.hadamard
            c |= {"is_quantized": True, "quantization_config": quant}
        return c


def write_artifact(
    source: Path, out: Path, *, tp: int = 1, scheme: str | None = None, group: int | str | None = None, hadamard: int = 128,
    absmax: Absmax | None = None, ignore: Collection[int] = (), mxconv: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """The artifact of `source` (minimax-m1 dialect) in `out`: every rank's files, config.json and a minimal manifest.json.

    `absmax` is needed for static schemes; `ignore` are layers whose experts stay unquantized; `mxconv` adds to that block.
    """
    writer = Writer(source, tp=tp, scheme=scheme, group=group, hadamard=hadamard, absmax=absmax, ignore=ignore)
    for r in range(tp):
        folder = out / f"rank{r}" if tp > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        tensors = writer.rank(r)
        file = "model-00001-of-00001.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), file)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = writer.config()
    config["mxconv"] |= dict(mxconv or {})
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "manifest.json").write_text(json.dumps({"version": 1}))
    return out
