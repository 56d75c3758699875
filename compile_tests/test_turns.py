"""Later turns: many tokens at once, tokens that go again, copies, files; a layer and a cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_layer import (
    ALL,
    DTYPES,
    SMALL,
    Tokens,
    assert_unchanged,
    dense_runs,
    graphs,
    make_layer,
    run,
    snapshot,
)
from test_models import (
    Largest,
    assert_tokens_of,
    generate,
    generate_dense,
    make_attention,
    make_cache,
    make_model,
    make_prompt,
    one_line,
    padded,
    state_of,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from retro_ops import RetroConfig, RetroLayer, turn
from retro_ops.models import RetroCache
from retro_ops.models.attention import retro_attention
from retro_ops.ops._contract import Counter
from retro_ops.testing import (
    assert_same,
    assert_within_budget,
    dense_attention,
    in_layout,
    in_orders_of_head_dim,
    make_kv,
    make_query,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")
offloads = pytest.mark.parametrize("offload", [False, True], ids=["fast", "offloaded"])


def part(tokens: Tokens, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens `first` .. `last` - 1."""
    own = slice(first, last)
    return tokens.queries[:, :, own], tokens.keys[:, :, own], tokens.values[:, :, own]


def assert_dense_steps(
    out: Tensor, tokens: Tokens | Row, first: int, scale: float | None = None, *runs: Tensor
) -> None:
    """Asserts that `out` is causal dense attention of the tokens from `first` on.

    Args:
        out: `[B, Hq, T, D]`.
        tokens: whose they are.
        first: of the T tokens.
        scale: factor on q . k; None: 1 / sqrt(D).
        *runs: further runs of plain torch, each with a first axis of runs.
    """
    exact, eager = [], []
    for t in range(first, first + out.shape[2]):
        query, keys, values = tokens.queries[:, :, t : t + 1], *tokens.prompt(t + 1)
        exact.append(dense_attention(query.double(), keys.double(), values.double(), scale=scale))
        eager.append(dense_runs(query, keys, values, scale))
    assert_within_budget(out, torch.cat(exact, dim=2), torch.cat((torch.cat(eager, dim=3), *runs)))


def assert_dense_turn(
    out: Tensor, tokens: Tokens | Row, first: int, scale: float | None = None
) -> None:
    """The same of tokens at once: some CPUs sum products of many queries in another way."""
    last = first + out.shape[2]
    keys, values = tokens.prompt(last)
    arguments = {"query": tokens.queries[:, :, first:last], "key": keys, "value": values}
    visible = torch.ones(last - first, last, dtype=torch.bool).tril(first)
    together = [
        scaled_dot_product_attention(**run_, attn_mask=visible, scale=scale, enable_gqa=True)
        for run_, _ in in_orders_of_head_dim(arguments, ("query", "key"))
    ]
    assert_dense_steps(out, tokens, first, scale, torch.stack(together))


class Row:
    """One row of `Tokens`."""

    def __init__(self, tokens: Tokens, row: int) -> None:
        own = (row, None)
        self.keys, self.values = tokens.keys[own], tokens.values[own]
        self.queries = tokens.queries[own]

    def prompt(self, tokens: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, :, :tokens], self.values[:, :, :tokens]


def assert_same_tokens(layer: RetroLayer, other: RetroLayer) -> None:
    """Asserts that both hold the same, bit for bit, but for what decode steps count and cache."""
    for name, tensor in layer.used_state().items():
        expected = other.used_state()[name]
        if name == "counters":
            tensor, expected = (each[:, : Counter.UPDATES + 1] for each in (tensor, expected))
        assert_same(tensor, expected, name)


# A turn of a layer


