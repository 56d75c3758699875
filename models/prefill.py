"""How a prompt is attended to: exactly, or by a function that you plug into a RetroCache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


class PrefillAttention(Protocol):
    """Attention over a prompt in one full-attention layer: `RetroCache(prefill_attention=...)`.

    It replaces exact attention where a prompt is read, and nothing else: what the layer indexes,
    decode steps, later turns and sliding-window layers are what they were. It may be sparse; its
    error goes into the hidden states that later layers see. Any function with the arguments of
    `__call__` is one.
    """

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        starts: Tensor | None,
        sinks: Tensor | None,
        layer_idx: int,
    ) -> Tensor:
        """Causal attention of a prompt to itself.

        Args:
            query: `[B, Hq, T, D]`, after rotary embedding, any strides.
            keys, values: `[B, Hkv, T, D]`, query's dtype and device; query head h reads KV head
                `h // (Hq / Hkv)`.
            scale: factor on q . k.
            starts: `[B]` int64, first real token of a left-padded row; None: no padding.
            sinks: `[Hq]`, logit of a token of value zero that every query sees too; None: none.
            layer_idx: of the layer in the model.

        Returns:
            `[B, Hq, T, D]` in query's dtype; what stands at padding does not matter.
        """
        ...


class LocalPrefill:
    """Sparse prefill: each token attends to the first tokens of its row and the latest ones.

    The pattern of StreamingLLM (arXiv 2309.17453). Time is linear in T: T (sinks + 2 window). Exact
    for prompts of up to `window` tokens. Not for compiled prompts: it waits for `starts`.

    Args:
        sink_tokens: first tokens of a row that all others see, from 0 on.
        window: latest tokens that a token sees, itself included, from 1 on.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, sink_tokens: int = 128, window: int = 4096) -> None:
        if sink_tokens < 0 or window < 1:
            raise ValueError(
                "LocalPrefill: sink_tokens must be at least 0 and window at least 1, "
                f"got {sink_tokens} and {window}"
            )
        self.sink_tokens = sink_tokens
        self.window = window

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        starts: Tensor | None,
        sinks: Tensor | None,
        layer_idx: int,
    ) -> Tensor:
        """As `PrefillAttention`."""
        out = torch.zeros_like(query)
        for row, start in enumerate([0] * len(query) if starts is None else starts.tolist()):
            own = (slice(row, row + 1), slice(None), slice(start, None))
            out[own] = self._attend(query[own], keys[own], values[own], scale, sinks)
        return out

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        tokens = query.shape[2]
        position = torch.arange(tokens, device=query.device)
        outs = []
        for first in range(0, tokens, self.window):
            begin = max(first - self.window, 0)
            kept = min(self.sink_tokens, begin)
            here = position[first : first + self.window, None]
            seen = torch.cat((position[:kept], position[begin : first + self.window]))
            mask = (seen <= here) & ((here - seen < self.window) | (seen < self.sink_tokens))
            outs.append(
                attention(
                    query[:, :, first : first + self.window],
                    keys[:, :, seen],
                    values[:, :, seen],
                    mask if first else None,  # the first piece is plain causal attention
                    scale=scale,
                    sinks=sinks,
                )
            )
        return torch.cat(outs, dim=1).transpose(1, 2)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    sinks: Tensor | None,
    module: nn.Module | None = None,
    **kwargs: object,
) -> Tensor:
    """Exact attention by transformers' `sdpa`, with or without attention sinks.

    Args:
        query: `[B, Hq, T, D]`.
        keys, values: `[B, Hkv, K, D]`.
        mask: bool, or added to the logits, broadcast to `[B, Hq, T, K]`; None: causal, or all keys
            for a single query.
        scale: factor on q . k; None: 1 / sqrt(D).
        sinks: `[Hq]`, logit of one more key of value zero; None: none.
        module: what `sdpa` asks for the number of query heads per KV head; None: it follows from
            the shapes.
        **kwargs: for `sdpa`.

    Returns:
        `[B, T, Hq, D]`.
    """
    groups = query.shape[1] // keys.shape[1]
    if mask is None and query.is_cuda and query.dtype == torch.float32 and groups > 1:
        # No kernel for float32 takes grouped heads: torch would make a matrix of T x T per head.
        keys, values, module = repeat_kv(keys, groups), repeat_kv(values, groups), _Heads(1)
    if module is None:
        module = _Heads(groups)
    if sinks is None:
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scale, **kwargs)[0]
    tokens, head_dim = query.shape[2:]
    causal = mask is None and tokens > 1
    if causal:  # as `sdpa` does with keys of a cache that is not full yet
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    # One more key, of value zero, in dimensions of its own, where every query has the sink's logit
    # over the scale, in three parts that add up to its float32 value. `sdpa` needs no mask for it,
    # and does not say the log-sum-exp by which one could merge the sink later.
    parts = 3
    extra = -(head_dim + parts) % 8 + parts  # kernels want a multiple of 8
    logit = sinks.float() / (head_dim**-0.5 if scale is None else scale)
    query = nn.functional.pad(query, (0, extra, int(causal), 0))
    keys = nn.functional.pad(keys, (0, extra, 1, 0))
    values = nn.functional.pad(values, (0, extra, 1, 0))
    for part in range(head_dim, head_dim + parts):
        query[..., part] = logit[:, None].to(query.dtype)
        logit = logit - logit.to(query.dtype).float()
        keys[:, :, 0, part] = 1.0
    if mask is not None:
        mask = nn.functional.pad(mask, (1, 0), value=mask.dtype == torch.bool)
    out = sdpa_attention_forward(
        module,
        query,
        keys,
        values,
        mask,
        scaling=head_dim**-0.5 if scale is None else scale,
        **kwargs,
    )[0]
    return out[:, int(causal) :, :, :head_dim]


