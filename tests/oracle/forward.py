"""A second forward of the model, written from its description alone: float64, one sequence, one token at a time.

It reads source checkpoints with the safetensors package and shares no line with the product. Slow and plain on purpose.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

F64 = torch.float64


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(config, all tensors) of a source checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def slope(heads: int, head: int) -> float:
    power = 2 ** math.floor(math.log2(heads))
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.to(F64) * x / torch.sqrt((x * x).mean() + eps)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


class Oracle:
    """`Oracle(folder).logits(ids)` → float64 [T, V]."""

    def __init__(self, folder: Path) -> None:
        c, self.t = read(folder)
        self.c = c
        self.inner = torch.empty(0)
        """The last input of a down projection."""
        self.seen: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        """(layer, expert) → inputs of its two projections, token by token."""
        self.dialect = "minimax" if c["model_type"] == "minimax" else "m1"
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim = c.get("head_dim") or c["hidden_size"] // self.heads
        self.layers = c["num_hidden_layers"]
        if self.dialect == "m1":
            self.linear = [kind == 0 for kind in c["attn_type_list"]]
            self.postnorm = c.get("postnorm", False)
            self.factors = {
                "full": (c.get("layernorm_full_attention_alpha", 1), c.get("layernorm_full_attention_beta", 1)),
                "linear": (c.get("layernorm_linear_attention_alpha", 1), c.get("layernorm_linear_attention_beta", 1)),
                "mlp": (c.get("layernorm_mlp_alpha", 1), c.get("layernorm_mlp_beta", 1)),
            }
        else:
            self.linear = [kind == "linear_attention" for kind in c["layer_types"]]
            self.postnorm = True
            self.factors = {
                "full": (c["full_attn_alpha_factor"], c["full_attn_beta_factor"]),
                "linear": (c["linear_attn_alpha_factor"], c["linear_attn_beta_factor"]),
                "mlp": (c["mlp_alpha_factor"], c["mlp_beta_factor"]),
            }
        rope = c.get("rope_parameters") or {}
        self.rotary = c.get("rotary_dim") or self.dim
        self.theta = c.get("rope_theta", 1e6)
        self.offset = self.rotary // 2  # slot of the second half of the rotated dims
        if rope.get("rope_type") == "proportional":
            self.rotary = round(self.dim * rope["partial_rotary_factor"])
            self.theta = rope["rope_theta"] ** rope["partial_rotary_factor"]
            self.offset = self.dim // 2

    def w(self, name: str) -> Tensor:
        return self.t[name].to(F64)

    def logits(self, ids: Tensor, rates: dict[int, list[float]] | None = None) -> Tensor:
        """float64 [T, V]; `rates` replaces the decay of some lightning layers."""
        x = self.w("model.embed_tokens.weight")[ids]
        for layer in range(self.layers):
            p = f"model.layers.{layer}."
            eps = self.c["rms_norm_eps"]
            h = torch.stack([norm(row, self.t[p + "input_layernorm.weight"], eps) for row in x])
            if self.linear[layer]:
                update, (alpha, beta) = self.lightning(p, layer, h, rates or {}), self.factors["linear"]
            else:
                update, (alpha, beta) = self.softmax(p, h), self.factors["full"]
            x = alpha * (h if self.postnorm else x) + beta * update
            h = torch.stack([norm(row, self.t[p + "post_attention_layernorm.weight"], eps) for row in x])
            alpha, beta = self.factors["mlp"]
            x = alpha * (h if self.postnorm else x) + beta * torch.stack([self.mlp(p, row) for row in h])
        x = torch.stack([norm(row, self.t["model.norm.weight"], self.c["rms_norm_eps"]) for row in x])
        head = "model.embed_tokens.weight" if self.c.get("tie_word_embeddings") else "lm_head.weight"
        return x @ self.w(head).T

    def lightning(self, p: str, layer: int, h: Tensor, rates: dict[int, list[float]]) -> Tensor:
        z = silu(h @ self.w(p + "self_attn.qkv_proj.weight").T).view(-1, self.heads, 3 * self.dim)
        q, k, v = z[..., : self.dim], z[..., self.dim : 2 * self.dim], z[..., 2 * self.dim :]
        depth = layer / (self.layers - 1) if self.layers > 1 else 0
        own = [slope(self.heads, head) * (1 - depth + 1e-5) for head in range(self.heads)]
        decay = torch.tensor([math.exp(-s) for s in rates.get(layer, own)], dtype=F64)
        state = torch.zeros(self.heads, self.dim, self.dim, dtype=F64)
        rows = []
        for t in range(len(h)):
            state = decay[:, None, None] * state + k[t][:, :, None] * v[t][:, None, :]
            out = (q[t][:, :, None] * state).sum(1).reshape(-1)
            out = norm(out, self.t[p + "self_attn.norm.weight"], 1e-6)
            gate = sigmoid(self.w(p + "self_attn.output_gate.weight") @ h[t])
            rows.append(self.w(p + "self_attn.out_proj.weight") @ (out * gate))
        return torch.stack(rows)

    def turn(self, head: Tensor, position: int) -> Tensor:
        """Rotary position of one head vector [D]."""
        out = head.clone()
        for j in range(self.rotary // 2):
            exponent = torch.tensor(2 * j, dtype=torch.float32) / self.rotary
            angle = position * float(1.0 / torch.tensor(self.theta, dtype=torch.float32) ** exponent)
            a, b = head[j], head[j + self.offset]
            out[j] = a * math.cos(angle) - b * math.sin(angle)
            out[j + self.offset] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def softmax(self, p: str, h: Tensor) -> Tensor:
        q = (h @ self.w(p + "self_attn.q_proj.weight").T).view(-1, self.heads, self.dim)
        k = (h @ self.w(p + "self_attn.k_proj.weight").T).view(-1, self.kv, self.dim)
        v = (h @ self.w(p + "self_attn.v_proj.weight").T).view(-1, self.kv, self.dim)
        q = torch.stack([torch.stack([self.turn(head, t) for head in row]) for t, row in enumerate(q)])
        k = torch.stack([torch.stack([self.turn(head, t) for head in row]) for t, row in enumerate(k)])
        rows = []
        for t in range(len(h)):
            heads = []
            for n in range(self.heads):
                g = n // (self.heads // self.kv)
                weight = torch.exp(k[: t + 1, g] @ q[t, n] / math.sqrt(self.dim))
                heads.append((weight / weight.sum()) @ v[: t + 1, g])
            rows.append(self.w(p + "self_attn.o_proj.weight") @ torch.cat(heads))
        return torch.stack(rows)

    def swiglu(self, gate: Tensor, up: Tensor, down: Tensor, h: Tensor) -> Tensor:
        self.inner = silu(gate @ h) * (up @ h)
        return down @ self.inner

    def expert(self, p: str, e: int, h: Tensor) -> Tensor:
        """One routed expert's output of one token [H]."""
        if p + "mlp.experts.down_proj" in self.t:
            gate, up = self.t[p + "mlp.experts.gate_up_proj"][e].to(F64).chunk(2)
            return self.swiglu(gate, up, self.t[p + "mlp.experts.down_proj"][e].to(F64), h)
        e1, e2, e3 = (self.w(f"{p}block_sparse_moe.experts.{e}.w{i}.weight") for i in (1, 2, 3))
        return self.swiglu(e1, e3, e2, h)

    def mlp(self, p: str, h: Tensor) -> Tensor:
        if p + "mlp.gate_proj.weight" in self.t:
            y = self.swiglu(*(self.w(f"{p}mlp.{name}_proj.weight") for name in ("gate", "up", "down")), h)
        else:
            router = p + "mlp.gate.weight" if p + "mlp.gate.weight" in self.t else p + "block_sparse_moe.gate.weight"
            share = torch.exp(self.w(router) @ h)
            share = share / share.sum()
            top = sorted(range(len(share)), key=lambda e: -share[e])[: self.c["num_experts_per_tok"]]
            total = sum(share[e] for e in top)
            y = torch.zeros_like(h)
            for e in top:
                y = y + share[e] / total * self.expert(p, e, h)
                self.seen.setdefault((int(p.split(".")[2]), e), []).append((h, self.inner))
        if p + "coefficient.weight" in self.t:
            c = sigmoid(self.w(p + "coefficient.weight") @ h)
            beside = self.swiglu(*(self.w(f"{p}shared_mlp.{name}_proj.weight") for name in ("gate", "up", "down")), h)
            y = y * (1 - c) + beside * c
        return y
