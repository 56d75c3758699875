"""Clustered tokens go into the KV store, cluster after cluster; the wave index describes them."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import Counter

OP = "pack_clusters"


def pack_clusters(
    keys: Tensor,
    values: Tensor,
    assignment: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    cluster_size: int,
) -> None:
    """Packs assigned tokens behind what the index of their row already holds.

    With S_i the tokens of cluster i, in their order:

        offsets_i+1 = offsets_i + |S_i|        store[offsets_i : offsets_i+1] = keys, values of S_i
        centroids_i = mean of keys, mean of values       variances_i = mean of |key - mean key|^2
        totals_0d += sum over tokens of (key_d - mean key_d)^2    totals_1d += sum of value_d

    Source: RetroInfer (arXiv 2505.02922), sections 4.2 and 4.3; departs in that mean values take
    the place of value sums (which overflow in float16), and in the variances and totals, which
    correct the estimate.

    Args:
        keys: `[B, Hkv, T, D]`, float32, bfloat16 or float16, any strides.
        values: like `keys`.
        assignment: `[B, Hkv, T]` int32 cluster of each token, from 0; -1: leave the token out. All
            heads of a row must leave out as many.
        store: `[2, B, Hkv, N, D]`, keys' dtype: keys, then values, in cluster order.
        centroids: `[2, B, Hkv, C, D]`, keys' dtype: mean keys, then mean values.
        offsets: `[B, Hkv, C + 1]` int32: first slot of each cluster in the store.
        variances: `[B, Hkv, C]` float32.
        totals: `[2, B, Hkv, D]` float32: over all indexed tokens, the sums of the squared distances
            of keys to their mean key, then those of values.
        counters: `[B, len(Counter)]` int64.
        cluster_size: tokens per cluster on average; n packed tokens become round(n / cluster_size)
            clusters, halves up, at least one.

    Mutates: `store`, `centroids`, `offsets`, `variances`, `totals`, `counters`.

    Raises:
        RuntimeError: a shape, dtype or assignment is wrong, or the store or index is full; nothing
            is written then.
    """
    torch.ops.retro.pack_clusters(
        keys,
        values,
        assignment,
        store,
        centroids,
        offsets,
        variances,
        totals,
        counters,
        cluster_size,
    )


def reference(
    keys: Tensor,
    values: Tensor,
    assignment: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    cluster_size: int,
) -> None:
    """`pack_clusters` in plain torch; sums in float64 for a float64 index, else in float32."""
    wide = variances.dtype
    rows, heads = keys.shape[:2]
    for row in range(rows):
        packed = int((assignment[row, 0] >= 0).sum())
        clusters = contract.cluster_count(packed, cluster_size)
        first_slot = int(counters[row, Counter.INDEXED_TOKENS])
        first_cluster = int(counters[row, Counter.CLUSTERS])
        for head in range(heads):
            slot = first_slot
            offsets[row, head, first_cluster] = slot
            for cluster in range(clusters):
                members = (assignment[row, head] == cluster).nonzero().squeeze(1)
                own_keys, own_values = keys[row, head, members], values[row, head, members]
                count, to = len(members), first_cluster + cluster
                store[0, row, head, slot : slot + count] = own_keys
                store[1, row, head, slot : slot + count] = own_values
                slot += count
                offsets[row, head, to + 1] = slot
                mean_key = own_keys.to(wide).sum(dim=0) / max(count, 1)
                squares = (own_keys.to(wide) - mean_key).square().sum(dim=0)
                centroids[0, row, head, to] = mean_key
                centroids[1, row, head, to] = own_values.to(wide).sum(dim=0) / max(count, 1)
                variances[row, head, to] = squares.sum() / max(count, 1)
                totals[0, row, head] += squares
                totals[1, row, head] += own_values.to(wide).sum(dim=0)
        counters[row, Counter.INDEXED_TOKENS] += packed
        counters[row, Counter.CLUSTERS] += clusters
        if packed > 0:
            counters[row, Counter.OPEN_TOKENS] = 0


@torch.library.register_fake(f"retro::{OP}")
def _(
    keys: Tensor,
    values: Tensor,
    assignment: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    cluster_size: int,
) -> None:
    contract.check_shape(OP, "keys", keys, "B, Hkv, T, D", (None, None, None, None))
    contract.check_element_dtype(OP, "keys", keys)
    rows, heads, tokens, head_dim = keys.shape
    contract.check_head_dim(OP, head_dim)
    contract.check_shape(OP, "values", values, "B, Hkv, T, D", (rows, heads, tokens, head_dim))
    contract.check_dtype(OP, "values", values, keys.dtype)
    contract.check_device(OP, "values", values, keys, "keys")
    contract.check_shape(OP, "assignment", assignment, "B, Hkv, T", (rows, heads, tokens))
    contract.check_dtype(OP, "assignment", assignment, torch.int32)
    contract.check_device(OP, "assignment", assignment, keys, "keys")
    contract.check_index(
        OP,
        (store, centroids, offsets, variances, totals),
        counters,
        keys,
        "keys",
        (rows, heads, head_dim),
    )
    contract.check_at_least(OP, "cluster_size", cluster_size, 1, " token")