@offloads
@pytest.mark.parametrize(("prompt", "new"), [(0, 31), (30, 1), (30, 21), (30, 22), (110, 31)])
@pytest.mark.parametrize("config", [SMALL, ALL], ids=["sparse", "dense"])
def test_a_short_turn_is_exact_and_leaves_what_steps_would(
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


@offloads
def test_a_long_turn_is_clustered_like_a_prompt(offload: bool) -> None:
    """Of an empty layer it is one, bit for bit, if its clusters are of whole size."""
    layer, prompt = make_layer(offload=offload), make_layer(offload=offload)
    tokens = Tokens(layer, 256)
    mask = torch.arange(132) >= torch.tensor([0, 64])[:, None]
    out = layer.extend(*part(tokens, 0, 132), mask=mask)
    prompt.prefill(*tokens.prompt(132), torch.tensor([0, 64]))
    assert_dense_turn(out[:1], Row(tokens, 0), 0)
    assert_same_tokens(layer, prompt)
    assert_same(run(layer, tokens, 132, 140), run(prompt, tokens, 132, 140))


@offloads
@pytest.mark.parametrize(("prompt", "new"), [(0, 51), (0, 130), (30, 32), (60, 39), (91, 155)])
def test_a_long_turn_is_exact_and_loses_nothing(prompt: int, new: int, offload: bool) -> None:
    layer = make_layer(ALL, offload=offload)
    tokens = Tokens(layer, prompt + new + 10)
    layer.prefill(*tokens.prompt(prompt))
    indexed = layer.stats()["indexed_tokens"] // 2
    out = layer.extend(*part(tokens, prompt, prompt + new))
    assert_dense_turn(out, tokens, prompt)
    stats = layer.stats()
    left = prompt + new - indexed - 20
    assert stats["indexed_tokens"] == 2 * (indexed + left // 8 * 8 * (left >= 32))
    assert stats["indexed_tokens"] + stats["steady_tokens"] == 2 * (prompt + new)
    assert stats["steps"] == 0
    assert_dense_steps(run(layer, tokens, prompt + new, prompt + new + 10), tokens, prompt + new)


@pytest.mark.parametrize("max_length", [52, 53, 84, 97, 200, 255])
def test_turns_fill_a_row_to_the_last_token(max_length: int) -> None:
    """However the number of clusters was rounded before."""
    layer = make_layer(ALL, max_length=max_length)
    tokens = Tokens(layer, max_length)
    for cuts in ([0, 52, max_length], [52, 85, max_length], [0, 33, 35, 84, max_length]):
        if sorted(cuts) == cuts:
            layer.prefill(*tokens.prompt(cuts[0]))
            for first, last in itertools.pairwise(dict.fromkeys(cuts)):
                out = layer.extend(*part(tokens, first, last))
                assert_dense_turn(out, tokens, first)
            assert layer.lengths().tolist() == [max_length] * 2


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
    out = batch.extend(*part(turns, 0, 100), mask=torch.arange(100) >= starts[:, None])
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
    arguments = {"mask": torch.rand(2, 120, generator=torch.Generator().manual_seed(0)) < 0.7}
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
    mask = torch.arange(59) >= torch.tensor([9, 10])[:, None]
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (RuntimeError, "row 0 holds 101 of max_length 150 tokens, 59 more do not fit; make", {}),
        (RuntimeError, "row 0 holds 101 of max_length 150 tokens, 50 more", {"mask": mask}),
        (ValueError, r"mask must be \[B, T\] = \[2, 59\] of torch.bool", {"mask": mask[:, 1:]}),
        (ValueError, r"mask must be .* got \[2, 59\] of torch.int64", {"mask": mask.long()}),
        (ValueError, "mask must be on cpu like keys, got meta", {"mask": mask.to("meta")}),
        (ValueError, r"query must be \[B, Hq, T, D\] = \[2, 4, 59, 32\]", {"query": query[:, :3]}),
        (ValueError, r"keys must be \[B, Hkv, T, D\] = \[2, 2, T, 32\]", {"keys": keys[:1]}),
        (ValueError, "values must have the shape of keys", {"values": values[:, :, 1:]}),
        (ValueError, "query must be torch.float32 on cpu like", {"query": query.bfloat16()}),
    ]
    for kind, message, changes in cases:
        arguments: dict[str, Any] = {"query": query, "keys": keys, "values": values, **changes}
        with pytest.raises(kind, match=rf"^RetroLayer.extend: {message}"):
            layer.extend(**arguments)
        assert_unchanged(layer, before)
    mask = torch.arange(59) >= torch.tensor([10, 0])[:, None]
    layer.extend(query, keys, values, mask=mask)
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


@pytest.mark.parametrize("new", [25, 50])
def test_a_turn_compiles(new: int) -> None:
    """One graph for any number of tokens that the rows hold."""
    layer, expected = make_layer(), make_layer()
    tokens = Tokens(layer, 256)

    def extend(layer: RetroLayer, *arguments: Tensor) -> Tensor:
        return layer.extend(*arguments[:3], None, *arguments[3:])

    compiled = torch.compile(extend, fullgraph=True, backend="aot_eager", dynamic=False)
    mask = torch.arange(new) >= torch.tensor([0, 7])[:, None]
    for prompt in (0, 20, 90, 200):
        for each in (layer, expected):
            each.prefill(*tokens.prompt(prompt))
        given = (*part(tokens, prompt, prompt + new), mask)
        torch.testing.assert_close(compiled(layer, *given), extend(expected, *given))
        assert_same_tokens(layer, expected)
    assert graphs() == 1
    layer.prefill(*tokens.prompt(250))
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="extend: a row has no room for its tokens in max_len"):
        compiled(layer, *part(tokens, 0, new), mask)
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
        assert_dense_steps(run(layer, tokens, back, back + 3), tokens, back)
        layer.crop(back)
    assert_dense_steps(run(layer, tokens, 117, 150), tokens, 117)


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
        other.prefill(*Tokens(other, 100).prompt(90))
        return other.used_state()

    long = make_layer()
    long.prefill(*tokens.prompt(121))
    missing = state()
    del missing["variances"]
    short = state()
    short["store"] = short["store"][:, :, :, 1:]
    for wrong, message in (
        (missing, "a layer has the tensors"),
        (short, r"store must be \[2, 2, 2, 70, 32\] of torch.float32, got \[2, 2, 2, 69, 32\]"),
        (state(batch_size=3), r"counters must be \[2, 15\] of torch.int64, got \[3, 15\]"),
        (state(head_dim=16), r"steady must be \[2, 2, 2, 20, 32\] of"),
        (state(dtype=torch.bfloat16), "of torch.float32, got .* of torch.bfloat16"),
        (long.used_state(), "store has room for 100 entries at max_length 120, not for 101; make"),
    ):
        with pytest.raises(ValueError, match=f"^RetroLayer.load_used_state: .*{message}"):
            layer.load_used_state(wrong)
        assert_unchanged(layer, before)


