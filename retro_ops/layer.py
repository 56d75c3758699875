"""RetroLayer: the KV of one attention layer, and attention over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retro_ops import wave_buffer, wave_index
from retro_ops.config import RetroConfig
from retro_ops.decode import decode_step
from retro_ops.ops._contract import ELEMENT_DTYPES, Counter, retrieved_count
from retro_ops.ops.update_pages import DEFAULT_POLICY, POLICIES


class RetroLayer(nn.Module):
    """Keys and values of one attention layer, read sparsely by every new token.

    All mutable state is in persistent buffers of fixed size, and counts live in `counters` on the
    device: a step never depends on a Python number, so it compiles into one graph, and `state_dict`
    saves the layer. For inference: a backward pass raises.

    Args:
        config: budgets and sizes.
        batch_size: B, rows.
        num_query_heads: Hq, a multiple of `num_kv_heads`.
        num_kv_heads: Hkv.
        head_dim: D, a multiple of 16 from 16 to 256.
        max_length: tokens that a row can hold, prompt and generated ones.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        device: where the state lives.
        offload: keep the KV store in slow memory behind a page cache of `config.cache_ratio` of it.
            Changes no result, bit for bit. On a CPU both are plain memory; not built yet on a GPU.

    Raises:
        ValueError: a number or dtype is out of range.
        NotImplementedError: `offload=True` on a GPU.
    """

    steady: Tensor  # [2, B, Hkv, S, D]
    store: Tensor  # [2, B, Hkv, N, D]
    centroids: Tensor  # [2, B, Hkv, C, D]
    offsets: Tensor  # [B, Hkv, C + 1] int32
    variances: Tensor  # [B, Hkv, C] float32
    totals: Tensor  # [2, B, Hkv, D] float32
    counters: Tensor  # [B, len(Counter)] int64
    # Offloaded only; see wave_buffer.py. P pages of S tokens for each row and KV head.
    pages: Tensor  # [2, B, Hkv, P * S, D]
    page_table: Tensor  # [B, Hkv, N / S + C] int32
    free_pages: Tensor  # [B, Hkv, 2 + P] int32
    decisions: Tensor  # [B, Hkv, 2 + P] int32
    requests: Tensor  # [B, Hkv, 3 + R] int32
    cached: Tensor  # [B, Hkv, C] uint8
    history: Tensor  # [B, Hkv, C + 1, 2] int64

    def __init__(
        self,
        config: RetroConfig,
        *,
        batch_size: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        offload: bool = False,
        _policy: str = DEFAULT_POLICY,
    ) -> None:
        super().__init__()
        for name, number in (
            ("batch_size", batch_size),
            ("num_query_heads", num_query_heads),
            ("num_kv_heads", num_kv_heads),
            ("max_length", max_length),
        ):
            if number < 1:
                raise ValueError(f"RetroLayer: {name} must be at least 1, got {number}")
        if num_query_heads % num_kv_heads:
            raise ValueError(
                "RetroLayer: num_query_heads must be a multiple of num_kv_heads, "
                f"got {num_query_heads} and {num_kv_heads}"
            )
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(
                f"RetroLayer: head_dim must be a multiple of 16 from 16 to 256, got {head_dim}"
            )
        if dtype not in ELEMENT_DTYPES:
            names = ", ".join(str(allowed) for allowed in ELEMENT_DTYPES)
            raise ValueError(f"RetroLayer: dtype must be one of {names}, got {dtype}")
        if offload and torch.device(device).type == "cuda":
            raise NotImplementedError(
                "RetroLayer: offload=True is not built yet on a GPU; use offload=False, which "
                f"keeps all KV on the device ({device})"
            )
        if _policy not in POLICIES:
            names = ", ".join(POLICIES)
            raise ValueError(f"RetroLayer: _policy must be one of {names}, got {_policy!r}")
        self.config = config
        self.batch_size = batch_size
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_length = max_length
        self.offload = offload
        self.policy = _policy

        tokens, clusters = wave_index.indexed_capacity(config, max_length)
        self.max_retrieved = retrieved_count(
            config.retrieval_budget, config.min_retrieved_clusters, clusters
        )
        groups = (batch_size, num_kv_heads)
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "steady": (
                (2, *groups, min(config.steady_capacity, max_length), head_dim),
                dtype,
            ),
            "store": ((2, *groups, tokens, head_dim), dtype),
            "centroids": ((2, *groups, clusters, head_dim), dtype),
            "offsets": ((*groups, clusters + 1), torch.int32),
            "variances": ((*groups, clusters), torch.float32),
            "totals": ((2, *groups, head_dim), torch.float32),
            "counters": ((batch_size, len(Counter)), torch.int64),
        }
        if offload:
            buffers |= wave_buffer.shapes(
                config, groups, tokens, clusters, self.max_retrieved, head_dim, dtype
            )
        for name, (shape, kind) in buffers.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        if offload:
            wave_buffer.clear(self)

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The wave index: centroids, offsets, variances, totals."""
        return self.centroids, self.offsets, self.variances, self.totals

    def prefill(self, keys: Tensor, values: Tensor, starts: Tensor | None = None) -> None:
        """Replaces whatever the layer holds with a prompt, and indexes it.

        Args:
            keys: `[B, Hkv, T, D]`, any strides, after rotary embedding.
            values: like `keys`.
            starts: `[B]` integers: first real token of a left-padded row; None: no padding. Values
                out of 0..T are refused on the CPU; a GPU is not waited for, they are clamped.

        Raises:
            ValueError: a shape, dtype, device or length does not fit the layer; it keeps what it
                held.
        """
        self._check_tokens("prefill", keys, values)
        tokens = keys.shape[2]
        if tokens > self.max_length:
            raise ValueError(
                f"RetroLayer.prefill: a prompt of {tokens} tokens exceeds max_length "
                f"{self.max_length}; make the layer or cache with a larger max_length"
            )
        if starts is None:
            starts = torch.zeros(self.batch_size, dtype=torch.int64, device=keys.device)
        elif tuple(starts.shape) != (self.batch_size,) or starts.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise ValueError(
                f"RetroLayer.prefill: starts must be [{self.batch_size}] integers, got "
                f"{list(starts.shape)} of {starts.dtype}"
            )
        elif starts.device != keys.device:
            raise ValueError(
                f"RetroLayer.prefill: starts must be on {keys.device} like keys, "
                f"got {starts.device}"
            )
        elif (
            starts.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and bool(((starts < 0) | (starts > tokens)).any())
        ):
            raise ValueError(
                f"RetroLayer.prefill: starts must lie in 0..{tokens}, got {starts.tolist()}"
            )
        self.reset()
        wave_index.build(self, keys, values, starts.long().clamp(0, tokens))

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
    ) -> Tensor:
        """Appends one token per row, then attends to everything the rows hold.

        Args:
            query: `[B, Hq, 1, D]`, any strides, after rotary embedding.
            key: `[B, Hkv, 1, D]`, any strides, after rotary embedding.
            value: like `key`.
            scale: factor on q . k; None: 1 / sqrt(D).

        Returns:
            `[B, Hq, 1, D]` in query's dtype.

        Raises:
            ValueError: a shape, dtype or device does not fit the layer.
            RuntimeError: a row is full; the layer keeps what it held. A GPU is not waited for:
                there the token is dropped and counted, in `stats()["dropped_tokens"]`.
        """
        self._check_tokens("decode", key, value)
        expected = (self.batch_size, self.num_query_heads, 1, self.head_dim)
        if tuple(query.shape) != expected:
            raise ValueError(
                f"RetroLayer.decode: query must be [B, Hq, 1, D] = {list(expected)}, "
                f"got {list(query.shape)}"
            )
        self._check_like_layer("decode", "query", query)
        out = decode_step(
            self,
            query.squeeze(2),
            key,
            value,
            self.head_dim**-0.5 if scale is None else scale,
        )
        return out.unsqueeze(2)

    def reset(self) -> None:
        """Forgets all tokens and statistics; the memory stays."""
        for buffer in (self.offsets, self.totals, self.counters):
            buffer.zero_()
        if self.offload:
            wave_buffer.clear(self)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, in place (beam search).

        Args:
            rows: `[B]` integers.
        """
        for name, buffer in self.named_buffers():
            axis = 1 if name in ("steady", "store", "centroids", "totals", "pages") else 0
            buffer.copy_(buffer.index_select(axis, rows.to(buffer.device)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Another layer's KV without its page cache, if `strict=False` lets that pass.
        if self.offload and any(prefix + name not in state_dict for name in wave_buffer.NAMES):
            wave_buffer.clear(self)

    def lengths(self) -> Tensor:
        """Tokens that each row holds, padding not included: `[B]` int64, on the device."""
        return self.counters[:, Counter.STEADY_TOKENS] + self.counters[:, Counter.INDEXED_TOKENS]

    def stats(self) -> dict[str, int]:
        """Counters since the last prefill or reset, summed over rows; waits for the device.

        Returns:
            steps: decode steps (of the batch).
            steady_tokens, indexed_tokens, clusters: what the rows hold now.
            updates: segments that became clusters while decoding.
            retrieved_tokens: tokens retrieved, over KV heads and steps.
            page_hits, page_misses: pages of retrieved clusters that were in the page cache, and
                those that were not; 0 unless offloaded, like the next four.
            slow_bytes_per_token: bytes of KV that one row's step reads from the slow memory, on
                average: the tokens of missed pages.
            page_admissions, page_evictions: clusters that came into the page cache and left it.
            late_decisions: times that a KV head's step found no decision of the step before on what
                may leave the page cache; always 0 on a CPU, which decides between two steps.
            truncated_clusters: clusters dropped for want of room; always 0: the working set has no
                buffer that could overflow.
            dropped_tokens: tokens that found no room in a full row on a GPU; the CPU raises.
            bytes_read_per_token: bytes of KV and index that one row's step reads, on average.
        """
        rows = self.counters.tolist()
        totals = dict(zip(Counter, map(sum, zip(*rows, strict=True)), strict=True))
        steps = rows[0][Counter.STEPS]
        rows_steps = max(totals[Counter.STEPS], 1)
        token_bytes = 2 * self.head_dim * self.store.element_size()
        estimated = sum(self._estimated(row[Counter.CLUSTERS]) for row in rows)
        per_head = (
            (totals[Counter.STEADY_TOKENS] * token_bytes)
            + totals[Counter.CLUSTERS] * (token_bytes // 2 + 8)  # mean key, offset, variance
            + estimated * (token_bytes // 2)  # mean value
        ) / self.batch_size
        retrieved = totals[Counter.RETRIEVED_TOKENS] / rows_steps * token_bytes
        return {
            "steps": steps,
            "steady_tokens": totals[Counter.STEADY_TOKENS],
            "indexed_tokens": totals[Counter.INDEXED_TOKENS],
            "clusters": totals[Counter.CLUSTERS],
            "updates": totals[Counter.UPDATES],
            "retrieved_tokens": totals[Counter.RETRIEVED_TOKENS],
            "page_hits": totals[Counter.PAGE_HITS],
            "page_misses": totals[Counter.PAGE_MISSES],
            "slow_bytes_per_token": round(totals[Counter.MISSED_TOKENS] / rows_steps * token_bytes),
            "page_admissions": totals[Counter.ADMISSIONS],
            "page_evictions": totals[Counter.EVICTIONS],
            "late_decisions": totals[Counter.LATE_DECISIONS],
            "truncated_clusters": 0,
            "dropped_tokens": totals[Counter.DROPPED_TOKENS],
            "bytes_read_per_token": round(per_head * self.num_kv_heads + retrieved),
        }

    def extra_repr(self) -> str:
        return (
            f"batch_size={self.batch_size}, num_query_heads={self.num_query_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"max_length={self.max_length}, dtype={self.store.dtype}, device={self.store.device}, "
            f"offload={self.offload}"
        )

    def _estimated(self, clusters: int) -> int:
        config = self.config
        retrieved = retrieved_count(
            config.retrieval_budget, config.min_retrieved_clusters, clusters
        )
        return min(round(config.estimation_budget * clusters), clusters - retrieved)

    def _check_tokens(self, method: str, key: Tensor, value: Tensor) -> None:
        name, other, letter = (
            ("keys", "values", "T") if method == "prefill" else ("key", "value", "1")
        )
        fits = key.dim() == 4 and (key.shape[0], key.shape[1], key.shape[3]) == (
            self.batch_size,
            self.num_kv_heads,
            self.head_dim,
        )
        if not fits or (method == "decode" and key.shape[2] != 1):
            raise ValueError(
                f"RetroLayer.{method}: {name} must be [B, Hkv, {letter}, D] = [{self.batch_size}, "
                f"{self.num_kv_heads}, {letter}, {self.head_dim}], got {list(key.shape)}"
            )
        if value.shape != key.shape:
            raise ValueError(
                f"RetroLayer.{method}: {other} must have the shape of {name}, "
                f"got {list(value.shape)} and {list(key.shape)}"
            )
        self._check_like_layer(method, name, key)
        self._check_like_layer(method, other, value)

    def _check_like_layer(self, method: str, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.store.dtype or tensor.device != self.store.device:
            raise ValueError(
                f"RetroLayer.{method}: {name} must be {self.store.dtype} on {self.store.device} "
                f"like the layer, got {tensor.dtype} on {tensor.device}"
            )
