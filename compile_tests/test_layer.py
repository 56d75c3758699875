"""RetroLayer: prompts and tokens go in, attention comes out, and nothing is lost on the way."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters

from retro_ops import RetroConfig, RetroLayer
from retro_ops.testing import (
    assert_same,
    assert_within_budget,
    dense_attention,
    in_layout,
    make_kv,
)

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The index is used from 52 tokens on, and grows every 32.
SMALL = RetroConfig(
    sink_tokens=4,
    local_tokens=16,
    cluster_size=8,
    segment_size=64,
    update_segment=32,
    retrieval_budget=0.3,
    min_retrieved_clusters=2,
    estimation_budget=0.4,
)
ALL = RetroConfig(
    sink_tokens=4,
    local_tokens=16,
    cluster_size=8,
    segment_size=64,
    update_segment=32,
    retrieval_budget=1.0,
)


def make_layer(config: RetroConfig = SMALL, **changes: Any) -> RetroLayer:
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "max_length": 256,
        "dtype": torch.float32,
    }
    return RetroLayer(config, **{**arguments, **changes})


class Tokens:
    """Keys and values of a context, and a query for every token."""

    def __init__(self, layer: RetroLayer, tokens: int, seed: int = 0) -> None:
        dtype, device = layer.store.dtype, layer.store.device
        groups = (layer.batch_size, layer.num_kv_heads)
        self.keys, self.values = make_kv(
            *groups, tokens, layer.head_dim, dtype=dtype, device=device, seed=seed
        )
        shape = (layer.batch_size, layer.num_query_heads, tokens, layer.head_dim)
        generator = torch.Generator().manual_seed(seed + 1)
        self.queries = (2 * torch.randn(shape, generator=generator)).to(device, dtype)

    def at(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of token `t`."""
        own = slice(t, t + 1)
        return self.queries[:, :, own], self.keys[:, :, own], self.values[:, :, own]

    def prompt(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, :tokens], self.values[:, :, :tokens]


def run(layer: RetroLayer, tokens: Tokens, first: int, last: int) -> Tensor:
    """Decodes tokens `first` .. `last` - 1: `[B, Hq, last - first, D]`."""
    return torch.cat([layer.decode(*tokens.at(t)) for t in range(first, last)], dim=2)


