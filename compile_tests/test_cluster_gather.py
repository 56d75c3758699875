"""cluster_gather: addresses of clusters, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ops import cluster_gather
from retro_ops.ops._contract import Counter
from retro_ops.ops.cluster_gather import reference
from retro_ops.testing import (
    Arguments,
    Variant,
    assert_captures,
    assert_compiles,
    assert_refused,
    assert_repeats,
    assert_same,
    in_layout,
    on_device,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(variant: Variant, retrieved: int, clusters: int, *, none: float = 0.3) -> Arguments:
    """`none` of the retrieved ids are -1, anywhere; a third of the clusters are empty."""
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    ids = torch.randint(max(clusters, 1), (*groups, retrieved), generator=generator)
    if clusters == 0:
        none = 1.0
    ids[torch.rand(ids.shape, generator=generator) < none] = -1
    sizes = torch.randint(30, (*groups, clusters + 1), generator=generator)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.33] = 0
    return {
        "retrieved": in_layout(ids.int(), variant.layout),
        "offsets": in_layout(sizes.cumsum(dim=2).int(), variant.layout),
        "counters": variant.counters(),
    }


def assert_matches(arguments: Arguments, device: str) -> None:
    actual, expected = on_device(arguments, device), on_device(arguments, "cpu")
    assert_same(cluster_gather(**actual).cpu(), reference(**expected), "addresses")
    assert_same(actual["counters"].cpu(), expected["counters"], "counters")


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize(
    ("retrieved", "clusters", "none"),
    [(0, 7, 0.3), (1, 1, 0.0), (5, 0, 0.3), (7, 40, 1.0), (300, 500, 0.3)],
    ids=["none asked", "one", "no clusters", "none found", "many"],
)
def test_matches_reference(
    device: str, layout: str, retrieved: int, clusters: int, none: float
) -> None:
    assert_matches(make(Variant(layout=layout), retrieved, clusters, none=none), device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), 5, 9), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"retrieved": torch.zeros(2, 5, dtype=torch.int32)},
            "retrieved must be [B, Hkv, R] = [any, any, any], got [2, 5]",
        ),
        (
            {"retrieved": torch.zeros(2, 2, 5, dtype=torch.int64)},
            "retrieved must be torch.int32, got torch.int64",
        ),
        (
            {"offsets": torch.zeros(2, 3, 10, dtype=torch.int32)},
            "offsets must be [B, Hkv, C + 1] = [2, 2, any], got [2, 3, 10]",
        ),
        (
            {"offsets": torch.zeros(2, 2, 10, dtype=torch.int16)},
            "offsets must be torch.int32, got torch.int16",
        ),
        (
            {"offsets": torch.zeros(2, 2, 0, dtype=torch.int32)},
            "offsets must hold C + 1 >= 1 entries, got 0",
        ),
        (
            {"counters": torch.zeros(2, 7, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [2, 7]",
        ),
        (
            {"counters": torch.zeros(2, 15, dtype=torch.bool)},
            "counters must be torch.int64, got torch.bool",
        ),
        (
            {"counters": torch.zeros(15, 2, dtype=torch.int64).T},
            "counters must be contiguous, got strides [1, 2]",
        ),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(cluster_gather, arguments, f"cluster_gather: {message}")


@pytest.mark.parametrize("cluster", [9, -2, 2**31 - 1])
def test_rejects_values(cluster: int) -> None:
    arguments = refusable("cpu")
    arguments["retrieved"][1, 1, 4] = cluster
    message = f"cluster_gather: retrieved must lie in -1 .. 8, got {cluster}"
    assert_refused(cluster_gather, arguments, message, by_fake=False)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "permuted"])
@pytest.mark.parametrize("retrieved", [5, 0])
def test_opcheck(device: str, layout: str, retrieved: int) -> None:
    arguments = on_device(make(Variant(layout=layout), retrieved, 9), device)
    torch.library.opcheck(torch.ops.retro.cluster_gather.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = on_device(make(Variant(rows=2, heads=3), 5, 9), device)
    second = on_device(make(Variant(rows=3, heads=4), 8, 21), device)
    assert_compiles(cluster_gather, first, backend=backend)
    assert_compiles(cluster_gather, first, second, backend=backend)


@pytest.mark.gpu
def test_captures() -> None:
    first, second = make(Variant(), 70, 90), make(Variant(seed=1), 70, 90)
    assert_captures(cluster_gather, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=200)
@given(
    variant=variants(),
    retrieved=st.sampled_from((0, 1, 2, 17, 64)),
    clusters=st.sampled_from((0, 1, 2, 33)),
    none=st.sampled_from((0.0, 0.3, 1.0)),
)
def test_gathers_any_clusters(
    device: str, variant: Variant, retrieved: int, clusters: int, none: float
) -> None:
    assert_matches(make(variant, retrieved, clusters, none=none), device)


def test_addresses_lie_behind_32_bits_of_bytes(device: str) -> None:
    offsets = torch.tensor([[[0, 2**30, 2**31 - 1]]], dtype=torch.int32, device=device)
    retrieved = torch.tensor([[[1, 0]]], dtype=torch.int32, device=device)
    counters = Variant(rows=1).counters(retrieved_tokens=[2**40], steps=[2**40]).to(device)
    addresses = cluster_gather(retrieved, offsets, counters)
    assert addresses.tolist() == [[[[2**30, 2**30 - 1], [0, 2**30]]]]
    columns = [Counter.RETRIEVED_TOKENS, Counter.STEPS]
    assert counters[0, columns].tolist() == [2**40 + 2**31 - 1, 2**40 + 1]


def test_repeats(device: str) -> None:
    assert_repeats(cluster_gather, on_device(make(Variant(), 70, 90), device))
