"""The MoE kernels, each held to plain torch: in the interpreter with tiny shapes, on a GPU with real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxconv.quantize.schemes import SCHEMES, Scheme
from mxconv.runtime.coded import rotate
from tests.interpreted import interpreted, under_interpreter
from tests.runtime.helpers import error
from tests.runtime.kernels.moe_reference import VARIANTS, random_experts, random_inputs, reference, variant_name

test_in_the_interpreter = under_interpreter(__file__)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EACH_LOOP = ("w4afp8", "w4a8", "block_wise_fp8", "tensor_wise_fp8")
"""Schemes that between them run through every branch of the kernels."""


def check_layer(scheme: Scheme, device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, intermediate: int, experts: int,
                per_token: int, bar: float) -> None:  # fmt: skip
    from mxconv.runtime.kernels.moe import MoeExperts

    pairs = random_experts(scheme, experts, hidden, intermediate, seed=tokens)
    x, chosen, weights = random_inputs(tokens, hidden, experts, per_token, seed=tokens + 1)
    chosen[-1, 0] = -1  # a padded assignment
    x = x.to(dtype)
    layer = MoeExperts.pack(scheme, *zip(*pairs, strict=True), device)
    got = layer(x.to(device), chosen.to(device), weights.to(device)).cpu()
    expected = reference(scheme, pairs, x.float(), chosen, weights)
    assert got.dtype == dtype and got.isfinite().all()
    assert got[x.eq(0).all(-1)].eq(0).all()
    assert error(got, expected) <= bar


@interpreted
@pytest.mark.parametrize("scheme", VARIANTS, ids=variant_name)
def test_a_layer_interpreted(scheme: Scheme) -> None:
    # A hidden vector that differs in its last bits may round to another code: far below the distance of a wrong scale.
    check_layer(scheme, CPU, torch.float32, tokens=5, hidden=256, intermediate=256, experts=3, per_token=2, bar=5e-3)


@interpreted
@pytest.mark.parametrize("name", EACH_LOOP)
def test_a_layer_in_fp16_interpreted(name: str) -> None:
    check_layer(SCHEMES[name], CPU, torch.float16, tokens=5, hidden=256, intermediate=256, experts=3, per_token=2, bar=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "tokens"), [*((name, 7) for name in EACH_LOOP), ("w4afp8", 333), ("block_wise_fp8", 333)])
def test_a_layer_in_fp16(name: str, tokens: int) -> None:
    # Outputs reach 60 here. The bar is bf16's: what differs most are hidden codes that round the other way.
    check_layer(SCHEMES[name], CUDA, torch.float16, tokens, hidden=768, intermediate=512, experts=8, per_token=2, bar=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "tokens"), [(s, 40) for s in VARIANTS] + [(SCHEMES[n], t) for n in EACH_LOOP for t in (1, 7, 333)]
)
def test_a_layer(scheme: Scheme, tokens: int) -> None:
    # 333 tokens of 8 experts: tiles that are full. The bar: bf16 output (1.7e-3), and hidden codes that round the other way, which
    # weigh most where tokens are few (measured 6e-3 at 7); a wrong scale or code is above 3e-2.
    check_layer(scheme, CUDA, torch.bfloat16, tokens, hidden=768, intermediate=512, experts=8, per_token=2, bar=1e-2)


def codes_of(x: Tensor, scheme: Scheme, scale: Tensor) -> Tensor:
    """What quantized values stand for, from the kernel's codes [R, K] and scales."""
    wide = x.to(torch.float64)
    runs = wide.unflatten(1, (scale.shape[1] if scale.dim() == 2 else 1, -1))
    return (runs * scale.double().view(len(x), -1, 1)).flatten(1)


def check_quantized_input(scheme: Scheme, device: torch.device, tokens: int, hidden: int) -> None:
    """Codes and scales of the layer's input equal those of the plain twin to the bit; rotated ones but for near ties."""
    from mxconv.runtime.kernels.moe import MoeExperts
    from mxconv.runtime.linear import quantize_activation

    pairs = random_experts(scheme, 3, hidden, 256)
    layer = MoeExperts.pack(scheme, *zip(*pairs, strict=True), device)
    x, chosen, _ = random_inputs(tokens, hidden, 3, 2)
    x[0, 3] = 1e4  # saturates static codes, and makes a token's other codes small: subnormals
    x[0, 4:] *= 1e-1
    _, codes, scale = layer.front(x.to(device), chosen.to(device), 16)
    codes, scale = codes.cpu(), scale.cpu()
    rotated, rule = rotate(x, scheme.rotation["up_gate_proj"]), scheme.activation
    if not scheme.static:
        # Divided by its scale, the twin's value is a code again: no code is closer than a relative 2^-4 to the next one.
        expected = quantize_activation(rotated, rule)
        assert error(codes_of(codes, scheme, scale), expected.double()) < 1e-7
        return
    for expert, (up_gate, _down) in enumerate(pairs):
        rows = (chosen.flatten() == expert).nonzero()[:, 0]
        expected = quantize_activation(rotated[rows // 2], rule, up_gate.activation_scale)
        step = float(up_gate.activation_scale) / (1.0 if rule.stored_divided else rule.divisor)
        got = codes[rows].double() * step
        assert error(got, expected) < (1e-3 if scheme.rotation["up_gate_proj"] else 1e-7)


@interpreted
@pytest.mark.parametrize("few_rows", [264, 1])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=variant_name)
def test_input_codes_interpreted(scheme: Scheme, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.runtime.kernels.moe.FEW_ROWS", few_rows)
    check_quantized_input(scheme, CPU, tokens=5, hidden=384)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "hidden"), [(70, 6144), (301, 1280)])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=variant_name)
