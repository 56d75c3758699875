"""RetroCache: a transformers cache whose full-attention layers are RetroLayers."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from retro_ops import RetroConfig, RetroLayer


class RetroTokens:
    """New keys and values on their way from the cache to the attention function `retro`.

    It stands where transformers expects key and value tensors; any other attention function that
    touches it learns what is wrong.
    """

    def __init__(self, layer: RetroCacheLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "RetroCache works with attn_implementation='retro' only; load the model with it, or call "
            "model.set_attn_implementation('retro')"
        )


class RetroCacheLayer(CacheLayerMixin):
    """One full-attention layer of a RetroCache; allocates its RetroLayer when it sees its first tokens."""

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
        if key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"RetroCache was made for batch_size={self.batch_size}, got {key_states.shape[0]} "
                f"rows; make it with batch_size={key_states.shape[0]}"
            )
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
        if not torch.compiler.is_compiling():
            for tensor in (*self.retro.buffers(), self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(  # type: ignore[override]  # transformers passes the results on, unread
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RetroTokens, RetroTokens]:
        """Hands new tokens to the attention function, which knows the padding."""
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

    def crop(self, max_length: int) -> None:
        """Not possible: clusters cannot be taken apart."""
        raise NotImplementedError("RetroCache cannot be cropped; reset() it and prefill again")

    def build_seconds(self) -> float:
        """Seconds that indexing the last prompt took; 0 before any."""
        if self._build_marks is None:
            return 0.0
        begin, end = self._build_marks
        if isinstance(begin, float):
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

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


class RetroCache(Cache):
    """A cache for `model.generate` and for forwards of a model with `attn_implementation="retro"`.

    Full-attention layers keep their KV in a RetroLayer; sliding-window layers keep transformers' own
    static cache. Decoding compiles into one graph: lengths are tensors, memory is allocated once.

    Args:
        config: the model's config.
        retro_config: budgets and sizes; None: the defaults.
        max_cache_len: tokens that a row can hold, prompt and generated ones.
        batch_size: rows.
        offload: keep the KV stores in host memory; not built yet.

    Raises:
        ValueError: the model has layers that retro attention cannot serve, or a number is out of range.
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
                layers.append(
                    STATIC_LAYER_TYPE_MAPPING[kind](max_cache_len=max_cache_len, **layer_arguments)
                )
            else:
                raise ValueError(
                    f"RetroCache: layer {index} of {type(config).__name__} is of type {kind!r}; "
                    "only full_attention and sliding_attention layers are supported"
                )
        super().__init__(layers=layers)

    @property
    def retro_layers(self) -> list[RetroCacheLayer]:
        """The full-attention layers, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, RetroCacheLayer)]

    def stats(self) -> dict[str, float]:
        """`RetroLayer.stats()` summed over layers, and `build_seconds`, the time to index the prompt.

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