def dense_runs(query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Dense attention with its sums in several orders, all as good: `[8, B, Hq, 1, D]`."""
    generator = torch.Generator().manual_seed(0)
    runs, (rows, _, tokens, head_dim) = 8, keys.shape
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(runs)])
    axis = torch.stack([torch.randperm(head_dim, generator=generator) for _ in range(runs)])
    out = dense_attention(
        query[..., axis].movedim(3, 0).flatten(0, 1),
        keys[:, :, order[:, :, None], axis[:, None]].movedim(2, 0).flatten(0, 1),
        values[:, :, order].movedim(2, 0).flatten(0, 1),
        scale=scale,
    )
    return out.unflatten(0, (runs, rows))


def assert_dense(out: Tensor, tokens: Tokens, t: int, scale: float | None = None) -> None:
    """Asserts that `out` is dense attention of token `t` to itself and all before it."""
    query, keys, values = tokens.queries[:, :, t : t + 1], *tokens.prompt(t + 1)
    exact = dense_attention(query.double(), keys.double(), values.double(), scale=scale)
    assert_within_budget(out, exact, dense_runs(query, keys, values, scale), f"token {t}")


def snapshot(layer: RetroLayer) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_unchanged(layer: RetroLayer, before: dict[str, Tensor]) -> None:
    for name, buffer in layer.named_buffers():
        assert_same(buffer, before[name], name)


# Short and long contexts


@pytest.mark.parametrize("prompt", [0, 1, 15, 51])
def test_a_short_context_is_dense(prompt: int) -> None:
    layer = make_layer()
    tokens = Tokens(layer, 52)
    layer.prefill(*tokens.prompt(prompt))
    for t in range(prompt, 51):
        assert_dense(layer.decode(*tokens.at(t)), tokens, t)
    assert layer.stats()["clusters"] == 0
    # The next token fills the first segment, which becomes clusters.
    layer.decode(*tokens.at(51))
    assert layer.stats()["clusters"] == 2 * 32 // 8


def test_decoding_needs_no_prompt() -> None:
    layer = make_layer(ALL)
    tokens = Tokens(layer, 100)
    for t in range(100):
        assert_dense(layer.decode(*tokens.at(t)), tokens, t)
    assert layer.stats()["updates"] == 2 * ((100 - 20) // 32)


def test_a_layer_too_small_to_index_is_dense() -> None:
    layer = make_layer(max_length=51)
    tokens = Tokens(layer, 51)
    layer.prefill(*tokens.prompt(40))
    for t in range(40, 51):
        assert_dense(layer.decode(*tokens.at(t)), tokens, t)
    assert layer.store.shape[3] == 0
    assert layer.stats()["clusters"] == 0


@pytest.mark.parametrize("max_length", [52, 53, 83, 84, 200])
def test_a_row_may_be_filled_to_the_last_token(max_length: int) -> None:
    layer = make_layer(ALL, max_length=max_length)
    tokens = Tokens(layer, max_length)
    for prompt in (0, max_length // 2, max_length):
        layer.prefill(*tokens.prompt(prompt))
        for t in range(prompt, max_length):
            assert_dense(layer.decode(*tokens.at(t)), tokens, t)
        assert layer.lengths().tolist() == [max_length] * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_dtypes_and_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    layer = make_layer(ALL, dtype=dtype, head_dim=head_dim)
    tokens = Tokens(layer, 120)
    layer.prefill(*tokens.prompt(80))
    for t in range(80, 120):
        out = layer.decode(*tokens.at(t))
        assert out.dtype == dtype
        assert_dense(out, tokens, t)


@pytest.mark.parametrize(
    ("query_heads", "kv_heads"),
    [(4, 4), (8, 2), (7, 1), (9, 3), (32, 2)],
    ids=["MHA", "GQA", "MQA", "odd GQA", "wide GQA"],
)
def test_head_counts(query_heads: int, kv_heads: int) -> None:
    layer = make_layer(ALL, num_query_heads=query_heads, num_kv_heads=kv_heads)
    tokens = Tokens(layer, 120)
    layer.prefill(*tokens.prompt(80))
    for t in range(80, 120):
        assert_dense(layer.decode(*tokens.at(t)), tokens, t)


def test_scale() -> None:
    layer, other = make_layer(ALL), make_layer(ALL)
    tokens = Tokens(layer, 81)
    query, key, value = tokens.at(80)
    for each in (layer, other):
        each.prefill(*tokens.prompt(80))
    before = snapshot(layer)
    assert_same(layer.decode(query, key, value), other.decode(query, key, value, 32**-0.5))
    layer.load_state_dict(before)
    assert_dense(layer.decode(query, key, value, 0.5), tokens, 80, 0.5)


@pytest.mark.parametrize("layout", ["permuted", "padded", "transposed"])
def test_strides_do_not_matter(layout: str) -> None:
    plain, strided = make_layer(), make_layer()
    tokens = Tokens(plain, 160)
    plain.prefill(*tokens.prompt(90))
    strided.prefill(*(in_layout(tensor, layout) for tensor in tokens.prompt(90)))
    for t in range(90, 160):
        expected = plain.decode(*tokens.at(t))
        out = strided.decode(*(in_layout(tensor, layout) for tensor in tokens.at(t)))
        assert_same(out, expected)
    assert_unchanged(strided, snapshot(plain))


def test_arguments_are_left_alone_and_not_kept() -> None:
    layer, other = make_layer(), make_layer()
    tokens = Tokens(layer, 100)
    keys, values = (tensor.clone() for tensor in tokens.prompt(90))
    layer.prefill(keys, values)
    other.prefill(*tokens.prompt(90))
    assert_same(keys, tokens.prompt(90)[0])
    keys.zero_()
    values.zero_()
    for t in range(90, 100):
        assert_same(layer.decode(*tokens.at(t)), other.decode(*tokens.at(t)))


# Padding


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("config", [SMALL, ALL], ids=["sparse", "dense"])
def test_a_padded_row_equals_the_row_alone(config: RetroConfig, index_dtype: torch.dtype) -> None:
    """Bit for bit, whatever the padding holds: not indexed, indexed, empty."""
    starts = torch.tensor([0, 37, 90, 149, 150], dtype=index_dtype)
    batch = make_layer(config, batch_size=5)
    tokens = Tokens(batch, 230)
    for row, start in enumerate(starts.tolist()):
        tokens.keys[row, :, :start] = torch.nan
        tokens.values[row, :, :start] = torch.inf
    batch.prefill(*tokens.prompt(150), starts)
    assert batch.lengths().tolist() == [150 - start for start in starts.tolist()]
    outs = run(batch, tokens, 150, 230)
    for row, start in enumerate(starts.tolist()):
        alone = make_layer(config, batch_size=1)
        own = Tokens(alone, 230)
        own.keys, own.values = tokens.keys[row, None], tokens.values[row, None]
        own.queries = tokens.queries[row, None]
        alone.prefill(own.keys[:, :, start:150], own.values[:, :, start:150])
        assert_same(outs[row, None], run(alone, own, 150, 230), f"row {row}")


def test_starts_of_zero_are_no_padding() -> None:
    layer, other = make_layer(), make_layer()
    tokens = Tokens(layer, 120)
    layer.prefill(*tokens.prompt(90), torch.zeros(2, dtype=torch.int64))
    other.prefill(*tokens.prompt(90))
    assert_unchanged(layer, snapshot(other))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        (torch.tensor([0]), r"starts must be \[2\] integers, got \[1\] of torch.int64"),
        (torch.tensor([[0, 1]]), r"starts must be \[2\] integers, got \[1, 2\] of torch.int64"),
        (torch.tensor([0.0, 1.0]), r"starts must be \[2\] integers, got \[2\] of torch.float32"),
        (torch.tensor([0, 91]), r"starts must lie in 0\.\.90, got \[0, 91\]"),
        (torch.tensor([-1, 0]), r"starts must lie in 0\.\.90, got \[-1, 0\]"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "starts must be on cpu .*got meta"),
    ],
)
def test_rejects_starts(starts: Tensor, message: str) -> None:
    layer = make_layer()
    tokens = Tokens(layer, 90)
    layer.prefill(*tokens.prompt(70))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=f"^RetroLayer.prefill: {message}"):
        layer.prefill(*tokens.prompt(90), starts)
    assert_unchanged(layer, before)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_query_heads": 0}, "num_query_heads must be at least 1, got 0"),
        ({"num_kv_heads": -1}, "num_kv_heads must be at least 1, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"num_query_heads": 5}, "num_query_heads must be a multiple of .* got 5 and 2"),
        ({"head_dim": 0}, "head_dim must be a multiple of 16 from 16 to 256, got 0"),
        ({"head_dim": 40}, "head_dim must be a multiple of 16 from 16 to 256, got 40"),
        ({"head_dim": 272}, "head_dim must be a multiple of 16 from 16 to 256, got 272"),
        (
            {"dtype": torch.float64},
            "dtype must be one of torch.float32, torch.bfloat16, torch.float16, got torch.float64",
        ),
    ],
)
def test_rejects_a_layer_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RetroLayer: {message}$"):
        make_layer(**changes)


def shapes_that_do_not_fit() -> list[Any]:
    fitting = {"query": [2, 4, 1, 32], "key": [2, 2, 1, 32], "value": [2, 2, 1, 32]}
    cases = []
    for name, shape in fitting.items():
        for axis in range(4):
            wrong = [*shape]
            wrong[axis] += 16 if axis == 3 else 1
            cases.append(pytest.param(name, wrong, id=f"{name}-{wrong}"))
        cases.append(pytest.param(name, shape[:3], id=f"{name}-{shape[:3]}"))
    return cases


@pytest.mark.parametrize(("name", "shape"), shapes_that_do_not_fit())
def test_decode_rejects_shapes(name: str, shape: list[int]) -> None:
    layer = make_layer()
    tokens = Tokens(layer, 90)
    layer.prefill(*tokens.prompt(80))
    before = snapshot(layer)
    arguments = dict(zip(("query", "key", "value"), tokens.at(80), strict=True))
    arguments[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"^RetroLayer.decode: {name} must ") as error:
        layer.decode(**arguments)
    assert str(shape) in str(error.value)
    assert_unchanged(layer, before)


def test_decode_rejects_several_tokens() -> None:
    layer = make_layer()
    message = r"^RetroLayer.decode: key must be \[B, Hkv, 1, D\] = .*, got \[2, 2, 2, 32\]$"
    with pytest.raises(ValueError, match=message):
        layer.decode(torch.zeros(2, 4, 1, 32), torch.zeros(2, 2, 2, 32), torch.zeros(2, 2, 2, 32))


@pytest.mark.parametrize(
    "shape", [(2, 2, 90, 16), (1, 2, 90, 32), (2, 3, 90, 32), (2, 90, 32)], ids=str
)
def test_prefill_rejects_shapes(shape: tuple[int, ...]) -> None:
    layer = make_layer()
    message = r"^RetroLayer.prefill: keys must be \[B, Hkv, T, D\] = \[2, 2, T, 32\], got "
    with pytest.raises(ValueError, match=message) as error:
        layer.prefill(torch.zeros(shape), torch.zeros(shape))
    assert str(error.value).endswith(str(list(shape)))
    message = r"^RetroLayer.prefill: values must have the shape of keys, got \[.*\] and \[2, 2, 9"
    with pytest.raises(ValueError, match=message):
        layer.prefill(torch.zeros(2, 2, 90, 32), torch.zeros(shape))


@pytest.mark.parametrize("name", ["query", "key", "value", "keys", "values"])
@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"dtype": torch.bfloat16}, "torch.bfloat16 on cpu"),
        ({"dtype": torch.float64}, "torch.float64 on cpu"),
        ({"device": "meta"}, "torch.float32 on meta"),
    ],
    ids=["bfloat16", "float64", "meta"],
)
def test_rejects_other_dtypes_and_devices(name: str, change: dict[str, Any], got: str) -> None:
    layer = make_layer()
    tokens = Tokens(layer, 90)
    layer.prefill(*tokens.prompt(80))
    before = snapshot(layer)
    if name in ("keys", "values"):
        arguments = dict(zip(("keys", "values"), tokens.prompt(90), strict=True))
        method: Any = layer.prefill
    else:
        arguments = dict(zip(("query", "key", "value"), tokens.at(80), strict=True))
        method = layer.decode
    arguments[name] = arguments[name].to(**change)
    message = (
        rf"^RetroLayer.{method.__name__}: {name} must be torch.float32 on cpu like the layer, "
        f"got {got}$"
    )
    with pytest.raises(ValueError, match=message):
        method(**arguments)
    assert_unchanged(layer, before)


def test_max_length_holds_and_nothing_is_lost() -> None:
    layer = make_layer(ALL, max_length=100)
    tokens = Tokens(layer, 102)
    message = (
        "^RetroLayer.prefill: a prompt of 101 tokens exceeds max_length 100; "
        "make the layer or cache with a larger max_length$"
    )
    layer.prefill(*tokens.prompt(98))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=message):
        layer.prefill(*tokens.prompt(101))
    assert_unchanged(layer, before)
    for t in (98, 99):
        layer.decode(*tokens.at(t))
    before = snapshot(layer)
    message = (
        "^append_tokens: row 0 holds 100 of max_length 100 tokens, 1 more do not fit; "
        "make the layer or cache with a larger max_length"
    )
    with pytest.raises(RuntimeError, match=message):
        layer.decode(*tokens.at(100))
    assert_unchanged(layer, before)


def test_one_full_row_refuses_for_all_rows() -> None:
    layer = make_layer(ALL, max_length=100)
    tokens = Tokens(layer, 101)
    layer.prefill(*tokens.prompt(100), torch.tensor([30, 0]))
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="row 1 holds 100 of max_length 100"):
        layer.decode(*tokens.at(100))
    assert_unchanged(layer, before)


def test_backward_raises() -> None:
    layer = make_layer()
    tokens = Tokens(layer, 91)
    layer.prefill(*tokens.prompt(90))
    query, key, value = tokens.at(90)
    out = layer.decode(query.clone().requires_grad_(), key, value)
    with pytest.raises(RuntimeError, match=r"there is no backward pass.*torch\.no_grad"):
        out.sum().backward()


# Budgets


def test_estimators_differ_and_budgets_of_zero_are_legal() -> None:
    outs = {}
    for name, changes in {
        "variance": {},
        "mean": {"estimator": "mean"},
        "retrieve only": {"estimation_budget": 0.0},
        "estimate only": {"retrieval_budget": 0.0, "min_retrieved_clusters": 0},
        "tail only": {
            "retrieval_budget": 0.0,
            "min_retrieved_clusters": 0,
            "estimation_budget": 0.0,
        },
        "steady only": {
            "retrieval_budget": 0.0,
            "min_retrieved_clusters": 0,
            "estimation_budget": 0.0,
            "estimator": "mean",  # has no tail
        },
    }.items():
        layer = make_layer(RetroConfig(**{**vars(SMALL), **changes}))
        tokens = Tokens(layer, 121)
        layer.prefill(*tokens.prompt(120))
        outs[name] = layer.decode(*tokens.at(120))
        assert outs[name].isfinite().all()
        assert (layer.stats()["retrieved_tokens"] == 0) == (
            name in ("estimate only", "tail only", "steady only")
        )
    names = list(outs)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not torch.equal(outs[name], outs[other]), (name, other)

    # Without clusters it is dense attention to the first four and the last 17 tokens.
    kept = [*range(4), *range(104, 121)]
    query, keys, values = tokens.queries[:, :, 120:], tokens.keys[:, :, kept], tokens.values
    values = values[:, :, kept]
    exact = dense_attention(query.double(), keys.double(), values.double())
    assert_within_budget(outs["steady only"], exact, dense_runs(query, keys, values))


@pytest.mark.parametrize(
    ("budget", "floor", "expected"),
    [(0.0, 0, 0), (0.0, 3, 3), (0.3, 2, 4), (0.3, 7, 7), (0.0, 99, 12), (1.0, 0, 12)],
)
def test_the_floor_holds_under_the_budget(budget: float, floor: int, expected: int) -> None:
    """A token per cluster: retrieved tokens count retrieved clusters."""
    config = RetroConfig(
        local_tokens=16,
        cluster_size=1,
        segment_size=64,
        update_segment=4,
        retrieval_budget=budget,
        min_retrieved_clusters=floor,
    )
    layer = make_layer(config, batch_size=1)
    tokens = Tokens(layer, 33)
    layer.prefill(*tokens.prompt(32))
    layer.decode(*tokens.at(32))
    assert layer.stats()["clusters"] == 12
    assert layer.stats()["retrieved_tokens"] == 2 * expected


# State


def test_stats() -> None:
    layer = make_layer()
    keys = set(layer.stats())
    assert set(layer.stats().values()) == {0}
    for name in keys:
        assert name in (RetroLayer.stats.__doc__ or ""), name
    tokens = Tokens(layer, 140)
    layer.prefill(*tokens.prompt(100), torch.tensor([0, 60]))
    first = layer.stats()
    assert first["indexed_tokens"] == 80  # the shorter row is not indexed
    assert first["clusters"] == 10
    assert first["steady_tokens"] == 20 + 40
    assert first["steps"] == first["retrieved_tokens"] == first["updates"] == 0
    run(layer, tokens, 100, 140)
    stats = layer.stats()
    assert set(stats) == keys
    assert all(type(value) is int for value in stats.values())
    assert stats["steps"] == 40
    assert stats["updates"] == 1 + 1  # at 132 tokens of row 0, and at 52 of row 1
    assert stats["indexed_tokens"] == 80 + 2 * 32
    assert stats["steady_tokens"] == 140 + 80 - stats["indexed_tokens"]
    assert stats["clusters"] == 10 + 2 * 4
    assert stats["retrieved_tokens"] > 0
    assert stats["page_hits"] == stats["page_misses"] == stats["truncated_clusters"] == 0
    layer.reset()
    assert set(layer.stats().values()) == {0}


def test_retrieved_tokens_and_bytes_are_counted() -> None:
    """With everything retrieved, the counter and the bytes follow from the lengths."""
    layer = make_layer(ALL)
    tokens = Tokens(layer, 101)
    layer.prefill(*tokens.prompt(100))
    layer.decode(*tokens.at(100))
    stats = layer.stats()
    assert stats["retrieved_tokens"] == 2 * 2 * 80
    # Two KV heads, 101 tokens of 32 keys and values; of 10 clusters mean key, offset and variance.
    assert stats["bytes_read_per_token"] == 2 * (101 * 2 * 32 * 4 + 10 * (32 * 4 + 8))


def test_estimated_bytes_are_counted() -> None:
    config = RetroConfig(**{**vars(ALL), "retrieval_budget": 0.8, "estimation_budget": 0.5})
    layer = make_layer(config, batch_size=1, num_query_heads=1, num_kv_heads=1)
    tokens = Tokens(layer, 101)
    layer.prefill(*tokens.prompt(100))
    layer.decode(*tokens.at(100))
    stats = layer.stats()
    # The floor of 64 clusters leaves nothing to estimate.
    assert stats["bytes_read_per_token"] == 101 * 256 + 10 * 136
    config = RetroConfig(**{**vars(config), "min_retrieved_clusters": 0})
    layer = make_layer(config, batch_size=1, num_query_heads=1, num_kv_heads=1)
    layer.prefill(*tokens.prompt(100))
    layer.decode(*tokens.at(100))
    stats = layer.stats()
    # 8 of 10 clusters are retrieved; 5 were to be estimated, 2 are left.
    expected = (21 + stats["retrieved_tokens"]) * 256 + 10 * 136 + 2 * 128
    assert stats["bytes_read_per_token"] == expected


def test_reset_forgets() -> None:
    layer, fresh = make_layer(), make_layer()
    tokens, others = Tokens(layer, 150), Tokens(layer, 170, seed=5)
    layer.prefill(*others.prompt(100))
    run(layer, others, 100, 170)
    layer.reset()
    assert layer.lengths().tolist() == [0, 0]
    for t in range(150):
        assert_same(layer.decode(*tokens.at(t)), fresh.decode(*tokens.at(t)))
    # A prompt replaces what is there, without a reset.
    for prompt in (10, 60, 120):
        layer.prefill(*tokens.prompt(prompt))
        fresh = make_layer()
        fresh.prefill(*tokens.prompt(prompt))
        assert_same(run(layer, tokens, prompt, 150), run(fresh, tokens, prompt, 150))
        assert layer.stats() == fresh.stats()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_restores_bit_for_bit(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    tokens = Tokens(layer, 200)
    layer.prefill(*tokens.prompt(90), torch.tensor([0, 20]))
    run(layer, tokens, 90, 130)
    assert set(layer.state_dict()) == {name for name, _ in layer.named_buffers()}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    direct, loaded = make_layer(dtype=dtype), make_layer(dtype=dtype)
    direct.load_state_dict(layer.state_dict())
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (direct, loaded):
        assert_unchanged(other, snapshot(layer))
        assert other.stats() == layer.stats()
    expected = run(layer, tokens, 130, 200)
    assert_same(run(direct, tokens, 130, 200), expected)
    assert_same(run(loaded, tokens, 130, 200), expected)


def test_deep_copies_are_independent() -> None:
    layer = make_layer()
    tokens, others = Tokens(layer, 160), Tokens(layer, 160, seed=7)
    layer.prefill(*tokens.prompt(90))
    twin, bystander = copy.deepcopy(layer), copy.deepcopy(layer)
    run(bystander, others, 90, 160)
    assert_same(run(layer, tokens, 90, 160), run(twin, tokens, 90, 160))


def test_reorder_moves_rows() -> None:
    """In place: the addresses of the buffers are those of a captured graph."""
    layer = make_layer(batch_size=4)
    tokens = Tokens(layer, 200)
    layer.prefill(*tokens.prompt(90), torch.tensor([0, 3, 45, 80]))
    run(layer, tokens, 90, 130)
    before = snapshot(layer)
    addresses = [buffer.data_ptr() for buffer in layer.buffers()]
    order = torch.tensor([3, 0, 0, 2])
    layer.reorder(order)
    assert [buffer.data_ptr() for buffer in layer.buffers()] == addresses
    outs = run(layer, tokens, 130, 200)
    for row, source in enumerate(order.tolist()):
        layer.load_state_dict(before)
        moved = Tokens(layer, 200)
        for name in ("keys", "values", "queries"):
            every = getattr(tokens, name)
            getattr(moved, name)[:] = every
            getattr(moved, name)[source] = every[row]
        assert_same(run(layer, moved, 130, 200)[source], outs[row], f"row {row}")


def test_moves_between_dtypes_and_devices_as_a_module() -> None:
    layer = make_layer()
    assert not list(layer.parameters())
    assert layer.to("meta").store.device.type == "meta"
    assert "batch_size=2, num_query_heads=4, num_kv_heads=2, head_dim=32" in repr(layer)


def test_inference_mode_and_no_grad() -> None:
    layer, other = make_layer(), make_layer()
    tokens = Tokens(layer, 120)
    layer.prefill(*tokens.prompt(90))
    other.prefill(*tokens.prompt(90))
    with torch.inference_mode():
        out = run(layer, tokens, 90, 120)
    with torch.no_grad():
        expected = run(other, tokens, 90, 120)
    assert_same(out.clone(), expected)


# Compiling


def graphs() -> int:
    return int(dynamo_counters["stats"]["unique_graphs"])


def decode(layer: RetroLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return layer.decode(query, key, value)


def prefill(layer: RetroLayer, keys: Tensor, values: Tensor, starts: Tensor | None = None) -> None:
    layer.prefill(keys, values, starts)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_decode_loop_compiles_into_one_graph(backend: str) -> None:
    """It grows the index on its way, and serves a second prompt and a second model's layers."""
    config = SMALL
    layer, expected = make_layer(config), make_layer(config)
    tokens = Tokens(layer, 200)
    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    for each in (layer, expected):
        each.prefill(*tokens.prompt(70))
    assert_same(compiled(layer, *tokens.at(70)), expected.decode(*tokens.at(70)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(71, 200):
            assert_same(compiled(layer, *tokens.at(t)), expected.decode(*tokens.at(t)), f"{t}")
        assert layer.stats() == expected.stats()
        assert layer.stats()["updates"] == 2 * 4
        assert_unchanged(layer, snapshot(expected))

        for each in (layer, expected):
            each.prefill(*tokens.prompt(30), torch.tensor([0, 11]))
        for t in range(30, 60):
            assert_same(compiled(layer, *tokens.at(t)), expected.decode(*tokens.at(t)), f"{t}")

        other = make_layer(RetroConfig(**vars(config)))
        for t in range(60):
            compiled(other, *tokens.at(t))
    assert graphs() == 1


def test_layers_of_one_model_share_their_graph() -> None:
    """Called as methods of modules in a list, as a model does."""
    layers = nn.ModuleList(make_layer() for _ in range(3))
    tokens = Tokens(layers[0], 70)  # type: ignore[arg-type]
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layer in layers:
            for t in range(70):
                compiled(layer, *tokens.at(t))  # type: ignore[arg-type]
    assert graphs() == 1


def test_prefill_compiles_for_any_length() -> None:
    layer, expected = make_layer(max_length=512), make_layer(max_length=512)
    tokens = Tokens(layer, 512)
    compiled = torch.compile(prefill, fullgraph=True, dynamic=True, backend="aot_eager")
    starts = torch.tensor([0, 33])

    def check(length: int) -> None:
        compiled(layer, *tokens.prompt(length), starts)
        expected.prefill(*tokens.prompt(length), starts)
        assert layer.stats() == expected.stats()
        assert_same(
            run(layer, tokens, length, length + 3), run(expected, tokens, length, length + 3)
        )

    check(100)
    with torch._dynamo.config.patch(error_on_recompile=True):
        # Among them prompts that are too short to be indexed.
        for length in (99, 101, 200, 333, 509, 34, 35, 40, 51, 52):
            check(length)
    assert graphs() == 1


def test_compiled_code_refuses_too() -> None:
    layer = make_layer(max_length=60)
    tokens = Tokens(layer, 61)
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    layer.prefill(*tokens.prompt(59))
    compiled(layer, *tokens.at(59))
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="row 0 holds 60 of max_length 60 tokens"):
        compiled(layer, *tokens.at(60))
    assert_unchanged(layer, before)


class Step(nn.Module):
    """A decode step with its state, as one would export it."""

    def __init__(self, layer: RetroLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.layer.decode(query, key, value)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export(strict: bool) -> None:
    layer, expected = make_layer(), make_layer()
    tokens = Tokens(layer, 160)
    for each in (layer, expected):
        each.prefill(*tokens.prompt(70))
    program = torch.export.export(Step(layer), tokens.at(70), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if "retro" in str(node.target)]
    names = ("append_tokens", "wave_estimate", "cluster_gather", "merged_attention", "grow_index")
    assert targets == [f"retro.{name}.default" for name in names]
    # Tracing runs no op: the exported state is that of the prompt.
    assert_unchanged(layer, snapshot(expected))
    step = program.module()
    for t in range(70, 160):
        assert_same(step(*tokens.at(t)), expected.decode(*tokens.at(t)), f"{t}")
    for name, buffer in step.named_buffers():
        assert_same(buffer, expected.get_buffer(name.removeprefix("layer.")), name)
