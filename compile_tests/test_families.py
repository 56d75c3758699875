"""Families of models by name, on tiny random weights with the real structure of each.

Real are head_dim, query heads per KV head, norms, windows, scalings of the rotary embedding and
attention sinks; small are width, depth, vocabulary, and the lengths at which windows and scalings
begin to matter.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from test_models import (
    ALL,
    BASE,
    assert_tokens_of,
    decode_loop,
    generate,
    graphs,
    make_cache,
    make_prompt,
    one_line,
    padded,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BambaConfig,
    BartConfig,
    DeepseekV2Config,
    DynamicCache,
    FalconConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
)

from retro_ops import RetroConfig, RetroLayer
from retro_ops.models import RetroCache, load_model, rope, support
from retro_ops.models import spread as retro_spread
from retro_ops.models.cache import RetroCacheLayer, SlidingCacheLayer
from retro_ops.models.generate import make_cache as make_any_cache
from retro_ops.models.load import layer_devices, move_between, prepare, remove_moves
from retro_ops.models.prefill import LocalPrefill, attention
from retro_ops.testing import assert_same, assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

ROOT = Path(__file__).parents[1]


def heads(head_dim: int, query: int, kv: int, **fields: Any) -> dict[str, Any]:
    return {
        **BASE,
        "head_dim": head_dim,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        **fields,
    }


def without_head_dim(query: int, kv: int, head_dim: int, **fields: Any) -> dict[str, Any]:
    """For configs in which the width says it."""
    width = query * head_dim
    own = heads(head_dim, query, kv, hidden_size=width, **fields)
    own["initializer_range"] *= (BASE["hidden_size"] / width) ** 0.5  # logits as of the others
    del own["head_dim"]
    return own


def longrope(dim: int, **fields: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.01 * i for i in range(dim // 2)],
        "long_factor": [1.5 + 0.2 * i for i in range(dim // 2)],
        "original_max_position_embeddings": 64,
        **fields,
    }


YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
# Each of a family of `support.FAMILIES`, which the test of the README checks.
TINY: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama-3.1": (
        "Llama 3, 3.1 (8B)",
        lambda: LlamaConfig(
            **heads(128, 4, 1),
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama-gradient": (
        "Llama 3 Gradient (8B, 1048k)",
        lambda: LlamaConfig(
            **heads(128, 4, 1, max_position_embeddings=1048576),
            rope_parameters={"rope_type": "default", "rope_theta": 3580165449.0},
        ),
    ),
    "qwen2.5-7b": (
        "Qwen2.5 (7B, 72B)",
        lambda: Qwen2Config(**without_head_dim(7, 1, 128), rope_parameters=dict(YARN)),
    ),
    "qwen2.5-72b": (
        "Qwen2.5 (7B, 72B)",
        lambda: Qwen2Config(**without_head_dim(8, 1, 128), rope_parameters=dict(YARN)),
    ),
    "qwen3": ("Qwen3", lambda: Qwen3Config(**heads(128, 4, 2))),
    "qwen3-moe": (
        "Qwen3",
        lambda: Qwen3MoeConfig(
            **heads(128, 4, 1, initializer_range=0.6),
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
    ),
    "mistral-0.1": ("Mistral", lambda: MistralConfig(**heads(128, 4, 1), sliding_window=24)),
    "mistral-0.3": ("Mistral", lambda: MistralConfig(**heads(128, 4, 1), sliding_window=None)),
    "gemma-3": (
        "Gemma 3 (text)",
        lambda: Gemma3TextConfig(
            **heads(256, 2, 1, num_hidden_layers=3),
            sliding_window=24,
            query_pre_attn_scalar=168,  # 27B: no 1 / sqrt(head_dim)
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        ),
    ),
    "phi-2": (
        "Phi-2",
        lambda: PhiConfig(
            **without_head_dim(2, 2, 80, initializer_range=0.6),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.4,
            },
        ),
    ),
    "phi-3.5-mini": (
        "Phi-3, Phi-3.5 (mini)",
        lambda: Phi3Config(
            **without_head_dim(2, 2, 96),
            sliding_window=1024,
            original_max_position_embeddings=64,
            rope_parameters=longrope(96),
        ),
    ),
    "phi-4": (
        "Phi-4, Phi-4-mini",
        lambda: Phi3Config(**without_head_dim(4, 1, 128), original_max_position_embeddings=64),
    ),
    "phi-4-mini": (
        "Phi-4, Phi-4-mini",
        lambda: Phi3Config(
            **without_head_dim(3, 1, 128),
            sliding_window=1024,
            original_max_position_embeddings=64,
            rope_parameters=longrope(96, partial_rotary_factor=0.75),
        ),
    ),
    "gpt-oss": (
        "gpt-oss",
        lambda: GptOssConfig(
            **heads(64, 8, 1),
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=24,
            rope_parameters={**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        ),
    ),
}
tiny = pytest.mark.parametrize("name", TINY)


_MODELS: dict[str, PreTrainedModel] = {}


def make_model(name: str) -> PreTrainedModel:
    """The tiny model of a name, ready for its full context; made once, set to `retro`."""
    if name not in _MODELS:
        config = TINY[name][1]()
        prepare(config, attention="retro", context=None, rope_parameters=None)
        _MODELS[name] = from_config(config)
    model = _MODELS[name]
    model.set_attn_implementation("retro")
    return model


def from_config(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="retro").eval()
    model.generation_config.pad_token_id = 0
    rope.without_switch(model)
    for module in model.modules():
        if isinstance(sinks := getattr(module, "sinks", None), nn.Parameter):
            # Some of much more weight than all tokens together, some of none.
            nn.init.uniform_(sinks, -4.0, 8.0)
    return with_batched_experts(model)


def with_batched_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Grouped products of float32 wait for a GPU, which a CUDA graph may not."""
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("batched_mm")
    return model


