"""Identities of the decode step: what must hold whatever the kernels do inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retro_ops import RetroConfig, RetroLayer, merged_attention
from retro_ops.ops._contract import Counter
from retro_ops.testing import (
    assert_same,
    assert_within_budget,
    dense_attention,
    make_kv,
    make_query,
    relative_error,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The steady zone is full with 4 + 16 + 64 tokens, of which 64 become 8 clusters.
SMALL_SEGMENTS = RetroConfig(local_tokens=16, cluster_size=8, segment_size=64, update_segment=64)


def make_layer(
    config: RetroConfig, like: Tensor, query_heads: int, max_length: int, *, offload: bool = False
) -> RetroLayer:
    """A layer for keys like `like`, `[B, Hkv, T, D]`."""
    rows, heads, _, head_dim = like.shape
    return RetroLayer(
        config,
        batch_size=rows,
        num_query_heads=query_heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_length=max_length,
        dtype=like.dtype,
        offload=offload,
    )


def last_token(
    config: RetroConfig, keys: Tensor, values: Tensor, query: Tensor, scale: float | None = None
) -> Tensor:
    """Attention of the last token after a prompt of all others."""
    layer = make_layer(config, keys, query.shape[1], keys.shape[2])
    layer.prefill(keys[:, :, :-1], values[:, :, :-1])
    return layer.decode(query, keys[:, :, -1:], values[:, :, -1:], scale)


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


def assert_dense(
    out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None
) -> None:
    exact = dense_attention(query.double(), keys.double(), values.double(), scale=scale)
    assert_within_budget(out, exact, dense_runs(query, keys, values, scale))


def assert_same_state(layer: RetroLayer, other: RetroLayer) -> None:
    """Asserts that two layers hold the same tokens and the same index, bit for bit."""
    assert_same(
        layer.counters[:, : Counter.CLUSTERS + 1], other.counters[:, : Counter.CLUSTERS + 1]
    )
    for row, facts in enumerate(layer.counters.tolist()):
        steady, slots = facts[Counter.STEADY_TOKENS], facts[Counter.INDEXED_TOKENS]
        clusters = facts[Counter.CLUSTERS]
        for name, axis, used in (
            ("steady", 2, steady),
            ("store", 2, slots),
            ("centroids", 2, clusters),
            ("offsets", 1, clusters + 1),
            ("variances", 1, clusters),
            ("totals", 2, layer.head_dim),
        ):
            pair = []
            for each in (layer, other):
                buffer = each.get_buffer(name)
                own = (
                    buffer[:, row]
                    if name in ("steady", "store", "centroids", "totals")
                    else buffer[row]
                )
                pair.append(own.narrow(axis, 0, used))
            assert_same(*pair, f"{name} of row {row}")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Everything retrieved is dense attention


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["clustered", "random"])
@pytest.mark.parametrize("cluster_size", [1, 16, 256])
def test_everything_retrieved_is_dense(dtype: torch.dtype, kind: str, cluster_size: int) -> None:
    config = RetroConfig(retrieval_budget=1.0, cluster_size=cluster_size, kmeans_iterations=2)
    keys, values = make_kv(2, 2, 3001, 64, kind=kind, dtype=dtype)
    query = make_query(keys, 8)
    assert_dense(last_token(config, keys, values, query), query, keys, values)


def test_a_floor_above_all_clusters_is_dense() -> None:
    config = RetroConfig(retrieval_budget=0.0, min_retrieved_clusters=1000)
    keys, values = make_kv(1, 2, 2501, 64)
    query = make_query(keys, 4)
    out = last_token(config, keys, values, query)
    assert_same(out, last_token(RetroConfig(retrieval_budget=1.0), keys, values, query))
    assert_dense(out, query, keys, values)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.5])
def test_everything_retrieved_is_dense_at_any_scale(scale: float) -> None:
    """From the mean of all values to nearly one of them."""
    config = RetroConfig(retrieval_budget=1.0)
    keys, values = make_kv(1, 2, 1501, 64)
    query = make_query(keys, 4)
    assert_dense(last_token(config, keys, values, query, scale), query, keys, values, scale)


# One token per cluster makes the estimate exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ["variance", "mean"])
@pytest.mark.parametrize("retrieval_budget", [0.0, 0.3])
def test_one_token_per_cluster_is_estimated_exactly(
    dtype: torch.dtype, estimator: str, retrieval_budget: float
) -> None:
    config = RetroConfig(
        cluster_size=1,
        segment_size=256,
        update_segment=64,
        retrieval_budget=retrieval_budget,
        min_retrieved_clusters=0,
        estimation_budget=1.0,
        estimator=estimator,
    )
    keys, values = make_kv(2, 2, 601, 64, dtype=dtype)
    query = make_query(keys, 4)
    layer = make_layer(config, keys, 4, 601)
    layer.prefill(keys[:, :, :-1], values[:, :, :-1])
    sizes = layer.offsets.diff(dim=-1)[:, :, : 600 - 68]
    assert bool((sizes == 1).all())
    out = layer.decode(query, keys[:, :, -1:], values[:, :, -1:])
    assert layer.stats()["retrieved_tokens"] == 4 * round(532 * retrieval_budget)
    assert_dense(out, query, keys, values)


# Halves merge into the whole


@pytest.mark.parametrize("split", [0, 1, 50, 99, 100])
def test_two_halves_merge_into_the_whole_in_either_order(split: int) -> None:
    rows, heads, tokens, head_dim, query_heads = 2, 2, 100, 64, 6
    keys, values = make_kv(rows, heads, tokens, head_dim)
    query = make_query(keys, query_heads)[:, :, 0]
    store = query.new_zeros(2, rows, heads, 0, head_dim)
    addresses = torch.zeros(rows, heads, 0, 2, dtype=torch.int64)

    def attend(part: slice, estimate: Tensor, estimate_lse: Tensor) -> tuple[Tensor, Tensor]:
        steady = torch.stack((keys[:, :, part], values[:, :, part]))
        counters = torch.zeros(rows, len(Counter), dtype=torch.int64)
        counters[:, Counter.STEADY_TOKENS] = steady.shape[3]
        return merged_attention(
            query, steady, store, addresses, counters, estimate, estimate_lse, head_dim**-0.5
        )

    nothing = torch.zeros_like(query), torch.full((rows, query_heads), -torch.inf)
    halves = slice(0, split), slice(split, tokens)

    def whole_lse(dtype: torch.dtype) -> Tensor:
        grouped = query.to(dtype).view(rows, heads, 3, head_dim)
        logit = grouped @ keys.to(dtype).transpose(-1, -2) * head_dim**-0.5
        return logit.logsumexp(dim=-1).flatten(1)

    for first, second in (halves, halves[::-1]):
        out, lse = attend(second, *attend(first, *nothing))
        assert_dense(out[:, :, None], query[:, :, None], keys, values)
        assert_within_budget(lse, whole_lse(torch.float64), whole_lse(torch.float32), "lse")


# Appending and then indexing is indexing at once


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ["variance", "mean"])
@pytest.mark.parametrize("prompt", [0, 1, 83, 84, 148, 212])
def test_growing_is_indexing_at_once(dtype: torch.dtype, estimator: str, prompt: int) -> None:
    """Segments of a prompt are cut as decoding cuts them if `segment_size == update_segment`, the
    indexed part of the prompt is whole segments (or none), and as many tokens are there in the end
    as leave whole segments again: then the state is the same, bit for bit.
    """
    config = replace(
        SMALL_SEGMENTS,
        retrieval_budget=0.2,
        min_retrieved_clusters=1,
        estimation_budget=0.5,
        estimator=estimator,
        merged_updates=1,
    )
    length = 4 + 16 + 4 * 64
    assert prompt < 84 or (prompt - 20) % 64 == 0
    keys, values = make_kv(2, 2, length + 40, 32, dtype=dtype)
    queries = torch.cat([make_query(keys, 4, seed=t) for t in range(length + 40)], dim=2)

    def tokens(t: int) -> tuple[Tensor, Tensor, Tensor]:
        own = slice(t, t + 1)
        return queries[:, :, own], keys[:, :, own], values[:, :, own]

    at_once = make_layer(config, keys, 4, length + 40)
    at_once.prefill(keys[:, :, :length], values[:, :, :length])
    grown = make_layer(config, keys, 4, length + 40)
    grown.prefill(keys[:, :, :prompt], values[:, :, :prompt])
    for t in range(prompt, length):
        grown.decode(*tokens(t))
    assert grown.stats()["updates"] == 2 * (4 - max(prompt - 20, 0) // 64)
    assert_same_state(grown, at_once)
    for t in range(length, length + 40):
        assert_same(grown.decode(*tokens(t)), at_once.decode(*tokens(t)), f"token {t}")


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_the_index_grows_behind_the_attention(offload: bool) -> None:
    """The token that fills a segment attends to it as it is; the next one, to its clusters."""
    config = replace(
        SMALL_SEGMENTS, retrieval_budget=0.0, min_retrieved_clusters=1, estimation_budget=0.0
    )
    full = 4 + 16 + 64
    keys, values = make_kv(2, 2, full + 1, 32)
    layer = make_layer(config, keys, 4, full + 1, offload=offload)
    for t in range(full + 1):
        own = slice(t, t + 1)
        seen = keys[:, :, : t + 1], values[:, :, : t + 1]
        query = make_query(seen[0], 4, seed=t)
        out = layer.decode(query, keys[:, :, own], values[:, :, own])
        if t < full:
            assert_dense(out, query, *seen)
        assert layer.stats()["updates"] == (2 if t >= full - 1 else 0), t
    dense = dense_attention(query.double(), *(each.double() for each in seen))
    assert relative_error(out, dense) > 0.01


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_an_interrupted_step_leaves_room_for_the_next(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever it is, also that whose token fills a segment: the token stays."""
    full = 4 + 16 + 64
    keys, values = make_kv(2, 2, 2 * full, 32)
    layer = make_layer(SMALL_SEGMENTS, keys, 4, 2 * full, offload=offload)
    expected = make_layer(SMALL_SEGMENTS, keys, 4, 2 * full, offload=offload)

    def interrupted(*_: object) -> Tensor:
        raise KeyboardInterrupt

    for t in range(2 * full):
        query = make_query(keys[:, :, : t + 1], 4, seed=t)
        step = query, keys[:, :, t : t + 1], values[:, :, t : t + 1]
        out = expected.decode(*step)
        if t < full + 2:
            with monkeypatch.context() as patch:
                patch.setattr("retro_ops.decode._attend", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    layer.decode(*step)
        else:
            assert_same(layer.decode(*step), out, f"token {t}")
        assert layer.stats()["updates"] == expected.stats()["updates"], t
    assert expected.stats()["updates"] == 4


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
def test_a_grown_index_is_as_good_as_one_of_a_prompt(offload: bool) -> None:
    """Topics come back after more tokens than a segment has: small segments tear them apart."""
    config = RetroConfig(
        local_tokens=16,
        cluster_size=8,
        segment_size=2048,
        update_segment=128,
        min_retrieved_clusters=8,
    )
    length, steps = 20 + 16 * 128, 16

    def error(config: RetroConfig, seed: int, *, prompt: int) -> float:
        keys, values = make_kv(1, 2, length + steps, 64, seed=seed)
        layer = make_layer(config, keys, 4, length + steps, offload=offload)
        layer.prefill(keys[:, :, :prompt], values[:, :, :prompt])
        errors = []
        for t in range(prompt, length + steps):
            query = make_query(keys[:, :, : t + 1], 4, seed=t)
            out = layer.decode(query, keys[:, :, t : t + 1], values[:, :, t : t + 1])
            if t >= length:
                seen = keys[:, :, : t + 1].double(), values[:, :, : t + 1].double()
                errors.append(relative_error(out, dense_attention(query.double(), *seen)))
        return sum(errors) / steps

    merged, unmerged, at_once = (
        sum(error(variant, seed, prompt=prompt) for seed in range(3)) / 3
        for variant, prompt in (
            (config, 100),
            (replace(config, merged_updates=1), 100),
            (config, length),
        )
    )
    assert merged < 1.5 * at_once
    assert merged < unmerged / 3


def test_rows_reach_their_segments_at_different_steps() -> None:
    """A padded row that the prompt does not index grows like one without a prompt."""
    keys, values = make_kv(3, 2, 300, 32)
    starts = [0, 30, 100]
    layer = make_layer(SMALL_SEGMENTS, keys, 4, 300)
    layer.prefill(keys[:, :, :110], values[:, :, :110], torch.tensor(starts))
    query = make_query(keys, 4)
    clusters = []
    for t in range(110, 300):
        out = layer.decode(query, keys[:, :, t : t + 1], values[:, :, t : t + 1])
        clusters.append(layer.counters[:, Counter.CLUSTERS].tolist())
    # 90 tokens of row 0 were indexed; the others gather 84 first, then 64 more for 8 clusters each.
    lengths = [[t + 1 - start for start in starts] for t in range(110, 300)]
    assert clusters == [
        [11 + 8 * ((own[0] - 110) // 64), *(8 * max((n - 20) // 64, 0) for n in own[1:])]
        for own in lengths
    ]
    for row in (1, 2):
        own = slice(row, row + 1)
        alone = make_layer(SMALL_SEGMENTS, keys[own], 4, 300)
        for t in range(starts[row], 300):
            token = slice(t, t + 1)
            alone_out = alone.decode(query[own], keys[own, :, token], values[own, :, token])
        assert_same(alone_out[0], out[row], f"row {row}")


# The same input gives the same bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    config = RetroConfig(update_segment=256, segment_size=512)
    keys, values = make_kv(2, 2, 2400, 64, dtype=dtype)
    query = make_query(keys, 8)

    def run() -> tuple[list[Tensor], RetroLayer]:
        layer = make_layer(config, keys, 8, 2400)
        layer.prefill(keys[:, :, :2000], values[:, :, :2000], torch.tensor([0, 700]))
        outs = [
            layer.decode(query, keys[:, :, t : t + 1], values[:, :, t : t + 1])
            for t in range(2000, 2400)
        ]
        return outs, layer

    expected, layer = run()
    for count in (1, 2, 3, 1):
        with threads(count):
            outs, other = run()
        for t, (out, want) in enumerate(zip(outs, expected, strict=True)):
            assert_same(out, want, f"step {t} on {count} threads")
        for name, buffer in other.named_buffers():
            assert_same(buffer, layer.get_buffer(name), f"{name} on {count} threads")


def test_heads_and_rows_do_not_see_each_other() -> None:
    config = RetroConfig(update_segment=64, segment_size=128, min_retrieved_clusters=3)
    keys, values = make_kv(2, 3, 400, 32)
    query = make_query(keys, 6)
    out = last_token(config, keys, values, query)
    for row in range(2):
        for head in range(3):
            kv = (slice(row, row + 1), slice(head, head + 1))
            own = (slice(row, row + 1), slice(2 * head, 2 * head + 2))
            assert_same(last_token(config, keys[kv], values[kv], query[own]), out[own])


# Estimating is better than leaving out


def errors(seed: int, **changes: Any) -> dict[str, float]:
    """Relative errors of settings, each at the same retrieval budget, against dense attention."""
    keys, values = make_kv(1, 2, 4097, 64, seed=seed)
    query = make_query(keys, 8, seed=seed + 100)
    exact = dense_attention(query.double(), keys.double(), values.double())
    found = {}
    for name, settings_of in changes.items():
        config = RetroConfig(**{"min_retrieved_clusters": 8, **settings_of})
        found[name] = relative_error(last_token(config, keys, values, query), exact)
    return found


@pytest.mark.parametrize("estimator", ["variance", "mean"])
def test_estimating_all_is_closer_than_leaving_out(estimator: str) -> None:
    for seed in range(8):
        found = errors(
            seed,
            all={"estimation_budget": 1.0, "estimator": estimator},
            some={"estimation_budget": 0.232, "estimator": estimator},
            none={"estimation_budget": 0.0, "estimator": estimator},
        )
        assert found["all"] < found["some"] < found["none"], (seed, found)


def test_the_variance_estimator_errs_less_than_the_mean() -> None:
    for seed in range(8):
        found = errors(seed, variance={"estimator": "variance"}, mean={"estimator": "mean"})
        assert found["variance"] <= found["mean"], (seed, found)
        found = errors(
            seed,
            variance={"estimator": "variance", "estimation_budget": 1.0},
            mean={"estimator": "mean", "estimation_budget": 1.0},
        )
        assert found["variance"] <= found["mean"], (seed, found)


def test_more_retrieval_is_closer() -> None:
    for seed in range(8):
        found = errors(
            seed,
            **{
                str(floor): {"min_retrieved_clusters": floor, "retrieval_budget": 0.0}
                for floor in (0, 16, 64, 254)
            },
        )
        assert found["0"] > found["16"] > found["64"] > found["254"], (seed, found)


# Random sequences against a list of tokens


class Model:
    """What a layer should hold, as lists, and dense attention over them."""

    def __init__(self, layer: RetroLayer) -> None:
        self.layer = layer
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        empty = self.layer.store.new_zeros(self.layer.num_kv_heads, 0, self.layer.head_dim)
        self.rows = [(empty, empty)] * self.layer.batch_size

    def append(self, keys: Tensor, values: Tensor, starts: list[int]) -> None:
        self.rows = [
            (
                torch.cat((old_keys, keys[row, :, start:]), dim=1),
                torch.cat((old_values, values[row, :, start:]), dim=1),
            )
            for row, ((old_keys, old_values), start) in enumerate(
                zip(self.rows, starts, strict=True)
            )
        ]

    def lengths(self) -> list[int]:
        return [keys.shape[1] for keys, _ in self.rows]

    def check(self, out: Tensor, query: Tensor, name: str) -> None:
        """Asserts that `out` is dense attention of every row."""
        exact, eager = [], []
        for row, (keys, values) in enumerate(self.rows):
            own = query[row, None], keys[None], values[None]
            exact.append(dense_attention(*(tensor.double() for tensor in own)))
            eager.append(dense_runs(*own))
        assert_within_budget(out, torch.cat(exact), torch.cat(eager, dim=1), name)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> RetroConfig:
    cluster_size = draw(st.integers(1, 6))
    arguments: dict[str, Any] = {
        "sink_tokens": draw(st.integers(0, 5)),
        "local_tokens": draw(st.integers(1, 9)),
        "cluster_size": cluster_size,
        "segment_size": draw(st.integers(cluster_size, 40)),
        "kmeans_iterations": draw(st.integers(1, 4)),
        "retrieval_budget": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "min_retrieved_clusters": draw(st.integers(0, 5)),
        "estimation_budget": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "estimator": draw(st.sampled_from(["variance", "mean"])),
        "update_segment": cluster_size * draw(st.integers(1, 5)),
    }
    return RetroConfig(**{**arguments, **fixed})


@st.composite
def layers(draw: st.DrawFn, **fixed: Any) -> RetroLayer:
    heads = draw(st.integers(1, 3))
    return RetroLayer(
        draw(configs(**fixed)),
        batch_size=draw(st.integers(1, 3)),
        num_query_heads=heads * draw(st.integers(1, 4)),
        num_kv_heads=heads,
        head_dim=draw(st.sampled_from([16, 48, 64])),
        max_length=draw(st.integers(1, 100)),
        dtype=draw(st.sampled_from(DTYPES)),
    )


def draw_kv(layer: RetroLayer, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    kind = "clustered" if seed % 2 else "random"
    shape = (layer.batch_size, layer.num_kv_heads, tokens, layer.head_dim)
    return make_kv(*shape, kind=kind, dtype=layer.store.dtype, seed=seed)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("prefill"), st.integers(0, 110)),
        st.tuples(st.just("decode"), st.integers(1, 20)),
        st.tuples(st.sampled_from(["reset", "reload", "reorder"]), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=250)
@given(layers(retrieval_budget=1.0), ACTIONS, st.integers(0, 2**16), st.data())
def test_any_sequence_of_calls_is_dense_attention(
    layer: RetroLayer, actions: list[tuple[str, int]], seed: int, data: st.DataObject
) -> None:
    """Prompts, tokens, resets, reloads and beams in any order, against a list of tokens."""
    torch.set_num_threads(1)  # the tensors are tiny: more threads only wait for each other
    model = Model(layer)
    rows, room = layer.batch_size, layer.max_length
    for step, (action, number) in enumerate(actions):
        seed += 1
        if action == "prefill":
            keys, values = draw_kv(layer, number, seed)
            if number > room:
                with pytest.raises(ValueError, match=f"exceeds max_length {room}"):
                    layer.prefill(keys, values)
            else:
                every = st.lists(st.integers(0, number), min_size=rows, max_size=rows)
                starts = data.draw(every, label="starts")
                layer.prefill(keys, values, torch.tensor(starts))
                model.reset()
                model.append(keys, values, starts)
        elif action == "decode":
            for t in range(number):
                keys, values = draw_kv(layer, 1, seed + 1000 * t)
                query = make_query(keys, layer.num_query_heads, seed=seed + t)
                if max(model.lengths()) == room:
                    with pytest.raises(RuntimeError, match=f"of max_length {room} tokens"):
                        layer.decode(query, keys, values)
                    break
                out = layer.decode(query, keys, values)
                model.append(keys, values, [0] * rows)
                model.check(out, query, f"call {step}, token {t}")
        elif action == "reset":
            layer.reset()
            model.reset()
        elif action == "reorder":
            order = [(row + 1) % rows for row in range(rows)]
            layer.reorder(torch.tensor(order))
            model.rows = [model.rows[row] for row in order]
        else:
            state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            layer.reset()
            layer.load_state_dict(state)
        assert layer.lengths().tolist() == model.lengths()
        stats = layer.stats()
        assert stats["steady_tokens"] + stats["indexed_tokens"] == sum(model.lengths())


@settings(max_examples=150)
@given(layers(), st.integers(0, 100), st.integers(1, 40), st.integers(0, 2**16), st.data())
def test_any_padded_row_equals_the_row_alone(
    layer: RetroLayer, prompt: int, steps: int, seed: int, data: st.DataObject
) -> None:
    """At any budgets: bit for bit."""
    torch.set_num_threads(1)
    prompt = min(prompt, layer.max_length)
    steps = min(steps, layer.max_length - prompt)
    rows = layer.batch_size
    starts = data.draw(st.lists(st.integers(0, prompt), min_size=rows, max_size=rows))
    keys, values = draw_kv(layer, prompt + steps, seed)
    query = make_query(keys, layer.num_query_heads, seed=seed)
    layer.prefill(keys[:, :, :prompt], values[:, :, :prompt], torch.tensor(starts))
    alone = [
        make_layer(layer.config, keys[row, None], layer.num_query_heads, layer.max_length)
        for row in range(rows)
    ]
    for row, start in enumerate(starts):
        own = slice(start, prompt)
        alone[row].prefill(keys[row, None, :, own], values[row, None, :, own])
    for t in range(prompt, prompt + steps):
        own = slice(t, t + 1)
        out = layer.decode(query, keys[:, :, own], values[:, :, own])
        assert bool(out.isfinite().all())
        for row in range(rows):
            kv = keys[row, None, :, own], values[row, None, :, own]
            assert_same(alone[row].decode(query[row, None], *kv)[0], out[row], f"row {row}")
