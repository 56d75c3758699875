"""Layers on several devices: the same tokens, and one graph for each share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, spread

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