def generate_dense(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """By transformers alone: `sdpa`, or `eager` where it has no `sdpa`."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        return generate(model, ids, **arguments)
    finally:
        model.set_attn_implementation("retro")


# Tokens and graphs


@tiny
def test_generates_the_tokens_of_dense_attention(name: str) -> None:
    """Rows of different length; the shortest is not indexed at first, and all of them grow."""
    model = make_model(name)
    ids, mask = padded(make_prompt(3, 90), [0, 20, 75])
    cache = make_cache(model, 3)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)
    full = [kind != "sliding_attention" for kind in support.check_model(model.config)]
    wide = (getattr(model.config, "sliding_window", None) or 0) > 512
    expected = [RetroCacheLayer if each or wide else SlidingCacheLayer for each in full]
    assert [type(layer) for layer in cache.layers] == expected
    if cache.retro_layers:
        stats, layers = cache.stats(), len(cache.retro_layers)
        assert stats["steps"] == 49
        assert stats["indexed_tokens"] == layers * (70 + 50 + 3 * 32)


@tiny
def test_decoding_is_one_graph(name: str) -> None:
    """No graph breaks, and no other graph from token to token or for a second cache."""
    model = make_model(name)
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = make_cache(model, 2)
    ids = make_prompt(2, 20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        step(ids[:, :1].contiguous(), past_key_values=cache)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for again, prompt in ((cache, 60), (make_cache(model, 2), 30)):
            again.reset()
            ids = make_prompt(2, prompt, seed=prompt)
            retro = decode_loop(model, step, again, ids, 30)
            assert_tokens_of(generate_dense(model, ids, max_new_tokens=30), retro)
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3", "gemma-3", "phi-3.5-mini", "gpt-oss"])
def test_half_precision_is_as_close_as_dense(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(make_model(name))
    # float32 is exact enough, and all that experts have.
    ids = make_prompt(2, 120)
    exact = generate_dense(model, ids, max_new_tokens=2)[1][:, 1].double()
    chosen = generate_dense(model, ids, max_new_tokens=1)[0]
    model.to(dtype)
    dense = generate_dense(model, chosen, max_new_tokens=1)[1][:, 0].double()
    cache = make_cache(model, 2)
    with torch.no_grad():
        model(chosen[:, :-1], past_key_values=cache)
        logits = model(chosen[:, -1:], past_key_values=cache).logits[:, -1]
    assert cache.retro_layers[0].retro.store.dtype == dtype  # type: ignore[union-attr]
    assert float((logits.double() - exact).norm()) < 1.5 * float((dense - exact).norm())


def test_images_models_with_text_alone() -> None:
    """Gemma 3 from 4B on is a model of images and text; its text part is served."""
    text = TINY["gemma-3"][1]().to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = from_config(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=1,
            initializer_range=BASE["initializer_range"],
            tie_word_embeddings=False,
        )
    )
    ids, mask = padded(make_prompt(2, 90), [0, 20])
    retro = generate(model, ids, attention_mask=mask, past_key_values=make_cache(model, 2))
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


# Attention sinks


def sinks_of(query_heads: int) -> Tensor:
    return torch.linspace(-8.0, 12.0, query_heads)


def dense_with_sinks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor,
    scale: float,
    first: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """By definition: the sink is a logit of the softmax without a value."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = (each.to(dtype).repeat_interleave(groups, dim=1) for each in (keys, values))
    logit = query.to(dtype) @ keys.transpose(-1, -2) * scale
    place = torch.arange(keys.shape[2])
    later = place > place[first : first + query.shape[2], None]
    logit = logit.masked_fill(later, -torch.inf)
    sink = sinks.to(dtype)[None, :, None, None].expand(*logit.shape[:3], 1)
    return torch.cat((logit, sink), dim=-1).softmax(dim=-1)[..., :-1] @ values


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("held", [0, 10, 150], ids=["empty", "steady", "indexed"])
def test_a_layer_with_sinks(held: int, offload: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 8, held + 40, 32)
    keys, values = torch.randn(2, 2, 2, held + 40, 32)
    layer = RetroLayer(
        ALL,
        batch_size=2,
        num_query_heads=8,
        num_kv_heads=2,
        head_dim=32,
        max_length=held + 40,
        dtype=torch.float32,
        offload=offload,
    )
    if held:
        layer.prefill(keys[:, :, :held], values[:, :, :held])
    sinks = sinks_of(8)
    expected = dense_with_sinks(query[:, :, held:], keys, values, sinks, 0.3, held)
    turn = slice(held, held + 39)
    out = layer.extend(
        query[:, :, turn], keys[:, :, turn], values[:, :, turn], scale=0.3, sinks=sinks
    )
    torch.testing.assert_close(out.double(), expected[:, :, :39], rtol=1e-5, atol=1e-5)
    last = slice(held + 39, None)
    out = layer.decode(query[:, :, last], keys[:, :, last], values[:, :, last], 0.3, sinks)
    torch.testing.assert_close(out.double(), expected[:, :, 39:], rtol=1e-5, atol=1e-5)


def test_sinks_of_no_weight_change_nothing() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, heads, 100, 32) for heads in (4, 2, 2))
    outs = []
    for sinks in (None, torch.full((4,), -torch.inf)):
        layer = RetroLayer(
            RetroConfig(),
            batch_size=1,
            num_query_heads=4,
            num_kv_heads=2,
            head_dim=32,
            max_length=200,
            dtype=torch.float32,
        )
        parts = [slice(0, 1), slice(1, 99), slice(99, 100)]
        take = [[each[:, :, part] for each in (query, keys, values)] for part in parts]
        outs.append(
            [
                layer.decode(*take[0], sinks=sinks),
                layer.extend(*take[1], sinks=sinks),
                layer.decode(*take[2], sinks=sinks),
            ]
        )
    for without, none in zip(*outs, strict=True):
        torch.testing.assert_close(none, without)


