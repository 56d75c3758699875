"""What the commands share: parsers of arguments, options, and how figures are shown."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from retro_ops.config import RetroConfig

# Headings of columns of words.
LEFT = (
    *("task", "group", "metric", "attention", "dtype", "keys", "shape", "trace", "policy", "part"),
    *("source", "estimator", "model", "text", "changed", "variant", "note", "wrong"),
)
ATTENTIONS = ("dense", "retro")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def number(low: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` on, as far as torch can count (63 bits)."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} on, got {text!r}")
        if value >= 1 << 63:
            raise argparse.ArgumentTypeError(f"must be less than 2^63, got {text!r}")
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


def words(text: str) -> list[str]:
    """A parser of a list of words with commas, such as names of models."""
    chosen = text.split(",")
    if not all(chosen):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, got {text!r}")
    return list(dict.fromkeys(chosen))


def numbers(text: str) -> list[int]:
    """A parser of a list of whole numbers from 1 on, with commas."""
    return [number(1)(part) for part in text.split(",")]


def fraction(text: str) -> float:
    """A parser of a number in 0..1."""
    return _in_0_to_1(text, "a number")


def fractions(text: str) -> list[float]:
    """A parser of a list of numbers in 0..1, with commas."""
    return [_in_0_to_1(part, "numbers") for part in text.split(",")]


def _in_0_to_1(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be {what} in 0..1, got {text!r}")
    return value


def dtype_name(text: str) -> str:
    """A parser of dtypes by their full or short names; argparse refuses others."""
    return SHORT_DTYPES.get(text, text)


def dtype_names(text: str) -> list[str]:
    """A parser of a list of dtypes with commas, by their full or short names."""
    return names(tuple(DTYPES))(",".join(map(dtype_name, text.split(","))))


def device(text: str) -> str:
    """A parser of devices that are there."""
    kind, _, index = text.partition(":")
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not there or (index and not (index.isdecimal() and int(index) < there)):
        kinds = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(kinds)}, got {text!r}{_why_no_gpu(kind)}"
        )
    return text


def _why_no_gpu(kind: str) -> str:
    if kind != "cuda" or torch.cuda.device_count():
        return ""
    why = "sees no GPU" if torch.version.cuda else "was built without CUDA"
    return f": torch {torch.__version__} {why}; `info` says more"


def new_file(text: str) -> Path:
    """A parser of files to write: refused before the work, not after it."""
    path = Path(text)
    folder = path.parent
    if path.is_dir():
        why = "it is a folder; name a file in it"
    elif not folder.is_dir():
        why = f"there is no folder '{folder}'"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "it may not be written to" if path.exists() else f"'{folder}' may not be written to"
    else:
        return path
    raise argparse.ArgumentTypeError(f"cannot write {text!r}: {why}")


def add_command(commands: Any, name: str, run: Any, help_: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=help_,
        description=help_,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", type=device, help="cpu or cuda (cuda if there is one)")


def add_dtype(
    parser: Parser, help_: str = "of the model (float32 on a CPU, else bfloat16)", **options: Any
) -> None:
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help=help_, **options)


def add_seed(parser: Parser, default: int) -> None:
    parser.add_argument("--seed", type=number(0), default=default, help="the same, the same data")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")


def add_budgets(parser: Parser) -> None:
    default = RetroConfig()
    group = parser.add_argument_group("retro attention")
    group.add_argument("--retrieval-budget", type=float, default=default.retrieval_budget)
    group.add_argument("--estimation-budget", type=float, default=default.estimation_budget)
    group.add_argument("--min-retrieved-clusters", type=int, default=default.min_retrieved_clusters)
    group.add_argument("--estimator", default=default.estimator, help="variance or mean")


def add_offload(parser: Any) -> None:
    """`--offload`, and how large a page cache that takes.

    Args:
        parser: or a group of one.
    """
    parser.add_argument("--offload", action="store_true", help="KV stores in the host's memory")
    parser.add_argument(
        "--cache-ratio",
        type=fraction,
        help="offloaded: of the KV, what the page cache in fast memory holds "
        f"({RetroConfig().cache_ratio})",
    )


def budgets(options: argparse.Namespace) -> RetroConfig:
    """What `add_budgets` and, where a command has it, `add_offload` asked for.

    Raises:
        ValueError: a budget is out of range, or there is a page cache and nothing offloaded.
    """
    cache_ratio = getattr(options, "cache_ratio", None)
    if cache_ratio is not None and not options.offload:
        raise ValueError(f"--cache-ratio {cache_ratio} is for --offload: give both, or neither")
    return RetroConfig(
        cache_ratio=RetroConfig().cache_ratio if cache_ratio is None else cache_ratio,
        retrieval_budget=options.retrieval_budget,
        estimation_budget=options.estimation_budget,
        min_retrieved_clusters=options.min_retrieved_clusters,
        estimator=options.estimator,
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """The device that was asked for, else a GPU if there is one."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(options: argparse.Namespace) -> str:
    """The name of the dtype that was asked for, else of the one that models have on the device."""
    named: str | None = options.dtype
    return named or ("float32" if device_of(options).type == "cpu" else "bfloat16")


def write_json(path: Path | None, figures: Any) -> None:
    if path is None:
        return
    path.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def print_table(title: str, columns: dict[str, list[str]]) -> None:
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
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
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
