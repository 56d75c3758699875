"""The command line, `python -m retro_ops COMMAND` or `retro COMMAND`.

Commands import what they need when they run. Bad input is one line on standard error and exit
status 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from retro_ops.config import RetroConfig
from retro_ops.ops.update_pages import POLICIES
from retro_ops.ops.wave_estimate import ESTIMATORS
from retro_ops.testing import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

# Headings of columns of words.
LEFT = (
    *("task", "group", "metric", "attention", "dtype", "keys", "shape", "trace", "policy", "part"),
    *("source", "estimator", "model", "text", "changed", "variant", "note", "wrong"),
)
ATTENTIONS = ("dense", "retro")
# Of models whose shape is known; the names of `retro_ops.models.shapes`.
SHAPES = ("llama-3-8b", "llama-3.1-8b", "qwen2.5-7b", "qwen2.5-72b", "tiny")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status is 0, or 2 for bad input."""
    parser = Parser(prog="retro_ops", description="Long-context decoding with RetroInfer.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_export(commands)
    _add_bench(commands)
    _add_ruler(commands)
    _add_longbench(commands)
    _add_info(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, NotImplementedError, ImportError, MemoryError) as error:
        print(f"{options.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def number(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} on, got {text!r}")
        return value

    return parse


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of a list of names with commas."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"must be names out of {','.join(allowed)}, got {unknown[0]!r}"
            )
        return list(dict.fromkeys(chosen))

    return parse


def numbers(text: str) -> list[int]:
    """A parser of a list of whole numbers from 1 on, with commas."""
    return [number(1)(part) for part in text.split(",")]


def fractions(text: str) -> list[float]:
    """A parser of a list of numbers in 0..1, with commas."""
    parsed = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"must be numbers in 0..1, got {part!r}")
        parsed.append(value)
    return parsed


def dtype_name(text: str) -> str:
    """A parser of dtypes by their full or short names; argparse refuses others."""
    return SHORT_DTYPES.get(text, text)


def device(text: str) -> str:
    """A parser of devices that are there."""
    kind, _, index = text.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not there or (index and not (index.isdecimal() and int(index) < there)):
        kinds = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(kinds)}, got {text!r}")
    return text


def new_file(text: str) -> Path:
    """A parser of files to write: refused before the work, not after it."""
    path = Path(text)
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {text!r}: no such folder, or a folder")
    return path


def _command(commands: Any, name: str, run: Any, help_: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=help_,
        description=help_,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _add_budgets(parser: Parser) -> None:
    default = RetroConfig()
    group = parser.add_argument_group("retro attention")
    group.add_argument("--retrieval-budget", type=float, default=default.retrieval_budget)
    group.add_argument("--estimation-budget", type=float, default=default.estimation_budget)
    group.add_argument("--min-retrieved-clusters", type=int, default=default.min_retrieved_clusters)
    group.add_argument("--estimator", default=default.estimator, help="variance or mean")


def _budgets(options: argparse.Namespace) -> RetroConfig:
    return RetroConfig(
        retrieval_budget=options.retrieval_budget,
        estimation_budget=options.estimation_budget,
        min_retrieved_clusters=options.min_retrieved_clusters,
        estimator=options.estimator,
    )


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", _demo, "Ask a model about a long context, dense and retro side by side."
    )
    parser.add_argument(
        "--model",
        default="recall",
        help="recall or recall-128k (in the package), gemma, a directory, or a model of the hub",
    )
    parser.add_argument("--context", type=number(1), help="tokens (recall: 32768, text: 16384)")
    parser.add_argument("--batch-size", type=number(1), default=1, help="rows at once")
    parser.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    parser.add_argument("--records", type=number(1), help="recall: planted (context / 16)")
    parser.add_argument(
        "--questions",
        type=number(1),
        help="recall: asked in one context (64); text: contexts with a fact each, at depths from "
        "the beginning to the end (one for each row of a batch)",
    )
    parser.add_argument(
        "--data-path",
        type=Path,
        help='text models: a JSON file, [{"input": str, "outputs": str}, ...]; '
        "without it, facts are hidden in prose",
    )
    parser.add_argument("--max-new-tokens", type=number(2), default=16, help="text models")
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        help="of the model (float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="compile retro's decode step into one graph",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(parser)


