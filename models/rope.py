"""Rotary embeddings for one length of context: how far they reach, other scalings, and no switches.

Two kinds of scaling change with the length of the context: LongRoPE has two sets of frequencies,
one for short contexts, and dynamic NTK has others for every length. Keys in a cache keep the
frequencies that they came with, so such a model is fixed to one context before it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from retro_ops.models.support import head_dim_of

# Kept when others are given: they say what the model was trained with, not how it is stretched.
KEPT = ("rope_theta", "partial_rotary_factor")
# Scalings that reach `factor` times as far as the model did without.
STRETCHING = ("linear", "dynamic", "yarn")
NEVER = 2**31 - 1
"""Tokens after which nothing switches any more."""


def scalings(config: PreTrainedConfig) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """The rope parameters of a text config, by layer type where they differ; else by None."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in parameters:
        yield None, parameters
        return
    for kind, own in parameters.items():
        if isinstance(own, Mapping):
            yield kind, own  # type: ignore[misc]  # a dict, in transformers


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens that a model reads: `max_position_embeddings`, times YaRN's factor where that is more.

    Args:
        config: the model's config.

    Returns:
        None: the config sets no limit.
    """
    text_config = config.get_text_config(decoder=True)
    limit: int | None = getattr(text_config, "max_position_embeddings", None)
    if limit is None:
        return None
    for _, own in scalings(text_config):
        # Models of Qwen2.5 keep the length without YaRN in max_position_embeddings.
        if own["rope_type"] == "yarn" and own.get("factor"):
            limit = max(limit, round(own["factor"] * own["original_max_position_embeddings"]))
    return limit


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raises ValueError if the model does not read `context` tokens."""
    limit = longest_context(config)
    if limit is not None and context > limit:
        raise ValueError(
            f"a context of {context} tokens exceeds the {limit} that the model reads "
            f"({type(config).__name__}); ask for less, or stretch it with rope_parameters="
            f"{{'rope_type': 'yarn', 'factor': {-(-context // limit)}.0}} if the model was made "
            "for that"
        )


