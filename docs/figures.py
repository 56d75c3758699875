"""Draws the pictures of the guides from the package itself.

    python docs/figures.py                      # all of them, a minute or two
    python docs/figures.py --only data_flow     # those with these names

`wave_index`, `error_bytes` and `fields` are of keys that a language model computed (Gemma 3 270M,
on a CPU), `step_bytes` of made keys, `hit_ratio` and `throughput` of rows in `benchmarks/results`;
`data_flow` is a drawing, `fields` a table. What is measured is printed.

Pictures are SVG on white ground, sharp in any size, their letters as paths, so that they look the
same wherever fonts differ; one with thousands of points is PNG. No Mermaid: a package index does
not draw it, nor does an editor. The README links its picture by a relative path, with what it shows
in words for those who do not get to see it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from torch import Tensor

from retro_ops import RetroConfig, RetroLayer
from retro_ops.benchmarks import quality
from retro_ops.benchmarks.recordings import Recording, record
from retro_ops.ops._contract import Counter, retrieved_count
from retro_ops.ops.wave_estimate import reference_scores
from retro_ops.testing import make_kv, make_query

ROOT = Path(__file__).resolve().parents[1]
READ, ESTIMATED, TAIL, STEADY, SLOW = "#d95f02", "#1f78b4", "#bdbdbd", "#1b9e77", "#7570b3"
PALE = {READ: "#fde3cf", ESTIMATED: "#d6e7f3", TAIL: "#f2f2f2", STEADY: "#d3eee4", SLOW: "#e2e1f0"}
ESTIMATORS = {"variance": READ, "mean": SLOW}


# The data flow


def data_flow(options: argparse.Namespace) -> Figure:
    """What becomes of a prompt, of a new token and of its query."""
    figure = Figure(figsize=(11, 4.9))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(0, 49))
    axis.axis("off")
    ink = "#333333"

    def box(x: float, y: float, wide: float, high: float, title: str, rest: str = "",
            colour: str = "#555555") -> None:  # fmt: skip
        axis.add_patch(
            FancyBboxPatch(
                (x, y), wide, high, boxstyle="round,pad=0,rounding_size=1",
                facecolor=PALE.get(colour, "white"), edgecolor=colour, linewidth=1.4,
            )
        )  # fmt: skip
        lines = len(rest.splitlines())
        middle = y + high / 2
        axis.text(x + wide / 2, middle + 1.0 * lines, title, ha="center", va="center",
                  fontsize=10.5, fontweight="bold")  # fmt: skip
        axis.text(x + wide / 2, middle - 1.3, rest, ha="center", va="center", fontsize=9,
                  linespacing=1.2)  # fmt: skip

    def line(*points: tuple[float, float], head: bool = True, style: str = "-") -> None:
        *bends, before, end = points
        axis.plot(*zip(*bends, before, strict=True), style, color=ink, linewidth=1.2)
        axis.add_patch(
            FancyArrowPatch(before, end, arrowstyle="-|>" if head else "-", mutation_scale=12,
                            linewidth=1.2, linestyle=style, color=ink, shrinkA=0, shrinkB=0)
        )  # fmt: skip

    def note(x: float, y: float, text: str, align: str = "center", **more: Any) -> None:
        axis.text(x, y, text, ha=align, va="center", fontsize=9, linespacing=1.2,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5}, **more)  # fmt: skip

    op = {"family": "monospace"}
    box(8, 42, 22, 5.5, "Prompt: keys, values")
    box(88, 42, 21, 5.5, "New token: key, value")
    box(1, 6, 8.5, 5.5, "Query")

    box(8, 24, 22, 8.5, "Wave index", "mean keys, mean values,\nsizes, variances", ESTIMATED)
    box(36, 24, 21, 8.5, "Page cache", "if offloaded: copies of\nclusters, fast memory", SLOW)
    box(63, 24, 21, 8.5, "KV store", "tokens by cluster,\nfast or host memory", READ)
    box(89, 24, 20, 8.5, "Steady zone", "first, latest and not\nyet indexed tokens", STEADY)

    box(14, 4, 19, 9.5, "wave_estimate", "scores all clusters,\nranks, estimates")
    box(40, 4, 18, 9.5, "cluster_gather", "where they lie; offloaded:\npage_gather")
    box(66, 4, 32, 9.5, "merged_attention", "exact softmax over what is read,\n"
        "merged with the estimate")  # fmt: skip

    line((19, 42), (19, 32.5))
    line((19, 37), (73.5, 37), (73.5, 32.5))
    note(35, 37, "cluster_keys, pack_clusters", **op)
    line((99, 42), (99, 32.5))
    note(100, 38.5, "append_tokens", **op)
    line((91, 32.5), (91, 37), (73.5, 37))
    note(83, 37, "grow_index", **op)

    line((19, 24), (19, 13.5))
    line((63, 28), (57, 28))
    note(60, 30, "misses", fontstyle="italic")
    line((9.5, 8.75), (14, 8.75))
    line((33, 8.75), (40, 8.75))
    line((58, 8.75), (66, 8.75))
    line((98, 8.75), (109, 8.75))
    note(103.5, 10.6, "output", fontstyle="italic")
    note(36.5, 10.6, "ranks", fontstyle="italic")
    note(62, 10.6, "addresses", fontstyle="italic")
    line((26, 13.5), (26, 18), (68, 18), (68, 13.5))
    note(34, 18, "estimate", fontstyle="italic")
    line((54, 24), (54, 20.5), (71, 20.5), (71, 13.5))
    note(60, 20.5, "hits", fontstyle="italic")
    line((76, 24), (76, 13.5))
    note(80.5, 20.5, "retrieved\nclusters", fontstyle="italic")
    line((94, 24), (94, 13.5))
    note(98, 20.5, "always", fontstyle="italic")
    line((44, 13.5), (44, 24), style=":")
    note(44, 15.7, "update_pages", **op)
    note(57, 1.4, "On a GPU the lower row is one op: decode_attention, or offloaded_attention.",
         color="#555555")  # fmt: skip
    return figure


# A real index


@cache
def recordings(model: str, context: int, queries: int) -> list[Recording]:
    """What the full-attention layers of a model see behind a prompt."""
    return record(model, "prose", context, queries)


def wave_index(options: argparse.Namespace) -> Figure:
    """The keys of one layer against one query, and the mass of its clusters."""
    every = recordings(options.model, options.context, options.queries)
    recording = every[len(every) // 2]
    config = RetroConfig()
    layer = quality.prefilled(recording, config)
    query = recording.queries[:, :, 0]  # [1, Hq, D]
    clusters, tokens = (
        int(layer.counters[0, column]) for column in (Counter.CLUSTERS, Counter.INDEXED_TOKENS)
    )
    scores = reference_scores(
        query, *layer.index, layer.counters, config.estimator, recording.scale
    )
    order = scores.score[0, 0, :clusters].argsort(descending=True, stable=True)
    read = retrieved_count(config.retrieval_budget, config.min_retrieved_clusters, clusters)
    last = min(read + round(config.estimation_budget * clusters), clusters)
    zone = torch.full((clusters,), 2)
    zone[order[:last]] = 1
    zone[order[:read]] = 0

    # Exact logits of the first KV head's query heads, [G, tokens], and each token's cluster.
    group = recording.queries.shape[1] // recording.keys.shape[1]
    keys = layer.store[0, 0, 0, :tokens].double()
    logit = recording.scale * query[0, :group].double() @ keys.T
    kept = layer.steady[0, 0, 0, : int(layer.counters[0, Counter.STEADY_TOKENS])].double()
    steady_logit = recording.scale * query[0, :group].double() @ kept.T
    lse = torch.cat((logit, steady_logit), dim=1).logsumexp(dim=1, keepdim=True)
    ends = layer.offsets[0, 0, 1 : clusters + 1].long().contiguous()
    cluster = torch.searchsorted(ends, torch.arange(tokens), right=True)
    weight = (logit - lse).exp().mean(dim=0)  # mean of the query heads, as everything below
    kept_weight = (steady_logit - lse).exp().mean(dim=0)
    exact = torch.zeros(clusters, dtype=torch.float64).index_add_(0, cluster, weight)
    guess = (scores.log_mass[0, 0, :, :clusters] - lse).exp().mean(dim=0)

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = ("read exactly", "estimated by their clusters' means", "tail: one mean value")
    centred = keys - keys.mean(dim=0)
    axis_of = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    height, kept_height = centred @ axis_of, (kept - keys.mean(dim=0)) @ axis_of
    for number, colour in ((2, TAIL), (1, ESTIMATED), (0, READ)):
        own = zone[cluster] == number
        left.scatter(weight[own], height[own], s=3, color=colour, linewidths=0,
                     label=f"{names[number]}: {int(own.sum()):,}")  # fmt: skip
    left.scatter(kept_weight, kept_height, s=9, color=STEADY, linewidths=0,
                 label=f"steady zone, read exactly: {len(kept)}")  # fmt: skip
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], markerscale=2.5, fontsize=8, loc="upper right")
    high = 1.9 * float(height.abs().max())
    left.set(xlabel="softmax weight of a token", ylabel="first principal component of the keys",
             title=f"{recording.source}, layer {recording.layer}, {recording.prompt:,} tokens",
             xscale="log", ylim=(-high / 1.7, high))  # fmt: skip

    ranks = torch.arange(1, clusters + 1)
    shares = exact[order]
    edges = ((0.9, read + 0.5, READ), (read + 0.5, last + 0.5, ESTIMATED),
             (last + 0.5, clusters, TAIL))  # fmt: skip
    for begin, end, colour in edges:
        right.axvspan(begin, end, color=PALE[colour], linewidth=0)
    right.loglog(ranks, shares, ".", markersize=3, color="black", label="exact")
    right.loglog(ranks, guess[order], ".", markersize=3, color="#e7298a",
                 label='counted, estimator "variance"')  # fmt: skip
    bounds = (0, read, last, clusters)
    mass = [float(shares[a:b].sum()) for a, b in itertools.pairwise(bounds)]
    right.set(xlabel="clusters by rank", ylabel="share of the softmax mass", xlim=(0.9, clusters),
              title="what each cluster weighs, and what it is counted as")  # fmt: skip
    right.legend(loc="lower left", fontsize=8)
    say("wave_index", f"clusters {clusters}: {read} read, {last - read} estimated, "
        f"{clusters - last} tail; mass " + ", ".join(f"{part:.3f}" for part in mass)
        + f"; steady zone {float(kept_weight.sum()):.3f} in {len(kept)} tokens; tokens read "
        f"{int((zone[cluster] == 0).sum())}")  # fmt: skip
    return figure


# What a step reads, and what it costs in accuracy


def step_bytes(options: argparse.Namespace) -> Figure:
    """Bytes of a decode step in per cent of what dense attention reads, by their kind."""
    config = RetroConfig()
    parts: dict[str, list[float]] = {"retrieved": [], "steady": [], "means": [], "values": []}
    for context in options.contexts:
        keys, values = make_kv(1, 1, context, 128, dtype=torch.bfloat16)
        layer = RetroLayer(
            config, batch_size=1, num_query_heads=4, num_kv_heads=1, head_dim=128,
            max_length=context + 32, dtype=torch.bfloat16,
        )  # fmt: skip
        layer.prefill(keys, values)
        for step in range(16):
            query = make_query(keys, 4, seed=1 + step)
            layer.decode(query, keys[:, :, step, None], values[:, :, step, None])
        stats, token = layer.stats(), 2 * 128 * 2
        clusters = stats["clusters"]
        read = retrieved_count(config.retrieval_budget, config.min_retrieved_clusters, clusters)
        estimated = min(round(config.estimation_budget * clusters), clusters - read)
        sizes = {
            "retrieved": stats["retrieved_tokens"] / stats["steps"] * token,
            "steady": stats["steady_tokens"] * token,
            "means": clusters * (token / 2 + 8),
            "values": estimated * token / 2,
        }
        dense = (stats["indexed_tokens"] + stats["steady_tokens"]) * token
        assert abs(sum(sizes.values()) - stats["bytes_read_per_token"]) < 1
        for name, size in sizes.items():
            parts[name].append(100 * size / dense)
        say("step_bytes", f"{context:,} tokens: "
            + ", ".join(f"{name} {shares[-1]:.2f} %" for name, shares in parts.items())
            + f"; {sum(sizes.values()) / dense:.4f} of dense; {clusters} clusters, {read} read, "
            f"{stats['retrieved_tokens'] / stats['steps']:.0f} tokens of them")  # fmt: skip
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    base = torch.zeros(len(options.contexts), dtype=torch.float64)
    labels = {
        "means": ("mean keys of all clusters, sizes, variances", ESTIMATED),
        "values": ("mean values of estimated clusters", SLOW),
        "retrieved": ("keys and values of retrieved clusters", READ),
        "steady": ("steady zone", STEADY),
    }
    names = [f"{context:,}" for context in options.contexts]
    for name, (label, colour) in labels.items():
        shares = torch.tensor(parts[name], dtype=torch.float64)
        axis.bar(names, shares, bottom=base, label=label, color=colour, width=0.6)
        base += shares
    for place, total in enumerate(base.tolist()):
        axis.text(place, total, f"{total:.1f} %", ha="center", va="bottom", fontsize=8)
    axis.set(xlabel="tokens of the context", ylabel="bytes, % of dense attention",
             ylim=(0, 1.12 * float(base.max())))  # fmt: skip
    axis.legend(fontsize=8)
    return figure


def error_bytes(options: argparse.Namespace) -> Figure:
    """Error of the attention output over bytes read, as either budget changes."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for estimator, colour in ESTIMATORS.items():
        default = RetroConfig(estimator=estimator)
        panels = (
            (left, "retrieval_budget", replace(default, min_retrieved_clusters=0)),
            (right, "estimation_budget", default),
        )
        for axis, field, config in panels:
            budgets = getattr(options, f"{field}s")
            points = []
            for budget in budgets:
                points.append(measured(options, replace(config, **{field: budget})))
                say("error_bytes", f"{estimator}, {field} {budget:g}", points[-1])
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, color=colour, label=estimator)
            for point, budget in zip(points, budgets, strict=True):
                axis.annotate(f"{100 * budget:g} %", point, textcoords="offset points",
                              xytext=(4, 4), fontsize=7, color=colour)  # fmt: skip
    left.set(title="retrieval budget, no floor under it", ylabel=ERROR, xlabel=BYTES)
    right.set(title="estimation budget, at least 64 clusters read", xlabel=BYTES)
    logarithmic(left, (0.02, 0.03, 0.05, 0.1, 0.2, 0.3))
    left.legend(title="estimator", fontsize=8, title_fontsize=8)
    return figure


