"""Decoding many rows at once: dense against retro attention, each at its own best batch.

All layers of a model run one compiled function: each has a cache of its own, in which it is layer
0, so that nothing tells one layer from another, and one compilation serves all. A whole step is one
CUDA graph of them. A model compiled as a whole, as users do it, compiles each layer anew for every
number of rows; `bench model` measures that.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    PreTrainedModel,
    StaticCache,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine, prefill
from retro_ops.benchmarks.buffer import import_pyplot, looked_for_next
from retro_ops.benchmarks.decode import QUERIES, check, dense_calls
from retro_ops.benchmarks.timing import Timing, clean, memory_note, synchronize, time_in_turn
from retro_ops.models import RetroCache
from retro_ops.models.attention import retro_attention
from retro_ops.models.memory import Memory, bytes_of, free_memory
from retro_ops.models.plan import CONTEXT_BYTES, LIBRARY_BYTES, Planner, largest
from retro_ops.models.shapes import SHAPES, first_layers
from retro_ops.ops._contract import Counter, cluster_count, retrieved_count
from retro_ops.testing import make_kv, make_query

COLUMNS = (
    *("shape", "dtype", "context", "attention", "overlap", "batch", "best", "ms", "tokens_per_s"),
    *("ratio", "bound_ms", "bound_no_floor_ms", "hit_ratio", "rows_gpu", "rows_host", "prefill_s"),
    *("end_to_end_tokens_per_s", "compile_s", "kernel", "note"),
)
"""What a table shows of a row; the machine is in its title."""
CONFIGURED = ("retrieval_budget", "min_retrieved_clusters", "cache_ratio")
"""Fields of the config that stand in every row: they decide how much is moved."""
ATTENTIONS = ("dense", "retro", "retro offloaded")
DENSE = "throughput_dense"
MADE = "throughput_made_queries"
SPARE_TOKENS = 256
"""Of room behind the filled part of a cache, at least: more than are decoded here."""
FIRST_STEPS = 3
"""Until a step is a CUDA graph."""
WARM_UP = 96
"""Steps before those that are timed: page caches are full, and queries are known."""
FILL = "synthetic KV"
"""Note of every row that was measured: keys and values were made, no prompt was read."""


@dataclass(frozen=True)
class Case:
    """What one figure is of."""

    attention: str
    tokens: int
    rows: int


def run(
    *,
    device: torch.device,
    shapes: Sequence[str],
    contexts: Sequence[int],
    batch_sizes: Sequence[int] | None,
    attentions: Sequence[str],
    dtype: torch.dtype,
    kind: str,
    config: RetroConfig,
    overlaps: Sequence[float] | None,
    steps: int,
    answer: int,
    layers: int | None = None,
    plot: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows of figures, for one shape and context after another.

    Args:
        device: where the model is.
        shapes: names of `SHAPES`; weights are random.
        contexts: tokens that every row holds when decoding begins.
        batch_sizes: rows; None: the most that the planner says fit, then powers of two below,
            until throughput falls.
        attentions: out of `ATTENTIONS`.
        dtype: of weights and KV.
        kind: of keys, as in `make_kv`. Rows hold the same tokens in another order.
        config: budgets and sizes.
        overlaps: how probably each KV head looks for the same as at the step before, as `_Queries`
            has it, one after another on what was filled once; None: queries are those of the model,
            which with random weights find nothing in made keys, and have little in common from step
            to step.
        steps: timed.
        answer: tokens of an answer, for throughput from the prompt to its end.
        layers: of the model, if not all.
        plot: a file for throughput over context; None: none.

    Raises:
        ImportError: a plot is asked for and matplotlib is missing; nothing is measured then.
        ValueError: more steps than an index takes before it grows.
        AssertionError: retro or dense attention is wrong; nothing is timed then.
    """
    phases = len(overlaps) if overlaps else 1
    if spare_tokens(steps, phases) > config.update_segment:
        most = (config.update_segment - FIRST_STEPS) // phases - WARM_UP
        raise ValueError(f"steps must be at most {most} for each overlap, got {steps}")
    if plot is not None:
        import_pyplot()
    check(device, dtype)
    register()
    facts = machine.facts(device)
    bandwidth = machine.copy_gb_per_s(device)
    host_bandwidth = machine.host_gb_per_s(device)
    everything = []
    for shape in shapes:
        model = prefill.make_model(SHAPES[shape](), dtype, device, layers)
        for layer in model.get_decoder().layers:
            layer.self_attn.layer_idx = 0  # of its own cache
        for tokens in contexts:
            progress(f"{shape}, {tokens:,} tokens: made keys", 0, 1)
            study = _Study(model, tokens, kind, config, overlaps, steps)
            rows: list[dict[str, Any]] = []
            for attention in attentions:
                reading = study.reads(attention)
                for figure in _best(study, attention, batch_sizes, progress):
                    if "ms" in figure:
                        figure |= study.bounds(figure, bandwidth, host_bandwidth)
                    if "ms" in figure and "prefill_s" in reading:  # one prompt after another
                        a_row = reading["prefill_s"] + answer * figure["ms"] / 1e3 / figure["batch"]
                        figure["end_to_end_tokens_per_s"] = answer / a_row
                    rows.append({"attention": attention, **reading, **figure})
            dense = [
                row["tokens_per_s"] for row in rows if row["attention"] == "dense" and "ms" in row
            ]
            case = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "context": tokens}
            for row in rows:
                if dense and "ms" in row:
                    row["ratio"] = row["tokens_per_s"] / max(dense)
            described = {
                "keys": kind,
                "answer": answer,
                **{name: getattr(config, name) for name in CONFIGURED},
            }
            rows = [{**case, **row, **described, **facts} for row in rows]
            everything += rows
            yield rows
            del study
            clean(device)
        del model
        clean(device)
    if plot is not None:
        draw(everything, plot)


