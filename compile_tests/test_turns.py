"""Later turns: many tokens at once, tokens that go again, copies, files; a layer and a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_layer import (
    ALL,
    DTYPES,
    SMALL,
    Tokens,
    assert_unchanged,
    dense_runs,
    make_layer,
    run,
    snapshot,
)
from test_models import (
    Largest,
    one_line,
)
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters

from retro_ops import RetroConfig, RetroLayer, turn
from retro_ops.ops._contract import Counter
from retro_ops.testing import (
    assert_same,
    assert_within_budget,
    dense_attention,
    in_layout,
)

pytestmark = pytest.mark.usefixtures("one_thread")
offloads = pytest.mark.parametrize("offload", [False, True], ids=["fast", "offloaded"])


def part(tokens: Tokens, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens `first` .. `last` - 1."""
    own = slice(first, last)
    return tokens.queries[:, :, own], tokens.keys[:, :, own], tokens.values[:, :, own]


def assert_dense_turn(out: Tensor, tokens: Tokens, first: int, scale: float | None = None) -> None:
    """Asserts that `out` is causal dense attention of the tokens from `first` on."""
    for t in range(out.shape[2]):
        query, keys, values = (
            tokens.queries[:, :, first + t : first + t + 1],
            *tokens.prompt(first + t + 1),
        )
        exact = dense_attention(query.double(), keys.double(), values.double(), scale=scale)
        eager = dense_runs(query, keys, values, scale)
        assert_within_budget(out[:, :, t : t + 1], exact, eager, f"token {first + t}")


def assert_same_tokens(layer: RetroLayer, other: RetroLayer) -> None:
    """Asserts that both hold the same, bit for bit, but for what decode steps count and cache."""
    for name, tensor in layer.used_state().items():
        expected = other.used_state()[name]
        if name == "counters":
            tensor, expected = (each[:, : Counter.UPDATES + 1] for each in (tensor, expected))
        assert_same(tensor, expected, name)


# A turn of a layer


@offloads
@pytest.mark.parametrize(("prompt", "new"), [(0, 130), (30, 1), (30, 21), (30, 22), (90, 140)])
@pytest.mark.parametrize("config", [SMALL, ALL], ids=["sparse", "dense"])
def test_a_turn_is_exact_and_leaves_what_steps_would(
    config: RetroConfig, prompt: int, new: int, offload: bool
) -> None:
    layer, steps = make_layer(config, offload=offload), make_layer(config, offload=offload)
    tokens = Tokens(layer, prompt + new + 10)
    for each in (layer, steps):
        each.prefill(*tokens.prompt(prompt))
    out = layer.extend(*part(tokens, prompt, prompt + new))
    assert_dense_turn(out, tokens, prompt)
    run(steps, tokens, prompt, prompt + new)
    assert_same_tokens(layer, steps)
    assert layer.stats()["steps"] == 0
    after = (prompt + new, prompt + new + 10)
    assert_same(run(layer, tokens, *after), run(steps, tokens, *after))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 80), (7, 1, 256)])
