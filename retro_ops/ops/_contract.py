"""What all ops share: columns of `counters`, checks in the words of C++, and no backward."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

ELEMENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ESTIMATORS = ("variance", "mean")
POLICIES = ("lru", "lru2", "lfu")


class Counter(IntEnum):
    """Columns of `counters`, int64 `[B, len(Counter)]`; the same as in `csrc/counters.h`."""

    STEADY_TOKENS = 0
    INDEXED_TOKENS = 1
    CLUSTERS = 2
    UPDATES = 3
    RETRIEVED_TOKENS = 4
    STEPS = 5
    DROPPED_TOKENS = 6
    FINISHED_HEADS = 7
    PAGE_HITS = 8
    PAGE_MISSES = 9
    MISSED_TOKENS = 10
    ADMISSIONS = 11
    EVICTIONS = 12
    LATE_DECISIONS = 13
    OPEN_TOKENS = 14


class FreeHeader(IntEnum):
    """Columns before the pages of `free_pages`; these three are as in `csrc/page_cache.h`."""

    STEP = 0
    COUNT = 1


class RequestHeader(IntEnum):
    """Columns before the ids of `requests`."""

    STEP = 0
    FREE = 1
    MISSED = 2


class DecisionHeader(IntEnum):
    """Columns before the clusters of `decisions`."""

    STEP = 0
    COUNT = 1


OUTLIER_SHARE = 8
"""One cluster out of so many is for outliers."""
OUTLIER_PASS = 2
"""Passes of k-means before outliers get clusters of their own."""


def cluster_count(tokens: int, cluster_size: int) -> int:
    """Clusters that `tokens` tokens become: tokens / cluster_size, halves up, at least one."""
    if tokens <= 0:
        return 0
    return max((2 * tokens + cluster_size) // (2 * cluster_size), 1)


def outlier_count(tokens: int, clusters: int) -> int:
    """Clusters of a segment, out of `clusters`, that are for outliers."""
    return clusters // OUTLIER_SHARE if clusters < tokens else 0


def retrieved_count(retrieval_budget: float, min_retrieved_clusters: int, clusters: int) -> int:
    """Clusters that a row of `clusters` live clusters retrieves."""
    return min(max(round(retrieval_budget * clusters), min_retrieved_clusters), clusters)


def segment_count(tokens: int, segment_size: int) -> int:
    """Segments that `tokens` tokens are cut into: tokens / segment_size, halves up, at least 1."""
    return max((2 * tokens + segment_size) // (2 * segment_size), 1)


def check_shape(
    op: str, name: str, tensor: Tensor, letters: str, expected: Sequence[int | None]
) -> None:
    """Raises unless `tensor` has the expected sizes; None accepts any size."""

    def message() -> str:
        want = ", ".join("any" if size is None else str(size) for size in expected)
        got = ", ".join(str(size) for size in tensor.shape)
        return f"{op}: {name} must be [{letters}] = [{want}], got [{got}]"

    torch._check(tensor.dim() == len(expected), message)
    for size, want in zip(tensor.shape, expected, strict=True):
        if want is not None:
            torch._check(size == want, message)


def check_dtype(op: str, name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """Raises unless `tensor` has dtype `expected`."""
    torch._check(
        tensor.dtype == expected, lambda: f"{op}: {name} must be {expected}, got {tensor.dtype}"
    )


def check_element_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` has a dtype of queries, keys and values."""
    torch._check(
        tensor.dtype in ELEMENT_DTYPES,
        lambda: (
            f"{op}: {name} must be torch.float32, torch.bfloat16 or torch.float16, "
            f"got {tensor.dtype}"
        ),
    )


def check_head_dim(op: str, head_dim: int) -> None:
    """Raises unless `head_dim` is a multiple of 16 from 16 to 256."""
    torch._check(
        head_dim % 16 == 0 and 16 <= head_dim <= 256,
        lambda: f"{op}: head_dim must be a multiple of 16 from 16 to 256, got {head_dim}",
    )


