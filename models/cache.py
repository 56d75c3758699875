"""RetroCache: a transformers cache whose full-attention layers are RetroLayers."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from retro_ops import RetroConfig, RetroLayer


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
    """One full-attention layer of a RetroCache; allocates its RetroLayer with its first tokens."""

    is_compileable = True
    is_sliding = False
    is_croppable = False

    def __init__(
        self,
        config: RetroConfig,
        *,
        num_query_heads: int,
        batch_size: int,
        max_length: int,
        offload: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_query_heads = num_query_heads
        self.batch_size = batch_size
        self.max_length = max_length
        self.offload_store = offload
        self.retro: RetroLayer | None = None
        # A tensor, changed in place, so that positions do not recompile a step. It counts padding.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # Only forwards of several tokens ask this: they are a prompt, or continue one.
        self.is_filled = False
        self._build_marks: tuple[Any, Any] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the state for keys `[B, Hkv, any, D]`."""
        self.retro = RetroLayer(
            self.config,
            batch_size=self.batch_size,
            num_query_heads=self.num_query_heads,
            num_kv_heads=key_states.shape[1],
            head_dim=key_states.shape[3],
            max_length=self.max_length,
            dtype=key_states.dtype,
            device=key_states.device,
            offload=self.offload_store,
        )
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        _mark_static(*self.retro.buffers(), self.cumulative_length)
        self.is_initialized = True

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

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Appends and attends, token by token: query `[B, Hq, T, D]`; see `RetroLayer.decode`."""
        retro = self._initialized()
        outs = [
            retro.decode(
                query[:, :, t : t + 1], keys[:, :, t : t + 1], values[:, :, t : t + 1], scale
            )
            for t in range(query.shape[2])
        ]
        self.cumulative_length.add_(query.shape[2])
        self.is_filled = True
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No keys: the mask function `retro` knows a RetroCache by this."""
        return 0, 0

    def get_seq_length(self) -> int:
        """Tokens so far, padding included; a tensor, changed in place."""
        return self.cumulative_length  # type: ignore[return-value]  # as transformers' StaticLayer

    def get_max_length(self) -> int:
        """Tokens that a row can hold."""
        return self.max_length

    def reset(self) -> None:
        """Forgets all tokens; the memory stays, and graphs compiled for it."""
        if self.retro is not None:
            self.retro.reset()
        self.cumulative_length.zero_()
        self.is_filled = False
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
        self.keys = key_states.new_zeros(rows, heads, self.past, key_states.shape[3])
        self.values = value_states.new_zeros(rows, heads, self.past, value_states.shape[3])
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        _mark_static(self.keys, self.values, self.cumulative_length)
        self.is_initialized = True

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
                whole = torch.cat((window, new), dim=2)
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

    def _is_prompt(self, tokens: int) -> bool:
        return tokens > 1 and not self.is_filled


class RetroCache(Cache):
    """A cache for `model.generate` and for forwards of a model with `attn_implementation="retro"`.

    Full-attention layers keep their KV in a RetroLayer; sliding-window layers keep their window and
    attend exactly. Decoding compiles into one graph: lengths are tensors, memory is allocated once.

    Args:
        config: the model's config.
        retro_config: budgets and sizes; None: the defaults.
        max_cache_len: tokens that a row can hold, prompt and generated ones.
        batch_size: rows.
        offload: keep the KV stores in slow memory behind page caches; see `RetroLayer`. Not built
            yet on a GPU.

    Raises:
        ValueError: the model has layers that retro attention cannot serve, or a number is out of
            range.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        retro_config: RetroConfig | None = None,
        *,
        max_cache_len: int,
        batch_size: int = 1,
        offload: bool = False,
    ) -> None:
        if max_cache_len < 1 or batch_size < 1:
            raise ValueError(
                "RetroCache: max_cache_len and batch_size must be at least 1, "
                f"got {max_cache_len} and {batch_size}"
            )
        self.retro_config = RetroConfig() if retro_config is None else retro_config
        text_config = config.get_text_config(decoder=True)
        for field, what in (
            ("kv_lora_rank", "latent attention (MLA)"),
            ("num_kv_shared_layers", "layers that share their KV"),
        ):
            if getattr(text_config, field, None):
                raise ValueError(
                    f"RetroCache does not support {what}, which {type(config).__name__} asks for "
                    f"({field}={getattr(text_config, field)}); use a DynamicCache"
                )
        layer_types, layer_arguments = get_layer_types_and_kwargs(text_config)
        layers: list[Any] = []
        for index, kind in enumerate(layer_types):
            if kind == "full_attention":
                layers.append(
                    RetroCacheLayer(
                        self.retro_config,
                        num_query_heads=text_config.num_attention_heads,
                        batch_size=batch_size,
                        max_length=max_cache_len,
                        offload=offload,
                    )
                )
            elif kind == "sliding_attention":
                # Full layers refuse more than max_cache_len tokens; without one, nothing would.
                limit = max_cache_len if "full_attention" in layer_types else None
                layers.append(SlidingCacheLayer(layer_arguments["sliding_window"], limit))
            else:
                raise ValueError(
                    f"RetroCache: layer {index} of {type(config).__name__} is of type {kind!r}; "
                    "only full_attention and sliding_attention layers are supported"
                )
        super().__init__(layers=layers)
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

        Raises:
            ValueError: wrong number of rows, or a prompt longer than `max_cache_len`.
            RuntimeError: a row would exceed `max_cache_len`.
        """
        if layer_idx == 0:  # before any layer has changed
            self._check_room(key_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def early_initialization(self, batch_size: int, *args: Any, **kwargs: Any) -> None:
        """Allocates all layers now instead of with their first tokens; see `Cache`."""
        self._check_rows(batch_size)
        super().early_initialization(batch_size, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: clusters cannot be taken apart."""
        raise NotImplementedError("RetroCache cannot be cropped; reset() it and prefill again")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible: memory is allocated once."""
        raise NotImplementedError(
            "RetroCache cannot change its number of rows; make one with the batch_size you need"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not possible: memory is allocated once."""
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
        # A step on a GPU does not wait for the device to answer; its ops check by themselves.
        if torch.compiler.is_compiling() or (tokens == 1 and new.device.type != "cpu"):
            return
        held = first.longest_row()
        if held + tokens > self._max_tokens:
            raise RuntimeError(
                f"RetroCache: a row holds {held} of max_cache_len {self._max_tokens} tokens, "
                f"{tokens} more do not fit; {advice}"
            )


def _mark_static(*tensors: Tensor) -> None:
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
