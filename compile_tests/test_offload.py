"""Offloaded layers on a GPU: host memory, graphs, and threads that are late, stalled or dead."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_layer import Tokens, make_layer
from test_models import BASE, FAMILIES, make_prompt
from test_update_pages import ROOT, settle
from test_wave_buffer import TIGHT, assert_consistent, assert_same_but_for_pages, pair
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from retro_ops import RetroLayer, wave_buffer
from retro_ops.models import RetroCache
from retro_ops.ops._contract import ELEMENT_DTYPES
from retro_ops.testing import assert_same

pytestmark = pytest.mark.gpu

# Some three clusters of eight in the cache, five or more retrieved.
FORCED = replace(TIGHT, retrieval_budget=0.1)


def host_bytes() -> int:
    gc.collect()
    return torch.ops.retro.host_bytes(torch.empty(0, device="cuda"))


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    before = host_bytes()
    yield
    settle("cuda")
    torch.compiler.reset()
    assert host_bytes() <= before


# Memory


@pytest.mark.parametrize("dtype", [*ELEMENT_DTYPES, torch.int32, torch.uint8, torch.int64], ids=str)
def test_host_and_gpu_see_the_same_memory(dtype: torch.dtype) -> None:
    tensor = wave_buffer.host_tensor((3, 5, 16), dtype, torch.device("cuda"))
    assert tensor.is_cuda
    assert tensor.is_contiguous()
    tensor.copy_(torch.arange(240).view(3, 5, 16))
    torch.cuda.synchronize()
    bytes_ = (ctypes.c_uint8 * (240 * dtype.itemsize)).from_address(tensor.data_ptr())
    seen = torch.frombuffer(bytes_, dtype=dtype)
    assert_same(seen, torch.arange(240).to(dtype), "seen by the host")
    seen += 1
    assert_same(tensor.flatten() + 0, torch.arange(1, 241).to(dtype), "seen by the GPU")
    assert_same(tensor[1:, ::2].clone(), tensor.cpu()[1:, ::2], "copied")


def test_memory_comes_and_goes() -> None:
    before = host_bytes()
    tensors = [
        wave_buffer.host_tensor((size, 1000), torch.float32, torch.device("cuda"))
        for size in (1, 0, 7)
    ]
    assert host_bytes() >= before + 8 * 4000
    view = tensors[2][3:]
    del tensors
    assert host_bytes() == before + 28_000
    view.zero_()
    del view
    assert host_bytes() <= before


def test_a_layer_stays_where_it_is() -> None:
    layer = make_layer(TIGHT, offload=True, device="cuda")
    for move in ("cpu", torch.float16, "cuda"):
        with pytest.raises(
            RuntimeError, match=r"^RetroLayer: an offloaded .* cannot be moved or cast"
        ):
            torch.nn.Sequential(layer).to(move)
    with pytest.raises(RuntimeError, match=r"^RetroLayer: an offloaded .*; fork\(\) it$"):
        copy.deepcopy(layer)


def test_too_little_room_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = host_bytes(), torch.cuda.memory_allocated()
    monkeypatch.setattr(wave_buffer, "free_host_bytes", lambda: 100_000)
    with pytest.raises(MemoryError, match=r"GB of host memory for 1 layer, 0\.00 GB are free"):
        make_layer(TIGHT, offload=True, device="cuda", max_length=4000)
    monkeypatch.undo()
    with pytest.raises(MemoryError, match=r"GB of (host memory|memory of cuda)"):
        make_layer(TIGHT, offload=True, device="cuda", max_length=10**9)
    assert (host_bytes(), torch.cuda.memory_allocated()) == before


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The host has no memory any more from the `call`-th allocation on."""
    right, calls = wave_buffer.host_tensor, 0

    def host_tensor(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise RuntimeError("host_tensor: no room for 7 bytes of pinned host memory")
        return right(*arguments)

    monkeypatch.setattr(wave_buffer, "host_tensor", host_tensor)


@pytest.mark.parametrize("call", [1, 3, 5])
def test_an_allocation_that_fails_half_way(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    before = host_bytes(), torch.cuda.memory_allocated()
    fail_at(monkeypatch, call)
    with pytest.raises(MemoryError, match=r"found no memory.*no room for 7 bytes"):
        make_layer(TIGHT, offload=True, device="cuda")
    assert (host_bytes(), torch.cuda.memory_allocated()) == before


# Graphs of layers


def capture(layers: list[RetroLayer], tokens: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """A graph of one step of every layer, and its results."""
    states = [{name: b.clone() for name, b in layer.named_buffers()} for layer in layers]
    for layer in layers:
        layer.decode(*tokens)  # loads kernels
    settle("cuda")
    for layer, state in zip(layers, states, strict=True):
        for name, buffer in layer.named_buffers():
            buffer.copy_(state[name])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [layer.decode(*tokens) for layer in layers]
    return graph, outs


@pytest.mark.parametrize("dtype", ELEMENT_DTYPES, ids=str)
@pytest.mark.parametrize("waits", [True, False], ids=["in time", "when it comes"])
def test_500_replays_are_the_same(dtype: torch.dtype, waits: bool) -> None:
    """Rows of different length, growth in the graph, clusters that must leave; late decisions."""
    plain, layer = pair(FORCED, dtype=dtype, device="cuda")
    tokens = Tokens(plain, 650)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150), torch.tensor([0, 37], device="cuda"))
    static = [tensor.clone() for tensor in tokens.at(150)]
    graph, outs = capture([layer], static)
    posts, *_ = torch.ops.retro.update_counts(layer.history)
    for t in range(150, 650):
        for buffer, token in zip(static, tokens.at(t), strict=True):
            buffer.copy_(token)
        graph.replay()
        if waits:
            settle("cuda")
        assert_same(outs[0], plain.decode(*tokens.at(t)), f"{t}")
    settle("cuda")
    assert_consistent(layer)
    assert_same_but_for_pages(layer, plain)
    stats = layer.stats()
    assert stats["updates"] > 0
    assert torch.ops.retro.update_counts(layer.history)[0] == posts + 500
    if waits:
        assert stats["page_evictions"] > 500
        assert stats["late_decisions"] == 0


@pytest.mark.parametrize("heads", [(32, 8, 128), (8, 8, 64), (20, 1, 80), (24, 2, 256)], ids=str)
def test_any_heads(heads: tuple[int, int, int]) -> None:
    """Query heads that take more than one block read the same pages."""
    query_heads, kv_heads, head_dim = heads
    sizes = {"num_query_heads": query_heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    plain, layer = pair(FORCED, dtype=torch.bfloat16, device="cuda", **sizes)
    tokens = Tokens(plain, 300)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    for t in range(150, 300):
        assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
        settle("cuda")
    assert_consistent(layer)
    assert layer.stats()["page_evictions"] > 0


def test_a_long_context() -> None:
    """Sizes of a real layer: 32,768 tokens, 2,048 clusters, pages of 8."""
    config = replace(TIGHT, page_size=8, cluster_size=16, segment_size=8192, cache_ratio=0.02)
    config = replace(config, retrieval_budget=0.018, update_segment=1024)
    sizes = {"num_query_heads": 8, "num_kv_heads": 2, "head_dim": 128, "max_length": 34_000}
    plain, layer = pair(config, dtype=torch.bfloat16, device="cuda", **sizes)
    tokens = Tokens(plain, 32_868)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(32_768))
    for t in range(32_768, 32_868):
        assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
    settle("cuda")
    assert_consistent(layer)


def test_layers_in_one_graph_join_once() -> None:
    """Only the last one waits for the stream beside; each is posted once a replay."""
    pairs = [pair(FORCED, device="cuda", _policy=policy) for policy in ("lfu", "lru", "lru2")]
    tokens = Tokens(pairs[0][0], 300)
    for plain, layer in pairs:
        for each in (plain, layer):
            each.prefill(*tokens.prompt(150))
    layers = [layer for _, layer in pairs]
    static = [tensor.clone() for tensor in tokens.at(150)]
    for layer in layers[:-1]:
        layer.joins = False
    graph, outs = capture(layers, static)
    posts = [torch.ops.retro.update_counts(layer.history)[0] for layer in layers]
    for t in range(150, 300):
        for buffer, token in zip(static, tokens.at(t), strict=True):
            buffer.copy_(token)
        graph.replay()
        for (plain, _), out in zip(pairs, outs, strict=True):
            assert_same(out, plain.decode(*tokens.at(t)), f"{t}")
    settle("cuda")
    for layer, before in zip(layers, posts, strict=True):
        assert torch.ops.retro.update_counts(layer.history)[0] == before + 150
        assert_consistent(layer)
        assert layer.stats()["page_evictions"] > 0


def test_two_graphs_in_turn() -> None:
    """Two models in one process, each with its own stream of steps."""
    pairs = [pair(FORCED, device="cuda", _policy=policy) for policy in ("lfu", "lru")]
    tokens = Tokens(pairs[0][0], 300)
    static = [tensor.clone() for tensor in tokens.at(150)]
    graphs = []
    for plain, layer in pairs:
        for each in (plain, layer):
            each.prefill(*tokens.prompt(150))
        graphs.append(capture([layer], static))
    streams = [torch.cuda.Stream() for _ in pairs]
    for t in range(150, 300):
        for buffer, token in zip(static, tokens.at(t), strict=True):
            buffer.copy_(token)
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (plain, _), (_, outs) in zip(pairs, graphs, strict=True):
            assert_same(outs[0], plain.decode(*tokens.at(t)), f"{t}")
    for _, layer in pairs:
        assert_consistent(layer)


def test_a_layer_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)
    torch._dynamo.reset()
    dynamo_counters.clear()
    plain, layer = pair(FORCED, device="cuda")
    tokens = Tokens(plain, 650)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    for buffer in layer.buffers():
        torch._dynamo.mark_static_address(buffer)

    def decode(layer: RetroLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return layer.decode(query, key, value)

    compiled = torch.compile(decode, mode="reduce-overhead", fullgraph=True)
    for t in range(150, 650):
        out = compiled(layer, *tokens.at(t)).clone()
        assert_same(out, plain.decode(*tokens.at(t)), f"{t}")
    settle("cuda")
    assert_consistent(layer)
    assert dynamo_counters["stats"]["unique_graphs"] == 1
    assert dynamo_counters["inductor"]["cudagraph_skips"] == 0
    assert dynamo_counters["inductor"]["cudagraph_partitions"] == 0
    assert torch.ops.retro.update_counts(layer.history)[0] == 500


# Turns, copies, files


def test_turns_crops_and_forks() -> None:
    plain, layer = pair(FORCED, device="cuda", max_length=800)
    tokens = Tokens(plain, 800)

    def part(first: int, last: int) -> tuple[Tensor, ...]:
        own = slice(first, last)
        return tokens.queries[:, :, own], tokens.keys[:, :, own], tokens.values[:, :, own]

    def both(first: int, last: int) -> None:
        for t in range(first, last):
            assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")

    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    both(150, 200)
    assert_same(layer.extend(*part(200, 220)), plain.extend(*part(200, 220)), "short turn")
    both(220, 250)
    assert_same(layer.extend(*part(250, 400)), plain.extend(*part(250, 400)), "long turn")
    both(400, 410)
    for each in (plain, layer):
        each.crop(400)
    both(400, 450)
    twins = plain.fork(torch.tensor([1, 1, 0])), layer.fork(torch.tensor([1, 1, 0]))
    rows = [tensor[[1, 1, 0]] for tensor in tokens.at(450)]
    assert_same(twins[1].decode(*rows), twins[0].decode(*rows), "forks")
    settle("cuda")
    assert_consistent(layer)
    assert_consistent(twins[1])
    for each in (plain, layer):
        each.reset()
        each.prefill(*tokens.prompt(100))
    both(100, 150)


# Models


def make_model(family: str = "llama") -> PreTrainedModel:
    """Three full-attention layers, or one between two with a window."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**BASE, "num_hidden_layers": 3})
    if family != "llama":
        config = FAMILIES[family]()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="retro")
    return model.eval()


def make_cache(
    model: PreTrainedModel, offload: bool, rows: int = 2, length: int = 400
) -> RetroCache:
    return RetroCache(model.config, FORCED, max_cache_len=length, batch_size=rows, offload=offload)


@torch.no_grad()
def forced(model: PreTrainedModel, step: Any, cache: RetroCache, steps: int) -> Tensor:
    """Logits `[steps, B, V]` behind a prompt."""
    model(make_prompt(2, 120).cuda(), past_key_values=cache)
    ids, logits = torch.zeros(2, 1, dtype=torch.int64, device="cuda"), []
    for place in range(steps):
        ids.copy_(make_prompt(2, 1, seed=place))
        logits.append(step(input_ids=ids, past_key_values=cache).logits[:, -1].clone())
    return torch.stack(logits)


def test_a_models_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)
    model = make_model()
    results = {}
    for offload in (False, True):
        torch._dynamo.reset()
        dynamo_counters.clear()
        step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        cache = make_cache(model, offload)
        results[offload] = forced(model, step, cache, 200)
        assert dynamo_counters["stats"]["unique_graphs"] == 1
        assert dynamo_counters["inductor"]["cudagraph_skips"] == 0
        assert dynamo_counters["inductor"]["cudagraph_partitions"] == 0
        manager = torch._inductor.cudagraph_trees.get_container(0).tree_manager
        assert manager is not None
        recorded = [node for nodes in manager.roots.values() for node in nodes]
        assert len(recorded) == 1
        assert not any(recorded[0].children.values())
    layers = [layer.retro for layer in cache.retro_layers]
    assert [layer.joins for layer in layers if layer is not None] == [False, False, True]
    settle("cuda")
    for layer in layers:
        assert layer is not None
        # The first step runs, the second one is recorded, which posts nothing, and replayed.
        assert torch.ops.retro.update_counts(layer.history)[0] == 200
        assert_consistent(layer)
        assert layer.stats()["page_evictions"] > 0
    assert_same(results[True], results[False], "logits")
    del recorded, manager, step, layers, layer, cache


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_generates_the_same_tokens(family: str) -> None:
    model = make_model(family)
    outs = []
    for offload in (False, True):
        cache = make_cache(model, offload)
        ids = make_prompt(2, 100).cuda()
        outs.append(model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=200))
    assert_same(outs[1], outs[0], "tokens")


def test_a_cache_plans_for_all_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    before = host_bytes()
    one = make_cache(model, True)
    one.layers[0].lazy_initialization(*(torch.zeros(2, 2, 1, 16, device="cuda") for _ in "kv"))
    layer_bytes = host_bytes() - before
    del one
    ids = make_prompt(2, 100).cuda()
    monkeypatch.setattr(wave_buffer, "free_host_bytes", lambda: int(2.5 * layer_bytes))
    cache = make_cache(model, True)
    with pytest.raises(MemoryError, match=r"RetroCache: 2 rows .* MiB on host"):
        model(ids, past_key_values=cache)
    assert host_bytes() <= before
    monkeypatch.undo()

    fail_at(monkeypatch, 8)  # in the second layer
    with pytest.raises(MemoryError, match="found no memory"):
        model(ids, past_key_values=cache)
    assert host_bytes() <= before
    monkeypatch.undo()

    plain = make_cache(model, False)
    outs = [
        model.generate(ids, past_key_values=each, do_sample=False, max_new_tokens=20)
        for each in (plain, cache)
    ]
    assert_same(outs[1], outs[0], "tokens")


def test_files(tmp_path: Any) -> None:
    model = make_model()
    path, outs = tmp_path / "cache.safetensors", []
    cache = make_cache(model, True)
    forced(model, model.forward, cache, 50)
    cache.save(path)
    caches = [cache, *(
        RetroCache.load(path, model.config, offload=offload, device="cuda")
        for offload in (True, False)
    )]  # fmt: skip
    ids = make_prompt(2, 1).cuda()
    for each in caches:
        with torch.no_grad():
            outs.append(
                torch.stack([model(ids, past_key_values=each).logits[:, -1] for _ in range(60)])
            )
    assert_same(outs[1], outs[0], "offloaded again")
    assert_same(outs[2], outs[0], "not offloaded")


# Faults


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from test_offload import *\n" + code],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'compile_tests'}"},
    )


STEPS = """
def steps(count, wait):
    plain, layer = pair(FORCED, device="cuda")
    tokens = Tokens(plain, 650)
    for each in (plain, layer):
        each.prefill(*tokens.prompt(150))
    for t in range(150, 150 + count):
        assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
        if wait: settle("cuda")
    return layer
"""


def test_dead_threads_cost_hits_only() -> None:
    """No thread can be started: what is posted never runs."""
    ran = run_python(
        STEPS
        + """
import resource, threading, time
from test_update_pages import idle, make, post_update_pages
torch.zeros(1, device="cuda")
for _ in range(8):  # takes the stacks that ended threads have left
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
small = make("lru", 1, 1, 1)
limits = resource.getrlimit(resource.RLIMIT_AS)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), limits[1]))
post_update_pages(small)
resource.setrlimit(resource.RLIMIT_AS, limits)
assert idle(0.0).startswith("threads 0, pending 1, failures 1"), idle(0.0)
layer = steps(300, False)
torch.cuda.synchronize()
stats = layer.stats()
assert stats["page_updates"] == stats["page_evictions"] == 0
assert stats["late_decisions"] == 299 * 4
assert stats["page_hits"] > 0
before = torch.ops.retro.host_bytes(layer.counters)
del layer
gc.collect()
assert torch.ops.retro.host_bytes(torch.empty(0, device="cuda")) < before
print("done")
"""
    )
    assert ran.stdout == "done\n", ran.stdout + ran.stderr
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyboardInterrupt", "os._exit(3)"])
def test_a_process_ends_with_updates_under_way(end: str) -> None:
    ran = run_python(f"{STEPS}layers = [steps(20, False) for _ in range(3)]\n{end}")
    expected = {
        "": {0},
        "sys.exit(3)": {3},
        "os._exit(3)": {3},
        "raise KeyboardInterrupt": {-2, 1},  # 1 where SIGINT is ignored, as in the background
    }
    assert ran.returncode in expected[end], ran.stderr
    assert "Segmentation" not in ran.stderr


def test_a_process_ends_with_a_graph_under_way() -> None:
    ran = run_python(
        """
