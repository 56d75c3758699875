"""Hugging Face models with retro attention, against the same weights with `sdpa`.

Random weights, float32 and everything retrieved: the tokens are those of dense attention. That the
two best logits are far apart compared with rounding is asserted, so that no test depends on luck.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layer import graphs
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    CompileConfig,
    DeepseekV3Config,
    DynamicCache,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from retro_ops import RetroConfig
from retro_ops.models import RetroCache, load_model
from retro_ops.models.attention import OTHER_MASK, retro_attention, retro_mask
from retro_ops.models.cache import RetroCacheLayer, SlidingCacheLayer
from retro_ops.ops._contract import Counter
from retro_ops.testing import assert_same, assert_within_budget

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

VOCABULARY = 97
# The index is used from 52 tokens on, and grows every 32.
ALL = RetroConfig(
    local_tokens=16, cluster_size=8, segment_size=64, update_segment=32, retrieval_budget=1.0
)
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**BASE),
    "qwen2": lambda: Qwen2Config(**{k: v for k, v in BASE.items() if k != "head_dim"}),
    "qwen3": lambda: Qwen3Config(**{**BASE, "head_dim": 32}),
    "mistral": lambda: MistralConfig(**BASE, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**BASE, sliding_window=24),
    "gemma3": lambda: Gemma3TextConfig(
        **{**BASE, "head_dim": 32, "num_hidden_layers": 3},
        sliding_window=24,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
families = pytest.mark.parametrize("family", FAMILIES)


def make_model(family: str, config: Any = None, attention: str = "retro") -> PreTrainedModel:
    config = FAMILIES[family]() if config is None else config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.pad_token_id = 0
    return model


def make_prompt(rows: int, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)


def make_cache(
    model: PreTrainedModel, rows: int = 1, length: int = 200, **changes: Any
) -> RetroCache:
    config = changes.pop("retro_config", ALL)
    return RetroCache(model.config, config, max_cache_len=length, batch_size=rows, **changes)


def padded(ids: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """Prompt and attention mask, each row left-padded up to its start."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]).long()
    return ids * mask, mask


