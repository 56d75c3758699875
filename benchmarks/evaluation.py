"""What evaluations share: questions, a file of finished answers, and a model that answers."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel

import retro_ops
from retro_ops import RetroConfig
from retro_ops.models.generate import PageUse, make_cache

PREFILL_CHUNK = 1024
"""Tokens of a prompt that dense attention takes at once. A padded batch has a mask of all of its
tokens by all keys, which does not fit in memory for a whole prompt."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt, and what is known of its answer."""

    task: str
    length: int
    """Tokens that prompt and answer have room for."""
    index: int
    """Which sample of its task and length."""
    ids: Tensor
    """`[T]` int32: the prompt."""
    new_tokens: int
    """That the answer may have."""
    answers: tuple[str, ...]
    """Those that are right."""
    classes: tuple[str, ...] = ()
    """Of a choice: all there are."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end an answer, if not its first one, besides those of the model."""

    @property
    def name(self) -> str:
        """It and no other question of an evaluation."""
        return f"{self.task}/{self.length}/{self.index}"

    def digest(self) -> str:
        """Of all that decides the answer."""
        digest = hashlib.sha256(self.ids.numpy().tobytes())
        digest.update(repr((self.new_tokens, self.stop_ids)).encode())
        return digest.hexdigest()[:16]


