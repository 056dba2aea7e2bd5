"""Guesses at what a wrong weight is: right ones where the mistake is a known one, none where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mxconv.verify import Options, verify
from tests.spoil import (
    Folder,
    exchange_halves,
    expert,
    interleaved_qkv,
    keys_for_queries,
    nibbles_swapped,
    on,
    rank_twice,
    ranks_exchanged,
    swapped,
)

MOE_1 = "model.layers.1.block_sparse_moe.experts."
GATE = "model.layers.0.self_attn.output_gate.weight"


@pytest.mark.parametrize(
    ("scheme", "spoil", "words"),
    [
        ("w4afp8", swapped(f"{MOE_1}0.", f"{MOE_1}2.", (1,)), "that of expert 2"),
        (None, swapped(f"{MOE_1}0.", f"{MOE_1}2.", (1,)), "that of expert 2"),
        (None, swapped("model.layers.0.self_attn.norm", "model.layers.2.self_attn.norm", (0,)), "that of layer 2"),
        ("w4afp8", rank_twice, "that of rank 0"),
        (None, ranks_exchanged, "that of rank 1"),
        (None, on(f"{expert(1, 0, 'up_gate')}weight", exchange_halves(1)), "gate and up exchanged"),
        (None, on(GATE, lambda x: x.roll(1, 0), (0,)), "its inputs moved by 1"),
        (None, on(GATE, lambda x: x.roll(-1, 1), (0,)), "its outputs moved by -1"),
        (None, on("model.layers.2.self_attn.qkv_proj.weight", keys_for_queries(2, 64)), "the layer's k"),
        ("block_wise_fp8", on(f"{expert(0, 0, 'down')}weight_scale", lambda s: s * 4), "the source times 3.99"),
    ],
)
def test_known_mistakes(
    scheme: str | None, spoil: Callable[[Folder], None], words: str, made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    lines = findings(scheme, spoil, made, small, tmp_path)
    assert any(f"it looks like {words}" in line for line in lines), lines[:4]


def test_a_third_of_the_interleaved_rows(made: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    def spoil(folder: Folder) -> None:
        folder.source_tensors = lambda: _all_tensors(small)  # type: ignore[method-assign]
        interleaved_qkv(folder)

    assert any("source's order (head, {q, k, v}, dim)" in line for line in findings(None, spoil, made, small, tmp_path))


@pytest.mark.parametrize(
    "spoil",
    [
        on(f"{expert(1, 0, 'up_gate')}quant_weight", nibbles_swapped, (0,)),
        on(f"{expert(1, 0, 'up_gate')}weight_scale", lambda s: s * (1 + torch.arange(s.numel()).view_as(s) % 2)),
    ],
    ids=["nibbles", "every other scale doubled"],
)
def test_no_guess_where_there_is_none(
    spoil: Callable[[Folder], None], made: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    lines = findings("w4afp8", spoil, made, small, tmp_path)
    assert lines and not any("looks like" in line for line in lines)


def findings(
    scheme: str | None, spoil: Callable[[Folder], None], made: Callable[..., Path], source: Path, tmp_path: Path
) -> list[str]:
    shutil.copytree(made(scheme, 2), tmp_path / "out")
    folder = Folder(tmp_path / "out", source)
    spoil(folder)
    folder.save()
    return [finding.render() for finding in verify(tmp_path / "out", Options(source=source, sections=("numerics",))).findings]


def _all_tensors(source: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: x for file in source.glob("*.safetensors") for name, x in load_file(file).items()}
