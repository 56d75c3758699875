"""Queries, keys and values of real models, and the texts that they read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, load_model, load_tokenizer
from retro_ops.models.attention import retro_attention, retro_mask
from retro_ops.models.load import find_model, read_config
from retro_ops.models.prose import prose
from retro_ops.models.recall import is_recall, make_task
from retro_ops.models.rope import longest_context

TEXTS = ("prose", "reference")
"""Made prose; the reference of the Python language, which comes with every Python. Any other name
is that of a file."""
RECORD = "retro_record"
EARLIER_QUERIES = 64
"""Queries of the end of the prompt, for what calibrates itself on them."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True)
class Recording:
    """What one full-attention layer attended to and with what; float32, on the CPU."""

    source: str
    layer: int
    prompt: int
    """T, tokens before the first of the S that are decoded."""
    queries: Tensor
    """`[1, Hq, S, D]`, of the tokens T to T + S - 1, after rotary embedding."""
    keys: Tensor
    """`[1, Hkv, T + S, D]`, after rotary embedding."""
    values: Tensor
    """Like `keys`."""
    scale: float
    """Factor on q . k."""
    earlier_queries: Tensor | None = None
    """`[1, Hq, EARLIER_QUERIES, D]`, of the last tokens before T."""


def text_of(name: str, seed: int) -> Callable[[], str]:
    """A function that gives one more part of a text at each call.

    Args:
        name: out of `TEXTS`, or a file, which is begun anew at its end.
        seed: of prose; the reference begins at another topic for each, a file at another tenth.

    Raises:
        FileNotFoundError: no such text.
        ValueError: the file is empty.
    """
    if name == "prose":
        return prose(seed)
    if name == "reference":
        from pydoc_data.topics import topics

        parts = [topics[topic] for topic in sorted(topics)]
        first = 13 * seed % len(parts)
    else:
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(
                f"no text {name!r}: it is neither {' nor '.join(TEXTS)}, nor a file"
            )
        whole = path.read_text("utf-8")
        if not whole.strip():
            raise ValueError(f"the text {name!r} is empty")
        parts = [part for part in whole.split("\n\n") if part.strip()]
        first = seed % 10 * len(parts) // 10
    place = iter(range(first, 1 << 62))
    return lambda: parts[next(place) % len(parts)]


def token_ids(tokenizer: Any, name: str, tokens: int, *, rows: int = 1, seed: int = 0) -> Tensor:
    """The first `tokens` tokens of a text, `[rows, tokens]` int64; see `text_of`.

    Row r is of the seed r further on: each has another text.
    """

    def row(seed: int) -> list[int]:
        part = text_of(name, seed)
        text: list[str] = []
        ids: list[int] = []
        while len(ids) < tokens:
            # A part has a few tokens at least.
            text += [part() for _ in range(max((tokens - len(ids)) // 64, 16))]
            ids = tokenizer("\n\n".join(text)).input_ids
        return ids[:tokens]

    return torch.tensor([row(seed + r) for r in range(rows)])


def input_ids(
    model_name: str, text: str, context: int, following: int, *, rows: int = 1, seed: int = 0
) -> Tensor:
    """What a model reads, `[rows, context + following]`: a recall model's records, then questions
    and answers; any other model a text. Rows are as in `token_ids`."""
    if not is_recall(model_name):
        tokenizer = load_tokenizer(model_name)
        return token_ids(tokenizer, text, context + following, rows=rows, seed=seed)
    read = []
    for r in range(rows):
        task = make_task(context, max(context // 16, 1), -(-following // 5), seed=seed + r)
        asked = torch.cat((task.questions, task.answers), dim=2).flatten(1)
        read.append(torch.cat((task.body, asked[:, :following]), dim=1))
    return torch.cat(read)


def record(
    model_name: str,
    text: str,
    context: int,
    queries: int,
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> list[Recording]:
    """What the full-attention layers of a model see while it reads on in a text, exactly.

    Args:
        model_name: as in `load_model`.
        text: as in `text_of`; recall models have their own.
        context: tokens before the recorded queries.
        queries: tokens after them, each with its query in every layer.
        seed: of the text.
        progress: told what is being done.

    Raises:
        ValueError: the model reads fewer tokens.
    """
    progress(f"loading {model_name}", 0, 2)
    model = load_model(model_name, dtype=torch.float32, device="cpu")
    check_length(model.config, context + queries)
    ids = input_ids(model_name, text, context, queries, seed=seed)
    progress(f"{model_name} reads {ids.shape[1]:,} tokens", 1, 2)
    taken: list[tuple[int, Tensor, Tensor, Tensor, float]] = []

    def recording_attention(
        module: nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if key.layer in cache.retro_layers:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            last = query[:, :, -queries - EARLIER_QUERIES :]
            number: Any = module.layer_idx
            taken.append((number, last.clone(), key.keys, key.values, scale))
        return retro_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register(RECORD, recording_attention)
    AttentionMaskInterface.register(RECORD, retro_mask)
    # Prompts are attended to exactly; this one is too short to be indexed for nothing.
    tokens = ids.shape[1]
    config = RetroConfig(cluster_size=tokens, segment_size=tokens, update_segment=tokens)
    cache = RetroCache(model.config, config, max_cache_len=tokens)
    model.set_attn_implementation(RECORD)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    progress(f"{model_name} read {tokens:,} tokens", 2, 2)
    source = model_name if is_recall(model_name) else f"{model_name}, {Path(text).stem}"
    return [
        Recording(
            source=source,
            layer=layer,
            prompt=context,
            queries=last[:, :, -queries:].clone(),
            keys=keys.clone(),
            values=values.clone(),
            scale=scale,
            earlier_queries=last[:, :, :-queries].clone(),
        )
        for layer, last, keys, values, scale in taken
    ]


def check_model(name: str, tokens: int, *, others: Collection[str] = ()) -> None:
    """Raises unless there is such a model, which reads so many tokens, and what makes them.

    Its weights are not looked at: what cannot be measured is refused before anything is.

    Args:
        name: as in `load_model`.
        tokens: of a prompt and what follows it.
        others: names that are no models, for the message.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
        ValueError: it reads fewer tokens, or its config is of no model that transformers knows.
    """
    path = find_model(name)
    try:
        config = read_config(name, path)
    except FileNotFoundError as error:
        if not others:
            raise
        raise FileNotFoundError(f"{error}; other names are {', '.join(others)}") from error
    check_length(config, tokens)
    if not is_recall(name):
        load_tokenizer(name)


def check_length(config: PreTrainedConfig, tokens: int) -> None:
    """Raises ValueError if a model does not read so many tokens."""
    limit = longest_context(config)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"the model reads {limit} tokens, got a text of {tokens}; shorten --context"
        )
