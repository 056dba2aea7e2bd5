"""Lightning decode kernels against float64, and the norm and gate behind them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mxconv.errors import UsageError
from mxconv.runtime.kernels.lightning_decode import lightning_decode
from mxconv.runtime.kernels.lightning_norm_gate import lightning_norm_gate
from mxconv.runtime.norm import scale_by_rms
from tests.interpreted import interpreted, under_interpreter
from tests.runtime.kernels.lightning_reference import draw, error, expected, worst

test_in_the_interpreter = under_interpreter(__file__)


def decodes(rows: int, tokens: int, heads: int, size: int, dtype: torch.dtype, device: str, **options: object) -> None:
    """`rows` slots of a pool of more, one of them padding; a poisoned pool and output show what is touched."""
    case = draw([tokens] * rows, heads, size, dtype, device, seed=tokens)
    slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(rows))[:rows].to(device)
    pool = torch.full((rows + 3, heads, size, size), torch.nan, device=device)
    pool[slots] = case.state
    padding = rows // 2 if rows > 1 else None
    used = [row for row in range(rows) if row != padding]
    if padding is not None:
        pool[slots[padding]] = torch.nan
        slots[padding] = -1
    q, k, v = (x.unflatten(0, (rows, tokens)) for x in (case.q, case.k, case.v))
    if tokens == 1:
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
    lightning_decode(q, k, v, case.rates, pool, slots, out=out, **options)
    want, want_states = expected(case, started=True)
    want = want.unflatten(0, (rows, tokens)).reshape(q.shape)
    assert worst(out[used], want[used], heads=-2) <= {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2e-3}[dtype]
    assert error(pool[slots[used]], want_states[used]) <= 5e-7
    rest = [slot for slot in range(rows + 3) if slot not in slots[used].tolist()]
    assert pool[rest].isnan().all()
    if padding is not None:
        assert (out[padding] == 0).all()


@interpreted
@pytest.mark.parametrize(("tokens", "size"), [(1, 16), (3, 24)])
def test_small(tokens: int, size: int) -> None:
    decodes(3, tokens, 2, size, torch.float32, "cpu")
    decodes(2, tokens, 2, size, torch.float16, "cpu")


@interpreted
def test_small_norm_gate() -> None:
    norm_gates(torch.float32, "cpu", rows=3, width=100)


def norm_gates(dtype: torch.dtype, device: str, rows: int, width: int) -> None:
    random = torch.Generator().manual_seed(rows)
    x, gate = (torch.randn(rows, width, generator=random) * 3).to(device, dtype), None
    fused = torch.randn(rows, 2 * width, generator=random).to(device, dtype)
    gate, weight = fused[:, width:], torch.randn(width, generator=random).to(device, dtype)
    own = x.float().square().mean(-1, keepdim=True)
    for given in (None, own, own * 4):
        out = lightning_norm_gate(x, gate, weight, given, out=torch.full_like(x, torch.nan))
        want = scale_by_rms(x.double(), (own if given is None else given).double(), weight.double()) * torch.sigmoid(gate.double())
        assert error(out, want) <= {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
        twin = scale_by_rms(x, own if given is None else given, weight) * torch.sigmoid(gate)
        assert (out != twin).float().mean().item() <= (1.0 if dtype == torch.float32 else 0.01)


GPU = pytest.mark.gpu


@GPU
@pytest.mark.parametrize("size", [64, 96, 128, 256, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_head_dims(size: int, dtype: torch.dtype, tokens: int) -> None:
    decodes(5, tokens, 8, size, dtype, "cuda")


@GPU
@pytest.mark.parametrize("rows", [1, 2, 64, 200])
def test_rows(rows: int) -> None:
    decodes(rows, 1, 8, 128, torch.bfloat16, "cuda")


@GPU
def test_silu_on_load() -> None:
    case = draw([2] * 4, 8, 128, torch.bfloat16, "cuda")
    raw = [torch.randn(8, 8, 128, device="cuda").bfloat16() for _ in range(3)]
    pool, slots = case.state.clone(), torch.arange(4, dtype=torch.int32, device="cuda")
    out = lightning_decode(*(x.unflatten(0, (4, 2)) for x in raw), case.rates, pool, slots, silu=True)
    case.q, case.k, case.v = (F.silu(x) for x in raw)
    want, want_states = expected(case, started=True)
    assert error(out.flatten(0, 1), want) <= 2e-3
    assert error(pool, want_states) <= 5e-7


@GPU
def test_a_pool_beyond_int32() -> None:
    pool = torch.zeros(2100, 64, 128, 128, device="cuda")  # 2.2 · 10⁹ elements
    q, k, v = (torch.ones(1, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = lightning_decode(q, k, v, torch.zeros(64, device="cuda"), pool, torch.tensor([2099], device="cuda"))
    assert (out == 128).all() and (pool[2099] == 1).all() and (pool[:2099] == 0).all()


@GPU
def test_in_a_graph() -> None:
    case = draw([1] * 4, 8, 128, torch.bfloat16, "cuda")
    pool, slots, out = case.state.clone(), torch.arange(4, device="cuda"), torch.empty_like(case.q)
    lightning_decode(case.q, case.k, case.v, case.rates, pool, slots, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lightning_decode(case.q, case.k, case.v, case.rates, pool, slots, out=out)
    pool.copy_(case.state)
    graph.replay()
    want, want_states = expected(case, started=True)
    assert error(out, want) <= 2e-3 and error(pool, want_states) <= 5e-7


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [8192, 1024, 6000])
def test_norm_gate(dtype: torch.dtype, width: int) -> None:
    norm_gates(dtype, "cuda", rows=33, width=width)


@pytest.mark.parametrize(
    "change",
    [
        {"v": torch.zeros(3, 2, 8)}, {"rates": torch.zeros(3)}, {"state": torch.zeros(4, 2, 16, 16, dtype=torch.float64)},
        {"slots": torch.zeros(2)}, {"state": torch.zeros(4, 2, 16, 8)}, {"k": torch.zeros(3, 16, 2).transpose(1, 2)},
        {"state": torch.zeros(4, 2, 300, 300), **{name: torch.zeros(3, 2, 300) for name in "qkv"}},
        {"slots": torch.zeros(65_536), **{name: torch.zeros(1, 2, 16).expand(65_536, 2, 16) for name in "qkv"}},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict) -> None:
    call = {name: torch.zeros(3, 2, 16) for name in "qkv"}
    call |= {"rates": torch.zeros(2), "state": torch.zeros(4, 2, 16, 16), "slots": torch.zeros(3), **change}
    with pytest.raises(UsageError):
        lightning_decode(**call)