def generate(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[B, T]` with the prompt, and logits `[B, steps, vocabulary]`."""
    settings = {"max_new_tokens": 50, "do_sample": False, **arguments}
    out = model.generate(ids, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences, torch.stack(out.logits, dim=1)


def generate_dense(model: PreTrainedModel, ids: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The same with `sdpa` and transformers' own cache."""
    model.set_attn_implementation("sdpa")
    try:
        return generate(model, ids, **arguments)
    finally:
        model.set_attn_implementation("retro")


def assert_tokens_of(dense: tuple[Tensor, Tensor], retro: tuple[Tensor, Tensor]) -> None:
    """Asserts equal tokens, and that rounding could not have made others."""
    best = dense[1].topk(2, dim=-1).values
    margin = float((best[..., 0] - best[..., 1]).min())
    difference = float((dense[1] - retro[1]).abs().max())
    assert margin > 20 * difference, (margin, difference)
    assert torch.equal(dense[0], retro[0])
    # They say something: no row repeats one token.
    assert all(row.unique().numel() > 5 for row in dense[0][:, -dense[1].shape[1] :])


# Tokens


@families
def test_generates_the_tokens_of_dense_attention(family: str) -> None:
    """Rows of different length; the shortest is not indexed at first, and all of them grow."""
    model = make_model(family)
    ids, mask = padded(make_prompt(3, 90), [0, 20, 75])
    cache = make_cache(model, 3)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)
    if family != "mistral-window":
        stats, layers = cache.stats(), len(cache.retro_layers)
        assert stats["steps"] == 49
        assert stats["updates"] == layers * 3
        assert stats["indexed_tokens"] == layers * (70 + 50 + 3 * 32)


@families
@pytest.mark.parametrize("prompt", [1, 2, 23, 24, 25, 52, 130])
def test_prompts_of_any_length(family: str, prompt: int) -> None:
    """Around a window of 24 and around the first segment."""
    model = make_model(family)
    ids = make_prompt(1, prompt)
    retro = generate(model, ids, past_key_values=make_cache(model), max_new_tokens=30)
    assert_tokens_of(generate_dense(model, ids, max_new_tokens=30), retro)


def test_a_small_budget_shows() -> None:
    """The tests above would see an index that is not read: it changes the logits."""
    model = make_model("llama")
    sparse = replace(ALL, retrieval_budget=0.0, min_retrieved_clusters=0, estimation_budget=0.0)
    ids = make_prompt(1, 150)
    cache = make_cache(model, retro_config=sparse)
    retro = generate(model, ids, past_key_values=cache, max_new_tokens=2)[1]
    dense = generate_dense(model, ids, max_new_tokens=2)[1]
    torch.testing.assert_close(retro[:, 0], dense[:, 0])  # a prompt is attended to exactly
    assert float((retro[:, 1] - dense[:, 1]).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_bfloat16_is_as_close_as_sdpa(family: str) -> None:
    model = make_model(family)
    ids = make_prompt(2, 120)
    exact = generate_dense(model.double(), ids, max_new_tokens=1)[0]
    exact_logits = generate_dense(model, exact, max_new_tokens=1)[1]
    model.bfloat16()
    dense = generate_dense(model, exact, max_new_tokens=1)[1].double() - exact_logits
    cache = make_cache(model, 2)
    with torch.no_grad():
        model(exact[:, :-1], past_key_values=cache)
        logits = model(exact[:, -1:], past_key_values=cache).logits
    assert float((logits.double() - exact_logits).norm()) < 1.5 * float(dense.norm())


def turns(model: PreTrainedModel, cache: Any, parts: list[Tensor]) -> Tensor:
    """Logits of all parts of a context but the first."""
    logits = [model(part, past_key_values=cache).logits for part in parts]
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_several_tokens_on_a_filled_cache(family: str) -> None:
    """A second turn: like token by token, and like dense attention."""
    model, dense = make_model(family), make_model(family, attention="sdpa")
    exact = make_model(family, attention="sdpa").double()
    ids = make_prompt(2, 120)
    with torch.no_grad():
        for first, second in ((70, 7), (10, 60), (30, 2)):
            end = first + second

            once = [ids[:, :first], ids[:, first:end]]
            singly = [ids[:, :first], *ids[:, first:end].split(1, dim=1)]
            cache, other = make_cache(model, 2), make_cache(model, 2)
            at_once, one_by_one = turns(model, cache, once), turns(model, other, singly)
            # With sums in three orders: the turn at once, by tokens, and as a part of the prompt.
            eager = torch.stack(
                [turns(dense, DynamicCache(config=dense.config), each) for each in (once, singly)]
                + [dense(ids[:, :end]).logits[:, first:]]
            )
            expected = exact(ids[:, :end]).logits[:, first:]
            assert_within_budget(at_once, expected, eager, "at once")
            assert_within_budget(one_by_one, expected, eager, "one by one")
            for layer, twin in zip(cache.retro_layers, other.retro_layers, strict=True):
                assert layer.retro is not None
                assert twin.retro is not None
                assert_same(layer.retro.lengths(), twin.retro.lengths())
                if second < ALL.update_segment:  # a longer turn is clustered like a prompt
                    held = slice(Counter.UPDATES + 1)
                    assert_same(layer.retro.counters[:, held], twin.retro.counters[:, held])
            assert cache.get_seq_length() == end


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_second_turn_through_generate(family: str) -> None:
    model = make_model(family)
    ids, mask = padded(make_prompt(2, 60), [0, 9])
    cache = make_cache(model, 2)
    first, _ = generate(model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20)
    ids = torch.cat((first, make_prompt(2, 11, seed=2)), dim=1)
    mask = torch.cat((mask, torch.ones(2, 31, dtype=torch.int64)), dim=1)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_a_prompt_in_chunks(family: str) -> None:
    model = make_model(family)
    ids = make_prompt(2, 90)
    cache = make_cache(model, 2)
    retro = generate(model, ids, past_key_values=cache, prefill_chunk_size=40)
    assert_tokens_of(generate_dense(model, ids), retro)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_beams(family: str) -> None:
    model = make_model(family)
    ids = make_prompt(2, 60)
    arguments: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 40}
    arguments |= {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    retro = model.generate(ids, past_key_values=make_cache(model, 6), **arguments)
    model.set_attn_implementation("sdpa")
    dense = model.generate(ids, **arguments)
    assert torch.equal(retro.sequences, dense.sequences)
    scores = dense.sequences_scores.view(2, 3)
    difference = float((retro.sequences_scores - dense.sequences_scores).abs().max())
    assert float((scores[:, :-1] - scores[:, 1:]).min()) > 20 * difference
    # Rows did move.
    assert any(row.unique().numel() > 1 for row in dense.beam_indices)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_reset_and_copies(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model, 2)
    generate(model, make_prompt(2, 120), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.stats()["build_seconds"] == 0
    ids = make_prompt(2, 80, seed=3)
    expected, _ = generate(model, ids, past_key_values=make_cache(model, 2))
    assert torch.equal(generate(model, ids, past_key_values=cache)[0], expected)

    # A prompt that is prefilled once serves many continuations.
    prompt = make_cache(model, 2)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=prompt)
    for _ in range(2):
        twin = copy.deepcopy(prompt)
        assert torch.equal(generate(model, ids, past_key_values=twin)[0], expected)
        assert twin.stats()["build_seconds"] == pytest.approx(prompt.stats()["build_seconds"])


def test_a_window_longer_than_the_cache() -> None:
    model = make_model("gemma3")
    ids = make_prompt(1, 12)
    retro = generate(model, ids, past_key_values=make_cache(model, length=20), max_new_tokens=8)
    assert_tokens_of(generate_dense(model, ids, max_new_tokens=8), retro)


def test_sliding_layers_alone() -> None:
    """Gemma 3 makes a mask for full-attention layers even without any; nothing attends with it."""
    config = FAMILIES["gemma3"]()
    config.layer_types = ["sliding_attention"] * 3
    model = make_model("gemma3", config)
    ids, mask = padded(make_prompt(2, 90), [0, 20])
    retro = generate(model, ids, attention_mask=mask, past_key_values=make_cache(model, 2))
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


def make_attention() -> nn.Module:
    """What `retro_attention` asks of a layer of 4 query heads and 2 KV heads."""
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("tokens", [2, 23, 24, 25, 47, 48, 49, 100])
@pytest.mark.parametrize("window", [1, 24])
def test_pieces_are_the_whole(window: int, tokens: int, padding: bool) -> None:
    """The prompt of a sliding-window layer: piece by piece, and at once with a mask of T x T."""
    torch.manual_seed(tokens)
    starts = torch.tensor([0, tokens // 3, tokens - 1] if padding else [0, 0, 0])[:, None]
    real = torch.arange(tokens) >= starts
    query, key, value = (torch.randn(3, heads, tokens, 16) for heads in (4, 2, 2))
    layer = SlidingCacheLayer(window)
    held = layer.update(key, value)
    mask = real if padding else None
    out, _ = retro_attention(
        make_attention(), query, *held, mask, scaling=0.3, sliding_window=window
    )

    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    allowed = (distance >= 0) & (distance < window) & real[:, None, None]
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, allowed, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out[real], expected[real])
    assert not out[~real].any()
    kept = min(window - 1, tokens)
    assert layer.get_seq_length() == tokens
    assert_same(layer.keys[:, :, window - 1 - kept :], key[:, :, tokens - kept :])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any op returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out


@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_nothing_grows_with_the_square_of_a_prompt(
    family: str, padding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor | None] = []

    def spy(**arguments: Any) -> Tensor | None:
        masks.append(retro_mask(**arguments))
        return masks[-1]

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "retro", spy)
    model, tokens = make_model(family), 1000
    ids, mask = padded(make_prompt(2, tokens), [0, 300 if padding else 0])
    cache = make_cache(model, 2, tokens)
    with torch.no_grad(), Largest() as largest:
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert masks
    for made in masks:
        assert made is None if not padding else made is not None and made.shape == (2, tokens)
    assert largest.elements < tokens**2 / 2


@families
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_without_a_retro_cache_it_is_sdpa(family: str, cache: str) -> None:
    """Bit for bit."""
    model = make_model(family)
    ids, mask = padded(make_prompt(2, 60), [0, 20])

    def run() -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20}
        if cache == "none":
            return generate(model, ids, use_cache=False, **arguments)
        made = (
            DynamicCache(config=model.config)
            if cache == "dynamic"
            else StaticCache(config=model.config, max_cache_len=100)
        )
        return generate(model, ids, past_key_values=made, **arguments)

    retro = run()
    model.set_attn_implementation("sdpa")
    dense = run()
    assert torch.equal(retro[0], dense[0])
    assert_same(retro[1], dense[1], "logits")


def test_stats() -> None:
    model = make_model("llama")
    cache = make_cache(model)
    assert cache.stats() == {"build_seconds": 0}
    generate(model, make_prompt(1, 100), past_key_values=cache, max_new_tokens=11)
    stats = cache.stats()
    first, second = (layer.retro.stats() for layer in cache.retro_layers if layer.retro)
    for name, value in first.items():
        assert stats[name] == (value if name == "steps" else value + second[name]), name
    assert stats["steps"] == 10
    assert stats["build_seconds"] > 0


# Compiling


@torch.no_grad()
def decode_loop(
    model: PreTrainedModel, step: Any, cache: RetroCache, ids: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy decoding by hand: the prompt through `model`, every token through `step`."""
    logits = [model(ids, past_key_values=cache).logits[:, -1]]
    chosen = [logits[-1].argmax(dim=-1, keepdim=True)]
    for _ in range(tokens - 1):
        # Copied: the next step of a CUDA graph writes over the output of this one.
        logits.append(step(chosen[-1], past_key_values=cache).logits[:, -1].clone())
        chosen.append(logits[-1].argmax(dim=-1, keepdim=True))
    # Logits come into being where the head is, which need not be where the prompt is.
    sequences = torch.cat((ids.to(chosen[0].device), *chosen), dim=1)
    return sequences, torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    ("family", "backend"),
    [(family, "aot_eager") for family in FAMILIES] + [("gemma3", "inductor")],
)
def test_decoding_compiles_into_one_graph(family: str, backend: str) -> None:
    """No other graph from token to token, for a second prompt or for a second cache."""
    model = make_model(family)
    step = torch.compile(model, fullgraph=True, backend=backend)
    cache = make_cache(model, 2)
    # The window of 24 tokens and the first segment fill up on the way.
    ids = make_prompt(2, 20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        step(ids[:, :1].contiguous(), past_key_values=cache)
    assert graphs() == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for again, prompt in ((cache, 20), (cache, 100), (make_cache(model, 2), 60)):
            again.reset()
            ids = make_prompt(2, prompt, seed=prompt)
            retro = decode_loop(model, step, again, ids, 60)
            assert_tokens_of(generate_dense(model, ids, max_new_tokens=60), retro)
        # A step on an empty cache, too, once it is allocated.
        empty = make_cache(model, 2)
        head_dim = getattr(model.config, "head_dim", None) or 16
        empty.early_initialization(2, 2, head_dim, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            step(ids[:, :1].contiguous(), past_key_values=empty)
    assert graphs() == 1


@pytest.mark.parametrize(
    ("family", "backend"),
    [("llama", "inductor"), ("mistral-window", "aot_eager"), ("gemma3", "aot_eager")],
)
def test_generate_compiles(family: str, backend: str) -> None:
    """The way of users on a GPU, where `generate` compiles by itself."""
    model = make_model(family)
    compiling = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiling._compile_all_devices = True
    cache = make_cache(model, 2)
    for attempt, (prompt, starts) in enumerate(((40, [0, 7]), (90, [33, 0]))):
        ids, mask = padded(make_prompt(2, prompt), starts)
        cache.reset()
        recompiles = torch._dynamo.config.patch(error_on_recompile=attempt > 0)
        with recompiles:
            retro = generate(
                model,
                ids,
                attention_mask=mask,
                past_key_values=cache,
                compile_config=compiling,
                disable_compile=False,
            )
        assert graphs() == 1
        assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_a_compiled_prompt(family: str) -> None:
    """Of any length, padded, in one graph."""
    model, dense = make_model(family), make_model(family, attention="sdpa")
    step = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    head_dim = getattr(model.config, "head_dim", None) or 16
    for tokens, starts in ((90, [0, 20]), (70, [3, 0])):
        ids, mask = padded(make_prompt(2, tokens), starts)
        cache = make_cache(model, 2)
        cache.early_initialization(2, 2, head_dim, torch.float32, torch.device("cpu"))
        with torch.no_grad():
            retro = step(ids, attention_mask=mask, past_key_values=cache).logits
            expected = dense(ids, attention_mask=mask).logits
        torch.testing.assert_close(retro[mask.bool()], expected[mask.bool()])
    assert graphs() == 1


# Refusals


def call(model: PreTrainedModel, ids: Tensor, cache: RetroCache, **arguments: Any) -> None:
    model.generate(
        ids, past_key_values=cache, do_sample=False, **{"max_new_tokens": 5, **arguments}
    )


def one_line(error: pytest.ExceptionInfo[BaseException], text: str) -> None:
    """Asserts that the message is one line with `text` in it."""
    message = str(error.value)
    assert text in message, message
    assert "\n" not in message


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_another_attention_refuses_a_retro_cache(family: str, attention: str) -> None:
    model = make_model(family, attention=attention)
    with pytest.raises(AttributeError) as error:
        call(model, make_prompt(1, 30), make_cache(model))
    one_line(error, "call model.set_attn_implementation('retro')")


@pytest.mark.parametrize(
    "mask",
    [[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]],
    ids=["right", "hole", "two holes", "nothing"],
)
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_refuses_padding_that_is_not_left(family: str, mask: list[int]) -> None:
    model = make_model(family)
    mask_of_rows = torch.tensor([[1, 1, 1, 1], mask])
    with pytest.raises(ValueError, match="needs left padding") as error:
        call(model, make_prompt(2, 4), make_cache(model, 2), attention_mask=mask_of_rows)
    one_line(error, "tokenizer.padding_side = 'left'")


def test_refuses_a_mask_of_its_own() -> None:
    model = make_model("llama")
    mask = torch.ones(1, 1, 30, 30).tril()
    with pytest.raises(ValueError, match=r"needs a padding mask \[B, T\]") as error:
        model(make_prompt(1, 30), attention_mask=mask, past_key_values=make_cache(model))
    one_line(error, "[1, 1, 30, 30]")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_refuses_turns_with_another_mask(family: str) -> None:
    """Before any layer has changed."""
    model = make_model(family)
    cache = make_cache(model, 2)
    ids = make_prompt(2, 90)
    with torch.no_grad():
        model(ids[:, :80], past_key_values=cache)
        before = state_of(cache)
        for masked, text in (
            (slice(88, 90), "the 10 new tokens of a filled cache must not end with padding in any"),
            (slice(80, 90), "row; set tokenizer.padding_side = 'left'"),
            (slice(10, 12), "has 78 tokens of row 1 before the 10 new ones, the cache holds 80"),
            (slice(60, 80), "masks the latest 20 tokens of row 1, but only 16 can be forgotten"),
        ):
            mask = torch.ones(2, 90, dtype=torch.int64)
            mask[1, masked] = 0
            with pytest.raises(ValueError, match="RetroCache: ") as error:
                model(ids[:, 80:], attention_mask=mask, past_key_values=cache)
            one_line(error, text)
            for tensor, kept in zip(state_of(cache), before, strict=True):
                assert_same(tensor, kept)


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_refuses_a_mask_of_another_length(family: str) -> None:
    model = make_model(family)
    for length in (29, 31):
        cache = make_cache(model)
        with pytest.raises(
            ValueError, match="the attention_mask of a prompt of 30 tokens"
        ) as error:
            model(
                make_prompt(1, 30),
                attention_mask=torch.tensor([[0] * 3 + [1] * (length - 3)]),
                past_key_values=cache,
            )
        one_line(error, f"must have as many, got [1, {length}]")
        assert cache.get_seq_length() == 0


BLOCK = torch.full((1, 60), -1)
BLOCK[:, 30:33] = 0
ADDITIONS: dict[str, dict[str, Any]] = {
    "or": {"or_mask_function": lambda batch, head, q, k: q - k == 40},
    "and": {"and_mask_function": lambda batch, head, q, k: q != 31},
    "block": {"block_sequence_ids": BLOCK},
}


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("name", ADDITIONS)
def test_refuses_what_a_model_adds_to_a_window(
    name: str, compiling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mistral-window")
    inputs: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.zeros(1, 60, 64),
        "attention_mask": None,
        "past_key_values": make_cache(model),
    }
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert create_sliding_window_causal_mask(**inputs) is None
    with pytest.raises(ValueError, match="supports causal masks") as error:
        create_sliding_window_causal_mask(**inputs, **ADDITIONS[name])
    one_line(error, OTHER_MASK)
    # Another window than that of the cache.
    model.config.sliding_window = 23
    with pytest.raises(ValueError, match="supports causal masks") as error:
        create_sliding_window_causal_mask(**inputs)
    one_line(error, OTHER_MASK)


def test_refuses_to_leave_a_window_out() -> None:
    """A mask without a window for a layer that has one."""
    model = make_model("mistral-window")
    cache = make_cache(model)
    mask = create_causal_mask(model.config, torch.zeros(1, 60, 64), None, cache)
    query = torch.zeros(1, 4, 60, 16)
    held = cache.update(query[:, :2], query[:, :2], 0)
    with pytest.raises(ValueError, match="supports causal masks") as error:
        retro_attention(make_attention(), query, *held, mask)
    one_line(error, OTHER_MASK)
    assert cache.get_seq_length() == 0


def test_refuses_another_window() -> None:
    query = torch.zeros(1, 4, 60, 16)
    full = RetroCacheLayer(ALL, num_query_heads=4, batch_size=1, max_length=60, offload=False)
    for layer, text in (
        (SlidingCacheLayer(24), "where the layer of the cache has one of 24"),
        (full, "where the layer of the cache attends to all tokens"),
    ):
        held = layer.update(query[:, :2], query[:, :2])
        with pytest.raises(ValueError, match="asks for a sliding window of 25 tokens") as error:
            retro_attention(make_attention(), query, *held, None, sliding_window=25)
        one_line(error, text)


def state_of(cache: RetroCache) -> list[Tensor]:
    tensors: list[Tensor] = []
    for layer in cache.layers:
        own = [layer.keys, layer.values] if layer.is_sliding else [*layer.retro.buffers()]
        tensors += [tensor.clone() for tensor in (*own, layer.cumulative_length)]
    return tensors


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_max_cache_len_holds_and_nothing_is_lost(family: str) -> None:
    model = make_model(family)
    with pytest.raises(ValueError, match="a prompt of 90 tokens exceeds") as error:
        call(model, make_prompt(1, 90), make_cache(model, length=80))
    one_line(error, "max_cache_len 80; make the cache with a larger max_cache_len")

    cache = make_cache(model, length=93)
    # The last token that generate returns is never fed back.
    call(model, make_prompt(1, 90), cache, max_new_tokens=4)
    before = state_of(cache)
    with torch.no_grad():
        for tokens in (1, 2, 60):
            with pytest.raises(RuntimeError, match="a row holds 93 of max_cache_len 93") as error:
                model(make_prompt(1, tokens), past_key_values=cache)
            one_line(error, f"{tokens} more do not fit; make the cache with a larger max_cache_len")
    for tensor, kept in zip(state_of(cache), before, strict=True):
        assert_same(tensor, kept)
    cache.reset()
    with pytest.raises(RuntimeError, match="a row holds 93 of max_cache_len 93 tokens, 1 more"):
        call(model, make_prompt(1, 90), cache, max_new_tokens=5)


def test_a_window_alone_goes_on_for_ever() -> None:
    """Without a full-attention layer nothing is limited by max_cache_len, and nothing is wrong."""
    model = make_model("mistral-window")
    ids = make_prompt(1, 40)
    retro = generate(model, ids, past_key_values=make_cache(model, length=10))
    assert_tokens_of(generate_dense(model, ids), retro)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])
def test_refuses_another_number_of_rows(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model, 2)
    assert cache.batch_size == 2
    for attempt in range(2):
        with pytest.raises(ValueError, match="made for batch_size=2, got 3 rows") as error:
            call(model, make_prompt(3, 30), cache)
        one_line(error, "make it with batch_size=3")
        if attempt == 0:  # the same once it is allocated
            call(model, make_prompt(2, 30), cache)
            cache.reset()
    with pytest.raises(ValueError, match="got 3 rows"):
        cache.early_initialization(3, 2, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="got 6 rows"):
        call(model, make_prompt(2, 30), cache, num_beams=3)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_refuses_what_it_cannot_undo(family: str) -> None:
    model = make_model(family)
    cache = make_cache(model)
    call(model, make_prompt(1, 60), cache)
    assert not cache.is_croppable
    before = state_of(cache)
    for tokens, text in (
        (3, "is given as a negative one, got 3; crop(-3) removes 3"),
        (-65, "cannot remove 65 of 64 tokens"),
        (-21, "row 0 can lose 20 of 64" if family == "llama" else "a sliding-window layer has let"),
    ):
        with pytest.raises(ValueError, match=r"^RetroCache.crop: ") as error:
            cache.crop(tokens)
        one_line(error, text)
    for tensor, kept in zip(state_of(cache), before, strict=True):
        assert_same(tensor, kept)
    for change in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0])),
    ):
        with pytest.raises(NotImplementedError, match="cannot change its number of rows"):
            change()


@pytest.mark.parametrize("numbers", [(0, 1), (10, 0), (-1, 1)])
def test_refuses_sizes(numbers: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="max_cache_len and batch_size must be at least 1, got"):
        RetroCache(FAMILIES["llama"](), max_cache_len=numbers[0], batch_size=numbers[1])


def test_backward_raises() -> None:
    model = make_model("llama")
    cache = make_cache(model)
    model(make_prompt(1, 60), past_key_values=cache)
    loss = model(make_prompt(1, 1), past_key_values=cache).logits.sum()
    with pytest.raises(RuntimeError, match="there is no backward pass") as error:
        loss.backward()
    one_line(error, "attn_implementation='sdpa'")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "soft-capping": (
        lambda: Gemma2Config(**BASE, sliding_window=24),
        "does not support soft-capped logits, which Gemma2Config asks for (attn_logit_softcapping",
    ),
    "bidirectional": (
        lambda: LlamaConfig(**BASE, is_causal=False),
        "supports causal masks with left padding only",
    ),
    "chunked": (
        lambda: Llama4TextConfig(**BASE, attention_chunk_size=16, num_local_experts=1),
        "layer 0 of Llama4TextConfig is of type 'chunked_attention'; only full_attention and",
    ),
    "latent": (
        lambda: DeepseekV3Config(
            **{k: v for k, v in BASE.items() if k != "head_dim"},
            first_k_dense_replace=2,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=16,
        ),
        "does not support latent attention (MLA), which DeepseekV3Config asks for",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_models_that_it_cannot_serve(name: str) -> None:
    make_config, text = REFUSED[name]
    model = make_model(name, config=make_config())
    with pytest.raises(ValueError, match="etro") as error:
        call(model, make_prompt(1, 60), make_cache(model))
    one_line(error, text)


def test_refuses_shared_layers() -> None:
    config = Gemma3nTextConfig(num_kv_shared_layers=15)
    with pytest.raises(ValueError, match="layers that share their KV") as error:
        RetroCache(config, max_cache_len=10)
    one_line(error, "num_kv_shared_layers=15")


def test_refuses_soft_capping_without_a_retro_cache_too() -> None:
    """`sdpa` would leave it out without a word."""
    model = make_model("soft-capping", config=REFUSED["soft-capping"][0]())
    with pytest.raises(ValueError, match="does not support soft-capped logits") as error:
        model(make_prompt(1, 30))
    one_line(error, "Gemma2Attention")


# Loading


def test_loads_a_directory(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    for name in (tmp_path, str(tmp_path)):
        loaded = load_model(name, device="cpu")
        assert loaded.config._attn_implementation == "retro"
        assert not loaded.training
        assert loaded.dtype == torch.float32
        ids = make_prompt(1, 60)
        retro = generate(loaded, ids, past_key_values=make_cache(loaded))
        assert_tokens_of(generate_dense(model, ids), retro)
    loaded = load_model(tmp_path, dtype=torch.bfloat16, device="cpu", attention="sdpa")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "sdpa"


def test_a_missing_model_is_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no-such/model", "nosuchmodel", str(tmp_path / "nothing"), tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError) as error:
            load_model(name)
        one_line(error, f"no model {str(name)!r}")
