"""Models by name whose shape alone is known: for plans and benchmarks, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

_LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_LLAMA_3_ROPE = {"rope_theta": 500000.0}
_LLAMA_31_ROPE = {
    **_LLAMA_3_ROPE,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_QWEN25_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
_QWEN25_72B = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}

SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-3-8b": lambda: LlamaConfig(
        **_LLAMA_3_8B, max_position_embeddings=8192, rope_parameters=dict(_LLAMA_3_ROPE)
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        **_LLAMA_3_8B, max_position_embeddings=131072, rope_parameters=dict(_LLAMA_31_ROPE)
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        **_QWEN25_7B, max_position_embeddings=32768, rope_parameters={"rope_theta": 1000000.0}
    ),
    "qwen2.5-72b": lambda: Qwen2Config(
        **_QWEN25_72B, max_position_embeddings=32768, rope_parameters={"rope_theta": 1000000.0}
    ),
    "tiny": lambda: LlamaConfig(**_TINY, max_position_embeddings=1 << 21),
}
"""Makers of configs, by name. "tiny" is for tests. No default of dtype: bfloat16 is assumed."""


def first_layers(config: PreTrainedConfig, count: int | None) -> PreTrainedConfig:
    """A copy of a model's config with its first `count` layers; None: with all."""
    first = copy.deepcopy(config)
    if count is not None:
        text = first.get_text_config(decoder=True)
        text.num_hidden_layers = count
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:count]
    return first
