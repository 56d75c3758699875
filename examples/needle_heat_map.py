"""A heat map of how often a model finds a fact, by the length of its context and the fact's depth.

A recall model reads each context once and is asked about many records in it, a batch of forks at a
time; any other model gets prose with one fact in it, and is asked to complete a sentence.

    python examples/needle_heat_map.py
    python examples/needle_heat_map.py --retrieval-budget 0.001 --min-clusters 1   # where it breaks
    python examples/needle_heat_map.py --model gemma --lengths 1024 4096 --depths 3 --questions 2
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, load_model, load_tokenizer
from retro_ops.models.prose import haystack, make_needle
from retro_ops.models.recall import is_recall, make_task

NEW_TOKENS = 12  # of an answer in text


def recalled(
    model: PreTrainedModel, config: RetroConfig, length: int, depths: int, questions: int
) -> Iterator[float]:
    """Fraction of right answers about records at each of `depths` depths, in one context."""
    records = length // 16
    body, asked, answers = (part.to(model.device) for part in make_task(length, records, records))
    keys = torch.stack((body[0, :-1], body[0, 1:]), dim=1)
    place = (keys == asked[0, :, None, 1:]).all(dim=2).int().argmax(dim=1)
    cache = RetroCache(model.config, config, max_cache_len=length + 5)
    with torch.inference_mode():
        model(body, past_key_values=cache, logits_to_keep=1)
    for depth in range(depths):
        chosen = (place * depths // length == depth).nonzero()[:questions, 0]
        if not len(chosen):
            raise ValueError(f"{length} tokens have no record at one of {depths} depths")
        ids = torch.cat((body.expand(len(chosen), -1), asked[0, chosen]), dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=model.config.eos_token_id,
            past_key_values=cache.fork(torch.zeros(len(chosen), dtype=torch.int64)),
            max_new_tokens=2,
            do_sample=False,
        )
        yield float((out[:, -2:] == answers[0, chosen]).all(dim=1).float().mean())


def completed(
    model: PreTrainedModel,
    tokenizer: Any,
    config: RetroConfig,
    length: int,
    depth: float,
    seed: int,
) -> bool:
    """Whether the model completes a sentence with the number that stands at one depth."""
    needle = make_needle(seed)
    text = haystack(needle, length, depth, lambda part: len(tokenizer(part).input_ids), seed=seed)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    tokens = inputs.input_ids.shape[1]
    cache = RetroCache(model.config, config, max_cache_len=tokens + NEW_TOKENS)
    out = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return needle.answer in tokenizer.decode(out[0, tokens:])


def draw(scores: list[list[float]], lengths: Sequence[int], title: str, path: Path) -> None:
    """Scores `[lengths][depths]` in 0..1 as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + len(lengths), 4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(
        [*zip(*scores, strict=True)], cmap="RdYlGn", vmin=0, vmax=1, aspect="auto",
        extent=(-0.5, len(lengths) - 0.5, 100, 0),
    )  # fmt: skip
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set(xlabel="tokens", ylabel="depth of the fact, %", title=title)
    figure.colorbar(image, label="right answers, fraction")
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Asks, prints the scores and draws them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="recall", help="name or directory (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--depths", type=int, default=10, help="bands of depth (%(default)s)")
    parser.add_argument("--questions", type=int, default=8, help="in each cell (%(default)s)")
    defaults = RetroConfig()
    parser.add_argument("--retrieval-budget", type=float, default=defaults.retrieval_budget)
    parser.add_argument("--min-clusters", type=int, default=defaults.min_retrieved_clusters)
    parser.add_argument("--out", type=Path, default=Path("needles.png"), help="PNG (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.depths, options.questions, *options.lengths) < 1:
        parser.error("--lengths, --depths and --questions must be at least 1")
    try:
        config = RetroConfig(
            retrieval_budget=options.retrieval_budget, min_retrieved_clusters=options.min_clusters
        )
        recall, depths = is_recall(options.model), options.depths
        tokenizer = None if recall else load_tokenizer(options.model)
        model = load_model(options.model, context=max(options.lengths) + NEW_TOKENS)
        scores: list[list[float]] = []
        for length in options.lengths:
            if recall:
                scores.append([*recalled(model, config, length, depths, options.questions)])
            else:
                cells = [
                    [
                        completed(model, tokenizer, config, length, (band + 0.5) / depths, seed)
                        for seed in range(options.questions)
                    ]
                    for band in range(depths)
                ]
                scores.append([sum(cell) / len(cell) for cell in cells])
            print(f"{length:>7,} tokens:", *(f"{100 * score:4.0f}" for score in scores[-1]), "%")
        draw(scores, options.lengths, options.model, options.out)
    except (ImportError, OSError, ValueError, MemoryError) as error:
        parser.error(str(error))
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
