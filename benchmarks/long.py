"""A long answer, one compiled step a token: whether it stays as fast and as exact."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from retro_ops import RetroConfig, RetroLayer
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.decode import QUERY_HEADS, check, make_layer, make_rows
from retro_ops.benchmarks.timing import Timing, synchronize
from retro_ops.testing import dense_attention, make_query, relative_error

COLUMNS = (
    *("dtype", "keys", "batch", "tokens", "ms", "us", "us_20", "us_80", "updates", "graphs"),
    *("prompt_us", "error", "worst_error", "prompt_error", "prompt_worst_error"),
)
"""What a table shows of a row; the machine is in its title."""
CHECKED_STEPS = 64


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
            f"bench long: tokens must be a multiple of window, and window at least "
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