# Turns of a model


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_padded_turns_through_generate(family: str) -> None:
    """Rows of different length in every turn, as in the mask; three of them."""
    model = make_model(family)
    cache = make_cache(model, 3, length=300)
    ids, mask = padded(make_prompt(3, 60), [0, 9, 40])
    for seed, (length, starts) in enumerate(((30, [7, 0, 29]), (50, [0, 44, 10]))):
        first, _ = generate(
            model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20
        )
        new, new_mask = padded(make_prompt(3, length, seed=seed + 5), starts)
        ids = torch.cat((first, new), dim=1)
        mask = torch.cat((mask, torch.ones(3, 20, dtype=torch.int64), new_mask), dim=1)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)
    for layer in cache.retro_layers:
        assert layer.retro is not None
        assert layer.retro.lengths().tolist() == (mask.sum(dim=1) + 49).tolist()


@torch.no_grad()
def test_a_conversation_is_one_prompt() -> None:
    """Every token of the answer, with everything retrieved."""
    model = make_model("llama")
    for first, second in ((70, 100), (20, 60), (150, 40)):
        ids = make_prompt(2, first)
        cache = make_cache(model, 2, length=400)
        said, _ = generate(model, ids, past_key_values=cache, max_new_tokens=30)
        ids = torch.cat((said, make_prompt(2, second, seed=8)), dim=1)
        mask = torch.ones_like(ids)
        talk = generate(model, ids, attention_mask=mask, past_key_values=cache)
        fresh = make_cache(model, 2, length=400)
        once = generate(model, ids, attention_mask=mask, past_key_values=fresh)
        dense = generate_dense(model, ids, attention_mask=mask)
        assert_tokens_of(dense, talk)
        assert torch.equal(talk[0], once[0])


