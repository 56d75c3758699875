"""The page cache: traces of retrieved clusters, by policy and cache ratio; steps offloaded.

A trace is what the steps of a real model retrieved, or a made one. Only ids and sizes of clusters
matter to the page cache, so a replay stores keys and values of 16 numbers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retro_ops import RetroConfig, RetroLayer, page_gather, update_pages, wave_buffer
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.decode import (
    HEAD_DIM,
    KV_HEADS,
    QUERIES,
    QUERY_HEADS,
    make_layer,
    make_rows,
)
from retro_ops.benchmarks.recordings import check_model, input_ids
from retro_ops.benchmarks.timing import L2_BYTES, Timing, time_in_turn
from retro_ops.models import RetroCache, load_model
from retro_ops.ops._contract import Counter, RequestHeader, cluster_count, retrieved_count
from retro_ops.ops.update_pages import POLICIES
from retro_ops.testing import make_query

MADE = ("synthetic", "layer")
"""Traces that no model leaves."""
CONTEXTS = {"synthetic": 131072, "layer": 131072, "recall": 32768, "recall-128k": 131072}
"""Tokens of a trace; of what is not here, which are models, 16,384."""
COLUMNS = (
    *("trace", "context", "batch", "layers", "overlap", "cache_ratio", "policy"),
    *("hit_ratio", "worst_layer", "missed_tokens_per_step", "evictions_per_step"),
    *("update_us", "update_us_20", "update_us_80", "us", "us_20", "us_80", "plain_us"),
    *("miss_bytes", "floor_us", "bound_us"),
)
"""What a table shows of a row; the machine is in its title."""

COLD_STEPS = 16
"""First steps of a replay, which fill the cache; hit ratios are of those after them."""
REPLAY_HEAD_DIM = 16
ROWS_IN_A_GRAPH = 16
"""On a GPU a graph has layers of so many rows: for what it waits at its end it waits once."""
WARM_STEPS = 96
"""Steps of a layer on a GPU before it is timed: its cache is full, and queries are known."""
BUS_GB_PER_S = 50.0
"""What a kernel reads from pinned memory of the host over PCIe 5.0 x16."""
SKEW = 2.0
"""Made traces: a new cluster is the r-th most popular one with probability ~ (r + 20) ^ -SKEW."""
DRIFT = 0.002
"""Made traces: fraction of clusters whose popularity changes hands at every step."""


@dataclass(frozen=True)
class Trace:
    """What the steps of some layers retrieved."""

    name: str
    context: int
    retrieved: list[Tensor]
    """Of each layer, `[steps, B, Hkv, R]` int32; -1: none."""
    offsets: list[Tensor]
    """Of each layer, `[B, Hkv, C + 1]` int32, after the last step."""
    store_tokens: int

    @property
    def overlap(self) -> float:
        """Clusters of a step that the step before had too, as a fraction."""
        shares = []
        for layer in self.retrieved:
            same = (layer[1:, ..., :, None] == layer[:-1, ..., None, :]) & (
                layer[1:, ..., None] >= 0
            )
            shares.append(float(same.sum() / (layer[1:] >= 0).sum().clamp(min=1)))
        return statistics.fmean(shares)


def synthetic(
    rows: int, tokens: int, steps: int, overlap: float, config: RetroConfig, *, seed: int = 0
) -> Trace:
    """One layer: `overlap` of a step's clusters are those of the step before, the others popular
    ones; what is popular drifts."""
    generator = torch.Generator().manual_seed(seed)
    clusters = cluster_count(tokens, config.cluster_size)
    ranks = retrieved_count(config.retrieval_budget, config.min_retrieved_clusters, clusters)
    groups = rows * KV_HEADS
    # k-means leaves clusters of very different size.
    weight = torch.empty(groups, clusters).exponential_(generator=generator) + 0.2
    ends = (weight.cumsum(1) / weight.sum(1, keepdim=True) * tokens).round().int()
    offsets = torch.cat((torch.zeros(groups, 1, dtype=torch.int32), ends), dim=1)
    popularity = -SKEW * (torch.arange(clusters) + 20.0).log()
    places = torch.stack([torch.randperm(clusters, generator=generator) for _ in range(groups)])
    popular = popularity[places]  # [groups, C], logarithms
    kept = round(overlap * ranks)
    before = torch.zeros(groups, clusters, dtype=torch.bool)
    result = []
    for step in range(steps):
        noise = -torch.rand(groups, clusters, generator=generator).log().neg().log()
        chance = (popular + noise).masked_fill(before, -torch.inf)
        fresh = chance.topk(ranks - kept if step else ranks, dim=1).indices
        old = before * torch.rand(groups, clusters, generator=generator)
        ids = torch.cat((old.topk(kept if step else 0, dim=1).indices, fresh), dim=1)
        order = torch.rand(groups, ranks, generator=generator).argsort(dim=1)
        result.append(ids.gather(1, order).int())
        before = torch.zeros_like(before).scatter_(1, ids, True)
        moving = torch.randint(
            clusters, (groups, 2 * round(DRIFT * clusters / 2)), generator=generator
        )
        popular.scatter_(1, moving, popular.gather(1, moving.flip(1)))
    shape = (rows, KV_HEADS, -1)
    return Trace(
        f"synthetic {overlap:g}",
        tokens,
        [torch.stack(result).view(steps, *shape)],
        [offsets.view(shape)],
        tokens,
    )


def recorded(
    name: str,
    context: int,
    steps: int,
    config: RetroConfig,
    progress: Callable[[str, int, int], None],
) -> Trace:
    """What a model retrieves: recall models while they answer questions, others while they read on
    in a text."""
    model = load_model(name, dtype=torch.float32, device="cpu")
    ids = input_ids(name, "prose", context, steps)
    body, following = ids.split((context, steps), dim=1)
    cache = RetroCache(model.config, config, max_cache_len=context + steps, offload=True)
    progress(f"{name} reads {context:,} tokens", 0, steps)
    retrieved: list[list[Tensor]] = [[] for _ in cache.retro_layers]
    with torch.inference_mode():
        model(body, past_key_values=cache, logits_to_keep=1)
        for step in range(steps):
            progress(f"{name} decodes", step, steps)
            model(following[:, step : step + 1], past_key_values=cache)
            for taken, layer in zip(retrieved, cache.retro_layers, strict=True):
                assert layer.retro is not None
                taken.append(layer.retro.requests[..., 3:].clone())
    layers = [layer.retro for layer in cache.retro_layers if layer.retro is not None]
    return Trace(
        name,
        context,
        [torch.stack(taken) for taken in retrieved],
        [layer.offsets.clone() for layer in layers],
        layers[0].store.shape[3],
    )


class Replay:
    """One layer's page cache, to which a trace is given step by step."""

    def __init__(self, trace: Trace, layer: int, config: RetroConfig, policy: str) -> None:
        self.retrieved, self.offsets = trace.retrieved[layer], trace.offsets[layer]
        _, rows, heads, ranks = self.retrieved.shape
        self.policy, self.page_size = policy, config.page_size
        self.store = torch.zeros(
            2, rows, heads, trace.store_tokens, REPLAY_HEAD_DIM, dtype=torch.bfloat16
        )
        self.counters = torch.zeros(rows, len(Counter), dtype=torch.int64)
        clusters = self.offsets.shape[2] - 1
        shapes = wave_buffer.shapes(
            config,
            (rows, heads),
            trace.store_tokens,
            clusters,
            ranks,
            REPLAY_HEAD_DIM,
            torch.bfloat16,
        )
        self.buffers = {
            name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()
        }
        wave_buffer.clear_buffers(self.buffers)

    def step(self, step: int) -> tuple[Tensor, float]:
        """The counters after a step, and seconds that the policy took."""
        buffers = self.buffers
        page_gather(
            self.retrieved[step],
            self.offsets,
            self.store,
            buffers["pages"],
            buffers["page_table"],
            buffers["free_pages"],
            buffers["decisions"],
            buffers["requests"],
            buffers["cached"],
            self.counters,
            self.page_size,
        )
        begin = time.perf_counter()
        update_pages(
            buffers["requests"],
            buffers["cached"],
            buffers["history"],
            buffers["decisions"],
            self.policy,
        )
        return self.counters.sum(dim=0), time.perf_counter() - begin


