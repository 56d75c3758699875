"""A whole model's decode step is one CUDA graph, recorded once, whatever the counters say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.models import RetroCache

pytestmark = pytest.mark.gpu

STEPS = 80
CONFIG = RetroConfig(
    sink_tokens=2,
    local_tokens=16,
    segment_size=64,
    update_segment=32,
    retrieval_budget=1.0,  # no choice of clusters that rounding could turn
)


def make_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, attn_implementation="retro").eval()


def make_cache(model: PreTrainedModel) -> RetroCache:
    return RetroCache(model.config, CONFIG, max_cache_len=512, batch_size=2)


def decode(model: PreTrainedModel, step: Any, cache: RetroCache, prompt: Tensor) -> Tensor:
    """Logits `[STEPS, B, V]` of forced tokens behind a prompt."""
    model(prompt, past_key_values=cache)
    ids = torch.zeros(2, 1, dtype=torch.int64, device="cuda")
    forced = torch.randint(128, (STEPS, 2, 1), generator=torch.Generator().manual_seed(1)).cuda()
    logits = []
    for token in forced:
        ids.copy_(token)
        logits.append(step(input_ids=ids, past_key_values=cache).logits[:, -1].clone())
    return torch.stack(logits)


@torch.no_grad()
def test_step_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the index grows, and for a second prompt; the same values as eager."""
    # A skipped CUDA graph is an error.
    monkeypatch.setattr(torch._inductor.config.triton, "cudagraph_or_error", True)
    torch.compiler.reset()
    counters.clear()
    model = make_model()
    prompts = [torch.randint(128, (2, tokens), device="cuda") for tokens in (150, 97)]
    step = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    cache, eager_cache = make_cache(model), make_cache(model)
    decode(model, step, cache, prompts[0])  # warms up and records
    for prompt in prompts:
        cache.reset()
        eager_cache.reset()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compiled = decode(model, step, cache, prompt)
        eager = decode(model, model.forward, eager_cache, prompt)
        torch.testing.assert_close(compiled, eager, atol=2e-3, rtol=2e-3)
        stats = cache.stats()
        assert stats["updates"] >= 2 * 2  # layers, rows
        assert stats["dropped_tokens"] == 0

    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_partitions"] == 0
    manager = torch._inductor.cudagraph_trees.get_container(0).tree_manager
    assert manager is not None
    recorded = [node for nodes in manager.roots.values() for node in nodes]
    assert len(recorded) == 1
    assert not any(recorded[0].children.values())