@pytest.mark.parametrize(
    ("sinks", "text"),
    [
        (
            torch.zeros(3),
            "sinks must be [Hq] = [4] floating-point logits, got [3] of torch.float32",
        ),
        (torch.zeros(4, dtype=torch.int64), "got [4] of torch.int64"),
    ],
)
def test_refuses_sinks(sinks: Tensor, text: str) -> None:
    layer = RetroLayer(
        ALL, batch_size=1, num_query_heads=4, num_kv_heads=2, head_dim=32, max_length=9
    )
    tokens = [torch.zeros(1, heads, 1, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    for method in (layer.decode, layer.extend):
        with pytest.raises(ValueError, match="sinks must be") as error:
            method(*tokens, sinks=sinks)
        one_line(error, text)
    assert layer.lengths().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", ["causal", "masked", "one", "longer"])
def test_sdpa_with_sinks(keys: str, dtype: torch.dtype) -> None:
    """Sinks in float32, which no dtype below holds exactly, and a scale that is no power of two."""
    torch.manual_seed(0)
    tokens = 1 if keys == "one" else 50
    query = torch.randn(2, 8, tokens, 40).to(dtype)
    key, value = torch.randn(2, 2, 2, {"one": 30, "longer": 60}.get(keys, 50), 40).to(dtype)
    sinks = sinks_of(8) + 0.1234567
    mask = torch.ones(50, 50, dtype=torch.bool).tril() if keys == "masked" else None
    out = attention(query, key, value, mask, scale=0.17, sinks=sinks).transpose(1, 2)
    seen = slice(tokens if keys != "one" else None)
    first = 29 if keys == "one" else 0
    given = (query, key[:, :, seen], value[:, :, seen], sinks, 0.17, first)
    assert_within_budget(out, dense_with_sinks(*given), dense_with_sinks(*given, dtype), keys)


@pytest.mark.parametrize("cache", ["none", "dynamic", "make_cache"])
def test_sinks_without_a_retro_cache(cache: str) -> None:
    """Exact too: `sdpa` of transformers would leave them out."""
    model = make_model("gpt-oss")
    ids, mask = padded(make_prompt(2, 60), [0, 20])
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20}
    dense = generate_dense(model, ids, **arguments)
    if cache == "none":
        arguments["use_cache"] = False
    elif cache == "dynamic":
        arguments["past_key_values"] = DynamicCache(config=model.config)
    else:
        arguments["past_key_values"] = make_any_cache(model, "dense", batch_size=2, max_length=90)
    assert_tokens_of(dense, generate(model, ids, **arguments))


def test_a_second_turn_with_sinks() -> None:
    model = make_model("gpt-oss")
    ids, mask = padded(make_prompt(2, 90), [0, 9])
    retro = generate(
        model, ids, attention_mask=mask, past_key_values=make_cache(model, 2), prefill_chunk_size=40
    )
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


def test_a_compiled_prompt_with_sinks() -> None:
    """Of any length, padded, in one graph."""
    model = make_model("gpt-oss")
    step = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for tokens, starts in ((90, [0, 20]), (70, [3, 0])):
        ids, mask = padded(make_prompt(2, tokens), starts)
        cache = make_cache(model, 2)
        cache.early_initialization(2, 1, 64, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            retro = step(ids, attention_mask=mask, past_key_values=cache).logits
            expected = model(ids, attention_mask=mask).logits
        real = mask.bool()
        torch.testing.assert_close(retro[real], expected[real], rtol=1e-4, atol=1e-4)
    assert graphs() == 1


# Rotary embeddings


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("context", "tokens"), [(512, 65), (512, 200), (65, 70), (64, 64), (9, 9)])
@pytest.mark.parametrize("name", ["phi-3.5-mini", "phi-4-mini"])
def test_longrope_is_that_of_its_context(name: str, context: int, tokens: int) -> None:
    """At the context it is fixed to, a model is bit for bit what it was before."""
    plain = AutoModelForCausalLM.from_config(TINY[name][1](), attn_implementation="sdpa").eval()
    config = TINY[name][1]()
    prepare(config, attention="retro", context=context, rope_parameters=None)
    fixed = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    fixed.load_state_dict(plain.state_dict())
    ids = make_prompt(1, tokens)
    assert_same(logits_of(fixed, ids), logits_of(plain, ids))
    rope.without_switch(fixed)
    assert_same(logits_of(fixed, ids), logits_of(plain, ids))
    # The config says so by itself: another process reads it.
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    other = AutoModelForCausalLM.from_config(again, attn_implementation="sdpa").eval()
    other.load_state_dict(plain.state_dict())
    assert_same(logits_of(other, ids), logits_of(plain, ids))


def test_dynamic_scaling_is_that_of_its_context() -> None:
    def make() -> Any:
        return LlamaConfig(
            **heads(32, 4, 2, max_position_embeddings=64),
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        )

    plain = AutoModelForCausalLM.from_config(make(), attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match="other frequencies at every length") as error:
        RetroCache(make(), max_cache_len=65)
    one_line(error, "load it with retro_ops.models.load_model(..., context=65)")
    RetroCache(make(), max_cache_len=64)
    config = make()
    rope.fix(config, 100)
    assert rope.why_not_fixed(config, 100) is None
    fixed = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    fixed.load_state_dict(plain.state_dict())
    ids = make_prompt(1, 100)
    torch.testing.assert_close(logits_of(fixed, ids), logits_of(plain, ids))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("phi-3.5-mini", "its LongRoPE embedding switches frequencies after 64 tokens"),
        ("phi-4", "generate drops the cache of such a model after 64 tokens"),
    ],
)
def test_refuses_a_model_that_would_switch(name: str, text: str) -> None:
    """transformers would generate without the cache, and not say so."""
    config = TINY[name][1]()
    RetroCache(config, max_cache_len=64)
    with pytest.raises(ValueError, match="is not ready for 65 tokens") as error:
        RetroCache(config, max_cache_len=65)
    one_line(error, text)
    one_line(error, "load it with retro_ops.models.load_model(..., context=65)")
    # What happens, or the refusal is for nothing.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    cache = DynamicCache(config=config)
    inputs = model.prepare_inputs_for_generation(make_prompt(1, 65), past_key_values=cache)
    assert inputs.get("past_key_values") is None
    inputs = model.prepare_inputs_for_generation(make_prompt(1, 64), past_key_values=cache)
    assert inputs["past_key_values"] is cache


