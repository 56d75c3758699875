"""Reading a prompt: how much of it is building the index, in one layer and in a whole model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.timing import clean, memory_note, synchronize, time_steps
from retro_ops.models import RetroCache
from retro_ops.models.shapes import SHAPES, first_layers

COLUMNS = (
    *(
        "shape",
        "dtype",
        "context",
        "attention",
        "layer_ms",
        "dense_ms",
        "added_ms",
        "added_percent",
    ),
    *("build_ms", "whole_s", "whole_dense_s", "whole_build_s", "whole_percent", "note"),
)
"""What a table shows of a row; the machine is in its title."""
WHOLE_ROUNDS = 2


def run(
    *,
    device: torch.device,
    shapes: Sequence[str],
    contexts: Sequence[int],
    dtype: torch.dtype,
    config: RetroConfig,
    offload: Sequence[bool],
    whole: bool,
    rounds: int,
) -> Iterator[dict[str, object]]:
    """A row of figures for every shape, context and place of the KV store; one prompt at a time.

    `layer_ms` is one layer of the model with its index, `dense_ms` the same layer without,
    `added_percent` their difference in per cent of `dense_ms`; `build_ms` is the building alone.
    `whole_...` are those of a prompt through all layers, the faster of two: `whole_s` with an index
    in allocated memory, of which `whole_build_s` is building it, `whole_dense_s` without one, and
    `whole_percent` what the index adds.

    Args:
        whole: measure the whole model too.
    """
    facts = machine.facts(device)
    for shape in shapes:
        for context in contexts:
            for offloaded in offload:
                case: dict[str, object] = {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "context": context,
                    "attention": "retro offloaded" if offloaded else "retro",
                }
                try:
                    model = make_model(SHAPES[shape](), dtype, device, layers=1)
                    figures: dict[str, object] = {}
                    figures |= measure_layer(model, context, config, offloaded, rounds)
                    del model
                    if whole:
                        model = make_model(SHAPES[shape](), dtype, device)
                        figures |= _measure_whole(model, context, config, offloaded)
                        del model
                except (MemoryError, RuntimeError) as error:
                    figures = {"note": memory_note(error)}
                clean(device)
                yield {**case, **figures, **facts}


def make_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, layers: int | None = None
) -> PreTrainedModel:
    """A model of random weights, with all or its first layers, and retro attention."""
    config = first_layers(config, layers)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="retro")
    return model.eval()


@torch.inference_mode()
def measure_layer(
    model: PreTrainedModel, context: int, config: RetroConfig, offload: bool, rounds: int
) -> dict[str, float]:
    """One layer reads a prompt of one row, with and without an index; see `run`.

    Args:
        model: of one layer, or whose layers all have the number 0 (see `throughput.py`).
    """
    model.set_attn_implementation("retro")  # without a RetroCache that is torch's own
    device, layer = model.device, model.get_decoder().layers[0]
    one = first_layers(model.config, 1)
    cache = RetroCache(one, config, max_cache_len=context, offload=offload)
    positions = torch.arange(context, device=device)[None]
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, context), device=device)
    hidden = model.get_decoder().embed_tokens(ids)
    places = model.get_decoder().rotary_emb(hidden, position_ids=positions)

    def read(cache: RetroCache | None) -> Tensor:
        out: Tensor = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=places,
        )
        return out

    builds = []

    def build() -> None:
        cache.reset()
        read(cache)
        builds.append(1e3 * cache.stats()["build_seconds"])

    dense = time_steps(device, lambda: read(None), rounds=rounds, warm_up=1).median_us / 1e3
    retro = time_steps(device, build, rounds=rounds, warm_up=1).median_us / 1e3
    return {
        "layer_ms": retro,
        "dense_ms": dense,
        "added_ms": retro - dense,
        "added_percent": 100 * (retro / dense - 1),
        "build_ms": sorted(builds[1:])[rounds // 2],
    }


@torch.inference_mode()
def _measure_whole(
    model: PreTrainedModel, context: int, config: RetroConfig, offload: bool
) -> dict[str, float]:
    ids = torch.randint(model.config.vocab_size, (1, context), device=model.device)
    cache = RetroCache(model.config, config, max_cache_len=context, offload=offload)

    def read(cache: RetroCache | None, tokens: int) -> float:
        synchronize(model.device)
        begin = time.perf_counter()
        model(
            input_ids=ids[:, :tokens],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        synchronize(model.device)
        return time.perf_counter() - begin

    dense, retro = [], []
    read(cache, min(context, 2 * config.steady_capacity))  # allocates, and loads kernels
    for _ in range(WHOLE_ROUNDS):
        dense.append(read(None, context))
        cache.reset()
        retro.append(read(cache, context))
    return {
        "whole_s": min(retro),
        "whole_dense_s": min(dense),
        "whole_build_s": cache.stats()["build_seconds"],
        "whole_percent": 100 * (min(retro) / min(dense) - 1),
    }
