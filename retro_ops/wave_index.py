"""The wave index of a layer: which tokens of a prompt it holds, and how it is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retro_ops import wave_buffer
from retro_ops.config import RetroConfig
from retro_ops.ops import append_tokens, cluster_keys, grow_index, pack_clusters
from retro_ops.ops._contract import cluster_count

if TYPE_CHECKING:
    from retro_ops.layer import RetroLayer

MERGE_ITERATIONS = 3
"""Passes of k-means over segments that become one. It begins with their clusters: more passes gain
little (docs/accuracy.md)."""


def indexed_capacity(config: RetroConfig, max_length: int) -> tuple[int, int]:
    """Tokens and clusters that the index of a row of `max_length` tokens can come to hold."""
    if max_length < config.steady_capacity:
        return 0, 0
    tokens = max_length - config.sink_tokens - config.local_tokens
    return tokens, cluster_count(tokens, config.cluster_size)


def indexed_spans(config: RetroConfig, starts: Tensor, tokens: int, multiple: int = 1) -> Tensor:
    """The span of each row's tokens that a prompt of `tokens` tokens puts into the index.

    All but the sinks and the local tokens are indexed, if that is `update_segment` tokens or more;
    otherwise none.

    Args:
        starts: `[B]` int64, first token of each row.
        tokens: length of the padded prompt.
        multiple: of which the indexed tokens are to be one; the latest others stay.

    Returns:
        `[B, 2]` int64: first token and the one after the last; an empty span is (0, 0).
    """
    first = starts + config.sink_tokens
    length = tokens - config.local_tokens - first
    span = torch.stack((first, first + length // multiple * multiple), dim=1)
    return span * (length >= config.update_segment)[:, None]


def build(
    layer: RetroLayer,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    multiple: int = 1,
    *,
    first: bool = False,
) -> None:
    """Clusters of a prompt go behind what the index holds, the rest into the empty steady zone.

    The store of an offloaded layer whose index is empty is written while what comes next computes,
    until `wave_buffer.finish_writes`.

    Args:
        layer: changed in place.
        keys, values: `[B, Hkv, T, D]`.
        starts: `[B]` int64, first token of each row.
        multiple: as in `indexed_spans`. Only the first clusters of a row may be of any number of
            tokens: their number is rounded, and the index has room for one rounding.
        first: the index is empty.
    """
    config, tokens = layer.config, keys.shape[2]
    spans = indexed_spans(config, starts, tokens, multiple)
    position = torch.arange(tokens, device=keys.device)
    indexed = (position >= spans[:, :1]) & (position < spans[:, 1:])
    # A shorter prompt has nothing to index in any row; a compiled one serves prompts of any length.
    if layer.store.shape[3] and (torch.compiler.is_compiling() or tokens >= config.steady_capacity):
        assignment = cluster_keys(
            keys, spans, config.cluster_size, config.segment_size, config.kmeans_iterations
        )
        staged = first and wave_buffer.stages(layer)
        most = tokens - config.sink_tokens - config.local_tokens
        store = wave_buffer.stage(layer.store, most) if staged else layer.store
        pack_clusters(
            keys, values, assignment, store, *layer.index, layer.counters, config.cluster_size
        )
        if staged:
            wave_buffer.write(layer.store)
    steady = ~indexed & (position >= starts[:, None])
    append_tokens(keys, values, steady, layer.steady, layer.counters, layer.max_length)


def grow(layer: RetroLayer) -> None:
    """Clusters full segments of the steady zone, if there are any; see `grow_index`."""
    config = layer.config
    grow_index(
        layer.steady,
        layer.store,
        *layer.index,
        layer.counters,
        config.sink_tokens,
        config.local_tokens + layer.growth_delay,
        config.update_segment,
        config.cluster_size,
        config.kmeans_iterations,
        config.merged_updates,
        MERGE_ITERATIONS,
    )
