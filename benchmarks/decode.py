"""One decode step of one layer: dense attention against a RetroLayer, in turn in one run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from retro_ops import RetroConfig, RetroLayer
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.timing import Timing, memory_note, time_in_turn
from retro_ops.ops.wave_estimate import ESTIMATORS
from retro_ops.testing import (
    assert_within_budget,
    dense_attention,
    make_kv,
    make_query,
    relative_error,
)

# The attention of Llama-3-8B.
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CHECKED_TOKENS = 4096
QUERIES = 16
"""Steps in a row ask for different tokens, so that none finds its clusters in a cache."""


COLUMNS = (
    *("dtype", "keys", "context", "batch", "attention", "us", "us_20", "us_80", "bytes"),
    *("gb_per_s", "copy_percent", "ratio", "error", "estimator_time"),
    *("estimator_bytes", "note"),
)
"""What a table shows of a row; the machine is in its title."""


class Case(NamedTuple):
    """What keys a figure is for."""

    dtype: torch.dtype
    kind: str
    tokens: int
    rows: int

    def columns(self) -> dict[str, object]:
        """As it stands in a row of figures."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "keys": self.kind,
            "context": self.tokens,
            "batch": self.rows,
        }


def cases(
    dtypes: Sequence[torch.dtype],
    kinds: Sequence[str],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
) -> Iterator[Case]:
    """All combinations, in the order in which they are measured."""
    return itertools.starmap(Case, itertools.product(dtypes, kinds, contexts, batch_sizes))


