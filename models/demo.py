"""The demos: the same questions about long contexts, with dense and with retro attention."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import get_layer_types_and_kwargs

from retro_ops import RetroConfig
from retro_ops.models.cache import RetroCache
from retro_ops.models.generate import (
    Decoder,
    PageUse,
    finished_at,
    kv_bytes_per_token,
    make_cache,
)
from retro_ops.models.memory import check_cache, free_memory, in_gib
from retro_ops.models.prose import haystack, make_needle
from retro_ops.models.recall import make_task
from retro_ops.models.rope import longest_context
from retro_ops.models.support import head_dim_of

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


def check_batch(
    model: PreTrainedModel,
    rows: int,
    tokens: int,
    *,
    attentions: Sequence[str] = ("dense", "retro"),
    config: RetroConfig | None = None,
    offload: bool = False,
) -> None:
    """Refuses a batch before its prompts are made, which takes time and memory, too.

    Args:
        model: on its device.
        rows, tokens: of the batch.
        attentions: "dense", "retro" or both.
        config: budgets and sizes of retro; None: the defaults.
        offload: the KV stores of retro are to be in the host's memory.

    Raises:
        MemoryError: keys and values alone are more than what all GPUs and the host have free, or
            all GPUs for dense attention on a GPU; or host or GPU have no room for what an offloaded
            cache has there.
    """
    text_config = model.config.get_text_config(decoder=True)
    kinds = list(get_layer_types_and_kwargs(text_config)[0])
    head_dim = head_dim_of(text_config)
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    row = 2 * heads * head_dim * model.dtype.itemsize * tokens
    row *= kinds.count("full_attention")
    memory = free_memory()
    free = memory.host + sum(memory.devices)
    if rows * row > free:
        raise MemoryError(
            f"keys and values of {rows:,} prompts of {tokens:,} tokens need "
            f"{in_gib(rows * row)}, {in_gib(free)} are free; make the batch size at most "
            f"{max(free // row, 1):,}" + ("" if free >= row else ", and the context shorter")
        )
    on_gpus = sum(memory.devices)
    if "dense" in attentions and model.device.type == "cuda" and rows * row > on_gpus:
        fits = on_gpus // row
        advice = f"make the batch size at most {fits:,}" if fits else "make the context shorter"
        if offload and "retro" in attentions:
            advice += ", or leave dense out with --attention retro"
        raise MemoryError(
            f"keys and values of {rows:,} prompts of {tokens:,} tokens need {in_gib(rows * row)} "
            f"for dense attention, {in_gib(on_gpus)} are free on the GPU; {advice}"
        )
    if offload and "retro" in attentions:
        cache = RetroCache(
            model.config, config, max_cache_len=tokens, batch_size=rows, offload=True
        )
        # What has the shape of a batch's keys, and the memory of a number.
        like = torch.empty((), dtype=model.dtype, device=model.device)
        like = like.expand(rows, heads, 1, head_dim)
        check_cache(cache.layers, like, like, rows, tokens)


class Prompt(NamedTuple):
    """A text to continue, and what the continuation should contain (may be empty: anything)."""

    input: str
    outputs: str


@dataclass
class Result:
    """What one kind of attention did with the questions."""

    attention: str
    right: int = 0
    questions: int = 0
    prefill_seconds: float = 0.0
    """Of all prompts, the index build included."""
    build_seconds: float = 0.0
    """Of it, what indexing the prompts took; 0 for dense."""
    first_step_seconds: float = 0.0
    """The first decode step of all, which compiles if anything does."""
    step_milliseconds: float = 0.0
    """Median over the other decode steps, one token of each row of the batch."""
    kv_bytes_per_token: int = 0
    """Keys, values and index that a step of one row reads, over all layers."""
    offloaded: bool = False
    """Whether KV stores were in slow memory, behind page caches."""
    slow_bytes_per_token: float | None = None
    """Offloaded: of `kv_bytes_per_token`, what came from slow memory, on average."""
    hit_ratio: float | None = None
    """Offloaded: of the pages of retrieved clusters, the fraction that was in a page cache; None
    also where no page was asked for: the context was too short to index."""
    answers: list[str] = field(default_factory=list)
    """Of text prompts: the continuations."""

    def note_pages(self, use: PageUse) -> None:
        """What the page caches did in all steps."""
        self.offloaded = True
        self.slow_bytes_per_token = use.slow_bytes_per_token
        self.hit_ratio = use.hit_ratio


def recall_demo(
    model: PreTrainedModel,
    *,
    context: int,
    records: int,
    questions: int,
    batch_size: int,
    attentions: Sequence[str],
    config: RetroConfig | None = None,
    offload: bool = False,
    compile_step: bool = False,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> list[Result]:
    """Asks a recall model about records planted in a context, one question after another.

    Args:
        model: a recall model, on its device.
        context, records, questions, batch_size, seed: see `make_task`.
        attentions: "dense", "retro" or both.
        config: budgets and sizes of retro; None: the defaults.
        offload: keep retro's KV stores in slow memory behind page caches, see `RetroCache`.
        compile_step: compile retro's decode step.
        progress: told about every question.

    Raises:
        ValueError: a number is out of range, or the model's vocabulary is not that of the task.
        MemoryError: so many rows cannot be held.
    """
    if model.config.vocab_size != 1024:
        raise ValueError(
            f"not a recall model: its vocabulary has {model.config.vocab_size} tokens, not 1024; "
            "give other models text with --data-path"
        )
    limit = longest_context(model.config)
    if limit is not None and context + 5 * questions > limit:
        raise ValueError(
            f"a context of {context} tokens and {questions} questions of 5 exceed the {limit} "
            "tokens that the model reads; make the context smaller"
        )
    check_batch(model, batch_size, context, attentions=attentions, config=config, offload=offload)
    task = make_task(context, records, questions, batch_size=batch_size, seed=seed)
    results = []
    for attention in attentions:
        decoder = Decoder(
            model,
            attention,
            batch_size=batch_size,
            max_length=context + 5 * questions,
            config=config,
            offload=offload,
            compile_step=compile_step,
        )
        progress(f"{attention}: reading {context:,} tokens", 0, questions)
        body, asked, truth = (part.to(model.device) for part in task)
        decoder.prefill(body)
        right = 0
        for q in range(questions):
            progress(f"{attention}: asking", q, questions)
            for token in range(3):
                logits = decoder.step(asked[:, q, token, None])
            first = logits.argmax(dim=1, keepdim=True)
            second = decoder.step(first).argmax(dim=1, keepdim=True)
            decoder.step(second)
            right += int((torch.cat((first, second), dim=1) == truth[:, q]).all(dim=1).sum())
        progress(f"{attention}: asking", questions, questions)
        result = Result(
            attention=attention,
            right=right,
            questions=batch_size * questions,
            prefill_seconds=decoder.prefill_seconds,
            build_seconds=_build_seconds(decoder.cache),
            first_step_seconds=decoder.step_seconds[0],
            step_milliseconds=1e3 * statistics.median(decoder.step_seconds[1:]),
            kv_bytes_per_token=kv_bytes_per_token(decoder.cache, batch_size),
        )
        if offload and isinstance(decoder.cache, RetroCache):
            use = PageUse()
            use.add(decoder.cache)
            result.note_pages(use)
        results.append(result)
    return results


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a JSON file: `[{"input": str, "outputs": str}, ...]`.

    Raises:
        ValueError: the file cannot be read, is not of that form, or has an empty input.
    """
    try:
        entries = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    form = '[{"input": str, "outputs": str}, ...]'
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} must hold a list of prompts, {form}")
    prompts = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("input"), str):
            raise ValueError(f"{path}: prompt {number} has no text 'input'; the form is {form}")
        outputs = entry.get("outputs", "")
        if not isinstance(outputs, str):
            raise ValueError(
                f"{path}: 'outputs' of prompt {number} must be a text, got {outputs!r}"
            )
        if not entry["input"].strip():
            raise ValueError(f"{path}: 'input' of prompt {number} is empty")
        prompts.append(Prompt(entry["input"], outputs))
    return prompts


