"""The view of a part must be the einops rearrangement that its axes string says, and share memory with the container."""

from __future__ import annotations

import numpy as np
import pytest

from mxconv.mapping.containers import Container, Part, parse_axes
from mxconv.tensors import whole

N, D, H, KV, I, E = 4, 3, 5, 2, 6, 3  # noqa: E741


def part(name: str, axes: str, shape: tuple[int, ...], slot: int = 0, stack: int | None = None) -> Part:
    return Part(
        parameter=name, axes=tuple(axes.split()), origin=(0,) * len(shape), extent=shape, box=whole(shape), slot=slot, stack=stack
    )


def container(axes: str, shape: tuple[int, ...], *parts: Part) -> Container:
    return Container(rank=0, name="t", dtype="F32", dims=parse_axes(axes), shape=shape, parts=parts)


def cases() -> list[tuple[Container, list[np.ndarray], np.ndarray]]:
    """(container, canonical arrays, what must be stored), each written out with plain numpy."""
    r = np.random.default_rng(0)
    q, k, v = (r.standard_normal((heads, D, H)) for heads in (N, N, N))
    small_k, small_v = r.standard_normal((KV, D, H)), r.standard_normal((KV, D, H))
    gate, up = r.standard_normal((2, E, I, H))
    down = r.standard_normal((E, H, I))
    out = r.standard_normal((H, N, D))
    flat = lambda x: x.reshape(-1, H)  # noqa: E731
    return [
        (
            container("(N * D) H", (N * 3 * D, H), *(part(n, "N D H", (N, D, H), i) for i, n in enumerate("qkv"))),
            [q, k, v],
            np.concatenate([np.concatenate([q[n], k[n], v[n]]) for n in range(N)]),
        ),
        (
            container(
                "H (* N D)", (H, (N + 2 * KV) * D),
                part("q", "N D H", (N, D, H)), part("k", "N D H", (KV, D, H), 1), part("v", "N D H", (KV, D, H), 2),
            ),
            [q, small_k, small_v],
            np.concatenate([flat(q), flat(small_k), flat(small_v)]).T,
        ),
        (
            container(
                "E (* I) H", (E, 2 * I, H),
                *(part(f"{n}{e}", "I H", (I, H), s, e) for e in range(E) for s, n in enumerate(("gate", "up"))),
            ),
            [x[e] for e in range(E) for x in (gate, up)],
            np.stack([np.concatenate([gate[e], up[e]]) for e in range(E)]),
        ),
        (container("E H I", (E, H, I), *(part(f"d{e}", "H I", (H, I), 0, e) for e in range(E))), list(down), down),
        (container("(N D) H", (N * D, H), part("o", "H N D", (H, N, D))), [out], out.reshape(H, -1).T),
        (container("H (N D)", (H, N * D), part("o", "H N D", (H, N, D))), [out], out.reshape(H, -1)),
        (container("H E", (H, E), part("r", "E H", (E, H))), [r.standard_normal((E, H))], np.empty(0)),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(cases())))
def test_parts_are_where_the_axes_string_says(number: int) -> None:
    box, canonical, stored = cases()[number]
    written = np.full(box.shape, np.nan)
    for each, values in zip(box.parts, canonical, strict=True):
        local = whole(each.extent)
        cover = box.cover(each, local)
        view = box.view(written[tuple(slice(*bounds) for bounds in cover)], each, local)
        assert view.shape == values.shape
        view[...] = values
    assert not np.isnan(written).any(), "a view did not share memory, or parts leave holes"
    if stored.size:
        np.testing.assert_array_equal(written, stored)


@pytest.mark.parametrize("number", range(len(cases())))
def test_a_cut_reads_the_same_values_as_the_whole(number: int) -> None:
    box, canonical, _ = cases()[number]
    written = np.zeros(box.shape)
    for each, values in zip(box.parts, canonical, strict=True):
        local = whole(each.extent)
        box.view(written[tuple(slice(*b) for b in box.cover(each, local))], each, local)[...] = values
    for each, values in zip(box.parts, canonical, strict=True):
        for axis, n in enumerate(each.extent):
            for start, stop in ((0, 1), (1, n), (n // 2, n)):
                local = tuple((start, stop) if a == axis else (0, m) for a, m in enumerate(each.extent))
                cut = box.view(written[tuple(slice(*b) for b in box.cover(each, local))], each, local)
                np.testing.assert_array_equal(cut, values[tuple(slice(*b) for b in local)])


def test_interleaved_is_seen() -> None:
    assert [case[0].interleaved for case in cases()] == [True, False, False, False, False, False, False]