class PromptForm:
    """Turns texts into token ids, in the form that a model was trained on.

    Args:
        tokenizer: the model's.
        chat: put the text into the tokenizer's chat template; None: if it has one.

    Raises:
        ValueError: a chat template is wanted where there is none.
    """

    def __init__(self, tokenizer: Any, chat: bool | None = None) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ValueError("the tokenizer has no chat template; leave --chat out")
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat

    def encode(self, prompt: str, prefix: str = "", *, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt and the beginning of its answer.

        Args:
            prompt: in a chat, what the user says.
            prefix: in a chat, what the assistant has said already.
            chat: this once.
        """
        if self.chat if chat is None else chat:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            # The template has the special tokens already.
            return self._ids(text + prefix, add_special_tokens=False)
        return self._ids(f"{prompt}\n{prefix}" if prefix else prompt)

    def _ids(self, text: str, **arguments: Any) -> list[int]:
        # A batch of one: tokenizers let other threads run while they work on a batch.
        return list(self.tokenizer([text], **arguments)["input_ids"][0])


def run_settings(
    model: str, dtype: str, attention: str, config: RetroConfig, offload: bool = False
) -> dict[str, Any]:
    """What answers depend on besides the question.

    And whether retro was offloaded: answers should not depend on it, which only those that an
    offloaded run gave itself can show.
    """
    from retro_ops.benchmarks import machine

    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "attention": attention,
        "torch": torch.__version__,
    }
    if attention == "retro":
        settings |= {
            "retro_ops": retro_ops.__version__,
            "commit": machine.commit(),
            "config": asdict(config),
        }
        if offload:  # or left out: files from before there was a choice stay valid
            settings["offload"] = True
    return settings


class Records:
    """Finished answers in a JSON-lines file, so that a run that was cut off goes on.

    A line is taken for a question if its settings and the digest of its prompt are the same.

    Args:
        path: appended to; made if it is not there.

    Raises:
        ValueError: the file has a line that this class did not write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self.dropped = 0
        """Bytes of an unfinished line at the end, which are removed."""
        text = path.read_bytes() if path.exists() else b""
        complete, _, rest = text.rpartition(b"\n")
        if rest:
            # The process ended while it wrote.
            self.dropped = len(rest)
            with path.open("r+b") as file:
                file.truncate(len(text) - len(rest))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                record = json.loads(line)
                record["settings"], record["name"], record["digest"], record["prediction"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number}: not an answer of an earlier run; give another --out"
                ) from error
            self.lines.append(record)

    def predictions(
        self, settings: dict[str, Any], questions: Sequence[Question]
    ) -> dict[str, str]:
        """By name, what was answered to those of the questions that were asked before."""
        settings = json.loads(json.dumps(settings))
        digests = {question.name: question.digest() for question in questions}
        return {
            record["name"]: record["prediction"]
            for record in self.lines
            if record["settings"] == settings and digests.get(record["name"]) == record["digest"]
        }

    def add(
        self, settings: dict[str, Any], questions: Sequence[Question], predictions: Sequence[str]
    ) -> None:
        """Writes answers down."""
        with self.path.open("a", encoding="utf-8") as file:
            for question, prediction in zip(questions, predictions, strict=True):
                record = {
                    "settings": settings,
                    "name": question.name,
                    "digest": question.digest(),
                    "tokens": len(question.ids),
                    "answers": question.answers,
                    "prediction": prediction,
                }
                self.lines.append(json.loads(json.dumps(record)))
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Answerer:
    """A model with one kind of attention that answers batches of questions, greedily.

    Dense attention is transformers' sdpa with a DynamicCache. Retro attention keeps one cache for
    all batches, so that a compiled step serves them all.

    Args:
        model, attention, config, offload: as in `make_cache`.
        tokenizer: the model's, padding on the left.
        batch_size: questions at once.
        max_length: tokens of the longest prompt with its answer.
        compile_step: compile the step of retro attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        attention: str,
        *,
        batch_size: int,
        max_length: int,
        config: RetroConfig | None = None,
        offload: bool = False,
        compile_step: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.attention = attention
        self.batch_size = batch_size
        self._new_cache = lambda rows: make_cache(
            model,
            attention,
            batch_size=rows,
            max_length=max_length,
            config=config,
            offload=offload,
        )
        self._cache: Any = None if attention == "dense" else self._new_cache(batch_size)
        self._compile = compile_step and attention == "retro"
        self.page_use = PageUse() if offload and attention == "retro" else None
        """Of all batches so far."""

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[str]:
        """What the model writes, one text for each question.

        Args:
            questions: at most `batch_size`, all with the same `new_tokens` and `stop_ids`.

        Raises:
            ValueError: the batch does not fit in the memory of the device.
            MemoryError: retro's cache has no room, there or in the host's memory.
        """
        (new_tokens,) = {question.new_tokens for question in questions}
        (stop_ids,) = {question.stop_ids for question in questions}
        rows = list(questions)
        if self._cache is not None:
            # Its number of rows is fixed; what the repeated ones write is left out.
            rows += rows[-1:] * (self.batch_size - len(rows))
        ids, mask = self._pad([question.ids for question in rows])
        try:
            out = self._generate(ids, mask, new_tokens, stop_ids)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(rows)} rows of {ids.shape[1]:,} tokens do not fit in the memory of the "
                "device; give a smaller --batch-size"
            ) from error
        if self.page_use is not None:
            self.page_use.add(self._cache)
        written = out[: len(questions), ids.shape[1] :]
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def _generate(
        self, ids: Tensor, mask: Tensor, new_tokens: int, stop_ids: tuple[int, ...]
    ) -> Tensor:
        cache = self._cache
        if cache is None:
            cache = self._new_cache(len(ids))
        else:
            cache.reset()
        arguments: dict[str, Any] = {}
        if stop_ids:
            own = self.model.generation_config.eos_token_id
            own = [] if own is None else [own] if isinstance(own, int) else own
            arguments |= {"eos_token_id": [*own, *stop_ids], "min_new_tokens": 1}
        if self.attention == "dense":
            arguments["prefill_chunk_size"] = PREFILL_CHUNK
        compile_config = CompileConfig(fullgraph=True)
        compile_config._compile_all_devices = True
        return self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            compile_config=compile_config if self._compile else None,
            disable_compile=not self._compile,
            **arguments,
        )

    def _pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Ids and mask `[B, T]` int64, padded on the left."""
        tokens = max(map(len, rows))
        ids = torch.full((len(rows), tokens), self.tokenizer.pad_token_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(rows):
            ids[row, tokens - len(own) :] = own
            mask[row, tokens - len(own) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


@dataclass
class Outcome:
    """All answers of one kind of attention."""

    attention: str
    predictions: dict[str, str] = field(default_factory=dict)
    """By name of the question."""
    reused: int = 0
    """Of them, those of an earlier run."""
    seconds: float = 0.0
    """That the others took, compilation included."""
    page_use: PageUse | None = None
    """Of the others, if they were given offloaded."""


def mean_score(scores: Sequence[float]) -> dict[str, float | int | None]:
    """Of scores in 0..1, one for each sample: their number, their mean in per cent, its error."""
    error = 100 * statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {
        "samples": len(scores),
        "score": 100 * statistics.fmean(scores),
        "standard_error": error,
    }


def ask(
    load: Callable[[], PreTrainedModel],
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    name: str,
    dtype: str,
    attentions: Sequence[str],
    batch_size: int,
    config: RetroConfig,
    offload: bool = False,
    compile_step: bool,
    records: Records,
    progress: Progress = lambda what, done, total: None,
) -> list[Outcome]:
    """Asks every question with every kind of attention, but for those answered before.

    Args:
        load: gives the model on its device; called if there is a question left to ask.
        tokenizer: the model's, padding on the left.
        questions: of any length. A batch has questions of one length and one `new_tokens`.
        name, dtype: the model's, for the records.
        attentions: "dense", "retro" or both.
        batch_size: questions at once.
        config: budgets and sizes of retro.
        offload: keep retro's KV stores in slow memory behind page caches, see `RetroCache`.
        compile_step: compile retro's decode step.
        records: answers of earlier runs; gets those of this one.
        progress: told about every batch.

    Raises:
        ValueError: a question is longer than the model reads, or a batch than memory.
        MemoryError: as `Answerer.answer`.
    """
    model: PreTrainedModel | None = None
    outcomes = []
    for attention in attentions:
        settings = run_settings(name, dtype, attention, config, offload)
        outcome = Outcome(attention, records.predictions(settings, questions))
        outcome.reused = len(outcome.predictions)
        outcomes.append(outcome)
        left = [question for question in questions if question.name not in outcome.predictions]
        progress(f"{attention}: {outcome.reused} answers are there", outcome.reused, len(questions))
        if not left:
            continue
        if model is None:
            records.path.touch()  # that it cannot be written is said now
            progress(f"loading {name}", 0, 1)
            model = load()
            _check_length(model, left)
        begin = time.perf_counter()
        rows = min(batch_size, len(left))
        answerer = Answerer(
            model,
            tokenizer,
            attention,
            batch_size=rows,
            max_length=max(len(question.ids) + question.new_tokens for question in left),
            config=config,
            offload=offload,
            compile_step=compile_step,
        )
        outcome.page_use = answerer.page_use
        for batch in _batches(left, rows):
            done = len(outcome.predictions)
            what = f"{attention}: {batch[0].task}, {batch[0].length:,} tokens"
            progress(what, done, len(questions))
            predictions = answerer.answer(batch)
            records.add(settings, batch, predictions)
            outcome.predictions |= {
                question.name: prediction
                for question, prediction in zip(batch, predictions, strict=True)
            }
        outcome.seconds = time.perf_counter() - begin
        progress(f"{attention}: done", len(questions), len(questions))
    return outcomes


def _check_length(model: PreTrainedModel, questions: Sequence[Question]) -> None:
    limit = model.config.get_text_config().max_position_embeddings
    longest = max(questions, key=lambda question: len(question.ids) + question.new_tokens)
    needed = len(longest.ids) + longest.new_tokens
    if needed > limit:
        raise ValueError(
            f"{longest.task} of {needed:,} tokens exceeds the {limit:,} that the model reads; "
            "give a smaller --context"
        )


def _batches(questions: Sequence[Question], rows: int) -> Iterator[list[Question]]:
    """Questions of one length and one length of answers; the others keep their order."""
    kinds: dict[tuple[Any, ...], list[Question]] = {}
    for question in questions:
        kind = (question.length, question.new_tokens, question.stop_ids)
        kinds.setdefault(kind, []).append(question)
    for same in kinds.values():
        for first in range(0, len(same), rows):
            yield same[first : first + rows]
