"""Layers on several devices: the same tokens, and one graph for each share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, load_model, spread
from retro_ops.models.load import move_between

SIZES = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIG = RetroConfig(local_tokens=32, segment_size=256, update_segment=64, min_retrieved_clusters=4)


def make_model(config: LlamaConfig | Qwen2Config) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="retro").eval()


def generate(model: PreTrainedModel, tokens: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(199, (2, 300), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0  # of different length
    cache = RetroCache(model.config, CONFIG, max_cache_len=300 + tokens, batch_size=2)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        disable_compile=True,
        pad_token_id=0,
    )
    return out[:, 300:].cpu()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_same_tokens(kind: type, tied: bool) -> None:
    model = make_model(kind(**SIZES, tie_word_embeddings=tied))
    expected = generate(model)
    parts = spread(copy.deepcopy(model), ["cpu", "cpu"], compiled=False)
    assert [len(stage.layers) for stage in parts.model.layers] == [2, 1]
    assert torch.equal(generate(parts), expected)


def test_a_model_with_a_device_map() -> None:
    """What moved inputs to where the map says goes, and with it the map."""
    model = make_model(LlamaConfig(**SIZES))
    expected = generate(model)
    places = {"model": "cpu", "lm_head": "cpu"}
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    assert model.hf_device_map == places
    assert torch.equal(generate(spread(model, ["cpu", "cpu"], compiled=False)), expected)
    assert not hasattr(model, "hf_device_map")
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())

    moved = make_model(LlamaConfig(**SIZES))
    move_between(moved, {f"model.layers.{i}": "meta" for i in range(3)} | {"lm_head": "meta"})
    assert torch.equal(generate(spread(moved, ["cpu", "cpu"], compiled=False)), expected)


def test_one_graph_for_each_share() -> None:
    model = make_model(LlamaConfig(**SIZES))
    expected = generate(model)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(generate(spread(model, ["cpu", "cpu"], layers=[1, 2])), expected)
    assert counters["stats"]["unique_graphs"] - before == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, r"layers must be 2 numbers from 1 on that add up to 3, got \[3\]"),
        ({"layers": [3, 0]}, r"layers must be 2 numbers from 1 on that add up to 3, got \[3, 0\]"),
        ({"layers": [2, 2]}, r"layers must be 2 numbers from 1 on that add up to 3, got \[2, 2\]"),
    ],
)
def test_rejects(arguments: dict[str, list[int]], message: str) -> None:
    model = make_model(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match=message):
        spread(model, ["cpu", "cpu"], **arguments)
    assert not generate(model, 2).isnan().any()  # nothing has changed


def test_rejects_models() -> None:
    model = make_model(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="the model is spread already"):
        spread(spread(model, ["cpu"], compiled=False), ["cpu"])
    mixed = Gemma3TextConfig(**SIZES, sliding_window=64, pad_token_id=0)
    mixed.layer_types = ["sliding_attention"] * 2 + ["full_attention"]
    with pytest.raises(ValueError, match="layers of one kind, Gemma3ForCausalLM has full"):
        spread(make_model(mixed), ["cpu", "cpu"])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one() -> None:
    model = make_model(LlamaConfig(**SIZES)).to("cuda:0", torch.bfloat16)
    parts = spread(copy.deepcopy(model), ["cuda:0", "cuda:1"])
    assert {str(p.device) for p in parts.model.layers[1].parameters()} == {"cuda:1"}
    assert torch.equal(generate(parts), generate(model))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_loaded_model_stays_on_its_two_gpus(tmp_path: Path) -> None:
    """load_model's device_map says where layers are; ids may come from where the head is."""
    make_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    whole = load_model(tmp_path, device="cuda:0")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    parts = load_model(tmp_path, device_map=places)
    expected = generate(whole)
    assert torch.equal(generate(parts), expected)
    spread(parts)
    assert [(str(stage.device), len(stage.layers)) for stage in parts.model.layers] == [
        ("cuda:0", 1),
        ("cuda:1", 2),
    ]
    assert torch.equal(generate(parts), expected)
    ids = torch.ones(2, 50, dtype=torch.int64, device="cuda:1")
    with torch.no_grad():
        logits = [
            model(ids.to(device), use_cache=False).logits[:, -1].cpu()
            for model, device in ((whole, "cuda:0"), (parts, "cuda:1"))
        ]
    assert torch.equal(logits[0].argmax(dim=-1), logits[1].argmax(dim=-1))
