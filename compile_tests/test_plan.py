"""The plan of a model's memory: what is planned is what is allocated, and too much is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from retro_ops import RetroConfig, RetroLayer, wave_buffer
from retro_ops.benchmarks.memory import measure
from retro_ops.cli import main
from retro_ops.models import RetroCache, load_model, memory, plan
from retro_ops.models.memory import GIB, HOST, Memory, free_memory
from retro_ops.models.plan import ACTIVATIONS, PARTS, ZONES, Plan, Planner
from retro_ops.models.shapes import SHAPES

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**BASE, head_dim=32),
    "qwen2, tied": lambda: Qwen2Config(**BASE, tie_word_embeddings=True),
    "mistral, a window that nothing fills": lambda: MistralConfig(**BASE, sliding_window=600),
    "gemma3, windows": lambda: Gemma3TextConfig(
        **BASE,
        head_dim=16,
        sliding_window=24,
        layer_types=[*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
    ),
}
MEASURED = LlamaConfig(
    vocab_size=4096,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
)
CONFIG = RetroConfig(
    local_tokens=16, cluster_size=8, segment_size=64, update_segment=32, cache_ratio=0.1
)
CONTEXT, ROWS = 300, 2


def make_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="retro").eval()


def run(model: PreTrainedModel, cache: RetroCache, tokens: int) -> None:
    ids = torch.zeros(cache.batch_size, tokens, dtype=torch.int64)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offloaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_plan_is_what_is_allocated(family: str, dtype: torch.dtype, offload: bool) -> None:
    config = FAMILIES[family]()
    planned = Planner(config, CONFIG, dtype=dtype, offload=offload).plan(CONTEXT, ROWS)
    model = make_model(config, dtype)
    cache = RetroCache(config, CONFIG, max_cache_len=CONTEXT, batch_size=ROWS, offload=offload)
    run(model, cache, 200)
    weights = {id(each): each for each in (*model.parameters(), *model.buffers())}
    expected = {"weights": sum(each.nbytes for each in weights.values())}
    for layer in cache.layers:
        for name, buffer in layer.named_buffers().items():
            expected[ZONES[name]] = expected.get(ZONES[name], 0) + buffer.nbytes
    assert [*planned.places] == [HOST]
    parts = planned.places[HOST]
    assert {part: parts[part] for part in parts if part not in ACTIVATIONS} == expected
    assert ("page cache" in parts) == offload


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_of_the_whole_model(family: str) -> None:
    """Run on the CPU with real tensors, all layers; the planner runs a few on the meta device."""
    config = FAMILIES[family]()
    planned = Planner(config, CONFIG, dtype=torch.float32).activations(CONTEXT, ROWS)
    model = make_model(config)
    cache = RetroCache(config, CONFIG, max_cache_len=CONTEXT, batch_size=ROWS)
    for layer, heads in zip(cache.layers, Planner(config, CONFIG)._heads, strict=True):
        tokens = torch.zeros(ROWS, heads.kv, 1, heads.dim)
        layer.lazy_initialization(tokens, tokens)
    for tokens, peak in zip((CONTEXT - 1, 1), planned, strict=True):
        with plan._FusedAttention(), plan._Allocations() as allocations:
            run(model, cache, tokens)
        assert peak == pytest.approx(allocations.peak, rel=0.01)


def test_activations_of_chunks_are_fewer() -> None:
    config = SHAPES["llama-3-8b"]()
    whole, chunks = (Planner(config, prefill_chunk=chunk) for chunk in (None, 4096))
    assert chunks.activations(65536, 1)[0] < 0.2 * whole.activations(65536, 1)[0]
    # A prompt as long as a chunk is one forward.
    assert chunks.activations(4096, 1) == whole.activations(4096, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_turns_work_in_what_they_say(rows: int) -> None:
    layer = RetroLayer(
        RetroConfig(),
        batch_size=rows,
        num_query_heads=8,
        num_kv_heads=2,
        head_dim=64,
        max_length=4096,
        dtype=torch.float32,
    )
    tokens = torch.randn(rows, 2, 2600, 64)
    layer.prefill(tokens[:, :, :2048], tokens[:, :, :2048])
    new = tokens[:, :, 2048:]
    query = new.repeat_interleave(4, dim=1)
    with plan._Allocations() as allocations:
        layer.extend(query, new, new)
    assert layer.extend_bytes(552) == pytest.approx(allocations.peak - query.nbytes, rel=0.15)


def test_shapes_have_their_names_parameters() -> None:
    for name, billions in (("llama-3-8b", 8.03), ("qwen2.5-7b", 7.62), ("qwen2.5-72b", 72.7)):
        model = plan.meta_model(SHAPES[name](), torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offloaded"])
def test_largest_and_longest_are_the_last_that_fit(offload: bool) -> None:
    there = Memory(host=2 * GIB, devices=(4 * GIB,))
    planner = Planner(MEASURED, offload=offload, devices=there.devices)
    rows, tokens = planner.largest_batch(20000, there), planner.longest_context(2, there)
    assert rows > 1
    assert tokens > 20000
    assert planner.plan(20000, rows).fits(there)
    assert not planner.plan(20000, rows + 1).fits(there)
    assert planner.plan(tokens, 2).fits(there)
    assert not planner.plan(tokens + 1, 2).fits(there)
    assert planner.largest_batch(20000, there, prefill=False) > rows
    assert planner.largest_batch(20000, Memory(host=GIB, devices=(GIB,))) == 0
    parts = planner.plan(20000, rows).places
    assert ("KV store" in parts["cuda:0"]) != offload
    assert (HOST in parts) == offload


def test_a_total_counts_one_kind_of_activations() -> None:
    parts = {part: 1 << bit for bit, part in enumerate(PARTS)}
    one = Plan(1, 1, {"cuda:0": parts})
    prefill, decode = (parts[name] for name in ACTIVATIONS)
    assert one.total("cuda:0") == sum(parts.values()) - min(prefill, decode)
    assert one.total("cuda:0", prefill=False) == sum(parts.values()) - prefill
    assert one.allocated("cuda:0") == one.total("cuda:0") - parts["context"]
    assert one.lacks(Memory(0, (one.total("cuda:0"),))) == ""
    assert "needed on cuda:0" in one.lacks(Memory(0, (one.total("cuda:0") - 1,)))


def test_layers_spread_over_gpus() -> None:
    config = SHAPES["llama-3-8b"]()
    one, three = (Planner(config, devices=(40 * GIB,) * count) for count in (1, 3))
    whole, spread = (planner.plan(32768, 1).places for planner in (one, three))
    assert [*spread] == [f"cuda:{index}" for index in range(3)]
    for part in ("weights", "KV store", "wave index"):
        assert sum(parts[part] for parts in spread.values()) == whole["cuda:0"][part]
        assert all(parts[part] > whole["cuda:0"][part] / 5 for parts in spread.values())
    with pytest.raises(ValueError, match=r"do not fit on 2 GPUs of 5.00 GiB, 5.00 GiB"):
        Planner(config, devices=(5 * GIB,) * 2)


def only(monkeypatch: pytest.MonkeyPatch, host: int) -> None:
    """As if so many bytes were free."""
    for module in (memory, plan):
        monkeypatch.setattr(module, "free_on", lambda device: host)


def test_a_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["llama"]()
    model = make_model(config)
    parts = Planner(config, CONFIG, dtype=torch.float32).plan(500, 1).places[HOST]
    row = parts["KV store"] + parts["wave index"] + parts["steady zone"]
    only(monkeypatch, 2 * row)
    cases = ((3, 500, "batch_size at most 2"), (1, 1500, "a smaller max_cache_len"))
    for rows, tokens, advice in cases:
        cache = RetroCache(config, CONFIG, max_cache_len=tokens, batch_size=rows)
        words = rf"{rows} rows of max_cache_len {tokens:,} tokens need \S+ MiB on host, {{}}.*{{}}"
        with pytest.raises(MemoryError, match=words.format(memory.in_gib(2 * row), advice)):
            run(model, cache, 2)
        assert not any(layer.is_initialized for layer in cache.layers)
    run(model, RetroCache(config, CONFIG, max_cache_len=500, batch_size=2), 2)


def test_a_saved_cache_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES["llama"]()
    cache = RetroCache(config, CONFIG, max_cache_len=64)
    run(make_model(config), cache, 60)
    cache.save(tmp_path / "cache")
    only(monkeypatch, 300_000)
    RetroCache.load(tmp_path / "cache", config)
    with pytest.raises(MemoryError, match="1 rows of max_cache_len 5,000 tokens need"):
        RetroCache.load(tmp_path / "cache", config, max_cache_len=5000)


def test_weights_that_do_not_fit_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, 300_000)

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(
        MemoryError, match=r"weights of 'recall' take .* MiB on host, 0.29 MiB are free"
    ):
        load_model("recall", device="cpu")


def test_free_memory_knows_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wave_buffer, "CGROUPS", tmp_path)
    whole = free_memory().host
    assert whole > 0
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_memory().host == 400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory().host == pytest.approx(whole, rel=0.2)


def test_info_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    asked = ["--model", "llama-3-8b", "--context", "120000", "--batch-size", "2", "--offload"]
    there = ["--device-memory", "79", "--host-memory", "128"]
    assert main(["info", *asked, *there, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["fits"]
    # Beside the store what the threads of the page cache read and write.
    on_host = figures["bytes"][HOST]
    assert set(on_host) == {"KV store", "page cache"}
    assert figures["total_bytes"][HOST] == sum(on_host.values())
    assert figures["there_bytes"] == {"cuda:0": 79 * GIB, HOST: 128 * GIB}
    assert figures["largest_batch"] >= 2
    assert figures["longest_context"] >= 120000
    printed = capsys.readouterr().out
    assert "It fits." in printed
    assert "of a model for up to 8,192 tokens" in printed
    store = on_host["KV store"] / GIB
    assert f"{store:.3f}" in printed

    assert main(["info", *asked, "--device-memory", "16", "--host-memory", "128"]) == 0
    printed = capsys.readouterr().out
    assert "It does not fit" in printed
    assert "Largest batch of 120,000 tokens: 0." in printed


def test_info_rejects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "/no/such/model"]) == 2
    assert "no model '/no/such/model'" in capsys.readouterr().err
    for arguments, words in (
        (["--device-memory", "0"], "must be a number of GiB above 0, got '0'"),
        (["--context", "1"], "whole number from 2 on"),
        (["--prefill-chunk", "1"], "whole number from 2 on"),
    ):
        with pytest.raises(SystemExit):
            main(["info", *arguments])
        assert words in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("context", "rows", "compile_step", "offload"),
    [(131072, 1, False, False), (16384, 8, True, False), (65536, 2, False, True)],
    ids=["long", "rows, compiled", "offloaded"],
)
def test_plan_is_what_a_gpu_holds(
    context: int, rows: int, compile_step: bool, offload: bool
) -> None:
    torch.compiler.reset()
    figures = measure(
        MEASURED,
        RetroConfig(),
        context,
        rows,
        torch.bfloat16,
        torch.device("cuda"),
        offload,
        compile_step,
    )
    assert abs(figures["error_percent"]) < 5, figures
