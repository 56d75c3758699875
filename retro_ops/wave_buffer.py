"""The wave buffer of an offloaded layer: a page cache in fast memory in front of the KV store.

Each tensor has one writer: `page_gather` writes what it looks up and what it reports,
`update_pages` its memory and its decisions. Neither waits for the other.

On a GPU the store, and what the host reads or writes between steps, are memory of the host that the
GPU sees as its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retro_ops.config import RetroConfig
from retro_ops.ops._contract import DecisionHeader, FreeHeader, RequestHeader

if TYPE_CHECKING:
    from retro_ops.layer import RetroLayer

NAMES = ("pages", "page_table", "free_pages", "decisions", "requests", "cached", "history")
ON_HOST = ("store", "decisions", "requests", "cached", "history")
"""Of an offloaded layer on a GPU, what is host memory."""
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def page_capacity(config: RetroConfig, tokens: int) -> int:
    """Pages of the cache of one row and KV head, for a store of `tokens` tokens."""
    return math.ceil(config.cache_ratio * tokens / config.page_size)


def shapes(
    config: RetroConfig,
    groups: tuple[int, int],
    tokens: int,
    clusters: int,
    max_retrieved: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Shapes:
    """The buffers of `NAMES`.

    Args:
        groups: B, Hkv.
        tokens, clusters: N and C, what the index can hold.
        max_retrieved: R.
        head_dim, dtype: of keys and values.
    """
    count = page_capacity(config, tokens)
    return {
        "pages": ((2, *groups, count * config.page_size, head_dim), dtype),
        "page_table": ((*groups, tokens // config.page_size + clusters), torch.int32),
        "free_pages": ((*groups, len(FreeHeader) + count), torch.int32),
        "decisions": ((*groups, len(DecisionHeader) + count), torch.int32),
        "requests": ((*groups, len(RequestHeader) + max_retrieved), torch.int32),
        "cached": ((*groups, clusters), torch.uint8),
        "history": ((*groups, clusters + 1, 2), torch.int64),
    }


def clear(layer: RetroLayer) -> None:
    """Empties the page cache and forgets what was retrieved when."""
    clear_buffers({name: layer.get_buffer(name) for name in NAMES})


def clear_buffers(buffers: Mapping[str, Tensor]) -> None:
    """`clear`, of the buffers of `NAMES`."""
    buffers["page_table"].fill_(-1)
    for name in ("decisions", "requests", "cached", "history"):
        buffers[name].zero_()
    free = buffers["free_pages"]
    count = free.shape[2] - len(FreeHeader)
    free[:, :, FreeHeader.STEP] = 0
    free[:, :, FreeHeader.COUNT] = count
    free[:, :, len(FreeHeader) :] = torch.arange(count, dtype=torch.int32, device=free.device)


def bytes_of(shapes: Shapes) -> int:
    """Bytes of buffers."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())