def override(config: PreTrainedConfig, rope_parameters: Mapping[str, Any]) -> None:
    """Gives a model another scaling of its rotary embedding.

    Args:
        config: the model's config; changed.
        rope_parameters: as in transformers' configs: `rope_type` and what belongs to it. For a
            model with rope parameters by layer type, such a mapping by layer type. The model's
            `rope_theta` and `partial_rotary_factor` stay, unless they are given; YaRN's
            `original_max_position_embeddings` is by default the config's
            `max_position_embeddings`, which becomes `factor` times as much.

    Raises:
        ValueError: the model has no rotary embedding, or the parameters are not those of any.
    """
    text_config = config.get_text_config(decoder=True)
    current = dict(scalings(text_config))
    if not current:
        raise ValueError(
            f"rope_parameters: {type(config).__name__} has no rotary embedding to change"
        )
    if not isinstance(rope_parameters, Mapping):
        raise ValueError(
            "rope_parameters must be a dictionary, as {'rope_type': 'yarn', 'factor': 4.0}, got "
            f"{rope_parameters!r}"
        )
    given: dict[Any, Any] = {None: rope_parameters} if None in current else dict(rope_parameters)
    for kind, own in given.items():
        if kind not in current or not isinstance(own, Mapping):
            raise ValueError(
                f"rope_parameters of {type(config).__name__} are given by layer type "
                f"({', '.join(map(str, current))}), got {kind!r}: {own!r}"
            )
        current[kind] = _scaling(text_config, current[kind], own)
    limit = text_config.max_position_embeddings
    for kind in given:
        factor = current[kind].get("factor")
        if current[kind]["rope_type"] in STRETCHING and factor:
            before = current[kind].get("original_max_position_embeddings", limit)
            text_config.max_position_embeddings = max(
                text_config.max_position_embeddings, round(factor * before)
            )
    text_config.rope_parameters = current.get(None, current)
    try:
        text_config.validate_rope()
    except (KeyError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else error
        raise ValueError(f"rope_parameters {dict(rope_parameters)}: {reason}") from error


def _scaling(
    config: PreTrainedConfig, current: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    own = {name: current[name] for name in KEPT if name in current} | dict(given)
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    own.setdefault("rope_type", own.pop("type", None))
    if own["rope_type"] not in kinds:
        raise ValueError(
            f"rope_parameters: rope_type must be one of {', '.join(kinds)}, "
            f"got {own['rope_type']!r}"
        )
    if own["rope_type"] == "yarn":
        own.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    factor = own.get("factor", 1.0)
    if not isinstance(factor, int | float) or factor < 1:
        raise ValueError(f"rope_parameters: factor must be a number from 1 on, got {factor!r}")
    return own


def why_not_fixed(config: PreTrainedConfig, context: int) -> str | None:
    """What would go wrong in a cache of `context` tokens, because the model is not `fix`ed to it.

    Returns:
        A clause for an error; None: nothing.
    """
    text_config = config.get_text_config(decoder=True)
    switches = False
    for _, own in scalings(text_config):
        if own["rope_type"] == "dynamic" and context > text_config.max_position_embeddings:
            return "its dynamic rotary embedding has other frequencies at every length"
        switch = own.get("original_max_position_embeddings", NEVER)
        differ = own["rope_type"] == "longrope" and own["short_factor"] != own["long_factor"]
        if differ and context > switch:
            return f"its LongRoPE embedding switches frequencies after {switch} tokens"
        switches = own["rope_type"] not in ("yarn", "llama3")
    # transformers' models with this field begin anew when a prompt is longer, without the cache.
    switch = getattr(text_config, "original_max_position_embeddings", NEVER)
    if switches and context > switch:
        return f"generate drops the cache of such a model after {switch} tokens"
    return None


def fix(config: PreTrainedConfig, context: int) -> None:
    """Fixes a model to the frequencies that it has at `context` tokens, whatever it reads later.

    LongRoPE gets the set of frequencies for that length for all lengths, dynamic NTK becomes an
    ordinary embedding of another base. Other models stay as they are.

    Args:
        config: the model's config, before the model is made; changed.
        context: tokens.
    """
    text_config = config.get_text_config(decoder=True)
    for kind, own in scalings(text_config):
        if own["rope_type"] == "longrope" and own["short_factor"] != own["long_factor"]:
            compute = ROPE_INIT_FUNCTIONS["longrope"]
            by_type = {} if kind is None else {"layer_type": kind}
            _, attention_factor = compute(text_config, "cpu", seq_len=context, **by_type)
            length = "long" if context > own["original_max_position_embeddings"] else "short"
            for other in ("short", "long"):
                own[f"{other}_factor"] = own[f"{length}_factor"]
                if f"{length}_mscale" in own:
                    own[f"{other}_mscale"] = own[f"{length}_mscale"]
            own["attention_factor"] = attention_factor
            own["original_max_position_embeddings"] = NEVER
        elif own["rope_type"] == "dynamic":
            limit, factor = text_config.max_position_embeddings, own.pop("factor")
            dim = int(head_dim_of(text_config) * own.get("partial_rotary_factor", 1.0))
            stretch = factor * max(context, limit) / limit - (factor - 1)
            own["rope_type"] = "default"
            own["rope_theta"] *= stretch ** (dim / (dim - 2))
        if own["rope_type"] in ("yarn", "llama3"):
            return  # for which the field below means something
    if hasattr(text_config, "original_max_position_embeddings"):
        text_config.original_max_position_embeddings = NEVER


def without_switch(model: nn.Module) -> None:
    """Has the rotary embeddings of a model that was fixed no longer look at lengths.

    A look at the length would split the graph of every step.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == "longrope":
            module.rope_type = "longrope of one length"  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            for name, kind in kinds.items():
                if kind == "longrope":
                    kinds[name] = "longrope of one length"
