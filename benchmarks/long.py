"""A long answer, one compiled step a token: whether it stays as fast and as exact.

`run` decodes with one layer, `run_model` with a whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from retro_ops import RetroConfig, RetroLayer
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.decode import QUERY_HEADS, check, make_layer, make_rows
from retro_ops.benchmarks.prefill import make_model
from retro_ops.benchmarks.recordings import token_ids
from retro_ops.benchmarks.timing import Timing, synchronize
from retro_ops.models import RetroCache, load_model, load_tokenizer
from retro_ops.models.generate import Decoder, make_cache
from retro_ops.models.recall import is_recall, make_task
from retro_ops.models.shapes import SHAPES
from retro_ops.testing import dense_attention, make_query, relative_error

COLUMNS = (
    *("dtype", "keys", "batch", "tokens", "ms", "us", "us_20", "us_80", "updates", "graphs"),
    *("prompt_us", "error", "worst_error", "prompt_error", "prompt_worst_error"),
)
"""What a table shows of a row; the machine is in its title."""
MODEL_COLUMNS = (
    *("model", "dtype", "batch", "tokens", "ms", "us", "us_20", "us_80", "growth_us", "merge_us"),
    *("updates", "graphs", "error", "kl", "top1", "prompt_error", "prompt_kl", "prompt_top1"),
    *("first_us", "last_us"),
)
CHECKED_STEPS = 64
SPARE = 64
"""Steps behind the answer, by which its speed is compared with that at its beginning."""


def decode(layer: RetroLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What is compiled."""
    return layer.decode(query, key, value)


def _timed(
    step: Callable[..., Tensor], layer: RetroLayer, arguments: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Tensor], list[float]]:
    """Outputs and microseconds of steps that follow one another, without another graph."""
    outs, microseconds = [], []
    device = layer.store.device
    with torch._dynamo.config.patch(error_on_recompile=True):
        for given in arguments:
            synchronize(device)
            begin = time.perf_counter()
            outs.append(step(layer, *given))
            synchronize(device)
            microseconds.append(1e6 * (time.perf_counter() - begin))
    return outs, microseconds


def run(
    *,
    device: torch.device,
    prompt: int,
    tokens: int,
    window: int,
    batch_size: int,
    dtype: torch.dtype,
    kind: str,
    config: RetroConfig,
) -> Iterator[dict[str, object]]:
    """A row of figures for every `window` tokens of the answer.

    `ms` is the mean of all steps of the window, those that index a segment included; `us` is their
    median. Errors are those of the last `CHECKED_STEPS` outputs against dense attention, median
    and worst. `prompt_...` are of the same steps, had all tokens before them been a prompt.

    Args:
        device: where the layer lives.
        prompt: tokens that are prefilled.
        tokens: decoded after them, a multiple of `window`.
        window: tokens.
        batch_size: rows.
        dtype, kind: of keys, as in `make_kv`.
        config: budgets and sizes.

    Raises:
        ValueError: `tokens` is no multiple of `window`.
        RuntimeError: a step needed a second graph.
    """
    if window < CHECKED_STEPS or tokens % window:
        raise ValueError(
            "tokens must be a multiple of window, and window at least "
            f"{CHECKED_STEPS}, got {tokens} and {window}"
        )
    check(device, dtype)
    facts = machine.facts(device)
    keys, values = make_rows(batch_size, prompt + tokens, kind, dtype, device)
    layer = make_layer(config, keys)
    layer.prefill(keys[:, :, :prompt], values[:, :, :prompt])
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(decode, fullgraph=True)
    # Compiles; a step of an empty layer of the same sizes is the same graph.
    spare = make_layer(config, keys)
    compiled(spare, make_query(keys, QUERY_HEADS), keys[:, :, :1].clone(), values[:, :, :1].clone())
    for first in range(prompt, prompt + tokens, window):
        last = first + window
        steps = [
            (
                make_query(keys[:, :, :t], QUERY_HEADS, seed=t),
                keys[:, :, t : t + 1].clone(),
                values[:, :, t : t + 1].clone(),
            )
            for t in range(first, last)
        ]
        outs, microseconds = _timed(compiled, layer, steps)
        timing = Timing.of(microseconds)
        as_prompt = make_layer(config, keys)
        checked = last - CHECKED_STEPS
        as_prompt.prefill(keys[:, :, :checked], values[:, :, :checked])
        fresh, fresh_microseconds = _timed(compiled, as_prompt, steps[-CHECKED_STEPS:])
        exact = []
        for t in range(checked, last):
            seen = keys[:, :, : t + 1].double(), values[:, :, : t + 1].double()
            exact.append(dense_attention(steps[t - first][0].double(), *seen))
        errors, fresh_errors = (
            torch.tensor(list(map(relative_error, each, exact)))
            for each in (outs[-CHECKED_STEPS:], fresh)
        )
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "keys": kind,
            "batch": batch_size,
            "tokens": last,
            "ms": sum(microseconds) / window / 1e3,
            "us": timing.median_us,
            "us_20": timing.low_us,
            "us_80": timing.high_us,
            "prompt_us": Timing.of(fresh_microseconds).median_us,
            "updates": layer.stats()["updates"] // batch_size,
            "graphs": counters["stats"]["unique_graphs"] - before,
            "error": errors.median().item(),
            "worst_error": errors.max().item(),
            "prompt_error": fresh_errors.median().item(),
            "prompt_worst_error": fresh_errors.max().item(),
            **facts,
        }


