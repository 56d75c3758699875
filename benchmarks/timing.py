"""Times calls in turn, so that all of them see the same machine."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_BYTES = 1 << 28
"""Read between two timed calls on a GPU; more than any GPU's L2 cache.

Reading empties the cache as a model's weights do between two layers. Writing would fill it with
lines that the timed call must then wait for to be written back.
"""


def no_room(error: BaseException) -> str | None:
    """Why something did not run for want of memory, for a row of figures; None: for another reason.

    Args:
        error: a MemoryError (of a check before anything is allocated), or what torch raises where
            an allocation fails: torch.OutOfMemoryError on a GPU, RuntimeError on the host.
    """
    if isinstance(error, MemoryError):
        return f"does not fit in memory: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit in memory"
    asked = re.search(r"allocate memory: you tried to allocate (\d+) bytes", str(error))
    if asked:
        return f"does not fit in memory: {int(asked[1]) / 1e9:,.1f} GB at once"
    # A size that no 64 bits can hold; pinned memory, torch's and ours.
    lacks = (
        *("Storage size calculation overflowed", "cudaHostAlloc", "out of memory"),
        "host_tensor: no room",
    )
    return "does not fit in memory" if any(words in str(error) for words in lacks) else None


def memory_note(error: Exception) -> str:
    """What `no_room` says of an error; raises it anew if it is for another reason."""
    note = no_room(error)
    if note is None:
        raise error
    return note


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, and the quantiles that 20 and 80 % of calls stay under."""

    median_us: float
    low_us: float
    high_us: float

    @staticmethod
    def of(microseconds: list[float]) -> Timing:
        points = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        return Timing(*torch.tensor(microseconds).double().quantile(points).tolist())


def time_in_turn(
    device: torch.device, calls: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, Timing]:
    """Times every call once in each round, after three rounds of warm-up.

    On a GPU each call is captured as a CUDA graph and its replays are timed by events, with the L2
    cache flushed before each. On a CPU the calls in between are what clears the caches.

    Args:
        device: where the calls run.
        calls: by name.
        rounds: timings of each.
    """
    for _ in range(3):
        for call in calls.values():
            call()
    if device.type == "cuda":
        return _time_graphs(device, calls, rounds)
    microseconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            microseconds[name].append(1e6 * (time.perf_counter() - begin))
    return {name: Timing.of(times) for name, times in microseconds.items()}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish; a CPU has when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """Frees graphs, and the memory that they and a cache had."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_steps(
    device: torch.device, step: Callable[[], object], *, rounds: int, warm_up: int = 5
) -> Timing:
    """Times steps that follow one another, as decoding does; compilation and warm-up come before.

    Args:
        device: where the step runs.
        step: one step; graphs that it needs are its own affair.
        rounds: timed steps.
        warm_up: steps before them.
    """
    microseconds = []
    for round_ in range(warm_up + rounds):
        synchronize(device)
        begin = time.perf_counter()
        step()
        synchronize(device)
        if round_ >= warm_up:
            microseconds.append(1e6 * (time.perf_counter() - begin))
    return Timing.of(microseconds)


def _time_graphs(
    device: torch.device, calls: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Timing]:
    graphs = {}
    for name, call in calls.items():
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs[name] = graph
    flush = torch.zeros(L2_BYTES // 4, dtype=torch.int32, device=device)
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, graph in graphs.items():
            flush.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            if round_ >= 3:
                marks[name].append((begin, end))
    torch.cuda.synchronize(device)
    return {
        name: Timing.of([1e3 * begin.elapsed_time(end) for begin, end in pairs])
        for name, pairs in marks.items()
    }
