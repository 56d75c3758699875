"""The CPU op of the wave buffer: which clusters may leave the page cache."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import POLICIES as POLICIES  # the names, for whoever uses the op
from retro_ops.ops._contract import DecisionHeader

OP = "update_pages"
DEFAULT_POLICY = "lfu"
# As in csrc/update_pages_cpu.h.
STAMP_RANKS = 4096
USE = 256
AGING_STEPS = 64
RESERVE = 4
MISS_MEMORY = 8


def update_pages(
    requests: Tensor,
    cached: Tensor,
    history: Tensor,
    decisions: Tensor,
    policy: str,
    join: bool = True,
) -> None:
    """Lists the clusters that may leave the page cache, the one least likely to be missed first.

    For each row and KV head, after gather number s has reported what it retrieved:

        stamp_c = (s, -rank), for what s retrieved: when it was last used, and how good it was then
        uses_c  = uses_c / 2^halvings + 1, a halving every 64 steps
        order   = by stamp ("lru"), by the stamp before the last one ("lru2"; never is earliest), or
                  by uses ("lfu"); the earlier stamp, then the lower id go first among equals
        most    = max(pages missed, 7/8 most), the pages missed by the worst step lately
        list    = the shortest beginning of the cached clusters in this order that has, with the
                  free pages, 4 most pages

    `page_gather` takes as many from the list as it needs. So a list too long costs only the time to
    make it, and one that comes late, twice or never costs hits, but changes no result.

    Source: RetroInfer (arXiv 2505.02922), section 4.3, which has LRU; departs in that misses are
    admitted by the gather, and that the policy counts uses.

    Args:
        requests: `[B, Hkv, 3 + R]` int32, of `page_gather`: number of the gather, pages it left
            free, pages that were missed, cluster ids by rank (-1: none).
        cached: `[B, Hkv, C]` uint8, of `page_gather`: pages of each cluster in the cache.
        history: `[B, Hkv, C + 1, 2]` int64: stamp and uses (or the stamp before) of each cluster;
            in the last row the number of the last gather seen, and `most`. Zeros at first.
        decisions: `[B, Hkv, 2 + P]` int32: number of the gather, number of clusters, these
            clusters.
        policy: "lru", "lru2" or "lfu".
        join: this is the last such op, on its device, of a CUDA graph that is being captured.

    Mutates: `history`, `decisions`; neither, where the gather has been seen before.

    Raises:
        RuntimeError: a shape, dtype or name is wrong; the message has the values.

    Runs at once on CPU tensors, all rows and heads in parallel. CUDA tensors must be host tensors
    (`torch.ops.retro.host_tensor`): a stream beside the current one has the worker pool run it, and
    nothing waits for it. A CUDA graph can capture it, if its last one takes that stream back in
    (`join`).
    """
    torch.ops.retro.update_pages(requests, cached, history, decisions, policy, join)


def reference(
    requests: Tensor, cached: Tensor, history: Tensor, decisions: Tensor, policy: str
) -> None:
    """`update_pages` in plain torch, one row and head after the other."""
    rows, heads, clusters = cached.shape
    limit = decisions.shape[2] - len(DecisionHeader)
    for row in range(rows):
        for head in range(heads):
            step, free, missed, *ids = requests[row, head].tolist()
            past = history[row, head]
            seen, most = past[clusters].tolist()
            if step <= 0 or step == seen:
                continue

            def aged(cluster: int, past: Tensor = past, step: int = step) -> int:
                stamp, uses = past[cluster].tolist()
                halvings = step // AGING_STEPS - stamp // STAMP_RANKS // AGING_STEPS
                return uses >> min(max(halvings, 0), 62)

            for rank, cluster in enumerate(ids):
                if not 0 <= cluster < clusters:
                    continue
                if policy == "lru2":
                    past[cluster, 1] = past[cluster, 0]
                elif policy == "lfu":
                    past[cluster, 1] = aged(cluster) + USE
                past[cluster, 0] = step * STAMP_RANKS + STAMP_RANKS - 1 - min(rank, STAMP_RANKS - 1)
            most = max(missed, most - -(-most // MISS_MEMORY))
            past[clusters] = torch.tensor([step, most])

            def key(cluster: int, past: Tensor = past) -> tuple[int, int, int]:
                stamp, before = past[cluster].tolist()
                major = {"lru": 0, "lru2": before, "lfu": aged(cluster)}[policy]
                return major, stamp, cluster

            held = cached[row, head].tolist()
            listed: list[int] = []
            wanted = RESERVE * most - free
            for cluster in sorted(filter(held.__getitem__, range(clusters)), key=key):
                if wanted <= 0 or len(listed) == limit:
                    break
                listed.append(cluster)
                wanted -= held[cluster]
            decisions[row, head, DecisionHeader.STEP] = step
            decisions[row, head, DecisionHeader.COUNT] = len(listed)
            decisions[row, head, 2 : 2 + len(listed)] = torch.tensor(listed, dtype=torch.int32)


@torch.library.register_fake(f"retro::{OP}")
def _(
    requests: Tensor,
    cached: Tensor,
    history: Tensor,
    decisions: Tensor,
    policy: str,
    join: bool = True,
) -> None:
    contract.check_update(OP, requests, "requests", requests, cached, history, decisions, policy)


@torch.library.register_fake(f"retro::post_{OP}")
def _(requests: Tensor, cached: Tensor, history: Tensor, decisions: Tensor, policy: str) -> None:
    contract.check_update(OP, requests, "requests", requests, cached, history, decisions, policy)


@torch.library.register_fake("retro::update_counts")
def _(history: Tensor) -> list[int]:
    return [0, 0, 0]


@torch.library.register_fake("retro::host_tensor")
def _(like: Tensor, size: list[int]) -> Tensor:
    return like.new_zeros(size)


@torch.library.register_fake("retro::host_bytes")
def _(like: Tensor) -> int:
    return 0
