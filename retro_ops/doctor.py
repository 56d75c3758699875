"""What is installed, what it runs on, whether every op works here, and what to do where not."""

from __future__ import annotations

import inspect
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import retro_ops
from retro_ops import RetroConfig, RetroLayer, wave_buffer
from retro_ops._library import find_library
from retro_ops.testing import (
    Arguments,
    cpu_kernel_sets,
    dense_attention,
    host_copy,
    make_kv,
    make_query,
    on_device,
    relative_error,
)

OPS = tuple(
    sorted(name for name in retro_ops.__all__ if isinstance(getattr(retro_ops, name), FunctionType))
)
TOLERANCE = 1e-4
"""Relative error of float32 results: rounding, in another order, is a hundredth of it."""
SAME_CLUSTER = 0.98
"""Of the tokens, that go to the cluster of the reference: the others are as near to two."""
# Its index is used from 92 tokens on, and grows every 32.
CONFIG = RetroConfig(
    sink_tokens=4,
    local_tokens=24,
    cluster_size=8,
    segment_size=128,
    update_segment=32,
    min_retrieved_clusters=4,
    page_size=4,
    cache_ratio=0.2,
)
PROMPT, STEPS, HEADS, QUERY_HEADS, HEAD_DIM = 200, 40, 2, 4, 64


@dataclass(frozen=True)
class Check:
    """What one op did on one device.

    Attributes:
        op: its name.
        device: "cpu" with the kernels' name, or "cuda".
        problem: what is wrong; empty: nothing.
    """

    op: str
    device: str
    problem: str


