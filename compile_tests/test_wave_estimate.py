"""wave_estimate: the best clusters are retrieved, the next best estimated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import wave_estimate
from retro_ops.ops._contract import ELEMENT_DTYPES, ESTIMATORS, Counter, retrieved_count
from retro_ops.ops.wave_estimate import reference, reference_scores
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

FLOAT32_ROUNDING = 2.0**-24
WITH_HEAD_DIM = ("query", "centroids", "totals")
INDEXED = ("query", "centroids", "offsets", "variances", "totals", "counters")


def make(
    variant: Variant,
    live: list[int],
    *,
    estimator: str = "variance",
    retrieval_budget: float = 0.2,
    min_retrieved_clusters: int = 1,
    estimation_budget: float = 0.4,
    empty: float = 0.2,
    strength: float = 1.0,
    room: int = 2,
) -> Arguments:
    """Rows of `live` clusters, of which a fraction `empty` hold no token.

    Args:
        strength: standard deviation of logits, about.
        room: clusters more than any row has, and more of `max_retrieved` than needed.
    """
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    capacity = max(live, default=0) + room
    centroids = variant.normal(generator, 2, *groups, capacity, variant.head_dim)
    sizes = torch.randint(1, 30, (*groups, capacity), generator=generator)
    sizes[torch.rand(sizes.shape, generator=generator) < empty] = 0
    centroids[:, sizes == 0] = 0.0
    offsets = torch.nn.functional.pad(sizes.cumsum(dim=2), (1, 0)).int()
    query = variant.normal(
        generator, variant.rows, variant.heads * variant.groups, variant.head_dim
    )
    magnitude = MAGNITUDES[variant.magnitude]
    variances = torch.rand(*groups, capacity, generator=generator) * magnitude**2
    residuals = torch.rand(*groups, variant.head_dim, generator=generator)
    residuals[:, -1] *= float(variant.seed % 2)  # a head whose keys are all alike
    tokens = [15 * count for count in live]
    value_sums = torch.randn(*groups, variant.head_dim, generator=generator) * magnitude
    value_sums *= torch.tensor(tokens).view(-1, 1, 1)
    return {
        "query": in_layout(query, variant.layout),
        "centroids": in_layout(centroids, variant.layout),
        "offsets": in_layout(offsets, variant.layout),
        "variances": in_layout(variances, variant.layout),
        "totals": in_layout(torch.stack((residuals, value_sums)), variant.layout),
        "counters": variant.counters(clusters=live, indexed_tokens=tokens),
        "max_retrieved": room + retrieved_count(retrieval_budget, min_retrieved_clusters, capacity),
        "retrieval_budget": retrieval_budget,
        "min_retrieved_clusters": min_retrieved_clusters,
        "estimation_budget": estimation_budget,
        "estimator": estimator,
        "scale": strength / (variant.head_dim**0.5 * (magnitude**2 or 1.0)),
    }


def poisoned(arguments: Arguments) -> Arguments:
    """NaN and nonsense behind the live clusters, which must not be read."""
    arguments = on_device(arguments, "cpu")
    for row, live in enumerate(arguments["counters"][:, Counter.CLUSTERS].tolist()):
        arguments["centroids"][:, row, :, live:] = torch.nan
        arguments["variances"][row, :, live:] = torch.nan
        arguments["offsets"][row, :, live + 1 :] = -77
    return arguments


def counts(arguments: Arguments, row: int) -> tuple[int, int]:
    """Clusters that `row` retrieves, and those that it retrieves or estimates."""
    live = int(arguments["counters"][row, Counter.CLUSTERS])
    retrieved = retrieved_count(
        arguments["retrieval_budget"], arguments["min_retrieved_clusters"], live
    )
    return retrieved, min(retrieved + round(arguments["estimation_budget"] * live), live)


def score_tolerance(arguments: Arguments) -> Tensor:
    """`[B, Hkv]`: by how much of itself rounding to float32 may move a score."""
    query, keys = arguments["query"].double(), arguments["centroids"][0].double()
    heads = keys.shape[1]
    grouped = query.unflatten(1, (heads, query.shape[1] // heads)).abs()
    products = abs(arguments["scale"]) * grouped @ keys.abs().transpose(-1, -2)
    largest = torch.nn.functional.pad(products.flatten(2), (0, 1)).amax(dim=2)
    return 4 * torch.expm1((query.shape[2] + 8) * FLOAT32_ROUNDING * largest) + 2.0**-17


def is_clear_cut(arguments: Arguments, score: Tensor) -> bool:
    """Whether no rounding can move a cluster into or out of the estimated ones."""
    tolerance = score_tolerance(arguments)
    ordered = score.sort(dim=-1, descending=True, stable=True).values
    for row in range(score.shape[0]):
        for border in counts(arguments, row):
            if 0 < border < score.shape[2]:
                better, worse = ordered[row, :, border - 1], ordered[row, :, border]
                gap = better - worse
                # Equal scores are equal in float32 too: they come from equal rows.
                if ((gap > 0) & (gap <= better * tolerance[row])).any():
                    return False
    return True


def assert_retrieves_the_best(
    retrieved: Tensor, arguments: Arguments, score: Tensor, name: str
) -> None:
    tolerance = score_tolerance(arguments)
    assert retrieved.dtype == torch.int32, name
    assert retrieved.shape == (*score.shape[:2], arguments["max_retrieved"]), name
    for row in range(score.shape[0]):
        count, _ = counts(arguments, row)
        live = int(arguments["counters"][row, Counter.CLUSTERS])
        assert (retrieved[row, :, count:] == -1).all(), name
        for head in range(score.shape[1]):
            ids = retrieved[row, head, :count].long()
            assert len(set(ids.tolist())) == count, f"{name}: {ids}"
            assert ((ids >= 0) & (ids < live)).all(), f"{name}: {ids}"
            own = score[row, head]
            slack = own.abs() * tolerance[row, head]
            ranked, spare = own[ids], slack[ids]
            assert (ranked[1:] - spare[1:] <= ranked[:-1] + spare[:-1]).all(), f"{name}: {ids}"
            others = torch.ones(live, dtype=torch.bool)
            others[ids] = False
            if count and others.any():
                missed = (own - slack)[:live][others].max()
                assert missed <= ranked[-1] + spare[-1], f"{name}: {ids} miss the best"


def assert_matches(arguments: Arguments, device: str) -> None:
    score = reference_scores(
        *(arguments[name] for name in INDEXED), arguments["estimator"], arguments["scale"]
    ).score
    _, exact, exact_lse = reference(**arguments)
    runs = [
        (estimate[..., back], lse)
        for run, back in in_orders_of_head_dim(arguments, WITH_HEAD_DIM)
        for _, estimate, lse in [reference(**run, dtype=torch.float32)]
    ]
    if device == "cuda":  # tensor cores multiply weights and mean values in query's dtype
        rounding = {"dtype": torch.float32, "weights_dtype": arguments["query"].dtype}
        runs.append((reference(**arguments, **rounding)[1], runs[0][1]))
    eager, eager_lse = (torch.stack(run) for run in zip(*runs, strict=True))
    given = on_device(poisoned(arguments), device)
    for kernels in every_kernel(device):
        retrieved, estimate, lse = wave_estimate(**given)
        assert_retrieves_the_best(retrieved.cpu(), arguments, score, kernels)
        assert estimate.dtype == lse.dtype == torch.float32
        assert_within_budget(estimate, exact, eager, f"{kernels}: estimate")
        assert_within_budget(lse, exact_lse, eager_lse, f"{kernels}: lse")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("live", "groups", "budgets"),
    [
        ([1, 0], 4, (0.2, 1, 0.4)),
        ([33, 17], 1, (0.2, 0, 0.4)),
        ([40, 25], 8, (0.0, 0, 1.0)),
        ([40, 25], 2, (1.0, 0, 1.0)),
        ([600, 1100], 2, (0.05, 64, 0.6)),
        ([5000, 8100], 4, (0.018, 4, 0.232)),
        ([9000, 700], 8, (0.018, 4, 0.232)),
        ([1900, 40], 4, (0.3, 1, 0.4)),
        ([40, 25], 12, (0.2, 1, 0.4)),
        ([40, 25], 20, (0.2, 1, 0.4)),
    ],
    ids=[
        "one cluster",
        "MHA",
        "all estimated",
        "all retrieved",
        "several tasks",
        "thousands",
        "ten thousand",
        "hundreds retrieved",
        "large groups",
        "MQA",
    ],
)
def test_matches_reference(
    device: str,
    dtype: torch.dtype,
    estimator: str,
    live: list[int],
    groups: int,
    budgets: tuple[float, int, float],
) -> None:
    retrieval, least, estimation = budgets
    arguments = make(
        Variant(dtype=dtype, groups=groups, seed=1),
        live,
        estimator=estimator,
        retrieval_budget=retrieval,
        min_retrieved_clusters=least,
        estimation_budget=estimation,
    )
    assert_matches(arguments, device)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("live", "budgets"),
    [
        ([33, 17], (0.0, 0, 0.0)),
        ([33, 17], (0.2, 1, 0.0)),
        ([10, 10], (0.3, 1, 0.6)),
        ([1300, 600], (0.02, 4, 0.1)),
    ],
    ids=["all of it", "none estimated", "one cluster", "long"],
)
def test_tail(
    device: str, dtype: torch.dtype, live: list[int], budgets: tuple[float, int, float]
) -> None:
    """All clusters count: lse is that of all masses but the retrieved ones."""
    retrieval, least, estimation = budgets
    arguments = make(
        Variant(dtype=dtype, groups=3, seed=1),
        live,
        retrieval_budget=retrieval,
        min_retrieved_clusters=least,
        estimation_budget=estimation,
        empty=0.0,
    )
    assert_matches(arguments, device)
    log_mass = reference_scores(
        *(arguments[name] for name in INDEXED), arguments["estimator"], arguments["scale"]
    ).log_mass
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        retrieved, _, lse = (result.cpu() for result in wave_estimate(**given))
        for row in range(2):
            ids = retrieved[row, :, None, : counts(arguments, row)[0]].long().expand(-1, 3, -1)
            left = log_mass[row].scatter(2, ids, -torch.inf).logsumexp(dim=2).flatten()
            assert (lse[row] - left).abs().max() < 1e-4, kernels


@pytest.mark.parametrize("estimation_budget", [0.0, 0.25, 1.0])
def test_equal_values_are_the_estimate(device: str, estimation_budget: float) -> None:
    """Whatever the masses are, and whatever stands for them."""
    arguments = make(Variant(groups=3), [90, 40], estimation_budget=estimation_budget, empty=0.0)
    value = torch.arange(1.0, 65.0)
    arguments["centroids"][1] = value
    tokens = arguments["counters"][:, Counter.INDEXED_TOKENS].view(2, 1, 1)
    arguments["totals"][1] = value * tokens
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        _, estimate, _ = wave_estimate(**given)
        error = (estimate.cpu() - value).abs() / value
        assert error.max() < 2.0**-20, kernels


def test_tail_has_the_mean_of_all_values(device: str) -> None:
    """Whatever its own mean values are."""
    arguments = make(Variant(rows=1), [10], retrieval_budget=0.3, estimation_budget=0.6, empty=0.0)
    score = reference_scores(
        *(arguments[name] for name in INDEXED), arguments["estimator"], arguments["scale"]
    ).score
    worst = score[0, :, :10].argmin(dim=1)
    unread, doubled = on_device(arguments, "cpu"), on_device(arguments, "cpu")
    unread["centroids"][1, 0, torch.arange(2), worst] = torch.nan
    doubled["totals"][1] *= 2
    arguments, unread, doubled = (
        on_device(given, device) for given in (arguments, unread, doubled)
    )
    for kernels in every_kernel(device):
        expected = wave_estimate(**arguments)
        for actual, result in zip(wave_estimate(**unread), expected, strict=True):
            assert_same(actual, result, kernels)
        assert bool((wave_estimate(**doubled)[1] != expected[1]).any(dim=-1).all()), kernels


@pytest.mark.parametrize(
    ("estimator", "retrieval_budget", "estimation_budget"),
    [("mean", 0.0, 0.0), ("mean", 0.2, 0.3), ("variance", 1.0, 0.3), ("variance", 0.2, 1.0)],
)
def test_without_a_tail_the_mean_of_all_values_is_not_used(
    device: str, estimator: str, retrieval_budget: float, estimation_budget: float
) -> None:
    arguments = make(
        Variant(),
        [40, 25],
        estimator=estimator,
        retrieval_budget=retrieval_budget,
        estimation_budget=estimation_budget,
    )
    others = on_device(arguments, "cpu")
    others["totals"][1] = torch.nan
    arguments, others = on_device(arguments, device), on_device(others, device)
    for kernels in every_kernel(device):
        expected = wave_estimate(**arguments)
        for actual, result in zip(wave_estimate(**others), expected, strict=True):
            assert_same(actual, result, kernels)
        if retrieval_budget == 1.0 or estimation_budget == 0.0:
            assert bool((expected[1] == 0.0).all()), kernels
            assert bool((expected[2] == -torch.inf).all()), kernels


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), [9, 7]), device)


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
            {"centroids": torch.zeros(2, 2, 0, 11, 64)},
            "query heads must be a multiple of KV heads, got 4 and 0",
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
    assert_refused(wave_estimate, arguments, f"wave_estimate: {message}")


@pytest.mark.parametrize("clusters", [12, -1])
def test_rejects_values(clusters: int) -> None:
    counters = Variant().counters(clusters=[0, clusters])
    message = f"counters say that row 1 has {clusters} clusters, the index holds 11"
    arguments = {**refusable("cpu"), "counters": counters}
    assert_refused(wave_estimate, arguments, f"wave_estimate: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(device: str, dtype: torch.dtype, layout: str, estimator: str) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = on_device(make(variant, [9, 3], estimator=estimator), device)
    torch.library.opcheck(torch.ops.retro.wave_estimate.default, tuple(arguments.values()))


def test_opcheck_with_gradients(device: str) -> None:
    arguments = on_device(make(Variant(), [9, 3]), device)
    arguments["query"].requires_grad_()
    torch.library.opcheck(
        torch.ops.retro.wave_estimate.default,
        tuple(arguments.values()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [9, 7])
    second = make(Variant(rows=3, heads=5, groups=4, head_dim=80), [20, 0, 17])
    second["max_retrieved"] = first["max_retrieved"] = 9
    second["scale"] = first["scale"]
    first, second = on_device(first, device), on_device(second, device)
    assert_compiles(wave_estimate, first, backend=backend)
    assert_compiles(wave_estimate, first, second, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_captures(dtype: torch.dtype, estimator: str) -> None:
    first = make(Variant(dtype=dtype), [90, 7], estimator=estimator)
    second = make(Variant(dtype=dtype, seed=1), [70, 90], estimator=estimator)
    assert_captures(wave_estimate, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=300)
@given(
    variant=variants(),
    live=st.lists(st.sampled_from((0, 1, 2, 15, 16, 17, 70)), min_size=3, max_size=3),
    estimator=st.sampled_from(ESTIMATORS),
    retrieval_budget=st.sampled_from((0.0, 0.018, 0.25, 0.5, 1.0)),
    min_retrieved_clusters=st.sampled_from((0, 1, 4, 2**62)),
    estimation_budget=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    empty=st.sampled_from((0.0, 0.3, 1.0)),
    strength=st.sampled_from((0.1, 1.0, 6.0, -1.0, 0.0)),
    room=st.sampled_from((0, 2)),
)
def test_estimates_any_index(
    device: str, variant: Variant, live: list[int], strength: float, **numbers: object
) -> None:
    arguments = make(variant, live[: variant.rows], strength=strength, **numbers)
    score = reference_scores(
        *(arguments[name] for name in INDEXED), arguments["estimator"], arguments["scale"]
    ).score
    assume(is_clear_cut(arguments, score))
    assert_matches(arguments, device)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("clusters", "budget"),
    [
        *[(60, 0.2), (2000, 0.2), (3000, 0.2), (9000, 0.1), (9000, 0.2), (20_000, 0.05)],
        *[(40_000, 0.05), (50_000, 0.02), (80_000, 0.01)],
    ],
)
def test_ties_go_to_the_lower_cluster(
    device: str, estimator: str, clusters: int, budget: float
) -> None:
    """Equal clusters at the border of what is retrieved, and of what is estimated."""
    arguments = make(
        Variant(rows=1, heads=1),
        [clusters],
        estimator=estimator,
        retrieval_budget=budget,
        empty=0.0,
        room=0,
        strength=0.5,
    )
    arguments["centroids"][:] = arguments["centroids"][:, :, :, :1].clone()
    # Small whole numbers, their mean too: sums are exact in any order, and tell neighbours apart.
    arguments["centroids"][1, 0, 0] = (torch.arange(float(clusters)) % 50)[:, None]
    arguments["counters"][:, Counter.INDEXED_TOKENS] = 1 << 17
    arguments["totals"][1, 0, 0] = 11 << 17
    arguments["variances"][:] = 0.5
    arguments["offsets"][:] = torch.arange(clusters + 1) * 7
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        retrieved, _, _ = wave_estimate(**given)
        assert retrieved.flatten().tolist() == list(range(round(budget * clusters))), kernels
    assert_matches(arguments, device)


@pytest.mark.parametrize("groups", [3, 4, 8, 20])
@pytest.mark.parametrize("live", [[20_000, 300], [70_000, 0]], ids=str)
def test_many_clusters(device: str, live: list[int], groups: int) -> None:
    """Several processors of a GPU choose together, and others than where more may be retrieved."""
    arguments = make(
        Variant(groups=groups, head_dim=16, dtype=torch.bfloat16, seed=2),
        live,
        retrieval_budget=0.018,
        min_retrieved_clusters=4,
        estimation_budget=0.232,
    )
    assert_matches(arguments, device)
    given = on_device(poisoned(arguments), device)
    for kernels in every_kernel(device):
        assert_repeats(wave_estimate, given)
        retrieved, *estimate = wave_estimate(**given)
        for most in (2560, 2561):
            more, *others = wave_estimate(**{**given, "max_retrieved": most})
            assert_same(more[:, :, : retrieved.shape[2]], retrieved, f"{kernels}: {most}")
            assert (more[:, :, retrieved.shape[2] :] == -1).all(), f"{kernels}: {most}"
            for own, other in zip(estimate, others, strict=True):
                assert_same(other, own, f"{kernels}: {most}")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_empty_cluster_does_not_count(device: str, estimator: str) -> None:
    """Its centroid is 0, which outdoes all others where every logit is far below 0."""
    arguments = make(Variant(rows=1, seed=3), [20], estimator=estimator, empty=0.0, room=0)
    arguments["scale"] = 1.0
    arguments["query"][:] = 1.0
    arguments["centroids"][0] = -3.0 + arguments["centroids"][0] / 16
    arguments["centroids"][:, :, :, 5] = 0.0
    sizes = torch.full((1, 2, 20), 4, dtype=torch.int32)
    sizes[:, :, 5] = 0
    arguments["offsets"] = torch.nn.functional.pad(sizes.cumsum(dim=2), (1, 0)).int()
    _, _, lse = reference(**arguments)
    assert lse.max() < -100
    assert_matches(arguments, device)


def test_mass_far_below_the_largest_counts_as_none_or_as_it_is(device: str) -> None:
    """CUDA kernels sum relative to the largest mass that they estimate, so they lose none."""
    arguments = make(Variant(rows=1, heads=1), [8], empty=0.0, room=0, retrieval_budget=0.125)
    arguments["scale"] = 1.0
    arguments["query"][:] = 1.0
    arguments["centroids"][0] = 0.0
    arguments["centroids"][0, 0, 0, 3] = 2.0  # 128 above all others
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        retrieved, estimate, lse = wave_estimate(**given)
        assert retrieved.tolist() == [[[3]]], kernels
        if device == "cpu":
            assert (estimate == 0).all(), kernels
            assert (lse == -torch.inf).all(), kernels
    if device != "cpu":
        assert_matches(arguments, device)


def test_backward_says_that_there_is_none(device: str) -> None:
    message = (
        "^wave_estimate: retro_ops is for inference, there is no backward pass; run the model "
        r"under torch.no_grad\(\), or train with attn_implementation='sdpa'$"
    )
    for op in (wave_estimate, torch.compile(wave_estimate, fullgraph=True, backend="aot_eager")):
        for name in ("query", "centroids", "variances", "totals"):
            torch._dynamo.reset()
            arguments = refusable(device)
            arguments[name].requires_grad_()
            _, estimate, lse = op(**arguments)
            for result in (estimate, lse):
                with pytest.raises(RuntimeError, match=message):
                    result.sum().backward(retain_graph=True)


@settings(max_examples=10)
@given(variant=variants(), estimator=st.sampled_from(ESTIMATORS))
def test_repeats(device: str, variant: Variant, estimator: str) -> None:
    live = [600, 17, 1][: variant.rows]
    arguments = on_device(make(variant, live, estimator=estimator), device)
    for _ in every_kernel(device):
        assert_repeats(wave_estimate, arguments)


def test_layout_does_not_matter(device: str) -> None:
    plain = on_device(make(Variant(), [40, 25]), device)
    for kernels in every_kernel(device):
        expected = wave_estimate(**plain)
        for layout in ("permuted", "padded", "transposed"):
            given = on_device(make(Variant(layout=layout), [40, 25]), device)
            for actual, result in zip(wave_estimate(**given), expected, strict=True):
                assert_same(actual, result, f"{kernels}: {layout}")
