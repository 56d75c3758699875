"""RetroCache: a transformers cache whose full-attention layers are RetroLayers."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from retro_ops import RetroConfig, RetroLayer
from retro_ops.models import memory, rope
from retro_ops.models.prefill import PrefillAttention
from retro_ops.models.support import check_model

FORMAT = "retro_cache"
FORMAT_VERSION = 2
# Of the model's config, what keys and values depend on.
MODEL_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "layer_types",
    "sliding_window",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_parameters",
)


class LayerOffset(int):
    """A number where transformers expects the position of a layer's first key.

    It reaches the mask function `retro`, which asks the layer whether it can take a turn, before
    any layer has changed.
    """

    layer: RetroCacheLayer

    @classmethod
    def of(cls, layer: RetroCacheLayer, value: int) -> LayerOffset:
        """The number `value`, of `layer`."""
        offset = cls(value)
        offset.layer = layer
        return offset


class RetroTokens:
    """New keys and values on their way from a layer to the attention function `retro`.

    It stands where transformers expects key and value tensors; any other attention function that
    touches it learns what is wrong.
    """

    def __init__(
        self, layer: RetroCacheLayer | SlidingCacheLayer, keys: Tensor, values: Tensor
    ) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "RetroCache works with attn_implementation='retro' only; load the model with it, or "
            "call model.set_attn_implementation('retro')"
        )


class RetroCacheLayer(CacheLayerMixin):
    """One full-attention layer of a RetroCache; allocates its RetroLayer with its first tokens.

    With a `sliding_window`, transformers takes the layer for one with a window; `RetroCache` knows
    that no context fills it.
    """

    is_compileable = True
    is_croppable = False

    def __init__(
        self,
        config: RetroConfig,
        *,
        num_query_heads: int,
        batch_size: int,
        max_length: int,
        offload: bool,
        sliding_window: int | None = None,
        prefill_attention: PrefillAttention | None = None,
    ) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.prefill_attention = prefill_attention
        self.config = config
        self.num_query_heads = num_query_heads
        self.batch_size = batch_size
        self.max_length = max_length
        self.offload_store = offload
        self.retro: RetroLayer | None = None
        # Layers that still have no memory when this one gets its own, this one included.
        self.layers_to_come = 1
        self.growth_delay = 0
        # A tensor, changed in place, so that positions do not recompile a step. It counts padding.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # Tokens so far up to the last padding that is not at the beginning of a row.
        self.padded_length = torch.zeros((), dtype=torch.int64)
        # Only forwards of several tokens ask this: they are a prompt, or continue one.
        self.is_filled = False
        self._build_marks: tuple[Any, Any] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the state for keys `[B, Hkv, any, D]`."""
        with _outside_inference_mode():
            retro = RetroLayer(
                self.config,
                batch_size=self.batch_size,
                num_query_heads=self.num_query_heads,
                num_kv_heads=key_states.shape[1],
                head_dim=key_states.shape[3],
                max_length=self.max_length,
                dtype=key_states.dtype,
                device=key_states.device,
                offload=self.offload_store,
                _layers_to_come=self.layers_to_come,
                _growth_delay=self.growth_delay,
            )
        self._allocate(retro)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RetroTokens, RetroTokens]:
        """Hands new tokens to the attention function, which knows the padding.

        transformers passes the results on as they are.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = RetroTokens(self, key_states, value_states)
        return tokens, tokens

    def prefill(self, keys: Tensor, values: Tensor, starts: Tensor | None) -> None:
        """Indexes a prompt, `[B, Hkv, T, D]`; see `RetroLayer.prefill`."""
        retro = self._initialized()
        begin = self._mark()
        retro.prefill(keys, values, starts)
        self._build_marks = (begin, self._mark())
        self.cumulative_length.add_(keys.shape[2])
        self.is_filled = True

    def decode(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Appends one token and attends; see `RetroLayer.decode`."""
        out = self._initialized().decode(query, keys, values, scale, sinks)
        self.cumulative_length.add_(1)
        self.is_filled = True
        return out

    def extend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        attention_mask: Tensor | None,
        scale: float | None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Takes in a later turn, query `[B, Hq, T, D]`; see `RetroLayer.extend`.

        Args:
            query, keys, values, scale, sinks: as there.
            attention_mask: `[B, past + T]` or `[B, T]`, 0 for padding in the turn, and for the
                latest tokens so far, if they are to be forgotten; None: neither.
        """
        retro, tokens = self._initialized(), query.shape[2]
        if not torch.compiler.is_compiling():
            surplus = self.check_turn(attention_mask, tokens)
            if surplus.any():
                retro.crop(retro.lengths() - surplus.to(keys.device))
        mask = None if attention_mask is None else attention_mask[:, -tokens:].bool()
        out = retro.extend(query, keys, values, scale, mask, sinks)
        if mask is not None:
            place = torch.arange(1, tokens + 1, device=mask.device)
            until = (place * ~mask).amax()
            until = torch.where(until > 0, self.cumulative_length + until, self.padded_length)
            self.padded_length.copy_(until)
        self.cumulative_length.add_(tokens)
        self.is_filled = True
        return out

    def check_turn(self, attention_mask: Tensor | None, tokens: int) -> Tensor:
        """Raises unless the layer can take a turn of `tokens` tokens; waits for the device.

        Args:
            attention_mask: as in `extend`.

        Returns:
            `[B]` int64 on the CPU: tokens of each row that the mask wants forgotten.

        Raises:
            ValueError: the turn of a row ends with padding, or the mask has not the tokens that the
                rows hold.
            RuntimeError: a row has no room.
        """
        retro = self._initialized()
        held = retro.lengths().cpu()
        surplus = torch.zeros_like(held)
        new = torch.full_like(held, tokens)
        if attention_mask is not None:
            real = attention_mask.bool().cpu()
            turn, past = real[:, -tokens:], real[:, :-tokens]
            if not turn[:, -1].all():
                raise ValueError(
                    f"RetroCache: the {tokens} new tokens of a filled cache must not end with "
                    "padding in any row; set tokenizer.padding_side = 'left'"
                )
            new = turn.sum(dim=1)
            if past.shape[1]:
                surplus = held - past.sum(dim=1)
                trailing = (~past).long().flip(1).cumprod(dim=1).sum(dim=1)
                wrong = (surplus < 0) | (surplus > trailing)
                if wrong.any():
                    row = int(wrong.long().argmax())
                    raise ValueError(
                        f"RetroCache: the attention_mask has {int(past[row].sum())} tokens of row "
                        f"{row} before the {tokens} new ones, the cache holds {int(held[row])}; "
                        "give the mask that they came with (the latest of them may be masked, "
                        "which forgets them)"
                    )
                fixed = (surplus > retro.croppable().cpu()) & (surplus < held)
                if fixed.any():
                    row = int(fixed.long().argmax())
                    raise ValueError(
                        f"RetroCache: the attention_mask masks the latest {int(surplus[row])} "
                        f"tokens of row {row}, but only {int(retro.croppable()[row])} can be "
                        "forgotten, the others are in clusters; reset() the cache and prefill anew"
                    )
        for before, more in zip((held - surplus).tolist(), new.tolist(), strict=True):
            if before + more > self.max_length:
                raise RuntimeError(
                    f"RetroCache: a row holds {before} of max_cache_len {self.max_length} tokens, "
                    f"{more} more do not fit; make the cache with a larger max_cache_len"
                )
        return surplus

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError unless the latest `tokens` tokens can be forgotten."""
        length, padded = int(self.cumulative_length), int(self.padded_length)
        if tokens > length - padded:
            raise ValueError(
                f"RetroCache.crop: cannot remove {tokens} tokens, only {length - padded} came "
                "after the padding of the latest turn"
                if padded
                else f"RetroCache.crop: cannot remove {tokens} of {length} tokens; reset() forgets "
                "all of them"
            )
        if self.retro is None:
            return
        lengths, croppable = self.retro.lengths(), self.retro.croppable()
        fixed = (croppable < tokens) & (lengths > tokens)
        if fixed.any():
            row = int(fixed.long().argmax())
            raise ValueError(
                f"RetroCache.crop: cannot remove {tokens} tokens, row {row} can lose "
                f"{int(croppable[row])} of {int(lengths[row])}: the others are in clusters, which "
                "do not know the order of their tokens; reset() and prefill again, or fork() "
                "before what may have to be undone"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest `-tokens_to_remove` tokens, a number of 0 or less."""
        self.check_crop(-tokens_to_remove)
        if self.retro is not None:
            self.retro.crop((self.retro.lengths() + tokens_to_remove).clamp(min=0))
        self.cumulative_length.add_(tokens_to_remove)
        self.is_filled = int(self.cumulative_length) > 0

    def fork(self, rows: Tensor) -> RetroCacheLayer:
        """A copy that goes on by itself, with rows `rows` `[R]` of this one."""
        twin = RetroCacheLayer(
            self.config,
            num_query_heads=self.num_query_heads,
            batch_size=len(rows),
            max_length=self.max_length,
            offload=self.offload_store,
            sliding_window=self.sliding_window,
            prefill_attention=self.prefill_attention,
        )
        twin._load_lengths(self)
        twin._build_marks = (0.0, self.build_seconds())
        if self.retro is not None:
            with _outside_inference_mode():
                retro = self.retro.fork(rows)
            twin._allocate(retro)
        return twin

    def named_buffers(self) -> dict[str, Tensor]:
        """What the layer has allocated; nothing before the first tokens."""
        return {} if self.retro is None else dict(self.retro.named_buffers())

    def state(self) -> dict[str, Tensor]:
        """Copies of what the layer holds, for `load_state`; nothing before the first tokens."""
        if self.retro is None:
            return {}
        return {
            **self.retro.used_state(),
            "cumulative_length": self.cumulative_length.clone(),
            "padded_length": self.padded_length.clone(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of such a layer gave; this one is new."""
        if not state:
            return
        state = dict(state)
        for name in ("cumulative_length", "padded_length"):
            getattr(self, name).copy_(state.pop(name))
        self.lazy_initialization(*state["steady"])
        self._initialized().load_used_state(state)
        self.is_filled = int(self.cumulative_length) > 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No keys: the mask function `retro` knows a RetroCache by this.

        And as position the window, if there is one, negative, as `SlidingCacheLayer`.
        """
        offset = -(self.sliding_window or 0)
        if query_length == 1 or not self.is_filled or torch.compiler.is_compiling():
            return 0, offset
        return 0, LayerOffset.of(self, offset)

    def get_seq_length(self) -> int:
        """Tokens so far, padding included; a tensor, changed in place."""
        return self.cumulative_length  # type: ignore[return-value]  # as transformers' StaticLayer

    def get_max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.max_length

    def reset(self) -> None:
        """Forgets all tokens; the memory stays, and graphs compiled for it."""
        if self.retro is not None:
            self.retro.finish_prefill()  # of a prompt that was interrupted
            self.retro.reset()
        self.cumulative_length.zero_()
        self.padded_length.zero_()
        self.is_filled = False
        self._build_marks = None

    def release(self) -> None:
        """Gives the memory back; the layer is as it was made."""
        if self.retro is not None:
            self.retro.finish_prefill()
        self.retro = None
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        self.padded_length = torch.zeros((), dtype=torch.int64)
        self.is_filled = self.is_initialized = False
        self._build_marks = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        if self.retro is not None:
            self.retro.reorder(beam_idx)

    def longest_row(self) -> int:
        """Tokens of the longest row, padding not included; waits for the device."""
        return 0 if self.retro is None else int(self.retro.lengths().max())

    def build_seconds(self) -> float:
        """Seconds that indexing the last prompt took; 0 before any."""
        if self._build_marks is None:
            return 0.0
        begin, end = self._build_marks
        if isinstance(begin, float):
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def __getstate__(self) -> dict[str, Any]:
        # CUDA events cannot be copied, what they measured can: copy.deepcopy keeps a filled cache.
        return {**self.__dict__, "_build_marks": (0.0, self.build_seconds())}

    def _allocate(self, retro: RetroLayer) -> None:
        self.retro = retro
        self.cumulative_length = self.cumulative_length.to(retro.store.device)
        self.padded_length = self.padded_length.to(retro.store.device)
        _mark_static(*retro.buffers(), self.cumulative_length, self.padded_length)
        self.is_initialized = True

    def _load_lengths(self, other: RetroCacheLayer) -> None:
        self.cumulative_length = other.cumulative_length.clone()
        self.padded_length = other.padded_length.clone()
        self.is_filled = other.is_filled

    def _initialized(self) -> RetroLayer:
        assert self.retro is not None  # update() came before
        return self.retro

    def _mark(self) -> Any:
        if torch.compiler.is_compiling():
            return 0.0
        if self.cumulative_length.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter()


class SlidingCacheLayer(CacheLayerMixin):
    """One sliding-window layer of a RetroCache: the latest tokens of every row, the newest last.

    transformers' own layer counts tokens in a Python number, which makes a new graph of every step.
    Here the count is a tensor, and slots that nothing has filled yet have negative positions, which
    the mask function `retro` leaves out.

    Args:
        sliding_window: tokens that a token attends to, itself included.
        max_length: tokens that a row can hold, if that is limited; no more are kept.
    """

    is_compileable = True
    is_sliding = True
    is_croppable = False

    def __init__(self, sliding_window: int, max_length: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        kept = sliding_window if max_length is None else min(sliding_window, max_length)
        self.past = kept - 1
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # Only forwards of several tokens ask this: they are a prompt, or continue one.
        self.is_filled = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the window for keys and values `[B, Hkv, any, D]`."""
        rows, heads = key_states.shape[:2]
        with _outside_inference_mode():
            keys = key_states.new_zeros(rows, heads, self.past, key_states.shape[3])
            values = value_states.new_zeros(rows, heads, self.past, value_states.shape[3])
        self._allocate(keys, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor] | tuple[RetroTokens, RetroTokens]:
        """Takes new tokens in, `[B, Hkv, T, D]`; returns them behind the window as it was before.

        The tokens of a prompt have nothing before them: they go to the attention function, which
        calls `prefill`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._is_prompt(key_states.shape[2]):
            tokens = RetroTokens(self, key_states, value_states)
            return tokens, tokens
        results = []
        for window, new in ((self.keys, key_states), (self.values, value_states)):
            whole = torch.cat((window, new), dim=2)
            window.copy_(whole[:, :, new.shape[2] :])
            results.append(whole)
        self.cumulative_length.add_(key_states.shape[2])
        self.is_filled = True
        return results[0], results[1]

    def prefill(self, keys: Tensor, values: Tensor) -> None:
        """Keeps the latest tokens of a prompt, `[B, Hkv, T, D]`."""
        for window, new in ((self.keys, keys), (self.values, values)):
            if torch.compiler.is_compiling():  # for one graph of all lengths
                # Zeros, not what a conversation before has left: masked, but a NaN would pass.
                whole = torch.cat((torch.zeros_like(window), new), dim=2)
                window.copy_(whole.narrow(2, new.shape[2], self.past))
                continue
            latest = new[:, :, max(new.shape[2] - self.past, 0) :]
            window[:, :, self.past - latest.shape[2] :] = latest
        self.cumulative_length.add_(keys.shape[2])
        self.is_filled = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return, and the position of the first one.

        For a prompt no keys, as `RetroCacheLayer`, and as position minus the window, by which
        `retro_mask` knows it.
        """
        if self._is_prompt(query_length):
            return 0, -self.sliding_window
        # A tensor, perhaps a negative one: `retro_mask` knows this layer by it.
        return self.past + query_length, self.cumulative_length - self.past  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Tokens so far, padding included; a tensor, changed in place."""
        return self.cumulative_length  # type: ignore[return-value]  # as transformers' StaticLayer

    def get_max_length(self) -> int:
        """-1: the window goes on for ever."""
        return -1

    def reset(self) -> None:
        """Forgets all tokens; the memory stays, and graphs compiled for it."""
        super().reset()
        self.is_filled = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        if self.is_initialized:
            for window in (self.keys, self.values):
                window.copy_(window.index_select(0, beam_idx.to(window.device)))

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError unless the latest `tokens` tokens can be forgotten."""
        length = int(self.cumulative_length)
        if tokens > length:
            raise ValueError(
                f"RetroCache.crop: cannot remove {tokens} of {length} tokens; reset() forgets all "
                "of them"
            )
        if tokens and length > self.past:
            raise ValueError(
                f"RetroCache.crop: cannot remove {tokens} tokens: after {length} a sliding-window "
                f"layer has let go of those before the latest {self.past}, which it would need "
                "again; reset() and prefill again, or fork() before what may have to be undone"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest `-tokens_to_remove` tokens, a number of 0 or less."""
        self.check_crop(-tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            for window in (self.keys, self.values):
                kept = window[:, :, :tokens_to_remove].clone()
                window[:, :, -tokens_to_remove:] = kept
        self.cumulative_length.add_(tokens_to_remove)
        self.is_filled = int(self.cumulative_length) > 0

    def fork(self, rows: Tensor) -> SlidingCacheLayer:
        """A copy that goes on by itself, with rows `rows` `[R]` of this one."""
        twin = SlidingCacheLayer(self.sliding_window)
        twin.past = self.past
        twin.cumulative_length = self.cumulative_length.clone()
        twin.is_filled = self.is_filled
        if self.is_initialized:
            chosen = rows.to(self.keys.device)
            with _outside_inference_mode():
                keys, values = (each.index_select(0, chosen) for each in (self.keys, self.values))
            twin._allocate(keys, values)
        return twin

    def named_buffers(self) -> dict[str, Tensor]:
        """What the layer has allocated; nothing before the first tokens."""
        return {"keys": self.keys, "values": self.values} if self.is_initialized else {}

    def state(self) -> dict[str, Tensor]:
        """Copies of what the layer holds, for `load_state`; nothing before the first tokens."""
        if not self.is_initialized:
            return {}
        return {
            **{name: tensor.clone() for name, tensor in self.named_buffers().items()},
            "cumulative_length": self.cumulative_length.clone(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` of such a layer gave; this one is new."""
        if not state:
            return
        self.cumulative_length.copy_(state["cumulative_length"])
        self.lazy_initialization(state["keys"], state["values"])
        for name, window in (("keys", self.keys), ("values", self.values)):
            # A cache of another max_cache_len may keep more or fewer tokens.
            latest = state[name][:, :, max(state[name].shape[2] - self.past, 0) :]
            window[:, :, self.past - latest.shape[2] :] = latest
        self.is_filled = int(self.cumulative_length) > 0

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.cumulative_length = self.cumulative_length.to(keys.device)
        _mark_static(self.keys, self.values, self.cumulative_length)
        self.is_initialized = True

    def _is_prompt(self, tokens: int) -> bool:
        return tokens > 1 and not self.is_filled


class RetroCache(Cache):
    """A cache for `model.generate` and for forwards of a model with `attn_implementation="retro"`.

    Full-attention layers keep their KV in a RetroLayer; sliding-window layers keep their window and
    attend exactly. Decoding compiles into one graph: lengths are tensors, memory is allocated once.

    Args:
        config: the model's config.
        retro_config: budgets and sizes; None: the defaults. The index of each layer grows one token
            later than that of the layer before it, so that no two grow in the same step.
        max_cache_len: tokens that a row can hold, prompt and generated ones.
        batch_size: rows.
        offload: keep the KV stores in slow memory behind page caches; see `RetroLayer`. On a GPU
            there must be room for all layers when the first one gets its memory.
        prefill_attention: how full-attention layers attend to a prompt; None: exactly, by
            transformers' `sdpa`. See `retro_ops.models.prefill`.

    Layers allocate with their first tokens, on the device of these: a model that is spread over
    several devices has each layer's KV beside its weights.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model has layers that retro attention cannot serve, its rotary embedding
            would switch in a context of `max_cache_len`, or a number is out of range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        retro_config: RetroConfig | None = None,
        *,
        max_cache_len: int,
        batch_size: int = 1,
        offload: bool = False,
        prefill_attention: PrefillAttention | None = None,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(
                "RetroCache: config must be the config of a model, model.config, got "
                f"{type(config).__name__}"
            )
        if retro_config is not None and not isinstance(retro_config, RetroConfig):
            raise TypeError(f"RetroCache: retro_config must be a RetroConfig, got {retro_config!r}")
        for name, number in (("max_cache_len", max_cache_len), ("batch_size", batch_size)):
            if not isinstance(number, int):
                raise TypeError(f"RetroCache: {name} must be an int, got {number!r}")
        if prefill_attention is not None and not callable(prefill_attention):
            raise TypeError(
                "RetroCache: prefill_attention must be a function, as LocalPrefill(), got "
                f"{prefill_attention!r}"
            )
        if max_cache_len < 1 or batch_size < 1:
            raise ValueError(
                "RetroCache: max_cache_len and batch_size must be at least 1, "
                f"got {max_cache_len} and {batch_size}"
            )
        self.retro_config = RetroConfig() if retro_config is None else retro_config
        layer_types = check_model(config)
        reason = rope.why_not_fixed(config, max_cache_len)
        if reason is not None:
            raise ValueError(
                f"RetroCache: {type(config).__name__} is not ready for {max_cache_len} tokens: "
                f"{reason}; load it with retro_ops.models.load_model(..., context={max_cache_len})"
            )
        text_config = config.get_text_config(decoder=True)
        window: int = getattr(text_config, "sliding_window", None) or 0
        # Some models have a window that none of their contexts fills: their layers see all tokens.
        longest = max(rope.longest_context(config) or max_cache_len, max_cache_len)
        layers: list[Any] = []
        for kind in layer_types:
            if kind == "full_attention" or window >= longest:
                layers.append(
                    RetroCacheLayer(
                        self.retro_config,
                        num_query_heads=text_config.num_attention_heads,
                        batch_size=batch_size,
                        max_length=max_cache_len,
                        offload=offload,
                        sliding_window=window if kind == "sliding_attention" else None,
                        prefill_attention=prefill_attention,
                    )
                )
            else:
                # Full layers refuse more than max_cache_len tokens; without one, nothing would.
                limit = max_cache_len if "full_attention" in layer_types else None
                layers.append(SlidingCacheLayer(window, limit))
        super().__init__(layers=layers)
        for place, layer in enumerate(self.retro_layers):
            layer.layers_to_come = len(self.retro_layers) - place
            layer.growth_delay = place
        self._model = _model_fields(config)
        self._offload = offload
        self._rows = batch_size
        self._max_tokens = max_cache_len

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Hands new tokens to a layer, if the cache can take them; see `Cache.update`.

        Args:
            key_states: `[B, Hkv, T, D]`, float32, bfloat16 or float16, after rotary embedding.
            value_states: like `key_states`.
            layer_idx: of the layer in the model.

        Returns:
            What the attention function `retro` takes for keys and values.

        Raises:
            ValueError: wrong number of rows, or a prompt longer than `max_cache_len`.
            RuntimeError: a row would exceed `max_cache_len`.
            MemoryError: the cache is new, and its buffers cannot all be allocated.
        """
        if layer_idx == 0:  # before any layer has changed
            self._check_room(key_states)
            self._check_memory(key_states, value_states)
        if not self.layers[layer_idx].is_initialized:
            try:
                self.layers[layer_idx].lazy_initialization(key_states, value_states)
            except MemoryError:  # give back what there is, or the next try would find less
                for layer in self.retro_layers:
                    layer.release()
                raise
            _mark_last(self.retro_layers)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def early_initialization(self, batch_size: int, *args: Any, **kwargs: Any) -> None:
        """Allocates all layers now instead of with their first tokens; see `Cache`.

        Args:
            batch_size: rows, as the cache was made for.

        Raises:
            ValueError: another number of rows.
        """
        self._check_rows(batch_size)
        super().early_initialization(batch_size, *args, **kwargs)
        _mark_last(self.retro_layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens of every row, exactly.

        Tokens that are in clusters cannot go, see `RetroLayer.crop`, nor can any once they are more
        than a sliding-window layer keeps.

        Args:
            tokens_to_remove: 0 or a negative number, as of transformers' caches: -3 removes three.
                The latest positions of all rows go; a row that began later is empty then.

        Raises:
            ValueError: a positive number (which was a length once, in transformers), or a layer
                cannot forget so many tokens; no layer has changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"RetroCache.crop: the number of tokens to remove is given as a negative one, got "
                f"{tokens_to_remove}; crop(-{tokens_to_remove}) removes {tokens_to_remove}"
            )
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def fork(self, rows: Tensor | None = None) -> RetroCache:
        """A copy that goes on by itself: a shared prefix, several continuations.

        Args:
            rows: `[R]` integers: row i of the copy is row `rows[i]` of this cache, so that one row
                may become several; None: the same rows.

        Raises:
            ValueError: `rows` names a row that is not there.
        """
        if rows is None:
            rows = torch.arange(self._rows)
        if not isinstance(rows, Tensor) or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"RetroCache.fork: rows must be a tensor of integers, got {rows!r}")
        chosen = rows.tolist()
        if rows.dim() != 1 or not chosen or not all(0 <= row < self._rows for row in chosen):
            raise ValueError(
                f"RetroCache.fork: rows must be one or more of 0..{self._rows - 1}, got {chosen}"
            )
        twin = copy.copy(self)
        twin.layers = [layer.fork(rows) for layer in self.layers]
        _mark_last(twin.retro_layers)
        twin._rows = len(chosen)
        return twin

    def save(self, path: str | Path) -> None:
        """Writes the cache to a file, for `load`.

        The file is in safetensors format; the metadata `header` is JSON that says what it is of.
        Only what is in use is written; page caches are not, they change no result.

        Args:
            path: replaced, if it is there, when all is written.

        Raises:
            OSError: the file cannot be written there.
        """
        path = Path(path)
        if path.is_dir() or not path.parent.is_dir():
            what = "it is a folder" if path.is_dir() else f"there is no folder '{path.parent}'"
            raise FileNotFoundError(f"RetroCache.save: cannot write {str(path)!r}: {what}")
        tensors = {
            f"{index}.{name}": tensor.contiguous().cpu()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.state().items()
        }
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "model": self._model,
            "retro_config": asdict(self.retro_config),
            "max_cache_len": self._max_tokens,
            "batch_size": self._rows,
            "offload": self._offload,
            "lengths": [
                [] if layer.retro is None else layer.retro.lengths().tolist()
                for layer in self.retro_layers
            ],
        }
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            save_file(tensors, unfinished, metadata={"header": json.dumps(header)})
            unfinished.replace(path)
        except SafetensorError as error:
            raise OSError(f"RetroCache.save: cannot write {str(path)!r}: {error}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: PreTrainedConfig,
        retro_config: RetroConfig | None = None,
        *,
        max_cache_len: int | None = None,
        offload: bool | None = None,
        device: torch.device | str | Sequence[torch.device | str] = "cpu",
    ) -> RetroCache:
        """The cache that `save` wrote; generation goes on with the same tokens.

        Args:
            path: the file.
            config: the model's config. That the weights are those that made the file is up to you.
            retro_config: budgets and sizes, if they are to be checked; None: those of the file.
            max_cache_len: tokens that a row can hold; None: as it was. It may be larger, or smaller
                if the tokens still fit.
            offload: as in `RetroCache`; None: as it was.
            device: where the cache is to live; or one for each layer of the model, as
                `retro_ops.models.load.layer_devices` gives them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no cache, or one of another format version, model or
                `retro_config`, or its tokens do not fit `max_cache_len`, or there are more or fewer
                devices than layers.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"RetroCache.load: no file {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("header", "null"))
                _check_header(path, header, config, retro_config)
                offloads = header["offload"] if offload is None else offload
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"RetroCache.load: {str(path)!r} is not a cache that RetroCache.save wrote, or is "
                f"damaged ({error})"
            ) from error
        cache = cls(
            config,
            RetroConfig(**header["retro_config"]),
            max_cache_len=header["max_cache_len"] if max_cache_len is None else max_cache_len,
            batch_size=header["batch_size"],
            offload=offloads,
        )
        places = (
            [device] * len(cache.layers)
            if isinstance(device, (torch.device, str))
            else list(device)
        )
        if len(places) != len(cache.layers):
            raise ValueError(
                f"RetroCache.load: device must be one, or one for each of the {len(cache.layers)} "
                f"layers, got {len(places)}"
            )
        places = [memory.known_device("RetroCache.load", place) for place in places]
        if "0.steady" in tensors:
            cache._check_memory(*tensors["0.steady"].to(places[0]))
        for index, (layer, place) in enumerate(zip(cache.layers, places, strict=True)):
            prefix = f"{index}."
            # A store in host memory need not fit into the GPU's.
            own = {
                name.removeprefix(prefix): tensor.to(
                    "cpu" if offloads and name.endswith(".store") else place
                )
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            try:
                layer.load_state(own)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"RetroCache.load: layer {index} of {str(path)!r} does not load: {error}"
                ) from error
        _mark_last(cache.retro_layers)
        return cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible: memory is allocated once.

        Args:
            repeats: rows for each row.

        Raises:
            NotImplementedError: always; `fork` makes a cache of more rows.
        """
        raise NotImplementedError(
            "RetroCache cannot change its number of rows; make one with the batch_size you need"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not possible: memory is allocated once.

        Args:
            indices: `[R]` integers, rows to keep.

        Raises:
            NotImplementedError: always; `fork` makes a cache of other rows.
        """
        self.batch_repeat_interleave(1)

    @property
    def retro_layers(self) -> list[RetroCacheLayer]:
        """The full-attention layers, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, RetroCacheLayer)]

    def stats(self) -> dict[str, float]:
        """`RetroLayer.stats()` summed over layers, and `build_seconds` of the last prompt.

        `steps` is not summed: it counts decode steps of the model.
        """
        totals: dict[str, float] = {}
        for layer in self.retro_layers:
            if layer.retro is None:
                continue
            for name, value in layer.retro.stats().items():
                totals[name] = value if name == "steps" else totals.get(name, 0) + value
        totals["build_seconds"] = sum(layer.build_seconds() for layer in self.retro_layers)
        return totals

    def _check_rows(self, rows: int) -> None:
        if rows != self._rows:
            raise ValueError(
                f"RetroCache was made for batch_size={self._rows}, got {rows} rows; "
                f"make it with batch_size={rows}"
            )

    def _check_memory(self, keys: Tensor, values: Tensor) -> None:
        if not (
            torch.compiler.is_compiling()
            or keys.device.type == "meta"
            or isinstance(keys, FakeTensor)  # of a device that need not be there
            or any(layer.is_initialized for layer in self.layers)
        ):
            memory.check_cache(self.layers, keys, values, self._rows, self._max_tokens)

    def _check_room(self, new: Tensor) -> None:
        rows, _, tokens, _ = new.shape
        self._check_rows(rows)
        if not self.retro_layers:
            return
        first = self.retro_layers[0]
        advice = "make the cache with a larger max_cache_len"
        if tokens > self._max_tokens:
            raise ValueError(
                f"RetroCache: a prompt of {tokens} tokens exceeds max_cache_len "
                f"{self._max_tokens}; {advice}"
            )
        # A turn of several tokens has its padding, which the layer knows. A step on a GPU does not
        # wait for the device to answer; its ops check by themselves.
        if torch.compiler.is_compiling() or tokens > 1 or new.device.type != "cpu":
            return
        held = first.longest_row()
        if held + tokens > self._max_tokens:
            raise RuntimeError(
                f"RetroCache: a row holds {held} of max_cache_len {self._max_tokens} tokens, "
                f"{tokens} more do not fit; {advice}"
            )


