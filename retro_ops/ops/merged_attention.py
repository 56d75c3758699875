"""Exact attention to the steady zone and the retrieved clusters, merged with the estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import Counter

OP = "merged_attention"


def merged_attention(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    addresses: Tensor,
    counters: Tensor,
    estimate: Tensor,
    estimate_lse: Tensor,
    scale: float,
    pages: Tensor | None = None,
    page_table: Tensor | None = None,
    page_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attends to steady and retrieved tokens in place and merges the estimate of the others.

    Over the tokens t of the working set, with logit_t = scale q . k_t:

        lse = log(sum_t exp(logit_t) + exp(estimate_lse))
        out = sum_t exp(logit_t - lse) v_t + exp(estimate_lse - lse) estimate

    (estimate, estimate_lse) may be the (out, lse) of any disjoint set of tokens: merging halves in
    either order gives the whole.

    Source: RetroInfer (arXiv 2505.02922), section 4.1, equation 4; the merge is that of
    flash-decoding. Where a page of a cluster lies, in the page cache or in the store, changes no
    bit: tokens are read in the same order.

    Args:
        query: `[B, Hq, D]`, float32, bfloat16 or float16, any strides.
        steady: `[2, B, Hkv, S, D]`, query's dtype; `counters[:, STEADY_TOKENS]` slots count.
        store: `[2, B, Hkv, N, D]`, query's dtype.
        addresses: `[B, Hkv, R, 2]` int64, first slot in the store and number of tokens; with
            `pages`, `[B, Hkv, R, 3]`: the first entry of `page_table` too.
        counters: `[B, len(Counter)]` int64.
        estimate: `[B, Hq, D]` float32.
        estimate_lse: `[B, Hq]` float32, natural log; -inf: no estimate.
        scale: factor on q . k.
        pages: `[2, B, Hkv, P * page_size, D]`, query's dtype: the page cache, if offloaded.
        page_table: `[B, Hkv, N / page_size + C]` int32, as `page_gather` leaves it: the page of
            each `page_size` tokens of a cluster; -1: they are read from the store.
        page_size: tokens per page; 0 without `pages`.

    Returns:
        out `[B, Hq, D]` in query's dtype, lse `[B, Hq]` float32, natural log. Where there is
        nothing to attend to, out is 0 and lse is -inf.

    Raises:
        RuntimeError: a shape, dtype or address is wrong; the message has the values.

    Mutates nothing. Has no backward pass.
    """
    return torch.ops.retro.merged_attention(
        query,
        steady,
        store,
        addresses,
        counters,
        estimate,
        estimate_lse,
        scale,
        pages,
        page_table,
        page_size,
    )


def reference(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    addresses: Tensor,
    counters: Tensor,
    estimate: Tensor,
    estimate_lse: Tensor,
    scale: float,
    pages: Tensor | None = None,
    page_table: Tensor | None = None,
    page_size: int = 0,
) -> tuple[Tensor, Tensor]:
    """`merged_attention` in plain torch, in float64 for float64 queries, else in query's dtype."""
    rows, query_heads, head_dim = query.shape
    heads = steady.shape[2]
    grouped = query.view(rows, heads, query_heads // heads, head_dim)
    out, lse = torch.empty_like(query), query.new_empty(rows, query_heads)
    for row in range(rows):
        for head in range(heads):
            parts = [steady[:, row, head, : int(counters[row, Counter.STEADY_TOKENS])]]
            for first, tokens, *entry in addresses[row, head].tolist():
                if pages is None or page_table is None:
                    parts.append(store[:, row, head, first : first + tokens])
                    continue
                for token in range(0, tokens, page_size):
                    count = min(page_size, tokens - token)
                    page = int(page_table[row, head, entry[0] + token // page_size])
                    source, slot = (store, first + token) if page < 0 else (pages, page * page_size)
                    parts.append(source[:, row, head, slot : slot + count])
            keys, values = torch.cat(parts, dim=1)
            own = slice(head * grouped.shape[2], (head + 1) * grouped.shape[2])
            logit = scale * (grouped[row, head] @ keys.T)
            other = estimate_lse[row, own, None].to(logit.dtype)
            both = torch.cat((logit, other), dim=1)
            lse[row, own] = both.logsumexp(dim=1)
            weights = (both - lse[row, own, None]).exp().nan_to_num(0.0)
            estimated = weights[:, -1:] * estimate[row, own].to(logit.dtype)
            out[row, own] = weights[:, :-1] @ values + estimated
    return out, lse


@torch.library.register_fake(f"retro::{OP}")
def _(
    query: Tensor,
    steady: Tensor,
    store: Tensor,
    addresses: Tensor,
    counters: Tensor,
    estimate: Tensor,
    estimate_lse: Tensor,
    scale: float,
    pages: Tensor | None = None,
    page_table: Tensor | None = None,
    page_size: int = 0,
) -> tuple[Tensor, Tensor]:
    contract.check_shape(OP, "query", query, "B, Hq, D", (None, None, None))
    contract.check_element_dtype(OP, "query", query)
    rows, query_heads, head_dim = query.shape
    contract.check_head_dim(OP, head_dim)
    contract.check_shape(OP, "steady", steady, "2, B, Hkv, S, D", (2, rows, None, None, head_dim))
    contract.check_dtype(OP, "steady", steady, query.dtype)
    heads = steady.shape[2]
    contract.check_heads(OP, query_heads, heads)
    contract.check_shape(OP, "store", store, "2, B, Hkv, N, D", (2, rows, heads, None, head_dim))
    contract.check_dtype(OP, "store", store, query.dtype)
    torch._check(
        (pages is None) == (page_table is None),
        lambda: (
            f"{OP}: pages and page_table must be given together, "
            f"got {'page_table' if pages is None else 'pages'} only"
        ),
    )
    columns = 2 if pages is None else 3
    contract.check_shape(
        OP, "addresses", addresses, f"B, Hkv, R, {columns}", (rows, heads, None, columns)
    )
    contract.check_dtype(OP, "addresses", addresses, torch.int64)
    contract.check_counters(OP, counters, rows)
    contract.check_shape(OP, "estimate", estimate, "B, Hq, D", (rows, query_heads, head_dim))
    contract.check_dtype(OP, "estimate", estimate, torch.float32)
    contract.check_shape(OP, "estimate_lse", estimate_lse, "B, Hq", (rows, query_heads))
    contract.check_dtype(OP, "estimate_lse", estimate_lse, torch.float32)
    if pages is not None and page_table is not None:
        contract.check_pages(OP, pages, page_size, store)
        letters = "B, Hkv, N / page_size + C"
        contract.check_shape(OP, "page_table", page_table, letters, (rows, heads, None))
        contract.check_dtype(OP, "page_table", page_table, torch.int32)
        contract.check_device(OP, "pages", pages, query, "query")
        contract.check_device(OP, "page_table", page_table, query, "query")
    for name, tensor in (
        ("steady", steady),
        ("store", store),
        ("addresses", addresses),
        ("counters", counters),
        ("estimate", estimate),
        ("estimate_lse", estimate_lse),
    ):
        contract.check_device(OP, name, tensor, query, "query")
    return (
        query.new_empty((rows, query_heads, head_dim)),
        query.new_empty((rows, query_heads), dtype=torch.float32),
    )


contract.refuse_backward(OP, differentiable=(0, 1, 2, 5, 6, 8), arguments=11)
