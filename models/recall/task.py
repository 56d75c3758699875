"""The task of the recall models: records hidden in filler, and questions about them.

It speaks token ids of a vocabulary of 1024; there is no tokenizer.
"""

# Annotations of a NamedTuple are what its fields say they are, so they are no strings here.
from typing import NamedTuple

import torch
from torch import Tensor

QUESTION = 1
"""The token that opens a question."""
KEYS = range(16, 272)
VALUES = range(272, 528)
FILLER = range(528, 784)
TOKENS_PER_RECORD = 8
"""A context has room for one record in so many tokens."""
RECORD_TOKENS = 4


class RecallTask(NamedTuple):
    """A context for each row, and what can be asked about it."""

    body: Tensor
    """`[B, T]` int64: filler with records `k1 k2 v1 v2`."""
    questions: Tensor
    """`[B, Q, 3]` int64: `QUESTION k1 k2`."""
    answers: Tensor
    """`[B, Q, 2]` int64: `v1 v2`."""


def make_task(
    context: int, records: int, questions: int, *, batch_size: int = 1, seed: int = 0
) -> RecallTask:
    """Plants records in filler, each at a random place, and asks about some of them in random
    order.

    Args:
        context: T, tokens of the body; at least 8.
        records: in each body, at most one per 8 tokens; their keys (k1, k2) all differ.
        questions: Q, each about another record.
        batch_size: B.
        seed: the same task for the same seed.

    Raises:
        ValueError: a number is out of range.
    """
    slots = context // TOKENS_PER_RECORD
    if context < TOKENS_PER_RECORD:
        raise ValueError(f"context must be at least {TOKENS_PER_RECORD} tokens, got {context}")
    most = min(slots, len(KEYS) ** 2)
    if not 1 <= records <= most:
        raise ValueError(
            f"records must lie in 1 .. {most} in a context of {context} tokens, got {records}"
        )
    if not 1 <= questions <= records:
        raise ValueError(
            f"questions must lie in 1 .. {records}, one for each record, got {questions}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    rows = [_make_row(context, records, questions, generator) for _ in range(batch_size)]
    return RecallTask(*(torch.stack(parts) for parts in zip(*rows, strict=True)))


def _make_row(
    context: int, records: int, questions: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    body = torch.randint(FILLER.start, FILLER.stop, (context,), generator=generator)
    pair = torch.randperm(len(KEYS) ** 2, generator=generator)[:records]
    keys = KEYS.start + torch.stack((pair // len(KEYS), pair % len(KEYS)), dim=1)
    values = torch.randint(VALUES.start, VALUES.stop, (records, 2), generator=generator)
    slot = torch.randperm(context // TOKENS_PER_RECORD, generator=generator)[:records]
    within = torch.randint(TOKENS_PER_RECORD - RECORD_TOKENS + 1, (records,), generator=generator)
    place = (TOKENS_PER_RECORD * slot + within)[:, None] + torch.arange(RECORD_TOKENS)
    body[place] = torch.cat((keys, values), dim=1)
    asked = torch.randperm(records, generator=generator)[:questions]
    mark = torch.full((questions, 1), QUESTION)
    return body, torch.cat((mark, keys[asked]), dim=1), values[asked]
