"""What tests of ops share: the device they run on, and settings that no test leaves changed."""

from __future__ import annotations

import os
from collections.abc import Iterator

# No test asks the network for a model; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

import retro_ops  # noqa: F401  (registers the ops)

# No test depends on luck, or on what else its machine does.
settings.register_profile(
    "retro_ops", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("retro_ops")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def settings_are_restored() -> Iterator[None]:
    kernels, threads = torch.ops.retro.cpu_kernels(""), torch.get_num_threads()
    yield
    torch.ops.retro.cpu_kernels(kernels)
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> None:
    """No graph of an earlier test, and counters of this one only."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def one_thread() -> None:
    """For many small calls: where another process holds a core, threads wait longer than they work.

    `assert_repeats` asserts that more threads give the same bits.
    """
    torch.set_num_threads(1)
