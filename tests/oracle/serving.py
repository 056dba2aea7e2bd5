"""What a serving engine computes with a quantized fastdeploy artifact, from formats.md §2: the second forward with its
experts' GEMMs replaced. float64, one token at a time; reads the artifact's rank files itself.
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tests.oracle.forward import F64, Oracle, silu


@lru_cache
def matrix(block: int) -> Tensor:
    """H_block: entry (i, j) is the parity of the bits that i and j share."""
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(block)] for i in range(block)], dtype=F64)


def e4m3_round(x: Tensor) -> Tensor:
    """The nearest e4m3 value of x in float32, ties to even mantissas, saturating at 448; from the format's definition."""
    x = x.float().double()
    magnitude = x.abs().clamp(max=448.0)
    exponent = torch.floor(torch.log2(magnitude.clamp(min=2.0**-6))).clamp(min=-6)
    step = 2.0 ** (exponent - 3)
    return torch.sign(x) * (torch.round(magnitude / step) * step).clamp(max=448.0)


def e4m3_values() -> Tensor:
    """The 256 values of e4m3fn by code."""
    values = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(math.nan if code & 127 == 127 else sign * value)
    return torch.tensor(values, dtype=F64)


class Serving(Oracle):
    """`Serving(source, artifact).logits(ids)`: everything but routed experts from the source, those from the artifact."""

    def __init__(self, source: Path, artifact: Path, *, quantize_activations: bool = True) -> None:
        super().__init__(source)
        from safetensors.torch import load_file

        config = json.loads((artifact / "config.json").read_text())
        block = config["mxconv"]
        self.scheme, self.group, self.rotation = block["scheme"], block["group_size"], block["rotation"]
        self.activations = quantize_activations
        folders = [artifact / f"rank{r}" for r in range(block["tp"])] if block["tp"] > 1 else [artifact]
        self.ranks = [
            {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
            for folder in folders
        ]
        self.decoded: dict[tuple[int, str], Tensor] = {}

    def weight(self, r: int, p: str, projection: str) -> Tensor:
        """[out, in] that multiplies the rotated activation."""
        found = self.decoded.get((r, p))
        if found is not None:
            return found
        stored, scale = self.ranks[r][f"{p}.quant_weight"], self.ranks[r][f"{p}.weight_scale"].to(F64)
        if self.scheme.startswith("w4a"):
            codes = torch.empty(2 * len(stored), stored.shape[1], dtype=F64)
            unsigned = stored.to(torch.int64) & 255
            for half, nibble in enumerate((unsigned & 15, unsigned >> 4)):
                codes[half::2] = torch.where(nibble > 7, nibble - 16, nibble).to(F64)
            scale = scale / 7
        else:
            codes = e4m3_values()[stored.to(torch.int64) & 255]
        inner, out = codes.shape
        if self.scheme == "block_wise_fp8":
            full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        elif scale.ndim == 2:
            grouped = scale.T if self.scheme == "w4afp8" else scale
            full = grouped.repeat_interleave(self.group, 0)
        else:
            full = scale.expand(inner, out)
        self.decoded[r, p] = (codes * full).T.contiguous()
        return self.decoded[r, p]

    def activation(self, r: int, p: str, projection: str, x: Tensor) -> Tensor:
        """The rotated and, unless switched off, quantized input [in] of a projection."""
        block = self.rotation[projection]
        if block:
            x = (x.view(-1, block) @ matrix(block)).flatten()
        if not self.activations:
            return x
        if self.scheme == "block_wise_fp8":
            return torch.cat([self.scaled(run, run.abs().max() / 448) for run in x.split(128)])
        if self.scheme == "w4afp8":
            return self.scaled(x, x.abs().max() / 440)
        stored = self.ranks[r][f"{p}.activation_scale"].to(F64)
        if self.scheme == "w4a8":
            return torch.round(127 * x / stored).clamp(-127, 127) * stored / 127
        if self.scheme == "tensor_wise_fp8":
            return self.scaled(x, stored)
        codes = 448 * x / stored
        return e4m3_round(torch.round(codes) if projection == "down_proj" else codes) * stored / 448

    @staticmethod
    def scaled(x: Tensor, scale: Tensor) -> Tensor:
        scale = torch.where(scale == 0, 1.0, scale)
        return e4m3_round(x / scale) * scale

    def expert(self, p: str, e: int, h: Tensor) -> Tensor:
        stem = f"{p}block_sparse_moe.experts.{e}"
        if f"{stem}.up_gate_proj.quant_weight" not in self.ranks[0]:
            return super().expert(p, e, h)
        y = torch.zeros_like(h)
        for r in range(len(self.ranks)):
            gate, up = (self.weight(r, f"{stem}.up_gate_proj", "up_gate_proj") @ self.activation(
                r, f"{stem}.up_gate_proj", "up_gate_proj", h)).chunk(2)  # fmt: skip
            inner = silu(gate) * up
            y = y + self.weight(r, f"{stem}.down_proj", "down_proj") @ self.activation(
                r, f"{stem}.down_proj", "down_proj", inner)  # fmt: skip
        return y