def test_an_index_of_turns_is_as_good_as_one_of_a_prompt() -> None:
    """With the default budgets; the error is that against dense attention."""
    tokens, steps, errors = 9000, 16, {}
    keys, values = make_kv(1, 2, tokens + steps, 64)
    for name, cuts in (
        ("one prompt", [tokens]),
        ("turns", [3000, 7000, tokens]),
        ("turns from nothing", [0, 2500, 2501, tokens]),
    ):
        layer = make_layer(
            RetroConfig(), batch_size=1, num_query_heads=8, head_dim=64, max_length=10000
        )
        layer.prefill(keys[:, :, : cuts[0]], values[:, :, : cuts[0]])
        for first, last in itertools.pairwise(cuts):
            query = torch.zeros(1, 8, last - first, 64)
            layer.extend(query, keys[:, :, first:last], values[:, :, first:last])
        outs, exact = [], []
        for t in range(tokens, tokens + steps):
            query = 2 * make_query(keys[:, :, :t], 8, seed=t)
            outs.append(layer.decode(query, keys[:, :, t : t + 1], values[:, :, t : t + 1]))
            exact.append(dense_attention(query, keys[:, :, : t + 1], values[:, :, : t + 1]))
        errors[name] = relative_error(torch.cat(outs), torch.cat(exact))
    assert errors["one prompt"] > 1e-4  # it is sparse
    assert errors["turns"] < 1.25 * errors["one prompt"], errors
    assert errors["turns from nothing"] < 1.25 * errors["one prompt"], errors


