"""One decode step: the data flow of the package, one line an op."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retro_ops import wave_index
from retro_ops.ops import (
    append_tokens,
    cluster_gather,
    decode_attention,
    merged_attention,
    offloaded_attention,
    page_gather,
    update_pages,
    wave_estimate,
)

if TYPE_CHECKING:
    from retro_ops.layer import RetroLayer


def decode_step(
    layer: RetroLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Appends one token per row, attends to the whole context, and indexes what is full.

    The index grows last: the token that fills a segment still attends to it as it is, and on a GPU
    the scores of clusters do not wait for `grow_index`, which as a rule finds nothing to do. It
    also grows where attention fails or is interrupted: else the next step might find no room for
    its token.

    Args:
        layer: the state; changed in place.
        query: `[B, Hq, D]`.
        keys, values: `[B, Hkv, 1, D]`.
        scale: factor on q . k.
        sinks: `[Hq]`, logits of one more token of value zero; None: none.

    Returns:
        `[B, Hq, D]` in query's dtype.
    """
    try:
        append_tokens(keys, values, None, layer.steady, layer.counters, layer.max_length)
        return _attend(layer, query, scale, sinks)
    finally:
        wave_index.grow(layer)


def _attend(layer: RetroLayer, query: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """Attention of `[B, Hq, D]` queries to the whole context, with the ops of where it lies."""
    config, index = layer.config, layer.index
    if query.is_cuda and layer.offload and sinks is None:  # the rest in one op, the same bits
        return offloaded_attention(
            query,
            layer.steady,
            layer.store,
            *index,
            layer.pages,
            layer.page_table,
            layer.free_pages,
            layer.requests,
            layer.cached,
            layer.history,
            layer.decisions,
            layer.counters,
            layer.max_retrieved,
            config.retrieval_budget,
            config.min_retrieved_clusters,
            config.estimation_budget,
            config.estimator,
            scale,
            config.page_size,
            layer.policy,
            layer.joins,
        )
    if query.is_cuda and not layer.offload and sinks is None:
        return decode_attention(
            query,
            layer.steady,
            layer.store,
            *index,
            layer.counters,
            layer.max_retrieved,
            config.retrieval_budget,
            config.min_retrieved_clusters,
            config.estimation_budget,
            config.estimator,
            scale,
        )
    retrieved, estimate, estimate_lse = wave_estimate(
        query,
        *index,
        layer.counters,
        layer.max_retrieved,
        config.retrieval_budget,
        config.min_retrieved_clusters,
        config.estimation_budget,
        config.estimator,
        scale,
    )
    if sinks is not None:
        estimate, estimate_lse = _with_sinks(estimate, estimate_lse, sinks)
    if layer.offload:
        addresses = page_gather(
            retrieved,
            layer.offsets,
            layer.store,
            layer.pages,
            layer.page_table,
            layer.free_pages,
            layer.decisions,
            layer.requests,
            layer.cached,
            layer.counters,
            config.page_size,
        )
        out, _ = merged_attention(
            query,
            layer.steady,
            layer.store,
            addresses,
            layer.counters,
            estimate,
            estimate_lse,
            scale,
            layer.pages,
            layer.page_table,
            config.page_size,
        )
        updated = (layer.requests, layer.cached, layer.history, layer.decisions)
        update_pages(*updated, layer.policy, layer.joins)
        return out
    addresses = cluster_gather(retrieved, layer.offsets, layer.counters)
    out, _ = merged_attention(
        query,
        layer.steady,
        layer.store,
        addresses,
        layer.counters,
        estimate,
        estimate_lse,
        scale,
    )
    return out


def _with_sinks(estimate: Tensor, estimate_lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Merges a token of value zero and given logit into the estimate, exactly.

        lse' = log(exp(lse) + exp(sink))
        estimate' = exp(lse - lse') estimate

    In float32, before the working set is merged, so that the result is rounded once.
    """
    sinks = sinks.float().clamp(min=torch.finfo(torch.float32).min)  # -inf minus -inf is no number
    estimate = estimate * torch.sigmoid(estimate_lse - sinks)[..., None]
    return estimate, torch.logaddexp(estimate_lse, sinks)
