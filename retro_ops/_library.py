"""Loads the op libraries: schemas and CPU kernels, and CUDA kernels where they were built."""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def find_library(stem: str) -> Path | None:
    """The compiled library `stem` beside this file, or None where it was not built."""
    candidates = sorted(_PACKAGE.glob(f"{stem}.*so")) + sorted(_PACKAGE.glob(f"{stem}.*pyd"))
    return candidates[0] if candidates else None


def load() -> None:
    """Registers the ops with torch.

    Raises:
        ImportError: the CPU library is missing.
    """
    library = find_library("_C")
    if library is None:
        raise ImportError(
            f"retro_ops: no compiled op library in {_PACKAGE}; build it with "
            "`pip install --no-build-isolation -e .` in the checkout"
        )
    torch.ops.load_library(str(library))
    cuda_library = find_library("_C_cuda")
    if cuda_library is not None and torch.version.cuda is not None:
        torch.ops.load_library(str(cuda_library))


load()
