"""What a figure was measured on, and what that machine can do."""

from __future__ import annotations

import datetime
import itertools
import platform
import subprocess
from pathlib import Path

import torch

import retro_ops
from retro_ops.benchmarks.timing import time_in_turn

COPY_BYTES = 1 << 28
"""Larger than any cache."""


def facts(device: torch.device) -> dict[str, str]:
    """Machine, versions, commit and date, for every row."""
    return {
        "machine": name(device),
        "threads": str(torch.get_num_threads()) if device.type == "cpu" else "",
        "kernels": torch.ops.retro.cpu_kernels("") if device.type == "cpu" else "cuda",
        "torch": torch.__version__,
        "retro_ops": retro_ops.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def name(device: torch.device) -> str:
    """The model of a processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def copy_gb_per_s(device: torch.device) -> float:
    """Bandwidth of copying a large tensor, bytes read and written counted."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turn(device, {"copy": lambda: target.copy_(source)}, rounds=15)["copy"]
    return 2 * COPY_BYTES / timing.median_us / 1e3


def host_gb_per_s(device: torch.device) -> float:
    """Bandwidth of copying from the host's memory to a device; of a CPU, of reading its own."""
    if device.type != "cuda":
        return copy_gb_per_s(device) / 2
    source = torch.ones(COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(6)]
    for mark in marks:
        mark.record()
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    fastest = min(one.elapsed_time(next_) for one, next_ in itertools.pairwise(marks))
    return COPY_BYTES / fastest / 1e6


def commit() -> str:
    """The commit of the checkout, with + if it has changes; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True
    )
    return described.stdout.strip()
