"""Indexing a prompt of one layer, and which op takes the time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.decode import (
    HEAD_DIM,
    KV_HEADS,
    cases,
    check,
    make_layer,
    make_rows,
)
from retro_ops.benchmarks.timing import memory_note, synchronize, time_steps

OPS = ("cluster_keys", "pack_clusters", "append_tokens")
COLUMNS = (
    *("dtype", "keys", "context", "batch", "ms", "ms_20", "ms_80", "clusters", "gflop_per_s"),
    *(f"{op}_percent" for op in OPS),
    "note",
)
"""What a table shows of a row; the machine is in its title."""


def run(
    *,
    device: torch.device,
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    dtypes: Sequence[torch.dtype],
    kinds: Sequence[str],
    config: RetroConfig,
    rounds: int,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one combination after another; see `retro_ops.benchmarks.decode.run`."""
    for dtype in dtypes:
        check(device, dtype)
    facts = machine.facts(device)
    for case in cases(dtypes, kinds, contexts, batch_sizes):
        try:
            figures = _measure(device, *case, config, rounds)
        except (MemoryError, RuntimeError) as error:
            figures = {"note": memory_note(error)}
        yield [{**case.columns(), **figures, **facts}]


class _OpTimes(TorchDispatchMode):
    """Seconds that each op of `OPS` takes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.seconds = dict.fromkeys(OPS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        synchronize(self.device)
        name = func.name().removeprefix("retro::")
        if name in self.seconds:
            self.seconds[name] += time.perf_counter() - begin
        return result


def _measure(
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    tokens: int,
    rows: int,
    config: RetroConfig,
    rounds: int,
) -> dict[str, object]:
    keys, values = make_rows(rows, tokens, kind, dtype, device)
    layer = make_layer(config, keys)

    def build() -> None:
        layer.prefill(keys, values)

    timing = time_steps(device, build, rounds=rounds, warm_up=1)
    for _ in range(2):  # what the timer itself does for the first time is not the build's
        with _OpTimes(device) as times:
            begin = time.perf_counter()
            build()
            whole = time.perf_counter() - begin
    clusters = layer.stats()["clusters"]
    segments = max(round(tokens / config.segment_size), 1)
    # Every pass multiplies each key with each centroid of its segment.
    operations = 2 * tokens * clusters * KV_HEADS * HEAD_DIM / segments * config.kmeans_iterations
    return {
        "ms": timing.median_us / 1e3,
        "ms_20": timing.low_us / 1e3,
        "ms_80": timing.high_us / 1e3,
        "clusters": clusters,
        "gflop_per_s": operations / timing.median_us / 1e3,
        **{f"{op}_percent": 100 * times.seconds[op] / whole for op in OPS},
    }
