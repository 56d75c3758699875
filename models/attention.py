"""The attention function `retro` and its mask, registered with transformers."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from retro_ops.models.cache import LayerOffset, RetroTokens, SlidingCacheLayer

NAME = "retro"
# Arguments that change what attention means, and what they stand for.
UNSUPPORTED = {"s_aux": "attention sinks", "softcap": "soft-capped logits"}
# `sdpa` gets these, or the mask has them.
UNSUPPORTED_WITH_CACHE = {
    "position_bias": "a position bias",
    "indices": "a choice of tokens by the model",
    "block_indices": "a choice of tokens by the model",
}
OTHER_MASK = "RetroCache supports causal masks with left padding only; this model adds to them"


def retro_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | RetroTokens,
    value: Tensor | RetroTokens,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; what it does depends on the cache that the model runs with.

    With a RetroCache, a prompt is attended to exactly and indexed, and so are several later tokens
    at once (`RetroLayer.extend`); a single one goes through `RetroLayer.decode`. Sliding-window
    layers of a RetroCache are exact, and a prompt costs them its length times the window. Any other
    cache (DynamicCache, StaticCache), and no cache at all, are transformers' `sdpa`.

    Args:
        module: the attention layer.
        query: `[B, Hq, T, D]`.
        key, value: `[B, Hkv, any, D]`, or what a RetroCache returned.
        attention_mask: what `retro_mask` returned.
        dropout: for `sdpa` only.
        scaling: factor on q . k; None: 1 / sqrt(D).

    Returns:
        `[B, T, Hq, D]`, and None for the attention weights.

    Raises:
        ValueError: the layer needs attention sinks, soft-capping, attention to later tokens,
            another window than its cache has or another mask than one for left padding.
    """
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"retro attention does not support {what} ({type(module).__name__}); "
                "load the model with attn_implementation='eager'"
            )
    if not isinstance(key, RetroTokens):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name, what in UNSUPPORTED_WITH_CACHE.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"RetroCache does not support {what} ({type(module).__name__}); use a DynamicCache"
            )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"RetroCache is for causal attention, {type(module).__name__} is bidirectional"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "RetroCache needs a padding mask [B, T], got an attention_mask of shape "
            f"{list(attention_mask.shape)}"
        )
    layer, tokens = key.layer, query.shape[2]
    window = layer.sliding_window if isinstance(layer, SlidingCacheLayer) else None
    asked = kwargs.get("sliding_window")
    if asked is not None and asked != window:
        has = "attends to all tokens" if window is None else f"has one of {window}"
        raise ValueError(
            f"RetroCache: {type(module).__name__} asks for a sliding window of {asked} tokens "
            f"where the layer of the cache {has}; use a DynamicCache"
        )
    if not isinstance(layer, SlidingCacheLayer) and (tokens == 1 or layer.is_filled):
        if tokens == 1:
            out = layer.decode(query, key.keys, key.values, scaling)
        else:
            out = layer.extend(query, key.keys, key.values, attention_mask, scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.shape[1] == 0:
        raise ValueError(OTHER_MASK)  # see `retro_mask`
    if attention_mask is not None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"RetroCache: the attention_mask of a prompt of {tokens} tokens must have as many, "
            f"got {list(attention_mask.shape)}"
        )
    if isinstance(layer, SlidingCacheLayer):
        layer.prefill(key.keys, key.values)
    else:
        starts = None if attention_mask is None else attention_mask.int().argmax(dim=1)
        layer.prefill(key.keys, key.values, starts)
    out = _attend_to_prompt(
        module, query, key.keys, key.values, attention_mask, scaling, window=window
    )
    return out, None