def test_a_window_wider_than_any_context_is_none() -> None:
    """Phi-3.5-mini's: its layers are indexed; one that the cache could fill is a window."""
    for window, longest, kind in (
        (512, 200, RetroCacheLayer),
        (511, 200, SlidingCacheLayer),
        (600, 601, SlidingCacheLayer),
    ):
        config = MistralConfig(**BASE, sliding_window=window)
        cache = RetroCache(config, ALL, max_cache_len=longest)
        assert {type(layer) for layer in cache.layers} == {kind}


YARN4 = {"rope_type": "yarn", "factor": 4.0}


def test_override_of_the_rotary_embedding() -> None:
    """As Qwen2.5's model card has it."""
    config = Qwen2Config(**without_head_dim(7, 1, 128), rope_parameters={"rope_theta": 1e6})
    assert rope.longest_context(config) == 512
    rope.override(config, YARN4)
    expected = {**YARN4, "rope_theta": 1e6, "original_max_position_embeddings": 512}
    assert dict(config.rope_parameters) == expected
    assert rope.longest_context(config) == config.max_position_embeddings == 2048
    # A config that has it already, with the length that the model had before.
    written = Qwen2Config(**without_head_dim(7, 1, 128), rope_parameters=dict(expected))
    assert written.max_position_embeddings == 512
    assert rope.longest_context(written) == 2048

    config = TINY["gemma-3"][1]()
    rope.override(config, {"full_attention": {"rope_type": "linear", "factor": 2.0}})
    assert config.rope_parameters["full_attention"] == {
        "rope_type": "linear",
        "factor": 2.0,
        "rope_theta": 1e6,
    }
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert config.max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("config", "parameters", "text"),
    [
        ("qwen3", {"rope_type": "yarm", "factor": 4.0}, "rope_type must be one of default, linear"),
        ("qwen3", {"factor": 4.0}, "got None"),
        ("qwen3", {"rope_type": "yarn", "factor": 0.5}, "must be a number from 1 on, got 0.5"),
        ("qwen3", {"rope_type": "yarn"}, "Missing required keys in `rope_parameters`"),
        ("qwen3", {"rope_type": "longrope", "factor": 2.0}, "Missing required keys"),
        ("gemma-3", YARN4, "by layer type (sliding_attention, full_attention), got 'rope_type'"),
        ("phi-4", YARN4, "got yarn"),
    ],
)
def test_refuses_rope_parameters(config: str, parameters: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="rope_") as error:
        rope.override(TINY[config][1](), parameters)
    one_line(error, text)


