"""page_gather: what is looked up, admitted and evicted, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_update_pages import zeros
from torch import Tensor

from retro_ops import page_gather
from retro_ops.ops._contract import Counter, FreeHeader
from retro_ops.ops.page_gather import reference
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


def make(
    variant: Variant,
    ranks: int,
    clusters: int,
    pages: int,
    *,
    page_size: int = 4,
    spare_tokens: int = 3,
    largest: int = 14,
) -> Arguments:
    """A cache in the midst of its work: clusters that are in, partly in and not; a free list.

    Args:
        ranks, clusters, pages: R, C, P; some ranks name no cluster.
        largest: tokens of a cluster at most; some are empty, many end within a page.
        spare_tokens: of the store behind the last cluster.

    Decisions name clusters that are in, that are not, some twice, and numbers that are none.
    """
    generator = variant.generator
    groups = (variant.rows, variant.heads)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (*groups, *shape), generator=generator)

    sizes = draw(largest + 1, clusters)
    sizes[torch.rand(sizes.shape, generator=generator) < 0.2] = 0
    offsets = torch.zeros(*groups, clusters + 1, dtype=torch.int32)
    offsets[..., 1:] = sizes.cumsum(dim=2)
    tokens = int(offsets.max()) if offsets.numel() else 0
    store = variant.normal(generator, 2, *groups, tokens + spare_tokens, variant.head_dim)
    retrieved = torch.full((*groups, ranks), -1, dtype=torch.int32)
    for row in range(variant.rows):
        for head in range(variant.heads):
            named = torch.randperm(clusters, generator=generator)[:ranks]
            named[torch.rand(named.shape, generator=generator) < 0.2] = -1
            retrieved[row, head, : len(named)] = named
    cache = make_cache(variant, offsets, store, ranks, pages, page_size)
    cache["pages"] = in_layout(cache["pages"], variant.writable_layout)
    return {
        "retrieved": in_layout(retrieved, variant.layout),
        "offsets": in_layout(offsets, variant.layout),
        "store": in_layout(store, variant.layout),
        **cache,
        "counters": variant.counters(
            # Any boundary of what is open, or none.
            indexed_tokens=[tokens] * variant.rows,
            open_tokens=[0, tokens // 3, tokens][: variant.rows],
        ),
        "page_size": page_size,
    }


def make_cache(
    variant: Variant, offsets: Tensor, store: Tensor, ranks: int, pages: int, page_size: int
) -> Arguments:
    """The page cache of an index: what is in holds the tokens of the store, other pages NaN."""
    generator = variant.generator
    groups, clusters = (variant.rows, variant.heads), offsets.shape[2] - 1

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (*groups, *shape), generator=generator)

    cache = torch.full((2, *groups, pages * page_size, store.shape[4]), torch.nan).to(store)
    table = torch.full((*groups, store.shape[3] // page_size + clusters), -1, dtype=torch.int32)
    free = torch.zeros(*groups, len(FreeHeader) + pages, dtype=torch.int32)
    cached = torch.zeros(*groups, clusters, dtype=torch.uint8)
    for row in range(variant.rows):
        for head in range(variant.heads):
            unused = torch.randperm(pages, generator=generator).tolist()
            begin = offsets[row, head].tolist()
            for cluster in torch.randperm(clusters, generator=generator).tolist():
                tokens = begin[cluster + 1] - begin[cluster]
                entry = begin[cluster] // page_size + cluster
                in_all, in_part = (torch.rand(2, generator=generator) < 0.5).tolist()
                for place in range(-(-tokens // page_size)):
                    if len(unused) <= pages // 4 or not (in_all or (in_part and place % 2)):
                        continue
                    page = table[row, head, entry + place] = unused.pop()
                    cached[row, head, cluster] += 1
                    slot, count = place * page_size, min(page_size, tokens - place * page_size)
                    held = store[:, row, head, begin[cluster] + slot :][:, :count]
                    cache[:, row, head, page * page_size :][:, :count] = held
            free[row, head, FreeHeader.STEP] = 7
            free[row, head, FreeHeader.COUNT] = len(unused)
            free[row, head, 2 : 2 + len(unused)] = torch.tensor(unused, dtype=torch.int32)
    decisions = draw(clusters + 6, 2 + pages).int() - 3
    decisions[..., 0] = draw(2).int() + 6
    decisions[..., 1] = draw(pages + 4).int() - 1
    return {
        "pages": cache,
        "page_table": table,
        "free_pages": free,
        "decisions": decisions,
        "requests": draw(1000, 3 + ranks).int(),
        "cached": cached,
    }


def live(free_pages: Tensor) -> Tensor:
    """The free list without what is left over behind its end."""
    place = torch.arange(free_pages.shape[2]) - len(FreeHeader)
    return free_pages.masked_fill(place >= free_pages[..., FreeHeader.COUNT, None], -1)


def assert_matches(arguments: Arguments, device: str) -> None:
    actual, expected = on_device(arguments, device), on_device(arguments, "cpu")
    addresses, expected_addresses = page_gather(**actual), reference(**expected)
    for each in (actual, expected):
        each["free_pages"] = live(each["free_pages"].cpu())
    # First what was decided, then what follows from it.
    for name in ("counters", "free_pages", "requests", "cached", "page_table"):
        assert_same(actual[name], expected[name], name)
    assert_same(addresses, expected_addresses, "addresses")
    for name, value in actual.items():
        if isinstance(value, Tensor):
            assert_same(value, expected[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize(
    ("ranks", "clusters", "pages", "page_size"),
    [(0, 7, 5, 4), (1, 1, 1, 1), (5, 0, 3, 4), (6, 40, 0, 4), (20, 50, 30, 8), (40, 90, 70, 3)],
    ids=["none asked", "one", "no clusters", "no pages", "many", "pages of 3"],
)
def test_matches_reference(
    device: str,
    layout: str,
    dtype: torch.dtype,
    ranks: int,
    clusters: int,
    pages: int,
    page_size: int,
) -> None:
    variant = Variant(layout=layout, dtype=dtype, head_dim=16, device=device)
    assert_matches(make(variant, ranks, clusters, pages, page_size=page_size), device)


@pytest.mark.parametrize("ranks", [513, 1300])
def test_more_than_the_threads_of_a_block(device: str, ranks: int) -> None:
    """Retrieved, and listed as those that may go, some of them twice."""
    variant = Variant(rows=1, heads=1, head_dim=16, device=device)
    arguments = make(variant, ranks, 1500, 1300, page_size=8)
    listed = arguments["decisions"][0, 0, 2:]
    listed.copy_(torch.randperm(1300, generator=variant.generator))
    listed[40:700] = listed[:660].clone()
    arguments["decisions"][..., 1] = 1290
    assert_matches(arguments, device)


def refusable() -> Arguments:
    return make(Variant(head_dim=16), 5, 9, 6)  # pages of 4, 24 tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"retrieved": zeros(2, 5)},
            "retrieved must be [B, Hkv, R] = [any, any, any], got [2, 5]",
        ),
        (
            {"retrieved": zeros(2, 2, 5, dtype=torch.int64)},
            "retrieved must be torch.int32, got torch.int64",
        ),
        (
            {"offsets": zeros(2, 3, 10)},
            "offsets must be [B, Hkv, C + 1] = [2, 2, any], got [2, 3, 10]",
        ),
        (
            {"offsets": zeros(2, 2, 10, dtype=torch.int16)},
            "offsets must be torch.int32, got torch.int16",
        ),
        ({"offsets": zeros(2, 2, 0)}, "offsets must hold C + 1 >= 1 entries, got 0"),
        (
            {"store": torch.zeros(2, 2, 3, 9, 16)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, any], got [2, 2, 3, 9, 16]",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 9, 16).double()},
            "store must be torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 9, 24)},
            "head_dim must be a multiple of 16 from 16 to 256, got 24",
        ),
        ({"page_size": 0}, "page_size must be at least 1 token, got 0"),
        (
            {"pages": torch.zeros(2, 2, 2, 24, 32)},
            "pages must be [2, B, Hkv, P * page_size, D] = [2, 2, 2, any, 16], "
            "got [2, 2, 2, 24, 32]",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 24, 16).half()},
            "pages must be torch.float32, got torch.float16",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 23, 16)},
            "pages must hold a multiple of page_size (4) tokens, got 23",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 16, 24).transpose(3, 4)},
            "pages must have stride 1 on its last axis, since it is changed in place, got 24",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 40, 16), "page_table": zeros(2, 2, 18)},
            "page_table must be [B, Hkv, N / page_size + C] = [2, 2, 19], got [2, 2, 18]",
        ),
        (
            {"free_pages": zeros(2, 2, 7)},
            "free_pages must be [B, Hkv, 2 + P] = [2, 2, 8], got [2, 2, 7]",
        ),
        (
            {"free_pages": zeros(2, 2, 8, dtype=torch.int64)},
            "free_pages must be torch.int32, got torch.int64",
        ),
        (
            {"decisions": zeros(2, 2, 9)},
            "decisions must be [B, Hkv, 2 + P] = [2, 2, 8], got [2, 2, 9]",
        ),
        (
            {"decisions": zeros(2, 8, 2).transpose(1, 2)},
            "decisions must be contiguous, got strides [16, 1, 2]",
        ),
        (
            {"requests": zeros(2, 2, 7)},
            "requests must be [B, Hkv, 3 + R] = [2, 2, 8], got [2, 2, 7]",
        ),
        (
            {"requests": zeros(2, 2, 8, dtype=torch.int16)},
            "requests must be torch.int32, got torch.int16",
        ),
        ({"cached": zeros(2, 2, 9)}, "cached must be torch.uint8, got torch.int32"),
        (
            {"cached": zeros(2, 2, 8, dtype=torch.uint8)},
            "cached must be [B, Hkv, C] = [2, 2, 9], got [2, 2, 8]",
        ),
        (
            {"counters": torch.zeros(2, 7, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [2, 7]",
        ),
    ],
)
def test_rejects(change: Arguments, message: str) -> None:
    assert_refused(page_gather, {**refusable(), **change}, f"page_gather: {message}")


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("retrieved", (1, 1, 4), 9, "retrieved must lie in -1 .. 8, got 9"),
        ("retrieved", (1, 1, 4), -2, "retrieved must lie in -1 .. 8, got -2"),
        ("free_pages", (0, 1, 1), 7, "free_pages counts 7 free pages of 6"),
        ("free_pages", (0, 1, 1), -1, "free_pages counts -1 free pages of 6"),
    ],
)
def test_rejects_values(name: str, place: tuple[int, ...], value: int, message: str) -> None:
    arguments = refusable()
    arguments[name][place] = value
    assert_refused(page_gather, arguments, f"page_gather: {message}", by_fake=False)


def test_rejects_values_that_lead_outside() -> None:
    arguments = refusable()
    arguments["retrieved"][1, 1] = torch.tensor([-1, 3, -1, 5, 3])
    message = "page_gather: retrieved must name a cluster once for each head, got 3 twice"
    assert_refused(page_gather, arguments, message, by_fake=False)
    arguments["retrieved"][1, 1, 4] = -1
    tokens = arguments["store"].shape[3]
    arguments["offsets"][1, 1, 3:] = 0
    arguments["offsets"][1, 1, 4:] = 5
    arguments["page_table"][1, 1, 3] = 6
    message = "page_gather: page_table must lie in -1 .. 5, got 6"
    assert_refused(page_gather, arguments, message, by_fake=False)
    arguments["offsets"][1, 1, 4] = tokens + 1
    message = (
        f"page_gather: offsets must rise within a store of {tokens} tokens, got 0 and {tokens + 1}"
    )
    assert_refused(page_gather, arguments, message, by_fake=False)
    arguments = refusable()
    arguments["free_pages"][0, 0, 1:] = torch.tensor([2, 3, 6, 0, 0, 0, 0])
    message = "page_gather: free_pages must lie in 0 .. 5, got 6"
    assert_refused(page_gather, arguments, message, by_fake=False)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [5, 0])
def test_opcheck(device: str, layout: str, dtype: torch.dtype, ranks: int) -> None:
    arguments = make(Variant(layout=layout, dtype=dtype, head_dim=16, device=device), ranks, 9, 6)
    # NaN is no difference of results.
    arguments["pages"].nan_to_num_()
    if layout == "padded":
        arguments["store"] = arguments["store"].nan_to_num()
        arguments["pages"] = arguments["pages"].clone()
    arguments = on_device(arguments, device)
    torch.library.opcheck(torch.ops.retro.page_gather.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = on_device(make(Variant(rows=2, heads=3, head_dim=16), 5, 9, 6), device)
    second = make(Variant(rows=3, heads=4, head_dim=32), 8, 21, 12, spare_tokens=7)
    second = on_device(second, device)
    assert_compiles(page_gather, first, backend=backend)
    assert_compiles(page_gather, first, second, backend=backend)


@pytest.mark.gpu
def test_captures() -> None:
    first = make(Variant(device="cuda"), 40, 90, 70)
    second = {**first, "retrieved": first["retrieved"].flip(2)}
    assert_captures(page_gather, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=200)
@given(
    variant=variants(),
    ranks=st.sampled_from((0, 1, 2, 17)),
    clusters=st.sampled_from((0, 1, 2, 33)),
    pages=st.sampled_from((0, 1, 2, 9, 40)),
    page_size=st.sampled_from((1, 2, 3, 8)),
    largest=st.sampled_from((1, 14, 40)),
)
def test_gathers_any_clusters(
    device: str,
    variant: Variant,
    ranks: int,
    clusters: int,
    pages: int,
    page_size: int,
    largest: int,
) -> None:
    variant = replace(variant, device=device)
    arguments = make(variant, ranks, clusters, pages, page_size=page_size, largest=largest)
    assert_matches(arguments, device)


def test_repeats(device: str) -> None:
    arguments = make(Variant(heads=3, head_dim=16), 40, 90, 70)
    assert_repeats(page_gather, on_device(arguments, device))


# What it decides, by hand


def by_hand(sizes: list[int], retrieved: list[int], pages: int, listed: list[int]) -> Arguments:
    """One row and head, pages of 4 tokens, an empty cache; token t of the store is full of t."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()[None, None]
    tokens = sum(sizes)
    store = torch.arange(2 * tokens).view(2, 1, 1, tokens, 1).expand(2, 1, 1, tokens, 16).float()
    decisions = torch.zeros(1, 1, 2 + pages, dtype=torch.int32)
    decisions[..., 1] = len(listed)
    decisions[..., 2 : 2 + len(listed)] = torch.tensor(listed, dtype=torch.int32)
    return {
        "retrieved": torch.tensor(retrieved, dtype=torch.int32)[None, None],
        "offsets": offsets,
        "store": store.contiguous(),
        "pages": torch.full((2, 1, 1, 4 * pages, 16), torch.nan),
        "page_table": torch.full((1, 1, tokens // 4 + len(sizes)), -1, dtype=torch.int32),
        "free_pages": torch.tensor([0, pages, *range(pages)], dtype=torch.int32)[None, None],
        "decisions": decisions,
        "requests": torch.zeros(1, 1, 3 + len(retrieved), dtype=torch.int32),
        "cached": torch.zeros(1, 1, len(sizes), dtype=torch.uint8),
        "counters": torch.zeros(1, len(Counter), dtype=torch.int64),
        "page_size": 4,
    }


def counted(arguments: Arguments) -> dict[str, int]:
    names = ("PAGE_HITS", "PAGE_MISSES", "MISSED_TOKENS", "ADMISSIONS", "EVICTIONS")
    return {name: int(arguments["counters"][0, Counter[name]]) for name in names}


def test_misses_come_in_by_rank_while_there_is_room(device: str) -> None:
    """Sizes in pages 2, 1, 3, 1: the third finds no room, nor does what ranks behind it."""
    arguments = on_device(by_hand([5, 4, 9, 1], [1, 0, 2, 3], 4, []), device)
    addresses = page_gather(**arguments)
    assert addresses.tolist() == [[[[5, 4, 2], [0, 5, 0], [9, 9, 4], [18, 1, 7]]]]
    assert arguments["cached"].tolist() == [[[2, 1, 0, 0]]]
    assert arguments["page_table"].tolist() == [[[2, 1, 3, -1, -1, -1, -1, -1]]]
    assert arguments["free_pages"].tolist() == [[[1, 1, 0, 1, 2, 3]]]
    assert arguments["requests"].tolist() == [[[1, 1, 7, 1, 0, 2, 3]]]
    assert counted(arguments) == {
        "PAGE_HITS": 0,
        "PAGE_MISSES": 7,
        "MISSED_TOKENS": 19,
        "ADMISSIONS": 2,
        "EVICTIONS": 0,
    }
    keys = arguments["pages"][0, 0, 0, :, 0]
    assert keys[12:].tolist() == [5, 6, 7, 8]
    assert keys[8:12].tolist() == [0, 1, 2, 3]
    assert keys[4] == 4
    assert keys[5:8].isnan().all()
    assert keys[:4].isnan().all()


def test_a_cluster_larger_than_the_cache_keeps_nobody_out(device: str) -> None:
    arguments = on_device(by_hand([20, 4, 4], [0, 1, 2], 4, []), device)
    page_gather(**arguments)
    assert arguments["cached"].tolist() == [[[0, 1, 1]]]
    page_gather(**arguments)
    assert counted(arguments) == {
        "PAGE_HITS": 2,
        "PAGE_MISSES": 7 + 5,
        "MISSED_TOKENS": 28 + 20,
        "ADMISSIONS": 2,
        "EVICTIONS": 0,
    }


def test_clusters_to_be_made_anew_stay_out(device: str) -> None:
    """Of 16 indexed tokens the last 8, which are clusters 2 and 3, are open."""
    arguments = on_device(by_hand([4, 4, 5, 3], [3, 2, 1, 0], 5, []), device)
    arguments["counters"][0, Counter.INDEXED_TOKENS] = 16
    for open_tokens, cached in ((8, [1, 1, 0, 0]), (0, [1, 1, 2, 1])):
        arguments["counters"][0, Counter.OPEN_TOKENS] = open_tokens
        page_gather(**arguments)
        assert arguments["cached"].tolist() == [[cached]]
    counts = counted(arguments)
    assert (counts["PAGE_MISSES"], counts["ADMISSIONS"]) == (5 + 3, 4)


def test_only_as_many_leave_as_must(device: str) -> None:
    arguments = on_device(by_hand([4, 4, 4, 4, 8], [0, 1, 2, 3], 4, [2, 0, 3, 1]), device)
    page_gather(**arguments)
    arguments["retrieved"] = torch.tensor([[[4, 2, -1, -1]]], dtype=torch.int32, device=device)
    page_gather(**arguments)
    # Cluster 2 is wanted, 0 and 3 make room, 1 may stay.
    assert arguments["cached"].tolist() == [[[0, 1, 1, 0, 2]]]
    assert counted(arguments)["EVICTIONS"] == 2
    assert arguments["counters"][0, Counter.LATE_DECISIONS] == 1


def test_steps_start_again_at_one(device: str) -> None:
    arguments = on_device(by_hand([4], [0], 1, []), device)
    arguments["free_pages"][..., FreeHeader.STEP] = 2**31 - 1
    page_gather(**arguments)
    assert arguments["free_pages"][0, 0, FreeHeader.STEP] == 1


def test_more_pages_than_a_byte_counts(device: str) -> None:
    arguments = on_device(by_hand([4 * 300], [0], 300, []), device)
    page_gather(**arguments)
    assert arguments["cached"].tolist() == [[[255]]]
    page_gather(**arguments)
    assert counted(arguments)["PAGE_HITS"] == 300
