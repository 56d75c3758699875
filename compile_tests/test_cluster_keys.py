"""cluster_keys: every pass assigns every key to the best cluster, up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import cluster_keys
from retro_ops.ops._contract import (
    ELEMENT_DTYPES,
    OUTLIER_PASS,
    cluster_count,
    outlier_count,
    segment_count,
)
from retro_ops.ops.cluster_keys import reference
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

FLOAT32_ROUNDING = 2.0**-24
# Unit roundoff of what scores are made of: these kernels may round keys and centroids to bfloat16.
ROUNDING = {"avx512bf16": 2.0**-9, "cuda": 2.0**-9}


def make(
    variant: Variant,
    tokens: int,
    spans: list[tuple[int, int]],
    cluster_size: int = 4,
    segment_size: int = 16,
    iterations: int = 3,
) -> Arguments:
    keys = variant.normal(variant.generator, variant.rows, variant.heads, tokens, variant.head_dim)
    return {
        "keys": in_layout(keys, variant.layout),
        "spans": torch.tensor(spans, dtype=torch.int64).view(variant.rows, 2),
        "cluster_size": cluster_size,
        "segment_size": segment_size,
        "iterations": iterations,
    }


def segments_of(
    count: int, cluster_size: int, segment_size: int
) -> list[tuple[int, int, int, int]]:
    """First token, the one after the last, first cluster, the one after the last; by segment."""
    segments, clusters = segment_count(count, segment_size), cluster_count(count, cluster_size)
    return [
        (
            *(count * (segment + step) // segments for step in (0, 1)),
            *(clusters * (segment + step) // segments for step in (0, 1)),
        )
        for segment in range(segments)
        if count > 0
    ]


def separated(variant: Variant, tokens: int, cluster_size: int, segment_size: int) -> tuple:
    """Arguments whose clusters no rounding can confuse, outliers among them, and those clusters."""
    generator = variant.generator
    keys = 5.0 + 0.05 * torch.randn(
        variant.rows, variant.heads, tokens, variant.head_dim, generator=generator
    )
    expected = torch.full(keys.shape[:3], -1, dtype=torch.int32)
    spans = [(row, tokens - row) for row in range(variant.rows)]
    for row, (first, last) in enumerate(spans):
        for begin, end, low, high in segments_of(last - first, cluster_size, segment_size):
            assert high - low <= variant.head_dim
            for token, cluster in enumerate(separate_clusters(end - begin, high - low)):
                keys[row, :, first + begin + token, cluster] += 8
                expected[row, :, first + begin + token] = low + cluster
    arguments = make(variant, tokens, spans, cluster_size, segment_size)
    arguments["keys"] = in_layout(keys.to(variant.dtype), variant.layout)
    return arguments, expected


def separate_clusters(tokens: int, clusters: int) -> list[int]:
    """The cluster of each token of a segment: groups of neighbours, outliers in some of them."""
    outliers = outlier_count(tokens, clusters)
    regular = clusters - outliers
    # Seeds are evenly spaced: each lies in a group of its own.
    found = [token * regular // tokens for token in range(tokens)]
    seeds = {(2 * cluster + 1) * tokens // (2 * regular) for cluster in range(regular)}
    used: set[int] = set()
    for outlier in range(outliers):
        token = next(
            token
            for token in range(outlier, tokens, outliers)
            if token not in seeds and found[token] not in used and found.count(found[token]) > 2
        )
        used.add(found[token])
        found[token] = regular + outlier
    return found


def assert_every_pass_is_best(
    assign: Callable[..., Tensor], arguments: Arguments, rounding: float, name: str
) -> None:
    """Follows `assign` pass by pass in float64: a chosen cluster may lose by rounding only."""
    keys, spans = arguments["keys"].double().cpu(), arguments["spans"].tolist()
    passes = [
        assign(**{**arguments, "iterations": iterations + 1}).cpu()
        for iterations in range(arguments["iterations"])
    ]
    assert all(assigned.dtype == torch.int32 for assigned in passes)
    outside = torch.ones(passes[0].shape, dtype=torch.bool)
    for row, (first, last) in enumerate(spans):
        outside[row, :, first : max(first, last)] = False
        for begin, end, low, high in segments_of(
            last - first, arguments["cluster_size"], arguments["segment_size"]
        ):
            own = keys[row, :, first + begin : first + end]
            chosen = [assigned[row, :, first + begin : first + end] - low for assigned in passes]
            for head in range(keys.shape[1]):
                assert_segment(
                    own[head], high - low, [one[head].long() for one in chosen], rounding, name
                )
    for assigned in passes:
        assert (assigned[outside] == -1).all(), name


def assert_segment(
    keys: Tensor, clusters: int, passes: list[Tensor], rounding: float, name: str
) -> None:
    tokens, head_dim = keys.shape
    centred = keys - keys.mean(dim=0)
    norm = centred.norm(dim=1)
    # Error of a centred key, and of a unit centroid, in Euclidean norm.
    key_error = (tokens + 2) * FLOAT32_ROUNDING * head_dim**0.5 * float(keys.abs().max())
    regular = clusters - outlier_count(tokens, clusters)
    seeds = [(2 * cluster + 1) * tokens // (2 * regular) for cluster in range(regular)]
    sums, error = centred[seeds], torch.full((regular,), 2 * key_error, dtype=torch.float64)
    centroids = torch.zeros_like(sums)
    centroid_error = torch.zeros(regular, dtype=torch.float64)
    moved = torch.ones(regular, dtype=torch.bool)
    count = torch.ones(regular, dtype=torch.int64)
    before = torch.zeros(tokens, dtype=torch.int64)
    for step, assigned in enumerate(passes):
        length = sums.norm(dim=1)
        turned = (error / length + 4 * FLOAT32_ROUNDING).nan_to_num(2.0, 2.0).clamp(max=2.0)
        centroid_error = torch.where(moved, turned, centroid_error)
        unit = torch.nn.functional.normalize(sums, dim=1, eps=1e-300)
        centroids = torch.where((moved & (length > 0))[:, None], unit, centroids)
        if step == OUTLIER_PASS:
            mean, mean_error = sums / count.clamp(min=1)[:, None], error / count.clamp(min=1)
            distance = (centred - mean[before]).norm(dim=1)
            blur = key_error + mean_error[before] + (head_dim + 4) * FLOAT32_ROUNDING * distance
            added = outlier_centroids(centred, distance, blur, clusters - regular)
            centroids = torch.cat((centroids, added[0]))
            seed_error = (2 * key_error / norm + 4 * FLOAT32_ROUNDING).nan_to_num(2.0, 2.0)
            centroid_error = torch.cat((centroid_error, seed_error[added[1]] + added[2]))
        assert int(assigned.min()) >= 0, name
        assert int(assigned.max()) < len(centroids), name
        score = centred @ centroids.T
        inner = 2 * rounding + (head_dim + 4) * FLOAT32_ROUNDING
        bound = norm[:, None] * (1.01 * inner + centroid_error) + key_error
        own = assigned[:, None]
        best = (score - bound).max(dim=1).values
        reached = (score + bound).gather(1, own).squeeze(1)
        worst = int((best - reached).argmax())
        assert best[worst] <= reached[worst], (
            f"{name}: token {worst} is in cluster {int(assigned[worst])} by "
            f"{float(score[worst, assigned[worst]])}, the best scores {float(score[worst].max())}"
        )
        count = torch.bincount(assigned, minlength=len(centroids))
        moved, before = count > 0, assigned
        sums = torch.zeros_like(centroids).index_add_(0, assigned, centred)
        lengths = torch.zeros(len(centroids), dtype=torch.float64).index_add_(0, assigned, norm)
        error = count * (FLOAT32_ROUNDING * lengths + key_error)


def outlier_centroids(
    centred: Tensor, distance: Tensor, blur: Tensor, outliers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of the farthest of every `outliers`-th key, those keys, and by how much another
    direction may be off that rounding may take for the farthest."""
    unit = torch.nn.functional.normalize(centred, dim=1, eps=1e-300)
    farthest = torch.zeros(outliers, dtype=torch.int64)
    apart = torch.zeros(outliers, dtype=torch.float64)
    for outlier in range(outliers):
        own = torch.arange(outlier, len(centred), outliers)
        farthest[outlier] = own[distance[own].argmax()]
        near = own[(distance + blur)[own] >= (distance - blur)[own].max()]
        apart[outlier] = (unit[near] - unit[farthest[outlier]]).norm(dim=1).max()
    return unit[farthest], farthest, apart


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "cluster_size", "segment_size", "head_dim"),
    [(1, 4, 16, 64), (17, 4, 64, 64), (96, 4, 32, 80), (130, 3, 130, 64), (50, 1, 6, 16)],
    ids=["one token", "one segment", "segments", "more clusters than a panel", "clusters of one"],
)
def test_matches_reference(
    device: str,
    dtype: torch.dtype,
    tokens: int,
    cluster_size: int,
    segment_size: int,
    head_dim: int,
) -> None:
    variant = Variant(rows=1 if tokens == 1 else 3, head_dim=head_dim, dtype=dtype)
    arguments, expected = separated(variant, tokens, cluster_size, segment_size)
    if tokens > 1:
        assert_same(reference(**arguments), expected, "reference")
    arguments = on_device(arguments, device)
    for kernels in every_kernel(device):
        assert_same(cluster_keys(**arguments).cpu(), expected, kernels)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), 12, [(0, 12), (3, 9)]), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keys": torch.zeros(2, 12, 64)},
            "keys must be [B, Hkv, T, D] = [any, any, any, any], got [2, 12, 64]",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 64, dtype=torch.float64)},
            "keys must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 64, dtype=torch.int16)},
            "keys must be torch.float32, torch.bfloat16 or torch.float16, got torch.int16",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 24)},
            "head_dim must be a multiple of 16 from 16 to 256, got 24",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 272)},
            "head_dim must be a multiple of 16 from 16 to 256, got 272",
        ),
        (
            {"spans": torch.zeros(3, 2, dtype=torch.int64)},
            "spans must be [B, 2] = [2, 2], got [3, 2]",
        ),
        (
            {"spans": torch.zeros(2, 2, dtype=torch.int32)},
            "spans must be torch.int64, got torch.int32",
        ),
        ({"cluster_size": 0}, "cluster_size must be at least 1 token, got 0"),
        ({"segment_size": 3}, "segment_size must be at least cluster_size (4 tokens), got 3"),
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(cluster_keys, arguments, f"cluster_keys: {message}")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(0, 12), (3, 13)], "spans of row 1 must lie in 0 .. 12, got 3 .. 13"),
        ([(-1, 12), (3, 12)], "spans of row 0 must lie in 0 .. 12, got -1 .. 12"),
        ([(0, 12), (0, 2**62)], f"spans of row 1 must lie in 0 .. 12, got 0 .. {2**62}"),
    ],
)
def test_rejects_values(spans: list, message: str) -> None:
    arguments = {**refusable("cpu"), "spans": torch.tensor(spans)}
    assert_refused(cluster_keys, arguments, f"cluster_keys: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(device: str, dtype: torch.dtype, layout: str) -> None:
    arguments = on_device(make(Variant(dtype=dtype, layout=layout), 9, [(0, 9), (2, 7)]), device)
    torch.library.opcheck(torch.ops.retro.cluster_keys.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), 20, [(0, 20), (3, 9)])
    second = make(Variant(rows=3, heads=5, head_dim=80), 33, [(0, 33), (3, 9), (0, 0)])
    assert_compiles(cluster_keys, on_device(first, device), backend=backend)
    assert_compiles(
        cluster_keys, on_device(first, device), on_device(second, device), backend=backend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_captures(dtype: torch.dtype) -> None:
    first = make(Variant(dtype=dtype), 100, [(0, 100), (7, 91)])
    second = make(Variant(dtype=dtype, seed=1), 100, [(1, 99), (0, 0)])
    assert_captures(cluster_keys, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=150)
@given(
    variant=variants(),
    tokens=st.sampled_from((0, 1, 2, 7, 16, 33, 70)),
    spans=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=3),
    cluster_size=st.sampled_from((1, 2, 3, 5, 16, 2**62, 2**63 - 1)),
    segment_tokens=st.sampled_from((0, 1, 7, 29, 1000)),
    iterations=st.integers(1, OUTLIER_PASS + 2),
)
def test_every_pass_assigns_to_the_best_cluster(
    device: str,
    variant: Variant,
    tokens: int,
    spans: list[tuple[float, float]],
    cluster_size: int,
    segment_tokens: int,
    iterations: int,
) -> None:
    within = [(int(first * tokens), int(last * tokens)) for first, last in spans]
    segment_size = min(cluster_size + segment_tokens, 2**63 - 1)
    arguments = make(
        variant, tokens, within[: variant.rows], cluster_size, segment_size, iterations
    )
    assert_every_pass_is_best(reference, arguments, FLOAT32_ROUNDING, "reference")
    arguments = on_device(arguments, device)
    for kernels in every_kernel(device):
        rounding = ROUNDING.get(kernels, FLOAT32_ROUNDING)
        assert_every_pass_is_best(cluster_keys, arguments, rounding, kernels)