def test_refuses_to_turn_what_does_not_turn() -> None:
    class NoRope(LlamaConfig):
        pass

    config = NoRope(**BASE)
    config.rope_parameters = None
    with pytest.raises(ValueError, match="NoRope has no rotary embedding"):
        rope.override(config, YARN4)


# The prefill hook


@pytest.mark.parametrize(("sink_tokens", "window"), [(0, 16), (5, 16), (30, 16), (4, 100), (4, 1)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_local_prefill_is_its_mask(sink_tokens: int, window: int, with_sinks: bool) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, heads, 90, 16) for heads in (4, 2, 2))
    starts = torch.tensor([0, 37])
    sinks = sinks_of(4) if with_sinks else None
    plugged = LocalPrefill(sink_tokens, window)
    out = plugged(query, keys, values, scale=0.3, starts=starts, sinks=sinks, layer_idx=0)
    place = torch.arange(90)
    distance = place[:, None] - place
    for row, start in enumerate(starts.tolist()):
        seen = (distance >= 0) & ((distance < window) | (place < start + sink_tokens))
        own = (slice(row, row + 1), slice(None), slice(start, None))
        expected = attention(
            query[own], keys[own], values[own], seen[start:, start:], scale=0.3, sinks=sinks
        )
        torch.testing.assert_close(out[own], expected.transpose(1, 2))


def test_refuses_a_local_prefill_of_nothing() -> None:
    for numbers in ((-1, 4), (4, 0)):
        with pytest.raises(ValueError, match="at least 0 and window at least 1, got") as error:
            LocalPrefill(*numbers)
        one_line(error, f"{numbers[0]} and {numbers[1]}")