def fields(options: argparse.Namespace) -> None:
    """Bytes and error when one field of the defaults is changed: a table, no picture."""
    changed: dict[str, tuple[int, ...]] = {
        "min_retrieved_clusters": (16, 32, 128),
        "cluster_size": (8, 32),
        "segment_size": (2048,),
        "kmeans_iterations": (3, 20),
        "sink_tokens": (0, 64),
        "local_tokens": (1, 512),
    }
    default = RetroConfig()
    say("fields", "defaults", measured(options, default))
    for field, values in changed.items():
        for value in values:
            point = measured(options, replace(default, **{field: value}))
            say("fields", f"{field} {value}", point)


BYTES = "bytes, % of dense attention"
ERROR = "mean relative error of the output"


def measured(options: argparse.Namespace, config: RetroConfig) -> tuple[float, float]:
    """Bytes in per cent of dense attention's and error, means over a model's layers."""
    every = recordings(options.model, options.context, options.queries)
    results = [
        quality.measure(recording, config, exact)
        for recording, exact in zip(
            every, exact_outputs(options.model, options.context, options.queries), strict=True
        )
    ]
    keys = every[0].keys
    dense = 2 * keys.shape[1] * every[0].prompt * keys.shape[3] * keys.element_size()
    size = sum(result.bytes_per_token for result in results) / len(results)
    errors = [float(result.figures.error.mean()) for result in results]
    return 100 * size / dense, sum(errors) / len(errors)


