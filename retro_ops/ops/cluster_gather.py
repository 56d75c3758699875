"""Where the tokens of the retrieved clusters lie."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import Counter

OP = "cluster_gather"


def cluster_gather(retrieved: Tensor, offsets: Tensor, counters: Tensor) -> Tensor:
    """Addresses of the retrieved clusters in the KV store; the tokens stay where they are.

        addresses_r = (offsets_c, offsets_c+1 - offsets_c)   with c = retrieved_r; (0, 0) for c = -1

    Source: RetroInfer (arXiv 2505.02922), section 4.3; departs in that attention reads the clusters
    in place: gathering them first would move every byte twice.

    Args:
        retrieved: `[B, Hkv, R]` int32 cluster ids; -1: none.
        offsets: `[B, Hkv, C + 1]` int32: first slot of each cluster in the store.
        counters: `[B, len(Counter)]` int64.

    Returns:
        `[B, Hkv, R, 2]` int64: first slot and number of tokens.

    Mutates: `counters` (steps, retrieved tokens).

    Raises:
        RuntimeError: a shape, dtype or cluster id is wrong; the message has the values.
    """
    return torch.ops.retro.cluster_gather(retrieved, offsets, counters)


def reference(retrieved: Tensor, offsets: Tensor, counters: Tensor) -> Tensor:
    """`cluster_gather` in plain torch."""
    clusters = retrieved.long().clamp(min=0)
    chosen = retrieved >= 0
    if offsets.shape[2] == 1:  # an index without clusters
        addresses = torch.zeros(*retrieved.shape, 2, dtype=torch.int64, device=retrieved.device)
    else:
        first = offsets.long().gather(2, clusters)
        tokens = offsets.long().gather(2, clusters + 1) - first
        addresses = torch.stack((first, tokens), dim=-1) * chosen[..., None]
    counters[:, Counter.RETRIEVED_TOKENS] += addresses[..., 1].sum(dim=(1, 2))
    counters[:, Counter.STEPS] += 1
    return addresses


@torch.library.register_fake(f"retro::{OP}")
def _(retrieved: Tensor, offsets: Tensor, counters: Tensor) -> Tensor:
    contract.check_shape(OP, "retrieved", retrieved, "B, Hkv, R", (None, None, None))
    contract.check_dtype(OP, "retrieved", retrieved, torch.int32)
    rows, heads, clusters = retrieved.shape
    contract.check_shape(OP, "offsets", offsets, "B, Hkv, C + 1", (rows, heads, None))
    contract.check_dtype(OP, "offsets", offsets, torch.int32)
    contract.check_device(OP, "offsets", offsets, retrieved, "retrieved")
    torch._check(
        offsets.shape[2] >= 1, lambda: f"{OP}: offsets must hold C + 1 >= 1 entries, got 0"
    )
    contract.check_counters(OP, counters, rows)
    contract.check_device(OP, "counters", counters, retrieved, "retrieved")
    return retrieved.new_empty((rows, heads, clusters, 2), dtype=torch.int64)
