"""The attention function `retro` and its mask, registered with transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from retro_ops.models.cache import RetroTokens

NAME = "retro"
# Arguments that change what attention means, and what they stand for.
UNSUPPORTED = {"s_aux": "attention sinks", "softcap": "soft-capped logits"}
# `sdpa` gets these, or the mask has them.
UNSUPPORTED_WITH_CACHE = {
    "position_bias": "a position bias",
    "sliding_window": "a sliding window in a full-attention layer",
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

    With a RetroCache, a prompt is attended to exactly and indexed, and every later token goes
    through `RetroLayer.decode`. Sliding-window layers of a RetroCache, any other cache
    (DynamicCache, StaticCache), and no cache at all are exact: transformers' `sdpa`.

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
        ValueError: the layer needs attention sinks, soft-capping, attention to later tokens or
            another mask than one for left padding.
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
    if tokens == 1 or layer.is_filled:
        _check_new_tokens(attention_mask, tokens)
        out = layer.decode(query, key.keys, key.values, scaling)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is not None and attention_mask.shape[1] != tokens:
        raise ValueError(
            f"RetroCache: the attention_mask of a prompt of {tokens} tokens must have as many, "
            f"got {list(attention_mask.shape)}"
        )
    starts = None if attention_mask is None else attention_mask.int().argmax(dim=1)
    layer.prefill(key.keys, key.values, starts)
    return _attend_to_prompt(module, query, key.keys, key.values, attention_mask, scaling), None


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
    fit in memory. A sliding-window layer with a past has a tensor as `kv_offset`.

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
    if mask_function is not causal_mask_function:
        raise ValueError(OTHER_MASK)
    if attention_mask is None or q_length == 1:
        return None
    attention_mask = attention_mask.bool()
    if torch.compiler.is_compiling() or attention_mask.shape[1] > q_length:
        return attention_mask  # tokens that continue a filled cache: `retro_attention` checks them
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


def _check_new_tokens(attention_mask: Tensor | None, tokens: int) -> None:
    if attention_mask is None or torch.compiler.is_compiling():
        return
    if not attention_mask[:, -tokens:].all():
        raise ValueError(
            f"RetroCache: the {tokens} new tokens of a filled cache must not be padded; continue "
            "rows of different length one by one, or reset() the cache and prefill anew"
        )


def _attend_to_prompt(
    module: nn.Module,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    padding: Tensor | None,
    scaling: float | None,
) -> Tensor:
    if padding is None:
        return sdpa_attention_forward(module, query, keys, values, None, scaling=scaling)[0]
    tokens = query.shape[2]
    if torch.compiler.is_compiling():
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        mask = later & padding[:, None, None, :]
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
    # Row by row, without the padding: no mask of T x T, and the kernel for causal attention.
    out = query.new_zeros(query.shape[0], tokens, query.shape[1], values.shape[3])
    for row, start in enumerate(padding.int().argmax(dim=1).tolist()):
        own = (slice(row, row + 1), slice(None), slice(start, None))
        out[row, start:] = sdpa_attention_forward(
            module, query[own], keys[own], values[own], None, scaling=scaling
        )[0][0]
    return out