@cache
def exact_outputs(model: str, context: int, queries: int) -> list[Tensor]:
    """Dense attention of what `recordings` gives, in float64."""
    return [quality.exact_outputs(one) for one in recordings(model, context, queries)]


def logarithmic(axis: Any, ticks: Sequence[float]) -> None:
    """A logarithmic y axis with these numbers on it."""
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)


# The page cache


def hit_ratio(options: argparse.Namespace) -> Figure:
    """Hit ratios over the size of the page cache, as measured: of the default policy, `lfu`."""
    with (ROOT / "benchmarks/results/buffer.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["policy"] == "lfu" and not row["us"]]
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axis = figure.subplots()
    traces = {
        "synthetic 0.8": ("made, 0.80 shared with the step before", "--", SLOW),
        "synthetic 0.6": ("made, 0.60 shared", "--", ESTIMATED),
        "synthetic 0.3": ("made, 0.30 shared", "--", STEADY),
        "recall-128k": ("recall-128k, 131,072 tokens", "-", READ),
        "recall": ("recall, 32,768 tokens", "-", "black"),
        "gemma": ("Gemma 3 270M, 16,384 tokens", "-", "#e7298a"),
    }
    for trace, (label, style, colour) in traces.items():
        points = {
            float(row["cache_ratio"]): float(row["hit_ratio"])
            for row in rows
            if row["trace"] == trace
        }
        x = sorted(points)
        axis.plot([100 * ratio for ratio in x], [points[ratio] for ratio in x], style, marker="o",
                  markersize=4, color=colour, label=label)  # fmt: skip
        say("hit_ratio", f"{trace}: " + ", ".join(f"{100 * r:g} %: {points[r]:.2f}" for r in x))
    axis.set(xlabel="page cache, % of the KV", ylabel="hit ratio, pages", ylim=(0, 1))
    axis.legend(fontsize=8)
    return figure


# Many rows


def throughput(options: argparse.Namespace) -> Figure:
    """Tokens per second over the context, each kind of attention at its best batch, as measured."""
    with (ROOT / "benchmarks/results/throughput.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["best"] == "yes"]
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axis = figure.subplots()
    kinds = {
        "retro offloaded, overlap 0.98": ("retro offloaded", "0.98", READ, 5),
        "retro offloaded, overlap 0.95": ("retro offloaded", "0.95", SLOW, 5),
        "retro on the GPU": ("retro", "", ESTIMATED, -13),
        "dense": ("dense", "", "black", -13),
    }
    contexts = (30_000, 60_000, 120_000)
    machines: set[str] = set()
    for label, (attention, overlap, colour, place) in kinds.items():
        best = []
        for context in contexts:
            # A floor of 64 clusters is more than the paper's budget where contexts are short.
            fair = [
                row
                for row in rows
                if (row["attention"], row["overlap"]) == (attention, overlap)
                and int(row["context"]) == context
                and (context > 30_000 or row["min_retrieved_clusters"] != "64")
            ]
            best.append(max(fair, key=lambda row: float(row["tokens_per_s"])))
        machines |= {row["machine"] for row in best}
        rates = [float(row["tokens_per_s"]) for row in best]
        bounds = [1e3 * int(row["batch"]) / float(row["bound_ms"]) for row in best]
        axis.plot(contexts, rates, "o-", markersize=4, color=colour, label=label)
        axis.plot(contexts, bounds, ":", linewidth=1.2, color=colour)
        for context, rate, bound, row in zip(contexts, rates, bounds, best, strict=True):
            axis.annotate(f"{rate:,.0f}", (context, rate), textcoords="offset points", ha="center",
                          xytext=(0, place), fontsize=8, color=colour)  # fmt: skip
            say("throughput", f"{label}, {context:,} tokens: {row['batch']} rows, {rate:.0f} "
                f"tokens/s, bound {bound:.0f}")  # fmt: skip
    (machine,) = machines
    axis.plot([], [], ":", color="#555555", linewidth=1.2, label="bound: bytes over bandwidth")
    axis.set(xlabel="tokens of the context", ylabel="tokens per second", xscale="log",
             title=f"Llama-3-8B, bfloat16, one {machine}")  # fmt: skip
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.set_xticks([], minor=True)
    logarithmic(axis, (100, 200, 500, 1000, 2000, 5000))
    axis.legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[argparse.Namespace], Figure | None]] = {
    "data_flow": data_flow,
    "wave_index": wave_index,
    "step_bytes": step_bytes,
    "error_bytes": error_bytes,
    "fields": fields,
    "hit_ratio": hit_ratio,
    "throughput": throughput,
}
PIXELS = {"wave_index"}


