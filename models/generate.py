"""A model fed token by token, with dense or retro attention, and what a step of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.models.attention import NAME
from retro_ops.models.cache import RetroCache
from retro_ops.models.spread import is_spread

ATTENTIONS = {"dense": "sdpa", "retro": NAME}
"""Kinds of attention by the names that commands take; the values are transformers' names."""


def make_cache(
    model: PreTrainedModel,
    attention: str,
    *,
    batch_size: int,
    max_length: int,
    config: RetroConfig | None = None,
    offload: bool = False,
) -> Cache:
    """Sets the model to one kind of attention and makes the cache that belongs to it.

    Args:
        model: on its device.
        attention: "dense" (transformers' sdpa and DynamicCache) or "retro". A model that
            transformers has no sdpa for, for its attention sinks, is dense with the function
            `retro` too, which is exact without a RetroCache.
        batch_size: rows.
        max_length: tokens that a row can come to hold.
        config: budgets and sizes of retro; None: the defaults.
        offload: keep the KV stores of retro in slow memory behind page caches, see `RetroCache`;
            dense has none.

    Raises:
        ValueError: an unknown kind, or retro attention cannot serve the model.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
    if attention == "dense":
        cache: Cache = DynamicCache(config=model.config)
    else:
        cache = RetroCache(
            model.config, config, max_cache_len=max_length, batch_size=batch_size, offload=offload
        )
    own = ATTENTIONS[attention]
    model.set_attn_implementation(own if model._supports_sdpa else NAME)
    return cache


def kv_bytes_per_token(cache: Cache, batch_size: int) -> int:
    """Bytes of keys, values and index that the next step of one row reads, over all layers.

    Layers of a RetroCache count what they read on average; any other layer is read whole.
    """
    total = 0
    if isinstance(cache, RetroCache):
        total = int(cache.stats().get("bytes_read_per_token", 0))
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            total += 2 * keys.numel() * keys.element_size() // batch_size
    return total


@dataclass
class PageUse:
    """What the page caches of offloaded layers did in decode steps, of one prompt or of several."""

    hits: int = 0
    """Pages that were in a page cache, over layers, rows and KV heads."""
    misses: int = 0
    """Those that were not."""
    tokens: int = 0
    """Decode steps, each row's counted."""
    slow_bytes: int = 0
    """Of KV, that the steps read from slow memory."""

    def add(self, cache: RetroCache) -> None:
        """Counts the steps of an offloaded cache since its last prompt; waits for the device."""
        stats = cache.stats()
        tokens = int(stats.get("steps", 0)) * cache.batch_size
        self.hits += int(stats.get("page_hits", 0))
        self.misses += int(stats.get("page_misses", 0))
        self.tokens += tokens
        self.slow_bytes += int(stats.get("slow_bytes_per_token", 0)) * tokens

    @property
    def hit_ratio(self) -> float | None:
        """In 0..1; None: no page was asked for, as in contexts that are too short to index."""
        pages = self.hits + self.misses
        return self.hits / pages if pages else None

    @property
    def slow_bytes_per_token(self) -> float:
        """Of one row's step, over all layers."""
        return self.slow_bytes / max(self.tokens, 1)


def finished_at(device: torch.device) -> float:
    """Seconds on a clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Decoder:
    """One batch of rows of equal length: a prompt at once, then a token of each row at a time.

    A retro step is compiled into one graph, if asked for. A dense one is not: its cache grows, and
    transformers' cache of fixed size is several times slower on a CPU. Nor is that of a model that
    lies on several devices: `spread` says whether its shares are.

    Args:
        model, attention, batch_size, max_length, config, offload: as in `make_cache`.
        compile_step: compile the step of retro attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: str,
        *,
        batch_size: int,
        max_length: int,
        config: RetroConfig | None = None,
        offload: bool = False,
        compile_step: bool = False,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.cache = make_cache(
            model,
            attention,
            batch_size=batch_size,
            max_length=max_length,
            config=config,
            offload=offload,
        )
        self.prefill_seconds = 0.0
        self.step_seconds: list[float] = []
        """Of each step so far; the first one compiles, if anything does."""
        # Steps read the same memory: strides that differ from call to call would compile anew.
        self._ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._forward: Callable[..., Any] = model.forward
        if compile_step and attention == "retro" and not is_spread(model):
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self._forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits `[B, V]` of the token that follows the prompt `[B, T]`."""
        begin = finished_at(self.model.device)
        logits = self._run(self.model.forward, ids)
        self.prefill_seconds = finished_at(self.model.device) - begin
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Logits `[B, V]` of the token that follows `ids` `[B, 1]`."""
        begin = finished_at(self.model.device)
        self._ids.copy_(ids)
        logits = self._run(self._forward, self._ids)
        self.step_seconds.append(finished_at(self.model.device) - begin)
        return logits

    @torch.inference_mode()
    def _run(self, forward: Callable[..., Any], ids: Tensor) -> Tensor:
        out = forward(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]