class Flex:
    """Exact attention by flex_attention; notes what it was asked."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        starts: Tensor | None,
        sinks: Tensor | None,
        layer_idx: int,
    ) -> Tensor:
        self.layers.append(layer_idx)
        assert sinks is None
        first = torch.zeros(len(query), dtype=torch.int64) if starts is None else starts

        def seen(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (j >= first[row])

        tokens = query.shape[2]
        mask = create_block_mask(seen, len(query), None, tokens, tokens, device="cpu")
        return flex_attention(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["llama-3.1", "gemma-3", "phi-4-mini"])
def test_a_plugged_in_prefill(name: str) -> None:
    """Exact attention by another kernel: the same tokens; only full-attention layers ask it."""
    model, flex = make_model(name), Flex()
    ids, mask = padded(make_prompt(2, 90), [0, 20])
    cache = make_cache(model, 2, prefill_attention=flex)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)
    assert flex.layers == ([1] if name == "gemma-3" else [0, 1])
    assert cache.fork().layers[1].prefill_attention is flex


def test_a_sparse_prefill_shows() -> None:
    model = make_model("llama-3.1")
    ids = make_prompt(1, 120)

    def logits(plugged: Any) -> Tensor:
        cache = make_cache(model, 1, prefill_attention=plugged)
        with torch.no_grad():
            return model(ids, past_key_values=cache).logits

    exact = logits(None)
    torch.testing.assert_close(logits(LocalPrefill(4, 120)), exact)
    sparse = logits(LocalPrefill(4, 30))
    torch.testing.assert_close(sparse[:, :30], exact[:, :30])
    assert float((sparse - exact)[:, 60:].abs().max()) > 1e-2


def test_refuses_what_a_prefill_must_not_return() -> None:
    model = make_model("llama-3.1")

    def wrong(query: Tensor, *tokens: Tensor, **rest: Any) -> Tensor:
        return query.transpose(1, 2)

    with pytest.raises(ValueError, match="prefill_attention must return") as error:
        model(make_prompt(1, 9), past_key_values=make_cache(model, prefill_attention=wrong))
    one_line(error, "[1, 4, 9, 128] of torch.float32, got [1, 9, 4, 128] of torch.float32")


# Refusals


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "deepseek": ("DeepSeek V2, V3", DeepseekV2Config, "latent attention (MLA), which Deepseek"),
    "jamba": ("Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba", JambaConfig, "'linear_attention'"),
    "bamba": ("Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba", BambaConfig, "'linear_attention'"),
    "falcon-h1": ("Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba", FalconH1Config, "type 'hybrid'"),
    "qwen3-next": (
        "Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba",
        Qwen3NextConfig,
        "layer 0 of Qwen3NextConfig is of type 'linear_attention'; only full_attention and",
    ),
    "mamba": ("Jamba, Bamba, Falcon-H1, Qwen3-Next, Mamba", MambaConfig, "'linear_attention'"),
    "recurrent": ("", RecurrentGemmaConfig, "recurrent layers, which RecurrentGemmaForCausalLM"),
    "t5": ("T5, BART", T5Config, "is for decoders, T5Config has an encoder too"),
    "bart": ("T5, BART", BartConfig, "is for decoders, BartConfig has an encoder too"),
    "per-layer": ("", Gemma4TextConfig, "has heads of different sizes"),
    "no-interface": ("", FalconConfig, "FalconForCausalLM does not go through transformers'"),
    "head_dim": ("", lambda: LlamaConfig(**heads(72, 4, 2)), "from 16 to 256, LlamaConfig has 72"),
    "wide": ("", lambda: GPTNeoXConfig(hidden_size=2048, num_attention_heads=4), "has 512"),
}
# In test_models.py.
REFUSED_ELSEWHERE = {"Gemma 2", "Gemma 3n", "Llama 4"}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_before_any_weight(name: str, tmp_path: Path) -> None:
    """A directory without weights: that there are none is not what it says."""
    _, make_config, text = REFUSED[name]
    config = make_config()
    if name == "per-layer":
        text = "layers of Gemma4TextConfig have heads of different sizes"
    with pytest.raises(ValueError, match="RetroCache") as error:
        RetroCache(config, max_cache_len=100)
    one_line(error, text)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="RetroCache") as error:
        load_model(tmp_path)
    one_line(error, text)


def test_the_documents_name_the_families_of_the_code() -> None:
    assert support.family_table() in (ROOT / "docs/models.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for row, status in (("work", True), ("are refused", False)):
        names = [family.name for family in support.FAMILIES if family.works is status]
        assert f"| models that {row} | {'; '.join(names)} |\n" in readme
    works = {family.name for family in support.FAMILIES if family.works}
    assert works == {family for family, _ in TINY.values()}
    compared = {family.name: family.compared_with for family in support.FAMILIES}
    for name, (family, _) in TINY.items():
        has_sdpa = make_model(name)._supports_sdpa
        assert compared[family] == ("sdpa" if has_sdpa else "eager")  # see `generate_dense`
    refused = {family.name for family in support.FAMILIES if not family.works}
    assert refused == {family for family, _, _ in REFUSED.values() if family} | REFUSED_ELSEWHERE


# Loading


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints as the hub has them: their configs are not prepared for anything."""
    made = {}
    for name in ("phi-3.5-mini", "phi-4", "qwen3", "gpt-oss"):
        made[name] = tmp_path_factory.mktemp(name)
        from_config(TINY[name][1]()).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("context", [60, 150, None])
@pytest.mark.parametrize("name", ["phi-3.5-mini", "phi-4"])
def test_loads_for_a_context(name: str, context: int | None, directories: dict[str, Path]) -> None:
    """Prompts longer than the switch, and the tokens of the model as transformers loads it."""
    model = load_model(directories[name], device="cpu", context=context)
    prompt = min(context or 150, 150) - 10
    cache = make_cache(model, 1, context or 200)
    retro = generate(model, make_prompt(1, prompt), past_key_values=cache, max_new_tokens=10)
    assert cache.retro_layers[0].longest_row() == prompt + 9
    plain = AutoModelForCausalLM.from_pretrained(directories[name]).eval()
    assert_tokens_of(generate(plain, make_prompt(1, prompt), max_new_tokens=10), retro)


