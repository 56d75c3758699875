"""New tokens go to the end of the steady zone."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import Counter

OP = "append_tokens"


def append_tokens(
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    steady: Tensor,
    counters: Tensor,
    max_length: int,
) -> None:
    """Appends tokens to the steady zone of their row, in their order.

    Source: RetroInfer (arXiv 2505.02922), section 4.1 (steady zone).

    Args:
        keys: `[B, Hkv, T, D]`, float32, bfloat16 or float16, any strides.
        values: like `keys`.
        mask: `[B, T]` bool, the tokens to append; None: all.
        steady: `[2, B, Hkv, S, D]`, keys' dtype: keys, then values.
        counters: `[B, len(Counter)]` int64.
        max_length: tokens that a row may hold in all, indexed ones included.

    Mutates: `steady`, `counters`.

    Raises:
        RuntimeError: a shape or dtype is wrong, or tokens do not fit; nothing is written then.
    """
    torch.ops.retro.append_tokens(keys, values, mask, steady, counters, max_length)


def reference(
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    steady: Tensor,
    counters: Tensor,
    max_length: int,
) -> None:
    """`append_tokens` in plain torch."""
    for row in range(len(keys)):
        chosen = slice(None) if mask is None else mask[row]
        own = torch.stack((keys[row][:, chosen], values[row][:, chosen]))
        first = int(counters[row, Counter.STEADY_TOKENS])
        steady[:, row, :, first : first + own.shape[2]] = own
        counters[row, Counter.STEADY_TOKENS] += own.shape[2]


@torch.library.register_fake(f"retro::{OP}")
def _(
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    steady: Tensor,
    counters: Tensor,
    max_length: int,
) -> None:
    contract.check_shape(OP, "keys", keys, "B, Hkv, T, D", (None, None, None, None))
    contract.check_element_dtype(OP, "keys", keys)
    rows, heads, tokens, head_dim = keys.shape
    contract.check_head_dim(OP, head_dim)
    contract.check_shape(OP, "values", values, "B, Hkv, T, D", (rows, heads, tokens, head_dim))
    contract.check_dtype(OP, "values", values, keys.dtype)
    contract.check_device(OP, "values", values, keys, "keys")
    contract.check_shape(OP, "steady", steady, "2, B, Hkv, S, D", (2, rows, heads, None, head_dim))
    contract.check_dtype(OP, "steady", steady, keys.dtype)
    contract.check_device(OP, "steady", steady, keys, "keys")
    contract.check_rows(OP, "steady", steady)
    contract.check_counters(OP, counters, rows)
    contract.check_device(OP, "counters", counters, keys, "keys")
    contract.check_not_negative(OP, "max_length", max_length)
    if mask is not None:
        contract.check_shape(OP, "mask", mask, "B, T", (rows, tokens))
        contract.check_dtype(OP, "mask", mask, torch.bool)
        contract.check_device(OP, "mask", mask, keys, "keys")
