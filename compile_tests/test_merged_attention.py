"""merged_attention: exact attention, in place, merged with an estimate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import merged_attention
from retro_ops.ops._contract import ELEMENT_DTYPES, Counter
from retro_ops.ops.merged_attention import reference
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
    to_float64,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WITH_HEAD_DIM = ("query", "steady", "store", "estimate")


def make(
    variant: Variant,
    held: list[int],
    retrieved: int,
    *,
    cluster_tokens: int = 12,
    estimated: float = 0.7,
    strength: float = 1.0,
    room: int = 2,
    poison: bool = True,
) -> Arguments:
    """Rows with `held` steady tokens and `retrieved` clusters of up to `cluster_tokens` tokens.

    Args:
        estimated: fraction of the query heads that have an estimate.
        strength: standard deviation of logits, about.
        room: slots of the steady zone that no row uses.
        poison: NaN in slots that no address names, which must not be read.
    """
    generator = variant.generator
    groups = (variant.rows, variant.heads)
    query_heads = variant.heads * variant.groups
    steady = variant.normal(generator, 2, *groups, max(held, default=0) + room, variant.head_dim)
    slots = retrieved * cluster_tokens
    store = variant.normal(generator, 2, *groups, slots, variant.head_dim)
    tokens = torch.randint(cluster_tokens + 1, (*groups, retrieved), generator=generator)
    first = torch.rand(*groups, retrieved, generator=generator) * (slots + 1 - tokens)
    addresses = torch.stack((first.long(), tokens), dim=-1)
    addresses[torch.rand(*groups, retrieved, generator=generator) < 0.2] = 0
    if poison:
        slot = torch.arange(slots)
        begin, count = addresses[..., None].unbind(dim=3)
        named = ((slot >= begin) & (slot < begin + count)).any(dim=2)
        store[:, ~named] = torch.nan
        for row, steady_tokens in enumerate(held):
            steady[:, row, :, steady_tokens:] = torch.nan
    magnitude = MAGNITUDES[variant.magnitude]
    estimate = torch.randn(variant.rows, query_heads, variant.head_dim, generator=generator)
    lse = 3 * torch.randn(variant.rows, query_heads, generator=generator)
    lse[torch.rand(lse.shape, generator=generator) >= estimated] = -torch.inf
    estimate[lse == -torch.inf] = 0.0
    query = variant.normal(generator, variant.rows, query_heads, variant.head_dim)
    return {
        "query": in_layout(query, variant.layout),
        "steady": in_layout(steady, variant.layout),
        "store": in_layout(store, variant.layout),
        "addresses": in_layout(addresses, variant.layout),
        "counters": variant.counters(steady_tokens=held),
        "estimate": in_layout(estimate * magnitude, variant.layout),
        "estimate_lse": in_layout(lse, variant.layout),
        "scale": strength / (variant.head_dim**0.5 * (magnitude**2 or 1.0)),
    }


def in_float32(arguments: Arguments) -> Arguments:
    return {
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def plain_runs(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Outputs in the input's dtype, log-sum-exps in float32, in several orders of operation."""
    outs, lses = [], []
    for run, back in in_orders_of_head_dim(arguments, WITH_HEAD_DIM):
        in_dtype = run["query"].dtype
        single = in_float32(run)
        scaled_first = {**single, "query": single["query"] * single["scale"], "scale": 1.0}
        # As a kernel that counts in powers of 2 scales its logits, and scales its results back.
        binary = single["query"] * (single["scale"] * math.log2(math.e))
        scaled_twice = {**single, "query": binary, "scale": math.log(2)}
        for order in (single, scaled_first, scaled_twice):
            out, lse = reference(**order)
            lses.append(lse)
            if in_dtype == torch.float32:
                outs.append(out[..., back])
        if in_dtype != torch.float32:
            outs.append(reference(**run)[0][..., back])
    return torch.stack(outs), torch.stack(lses)