def test_loads_with_yarn(directories: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="a context of 2000 tokens exceeds the 512") as error:
        load_model(directories["qwen3"], device="cpu", context=2000)
    one_line(error, "stretch it with rope_parameters={'rope_type': 'yarn', 'factor': 4.0}")
    model = load_model(
        directories["qwen3"],
        device="cpu",
        context=2000,
        rope_parameters=YARN4,
        dtype="bfloat16",
        attention="sdpa",
    )
    assert model.dtype == torch.bfloat16
    assert model.config.max_position_embeddings == 2048
    config = AutoConfig.from_pretrained(directories["qwen3"], rope_parameters={**YARN, "factor": 1})
    turning = model.model.rotary_emb
    factor, _ = rope.ROPE_INIT_FUNCTIONS["yarn"](model.config, "cpu")
    assert_same(turning.inv_freq, factor)
    assert turning.attention_scaling > 1
    assert config.max_position_embeddings == 512


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device or device_map, got 'cpu' and 'auto'"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"dtype": "float64"}, "dtype must be one of auto, float32, bfloat16, float16, got"),
        ({"dtype": torch.int8}, "got 'torch.int8'"),
        (
            {"context": 513},
            "a context of 513 tokens exceeds the 512 that the model reads (Qwen3Config)",
        ),
    ],
)
def test_load_model_refuses(
    arguments: dict[str, Any], text: str, directories: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        load_model(directories["qwen3"], **arguments)
    one_line(error, text)


# Several devices


@pytest.mark.parametrize("name", ["gemma-3", "gpt-oss"])
def test_a_spread_model_is_one_graph(name: str) -> None:
    """Its parts move their inputs; accelerate's hooks, which do so too, give way."""
    model = copy.deepcopy(make_model(name))
    ids, mask = padded(make_prompt(2, 60), [0, 20])
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20}
    expected = generate(model, ids, past_key_values=make_cache(model, 2), **arguments)
    places = spread(model, "cpu", "cpu")
    dispatch_model(model, places, main_device="cpu", force_hooks=True)
    for move in (lambda: None, lambda: move_between(model, places)):
        move()
        retro = generate(model, ids, past_key_values=make_cache(model, 2), **arguments)
        assert_same(retro[1], expected[1])
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    move_between(model, places)  # again: instead of the others, not beside them
    assert {len(model.get_submodule(name)._forward_pre_hooks) for name in places} == {1}
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = make_cache(model, 2)
    decode_loop(model, step, cache, ids, 20)
    assert graphs() == 1


def test_parts_move_their_inputs() -> None:
    """To a device that is there only as fake tensors."""
    parts = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})
    move_between(parts, {"first": "cpu", "second": "cuda:1"})
    with FakeTensorMode():
        tensor = torch.empty(2)
        assert str(parts["first"](tensor).device) == "cpu"
        moved = parts["second"]((tensor, {"mask": tensor, "other": 3}))
    assert str(moved[0].device) == str(moved[1]["mask"].device) == "cuda:1"
    assert moved[1]["other"] == 3
    twin = copy.deepcopy(parts)
    remove_moves(parts)
    with FakeTensorMode():
        assert str(parts["second"](torch.empty(2)).device) == "cpu"
        assert str(twin["second"](torch.empty(2)).device) == "cuda:1"
        remove_moves(twin)
        assert str(twin["second"](torch.empty(2)).device) == "cpu"


def test_gpus_have_numbers() -> None:
    """As in a device_map; 0 is one, too."""
    parts = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})
    move_between(parts, {"first": 0, "second": 1})
    with FakeTensorMode():
        assert str(parts["first"](torch.empty(2)).device) == "cuda:0"
        assert str(parts["second"](torch.empty(2)).device) == "cuda:1"


