"""One turn: many new tokens attend exactly to all that a layer holds, then they join it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retro_ops import wave_index
from retro_ops.ops import append_tokens
from retro_ops.ops._contract import Counter

if TYPE_CHECKING:
    from retro_ops.layer import RetroLayer

# Keys that are read at once, and logits that are in memory at once, over rows and heads.
KEYS_AT_ONCE = 1024
LOGITS_AT_ONCE = 2**23


class _Softmax:
    """Attention of queries `[B, Hkv, G, T, D]` float32 to one block of keys after another.

    Any block may be masked as a whole: it adds nothing, whatever its keys and values are.
    """

    def __init__(self, query: Tensor, scale: float, sinks: Tensor | None) -> None:
        self.query = query
        self.scale = scale
        self.largest = query.new_full((*query.shape[:-1], 1), -torch.inf)
        self.mass = torch.zeros_like(self.largest)
        if sinks is not None:  # [Hq]: a first token of value zero
            own = sinks.float().clamp(min=torch.finfo(torch.float32).min)
            self.largest = own.view(*query.shape[1:3], 1, 1).expand_as(self.largest)
            self.mass = self.mass + 1.0
        self.sums = torch.zeros_like(query)

    def add(self, keys: Tensor, values: Tensor, exists: Tensor, visible: Tensor | None) -> None:
        """Adds a block.

        Args:
            keys, values: `[B, Hkv, K, D]`.
            exists: `[B, K]` bool; what lies elsewhere may be anything.
            visible: `[T, K]` bool, the keys that each query may see; None: all.
        """
        allowed = exists[:, None, None, None]
        if visible is not None:
            allowed = allowed & visible
        groups = self.query.shape[2:4]
        logit = self.query.flatten(2, 3) @ keys.float().transpose(-1, -2)
        logit = logit.mul_(self.scale).unflatten(2, groups).masked_fill_(~allowed, -torch.inf)
        largest = torch.maximum(self.largest, logit.amax(dim=-1, keepdim=True))
        # A query that has seen nothing yet: -inf minus -inf is no number.
        finite = largest.clamp(min=torch.finfo(torch.float32).min)
        weight = logit.sub_(finite).exp_()
        kept = (self.largest - finite).exp_()
        values = values.float().masked_fill(~exists[:, None, :, None], 0.0)
        self.mass.mul_(kept).add_(weight.sum(dim=-1, keepdim=True))
        self.sums.mul_(kept).add_((weight.flatten(2, 3) @ values).unflatten(2, groups))
        self.largest = largest

    def result(self) -> Tensor:
        """`[B, Hkv, G, T, D]` float32; zero for a query that saw nothing."""
        return self.sums / self.mass.clamp(min=torch.finfo(torch.float32).tiny)


def attend(
    layer: RetroLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Exact attention of new tokens to what their row holds, to themselves and those before them.

    Sums are in float32. Memory is bounded by `LOGITS_AT_ONCE`, however many tokens there are.

    Args:
        layer: what the rows hold; unchanged.
        query: `[B, Hq, T, D]`.
        keys, values: `[B, Hkv, T, D]`.
        mask: `[B, T]` bool, False for padding.
        scale: factor on q . k.
        sinks: `[Hq]`, logits of one more token of value zero; None: none.

    Returns:
        `[B, Hq, T, D]` in query's dtype; zero for padding.
    """
    rows, query_heads, tokens, _ = query.shape
    heads = keys.shape[1]
    position = torch.arange(tokens, device=query.device)
    held = []
    for zone, counter in (
        (layer.store, Counter.INDEXED_TOKENS),
        (layer.steady, Counter.STEADY_TOKENS),
    ):
        count = layer.counters[:, counter, None]
        # A graph serves any number of tokens: it reads the whole buffer.
        limit = zone.shape[3] if torch.compiler.is_compiling() else int(count.max())
        held.append((zone, count, limit))
    at_once = max(LOGITS_AT_ONCE // (KEYS_AT_ONCE * rows * query_heads), 16)
    out = query.new_zeros(query.shape)
    for first in range(0, tokens, at_once):
        last = min(first + at_once, tokens)
        own = query[:, :, first:last].float().unflatten(1, (heads, query_heads // heads))
        softmax = _Softmax(own, scale, sinks)
        for zone, count, limit in held:
            for begin in range(0, limit, KEYS_AT_ONCE):
                end = min(begin + KEYS_AT_ONCE, limit)
                exists = torch.arange(begin, end, device=query.device) < count
                softmax.add(zone[0, :, :, begin:end], zone[1, :, :, begin:end], exists, None)
        for begin in range(0, last, KEYS_AT_ONCE):
            end = min(begin + KEYS_AT_ONCE, last)
            visible = position[begin:end] <= position[first:last, None]
            softmax.add(keys[:, :, begin:end], values[:, :, begin:end], mask[:, begin:end], visible)
        attended = softmax.result().flatten(1, 2)
        out[:, :, first:last] = attended.masked_fill(~mask[:, None, first:last, None], 0.0)
    return out


def working_bytes(layer: RetroLayer, tokens: int) -> int:
    """About what `attend` allocates at one time for `tokens` new tokens, besides its result."""
    rows, heads, dim = layer.batch_size, layer.num_query_heads, layer.head_dim
    at_once = max(LOGITS_AT_ONCE // (KEYS_AT_ONCE * rows * heads), 16)
    queries = rows * heads * min(tokens, at_once)
    block = rows * layer.num_kv_heads * KEYS_AT_ONCE * dim
    # float32: logits, which become weights; queries, sums and a product; a block's tokens.
    return 4 * (queries * KEYS_AT_ONCE + 3 * queries * dim + 2 * block)


def append(layer: RetroLayer, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    """Appends new tokens, and indexes those that leave the steady zone.

    Args:
        layer: has room for them; changed in place.
        keys, values: `[B, Hkv, T, D]`.
        mask: `[B, T]` bool, False for padding.
    """
    # A layer that is too small to index anything has no store.
    if keys.shape[2] < layer.config.update_segment or not layer.store.shape[3]:
        _append_as_steps(layer, keys, values, mask)
    else:
        _append_as_prompt(layer, keys, values, mask)


def _append_as_steps(layer: RetroLayer, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    place = mask.cumsum(dim=1) - 1
    done = torch.zeros_like(layer.counters[:, Counter.STEADY_TOKENS])
    # As many as there is room for, which may fill up a segment; then the others.
    for _ in range(2):
        room = layer.steady.shape[3] - layer.counters[:, Counter.STEADY_TOKENS]
        chosen = mask & (place >= done[:, None]) & (place < (done + room)[:, None])
        append_tokens(keys, values, chosen, layer.steady, layer.counters, layer.max_length)
        wave_index.grow(layer)
        done = done + room


def _append_as_prompt(layer: RetroLayer, keys: Tensor, values: Tensor, mask: Tensor) -> None:
    """With the steady tokens before them: a left-padded prompt, of which sinks and latest stay."""
    steady = layer.counters[:, Counter.STEADY_TOKENS]
    held = torch.arange(layer.steady.shape[3], device=keys.device) < steady[:, None]
    real = torch.cat((held, mask), dim=1)
    order = real.long().argsort(dim=1, stable=True)[:, None, :, None]
    whole = [
        torch.cat((old, new), dim=2).gather(2, order.expand(*new.shape[:2], -1, new.shape[3]))
        for old, new in zip(layer.steady, (keys, values), strict=True)
    ]
    starts = real.shape[1] - real.sum(dim=1)
    steady.zero_()
    wave_index.build(layer, whole[0], whole[1], starts, layer.config.cluster_size)