def _demo(options: argparse.Namespace) -> None:
    from retro_ops.models import demo, load_model, load_tokenizer
    from retro_ops.models.load import RECALL

    config = _budgets(options)
    prompts = demo.read_prompts(options.data_path) if options.data_path else None
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = options.dtype or ("float32" if place == "cpu" else "bfloat16")
    with _progress() as progress:
        progress(f"loading {options.model}", 0, 1)
        model = load_model(options.model, dtype=DTYPES[name], device=place)
        shared: dict[str, Any] = {
            "batch_size": options.batch_size,
            "attentions": options.attention,
            "config": config,
            "compile_step": options.compile,
            "progress": progress,
        }
        if options.model in RECALL and prompts is None:
            context = options.context or 32768
            records = options.records or max(context // 16, 1)
            results = demo.recall_demo(
                model,
                context=context,
                records=records,
                questions=options.questions or 64,
                seed=options.seed,
                **shared,
            )
            title = f"{records:,} records in {context:,} tokens"
        else:
            tokenizer = load_tokenizer(options.model)
            if prompts is None:
                context = options.context or 16384
                count = options.questions or options.batch_size
                depths = [(i + 0.5) / count for i in range(count)]
                prompts = demo.hidden_facts(tokenizer, context, depths, seed=options.seed)
                title = f"facts hidden in {context:,} tokens of prose"
            else:
                title = f"{len(prompts)} prompts of {options.data_path.name}"
            results = demo.text_demo(
                model, tokenizer, prompts, max_new_tokens=options.max_new_tokens, **shared
            )
    title = f"{options.model}, {title}, batch {options.batch_size}, {name} on {place}"
    _print_table(
        title,
        {
            "attention": [result.attention for result in results],
            "right answers": [f"{result.right} of {result.questions}" for result in results],
            "prefill s": [f"{result.prefill_seconds:.2f}" for result in results],
            "of it index build s": [f"{result.build_seconds:.2f}" for result in results],
            "first step s": [f"{result.first_step_seconds:.2f}" for result in results],
            "ms per token": [f"{result.step_milliseconds:.2f}" for result in results],
            "KV MB read per token": [
                f"{result.kv_bytes_per_token / 1e6:.2f}" for result in results
            ],
        },
    )
    for result in results:
        for answer in result.answers[:4]:
            print(f"{result.attention} wrote: {' '.join(answer.split())}")
    _write_json(options.json, [dataclasses.asdict(result) for result in results])


def package_file(text: str) -> Path:
    """A parser of packages to write."""
    path = new_file(text)
    if path.suffix != ".pt2":
        raise argparse.ArgumentTypeError(f"must be a file *.pt2, got {text!r}")
    return path


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "Write a model as a package that runs without Python."
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="recall or recall-128k (in the package), gemma, a directory, or a model of the hub",
    )
    parser.add_argument(
        "--context",
        type=number(1),
        required=True,
        help="tokens that a row can hold, prompt and generated ones",
    )
    parser.add_argument("--batch-size", type=number(1), default=1, help="rows; no other number")
    parser.add_argument("--out", type=package_file, default="model.pt2", metavar="FILE")
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        help="of the model (float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(parser)


def _export(options: argparse.Namespace) -> None:
    import time

    from retro_ops.models import export_model, load_model

    config = _budgets(options)
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = options.dtype or ("float32" if place == "cpu" else "bfloat16")
    begin = time.perf_counter()
    with _progress() as progress:
        progress(f"loading {options.model}", 0, 5)
        model = load_model(options.model, dtype=DTYPES[name], device=place, context=options.context)
        metadata = export_model(
            model,
            options.out,
            context=options.context,
            batch_size=options.batch_size,
            config=config,
            name=options.model,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    megabytes = options.out.stat().st_size / 1e6
    print(
        f"{options.out}: {options.model}, {name} on {metadata['retro.device']}, batch "
        f"{options.batch_size}, up to {options.context:,} tokens, {megabytes:.1f} MB, "
        f"in {seconds:.0f} s"
    )
    print(f"It needs version {metadata['retro.ops']} of the op library: {_library()}")
    figures = {**metadata, "megabytes": megabytes, "seconds": seconds}
    _write_json(options.json, figures)


def _library() -> str:
    """Where the op library is, as one would type it here."""
    from retro_ops._library import find_library

    path, here = find_library("_C"), Path.cwd()
    inside = path is not None and path.resolve().is_relative_to(here)
    return str(path.resolve().relative_to(here) if path is not None and inside else path)


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", None, "Measure; every row says on which machine.")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for name, help_ in (
        ("decode", "One decode step of one layer, dense attention against retro."),
        ("build", "Indexing a prompt of one layer, and which op takes the time."),
        ("model", "Decoding with a whole model of random weights, dense compiled against retro."),
    ):
        kind = _command(kinds, name, _bench, help_)
        kind.set_defaults(what=name)
        kind.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
        kind.add_argument("--context", type=numbers, default="32768,131072", help="tokens")
        kind.add_argument("--batch", type=numbers, default="1", help="rows")
        dtypes = "bfloat16" if name == "model" else "bfloat16,float32"
        kind.add_argument("--dtype", type=names(tuple(DTYPES)), default=dtypes)
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
        kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
        kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
        _add_budgets(kind)
    _add_bench_buffer(kinds)
    _add_bench_long(kinds)
    _add_bench_throughput(kinds)
    _add_bench_prefill(kinds)
    _add_bench_spread(kinds)
    _add_bench_memory(kinds)
    _add_bench_accuracy(kinds)
    _add_bench_export(kinds)


