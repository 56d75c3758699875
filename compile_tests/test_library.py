"""The op library as a fresh process finds it: schemas, fakes, checks of devices, CPU kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import retro_ops
from retro_ops.ops._contract import Counter
from retro_ops.testing import CPU_KERNELS, cpu_kernel_sets, every_kernel, example_arguments

OPS = (
    "append_tokens",
    "cluster_gather",
    "cluster_keys",
    "decode_attention",
    "grow_index",
    "merged_attention",
    "offloaded_attention",
    "pack_clusters",
    "page_gather",
    "update_pages",
    "wave_estimate",
)
OTHERS = (
    *("cpu_kernels", "host_bytes", "host_tensor", "library_version", "no_backward"),
    *("post_update_pages", "update_counts", "worker_api", "worker_pool"),
)
# What the fakes of those that return something must return for `example_arguments`.
RESULTS = {
    "cluster_gather": [([2, 3, 8, 2], "torch.int64")],
    "cluster_keys": [([2, 3, 5], "torch.int32")],
    "decode_attention": [([2, 6, 64], "torch.float32")],
    "merged_attention": [([2, 6, 64], "torch.float32"), ([2, 6], "torch.float32")],
    "offloaded_attention": [([2, 6, 64], "torch.float32")],
    "page_gather": [([2, 3, 8, 3], "torch.int64")],
    "host_tensor": [([2, 3], "torch.float32")],
    "no_backward": [([2, 3, 5, 64], "torch.float32")],
    "wave_estimate": [
        ([2, 3, 8], "torch.int32"),
        ([2, 6, 64], "torch.float32"),
        ([2, 6], "torch.float32"),
    ],
}
CALL_FAKES = """
import torch
import retro_ops
from retro_ops.testing import example_arguments
from torch._subclasses import FakeTensorMode

for name in sorted(torch._C._dispatch_get_all_op_names()):
    if name.startswith("retro::"):
        name = name.removeprefix("retro::")
        with FakeTensorMode():
            results = getattr(torch.ops.retro, name)(**example_arguments(name))
        if isinstance(results, torch.Tensor):
            results = [results]
        if isinstance(results, (int, str)) or name == "update_counts":  # no tensor to fake
            results = None
        print([name, [(list(result.shape), str(result.dtype)) for result in results or ()]])
"""


def test_fresh_process_has_every_schema_and_fake(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CALL_FAKES], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    results = dict(ast.literal_eval(line) for line in result.stdout.splitlines())
    expected = {name: RESULTS.get(name, []) for name in (*OPS, *OTHERS)}
    assert results == expected


@pytest.mark.parametrize("name", OPS)
def test_schema_and_public_function_agree(name: str) -> None:
    schema = getattr(torch.ops.retro, name).default._schema
    code = getattr(retro_ops, name).__code__
    assert [argument.name for argument in schema.arguments] == list(
        code.co_varnames[: code.co_argcount]
    )
    assert all(result.alias_info is None for result in schema.returns)


@pytest.mark.parametrize("name", OPS)
def test_tensors_of_two_devices_are_rejected(name: str) -> None:
    op, arguments = getattr(torch.ops.retro, name), example_arguments(name)
    first, *others = (key for key, value in arguments.items() if isinstance(value, torch.Tensor))
    for other in others:
        message = f"^{name}: {other} must be on cpu like {first}, got meta$"
        with pytest.raises(RuntimeError, match=message):
            op(**{**arguments, other: arguments[other].to("meta")})


def test_counters_have_the_columns_of_the_kernels() -> None:
    counters = torch.zeros(1, len(Counter), dtype=torch.int64)
    offsets = torch.tensor([[[0, 5]]], dtype=torch.int32)
    retro_ops.cluster_gather(torch.zeros(1, 1, 1, dtype=torch.int32), offsets, counters)
    assert counters[0, Counter.RETRIEVED_TOKENS] == 5
    assert counters[0, Counter.STEPS] == 1
    assert counters.sum() == 6


def test_library_knows_its_version() -> None:
    assert torch.ops.retro.library_version() == retro_ops.__version__


def test_cpu_kernels_can_be_selected() -> None:
    best = torch.ops.retro.cpu_kernels("")
    names = cpu_kernel_sets()
    assert names[0] == best
    assert names[-1] == "portable"
    for name in CPU_KERNELS:
        if name in names:
            assert torch.ops.retro.cpu_kernels(name) == name
        else:
            with pytest.raises(RuntimeError, match=f"no kernels named '{name}'"):
                torch.ops.retro.cpu_kernels(name)
    assert torch.ops.retro.cpu_kernels(best) == best
    assert list(every_kernel("cpu")) == names
    assert torch.ops.retro.cpu_kernels("") == best
    with pytest.raises(
        RuntimeError, match=r"^cpu_kernels: this machine has no kernels named 'sse'"
    ):
        torch.ops.retro.cpu_kernels("sse")
