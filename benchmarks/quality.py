"""How close retro attention comes to dense attention in float64, for made keys and recorded ones.

Nothing here is of a model's answers: for each query, what was read, what was left to the estimate,
and how far off the output is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from retro_ops import RetroConfig, RetroLayer, wave_estimate
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.decode import HEAD_DIM, KV_HEADS, QUERY_HEADS
from retro_ops.benchmarks.recordings import Progress, Recording, record
from retro_ops.ops._contract import Counter
from retro_ops.ops.wave_estimate import reference_scores
from retro_ops.testing import dense_attention, make_kv, make_query

COLUMNS = (
    *("source", "context", "layer", "head", "estimator", "error", "error_95", "ratio"),
    *("top_recall", "unread_mass", "left_out_mass", "mass_error", "bytes"),
)
"""What a table shows of a row; the machine is in its title."""

TOP_TOKENS = 100
EQUAL_BYTES = "mean, equal bytes"
"""The estimator "mean" with so many more retrieved clusters that it reads what "variance" reads."""


class Figures(NamedTuple):
    """Of each query and head, `[S, Hq]` float64."""

    error: Tensor
    """|out - exact| / |exact|."""
    top_recall: Tensor
    """Of the `TOP_TOKENS` indexed tokens with the largest weights, the fraction that is read."""
    unread_mass: Tensor
    """Softmax mass of the tokens that are not read, which the estimate stands for."""
    left_out_mass: Tensor
    """Of it, the mass of clusters that are not in the estimate either."""
    mass_error: Tensor
    """|Z - exact Z| / exact Z of the softmax denominator Z."""


@dataclass(frozen=True)
class Measured:
    """Figures of one layer with one estimator, and what a step of it reads."""

    figures: Figures
    bytes_per_token: int
    tokens_read: float
    """Retrieved tokens of a KV head, mean over steps."""


def made(kind: str, context: int, queries: int) -> Recording:
    """Keys of `make_kv` in the shape of Llama-3-8B's attention, and queries that look for them."""
    keys, values = make_kv(1, KV_HEADS, context + queries, HEAD_DIM, kind=kind)
    asked = [make_query(keys[:, :, :context], QUERY_HEADS, seed=1 + s) for s in range(queries)]
    return Recording(
        source=f"made, {kind}",
        layer=0,
        prompt=context,
        queries=torch.cat(asked, dim=2),
        keys=keys,
        values=values,
        scale=HEAD_DIM**-0.5,
    )


def prefilled(recording: Recording, config: RetroConfig) -> RetroLayer:
    """A layer that holds the prompt of a recording."""
    keys, prompt = recording.keys, recording.prompt
    layer = RetroLayer(
        config,
        batch_size=keys.shape[0],
        num_query_heads=recording.queries.shape[1],
        num_kv_heads=keys.shape[1],
        head_dim=keys.shape[3],
        max_length=keys.shape[2],
        dtype=keys.dtype,
        device=keys.device,
    )
    layer.prefill(keys[:, :, :prompt], recording.values[:, :, :prompt])
    return layer


def exact_outputs(recording: Recording) -> Tensor:
    """Dense attention in float64 of each query to all tokens up to its own, `[S, Hq, D]`."""
    keys, values = recording.keys.double(), recording.values.double()
    outs = []
    for step in range(recording.queries.shape[2]):
        end = recording.prompt + step + 1
        query = recording.queries[:, :, step : step + 1].double()
        outs.append(
            dense_attention(query, keys[:, :, :end], values[:, :, :end], scale=recording.scale)
        )
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


def measure(recording: Recording, config: RetroConfig, exact: Tensor) -> Measured:
    """Decodes the recorded tokens, one after another, with the package's own ops.

    Args:
        recording: of one row.
        config: budgets and estimator.
        exact: what `exact_outputs` gave.
    """
    layer = prefilled(recording, config)
    steps = recording.queries.shape[2]
    outs, masses = [], []
    for step in range(steps):
        query = recording.queries[:, :, step : step + 1]
        new = slice(recording.prompt + step, recording.prompt + step + 1)
        out = layer.decode(
            query, recording.keys[:, :, new], recording.values[:, :, new], recording.scale
        )
        outs.append(out[0, :, 0].double())
        masses.append(_masses(layer, query[:, :, 0], recording.scale))
    out = torch.stack(outs)
    error = (out - exact).norm(dim=2) / exact.norm(dim=2)
    stats = layer.stats()
    return Measured(
        Figures(error, *map(torch.stack, zip(*masses, strict=True))),
        stats["bytes_read_per_token"],
        stats["retrieved_tokens"] / steps / layer.num_kv_heads,
    )


