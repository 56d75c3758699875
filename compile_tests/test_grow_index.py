"""grow_index: cluster_keys and pack_clusters of the tokens behind the sinks, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
            "counters must be [B, columns] = [2, 15], got [3, 6]",
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


@settings(max_examples=200)
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


@settings(max_examples=10)
@given(variant=variants())
def test_repeats(device: str, variant: Variant) -> None:
    variant = replace(variant, device=device)
    arguments = make(
        variant, [13, 40, 12][: variant.rows], [(0, 0), (10, 3), (1, 1)][: variant.rows]
    )
    arguments = on_device(arguments, device)
    for _ in every_kernel(device):
        assert_repeats(grow_index, arguments)


# Segments that become one.


def make_merging(
    variant: Variant, held: list[int], merge_iterations: int = 2, *, room: int = 20
) -> Arguments:
    """Three updates of 12 tokens, or 4 clusters, become one; keys are near one of five topics.

    A row of 17 steady tokens gives up 12, one of 29 24; rows hold (0, 0) and (10, 3) before.
    """
    indexed = [(0, 0), (10, 3), (1, 1)][: variant.rows]
    arguments = make(variant, held, indexed, update_segment=12, cluster_size=3, room=room)
    generator = variant.generator
    keys = arguments["steady"][0]
    topics = torch.randn(5, keys.shape[3], generator=generator)
    chosen = torch.randint(5, keys.shape[:3], generator=generator)
    keys.copy_(topics[chosen] + 0.3 * torch.randn(keys.shape, generator=generator))
    for row, (tokens, clusters) in enumerate(indexed):
        arguments["offsets"][row, :, clusters] = tokens
    return {**arguments, "merged_updates": 3, "merge_iterations": merge_iterations}


def without_merges(arguments: Arguments) -> Arguments:
    plain = {**on_device(arguments, "cpu"), "merged_updates": 1}
    return on_device(plain, arguments["steady"].device)


def region_of(arguments: Arguments, row: int) -> tuple[int, int, int, int]:
    """First slot and cluster of the three segments behind (0, 0) or (10, 3), and their numbers."""
    tokens, clusters = [(0, 0), (10, 3), (1, 1)][row]
    merged = arguments["merged_updates"]
    count = cluster_count(arguments["update_segment"], arguments["cluster_size"])
    return tokens, clusters, merged * arguments["update_segment"], merged * count


def merged_assignment(before: Tensor, arguments: Arguments, row: int, head: int) -> Tensor:
    """The cluster, from 0, of each token of `before`, `[T, D]` keys in the order of their slots."""
    slot, cluster, tokens, clusters = region_of(arguments, row)
    offsets = arguments["offsets"][row, head, cluster : cluster + clusters + 1].cpu() - slot
    assert offsets[0] == 0
    assert offsets[-1] == tokens
    assert (offsets.diff() >= 0).all()
    after = arguments["store"][0, row, head, slot : slot + tokens].cpu().double()
    moved_to = torch.cdist(before.cpu().double(), after).argmin(dim=1)
    assert moved_to.sort().values.tolist() == list(range(tokens)), "every token is there once"
    return torch.searchsorted(offsets[1:].contiguous(), moved_to.int(), right=True).int()


def scores_of_means(keys: Tensor, means: Tensor) -> Tensor:
    """Product of each centred key `[T, D]` with the direction of each centred mean `[C, D]`."""
    keys, means = keys.cpu().double(), means.cpu().double()
    mean = keys.mean(dim=0)
    return (keys - mean) @ torch.nn.functional.normalize(means - mean, dim=1).T


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_merged_segments_are_packed_as_one(device: str, dtype: torch.dtype) -> None:
    """Slots and ids stay, and with its assignment pack_clusters makes the same of the tokens."""
    variant = Variant(dtype=dtype, rows=2, heads=2, head_dim=64)
    arguments = on_device(make_merging(variant, [17 + 2 * 12, 17 + 3 * 12]), device)
    for kernels in every_kernel(device):
        plain, actual = without_merges(arguments), on_device(arguments, device)
        grow_index(**plain)
        grow_index(**actual)
        assert actual["counters"][:, Counter.OPEN_TOKENS].tolist() == [0, 12]
        assert plain["counters"][:, Counter.OPEN_TOKENS].tolist() == [0, 0]
        for column in Counter:
            if column != Counter.OPEN_TOKENS:
                assert_same(actual["counters"][:, column], plain["counters"][:, column], kernels)
        for row in range(2):
            slot, cluster, tokens, clusters = region_of(arguments, row)
            own = slice(slot, slot + tokens), slice(cluster, cluster + clusters)
            before = plain["store"][:, row : row + 1, :, own[0]].clone()
            assignment = torch.stack(
                [merged_assignment(before[0, 0, head], actual, row, head) for head in range(2)]
            )[None].to(device)
            expected = {
                name: torch.zeros_like(plain[name][:, row : row + 1])
                if name in WITH_HALVES
                else torch.zeros_like(plain[name][row : row + 1])
                for name in INDEX
            }
            expected["counters"][0, Counter.INDEXED_TOKENS] = slot
            expected["counters"][0, Counter.CLUSTERS] = cluster
            pack_clusters(before[0], before[1], assignment, **expected, cluster_size=3)
            assert_same(
                actual["store"][:, row, :, own[0]], expected["store"][:, 0, :, own[0]], kernels
            )
            assert_same(
                actual["centroids"][:, row, :, own[1]],
                expected["centroids"][:, 0, :, own[1]],
                kernels,
            )
            for name in ("offsets", "variances"):
                assert_same(actual[name][row, :, own[1]], expected[name][0, :, own[1]], kernels)
            # What lies beside the merged segments is as it would be without.
            rest = slot + tokens
            assert_same(actual["store"][:, row, :, :slot], plain["store"][:, row, :, :slot])
            assert_same(actual["store"][:, row, :, rest:], plain["store"][:, row, :, rest:])
            # Totals count each token once: those of the clusters as they are now.
            changed = actual["totals"][:, row].double() - arguments["totals"][:, row].double()
            unmerged = plain["totals"][:, row].double() - arguments["totals"][:, row].double()
            ends = plain["offsets"][row, :, cluster : cluster + clusters + 1].tolist()
            old = torch.zeros_like(changed[0])
            for head in range(2):
                for first, last in zip(ends[head], ends[head][1:], strict=False):
                    keys = plain["store"][0, row, head, first:last].double()
                    old[head] += (keys - keys.mean(dim=0)).square().sum(dim=0) if len(keys) else 0
            torch.testing.assert_close(
                changed[0],
                unmerged[0] - old + expected["totals"][0, 0].double(),
                rtol=1e-5,
                atol=1e-3,
            )
            torch.testing.assert_close(changed[1], unmerged[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_merging_begins_with_the_clusters_so_far(device: str, dtype: torch.dtype) -> None:
    """After one pass each token is with the best of their means, wherever its segment was."""
    arguments = on_device(make_merging(Variant(dtype=dtype), [17 + 24, 17 + 24], 1), device)
    for kernels in every_kernel(device):
        plain, actual = without_merges(arguments), on_device(arguments, device)
        grow_index(**plain)
        grow_index(**actual)
        for row in range(2):
            slot, cluster, tokens, clusters = region_of(arguments, row)
            crossed = 0
            for head in range(2):
                keys = plain["store"][0, row, head, slot : slot + tokens]
                means = plain["centroids"][0, row, head, cluster : cluster + clusters]
                scores = scores_of_means(keys, means)
                assigned = merged_assignment(keys, actual, row, head).long()[:, None]
                short = scores.amax(dim=1) - scores.gather(1, assigned)[:, 0]
                lengths = (keys.double() - keys.double().mean(dim=0)).norm(dim=1).cpu()
                assert (short <= 0.01 * lengths).all(), kernels
                segment = torch.arange(tokens) // arguments["update_segment"]
                crossed += int((assigned[:, 0] // (clusters // 3) != segment).sum())
            assert crossed > 0, "no token has found a better cluster in another segment"


def test_passes_bring_tokens_closer(device: str) -> None:
    arguments = make_merging(Variant(head_dim=64), [17 + 24, 17 + 24])
    for _ in every_kernel(device):
        sums = []
        for merged, passes in ((1, 1), (3, 1), (3, 4)):
            grown = on_device(arguments, device)
            grown |= {"merged_updates": merged, "merge_iterations": passes}
            grow_index(**grown)
            sizes = grown["offsets"][0].diff(dim=1)[:, :12]
            sums.append(float((grown["variances"][0, :, :12] * sizes).sum()))
        # Of the squared distances of keys to their mean; cosines are not distances, but nearly.
        assert sums[1] < sums[0]
        assert sums[2] < sums[0]


@pytest.mark.parametrize("merge_iterations", [1, 3])
def test_merging_one_segment_at_a_time_is_merging_at_once(
    device: str, merge_iterations: int
) -> None:
    arguments = make_merging(
        Variant(rows=3), [17 + 6 * 12, 17 + 2 * 12, 17 + 3 * 12], merge_iterations
    )
    at_once, one_by_one = on_device(arguments, device), on_device(arguments, device)
    for _ in every_kernel(device):
        grow_index(**at_once)
        for kept_back in range(6, -1, -1):
            local_tokens = arguments["local_tokens"] + 12 * kept_back
            grow_index(**{**one_by_one, "local_tokens": local_tokens})
        for name in INDEX:
            assert_same(one_by_one[name], at_once[name], name)
        at_once, one_by_one = on_device(arguments, device), on_device(arguments, device)


def test_a_prompt_between_segments_begins_anew(device: str) -> None:
    arguments = on_device(make_merging(Variant(), [17 + 12, 17 + 12]), device)
    grow_index(**arguments)
    counters = arguments["counters"]
    assert counters[:, Counter.OPEN_TOKENS].tolist() == [24, 24]
    # One row gets four more tokens, the other none.
    keys = Variant().normal(Variant().generator, 2, 2, 4, 64).to(device)
    assignment = torch.tensor([[0, 0, 1, 1], [-1, -1, -1, -1]], dtype=torch.int32, device=device)
    room = {
        name: torch.cat(
            (arguments[name], torch.zeros_like(arguments[name]).narrow(axis, 0, 4)), dim=axis
        )
        for name, axis in (("store", 3), ("centroids", 3), ("offsets", 2), ("variances", 2))
    }
    arguments |= room
    index = {name: arguments[name] for name in INDEX}
    pack_clusters(keys, keys, assignment[:, None].expand(2, 2, 4), **index, cluster_size=2)
    assert counters[:, Counter.OPEN_TOKENS].tolist() == [0, 24]


def test_a_store_too_small_for_a_merge_has_none(device: str) -> None:
    arguments = on_device(make(Variant(), [13, 13], [(0, 0), (0, 0)], room=7), device)
    grow_index(**arguments, merged_updates=2)
    assert arguments["counters"][:, Counter.OPEN_TOKENS].tolist() == [0, 0]


def test_rejects_merges(device: str) -> None:
    arguments = on_device(make_merging(Variant(), [29, 29]), device)
    for name in ("merged_updates", "merge_iterations"):
        assert_refused(
            grow_index, {**arguments, name: 0}, f"grow_index: {name} must be at least 1, got 0"
        )


def test_rejects_open_tokens_that_are_not_there() -> None:
    for open_tokens, message in (
        (11, "counters say that row 1 has 11 open tokens, the index holds 10"),
        (-1, "counters say that row 1 has -1 open tokens, the index holds 10"),
    ):
        arguments = make_merging(Variant(), [17, 17])
        arguments["counters"][1, Counter.OPEN_TOKENS] = open_tokens
        assert_refused(grow_index, arguments, f"grow_index: {message}", by_fake=False)
    arguments = make_merging(Variant(), [17, 17])
    arguments["counters"][0, Counter.INDEXED_TOKENS] = 24
    arguments["counters"][0, Counter.CLUSTERS] = 7
    arguments["counters"][0, Counter.OPEN_TOKENS] = 24
    message = "counters say that row 0 has 24 open tokens, but only 7 clusters"
    assert_refused(grow_index, arguments, f"grow_index: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_merges_repeat_and_opcheck(device: str, dtype: torch.dtype) -> None:
    arguments = on_device(make_merging(Variant(dtype=dtype), [17 + 24, 17 + 36]), device)
    torch.library.opcheck(torch.ops.retro.grow_index.default, tuple(arguments.values()))
    for _ in every_kernel(device):
        assert_repeats(grow_index, arguments)