@pytest.mark.parametrize("iterations", [1, 4])
def test_ties_go_to_the_lower_cluster(device: str, iterations: int) -> None:
    # Centred, these are themselves, and their unit vectors are exact: equal scores are equal bits.
    directions = torch.zeros(4, 32)
    directions[0, 3], directions[1, 3], directions[2, 9], directions[3, 9] = 2.0, -2.0, 4.0, -4.0
    direction = torch.arange(160) // 2 % 4
    keys = directions[direction].view(1, 1, 160, 32)
    # Of 70 regular clusters, more than one panel of centroids, the first of each direction wins,
    # and the 10 of outliers, which are no better, stay empty.
    seeds = direction[[(2 * cluster + 1) * 160 // 140 for cluster in range(70)]].tolist()
    expected = torch.tensor([seeds.index(one) for one in direction.tolist()], dtype=torch.int32)
    spans = torch.tensor([[0, 160]])
    for kernels in every_kernel(device):
        assigned = cluster_keys(keys.to(device), spans.to(device), 2, 160, iterations)
        assert_same(assigned[0, 0].cpu(), expected, kernels)


def test_a_key_like_no_other_has_its_own_cluster(device: str) -> None:
    """The digits of a number in a long text: neighbours, each far from every other key."""
    generator = torch.Generator().manual_seed(0)
    topics = 4 * torch.randn(1, 2, 56, 64, generator=generator)
    keys = topics[:, :, torch.arange(1024) * 56 // 1024]
    keys += 0.5 * torch.randn(keys.shape, generator=generator)
    number = range(601, 608)
    keys[:, :, 601:608] = 2 * torch.randn(1, 2, 7, 64, generator=generator)
    spans = torch.tensor([[0, 1024]])
    for kernels in every_kernel(device):
        assigned = cluster_keys(keys.to(device), spans.to(device), 16, 1024, 10).cpu()
        for head in assigned[0]:
            sizes = torch.bincount(head)
            assert [int(sizes[head[token]]) for token in number] == [1] * 7, kernels


def test_equal_keys_share_a_cluster(device: str) -> None:
    keys = torch.full((2, 1, 21, 16), 3.0, device=device)
    spans = torch.tensor([[0, 21], [4, 5]], device=device)
    for kernels in every_kernel(device):
        assigned = cluster_keys(keys, spans, 2, 21, 3)
        assert (assigned[0] == 0).all(), kernels
        assert assigned[1, 0].tolist() == [-1] * 4 + [0] + [-1] * 16, kernels


def test_large_common_mean_is_taken_off(device: str) -> None:
    variant = Variant(rows=1, head_dim=64)
    arguments, expected = separated(variant, 64, 4, 64)
    arguments["keys"] = arguments["keys"] + 10_000.0
    for kernels in every_kernel(device):
        assigned = cluster_keys(**on_device(arguments, device))
        assert_same(assigned.cpu(), expected, kernels)


@settings(max_examples=10)
@given(variant=variants(), tokens=st.sampled_from((1, 40, 100)))
def test_repeats(device: str, variant: Variant, tokens: int) -> None:
    spans = [(row, tokens) for row in range(variant.rows)]
    arguments = on_device(make(variant, tokens, spans), device)
    for _ in every_kernel(device):
        assert_repeats(cluster_keys, arguments)