def facts() -> dict[str, str]:
    """Versions, build and machine, by names to print."""
    libraries = {stem: find_library(stem) for stem in ("_C", "_C_cuda")}
    return {
        "retro_ops": retro_ops.__version__,
        "op library": f"{libraries['_C']}, version {torch.ops.retro.library_version()}",
        "CUDA op library": _cuda_library(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "transformers": _version_of("transformers"),
        "triton": _version_of("triton"),
        "numpy": _version_of("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU kernels": f"{torch.ops.retro.cpu_kernels('')} (of {', '.join(cpu_kernel_sets())})",
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "CUDA device": _devices(),
        "C++ compiler": _compiler(),
    }


def hints() -> list[str]:
    """A line for each known problem that is there: what it is, and the remedy."""
    found = []
    built, loaded = torch.ops.retro.library_version(), retro_ops.__version__
    if built != loaded:
        found.append(
            f"the op library is of version {built}, the Python package of {loaded}: build it anew "
            "with `pip install --no-build-isolation -e .`"
        )
    cuda = find_library("_C_cuda")
    if torch.cuda.is_available():
        if cuda is None:
            found.append(
                "there is a GPU, and no CUDA op library: build one where nvcc is, "
                "`CUDA_HOME=/usr/local/cuda pip install --no-build-isolation -e .`"
            )
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            found.append(
                f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; CUDA "
                "kernels are for 8.0 and later: use device='cpu'"
            )
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        found.append(
            "nvidia-smi is there, but torch sees no GPU: look at CUDA_VISIBLE_DEVICES, and whether "
            f"the driver serves CUDA {torch.version.cuda}"
        )
    elif torch.version.cuda is None and shutil.which("nvidia-smi"):
        found.append(
            f"torch {torch.__version__} was built without CUDA, and there is a GPU: install a "
            "torch with CUDA, then retro_ops anew"
        )
    if cuda is not None and torch.version.cuda is None:
        found.append("the CUDA op library is not loaded: torch was built without CUDA")
    if torch.ops.retro.cpu_kernels("") == "portable" and platform.machine() == "x86_64":
        found.append("this CPU has neither AVX2 nor AVX-512: CPU steps are several times slower")
    if not torch.cuda.is_available() and torch.get_num_threads() < (os.cpu_count() or 1):
        found.append(
            f"torch uses {torch.get_num_threads()} of {os.cpu_count()} cores: OMP_NUM_THREADS or "
            "torch.set_num_threads() give it more"
        )
    if shutil.which(_compiler_name()) is None:
        found.append(
            f"no C++ compiler ({_compiler_name()}): torch.compile and `export` need g++, or one "
            "that CXX names"
        )
    transformers = _version_of("transformers")
    if transformers == "not installed":
        found.append("no transformers, which models need: pip install 'retro_ops[models]'")
    elif tuple(map(int, transformers.split(".")[:2])) < (5, 17):
        found.append(f"transformers {transformers} is older than 5.17: pip install -U transformers")
    return found


def self_test() -> Iterator[Check]:
    """Every op against its reference in plain torch, on every device and kind of CPU kernels.

    An op is given what a layer gives it while it decodes, so this takes seconds.
    """
    calls = _recorded()
    chosen = torch.ops.retro.cpu_kernels("")
    try:
        for kernels in cpu_kernel_sets():
            torch.ops.retro.cpu_kernels(kernels)
            for op in OPS:
                yield Check(op, f"cpu, {kernels}", _tried(op, calls[op], "cpu"))
    finally:
        torch.ops.retro.cpu_kernels(chosen)
    if torch.cuda.is_available() and find_library("_C_cuda") is not None:
        for op in OPS:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"retro::{op}", "CUDA"):
                yield Check(op, "cuda", _tried(op, calls[op], "cuda"))


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of calls of ops as they were before."""

    def __init__(self, calls: dict[str, list[Arguments]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        space, _, name = func._schema.name.partition("::")
        if space == "retro" and name in self.calls:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.calls[name].append(on_device(given, "cpu"))
        return func(*args, **kwargs)


def _recorded() -> dict[str, list[Arguments]]:
    """Arguments of a few calls of each op, by a layer and an offloaded one."""
    calls: dict[str, list[Arguments]] = {op: [] for op in OPS}
    keys, values = _kv()
    with torch.no_grad(), _Recorder(calls):
        for offload in (False, True):
            layer = _layer("cpu", CONFIG, offload=offload)
            layer.prefill(keys[:, :, :PROMPT], values[:, :, :PROMPT])
            for t in range(PROMPT, PROMPT + STEPS):
                token = slice(t, t + 1)
                layer.decode(
                    make_query(keys[:, :, :t], QUERY_HEADS, seed=t),
                    keys[:, :, token],
                    values[:, :, token],
                )
    # A layer on a GPU has one op for three of these, or for four of an offloaded one.
    gathers, updates = iter(calls["page_gather"]), iter(calls["update_pages"])
    for estimate, attend in zip(calls["wave_estimate"], calls["merged_attention"], strict=True):
        both = {"steady": attend["steady"], "store": attend["store"]}
        if attend.get("pages") is None:
            calls["decode_attention"].append({**estimate, **both})
            continue
        gather, update = next(gathers), next(updates)
        whole = {**gather, **estimate, **both, "history": update["history"]}
        del whole["retrieved"]
        calls["offloaded_attention"].append({**whole, "policy": update["policy"], "join": True})
    return {op: made[:2] + made[-2:] for op, made in calls.items()}


def _tried(op: str, calls: list[Arguments], device: str) -> str:
    """What is wrong with an op; empty: nothing."""
    if not calls:
        return "it was not called"
    try:
        if op in ("decode_attention", "grow_index"):
            return _tried_whole(device) or (_tried_fused(calls, device) if op[0] == "d" else "")
        if op == "offloaded_attention":
            return _tried_offloaded(calls, device)
        reference = import_module(f"retro_ops.ops.{op}").reference
        for arguments in calls:
            actual, expected = _given(op, arguments, device), on_device(arguments, "cpu")
            known = inspect.signature(reference).parameters
            got = getattr(torch.ops.retro, op)(**actual)
            if device == "cuda" and op == "update_pages":  # threads of the host do it
                torch.cuda.synchronize()
                torch.ops.retro.worker_pool(10.0)
            wanted = reference(**{key: expected[key] for key in expected if key in known})
            problem = _difference(
                {**_results(got), **_changed(actual)}, {**_results(wanted), **_changed(expected)}
            )
            if problem:
                return problem
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _given(op: str, arguments: Arguments, device: str) -> Arguments:
    """Arguments on a device; what threads of the host read or write where both see it."""
    given = on_device(arguments, device)
    if device == "cuda" and op in ("update_pages", "offloaded_attention"):
        for name in wave_buffer.ON_HOST:
            if name in given:
                given[name] = host_copy(arguments[name], device)
    return given


def _tried_fused(calls: list[Arguments], device: str) -> str:
    """`decode_attention` against the references of the three ops that it stands for."""
    ops = ("wave_estimate", "cluster_gather", "merged_attention")
    estimate, gather, attend = (import_module(f"retro_ops.ops.{op}").reference for op in ops)
    for arguments in calls:
        whole = dict(on_device(arguments, "cpu"))
        steady, store, scale = whole.pop("steady"), whole.pop("store"), whole["scale"]
        retrieved, out, lse = estimate(**whole)
        addresses = gather(retrieved, whole["offsets"], whole["counters"])
        wanted, _ = attend(
            whole["query"],
            *(steady, store, addresses, whole["counters"], out.float(), lse.float(), scale),
        )
        got = torch.ops.retro.decode_attention(**on_device(arguments, device))
        problem = _difference({"out": got.cpu()}, {"out": wanted})
        if problem:
            return problem
    return ""


def _tried_offloaded(calls: list[Arguments], device: str) -> str:
    """`offloaded_attention` against the references of the ops that make its result."""
    ops = ("wave_estimate", "page_gather", "merged_attention")
    references = [import_module(f"retro_ops.ops.{op}").reference for op in ops]
    for arguments in calls:
        whole = on_device(arguments, "cpu")
        known = [
            {name: whole[name] for name in inspect.signature(each).parameters if name in whole}
            for each in references
        ]
        retrieved, estimate, lse = references[0](**known[0])
        addresses = references[1](**known[1], retrieved=retrieved)
        wanted, _ = references[2](
            **known[2], addresses=addresses, estimate=estimate.float(), estimate_lse=lse.float()
        )
        got = torch.ops.retro.offloaded_attention(
            **_given("offloaded_attention", arguments, device)
        )
        problem = _difference({"out": got.cpu()}, {"out": wanted})
        if problem:
            return problem
    return ""


def _tried_whole(device: str) -> str:
    """A layer that retrieves all it has is dense attention, also while its index grows."""
    keys, values = (each.to(device) for each in _kv())
    layer = _layer(device, RetroConfig(**{**vars(CONFIG), "retrieval_budget": 1.0}))
    layer.prefill(keys[:, :, :PROMPT], values[:, :, :PROMPT])
    for t in range(PROMPT, PROMPT + STEPS):
        token = slice(t, t + 1)
        query = make_query(keys[:, :, :t], QUERY_HEADS, seed=t)
        out = layer.decode(query, keys[:, :, token], values[:, :, token])
        seen = keys[:, :, : t + 1].double(), values[:, :, : t + 1].double()
        error = relative_error(out, dense_attention(query.double(), *seen))
        if not error <= TOLERANCE:
            return f"attention to all tokens is {error:.1e} from dense attention"
    return "" if layer.stats()["updates"] else "the index did not grow"


def _kv() -> tuple[Tensor, Tensor]:
    return make_kv(1, HEADS, PROMPT + STEPS, HEAD_DIM)


def _layer(device: str, config: RetroConfig, *, offload: bool = False) -> RetroLayer:
    return RetroLayer(
        config,
        batch_size=1,
        num_query_heads=QUERY_HEADS,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        max_length=PROMPT + STEPS,
        dtype=torch.float32,
        device=device,
        offload=offload,
    )


def _results(outputs: Any) -> dict[str, Tensor]:
    if outputs is None:
        return {}
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return {f"result {place}": output.cpu() for place, output in enumerate(outputs)}


def _changed(arguments: Arguments) -> dict[str, Tensor]:
    # What lies behind the end of the list of free pages may be anything.
    return {
        name: value.cpu()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and name != "free_pages"
    }


def _difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """The first tensor that is not as it should be; empty: none."""
    for name, wanted in expected.items():
        got = actual[name]
        if got.shape != wanted.shape:
            return f"{name} has shape {list(got.shape)}, not {list(wanted.shape)}"
        if wanted.is_floating_point():
            finite = wanted.isfinite()
            if not torch.equal(finite, got.isfinite()):
                return f"{name} is finite in other places"
            error = relative_error(got[finite], wanted[finite])
            if not error <= TOLERANCE:
                return f"{name} is wrong by {error:.1e} of its size"
        else:
            same = (got == wanted).double().mean().item() if wanted.numel() else 1.0
            if same < (SAME_CLUSTER if wanted.dtype == torch.int32 else 1.0):
                return f"{name}: {100 * (1 - same):.0f} % of it is wrong"
    return ""


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda_library() -> str:
    """Where it is, or why it is not used."""
    path = find_library("_C_cuda")
    if path is None:
        return "none: it was built without nvcc, or for a torch without CUDA"
    if torch.version.cuda is None:
        return f"{path}, not loaded: torch {torch.__version__} was built without CUDA"
    return str(path)


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        size = properties.total_memory / 2**30
        names.append(f"{properties.name} ({capability}, {size:.0f} GiB)")
    return ", ".join(names)


def _compiler_name() -> str:
    return (os.environ.get("CXX") or "g++").split()[0]


def _compiler() -> str:
    return shutil.which(_compiler_name()) or f"none ({_compiler_name()})"