def allocate(shapes: Shapes, device: torch.device, layers: int) -> dict[str, Tensor]:
    """The buffers of an offloaded layer on a GPU; those of `ON_HOST` in host memory.

    Everything is zero.

    Args:
        shapes: of all buffers.
        layers: such layers that are still to be made, this one included; there must be room for
            all of them.

    Raises:
        MemoryError: there is not; nothing is allocated then, or given back.
    """
    check_room(shapes, device, layers)
    buffers: dict[str, Tensor] = {}
    try:
        for name, (shape, dtype) in shapes.items():
            if name not in ON_HOST:
                buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
                continue
            buffers[name] = host_tensor(shape, dtype, device)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        buffers.clear()
        raise MemoryError(
            f"RetroLayer: offload=True on {device} found no memory, though there seemed to be "
            f"enough: {str(error).splitlines()[0]}"
        ) from None
    return buffers


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pinned memory of the host as a tensor of a GPU; zeros. On a CPU, any memory."""
    tensor: Tensor = torch.ops.retro.host_tensor(
        torch.empty(0, dtype=dtype, device=device), list(shape)
    )
    return tensor


def check_room(shapes: Shapes, device: torch.device, layers: int) -> None:
    """Raises MemoryError unless host and GPU have room for the buffers of so many layers."""
    needed = {True: 0, False: 0}
    for name, (shape, dtype) in shapes.items():
        needed[name in ON_HOST] += layers * math.prod(shape) * dtype.itemsize
    for where, bytes_, free in (
        ("host memory", needed[True], free_host_bytes()),
        (f"memory of {device}", needed[False], free_device_bytes(device)),
    ):
        if bytes_ > free:
            raise MemoryError(
                f"RetroLayer: offload=True needs {bytes_ / 1e9:.2f} GB of {where} for {layers} "
                f"layer{'s' * (layers > 1)}, {free / 1e9:.2f} GB are free; make max_length or the "
                "batch smaller"
            )


def free_device_bytes(device: torch.device) -> int:
    """Bytes that torch can still allocate on a GPU, those that it keeps for reuse included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_bytes() -> int:
    """Bytes of host memory that this process can still get: the machine's, or its cgroup's.

    Where the system is not Linux, all memory of the machine.
    """
    if not MEMINFO.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
    free = 1024 * int(meminfo["MemAvailable"].split()[0])
    return min([free, *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """What cgroups leave this process, where they limit memory; file caches count as free."""
    for limit, usage, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most = (CGROUPS / limit).read_text().strip()
            used = int((CGROUPS / usage).read_text())
            stats = dict(line.split() for line in (CGROUPS / stat).read_text().splitlines())
        except OSError:  # there is no such group
            continue
        if most != "max":
            yield max(int(most) - used + int(stats.get(cached, 0)), 0)


@dataclass
class _Writes:
    """What a stream beside copies from a GPU's memory to a store in the host's."""

    staged: Tensor
    done: torch.cuda.Event | None = None


_writes: dict[tuple[torch.device, int, int], _Writes] = {}
"""By device, stream that steps run on and thread: each has one layer at a time on its way."""
_beside: dict[torch.device, torch.cuda.Stream] = {}


def _steps_of(device: torch.device) -> tuple[torch.device, int, int]:
    # All threads have the same default stream.
    thread = threading.get_ident()
    if device.type != "cuda":
        return device, 0, thread
    return device, torch.cuda.current_stream(device).cuda_stream, thread


def stages(layer: RetroLayer) -> bool:
    """Whether a prompt goes to `stage`d memory of the GPU first, and to the store with `write`."""
    device = layer.store.device
    if not layer.offload or device.type == "cpu" or torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def stage(store: Tensor, tokens: int) -> Tensor:
    """Memory of the GPU for the first tokens of a store, `[2, B, Hkv, tokens, D]`.

    It is the same from layer to layer, and may be written to at once: what the layer before has put
    there has arrived by then.
    """
    shape = (*store.shape[:3], tokens, store.shape[4])
    before = _arrived(store.device)
    if before is None or before.staged.shape != shape or before.staged.dtype != store.dtype:
        del before
        with torch.inference_mode(False):  # or only inference mode could write to it
            before = _Writes(torch.empty(shape, dtype=store.dtype, device=store.device))
    _writes[_steps_of(store.device)] = before
    return before.staged


def write(store: Tensor) -> None:
    """What was `stage`d goes to the store, while the next layer computes; see `finish_writes`."""
    writes = _writes[_steps_of(store.device)]
    if store.device.type != "cuda":
        load_store(store, writes.staged)
        return
    if store.device not in _beside:
        _beside[store.device] = torch.cuda.Stream(store.device)
    beside = _beside[store.device]
    beside.wait_stream(torch.cuda.current_stream(store.device))
    with torch.cuda.stream(beside):
        load_store(store, writes.staged)
        writes.done = beside.record_event()


def finish_writes(device: torch.device) -> None:
    """What comes on the current stream of `device` sees all that was written; nothing is staged."""
    _arrived(device)


def _arrived(device: torch.device) -> _Writes | None:
    """What was on its way, no longer kept; what comes on the current stream waits for it."""
    writes = _writes.pop(_steps_of(device), None)
    if writes is not None and writes.done is not None:
        torch.cuda.current_stream(device).wait_event(writes.done)
    return writes


def copy_rows(target: Tensor, source: Tensor, axis: int, rows: list[int]) -> None:
    """Row i of `target` becomes row `rows[i]` of another tensor, without a copy of them all."""
    for place, row in enumerate(rows):
        target.select(axis, place).copy_(source.select(axis, row))


def reorder_store(store: Tensor, rows: Tensor) -> None:
    """Row i of `[2, B, Hkv, N, D]` becomes what row `rows[i]` was, one head after another."""
    for half in store:
        for head in half.unbind(1):
            head.copy_(head.index_select(0, rows))


def store_on_cpu(store: Tensor) -> Tensor:
    """A copy of `[2, B, Hkv, N, D]`, one row and head after another."""
    there = torch.empty(store.shape, dtype=store.dtype)
    _copy_heads(there, store)
    return there


def load_store(store: Tensor, given: Tensor) -> None:
    """`store[:, :, :, :n]` becomes `given` `[2, B, Hkv, n, D]`, one row and head after another."""
    _copy_heads(store[:, :, :, : given.shape[3]], given)


def _copy_heads(target: Tensor, source: Tensor) -> None:
    for half in range(2):
        for row in range(source.shape[1]):
            for head in range(source.shape[2]):
                target[half, row, head].copy_(source[half, row, head])
