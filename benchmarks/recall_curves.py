"""Accuracy of a recall model over tokens, density of records and retrieval budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.buffer import import_pyplot
from retro_ops.benchmarks.recordings import Progress, check_length
from retro_ops.models import RetroCache, load_model
from retro_ops.models.generate import Decoder, kv_bytes_per_token
from retro_ops.models.recall import RecallTask, is_recall, make_task
from retro_ops.models.recall.task import TOKENS_PER_RECORD
from retro_ops.ops._contract import retrieved_count

COLUMNS = (
    *("model", "dtype", "context", "density", "records", "attention", "estimator", "budget"),
    *("clusters", "right", "questions", "accuracy", "nll", "kv_mb"),
)
"""What a table shows of a row; the machine is in its title."""


def run(
    *,
    model_name: str,
    contexts: Sequence[int],
    densities: Sequence[float],
    budgets: Sequence[float],
    estimators: Sequence[str],
    attentions: Sequence[str],
    questions: int,
    batch_size: int,
    config: RetroConfig,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    plot: Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one context and density after another.

    A prompt is indexed once; every budget and estimator goes on from that index. Answers are fed as
    they should be, so that a question is right if both tokens of its answer are the most likely
    ones, which is what greedy decoding would write; `nll` is the mean negative log-likelihood of an
    answer, in nats.

    Args:
        model_name: "recall", "recall-128k", or the directory of a recall model that was trained.
        contexts: tokens.
        densities: records over those that a context has room for, one in 8 tokens.
        budgets: retrieval budgets, fractions; the floor under them is the config's, and `clusters`
            of a row is what that makes of them.
        estimators: of retro.
        attentions: "dense", "retro" or both.
        questions: for each row.
        batch_size: rows, each with records of its own.
        config: everything else.
        dtype, device: of the model.
        seed: of the records.
        plot: a file for the curves; None: none.
        progress: told about every question.

    Raises:
        ImportError: a plot is asked for and matplotlib is missing; nothing is measured then.
        ValueError: it is no recall model, or a number is out of range.
    """
    if not is_recall(model_name):
        raise ValueError(
            f"bench recall: {model_name!r} is no recall model; take recall, recall-128k or a "
            "directory that retro_ops.models.recall.train has written"
        )
    if plot is not None:
        import_pyplot()
    variants = [
        replace(config, retrieval_budget=budget, estimator=estimator)
        for estimator in estimators
        for budget in budgets
    ]
    facts = machine.facts(device)
    model = load_model(model_name, dtype=dtype, device=device)
    tasks = {}  # made before anything is measured: they check the numbers
    for context in contexts:
        check_length(model.config, context + 5 * questions)
        for density in densities:
            records = max(round(density * (context // TOKENS_PER_RECORD)), 1)
            task = make_task(context, records, questions, batch_size=batch_size, seed=seed)
            tasks[context, density] = (records, task)
    every: list[dict[str, object]] = []
    for (context, density), (records, task) in tasks.items():
        case = {
            "model": model_name,
            "dtype": str(dtype).removeprefix("torch."),
            "context": context,
            "density": density,
            "records": records,
            "questions": questions * batch_size,
        }
        task = RecallTask(*(part.to(device) for part in task))
        rows = [
            {**case, **row, **facts} for row in _rows(model, task, attentions, variants, progress)
        ]
        every += rows
        yield rows
    if plot is not None:
        draw(every, plot)


def _rows(
    model: PreTrainedModel,
    task: RecallTask,
    attentions: Sequence[str],
    variants: Sequence[RetroConfig],
    progress: Progress,
) -> Iterator[dict[str, object]]:
    rows, context = task.body.shape
    questions = task.questions.shape[1]
    max_length = context + 5 * questions
    name = f"{context:,} tokens"

    def ask(decoder: Decoder, what: str) -> dict[str, object]:
        right, nll = _ask(decoder, task, lambda q: progress(f"{name}: {what}", q, questions))
        return {
            "right": right,
            "accuracy": right / (rows * questions),
            "nll": nll,
            "kv_mb": kv_bytes_per_token(decoder.cache, rows) / 1e6,
        }

    if "dense" in attentions:
        progress(f"{name}: dense reads", 0, questions)
        decoder = Decoder(model, "dense", batch_size=rows, max_length=max_length)
        decoder.prefill(task.body)
        yield {"attention": "dense", **ask(decoder, "dense answers")}
        del decoder
    if "retro" not in attentions:
        return
    progress(f"{name}: retro reads", 0, questions)
    for config, decoder in after_one_prompt(model, task.body, variants, max_length):
        assert isinstance(decoder.cache, RetroCache)
        layer = decoder.cache.retro_layers[0].retro
        assert layer is not None
        clusters = layer.stats()["clusters"] // rows
        yield {
            "attention": "retro",
            "estimator": config.estimator,
            "budget": config.retrieval_budget,
            "clusters": retrieved_count(
                config.retrieval_budget, config.min_retrieved_clusters, clusters
            ),
            **ask(decoder, f"{config.estimator}, budget {config.retrieval_budget:g}"),
        }


def after_one_prompt(
    model: PreTrainedModel, prompt: Tensor, configs: Sequence[RetroConfig], max_length: int
) -> Iterator[tuple[RetroConfig, Decoder]]:
    """Retro attention with each config, after a prompt that is read and indexed once.

    Args:
        model: on its device.
        prompt: `[B, T]`.
        configs: alike in all that the index depends on; budgets and estimator may differ.
        max_length: tokens that a row can come to hold.
    """
    states: list[dict[str, Tensor]] = []
    for config in configs:
        decoder = Decoder(
            model, "retro", batch_size=len(prompt), max_length=max_length, config=config
        )
        assert isinstance(decoder.cache, RetroCache)
        if states:
            for layer, state in zip(decoder.cache.layers, states, strict=True):
                layer.load_state(state)
        else:
            decoder.prefill(prompt)
            if len(configs) > 1:
                states = [layer.state() for layer in decoder.cache.layers]
        yield config, decoder


def _ask(decoder: Decoder, task: RecallTask, progress: Callable[[int], None]) -> tuple[int, float]:
    """Questions that are answered right, and the mean negative log-likelihood of an answer."""
    right, nll = 0, 0.0
    questions = task.questions.shape[1]
    for q in range(questions):
        progress(q)
        for token in range(3):
            logits = decoder.step(task.questions[:, q, token, None])
        hits = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        for token in range(2):
            answer = task.answers[:, q, token]
            hits &= logits.argmax(dim=1) == answer
            nll += _nll(logits, answer) / questions
            logits = decoder.step(answer[:, None])
        right += int(hits.sum())
    return right, nll


def _nll(logits: Tensor, truth: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.float(), truth))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over tokens: a panel for each density, a line for each attention and budget."""
    pyplot = import_pyplot()
    densities = list(dict.fromkeys(row["density"] for row in rows))
    figure, axes = pyplot.subplots(
        1,
        len(densities),
        figsize=(4.5 * len(densities), 3.5),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, density in zip(axes[0], densities, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row["density"] == density:
                name = "dense"
                if row["attention"] == "retro":
                    name = f"retro, {row['estimator']}, {100 * row['budget']:g} %"
                lines.setdefault(name, []).append((row["context"], row["accuracy"]))
        for name, points in lines.items():
            style = {"color": "black", "linestyle": "--"} if name == "dense" else {}
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, marker="o", markersize=3, linewidth=1, label=name, **style)
        axis.set_xscale("log", base=2)
        ticks = sorted({row["context"] for row in rows})
        axis.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks])
        axis.set_title(f"one record in {TOKENS_PER_RECORD / density:g} tokens", fontsize=9)
        axis.set_xlabel("tokens")
        axis.set_ylim(-0.02, 1.02)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="lower left")
    axes[0][0].set_ylabel("questions answered right")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
