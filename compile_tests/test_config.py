"""RetroConfig: every field has a default, a type and a range, and says so."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest

from retro_ops import RetroConfig

DEFAULTS = {
    "sink_tokens": 4,
    "local_tokens": 64,
    "cluster_size": 16,
    "segment_size": 8192,
    "kmeans_iterations": 10,
    "retrieval_budget": 0.018,
    "min_retrieved_clusters": 64,
    "estimation_budget": 0.232,
    "estimator": "variance",
    "update_segment": 1024,
    "page_size": 8,
    "cache_ratio": 0.05,
    "merged_updates": 4,
}
INTEGERS = [name for name, value in DEFAULTS.items() if isinstance(value, int)]
FRACTIONS = [name for name, value in DEFAULTS.items() if isinstance(value, float)]


def test_defaults() -> None:
    assert dataclasses.asdict(RetroConfig()) == DEFAULTS
    # In this order, positionally too.
    assert RetroConfig(*DEFAULTS.values()) == RetroConfig()


def test_is_frozen_and_behaves_as_a_value() -> None:
    config = RetroConfig(cluster_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cluster_size"):
        config.cluster_size = 16  # type: ignore[misc]
    assert {config: 1}[RetroConfig(cluster_size=8)] == 1
    assert dataclasses.replace(config, cluster_size=16) == RetroConfig()
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_replace_checks_too() -> None:
    with pytest.raises(ValueError, match="cluster_size must be at least 1, got 0"):
        dataclasses.replace(RetroConfig(), cluster_size=0)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [1.0, "1", True, None, [1]], ids=repr)
def test_rejects_what_is_no_integer(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^RetroConfig: {name} must be an int, got ") as error:
        RetroConfig(**{name: value})
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("name", FRACTIONS)
@pytest.mark.parametrize("value", ["0.5", True, None, 1j], ids=repr)
def test_rejects_what_is_no_number(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^RetroConfig: {name} must be a number, got ") as error:
        RetroConfig(**{name: value})
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", [None, 1, ["mean"]], ids=repr)
def test_rejects_an_estimator_that_is_no_string(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^RetroConfig: estimator must be a str, got "):
        RetroConfig(estimator=value)


@pytest.mark.parametrize(
    ("name", "lowest"),
    [
        ("sink_tokens", 0),
        ("local_tokens", 1),
        ("cluster_size", 1),
        ("kmeans_iterations", 1),
        ("min_retrieved_clusters", 0),
        ("page_size", 1),
        ("merged_updates", 1),
    ],
)
def test_lower_bounds(name: str, lowest: int) -> None:
    assert getattr(RetroConfig(**{name: lowest}), name) == lowest
    message = f"^RetroConfig: {name} must be at least {lowest}, got {lowest - 1}$"
    with pytest.raises(ValueError, match=message):
        RetroConfig(**{name: lowest - 1})


@pytest.mark.parametrize("name", FRACTIONS)
def test_fractions(name: str) -> None:
    for value in (0, 0.0, 0.5, 1, 1.0):
        kept = getattr(RetroConfig(**{name: value}), name)
        assert kept == value
        assert type(kept) is float
    for value in (-0.001, 1.001, -math.inf, math.inf, math.nan):
        message = rf"^RetroConfig: {name} must lie in 0\.\.1, got {value}$"
        with pytest.raises(ValueError, match=message):
            RetroConfig(**{name: value})


def test_budgets_may_exceed_one_together() -> None:
    config = RetroConfig(retrieval_budget=1.0, estimation_budget=1.0)
    assert config.retrieval_budget + config.estimation_budget == 2


def test_segment_size_holds_a_cluster() -> None:
    assert RetroConfig(segment_size=16).segment_size == 16
    message = r"^RetroConfig: segment_size must be at least cluster_size \(16\), got 15$"
    with pytest.raises(ValueError, match=message):
        RetroConfig(segment_size=15)


@pytest.mark.parametrize("value", [-16, 0, 8, 15, 17, 1000])
def test_update_segment_is_a_multiple_of_cluster_size(value: int) -> None:
    message = (
        r"^RetroConfig: update_segment must be a positive multiple of cluster_size \(16\), "
        f"got {value}$"
    )
    with pytest.raises(ValueError, match=message):
        RetroConfig(update_segment=value)
    assert RetroConfig(update_segment=48).update_segment == 48


def test_estimator_is_one_of_two() -> None:
    assert RetroConfig(estimator="mean").estimator == "mean"
    message = r"^RetroConfig: estimator must be one of variance, mean, got 'median'$"
    with pytest.raises(ValueError, match=message):
        RetroConfig(estimator="median")


def test_steady_capacity() -> None:
    assert RetroConfig().steady_capacity == 4 + 64 + 1024
    assert RetroConfig(sink_tokens=0, local_tokens=1, update_segment=16).steady_capacity == 17
