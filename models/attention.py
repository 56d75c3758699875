"""The attention function `retro` and its mask, registered with transformers."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from retro_ops.models.cache import LayerOffset, RetroTokens, SlidingCacheLayer
from retro_ops.models.prefill import attend_to_prompt, attention

NAME = "retro"
# Arguments that change what attention means, and what they stand for; `sdpa` gets the latter three,
# or the mask has them.
UNSUPPORTED = {"softcap": "soft-capped logits"}
UNSUPPORTED_WITH_CACHE = {
    "position_bias": "a position bias",
    "indices": "a choice of tokens by the model",
    "block_indices": "a choice of tokens by the model",
}
OTHER_MASK = (
    "RetroCache supports causal masks with left padding only; this model adds to them: use a "
    "DynamicCache"
)


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
        **kwargs: `s_aux` `[Hq]`: attention sinks; others are checked, or for `sdpa`.

    Returns:
        `[B, T, Hq, D]`, and None for the attention weights.

    Raises:
        ValueError: the layer needs soft-capping, attention to later tokens,
            another window than its cache has or another mask than one for left padding.
    """
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"retro attention does not support {what} ({type(module).__name__}); "
                "load the model with attn_implementation='eager'"
            )
    sinks = kwargs.pop("s_aux", None)
    if not isinstance(key, RetroTokens):
        assert not isinstance(value, RetroTokens)  # a cache returns both or neither
        out = attention(
            query,
            key,
            value,
            attention_mask,
            scale=scaling,
            sinks=sinks,
            module=module,
            dropout=dropout,
            **kwargs,
        )
        return out, None
    for name, what in UNSUPPORTED_WITH_CACHE.items():
        if kwargs.get(name) is not None:
            raise ValueError(
                f"RetroCache does not support {what} ({type(module).__name__}); use a DynamicCache"
            )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(
            f"RetroCache is for causal attention, {type(module).__name__} is bidirectional; "
            "use a DynamicCache"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            "RetroCache needs a padding mask [B, T], got an attention_mask of shape "
            f"{list(attention_mask.shape)}"
        )
    layer, tokens = key.layer, query.shape[2]
    asked = kwargs.get("sliding_window")
    if asked is not None and asked != layer.sliding_window:
        has = (
            "attends to all tokens"
            if layer.sliding_window is None
            else f"has one of {layer.sliding_window}"
        )
        raise ValueError(
            f"RetroCache: {type(module).__name__} asks for a sliding window of {asked} tokens "
            f"where the layer of the cache {has}; use a DynamicCache"
        )
    if not isinstance(layer, SlidingCacheLayer) and (tokens == 1 or layer.is_filled):
        if tokens == 1:
            out = layer.decode(query, key.keys, key.values, scaling, sinks)
        else:
            out = layer.extend(query, key.keys, key.values, attention_mask, scaling, sinks)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.shape[1] == 0:
        raise ValueError(OTHER_MASK)  # see `retro_mask`
    if attention_mask is not None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"RetroCache: the attention_mask of a prompt of {tokens} tokens must have as many, "
            f"got {list(attention_mask.shape)}"
        )
    window = None
    if isinstance(layer, SlidingCacheLayer):
        layer.prefill(key.keys, key.values)
        window = layer.sliding_window
    else:
        starts = None if attention_mask is None else attention_mask.int().argmax(dim=1)
        layer.prefill(key.keys, key.values, starts)
        if layer.prefill_attention is not None:
            plugged = layer.prefill_attention(
                query,
                key.keys,
                key.values,
                scale=query.shape[3] ** -0.5 if scaling is None else scaling,
                starts=starts,
                sinks=sinks,
                layer_idx=module.layer_idx,  # type: ignore[arg-type]  # an attribute, no module
            )
            if plugged.shape != query.shape or plugged.dtype != query.dtype:
                raise ValueError(
                    f"RetroCache: prefill_attention must return [B, Hq, T, D] = "
                    f"{list(query.shape)} of {query.dtype}, got {list(plugged.shape)} of "
                    f"{plugged.dtype}"
                )
            return plugged.transpose(1, 2).contiguous(), None
    out = attend_to_prompt(
        module,
        query,
        key.keys,
        key.values,
        attention_mask,
        scale=scaling,
        sinks=sinks,
        window=window,
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
        # Where the inputs are, which the layer need not be.
        first = kv_offset.to(kwargs.get("device", kv_offset.device))
        return _window_mask(
            batch_size, q_length, kv_length, q_offset, first, mask_function, attention_mask
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
        plain = kwargs.get("local_size") == -kv_offset and (
            kwargs.get("allow_is_causal_skip") or (q_length == 1 and not kwargs.get("use_vmap"))
        )
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
