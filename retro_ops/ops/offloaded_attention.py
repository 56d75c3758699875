"""The offloaded decode step behind its appended token as one op: four launches on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract

OP = "offloaded_attention"


def offloaded_attention(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    pages: Tensor,
    page_table: Tensor,
    free_pages: Tensor,
    requests: Tensor,
    cached: Tensor,
    history: Tensor,
    decisions: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
    page_size: int,
    policy: str,
    join: bool,
) -> Tensor:
    """`decode_attention`, offloaded: the same, bit for bit, as four ops one after the other.

        retrieved, estimate, lse = wave_estimate(query, index, ...)
        addresses = page_gather(retrieved, offsets, store, pages, ..., counters, page_size)
        out, _ = merged_attention(..., estimate, lse, scale, pages, page_table, page_size)
        update_pages(requests, cached, history, decisions, policy)

    On CUDA the attention itself copies the pages that come in, from what it reads of the store, so
    that each byte crosses the bus once; and `update_pages` is posted to the worker pool as soon as
    the gather is done.

    Source: RetroInfer (arXiv 2505.02922), sections 4.1 to 4.3.

    Args:
        query: `[B, Hq, D]`, float32, bfloat16 or float16, any strides.
        steady: `[2, B, Hkv, S, D]`, query's dtype, as in `merged_attention`.
        store: `[2, B, Hkv, N, D]`, query's dtype.
        centroids, offsets, variances, totals: the wave index, as in `pack_clusters`.
        pages, page_table, free_pages, requests, cached: as in `page_gather`.
        history, decisions: as in `update_pages`.
        counters: `[B, len(Counter)]` int64.
        max_retrieved, retrieval_budget, min_retrieved_clusters: as in `wave_estimate`.
        estimation_budget, estimator, scale: as in `wave_estimate`.
        page_size: tokens per page.
        policy: as in `update_pages`.
        join: this is the last such op of a CUDA graph that is being captured: see `update_pages`.

    On CUDA `requests`, `cached`, `history` and `decisions` must be host tensors
    (`torch.ops.retro.host_tensor`).

    Returns:
        `[B, Hq, D]` in query's dtype; 0 where there is nothing to attend to.

    Mutates: what the four ops mutate; `history` and `decisions` on CUDA some time later.

    Raises:
        RuntimeError: a shape, dtype or number is wrong; the message has the values.

    A CUDA graph can capture it. Has no backward pass.
    """
    out = torch.ops.retro.offloaded_attention(
        query,
        steady,
        store,
        centroids,
        offsets,
        variances,
        totals,
        pages,
        page_table,
        free_pages,
        requests,
        cached,
        history,
        decisions,
        counters,
        max_retrieved,
        retrieval_budget,
        min_retrieved_clusters,
        estimation_budget,
        estimator,
        scale,
        page_size,
        policy,
        join,
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
    pages: Tensor,
    page_table: Tensor,
    free_pages: Tensor,
    requests: Tensor,
    cached: Tensor,
    history: Tensor,
    decisions: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
    page_size: int,
    policy: str,
    join: bool,
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
    contract.check_page_cache(
        OP,
        query,
        "query",
        (rows, heads, max_retrieved),
        offsets,
        store,
        pages,
        page_table,
        free_pages,
        decisions,
        requests,
        cached,
        counters,
        page_size,
    )
    contract.check_update(OP, query, "query", requests, cached, history, decisions, policy)
    return query.new_empty((rows, query_heads, head_dim))
