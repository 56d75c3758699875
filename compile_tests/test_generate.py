"""What transformers' `generate` offers, with a RetroCache: the same as with dense attention."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from test_models import (
    assert_tokens_of,
    call,
    generate,
    generate_dense,
    make_cache,
    make_model,
    make_prompt,
    one_line,
    padded,
    state_of,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from retro_ops.testing import assert_same

pytestmark = pytest.mark.usefixtures("one_thread")
# transformers spells "abcdef" when it prepares a tokenizer for stop strings.
CHARACTERS = "abcdef" + "".join(chr(0x4E00 + i) for i in range(91))
families = pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3"])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One character for every token; a streamer holds none of them back but "abcdef"."""
    words = Tokenizer(models.WordLevel({CHARACTERS[i]: i for i in range(97)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", unk_token="a")


def answer(sequences: Tensor, ids: Tensor) -> list[list[int]]:
    return sequences[:, ids.shape[1] :].tolist()


@families
def test_streams_tokens_as_they_come(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(family)
    ids = make_prompt(1, 60)
    expected, _ = generate_dense(model, ids)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments: dict[str, Any] = {"max_new_tokens": 50, "streamer": streamer}
    thread = Thread(target=call, args=(model, ids, make_cache(model)), kwargs=arguments)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len([piece for piece in pieces if piece]) > 10
    assert "".join(pieces) == "".join(CHARACTERS[token] for token in answer(expected, ids)[0])


@families
def test_stop_strings(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """The cache holds all but the last token then, and a new turn goes on from there."""
    model = make_model(family)
    ids = make_prompt(1, 60)
    said = answer(generate_dense(model, ids)[0], ids)[0]
    stop = "".join(CHARACTERS[token] for token in said[20:22])
    length = next(t for t in range(50) if said[t : t + 2] == said[20:22]) + 2
    cache = make_cache(model)
    arguments: dict[str, Any] = {"tokenizer": tokenizer, "stop_strings": [stop]}
    stopped, _ = generate(model, ids, past_key_values=cache, **arguments)
    assert answer(stopped, ids)[0] == said[:length]
    assert cache.get_seq_length() == 60 + length - 1
    ids = torch.cat((stopped, make_prompt(1, 9, seed=2)), dim=1)
    mask = torch.ones_like(ids)
    retro = generate(model, ids, attention_mask=mask, past_key_values=cache)
    assert_tokens_of(generate_dense(model, ids, attention_mask=mask), retro)


@families
@pytest.mark.parametrize(
    "arguments", [{"top_k": 20}, {"top_p": 0.8, "temperature": 1.5}, {"repetition_penalty": 1.3}]
)
def test_samples(family: str, arguments: dict[str, Any]) -> None:
    """The same random numbers make the same tokens."""
    model = make_model(family)
    ids, mask = padded(make_prompt(2, 60), [0, 20])
    arguments = {**arguments, "do_sample": True, "attention_mask": mask}
    torch.manual_seed(3)
    dense = generate_dense(model, ids, **arguments)[0]
    torch.manual_seed(3)
    retro = generate(model, ids, past_key_values=make_cache(model, 2), **arguments)[0]
    assert torch.equal(retro, dense)


@families
def test_several_sequences_of_a_prompt(family: str) -> None:
    model = make_model(family)
    ids = make_prompt(2, 60)
    arguments: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(3)
    dense = generate_dense(model, ids, **arguments)[0]
    torch.manual_seed(3)
    retro = generate(model, ids, past_key_values=make_cache(model, 6), **arguments)[0]
    assert torch.equal(retro, dense)
    assert retro[:3].unique(dim=0).shape[0] == 3
    with pytest.raises(ValueError, match="made for batch_size=2, got 6 rows") as error:
        generate(model, ids, past_key_values=make_cache(model, 2), **arguments)
    one_line(error, "make it with batch_size=6")


@families
def test_rows_stop_by_themselves(family: str) -> None:
    """At an end token, each at its own time; all of them at last."""
    model = make_model(family)
    ids, mask = padded(make_prompt(3, 60), [0, 20, 7])
    arguments: dict[str, Any] = {"attention_mask": mask}
    said = answer(generate_dense(model, ids, **arguments)[0], ids)
    ends = [row[place] for row, place in zip(said, (5, 25, 12), strict=True)]
    arguments["eos_token_id"] = ends
    dense, _ = generate_dense(model, ids, **arguments)
    cache = make_cache(model, 3)
    retro, _ = generate(model, ids, past_key_values=cache, **arguments)
    assert torch.equal(retro, dense)
    rows = answer(dense, ids)
    lengths = [next(t for t, token in enumerate(row) if token in ends) for row in rows]
    assert len(set(lengths)) > 1
    assert dense.shape[1] - 60 == max(lengths) + 1 < 50


class At(StoppingCriteria):
    """Stops row i when it has `lengths[i]` tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, ids: Tensor, scores: Tensor, **arguments: Any) -> Tensor:
        return ids.shape[1] >= self.lengths


def test_criteria_of_rows() -> None:
    model = make_model("llama")
    ids = make_prompt(2, 60)
    arguments: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([At([65, 90])])}
    dense, _ = generate_dense(model, ids, **arguments)
    retro, _ = generate(model, ids, past_key_values=make_cache(model, 2), **arguments)
    assert torch.equal(retro, dense)
    assert retro.shape[1] == 90


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fills_the_cache_and_says_so_beyond(family: str) -> None:
    """The last token that generate returns is never fed back."""
    model = make_model(family)
    ids, mask = padded(make_prompt(2, 60), [0, 10])
    cache = make_cache(model, 2, length=100)
    settings: dict[str, Any] = {"attention_mask": mask}
    retro = generate(model, ids, past_key_values=cache, max_new_tokens=41, **settings)
    assert_tokens_of(generate_dense(model, ids, max_new_tokens=41, **settings), retro)
    before = state_of(cache)
    longer = torch.cat((retro[0], make_prompt(2, 5, seed=2)), dim=1)
    mask = torch.cat((mask, torch.ones(2, 46, dtype=torch.int64)), dim=1)
    with pytest.raises(RuntimeError, match="a row holds 100 of max_cache_len 100 tokens") as error:
        generate(model, longer, attention_mask=mask, past_key_values=cache)
    one_line(error, "6 more do not fit; make the cache with a larger max_cache_len")
    for tensor, kept in zip(state_of(cache), before, strict=True):
        assert_same(tensor, kept)
    cache.reset()
    with pytest.raises(RuntimeError, match="a row holds 100 of max_cache_len 100 tokens") as error:
        generate(model, ids, past_key_values=cache, max_new_tokens=42)
    one_line(error, "1 more do not fit; make the cache with a larger max_cache_len")


@pytest.mark.parametrize("matches", [2, 8])
def test_looks_the_answer_up_in_the_prompt(matches: int) -> None:
    """Guessed tokens are read at once, and cropped where they were wrong."""
    model = make_model("llama")
    ids = make_prompt(1, 30).repeat(1, 4)
    cache = make_cache(model, length=300)
    arguments: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False}
    arguments["prompt_lookup_num_tokens"] = matches
    retro = model.generate(ids, past_key_values=cache, **arguments)
    dense, _ = generate_dense(model, ids, max_new_tokens=100)
    assert torch.equal(retro, dense)
    assert cache.get_seq_length() == 219
    assert sum(layer.longest_row() for layer in cache.retro_layers) == 2 * 219


def test_a_draft_model_guesses() -> None:
    """Assisted generation, with another model's own cache beside it."""
    model, draft = make_model("llama"), make_model("llama", attention="sdpa")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    draft.generation_config.num_assistant_tokens = 5
    ids = make_prompt(1, 60)
    cache = make_cache(model)
    retro = model.generate(
        ids, past_key_values=cache, assistant_model=draft, max_new_tokens=50, do_sample=False
    )
    dense, _ = generate_dense(model, ids)
    assert torch.equal(retro, dense)
    assert cache.get_seq_length() == 109


def test_guesses_are_refused_where_a_window_has_let_go() -> None:
    model: PreTrainedModel = make_model("gemma3")
    ids = make_prompt(1, 30).repeat(1, 4)
    with pytest.raises(ValueError, match=r"RetroCache.crop: cannot remove") as error:
        model.generate(
            ids,
            past_key_values=make_cache(model, length=300),
            prompt_lookup_num_tokens=8,
            max_new_tokens=100,
            do_sample=False,
        )
    one_line(error, "a sliding-window layer has let go")
