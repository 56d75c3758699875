"""A model whose layers lie on several devices; a decode step is one compiled graph on each.

One graph of the whole step cannot be: a CUDA graph that the compiler makes belongs to one device.
So consecutive layers of a device become one module, which is compiled by itself, and what goes from
one device to the next is the hidden state of a token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retro_ops.models.load import moved, remove_moves
from retro_ops.models.memory import known_device


class Stage(nn.Module):
    """Consecutive decoder layers of one device; stands for them in the model's list of layers.

    Args:
        layers: on `device`.
        device: where they are.
        compiled: compile steps of one token into one graph.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device, compiled: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.device = device
        self._step = self._run
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else None
            self._step = torch.compile(self._run, mode=mode, fullgraph=True, dynamic=False)

    def _run(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states, kwargs = moved((hidden_states, kwargs), self.device)
        if hidden_states.shape[1] > 1:
            return self._run(hidden_states, **kwargs)
        # A graph reads the same strides in every step.
        hidden_states = hidden_states.contiguous()
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                # The next step writes over the graph's own output.
                return self._step(hidden_states, **kwargs).clone()
        return self._step(hidden_states, **kwargs)


def is_spread(model: PreTrainedModel) -> bool:
    """Whether `spread` has laid out the model."""
    return any(isinstance(module, Stage) for module in model.modules())


def spread(
    model: PreTrainedModel,
    devices: Sequence[torch.device | str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    compiled: bool = True,
) -> PreTrainedModel:
    """Lays a model's layers on several devices, in place, and compiles each device's share.

    A model that `load_model` or accelerate has laid out (`device_map`) stays as it lies, if there
    are no `devices` and no `layers`; hooks that move its inputs are replaced.
    Embeddings go to the first device, the head to the last, or to the first where it shares its
    weights with the embeddings. A RetroCache needs nothing: each of its layers lives where its keys
    are made. `generate` takes the model as it is; give it `disable_compile=True`, since the steps
    are compiled already.

    Args:
        model: a decoder whose layers are all of one kind (Llama, Mistral, Qwen, Phi, ...).
        devices: one for each share; None: where the layers lie, or all GPUs if they lie on one.
        layers: how many layers each share has; None: as equal as can be.
        compiled: compile steps of one token, one graph (on GPUs: one CUDA graph) for each share.

    Returns:
        `model`.

    Raises:
        ValueError: the layers are of several kinds, weights wait on the CPU or on disk, or
            `devices` and `layers` do not fit the layers.
    """
    decoder = model.base_model
    found = getattr(decoder, "layers", None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(
            f"spread needs a decoder with a list of layers, {type(decoder).__name__} has none"
        )
    if is_spread(model):
        raise ValueError("the model is spread already; load it anew to lay it out otherwise")
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        raise ValueError(
            f"spread needs layers of one kind, {type(model).__name__} has "
            f"{' and '.join(sorted(kinds))}"
        )
    waiting = next((name for name, each in model.named_parameters() if each.is_meta), None)
    if waiting is not None:
        raise ValueError(
            f"spread needs all weights on their devices, {waiting} waits elsewhere to be copied "
            "for each step; load the model on more or larger devices"
        )
    placed = _places(list(found), devices, layers)
    remove_moves(model)
    if hasattr(model, "hf_device_map"):
        del model.hf_device_map  # by names that the layers do not have any more
    stages = [Stage(own.to(device), device, compiled) for device, own in placed]
    first, last = stages[0].device, stages[-1].device
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    decoder.layers = nn.ModuleList()
    decoder.to(first)
    decoder.layers = nn.ModuleList(stages)
    if head is not None:
        head.to(first if tied else last)
    behind = [decoder.norm] if hasattr(decoder, "norm") else []
    if not tied:
        for module in behind:
            module.to(last)
    for module in (model.get_input_embeddings(), *behind, *([] if head is None else [head])):
        module.register_forward_pre_hook(_follow_weights, with_kwargs=True)
    return model


def _places(
    layers: Sequence[nn.Module],
    devices: Sequence[torch.device | str] | None,
    counts: Sequence[int] | None,
) -> list[tuple[torch.device, nn.ModuleList]]:
    """Each device with its layers."""
    lie = [next(layer.parameters()).device for layer in layers]
    if devices is None and counts is None and len(set(lie)) > 1:
        groups = itertools.groupby(zip(lie, layers, strict=True), key=lambda pair: pair[0])
        return [(device, nn.ModuleList(layer for _, layer in own)) for device, own in groups]
    if devices is None:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    devices = [known_device("spread", device) for device in devices]
    if not 1 <= len(devices) <= len(layers):
        raise ValueError(
            f"spread: devices must be 1 to {len(layers)}, one layer or more for each, "
            f"got {len(devices)}"
        )
    if counts is None:
        share, more = divmod(len(layers), len(devices))
        counts = [share + (i < more) for i in range(len(devices))]
    if len(counts) != len(devices) or sum(counts) != len(layers) or min(counts) < 1:
        raise ValueError(
            f"layers must be {len(devices)} numbers from 1 on that add up to {len(layers)}, "
            f"got {list(counts)}"
        )
    ends = list(itertools.accumulate(counts))
    return [
        (torch.device(device), nn.ModuleList(layers[end - count : end]))
        for device, count, end in zip(devices, counts, ends, strict=True)
    ]


def _follow_weights(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return moved((args, kwargs), next(module.parameters()).device)
