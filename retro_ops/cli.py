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
from retro_ops.testing import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

# Headings of columns of words.
LEFT = ("attention", "dtype", "keys", "shape", "trace", "policy", "model", "note", "wrong")
ATTENTIONS = ("dense", "retro")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    _add_info(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, NotImplementedError, ImportError) as error:
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
        "--dtype", choices=DTYPES, help="of the model (float32 on a CPU, else bfloat16)"
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
        "--dtype", choices=DTYPES, help="of the model (float32 on a CPU, else bfloat16)"
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
        model = load_model(options.model, dtype=DTYPES[name], device=place)
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
        kind.add_argument("--dtype", type=names(tuple(DTYPES)), default="bfloat16,float32")
        if name == "model":
            kind.add_argument("--shape", type=names(("llama-8b", "tiny")), default="llama-8b")
        else:
            kind.add_argument("--keys", type=names(KINDS), default=",".join(KINDS))
        kind.add_argument("--rounds", type=number(1), default=3 if name == "build" else 30)
        kind.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
        kind.add_argument("--csv", type=new_file, metavar="FILE", help="write the figures")
        _add_budgets(kind)
    _add_bench_buffer(kinds)
    _add_bench_long(kinds)
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
    kind.add_argument(
        "--context", type=numbers, help="tokens (recall: 32768, gemma: 16384, others: 131072)"
    )
    kind.add_argument("--batch", type=numbers, default="1", help="rows of synthetic and layer")
    kind.add_argument(
        "--overlap",
        type=fractions,
        default="0.3,0.6,0.8",
        help="synthetic: clusters that a step shares with the one before",
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

    rows: list[dict[str, Any]] = []
    with _progress() as progress:
        progress("compiling", 0, options.tokens)
        for row in long.run(
            device=torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
            prompt=options.context,
            tokens=options.tokens,
            window=options.window,
            batch_size=options.batch,
            dtype=DTYPES[options.dtype],
            kind=options.keys,
            config=_budgets(options),
        ):
            rows.append(row)
            done = len(rows) * options.window
            progress(f"{done:,} of {options.tokens:,} tokens", done, options.tokens)
    _report(options, rows, long.COLUMNS)


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


def _add_info(commands: Any) -> None:
    parser = _command(
        commands, "info", _info, "Say what is installed, what it runs on, and whether it works."
    )
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try every op on every device, for some seconds",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")


def _info(options: argparse.Namespace) -> None:
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