def retro_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that `retro_attention` gets: `[B, T]` padding for a RetroCache, else that of `sdpa`.

    A full-attention layer of a RetroCache has no keys to mask, so it says `kv_length=0`. Its rows
    know their tokens: only a prompt needs the padding, and a `[T, T]` mask of a long one would not
    fit in memory. A sliding-window layer says the same of a prompt, with its window, negative, as
    `kv_offset`; with a past, its `kv_offset` is a tensor.

    Returns:
        None where nothing is masked but later tokens; `[B, past + T]` bool, True for real tokens;
        or the mask of `sdpa`, `[B, 1, T, keys]` bool.

    Raises:
        ValueError: padding is not on the left, or another mask than a causal one is asked for.
    """
    if isinstance(kv_offset, Tensor):
        # `sdpa_mask` decides by the offset, which would wait for the device and break the graph.
        if kwargs.get("use_vmap"):
            raise ValueError(OTHER_MASK)
        return _window_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask
        )
    if kv_length != 0:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if kv_offset < 0 and mask_function is causal_mask_function:
        # Some models make a mask for full-attention layers even if they have none: transformers
        # takes a sliding-window layer for one. `retro_attention` refuses this mask if it gets it.
        return torch.empty(batch_size, 0, dtype=torch.bool, device=kwargs.get("device"))
    if kv_offset < 0 and torch.compiler.is_compiling():
        # Functions cannot be looked into here; transformers drops the permission to use
        # `is_causal` as soon as anything is added to a mask.
        plain = kwargs.get("local_size") == -kv_offset and kwargs.get("allow_is_causal_skip")
    elif kv_offset < 0:
        plain = _is_same(mask_function, sliding_window_causal_mask_function(-kv_offset))
    else:
        plain = mask_function is causal_mask_function
    if not plain:
        raise ValueError(OTHER_MASK)
    if isinstance(kv_offset, LayerOffset):
        kv_offset.layer.check_turn(attention_mask, q_length)
    if attention_mask is None or q_length == 1:
        return None
    attention_mask = attention_mask.bool()
    if torch.compiler.is_compiling() or attention_mask.shape[1] > q_length:
        return attention_mask  # its tokens continue a filled cache
    if attention_mask.all():
        return None
    if not attention_mask[:, -1].all() or (attention_mask[:, :-1] > attention_mask[:, 1:]).any():
        raise ValueError(
            "RetroCache needs left padding, and at least one token in every row; "
            "set tokenizer.padding_side = 'left'"
        )
    return attention_mask


def register() -> None:
    """Makes `attn_implementation="retro"` known to transformers."""
    AttentionInterface.register(NAME, retro_attention)
    AttentionMaskInterface.register(NAME, retro_mask)


def _window_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    kv_offset: Tensor,
    mask_function: Any,
    attention_mask: Tensor | None,
) -> Tensor:
    device = kv_offset.device
    row = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    query = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    key = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None]
    allowed = mask_function(row, head, query, key) & (key >= 0)
    if attention_mask is not None:
        known = attention_mask.shape[1]
        real = attention_mask.bool()[:, key.flatten().clamp(0, known - 1)][:, None, None]
        allowed = allowed & real & (key < known)
    return allowed.expand(batch_size, 1, q_length, kv_length)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two mask functions were made of the same functions and numbers.

    Their values at some positions would not tell: an addition may be anywhere in the prompt.
    """
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        inside, expected = (
            tuple(cell.cell_contents for cell in function.__closure__ or ())
            for function in (one, other)
        )
        return one.__code__ is other.__code__ and _is_same(inside, expected)
    return one is other


def _attend_to_prompt(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    scaling: float | None,
    *,
    window: int | None,
) -> Tensor:
    tokens = query.shape[2]
    if torch.compiler.is_compiling():
        if window is not None:
            return _attend_in_windows(module, query, keys, values, padding, scaling, window)
        if padding is None:
            return _attend(module, query, keys, values, None, scaling)
        # Each row is turned so that its padding is behind its tokens, which do not see it then: no
        # mask of T x T, the kernel for causal attention, and one graph of all lengths.
        place = torch.arange(tokens, device=query.device)
        starts = padding.int().argmax(dim=1)[:, None]
        turned, back = (place + starts) % tokens, (place - starts) % tokens  # [B, T]
        query, keys, values = (
            each.gather(2, turned[:, None, :, None].expand_as(each))
            for each in (query, keys, values)
        )
        out = _attend(module, query, keys, values, None, scaling)
        return out.gather(1, back[:, :, None, None].expand_as(out))
    band = None
    if window is not None and tokens > window:
        # Query i of a piece and key j, with one window before the piece: i < j <= i + window.
        band = torch.ones(window, 2 * window, dtype=torch.bool, device=query.device)
        band = band.tril(window).triu(1)
    if padding is None:
        return _attend_in_pieces(module, query, keys, values, band, scaling)
    # Row by row, without the padding: no mask of T x T, and the kernel for causal attention.
    out = query.new_zeros(query.shape[0], tokens, query.shape[1], values.shape[3])
    for row, start in enumerate(padding.int().argmax(dim=1).tolist()):
        own = (slice(row, row + 1), slice(None), slice(start, None))
        out[row, start:] = _attend_in_pieces(
            module, query[own], keys[own], values[own], band, scaling
        )[0]
    return out


def _attend_in_windows(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    scaling: float | None,
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
    out = _attend(
        module,
        piece(nn.functional.pad(query, (0, 0, 0, behind))),
        with_past(keys),
        with_past(values),
        mask,
        scaling,
    )
    return out.unflatten(0, (rows, pieces)).flatten(1, 2)[:, :tokens]


def _attend_in_pieces(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    band: Tensor | None,
    scaling: float | None,
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
            _attend(module, query[:, :, here], keys[:, :, seen], values[:, :, seen], mask, scaling)
        )
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Exact attention, `[B, T, Hq, D]`: causal, or as the mask says."""
    groups = query.shape[1] // keys.shape[1]
    if mask is None and query.is_cuda and query.dtype == torch.float32 and groups > 1:
        # No kernel for float32 takes grouped heads: torch would make a matrix of T x T per head.
        out = nn.functional.scaled_dot_product_attention(
            query,
            repeat_kv(keys, groups),
            repeat_kv(values, groups),
            is_causal=True,  # one query has one key here
            scale=scaling,
        )
        return out.transpose(1, 2).contiguous()
    return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
