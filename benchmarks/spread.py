"""A model of random weights on one GPU and on several: time, and what handing over costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.model import SPARE_TOKENS, fill_retro
from retro_ops.benchmarks.timing import clean, memory_note, synchronize, time_steps
from retro_ops.models import spread
from retro_ops.models.memory import GIB, HOST
from retro_ops.models.plan import Plan, Planner
from retro_ops.models.shapes import SHAPES, first_layers

COLUMNS = (
    *("shape", "layers", "dtype", "context", "batch", "devices", "offload", "ms", "ms_20", "ms_80"),
    *("tokens_per_s", "handover_percent", "planned_gib", "gib", "plan_error_percent", "note"),
)
"""What a table shows of a row; the machine is in its title."""


def run(
    *,
    devices: Sequence[torch.device],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    dtype: torch.dtype,
    shape: str,
    layers: int | None,
    config: RetroConfig,
    offload: bool,
    rounds: int,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures: each context and batch on the first device alone, then on all.

    Caches are filled with random numbers. `handover_percent` is what the step takes longer on
    several devices than on one, of the former; `gib` are the most bytes that were allocated on each
    GPU from the first step on, `planned_gib` what the planner says, and `plan_error_percent` the
    larger of their differences. Layers lie where the planner, and so `device_map="auto"`, puts
    them. What does not fit says so.

    Args:
        devices: GPUs, or CPUs for a try.
        contexts: tokens.
        batch_sizes: rows.
        dtype: of the weights.
        shape: a name of `models.shapes`.
        layers: how many the model has; None: as many as the shape.
        config: budgets and sizes.
        offload: keep keys and values in host memory.
        rounds: timed steps.

    Raises:
        ValueError: there are more devices than layers; nothing is measured then.
    """
    facts = machine.facts(devices[0])
    model_config = first_layers(SHAPES[shape](), layers)
    if len(devices) > model_config.num_hidden_layers:
        raise ValueError(
            f"devices must be 1 to {model_config.num_hidden_layers}, one layer or more for each, "
            f"got {len(devices)}"
        )
    alone: dict[tuple[int, int], float] = {}
    for used in (list(devices[:1]), list(devices)):
        places = tuple(
            torch.cuda.mem_get_info(device)[1] for device in used if device.type == "cuda"
        )
        model, planner, note = None, None, ""
        try:
            planner = Planner(model_config, config, dtype=dtype, offload=offload, devices=places)
            if places and set(planner.layer_places) != {f"cuda:{i}" for i in range(len(used))}:
                raise ValueError(
                    "a device gets no layers, as by device_map='auto'; take more layers"
                )
            model = make_model(model_config, dtype, used, planner.layer_places)
        except ValueError as error:  # about places or weights
            note = str(error)
        except (MemoryError, RuntimeError) as error:
            note = memory_note(error)
        for tokens in contexts:
            for rows in batch_sizes:
                figure: dict[str, object] = {
                    "shape": shape,
                    "layers": model_config.num_hidden_layers,
                    "dtype": str(dtype).removeprefix("torch."),
                    "context": tokens,
                    "batch": rows,
                    "devices": len(used),
                    "offload": offload,
                }
                if model is None:
                    yield [{**figure, "note": note, **facts}]
                    continue
                figure |= _measure(model, used, tokens, rows, config, offload, rounds)
                if planner is not None and "gib" in figure:
                    plan = planner.plan(tokens + SPARE_TOKENS, rows)
                    figure |= _compared(plan, figure["gib"])
                if "ms" in figure and len(used) == 1:
                    alone[tokens, rows] = float(str(figure["ms"]))
                elif "ms" in figure and (tokens, rows) in alone:
                    ms = float(str(figure["ms"]))
                    figure["handover_percent"] = 100 * (1 - alone[tokens, rows] / ms)
                yield [figure | facts]
        del model
        clean(devices[0])


def _compared(plan: Plan, seen: Any) -> dict[str, object]:
    planned = [plan.allocated(place, prefill=False) / GIB for place in plan.places if place != HOST]
    errors = [100 * (own / gib - 1) for own, gib in zip(planned, seen, strict=True)]
    return {
        "planned_gib": _listed(planned),
        "gib": _listed(seen),
        "plan_error_percent": max(errors, key=abs, default=None),
    }


def _listed(sizes: Sequence[float]) -> str:
    return " ".join(f"{size:.2f}" for size in sizes)


def make_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    devices: Sequence[torch.device],
    places: Sequence[str],
) -> PreTrainedModel:
    """A model of random weights, made on its devices and spread over them.

    Args:
        config, dtype: of the model.
        devices: all get layers.
        places: of each layer; those of one device follow one another. CPUs share alike.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="retro")
    decoder, count = model.get_decoder(), config.num_hidden_layers
    counts = [len(list(own)) for _, own in itertools.groupby(places)]
    if devices[0].type != "cuda":
        share = -(-count // len(devices))
        counts = [min(share, count - first) for first in range(0, count, share)]
    where = [device for device, own in zip(devices, counts, strict=True) for _ in range(own)]
    for device, layer in zip(where, decoder.layers, strict=True):
        layer.to_empty(device=device)
    decoder.embed_tokens.to_empty(device=devices[0])
    decoder.norm.to_empty(device=devices[-1])
    model.lm_head.to_empty(device=devices[-1])
    decoder.rotary_emb = type(decoder.rotary_emb)(config, device=devices[0])
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, (nn.Linear, nn.Embedding)) and name == "weight":
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)
    return spread(model.eval(), devices, layers=counts)


@torch.inference_mode()
def _measure(
    model: PreTrainedModel,
    devices: Sequence[torch.device],
    tokens: int,
    rows: int,
    config: RetroConfig,
    offload: bool,
    rounds: int,
) -> dict[str, Any]:
    gpus = [device for device in devices if device.type == "cuda"]
    try:
        cache = fill_retro(model, tokens, rows, config, offload=offload)
        for device in gpus:
            torch.cuda.reset_peak_memory_stats(device)
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=devices[0])

        def step() -> None:
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            ids.copy_(logits[:, -1].argmax(dim=1, keepdim=True))
            for device in gpus[1:]:
                synchronize(device)

        timing = time_steps(devices[0], step, rounds=rounds)
    except (MemoryError, RuntimeError) as error:
        return {"note": memory_note(error)}
    finally:
        clean(devices[0])
    gib = [torch.cuda.max_memory_allocated(device) / GIB for device in gpus]
    return {
        "ms": timing.median_us / 1e3,
        "ms_20": timing.low_us / 1e3,
        "ms_80": timing.high_us / 1e3,
        "tokens_per_s": 1e6 * rows / timing.median_us,
        "gib": gib,
    }
