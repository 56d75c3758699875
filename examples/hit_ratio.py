"""A plot of the page cache's hit ratio over decode steps, for several sizes of the cache.

The KV store of every layer is offloaded: to pinned memory of the host on a GPU; on a CPU both are
plain memory, and the counts are the same. The model answers questions about records (recall
models) or reads on in prose (others).

    python examples/hit_ratio.py
    python examples/hit_ratio.py --model gemma --context 4096 --steps 64 --cache-ratios 0.05
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, load_model, load_tokenizer
from retro_ops.models.prose import prose
from retro_ops.models.recall import is_recall, make_task

WINDOW = 16  # steps that a point of a curve is the mean of


def token_ids(name: str, context: int, steps: int) -> Tensor:
    """What the model reads, `[1, context + steps]`."""
    if is_recall(name):
        body, questions, answers = make_task(context, max(context // 16, 1), -(-steps // 5))
        following = torch.cat((questions, answers), dim=2).flatten(1)
        return torch.cat((body, following[:, :steps]), dim=1)
    tokenizer, paragraph = load_tokenizer(name), prose(0)
    text = "\n\n".join(paragraph() for _ in range((context + steps) // 40 + 1))
    ids = tokenizer(text, return_tensors="pt").input_ids
    return ids[:, : context + steps]


@torch.inference_mode()
def pages_of_steps(
    model: PreTrainedModel, ids: Tensor, context: int, config: RetroConfig
) -> tuple[Tensor, Tensor]:
    """Hits and misses in pages of each step, summed over layers: two `[steps]`."""
    cache = RetroCache(model.config, config, max_cache_len=ids.shape[1], offload=True)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    counts = [(0, 0)]
    for token in ids[:, context:].split(1, dim=1):
        model(token, past_key_values=cache)
        stats = cache.stats()
        counts.append((int(stats["page_hits"]), int(stats["page_misses"])))
    hits, misses = torch.tensor(counts).diff(dim=0).unbind(1)
    return hits, misses


def draw(curves: dict[float, tuple[Tensor, Tensor]], title: str, path: Path) -> None:
    """A line for each size of the cache: pages that hit in the latest `WINDOW` steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for ratio, (hits, misses) in curves.items():
        window = min(WINDOW, len(hits))
        hit, missed = (pages.unfold(0, window, 1).sum(dim=1) for pages in (hits, misses))
        steps = range(window, len(hits) + 1)
        axis.plot(steps, (hit / (hit + missed)).tolist(), label=f"cache: {100 * ratio:g} % of KV")
    axis.set(xlabel="decode step", ylabel="hit ratio, pages", ylim=(0, 1), title=title)
    axis.legend()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    """Decodes once for each size of the cache, prints the hit ratios and draws them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="recall", help="name or directory (%(default)s)")
    parser.add_argument("--context", type=int, default=16384, help="prompt tokens (%(default)s)")
    parser.add_argument("--steps", type=int, default=256, help="decode steps (%(default)s)")
    parser.add_argument("--cache-ratios", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--out", type=Path, default=Path("hit_ratio.png"), help="PNG (%(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.context < 2:
        parser.error(f"--steps and --context must be at least 2, got {options.steps} and "
                     f"{options.context}")  # fmt: skip
    try:
        configs = {ratio: RetroConfig(cache_ratio=ratio) for ratio in options.cache_ratios}
        ids = token_ids(options.model, options.context, options.steps)
        model = load_model(options.model, context=options.context + options.steps)
        curves = {}
        for ratio, config in configs.items():
            hits, misses = pages_of_steps(model, ids.to(model.device), options.context, config)
            total = int((hits + misses).sum())
            if not total:
                raise ValueError(
                    f"{options.context} tokens make no clusters, so no page is asked for; "
                    "give a larger --context"
                )
            print(f"cache {100 * ratio:g} %: {int(hits.sum()):,} of {total:,} pages hit, "
                  f"{100 * int(hits.sum()) / total:.1f} %")  # fmt: skip
            curves[ratio] = (hits, misses)
        draw(curves, f"{options.model}, {options.context:,} tokens", options.out)
    except (ImportError, OSError, ValueError, MemoryError) as error:
        parser.error(str(error))
    print(f"drawn in {options.out}")


if __name__ == "__main__":
    main()