def load(
    name: str, *, dtype: torch.dtype, device: torch.device, rows: int, tokens: int
) -> tuple[PreTrainedModel, Tensor]:
    """A model and ids `[B, T]` to feed it: of prose where it has a tokenizer, else random ones.

    Args:
        name: as in `load_model`, or a shape of `models.shapes` with random weights.
        dtype: of the weights.
        device: of both.
        rows: B.
        tokens: T.
    """
    if name in SHAPES:
        model: PreTrainedModel = make_model(SHAPES[name](), dtype, device)
    else:
        model = load_model(name, dtype=dtype, device=device)
    if name in SHAPES:
        vocabulary = model.config.vocab_size
        ids = torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0))
    elif is_recall(name):
        ids = make_task(tokens, tokens // 16, 1, batch_size=rows).body
    else:
        ids = token_ids(load_tokenizer(name), "prose", tokens, rows=rows)
    return model, ids.to(device)


def run_model(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    name: str,
    prompt: int,
    window: int,
    config: RetroConfig,
) -> Iterator[dict[str, object]]:
    """A row of figures for every `window` tokens that a model is fed after its prompt.

    The tokens are given, not the model's own, so that dense attention can be asked about the same
    ones. Distributions of the next token are compared after the last `CHECKED_STEPS` steps of a
    window, and in a first row after the first ones that follow the prompt: relative error of the
    logits, mean Kullback-Leibler divergence from dense to retro attention in nats, and how often
    both would choose the same token. `prompt_...` are of the same steps, had all tokens before them
    been a prompt. `growth_us` is the median of the steps in which the index of the first layer
    grew, `merge_us` of those in which its latest segments also became one; no two layers grow in
    the same step. Models of random weights say nothing about fidelity:
    their attention weighs noise. In the last row `first_us` and `last_us` are steps right after the
    prompt and at the end of the answer, timed in turn.

    Args:
        model: on its device.
        ids: `[B, T]` int64: the prompt, and a multiple of `window` tokens more.
        name: of the model, for the rows.
        prompt: tokens that are prefilled.
        window: tokens.
        config: budgets and sizes.

    Raises:
        ValueError: the tokens after the prompt are no multiple of `window`, or none.
        RuntimeError: a step needed a second graph.
    """
    rows, tokens = ids.shape
    answer = tokens - prompt
    if window < 2 * CHECKED_STEPS or answer < window or answer % window:
        raise ValueError(
            "tokens must be a multiple of window, and window at least "
            f"{2 * CHECKED_STEPS}, got {answer} and {window}"
        )
    facts = machine.facts(model.device)
    # After so many tokens each: the last steps of a row of figures.
    ends = [prompt + CHECKED_STEPS, *range(prompt + window, tokens + 1, window)]
    dense = _dense_logits(model, ids, ends)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    decoder = Decoder(
        model, "retro", batch_size=rows, max_length=tokens + SPARE, config=config, compile_step=True
    )
    assert isinstance(decoder.cache, RetroCache)
    decoder.prefill(ids[:, :prompt])
    layer = decoder.cache.retro_layers[0].retro
    assert layer is not None
    logits: list[Tensor] = []
    # Microseconds of the steps in which the first layer grew, and of those in which it also merged.
    growth: dict[bool, list[float]] = {False: [], True: []}
    done, updates = prompt, 0
    for end, expected in zip(ends, dense, strict=True):
        first_step = len(decoder.step_seconds)
        for t in range(done, end):
            with torch._dynamo.config.patch(error_on_recompile=t > prompt):
                out = decoder.step(ids[:, t, None])
            if t >= end - CHECKED_STEPS:
                logits.append(out.float().cpu())
            grown = int(layer.stats()["updates"])
            if grown > updates:
                merged = config.merged_updates > 1 and grown % (config.merged_updates * rows) == 0
                growth[merged].append(1e6 * decoder.step_seconds[-1])
            updates = grown
        done = end
        # The first step of all compiles, the next ones record the graph.
        steps = [1e6 * s for s in decoder.step_seconds[first_step + (5 if end == ends[0] else 0) :]]
        timing = Timing.of(steps)
        fresh = Decoder(model, "retro", batch_size=rows, max_length=tokens + SPARE, config=config)
        fresh.prefill(ids[:, : end - CHECKED_STEPS])
        as_prompt = [
            fresh.step(ids[:, t, None]).float().cpu() for t in range(end - CHECKED_STEPS, end)
        ]
        fidelity = {
            **_fidelity(torch.stack(logits, dim=1), expected),
            **{
                f"prompt_{key}": value
                for key, value in _fidelity(torch.stack(as_prompt, dim=1), expected).items()
            },
        }
        yield {
            "model": name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch": rows,
            "tokens": end,
            "ms": sum(steps) / len(steps) / 1e3,
            "us": timing.median_us,
            "us_20": timing.low_us,
            "us_80": timing.high_us,
            "growth_us": Timing.of(growth[False]).median_us if growth[False] else None,
            "merge_us": Timing.of(growth[True]).median_us if growth[True] else None,
            "updates": updates // rows,
            "graphs": counters["stats"]["unique_graphs"] - before,
            **fidelity,
            **(_in_turn(decoder, model, ids, prompt, config) if end == tokens else {}),
            **facts,
        }
        logits, growth = [], {False: [], True: []}


def _in_turn(
    decoder: Decoder, model: PreTrainedModel, ids: Tensor, prompt: int, config: RetroConfig
) -> dict[str, float]:
    """Microseconds of steps now, and of steps right after the prompt, one after the other."""
    rows, tokens = ids.shape
    start = Decoder(
        model, "retro", batch_size=rows, max_length=tokens + SPARE, config=config, compile_step=True
    )
    start.prefill(ids[:, :prompt])
    for t in range(SPARE):
        decoder.step(ids[:, t, None])
        start.step(ids[:, t, None])
    now, then = (
        Timing.of([1e6 * s for s in each.step_seconds[-SPARE // 2 :]]) for each in (decoder, start)
    )
    return {"last_us": now.median_us, "first_us": then.median_us}


def _fidelity(logits: Tensor, dense: Tensor) -> dict[str, float]:
    log_dense, log_retro = dense.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    kl = (log_dense.exp() * (log_dense - log_retro)).sum(dim=-1)
    same = log_dense.argmax(dim=-1) == log_retro.argmax(dim=-1)
    return {
        "error": relative_error(logits, dense),
        "kl": kl.mean().item(),
        "top1": same.float().mean().item(),
    }


@torch.inference_mode()
def _dense_logits(model: PreTrainedModel, ids: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """Logits `[B, CHECKED_STEPS, V]` of the tokens that follow the last ones before each end."""
    cache = make_cache(model, "dense", batch_size=ids.shape[0], max_length=ids.shape[1])
    logits, done = [], 0
    for end in ends:
        out = model(input_ids=ids[:, done:end], past_key_values=cache, logits_to_keep=CHECKED_STEPS)
        logits.append(out.logits.float().cpu())
        done = end
    return logits
