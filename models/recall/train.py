"""Trains a recall model from scratch on one GPU.

    python -m retro_ops.models.recall.train OUT          # recalls up to 32K tokens
    python -m retro_ops.models.recall.train OUT --long   # up to 128K

Sequences grow from 64 tokens on, each time a length has been learned: among six records a model
soon finds out that keys are to be looked for, among thousands never. Three quarters of a sequence
are a body with records, of a density that differs from row to row; the rest are questions about it,
and only their answers are learned. Weights of the layers learn by Muon, which finds this out sooner
than AdamW.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import (
    cross_entropy,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)
from transformers import LlamaConfig, LlamaForCausalLM

from retro_ops.models.load import BUILT_IN
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
SECONDS = 240
"""Of training on an H100; the last length gets what the others leave."""
LONG_LENGTHS = (*LENGTHS, 65536, 131072)
LONG_SECONDS = 360
LEARNED = 0.95
"""Of answers right: the next length follows."""
FIRST_RATE, LAST_RATE = 1e-3, 5e-5
"""Of learning."""
STEADY = 0.6
"""Of the time the rate stays, then it falls in a straight line."""
WARM_UP_STEPS = 100
STEPS_BETWEEN = 5
"""Steps between two readings of loss and accuracy, each of which waits for the GPU."""
LOWEST_DENSITY = 0.02
FEWEST_RECORDS = 12
"""Of a row, however short: among few records a model guesses, and never learns to look for keys."""
SPARE_KEYS = 1.5
"""Of rows with few keys: pairs of them for each record. Where keys are many and records few, one
half of a pair tells which record is meant, and a model learns to look at that half only."""
QUESTION_TOKENS = 5
HEAD_DIM = 64
RMS_NORM_EPS = 1e-6
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
"""Of attention, the fastest first (cuDNN, by half). Others would need memory for all scores."""


def make_model() -> LlamaForCausalLM:
    """The model of the task: 3 million parameters, random weights.

    Layers add nothing at first. Otherwise what they add would drown the embeddings, which are
    small, and by which keys are told apart.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=RMS_NORM_EPS,
    )
    config.retro_ops_task = "recall"  # so that `demo` and `bench` know what to ask
    model = LlamaForCausalLM(config)
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


def spread_positions(tokens: int, rows: int, span: int, generator: torch.Generator) -> Tensor:
    """Positions of the tokens of sequences, `[B, T]`, as if filler between records were left out.

    Otherwise a model that learns with short sequences finds records by dimensions that turn too
    fast for long ones. Records and questions stay in one piece. How much is left out is random for
    each row, evenly on a logarithmic scale: nothing, or up to `span` tokens with those that stay.

    Args:
        tokens: T.
        rows: B.
        span: tokens of the longest sequence that is stood for.
        generator: of the device.
    """
    device = generator.device
    place = torch.arange(tokens, device=device)
    body_tokens = tokens // 4 * 3
    records = body_tokens // TOKENS_PER_RECORD
    questions = -(-(tokens - body_tokens) // QUESTION_TOKENS)  # and what is left behind them
    question = records + (place - body_tokens) // QUESTION_TOKENS
    piece = (place // TOKENS_PER_RECORD).where(place < body_tokens, question)
    share = torch.rand(rows, 1, generator=generator, device=device)
    left_out = tokens * (max(span / tokens, 1.0) ** share - 1)
    ahead = (
        torch.rand(rows, records + questions, generator=generator, device=device).sort(dim=1).values
    )
    return place + (left_out * ahead).long().gather(1, piece.expand(rows, tokens))


@torch.compile(dynamic=False)
def _before_attention(
    hidden: Tensor, norm: Tensor, weights: list[Tensor], cosine: Tensor, sine: Tensor
) -> list[Tensor]:
    """Queries, keys and values, each `[N, heads, D]`, of `[N, C]`."""
    normed = rms_norm(hidden, norm.shape, norm, RMS_NORM_EPS)
    states = [linear(normed, weight).unflatten(1, (-1, HEAD_DIM)) for weight in weights]
    for number in (0, 1):  # queries and keys turn with their positions
        left, right = states[number].chunk(2, dim=2)
        turned = states[number] * cosine + torch.cat((-right, left), dim=2) * sine
        states[number] = turned.to(states[number].dtype)
    return states


@torch.compile(dynamic=False)
def _after_attention(
    hidden: Tensor, attended: Tensor, norm: Tensor, weights: list[Tensor]
) -> Tensor:
    """What a layer hands on, `[N, C]`."""
    out, gate, up, down = weights
    hidden = hidden + linear(attended, out)
    normed = rms_norm(hidden, norm.shape, norm, RMS_NORM_EPS)
    return hidden + linear(silu(linear(normed, gate)) * linear(normed, up), down)


def hidden_states(model: LlamaForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """What `model.model(ids, position_ids=positions)` returns, `[B, T, C]`, at twice its speed.

    All but attention takes the tokens of all rows as one, so that whatever the length there is one
    shape to compile for. (Without an attention mask transformers takes a jump of positions for the
    beginning of another sequence.)
    """
    hidden = model.model.embed_tokens(ids.flatten())
    turns = model.model.rotary_emb(hidden, positions.flatten()[None])
    cosine, sine = (turn[0, :, None] for turn in turns)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        before = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        after = [attention.o_proj.weight]
        after += [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
        states = _before_attention(hidden, layer.input_layernorm.weight, before, cosine, sine)
        queries, keys, values = (state.unflatten(0, ids.shape).transpose(1, 2) for state in states)
        with sdpa_kernel(BACKENDS, set_priority=True):
            attended = scaled_dot_product_attention(
                queries, keys, values, is_causal=True, enable_gqa=True
            )
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        norm = layer.post_attention_layernorm.weight
        hidden = _after_attention(hidden, attended, norm, after)
    return model.model.norm(hidden).unflatten(0, ids.shape)


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.05),
    ]


def learn(
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    ids: Tensor,
    answers: Tensor,
    positions: Tensor,
    rate: float,
) -> Tensor:
    """One step. Returns `[3]`: the loss, the share of the answers' tokens that were right, and the
    norm of the gradient.

    Args:
        model: that learns.
        optimizers: of all its weights.
        ids, answers: a batch of `make_batch`.
        positions: of its tokens, `[B, T]`.
        rate: of learning.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = hidden_states(model, ids, positions)
        flat = answers.flatten(1)
        asked = hidden.gather(1, flat[..., None].expand(*flat.shape, hidden.shape[2]))
        logits = model.lm_head(asked)
    truth = ids.gather(1, flat + 1)
    loss = cross_entropy(logits.float().flatten(0, 1), truth.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    right = (logits.argmax(dim=2) == truth).float().mean()
    return torch.stack((loss.detach(), right, norm))


def train(
    device: torch.device, lengths: tuple[int, ...], seconds: float, seed: int = 0
) -> tuple[LlamaForCausalLM, int]:
    """A trained model, and the length that it had come to; prints a line now and then.

    Args:
        device: a GPU.
        lengths: of sequences, in tokens, each to be learned before the next one.
        seconds: in all.
        seed: of weights and sequences.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    model = make_model().to(device)
    optimizers = make_optimizers(model)
    stage = step = 0
    begin, next_line = time.perf_counter(), 0.0
    while (now := time.perf_counter() - begin) < seconds:
        tokens = lengths[stage]
        figures = []
        for _ in range(STEPS_BETWEEN):
            step += 1
            falling = min((1 - now / seconds) / (1 - STEADY), 1)
            rate = LAST_RATE + (FIRST_RATE - LAST_RATE) * falling
            rate *= min(step / WARM_UP_STEPS, 1)
            # With the last length only, a model would forget the others.
            rehearsed = [lengths[step % stage]] if stage else []
            for length in (*rehearsed, tokens):
                ids, answers = make_batch(length, generator)
                positions = spread_positions(length, len(ids), lengths[-1], generator)
                figure = learn(model, optimizers, ids, answers, positions, rate)
            figures.append(figure)
        loss, right, norm = torch.stack(figures).mean(dim=0).tolist()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} within {step} steps: try another seed"
            )
        learned = right > LEARNED and tokens < lengths[-1]
        if learned or now >= next_line:
            print(f"{now:6.0f} s, step {step}, {tokens} tokens: loss {loss:.4f}, {right:.2%} right")
            next_line = now + 20
        if learned:
            stage += 1
    return model.eval(), lengths[stage]


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


