"""Bytes: what a cache takes, and what there is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retro_ops import RetroLayer

GIB = 1 << 30
HOST = "host"
"""The name of the host's memory, beside "cuda:0" and so on."""


@dataclass(frozen=True)
class Memory:
    """Bytes that are free, or that there are: of the host, and of each GPU by its number."""

    host: int
    devices: tuple[int, ...] = ()

    def of(self, place: str) -> int:
        """Bytes of "host" or of "cuda:0" and so on; 0 for a GPU that is not there."""
        if place == HOST:
            return self.host
        index = int(place.removeprefix("cuda:"))
        return self.devices[index] if index < len(self.devices) else 0


def in_gib(bytes_: int) -> str:
    """Bytes as text, in GiB, or in MiB where there are few."""
    return f"{bytes_ / GIB:,.2f} GiB" if bytes_ >= GIB / 10 else f"{bytes_ / (1 << 20):,.2f} MiB"


def free_memory() -> Memory:
    """What can be allocated now, on all GPUs that are in sight and on the host."""
    gpus = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return Memory(free_on(torch.device("cpu")), tuple(map(free_on, gpus)))


def free_on(device: torch.device) -> int:
    """The same of one device only: asking a GPU takes some of its memory for a CUDA context."""
    return RetroLayer.free_bytes(device)


def place_of(device: torch.device) -> str:
    """In which memory tensors on a device lie."""
    if device.type != "cuda":
        return HOST
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def known_device(who: str, device: Any) -> torch.device:
    """A device that is there, of what a caller gave.

    Args:
        who: begins the message.

    Raises:
        ValueError: it is none, or a GPU that is not there.
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{who}: a device must be one of torch's, as 'cpu' or 'cuda:0', got {device!r}"
        ) from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{who}: there is no device '{place}', torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs; `python -m retro_ops info` says what there is"
        )
    return place


def layer_bytes(layer: Any, keys: Tensor, values: Tensor) -> dict[str, int]:
    """Bytes of a layer's buffers by name, before they are allocated.

    The layer makes them, on the meta device.

    Args:
        layer: of a RetroCache, not initialized; unchanged.
        keys, values: `[B, Hkv, any, D]`; what counts is shapes and dtypes.
    """
    twin = copy.copy(layer)
    twin.lazy_initialization(
        *(
            torch.empty((*tokens.shape[:2], 1, tokens.shape[3]), dtype=tokens.dtype, device="meta")
            for tokens in (keys, values)
        )
    )
    return {name: buffer.nbytes for name, buffer in twin.named_buffers().items()}


def host_buffers(layer: Any) -> tuple[str, ...]:
    """Names of the buffers of a layer on a GPU that are in the host's memory."""
    return RetroLayer.host_buffers if getattr(layer, "offload_store", False) else ()


def lacking(
    need: Mapping[str, int], device: torch.device, *, spread: bool = False
) -> Iterator[tuple[str, int, int]]:
    """Memories that have less free than is needed there: their names, bytes needed, bytes free.

    Args:
        need: bytes by place, "host" or that of `device`.
        device: of the other place.
        spread: over all GPUs, if there are several: then it is the sum of them that has to suffice.
    """
    for where, bytes_ in need.items():
        there = free_on(torch.device("cpu") if where == HOST else device)
        if spread and where != HOST and bytes_ > there and torch.cuda.device_count() > 1:
            there = sum(free_memory().devices)
        if bytes_ > there:
            yield where, bytes_, there


def check_cache(
    layers: Sequence[Any], keys: Tensor, values: Tensor, rows: int, max_length: int
) -> None:
    """Raises MemoryError unless the buffers of all layers of a RetroCache can be allocated.

    Args:
        layers: none of them initialized; all as the first one, whose tokens are `keys` and
            `values`. With several GPUs in sight layers may lie on any: then it is the sum of them
            that has to suffice.
        rows, max_length: for the message.
    """
    place = place_of(keys.device)
    need = {place: 0, HOST: 0}
    for layer in layers:
        for name, bytes_ in layer_bytes(layer, keys, values).items():
            need[HOST if name in host_buffers(layer) else place] += bytes_
    for where, bytes_, there in lacking(need, keys.device, spread=True):
        fits = rows * there // bytes_
        advice = f"batch_size at most {fits}" if fits else "a smaller max_cache_len"
        if where != HOST and not any(host_buffers(layer) for layer in layers):
            advice += ", or offload=True"
        raise MemoryError(
            f"RetroCache: {rows} rows of max_cache_len {max_length:,} tokens need "
            f"{in_gib(bytes_)} on {where}, {in_gib(there)} are free; make it with {advice}"
        )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; one that comes twice counts once."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
