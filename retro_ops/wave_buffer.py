"""The wave buffer of an offloaded layer: a page cache in fast memory in front of the KV store.

Each tensor has one writer: `page_gather` writes what it looks up and what it reports,
`update_pages` its memory and its decisions. Neither waits for the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retro_ops.config import RetroConfig
from retro_ops.ops._contract import DecisionHeader, FreeHeader, RequestHeader

if TYPE_CHECKING:
    from retro_ops.layer import RetroLayer

NAMES = ("pages", "page_table", "free_pages", "decisions", "requests", "cached", "history")
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def page_capacity(config: RetroConfig, tokens: int) -> int:
    """Pages of the cache of one row and KV head, for a store of `tokens` tokens."""
    return math.ceil(config.cache_ratio * tokens / config.page_size)


def shapes(
    config: RetroConfig,
    groups: tuple[int, int],
    tokens: int,
    clusters: int,
    max_retrieved: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Shapes:
    """The buffers of `NAMES`.

    Args:
        groups: B, Hkv.
        tokens, clusters: N and C, what the index can hold.
        max_retrieved: R.
        head_dim, dtype: of keys and values.
    """
    count = page_capacity(config, tokens)
    return {
        "pages": ((2, *groups, count * config.page_size, head_dim), dtype),
        "page_table": ((*groups, tokens // config.page_size + clusters), torch.int32),
        "free_pages": ((*groups, len(FreeHeader) + count), torch.int32),
        "decisions": ((*groups, len(DecisionHeader) + count), torch.int32),
        "requests": ((*groups, len(RequestHeader) + max_retrieved), torch.int32),
        "cached": ((*groups, clusters), torch.uint8),
        "history": ((*groups, clusters + 1, 2), torch.int64),
    }


def clear(layer: RetroLayer) -> None:
    """Empties the page cache and forgets what was retrieved when."""
    clear_buffers({name: layer.get_buffer(name) for name in NAMES})


def clear_buffers(buffers: Mapping[str, Tensor]) -> None:
    """`clear`, of the buffers of `NAMES`."""
    buffers["page_table"].fill_(-1)
    for name in ("decisions", "requests", "cached", "history"):
        buffers[name].zero_()
    free = buffers["free_pages"]
    count = free.shape[2] - len(FreeHeader)
    free[:, :, FreeHeader.STEP] = 0
    free[:, :, FreeHeader.COUNT] = count
    free[:, :, len(FreeHeader) :] = torch.arange(count, dtype=torch.int32, device=free.device)
