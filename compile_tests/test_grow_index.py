"""grow_index: cluster_keys and pack_clusters of the tokens behind the sinks, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ops import cluster_keys, grow_index, pack_clusters
from retro_ops.ops._contract import ELEMENT_DTYPES, Counter, cluster_count
from retro_ops.testing import (
    Arguments,
    Variant,
    assert_captures,
    assert_compiles,
    assert_refused,
    assert_repeats,
    assert_same,
    every_kernel,
    in_layout,
    on_device,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = ("store", "centroids", "offsets", "variances", "totals", "counters")
WITH_HALVES = ("store", "centroids", "totals")  # [2, B, ...]


def updates_of(arguments: Arguments, steady_tokens: int) -> int:
    """Segments that a row of `steady_tokens` gives up."""
    full = sum(arguments[name] for name in ("sink_tokens", "local_tokens", "update_segment"))
    updates = 0
    while steady_tokens - updates * arguments["update_segment"] >= full:
        updates += 1
    return updates


def make(
    variant: Variant,
    held: list[int],
    indexed: list[tuple[int, int]],
    *,
    sink_tokens: int = 2,
    local_tokens: int = 3,
    update_segment: int = 8,
    cluster_size: int = 2,
    room: int = 1,
) -> Arguments:
    """Rows with `held` steady tokens, and (tokens, clusters) of `indexed` in their index."""
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    numbers = {
        "sink_tokens": sink_tokens,
        "local_tokens": local_tokens,
        "update_segment": update_segment,
        "cluster_size": cluster_size,
        "iterations": 3,
    }
    updates = [updates_of(numbers, steady_tokens) for steady_tokens in held]
    new_clusters = cluster_count(update_segment, cluster_size)
    tokens = [
        first + count * update_segment for (first, _), count in zip(indexed, updates, strict=True)
    ]
    clusters = [
        first + count * new_clusters for (_, first), count in zip(indexed, updates, strict=True)
    ]
    slots = max(held, default=0) + room
    capacity = max(clusters, default=0) + room
    steady = variant.normal(generator, 2, *groups, slots, variant.head_dim)
    for row, steady_tokens in enumerate(held):
        steady[:, row, :, steady_tokens:] = torch.nan  # nothing behind the last token is read
    store = variant.normal(generator, 2, *groups, max(tokens, default=0) + room, variant.head_dim)
    centroids = variant.normal(generator, 2, *groups, capacity, variant.head_dim)
    return {
        "steady": in_layout(steady, variant.writable_layout),
        "store": in_layout(store, variant.writable_layout),
        "centroids": in_layout(centroids, variant.writable_layout),
        "offsets": torch.full((*groups, capacity + 1), 77, dtype=torch.int32),
        "variances": torch.rand(*groups, capacity, generator=generator),
        "totals": torch.rand(2, *groups, variant.head_dim, generator=generator),
        "counters": variant.counters(
            steady_tokens=held,
            indexed_tokens=[first for first, _ in indexed],
            clusters=[first for _, first in indexed],
        ),
        **numbers,
    }


def composed(arguments: Arguments) -> None:
    """grow_index in terms of cluster_keys and pack_clusters, row by row and segment by segment."""
    steady, counters = arguments["steady"], arguments["counters"]
    sink, segment = arguments["sink_tokens"], arguments["update_segment"]
    for row in range(steady.shape[1]):
        for _ in range(updates_of(arguments, int(counters[row, Counter.STEADY_TOKENS]))):
            held = int(counters[row, Counter.STEADY_TOKENS])
            own = steady[:, row : row + 1]
            keys, values = own[:, :, :, sink : sink + segment].clone()
            spans = torch.tensor([[0, segment]], device=steady.device)
            assignment = cluster_keys(
                keys, spans, arguments["cluster_size"], segment, arguments["iterations"]
            )
            index = {
                name: arguments[name][:, row : row + 1].clone()
                if name in WITH_HALVES
                else arguments[name][row : row + 1].clone()
                for name in INDEX
            }
            pack_clusters(keys, values, assignment, **index, cluster_size=arguments["cluster_size"])
            for name, value in index.items():
                if name in WITH_HALVES:
                    arguments[name][:, row : row + 1] = value
                else:
                    arguments[name][row : row + 1] = value
            own[:, :, :, sink : held - segment] = own[:, :, :, sink + segment : held].clone()
            counters[row, Counter.STEADY_TOKENS] -= segment
            counters[row, Counter.UPDATES] += 1


def assert_matches(arguments: Arguments, device: str) -> None:
    for kernels in every_kernel(device):
        actual, expected = on_device(arguments, device), on_device(arguments, device)
        grow_index(**actual)
        composed(expected)
        for name in INDEX:
            assert_same(actual[name], expected[name], f"{kernels}: {name}")
        for row, held in enumerate(expected["counters"][:, Counter.STEADY_TOKENS].tolist()):
            assert_same(
                actual["steady"][:, row, :, :held],
                expected["steady"][:, row, :, :held],
                f"{kernels}: steady",
            )


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    "held",
    [[13, 13], [12, 13], [12, 0], [14, 20], [21, 40]],
    ids=["all rows", "one row", "no row", "more local tokens", "several segments"],
)
def test_matches_reference(device: str, dtype: torch.dtype, held: list[int]) -> None:
    assert_matches(make(Variant(dtype=dtype), held, [(0, 0), (10, 3)]), device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), [13, 14], [(0, 0), (10, 3)]), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"steady": torch.zeros(2, 2, 14, 64)},
            "steady must be [2, B, Hkv, S, D] = [2, any, any, any, any], got [2, 2, 14, 64]",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 15, 64, dtype=torch.float64)},
            "steady must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 64, 15).transpose(-1, -2)},
            "steady must have stride 1 on its last axis, since it is changed in place, got 15",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 15, 72)},
            "head_dim must be a multiple of 16 from 16 to 256, got 72",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 19, 80)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, 64], got [2, 2, 2, 19, 80]",
        ),
        (
            {"centroids": torch.zeros(2, 2, 2, 8, 64, dtype=torch.bfloat16)},
            "centroids must be torch.float32, got torch.bfloat16",
        ),
        (
            {"offsets": torch.zeros(2, 2, 8, dtype=torch.int32)},
            "offsets must be [B, Hkv, C + 1] = [2, 2, 9], got [2, 2, 8]",
        ),
        (
            {"variances": torch.zeros(2, 2, 9)},
            "variances must be [B, Hkv, C] = [2, 2, 8], got [2, 2, 9]",
        ),
        (
            {"totals": torch.zeros(2, 2, 64, 2).transpose(2, 3)},
            "totals must be contiguous, got strides [256, 128, 1, 2]",
        ),
        (
            {"counters": torch.zeros(3, 6, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 14], got [3, 6]",
        ),
        ({"sink_tokens": -1}, "sink_tokens must not be negative, got -1"),
        ({"local_tokens": -2}, "local_tokens must not be negative, got -2"),
        ({"cluster_size": 0}, "cluster_size must be at least 1 token, got 0"),
        (
            {"update_segment": 1},
            "update_segment must be at least cluster_size (2 tokens), got 1",
        ),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(grow_index, arguments, f"grow_index: {message}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"steady_tokens": [0, 13], "indexed_tokens": [0, 12], "clusters": [0, 0]},
            "store of 19 tokens holds 12 of row 1, 8 more do not fit",
        ),
        (
            {"steady_tokens": [0, 13], "indexed_tokens": [0, 10], "clusters": [0, 5]},
            "index of 8 clusters holds 5 of row 1, 4 more do not fit",
        ),
        (
            {"steady_tokens": [0, 16], "indexed_tokens": [0, 10], "clusters": [0, 3]},
            "counters say that row 1 has 16 steady tokens, the steady zone holds 15",
        ),
        (
            {"steady_tokens": [13, 13], "indexed_tokens": [-5, 0], "clusters": [0, 0]},
            "counters say that row 0 has -5 indexed tokens, the store holds 19",
        ),
        (
            {"steady_tokens": [13, 13], "indexed_tokens": [0, 0], "clusters": [0, 9]},
            "counters say that row 1 has 9 clusters, the index holds 8",
        ),
    ],
)
def test_rejects_values(columns: dict[str, list[int]], message: str) -> None:
    arguments = {**refusable("cpu"), "counters": Variant().counters(**columns)}
    assert_refused(grow_index, arguments, f"grow_index: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(device: str, dtype: torch.dtype, layout: str) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = on_device(make(variant, [13, 13], [(0, 0), (10, 3)], room=0), device)
    torch.library.opcheck(torch.ops.retro.grow_index.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [13, 14], [(0, 0), (10, 3)])
    second = make(
        Variant(rows=4, heads=5, head_dim=80), [13, 12, 0, 22], [(0, 0), (10, 3), (7, 2), (9, 9)]
    )
    assert_compiles(grow_index, on_device(first, device), backend=backend)
    assert_compiles(
        grow_index, on_device(first, device), on_device(second, device), backend=backend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_captures(dtype: torch.dtype) -> None:
    first = make(Variant(dtype=dtype), [13, 40], [(0, 0), (10, 3)])
    second = make(Variant(dtype=dtype, seed=1), [12, 40], [(10, 3), (1, 1)])
    for name in INDEX:  # the same room, though rows hold other numbers of tokens
        second[name] = second["counters"] if name == "counters" else first[name].clone()
    assert_captures(grow_index, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    variant=variants(),
    sink_tokens=st.sampled_from((0, 1, 4)),
    local_tokens=st.sampled_from((0, 1, 5)),
    cluster_size=st.sampled_from((1, 2, 3)),
    update_segment=st.sampled_from((3, 8, 37)),
    held=st.lists(
        st.tuples(st.integers(-2, 2), st.sampled_from((0, 1, 2))), min_size=3, max_size=3
    ),
    indexed=st.lists(
        st.tuples(st.sampled_from((0, 1, 9)), st.sampled_from((0, 1, 5))), min_size=3, max_size=3
    ),
    room=st.sampled_from((0, 2)),
)
def test_grows_any_rows(
    device: str,
    variant: Variant,
    sink_tokens: int,
    local_tokens: int,
    cluster_size: int,
    update_segment: int,
    held: list[tuple[int, int]],
    indexed: list[tuple[int, int]],
    room: int,
) -> None:
    full = sink_tokens + local_tokens + update_segment
    steady_tokens = [
        max(full + more + segments * update_segment, 0) for more, segments in held[: variant.rows]
    ]
    arguments = make(
        replace(variant, device=device),
        steady_tokens,
        indexed[: variant.rows],
        sink_tokens=sink_tokens,
        local_tokens=local_tokens,
        update_segment=update_segment,
        cluster_size=cluster_size,
        room=room,
    )
    assert_matches(arguments, device)


@pytest.mark.parametrize("name", ["sink_tokens", "local_tokens", "update_segment"])
def test_more_tokens_than_a_row_holds_are_never_indexed(device: str, name: str) -> None:
    for number in (100, 2**63 - 1):
        arguments = on_device({**refusable(device), name: number}, device)
        before = on_device(arguments, device)
        grow_index(**arguments)
        for tensor in ("steady", *INDEX):
            assert_same(arguments[tensor], before[tensor], tensor)


def test_values_are_summed_over_what_is_indexed(device: str) -> None:
    """Small whole numbers, whose sums are exact."""
    variant = Variant(dtype=torch.bfloat16, device=device)
    arguments = make(variant, [21, 12], [(0, 0), (10, 3)])
    values, before = arguments["steady"][1], arguments["totals"][1]
    values.copy_(torch.randint(-9, 10, values.shape, generator=variant.generator))
    before.copy_(torch.randint(-99, 100, before.shape, generator=variant.generator))
    expected = before.clone()
    expected[0] += values[0, :, 2:18].float().sum(dim=1)
    for kernels in every_kernel(device):
        actual = on_device(arguments, device)
        grow_index(**actual)
        assert_same(actual["totals"][1].cpu(), expected, kernels)


def test_other_rows_are_untouched(device: str) -> None:
    arguments = on_device(make(Variant(), [13, 12], [(0, 0), (10, 3)]), device)
    before = on_device(arguments, device)
    grow_index(**arguments)
    assert_same(arguments["steady"][:, 1], before["steady"][:, 1], "steady")
    for name in WITH_HALVES:
        assert_same(arguments[name][:, 1], before[name][:, 1], name)
    for name in ("offsets", "variances", "counters"):
        assert_same(arguments[name][1], before[name][1], name)


@settings(deadline=None, derandomize=True, max_examples=10)
@given(variant=variants())
def test_repeats(device: str, variant: Variant) -> None:
    variant = replace(variant, device=device)
    arguments = make(
        variant, [13, 40, 12][: variant.rows], [(0, 0), (10, 3), (1, 1)][: variant.rows]
    )
    arguments = on_device(arguments, device)
    for _ in every_kernel(device):
        assert_repeats(grow_index, arguments)
