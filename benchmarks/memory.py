"""The plan of a model's memory against what a GPU was seen to hold."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.models import RetroCache
from retro_ops.models.memory import GIB, free_memory
from retro_ops.models.plan import Planner, load_config

COLUMNS = (
    *("shape", "dtype", "context", "batch", "attention", "planned_gib", "allocated_gib"),
    *("error_percent", "reserved_gib", "note"),
)
"""What a table shows of a row; the machine is in its title."""
STEPS = 8
"""Decoded after the prompt."""


def run(
    *,
    device: torch.device,
    models: Sequence[str],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    dtype: torch.dtype,
    config: RetroConfig,
    offload: bool,
) -> Iterator[dict[str, object]]:
    """A row of figures for every model, context and number of rows; weights are random.

    Raises:
        ValueError: the device is no GPU: nothing counts what a CPU was given.
    """
    if device.type != "cuda":
        raise ValueError(f"it needs a GPU, got {str(device)!r}; `info --model` plans without one")
    facts = machine.facts(device)
    for name in models:
        for context in contexts:
            for rows in batch_sizes:
                yield {
                    "shape": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "context": context,
                    "batch": rows,
                    "attention": "retro offloaded" if offload else "retro",
                    **measure(load_config(name), config, context, rows, dtype, device, offload),
                    **facts,
                }


def measure(
    model_config: PreTrainedConfig,
    config: RetroConfig,
    context: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool = False,
    compile_step: bool = False,
) -> dict[str, Any]:
    """Peaks of a prompt and `STEPS` steps, planned and seen, or a note of why there are none.

    Args:
        context: tokens that the cache has room for; the steps are the last of them.
        compile_step: as one CUDA graph.
    """
    free = free_memory()
    index = torch.cuda.current_device() if device.index is None else device.index
    planner = Planner(
        model_config, config, dtype=dtype, offload=offload, devices=(free.devices[index],)
    )
    plan = planner.plan(context, rows)
    planned = plan.allocated("cuda:0")
    figures: dict[str, Any] = {"planned_gib": planned / GIB}
    if lacks := plan.lacks(free):
        return {**figures, "note": f"does not fit: {lacks}"}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    _generate(model_config, config, context, rows, dtype, device, offload, compile_step)
    allocated = torch.cuda.max_memory_allocated(device) - before[0]
    reserved = torch.cuda.max_memory_reserved(device) - before[1]
    return {
        **figures,
        "allocated_gib": allocated / GIB,
        "error_percent": 100 * (planned / allocated - 1),
        "reserved_gib": reserved / GIB,
    }


@torch.inference_mode()
def _generate(
    model_config: PreTrainedConfig,
    config: RetroConfig,
    context: int,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    offload: bool,
    compile_step: bool,
) -> None:
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            model_config, dtype=dtype, attn_implementation="retro"
        ).eval()
    cache = RetroCache(
        model.config, config, max_cache_len=context, batch_size=rows, offload=offload
    )
    vocabulary = model_config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (rows, context - STEPS), device=device)
    forward: Any = model.forward
    given: dict[str, Any] = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    forward(input_ids=ids, **given)
    if compile_step:
        forward = torch.compile(forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
    for _ in range(STEPS):
        logits = forward(input_ids=token, **given).logits
        token.copy_(logits[:, -1].argmax(dim=1, keepdim=True))
    torch.cuda.synchronize(device)