def _add_bench_buffer(kinds: Any) -> None:
    kind = _command(
        kinds,
        "buffer",
        _bench_buffer,
        "The page cache: hit ratios of traces by policy and cache ratio, and steps offloaded.",
    )
    kind.add_argument(
        "--trace",
        type=names(("synthetic", "layer", "recall", "recall-128k", "gemma")),
        default="synthetic,recall",
        help="made ones, a layer with random queries (timed), what a model retrieves",
    )
    kind.add_argument("--device", type=device, help="of layer: cpu or cuda (cuda if there is one)")
    kind.add_argument(
        "--context", type=numbers, help="tokens (recall: 32768, gemma: 16384, others: 131072)"
    )
    kind.add_argument("--batch", type=numbers, default="1", help="rows of synthetic and layer")
    kind.add_argument(
        "--overlap",
        type=fractions,
        default="0.3,0.6,0.8",
        help="synthetic: clusters that a step shares with the one before; layer on a GPU: how "
        "probably a head asks for the same again",
    )
    kind.add_argument("--cache-ratio", type=fractions, default="0.05,0.025,0.1")
    kind.add_argument("--policy", type=names(POLICIES), default=",".join(POLICIES))
    kind.add_argument("--page-size", type=number(1), default=RetroConfig().page_size)
    kind.add_argument("--steps", type=number(2), default=320, help="of a trace")
    kind.add_argument("--rounds", type=number(1), default=60, help="layer: timed steps")
    kind.add_argument(
        "--plot", type=new_file, metavar="FILE.png", help="draw hit ratios over steps"
    )
    kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(kind)
    # What 64 clusters at least would be of a short context, no cache of 5 % holds.
    kind.set_defaults(min_retrieved_clusters=0)


