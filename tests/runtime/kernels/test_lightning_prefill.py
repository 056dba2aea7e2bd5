"""Lightning prefill kernels against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import mxconv.runtime.kernels.lightning_prefill as prefill_module
from mxconv.errors import UsageError
from mxconv.runtime.kernels.lightning_launches import LAUNCHES, Launch, Launches
from mxconv.runtime.kernels.lightning_prefill import Cut, lightning_prefill
from mxconv.runtime.lightning import decay_rates
from tests.interpreted import interpreted, under_interpreter
from tests.runtime.kernels.lightning_reference import BARS, HOPPER, WHOLE, WIDENED, Case, draw, error, expected, worst

test_in_the_interpreter = under_interpreter(__file__)

SMALL = Launch(columns=16, chunk=16, warps=1, stages=1)
CHUNKY = Launch(columns=16, chunk=64, warps=1, stages=1)


def both(launch: Launch) -> Launches:
    return Launches(outputs=launch, states=launch)


def cut_in(programs: int | None) -> Cut | None:
    """That many programs, of two segments each where there is more than one."""
    return None if programs is None else Cut(programs, 1 if programs == 1 else 2)


def bars_of(x: torch.Tensor, launches: Launches | None = None) -> tuple[float, float]:
    """What outputs and states of the worst head may be off for inputs like x [T, N, D]."""
    if x.dtype in prefill_module.WIDENED:
        return WIDENED
    hopper = x.dtype == torch.bfloat16 and x.shape[-1] in (64, 128) and len(x) >= 64 and prefill_module._copies_tiles(x.device)
    return HOPPER if hopper and launches is None else BARS[x.dtype]


def agrees(case: Case, *, started: bool = True, packed: bool = True, **options: object) -> None:
    """Outputs into a poisoned buffer, and states, within the bars, head by head; the given state is not changed."""
    out = torch.full(case.q.shape, torch.nan, dtype=case.q.dtype, device=case.q.device)
    before = case.state.clone()
    out, states = lightning_prefill(
        case.q, case.k, case.v, case.rates, case.state if started else None, case.cu_seqlens if packed else None, out=out, **options
    )
    want, want_states = expected(case, started=started)
    bars = bars_of(case.q, options.get("launches"))
    errors = worst(out, want), worst(states, want_states)
    assert errors[0] <= bars[0] and errors[1] <= bars[1], f"{errors} beyond {bars}"
    assert torch.equal(case.state, before)


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 goes to the kernels as two bytes: the interpreter multiplies no bf16, and their two-byte code is to be run."""
    monkeypatch.setattr(prefill_module, "WIDENED", ())


@interpreted
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.float16, 64), (torch.float16, 24)])
def test_small(segments: int, dtype: torch.dtype, size: int, as_it_is: None) -> None:
    case = draw([0, 1, 37, 16], 2, size, dtype, "cpu", seed=segments)
    agrees(case, launches=both(SMALL), cut=cut_in(segments))


@interpreted
def test_small_rows_off_alignment_are_taken_as_float32(as_it_is: None) -> None:
    case = draw([40], 2, 64, torch.float16, "cpu")
    odd = torch.full((40, 2, 3 * 64 + 1), torch.nan, dtype=torch.float16)
    raw = []
    for at, x in enumerate((case.q, case.k, case.v)):
        raw.append(odd[..., at * 64 + 1 : at * 64 + 65].copy_(x))
    out, states = lightning_prefill(*raw, case.rates, case.state[:1], out=torch.full_like(case.q, torch.nan))
    want, want_states = expected(case, started=True)
    assert error(out, want) <= 1e-3
    assert error(states, want_states) <= 2e-6  # float32 all the way


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_value_is_rounded_to_the_bits_of_a_dtype(dtype: torch.dtype) -> None:
    from tests.runtime.kernels.round_kernel import round_numbers

    count, digits = 4096, 8 if dtype == torch.bfloat16 else 11
    x = torch.randn(count) * torch.exp(torch.randn(count))
    got = torch.empty(count)
    round_numbers[(1,)](x, got, torch.empty(0, dtype=dtype), N=count)
    assert ((got.double() - x.double()).abs() <= 2.0**-digits * x.double().abs()).all()  # to nearest
    assert (got.view(torch.int32) & ((1 << (24 - digits)) - 1) == 0).all()  # no bit that the dtype lacks
    assert abs(float(((x - got) * x > 0).float().mean()) - 0.5) < 0.05  # up as often as down