def test_ragged_rows_are_each_the_row_alone() -> None:
    """Of 500 to 16,000 tokens, with the default budgets."""
    lengths = [500, 3000, 9000, 16000]
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=20000,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = make_model("ragged", config)
    ids, mask = padded(make_prompt(4, 16000), [16000 - length for length in lengths])

    def cache(rows: int) -> RetroCache:
        return make_cache(model, rows, length=16100, retro_config=RetroConfig())

    settings = {"max_new_tokens": 24}
    batch, logits = generate(model, ids, attention_mask=mask, past_key_values=cache(4), **settings)
    for row, length in enumerate(lengths):
        own, own_logits = generate(
            model, ids[row, None, -length:], past_key_values=cache(1), **settings
        )
        assert torch.equal(batch[row, -length - 24 :], own[0]), f"row {row}"
        torch.testing.assert_close(logits[row], own_logits[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masked_tokens_of_the_turn_before_are_forgotten(family: str) -> None:
    """A row that ended early has padding behind its answer; dense attention never sees it."""
    model = make_model(family)
    cache = make_cache(model, 2, length=250)
    ids = make_prompt(2, 80)
    said, _ = generate(model, ids, past_key_values=cache, max_new_tokens=12)
    said[1, 86:] = 0
    ids = torch.cat((said, make_prompt(2, 20, seed=3)), dim=1)
    mask = torch.ones_like(ids)
    mask[1, 86:92] = 0
    mask[0, 92:95] = 0
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


@offloads
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_fork_serves_several_continuations(family: str, offload: bool) -> None:
    model = make_model(family)
    ids = make_prompt(1, 90)
    prefix = make_cache(model, offload=offload)
    with torch.inference_mode():  # whose tensors nothing outside it could change
        model(ids, past_key_values=prefix)
    before = state_of(prefix)
    ends = [make_prompt(1, 9, seed=seed) for seed in (2, 3)]
    for end in ends:
        whole = torch.cat((ids, end), dim=1)
        retro = generate(model, whole, past_key_values=prefix.fork())
        assert_tokens_of(generate_dense(model, whole), retro)
    whole = torch.cat((ids.expand(2, -1), torch.cat(ends)), dim=1)
    pair = prefix.fork(torch.tensor([0, 0]))
    assert pair.batch_size == 2
    assert_tokens_of(generate_dense(model, whole), generate(model, whole, past_key_values=pair))
    for tensor, kept in zip(state_of(prefix), before, strict=True):
        assert_same(tensor, kept)
    with pytest.raises(ValueError, match=r"^RetroCache.fork: rows must be .* 0\.\.0, got \[1\]"):
        prefix.fork(torch.tensor([1]))


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_a_cropped_cache_generates_as_if_nothing_had_been(family: str) -> None:
    model = make_model(family)
    short = family != "llama"  # a window of 24 tokens lets go of what was before it
    first, wrong = (13, 8) if short else (90, 14)
    ids = make_prompt(2, first)
    cache = make_cache(model, 2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(make_prompt(2, wrong, seed=7), past_key_values=cache)
    cache.crop(0)
    cache.crop(-wrong)
    assert cache.get_seq_length() == first
    end = torch.cat((ids, make_prompt(2, 5, seed=11)), dim=1)
    retro = generate(model, end, past_key_values=cache)
    assert_tokens_of(generate_dense(model, end), retro)
    cache.reset()
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        cache.crop(-10)
    assert cache.get_seq_length() == 0
    retro = generate(model, ids, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids), retro)


def test_a_crop_into_a_padded_turn_is_refused() -> None:
    """Its rows would not lose the same tokens."""
    model = make_model("llama")
    cache = make_cache(model, 2)
    ids, mask = padded(make_prompt(2, 40), [0, 4])
    mask[1, 30:33] = 0
    with torch.no_grad():
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        model(ids[:, 30:], attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="cannot remove 8 tokens, only 7 came after") as error:
        cache.crop(-8)
    one_line(error, "the padding of the latest turn")
    cache.crop(-7)
    for layer in cache.retro_layers:
        assert layer.retro is not None
        assert layer.retro.lengths().tolist() == [33, 26]


# Files


@offloads
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_a_saved_cache_goes_on_with_the_same_tokens(
    family: str, offload: bool, tmp_path: Path
) -> None:
    model = make_model(family)
    path = tmp_path / "cache.safetensors"
    ids, mask = padded(make_prompt(2, 90), [0, 30])
    cache = make_cache(model, 2, retro_config=SMALL, offload=offload)
    said, _ = generate(model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
    cache.save(path)
    ids = torch.cat((said, make_prompt(2, 7, seed=2)), dim=1)
    mask = torch.cat((mask, torch.ones(2, 27, dtype=torch.int64)), dim=1)
    expected = generate(model, ids, attention_mask=mask, past_key_values=cache)
    for changes in ({}, {"max_cache_len": 166}, {"max_cache_len": 999}, {"offload": not offload}):
        loaded = RetroCache.load(path, model.config, SMALL, **changes)
        assert loaded.get_seq_length() == 109
        tokens, logits = generate(model, ids, attention_mask=mask, past_key_values=loaded)
        assert torch.equal(tokens, expected[0])
        assert_same(logits, expected[1], "logits")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    # An empty one, too.
    make_cache(model, 2).save(path)
    empty = RetroCache.load(path, model.config)
    assert empty.batch_size == 2
    ids = make_prompt(2, 60)
    assert_tokens_of(generate_dense(model, ids), generate(model, ids, past_key_values=empty))


def test_a_file_holds_what_is_in_use(tmp_path: Path) -> None:
    model = make_model("llama")
    cache = make_cache(model, length=100_000)
    with torch.no_grad():
        model(make_prompt(1, 100), past_key_values=cache)
    cache.save(tmp_path / "cache")
    # 2 layers of 100 tokens in 2 heads of 16 keys and values, and their index.
    assert 2 * 100 * 2 * 2 * 16 * 4 < (tmp_path / "cache").stat().st_size < 80_000


def test_refuses_other_files(tmp_path: Path) -> None:
    model = make_model("llama")
    cache = make_cache(model)
    with torch.no_grad():
        model(make_prompt(1, 100), past_key_values=cache)
    path = tmp_path / "cache"
    cache.save(path)

    def changed(tensors: Callable[[dict[str, Tensor]], Any], **fields: Any) -> Path:
        other = tmp_path / "other"
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["header"])
        held = load_file(path)
        tensors(held)
        save_file(held, other, metadata={"header": json.dumps({**header, **fields})})
        return other

    def nothing(tensors: dict[str, Tensor]) -> None:
        pass

    longer = make_model("llama").config
    longer.num_hidden_layers = 3
    rope = make_model("llama").config
    rope.rope_parameters = {"rope_type": "default", "rope_theta": 7.0}
    (tmp_path / "text").write_text("no tensors")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-100])
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    config = model.config
    for file, arguments, text in (
        (path, (longer,), "is of another model: num_hidden_layers is 2 there, 3 here"),
        (path, (rope,), "is of another model: rope_parameters is "),
        (path, (make_model("gemma3").config,), "is of another model: model_type is 'llama' there"),
        (path, (config, SMALL), "is of another retro_config: retrieval_budget is 1.0 there, 0.3"),
        (changed(nothing, version=3), (config,), "has format version 3, this retro_ops reads 2"),
        (tmp_path / "text", (config,), "is not a cache that RetroCache.save wrote"),
        (tmp_path / "short", (config,), "is not a cache that RetroCache.save wrote, or is damaged"),
        (tmp_path / "weights", (config,), "is not a cache that RetroCache.save wrote"),
    ):
        with pytest.raises(ValueError, match=r"^RetroCache.load: ") as error:
            RetroCache.load(file, *arguments)
        one_line(error, text)
    for change, text in (
        (lambda held: held.pop("1.store"), "layer 1 of "),
        (lambda held: held.pop("1.cumulative_length"), "does not load: 'cumulative_length'"),
        (lambda held: held.update({"0.offsets": torch.zeros(3)}), "offsets must be [1, 2, "),
    ):
        with pytest.raises(ValueError, match=r"^RetroCache.load: layer") as error:
            RetroCache.load(changed(change), config)
        one_line(error, text)
    with pytest.raises(ValueError, match=r"^RetroCache.load: layer 0 ") as error:
        RetroCache.load(path, config, max_cache_len=99)
    one_line(error, "make the layer or cache with a larger max_length")
    with pytest.raises(FileNotFoundError, match=r"^RetroCache.load: no file "):
        RetroCache.load(tmp_path / "nothing", config)


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    cache = make_cache(model)
    path = tmp_path / "cache"
    path.write_text("old")

    def full(tensors: Any, file: Path, **arguments: Any) -> None:
        file.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("retro_ops.models.cache.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        cache.save(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("cache", "old")]


# Any order of all of it


MODEL = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=97,
)
ROWS, ROOM = 3, 200
COMMANDS = ("decode", "decode", "turn", "turn", "crop", "reorder", "fork", "reset", "file")