class _Heads(nn.Module):
    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups


def attend_to_prompt(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    *,
    scale: float | None,
    sinks: Tensor | None,
    window: int | None,
) -> Tensor:
    """Exact causal attention of a prompt, `[B, T, Hq, D]`; a window costs T times the window.

    Args:
        module, query, keys, values, scale, sinks: as in `attention`.
        padding: `[B, T]` bool, False for padding, on the left; None: no padding.
        window: latest tokens that a token sees; None: all.
    """
    tokens = query.shape[2]
    if torch.compiler.is_compiling():
        if window is not None:
            return _attend_in_windows(module, query, keys, values, padding, scale, sinks, window)
        if padding is None:
            return attention(query, keys, values, None, scale=scale, sinks=sinks, module=module)
        # Each row is turned so that its padding is behind its tokens, which do not see it then: no
        # mask of T x T, the kernel for causal attention, and one graph of all lengths.
        place = torch.arange(tokens, device=query.device)
        starts = padding.int().argmax(dim=1)[:, None]
        turned, back = (place + starts) % tokens, (place - starts) % tokens  # [B, T]
        query, keys, values = (
            each.gather(2, turned[:, None, :, None].expand_as(each))
            for each in (query, keys, values)
        )
        out = attention(query, keys, values, None, scale=scale, sinks=sinks, module=module)
        return out.gather(1, back[:, :, None, None].expand_as(out))
    band = None
    if window is not None and tokens > window:
        # Query i of a piece and key j, with one window before the piece: i < j <= i + window.
        band = torch.ones(window, 2 * window, dtype=torch.bool, device=query.device)
        band = band.tril(window).triu(1)
    if padding is None:
        return _attend_in_pieces(module, query, keys, values, band, scale, sinks)
    # Row by row, without the padding: no mask of T x T, and the kernel for causal attention.
    out = query.new_zeros(query.shape[0], tokens, query.shape[1], values.shape[3])
    for row, start in enumerate(padding.int().argmax(dim=1).tolist()):
        own = (slice(row, row + 1), slice(None), slice(start, None))
        out[row, start:] = _attend_in_pieces(
            module, query[own], keys[own], values[own], band, scale, sinks
        )[0]
    return out


def _attend_in_windows(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    scale: float | None,
    sinks: Tensor | None,
    window: int,
) -> Tensor:
    """The same as `_attend_in_pieces` with a band, in one graph of all lengths.

    All pieces at once, as rows of a batch: `[B * pieces, heads, W, D]`.
    """
    rows, _, tokens, _ = query.shape
    # At least two, and padding behind: a graph of all lengths has no place for special cases.
    pieces = tokens // window + 2
    behind = pieces * window - tokens

    def piece(tensor: Tensor) -> Tensor:  # [B, heads, pieces * W, any] -> [B * pieces, ...]
        split = tensor.unflatten(2, (pieces, window)).transpose(1, 2)
        return split.flatten(0, 1)

    def with_past(tensor: Tensor) -> Tensor:  # each piece behind the one before it
        whole = nn.functional.pad(tensor, (0, 0, window, behind))
        return torch.cat((piece(whole[:, :, :-window]), piece(whole[:, :, window:])), dim=2)

    # Query i of a piece and key j, with one window before the piece: i < j <= i + window.
    i = torch.arange(window, device=query.device)[:, None]
    j = torch.arange(2 * window, device=query.device)
    real = torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
    real = real if padding is None else real & padding
    mask = with_past(real[:, None, :, None]).transpose(2, 3)  # [B * pieces, 1, 1, 2 W]
    # Padding sees itself: what it becomes is not looked at, but has to be finite.
    mask = (mask | (j == i + window)) & (i < j) & (j <= i + window)
    out = attention(
        piece(nn.functional.pad(query, (0, 0, 0, behind))),
        with_past(keys),
        with_past(values),
        mask,
        scale=scale,
        sinks=sinks,
        module=module,
    )
    return out.unflatten(0, (rows, pieces)).flatten(1, 2)[:, :tokens]


def _attend_in_pieces(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    band: Tensor | None,
    scale: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention; with a band `[W, 2 W]`, of a window's length of queries at a time.

    Their keys are at most the window before them and themselves, so the cost is linear in T.
    """
    tokens = query.shape[2]
    window = tokens if band is None else band.shape[0]
    outs = []
    for first in range(0, tokens, window):
        here = slice(first, first + window)
        seen = slice(max(first - window, 0), first + window)
        # The first piece has nothing before it: plain causal attention.
        mask = None if first == 0 or band is None else band[: tokens - first, : tokens - seen.start]
        outs.append(
            attention(
                query[:, :, here],
                keys[:, :, seen],
                values[:, :, seen],
                mask,
                scale=scale,
                sinks=sinks,
                module=module,
            )
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