def _bench_buffer(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import buffer

    config = dataclasses.replace(_budgets(options), page_size=options.page_size)
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for case in buffer.run(
            device=torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            traces=options.trace,
            contexts=options.context,
            batch_sizes=options.batch,
            overlaps=options.overlap,
            cache_ratios=options.cache_ratio,
            policies=options.policy,
            steps=options.steps,
            config=config,
            rounds=options.rounds,
            plot=options.plot,
            progress=progress,
        ):
            rows += case
    _report(options, rows, buffer.COLUMNS)


def _add_bench_long(kinds: Any) -> None:
    kind = _command(
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
    kind.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    kind.add_argument("--context", type=number(1), default=2048, help="tokens of the prompt")
    kind.add_argument("--tokens", type=number(1), default=16384, help="of the answer")
    kind.add_argument("--window", type=number(1), default=2048, help="tokens of a row of figures")
    kind.add_argument("--batch", type=number(1), default=1, help="rows")
    kind.add_argument("--dtype", choices=DTYPES, default="float32")
    kind.add_argument("--keys", choices=KINDS, default=KINDS[0])
    kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(kind)


def _bench_long(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import long

    place = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
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
                config=_budgets(options),
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
                config=_budgets(options),
            )
        for row in found:
            rows.append(row)
            done = row["tokens"] - options.context
            progress(f"{done:,} of {options.tokens:,} tokens", done, options.tokens)
    _report(options, rows, long.COLUMNS if options.model is None else long.MODEL_COLUMNS)


def batches(text: str) -> list[int] | None:
    """A parser of numbers of rows, or None for "auto"."""
    return None if text == "auto" else numbers(text)


def _add_model_bench(kinds: Any, name: str, run: Any, help_: str, context: str) -> Parser:
    """A benchmark of a model of random weights."""
    kind = _command(kinds, name, run, help_)
    kind.add_argument("--model", type=names(SHAPES), default=SHAPES[0], help="a shape")
    kind.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    kind.add_argument("--context", type=numbers, default=context, help="tokens")
    kind.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    kind.add_argument("--offload", action="store_true", help="KV stores in the host's memory")
    kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(kind)
    return kind


def _place(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    kind.add_argument(
        "--tokens",
        choices=("greedy", "random"),
        default="greedy",
        help="what a step reads: greedy steps are alike, random ones are not",
    )
    kind.add_argument("--steps", type=number(1), default=48, help="timed")
    kind.add_argument("--answer", type=number(1), default=1024, help="tokens, for end to end")
    kind.add_argument("--layers", type=number(1), help="of the model (all)")
    kind.add_argument("--plot", type=new_file, metavar="FILE.png", help="draw tokens per second")


def _bench_throughput(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import throughput

    attentions = [*options.attention, *(["retro offloaded"] if options.offload else [])]
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for case in throughput.run(
            device=_place(options),
            shapes=options.model,
            contexts=options.context,
            batch_sizes=options.batch,
            attentions=attentions,
            dtype=DTYPES[options.dtype],
            kind=options.keys,
            config=_budgets(options),
            next_tokens=options.tokens,
            steps=options.steps,
            answer=options.answer,
            layers=options.layers,
            plot=options.plot,
            progress=progress,
        ):
            rows += case
    _report(options, rows, throughput.COLUMNS)


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

    rows = []
    with _progress() as progress:
        progress("reading prompts", 0, 1)
        for row in prefill.run(
            device=_place(options),
            shapes=options.model,
            contexts=options.context,
            dtype=DTYPES[options.dtype],
            config=_budgets(options),
            offload=[False, True] if options.offload else [False],
            whole=options.whole,
            rounds=options.rounds,
        ):
            rows.append(row)
            progress(f"{row['context']:,} tokens", 0, 1)
    _report(options, rows, prefill.COLUMNS)


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

    first = _place(options)
    count = options.devices or (torch.cuda.device_count() if first.type == "cuda" else 2)
    devices = [torch.device("cuda", i) if first.type == "cuda" else first for i in range(count)]
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        progress("one device", 0, 2)
        for case in spread.run(
            devices=devices,
            contexts=options.context,
            batch_sizes=options.batch,
            dtype=DTYPES[options.dtype],
            shape=options.model[0],
            layers=options.layers,
            config=_budgets(options),
            offload=options.offload,
            rounds=options.rounds,
        ):
            rows += case
            progress(f"{case[0]['devices']} devices", len(rows), 0)
    _report(options, rows, spread.COLUMNS)


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

    rows = []
    with _progress() as progress:
        progress("measuring", 0, 1)
        for row in memory.run(
            device=_place(options),
            models=options.model,
            contexts=options.context,
            batch_sizes=options.batch,
            dtype=DTYPES[options.dtype],
            config=_budgets(options),
            offload=options.offload,
        ):
            rows.append(row)
            progress(f"{row['context']:,} tokens, batch {row['batch']}", 0, 1)
    _report(options, rows, memory.COLUMNS)


def _add_bench_accuracy(kinds: Any) -> None:
    """The commands that measure how close retro attention comes to dense attention."""
    quality = _command(
        kinds,
        "quality",
        _bench_quality,
        "Errors of the attention output, made keys and recorded ones, per layer and head.",
    )
    recall = _command(
        kinds, "recall", _bench_recall, "Accuracy of a recall model over tokens, density, budget."
    )
    fidelity = _command(
        kinds,
        "fidelity",
        _bench_fidelity,
        "KL divergence, top-1 agreement and perplexity over a long text, dense against retro.",
    )
    estimators = _command(
        kinds, "estimators", _bench_estimators, "What other estimators would do, at equal bytes."
    )
    text = "prose (made), reference (of the Python language), or a file; recall models have theirs"
    for kind in (quality, estimators):
        kind.add_argument("--keys", type=names((*KINDS, "none")), default=",".join(KINDS))
        kind.add_argument(
            "--model",
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
        kind.add_argument(
            "--dtype", choices=DTYPES, help="of the model (float32 on a CPU, else bfloat16)"
        )
        kind.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    recall.add_argument("--model", choices=("recall", "recall-128k"), default="recall-128k")
    recall.add_argument("--context", type=numbers, default="4096,8192,16384", help="tokens")
    recall.add_argument(
        "--density", type=fractions, default="0.1,0.5", help="records; 1 is one in 8 tokens"
    )
    recall.add_argument(
        "--retrieval-budgets", type=fractions, default=str(RetroConfig().retrieval_budget)
    )
    recall.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    recall.add_argument("--questions", type=number(1), default=64, help="for each row")
    recall.add_argument("--seed", type=int, default=0)
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
        kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
        kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")


def _accuracy_config(options: argparse.Namespace) -> RetroConfig:
    fields = {field.name for field in dataclasses.fields(RetroConfig)} - {"estimator"}
    return RetroConfig(**{name: vars(options)[name] for name in fields if name in vars(options)})


def _sources(options: argparse.Namespace) -> dict[str, Any]:
    """Kinds of made keys, and models to record."""
    kinds = [kind for kind in options.keys if kind != "none"]
    models = [] if options.model == "none" else options.model.split(",")
    if not kinds and not models:
        raise ValueError("nothing to measure: --keys and --model are both none")
    return {"kinds": kinds, "models": models}


def _bench_quality(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import quality

    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for case in quality.run(
            **_sources(options),
            text=options.text,
            contexts=options.context,
            queries=options.queries,
            estimators=options.estimator,
            config=_accuracy_config(options),
            progress=progress,
        ):
            rows += case
    _report(options, rows, quality.COLUMNS)


def _bench_recall(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import recall_curves

    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for case in recall_curves.run(
            model_name=options.model,
            contexts=options.context,
            densities=options.density,
            budgets=options.retrieval_budgets,
            estimators=options.estimator,
            attentions=options.attention,
            questions=options.questions,
            batch_size=options.batch,
            config=_accuracy_config(options),
            dtype=DTYPES[options.dtype or ("float32" if place == "cpu" else "bfloat16")],
            device=torch.device(place),
            seed=options.seed,
            plot=options.plot,
            progress=progress,
        ):
            rows += case
    _report(options, rows, recall_curves.COLUMNS)


def _bench_fidelity(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import fidelity

    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        for case in fidelity.run(
            model_name=options.model,
            text=options.text,
            contexts=options.context,
            positions=options.positions,
            batch_size=options.batch,
            estimators=options.estimator,
            config=_accuracy_config(options),
            dtype=DTYPES[options.dtype or ("float32" if place == "cpu" else "bfloat16")],
            device=torch.device(place),
            progress=progress,
        ):
            rows += case
    _report(options, rows, fidelity.COLUMNS)


def _bench_estimators(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import estimators

    every = [group for group in estimators.VARIANTS if group]
    chosen = every if options.change is None else options.change.split(",")
    for group in chosen:
        if group not in every:
            raise ValueError(f"--change must be names out of {', '.join(every)}, got {group!r}")
    with _progress() as progress:
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
    kind = _command(
        kinds,
        "export",
        _bench_export,
        "Export a model, run it without Python, and compare with the model compiled in Python.",
    )
    kind.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    kind.add_argument(
        "--model",
        type=names(("llama-8b", "tiny", "recall", "recall-128k")),
        default="recall",
        help="shapes with random weights, or models of the package",
    )
    kind.add_argument("--context", type=numbers, default="4096", help="tokens of the prompt")
    kind.add_argument("--batch", type=numbers, default="1", help="rows")
    kind.add_argument("--dtype", type=names(tuple(DTYPES)), default="float32")
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
    kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(kind)


def _bench_export(options: argparse.Namespace) -> None:
    import time

    from retro_ops.benchmarks import export

    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"--folder must be a folder that is there, got '{options.folder}'")
    if options.runner is not None and not options.runner.is_file():
        raise ValueError(f"--runner must be the program retro_runner, got '{options.runner}'")
    rows: list[dict[str, Any]] = []
    lists = (options.model, options.dtype, options.context, options.batch)
    total = math.prod(len(values) for values in lists)
    begin = time.perf_counter()
    with _progress() as progress:

        def report(what: str) -> None:
            progress(what, 0, total)
            if not sys.stderr.isatty():  # minutes in which nothing else is heard
                print(f"{time.perf_counter() - begin:.0f} s: {what}", file=sys.stderr)

        for case in export.run(
            device=torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            models=options.model,
            dtypes=[DTYPES[name] for name in options.dtype],
            contexts=options.context,
            batch_sizes=options.batch,
            tokens=options.tokens,
            layers=options.layers,
            config=_budgets(options),
            runner=options.runner,
            folder=options.folder,
            exact=options.exact,
            timeout=options.timeout,
            progress=report,
        ):
            rows += case
    _report(options, rows, export.COLUMNS)
    if any(row["wrong"] for row in rows):
        raise SystemExit(f"{options.prog}: the figures above are wrong where a row says so")


def _bench(options: argparse.Namespace) -> None:
    import importlib

    config = _budgets(options)
    place = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    benchmark = importlib.import_module(f"retro_ops.benchmarks.{options.what}")
    rows: list[dict[str, Any]] = []
    with _progress() as progress:
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
    _report(options, rows, benchmark.COLUMNS)


def _report(
    options: argparse.Namespace, rows: list[dict[str, Any]], columns: Sequence[str]
) -> None:
    """Prints the rows of a benchmark and writes the files that were asked for."""
    import csv

    title = ", ".join(f"{rows[0][key]}" for key in ("machine", "threads", "kernels", "torch"))
    shown = [key for key in columns if any(key in row for row in rows)]
    _print_table(title, {key: [_shown(row.get(key, "")) for row in rows] for key in shown})
    _write_json(options.json, rows)
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


def _add_evaluation(parser: Parser, out: str) -> None:
    """What `ruler` and `longbench` have in common."""
    parser.add_argument("--model", required=True, help="gemma, a directory, or a model of the hub")
    parser.add_argument("--attention", type=names(ATTENTIONS), default="dense,retro")
    parser.add_argument("--batch-size", type=number(1), default=1, help="prompts at once")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts into the model's chat template (if it has one)",
    )
    parser.add_argument(
        "--dtype",
        type=dtype_name,
        choices=DTYPES,
        help="of the model (float32 on a CPU, else bfloat16)",
    )
    parser.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile retro's decode step into one graph (on a GPU)",
    )
    parser.add_argument(
        "--out",
        type=new_file,
        default=out,
        metavar="FILE.jsonl",
        help="every answer as soon as it is there; a run that was cut off goes on from it",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    _add_budgets(parser)


def _ask(
    options: argparse.Namespace,
    make_questions: Callable[[Any], list[Any]],
    progress: Callable[[str, int, int], None],
) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Questions for a tokenizer, what each attention answered, and what that was done with.

    Args:
        make_questions: of the form of prompts.
    """
    from retro_ops.benchmarks import evaluation, machine
    from retro_ops.models import load_model, load_tokenizer

    config = _budgets(options)
    place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = options.dtype or ("float32" if place == "cpu" else "bfloat16")
    records = evaluation.Records(options.out)
    if records.dropped:
        print(f"{options.out}: took away an unfinished line", file=sys.stderr)
    tokenizer = load_tokenizer(options.model)
    form = evaluation.PromptForm(tokenizer, options.chat)
    questions = make_questions(form)
    outcomes = evaluation.ask(
        lambda: load_model(options.model, dtype=DTYPES[name], device=place),
        tokenizer,
        questions,
        name=options.model,
        dtype=name,
        attentions=options.attention,
        batch_size=options.batch_size,
        config=config,
        compile_step=place.startswith("cuda") if options.compile is None else options.compile,
        records=records,
        progress=progress,
    )
    facts = {
        "model": options.model,
        "chat": form.chat,
        "dtype": name,
        "config": dataclasses.asdict(config),
        "answers": {
            each.attention: {
                "of_earlier_runs": each.reused,
                "new": len(each.predictions) - each.reused,
                "seconds": each.seconds,
            }
            for each in outcomes
        },
        **machine.facts(torch.device(place)),
    }
    return questions, outcomes, facts


def _print_answers(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    for attention, counts in facts["answers"].items():
        print(
            f"{attention}: {counts['new']} answers in {counts['seconds']:.0f} s, "
            f"{counts['of_earlier_runs']} of earlier runs, all in {options.out}"
        )


def _chosen_tasks(text: str, allowed: Sequence[str]) -> list[str]:
    """Names of tasks, or all; only the command knows which there are."""
    if text == "all":
        return list(allowed)
    try:
        return names(allowed)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--tasks {error}") from error


def _add_ruler(commands: Any) -> None:
    parser = _command(
        commands, "ruler", _ruler, "Score a model on the 13 tasks of RULER, dense and retro."
    )
    parser.add_argument("--context", type=numbers, default="4096", help="tokens, with the answer")
    parser.add_argument("--tasks", default="all", help="names with commas")
    parser.add_argument("--samples", type=number(1), default=25, help="of each task and length")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--essays", type=Path, metavar="DIR", help="*.txt to hide facts in (generated prose)"
    )
    parser.add_argument("--squad", type=Path, metavar="FILE", help="for qa_1 (made-up facts)")
    parser.add_argument("--hotpotqa", type=Path, metavar="FILE", help="for qa_2 (made-up facts)")
    parser.add_argument("--plot", type=new_file, metavar="FILE.png", help="draw a heat map")
    _add_evaluation(parser, "ruler.jsonl")


def _ruler(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import ruler
    from retro_ops.benchmarks.ruler_tasks import TASKS

    tasks = _chosen_tasks(options.tasks, list(TASKS))
    with _progress() as progress:

        def make_questions(form: Any) -> list[Any]:
            return ruler.make_questions(
                form,
                tasks=tasks,
                lengths=sorted(set(options.context)),
                samples=options.samples,
                seed=options.seed,
                essays=options.essays,
                squad=options.squad,
                hotpotqa=options.hotpotqa,
                progress=progress,
            )

        questions, outcomes, facts = _ask(options, make_questions, progress)
    rows = ruler.results(questions, outcomes)
    _print_table(
        f"RULER, {options.model}, {options.samples} samples a task, {facts['dtype']}, "
        f"{facts['machine']}, per cent",
        ruler.table(rows),
    )
    for line in ruler.summary(rows):
        print(line)
    _print_answers(options, facts)
    _write_json(options.json, {"seed": options.seed, **facts, "results": rows})
    if options.plot is not None:
        ruler.draw(rows, options.plot)


def _add_longbench(commands: Any) -> None:
    parser = _command(
        commands, "longbench", _longbench, "Score a model on the 21 tasks of LongBench, version 1."
    )
    parser.add_argument(
        "--data",
        default="hub",
        help="a directory with TASK.jsonl, the published data.zip, or hub, which downloads that",
    )
    parser.add_argument("--tasks", default="all", help="names with commas, or en, or zh")
    parser.add_argument("--samples", type=number(1), help="of each task, the first ones (all)")
    parser.add_argument(
        "--context",
        type=number(1),
        default=8192,
        help="tokens, with the answer; the middle of longer prompts is left out",
    )
    _add_evaluation(parser, "longbench.jsonl")


def _longbench(options: argparse.Namespace) -> None:
    from retro_ops.benchmarks import longbench
    from retro_ops.benchmarks.longbench_tasks import TASKS

    if options.tasks in ("en", "zh"):
        tasks = [name for name, task in TASKS.items() if task.language == options.tasks]
    else:
        tasks = _chosen_tasks(options.tasks, list(TASKS))
    samples = longbench.read_samples(options.data, tasks)
    with _progress() as progress:

        def make_questions(form: Any) -> list[Any]:
            return longbench.make_questions(
                form,
                samples,
                length=options.context,
                most=options.samples,
                progress=progress,
            )

        questions, outcomes, facts = _ask(options, make_questions, progress)
    rows = longbench.results(questions, outcomes)
    _print_table(
        f"LongBench, {options.model}, {options.context:,} tokens, {facts['dtype']}, "
        f"{facts['machine']}, per cent",
        longbench.table(rows),
    )
    _print_answers(options, facts)
    _write_json(options.json, {**facts, "context": options.context, "results": rows})


def _add_info(commands: Any) -> None:
    parser = _command(
        commands,
        "info",
        _info,
        "Say what is installed, what it runs on, and whether it works; of a model, what memory it "
        "would take.",
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try every op on every device, for some seconds",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    group = parser.add_argument_group("memory of a model, of which nothing but its config is read")
    group.add_argument(
        "--model",
        help="recall or recall-128k (in the package), gemma, a directory, a model of the hub, or a "
        "shape: llama-3-8b, llama-3.1-8b, qwen2.5-7b, qwen2.5-72b",
    )
    group.add_argument(
        "--context", type=number(2), default=131072, help="tokens of a row, prompt and answer"
    )
    group.add_argument("--batch-size", type=number(1), default=1, help="rows at once")
    group.add_argument("--offload", action="store_true", help="KV stores in the host's memory")
    group.add_argument("--dtype", choices=DTYPES, help="of the model (as its config says)")
    group.add_argument(
        "--prefill-chunk", type=number(2), help="tokens of a prompt at once (all of them)"
    )
    group.add_argument(
        "--devices", type=number(0), help="GPUs; 0: the CPU (those that are there; else 0, or 1)"
    )
    group.add_argument(
        "--device-memory", type=gibibytes, metavar="GiB", help="of each GPU (what is free, or 80)"
    )
    group.add_argument(
        "--host-memory", type=gibibytes, metavar="GiB", help="of the host (what is free)"
    )
    _add_budgets(parser)


def gibibytes(text: str) -> int:
    """A parser of GiB; the result is bytes."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1 << 30:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got {text!r}")
    return round(value * (1 << 30))


def _memory(options: argparse.Namespace) -> Any:
    """What there is to plan for: what is asked for, else what is free here."""
    from retro_ops.models.memory import GIB, Memory, free_memory

    free = free_memory()
    count = options.devices
    if count is None:
        count = len(free.devices) or (1 if options.device_memory else 0)
    devices = free.devices[:count]
    if options.device_memory:
        devices = (options.device_memory,) * count
    elif len(devices) < count:
        devices = (80 * GIB,) * count
    return Memory(options.host_memory or free.host, devices)


def _info_memory(options: argparse.Namespace) -> None:
    from retro_ops.models.memory import GIB
    from retro_ops.models.plan import ACTIVATIONS, PARTS, Planner, load_config

    memory = _memory(options)
    config = load_config(options.model)
    planner = Planner(
        config,
        _budgets(options),
        dtype=DTYPES.get(options.dtype),
        offload=options.offload,
        devices=memory.devices,
        prefill_chunk=options.prefill_chunk,
    )
    plan = planner.plan(options.context, options.batch_size)
    lines: dict[str, dict[str, int]] = {
        part: {place: parts[part] for place, parts in plan.places.items() if part in parts}
        for part in PARTS
    }
    lines = {part: line for part, line in lines.items() if any(line.values())}
    lines["at most"] = {place: plan.total(place) for place in plan.places}
    lines["there is"] = {place: memory.of(place) for place in plan.places}
    rows, tokens = f"{options.batch_size:,}", f"{options.context:,}"
    dtype = str(planner.dtype).removeprefix("torch.")
    _print_table(
        f"{options.model}, {tokens} tokens, batch {rows}, {dtype}"
        f"{', offloaded' if options.offload else ''}: GiB",
        {
            "part": list(lines),
            **{
                place: [
                    f"{line[place] / GIB:,.3f}" if place in line else "" for line in lines.values()
                ]
                for place in plan.places
            },
        },
    )
    if all(name in lines for name in ACTIVATIONS):
        print("Of the two kinds of activations only the larger counts.")
    batch = planner.largest_batch(options.context, memory)
    longest = planner.longest_context(options.batch_size, memory)
    lacks = plan.lacks(memory)
    print(f"It does not fit: {lacks}." if lacks else "It fits.")
    print(f"Largest batch of {tokens} tokens: {batch:,}.")
    print(f"Longest context of {rows} {'row' if rows == '1' else 'rows'}: {longest:,} tokens.")
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and positions < options.context:
        print(f"The config is of a model for up to {positions:,} tokens.")
    _write_json(
        options.json,
        {
            "model": options.model,
            "context": options.context,
            "batch_size": options.batch_size,
            "dtype": dtype,
            "offload": options.offload,
            "bytes": plan.places,
            "total_bytes": lines["at most"],
            "there_bytes": lines["there is"],
            "fits": not lacks,
            "largest_batch": batch,
            "longest_context": longest,
        },
    )


def _info(options: argparse.Namespace) -> None:
    if options.model is not None:
        _info_memory(options)
        return
    from retro_ops import doctor

    facts, hints = doctor.facts(), doctor.hints()
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:{width}} {value}")
    for hint in hints:
        print(f"hint: {hint}")
    checks = []
    if options.check:
        checks = list(doctor.self_test())
        devices = dict.fromkeys(check.device for check in checks)
        for place in devices:
            here = [check for check in checks if check.device == place]
            right = sum(not check.problem for check in here)
            print(f"{'self-test':{width}} {right} of {len(here)} ops are right on {place}")
    wrong = [check for check in checks if check.problem]
    for check in wrong:
        print(f"wrong: {check.op} on {check.device}: {check.problem}")
    figures = {**facts, "hints": hints, "checks": [dataclasses.asdict(check) for check in checks]}
    _write_json(options.json, figures)
    if wrong:
        raise SystemExit(
            f"{options.prog}: {len(wrong)} of {len(checks)} self-tests failed; report the lines "
            "above, with those that say what is installed"
        )


def _write_json(path: Path | None, figures: Any) -> None:
    if path is None:
        return
    path.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def _print_table(title: str, columns: dict[str, list[str]]) -> None:
    """A table; without lines and colours where standard output is not a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE if console.is_terminal else None
    )
    for heading in columns:
        table.add_column(
            heading,
            justify="left" if heading in LEFT else "right",
        )
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    console.print(table)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error if that is a terminal, else nothing."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading weights: it would write into a pipe
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield progress