def test_input_codes(scheme: Scheme, tokens: int, hidden: int) -> None:
    check_quantized_input(scheme, CUDA, tokens, hidden)


def check_gemm(
    scheme: Scheme, device: torch.device, rows: int, n: int, k: int, experts: int, bar: float, **other: object
) -> float:
    """A grouped GEMM on given codes against float64: relative L2. Rows of no expert stay; `other` alters the launch."""
    from mxconv.runtime.coded import rotated_weight
    from mxconv.runtime.kernels.moe import Matrix
    from mxconv.runtime.kernels.moe_sort import sort_assignments
    from mxconv.runtime.kernels.moe_table import launch_of
    from tests.runtime.kernels.moe_reference import random_coded

    generator = torch.Generator().manual_seed(rows + n + k)
    matrix = Matrix(scheme, experts, n, k, device)
    coded = [random_coded(scheme, n, k, 3.0 + e, generator) for e in range(experts)]
    for e, one in enumerate(coded):
        matrix.put(e, one)
    if scheme.activation.code == "int8":
        codes = torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8)
    else:
        codes = (torch.randn(rows, k, generator=generator) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)
    chosen = torch.randint(0, experts, (rows, 1), generator=generator)
    chosen[rows // 2] = -1
    scale = torch.rand((rows, k // 128) if scheme.activation.scale == "token_group" else (rows,), generator=generator) + 0.5
    launch = replace(launch_of(matrix.kind, rows, experts, n, k), **other)
    ordered = sort_assignments(chosen.to(device), experts, launch.block_t)
    out = torch.full((launch.splits, rows, n), float("nan"), device=device)
    matrix.multiply(codes.to(device), scale.to(device), ordered.order, 1, ordered.tiles, launch, out)
    order, got = ordered.order.cpu().long(), out.double().sum(0).cpu()
    assert got[-1].isnan().all() and order[-1] == -1 and got[:-1].isfinite().all()
    expected = torch.zeros(rows - 1, n, dtype=torch.float64)
    wide = [rotated_weight(one, scheme, torch.float64) for one in coded]
    for s, a in enumerate(order[:-1].tolist()):
        e = int(chosen[a, 0])
        if scheme.static:
            divisor = 1.0 if scheme.activation.stored_divided else scheme.activation.divisor
            x = codes[a].double() * float(coded[e].activation_scale) / divisor
        else:
            x = codes_of(codes[a : a + 1], scheme, scale[a : a + 1])[0]
        expected[s] = wide[e] @ x
    measured = error(got[:-1], expected)
    assert measured <= bar
    return measured


@interpreted
@pytest.mark.parametrize("scheme", VARIANTS, ids=variant_name)
def test_gemm_interpreted(scheme: Scheme) -> None:
    check_gemm(scheme, CPU, rows=21, n=192, k=512, experts=3, bar=2e-6)


SHAPED = [
    ("w4afp8", {"splits": 3}), ("w4a8", {"splits": 2}), ("block_wise_fp8", {"block_n": 256, "warps": 8}),
    ("tensor_wise_fp8", {"block_n": 64, "block_t": 32, "splits": 2}),
    ("w4afp8_static", {"block_n": 256, "warps": 8, "block_t": 32}),
]  # fmt: skip
"""Launches beside the table's: K split unevenly, rows of two blocks of scales."""


@interpreted
@pytest.mark.parametrize(("name", "other"), SHAPED)
def test_launches_interpreted(name: str, other: dict[str, object]) -> None:
    check_gemm(SCHEMES[name], CPU, rows=11, n=256, k=512, experts=2, bar=2e-6, **other)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "other"), SHAPED)
def test_launches(name: str, other: dict[str, object]) -> None:
    check_gemm(SCHEMES[name], CUDA, rows=70, n=512, k=1152, experts=2, bar=1e-3, **other)


@interpreted
@pytest.mark.parametrize("name", ["w4afp8", "w4a8"])
def test_a_layer_with_split_sums_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.runtime.kernels.moe_table.MIN_STEPS", 1)
    check_layer(SCHEMES[name], CPU, torch.float32, tokens=3, hidden=384, intermediate=256, experts=2, per_token=2, bar=5e-3)


@interpreted
def test_more_tokens_than_offsets_reach_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.runtime.kernels.moe.LARGEST_OFFSET", 2 * 2 * 256 * 2)  # two tokens of two experts
    check_layer(SCHEMES["w4a8"], CPU, torch.float32, tokens=5, hidden=256, intermediate=256, experts=3, per_token=2, bar=5e-3)


@interpreted
@pytest.mark.parametrize("name", ["w4afp8", "w4a8", "block_wise_fp8"])
def test_a_layer_with_swiglu_in_the_gemm_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.runtime.kernels.moe_table.SPLIT_ASSIGNMENTS", 0)
    monkeypatch.setattr("mxconv.runtime.kernels.moe.FEW_ROWS", 0)
    check_layer(SCHEMES[name], CPU, torch.float32, tokens=5, hidden=256, intermediate=384, experts=3, per_token=2, bar=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("scheme", "rows", "n", "k"),
    [(s, 35, 320, 2304) for s in VARIANTS]
    + [(SCHEMES[n], *shape) for n in EACH_LOOP for shape in ((2, 2304, 6144), (130, 6144, 1152), (700, 192, 512))],
)
def test_gemm(scheme: Scheme, rows: int, n: int, k: int) -> None:
    # fp8 products leave the tensor cores every 128 inputs with about 14 bits (measured: 6e-5 int4, 1.3e-4 e4m3); int8 are exact.
    measured = check_gemm(scheme, CUDA, rows, n, k, experts=4, bar=1e-6 if scheme.name == "w4a8" else 3e-4)
    print(f"{variant_name(scheme)} {rows} {n} {k}: {measured:.1e}")