class Lists:
    """What a cache should hold: keys and values of every column, and which of them are real."""

    def __init__(self) -> None:
        self.keys = torch.zeros(ROWS, 2, 0, 16)
        self.values = torch.zeros(ROWS, 2, 0, 16)
        self.real = torch.zeros(ROWS, 0, dtype=torch.bool)
        self.padded = 0  # columns up to the last padding of a later turn
        self.steady = [0] * ROWS
        self.indexed = [0] * ROWS

    def lengths(self) -> list[int]:
        return self.real.sum(dim=1).tolist()

    def add(self, keys: Tensor, values: Tensor, real: Tensor, padded: int) -> None:
        # Only the first prompt may leave a rest of tokens that makes no cluster of whole size.
        multiple = 1 if self.real.shape[1] == 0 and keys.shape[2] > 1 else ALL.cluster_size
        whole = multiple == 1 or keys.shape[2] >= ALL.update_segment
        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        self.real = torch.cat((self.real, real), dim=1)
        self.padded = padded
        for row, count in enumerate(real.sum(dim=1).tolist()):
            self.steady[row] += count
            if whole and self.steady[row] >= ALL.steady_capacity:
                left = self.steady[row] - ALL.sink_tokens - ALL.local_tokens
                self.indexed[row] += left // multiple * multiple
                self.steady[row] -= left // multiple * multiple
            while self.steady[row] >= ALL.steady_capacity:
                self.steady[row] -= ALL.update_segment
                self.indexed[row] += ALL.update_segment

    def can_crop(self, columns: int) -> bool:
        if columns > self.real.shape[1] - self.padded:
            return False
        return all(
            length <= columns or columns <= steady - (ALL.sink_tokens if indexed else 0)
            for length, steady, indexed in zip(
                self.lengths(), self.steady, self.indexed, strict=True
            )
        )

    def crop(self, columns: int) -> None:
        for row, length in enumerate(self.lengths()):
            if length <= columns:
                self.steady[row] = self.indexed[row] = 0
            else:
                self.steady[row] -= columns
        kept = self.real.shape[1] - columns
        self.keys, self.values = self.keys[:, :, :kept], self.values[:, :, :kept]
        self.real = self.real[:, :kept]

    def reorder(self, rows: Tensor) -> None:
        self.keys, self.values, self.real = self.keys[rows], self.values[rows], self.real[rows]
        self.steady = [self.steady[row] for row in rows.tolist()]
        self.indexed = [self.indexed[row] for row in rows.tolist()]