@interpreted
def test_small_segments_look_back() -> None:
    # Segments are multiples of 128 tokens: three of them, the slow head needs them all, the fast one a halo.
    case = draw([300], 2, 16, torch.float32, "cpu", rates=[1e-3, 2.0])
    agrees(case, packed=False, started=False, launches=both(CHUNKY), cut=cut_in(3))


@interpreted
@pytest.mark.parametrize("masked", [False, True])
def test_small_states_that_nobody_reads_are_left_out(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs of two segments: a head that decays fast needs the last of the first program alone, a slow one both.

    Three heads decay by nearly e^-reach, and by just that, in a segment of 128 tokens.
    """
    reach = prefill_module.REACH[torch.float32]
    rates = [1e-3, 2.0, reach / 129, reach / 127, reach / 128]
    case = draw([512], len(rates), 16, torch.float32, "cpu", rates=rates)
    if masked:
        case.mask = torch.rand(512, generator=torch.Generator().manual_seed(3)) > 0.3
    kept = []

    def run_states(call: object, launch: Launch) -> torch.Tensor:
        kept.append(original(call, launch))
        return kept[-1]

    original = prefill_module._Call.run_states
    monkeypatch.setattr(prefill_module._Call, "run_states", run_states)
    monkeypatch.setattr(torch, "empty", lambda shape, **how: torch.full(shape, torch.nan, **how))
    mask = None if case.mask is None else case.mask[None]
    q, k, v = (x[None] for x in (case.q, case.k, case.v))
    out, states = lightning_prefill(q, k, v, case.rates, mask=mask, launches=both(CHUNKY), cut=Cut(2, 2))
    monkeypatch.undo()
    want, want_states = expected(case, started=False)
    assert error(out[0], want) <= 4e-6 and error(states, want_states) <= 4e-6
    left_out = kept[0][0].isnan().all(-1).all(-1)
    assert left_out[:, 1:].tolist() == [[False, True, True]] * len(rates)  # the last program's are nobody's
    assert left_out[:, 0].tolist() == [False, True, False, not masked, False]  # padding does not decay


def backwards(*bounds: int) -> range:
    """The interpreter's grid loops, last program first."""
    return range(*bounds)[::-1] if len(bounds) == 1 else range(*bounds)


@interpreted
@pytest.mark.parametrize("slots", [[2, 0], [-1, 3], [1, -1], [-1, -1]])
def test_small_segments_of_a_pool_in_whatever_order(slots: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of a sequence reads a state that another has written already; a slot of -1 changes no row."""
    case = draw([300, 260], 1, 16, torch.float32, "cpu", rates=[3e-3])
    pool = torch.randn(4, 1, 16, 16)
    before = pool.clone()
    state = torch.stack([pool[slot] for slot in slots]).clone()
    fresh, states = lightning_prefill(case.q, case.k, case.v, case.rates, state, case.cu_seqlens, launches=both(CHUNKY))
    monkeypatch.setattr("triton.runtime.interpreter.range", backwards, raising=False)
    call = case.q, case.k, case.v, case.rates, pool, case.cu_seqlens
    out, _ = lightning_prefill(*call, slots=torch.tensor(slots), launches=both(CHUNKY), cut=cut_in(2))
    ends = case.cu_seqlens.tolist()
    for at, slot in enumerate(slots):
        mine = slice(ends[at], ends[at + 1])
        assert error(out[mine], fresh[mine].double()) <= 2e-6 if slot >= 0 else bool((out[mine] == 0).all())
        if slot >= 0:
            assert error(pool[slot], states[at].double()) <= 2e-6
    untouched = [row for row in range(4) if row not in slots]
    assert torch.equal(pool[untouched], before[untouched])


@interpreted
def test_small_masked_pool() -> None:
    case = draw([21, 21], 2, 16, torch.float32, "cpu")
    case.mask = torch.rand(42, generator=torch.Generator().manual_seed(1)) > 0.4
    pool = torch.full((5, 2, 16, 16), torch.nan)
    pool[3], pool[1] = case.state
    q, k, v = (x.unflatten(0, (2, 21)) for x in (case.q, case.k, case.v))
    slots, mask = torch.tensor([3, 1]), case.mask.view(2, 21)
    out, states = lightning_prefill(q, k, v, case.rates, pool, slots=slots, mask=mask, launches=both(SMALL), cut=cut_in(2))
    want, want_states = expected(case, started=True)
    assert states is pool
    assert error(out.flatten(0, 1), want) <= 2e-6
    assert error(pool[slots], want_states) <= 2e-6
    assert pool[[0, 2, 4]].isnan().all()


GPU = pytest.mark.gpu
TRITON_ALONE = {size: dataclasses.replace(LAUNCHES[size, True], hopper=None) for size in (64, 128)}


@GPU
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segments", [1, 3])
def test_both_output_kernels(size: int, dtype: torch.dtype, segments: int) -> None:
    for lengths in ([64], [65], [640], [0, 1, 700, 64, 0, 2000, 130]):
        case = draw(lengths, 8, size, dtype, "cuda", seed=len(lengths))
        agrees(case, cut=cut_in(segments))
        agrees(case, cut=cut_in(segments), launches=TRITON_ALONE[size])


@GPU
@pytest.mark.parametrize(("heads", "layer", "bars"), [
    (slice(None), 0, WHOLE), (slice(None), 40, WHOLE), (slice(24, 32), 40, WHOLE), (slice(24, 32), 79, WHOLE),
    (slice(0, 8), 0, HOPPER),  # a rank whose heads decay within a few tokens: a rounded score has no others to cancel with
    (slice(56, 64), 78, HOPPER),  # of M1's last lightning layer: a chunk decays by less than a bf16 step
])  # fmt: skip
@pytest.mark.parametrize("tokens", [64, 128, 4096, 4097])
def test_a_layer_of_minimax_m1(heads: slice, layer: int, bars: tuple[float, float], tokens: int) -> None:
    rates = decay_rates(64, layer, 80)[heads]
    case = draw([tokens], len(rates), 128, torch.bfloat16, "cuda", rates=rates)
    out, states = lightning_prefill(case.q, case.k, case.v, case.rates)
    want, want_states = expected(case, started=False)
    bars = bars if prefill_module._copies_tiles(case.q.device) else BARS[torch.bfloat16]
    assert error(out, want) <= bars[0] and error(states, want_states) <= bars[1]


@GPU
def test_rows_that_tensor_copies_cannot_read() -> None:
    case = draw([500], 4, 128, torch.bfloat16, "cuda")
    odd = torch.empty(500, 4, 3 * 128 + 1, dtype=torch.bfloat16, device="cuda")
    for at, name in enumerate("qkv"):
        view = odd[..., at * 128 + 1 : at * 128 + 129]
        view.copy_(getattr(case, name))
        setattr(case, name, view)
    agrees(case)


@GPU
@pytest.mark.parametrize("size", [64, 96, 128, 256, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("segments", [1, 4])
def test_head_dims(size: int, dtype: torch.dtype, segments: int) -> None:
    agrees(draw([1000], 8, size, dtype, "cuda"), packed=False, cut=cut_in(segments))


@GPU
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 255, 513, 3001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lengths(tokens: int, dtype: torch.dtype) -> None:
    agrees(draw([tokens], 4, 128, dtype, "cuda", seed=tokens), packed=False)
    agrees(draw([tokens], 4, 128, dtype, "cuda", seed=tokens), packed=False, started=False)


@GPU
@pytest.mark.parametrize("segments", [None, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [96, 128])
def test_packed_sequences(segments: int | None, dtype: torch.dtype, size: int) -> None:
    agrees(draw([0, 1, 700, 64, 0, 2000, 130], 8, size, dtype, "cuda"), cut=cut_in(segments))


@GPU
@pytest.mark.parametrize("segments", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_padding_is_skipped(segments: int | None, dtype: torch.dtype) -> None:
    case = draw([777] * 3, 4, 128, dtype, "cuda")
    random = torch.Generator("cuda").manual_seed(2)
    case.mask = torch.rand(3, 777, device="cuda", generator=random) > 0.3
    case.mask[1, :300], case.mask[2] = False, False
    for x in (case.q, case.k, case.v):
        x[~case.mask.flatten()] = torch.nan  # what is skipped is not even read into a product
    q, k, v = (x.unflatten(0, (3, 777)) for x in (case.q, case.k, case.v))
    out, states = lightning_prefill(q, k, v, case.rates, case.state, mask=case.mask, cut=cut_in(segments))
    flat = case.mask.flatten()
    for x in (case.q, case.k, case.v):
        x[~flat] = 0.0
    case.mask = flat
    want, want_states = expected(case, started=True)
    bars = bars_of(case.q)
    assert worst(out.flatten(0, 1), want) <= bars[0]
    assert worst(states, want_states) <= bars[1]
    assert torch.equal(states[2], case.state[2])


@GPU
@pytest.mark.parametrize("segments", [None, 1, 3])
def test_slots_of_a_pool(segments: int | None) -> None:
    case = draw([500, 300, 900], 8, 128, torch.bfloat16, "cuda")
    pool = torch.full((6, 8, 128, 128), torch.nan, device="cuda")
    slots = torch.tensor([4, -1, 0], dtype=torch.int32, device="cuda")
    pool[4], pool[0] = case.state[0], case.state[2]
    out = torch.full(case.q.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    call = case.q, case.k, case.v, case.rates, pool, case.cu_seqlens
    _, states = lightning_prefill(*call, slots=slots, out=out, cut=cut_in(segments))
    want, want_states = expected(case, started=True)
    assert states is pool
    assert (out[500:800] == 0).all()
    bars = bars_of(case.q)
    assert worst(out[:500], want[:500]) <= bars[0] and worst(out[800:], want[800:]) <= bars[0]
    assert worst(pool[[4, 0]], want_states[[0, 2]]) <= bars[1]
    assert pool[[1, 2, 3, 5]].isnan().all()


@GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strong_and_no_decay(dtype: torch.dtype) -> None:
    rates = [40.0, 5.0, 0.9999, 0.9, 1e-3, 1e-8, 0.0, 1e4]
    for segments in (1, 4):
        agrees(draw([4000], 8, 128, dtype, "cuda", rates=rates), packed=False, cut=cut_in(segments))


@GPU
def test_what_lies_beyond_reach_is_below_its_bound() -> None:
    # A huge early token, decayed by e^-reach at most when it is left out: the bound in absolute terms.
    case = draw([4096], 1, 128, torch.float32, "cuda", rates=[0.05])
    case.k[:8], case.v[:8] = 1e3, 1e3
    outs = [lightning_prefill(case.q, case.k, case.v, case.rates, cut=cut_in(segments))[0].double() for segments in (1, 16)]
    bound = 128 * 8 * 1e6 * torch.exp(torch.tensor(-40.0)).item() * case.q.abs().max().item()
    far = outs[0][2048:] - outs[1][2048:]
    assert far.abs().max().item() <= bound + 1e-5 * outs[0][2048:].abs().max().item()
    assert all(out.isfinite().all() for out in outs)


@GPU
def test_extremes_stay_finite_where_float64_does() -> None:
    case = draw([700], 4, 128, torch.bfloat16, "cuda")
    case.q[5], case.k[6], case.v[7] = 1e4, -1e4, 1e4
    out, states = lightning_prefill(case.q, case.k, case.v, case.rates)
    assert out.isfinite().all() and states.isfinite().all()


@GPU
@pytest.mark.parametrize(("heads", "segments"), [(2, 1), (2, None)])
def test_a_million_tokens(heads: int, segments: int | None) -> None:
    # The rates of a last and of a middle layer's slowest heads: nothing may drift in 15,625 chunks.
    case = draw([1_000_000], heads, 128, torch.bfloat16, "cuda", rates=[4e-8, 2e-3])
    out, states = lightning_prefill(case.q, case.k, case.v, case.rates, cut=cut_in(segments))
    want, want_states = expected(case, started=False)
    assert out.isfinite().all()
    # Their own rounding is 1.7e-3; the state drifts by up to 1e-3, as the matrix unit truncates its sums and nothing decays.
    assert worst(out[-10_000:], want[-10_000:]) <= 2.2e-3
    assert worst(states, want_states) <= 1e-3


@interpreted
def test_small_heads_that_lie_beyond_int32(as_it_is: None) -> None:
    """Heads before tokens, as attention elsewhere has them: the third begins 2.2e9 elements behind the first."""
    case = draw([40], 3, 64, torch.float16, "cpu")
    far = torch.empty(3 * 1_100_000_000, dtype=torch.float16)  # of which some pages are touched
    views = []
    for at, x in enumerate((case.q, case.k, case.v)):
        view = far[at * 40 * 64 :].as_strided(x.shape, (64, 1_100_000_000, 1))
        views.append(view.copy_(x))
    case.q, case.k, case.v = views
    agrees(case, packed=False, launches=both(SMALL))


@GPU
@pytest.mark.parametrize("size", [128, 96])
def test_offsets_beyond_int32(size: int) -> None:
    # 60,000 rows of 64 heads · 5 · size elements: the last rows lie beyond 2^31 elements.
    fused = torch.empty(60_000, 64, 5 * size, dtype=torch.bfloat16, device="cuda")
    fused[:-500] = 0
    fused[-500:] = F.silu(torch.randn(500, 64, 5 * size, device="cuda"))
    q, k, v = fused[..., :size], fused[..., size : 2 * size], fused[..., 4 * size :]
    rates = torch.full((64,), 0.01, device="cuda")
    out, _ = lightning_prefill(q, k, v, rates)
    last = (x[-500:, 60:].contiguous() for x in (q, k, v))
    short = Case(*last, rates[60:].double(), [500], torch.zeros(1, 4, size, size, device="cuda"))
    assert worst(out[-500:, 60:], expected(short, started=False)[0]) <= bars_of(q)[0]
    assert (out[:-500] == 0).all()


@GPU
def test_heads_beyond_int32() -> None:
    far = torch.empty(3 * 1_100_000_000, dtype=torch.bfloat16, device="cuda")
    case = draw([700], 3, 128, torch.bfloat16, "cuda")
    for at, name in enumerate("qkv"):
        view = far[at * 700 * 128 :].as_strided((700, 3, 128), (128, 1_100_000_000, 1))
        setattr(case, name, view.copy_(getattr(case, name)))
    want, want_states = expected(case, started=False)
    out, states = lightning_prefill(case.q, case.k, case.v, case.rates)
    assert worst(out, want) <= BARS[torch.bfloat16][0] and worst(states, want_states) <= BARS[torch.bfloat16][1]


@GPU
def test_fp16_keeps_to_the_range_of_the_state() -> None:
    """States and scores beyond 65,504: the definition's outputs are small and finite."""
    case = draw([300], 2, 128, torch.float16, "cuda", rates=[1e-3, 0.5])
    case.state.fill_(1e5)
    case.q.mul_(1e-3)
    agrees(case, packed=False)


@pytest.mark.parametrize(
    "change",
    [
        {"v": torch.zeros(4, 2, 8)}, {"rates": torch.zeros(3)}, {"state": torch.zeros(1, 2, 16, 16, dtype=torch.float64)},
        {"slots": torch.zeros(1)}, {"q": torch.zeros(4, 2, 16, dtype=torch.float64)}, {"mask": torch.ones(5, dtype=torch.bool)},
        {name: torch.zeros(4, 2, 300) for name in "qkv"}, {"k": torch.zeros(4, 16, 2).transpose(1, 2)},
        {"out": torch.zeros(3, 2, 16)}, {"out": torch.zeros(4, 2, 16, dtype=torch.float64)},
        {"cu_seqlens": torch.tensor([0.0, 4.0])}, {"cu_seqlens": torch.arange(65_537, dtype=torch.int32)},
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict) -> None:
    call = {"q": torch.zeros(4, 2, 16), "k": torch.zeros(4, 2, 16), "v": torch.zeros(4, 2, 16), "rates": torch.zeros(2), **change}
    with pytest.raises(UsageError):
        lightning_prefill(**call)