def hidden_facts(
    tokenizer: Any, tokens: int, depths: Sequence[float], *, seed: int = 0
) -> list[Prompt]:
    """Prompts of about `tokens` tokens of prose, each with a fact hidden at one of the depths."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    prompts = []
    for number, depth in enumerate(depths):
        needle = make_needle(1000 * seed + number)
        text = haystack(needle, tokens, depth, count_tokens, seed=1000 * seed + number)
        prompts.append(Prompt(text, needle.answer))
    return prompts


class _StepTimes(StoppingCriteria):
    """Stops nothing; notes when each new token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments = [finished_at(device)]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.moments.append(finished_at(self.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def text_demo(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_new_tokens: int,
    attentions: Sequence[str],
    config: RetroConfig | None = None,
    offload: bool = False,
    compile_step: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Result]:
    """Continues prompts by `model.generate`, greedily, and looks for the expected outputs.

    Args:
        model: on its device.
        tokenizer: the model's, padding on the left.
        prompts: what to continue.
        batch_size: prompts at once.
        max_new_tokens: tokens to write, at least 2.
        attentions: "dense", "retro" or both.
        config: budgets and sizes of retro; None: the defaults.
        offload: keep retro's KV stores in slow memory behind page caches, see `RetroCache`.
        compile_step: compile retro's decode step.
        progress: told about every batch.

    Raises:
        ValueError: a number is out of range, or a prompt is longer than the model reads.
        MemoryError: as `check_batch`, of the largest batch.
    """
    if batch_size < 1 or max_new_tokens < 2:
        raise ValueError(
            "batch size must be at least 1 and new tokens at least 2, "
            f"got {batch_size} and {max_new_tokens}"
        )
    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    encoded = []
    limit = longest_context(model.config)
    for batch in batches:
        inputs = tokenizer([p.input for p in batch], return_tensors="pt", padding=True)
        tokens = inputs.input_ids.shape[1]
        if limit is not None and tokens + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {tokens} tokens and {max_new_tokens} new ones exceed the "
                f"{limit} tokens that the model reads; shorten the prompt"
            )
        encoded.append(inputs.to(model.device))
    rows, tokens = max((each.input_ids.shape for each in encoded), key=math.prod)
    check_batch(
        model,
        rows,
        tokens + max_new_tokens,
        attentions=attentions,
        config=config,
        offload=offload,
    )
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True
    results = []
    for attention in attentions:
        result = Result(attention, questions=sum(bool(p.outputs) for p in prompts))
        steps: list[float] = []
        use = PageUse()
        for number, (batch, inputs) in enumerate(zip(batches, encoded, strict=True)):
            rows, tokens = inputs.input_ids.shape
            progress(f"{attention}: reading {tokens:,} tokens", number, len(batches))
            cache = make_cache(
                model,
                attention,
                batch_size=rows,
                max_length=tokens + max_new_tokens,
                config=config,
                offload=offload,
            )
            times = _StepTimes(model.device)
            with torch.inference_mode():
                ids = model.generate(
                    **inputs,
                    past_key_values=cache,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([times]),
                    compile_config=compile_config if compile_step else None,
                    disable_compile=not compile_step,
                )
            seconds = [end - begin for begin, end in itertools.pairwise(times.moments)]
            result.prefill_seconds += seconds[0]
            result.build_seconds += _build_seconds(cache)
            steps += seconds[1:]
            result.kv_bytes_per_token = kv_bytes_per_token(cache, rows)
            if offload and isinstance(cache, RetroCache):
                use.add(cache)
            answers = tokenizer.batch_decode(ids[:, tokens:], skip_special_tokens=True)
            for prompt, answer in zip(batch, answers, strict=True):
                result.right += bool(prompt.outputs) and prompt.outputs.strip() in answer
                result.answers.append(answer)
        progress(f"{attention}: done", len(batches), len(batches))
        if offload and attention == "retro":
            result.note_pages(use)
        result.first_step_seconds = steps[0] if steps else 0.0
        result.step_milliseconds = 1e3 * statistics.median(steps[1:] or steps or [0.0])
        results.append(result)
    return results


def _build_seconds(cache: Any) -> float:
    return float(cache.stats()["build_seconds"]) if isinstance(cache, RetroCache) else 0.0