def assert_matches(arguments: Arguments, device: str) -> None:
    exact, exact_lse = reference(**to_float64(arguments))
    eager, eager_lse = plain_runs(arguments)
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        out, lse = merged_attention(**given)
        assert out.dtype == arguments["query"].dtype, kernels
        assert lse.dtype == torch.float32, kernels
        assert_within_budget(out, exact, eager, f"{kernels}: out")
        assert_within_budget(lse, exact_lse, eager_lse, f"{kernels}: lse")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("held", "retrieved", "cluster_tokens", "groups"),
    [
        ([1, 0], 0, 12, 4),
        ([0, 0], 1, 1, 1),
        ([64, 65], 15, 12, 1),
        ([600, 255], 33, 12, 8),
        ([3, 4], 17, 70, 2),
        ([64, 65], 15, 12, 12),
        ([64, 65], 15, 12, 20),
    ],
    ids=[
        "one token",
        "one cluster",
        "MHA",
        "several tasks",
        "large clusters",
        "large groups",
        "MQA",
    ],
)
def test_matches_reference(
    device: str,
    dtype: torch.dtype,
    held: list[int],
    retrieved: int,
    cluster_tokens: int,
    groups: int,
) -> None:
    variant = Variant(dtype=dtype, groups=groups)
    assert_matches(make(variant, held, retrieved, cluster_tokens=cluster_tokens), device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), [9, 3], 5, poison=False), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.zeros(2, 4, 1, 64)},
            "query must be [B, Hq, D] = [any, any, any], got [2, 4, 1, 64]",
        ),
        (
            {"query": torch.zeros(2, 4, 64, dtype=torch.int8)},
            "query must be torch.float32, torch.bfloat16 or torch.float16, got torch.int8",
        ),
        (
            {"query": torch.zeros(2, 4, 4)},
            "head_dim must be a multiple of 16 from 16 to 256, got 4",
        ),
        (
            {"query": torch.zeros(2, 3, 64)},
            "query heads must be a multiple of KV heads, got 3 and 2",
        ),
        (
            {"steady": torch.zeros(2, 1, 2, 11, 64)},
            "steady must be [2, B, Hkv, S, D] = [2, 2, any, any, 64], got [2, 1, 2, 11, 64]",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 11, 64, dtype=torch.float16)},
            "steady must be torch.float32, got torch.float16",
        ),
        (
            {"store": torch.zeros(2, 2, 3, 60, 64)},
            "store must be [2, B, Hkv, N, D] = [2, 2, 2, any, 64], got [2, 2, 3, 60, 64]",
        ),
        (
            {"store": torch.zeros(2, 2, 2, 60, 64, dtype=torch.bfloat16)},
            "store must be torch.float32, got torch.bfloat16",
        ),
        (
            {"addresses": torch.zeros(2, 2, 5, 3, dtype=torch.int64)},
            "addresses must be [B, Hkv, R, 2] = [2, 2, any, 2], got [2, 2, 5, 3]",
        ),
        (
            {"addresses": torch.zeros(2, 2, 5, 2, dtype=torch.int32)},
            "addresses must be torch.int64, got torch.int32",
        ),
        (
            {"counters": torch.zeros(6, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [6]",
        ),
        (
            {"counters": torch.zeros(2, 15, dtype=torch.uint8)},
            "counters must be torch.int64, got torch.uint8",
        ),
        (
            {"counters": torch.zeros(15, 2, dtype=torch.int64).T},
            "counters must be contiguous, got strides [1, 2]",
        ),
        (
            {"estimate": torch.zeros(2, 2, 64)},
            "estimate must be [B, Hq, D] = [2, 4, 64], got [2, 2, 64]",
        ),
        (
            {"estimate": torch.zeros(2, 4, 64, dtype=torch.bfloat16)},
            "estimate must be torch.float32, got torch.bfloat16",
        ),
        (
            {"estimate_lse": torch.zeros(2, 4, 1)},
            "estimate_lse must be [B, Hq] = [2, 4], got [2, 4, 1]",
        ),
        (
            {"estimate_lse": torch.zeros(2, 4, dtype=torch.complex64)},
            "estimate_lse must be torch.float32, got torch.complex64",
        ),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(merged_attention, arguments, f"merged_attention: {message}")


@pytest.mark.parametrize("tokens", [12, -1])
def test_rejects_counters(tokens: int) -> None:
    counters = Variant().counters(steady_tokens=[0, tokens])
    message = f"counters say that row 1 has {tokens} steady tokens, the steady zone holds 11"
    arguments = {**refusable("cpu"), "counters": counters}
    assert_refused(merged_attention, arguments, f"merged_attention: {message}", by_fake=False)


@pytest.mark.parametrize(
    ("first", "tokens"), [(60, 1), (-1, 1), (3, -1), (61, 0), (2**63 - 1, 1), (1, 2**63 - 1)]
)
def test_rejects_values(first: int, tokens: int) -> None:
    arguments = refusable("cpu")
    arguments["addresses"][1, 1, 4] = torch.tensor([first, tokens])
    message = f"addresses must lie in a store of 60 tokens, got {tokens} tokens from slot {first}"
    assert_refused(merged_attention, arguments, f"merged_attention: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(device: str, dtype: torch.dtype, layout: str) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = make(variant, [9, 3], 5, poison=False, estimated=1.0)
    arguments = on_device(arguments, device)
    torch.library.opcheck(torch.ops.retro.merged_attention.default, tuple(arguments.values()))


def test_opcheck_with_gradients(device: str) -> None:
    arguments = on_device(make(Variant(), [9, 3], 5, poison=False, estimated=1.0), device)
    arguments["query"].requires_grad_()
    torch.library.opcheck(
        torch.ops.retro.merged_attention.default,
        tuple(arguments.values()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(device: str, backend: str) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [9, 7], 5)
    second = make(Variant(rows=4, heads=5, groups=3, head_dim=80), [20, 0, 17, 1], 8)
    second["scale"] = first["scale"]
    first, second = on_device(first, device), on_device(second, device)
    assert_compiles(merged_attention, first, backend=backend)
    assert_compiles(merged_attention, first, second, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
def test_captures(dtype: torch.dtype) -> None:
    first = make(Variant(dtype=dtype), [90, 7], 33)
    second = make(Variant(dtype=dtype, seed=1), [3, 90], 33)
    assert_captures(merged_attention, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=300)
@given(
    variant=variants(),
    held=st.lists(st.sampled_from((0, 1, 15, 64, 65)), min_size=3, max_size=3),
    retrieved=st.sampled_from((0, 1, 3, 16, 17)),
    cluster_tokens=st.sampled_from((1, 2, 9, 40)),
    estimated=st.sampled_from((0.0, 0.7, 1.0)),
    strength=st.sampled_from((0.1, 1.0, 10.0, -1.0, 0.0)),
    room=st.sampled_from((0, 2)),
)
def test_attends_to_any_tokens(
    device: str, variant: Variant, held: list[int], retrieved: int, **numbers: object
) -> None:
    assert_matches(make(variant, held[: variant.rows], retrieved, **numbers), device)


def test_nothing_to_attend_to(device: str) -> None:
    arguments = on_device(make(Variant(), [0, 0], 3, cluster_tokens=0, estimated=0.0), device)
    for kernels in every_kernel(device):
        out, lse = merged_attention(**arguments)
        assert (out == 0).all(), kernels
        assert (lse == -torch.inf).all(), kernels


def test_estimate_alone_comes_back(device: str) -> None:
    arguments = make(Variant(), [0, 0], 0, estimated=1.0)
    given = on_device(arguments, device)
    for kernels in every_kernel(device):
        out, lse = merged_attention(**given)
        assert_same(out.cpu(), arguments["estimate"], f"{kernels}: out")
        # CUDA kernels count in powers of 2: there and back are two roundings.
        if device == "cpu":
            assert_same(lse, arguments["estimate_lse"], f"{kernels}: lse")
        torch.testing.assert_close(
            lse.cpu(), arguments["estimate_lse"], rtol=2.0**-22, atol=0.0, msg=kernels
        )


@pytest.mark.parametrize("lse", [-1e4, 1e4])
def test_one_half_outweighs_the_other(device: str, lse: float) -> None:
    arguments = make(Variant(), [9, 70], 3)
    arguments["estimate_lse"].fill_(lse)
    assert_matches(arguments, device)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_merged_halves_are_the_whole(device: str, dtype: torch.dtype, groups: int) -> None:
    """Steady tokens into clusters, or clusters into steady tokens."""
    whole = make(Variant(dtype=dtype, groups=groups), [70, 9], 17, estimated=0.0)
    exact, exact_lse = reference(**to_float64(whole))
    eager, eager_lse = plain_runs(whole)
    whole = on_device(whole, device)
    no_steady = whole["counters"].clone()
    no_steady[:, Counter.STEADY_TOKENS] = 0
    steady_only = {**whole, "addresses": whole["addresses"][:, :, :0]}
    clusters_only = {**whole, "counters": no_steady}
    for kernels in every_kernel(device):
        for first, second in ((steady_only, clusters_only), (clusters_only, steady_only)):
            half, half_lse = merged_attention(**first)
            estimate = {"estimate": half.float(), "estimate_lse": half_lse}
            out, lse = merged_attention(**{**second, **estimate})
            assert_within_budget(out, exact, eager, f"{kernels}: out")
            assert_within_budget(lse, exact_lse, eager_lse, f"{kernels}: lse")


def test_backward_says_that_there_is_none(device: str) -> None:
    message = (
        "^merged_attention: retro_ops is for inference, there is no backward pass; run the model "
        r"under torch.no_grad\(\), or train with attn_implementation='sdpa'$"
    )
    compiled = torch.compile(merged_attention, fullgraph=True, backend="aot_eager")
    for op in (merged_attention, compiled):
        for name in ("query", "steady", "store", "estimate", "estimate_lse"):
            torch._dynamo.reset()
            arguments = refusable(device)
            arguments[name].requires_grad_()
            for result in op(**arguments):
                with pytest.raises(RuntimeError, match=message):
                    result.float().sum().backward(retain_graph=True)


@settings(max_examples=10)
@given(variant=variants())
def test_repeats(device: str, variant: Variant) -> None:
    arguments = on_device(make(variant, [600, 17, 1][: variant.rows], 33), device)
    for _ in every_kernel(device):
        assert_repeats(merged_attention, arguments)


def test_layout_does_not_matter(device: str) -> None:
    plain = on_device(make(Variant(), [40, 25], 5), device)
    for kernels in every_kernel(device):
        expected = merged_attention(**plain)
        for layout in ("permuted", "padded", "transposed"):
            given = on_device(make(Variant(layout=layout), [40, 25], 5), device)
            for actual, result in zip(merged_attention(**given), expected, strict=True):
                assert_same(actual, result, f"{kernels}: {layout}")


# With a page cache


def with_pages(arguments: Arguments, page_size: int, seed: int = 0) -> Arguments:
    """The same tokens, each page of a cluster in the store or in the cache, NaN where nothing is
    read."""
    generator = torch.Generator().manual_seed(seed)
    store, addresses = arguments["store"], arguments["addresses"]
    rows, heads, ranks, _ = addresses.shape
    counts = (addresses[..., 1] + page_size - 1) // page_size
    entry = counts.cumsum(dim=2) - counts + 1  # the table's first entry belongs to nobody
    entries = int(counts.sum(dim=2).max()) + 2 if counts.numel() else 2
    in_cache = torch.rand(rows, heads, entries, generator=generator) < 0.5
    pages = entries + 3
    table = torch.full((rows, heads, entries), -1, dtype=torch.int32)
    cache = torch.full((2, rows, heads, pages * page_size, store.shape[4]), torch.nan).to(store)
    read = torch.zeros(store.shape[1:4], dtype=torch.bool)
    for row in range(rows):
        for head in range(heads):
            free = torch.randperm(pages, generator=generator).tolist()
            for rank in range(ranks):
                first, tokens = addresses[row, head, rank].tolist()
                for token in range(0, tokens, page_size):
                    place = int(entry[row, head, rank]) + token // page_size
                    source = slice(first + token, first + min(token + page_size, tokens))
                    if not in_cache[row, head, place]:
                        read[row, head, source] = True
                        continue
                    page = table[row, head, place] = free.pop()
                    slot = page * page_size
                    target = slice(slot, slot + source.stop - source.start)
                    cache[:, row, head, target] = store[:, row, head, source]
    held = torch.where(read[None, ..., None], store, torch.nan)
    return {
        **arguments,
        "store": store.clone().copy_(held),
        "addresses": torch.cat((addresses, entry[..., None]), dim=3),
        "pages": cache,
        "page_table": table,
        "page_size": page_size,
    }


@settings(max_examples=100)
@given(
    variant=variants(),
    held=st.lists(st.sampled_from((0, 1, 65)), min_size=3, max_size=3),
    retrieved=st.sampled_from((0, 1, 3, 17)),
    cluster_tokens=st.sampled_from((1, 2, 9, 40)),
    page_size=st.sampled_from((1, 3, 8, 64)),
)
def test_where_a_page_lies_changes_no_bit(
    device: str,
    variant: Variant,
    held: list[int],
    retrieved: int,
    cluster_tokens: int,
    page_size: int,
) -> None:
    plain = make(variant, held[: variant.rows], retrieved, cluster_tokens=cluster_tokens)
    paged = with_pages(plain, page_size, variant.seed)
    on = [on_device(arguments, device) for arguments in (paged, plain)]
    for kernels in every_kernel(device):
        for actual, expected in zip(
            *(merged_attention(**arguments) for arguments in on), strict=True
        ):
            assert_same(actual, expected, kernels)
    for actual, expected in zip(reference(**paged), reference(**plain), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize("ranks", [853, 854, 1281])
def test_pages_of_many_ranks(device: str, ranks: int) -> None:
    """As many as a block of the GPU keeps the places of in its own memory, and more."""
    plain = make(Variant(rows=1, heads=2, groups=4, head_dim=128), [40], ranks, cluster_tokens=9)
    on = [on_device(arguments, device) for arguments in (with_pages(plain, 8), plain)]
    for actual, expected in zip(*(merged_attention(**arguments) for arguments in on), strict=True):
        assert_same(actual, expected)


@pytest.mark.gpu
def test_captures_with_pages() -> None:
    first = with_pages(make(Variant(), [90, 7], 17), 4)
    second = {**first, "query": first["query"].flip(0)}
    assert_captures(merged_attention, on_device(first, "cuda"), on_device(second, "cuda"))


@pytest.mark.gpu
def test_wrong_pages_do_not_lead_outside() -> None:
    """What the CPU refuses; a GPU is not waited for, it reads the store, or nothing."""
    plain = make(Variant(), [9, 3], 5, poison=False)
    paged = with_pages(plain, 4)
    paged["store"] = plain["store"]
    for page in (-2, -(2**31), 1000, 2**31 - 1):
        wrong = on_device(paged, "cuda")
        wrong["page_table"].fill_(page)
        for actual, expected in zip(
            merged_attention(**wrong), merged_attention(**on_device(plain, "cuda")), strict=True
        ):
            assert_same(actual, expected, f"page {page}")
    for entry in (-1, 5000, 2**63 - 1):
        wrong = on_device(paged, "cuda")
        wrong["addresses"][..., 2] = entry
        nothing = on_device(plain, "cuda")
        nothing["addresses"].zero_()
        for actual, expected in zip(
            merged_attention(**wrong), merged_attention(**nothing), strict=True
        ):
            assert_same(actual, expected, f"entry {entry}")


def paged_and_refusable() -> Arguments:
    return with_pages(make(Variant(), [9, 3], 5, poison=False), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pages": None}, "pages and page_table must be given together, got page_table only"),
        ({"page_table": None}, "pages and page_table must be given together, got pages only"),
        (
            {"addresses": torch.zeros(2, 2, 5, 2, dtype=torch.int64)},
            "addresses must be [B, Hkv, R, 3] = [2, 2, any, 3], got [2, 2, 5, 2]",
        ),
        ({"page_size": 0}, "page_size must be at least 1 token, got 0"),
        (
            {"pages": torch.zeros(2, 2, 2, 8, 80)},
            "pages must be [2, B, Hkv, P * page_size, D] = [2, 2, 2, any, 64], "
            "got [2, 2, 2, 8, 80]",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 8, 64).half()},
            "pages must be torch.float32, got torch.float16",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 9, 64)},
            "pages must hold a multiple of page_size (4) tokens, got 9",
        ),
        (
            {"page_table": torch.zeros(2, 3, 8, dtype=torch.int32)},
            "page_table must be [B, Hkv, N / page_size + C] = [2, 2, any], got [2, 3, 8]",
        ),
        (
            {"page_table": torch.zeros(2, 2, 8)},
            "page_table must be torch.int32, got torch.float32",
        ),
        (
            {"pages": torch.zeros(2, 2, 2, 8, 64, device="meta")},
            "pages must be on cpu like query, got meta",
        ),
    ],
)
def test_rejects_pages(change: Arguments, message: str) -> None:
    arguments = {**paged_and_refusable(), **change}
    refusal = None
    try:
        merged_attention(**arguments)
    except RuntimeError as error:
        refusal = str(error)
    assert refusal == f"merged_attention: {message}"
    if "meta" not in message:
        assert_refused(merged_attention, arguments, f"merged_attention: {message}")


@pytest.mark.parametrize("first_entry", [-1, 5000, 2**63 - 1])
def test_rejects_entries(first_entry: int) -> None:
    arguments = paged_and_refusable()
    entries = arguments["page_table"].shape[2]
    arguments["addresses"][1, 1, 4] = torch.tensor([3, 5, first_entry])
    message = (
        f"merged_attention: addresses must lie in a page_table of {entries} entries, "
        f"got 2 entries from {first_entry}"
    )
    assert_refused(merged_attention, arguments, message, by_fake=False)


@pytest.mark.parametrize("page", [-2, 1000])
def test_rejects_a_page_table(page: int) -> None:
    arguments = paged_and_refusable()
    arguments["addresses"][1, 1, 4] = torch.tensor([3, 5, 1])
    arguments["page_table"][1, 1, 2] = page
    last = arguments["pages"].shape[3] // 4 - 1
    message = f"merged_attention: page_table must lie in -1 .. {last}, got {page}"
    assert_refused(merged_attention, arguments, message, by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck_with_pages(dtype: torch.dtype, layout: str) -> None:
    arguments = make(Variant(dtype=dtype, layout=layout), [9, 3], 5, poison=False, estimated=1.0)
    paged = with_pages(arguments, 4)
    paged["store"] = arguments["store"]
    paged["pages"] = in_layout(paged["pages"].nan_to_num(), layout)
    torch.library.opcheck(torch.ops.retro.merged_attention.default, tuple(paged.values()))
    paged["query"].requires_grad_()
    torch.library.opcheck(
        torch.ops.retro.merged_attention.default,
        tuple(paged.values()),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_with_pages() -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), [9, 7], 5)
    second = make(Variant(rows=4, heads=5, groups=3, head_dim=80), [20, 0, 17, 1], 8)
    second["scale"] = first["scale"]
    assert_compiles(merged_attention, with_pages(first, 4), with_pages(second, 4))


def test_backward_with_pages_raises() -> None:
    arguments = paged_and_refusable()
    arguments["pages"].requires_grad_()
    out, _ = merged_attention(**arguments)
    with pytest.raises(RuntimeError, match="there is no backward pass"):
        out.sum().backward()
