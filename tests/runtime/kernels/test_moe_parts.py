"""The repack, the sort, the router and the table of launches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxconv.errors import MalformedInput, UsageError
from mxconv.quantize.schemes import Scheme, get_scheme
from mxconv.runtime.kernels.moe_pack import Kind, pack_codes, tile_bytes, unpack_codes
from mxconv.runtime.kernels.moe_table import block_tokens, launch_of, max_tiles
from tests.interpreted import interpreted, under_interpreter
from tests.runtime.kernels.moe_reference import VARIANTS, random_experts, variant_name

test_in_the_interpreter = under_interpreter(__file__)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS: tuple[Kind, ...] = ("int4_e4m3", "int4_int8", "e4m3")


def all_codes(n: int, k: int, kind: Kind) -> Tensor:
    """Every code beside every other one at distance 64, in a transposed view as files give them."""
    low, high = (-128, 128) if kind == "e4m3" else (-7, 8)
    return torch.randint(low, high, (k, n), generator=torch.Generator().manual_seed(k), dtype=torch.int8).t()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_survive_the_repack(kind: Kind) -> None:
    codes = all_codes(192, 384, kind)
    packed = pack_codes(codes, kind)
    assert packed.shape == (3, 3, 64, tile_bytes(kind)) and packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, kind), codes)


@pytest.mark.parametrize("kind", ["int4_e4m3", "int4_int8"])
def test_what_the_masks_find_are_the_codes(kind: Kind) -> None:
    """The GEMM's two instructions, on four-byte words in numpy's order of bytes: little-endian as on the GPU."""
    codes = all_codes(64, 128, kind)
    words = pack_codes(codes, kind).reshape(64, 64).contiguous().numpy().view("<u4")
    if kind == "int4_int8":
        low, high = (words << 4) & 0xF0F0F0F0, words & 0xF0F0F0F0
        values = [torch.from_numpy(part.astype("<u4").view("i1").reshape(64, 64).copy()).double() / 16 for part in (low, high)]
    else:
        low, high = words & 0x87878787, ((words >> 4) | (words << 28)) & 0x87878787
        parts = [torch.from_numpy(part.astype("<u4").view("i1").reshape(64, 64).copy()) for part in (low, high)]
        values = [part.view(torch.float8_e4m3fn).double() * 512 for part in parts]
    assert torch.equal(torch.cat(values, 1), codes.double())


def test_a_code_that_no_scheme_writes_is_refused() -> None:
    codes = all_codes(64, 128, "int4_e4m3").clone()
    codes[3, 5] = -8
    with pytest.raises(MalformedInput, match="out of range"):
        pack_codes(codes, "int4_e4m3")


@pytest.mark.parametrize("scheme", VARIANTS, ids=variant_name)
def test_experts_unpack_to_what_was_packed(scheme: Scheme) -> None:
    from mxconv.runtime.kernels.moe import MoeExperts

    pairs = random_experts(scheme, 3, 512, 256)
    layer = MoeExperts.pack(scheme, *zip(*pairs, strict=True), CPU)
    for expert, pair in enumerate(pairs):
        for got, given in zip(layer.unpack(expert), pair, strict=True):
            assert torch.equal(got.codes, given.codes) and torch.equal(got.weight_scale, given.weight_scale)
            assert (got.activation_scale is None) == (given.activation_scale is None)
            assert given.activation_scale is None or torch.equal(got.activation_scale, given.activation_scale)


def test_sizes_that_do_not_fit_are_refused() -> None:
    from mxconv.runtime.kernels.moe import MoeExperts

    for hidden, intermediate in ((192, 256), (256, 96)):
        with pytest.raises(UsageError, match="do not fit"):
            MoeExperts(get_scheme("w4afp8"), 2, hidden, intermediate, CPU)


def test_launches_exist_for_every_size() -> None:
    for kind in KINDS:
        for assignments in (1, 2, 31, 64, 65, 500, 5000, 10**6):
            for n, k in ((2304, 6144), (6144, 1152), (192, 128)):
                launch = launch_of(kind, assignments, 32, n, k)
                assert launch.block_t == block_tokens(kind, assignments, 32) and n % launch.block_n == 0
                assert launch.splits == 1 or (k // 128) // launch.splits >= 1


def check_sort(device: torch.device, tokens: int, per_token: int, experts: int, block_t: int, padded: float) -> None:
    from mxconv.runtime.kernels.moe_sort import sort_assignments

    generator = torch.Generator().manual_seed(tokens * experts)
    chosen = torch.randint(0, max(1, experts - 1), (tokens, per_token), generator=generator)  # the last expert has none
    chosen[torch.rand(tokens, per_token, generator=generator) < padded] = -1
    ordered = sort_assignments(chosen.to(device), experts, block_t)
    flat = chosen.flatten()
    keys = torch.where(flat < 0, experts, flat)
    expected = keys.argsort(stable=True)
    valid = int((flat >= 0).sum())
    order, position = ordered.order.cpu().long(), ordered.position.cpu().long()
    assert torch.equal(order[:valid], expected[:valid]) and order[valid:].eq(-1).all()
    assert position[flat < 0].eq(-1).all() and torch.equal(position[order[:valid]], torch.arange(valid))
    counts = torch.bincount(keys, minlength=experts + 1)[:experts]
    assert torch.equal(ordered.ends.cpu().long(), counts.cumsum(0))
    tiles = ordered.tiles.cpu().view(-1, 3)
    assert len(tiles) == max_tiles(flat.numel(), experts, block_t)
    wanted = [
        [e, int(counts[:e].sum()) + start, min(block_t, int(counts[e]) - start)]
        for e in range(experts) for start in range(0, int(counts[e]), block_t)
    ]  # fmt: skip
    assert tiles[: len(wanted)].tolist() == wanted and tiles[len(wanted) :, 0].eq(-1).all()


SORTS = [(1, 1, 1, 16, 0.0), (1, 2, 32, 16, 0.0), (9, 2, 5, 16, 0.3), (70, 4, 7, 16, 0.1), (6, 2, 4, 16, 1.0)]


@interpreted
@pytest.mark.parametrize("case", SORTS)
def test_sort_interpreted(case: tuple[int, int, int, int, float]) -> None:
    check_sort(CPU, *case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*SORTS, (3000, 2, 32, 128, 0.05), (40000, 2, 3, 16, 0.0)])
def test_sort(case: tuple[int, int, int, int, float]) -> None:
    check_sort(CUDA, *case)


def check_route(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int, experts: int, per_token: int) -> None:
    from mxconv.runtime.kernels.moe import route

    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    router = torch.randn(experts, hidden, generator=generator) / hidden**0.5
    x[-1] = 0.0  # a tie of all experts
    chosen, weights = (part.cpu() for part in route(x.to(device), router.to(device), per_token))
    shares = torch.softmax(x.double() @ router.double().t(), -1)
    top, expected = shares.topk(per_token, -1)
    assert chosen.dtype == torch.int32 and weights.dtype == torch.float32
    assert chosen[-1].tolist() == list(range(per_token)) and torch.allclose(weights[-1], torch.full((per_token,), 1 / per_token))
    assert torch.equal(chosen[:-1].long(), expected[:-1])  # these seeds have no near ties: the smallest gap is asserted below
    ordered = shares[:-1].sort(-1, descending=True).values
    assert float((ordered[:, :-1] - ordered[:, 1:])[:, :per_token].min()) > 1e-7
    assert torch.allclose(weights[:-1].double(), (top / top.sum(-1, keepdim=True))[:-1], rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("tokens", [5, 70])
def test_route_interpreted(tokens: int) -> None:
    check_route(CPU, torch.float16, tokens, hidden=320, experts=6, per_token=2)


@interpreted
def test_route_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxconv.runtime.kernels.moe_route.LARGEST_OFFSET", 3 * 320)
    check_route(CPU, torch.float16, 7, hidden=320, experts=6, per_token=2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.bfloat16), (65, torch.bfloat16), (1000, torch.bfloat16), (65, torch.float16), (30, torch.float32)],
)
def test_route(tokens: int, dtype: torch.dtype) -> None:
    check_route(CUDA, dtype, tokens + 1, hidden=6144, experts=32, per_token=2)


@pytest.mark.gpu
def test_the_largest_fp16_numbers_are_routed() -> None:
    """From 65,408 on they round up to a bf16 number that fp16 does not hold."""
    from mxconv.runtime.kernels.moe import route

    router = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) / 65536
    for tokens in (1, 40):
        x = torch.zeros(tokens, 512, dtype=torch.float16)
        x[:, :3] = torch.tensor([65504.0, -65504.0, 65440.0])
        chosen, weights = (part.cpu() for part in route(x.to(CUDA), router.to(CUDA), 2))
        top, expected = torch.softmax(x.double() @ router.double().t(), -1).topk(2, -1)
        assert torch.equal(chosen.long(), expected)
        assert torch.allclose(weights.double(), top / top.sum(-1, keepdim=True), rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_a_token_that_is_not_a_number_stays_one() -> None:
    from mxconv.runtime.kernels.moe import MoeExperts, route

    scheme = get_scheme("w4afp8")
    layer = MoeExperts.pack(scheme, *zip(*random_experts(scheme, 4, 256, 256), strict=True), CUDA)
    x = torch.randn(3, 256, device=CUDA, dtype=torch.bfloat16)
    x[1, 7] = float("nan")
    chosen, weights = route(x, torch.randn(4, 256, device=CUDA), 2)
    y = layer(x, chosen, weights)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 33, 300])
def test_unquantized_experts(tokens: int) -> None:
    from mxconv.runtime.kernels.moe import MoeExperts

    generator = torch.Generator().manual_seed(tokens)
    up_gate = [(torch.randn(768, 512, generator=generator) / 512**0.5).bfloat16() for _ in range(5)]
    down = [(torch.randn(512, 384, generator=generator) / 384**0.5).bfloat16() for _ in range(5)]
    layer = MoeExperts.pack(None, up_gate, down, CUDA)
    assert all(torch.equal(got.cpu(), given) for got, given in zip(layer.unpack(3), (up_gate[3], down[3]), strict=True))
    x = torch.randn(tokens, 512, generator=generator).bfloat16()
    chosen = torch.rand(tokens, 5, generator=generator).argsort(-1)[:, :2]
    weights = torch.rand(tokens, 2, generator=generator)
    chosen[0, 1] = -1
    got = layer(x.to(CUDA), chosen.to(CUDA), weights.to(CUDA)).cpu().double()
    expected = torch.zeros(tokens, 512, dtype=torch.float64)
    for t in range(tokens):
        for j in range(2):
            if chosen[t, j] >= 0:
                gate, up = (up_gate[chosen[t, j]].double() @ x[t].double()).chunk(2)
                expected[t] += weights[t, j] * (down[chosen[t, j]].double() @ (torch.nn.functional.silu(gate) * up))
    assert float((got - expected).norm() / expected.norm()) < 1e-2  # bf16 between the products


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", VARIANTS[:1] + VARIANTS[2:4], ids=variant_name)
def test_a_graph_replays_other_routings(scheme: Scheme) -> None:
    """Captured once, right for whatever is written into its inputs: no number has gone through the host."""
    from mxconv.runtime.kernels.moe import MoeExperts, route

    layer = MoeExperts.pack(scheme, *zip(*random_experts(scheme, 6, 512, 256), strict=True), CUDA)
    router = torch.randn(6, 512, device=CUDA)
    x = torch.randn(20, 512, device=CUDA, dtype=torch.bfloat16)
    layer(x, *route(x, router, 2))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, *route(x, router, 2))
    for _ in range(3):
        x.copy_(torch.randn(20, 512, device=CUDA))
        graph.replay()
        assert torch.equal(y, layer(x, *route(x, router, 2)))
