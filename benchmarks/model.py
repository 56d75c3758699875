"""Decoding with a whole model of random weights: dense compiled against retro compiled."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.prefill import make_model
from retro_ops.benchmarks.timing import Timing, clean, memory_note, synchronize, time_steps
from retro_ops.models import RetroCache
from retro_ops.models.load import layer_devices
from retro_ops.models.shapes import SHAPES
from retro_ops.models.support import head_dim_of

COLUMNS = (
    *("shape", "dtype", "context", "batch", "attention", "ms", "ms_20", "ms_80"),
    *("tokens_per_s", "ratio", "gemm_percent", "attention_percent", "other_percent"),
    *("idle_percent", "compile_s", "largest", "note"),
)
"""What a table shows of a row; the machine is in its title."""

DENSE = "bench_dense"
SPARE_TOKENS = 256
WARM_UP = 5
NAMED_KERNELS = 8


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
            model = make_model(SHAPES[shape](), dtype, device)
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
            del model  # before the next one is made
            clean(device)


def _measure_or_say_why_not(
    model: PreTrainedModel,
    attention: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
) -> dict[str, Any]:
    try:
        return _measure(model, attention, tokens, rows, config, rounds)
    except (MemoryError, RuntimeError) as error:
        return {"attention": attention, "note": memory_note(error)}
    finally:
        clean(model.device)


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    attention: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
) -> dict[str, Any]:
    fill = _fill_dense if attention == "dense" else fill_retro
    model.set_attn_implementation(DENSE if attention == "dense" else "retro")
    cache = fill(model, tokens, rows, config)
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        logits = forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids.copy_(logits[:, -1].argmax(dim=1, keepdim=True))

    begin = time.perf_counter()
    for _ in range(WARM_UP):  # compiles, warms up, records a CUDA graph
        step()
    synchronize(model.device)
    seconds = time.perf_counter() - begin
    timing = time_steps(model.device, step, rounds=rounds, warm_up=1)
    return {
        "attention": attention,
        "ms": timing.median_us / 1e3,
        "ms_20": timing.low_us / 1e3,
        "ms_80": timing.high_us / 1e3,
        "tokens_per_s": 1e6 * rows / timing.median_us,
        "compile_s": seconds,
        **(_shares(step, timing) if model.device.type == "cuda" else {}),
    }


def _layer_kv(
    model: PreTrainedModel, tokens: int, rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    config = model.config
    heads = config.num_key_value_heads
    head_dim = head_dim_of(config)
    generator = torch.Generator(device).manual_seed(0)
    kwargs: dict[str, Any] = {"dtype": model.dtype, "device": device, "generator": generator}
    shape = (rows, heads, tokens, head_dim)
    return torch.randn(shape, **kwargs), torch.randn(shape, **kwargs)


def _fill_dense(model: PreTrainedModel, tokens: int, rows: int, config: RetroConfig) -> StaticCache:
    cache = StaticCache(config=model.config, max_cache_len=tokens + SPARE_TOKENS)
    keys, values = _layer_kv(model, tokens, rows, model.device)
    for layer in range(model.config.num_hidden_layers):
        cache.update(keys, values, layer)
    return cache


def fill_retro(
    model: PreTrainedModel,
    tokens: int,
    rows: int,
    config: RetroConfig,
    *,
    offload: bool = False,
) -> RetroCache:
    """A RetroCache full of random tokens, each layer on its device."""
    cache = RetroCache(
        model.config, config, max_cache_len=tokens + SPARE_TOKENS, batch_size=rows, offload=offload
    )
    made: dict[torch.device, tuple[Tensor, Tensor]] = {}
    for layer, device in zip(cache.retro_layers, layer_devices(model), strict=True):
        if device not in made:
            made[device] = _layer_kv(model, tokens, rows, device)
        layer.lazy_initialization(*made[device])
        layer.prefill(*made[device], None)
    return cache


def _shares(step: Callable[[], None], timing: Timing) -> dict[str, Any]:
    """Per cent of a step's time, by kind of kernel, and of the kernels that take most.

    What is left, `idle_percent`, are gaps between kernels and the host's part.
    """
    from torch.profiler import DeviceType, ProfilerActivity, profile

    steps = 3
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = own_times(
        (_short(event.name), event.time_range.start, event.time_range.end)
        for event in profiled.events()
        # Ranges that compiled code names span kernels, which would count twice.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    percent = {name: 100 * us / steps / timing.median_us for name, us in kernels.items()}
    kinds = {"gemm": 0.0, "attention": 0.0, "other": 0.0}
    for name, share in percent.items():
        kinds[_kind(name)] += share
    most = sorted(percent, key=lambda name: -percent[name])[:NAMED_KERNELS]
    return {
        **{f"{kind}_percent": share for kind, share in kinds.items()},
        "idle_percent": 100 - sum(kinds.values()),
        "largest": ", ".join(f"{name} {percent[name]:.1f}" for name in most),
    }


def own_times(spans: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """How long each kernel ran, without what it waited for kernels that began before it.

    A kernel of a step may start while its predecessor runs; what both take counts for the first.

    Args:
        spans: name, begin and end of each run, in any order and unit.

    Returns:
        By name, the sum over its runs; all together no more than the time in which any ran.
    """
    times: dict[str, float] = {}
    covered = -math.inf
    for name, begin, end in sorted(spans, key=lambda span: span[1:]):
        times[name] = times.get(name, 0.0) + max(end - max(begin, covered), 0.0)
        covered = max(covered, end)
    return times


def _kind(kernel: str) -> str:
    name = kernel.lower()
    if any(word in name for word in ("gemm", "nvjet", "gemv", "cutlass", "splitk")):
        # FlashAttention's kernels are CUTLASS, and split the keys.
        return "attention" if "flash" in name or "fmha" in name else "gemm"
    return (
        "attention" if any(w in name for w in ("retro", "flash", "fmha", "attention")) else "other"
    )


def _short(kernel: str) -> str:
    """A kernel's name without its return type, template arguments and parameters."""
    name = kernel.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.split(r"[<(]", name, maxsplit=1)[0].strip()
