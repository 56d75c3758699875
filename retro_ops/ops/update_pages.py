"""The CPU op of the wave buffer: which clusters may leave the page cache."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import DecisionHeader, RequestHeader

OP = "update_pages"
POLICIES = ("lru",)
DEFAULT_POLICY = "lru"


def update_pages(
    requests: Tensor, cached: Tensor, history: Tensor, decisions: Tensor, policy: str
) -> None:
    torch.ops.retro.update_pages(requests, cached, history, decisions, policy)


@torch.library.register_fake(f"retro::{OP}")
def _(requests: Tensor, cached: Tensor, history: Tensor, decisions: Tensor, policy: str) -> None:
    contract.check_shape(OP, "requests", requests, "B, Hkv, 3 + R", (None, None, None))
    contract.check_dtype(OP, "requests", requests, torch.int32)
    contract.check_contiguous(OP, "requests", requests)
    rows, heads, columns = requests.shape
    torch._check(
        columns >= len(RequestHeader),
        lambda: f"{OP}: requests must hold 3 + R >= 3 columns, got {columns}",
    )
    contract.check_shape(OP, "cached", cached, "B, Hkv, C", (rows, heads, None))
    contract.check_dtype(OP, "cached", cached, torch.uint8)
    contract.check_contiguous(OP, "cached", cached)
    clusters = cached.shape[2]
    contract.check_shape(OP, "history", history, "B, Hkv, C + 1, 2", (rows, heads, clusters + 1, 2))
    contract.check_dtype(OP, "history", history, torch.float64)
    contract.check_contiguous(OP, "history", history)
    contract.check_shape(OP, "decisions", decisions, "B, Hkv, 2 + P", (rows, heads, None))
    contract.check_dtype(OP, "decisions", decisions, torch.int32)
    contract.check_contiguous(OP, "decisions", decisions)
    torch._check(
        decisions.shape[2] >= len(DecisionHeader),
        lambda: f"{OP}: decisions must hold 2 + P >= 2 columns, got {decisions.shape[2]}",
    )
    for name, tensor in (("cached", cached), ("history", history), ("decisions", decisions)):
        contract.check_device(OP, name, tensor, requests, "requests")
    torch._check(
        policy in POLICIES,
        lambda: f"{OP}: policy must be one of {', '.join(map(repr, POLICIES))}, got '{policy}'",
    )
