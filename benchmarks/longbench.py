"""LongBench: questions, summaries, examples and code from real documents, dense and retro."""

from __future__ import annotations

import json
import statistics
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retro_ops.benchmarks.evaluation import Outcome, Progress, PromptForm, Question, mean_score
from retro_ops.benchmarks.longbench_tasks import TASKS, Task, score

HUB = "hub"
REPOSITORY, ARCHIVE = "THUDM/LongBench", "data.zip"
"""Where the Hugging Face hub has the data."""


def read_samples(data: str, tasks: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Samples by task.

    Args:
        data: a directory with TASK.jsonl, an archive with them (as published: data.zip), or "hub".
        tasks: names out of `TASKS`.

    Raises:
        ValueError: a file is missing or is not of the published form.
        OSError: the hub cannot be reached.
    """
    path = Path(data)
    if data == HUB:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(REPOSITORY, ARCHIVE, repo_type="dataset"))
        except OSError as error:
            raise OSError(
                f"the hub did not give {ARCHIVE} of {REPOSITORY}; fetch it elsewhere and give its "
                f"path with --data ({error})"
            ) from error
    if path.is_dir():
        files = [path / f"{task}.jsonl" for task in tasks]
        found = {file.name: file.read_text("utf-8") for file in files if file.is_file()}
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            found = {
                Path(name).name: archive.read(name).decode("utf-8")
                for name in archive.namelist()
                if name.endswith(".jsonl")
            }
    else:
        what = "is no zip archive" if path.is_file() else "is not there"
        raise ValueError(f"--data must be a directory, a .zip or 'hub', got {data!r}, which {what}")
    return {task: _parse(task, found, str(path)) for task in tasks}


def _parse(task: str, files: dict[str, str], where: str) -> list[dict[str, Any]]:
    name = f"{task}.jsonl"
    if name not in files:
        raise ValueError(f"{where} has no {name}; choose from the tasks it has with --tasks")
    samples = []
    for number, line in enumerate(files[name].split("\n"), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}, {name}, line {number} is not JSON: {error}") from error
        if (
            not isinstance(sample, dict)
            or not all(isinstance(sample.get(key), str) for key in ("input", "context"))
            or not isinstance(sample.get("answers"), list)
            or not sample["answers"]
            or not all(isinstance(answer, str) for answer in sample["answers"])
        ):
            raise ValueError(
                f"{where}, {name}, line {number}: a sample needs texts 'input' and 'context' and a "
                "list of texts 'answers'"
            )
        if TASKS[task].metric == "classes" and not sample.get("all_classes"):
            raise ValueError(f"{where}, {name}, line {number} needs a list 'all_classes'")
        samples.append(sample)
    if not samples:
        raise ValueError(f"{where}: {name} has no samples")
    return samples


def make_questions(
    form: PromptForm,
    samples: dict[str, list[dict[str, Any]]],
    *,
    length: int,
    most: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Question]:
    """Questions of at most `length` tokens, answer included.

    Args:
        form: tokenizer and form of prompts.
        samples: as of `read_samples`.
        length: tokens. Of a longer prompt the middle is left out, as published.
        most: samples of a task; None: all.
        progress: told about every task.

    Raises:
        ValueError: no prompt fits in `length`.
    """
    questions = []
    for done, (name, own) in enumerate(samples.items()):
        progress(f"reading {name}", done, len(samples))
        task = TASKS[name]
        end_of_line = form.tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        stop_ids = tuple(end_of_line) if task.one_line else ()
        for index, sample in enumerate(own[:most]):
            # Not str.format: contexts are full of braces.
            prompt = task.prompt.replace("{input}", "\0").replace("{context}", sample["context"])
            prompt = prompt.replace("\0", sample["input"])
            ids = fit(form, task, prompt, length - task.new_tokens)
            questions.append(
                Question(
                    task=name,
                    length=length,
                    index=index,
                    ids=torch.tensor(ids, dtype=torch.int32),
                    new_tokens=task.new_tokens,
                    answers=tuple(sample["answers"]),
                    classes=tuple(sample.get("all_classes") or ()),
                    stop_ids=stop_ids,
                )
            )
    # A batch has rows of about the same length.
    order = {name: position for position, name in enumerate(samples)}
    return sorted(questions, key=lambda each: (order[each.task], len(each.ids)))


def fit(form: PromptForm, task: Task, prompt: str, room: int) -> list[int]:
    """Token ids of a prompt, at most `room`: where it is longer, the middle is left out.

    Beginning and end of the text keep the same number of tokens. Where they meet, other tokens may
    come of it, and a chat adds its own: then a few more are left out.

    Raises:
        ValueError: `room` has no place for a prompt.
    """
    chat = False if task.by_example else None
    ids = form.encode(prompt, chat=chat)
    plain = form.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    kept = min(room, len(plain))
    while len(ids) > room:
        half = kept // 2
        if half < 1:
            raise ValueError(f"no prompt fits in {room} tokens; give a larger --context")
        ends = (
            form.tokenizer.decode(part, clean_up_tokenization_spaces=False)
            for part in (plain[:half], plain[-half:])
        )
        ids = form.encode("".join(ends), chat=chat)
        kept -= max(len(ids) - room, 1)
    return ids


def results(questions: Sequence[Question], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """A row for each task and attention: mean score in per cent."""
    rows = []
    for task in dict.fromkeys(question.task for question in questions):
        own = [question for question in questions if question.task == task]
        for outcome in outcomes:
            scores = [score(task, q.answers, q.classes, outcome.predictions[q.name]) for q in own]
            rows.append(
                {
                    "task": task,
                    "group": TASKS[task].group,
                    "language": TASKS[task].language,
                    "metric": TASKS[task].metric,
                    "attention": outcome.attention,
                    **mean_score(scores),
                    "longest_prompt": max(len(question.ids) for question in own),
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Columns of a table: a line for each task, one for each group and one for all tasks."""
    tasks = {row["task"]: row for row in rows}
    cells = {(row["task"], row["attention"]): row["score"] for row in rows}
    lines: list[tuple[str, str, str, str, list[str]]] = [
        (name, row["group"], row["metric"], str(row["samples"]), [name])
        for name, row in tasks.items()
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [name for name, row in tasks.items() if row["group"] == group]
        if len(own) > 1:
            lines.append((f"mean of {group}", "", "", "", own))
    lines.append(("mean", "", "", "", list(tasks)))
    columns = {
        heading: [str(line[place]) for line in lines]
        for place, heading in enumerate(("task", "group", "metric", "samples"))
    }
    for attention in dict.fromkeys(row["attention"] for row in rows):
        columns[attention] = [
            f"{statistics.fmean(cells[name, attention] for name in names):.1f}"
            for *_, names in lines
        ]
    return columns
