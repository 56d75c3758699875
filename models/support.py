"""Which models retro attention serves, and why it refuses others.

What is refused is seen in the config: fields, layer types, and what the model class says of itself.
Names decide nothing; a model that is not in `FAMILIES` works if nothing here speaks against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Those that RetroCache serves."""

# Fields of a config that change what attention means, and what they stand for.
REFUSED_FIELDS = {
    "kv_lora_rank": "latent attention (MLA)",
    "num_kv_shared_layers": "layers that share their KV",
    "attn_logit_softcapping": "soft-capped logits",
}


@dataclass(frozen=True)
class Family:
    """One row of the table of models in `docs/models.md`."""

    name: str
    works: bool
    structure: str
    """What attention of the family is like, or why it is refused."""
    compared_with: str = "sdpa"
    """Dense attention of transformers, whose tokens are to be the same."""


FAMILIES = (
    Family("Llama 3, 3.1 (8B)", True, "head_dim 128, 4 query heads per KV head, llama3 scaling"),
    Family("Llama 3 Gradient (8B, 1048k)", True, "the same, rope_theta of 3.6e9"),
    Family("Qwen2.5 (7B, 72B)", True, "head_dim 128, 7 and 8 query heads per KV head, YaRN"),
    Family("Qwen3", True, "head_dim 128, norms of queries and keys; also experts"),
    Family("Mistral", True, "head_dim 128, with and without a sliding window"),
    Family("Gemma 3 (text)", True, "head_dim 256, sliding windows, linear scaling, norms"),
    Family("Phi-2", True, "head_dim 80, MHA, rotates a part of each head"),
    Family("Phi-3, Phi-3.5 (mini)", True, "head_dim 96, MHA, LongRoPE, a window wider than all"),
    Family("Phi-4, Phi-4-mini", True, "head_dim 128, LongRoPE of a part of each head (mini)"),
    Family("gpt-oss", True, "head_dim 64, attention sinks, windows, YaRN, experts", "eager"),
    Family("DeepSeek V2, V3", False, "latent attention (MLA)"),
    Family("Gemma 2", False, "soft-capped logits"),
    Family("Gemma 3n", False, "layers that share their KV"),
    Family("Llama 4", False, "chunked attention"),
    Family("Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba", False, "recurrent layers"),
    Family("T5, BART", False, "encoder and decoder"),
)


def head_dim_of(text_config: PreTrainedConfig) -> int:
    """Elements of a key of a language model, which not every config names."""
    head_dim: int | None = getattr(text_config, "head_dim", None)
    return head_dim or int(text_config.hidden_size // text_config.num_attention_heads)


def family_table() -> str:
    """`FAMILIES` as `docs/models.md` has them."""
    rows = ["| family | status | structure, or why not | tested |", "|---|---|---|---|"]
    for family in FAMILIES:
        status = "works" if family.works else "refused"
        tested = f"random weights: tokens of `{family.compared_with}`, one graph"
        tested = tested if family.works else "refusal"
        rows.append(f"| {family.name} | {status} | {family.structure} | {tested} |")
    return "\n".join(rows)


def check_model(config: PreTrainedConfig) -> list[str]:
    """The types of a model's layers, if retro attention serves it.

    Args:
        config: the model's config.

    Returns:
        For each layer one of `LAYER_TYPES`.

    Raises:
        ValueError: it does not; the message says why.
    """
    name = type(config).__name__
    text_config = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"RetroCache is for decoders, {name} has an encoder too (is_encoder_decoder=True); use "
            "attn_implementation='sdpa'"
        )
    for field, what in REFUSED_FIELDS.items():
        if getattr(text_config, field, None):
            raise ValueError(
                f"RetroCache does not support {what}, which {name} asks for "
                f"({field}={getattr(text_config, field)}); use a DynamicCache"
            )
    if getattr(text_config, "is_heterogeneous", False):
        raise ValueError(
            f"RetroCache: layers of {name} have heads of different sizes (is_heterogeneous), which "
            "it does not support; use a DynamicCache"
        )
    if getattr(text_config, "num_hidden_layers", None) is None:
        raise ValueError(
            f"RetroCache: {name} has no num_hidden_layers, so it is no decoder that it knows; "
            "use a DynamicCache"
        )
    layer_types, _ = get_layer_types_and_kwargs(text_config)
    for index, kind in enumerate(layer_types):
        if kind not in LAYER_TYPES:
            raise ValueError(
                f"RetroCache: layer {index} of {name} is of type {kind!r}; "
                "only full_attention and sliding_attention layers are supported; use a DynamicCache"
            )
    if "sliding_attention" in layer_types and not getattr(text_config, "sliding_window", None):
        raise ValueError(
            f"RetroCache: {name} has sliding-window layers, but no sliding_window; set it in the "
            "config"
        )
    model_class = _model_class(config)
    if model_class is not None and model_class._is_stateful:
        raise ValueError(
            f"RetroCache does not support recurrent layers, which {model_class.__name__} has; "
            "leave the cache to transformers"
        )
    if model_class is not None and not model_class._supports_attention_backend:
        raise ValueError(
            f"RetroCache: {model_class.__name__} does not go through transformers' attention "
            "interface (_supports_attention_backend=False); use a DynamicCache"
        )
    head_dim = head_dim_of(text_config)
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(
            f"RetroCache: head_dim must be a multiple of 16 from 16 to 256, {name} has {head_dim}; "
            "use a DynamicCache"
        )
    return list(layer_types)


def _model_class(config: PreTrainedConfig) -> Any:
    """The class of the model with this config; None: transformers does not know it."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING.keys():  # noqa: SIM118  (a lazy mapping)
        return None
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found
