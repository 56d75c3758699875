"""The commands `bench WHAT`; `retro_ops.cli` adds them to the others."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retro_ops.cli_parts import (
    ATTENTIONS,
    DTYPES,
    Parser,
    add_budgets,
    add_command,
    add_device,
    add_dtype,
    add_json,
    add_offload,
    add_seed,
    budgets,
    device,
    device_of,
    dtype_names,
    dtype_of,
    fractions,
    names,
    new_file,
    number,
    numbers,
    print_table,
    progress_bar,
    words,
    write_json,
)
from retro_ops.config import RetroConfig
from retro_ops.ops.update_pages import POLICIES
from retro_ops.ops.wave_estimate import ESTIMATORS
from retro_ops.testing import KINDS

# Of models whose shape is known; the names of `retro_ops.models.shapes`.
SHAPES = ("llama-3-8b", "llama-3.1-8b", "qwen2.5-7b", "qwen2.5-72b", "tiny")


def add_bench(commands: Any) -> None:
    parser = add_command(commands, "bench", None, "Measure; every row says on which machine.")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for name, help_ in (
        ("decode", "One decode step of one layer, dense attention against retro."),
        ("build", "Indexing a prompt of one layer, and which op takes the time."),
        ("model", "Decoding with a whole model of random weights, dense compiled against retro."),
    ):
        kind = add_command(kinds, name, _bench, help_)
        kind.set_defaults(what=name)
        add_device(kind)
        kind.add_argument("--context", type=numbers, default="32768,131072", help="tokens")
        kind.add_argument("--batch", type=numbers, default="1", help="rows")
        dtypes = "bfloat16" if name == "model" else "bfloat16,float32"
        kind.add_argument("--dtype", type=dtype_names, default=dtypes)
        if name == "model":
            kind.add_argument("--shape", type=names(SHAPES), default=SHAPES[0])
        else:
            kind.add_argument("--keys", type=names(KINDS), default="clustered,random")
        if name == "decode":
            kind.add_argument(
                "--compare-estimators",
                action="store_true",
                help="a row of the other estimator too, on the same index",
            )
        kind.add_argument("--rounds", type=number(1), default=3 if name == "build" else 30)
        _add_files(kind)
        add_budgets(kind)
    _add_bench_buffer(kinds)
    _add_bench_long(kinds)
    _add_bench_throughput(kinds)
    _add_bench_prefill(kinds)
    _add_bench_spread(kinds)
    _add_bench_memory(kinds)
    _add_bench_accuracy(kinds)
    _add_bench_export(kinds)


def _add_files(kind: Parser) -> None:
    add_json(kind)
    kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")


def _add_bench_buffer(kinds: Any) -> None:
    kind = add_command(
        kinds,
        "buffer",
        _bench_buffer,
        "The page cache: hit ratios of traces by policy and cache ratio, and steps offloaded.",
    )
    kind.add_argument(
        "--trace",
        type=words,
        default="synthetic,recall",
        help="synthetic: made ones; layer: one with random queries (timed); or a model as in demo: "
        "what it retrieves",
    )
    kind.add_argument("--device", type=device, help="of layer: cpu or cuda (cuda if there is one)")
    kind.add_argument(
        "--context",
        type=numbers,
        help="tokens (made ones and recall-128k: 131072, recall: 32768, other models: 16384)",
    )
    kind.add_argument("--batch", type=numbers, default="1", help="rows of synthetic and layer")
    kind.add_argument(
        "--overlap",
        type=fractions,
        default="0.3,0.6,0.8",
        help="synthetic: clusters that a step shares with the one before; layer on a GPU: how "
        "probably a head asks for the same again",
    )
    kind.add_argument("--cache-ratios", type=fractions, default="0.05,0.025,0.1")
    kind.add_argument("--policy", type=names(POLICIES), default=",".join(POLICIES))
    kind.add_argument("--page-size", type=number(1), default=RetroConfig().page_size)
    kind.add_argument("--steps", type=number(2), default=320, help="of a trace")
    kind.add_argument("--rounds", type=number(1), default=60, help="layer: timed steps")
    kind.add_argument(
        "--plot", type=new_file, metavar="FILE.png", help="draw hit ratios over steps"
    )
    _add_files(kind)
    add_budgets(kind)
    # What 64 clusters at least would be of a short context, no cache of 5 % holds.
    kind.set_defaults(min_retrieved_clusters=0)


def _bench_buffer(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import buffer

    config = dataclasses.replace(budgets(options), page_size=options.page_size)
    _run(
        options,
        buffer,
        device=device_of(options),
        traces=options.trace,
        contexts=options.context,
        batch_sizes=options.batch,
        overlaps=options.overlap,
        cache_ratios=options.cache_ratios,
        policies=options.policy,
        steps=options.steps,
        config=config,
        rounds=options.rounds,
        plot=options.plot,
    )


def _add_bench_long(kinds: Any) -> None:
    kind = add_command(
        kinds,
        "long",
        _bench_long,
        "A long answer, one compiled step a token: does it stay as fast and as exact?",
    )
    kind.add_argument(
        "--model",
        help="a whole model: recall, recall-128k, gemma, a directory, a model of the hub, or a "
        "shape of `bench model` with random weights; without it, one layer",
    )
    add_device(kind)
    kind.add_argument("--context", type=number(1), default=2048, help="tokens of the prompt")
    kind.add_argument("--tokens", type=number(1), default=16384, help="of the answer")
    kind.add_argument("--window", type=number(1), default=2048, help="tokens of a row of figures")
    kind.add_argument("--batch", type=number(1), default=1, help="rows")
    add_dtype(kind, "of the model or layer", default="float32")
    kind.add_argument("--keys", choices=KINDS, default=KINDS[0])
    _add_files(kind)
    add_budgets(kind)


def _bench_long(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import long

    place = device_of(options)
    columns = long.COLUMNS if options.model is None else long.MODEL_COLUMNS
    with _reporting(options, columns) as rows, progress_bar() as progress:
        progress("compiling", 0, options.tokens)
        if options.model is None:
            found = long.run(
                device=place,
                prompt=options.context,
                tokens=options.tokens,
                window=options.window,
                batch_size=options.batch,
                dtype=DTYPES[options.dtype],
                kind=options.keys,
                config=budgets(options),
            )
        else:
            model, ids = long.load(
                options.model,
                dtype=DTYPES[options.dtype],
                device=place,
                rows=options.batch,
                tokens=options.context + options.tokens,
            )
            found = long.run_model(
                model,
                ids,
                name=options.model,
                prompt=options.context,
                window=options.window,
                config=budgets(options),
            )
        for row in found:
            rows.append(row)
            done = row["tokens"] - options.context
            progress(f"{done:,} of {options.tokens:,} tokens", done, options.tokens)


def batches(text: str) -> list[int] | None:
    """A parser of numbers of rows, or None for "auto"."""
    return None if text == "auto" else numbers(text)


def _add_model_bench(kinds: Any, name: str, run: Any, help_: str, context: str) -> Parser:
    """A benchmark of a model of random weights."""
    kind = add_command(kinds, name, run, help_)
    kind.add_argument("--model", type=names(SHAPES), default=SHAPES[0], help="a shape")
    add_device(kind)
    kind.add_argument("--context", type=numbers, default=context, help="tokens")
    add_dtype(kind, "of the model", default="bfloat16")
    add_offload(kind)
    _add_files(kind)
    add_budgets(kind)
    return kind


def _add_bench_throughput(kinds: Any) -> None:
    kind = _add_model_bench(
        kinds,
        "throughput",
        _bench_throughput,
        "Decoding many rows at once, dense against retro, each at its best number of rows.",
        "30000,60000,120000",
    )
    kind.add_argument(
        "--batch", type=batches, default="auto", help="rows; auto: what fits, then fewer"
    )
    kind.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    kind.add_argument("--keys", choices=KINDS, default=KINDS[0])
    looked_for = kind.add_mutually_exclusive_group()
    looked_for.add_argument(
        "--overlap",
        type=fractions,
        default="0.6",
        help="how probably a KV head looks for the same as at the step before",
    )
    looked_for.add_argument(
        "--own-queries",
        action="store_true",
        help="take the queries of the random weights, which look for nothing in made keys",
    )
    kind.add_argument("--steps", type=number(1), default=48, help="timed")
    kind.add_argument("--answer", type=number(1), default=1024, help="tokens, for end to end")
    kind.add_argument("--layers", type=number(1), help="of the model (all)")
    kind.add_argument("--plot", type=new_file, metavar="FILE.png", help="draw tokens per second")


def _bench_throughput(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import throughput

    attentions = [*options.attention, *(["retro offloaded"] if options.offload else [])]
    _run(
        options,
        throughput,
        device=device_of(options),
        shapes=options.model,
        contexts=options.context,
        batch_sizes=options.batch,
        attentions=attentions,
        dtype=DTYPES[options.dtype],
        kind=options.keys,
        config=budgets(options),
        overlaps=None if options.own_queries else options.overlap,
        steps=options.steps,
        answer=options.answer,
        layers=options.layers,
        plot=options.plot,
    )


def _add_bench_prefill(kinds: Any) -> None:
    kind = _add_model_bench(
        kinds,
        "prefill",
        _bench_prefill,
        "Reading a prompt: what building the index adds, in one layer and in a whole model.",
        "120000",
    )
    kind.add_argument(
        "--whole",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also a prompt through all layers",
    )
    kind.add_argument("--rounds", type=number(1), default=3)


def _bench_prefill(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import prefill

    with _reporting(options, prefill.COLUMNS) as rows, progress_bar() as progress:
        progress("reading prompts", 0, 1)
        for row in prefill.run(
            device=device_of(options),
            shapes=options.model,
            contexts=options.context,
            dtype=DTYPES[options.dtype],
            config=budgets(options),
            offload=[False, True] if options.offload else [False],
            whole=options.whole,
            rounds=options.rounds,
        ):
            rows.append(row)
            progress(f"{row['context']:,} tokens", 0, 1)


def _add_bench_spread(kinds: Any) -> None:
    kind = _add_model_bench(
        kinds,
        "spread",
        _bench_spread,
        "Decoding with layers on one device and on several: what handing over costs.",
        "120000",
    )
    kind.add_argument("--devices", type=number(1), help="how many (all GPUs)")
    kind.add_argument("--batch", type=numbers, default="1", help="rows")
    kind.add_argument("--layers", type=number(1), help="of the model (all)")
    kind.add_argument("--rounds", type=number(1), default=30)


def _bench_spread(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import spread

    first = device_of(options)
    count = options.devices or (torch.cuda.device_count() if first.type == "cuda" else 2)
    devices = [torch.device(f"cuda:{i}" if first.type == "cuda" else "cpu") for i in range(count)]
    with _reporting(options, spread.COLUMNS) as rows, progress_bar() as progress:
        progress("one device", 0, 2)
        for case in spread.run(
            devices=devices,
            contexts=options.context,
            batch_sizes=options.batch,
            dtype=DTYPES[options.dtype],
            shape=options.model[0],
            layers=options.layers,
            config=budgets(options),
            offload=options.offload,
            rounds=options.rounds,
        ):
            rows += case
            progress(f"{case[0]['devices']} devices", len(rows), 0)


def _add_bench_memory(kinds: Any) -> None:
    kind = _add_model_bench(
        kinds,
        "memory",
        _bench_memory,
        "The plan of `info` against the memory that a GPU was seen to hold.",
        "32768",
    )
    kind.add_argument("--batch", type=numbers, default="1", help="rows")


def _bench_memory(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import memory

    with _reporting(options, memory.COLUMNS) as rows, progress_bar() as progress:
        progress("measuring", 0, 1)
        for row in memory.run(
            device=device_of(options),
            models=options.model,
            contexts=options.context,
            batch_sizes=options.batch,
            dtype=DTYPES[options.dtype],
            config=budgets(options),
            offload=options.offload,
        ):
            rows.append(row)
            progress(f"{row['context']:,} tokens, batch {row['batch']}", 0, 1)


def _add_bench_accuracy(kinds: Any) -> None:
    """The commands that measure how close retro attention comes to dense attention."""
    quality = add_command(
        kinds,
        "quality",
        _bench_quality,
        "Errors of the attention output, made keys and recorded ones, per layer and head.",
    )
    recall = add_command(
        kinds, "recall", _bench_recall, "Accuracy of a recall model over tokens, density, budget."
    )
    fidelity = add_command(
        kinds,
        "fidelity",
        _bench_fidelity,
        "KL divergence, top-1 agreement and perplexity over a long text, dense against retro.",
    )
    estimators = add_command(
        kinds, "estimators", _bench_estimators, "What other estimators would do, at equal bytes."
    )
    text = "prose (made), reference (of the Python language), or a file; recall models have theirs"
    for kind in (quality, estimators):
        kind.add_argument("--keys", type=names((*KINDS, "none")), default=",".join(KINDS))
        kind.add_argument(
            "--model",
            type=words,
            default="recall",
            help="to record, names with commas: as in demo; none: made keys only",
        )
        kind.add_argument("--text", default="prose", help=text)
        kind.add_argument("--queries", type=number(2), default=64, help="of each layer")
    quality.add_argument("--context", type=numbers, default="16384", help="tokens")
    estimators.add_argument("--context", type=number(2048), default=16384, help="tokens")
    estimators.add_argument("--change", help="names with commas: ranking, mass, ... (all)")
    for kind in (recall, fidelity):
        kind.add_argument("--batch", type=number(1), default=1, help="rows, each another text")
        add_dtype(kind)
        add_device(kind)
    recall.add_argument(
        "--model",
        default="recall-128k",
        help="recall, recall-128k, or the directory of a recall model that was trained",
    )
    recall.add_argument("--context", type=numbers, default="4096,8192,16384", help="tokens")
    recall.add_argument(
        "--density", type=fractions, default="0.1,0.5", help="records; 1 is one in 8 tokens"
    )
    recall.add_argument(
        "--retrieval-budgets", type=fractions, default=str(RetroConfig().retrieval_budget)
    )
    recall.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    recall.add_argument("--questions", type=number(1), default=64, help="for each row")
    add_seed(recall, 0)
    recall.add_argument("--plot", type=new_file, metavar="FILE.png", help="draw the curves")
    fidelity.add_argument("--model", default="gemma", help="as in demo")
    fidelity.add_argument("--text", default="prose", help=text)
    fidelity.add_argument("--context", type=numbers, default="4096", help="tokens")
    fidelity.add_argument("--positions", type=number(1), default=128, help="for each row")
    default = RetroConfig()
    for kind in (quality, recall, fidelity, estimators):
        if kind is not estimators:
            kind.add_argument("--estimator", type=names(ESTIMATORS), default=",".join(ESTIMATORS))
        if kind is not recall:
            kind.add_argument("--retrieval-budget", type=float, default=default.retrieval_budget)
        kind.add_argument("--estimation-budget", type=float, default=default.estimation_budget)
        kind.add_argument(
            "--min-retrieved-clusters", type=int, default=default.min_retrieved_clusters
        )
        kind.add_argument("--segment-size", type=int, default=default.segment_size)
        kind.add_argument("--kmeans-iterations", type=int, default=default.kmeans_iterations)
        _add_files(kind)


def _accuracy_config(options: argparse.Namespace) -> RetroConfig:
    fields = {field.name for field in dataclasses.fields(RetroConfig)} - {"estimator"}
    return RetroConfig(**{name: vars(options)[name] for name in fields if name in vars(options)})


def _sources(options: argparse.Namespace) -> dict[str, Any]:
    """Kinds of made keys, and models to record."""
    kinds = [kind for kind in options.keys if kind != "none"]
    models = [name for name in options.model if name != "none"]
    if not kinds and not models:
        raise ValueError("nothing to measure: --keys and --model are both none")
    return {"kinds": kinds, "models": models}


def _bench_quality(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import quality

    _run(
        options,
        quality,
        **_sources(options),
        text=options.text,
        contexts=options.context,
        queries=options.queries,
        estimators=options.estimator,
        config=_accuracy_config(options),
    )


def _bench_recall(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import recall_curves

    _run(
        options,
        recall_curves,
        model_name=options.model,
        contexts=options.context,
        densities=options.density,
        budgets=options.retrieval_budgets,
        estimators=options.estimator,
        attentions=options.attention,
        questions=options.questions,
        batch_size=options.batch,
        config=_accuracy_config(options),
        dtype=DTYPES[dtype_of(options)],
        device=device_of(options),
        seed=options.seed,
        plot=options.plot,
    )


def _bench_fidelity(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import fidelity

    _run(
        options,
        fidelity,
        model_name=options.model,
        text=options.text,
        contexts=options.context,
        positions=options.positions,
        batch_size=options.batch,
        estimators=options.estimator,
        config=_accuracy_config(options),
        dtype=DTYPES[dtype_of(options)],
        device=device_of(options),
    )


def _bench_estimators(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import estimators

    every = [group for group in estimators.VARIANTS if group]
    chosen = every if options.change is None else options.change.split(",")
    for group in chosen:
        if group not in every:
            raise ValueError(f"--change must be names out of {', '.join(every)}, got {group!r}")
    with progress_bar() as progress:
        rows = estimators.run(
            **_sources(options),
            text=options.text,
            context=options.context,
            queries=options.queries,
            config=_accuracy_config(options),
            groups=chosen,
            progress=progress,
        )
    _report(options, rows, tuple(estimators.columns(rows)))


def _add_bench_export(kinds: Any) -> None:
    kind = add_command(
        kinds,
        "export",
        _bench_export,
        "Export a model, run it without Python, and compare with the model compiled in Python.",
    )
    add_device(kind)
    kind.add_argument(
        "--model",
        type=words,
        default="recall",
        help="names with commas: as in demo, or shapes of `bench model` with random weights",
    )
    kind.add_argument("--context", type=numbers, default="4096", help="tokens of the prompt")
    kind.add_argument("--batch", type=numbers, default="1", help="rows")
    kind.add_argument("--dtype", type=dtype_names, default="float32")
    kind.add_argument("--tokens", type=number(2), default=64, help="generated")
    kind.add_argument("--layers", type=number(1), help="of random weights (as many as the shape)")
    kind.add_argument(
        "--runner", type=Path, metavar="FILE", help="retro_runner (built from the checkout)"
    )
    kind.add_argument("--folder", type=Path, metavar="DIR", help="keep the packages there")
    kind.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare logits with float32's, if --dtype is another",
    )
    kind.add_argument("--timeout", type=number(1), default=300, help="seconds, of the runner")
    add_offload(kind)
    _add_files(kind)
    add_budgets(kind)


def _bench_export(options: argparse.Namespace) -> None:
    import time

    from retro_ops.benchmarks import export

    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"--folder must be a folder that is there, got '{options.folder}'")
    if options.runner is not None:
        if not options.runner.is_file() or not os.access(options.runner, os.X_OK):
            raise ValueError(
                f"--runner must be the program retro_runner, got '{options.runner}'; `make runner` "
                "builds it"
            )
        options.runner = options.runner.resolve()
    lists = (options.model, options.dtype, options.context, options.batch)
    total = math.prod(len(values) for values in lists)
    begin = time.perf_counter()
    with _reporting(options, export.COLUMNS) as rows, progress_bar() as progress:

        def report(what: str) -> None:
            progress(what, 0, total)
            if not sys.stderr.isatty():  # minutes in which nothing else is heard
                print(f"{time.perf_counter() - begin:.0f} s: {what}", file=sys.stderr)

        for case in export.run(
            device=device_of(options),
            models=options.model,
            dtypes=[DTYPES[name] for name in options.dtype],
            contexts=options.context,
            batch_sizes=options.batch,
            tokens=options.tokens,
            layers=options.layers,
            config=budgets(options),
            offload=options.offload,
            runner=options.runner,
            folder=options.folder,
            exact=options.exact,
            timeout=options.timeout,
            progress=report,
        ):
            rows += case
    if any(row["wrong"] for row in rows):
        raise SystemExit(
            f"{options.prog}: the figures above are wrong where a row says so, in its column wrong"
        )


def _bench(options: argparse.Namespace) -> None:
    import importlib

    config = budgets(options)
    place = device_of(options)
    benchmark = importlib.import_module(f"retro_ops.benchmarks.{options.what}")
    with _reporting(options, benchmark.COLUMNS) as rows, progress_bar() as progress:
        axis = {"shapes": options.shape} if options.what == "model" else {"kinds": options.keys}
        more = (
            {"compare_estimators": options.compare_estimators} if options.what == "decode" else {}
        )
        lists = (options.dtype, options.context, options.batch, *axis.values())
        total = math.prod(len(values) for values in lists)
        progress("checking", 0, total)
        cases = benchmark.run(
            device=place,
            contexts=options.context,
            batch_sizes=options.batch,
            dtypes=[DTYPES[name] for name in options.dtype],
            config=config,
            rounds=options.rounds,
            **axis,
            **more,
        )
        for done, case in enumerate(cases, 1):
            rows += case
            progress(f"{case[0]['dtype']}, {case[0]['context']:,} tokens", done, total)


def _run(options: argparse.Namespace, benchmark: Any, **arguments: Any) -> None:
    """Runs a benchmark that reports its progress itself, and shows its rows."""
    with _reporting(options, benchmark.COLUMNS) as rows, progress_bar() as progress:
        for case in benchmark.run(**arguments, progress=progress):
            rows += case


@contextmanager
def _reporting(
    options: argparse.Namespace, columns: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """A list for the rows of a benchmark, which are reported at its end.

    Be it that of an error or of Ctrl-C: what took minutes to measure is not lost.
    """
    rows: list[dict[str, Any]] = []
    try:
        yield rows
    finally:
        if rows:
            _report(options, rows, columns)


def _report(
    options: argparse.Namespace, rows: list[dict[str, Any]], columns: Sequence[str]
) -> None:
    """Prints the rows of a benchmark and writes the files that were asked for."""
    import csv

    title = ", ".join(f"{rows[0][key]}" for key in ("machine", "threads", "kernels", "torch"))
    shown = [key for key in columns if any(key in row for row in rows)]
    print_table(title, {key: [_shown(row.get(key, "")) for row in rows] for key in shown})
    write_json(options.json, rows)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)


def _shown(value: Any) -> str:
    """A figure with three or more digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