plain, layer = pair(FORCED, device="cuda")
tokens = Tokens(plain, 200)
layer.prefill(*tokens.prompt(150))
graph, outs = capture([layer], [tensor.clone() for tensor in tokens.at(150)])
for _ in range(20):
    graph.replay()
"""
    )
    assert ran.returncode == 0, ran.stderr


def test_layers_go_while_their_updates_are_under_way() -> None:
    plain, layer = pair(FORCED, device="cuda")
    tokens = Tokens(plain, 300)
    for _ in range(20):
        plain, layer = pair(FORCED, device="cuda")
        for each in (plain, layer):
            each.prefill(*tokens.prompt(150))
        for t in range(150, 160):
            assert_same(layer.decode(*tokens.at(t)), plain.decode(*tokens.at(t)), f"{t}")
        del layer, each


def test_a_capture_without_its_last_layer_is_refused() -> None:
    ran = run_python(
        """
_, layer = pair(FORCED, device="cuda")
tokens = Tokens(layer, 200)
layer.prefill(*tokens.prompt(150))
layer.decode(*tokens.at(150))
settle("cuda")
layer.joins = False
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    layer.decode(*tokens.at(151))
"""
    )
    assert ran.returncode == 1, ran.stderr
    assert "unjoined" in ran.stderr
