"""cluster_gather, offloaded: the retrieved clusters in the page cache, and those that come in."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import Counter, DecisionHeader, FreeHeader, RequestHeader

OP = "page_gather"
MOST_PAGES_COUNTED = 255


def page_gather(
    retrieved: Tensor,
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
) -> Tensor:
    """Addresses of the retrieved clusters; brings in those that the page cache has room for.

    A cluster c of n_c tokens has ceil(n_c / page_size) pages, the last one partly filled; the page
    of its token j is at

        entry_c + floor(j / page_size)   with entry_c = floor(offsets_c / page_size) + c

    of the page table; -1: it is read from the store, where every token stays. For each row and KV
    head, with m_r the pages that cluster c = retrieved_r lacks:

        1. look up: every m_r; then m_r = 0 for a cluster of more pages than the cache has
        2. evict, while sum_r m_r exceeds the free pages: the clusters of `decisions`, in their
           order, but for those that this step retrieves
        3. admit rank r if m_0 + ... + m_r do not exceed the free pages: pages taken from the end of
           the free list, rows copied, table set

    All changes of the page table happen here. `decisions` may be late, old or of any content: it
    changes what is read from where, not a bit of what is read.

    Source: RetroInfer (arXiv 2505.02922), section 4.3; departs in that misses are admitted at once,
    by the gather, and that clusters leave only when their room is needed.

    Args:
        retrieved: `[B, Hkv, R]` int32 cluster ids, each at most once in a row and head; -1: none.
        offsets: `[B, Hkv, C + 1]` int32: first slot of each cluster in the store.
        store: `[2, B, Hkv, N, D]`, float32, bfloat16 or float16: the slow tier.
        pages: `[2, B, Hkv, P * page_size, D]`, store's dtype: the fast tier.
        page_table: `[B, Hkv, N / page_size + C]` int32.
        free_pages: `[B, Hkv, 2 + P]` int32: gathers so far, number of free pages, these pages.
        decisions: `[B, Hkv, 2 + P]` int32, of `update_pages`: number of the gather it knew of,
            number of clusters, these clusters.
        requests: `[B, Hkv, 3 + R]` int32, for `update_pages`: number of this gather, pages it left
            free, pages that were missed, `retrieved`.
        cached: `[B, Hkv, C]` uint8, for `update_pages`: pages of each cluster in the cache, 255 for
            that many or more.
        counters: `[B, len(Counter)]` int64.
        page_size: tokens per page.

    Returns:
        `[B, Hkv, R, 3]` int64: first slot, number of tokens, first entry of the page table.

    Mutates: `pages`, `page_table`, `free_pages`, `requests`, `cached`, `counters` (steps, retrieved
    tokens, page hits and misses, missed tokens, admissions, evictions, late decisions).

    Raises:
        RuntimeError: a shape, dtype or value is wrong; the message has the values. On CUDA only
            shapes and dtypes are looked at: wrong ids name no cluster, and none may stand twice.
    """
    return torch.ops.retro.page_gather(
        retrieved,
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


def reference(
    retrieved: Tensor,
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
) -> Tensor:
    """`page_gather` in plain torch, one row and head after the other."""
    rows, heads, ranks = retrieved.shape
    clusters, count = cached.shape[2], pages.shape[3] // page_size
    addresses = torch.zeros(rows, heads, ranks, 3, dtype=torch.int64, device=retrieved.device)
    for row in range(rows):
        for head in range(heads):
            begin = offsets[row, head].tolist()
            ids = retrieved[row, head].tolist()
            table = page_table[row, head]
            header = free_pages[row, head, :2]
            free = free_pages[row, head, 2 : 2 + int(header[FreeHeader.COUNT])].tolist()
            tally = counters[row]

            def entries(cluster: int, begin: list[int] = begin) -> slice:
                first = begin[cluster] // page_size + cluster
                return slice(first, first - (begin[cluster] - begin[cluster + 1]) // page_size)

            missing = [0] * ranks
            for rank, cluster in enumerate(ids):
                if cluster < 0:
                    continue
                tokens = begin[cluster + 1] - begin[cluster]
                addresses[row, head, rank, 0] = begin[cluster]
                addresses[row, head, rank, 1] = tokens
                addresses[row, head, rank, 2] = entries(cluster).start
                absent = table[entries(cluster)] < 0
                missing[rank] = int(absent.sum())
                tally[Counter.RETRIEVED_TOKENS] += tokens
                tally[Counter.PAGE_HITS] += len(absent) - missing[rank]
                tally[Counter.PAGE_MISSES] += missing[rank]
                missed = absent.repeat_interleave(page_size)[:tokens]
                tally[Counter.MISSED_TOKENS] += missed.sum()
            all_missing = sum(missing)
            # A cluster that does not fit, or that grow_index will make anew, stays out.
            open_tokens = int(tally[Counter.OPEN_TOKENS])
            lasting = int(tally[Counter.INDEXED_TOKENS]) - open_tokens
            for rank, cluster in enumerate(ids):
                too_large = cluster >= 0 and len(table[entries(cluster)]) > count
                if too_large or (cluster >= 0 and open_tokens > 0 and begin[cluster] >= lasting):
                    missing[rank] = 0

            step = int(header[FreeHeader.STEP])
            decided = decisions[row, head].tolist()
            tally[Counter.LATE_DECISIONS] += step > 0 and decided[DecisionHeader.STEP] != step
            listed = decided[2 : 2 + min(max(decided[DecisionHeader.COUNT], 0), count)]
            for victim in listed:
                if len(free) >= sum(missing):
                    break
                if not 0 <= victim < clusters or victim in ids:
                    continue
                held = [page for page in table[entries(victim)].tolist() if page >= 0]
                free += held
                table[entries(victim)] = -1
                cached[row, head, victim] = 0
                tally[Counter.EVICTIONS] += len(held) > 0

            room = len(free)
            for rank, cluster in enumerate(ids):
                room -= missing[rank]
                if room < 0:
                    break
                if missing[rank] == 0:
                    continue
                for place in range(entries(cluster).start, entries(cluster).stop):
                    if table[place] >= 0:
                        continue
                    page = table[place] = free.pop()
                    slot = begin[cluster] + (place - entries(cluster).start) * page_size
                    held_tokens = min(page_size, begin[cluster + 1] - slot)
                    pages[:, row, head, page * page_size : page * page_size + held_tokens] = store[
                        :, row, head, slot : slot + held_tokens
                    ]
                cached[row, head, cluster] = min(len(table[entries(cluster)]), MOST_PAGES_COUNTED)
                tally[Counter.ADMISSIONS] += 1

            header[FreeHeader.STEP] = 1 if step == 2**31 - 1 else step + 1
            header[FreeHeader.COUNT] = len(free)
            free_pages[row, head, 2 : 2 + len(free)] = torch.tensor(free, dtype=torch.int32)
            requests[row, head, RequestHeader.STEP] = header[FreeHeader.STEP]
            requests[row, head, RequestHeader.FREE] = len(free)
            requests[row, head, RequestHeader.MISSED] = all_missing
            requests[row, head, 3:] = retrieved[row, head]
    counters[:, Counter.STEPS] += 1
    return addresses


@torch.library.register_fake(f"retro::{OP}")
def _(
    retrieved: Tensor,
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
) -> Tensor:
    contract.check_shape(OP, "retrieved", retrieved, "B, Hkv, R", (None, None, None))
    contract.check_dtype(OP, "retrieved", retrieved, torch.int32)
    rows, heads, ranks = retrieved.shape
    contract.check_page_cache(
        OP,
        retrieved,
        "retrieved",
        (rows, heads, ranks),
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
    return retrieved.new_empty((rows, heads, ranks, 3), dtype=torch.int64)
