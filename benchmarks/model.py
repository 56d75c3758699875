"""Decoding with a whole model of random weights: dense compiled against retro compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.timing import Timing, time_steps
from retro_ops.models import RetroCache

SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
    },
}
COLUMNS = (
    *("shape", "dtype", "context", "batch", "attention", "ms", "ms_20", "ms_80"),
    *("tokens_per_s", "ratio", "gemm_percent", "attention_percent", "other_percent", "note"),
)
"""What a table shows of a row; the machine is in its title."""

DENSE = "bench_dense"
SPARE_TOKENS = 256


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The fastest dense step: grouped heads as they are, and no mask.

    The cache is full but for `SPARE_TOKENS`, whose zeros are read along. transformers' own `sdpa`
    copies keys and values for every query head as soon as there is a mask.
    """
    out = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def run(
    *,
    device: torch.device,
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[str],
    config: RetroConfig,
    rounds: int,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one combination after another; caches are filled with random numbers."""
    AttentionInterface.register(DENSE, dense_attention)
    AttentionMaskInterface.register(DENSE, lambda *args, **kwargs: None)
    facts = machine.facts(device)
    for shape in shapes:
        for dtype in dtypes:
            model = make_model(shape, dtype, device)
            for tokens in contexts:
                for rows in batch_sizes:
                    case = {
                        "shape": shape,
                        "dtype": str(dtype).removeprefix("torch."),
                        "context": tokens,
                        "batch": rows,
                    }
                    figures = [
                        _measure_or_say_why_not(model, attention, tokens, rows, config, rounds)
                        for attention in ("dense", "retro")
                    ]
                    dense_ms = figures[0].get("ms")
                    for figure in figures:
                        if dense_ms and "ms" in figure:
                            figure["ratio"] = dense_ms / figure["ms"]
                    yield [{**case, **figure, **facts} for figure in figures]


def make_model(shape: str, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 21)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval()


def _measure_or_say_why_not(
    model: LlamaForCausalLM,
    attention: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
) -> dict[str, Any]:
    try:
        return _measure(model, attention, tokens, rows, config, rounds)
    except torch.OutOfMemoryError:
        return {"attention": attention, "note": "does not fit in memory"}
    finally:
        torch.compiler.reset()
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def _measure(
    model: LlamaForCausalLM,
    attention: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
) -> dict[str, Any]:
    fill = _fill_dense if attention == "dense" else _fill_retro
    model.set_attn_implementation(DENSE if attention == "dense" else "retro")
    cache = fill(model, tokens, rows, config)
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        logits = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids.copy_(logits[:, -1].argmax(dim=1, keepdim=True))

    timing = time_steps(model.device, step, rounds=rounds)
    return {
        "attention": attention,
        "ms": timing.median_us / 1e3,
        "ms_20": timing.low_us / 1e3,
        "ms_80": timing.high_us / 1e3,
        "tokens_per_s": 1e6 * rows / timing.median_us,
        **(_shares(step, timing) if model.device.type == "cuda" else {}),
    }


def _layer_kv(model: LlamaForCausalLM, tokens: int, rows: int) -> tuple[Tensor, Tensor]:
    shape = (rows, model.config.num_key_value_heads, tokens, model.config.head_dim)
    generator = torch.Generator(model.device).manual_seed(0)
    kwargs: dict[str, Any] = {
        "dtype": model.dtype,
        "device": model.device,
        "generator": generator,
    }
    return torch.randn(shape, **kwargs), torch.randn(shape, **kwargs)


def _fill_dense(
    model: LlamaForCausalLM, tokens: int, rows: int, config: RetroConfig
) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=tokens + SPARE_TOKENS)
    keys, values = _layer_kv(model, tokens, rows)
    for layer in range(model.config.num_hidden_layers):
        cache.update(keys, values, layer)
    return cache


def _fill_retro(model: LlamaForCausalLM, tokens: int, rows: int, config: RetroConfig) -> RetroCache:
    cache = RetroCache(model.config, config, max_cache_len=tokens + SPARE_TOKENS, batch_size=rows)
    keys, values = _layer_kv(model, tokens, rows)
    for layer in cache.retro_layers:
        layer.lazy_initialization(keys, values)
        layer.prefill(keys, values, None)
    return cache


def _shares(step: Callable[[], None], timing: Timing) -> dict[str, float]:
    """Per cent of a step's time on the GPU, by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    steps = 3
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spent = {"gemm": 0.0, "attention": 0.0, "other": 0.0}
    for event in profiled.key_averages():
        name = event.key.lower()
        if any(word in name for word in ("gemm", "nvjet", "gemv", "cutlass", "splitk")):
            kind = "gemm"
        elif any(word in name for word in ("retro", "flash", "fmha", "attention")):
            kind = "attention"
        else:
            kind = "other"
        spent[kind] += event.device_time_total / steps
    return {f"{kind}_percent": 100 * us / timing.median_us for kind, us in spent.items()}
