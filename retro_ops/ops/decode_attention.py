"""The decode step behind its appended token as one op: three launches on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract

OP = "decode_attention"


def decode_attention(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
) -> Tensor:
    """Attends to everything a row holds: the same, bit for bit, as three ops one after the other.

        retrieved, estimate, lse = wave_estimate(query, index, ...)
        addresses = cluster_gather(retrieved, offsets, counters)
        out, _ = merged_attention(query, steady, store, addresses, counters, estimate, lse, scale)

    Source: RetroInfer (arXiv 2505.02922), sections 4.1 to 4.3.

    Args:
        query: `[B, Hq, D]`, float32, bfloat16 or float16, any strides.
        steady: `[2, B, Hkv, S, D]`, query's dtype, as in `merged_attention`.
        store: `[2, B, Hkv, N, D]`, query's dtype.
        centroids, offsets, variances, totals: the wave index, as in `pack_clusters`.
        counters: `[B, len(Counter)]` int64.
        max_retrieved, retrieval_budget, min_retrieved_clusters: as in `wave_estimate`.
        estimation_budget, estimator, scale: as in `wave_estimate`.

    Returns:
        `[B, Hq, D]` in query's dtype; 0 where there is nothing to attend to.

    Mutates: `counters` (steps, retrieved tokens).

    Raises:
        RuntimeError: a shape, dtype or number is wrong; the message has the values.

    A CUDA graph can capture it. Has no backward pass.
    """
    out = torch.ops.retro.decode_attention(
        query,
        steady,
        store,
        centroids,
        offsets,
        variances,
        totals,
        counters,
        max_retrieved,
        retrieval_budget,
        min_retrieved_clusters,
        estimation_budget,
        estimator,
        scale,
    )
    return contract.without_backward(OP, out, query)


@torch.library.register_fake(f"retro::{OP}")
def _(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
) -> Tensor:
    rows, query_heads, heads, head_dim = contract.check_estimate(
        OP,
        query,
        (centroids, offsets, variances, totals),
        counters,
        max_retrieved,
        retrieval_budget,
        min_retrieved_clusters,
        estimation_budget,
        estimator,
    )
    for name, tensor, letters in (("steady", steady, "S"), ("store", store, "N")):
        contract.check_shape(
            OP, name, tensor, f"2, B, Hkv, {letters}, D", (2, rows, heads, None, head_dim)
        )
        contract.check_dtype(OP, name, tensor, query.dtype)
        contract.check_device(OP, name, tensor, query, "query")
    return query.new_empty((rows, query_heads, head_dim))
