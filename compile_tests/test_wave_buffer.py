"""The wave buffer: whatever is in the page cache, attention is the same, bit for bit."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layer import SMALL, Tokens, make_layer, snapshot
from test_models import call, generate, make_cache, make_model, make_prompt
from test_update_pages import settle
from torch import Tensor

import retro_ops.decode
from retro_ops import RetroConfig, RetroLayer, page_gather, update_pages, wave_buffer
from retro_ops.ops._contract import ELEMENT_DTYPES, Counter, FreeHeader
from retro_ops.ops.update_pages import MISS_MEMORY, POLICIES, RESERVE
from retro_ops.testing import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")

# Twelve pages of 4 tokens, some four clusters; a step retrieves five or more.
TIGHT = replace(SMALL, page_size=4, cache_ratio=0.06)


def pair(config: RetroConfig = TIGHT, **changes: Any) -> tuple[RetroLayer, RetroLayer]:
    """The same layer twice: all in one memory, and offloaded."""
    policy = changes.pop("_policy", "lfu")
    changes = {"max_length": 800, **changes}
    return make_layer(config, **changes), make_layer(
        config, offload=True, _policy=policy, **changes
    )


def decode(layer: RetroLayer, *token: Tensor) -> Tensor:
    """One step, and on a GPU what threads of the host do for the next one."""
    out = layer.decode(*token)
    settle(layer.store.device.type)
    return out


def run(layer: RetroLayer, tokens: Tokens, first: int, last: int) -> Tensor:
    """Decodes tokens `first` .. `last` - 1: `[B, Hq, last - first, D]`."""
    return torch.cat([decode(layer, *tokens.at(t)) for t in range(first, last)], dim=2)


def assert_consistent(layer: Any) -> None:
    """Every page is free or belongs to one cluster, whose tokens it holds."""
    if layer.store.is_cuda:
        sizes = {name: getattr(layer, name) for name in ("config", "batch_size", "num_kv_heads")}
        buffers = {name: buffer.cpu() for name, buffer in layer.named_buffers()}
        layer = SimpleNamespace(**sizes, **buffers)
    size = layer.config.page_size
    count = layer.free_pages.shape[2] - len(FreeHeader)
    for row in range(layer.batch_size):
        for head in range(layer.num_kv_heads):
            begin = layer.offsets[row, head].tolist()
            table = layer.page_table[row, head].tolist()
            owned, entries = [], 0
            for cluster in range(len(begin) - 1):
                tokens = begin[cluster + 1] - begin[cluster]
                first = begin[cluster] // size + cluster
                pages = table[first : first + -(-tokens // size)] if tokens > 0 else []
                held = [page for page in pages if page >= 0]
                assert len(held) in (0, len(pages)), "clusters are in or out as a whole"
                assert layer.cached[row, head, cluster] == min(len(held), 255)
                for place, page in enumerate(held):
                    slot, full = begin[cluster] + place * size, min(size, tokens - place * size)
                    assert_same(
                        layer.pages[:, row, head, page * size : page * size + full],
                        layer.store[:, row, head, slot : slot + full],
                        f"page {page}",
                    )
                owned += held
                entries += len(held)
            free = layer.free_pages[row, head].tolist()
            free = free[2 : 2 + free[FreeHeader.COUNT]]
            assert sorted(owned + free) == list(range(count))
            assert sum(page >= 0 for page in table) == entries, "no entry between clusters"


def assert_same_but_for_pages(layer: RetroLayer, plain: RetroLayer) -> None:
    for name, buffer in plain.named_buffers():
        last = Counter.PAGE_HITS if name == "counters" else None
        if name != "store":
            assert_same(layer.get_buffer(name)[..., :last], buffer[..., :last], name)
    # What no cluster has been put into yet may hold anything.
    for row in range(plain.batch_size):
        for head in range(plain.num_kv_heads):
            own = (slice(None), row, head, slice(int(plain.offsets[row, head].max())))
            assert_same(layer.store[own], plain.store[own], f"store of {row}, {head}")


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("policy", "page_size", "cache_ratio"),
    [("lfu", 4, 0.06), ("lru", 3, 0.2), ("lru2", 8, 0.05), ("lfu", 1, 1.0), ("lru", 8, 0.0)],
    ids=["tight", "pages of 3", "pages of 8", "all fit", "no pages"],
)
def test_500_steps_are_the_same(
    device: str, policy: str, page_size: int, cache_ratio: float, dtype: torch.dtype
) -> None:
    """The index grows from 130 to 610 tokens on the way; rows begin at different tokens."""
    config = replace(TIGHT, page_size=page_size, cache_ratio=cache_ratio)
    plain, layer = pair(config, dtype=dtype, _policy=policy, device=device)
    tokens = Tokens(plain, 650)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150), torch.tensor([0, 37], device=device))
    for begin in range(150, 650, 50):
        expected = run(plain, tokens, begin, begin + 50)
        assert_same(run(layer, tokens, begin, begin + 50), expected, f"from {begin}")
        assert_consistent(layer)
        assert_same_but_for_pages(layer, plain)
    stats, count = layer.stats(), layer.free_pages.shape[2] - 2
    assert stats["late_decisions"] == 0
    assert stats["page_updates"] == (500 if device == "cuda" else 0)
    assert stats["page_hits"] + stats["page_misses"] > 500 * 4 * 5
    assert (stats["page_evictions"] > 500) == (0 < cache_ratio < 1)
    assert (stats["page_hits"] > 0) == (count > 0)
    token_bytes = 2 * layer.head_dim * layer.store.element_size()
    missed = int(layer.counters[:, Counter.MISSED_TOKENS].sum())
    assert stats["slow_bytes_per_token"] == round(missed * token_bytes / 1000)
    shared = set(plain.stats()) - {"page_hits", "page_misses", "slow_bytes_per_token"}
    shared -= {"page_admissions", "page_evictions", "page_updates", "page_update_us"}
    assert {name: stats[name] for name in shared} == {name: plain.stats()[name] for name in shared}


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_decode_loop_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    plain, layer = pair()
    tokens = Tokens(plain, 650)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))

    def decode(layer: RetroLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return layer.decode(query, key, value)

    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    compiled(layer, *tokens.at(150))
    plain.decode(*tokens.at(150))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(151, 650):
            assert_same(compiled(layer, *tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
    assert_consistent(layer)
    assert layer.stats()["page_evictions"] > 500


def test_prefill_compiles() -> None:
    torch._dynamo.reset()
    plain, layer = pair()
    tokens, others = Tokens(plain, 300), Tokens(plain, 300, seed=5)

    def prefill(layer: RetroLayer, keys: Tensor, values: Tensor) -> None:
        layer.prefill(keys, values)

    compiled = torch.compile(prefill, fullgraph=True, backend="aot_eager")
    layer.prefill(*others.prompt(200))
    run(layer, others, 200, 250)
    compiled(layer, *tokens.prompt(150))
    plain.prefill(*tokens.prompt(150))
    assert is_empty(layer)
    assert_same(run(layer, tokens, 150, 300), run(plain, tokens, 150, 300))


def test_export_keeps_the_ops_and_their_order() -> None:
    plain, layer = pair()
    tokens = Tokens(plain, 200)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.layer.decode(query, key, value)

    program = torch.export.export(Step(), tokens.at(150))
    targets = [str(node.target) for node in program.graph.nodes if "retro" in str(node.target)]
    assert [target.split(".")[1] for target in targets] == [
        *("append_tokens", "wave_estimate", "page_gather"),
        *("merged_attention", "update_pages", "grow_index"),
    ]
    step = program.module()
    for t in range(150, 200):
        assert_same(step(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")


# Decisions


def drop(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    if rng.random() < 0.5:
        decisions.copy_(history[-2] if len(history) > 1 else torch.zeros_like(decisions))


def delay(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    decisions.copy_(history[max(len(history) - 1 - rng.randrange(8), 0)])


def repeat(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    decisions.copy_(rng.choice(history))


def never(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    decisions.zero_()


def tear(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    """Half of one decision and half of another, as a reader may find a list being written."""
    half = torch.rand(decisions.shape, generator=torch.Generator().manual_seed(rng.randrange(999)))
    decisions.copy_(torch.where(half < 0.5, decisions, rng.choice(history)))


def nonsense(rng: random.Random, decisions: Tensor, history: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    decisions.copy_(torch.randint(-(2**31), 2**31, decisions.shape, generator=generator))
    if rng.random() < 0.7:  # ids that are clusters
        decisions[..., 1:] %= 90


@pytest.mark.parametrize("disturb", [drop, delay, repeat, never, tear, nonsense])
def test_decisions_change_no_bit(device: str, disturb: Callable[..., None]) -> None:
    plain, layer = pair(device=device)
    tokens = Tokens(plain, 450)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    rng, history = random.Random(0), []
    for t in range(150, 450):
        assert_same(decode(layer, *tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
        decisions = layer.decisions.cpu()
        history.append(decisions.clone())
        disturb(rng, decisions, history)
        layer.decisions.copy_(decisions)
    assert_consistent(layer)
    assert_same_but_for_pages(layer, plain)
    stats = layer.stats()
    assert stats["late_decisions"] > 0
    assert (stats["page_evictions"] == 0) == (disturb is never)


def test_decisions_that_come_when_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker thread decides while the next steps run: two layers, in turn."""
    monkeypatch.setattr(
        retro_ops.decode,
        "update_pages",
        lambda *arguments: torch.ops.retro.post_update_pages(*arguments[:5]),
    )
    config = replace(TIGHT, cache_ratio=0.3)
    pairs = [pair(config), pair(config, _policy="lru")]
    tokens = Tokens(pairs[0][0], 650)
    for each in (*pairs[0], *pairs[1]):
        each.prefill(*tokens.prompt(150))
    for t in range(150, 650):
        for plain, layer in pairs:
            assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
    assert torch.ops.retro.worker_pool(10.0).endswith("pending 0, failures 0")
    for _, layer in pairs:
        assert_consistent(layer)
        assert layer.stats()["page_evictions"] > 0


