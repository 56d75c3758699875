"""Tokens that have gathered in the steady zone become clusters of the index."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract

OP = "grow_index"


def grow_index(
    steady: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    sink_tokens: int,
    local_tokens: int,
    update_segment: int,
    cluster_size: int,
    iterations: int,
    merged_updates: int = 1,
    merge_iterations: int = 1,
) -> None:
    """Indexes the oldest `update_segment` tokens behind the sinks of every row that has that many.

    A row with at least sink_tokens + local_tokens + update_segment steady tokens gives up those
    after the sinks: they are clustered as one segment and packed behind what the index holds,
    exactly as `cluster_keys` and `pack_clusters` would; later steady tokens move up. That repeats
    while the row has as many. Other rows are untouched. Only `counters` decide, so the op may stand
    in every step of a compiled graph.

    Once `merged_updates` segments in a row have come that way, and nothing else between them, they
    are clustered anew, as one: the means of their clusters are the first centroids,
    `merge_iterations` passes follow, and the same slots and cluster ids hold the result. Until
    then `counters` count their tokens as open, which `page_gather` keeps out of the page cache.

    Source: RetroInfer (arXiv 2505.02922), section 4.2 (index update).

    Args:
        steady: `[2, B, Hkv, S, D]`, float32, bfloat16 or float16: keys, then values.
        store, centroids, offsets, variances, totals, counters: as in `pack_clusters`.
        sink_tokens: first tokens of a row that stay, at least 0.
        local_tokens: latest tokens of a row that stay, at least 0.
        update_segment: tokens that are indexed at once, at least `cluster_size`.
        cluster_size: tokens per cluster on average, at least 1.
        iterations: passes of k-means, at least 1.
        merged_updates: segments that become one; 1: none. No effect where the store has not so
            many.
        merge_iterations: passes of k-means over them, at least 1.

    Mutates: all seven tensors.

    Raises:
        RuntimeError: a shape, dtype or number is wrong, or the store or index is full; nothing is
            written then.
    """
    torch.ops.retro.grow_index(
        steady,
        store,
        centroids,
        offsets,
        variances,
        totals,
        counters,
        sink_tokens,
        local_tokens,
        update_segment,
        cluster_size,
        iterations,
        merged_updates,
        merge_iterations,
    )


@torch.library.register_fake(f"retro::{OP}")
def _(
    steady: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    sink_tokens: int,
    local_tokens: int,
    update_segment: int,
    cluster_size: int,
    iterations: int,
    merged_updates: int = 1,
    merge_iterations: int = 1,
) -> None:
    contract.check_shape(OP, "steady", steady, "2, B, Hkv, S, D", (2, None, None, None, None))
    contract.check_element_dtype(OP, "steady", steady)
    _, rows, heads, _, head_dim = steady.shape
    contract.check_head_dim(OP, head_dim)
    contract.check_index(
        OP,
        (store, centroids, offsets, variances, totals),
        counters,
        steady,
        "steady",
        (rows, heads, head_dim),
    )
    contract.check_rows(OP, "steady", steady)
    contract.check_not_negative(OP, "sink_tokens", sink_tokens)
    contract.check_not_negative(OP, "local_tokens", local_tokens)
    contract.check_clustering(OP, cluster_size, "update_segment", update_segment, iterations)
    contract.check_at_least(OP, "merged_updates", merged_updates, 1)
    contract.check_at_least(OP, "merge_iterations", merge_iterations, 1)