def check_device(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    """Raises unless `tensor` is on the device of `like`."""
    torch._check(
        tensor.device == like.device,
        lambda: f"{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}",
    )


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Raises unless the rows of `tensor`, which the op changes in place, are contiguous."""
    torch._check(
        tensor.stride(-1) == 1 or tensor.numel() == 0,
        lambda: (
            f"{op}: {name} must have stride 1 on its last axis, since it is changed in place, "
            f"got {tensor.stride(-1)}"
        ),
    )


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raises unless `tensor` is contiguous."""
    torch._check(
        tensor.is_contiguous(),
        lambda: f"{op}: {name} must be contiguous, got strides {list(tensor.stride())}",
    )


def check_at_least(op: str, name: str, number: int, lowest: int, what: str = "") -> None:
    """Raises unless `number` is `lowest` or more; `what` follows `lowest` in the message."""
    torch._check(
        number >= lowest, lambda: f"{op}: {name} must be at least {lowest}{what}, got {number}"
    )


def check_not_negative(op: str, name: str, number: int) -> None:
    """Raises unless `number` is 0 or more."""
    torch._check(number >= 0, lambda: f"{op}: {name} must not be negative, got {number}")


def check_fraction(op: str, name: str, number: float) -> None:
    """Raises unless `number` lies in 0..1."""
    torch._check(0.0 <= number <= 1.0, lambda: f"{op}: {name} must lie in 0..1, got {number:g}")


def check_clustering(
    op: str, cluster_size: int, name: str, segment_tokens: int, iterations: int
) -> None:
    """Raises unless k-means can run on segments of `segment_tokens`, an argument called `name`."""
    check_at_least(op, "cluster_size", cluster_size, 1, " token")
    torch._check(
        segment_tokens >= cluster_size,
        lambda: (
            f"{op}: {name} must be at least cluster_size ({cluster_size} tokens), "
            f"got {segment_tokens}"
        ),
    )
    check_at_least(op, "iterations", iterations, 1)


def check_counters(op: str, counters: Tensor, rows: int) -> None:
    """Raises unless `counters` is int64 `[B, len(Counter)]` and contiguous."""
    check_shape(op, "counters", counters, "B, columns", (rows, len(Counter)))
    check_dtype(op, "counters", counters, torch.int64)
    check_contiguous(op, "counters", counters)


def check_pages(
    op: str,
    pages: Tensor,
    page_size: int,
    store: Tensor,
) -> int:
    """Checks a page cache `[2, B, Hkv, P * page_size, D]` against the store; returns P."""
    check_at_least(op, "page_size", page_size, 1, " token")
    rows, heads, _, head_dim = store.shape[1:]
    letters = "2, B, Hkv, P * page_size, D"
    check_shape(op, "pages", pages, letters, (2, rows, heads, None, head_dim))
    check_dtype(op, "pages", pages, store.dtype)
    torch._check(
        pages.shape[3] % page_size == 0,
        lambda: (
            f"{op}: pages must hold a multiple of page_size ({page_size}) tokens, "
            f"got {pages.shape[3]}"
        ),
    )
    return pages.shape[3] // page_size


def check_page_cache(
    op: str,
    like: Tensor,
    like_name: str,
    groups: tuple[int, int, int],
    offsets: Tensor,
    store: Tensor,
    pages: Tensor,
    page_table: Tensor,
    free_pages: Tensor,
    decisions: Tensor,
    requests: Tensor,
    cached: Tensor,
    counters: Tensor,
    page_size: int,
) -> None:
    """Raises unless these fit B, Hkv, R (`groups`) and are on the device of `like`."""
    rows, heads, ranks = groups
    check_shape(op, "offsets", offsets, "B, Hkv, C + 1", (rows, heads, None))
    check_dtype(op, "offsets", offsets, torch.int32)
    torch._check(
        offsets.shape[2] >= 1, lambda: f"{op}: offsets must hold C + 1 >= 1 entries, got 0"
    )
    clusters = offsets.shape[2] - 1
    check_shape(op, "store", store, "2, B, Hkv, N, D", (2, rows, heads, None, None))
    check_element_dtype(op, "store", store)
    check_head_dim(op, store.shape[4])
    count = check_pages(op, pages, page_size, store)
    check_rows(op, "pages", pages)
    for name, tensor, letters, columns, dtype in (
        (
            "page_table",
            page_table,
            "N / page_size + C",
            store.shape[3] // page_size + clusters,
            torch.int32,
        ),
        ("free_pages", free_pages, "2 + P", len(FreeHeader) + count, torch.int32),
        ("decisions", decisions, "2 + P", len(DecisionHeader) + count, torch.int32),
        ("requests", requests, "3 + R", len(RequestHeader) + ranks, torch.int32),
        ("cached", cached, "C", clusters, torch.uint8),
    ):
        check_shape(op, name, tensor, f"B, Hkv, {letters}", (rows, heads, columns))
        check_dtype(op, name, tensor, dtype)
        check_contiguous(op, name, tensor)
    check_counters(op, counters, rows)
    for name, tensor in (
        ("offsets", offsets),
        ("store", store),
        ("pages", pages),
        ("page_table", page_table),
        ("free_pages", free_pages),
        ("decisions", decisions),
        ("requests", requests),
        ("cached", cached),
        ("counters", counters),
    ):
        check_device(op, name, tensor, like, like_name)


def check_update(
    op: str,
    like: Tensor,
    like_name: str,
    requests: Tensor,
    cached: Tensor,
    history: Tensor,
    decisions: Tensor,
    policy: str,
) -> None:
    """Raises unless these fit each other and are on the device of `like`."""
    check_shape(op, "requests", requests, "B, Hkv, 3 + R", (None, None, None))
    check_dtype(op, "requests", requests, torch.int32)
    check_contiguous(op, "requests", requests)
    rows, heads, columns = requests.shape
    torch._check(
        columns >= len(RequestHeader),
        lambda: f"{op}: requests must hold 3 + R >= 3 columns, got {columns}",
    )
    check_shape(op, "cached", cached, "B, Hkv, C", (rows, heads, None))
    check_dtype(op, "cached", cached, torch.uint8)
    check_contiguous(op, "cached", cached)
    clusters = cached.shape[2]
    check_shape(op, "history", history, "B, Hkv, C + 1, 2", (rows, heads, clusters + 1, 2))
    check_dtype(op, "history", history, torch.int64)
    check_contiguous(op, "history", history)
    check_shape(op, "decisions", decisions, "B, Hkv, 2 + P", (rows, heads, None))
    check_dtype(op, "decisions", decisions, torch.int32)
    check_contiguous(op, "decisions", decisions)
    torch._check(
        decisions.shape[2] >= len(DecisionHeader),
        lambda: f"{op}: decisions must hold 2 + P >= 2 columns, got {decisions.shape[2]}",
    )
    for name, tensor in (
        ("requests", requests),
        ("cached", cached),
        ("history", history),
        ("decisions", decisions),
    ):
        check_device(op, name, tensor, like, like_name)
    torch._check(
        policy in POLICIES,
        lambda: f"{op}: policy must be one of {', '.join(map(repr, POLICIES))}, got '{policy}'",
    )


def check_heads(op: str, query_heads: int, kv_heads: int) -> None:
    """Raises unless query heads divide evenly over KV heads."""
    torch._check(
        kv_heads > 0 and query_heads % kv_heads == 0,
        lambda: (
            f"{op}: query heads must be a multiple of KV heads, got {query_heads} and {kv_heads}"
        ),
    )


def check_index(
    op: str,
    index: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    counters: Tensor,
    like: Tensor,
    like_name: str,
    sizes: tuple[int, int, int],
) -> None:
    """Checks (store, centroids, offsets, variances, totals) for sizes (B, Hkv, D)."""
    store, centroids, offsets, variances, totals = index
    rows, heads, head_dim = sizes
    check_shape(op, "store", store, "2, B, Hkv, N, D", (2, rows, heads, None, head_dim))
    check_dtype(op, "store", store, like.dtype)
    check_rows(op, "store", store)
    check_shape(op, "centroids", centroids, "2, B, Hkv, C, D", (2, rows, heads, None, head_dim))
    check_dtype(op, "centroids", centroids, like.dtype)
    check_rows(op, "centroids", centroids)
    clusters = centroids.shape[3]
    check_shape(op, "offsets", offsets, "B, Hkv, C + 1", (rows, heads, clusters + 1))
    check_dtype(op, "offsets", offsets, torch.int32)
    check_contiguous(op, "offsets", offsets)
    check_shape(op, "variances", variances, "B, Hkv, C", (rows, heads, clusters))
    check_dtype(op, "variances", variances, torch.float32)
    check_contiguous(op, "variances", variances)
    check_shape(op, "totals", totals, "2, B, Hkv, D", (2, rows, heads, head_dim))
    check_dtype(op, "totals", totals, torch.float32)
    check_contiguous(op, "totals", totals)
    check_counters(op, counters, rows)
    for name, tensor in zip(
        ("store", "centroids", "offsets", "variances", "totals", "counters"),
        (*index, counters),
        strict=True,
    ):
        check_device(op, name, tensor, like, like_name)


def check_estimate(
    op: str,
    query: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor],
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
) -> tuple[int, int, int, int]:
    """Checks what chooses clusters by a query; returns B, Hq, Hkv, D.

    Args:
        index: centroids, offsets, variances, totals.
    """
    centroids, offsets, variances, totals = index
    check_shape(op, "query", query, "B, Hq, D", (None, None, None))
    check_element_dtype(op, "query", query)
    rows, query_heads, head_dim = query.shape
    check_head_dim(op, head_dim)
    check_shape(op, "centroids", centroids, "2, B, Hkv, C, D", (2, rows, None, None, head_dim))
    check_dtype(op, "centroids", centroids, query.dtype)
    heads, clusters = centroids.shape[2:4]
    check_heads(op, query_heads, heads)
    check_shape(op, "offsets", offsets, "B, Hkv, C + 1", (rows, heads, clusters + 1))
    check_dtype(op, "offsets", offsets, torch.int32)
    check_shape(op, "variances", variances, "B, Hkv, C", (rows, heads, clusters))
    check_dtype(op, "variances", variances, torch.float32)
    check_shape(op, "totals", totals, "2, B, Hkv, D", (2, rows, heads, head_dim))
    check_dtype(op, "totals", totals, torch.float32)
    check_counters(op, counters, rows)
    for name, tensor in (
        ("centroids", centroids),
        ("offsets", offsets),
        ("variances", variances),
        ("totals", totals),
        ("counters", counters),
    ):
        check_device(op, name, tensor, query, "query")
    check_fraction(op, "retrieval_budget", retrieval_budget)
    check_fraction(op, "estimation_budget", estimation_budget)
    check_not_negative(op, "min_retrieved_clusters", min_retrieved_clusters)
    torch._check(
        estimator in ESTIMATORS,
        lambda: f"{op}: estimator must be 'variance' or 'mean', got '{estimator}'",
    )
    # In a graph for any number of clusters the kernel alone checks, at every call.
    if isinstance(clusters, int) and isinstance(max_retrieved, int):
        needed = retrieved_count(retrieval_budget, min_retrieved_clusters, clusters)
        torch._check(
            max_retrieved >= needed,
            lambda: (
                f"{op}: max_retrieved must be at least {needed} for {clusters} clusters at these "
                f"budgets, got {max_retrieved}"
            ),
        )
    return rows, query_heads, heads, head_dim


