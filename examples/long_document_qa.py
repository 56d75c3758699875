"""Several questions about one long document, which the model reads only once.

The document is read into a RetroCache, which is saved to a file; each question goes on from a fork
of it. Another call about the same document loads the file instead of reading again.

    python examples/long_document_qa.py                  # prose with three facts hidden in it
    python examples/long_document_qa.py report.txt --question "The report was written by"
    python examples/long_document_qa.py --model recall   # token ids instead of text

The default model, Gemma 3 270M, completes text: put a question as a sentence to complete.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from retro_ops.models import RetroCache, load_model, load_tokenizer
from retro_ops.models.prose import make_needle, prose
from retro_ops.models.recall import is_recall, make_task


class Task(NamedTuple):
    """Token ids of a document `[1, T]` and of questions `[1, t]`, and what the answers should be
    ("": unknown)."""

    document: Tensor
    questions: list[Tensor]
    answers: list[str]
    new_tokens: int
    as_text: Callable[[Tensor], str]


def read_text(options: argparse.Namespace) -> Task:
    """The document and questions that the user names, or prose with three facts in it."""
    tokenizer = load_tokenizer(options.model)
    if options.document:
        text, questions = options.document.read_text("utf-8"), options.question
        answers = [""] * len(questions)
    else:
        needles, paragraph = [make_needle(seed) for seed in range(3)], prose(0)
        paragraphs = [paragraph() for _ in range(options.tokens // 100)]
        for number, needle in enumerate(needles):
            paragraphs.insert(len(paragraphs) * (2 * number + 1) // 6, needle.fact)
        text = "\n\n".join(paragraphs)
        questions, answers = [n.question for n in needles], [n.answer for n in needles]
    ids = [
        tokenizer(f"\n\n{question}", add_special_tokens=False, return_tensors="pt").input_ids
        for question in questions
    ]
    document = tokenizer(text, return_tensors="pt").input_ids
    return Task(document, ids, answers, options.new_tokens, tokenizer.decode)


def make_records(options: argparse.Namespace) -> Task:
    """Records in filler, which recall models read: their tokens are numbers, not text."""
    body, questions, answers = make_task(options.tokens, max(options.tokens // 16, 3), 3)
    asked = [questions[:, number] for number in range(3)]
    expected = [str(pair) for pair in answers[0].tolist()]
    return Task(body, asked, expected, 2, lambda ids: str(ids.tolist()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the document, or loads what was saved of it, and prints an answer to each question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path, nargs="?", help="a text file (made-up prose)")
    parser.add_argument("--question", action="append", default=[], help="may be given again")
    parser.add_argument("--model", default="gemma", help="name or directory (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="about, if made up (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=12, help="of an answer (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "retro_ops_documents",
        help="for saved caches (%(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    made = is_recall(options.model)
    if bool(options.document) != bool(options.question) or (made and options.document):
        parser.error("a document needs --question, --question a document; recall models read none")
    try:
        task = make_records(options) if made else read_text(options)
        length = task.document.shape[1]
        room = length + max(question.shape[1] for question in task.questions) + task.new_tokens
        model = load_model(options.model, context=room)
        document = task.document.to(model.device)
        key = hashlib.sha256(f"{options.model} {task.document.tolist()}".encode()).hexdigest()[:16]
        file = options.folder / f"{key}.safetensors"
        begin = time.perf_counter()
        if not file.exists():
            cache = RetroCache(model.config, max_cache_len=room)
            with torch.inference_mode():
                model(document, past_key_values=cache, logits_to_keep=1)
            options.folder.mkdir(parents=True, exist_ok=True)
            cache.save(file)
            print(f"read {length:,} tokens in {time.perf_counter() - begin:.1f} s, kept in {file}")
        else:
            cache = RetroCache.load(file, model.config, max_cache_len=room, device=model.device)
            print(f"loaded {length:,} tokens in {time.perf_counter() - begin:.1f} s from {file}")
        for question, answer in zip(task.questions, task.answers, strict=True):
            begin = time.perf_counter()
            ids = torch.cat((document, question.to(model.device)), dim=1)
            out = model.generate(
                ids,
                past_key_values=cache.fork(),  # the cache itself stays as it is after the document
                max_new_tokens=task.new_tokens,
                do_sample=False,
            )
            written = task.as_text(out[0, ids.shape[1] :])
            print(f"{task.as_text(question[0]).strip()} -> {written.strip()!r}", end="")
            print(f" (expected: {answer})" if answer else "", end="")
            print(f", {time.perf_counter() - begin:.1f} s")
    except (OSError, ValueError, MemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