def spare_tokens(steps: int, phases: int) -> int:
    """Tokens of room behind the filled part of a cache, for so many timed steps in each phase."""
    return max(SPARE_TOKENS, FIRST_STEPS + phases * (WARM_UP + steps))


def register() -> None:
    """Makes the attentions of this module known to transformers; all without a mask. What `DENSE`
    is depends on the case."""
    AttentionInterface.register(MADE, _made_queries)
    for name in (DENSE, MADE):
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def _best(
    study: _Study,
    attention: str,
    batch_sizes: Sequence[int] | None,
    progress: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    """Figures for one number of rows after another; the fastest of an overlap has `best`."""
    limits = study.limits(attention)
    most = min(limits.values())
    candidates = batch_sizes or _candidates(most)
    if not candidates:
        yield {**limits, "batch": 0, "note": "not even one row fits in memory"}
        return
    figures: list[dict[str, Any]] = []
    throughput: list[float] = []  # of the first overlap
    for rows in candidates:
        progress(f"{study.tokens:,} tokens, {attention}, batch {rows}", len(throughput), 3)
        figure: dict[str, Any] = {"batch": rows, **limits}
        if rows > most:
            yield {**figure, "note": f"does not fit in memory: at most {most} rows"}
            continue
        try:
            measured = study.measure(Case(attention, study.tokens, rows))
        except NotImplementedError as error:
            yield {**figure, "note": str(error)}
            return
        except (MemoryError, RuntimeError) as error:
            measured = [{"note": memory_note(error)}]
        clean(study.device)
        figures += [{**figure, **each} for each in measured]
        throughput += [each["tokens_per_s"] for each in measured[:1] if "ms" in each]
        if batch_sizes is None and len(throughput) > 1 and throughput[-1] < throughput[-2]:
            break
    timed = [each for each in figures if "ms" in each]
    for overlap in {each.get("overlap") for each in timed}:
        same = [each for each in timed if each.get("overlap") == overlap]
        max(same, key=lambda each: each["tokens_per_s"])["best"] = "yes"
    yield from figures


def _candidates(most: int) -> list[int]:
    """The most rows, a tenth less, and powers of two below, largest first: more rows are seldom
    slower, but the most that fit by calculation may not fit by a gigabyte."""
    fewer = {1 << bit for bit in range(most.bit_length())} | {most - most // 10}
    return [most, *sorted(fewer - {most}, reverse=True)] if most else []


class _Queries:
    """What each layer looks for in place of what random weights would: at each step one of
    `QUERIES` things for every KV head, some of them often, and with a probability, the overlap, the
    same as at the step before. Rows look for the same; they hold the same, in another order.

    Args:
        keys: of a row, `[1, Hkv, T, D]`.
        query_heads, layers: of the model.
        overlaps: of all steps, one after another.
    """

    def __init__(
        self, keys: Tensor, query_heads: int, layers: int, overlaps: Sequence[float]
    ) -> None:
        heads = keys.shape[1]
        made = [make_query(keys, query_heads, seed=seed) for seed in range(QUERIES)]
        self.made = torch.cat(made).unflatten(1, (heads, -1))  # [Q, Hkv, G, 1, D]
        self.asked = made[0].repeat(layers, 1, 1, 1)  # [L, Hq, 1, D]; a layer knows its own
        generator = torch.Generator().manual_seed(0)
        wanted = [torch.zeros(layers, heads, dtype=torch.int64)]
        for overlap in overlaps:
            wanted.append(looked_for_next(wanted[-1], overlap, generator))
        self.wanted = torch.stack(wanted).to(keys.device)  # [steps, L, Hkv]
        self.heads = torch.arange(heads, device=keys.device)

    def choose(self, step: Tensor) -> None:
        """Layers ask for what is wanted at a step `[1, 1]`."""
        wanted = self.wanted.index_select(0, step.flatten())[0]
        self.asked.copy_(self.made[wanted, self.heads].flatten(1, 2))


class _Study:
    """One model and context: what fits, what is to be expected, and what is measured."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: int,
        kind: str,
        config: RetroConfig,
        overlaps: Sequence[float] | None,
        steps: int,
    ) -> None:
        self.model, self.tokens, self.config = model, tokens, config
        self.device, self.dtype = model.device, model.dtype
        self.steps = steps
        self.overlaps: list[float | None] = [*overlaps] if overlaps else [None]
        self.dense_spare, self.spare = (
            spare_tokens(steps, phases) for phases in (1, len(self.overlaps))
        )
        self.layers = list(model.get_decoder().layers)
        attention = self.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.heads = model.config.num_key_value_heads
        self.query_heads = model.config.num_attention_heads
        self.one = first_layers(model.config, 1)
        self.row = make_kv(
            1, self.heads, tokens, self.head_dim, kind=kind, dtype=self.dtype, device=self.device
        )
        self.queries = None  # those of the model
        if overlaps:
            each_step = [overlaps[0]] * FIRST_STEPS
            for overlap in overlaps:
                each_step += [overlap] * (WARM_UP + steps)
            self.queries = _Queries(self.row[0], self.query_heads, len(self.layers), each_step)
            for layer, own in zip(self.layers, self.queries.asked, strict=True):
                layer.self_attn.asked = own

    def reads(self, attention: str) -> dict[str, float]:
        """Seconds that a prompt takes, from one layer; nothing where that cannot run."""
        offload = attention == "retro offloaded"
        try:
            figures = prefill.measure_layer(self.model, self.tokens, self.config, offload, rounds=1)
        except NotImplementedError:
            return {}
        except (MemoryError, RuntimeError) as error:
            memory_note(error)
            return {}
        finally:
            clean(self.device)
        name = "dense_ms" if attention == "dense" else "layer_ms"
        return {"prefill_s": len(self.layers) * figures[name] / 1e3}

    def limits(self, attention: str) -> dict[str, int]:
        """Rows that fit beside the weights: on the GPU, and in the host's memory."""
        free = free_memory()
        free = Memory(free.host - free.host // 20, free.devices)  # the system needs some, too
        weights = bytes_of((*self.model.parameters(), *self.model.buffers()))
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            free = Memory(free.host, (free.devices[index] + weights,))
        else:
            free = Memory(free.host + weights)
        capacity = self.tokens + (self.dense_spare if attention == "dense" else self.spare)
        token_bytes = 2 * self.heads * self.head_dim * self.dtype.itemsize
        # The made row, and a copy on its way.
        made = 2 * token_bytes * self.tokens
        free = Memory(free.host - made * (not on_gpu), tuple(each - made for each in free.devices))
        if attention == "dense":
            row_bytes = len(self.layers) * token_bytes * capacity
            fixed = weights + (LIBRARY_BYTES + CONTEXT_BYTES) * on_gpu
            room = (free.devices[0] if on_gpu else free.host) - fixed
            return {"rows_gpu" if on_gpu else "rows_host": max(room // row_bytes, 0)}
        planner = Planner(
            self.model.config,
            self.config,
            dtype=self.dtype,
            offload=attention == "retro offloaded",
            devices=free.devices,
        )

        def most(memory: Memory) -> int:
            def fits(rows: int) -> bool:
                # All rows of a layer are there while it takes them in; twice while made.
                made = 2 * rows * token_bytes * self.tokens
                beside = Memory(
                    memory.host - made * (not on_gpu), tuple(each - made for each in memory.devices)
                )
                return planner.plan(capacity, rows).fits(beside, prefill=False)

            return largest(fits, 1 << 12)

        endless = 1 << 50
        limits = {"rows_host": most(Memory(free.host, (endless,) if on_gpu else ()))}
        if on_gpu:
            limits["rows_gpu"] = most(Memory(endless, free.devices))
            if attention == "retro":
                del limits["rows_host"]
        return limits

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """Figures of decode steps after a made fill, for one overlap after another; dense attention
        does not depend on it."""
        begin = time.perf_counter()
        caches, kernel = self._fill(case)
        synchronize(self.device)
        fill_seconds = time.perf_counter() - begin
        clean(self.device)
        figures = []
        with torch.no_grad():
            step, _, compile_seconds = self._step(caches, case.rows)
            for overlap in self.overlaps if case.attention != "dense" else [None]:
                for _ in range(WARM_UP):
                    step()
                before = _counters(caches)
                timing = _time(self.device, step, self.steps)
                figures.append(
                    {
                        "ms": timing.median_us / 1e3,
                        "ms_20": timing.low_us / 1e3,
                        "ms_80": timing.high_us / 1e3,
                        "tokens_per_s": 1e6 * case.rows / timing.median_us,
                        "compile_s": compile_seconds,
                        "fill_s": fill_seconds,
                        "kernel": kernel,
                        "note": FILL if self.queries else f"{FILL}, own queries",
                    }
                )
                if case.attention != "dense":
                    figures[-1]["overlap"] = overlap
                    figures[-1] |= self._moved(caches, _counters(caches) - before)
        return figures

    def _moved(self, caches: Sequence[Any], counts: Tensor) -> dict[str, float]:
        """What retro attention read in steps that counted so much, and the share of hits."""
        rows_steps = max(int(counts[Counter.STEPS]) / len(caches), 1)
        token_bytes = 2 * self.head_dim * self.dtype.itemsize
        retro = [layer for cache in caches for layer in cache.retro_layers]
        hits, misses = (int(counts[one]) for one in (Counter.PAGE_HITS, Counter.PAGE_MISSES))
        figures = {
            "bytes_read_per_token": sum(
                layer.retro.stats()["bytes_read_per_token"] for layer in retro
            ),
            "retrieved_bytes_per_token": (
                int(counts[Counter.RETRIEVED_TOKENS]) / rows_steps * token_bytes
            ),
            "slow_bytes_per_token": int(counts[Counter.MISSED_TOKENS]) / rows_steps * token_bytes,
        }
        if hits + misses:
            figures["hit_ratio"] = hits / (hits + misses)
        return figures

    def bounds(
        self, figure: dict[str, Any], gb_per_s: float, host_gb_per_s: float
    ) -> dict[str, float]:
        """Milliseconds that moving the bytes of a step takes at least, as measured and with no
        floor under the number of retrieved clusters."""
        head = self.model.get_output_embeddings().weight
        weights = bytes_of((*self.model.get_decoder().layers.parameters(), head))
        rows = figure["batch"]
        if "bytes_read_per_token" not in figure:
            token_bytes = 2 * self.heads * self.head_dim * self.dtype.itemsize
            kv = rows * len(self.layers) * token_bytes * (self.tokens + self.dense_spare)
            return {"bound_ms": (weights + kv) / gb_per_s / 1e6}
        config = self.config
        indexed = self.tokens - config.sink_tokens - config.local_tokens
        clusters = cluster_count(max(indexed, 0), config.cluster_size)
        floor, none = (
            retrieved_count(config.retrieval_budget, least, clusters)
            for least in (config.min_retrieved_clusters, 0)
        )
        bounds = {}
        for name, share in (("bound_ms", 1.0), ("bound_no_floor_ms", none / max(floor, 1))):
            saved = (1 - share) * figure["retrieved_bytes_per_token"]
            fast = weights + rows * (figure["bytes_read_per_token"] - saved)
            slow = rows * share * figure["slow_bytes_per_token"]
            bounds[name] = max(fast / gb_per_s, slow / host_gb_per_s) / 1e6
        return bounds

    def _fill(self, case: Case) -> tuple[list[Any], str]:
        """A cache for every layer, full of made keys and values, and who attends."""
        caches: list[Any] = []
        shape = (case.rows, self.heads, 1, self.head_dim)
        first = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if case.attention == "dense":
            for _ in self.layers:
                cache: Cache = StaticCache(self.one, max_cache_len=case.tokens + self.dense_spare)
                layer = cache.layers[0]
                layer.lazy_initialization(first, first)
                for row, held in enumerate(zip(layer.keys, layer.values, strict=True)):
                    for target, made in zip(held, self.row, strict=True):
                        target[:, : case.tokens].copy_(self._rolled(made[0], row, case.rows))
                layer.cumulative_length.fill_(case.tokens)
                caches.append(cache)
            kernel = _fastest_dense(caches[0].layers[0], self.query_heads)
            AttentionInterface.register(DENSE, _dense_attention(kernel, self.device, self.dtype))
            self.model.set_attn_implementation(DENSE)
            return caches, kernel
        self.model.set_attn_implementation(MADE if self.queries else "retro")
        keys, values = (made.repeat(case.rows, 1, 1, 1) for made in self.row)
        for row in range(1, case.rows):
            for rows, made in zip((keys, values), self.row, strict=True):
                rows[row] = self._rolled(made[0], row, case.rows)
        for _ in self.layers:
            cache = RetroCache(
                self.one,
                self.config,
                max_cache_len=case.tokens + self.spare,
                batch_size=case.rows,
                offload=case.attention == "retro offloaded",
            )
            layer = cache.retro_layers[0]
            layer.lazy_initialization(first, first)
            layer.prefill(keys, values, None)
            caches.append(cache)
        return caches, "retro"

    def _rolled(self, made: Tensor, row: int, rows: int) -> Tensor:
        return made.roll(row * (self.tokens // rows), dims=1)

    def _step(self, caches: list[Any], rows: int) -> tuple[Callable[[], None], Tensor, float]:
        """A step of all rows, compiled; the tokens `[B, 1]` that it reads and then replaces by
        those of the next one; and the seconds that compiling took, with the first step."""
        torch._dynamo.reset()
        decoder, device = self.model.get_decoder(), self.device
        generator = torch.Generator().manual_seed(0)
        some = torch.randint(self.model.config.vocab_size, (rows, 64), generator=generator)
        ids = some[:, :1].to(device)
        position = torch.full((1, 1), self.tokens, dtype=torch.int64, device=device)
        block = torch.compile(_block, dynamic=False)
        ends = torch.compile(_likeliest, dynamic=False)
        head = self.model.get_output_embeddings()

        def step() -> None:
            if self.queries:
                self.queries.choose(position - self.tokens)
            hidden = decoder.embed_tokens(ids)
            places = decoder.rotary_emb(hidden, position_ids=position)
            for layer, cache in zip(self.layers, caches, strict=True):
                hidden = block(layer, hidden, places, position, cache)
            likeliest = ends(decoder.norm, head, hidden)
            position.add_(1)
            ids.copy_(likeliest)

        begin = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - begin
        if device.type != "cuda":
            return step, ids, seconds
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that serve offloaded layers may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()

        return _Replayed(graph, step), ids, seconds


@dataclass(frozen=True)
class _Replayed:
    """A step as a CUDA graph. It keeps what the graph reads and writes: `step` has its tensors."""

    graph: torch.cuda.CUDAGraph
    step: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


def _block(layer: nn.Module, hidden: Tensor, places: Any, position: Tensor, cache: Any) -> Tensor:
    """What is compiled: one layer, with a cache of its own."""
    out: Tensor = layer(
        hidden,
        attention_mask=None,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=places,
    )
    return out


def _made_queries(
    module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Retro attention with the queries that `_Queries` chose; the model's own are computed too."""
    asked = module.asked
    assert isinstance(asked, Tensor)
    return retro_attention(module, 0 * query + asked, *args, **kwargs)


def _likeliest(norm: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    logits: Tensor = head(norm(hidden))
    return logits.argmax(dim=-1)


def _time(device: torch.device, step: Callable[[], None], steps: int) -> Timing:
    """Of steps that follow one another; on a GPU by events, without waiting in between."""
    if device.type != "cuda":
        microseconds = []
        for _ in range(steps):
            begin = time.perf_counter()
            step()
            microseconds.append(1e6 * (time.perf_counter() - begin))
        return Timing.of(microseconds)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return Timing.of([1e3 * one.elapsed_time(other) for one, other in itertools.pairwise(marks)])


def _counters(caches: Sequence[Any]) -> Tensor:
    """Counters of all rows and layers, in sum; zeros for dense attention."""
    total = torch.zeros(len(Counter), dtype=torch.int64)
    for cache in caches:
        if isinstance(cache, RetroCache):
            for retro in (layer.retro for layer in cache.retro_layers):
                assert retro is not None
                total += retro.counters.sum(dim=0).cpu()
    return total


def _fastest_dense(layer: Any, query_heads: int) -> str:
    """Which call of dense attention is fastest on what a layer holds."""
    keys, values = layer.keys, layer.values
    query = torch.randn(
        keys.shape[0], query_heads, 1, keys.shape[3], dtype=keys.dtype, device=keys.device
    )
    calls = {
        name: lambda call=call: call(query, keys, values)
        for name, call in dense_calls(keys.device, keys.dtype).items()
    }
    timings = time_in_turn(keys.device, calls, rounds=5)
    return min(timings, key=lambda name: timings[name].median_us)


def _dense_attention(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """An attention function without a mask: rows are full but for spare tokens, whose zeros are
    read along. transformers' own `sdpa` would copy keys and values for every query head."""
    call = dense_calls(device, dtype)[name]
    if name == "flash3":  # its Python cannot be traced; a CUDA graph takes in what it launches
        call = torch._dynamo.disable(call)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return call(query, key, value).transpose(1, 2).contiguous(), None

    return attend


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput over context, each attention at its best batch, with its bound."""
    pyplot = import_pyplot()
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(shapes), figsize=(5.5 * len(shapes), 4), squeeze=False, layout="constrained"
    )
    for axis, shape in zip(axes[0], shapes, strict=True):
        axis.set_title(shape, fontsize=9)
        axis.set_xlabel("tokens of a row")
        axis.set_ylabel("decoded tokens per second")
        best = [row for row in rows if row["shape"] == shape and "best" in row]
        lines = dict.fromkeys((row["attention"], row.get("overlap")) for row in best)
        several = len({overlap for _, overlap in lines} - {None}) > 1
        for attention, overlap in sorted(lines, key=lambda each: ATTENTIONS.index(each[0])):
            points = [
                row
                for row in best
                if (row["attention"], row.get("overlap")) == (attention, overlap)
            ]
            contexts = [row["context"] for row in points]
            label = attention + (
                f", overlap {overlap:g}" if several and overlap is not None else ""
            )
            throughput = [row["tokens_per_s"] for row in points]
            (line,) = axis.plot(contexts, throughput, marker="o", label=label)
            bounds = [1e3 * row["batch"] / row["bound_ms"] for row in points]
            axis.plot(contexts, bounds, linestyle=":", color=line.get_color(), linewidth=1)
            for row in points:
                axis.annotate(f"{row['batch']}", (row["context"], row["tokens_per_s"]), fontsize=7)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7, title="dotted: bytes at copy bandwidth; numbers: rows")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