def refuse_backward(op: str, differentiable: Sequence[int], arguments: int) -> None:
    """Registers a backward formula that raises when it runs, not when a graph is traced.

    Args:
        op: name of a functional op, without namespace.
        differentiable: positions of the floating-point arguments.
        arguments: number of arguments of the op.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(inputs[position] for position in differentiable))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        # Depends on a gradient, so that a compiler cannot move it into the forward pass.
        grad = next(grad for grad in grads if grad is not None and grad.is_floating_point())
        results: list[Any] = [None] * arguments
        for position, tensor in zip(differentiable, ctx.saved_tensors, strict=True):
            if tensor is not None:  # an optional argument
                results[position] = torch.ops.retro.no_backward(grad, tensor, op)
        return tuple(results)

    torch.library.register_autograd(f"retro::{op}", backward, setup_context=setup_context)


class _NoBackward(torch.autograd.Function):
    """The result of an op that changes an argument, for which torch takes no backward formula."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, argument: Tensor, op: str) -> Tensor:
        ctx.save_for_backward(argument)
        ctx.op = op
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (argument,) = ctx.saved_tensors
        return None, torch.ops.retro.no_backward(grad, argument, ctx.op), None


def without_backward(op: str, result: Tensor, argument: Tensor) -> Tensor:
    """`result`, such that a backward pass from it to `argument` raises when it runs."""
    if not (torch.is_grad_enabled() and argument.requires_grad):
        return result
    refusing: Tensor = _NoBackward.apply(result.detach(), argument, op)
    return refusing


@torch.library.register_fake("retro::no_backward")
def _(grad: Tensor, argument: Tensor, op: str) -> Tensor:
    return torch.empty_like(argument)