def test_a_turn_of_any_dtype_and_heads(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    layer = make_layer(dtype=dtype, num_query_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    tokens = Tokens(layer, 130)
    layer.prefill(*tokens.prompt(80))
    out = layer.extend(*part(tokens, 80, 130), scale=0.2)
    assert out.dtype == dtype
    assert_dense_turn(out, tokens, 80, 0.2)


@offloads
def test_a_padded_turn_equals_the_rows_alone(offload: bool) -> None:
    """Whatever the padding and what no row holds yet are; a row may get no token at all."""
    lengths, starts = [120, 0, 60, 90], torch.tensor([0, 33, 99, 100])
    batch = make_layer(batch_size=4, offload=offload)
    for name in ("steady", "store"):
        batch.get_buffer(name).fill_(torch.nan)
    prompt, turns = Tokens(batch, 120), Tokens(batch, 110, seed=3)
    batch.prefill(*prompt.prompt(120), 120 - torch.tensor(lengths))
    for row, start in enumerate(starts.tolist()):
        for tensor in (turns.queries, turns.keys, turns.values):
            tensor[row, :, :start] = torch.nan
    out = batch.extend(*part(turns, 0, 100), starts=starts)
    steps = run(batch, turns, 100, 110)
    for row, (length, start) in enumerate(zip(lengths, starts.tolist(), strict=True)):
        alone = make_layer(batch_size=1, offload=offload)
        alone.prefill(
            prompt.keys[row, None, :, 120 - length :], prompt.values[row, None, :, 120 - length :]
        )
        own = Tokens(alone, 110)
        for name in ("queries", "keys", "values"):
            setattr(own, name, getattr(turns, name)[row, None])
        assert not out[row, :, :start].any()
        expected = alone.extend(*part(own, start, 100))
        torch.testing.assert_close(out[row, None, :, start:], expected)
        assert_same(steps[row, None], run(alone, own, 100, 110), f"row {row}")


@pytest.mark.parametrize(("keys", "logits"), [(1, 1), (7, 1), (50, 8 * 50 * 40)])
def test_blocks_are_the_whole(keys: int, logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    tokens = Tokens(layer, 220)
    layer.prefill(*tokens.prompt(100), torch.tensor([0, 70]))
    before = snapshot(layer)
    arguments = {"starts": torch.tensor([20, 3])}
    whole = layer.extend(*part(tokens, 100, 220), **arguments)
    layer.load_state_dict(before)
    monkeypatch.setattr(turn, "KEYS_AT_ONCE", keys)
    monkeypatch.setattr(turn, "LOGITS_AT_ONCE", logits)
    torch.testing.assert_close(layer.extend(*part(tokens, 100, 220), **arguments), whole)


def test_the_memory_of_a_turn_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "KEYS_AT_ONCE", 128)
    monkeypatch.setattr(turn, "LOGITS_AT_ONCE", 2**17)
    config = RetroConfig(update_segment=256)
    layer = make_layer(config, batch_size=1, head_dim=16, max_length=6000)
    tokens = Tokens(layer, 6000)
    layer.prefill(*tokens.prompt(3000))
    with Largest() as largest:
        layer.extend(*part(tokens, 3000, 6000))
    # The tokens of the turn themselves, with all query heads, are 192,000 numbers.
    assert largest.elements == 4 * 3000 * 16


@pytest.mark.parametrize("layout", ["permuted", "padded", "transposed"])
def test_strides_do_not_matter(layout: str) -> None:
    layer, other = make_layer(), make_layer()
    tokens = Tokens(layer, 160)
    for each in (layer, other):
        each.prefill(*tokens.prompt(90))
    given = part(tokens, 90, 160)
    out = other.extend(*(in_layout(tensor, layout) for tensor in given))
    torch.testing.assert_close(out, layer.extend(*given))
    assert_same_tokens(layer, other)


def test_turns_of_a_layer_too_small_to_index() -> None:
    layer = make_layer(max_length=40)
    tokens = Tokens(layer, 40)
    for first, last in ((0, 13), (13, 39), (39, 40)):
        assert_dense_turn(layer.extend(*part(tokens, first, last)), tokens, first)
    assert layer.extend(*part(tokens, 0, 0)).shape == (2, 4, 0, 32)


@offloads
def test_refuses_a_turn_and_keeps_what_it_held(offload: bool) -> None:
    layer = make_layer(max_length=150, offload=offload)
    tokens = Tokens(layer, 200)
    layer.prefill(*tokens.prompt(100), torch.tensor([0, 30]))
    layer.decode(*tokens.at(100))
    before = snapshot(layer)
    query, keys, values = part(tokens, 101, 160)
    few = torch.tensor([9, 10])
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (RuntimeError, "row 0 holds 101 of max_length 150 tokens, 59 more do not fit; make", {}),
        (RuntimeError, "row 0 holds 101 of max_length 150 tokens, 50 more", {"starts": few}),
        (ValueError, r"starts must lie in 0\.\.59, got \[0, 60\]", {"starts": few * 6 - 60 + 6}),
        (ValueError, r"starts must be \[2\] integers, got \[3\]", {"starts": torch.arange(3)}),
        (ValueError, r"query must be \[B, Hq, T, D\] = \[2, 4, 59, 32\]", {"query": query[:, :3]}),
        (ValueError, r"keys must be \[B, Hkv, T, D\] = \[2, 2, T, 32\]", {"keys": keys[:1]}),
        (ValueError, "values must have the shape of keys", {"values": values[:, :, 1:]}),
        (ValueError, "query must be torch.float32 on cpu like", {"query": query.bfloat16()}),
    ]
    cases[2][2]["starts"] = torch.tensor([0, 60])
    for kind, message, changes in cases:
        arguments: dict[str, Any] = {"query": query, "keys": keys, "values": values, **changes}
        with pytest.raises(kind, match=rf"^RetroLayer.extend: {message}"):
            layer.extend(**arguments)
        assert_unchanged(layer, before)
    layer.extend(query, keys, values, starts=torch.tensor([10, 0]))
    assert layer.lengths().tolist() == [150, 130]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_turn_has_no_backward(place: int) -> None:
    layer = make_layer()
    given = [tensor.clone() for tensor in part(Tokens(layer, 30), 0, 30)]
    given[place].requires_grad_()
    out = layer.extend(*given)
    with pytest.raises(RuntimeError, match=r"there is no backward pass.*torch\.no_grad"):
        out.sum().backward()


# Compiling


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    dynamo_counters.clear()


def graphs() -> int:
    return int(dynamo_counters["stats"]["unique_graphs"])


def test_a_turn_compiles() -> None:
    """One graph for any number of tokens that the rows hold."""
    layer, expected = make_layer(), make_layer()
    tokens = Tokens(layer, 256)

    def extend(layer: RetroLayer, *arguments: Tensor) -> Tensor:
        return layer.extend(*arguments[:3], None, *arguments[3:])

    compiled = torch.compile(extend, fullgraph=True, backend="aot_eager", dynamic=False)
    starts = torch.tensor([0, 7])
    for prompt in (0, 20, 90, 200):
        for each in (layer, expected):
            each.prefill(*tokens.prompt(prompt))
        given = (*part(tokens, prompt, prompt + 50), starts)
        torch.testing.assert_close(compiled(layer, *given), extend(expected, *given))
        assert_same_tokens(layer, expected)
    assert graphs() == 1
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="extend: a row has no room for its tokens in max_len"):
        compiled(layer, *part(tokens, 0, 50), starts)
    assert_unchanged(layer, before)