def _masses(
    layer: RetroLayer, query: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The other figures of one query `[1, Hq, D]`, `[Hq]` each, of what the layer holds now."""
    config, heads, groups = (
        layer.config,
        layer.num_kv_heads,
        layer.num_query_heads // layer.num_kv_heads,
    )
    indexed, steady, clusters = (
        int(layer.counters[0, column])
        for column in (Counter.INDEXED_TOKENS, Counter.STEADY_TOKENS, Counter.CLUSTERS)
    )
    retrieved, _, estimate_lse = wave_estimate(
        query,
        *layer.index,
        layer.counters,
        layer.max_retrieved,
        config.retrieval_budget,
        config.min_retrieved_clusters,
        config.estimation_budget,
        config.estimator,
        scale,
    )
    scores = reference_scores(query, *layer.index, layer.counters, config.estimator, scale)
    order = scores.score[0].sort(dim=-1, descending=True, stable=True).indices  # [Hkv, C]
    is_read = torch.zeros(heads, layer.offsets.shape[2], dtype=torch.bool)
    # -1, behind the last, marks the place behind the last cluster, which no token has.
    is_read.scatter_(1, retrieved[0].long() % layer.offsets.shape[2], True)
    in_estimate = torch.zeros_like(is_read)
    ranked = order[:, int((retrieved[0, 0] >= 0).sum()) :]
    if config.estimator == "mean":  # without a tail
        ranked = ranked[:, : round(config.estimation_budget * clusters)]
    in_estimate.scatter_(1, ranked, True)

    grouped = query[0].double().view(heads, groups, -1)
    store, kept = layer.store[0, 0, :, :indexed], layer.steady[0, 0, :, :steady]
    logit = scale * grouped @ store.double().transpose(1, 2)  # [Hkv, G, N]
    steady_lse = (scale * grouped @ kept.double().transpose(1, 2)).logsumexp(dim=2)
    lse = torch.logaddexp(logit.logsumexp(dim=2), steady_lse)  # [Hkv, G]
    weight = (logit - lse[..., None]).exp()
    ends = layer.offsets[0, :, 1 : clusters + 1].contiguous()
    slots = torch.arange(indexed, dtype=torch.int32).expand(heads, -1).contiguous()
    cluster = torch.searchsorted(ends, slots, right=True)
    read, estimated = (
        flags.gather(1, cluster)[:, None].expand_as(weight) for flags in (is_read, in_estimate)
    )
    top = weight.topk(min(TOP_TOKENS, indexed), dim=2).indices
    unread = weight.masked_fill(read, 0.0).sum(dim=2)
    left_out = weight.masked_fill(read | estimated, 0.0).sum(dim=2)
    estimated_mass = (estimate_lse[0].double().view(heads, groups) - lse).exp()
    mass_error = (estimated_mass - unread).abs()
    recall = read.gather(2, top).double().mean(dim=2)
    return recall.flatten(), unread.flatten(), left_out.flatten(), mass_error.flatten()


def with_equal_bytes(recording: Recording, config: RetroConfig, tokens: float) -> RetroConfig:
    """The config with as many clusters as make it read `tokens` tokens of each KV head, or more."""
    layer = prefilled(recording, config)
    sizes = layer.offsets[0].diff(dim=-1)
    read = torch.zeros(sizes.shape[1], dtype=torch.float64)
    steps = recording.queries.shape[2]
    for step in range(steps):
        query = recording.queries[:, :, step]
        scores = reference_scores(
            query, *layer.index, layer.counters, config.estimator, recording.scale
        )
        order = scores.score[0].sort(dim=-1, descending=True, stable=True).indices
        read += sizes.gather(1, order).double().cumsum(dim=1).mean(dim=0) / steps
    count = min(int(torch.searchsorted(read, tokens)) + 1, len(read))
    return replace(config, retrieval_budget=0.0, min_retrieved_clusters=count)


def run(
    *,
    kinds: Sequence[str],
    models: Sequence[str],
    text: str,
    contexts: Sequence[int],
    queries: int,
    estimators: Sequence[str],
    config: RetroConfig,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one layer after another; on the CPU, in float32.

    A row with the head "all" has the means over heads; recorded layers have a row for each head
    too. `ratio` is the error over that of the estimator "mean" at the same budgets. If both
    estimators are asked for, a third set of rows is of "mean" at as many bytes as "variance" reads,
    which ranks larger clusters first.

    Args:
        kinds: of keys, as in `make_kv`.
        models: to record, as in `load_model`.
        text: what they read, as in `recordings.text_of`.
        contexts: tokens before the queries.
        queries: of each layer.
        estimators: "variance" and "mean", or one of them.
        config: budgets; the estimator is replaced.
        progress: told what is being done.
    """
    facts = machine.facts(torch.device("cpu"))
    for context in contexts:
        sources: list[Callable[[], list[Recording]]] = [
            functools.partial(lambda kind, context: [made(kind, context, queries)], kind, context)
            for kind in kinds
        ]
        sources += [
            functools.partial(record, model, text, context, queries, progress=progress)
            for model in models
        ]
        for number, source in enumerate(sources):
            progress(f"{context:,} tokens", number, len(sources))
            for recording in source():
                progress(f"{recording.source}, layer {recording.layer}", number, len(sources))
                rows = _rows(recording, estimators, config)
                yield [{**row, **facts} for row in rows]


def _rows(
    recording: Recording, estimators: Sequence[str], config: RetroConfig
) -> list[dict[str, object]]:
    exact = exact_outputs(recording)
    measured = {
        estimator: measure(recording, replace(config, estimator=estimator), exact)
        for estimator in estimators
    }
    if {"variance", "mean"} <= measured.keys():
        equal = with_equal_bytes(
            recording, replace(config, estimator="mean"), measured["variance"].tokens_read
        )
        measured[EQUAL_BYTES] = measure(recording, equal, exact)
    rows: list[dict[str, object]] = []
    heads: list[int | str] = ["all"]
    if not recording.source.startswith("made"):  # heads of made keys are alike
        heads += range(recording.queries.shape[1])
    for head in heads:
        own = slice(None) if isinstance(head, str) else slice(head, head + 1)
        for estimator, what in measured.items():
            row: dict[str, object] = {
                "source": recording.source,
                "context": recording.prompt,
                "layer": recording.layer,
                "head": head,
                "estimator": estimator,
                "queries": recording.queries.shape[2],
                "error_95": float(what.figures.error[:, own].quantile(0.95)),
            }
            for name, figure in what.figures._asdict().items():
                row[name] = float(figure[:, own].mean())
            if "mean" in measured:
                paper = measured["mean"].figures.error[:, own]
                row["ratio"] = float(what.figures.error[:, own].mean() / paper.mean())
            row["bytes"] = what.bytes_per_token
            rows.append(row)
    return rows