def attend(
    cache: RetroCache, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    held = cache.update(keys, values, 0)
    module: nn.Module = make_attention()
    return retro_attention(module, query, *held, mask)[0].transpose(1, 2)


def assert_attends(out: Tensor, query: Tensor, lists: Lists) -> None:
    """Asserts that the latest tokens attended to what the lists hold, up to themselves."""
    columns, tokens = lists.real.shape[1], query.shape[2]
    seen = torch.arange(columns) <= torch.arange(columns - tokens, columns)[:, None]
    seen = seen & lists.real[:, None, None]
    own = lists.real[:, columns - tokens :]
    exact = nn.functional.scaled_dot_product_attention(
        query.double(), lists.keys.double(), lists.values.double(), seen, enable_gqa=True
    ).transpose(1, 2)[own]
    torch.testing.assert_close(out.transpose(1, 2)[own].double(), exact, atol=2e-6, rtol=2e-5)
    assert not out.transpose(1, 2)[~own].any()


def run_command(
    command: str, cache: RetroCache, lists: Lists, data: st.DataObject, generator: torch.Generator
) -> RetroCache:
    columns = lists.real.shape[1]
    if command in ("decode", "turn"):
        tokens = 1 if command == "decode" else data.draw(st.integers(2, 70), "tokens")
        query, keys, values = (
            torch.randn(ROWS, heads, tokens, 16, generator=generator) for heads in (4, 2, 2)
        )
        real = torch.ones(ROWS, tokens, dtype=torch.bool)
        if command == "turn" and data.draw(st.booleans(), "padded"):
            starts = data.draw(st.lists(st.integers(0, tokens - 1), min_size=ROWS, max_size=ROWS))
            real = torch.arange(tokens) >= torch.tensor(starts)[:, None]
            if columns:  # a turn may have a token of the turn before, then padding
                real[:, 0] |= data.draw(st.booleans(), "a token before the padding")
        mask = None if real.all() else torch.cat((lists.real, real), dim=1)
        before = state_of(cache) if cache.is_initialized else []
        if max(map(int.__add__, lists.lengths(), real.sum(dim=1).tolist())) > ROOM:
            with pytest.raises(RuntimeError, match=r"a row holds .* do not fit"):
                attend(cache, query, keys, values, mask)
            for tensor, kept in zip(state_of(cache), before, strict=True):
                assert_same(tensor, kept)
            return cache
        out = attend(cache, query, keys, values, mask)
        padding = (~real).any(dim=0).nonzero().flatten().tolist()
        later = bool(padding) and columns > 0
        lists.add(keys, values, real, columns + padding[-1] + 1 if later else lists.padded)
        assert_attends(out, query, lists)
    elif command == "crop":
        removed = data.draw(st.integers(0, min(columns + 1, 40)), "removed")
        if lists.can_crop(removed):
            cache.crop(-removed)
            lists.crop(removed)
        else:
            before = state_of(cache) if cache.is_initialized else []
            with pytest.raises(ValueError, match=r"^RetroCache.crop: cannot remove"):
                cache.crop(-removed)
            for tensor, kept in zip(state_of(cache) if before else [], before, strict=True):
                assert_same(tensor, kept)
    elif command == "reorder":
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
        )
        cache.reorder_cache(rows)
        lists.reorder(rows)
    elif command == "fork":
        twin = cache.fork()
        if data.draw(st.booleans(), "the copy goes on"):
            cache.reset()
            return twin
        twin.reset()
    elif command == "reset":
        cache.reset()
        lists.__init__()  # type: ignore[misc]
    else:
        with TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache")
            return RetroCache.load(Path(folder) / "cache", MODEL, ALL)
    return cache


@offloads
@settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    commands=st.lists(st.sampled_from(COMMANDS), min_size=3, max_size=14),
    data=st.data(),
    seed=st.integers(0, 2**16),
)
@torch.no_grad()
def test_any_order(offload: bool, commands: list[str], data: st.DataObject, seed: int) -> None:
    """Against plain lists of tokens, with everything retrieved."""
    generator = torch.Generator().manual_seed(seed)
    cache = RetroCache(MODEL, ALL, max_cache_len=ROOM, batch_size=ROWS, offload=offload)
    lists = Lists()
    for command in ("turn", *commands, "turn", "decode"):
        cache = run_command(command, cache, lists, data, generator)
        retro = cache.retro_layers[0].retro
        assert retro is not None
        assert retro.lengths().tolist() == lists.lengths()
        assert retro.counters[:, Counter.INDEXED_TOKENS].tolist() == lists.indexed
        assert cache.get_seq_length() == lists.real.shape[1]