def _mark_last(layers: list[RetroCacheLayer]) -> None:
    """Tells the layers, of which a model's step runs all, which one is the last on each device.

    As long as some have no device yet, none is. When all have, those of other devices than the
    latest layer's may have taken in a prompt that none of them has waited for.
    """
    if any(layer.retro is None for layer in layers):
        for layer in layers:
            if layer.retro is not None:
                layer.retro.joins = False
        return
    seen = set()
    for layer in reversed(layers):
        if layer.retro is not None:
            layer.retro.joins = layer.retro.store.device not in seen
            seen.add(layer.retro.store.device)
            if layer.retro.joins:
                layer.retro.finish_prefill()


def _model_fields(config: PreTrainedConfig) -> dict[str, Any]:
    text_config = config.get_text_config(decoder=True)
    fields = {name: getattr(text_config, name, None) for name in MODEL_FIELDS}
    return json.loads(json.dumps(fields, default=str))  # as a file gives them back


def _check_header(
    path: Path, header: Any, config: PreTrainedConfig, retro_config: RetroConfig | None
) -> None:
    """Raises ValueError unless a file with this header is a cache for a model."""
    where = f"RetroCache.load: {str(path)!r}"
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{where} is not a cache that RetroCache.save wrote")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {header.get('version')}, this retro_ops reads "
            f"{FORMAT_VERSION}; make the cache anew"
        )
    pairs = [("model", header["model"], _model_fields(config))]
    if retro_config is not None:
        pairs.append(("retro_config", header["retro_config"], asdict(retro_config)))
    for what, held, asked in pairs:
        for name in {**held, **asked}:
            if held.get(name) != asked.get(name):
                raise ValueError(
                    f"{where} is of another {what}: {name} is {held.get(name)!r} there, "
                    f"{asked.get(name)!r} here; load it with the {what} that it was made with"
                )


def _outside_inference_mode() -> contextlib.AbstractContextManager[None]:
    """For memory that may also be changed there: what inference mode allocates may not."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.inference_mode(False)


def _mark_static(*tensors: Tensor) -> None:
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
