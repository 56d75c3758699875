"""Trains a recall model from scratch on one GPU.

    python -m retro_ops.models.recall.train OUT          # recalls up to 32K tokens
    python -m retro_ops.models.recall.train OUT --long   # up to 128K

Sequences grow from 64 tokens on, each time a length has been learned: among six records a model
soon finds out that keys are to be looked for, among thousands never. Three quarters of a sequence
are a body with records, of a density that differs from row to row; the rest are questions about it,
and only their answers are learned. A model that falls apart, which one of this kind does now and
then, goes on from before; one that does not find out at all gives way to another.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from retro_ops.models.recall.task import (
    FILLER,
    KEYS,
    QUESTION,
    RECORD_TOKENS,
    TOKENS_PER_RECORD,
    VALUES,
    make_task,
)

TOKENS_PER_STEP = 1 << 18
LENGTHS = (64, 256, 1024, 4096, 16384, 32768)
"""Tokens of a sequence, one after another."""
SECONDS = 460
"""Of training; the last length gets what the others leave."""
LONG_LENGTHS = (*LENGTHS, 65536, 131072)
LONG_SECONDS = 840
LEARNED = 0.95
"""Of answers right: the next length follows."""
PATIENCE = 90
"""Seconds within which the first length is learned; else training begins anew, with other weights.
Which weights find out soon, nobody knows: some take 50 seconds, some 200."""
FIRST_RATE, LAST_RATE = 1e-3, 4e-4
"""Of learning, in between by a cosine."""
WARM_UP_STEPS = 100
AVERAGED_STEPS = 20
FALLEN = 0.3
"""Of right answers fewer than at best with a length: the model goes on from its best."""
SLOWEST = 0.25
"""Each time it does, the rate for this length is halved, down to this factor."""
LOWEST_DENSITY = 0.02
FEWEST_RECORDS = 12
"""Of a row, however short: among few records a model guesses, and never learns to look for keys."""
SPARE_KEYS = 1.5
"""Of rows with few keys: pairs of them for each record. Where keys are many and records few, one
half of a pair tells which record is meant, and a model learns to look at that half only."""
QUESTION_TOKENS = 5


def make_model() -> LlamaForCausalLM:
    """The model of the task: 3 million parameters, random weights.

    Layers add nothing at first. Otherwise what they add would drown the embeddings, which are
    small, and by which keys are told apart.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=262144,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            rms_norm_eps=1e-6,
        )
    )
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def distinct_pairs(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Random numbers below 256, `[rows, count, 2]`; no row has a pair twice.

    A permutation of 65,536 numbers for each row would be large; a Feistel network with random
    tables is one too, and is computed where it is needed.
    """
    device = generator.device
    index = torch.arange(count, device=device).expand(rows, count)
    left, right = index // 256, index % 256
    for _ in range(4):
        table = torch.randint(256, (rows, 256), generator=generator, device=device)
        left, right = right, left ^ table.gather(1, right)
    return torch.stack((left, right), dim=2)


def key_pairs(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Keys of records, `[rows, count, 2]`; no row has a pair twice.

    Half of the rows have few keys, so that many records share the first or the second one.
    """
    device = generator.device
    side = math.ceil(math.sqrt(SPARE_KEYS * count))
    number = torch.rand(rows, side * side, generator=generator, device=device).argsort(dim=1)
    number = number[:, :count]
    some = torch.rand(rows, 2, len(KEYS), generator=generator, device=device).argsort(dim=2)
    few = [
        some[:, half].gather(1, place) for half, place in enumerate((number // side, number % side))
    ]
    chosen = torch.rand(rows, 1, 1, generator=generator, device=device) < 0.5
    many = distinct_pairs(rows, count, generator)
    return KEYS.start + torch.stack(few, dim=2).where(chosen, many)


def make_batch(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences `[B, T]`, and the places `[B, Q, 2]` before the answers' tokens.

    Rows differ in density, evenly on a logarithmic scale from `LOWEST_DENSITY`, or more where that
    would be less than `FEWEST_RECORDS`, to 1, a record wherever there is room for one: every batch
    has all of it, so that steps do not pull in different directions, and their losses can be
    compared.

    Args:
        tokens: T.
        generator: of the device.
    """
    device = generator.device
    rows = TOKENS_PER_STEP // tokens
    body_tokens = tokens // 4 * 3
    slots = body_tokens // TOKENS_PER_RECORD
    offset = torch.rand(1, generator=generator, device=device)
    sparseness = (torch.arange(rows, device=device) + offset) / rows
    lowest = min(max(LOWEST_DENSITY, FEWEST_RECORDS / slots), 1)
    records = (slots * lowest**sparseness).round().long()  # of each row

    ids = torch.randint(
        FILLER.start, FILLER.stop, (rows, tokens), generator=generator, device=device
    )
    keys = key_pairs(rows, slots, generator)
    values = torch.randint(
        VALUES.start, VALUES.stop, (rows, slots, 2), generator=generator, device=device
    )
    order = torch.rand(rows, slots, generator=generator, device=device).argsort(dim=1)
    within = torch.randint(
        TOKENS_PER_RECORD - RECORD_TOKENS + 1, (rows, slots), generator=generator, device=device
    )
    place = TOKENS_PER_RECORD * order + within
    place = (place[..., None] + torch.arange(RECORD_TOKENS, device=device)).flatten(1)
    there = torch.arange(slots, device=device) < records[:, None]
    text = torch.cat((keys, values), dim=2).flatten(1)
    filler = ids.gather(1, place)
    ids.scatter_(1, place, text.where(there.repeat_interleave(RECORD_TOKENS, dim=1), filler))

    questions = (tokens - body_tokens) // QUESTION_TOKENS
    asked = torch.rand(rows, questions, generator=generator, device=device) * records[:, None]
    asked = asked.long().minimum(records[:, None] - 1)[..., None].expand(rows, questions, 2)
    mark = torch.full((rows, questions, 1), QUESTION, device=device)
    text = torch.cat((mark, keys.gather(1, asked), values.gather(1, asked)), dim=2)
    ids[:, body_tokens : body_tokens + QUESTION_TOKENS * questions] = text.flatten(1)
    first = body_tokens + QUESTION_TOKENS * torch.arange(questions, device=device)
    answers = (first[:, None] + torch.tensor([2, 3], device=device)).expand(rows, questions, 2)
    return ids, answers


@dataclass
class Progress:
    """Right answers at one length, and what to do about them."""

    right: float = 0.0
    """Share of answers, averaged over about twenty steps."""
    best: float = 0.0
    steps: int = 0

    @property
    def learned(self) -> bool:
        """Whether so many are right that the next length may follow."""
        return self.steps >= AVERAGED_STEPS and self.right > LEARNED

    def add(self, right: float) -> str:
        """Counts a step: "fallen", "best" (worth keeping), or ""."""
        self.steps += 1
        self.right += (right - self.right) * max(1 / AVERAGED_STEPS, 1 / self.steps)
        if self.steps < AVERAGED_STEPS:
            return ""
        if self.right < self.best - FALLEN:
            return "fallen"
        if self.right > self.best + 0.01:
            self.best = self.right
            return "best"
        return ""


def _new(device: torch.device) -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=FIRST_RATE, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    return model, optimizer


def train(
    device: torch.device, lengths: tuple[int, ...], seconds: float, seed: int = 0
) -> LlamaForCausalLM:
    """A trained model; prints a line now and then.

    Args:
        lengths: of sequences, in tokens, each to be learned before the next one.
        seconds: in all.
        seed: of weights and sequences.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model, optimizer = _new(device)
    begin, next_line, step, began = time.perf_counter(), 0.0, 0, 0.0
    to_come = list(lengths)
    tokens, slower, progress = to_come.pop(0), 1.0, Progress()
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    while (now := time.perf_counter() - begin) < seconds:
        if tokens == lengths[0] and now - began > PATIENCE:
            print(f"{now:6.0f} s, {step} steps: {progress.right:.1%} right, begins anew")
            model, optimizer = _new(device)
            began, step, slower, progress = now, 0, 1.0, Progress()
        rate = LAST_RATE + (FIRST_RATE - LAST_RATE) * (1 + math.cos(math.pi * now / seconds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = slower * rate * min((step + 1) / WARM_UP_STEPS, 1)
        ids, answers = make_batch(tokens, generator)
        with torch.autocast(device.type, torch.bfloat16):
            hidden = model.model(ids, use_cache=False).last_hidden_state
            flat = answers.flatten(1)
            asked = hidden.gather(1, flat[..., None].expand(*flat.shape, hidden.shape[2]))
            logits = model.lm_head(asked)
        truth = ids.gather(1, flat + 1)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), truth.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if norm.isfinite():  # one step that is not would leave no weight that is
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        what = progress.add(float((logits.argmax(dim=2) == truth).float().mean()))
        line = f"{now:6.0f} s, step {step}, {tokens} tokens"
        if now >= next_line:
            print(f"{line}, loss {loss:.3f}, {progress.right:.1%} on average")
            next_line = now + 20
        if what == "best":
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        elif what == "fallen":
            slower = max(slower / 2, SLOWEST)
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(copy.deepcopy(kept[1]))
            print(f"{line}: fallen to {progress.right:.1%}, back to its best")
            progress = Progress(best=progress.best)
        if progress.learned and to_come:
            print(f"{line}: learned, {progress.right:.1%} right")
            tokens, slower, progress = to_come.pop(0), 1.0, Progress()
    return model.eval()


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokens: int, records: int) -> float:
    """Share of up to 64 questions, all asked in one context, whose answers are right."""
    questions = min(records, 64)
    task = make_task(tokens, records, questions, seed=1)
    text = torch.cat((task.questions, task.answers), dim=2).flatten(1)
    ids = torch.cat((task.body, text), dim=1).to(model.device)
    hidden = model.model(ids, use_cache=False).last_hidden_state[:, tokens:]
    logits = model.lm_head(hidden.view(questions, QUESTION_TOKENS, -1)[:, 2:4])
    right = logits.argmax(dim=2).cpu() == task.answers[0]
    return float(right.all(dim=1).float().mean())


def main() -> None:
    """Trains, measures and saves."""
    parser = argparse.ArgumentParser(description="Train a recall model.")
    parser.add_argument("out", type=Path, help="directory to save to")
    parser.add_argument("--long", action="store_true", help="for 128K tokens instead of 32K")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("training needs a GPU: it takes minutes there and days on a CPU")
    lengths, seconds = (LONG_LENGTHS, LONG_SECONDS) if options.long else (LENGTHS, SECONDS)
    model = train(torch.device("cuda"), lengths, seconds, options.seed).to(torch.bfloat16)
    model.save_pretrained(options.out)
    for tokens in (4096, 16384, 32768, *((65536, 131072) if options.long else ())):
        shares = [accuracy(model, tokens, round(density * tokens / 8)) for density in (0.1, 0.5)]
        print(f"{tokens} tokens, density 0.1 and 0.5: {shares[0]:.2f} and {shares[1]:.2f}")


if __name__ == "__main__":
    main()
