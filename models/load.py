"""Loads a model for retro attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

BUILT_IN = {"recall": Path(__file__).parent / "recall"}
"""Models that come with the package, by name."""


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
        name: a built-in name ("recall"), a directory, or a model of the Hugging Face hub.
        dtype: of the weights; "auto": as stored.
        device: where to; None: CUDA if there is one, else the CPU.
        attention: transformers' `attn_implementation`.
        **kwargs: passed on to `from_pretrained`.

    Raises:
        FileNotFoundError: there is no such model, or it cannot be reached.
    """
    path = BUILT_IN.get(str(name), name)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, **kwargs
        )
    except OSError as error:
        raise FileNotFoundError(
            f"no model {str(name)!r}: it is not built in ({', '.join(BUILT_IN)}), not a directory with "
            "a model, and the Hugging Face hub did not give it"
        ) from error
    return model.to(device).eval()