def replay(trace: Trace, config: RetroConfig, policy: str) -> tuple[dict[str, object], Tensor]:
    """Figures of one policy, and hits and misses `[layers, steps, 2]` in pages."""
    steps = len(trace.retrieved[0])
    cold = min(COLD_STEPS, steps // 2)
    curves, seconds, totals = [], [], []
    for layer in range(len(trace.retrieved)):
        state = Replay(trace, layer, config, policy)
        counted = [torch.zeros(len(Counter), dtype=torch.int64)]
        for step in range(steps):
            counters, spent = state.step(step)
            counted.append(counters)
            if step >= cold:
                seconds.append(1e6 * spent)
        counts = torch.stack(counted)
        curves.append(counts.diff(dim=0)[:, [Counter.PAGE_HITS, Counter.PAGE_MISSES]])
        totals.append(counts[-1] - counts[cold])
    pages = torch.stack(curves)
    by_layer = pages[:, cold:].sum(dim=1).double()
    total = torch.stack(totals).sum(dim=0).double()
    timing = Timing.of(seconds)
    layer_steps = len(totals) * (steps - cold)
    return {
        "hit_ratio": float(by_layer[:, 0].sum() / by_layer.sum().clamp(min=1)),
        "worst_layer": float((by_layer[:, 0] / by_layer.sum(dim=1).clamp(min=1)).min()),
        "missed_tokens_per_step": float(total[Counter.MISSED_TOKENS] / layer_steps),
        "evictions_per_step": float(total[Counter.EVICTIONS] / layer_steps),
        "update_us": timing.median_us,
        "update_us_20": timing.low_us,
        "update_us_80": timing.high_us,
    }, pages


def decode_layer(
    rows: int, tokens: int, config: RetroConfig, policy: str, rounds: int
) -> dict[str, object]:
    """Steps of one layer with the attention of Llama-3-8B, offloaded and not, in turn.

    Steps look for one of `QUERIES` things, some of them often; bfloat16.

    Raises:
        AssertionError: the results differ in a bit; nothing is timed then.
    """
    keys, values = make_rows(rows, tokens, "clustered", torch.bfloat16, torch.device("cpu"))
    layers = {
        offload: make_layer(config, keys, offload=offload, _policy=policy)
        for offload in (False, True)
    }
    layers[False].prefill(keys[:, :, :-1], values[:, :, :-1])
    layers[True].load_state_dict(layers[False].state_dict(), strict=False)
    last = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
    queries = [make_query(keys, QUERY_HEADS, seed=seed) for seed in range(QUERIES)]
    del keys, values
    chance = torch.rand(1 << 12, generator=torch.Generator().manual_seed(0))
    wanted = (QUERIES * chance**2).int().tolist()
    for step_wanted in wanted[: 2 * COLD_STEPS]:
        outs = [layer.decode(queries[step_wanted], *last) for layer in layers.values()]
        assert torch.equal(*outs), "offloading changes the result"
    before = layers[True].counters.sum(dim=0)
    turn = dict.fromkeys(layers, 0)

    def step(offload: bool) -> Tensor:
        turn[offload] += 1
        return layers[offload].decode(queries[wanted[-turn[offload] % len(wanted)]], *last)

    timings = time_in_turn(
        torch.device("cpu"),
        {"plain": lambda: step(False), "offloaded": lambda: step(True)},
        rounds=rounds,
    )
    counts = layers[True].counters.sum(dim=0) - before
    hits, misses = (int(counts[column]) for column in (Counter.PAGE_HITS, Counter.PAGE_MISSES))
    done = int(counts[Counter.STEPS]) / rows
    return {
        "layers": 1,
        "hit_ratio": hits / max(hits + misses, 1),
        "missed_tokens_per_step": int(counts[Counter.MISSED_TOKENS]) / done,
        "evictions_per_step": int(counts[Counter.EVICTIONS]) / done,
        "us": timings["offloaded"].median_us,
        "us_20": timings["offloaded"].low_us,
        "us_80": timings["offloaded"].high_us,
        "plain_us": timings["plain"].median_us,
    }


def looked_for_next(wanted: Tensor, stay: float, generator: torch.Generator) -> Tensor:
    """Which of `QUERIES` things is looked for at the next step: the same as at this one, `wanted`,
    with probability `stay`, else any, some of them often."""
    fresh = (QUERIES * torch.rand(wanted.shape, generator=generator) ** 2).long()
    return torch.where(torch.rand(wanted.shape, generator=generator) < stay, wanted, fresh)


def decode_layers_on_gpu(
    device: torch.device,
    rows: int,
    tokens: int,
    config: RetroConfig,
    policy: str,
    rounds: int,
    stay: float,
    hbm_gb_per_s: float,
) -> dict[str, object]:
    """Steps of layers with the attention of Llama-3-8B in a CUDA graph, offloaded and not, in turn.

    Each KV head looks for one of `QUERIES` things, some of them often, and at the next step for the
    same with probability `stay`. Times are of one layer. The threads of the host have decided
    before the next step, as in a model, whose steps are longer.

    Raises:
        AssertionError: the results differ in a bit.
    """
    keys, values = make_rows(rows, tokens, "clustered", torch.bfloat16, device)
    count = max(ROWS_IN_A_GRAPH // rows, 1)
    layers = {
        offload: [
            make_layer(config, keys, offload=offload, _policy=policy, _layers_to_come=count - place)
            for place in range(count)
        ]
        for offload in (False, True)
    }
    for layer in (*layers[False], *layers[True]):
        layer.prefill(keys[:, :, :-1], values[:, :, :-1])
        layer.joins = layer is layers[True][-1]
    last = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
    asked = torch.stack([make_query(keys, QUERY_HEADS, seed=seed) for seed in range(QUERIES)])
    asked = asked.unflatten(2, (KV_HEADS, QUERY_HEADS // KV_HEADS))  # [Q, B, Hkv, G, 1, D]
    del keys, values
    query = asked[0].flatten(1, 2).clone()
    graphs, outs = {}, {}
    for offload, own in layers.items():
        for layer in own:
            layer.decode(query, *last)
        torch.cuda.synchronize(device)
        graphs[offload] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[offload]):
            outs[offload] = [layer.decode(query, *last) for layer in own]
    flush = torch.zeros(L2_BYTES // 4, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(0)
    row, head = torch.meshgrid(torch.arange(rows), torch.arange(KV_HEADS), indexing="ij")
    wanted = torch.zeros(rows, KV_HEADS, dtype=torch.int64)
    times: dict[bool, list[float]] = {False: [], True: []}
    before, ids_before, shared, all_ids = torch.zeros(len(Counter)), None, 0, 0
    for step in range(WARM_STEPS + rounds):
        wanted = looked_for_next(wanted, stay, generator)
        query.copy_(asked[wanted.to(device), row.to(device), head.to(device)].flatten(1, 2))
        if step == WARM_STEPS:
            before = _counted(layers[True])
        for offload, graph in graphs.items():
            flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize(device)
            if step >= WARM_STEPS:
                times[offload].append(1e3 * begin.elapsed_time(end) / count)
        torch.ops.retro.worker_pool(10.0)
        assert all(map(torch.equal, outs[False], outs[True])), "offloading changes the result"
        ids = layers[True][0].requests[..., len(RequestHeader) :].cpu()
        if step >= WARM_STEPS and ids_before is not None:
            shared += int((ids[..., :, None] == ids_before[..., None, :]).sum())
            all_ids += ids.numel()
        ids_before = ids
    counts = (_counted(layers[True]) - before) / count
    hits, misses = float(counts[Counter.PAGE_HITS]), float(counts[Counter.PAGE_MISSES])
    missed_tokens = float(counts[Counter.MISSED_TOKENS]) / rounds
    miss_bytes = missed_tokens * 2 * HEAD_DIM * 2
    all_bytes = rows * layers[False][0].stats()["bytes_read_per_token"]
    floor = max((all_bytes - miss_bytes) / hbm_gb_per_s, miss_bytes / BUS_GB_PER_S) / 1e3
    timings = {offload: Timing.of(own) for offload, own in times.items()}
    stats = [layer.stats() for layer in layers[True]]
    updates = sum(own["page_updates"] for own in stats)
    return {
        "layers": count,
        "overlap": shared / max(all_ids, 1),
        "hit_ratio": hits / max(hits + misses, 1.0),
        "missed_tokens_per_step": missed_tokens,
        "evictions_per_step": float(counts[Counter.EVICTIONS]) / rounds,
        "update_us": sum(own["page_update_us"] for own in stats) / max(updates, 1),
        "us": timings[True].median_us,
        "us_20": timings[True].low_us,
        "us_80": timings[True].high_us,
        "plain_us": timings[False].median_us,
        "miss_bytes": miss_bytes,
        "floor_us": floor,
        "bound_us": 1.3 * floor + 20.0,
    }


def _counted(layers: Sequence[RetroLayer]) -> Tensor:
    """Counters of all rows and layers, `[len(Counter)]` float64."""
    return torch.stack([layer.counters.sum(dim=0) for layer in layers]).sum(dim=0).double().cpu()


def run(
    *,
    device: torch.device,
    traces: Sequence[str],
    contexts: Sequence[int] | None,
    batch_sizes: Sequence[int],
    overlaps: Sequence[float],
    cache_ratios: Sequence[float],
    policies: Sequence[str],
    steps: int,
    config: RetroConfig,
    rounds: int,
    plot: Path | None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one trace after another.

    Args:
        device: where layers run; traces are replayed on the CPU.
        traces: "synthetic", "layer", or models as in `load_model`.
        contexts: tokens; None: as in `CONTEXTS`, else 16,384.
        batch_sizes: rows, of made traces and layers; models have one.
        overlaps: of made traces, fractions; of layers on a GPU, how probably a head asks again.
        cache_ratios, policies: of the page cache; every trace with each of them.
        steps: of a trace.
        config: budgets and page size.
        rounds: timed steps of a layer.
        plot: a file for hit ratios over steps, of each trace at the first cache ratio; None: none.

    Raises:
        ImportError: a plot is asked for and matplotlib is missing; nothing is measured then.
        FileNotFoundError, ValueError: as in `check_model`; nothing is measured then.
        AssertionError: offloading changes a result.
    """
    if plot is not None:
        import_pyplot()
    lengths = {name: contexts or [CONTEXTS.get(name, 16384)] for name in traces}
    for name in traces:
        if name not in MADE:
            check_model(name, max(lengths[name]) + steps, others=MADE)
    facts = machine.facts(torch.device("cpu"))
    on_gpu = device.type == "cuda" and "layer" in traces
    hbm_gb_per_s = machine.copy_gb_per_s(device) if on_gpu else 0.0
    curves: dict[str, dict[str, Tensor]] = {}
    for name in traces:
        for context in lengths[name]:
            if name == "layer" and device.type == "cuda":
                for rows, stay in itertools.product(batch_sizes, overlaps):
                    figures = []
                    for ratio, policy in itertools.product(cache_ratios, policies):
                        progress(f"{name}, {context:,} tokens, batch {rows}", 0, 1)
                        sized = replace(config, cache_ratio=ratio)
                        figure = decode_layers_on_gpu(
                            device, rows, context, sized, policy, rounds, stay, hbm_gb_per_s
                        )
                        case = _case(f"{name} {stay:g}", context, rows, ratio, policy)
                        figures.append({**case, **figure, **machine.facts(device)})
                    yield figures
                continue
            if name == "layer":
                for rows in batch_sizes:
                    figures = []
                    for ratio in cache_ratios:
                        for policy in policies:
                            progress(f"{name}, {context:,} tokens", 0, 1)
                            sized = replace(config, cache_ratio=ratio)
                            figures.append(
                                {
                                    **_case(name, context, rows, ratio, policy),
                                    **decode_layer(rows, context, sized, policy, rounds),
                                    **facts,
                                }
                            )
                    yield figures
                continue
            for trace in _made(name, context, batch_sizes, overlaps, steps, config, progress):
                figures = []
                for ratio in cache_ratios:
                    for policy in policies:
                        progress(f"{trace.name}, {policy}", 0, 1)
                        figure, pages = replay(trace, replace(config, cache_ratio=ratio), policy)
                        rows = trace.offsets[0].shape[0]
                        case = _case(trace.name, context, rows, ratio, policy)
                        case |= {"layers": len(trace.offsets), "overlap": trace.overlap}
                        figures.append({**case, **figure, **facts})
                        if ratio == cache_ratios[0]:
                            title = f"{trace.name}, {context:,} tokens, batch {rows}"
                            curves.setdefault(title, {})[policy] = pages
                yield figures
    if plot is not None:
        draw(curves, cache_ratios[0], plot)


def _case(name: str, context: int, rows: int, ratio: float, policy: str) -> dict[str, object]:
    return {
        "trace": name,
        "context": context,
        "batch": rows,
        "cache_ratio": ratio,
        "policy": policy,
    }


def _made(
    name: str,
    context: int,
    batch_sizes: Sequence[int],
    overlaps: Sequence[float],
    steps: int,
    config: RetroConfig,
    progress: Callable[[str, int, int], None],
) -> Iterator[Trace]:
    if name != "synthetic":
        yield recorded(name, context, steps, config, progress)
        return
    for rows in batch_sizes:
        for overlap in overlaps:
            progress(f"synthetic {overlap:g}", 0, 1)
            yield synthetic(rows, context, steps, overlap, config)


def import_pyplot() -> Any:
    """matplotlib's pyplot, for files only.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib; pip install 'retro_ops[plot]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(curves: dict[str, dict[str, Tensor]], cache_ratio: float, path: Path) -> None:
    """Hit ratios over steps, 16 at a time: a row of panels for each trace, one for each policy, in
    each a line for each layer.

    Args:
        curves: by trace and policy, hits and misses `[layers, steps, 2]`.
    """
    pyplot = import_pyplot()
    columns = [policy for policy in POLICIES if any(policy in panels for panels in curves.values())]
    size = (max(len(columns), 1), max(len(curves), 1))
    figure, axes = pyplot.subplots(
        size[1],
        size[0],
        figsize=(4.5 * size[0], 3 * size[1]),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for row, (name, panels) in zip(axes, curves.items(), strict=False):
        for axis, policy in zip(row, columns, strict=True):
            axis.set_title(f"{name}: {policy}", fontsize=8)
            axis.set_ylim(0, 1)
            axis.set_xlabel("decode step")
            if policy not in panels:
                continue
            for layer, pages in enumerate(panels[policy].double()):
                window = min(16, len(pages))
                sums = pages.unfold(0, window, 1).sum(dim=-1)
                hit_ratio = sums[:, 0] / sums.sum(dim=1).clamp(min=1)
                steps = range(window, len(pages) + 1)
                axis.plot(steps, hit_ratio.tolist(), linewidth=1, label=f"layer {layer}")
            axis.legend(fontsize=6, loc="lower right")
        row[0].set_ylabel(f"hit ratio, cache {100 * cache_ratio:g} %")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