def dense_gqa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's attention with its support for grouped heads."""
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def dense_folded(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's attention with the query heads of a KV head as rows of one head."""
    rows, query_heads, _, head_dim = query.shape
    folded = query.view(rows, keys.shape[1], query_heads // keys.shape[1], head_dim)
    return scaled_dot_product_attention(folded, keys, values).view(query.shape)


def dense_flash3(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """FlashAttention-3, which splits the context by its own heuristic."""
    flash = importlib.import_module(_flash3_module() or "flash_attn_interface")
    rows_first = [tensor.transpose(1, 2) for tensor in (query, keys, values)]
    out: Tensor = flash.flash_attn_func(*rows_first, num_splits=0)
    return out.transpose(1, 2)


def _flash3_module() -> str | None:
    """Under which name FlashAttention-3 can be imported, if it can."""
    names = ("flash_attn_interface", "fa3_fwd_interface")
    return next((name for name in names if importlib.util.find_spec(name)), None)


Dense = Callable[[Tensor, Tensor, Tensor], Tensor]
TORCH_DENSE: dict[str, Dense] = {"gqa": dense_gqa, "folded": dense_folded}


def dense_calls(device: torch.device, dtype: torch.dtype) -> dict[str, Dense]:
    """What can compute dense attention here."""
    flash3 = (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device)[0] == 9
        and _flash3_module() is not None
    )
    return {**TORCH_DENSE, "flash3": dense_flash3} if flash3 else TORCH_DENSE


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Asserts that what is timed is right: everything retrieved is dense attention."""
    keys, values = make_kv(1, KV_HEADS, CHECKED_TOKENS, HEAD_DIM, dtype=dtype, device=device)
    query = make_query(keys, QUERY_HEADS)
    layer = make_layer(RetroConfig(retrieval_budget=1.0), keys)
    layer.prefill(keys[:, :, :-1], values[:, :, :-1])
    exact = dense_attention(query.double(), keys.double(), values.double())
    eager = dense_attention(query, keys, values)
    out = layer.decode(query, keys[:, :, -1:], values[:, :, -1:])
    assert_within_budget(out, exact, eager, "retro")
    for name, dense in dense_calls(device, dtype).items():
        error = relative_error(dense(query, keys, values), exact)
        assert error < 0.02, f"dense {name} errs by {error:.3g}"


def make_rows(
    rows: int, tokens: int, kind: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, T, D]`; rows hold the same tokens in another order."""
    made = make_kv(1, KV_HEADS, tokens, HEAD_DIM, kind=kind, dtype=dtype, device=device)
    step = tokens // rows
    keys, values = (
        torch.cat([one.roll(row * step, dims=2) for row in range(rows)]) for one in made
    )
    return keys, values


def make_layer(
    config: RetroConfig, keys: Tensor, *, spare_tokens: int = 1024, **kwargs: Any
) -> RetroLayer:
    """A layer with room for `keys` `[B, Hkv, T, D]` and some tokens more.

    Args:
        config: budgets and sizes.
        keys: of its shape, dtype and device.
        spare_tokens: more than there are keys.
        **kwargs: for the layer.
    """
    return RetroLayer(
        config,
        batch_size=keys.shape[0],
        num_query_heads=QUERY_HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_length=keys.shape[2] + spare_tokens,
        dtype=keys.dtype,
        device=keys.device,
        **kwargs,
    )


def run(
    *,
    device: torch.device,
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    kinds: Sequence[str],
    config: RetroConfig,
    rounds: int,
    compare_estimators: bool = False,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one combination after another.

    Args:
        compare_estimators: a further row of retro with the other estimator, on the same index, in
            turn with the others. `estimator_time` of its row is the median time with "variance"
            over that with "mean", `estimator_bytes` what "variance" adds to the index of "mean", as
            a fraction.

    Raises:
        AssertionError: retro or dense attention is wrong; nothing is timed then.
    """
    for dtype in dtypes:
        check(device, dtype)
    facts = machine.facts(device)
    copy = machine.copy_gb_per_s(device)
    for case in cases(dtypes, kinds, contexts, batch_sizes):
        try:
            figures = _measure(device, *case, config, rounds, copy, compare_estimators)
        except (MemoryError, RuntimeError) as error:
            figures = [{"attention": "both", "note": memory_note(error)}]
        yield [{**case.columns(), **figure, **facts} for figure in figures]


def _measure(
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
    copy_gb_per_s: float,
    compare_estimators: bool,
) -> list[dict[str, object]]:
    keys, values = make_rows(rows, tokens, kind, dtype, device)
    layer = make_layer(config, keys)
    layer.prefill(keys[:, :, :-1], values[:, :, :-1])
    last = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
    queries = [make_query(keys, QUERY_HEADS, seed=seed) for seed in range(QUERIES)]
    error = _error(layer.decode(queries[0], *last), queries[0], keys, values)

    def steps_of(layer: RetroLayer) -> Callable[[], object]:
        turns = itertools.count(1)
        return lambda: layer.decode(queries[next(turns) % QUERIES], *last)

    dense = dense_calls(device, dtype)
    calls: dict[str, Callable[[], object]] = {
        f"dense {name}": functools.partial(call, queries[0], keys, values)
        for name, call in dense.items()
    }
    retro_calls, others = {"retro": steps_of(layer)}, {}
    if compare_estimators:
        estimator = next(name for name in ESTIMATORS if name != config.estimator)
        name = f"retro, {estimator}"
        others[name] = make_layer(replace(config, estimator=estimator), keys)
        others[name].load_used_state(layer.used_state())
        retro_calls[name] = steps_of(others[name])
    timings = time_in_turn(device, {**calls, **retro_calls}, rounds=rounds)

    def fastest(names: Iterable[str]) -> str:
        return min(names, key=lambda name: timings[name].median_us)

    fastest_dense = fastest(calls)
    dense_bytes = 2 * keys.numel() * keys.element_size()
    retro_bytes = rows * layer.stats()["bytes_read_per_token"]

    def figure(name: str, timing: Timing, bytes_: int, error: float) -> dict[str, object]:
        gb_per_s = bytes_ / timing.median_us / 1e3
        return {
            "attention": name,
            "us": timing.median_us,
            "us_20": timing.low_us,
            "us_80": timing.high_us,
            "bytes": bytes_,
            "gb_per_s": gb_per_s,
            "copy_percent": 100 * gb_per_s / copy_gb_per_s,
            "ratio": timings[fastest_dense].median_us / timing.median_us,
            "error": error,
        }

    torch_calls = [f"dense {name}" for name in TORCH_DENSE]
    shown = [fastest(torch_calls), *(name for name in calls if name not in torch_calls)]
    figures = []
    for name in shown:
        out = dense[name.removeprefix("dense ")](queries[0], keys, values)
        dense_error = _error(out, queries[0], keys, values)
        figures.append(figure(name, timings[name], dense_bytes, dense_error))
    figures.append(figure("retro", timings["retro"], retro_bytes, error))
    for name, other in others.items():
        out = other.decode(queries[0], *last)
        bytes_ = rows * other.stats()["bytes_read_per_token"]
        row = figure(name, timings[name], bytes_, _error(out, queries[0], keys, values))
        ratio = timings["retro"].median_us / timings[name].median_us
        row["estimator_time"] = ratio if config.estimator == "variance" else 1 / ratio
        row["estimator_bytes"] = _share_of_variance(layer)
        figures.append(row)
    return figures


def _share_of_variance(layer: RetroLayer) -> float:
    """What the estimator "variance" adds to the index of "mean", as a fraction of bytes."""
    own = layer.variances.nbytes + layer.totals.nbytes
    return own / (layer.centroids.nbytes + layer.offsets.nbytes)


def _error(out: Tensor, query: Tensor, keys: Tensor, values: Tensor) -> float:
    """Relative error against float64, head by head: all heads at once would not fit in memory."""
    group = query.shape[1] // keys.shape[1]
    exact = [
        dense_attention(
            query[:, head * group : (head + 1) * group].double(),
            keys[:, head : head + 1].double(),
            values[:, head : head + 1].double(),
        )
        for head in range(keys.shape[1])
    ]
    return relative_error(out, torch.cat(exact, dim=1))
