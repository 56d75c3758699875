"""pack_clusters: tokens in cluster order, bit for bit, and an index that describes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import cluster_keys, pack_clusters
from retro_ops.ops._contract import ELEMENT_DTYPES, Counter, cluster_count
from retro_ops.ops.pack_clusters import reference
from retro_ops.testing import (
    Arguments,
    Variant,
    assert_captures,
    assert_compiles,
    assert_refused,
    assert_repeats,
    assert_same,
    assert_within_budget,
    every_kernel,
    in_layout,
    in_orders_of_head_dim,
    on_device,
    to_float64,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")

COPIED = ("store", "offsets", "counters")
COMPUTED = ("centroids", "variances", "totals")


def random_assignment(variant: Variant, tokens: int, packed: list[int], clusters: int) -> Tensor:
    """As many tokens of every head as `packed` says, in up to `clusters` clusters."""
    generator = variant.generator
    shape = (variant.rows, variant.heads, tokens)
    assignment = torch.full(shape, -1, dtype=torch.int32)
    for row, count in enumerate(packed):
        for head in range(variant.heads):
            chosen = torch.randperm(tokens, generator=generator)[:count]
            cluster = torch.randint(max(clusters, 1), (count,), generator=generator)
            assignment[row, head, chosen] = cluster.int()
    return assignment


def make(
    variant: Variant,
    tokens: int,
    packed: list[int],
    held: list[tuple[int, int]],
    cluster_size: int = 4,
    room: int = 2,
) -> Arguments:
    """Rows that hold (tokens, clusters) of `held` and get `packed` more; `room` is left."""
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    clusters = cluster_count(min(packed, default=0), cluster_size)
    most_tokens = max(
        (first + count for (first, _), count in zip(held, packed, strict=True)), default=0
    )
    most_clusters = max(
        (
            first + cluster_count(count, cluster_size)
            for (_, first), count in zip(held, packed, strict=True)
        ),
        default=0,
    )
    store = variant.normal(generator, 2, *groups, most_tokens + room, variant.head_dim)
    centroids = variant.normal(generator, 2, *groups, most_clusters + room, variant.head_dim)
    keys, values = (variant.normal(generator, *groups, tokens, variant.head_dim) for _ in range(2))
    assignment = random_assignment(variant, tokens, packed, clusters)
    return {
        "keys": in_layout(keys, variant.layout),
        "values": in_layout(values, variant.layout),
        "assignment": in_layout(assignment, variant.layout),
        "store": in_layout(store, variant.writable_layout),
        "centroids": in_layout(centroids, variant.writable_layout),
        "offsets": torch.full((*groups, most_clusters + room + 1), 77, dtype=torch.int32),
        "variances": torch.rand(*groups, most_clusters + room, generator=generator),
        "totals": torch.rand(2, *groups, variant.head_dim, generator=generator),
        "counters": variant.counters(
            indexed_tokens=[first for first, _ in held], clusters=[first for _, first in held]
        ),
        "cluster_size": cluster_size,
    }


def plain_runs(arguments: Arguments) -> dict[str, Tensor]:
    """What the reference computes in several orders of summation, stacked."""
    runs: dict[str, list[Tensor]] = {name: [] for name in COMPUTED}
    with_head_dim = ("keys", "values", "store", "centroids", "totals")
    for run, back in in_orders_of_head_dim(arguments, with_head_dim):
        reference(**run)
        for name in COMPUTED:
            runs[name].append(run[name][..., back] if name in with_head_dim else run[name])
    return {name: torch.stack(run) for name, run in runs.items()}


def assert_matches(arguments: Arguments, device: str) -> None:
    exact, copied, eager = to_float64(arguments), on_device(arguments, "cpu"), plain_runs(arguments)
    reference(**exact)
    reference(**copied)
    first = arguments["counters"][:, Counter.CLUSTERS].tolist()
    last = copied["counters"][:, Counter.CLUSTERS].tolist()
    for kernels in every_kernel(device):
        actual = on_device(arguments, device)
        pack_clusters(**actual)
        for name in COPIED:
            assert_same(actual[name].cpu(), copied[name], f"{kernels}: {name}")
        for name in COMPUTED:
            assert_within_budget(actual[name], exact[name], eager[name], f"{kernels}: {name}")
        # What does not belong to the new clusters keeps its bits.
        for row in range(len(first)):
            for name, axis in (("centroids", 1), ("variances", 0)):
                now = actual[name].cpu().select(axis, row)
                before = arguments[name].select(axis, row)
                for kept in (slice(0, first[row]), slice(last[row], None)):
                    at = (slice(None),) * (axis + 1) + (kept,)
                    assert_same(now[at], before[at], f"{kernels}: {name} of others")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "packed", "held", "cluster_size"),
    [
        (1, [1, 1], [(0, 0), (0, 0)], 4),
        (40, [40, 40], [(0, 0), (12, 3)], 4),
        (60, [17, 55], [(0, 0), (12, 3)], 7),
        (9, [0, 5], [(3, 2), (0, 0)], 2),
        (0, [0, 0], [(3, 2), (0, 0)], 2),
        (300, [300, 300], [(0, 0), (1, 1)], 300),
    ],
    ids=["one token", "all", "some", "none of a row", "no token", "one cluster"],
)
def test_matches_reference(
    device: str,
    dtype: torch.dtype,
    tokens: int,
    packed: list[int],
    held: list[tuple[int, int]],
    cluster_size: int,
) -> None:
    assert_matches(make(Variant(dtype=dtype), tokens, packed, held, cluster_size), device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), 12, [12, 12], [(0, 0), (4, 1)]), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keys": torch.zeros(2, 2, 64)},
            "keys must be [B, Hkv, T, D] = [any, any, any, any], got [2, 2, 64]",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 64, dtype=torch.float64)},
            "keys must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 40)},
            "head_dim must be a multiple of 16 from 16 to 256, got 40",
        ),
        (
            {"values": torch.zeros(2, 2, 12, 80)},
            "values must be [B, Hkv, T, D] = [2, 2, 12, 64], got [2, 2, 12, 80]",
        ),
        (
            {"values": torch.zeros(2, 2, 12, 64, dtype=torch.bfloat16)},
            "values must be torch.float32, got torch.bfloat16",
        ),
        (
            {"assignment": torch.zeros(2, 2, 11, dtype=torch.int32)},
            "assignment must be [B, Hkv, T] = [2, 2, 12], got [2, 2, 11]",
        ),
        (
            {"assignment": torch.zeros(2, 2, 12, dtype=torch.int64)},
            "assignment must be torch.int32, got torch.int64",
        ),
        (
            {"store": torch.zeros(2, 2, 1, 20, 64)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, 64], got [2, 2, 1, 20, 64]",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 20, 64, dtype=torch.float16)},
            "store must be torch.float32, got torch.float16",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 64, 20).transpose(-1, -2)},
            "store must have stride 1 on its last axis, since it is changed in place, got 20",
        ),
        (
            {"centroids": torch.zeros(1, 2, 2, 6, 64)},
            "centroids must be [2, B, Hkv, C, D] = [2, 2, 2, any, 64], got [1, 2, 2, 6, 64]",
        ),
        (
            {"centroids": torch.zeros(2, 2, 2, 6, 64, dtype=torch.float16)},
            "centroids must be torch.float32, got torch.float16",
        ),
        (
            {"centroids": torch.zeros(2, 2, 2, 64, 6).transpose(-1, -2)},
            "centroids must have stride 1 on its last axis, since it is changed in place, got 6",
        ),
        (
            {"offsets": torch.zeros(2, 2, 6, dtype=torch.int32)},
            "offsets must be [B, Hkv, C + 1] = [2, 2, 7], got [2, 2, 6]",
        ),
        (
            {"offsets": torch.zeros(2, 2, 7, dtype=torch.int64)},
            "offsets must be torch.int32, got torch.int64",
        ),
        (
            {"offsets": torch.zeros(2, 7, 2, dtype=torch.int32).transpose(1, 2)},
            "offsets must be contiguous, got strides [14, 1, 2]",
        ),
        (
            {"variances": torch.zeros(2, 2, 7)},
            "variances must be [B, Hkv, C] = [2, 2, 6], got [2, 2, 7]",
        ),
        (
            {"variances": torch.zeros(2, 2, 6, dtype=torch.float64)},
            "variances must be torch.float32, got torch.float64",
        ),
        (
            {"variances": torch.zeros(2, 6, 2).transpose(1, 2)},
            "variances must be contiguous, got strides [12, 1, 2]",
        ),
        (
            {"totals": torch.zeros(2, 2, 32)},
            "totals must be [2, B, Hkv, D] = [2, 2, 2, 64], got [2, 2, 32]",
        ),
        (
            {"totals": torch.zeros(2, 2, 2, 64, dtype=torch.bfloat16)},
            "totals must be torch.float32, got torch.bfloat16",
        ),
        (
            {"totals": torch.zeros(2, 2, 64, 2).transpose(2, 3)},
            "totals must be contiguous, got strides [256, 128, 1, 2]",
        ),
        (
            {"counters": torch.zeros(1, 6, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [1, 6]",
        ),
        (
            {"counters": torch.zeros(2, 15)},
            "counters must be torch.int64, got torch.float32",
        ),
        (
            {"counters": torch.zeros(15, 2, dtype=torch.int64).T},
            "counters must be contiguous, got strides [1, 2]",
        ),
        ({"cluster_size": 0}, "cluster_size must be at least 1 token, got 0"),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(pack_clusters, arguments, f"pack_clusters: {message}")


def test_rejects_assignment() -> None:
    arguments = refusable("cpu")
    arguments["assignment"][1, 1, 3] = -1
    assert_refused(
        pack_clusters,
        arguments,
        "pack_clusters: assignment of row 1 must name as many tokens in every head, got 12 in "
        "head 0 and 11 in head 1",
        by_fake=False,
    )
    arguments = refusable("cpu")
    arguments["assignment"][1, 0, 3] = 3
    assert_refused(
        pack_clusters,
        arguments,
        "pack_clusters: assignment of row 1, head 0 must lie below 3 clusters (12 tokens of "
        "cluster_size 4), got 3",
        by_fake=False,
    )


@pytest.mark.parametrize(
    ("indexed_tokens", "clusters", "message"),
    [
        ([0, 7], [0, 1], "store of 18 tokens holds 7 of row 1, 12 more do not fit"),
        ([0, 6], [0, 4], "index of 6 clusters holds 4 of row 1, 3 more do not fit"),
        ([0, 19], [0, 1], "counters say that row 1 has 19 indexed tokens, the store holds 18"),
        ([-1, 0], [0, 1], "counters say that row 0 has -1 indexed tokens, the store holds 18"),
        ([0, 6], [0, 7], "counters say that row 1 has 7 clusters, the index holds 6"),
        ([0, 6], [-9, 0], "counters say that row 0 has -9 clusters, the index holds 6"),
    ],
)
def test_rejects_values(indexed_tokens: list[int], clusters: list[int], message: str) -> None:
    counters = Variant().counters(indexed_tokens=indexed_tokens, clusters=clusters)
    arguments = {**refusable("cpu"), "counters": counters}
    assert_refused(pack_clusters, arguments, f"pack_clusters: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(device: str, dtype: torch.dtype, layout: str) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = on_device(make(variant, 9, [9, 5], [(0, 0), (4, 1)]), device)
    torch.library.opcheck(torch.ops.retro.pack_clusters.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), 12, [12, 9], [(0, 0), (11, 4)])
    second = make(Variant(rows=3, heads=4, head_dim=80), 31, [31, 17, 0], [(0, 0), (11, 4), (5, 1)])
    assert_compiles(pack_clusters, on_device(first, device), backend=backend)
    assert_compiles(
        pack_clusters, on_device(first, device), on_device(second, device), backend=backend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_captures(dtype: torch.dtype) -> None:
    first = make(Variant(dtype=dtype), 40, [40, 40], [(0, 0), (11, 4)])
    second = make(Variant(dtype=dtype, seed=1), 40, [40, 40], [(11, 4), (0, 0)])
    second["assignment"][1, :, ::2] = -1
    assert_captures(pack_clusters, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=150)
@given(
    variant=variants(),
    tokens=st.sampled_from((0, 1, 2, 7, 33, 70)),
    parts=st.lists(st.sampled_from((0.0, 0.5, 1.0)), min_size=3, max_size=3),
    held=st.lists(
        st.tuples(st.sampled_from((0, 1, 9)), st.sampled_from((0, 1, 5))), min_size=3, max_size=3
    ),
    cluster_size=st.sampled_from((1, 2, 3, 16, 2**63 - 1)),
    room=st.sampled_from((0, 1, 3)),
)
def test_packs_any_tokens(
    device: str,
    variant: Variant,
    tokens: int,
    parts: list[float],
    held: list[tuple[int, int]],
    cluster_size: int,
    room: int,
) -> None:
    variant = replace(variant, device=device)
    packed = [int(part * tokens) for part in parts[: variant.rows]]
    assert_matches(make(variant, tokens, packed, held[: variant.rows], cluster_size, room), device)


def test_extreme_values(device: str) -> None:
    # Sums of these overflow float16, their means and squares do not overflow float32.
    for dtype, extreme in ((torch.float16, 65504.0), (torch.bfloat16, 1e15), (torch.float32, 1e15)):
        arguments = make(Variant(dtype=dtype, layout="contiguous"), 40, [40, 40], [(0, 0), (1, 1)])
        for name in ("keys", "values"):
            arguments[name] = (arguments[name].sign() * extreme).to(dtype)
        assert_matches(arguments, device)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded"])
def test_two_pieces_are_the_whole(device: str, dtype: torch.dtype, layout: str) -> None:
    """Two segments, indexed one after the other or at once."""
    variant = Variant(dtype=dtype, layout=layout, device=device)
    arguments = on_device(make(variant, 64, [64, 64], [(0, 0), (4, 1)], room=0), device)

    def index(into: Arguments, first: int, last: int) -> None:
        spans = torch.tensor([[first, last]] * 2, device=device)
        assignment = cluster_keys(arguments["keys"], spans, 4, 32, 3)
        pack_clusters(**{**into, "assignment": assignment})

    for kernels in every_kernel(device):
        whole, pieces = on_device(arguments, device), on_device(arguments, device)
        index(whole, 0, 64)
        index(pieces, 0, 32)
        index(pieces, 32, 64)
        for name in (*COPIED, "centroids", "variances"):
            assert_same(pieces[name], whole[name], f"{kernels}: {name}")
        # CUDA kernels sum many clusters at once, in another order; squares are positive.
        if device == "cpu":
            assert_same(pieces["totals"], whole["totals"], f"{kernels}: totals")
        residuals, value_sums = zip(pieces["totals"], whole["totals"], strict=True)
        torch.testing.assert_close(*residuals, rtol=2.0**-20, atol=0.0, msg=kernels)
        largest = 1.0 + float(arguments["values"].float().abs().sum(dim=2).max())
        torch.testing.assert_close(*value_sums, rtol=0.0, atol=2.0**-20 * largest, msg=kernels)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_values_are_summed_over_what_is_packed(device: str, dtype: torch.dtype) -> None:
    """Small whole numbers, whose sums are exact; tokens left out do not count."""
    variant = Variant(dtype=dtype, device=device)
    arguments = make(variant, 60, [17, 55], [(0, 0), (12, 3)], 7)
    values, before = arguments["values"], arguments["totals"][1]
    values.copy_(torch.randint(-9, 10, values.shape, generator=variant.generator))
    before.copy_(torch.randint(-99, 100, before.shape, generator=variant.generator))
    packed = (arguments["assignment"] >= 0)[..., None]
    expected = before + (values.float() * packed).sum(dim=2)
    for kernels in every_kernel(device):
        actual = on_device(arguments, device)
        pack_clusters(**actual)
        assert_same(actual["totals"][1].cpu(), expected, kernels)


@settings(max_examples=10)
@given(variant=variants(), tokens=st.sampled_from((1, 40)))
def test_repeats(device: str, variant: Variant, tokens: int) -> None:
    variant = replace(variant, device=device)
    packed, held = [tokens] * variant.rows, [(3, 2)] * variant.rows
    arguments = on_device(make(variant, tokens, packed, held), device)
    for _ in every_kernel(device):
        assert_repeats(pack_clusters, arguments)