def say(figure: str, what: str, point: tuple[float, float] | None = None) -> None:
    if point is not None:
        what += f": {point[0]:.1f} % of the bytes, error {point[1]:.4f}"
    print(f"{figure}: {what}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws and says what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder (%(default)s)")
    parser.add_argument("--model", default="gemma", help="whose keys (%(default)s)")
    parser.add_argument("--context", type=int, default=8192, help="of the model (%(default)s)")
    parser.add_argument("--queries", type=int, default=32, help="of the model (%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", help="of step_bytes",
                        default=[4096, 8192, 16384, 32768, 65536, 131072])  # fmt: skip
    parser.add_argument("--retrieval-budgets", type=float, nargs="+",
                        default=[0.005, 0.01, 0.018, 0.05, 0.1, 0.2])  # fmt: skip
    parser.add_argument("--estimation-budgets", type=float, nargs="+",
                        default=[0.0, 0.05, 0.1, 0.232, 0.5, 1.0])  # fmt: skip
    options = parser.parse_args(arguments)
    # The same picture is the same file, whenever and wherever it is drawn: with matplotlib's own
    # DejaVu Sans, not that of another version which the machine may have.
    matplotlib.rcParams.update({"svg.hashsalt": "retro_ops", "svg.fonttype": "path"})
    fonts = font_manager.fontManager
    fonts.ttflist = [font for font in fonts.ttflist if font.name != "DejaVu Sans"]
    for file in Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf"):
        fonts.addfont(file)
    for name in options.only:
        figure = FIGURES[name](options)
        if figure is None:
            continue
        if name in PIXELS:
            figure.savefig(options.out / f"{name}.png", dpi=110, metadata={"Software": None})
        else:
            metadata = {"Date": None, "Creator": None}
            figure.savefig(options.out / f"{name}.svg", facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main()