# State


def test_the_cache_helps(device: str) -> None:
    """Steps that ask for the same find it; what a policy forgets it does not find."""
    config = replace(SMALL, page_size=4, cache_ratio=0.5)
    _, layer = pair(config, device=device)
    tokens = Tokens(layer, 300)
    layer.prefill(*tokens.prompt(200))
    query, key, value = tokens.at(200)
    for _ in range(20):
        decode(layer, query, key, value)
    stats = layer.stats()
    assert stats["page_hits"] == 19 * stats["page_misses"]
    assert stats["page_evictions"] == 0


def is_empty(layer: RetroLayer) -> bool:
    fresh = make_layer(
        layer.config, offload=True, max_length=layer.max_length, device=layer.store.device
    )
    return all(
        torch.equal(layer.get_buffer(name), fresh.get_buffer(name))
        for name in wave_buffer.NAMES
        if name != "pages"
    )


def test_prefill_and_reset_empty_the_cache(device: str) -> None:
    plain, layer = pair(device=device)
    tokens, others = Tokens(plain, 400), Tokens(plain, 400, seed=5)
    assert is_empty(layer)
    layer.prefill(*others.prompt(200))
    run(layer, others, 200, 300)
    assert not is_empty(layer)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    assert is_empty(layer)
    assert_same(run(layer, tokens, 150, 400), run(plain, tokens, 150, 400))
    assert_consistent(layer)
    for each in (plain, layer):
        each.reset()
    assert is_empty(layer)
    assert_same(run(layer, tokens, 0, 400), run(plain, tokens, 0, 400))
    assert_consistent(layer)