def test_layers_live_where_their_keys_come_from() -> None:
    """Devices that are not there, as fake tensors: none of them is asked to compute."""
    cache = RetroCache(TINY["gemma-3"][1](), ALL, max_cache_len=200, batch_size=2)
    places = ["cuda:1", "cuda:0", "cpu"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for index, place in enumerate(places):
            keys = torch.empty(2, 1, 90, 256, device=place)
            cache.update(keys, keys, index)
        window, full, last = cache.layers
        assert {str(buffer.device) for buffer in full.retro.buffers()} == {"cuda:0"}
        for layer, place in ((window, "cuda:1"), (last, "cpu")):
            assert str(layer.keys.device) == str(layer.cumulative_length.device) == place
        assert str(full.cumulative_length.device) == "cuda:0"


def test_devices_of_layers() -> None:
    model = copy.deepcopy(make_model("llama-3.1"))
    assert layer_devices(model) == [torch.device("cpu")] * 2
    # Offloaded: weights are elsewhere, the layer computes where its hook says.
    dispatch_model(model, spread(model, "cpu", "cpu"), main_device="cpu", force_hooks=True)
    last = model.model.layers[1].self_attn
    last.to("meta")
    for place, device in (("cuda:1", "cuda:1"), (0, "cuda:0"), (torch.device("cpu"), "cpu")):
        for part in last.children():
            part._hf_hook.execution_device = place  # type: ignore[union-attr]
        assert [str(each) for each in layer_devices(model)] == ["cpu", device]
    with pytest.raises(ValueError, match=r"Linear has attention layers \[\]"):
        layer_devices(nn.Linear(2, 2))


def test_weights_that_wait_on_disk(directories: dict[str, Path], tmp_path: Path) -> None:
    reference = load_model(directories["qwen3"], device="cpu")
    places = spread(reference, "cpu", "disk")
    model = load_model(directories["qwen3"], device_map=places, offload_folder=tmp_path)
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert layer_devices(model) == [torch.device("cpu")] * 2
    ids = make_prompt(2, 90)
    retro = generate(model, ids, past_key_values=make_cache(model, 2))
    assert_tokens_of(generate_dense(reference, ids), retro)
    with pytest.raises(ValueError, match=r"all weights on their devices, model.layers.1\S* waits"):
        retro_spread(model)


def test_a_saved_cache_goes_to_the_layers(tmp_path: Path) -> None:
    model = make_model("gemma-3")
    cache = make_cache(model)
    with torch.no_grad():
        model(make_prompt(1, 60), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = RetroCache.load(tmp_path / "cache", model.config, device=layer_devices(model))
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert one.state().keys() == other.state().keys()
        for key, tensor in one.state().items():
            assert_same(other.state()[key], tensor)
    with pytest.raises(ValueError, match="one for each of the 3 layers, got 2"):
        RetroCache.load(tmp_path / "cache", model.config, device=["cpu", "cpu"])


def spread(model: PreTrainedModel, first: Any, second: Any) -> dict[str, Any]:
    """A device_map: the later half of the layers, and what follows, on the second device."""
    layers = len(model.model.layers)
    halves = {f"model.layers.{i}": (first, second)[i >= layers // 2] for i in range(layers)}
    ends = {"model.embed_tokens": first, "model.rotary_emb": first}
    return {**ends, **halves, "model.norm": second, "lm_head": second}


def assert_spread(model: PreTrainedModel, devices: list[str], reference: PreTrainedModel) -> None:
    """Asserts the tokens of a model on one device, a prompt, steps, and one graph of them."""
    assert [str(each) for each in layer_devices(model)] == devices
    ids, mask = padded(make_prompt(2, 90), [0, 20])
    expected = generate_dense(reference, ids, attention_mask=mask)
    cache = make_cache(model, 2)
    place = torch.device(devices[0])
    inputs = {"attention_mask": mask.to(place), "past_key_values": cache}
    sequences, logits = generate(model, ids.to(place), **inputs, disable_compile=True)
    assert_tokens_of(expected, (sequences.cpu(), logits.cpu()))
    for layer, device in zip(cache.layers, devices, strict=True):
        tensor = layer.retro.store if isinstance(layer, RetroCacheLayer) else layer.keys
        assert str(tensor.device) == device
        assert str(layer.cumulative_length.device) == device
    cache.reset()
    ids = make_prompt(2, 90)
    step = torch.compile(model, fullgraph=True)
    sequences, logits = decode_loop(model, step, cache, ids.to(place), 40)
    expected = generate_dense(reference, ids, max_new_tokens=40)
    assert_tokens_of(expected, (sequences.cpu(), logits.cpu()))
    assert graphs() == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-3.1", "gemma-3", "gpt-oss"])
def test_layers_on_cpu_and_gpu(name: str) -> None:
    reference = make_model(name)
    model = copy.deepcopy(reference)
    places = spread(model, "cpu", "cuda:0")
    for name, place in places.items():
        model.get_submodule(name).to(place)
    move_between(model, places)
    layers = [places[f"model.layers.{i}"] for i in range(len(model.model.layers))]
    assert_spread(model, layers, reference)


@pytest.mark.gpu
def test_weights_that_wait_on_the_cpu(directories: dict[str, Path]) -> None:
    """device_map with "cpu" beside a GPU: weights lie there, layers and their KV are on the GPU."""
    reference = load_model(directories["qwen3"], device="cpu")
    model = load_model(directories["qwen3"], device_map=spread(reference, 0, "cpu"))
    assert [str(each) for each in layer_devices(model)] == ["cuda:0", "cuda:0"]
    ids = make_prompt(2, 90)
    cache = make_cache(model, 2)
    sequences, logits = generate(model, ids.to("cuda:0"), past_key_values=cache)
    assert_tokens_of(generate_dense(reference, ids), (sequences.cpu(), logits.cpu()))
    assert {str(layer.retro.store.device) for layer in cache.retro_layers} == {"cuda:0"}  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_layers_on_two_gpus(name: str, directories: dict[str, Path]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there are {torch.cuda.device_count()}")
    reference = with_batched_experts(load_model(directories[name], device="cpu"))
    model = with_batched_experts(load_model(directories[name], device_map=spread(reference, 0, 1)))
    assert_spread(model, ["cuda:0", "cuda:1"], reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt-oss", "phi-4-mini"])
def test_families_on_a_gpu(name: str) -> None:
    """Sinks take another way there, without the fused op; a step is one CUDA graph."""
    reference = make_model(name)
    model = copy.deepcopy(reference).cuda()
    ids, mask = padded(make_prompt(2, 90), [0, 20])
    cache = make_cache(model, 2)
    sequences, logits = generate(
        model, ids.cuda(), attention_mask=mask.cuda(), past_key_values=cache, disable_compile=True
    )
    assert_tokens_of(
        generate_dense(reference, ids, attention_mask=mask), (sequences.cpu(), logits.cpu())
    )
    cache.reset()
    ids = make_prompt(2, 90)
    step = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    sequences, logits = decode_loop(model, step, cache, ids.cuda(), 40)
    expected = generate_dense(reference, ids, max_new_tokens=40)
    assert_tokens_of(expected, (sequences.cpu(), logits.cpu()))
    assert graphs() == 1
    assert dynamo_counters["inductor"]["cudagraph_skips"] == 0
