"""append_tokens: a copy, bit for bit, or a refusal that changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ops import append_tokens
from retro_ops.ops._contract import ELEMENT_DTYPES
from retro_ops.ops.append_tokens import reference
from retro_ops.testing import (
    Arguments,
    Variant,
    assert_captures,
    assert_compiles,
    assert_refused,
    assert_repeats,
    assert_same,
    in_layout,
    on_device,
    variants,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def make(
    variant: Variant,
    tokens: int,
    held: list[int],
    *,
    masked: bool = True,
    room: int = 3,
    max_length: int = 5000,
) -> Arguments:
    """Rows that hold `held` tokens; `room` slots are left when all tokens are appended."""
    generator = variant.generator
    shape = (variant.rows, variant.heads, tokens, variant.head_dim)
    slots = max(held, default=0) + tokens + room
    steady = variant.normal(generator, 2, variant.rows, variant.heads, slots, variant.head_dim)
    mask = torch.rand(variant.rows, tokens, generator=generator) < 0.6
    return {
        "keys": in_layout(variant.normal(generator, *shape), variant.layout),
        "values": in_layout(variant.normal(generator, *shape), variant.layout),
        "mask": in_layout(mask, variant.layout) if masked else None,
        "steady": in_layout(steady, variant.writable_layout),
        "counters": variant.counters(steady_tokens=held),
        "max_length": max_length,
    }


def assert_matches(arguments: Arguments, device: str) -> None:
    actual, expected = on_device(arguments, device), on_device(arguments, "cpu")
    append_tokens(**actual)
    reference(**expected)
    for name in ("keys", "values", "steady", "counters"):
        assert_same(actual[name].cpu(), expected[name], name)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
@pytest.mark.parametrize("tokens", [0, 1, 33, 200])
def test_matches_reference(device: str, dtype: torch.dtype, masked: bool, tokens: int) -> None:
    assert_matches(make(Variant(dtype=dtype), tokens, [0, 5], masked=masked), device)


def refusable(device: str) -> Arguments:
    return on_device(make(Variant(), 12, [0, 5]), device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"keys": torch.zeros(2, 12, 64)},
            "keys must be [B, Hkv, T, D] = [any, any, any, any], got [2, 12, 64]",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 64, dtype=torch.int64)},
            "keys must be torch.float32, torch.bfloat16 or torch.float16, got torch.int64",
        ),
        (
            {"keys": torch.zeros(2, 2, 12, 8)},
            "head_dim must be a multiple of 16 from 16 to 256, got 8",
        ),
        (
            {"values": torch.zeros(2, 2, 13, 64)},
            "values must be [B, Hkv, T, D] = [2, 2, 12, 64], got [2, 2, 13, 64]",
        ),
        (
            {"values": torch.zeros(2, 2, 12, 64, dtype=torch.float16)},
            "values must be torch.float32, got torch.float16",
        ),
        (
            {"mask": torch.zeros(2, 13, dtype=torch.bool)},
            "mask must be [B, T] = [2, 12], got [2, 13]",
        ),
        (
            {"mask": torch.zeros(2, 12, dtype=torch.uint8)},
            "mask must be torch.bool, got torch.uint8",
        ),
        (
            {"steady": torch.zeros(2, 2, 3, 20, 64)},
            "steady must be [2, B, Hkv, S, D] = [2, 2, 2, any, 64], got [2, 2, 3, 20, 64]",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 20, 64, dtype=torch.bfloat16)},
            "steady must be torch.float32, got torch.bfloat16",
        ),
        (
            {"steady": torch.zeros(2, 2, 2, 64, 20).transpose(-1, -2)},
            "steady must have stride 1 on its last axis, since it is changed in place, got 20",
        ),
        (
            {"counters": torch.zeros(2, 5, dtype=torch.int64)},
            "counters must be [B, columns] = [2, 15], got [2, 5]",
        ),
        (
            {"counters": torch.zeros(2, 15, dtype=torch.int32)},
            "counters must be torch.int64, got torch.int32",
        ),
        (
            {"counters": torch.zeros(15, 2, dtype=torch.int64).T},
            "counters must be contiguous, got strides [1, 2]",
        ),
        ({"max_length": -1}, "max_length must not be negative, got -1"),
    ],
)
def test_rejects(device: str, change: Arguments, message: str) -> None:
    arguments = {**refusable(device), **on_device(change, device)}
    assert_refused(append_tokens, arguments, f"append_tokens: {message}")


@pytest.mark.parametrize(
    ("held", "indexed", "max_length", "message"),
    [
        (
            [0, 5],
            [0, 8],
            24,
            "row 1 holds 13 of max_length 24 tokens, 12 more do not fit; make the layer or cache "
            "with a larger max_length",
        ),
        (
            [0, 9],
            [0, 0],
            99,
            "the steady zone of 20 tokens holds 9 of row 1, 12 more do not fit; append fewer "
            "tokens at once",
        ),
        ([0, 21], [0, 0], 99, "counters say that row 1 has 21 steady tokens, {zone} holds 20"),
        ([-1, 0], [0, 0], 99, "counters say that row 0 has -1 steady tokens, {zone} holds 20"),
    ],
)
def test_rejects_values(held: list, indexed: list, max_length: int, message: str) -> None:
    arguments = {**refusable("cpu"), "mask": None, "max_length": max_length}
    arguments["counters"] = Variant().counters(steady_tokens=held, indexed_tokens=indexed)
    message = message.format(zone="the steady zone")
    assert_refused(append_tokens, arguments, f"append_tokens: {message}", by_fake=False)


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_opcheck(device: str, dtype: torch.dtype, layout: str, masked: bool) -> None:
    variant = Variant(dtype=dtype, layout=layout)
    arguments = on_device(make(variant, 5, [0, 3], masked=masked), device)
    torch.library.opcheck(torch.ops.retro.append_tokens.default, tuple(arguments.values()))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_compiles(device: str, backend: str, masked: bool) -> None:
    first = make(Variant(rows=2, heads=3, head_dim=64), 5, [0, 4], masked=masked)
    second = make(Variant(rows=3, heads=4, head_dim=80), 9, [1, 0, 7], masked=masked)
    assert_compiles(append_tokens, on_device(first, device), backend=backend)
    assert_compiles(
        append_tokens, on_device(first, device), on_device(second, device), backend=backend
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "all"])
def test_captures(dtype: torch.dtype, masked: bool) -> None:
    first = make(Variant(dtype=dtype), 9, [0, 7], masked=masked)
    second = make(Variant(dtype=dtype, seed=1), 9, [7, 3], masked=masked)
    assert_captures(append_tokens, on_device(first, "cuda"), on_device(second, "cuda"))


@settings(max_examples=200)
@given(
    variant=variants(),
    tokens=st.sampled_from((0, 1, 2, 5, 64)),
    held=st.lists(st.sampled_from((0, 1, 6)), min_size=3, max_size=3),
    masked=st.booleans(),
    room=st.sampled_from((0, 1, 4)),
)
def test_appends_any_tokens(
    device: str, variant: Variant, tokens: int, held: list[int], masked: bool, room: int
) -> None:
    variant, held = replace(variant, device=device), held[: variant.rows]
    assert_matches(make(variant, tokens, held, masked=masked, room=room), device)


def test_appends_to_the_last_slot(device: str) -> None:
    arguments = make(Variant(), 6, [2, 2], masked=False, room=0)
    arguments["counters"] = Variant().counters(steady_tokens=[2, 2], indexed_tokens=[30, 0])
    assert_matches({**arguments, "max_length": 38}, device)


def test_tokens_one_by_one_are_tokens_at_once(device: str) -> None:
    arguments = on_device(make(Variant(), 7, [0, 5], masked=False), device)
    whole, pieces = on_device(arguments, device), on_device(arguments, device)
    append_tokens(**whole)
    for token in range(7):
        part = {name: arguments[name][:, :, token : token + 1] for name in ("keys", "values")}
        append_tokens(**{**pieces, **part})
    assert_same(pieces["steady"], whole["steady"], "steady")
    assert_same(pieces["counters"], whole["counters"], "counters")


def test_repeats(device: str) -> None:
    # Enough heads for several tasks.
    assert_repeats(append_tokens, on_device(make(Variant(heads=40), 9, [0, 5]), device))