def _make_directory(path: Path) -> None:
    """For the model, before the work and not after it.

    Raises:
        ValueError: why it cannot be.
    """
    if str(path) in BUILT_IN:
        raise ValueError(f"{str(path)!r} is the name of a built-in model: take another one")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{str(path)!r} is there already: take another name")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make {str(path)!r}: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"{str(path)!r} may not be written to")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, saves and measures.

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        0; 1 if time ran out before the last length, or a gradient is not finite.
    """
    parser = argparse.ArgumentParser(
        prog="python -m retro_ops.models.recall.train",
        description="Train a recall model on one GPU, in 12 GiB of its memory (measured: H100).",
    )
    parser.add_argument("out", type=Path, help="directory to write, a new one")
    parser.add_argument("--long", action="store_true", help="for 128K tokens instead of 32K")
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of training; more for a slower GPU than an H100 ({SECONDS}; --long: {LONG_SECONDS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("training needs a GPU: it takes minutes there and days on a CPU")
    if torch.cuda.get_device_capability() < (8, 0):
        parser.error("training needs a GPU of compute capability 8.0 or later, for bfloat16")
    lengths, seconds = (LONG_LENGTHS, LONG_SECONDS) if options.long else (LENGTHS, SECONDS)
    if options.seconds is not None:
        seconds = options.seconds
    if not seconds > 0:
        parser.error(f"--seconds must be more than 0, got {seconds}")
    try:
        _make_directory(options.out)
    except ValueError as error:
        parser.error(str(error))
    try:
        model, reached = train(torch.device("cuda"), lengths, seconds, options.seed)
    except FloatingPointError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    model = model.to(torch.bfloat16)
    model.save_pretrained(options.out)
    for tokens in (4096, 16384, 32768, *((65536, 131072) if options.long else ())):
        shares = [accuracy(model, tokens, round(density * tokens / 8)) for density in (0.1, 0.5)]
        print(f"{tokens} tokens, density 0.1 and 0.5: {shares[0]:.2f} and {shares[1]:.2f}")
    if reached < lengths[-1]:
        print(
            f"{parser.prog}: time ran out at {reached} of {lengths[-1]} tokens; "
            "more --seconds help",
            file=sys.stderr,
        )
        return 1
    print(f"python -m retro_ops demo --model {shlex.quote(str(options.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