@pytest.mark.parametrize("starts", [None, (0, 7)])
def test_a_staged_prompt_is_the_same(
    starts: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU packs in its own memory and copies from there; here both are the CPU's."""
    plain, layer = pair()
    tokens = Tokens(plain, 400)
    padding = None if starts is None else torch.tensor(starts)
    for count in (350, 60, 10, 200):  # without an index, too
        layer.prefill(*tokens.prompt(count), padding)
        expected = snapshot(layer)
        monkeypatch.setattr(wave_buffer, "stages", lambda layer: layer.offload)
        for buffer in layer.buffers():
            buffer.fill_(99)
        layer.joins = False
        layer.prefill(*tokens.prompt(count), padding)
        assert (count > 50) == bool(wave_buffer._writes)
        layer.joins = True
        layer.prefill(*tokens.prompt(count), padding)
        assert not wave_buffer._writes
        monkeypatch.undo()
        for row, counts in enumerate(layer.counters.tolist()):
            for name, buffer in snapshot(layer).items():
                if name != "pages" and name in (*wave_buffer.NAMES, "counters", "totals"):
                    assert_same(buffer, expected[name], name)
            used = counts[Counter.INDEXED_TOKENS]
            assert used == expected["counters"][row, Counter.INDEXED_TOKENS]
            assert_same(layer.store[:, row, :, :used], expected["store"][:, row, :, :used])


@pytest.mark.parametrize("count", [1, 30])
def test_tokens_wait_for_a_staged_prompt(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the layer that waits for all never came: of a model cut shorter than its config."""
    plain, layer = pair()
    tokens = Tokens(plain, 400)
    plain.prefill(*tokens.prompt(350))
    monkeypatch.setattr(wave_buffer, "stages", lambda layer: layer.offload)
    layer.joins = False
    layer.prefill(*tokens.prompt(350))
    assert wave_buffer._writes
    new = [part[:, :, 350 : 350 + count] for part in (tokens.queries, tokens.keys, tokens.values)]
    method = "decode" if count == 1 else "extend"
    outs = [getattr(each, method)(*new) for each in (plain, layer)]
    assert not wave_buffer._writes
    assert_same(outs[1], outs[0], method)


def test_layers_of_a_model_stage_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    ids = make_prompt(2, 100)
    plain = make_cache(model, rows=2, length=400, retro_config=TIGHT)
    expected = generate(model, ids, past_key_values=plain, max_new_tokens=40)
    monkeypatch.setattr(wave_buffer, "stages", lambda layer: layer.offload)
    staged = []
    stage = wave_buffer.stage
    monkeypatch.setattr(
        wave_buffer, "stage", lambda *given: staged.append(stage(*given)) or staged[-1]
    )
    cache = make_cache(model, rows=2, length=400, retro_config=TIGHT, offload=True)
    for _ in range(2):
        staged.clear()
        cache.reset()
        outs = generate(model, ids, past_key_values=cache, max_new_tokens=40)
        assert_same(outs[0], expected[0], "tokens")
        assert len(staged) == len(cache.retro_layers)
        assert not wave_buffer._writes  # the last layer waits


def test_reorder_moves_the_cache_with_its_row(device: str) -> None:
    plain, layer = pair(batch_size=4, device=device)
    tokens = Tokens(plain, 450)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150), torch.tensor([0, 3, 45, 80], device=device))
        run(each, tokens, 150, 250)
        each.reorder(torch.tensor([3, 0, 0, 2]))
    assert_consistent(layer)
    hits = layer.stats()["page_hits"]
    assert_same(run(layer, tokens, 250, 450), run(plain, tokens, 250, 450))
    assert layer.stats()["page_hits"] > hits
    assert layer.stats()["late_decisions"] == 0
    assert_consistent(layer)


def test_state_dict_and_copies_continue(device: str) -> None:
    plain, layer = pair(device=device)
    tokens = Tokens(plain, 400)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
        run(each, tokens, 150, 250)
    restored = make_layer(TIGHT, offload=True, max_length=800, device=device)
    restored.load_state_dict(layer.state_dict())
    copies = [restored, layer.fork()]
    if device == "cpu":
        copies.append(copy.deepcopy(layer))
    expected = run(plain, tokens, 250, 400)
    for each in (layer, *copies):
        assert_same(run(each, tokens, 250, 400), expected)
        assert_consistent(each)
        stats = each.stats()
        for name in ("page_updates", "page_update_us"):  # these belong to a layer, not to its state
            stats[name] = layer.stats()[name]
        assert stats == layer.stats()


def test_another_layers_tokens_empty_the_cache(device: str) -> None:
    """A state without a page cache, loaded into a layer that has one."""
    plain, layer = pair(device=device)
    tokens, others = Tokens(plain, 400), Tokens(plain, 400, seed=5)
    plain.prefill(*tokens.prompt(250))
    layer.prefill(*others.prompt(250))
    run(layer, others, 250, 300)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(plain.state_dict())
    layer.load_state_dict(plain.state_dict(), strict=False)
    assert is_empty(layer)
    assert_same(run(layer, tokens, 250, 400), run(plain, tokens, 250, 400))


def test_a_refused_token_changes_nothing() -> None:
    _, layer = pair(max_length=260)
    tokens = Tokens(layer, 261)
    layer.prefill(*tokens.prompt(150))
    run(layer, tokens, 150, 260)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="row 0 holds 260 of max_length 260"):
        layer.decode(*tokens.at(260))
    for name, buffer in layer.named_buffers():
        assert_same(buffer, before[name], name)


def test_used_state_goes_to_another_length(device: str) -> None:
    """And from one memory to two, and back; the copy of a store in host memory is on the CPU."""
    plain, layer = pair(device=device)
    tokens = Tokens(plain, 400)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
        run(each, tokens, 150, 250)
    states = [each.used_state() for each in (plain, layer)]
    for name, tensor in states[0].items():
        if name != "counters":
            assert_same(states[1][name], tensor, name)
    assert states[1]["store"].device.type == "cpu"
    expected = run(plain, tokens, 250, 400)
    for state in states:
        for offload in (False, True):
            other = make_layer(TIGHT, offload=offload, max_length=500, device=device)
            other.load_used_state(state)
            assert_same(run(other, tokens, 250, 400), expected)


def test_room_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: wave_buffer.Shapes = {
        "store": ((1000, 1000), torch.float32),
        "history": ((500, 1000), torch.int64),
        "pages": ((1000, 300), torch.float32),
    }
    cuda = torch.device("cuda")
    monkeypatch.setattr(wave_buffer, "free_device_bytes", lambda device: 3_600_000)
    monkeypatch.setattr(wave_buffer, "free_host_bytes", lambda: 24_000_000)
    wave_buffer.check_room(shapes, cuda, 3)
    message = (
        r"^RetroLayer: offload=True needs 0.03 GB of host memory for 4 layers, 0.02 GB are free"
    )
    with pytest.raises(MemoryError, match=message):
        wave_buffer.check_room(shapes, cuda, 4)
    monkeypatch.setattr(wave_buffer, "free_host_bytes", lambda: 8 * 24_000_000)
    with pytest.raises(MemoryError, match=r"needs 0.00 GB of memory of cuda for 4 layers"):
        wave_buffer.check_room(shapes, cuda, 4)


def test_free_host_memory_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (total,) = (
        1024 * int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    assert 0 < wave_buffer.free_host_bytes() <= total
    monkeypatch.setattr(wave_buffer, "MEMINFO", tmp_path / "meminfo")
    assert wave_buffer.free_host_bytes() == pytest.approx(total, rel=0.05)


def test_rejects_an_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"_policy must be one of lru, lru2, lfu, got 'random'"):
        make_layer(offload=True, _policy="random")


def test_a_layer_too_small_to_index_has_no_cache(device: str) -> None:
    layer = make_layer(offload=True, max_length=51, device=device)
    tokens = Tokens(layer, 51)
    layer.prefill(*tokens.prompt(40))
    run(layer, tokens, 40, 51)
    assert layer.pages.numel() == layer.page_table.numel() == 0
    assert layer.stats()["page_misses"] == 0


# Whole models


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_generates_the_same_tokens(family: str) -> None:
    model = make_model(family)
    ids = make_prompt(2, 100)
    outs = {}
    for offload in (False, True):
        cache = make_cache(model, rows=2, length=400, retro_config=TIGHT, offload=offload)
        outs[offload] = generate(model, ids, past_key_values=cache, max_new_tokens=200)
    assert_same(outs[True][0], outs[False][0], "tokens")
    assert_same(outs[True][1], outs[False][1], "logits")
    assert cache.stats()["page_hits"] > 0
    assert cache.stats()["page_evictions"] > 0


def test_beams_and_resets() -> None:
    model = make_model("llama")
    outs = []
    for offload in (False, True):
        cache = make_cache(model, rows=3, length=300, retro_config=TIGHT, offload=offload)
        for seed in (1, 2):
            cache.reset()
            outs.append(
                generate(
                    model,
                    make_prompt(1, 90, seed=seed),
                    past_key_values=cache,
                    max_new_tokens=60,
                    num_beams=3,
                )
            )
    for seed in (0, 1):
        assert_same(outs[2 + seed][0], outs[seed][0], "tokens")


def test_a_model_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = make_model("llama")
    caches = [
        make_cache(model, length=300, retro_config=TIGHT, offload=offload)
        for offload in (False, True)
    ]
    with torch.no_grad():
        for cache in caches:
            call(model, make_prompt(1, 100), cache)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for step in range(100):
            token = make_prompt(1, 1, seed=step)
            expected = model(token, past_key_values=caches[0]).logits
            assert_same(compiled(token, past_key_values=caches[1]).logits, expected, f"{step}")
    assert caches[1].stats()["page_hits"] > 0


# The page table


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
def test_entries_of_clusters_never_overlap(page_size: int) -> None:
    """All sizes of four clusters, with the smallest store that holds them."""
    for sizes in itertools.product(range(2 * page_size + 2), repeat=4):
        end, first = 0, 0
        for cluster, tokens in enumerate(sizes):
            entry = first // page_size + cluster
            assert entry >= end
            end = max(end, entry + -(-tokens // page_size))
            first += tokens
        assert end <= first // page_size + len(sizes)


# Against a dictionary


class PlainLru:
    """The cache of one row and head as a dictionary from cluster to pages, the newest last."""

    def __init__(self, pages: int) -> None:
        self.capacity = self.free = pages
        self.held: dict[int, int] = {}
        self.listed: list[int] = []
        self.worst = 0

    def step(self, ids: list[int], pages: dict[int, int]) -> None:
        missing = [cluster for cluster in ids if cluster not in self.held]
        fitting = [cluster for cluster in missing if 0 < pages[cluster] <= self.capacity]
        needed = sum(pages[cluster] for cluster in fitting)
        for victim in self.listed:
            if self.free < needed and victim in self.held and victim not in ids:
                self.free += self.held.pop(victim)
        room = self.free
        for cluster in fitting:
            room -= pages[cluster]
            if room < 0:
                break
            self.free -= pages[cluster]
            self.held[cluster] = pages[cluster]
        for cluster in reversed(ids):
            if cluster in self.held:
                self.held[cluster] = self.held.pop(cluster)
        missed = sum(pages[cluster] for cluster in missing)
        self.worst = max(missed, self.worst - -(-self.worst // MISS_MEMORY))
        wanted, self.listed = RESERVE * self.worst - self.free, []
        for cluster, count in self.held.items():
            if wanted <= 0:
                break
            self.listed.append(cluster)
            wanted -= count


@settings(max_examples=40)
@given(
    page_size=st.sampled_from((1, 2, 3, 5, 8)),
    pages=st.integers(0, 24),
    largest=st.sampled_from((1, 7, 20, 60)),
    policy=st.sampled_from(POLICIES),
    lose=st.sampled_from((0.0, 0.0, 0.4)),
    data=st.data(),
)
def test_any_accesses_keep_the_cache_consistent(
    page_size: int,
    pages: int,
    largest: int,
    policy: str,
    lose: float,
    data: st.DataObject,
) -> None:
    """Clusters of every fill, some larger than the cache, rows of different length, growth between
    steps; with LRU and no decision lost, what is in is what a dictionary has."""
    rng = random.Random(data.draw(st.integers(0, 2**16)))
    rows, heads, ranks, clusters = 2, 2, rng.choice((1, 3, 8)), 24
    config = replace(SMALL, page_size=page_size)
    layer = make_layer(config, offload=True, head_dim=16)
    tokens = clusters * largest
    shapes = wave_buffer.shapes(
        replace(config, cache_ratio=0.0), (rows, heads), tokens, clusters, ranks, 16, torch.float32
    )
    for name, (shape, dtype) in shapes.items():
        size = list(shape)
        if name == "pages":
            size[3] = pages * page_size
        elif name in ("free_pages", "decisions"):
            size[2] += pages
        setattr(layer, name, torch.zeros(size, dtype=dtype))
    wave_buffer.clear(layer)
    layer.store = torch.randn(2, rows, heads, tokens, 16)
    layer.offsets = torch.zeros(rows, heads, clusters + 1, dtype=torch.int32)
    live = [rng.randrange(1, 12) for _ in range(rows)]
    for row in range(rows):
        for head in range(heads):
            grow(layer.offsets[row, head], 0, live[row], largest, rng)
    models = {(row, head): PlainLru(pages) for row in range(rows) for head in range(heads)}

    for _ in range(data.draw(st.integers(1, 30))):
        if rng.random() < 0.2:
            for row in range(rows):
                more = min(rng.randrange(4), clusters - live[row])
                for head in range(heads):
                    grow(layer.offsets[row, head], live[row], more, largest, rng)
                live[row] += more
        retrieved = torch.full((rows, heads, ranks), -1, dtype=torch.int32)
        for (row, head), model in models.items():
            # The first ones are popular.
            wanted = [int(rng.random() ** 2 * live[row]) for _ in range(ranks)]
            wanted = list(dict.fromkeys(wanted))
            retrieved[row, head, : len(wanted)] = torch.tensor(wanted, dtype=torch.int32)
            sizes = layer.offsets[row, head].diff().tolist()
            model.step(wanted, {cluster: -(-sizes[cluster] // page_size) for cluster in wanted})
        before = layer.decisions.clone()
        page_gather(
            retrieved,
            layer.offsets,
            layer.store,
            *(layer.get_buffer(name) for name in wave_buffer.NAMES[:6]),
            layer.counters,
            page_size,
        )
        update_pages(layer.requests, layer.cached, layer.history, layer.decisions, policy)
        if rng.random() < lose:
            layer.decisions.copy_(before)
        assert_consistent(layer)
        if policy == "lru" and lose == 0.0:
            for (row, head), model in models.items():
                held = layer.cached[row, head].nonzero().flatten().tolist()
                assert held == sorted(model.held), (row, head)


def grow(offsets: Tensor, live: int, more: int, largest: int, rng: random.Random) -> None:
    """Clusters of 0 to `largest` tokens at the end of an index; what follows them is empty."""
    for cluster in range(live, live + more):
        offsets[cluster + 1 :] = int(offsets[cluster]) + rng.randrange(largest + 1)