def test_steps_share_their_graph_with_turns_crops_and_copies() -> None:
    def decode(layer: RetroLayer, *token: Tensor) -> Tensor:
        return layer.decode(*token)

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    layer, expected = make_layer(), make_layer()
    tokens = Tokens(layer, 200)
    compiled(layer, *tokens.at(0))
    expected.decode(*tokens.at(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for each in (layer, expected):
            each.extend(*part(tokens, 1, 100))
            each.crop(90)
        layer = layer.fork()
        for t in range(90, 140):
            assert_same(compiled(layer, *tokens.at(t)), expected.decode(*tokens.at(t)))
    assert graphs() == 1


# Tokens that go again


@offloads
def test_cropped_tokens_were_never_there(offload: bool) -> None:
    layer, other = make_layer(ALL, offload=offload), make_layer(ALL, offload=offload)
    tokens, wrong = Tokens(layer, 200), Tokens(layer, 200, seed=9)
    for each in (layer, other):
        each.prefill(*tokens.prompt(100), torch.tensor([0, 70]))
    assert layer.croppable().tolist() == [16, 30]
    layer.extend(*part(wrong, 0, 10))
    layer.crop(layer.lengths() - 10)
    run(layer, wrong, 10, 20)
    layer.crop(torch.tensor([100, 30], dtype=torch.int32))
    # A segment that was indexed meanwhile would have gone into the index later.
    assert_same(run(layer, tokens, 100, 200), run(other, tokens, 100, 200))
    assert_same_tokens(layer, other)


def test_a_crop_right_after_a_segment_was_indexed() -> None:
    layer = make_layer(ALL)
    tokens = Tokens(layer, 150)
    layer.prefill(*tokens.prompt(100))
    run(layer, tokens, 100, 112)  # as many as make a segment full... but for 20
    for length, back in ((132, 116), (132, 117)):
        layer.extend(*part(tokens, int(layer.lengths()[0]), length))
        assert layer.croppable().tolist() == [16, 16]
        layer.crop(back)
        assert_dense_turn(run(layer, tokens, back, back + 3), tokens, back)
        layer.crop(back)
    assert_dense_turn(run(layer, tokens, 117, 150), tokens, 117)


@offloads
def test_a_row_that_keeps_nothing_is_new(offload: bool) -> None:
    layer, other = make_layer(offload=offload), make_layer(offload=offload)
    tokens = Tokens(layer, 200)
    layer.prefill(*tokens.prompt(100))
    run(layer, tokens, 100, 110)
    layer.crop(torch.tensor([110, 0]))
    assert layer.lengths().tolist() == [110, 0]
    out, expected = run(layer, tokens, 110, 200), run(other, tokens, 110, 200)
    assert_same(out[1], expected[1])
    layer.crop(0)
    assert layer.lengths().tolist() == [0, 0]
    assert set(layer.stats().values()) == {0}


@offloads
def test_refuses_a_crop_and_keeps_what_it_held(offload: bool) -> None:
    layer = make_layer(offload=offload)
    tokens = Tokens(layer, 120)
    layer.prefill(*tokens.prompt(110), torch.tensor([0, 70]))
    run(layer, tokens, 110, 115)
    before = snapshot(layer)
    for lengths, message in (
        (torch.tensor([116, 20]), "row 0 holds 115 tokens and cannot keep 116; keep 0..115"),
        (torch.tensor([100, -1]), "row 1 holds 45 tokens and cannot keep -1; keep 0..45"),
        (93, "row 0 must keep 94 of its 115 tokens, got 93: the others are in clusters, which "),
    ):
        with pytest.raises(ValueError, match=f"^RetroLayer.crop: {message}") as error:
            layer.crop(lengths)
        one_line(error, "RetroLayer")
        assert_unchanged(layer, before)


# Copies


@offloads
def test_forks_go_on_by_themselves(offload: bool) -> None:
    layer = make_layer(batch_size=3, offload=offload)
    tokens = Tokens(layer, 200)
    layer.prefill(*tokens.prompt(100), torch.tensor([0, 70, 5]))
    run(layer, tokens, 100, 110)
    before = snapshot(layer)
    twin = layer.fork()
    expected = run(layer, tokens, 110, 200)
    assert_unchanged(twin, before)
    assert_same(run(twin, tokens, 110, 200), expected)

    layer.load_state_dict(before)
    rows = torch.tensor([2, 0, 0, 1, 2])
    several = layer.fork(rows)
    assert several.batch_size == 5
    own = Tokens(several, 200)
    for name in ("queries", "keys", "values"):
        setattr(own, name, getattr(tokens, name)[rows])
    assert_same(run(several, own, 110, 200), expected[rows])
    assert_unchanged(layer, before)
    for wrong in ([], [3], [-1, 0]):
        with pytest.raises(ValueError, match=r"rows must be one or more of 0\.\.2, got \["):
            layer.fork(torch.tensor(wrong, dtype=torch.int64))


def test_used_state_goes_into_other_layers() -> None:
    """Only what is in use, and the same continuation with more room, offloaded or not."""
    layer = make_layer()
    tokens = Tokens(layer, 250)
    layer.prefill(*tokens.prompt(100), torch.tensor([0, 60]))
    run(layer, tokens, 100, 140)
    state = layer.used_state()
    assert state["store"].shape[3] == 112
    assert state["centroids"].shape[3] == 14
    assert state["steady"].shape[3] < 52
    assert not {"pages", "history"} & state.keys()
    expected = run(layer, tokens, 140, 200)
    for changes in ({}, {"max_length": 201}, {"max_length": 999}, {"offload": True}):
        other = make_layer(**changes)
        other.prefill(*tokens.prompt(170))
        run(other, tokens, 170, 180)
        other.load_used_state(state)
        assert_same(run(other, tokens, 140, 200), expected)


def test_refuses_a_state_and_keeps_what_it_held() -> None:
    layer = make_layer(max_length=120)
    tokens = Tokens(layer, 256)
    layer.prefill(*tokens.prompt(80))
    before = snapshot(layer)

    def state(**changes: Any) -> dict[str, Tensor]:
        other = make_layer(**changes)
        given = Tokens(other, 100)
        other.prefill(*given.prompt(90))
        return other.used_state()

    long = make_layer()
    long.prefill(*tokens.prompt(121))
    missing = state()
    del missing["variances"]
    short = state()
    short["store"] = short["store"][:, :, :, 1:]
    for given, message in (
        (missing, "a layer has the tensors"),
        (short, r"store must be \[2, 2, 2, 70, 32\] of torch.float32, got \[2, 2, 2, 69, 32\]"),
        (state(batch_size=3), r"counters must be \[2, 14\] of torch.int64, got \[3, 14\]"),
        (state(head_dim=16), r"steady must be \[2, 2, 2, 20, 32\] of"),
        (state(dtype=torch.bfloat16), "of torch.float32, got .* of torch.bfloat16"),
        (long.used_state(), "store has room for 100 entries at max_length 120, not for 101; make"),
    ):
        with pytest.raises(ValueError, match=f"^RetroLayer.load_used_state: .*{message}"):
            layer.load_used_state(given)
        assert_unchanged(layer, before)
