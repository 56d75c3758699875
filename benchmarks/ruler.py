"""RULER: what a model finds, follows, counts and answers in long contexts, dense and retro."""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from retro_ops.benchmarks.evaluation import Outcome, Progress, PromptForm, Question, mean_score
from retro_ops.benchmarks.ruler_tasks import (
    TASKS,
    Draft,
    Sources,
    Text,
    largest_size,
    most_units,
    score,
)

HARD = ("niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""Tasks that separate sparse methods, shown one by one."""
DENSE_AT_LEAST = 50.0
"""Per cent: tasks that dense attention itself fails say nothing about another attention."""


def make_questions(
    form: PromptForm,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 42,
    essays: Path | None = None,
    squad: Path | None = None,
    hotpotqa: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Question]:
    """Questions whose prompt and answer fill a length but for less than one unit of hay.

    Args:
        form: tokenizer and form of prompts.
        tasks: names out of `TASKS`.
        lengths: tokens of prompt and answer together.
        samples: of each task and length. Sample i is the same, however many there are.
        seed: of everything that is random.
        essays: directory of `*.txt`; None: generated prose.
        squad, hotpotqa: see `Sources`.
        progress: told about every task.

    Raises:
        ValueError: a task does not fit in a length, or a file has too little text to fill it.
        ImportError: the word lists are not installed.
    """
    # A word has at least one token.
    text = Text.read(essays) if essays else Text.generated(max(lengths), seed)
    sources = Sources(text, squad, hotpotqa)
    cases = [(task, length) for length in lengths for task in tasks]
    questions: list[Question] = []
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for done, (task, length) in enumerate(cases):
            progress(f"writing {task}, {length:,} tokens", done, len(cases))
            questions += pool.map(
                lambda index, task=task, length=length: make_question(
                    form, sources, task, length, index, seed
                ),
                range(samples),
            )
    return questions


def make_question(
    form: PromptForm, sources: Sources, task: str, length: int, index: int, seed: int
) -> Question:
    """One sample of a task; see `make_questions`."""
    kind = TASKS[task]
    encoded: dict[int, tuple[Draft, list[int]]] = {}

    def count_tokens(size: int) -> int:
        # The same random numbers for every size.
        random_ = random.Random(f"{seed} {task} {length} {index}")
        draft = kind.make(random_, size, length, sources)
        encoded[size] = (draft, form.encode(draft.prompt, draft.prefix))
        return len(encoded[size][1])

    most = most_units(task, sources)
    room = length - kind.new_tokens
    size = largest_size(count_tokens, room, kind.smallest, most)
    if size is None:
        needed = len(encoded[kind.smallest][1]) + kind.new_tokens
        raise ValueError(
            f"{task} needs at least {needed} tokens with this tokenizer, got a context of {length}"
        )
    if size == most:
        raise ValueError(
            f"the file of {task} has too little text for {length} tokens: all of its documents "
            f"make {len(encoded[size][1])}; give a larger file or a smaller --context"
        )
    draft, ids = encoded[size]
    return Question(
        task=task,
        length=length,
        index=index,
        ids=torch.tensor(ids, dtype=torch.int32),
        new_tokens=kind.new_tokens,
        answers=tuple(draft.answers),
    )


def results(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each task, length and attention: mean score in per cent and its standard error."""
    scores: dict[tuple[int, str, str], list[float]] = {}
    tokens: dict[tuple[int, str], list[int]] = {}
    for question in questions:
        tokens.setdefault((question.length, question.task), []).append(
            len(question.ids) + question.new_tokens
        )
        for outcome in outcomes:
            prediction = outcome.predictions[question.name]
            case = (question.length, question.task, outcome.attention)
            scores.setdefault(case, []).append(score(question.task, question.answers, prediction))
    return [
        {
            "task": task,
            "context": length,
            "attention": attention,
            **mean_score(own),
            "tokens_at_least": min(tokens[length, task]),
        }
        for (length, task, attention), own in scores.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Columns of a table: a line for each task and one for their mean."""
    cells = _cells(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = {"task": [*tasks, "mean"]}
    for length in dict.fromkeys(row["context"] for row in rows):
        for attention in dict.fromkeys(row["attention"] for row in rows):
            own = [cells[task, length, attention] for task in tasks]
            columns[f"{length:,} {attention}"] = [f"{x:.1f}" for x in (*own, statistics.fmean(own))]
    return columns


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines that compare retro with dense attention, if both were asked.

    First the mean over the tasks where dense attention scores `DENSE_AT_LEAST` or more, for each
    length and for all; then the hard tasks one by one.
    """
    cells = _cells(rows)
    if {row["attention"] for row in rows} < {"dense", "retro"}:
        return []
    lengths = list(dict.fromkeys(row["context"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    pairs = {
        (task, length): (cells[task, length, "dense"], cells[task, length, "retro"])
        for length in lengths
        for task in tasks
    }
    lines = []
    for label, chosen in (
        *((f"{length:,} tokens", [length]) for length in lengths),
        *([("all lengths", lengths)] if len(lengths) > 1 else []),
    ):
        able = [
            pair
            for (_, length), pair in pairs.items()
            if length in chosen and pair[0] >= DENSE_AT_LEAST
        ]
        lines.append(
            f"{label}: {_compare(able)}, mean of {len(able)} of {len(tasks) * len(chosen)} tasks, "
            f"those where dense scores {DENSE_AT_LEAST:.0f} or more"
            if able
            else f"{label}: dense scores {DENSE_AT_LEAST:.0f} or more in no task"
        )
    for task in HARD:
        if task in tasks:
            for length in lengths:
                lines.append(f"{task}, {length:,} tokens: {_compare([pairs[task, length]])}")
    return lines


def _compare(pairs: Sequence[tuple[float, float]]) -> str:
    dense, retro = (statistics.fmean(scores) for scores in zip(*pairs, strict=True))
    return f"dense {dense:.1f}, retro {retro:.1f} ({retro - dense:+.1f})"


def _cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    return {(row["task"], row["context"], row["attention"]): row["score"] for row in rows}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A heat map for each kind of attention, tasks by lengths, and one of their difference.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from retro_ops.benchmarks.buffer import import_pyplot

    pyplot = import_pyplot()
    cells = _cells(rows)
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lengths = list(dict.fromkeys(row["context"] for row in rows))
    scores = {
        name: [[cells[task, length, name] for length in lengths] for task in tasks]
        for name in dict.fromkeys(row["attention"] for row in rows)
    }
    panels = [(name, grid, "viridis", (0.0, 100.0)) for name, grid in scores.items()]
    if {"dense", "retro"} <= set(scores):
        gap = [
            [retro - dense for dense, retro in zip(*lines, strict=True)]
            for lines in zip(scores["dense"], scores["retro"], strict=True)
        ]
        reach = max(5.0, *(abs(x) for line in gap for x in line))
        panels.append(("retro - dense", gap, "RdBu", (-reach, reach)))
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(1.5 + len(panels) * (1.2 + 0.8 * len(lengths)), 1.5 + 0.36 * len(tasks)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, (title, values, colours, (low, high)) in zip(axes[0], panels, strict=True):
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=7)
        axis.set_xlabel("tokens", fontsize=8)
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                shade = (value - low) / (high - low)
                dark = shade < 0.5 if colours == "viridis" else not 0.2 < shade < 0.8
                axis.text(
                    *(x, y, f"{value:.0f}" if low == 0 else f"{value:+.0f}"),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else "black",
                )
        figure.colorbar(image, ax=axis, fraction=0.05)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
