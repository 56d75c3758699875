"""decode_attention: wave_estimate, cluster_gather and merged_attention in one, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import cluster_gather, decode_attention, merged_attention, wave_estimate
from retro_ops.ops._contract import ELEMENT_DTYPES, ESTIMATORS, Counter, retrieved_count
from retro_ops.ops.cluster_gather import reference as reference_gather
from retro_ops.ops.merged_attention import reference as reference_attention
from retro_ops.ops.wave_estimate import reference as reference_estimate
from retro_ops.testing import (
    MAGNITUDES,
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
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_HEAD_DIM = ("query", "steady", "store", "centroids", "totals")
INDEX = ("centroids", "offsets", "variances", "totals")
NUMBERS = (
    "max_retrieved",
    "retrieval_budget",
    "min_retrieved_clusters",
    "estimation_budget",
    "estimator",
)


def make(
    variant: Variant,
    held: list[int],
    live: list[int],
    *,
    estimator: str = "variance",
    retrieval_budget: float = 0.2,
    min_retrieved_clusters: int = 1,
    estimation_budget: float = 0.4,
    cluster_tokens: int = 12,
    strength: float = 1.0,
    room: int = 2,
) -> Arguments:
    """Rows of `held` steady tokens and `live` clusters of up to `cluster_tokens` tokens.

    Args:
        strength: standard deviation of logits, about.
        room: slots and clusters more than any row has, and more of `max_retrieved` than needed.
    """
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    capacity = max(live, default=0) + room
    sizes = torch.randint(cluster_tokens + 1, (*groups, capacity), generator=generator)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.2] = 0
    offsets = torch.nn.functional.pad(sizes.cumsum(dim=2), (1, 0)).int()
    slots = max(held, default=0) + room
    steady = variant.normal(generator, 2, *groups, slots, variant.head_dim)
    tokens = capacity * cluster_tokens + room
    store = variant.normal(generator, 2, *groups, tokens, variant.head_dim)
    centroids = variant.normal(generator, 2, *groups, capacity, variant.head_dim)
    centroids[:, sizes == 0] = 0.0
    magnitude = MAGNITUDES[variant.magnitude]
    variances = torch.rand(*groups, capacity, generator=generator) * magnitude**2
    totals = torch.rand(2, *groups, variant.head_dim, generator=generator)
    totals[1] *= magnitude * offsets[..., -1:]
    query = variant.normal(
        generator, variant.rows, variant.heads * variant.groups, variant.head_dim
    )
    return {
        "query": in_layout(query, variant.layout),
        "steady": in_layout(steady, variant.layout),
        "store": in_layout(store, variant.layout),
        "centroids": in_layout(centroids, variant.layout),
        "offsets": in_layout(offsets, variant.layout),
        "variances": in_layout(variances, variant.layout),
        "totals": in_layout(totals, variant.layout),
        "counters": variant.counters(
            steady_tokens=held,
            clusters=live,
            indexed_tokens=[cluster_tokens * count for count in live],
        ),
        "max_retrieved": room + retrieved_count(retrieval_budget, min_retrieved_clusters, capacity),
        "retrieval_budget": retrieval_budget,
        "min_retrieved_clusters": min_retrieved_clusters,
        "estimation_budget": estimation_budget,
        "estimator": estimator,
        "scale": strength / (variant.head_dim**0.5 * (magnitude**2 or 1.0)),
    }


def poisoned(arguments: Arguments) -> Arguments:
    """NaN and nonsense behind what the rows hold, which must not be read."""
    arguments = on_device(arguments, "cpu")
    for row, counters in enumerate(arguments["counters"].tolist()):
        live = counters[Counter.CLUSTERS]
        arguments["steady"][:, row, :, counters[Counter.STEADY_TOKENS] :] = torch.nan
        for head, last in enumerate(arguments["offsets"][row, :, live].tolist()):
            arguments["store"][:, row, head, last:] = torch.nan
        arguments["centroids"][:, row, :, live:] = torch.nan
        arguments["variances"][row, :, live:] = torch.nan
        arguments["offsets"][row, :, live + 1 :] = -77
    return arguments


def composed(arguments: Arguments) -> Tensor:
    """decode_attention in terms of the three ops."""
    query, counters, scale = (arguments[name] for name in ("query", "counters", "scale"))
    index, numbers = ([arguments[name] for name in names] for names in (INDEX, NUMBERS))
    retrieved, estimate, lse = wave_estimate(query, *index, counters, *numbers, scale)
    addresses = cluster_gather(retrieved, arguments["offsets"], counters)
    kept = (arguments["steady"], arguments["store"])
    return merged_attention(query, *kept, addresses, counters, estimate, lse, scale)[0]


def reference(arguments: Arguments, arithmetic: torch.dtype) -> Tensor:
    """The references of the three ops, one after the other; changes the counters."""
    query, counters, scale = (arguments[name] for name in ("query", "counters", "scale"))
    index, numbers = ([arguments[name] for name in names] for names in (INDEX, NUMBERS))
    retrieved, estimate, lse = reference_estimate(
        query, *index, counters, *numbers, scale, dtype=arithmetic
    )
    addresses = reference_gather(retrieved, arguments["offsets"], counters)
    rows = [arguments[name] for name in ("query", "steady", "store")]
    if arithmetic == torch.float64:
        rows = [tensor.double() for tensor in rows]
    return reference_attention(*rows, addresses, counters, estimate, lse, scale)[0]


def assert_is_composed(arguments: Arguments, device: str) -> None:
    given = on_device(poisoned(arguments), device)
    for kernels in every_kernel(device):
        actual, expected = on_device(given, device), on_device(given, device)
        out = decode_attention(**actual)
        assert_same(out, composed(expected), f"{kernels}: out")
        assert bool(torch.isfinite(out).all()), kernels
        for name, value in expected.items():
            if isinstance(value, Tensor):
                assert_same(actual[name], value, f"{kernels}: {name}")


def assert_matches(arguments: Arguments, device: str) -> None:
    whole = on_device(arguments, "cpu")
    exact = reference(whole, torch.float64)
    eager = [
        reference(run, torch.float32)[..., back]
        for run, back in in_orders_of_head_dim(arguments, WITH_HEAD_DIM)
    ]
    given = on_device(poisoned(arguments), device)
    for kernels in every_kernel(device):
        actual = on_device(given, device)
        out = decode_attention(**actual)
        assert out.dtype == arguments["query"].dtype, kernels
        assert_within_budget(out, exact, torch.stack(eager), f"{kernels}: out")
        assert_same(actual["counters"].cpu(), whole["counters"], f"{kernels}: counters")
    assert_is_composed(arguments, device)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("held", "live", "groups", "budgets"),
    [
        ([1, 0], [0, 1], 4, (0.2, 1, 0.4)),
        ([9, 70], [33, 17], 1, (0.2, 0, 0.4)),
        ([9, 0], [40, 25], 8, (0.0, 0, 1.0)),
        ([3, 65], [40, 25], 2, (1.0, 0, 1.0)),
        ([600, 255], [600, 1100], 2, (0.05, 64, 0.6)),
        ([9, 70], [33, 17], 12, (0.2, 1, 0.4)),
        ([9, 70], [33, 17], 20, (0.2, 1, 0.4)),
    ],
    ids=[
        "one token, one cluster",
        "MHA",
        "all estimated",
        "all retrieved",
        "several tasks",
        "large groups",
        "MQA",
    ],
)
def test_matches_reference(
    device: str,
    dtype: torch.dtype,
    estimator: str,
    held: list[int],
    live: list[int],
    groups: int,
    budgets: tuple[float, int, float],
) -> None:
    retrieval, least, estimation = budgets
    arguments = make(
        Variant(dtype=dtype, groups=groups, seed=1),
        held,
        live,
        estimator=estimator,
        retrieval_budget=retrieval,
        min_retrieved_clusters=least,
        estimation_budget=estimation,
    )
    assert_matches(arguments, device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), [9, 3], [9, 7]), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 4, 1, 64)},
            "query must be [B, Hq, D] = [any, any, any], got [2, 4, 1, 64]",
        ),
        (
            {"query": torch.zeros(2, 4, 64, dtype=torch.float64)},
            "query must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"query": torch.zeros(2, 4, 20)},
            "head_dim must be a multiple of 16 from 16 to 256, got 20",
        ),
        (
            {"query": torch.zeros(2, 5, 64)},
            "query heads must be a multiple of KV heads, got 5 and 2",
        ),
        (
            {"steady": torch.zeros(2, 2, 3, 11, 64)},
            "steady must be [2, B, Hkv, S, D] = [2, 2, 2, any, 64], got [2, 2, 3, 11, 64]",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 11, 64, dtype=torch.float16)},
            "steady must be torch.float32, got torch.float16",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 134, 80)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, 64], got [2, 2, 2, 134, 80]",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 134, 64, dtype=torch.bfloat16)},
            "store must be torch.float32, got torch.bfloat16",
        ),
        (
            {"centroids": torch.zeros(2, 2, 2, 11, 128)},
            "centroids must be [2, B, Hkv, C, D] = [2, 2, any, any, 64], got [2, 2, 2, 11, 128]",
        ),
        (
            {"centroids": torch.zeros(2, 2, 2, 11, 64, dtype=torch.bfloat16)},
            "centroids must be torch.float32, got torch.bfloat16",
        ),
        (
            {"offsets": torch.zeros(2, 2, 11, dtype=torch.int32)},
            "offsets must be [B, Hkv, C + 1] = [2, 2, 12], got [2, 2, 11]",
        ),
        (
            {"offsets": torch.zeros(2, 2, 12, dtype=torch.int64)},
            "offsets must be torch.int32, got torch.int64",
        ),
        (
            {"variances": torch.zeros(2, 2, 12)},
            "variances must be [B, Hkv, C] = [2, 2, 11], got [2, 2, 12]",
        ),
        (
            {"variances": torch.zeros(2, 2, 11, dtype=torch.float16)},
            "variances must be torch.float32, got torch.float16",
        ),
        (
            {"totals": torch.zeros(2, 2, 2, 80)},
            "totals must be [2, B, Hkv, D] = [2, 2, 2, 64], got [2, 2, 2, 80]",
        ),
        (
            {"totals": torch.zeros(2, 2, 2, 64, dtype=torch.float64)},
            "totals must be torch.float32, got torch.float64",
        ),
        (
            {"counters": torch.zeros(2, 1, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [2, 1]",
        ),
        (
            {"counters": torch.zeros(2, 15, dtype=torch.int32)},
            "counters must be torch.int64, got torch.int32",
        ),
        (
            {"counters": torch.zeros(15, 2, dtype=torch.int64).T},
            "counters must be contiguous, got strides [1, 2]",
        ),
        ({"retrieval_budget": 1.5}, "retrieval_budget must lie in 0..1, got 1.5"),
        ({"retrieval_budget": math.nan}, "retrieval_budget must lie in 0..1, got nan"),
        ({"estimation_budget": -0.25}, "estimation_budget must lie in 0..1, got -0.25"),
        ({"min_retrieved_clusters": -1}, "min_retrieved_clusters must not be negative, got -1"),
        ({"estimator": "median"}, "estimator must be 'variance' or 'mean', got 'median'"),
        (
            {"max_retrieved": 1},
            "max_retrieved must be at least 2 for 11 clusters at these budgets, got 1",
        ),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(decode_attention, arguments, f"decode_attention: {message}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"steady_tokens": [9, 3], "clusters": [0, 12]},
            "wave_estimate: counters say that row 1 has 12 clusters, the index holds 11",
        ),
        (
            {"steady_tokens": [9, 12], "clusters": [9, 7]},
            "merged_attention: counters say that row 1 has 12 steady tokens, "
            "the steady zone holds 11",
        ),
    ],
)
def test_rejects_counters(columns: dict[str, list[int]], message: str) -> None:
    """Whichever of the three finds it: nothing has been counted by then."""
    arguments = {**refusable("cpu"), "counters": Variant().counters(**columns)}
    assert_refused(decode_attention, arguments, message, by_fake=False)


def test_rejects_values() -> None:
    """An index that leads outside the store."""
    arguments = {**refusable("cpu"), "retrieval_budget": 1.0, "max_retrieved": 11}
    arguments["offsets"][1] = 1000 + torch.arange(12, dtype=torch.int32)
    message = r"^merged_attention: addresses must lie in a store of 134 tokens, got 1 tokens from"
    counters = arguments["counters"].clone()
    with pytest.raises(RuntimeError, match=message):
        decode_attention(**arguments)
    assert_same(arguments["counters"], counters, "counters")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(device: str, dtype: torch.dtype, layout: str, estimator: str) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = on_device(make(variant, [9, 3], [9, 3], estimator=estimator), device)
    torch.library.opcheck(torch.ops.retro.decode_attention.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [9, 7], [9, 7])
    second = make(Variant(rows=3, heads=5, groups=4, head_dim=80), [0, 12, 1], [20, 0, 17])
    second["max_retrieved"] = first["max_retrieved"] = 9
    second["scale"] = first["scale"]
    first, second = on_device(first, device), on_device(second, device)
    assert_compiles(decode_attention, first, backend=backend)
    assert_compiles(decode_attention, first, second, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_captures(dtype: torch.dtype, estimator: str) -> None:
    first = make(Variant(dtype=dtype), [90, 7], [90, 7], estimator=estimator)
    second = make(Variant(dtype=dtype, seed=1), [3, 90], [70, 90], estimator=estimator)
    assert_captures(decode_attention, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=200)
@given(
    variant=variants(),
    held=st.lists(st.sampled_from((0, 1, 15, 64, 65)), min_size=3, max_size=3),
    live=st.lists(st.sampled_from((0, 1, 2, 15, 16, 17, 70)), min_size=3, max_size=3),
    estimator=st.sampled_from(ESTIMATORS),
    retrieval_budget=st.sampled_from((0.0, 0.018, 0.25, 0.5, 1.0)),
    min_retrieved_clusters=st.sampled_from((0, 1, 4, 2**62)),
    estimation_budget=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    cluster_tokens=st.sampled_from((0, 1, 9, 40)),
    strength=st.sampled_from((0.1, 1.0, 10.0, -1.0, 0.0)),
    room=st.sampled_from((0, 2)),
)
def test_is_the_three_ops_for_any_index(
    device: str, variant: Variant, held: list[int], live: list[int], **numbers: object
) -> None:
    arguments = make(variant, held[: variant.rows], live[: variant.rows], **numbers)
    assert_is_composed(arguments, device)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("retrieved", "capacity"),
    [
        *[(600, 9000), (1001, 1001), (2500, 3000), (700, 20_000), (100, 40_000)],
        *[(1500, 70_000), (3000, 3500), (100, 140_000)],
    ],
)
def test_large_index(device: str, estimator: str, retrieved: int, capacity: int) -> None:
    """Each beyond what a smaller way of choosing takes: of so many retrieved or live clusters."""
    arguments = make(
        Variant(rows=1, heads=1, head_dim=16, dtype=torch.bfloat16),
        [70],
        [capacity],
        estimator=estimator,
        retrieval_budget=0.0,
        min_retrieved_clusters=retrieved,
        cluster_tokens=2,
    )
    assert_matches(arguments, device)


def test_nothing_to_attend_to(device: str) -> None:
    arguments = on_device(make(Variant(), [0, 0], [0, 3], cluster_tokens=0), device)
    for kernels in every_kernel(device):
        given = on_device(arguments, device)
        assert (decode_attention(**given) == 0).all(), kernels
        steps = given["counters"] - arguments["counters"]
        assert (steps[:, Counter.STEPS] == 1).all(), kernels
        assert steps.sum() == steps.shape[0], kernels


@settings(max_examples=10)
@given(variant=variants(), estimator=st.sampled_from(ESTIMATORS))
def test_repeats(device: str, variant: Variant, estimator: str) -> None:
    held, live = [600, 17, 1], [600, 17, 1]
    arguments = make(variant, held[: variant.rows], live[: variant.rows], estimator=estimator)
    arguments = on_device(arguments, device)
    for _ in every_kernel(device):
        assert_repeats(decode_attention, arguments)


def test_layout_does_not_matter(device: str) -> None:
    plain = make(Variant(), [40, 25], [40, 25])
    for kernels in every_kernel(device):
        expected = decode_attention(**on_device(plain, device))
        for layout in ("permuted", "padded", "transposed"):
            given = on_device(make(Variant(layout=layout), [40, 25], [40, 25]), device)
            assert_same(decode_attention(**given), expected, f"{kernels}: {layout}")


def test_backward_says_that_there_is_none(device: str) -> None:
    message = "^decode_attention: retro_ops is for inference, there is no backward pass"
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    for op in (decode_attention, compiled):
        torch._dynamo.reset()
        arguments = refusable(device)
        expected = decode_attention(**{**arguments, "counters": arguments["counters"].clone()})
        arguments["query"].requires_grad_()
        out = op(**arguments)
        assert torch.equal(out, expected)
        with pytest.raises(RuntimeError, match=message):
            out.float().sum().backward()
