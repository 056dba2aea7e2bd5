"""Each mistake that model.md warns of, made in the runtime, must break its bars: proof that the tests above can fail."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from mxconv.runtime import attention, batch, layer, lightning, load, loader, moe, norm, recurrence, rope, softmax
from mxconv.runtime import model as model_module
from tests.oracle.forward import Oracle
from tests.runtime.helpers import FLOAT32_BAR, FLOAT64_BAR, error, split_call
from tests.synthetic import make_checkpoint, random_ids


@dataclass(frozen=True)
class Mutation:
    """In the source of `where` (a function or a class) of `module`, `old` becomes `new`."""

    module: ModuleType
    where: str
    old: str
    new: str

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Compile the changed source in the module's own namespace and put it in the original's place, wherever it is used."""
        original = getattr(self.module, self.where)
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, f"the line to change is not in {self.where} (once)"
        names = dict(vars(self.module))
        exec(compile("from __future__ import annotations\n" + source.replace(self.old, self.new), "mutant", "exec"), names)
        for module in (attention, batch, layer, lightning, loader, model_module, moe, norm, recurrence, rope, softmax):
            if getattr(module, self.where, None) is original:
                monkeypatch.setattr(module, self.where, names[self.where])


M = Mutation
MISTAKES = {
    "linear norm eps 1e-5": M(norm, "scale_by_rms", "LINEAR_NORM_EPS", "1e-5"),
    "linear norm per rank": M(attention, "LightningAttention", "scale_by_rms(heads[rank], mean_square,",
                              "scale_by_rms(heads[rank], heads[rank].square().mean(-1, keepdim=True),"),
    "layer factor without 1e-5": M(lightning, "decay_rates", "1.0 - depth + 1e-5", "1.0 - depth"),
    "L-1+1e-5": M(lightning, "decay_rates", "(layers - 1)", "(layers - 1 + 1e-5)"),
    "layer counted from 1": M(lightning, "decay_rates", "layer / (", "(layer + 1) / ("),
    "slopes for powers of two": M(lightning, "head_slopes", "heads == below", "True"),
    "q decay from 0": M(lightning, "block_decay", "query=torch.exp(-s * count)", "query=torch.exp(-s * (count - 1))"),
    "current token decayed": M(lightning, "block_decay", "gap.clamp(min=0)", "(gap.clamp(min=0) + 1)"),
    "padding decays": M(lightning, "LightningDecay", "block_decay(self.rates, real.cumsum(1), real, self.dtype)",
                        "block_decay(self.rates, torch.ones_like(real).cumsum(1), real, self.dtype)"),
    "no silu on v": M(recurrence, "by_torch", "F.silu(qkv)", "torch.cat((F.silu(qkv[..., : -qkv.shape[-1] // 3]), "
                      "qkv[..., -qkv.shape[-1] // 3 :]), -1)"),
    "gate without sigmoid": M(attention, "LightningAttention", "torch.sigmoid(gates", "F.silu(gates"),
    "k and v exchanged": M(recurrence, "by_torch", "q, k, v = F.silu", "q, v, k = F.silu"),
    "heads of kv in turn": M(softmax, "attend", "k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)",
                             "k, v = k.repeat(1, shared, 1, 1), v.repeat(1, shared, 1, 1)"),
    "rope over the whole head": M(rope, "frequencies", "exponent =", "rotary_dim = 16; exponent ="),
    "rope interleaved": M(rope, "rotate_heads",
                          "x[..., :half], x[..., half : 2 * half]", "x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]"),
    "rope by head_dim": M(rope, "frequencies", "/ rotary_dim", "/ (2 * rotary_dim)"),
    "bf16 gate": M(moe, "FeedForward", "F.linear(tokens.to(router.dtype), router)",
                   "F.linear(tokens.bfloat16(), router.bfloat16()).to(router.dtype)"),
    "not renormalised": M(moe, "FeedForward", "top = top / top.sum(-1, keepdim=True)", "pass"),
    "gate and up exchanged": M(moe, "gated", "gate, up = up_gate", "up, gate = up_gate"),
    "coefficient the other way": M(moe, "FeedForward", "y * (1 - mixed) + beside * mixed", "y * mixed + beside * (1 - mixed)"),
    "residual before the norm": M(layer, "DecoderLayer", "(h, False) if self.postnorm else (x, True)", "(x, True)"),
    "mlp residual before the norm": M(layer, "DecoderLayer",
                                      "return add(h if self.postnorm else x", "return add(x"),
    "hidden norm eps": M(norm, "rms_norm", "F.rms_norm(x, weight.shape, weight, eps)",
                         "F.rms_norm(x, weight.shape, weight, 0.1 * eps)"),
    "positions count padding": M(batch, "make_batch", "positions = (real.cumsum(1) - 1)",
                                 "positions = torch.arange(columns)[None].expand(size, -1)"),
    "padding attended": M(batch, "make_batch", "real=all_real", "real=None"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(folder, ids and mask [2, 16] of which 12 are real, expected logits of the real ones)."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("m"), heads=6, kv_heads=2, layers="lsls", shared=32, intermediate=96, head_dim=16
    )  # fmt: skip
    ids = random_ids(128, 2, 16, seed=5)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[0, :4], mask[1, [2, 6, 7, 15]] = False, False
    oracle = Oracle(folder)
    return folder, ids, mask, torch.stack([oracle.logits(row[real]) for row, real in zip(ids, mask, strict=True)])


def measured(model: tuple[Path, torch.Tensor, torch.Tensor, torch.Tensor], tp: int) -> float:
    folder, ids, mask, expected = model
    logits = split_call(load(folder, tp=tp, dtype=torch.float64), ids, [9], mask)
    return error(logits[mask].view(expected.shape), expected)


@pytest.mark.parametrize("tp", [1, 2])
def test_without_a_mistake(model: Any, tp: int) -> None:
    assert measured(model, tp) <= FLOAT64_BAR


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_break_the_bar(name: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name].apply(monkeypatch)
    assert measured(model, 2 if name == "linear norm per rank" else 1) > FLOAT64_BAR


# The nearly silent ones on a trained model, where random weights could flatter the test: (mistake, dtype, bar).
SILENT = [
    ("linear norm eps 1e-5", torch.float32, FLOAT32_BAR),
    ("layer factor without 1e-5", torch.float32, FLOAT32_BAR),
    ("L-1+1e-5", torch.float64, FLOAT64_BAR),
    ("hidden norm eps", torch.float32, FLOAT32_BAR),
    ("bf16 gate", torch.float32, FLOAT32_BAR),
]


@pytest.mark.parametrize(("name", "dtype", "bar"), SILENT)
def test_silent_mistakes_on_a_trained_model(
    name: str, dtype: torch.dtype, bar: float, tiny_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.load(tiny_a.parent / "tiny-a-expected.npz")
    ids, expected = torch.from_numpy(data["long_ids"]).long(), torch.from_numpy(data["long_logits_last16"])
    run: Callable[[], float] = lambda: error(load(tiny_a, dtype=dtype)(ids, last=16), expected)  # noqa: E731
    assert run() <= bar
    MISTAKES[name].apply(monkeypatch)
    assert run() > bar
