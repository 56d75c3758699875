"""offloaded_attention: four ops in one, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import test_decode_attention
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_page_gather import live, make_cache
from test_update_pages import settle
from torch import Tensor

from retro_ops import (
    decode_attention,
    merged_attention,
    offloaded_attention,
    page_gather,
    update_pages,
    wave_estimate,
)
from retro_ops.ops._contract import ELEMENT_DTYPES, ESTIMATORS, POLICIES, Counter
from retro_ops.testing import (
    Arguments,
    Variant,
    assert_compiles,
    assert_refused,
    assert_same,
    host_copy,
    in_layout,
    on_device,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = ("centroids", "offsets", "variances", "totals")
CACHE = ("pages", "page_table", "free_pages", "requests", "cached", "history", "decisions")
# What threads of the host read or write.
ON_HOST = ("requests", "cached", "history", "decisions")
NUMBERS = test_decode_attention.NUMBERS


def make(
    variant: Variant,
    held: list[int],
    live: list[int],
    *,
    pages: int = 30,
    page_size: int = 4,
    policy: str = "lfu",
    **numbers: Any,
) -> Arguments:
    """An index as in test_decode_attention, and a page cache in the midst of its work."""
    plain = test_decode_attention.make(variant, held, live, **numbers)
    store, offsets, ranks = plain["store"], plain["offsets"], plain["max_retrieved"]
    cache = make_cache(variant, offsets, store, ranks, pages, page_size)
    cache["pages"] = in_layout(cache["pages"], variant.writable_layout)
    clusters = offsets.shape[2] - 1
    shape = (variant.rows, variant.heads, clusters + 1, 2)
    cache["history"] = torch.zeros(shape, dtype=torch.int64)
    counters, scale = plain.pop("counters"), plain.pop("scale")
    inputs = ("query", "steady", "store", *INDEX)
    return {
        **{name: plain[name] for name in inputs},
        **{name: cache[name] for name in CACHE},
        "counters": counters,
        **{name: plain[name] for name in NUMBERS},
        "scale": scale,
        "page_size": page_size,
        "policy": policy,
        "join": True,
    }


def on(arguments: Arguments, device: str) -> Arguments:
    copies = on_device(arguments, device)
    for name in ON_HOST:
        copies[name] = host_copy(arguments[name], device)
    return copies


def composed(arguments: Arguments, device: str) -> Tensor:
    """offloaded_attention in terms of the four ops; the last one has ended."""
    query, counters, scale, size = (
        arguments[name] for name in ("query", "counters", "scale", "page_size")
    )
    index, numbers = ([arguments[name] for name in names] for names in (INDEX, NUMBERS))
    retrieved, estimate, lse = wave_estimate(query, *index, counters, *numbers, scale)
    gathered = ("store", "pages", "page_table", "free_pages", "decisions", "requests", "cached")
    tensors = [arguments[name] for name in gathered]
    addresses = page_gather(retrieved, arguments["offsets"], *tensors, counters, size)
    kept = (arguments["steady"], arguments["store"])
    pages = (arguments["pages"], arguments["page_table"], size)
    out, _ = merged_attention(query, *kept, addresses, counters, estimate, lse, scale, *pages)
    updated = [arguments[name] for name in ("requests", "cached", "history", "decisions")]
    update_pages(*updated, arguments["policy"])
    settle(device)
    return out


def fused(arguments: Arguments, device: str) -> Tensor:
    out = offloaded_attention(**arguments)
    settle(device)
    return out


def plain(arguments: Arguments) -> Tensor:
    """Without a page cache."""
    inputs = [arguments[name] for name in ("query", "steady", "store", *INDEX)]
    numbers = [arguments[name] for name in NUMBERS]
    counters = arguments["counters"].clone()
    return decode_attention(*inputs, counters, *numbers, arguments["scale"])


def assert_same_state(actual: Arguments, expected: Arguments, name: str) -> None:
    """First what was decided, then what follows from it."""
    for key in ("counters", *CACHE[1:], "pages"):
        pair = [arguments[key].cpu() for arguments in (actual, expected)]
        if key == "free_pages":
            pair = [live(free) for free in pair]
        assert_same(*pair, f"{name}: {key}")


def assert_is_composed(arguments: Arguments, device: str, steps: int = 6) -> None:
    """Over steps of changing queries, so that misses come in and others go."""
    actual, expected = on(arguments, device), on(arguments, device)
    generator = torch.Generator().manual_seed(1)
    largest = arguments["query"].float().abs().amax() / 3 if arguments["query"].numel() else 0.0
    for step in range(steps):
        outs = fused(actual, device), composed(expected, device)
        assert_same(outs[0], plain(actual), f"step {step}: as without a page cache")
        assert_same(*outs, f"step {step}")
        assert_same_state(actual, expected, f"step {step}")
        noise = torch.randn(actual["query"].shape, generator=generator)
        for each in (actual, expected):
            each["query"].copy_(noise * largest)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("held", "live", "groups", "budgets", "pages"),
    [
        ([1, 0], [0, 1], 4, (0.2, 1, 0.4), 3),
        ([9, 70], [33, 17], 1, (0.2, 0, 0.4), 9),
        ([9, 0], [40, 25], 8, (0.0, 0, 1.0), 9),
        ([3, 65], [40, 25], 2, (1.0, 0, 1.0), 20),
        ([600, 255], [600, 1100], 4, (0.05, 64, 0.6), 150),
        ([9, 70], [33, 17], 12, (0.2, 1, 0.4), 12),
        ([9, 70], [33, 17], 20, (0.2, 1, 0.4), 12),
        ([9, 70], [33, 17], 4, (0.2, 1, 0.4), 0),
    ],
    ids=[
        "one token, one cluster",
        "MHA",
        "none retrieved",
        "all retrieved",
        "several tasks",
        "large groups",
        "MQA",
        "no pages",
    ],
)
def test_is_the_four_ops(
    device: str,
    dtype: torch.dtype,
    estimator: str,
    held: list[int],
    live: list[int],
    groups: int,
    budgets: tuple[float, int, float],
    pages: int,
) -> None:
    retrieval, least, estimation = budgets
    arguments = make(
        Variant(dtype=dtype, groups=groups, seed=1, device=device),
        held,
        live,
        pages=pages,
        estimator=estimator,
        retrieval_budget=retrieval,
        min_retrieved_clusters=least,
        estimation_budget=estimation,
    )
    assert_is_composed(arguments, device)
    counters = arguments["counters"]
    assert (counters[:, Counter.CLUSTERS] == torch.tensor(live)).all()


@settings(max_examples=100)
@given(
    variant=variants(),
    held=st.lists(st.sampled_from((0, 1, 15, 65)), min_size=3, max_size=3),
    live=st.lists(st.sampled_from((0, 1, 17, 70)), min_size=3, max_size=3),
    pages=st.sampled_from((0, 1, 9, 40)),
    page_size=st.sampled_from((1, 3, 8, 64)),
    policy=st.sampled_from(POLICIES),
    estimator=st.sampled_from(ESTIMATORS),
    retrieval_budget=st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    estimation_budget=st.sampled_from((0.0, 0.5)),
    cluster_tokens=st.sampled_from((0, 1, 9, 40)),
)
def test_is_the_four_ops_for_any_index(
    device: str, variant: Variant, held: list[int], live: list[int], **numbers: Any
) -> None:
    variant = replace(variant, device=device)
    arguments = make(variant, held[: variant.rows], live[: variant.rows], **numbers)
    assert_is_composed(arguments, device, steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 4, 20)},
            "head_dim must be a multiple of 16 from 16 to 256, got 20",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 134, 80)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, 64], got [2, 2, 2, 134, 80]",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 119, 64)},
            "pages must hold a multiple of page_size (4) tokens, got 119",
        ),
        (
            {"page_table": torch.zeros(2, 2, 5, dtype=torch.int32)},
            "page_table must be [B, Hkv, N / page_size + C] = [2, 2, 44], got [2, 2, 5]",
        ),
        (
            {"requests": torch.zeros(2, 2, 4, dtype=torch.int32)},
            "requests must be [B, Hkv, 3 + R] = [2, 2, 7], got [2, 2, 4]",
        ),
        (
            {"history": torch.zeros(2, 2, 11, 2, dtype=torch.int64)},
            "history must be [B, Hkv, C + 1, 2] = [2, 2, 12, 2], got [2, 2, 11, 2]",
        ),
        ({"max_retrieved": 1}, "max_retrieved must be at least 2 for 11 clusters at these "
         "budgets, got 1"),
        ({"policy": "random"}, "policy must be one of 'lru', 'lru2', 'lfu', got 'random'"),
    ],
)  # fmt: skip
def test_rejects(change: Arguments, message: str) -> None:
    arguments = {**make(Variant(), [9, 3], [9, 7]), **change}
    assert_refused(offloaded_attention, arguments, f"offloaded_attention: {message}")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    arguments = make(Variant(dtype=dtype), [9, 3], [9, 3])
    arguments["pages"].nan_to_num_()
    torch.library.opcheck(torch.ops.retro.offloaded_attention.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [9, 7], [9, 7])
    assert_compiles(offloaded_attention, first, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_captures(dtype: torch.dtype) -> None:
    """A graph, replayed with changing queries, is the op; its state goes on with each replay."""
    arguments = make(Variant(dtype=dtype, groups=4), [90, 7], [90, 70], pages=25)
    static, expected = on(arguments, "cuda"), on(arguments, "cuda")
    for each in (static, expected):
        fused(each, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = offloaded_attention(**static)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        query = torch.randn(static["query"].shape, generator=generator)
        for each in (static, expected):
            each["query"].copy_(query)
        graph.replay()
        settle("cuda")
        assert_same(captured, fused(expected, "cuda"), f"step {step}")
        assert_same_state(static, expected, f"step {step}")
    posts, updates, _ = torch.ops.retro.update_counts(static["history"])
    assert (posts, updates) == (21, 21)
    counters = static["counters"].cpu() - arguments["counters"]
    assert (counters[:, Counter.EVICTIONS] > 0).all()
    assert (counters[:, Counter.LATE_DECISIONS] <= 2).all()  # of a head, the first step


def test_backward_says_that_there_is_none(device: str) -> None:
    arguments = on(make(Variant(), [9, 3], [9, 7]), device)
    arguments["query"].requires_grad_()
    out = offloaded_attention(**arguments)
    with pytest.raises(RuntimeError, match="offloaded_attention: retro_ops is for inference"):
        out.sum().backward()
