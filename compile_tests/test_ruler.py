"""RULER: tasks are what their definitions say, prompts fill their length, runs go on where they
were cut off; and a real model is scored."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from retro_ops import RetroConfig
from retro_ops.benchmarks import evaluation, ruler
from retro_ops.benchmarks.evaluation import Answerer, PromptForm, Question, Records
from retro_ops.benchmarks.ruler_tasks import (
    DEPTHS,
    FILLER,
    TASKS,
    Draft,
    Sources,
    Text,
    largest_size,
    score,
)
from retro_ops.cli import main

ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue")
SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The {i}th hill is called Mount {chr(65 + i)}, which few climb.",
                    "qas": [
                        {
                            "question": f"What is the {i}th hill called?",
                            "answers": [{"text": f"Mount {chr(65 + i)}"}] * 2,
                        },
                        {"question": "Who climbs it?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(26)
            ]
        }
    ]
}
HOTPOTQA = [
    {
        "question": f"Who owns the ship of harbour {i}?",
        "answer": f"Owner{i}",
        "context": [
            [f"Harbour {i}", [f"Harbour {i} has one ship, ", f"the Gull {i}."]],
            [f"Gull {i}", [f"The Gull {i} belongs to Owner{i}."]],
        ],
    }
    for i in range(20)
]


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(Text.generated(4000, 0))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte pair encoding with few pairs: about two tokens a word."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator([" ".join(Text.generated(3000, 1).sentences)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, with sliding and full layers."""
    config = Gemma3TextConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=8192,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def make(task: str, size: int, sources: Sources, *, length: int = 8192, seed: int = 0) -> Draft:
    return TASKS[task].make(random.Random(seed), size, length, sources)


# Tasks


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("niah")])
@pytest.mark.parametrize("seed", range(3))
def test_needles_are_where_they_are_asked_for(task: str, seed: int, sources: Sources) -> None:
    draft = make(task, 300, sources, seed=seed)
    stated = re.findall(r"One secret (\w+) of the (\S+) is (\S+)\.", draft.prompt)
    question = draft.prompt.rpartition("Question: ")[2]
    asked = [key for key in dict.fromkeys(key for _, key, _ in stated) if key in question]
    assert sorted(draft.answers) == sorted(value for _, key, value in stated if key in asked)
    # Kinds and counts of the definition.
    keys, values = {key for _, key, _ in stated}, [value for _, _, value in stated]
    assert len(set(values)) == len(values)
    hay = 300 if task in ("niah_multikey_2", "niah_multikey_3") else 0
    expected = {
        "niah_multikey_1": (4, 4, 1),
        "niah_multivalue": (1, 4, 1),
        "niah_multiquery": (4, 4, 4),
    }
    assert (len(keys), len(values), len(asked)) == expected.get(task, (1 + hay, 1 + hay, 1))
    identifier = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    long_values = task in ("niah_single_3", "niah_multikey_3")
    assert all(re.fullmatch(identifier if long_values else r"\d{7}", value) for value in values)
    words = identifier if task == "niah_multikey_3" else "[a-z]+-[a-z]+"
    assert all(re.fullmatch(words, key) for key in keys)
    assert draft.prompt.count(FILLER) == (300 if task == "niah_single_1" else 0)
    # The answer begins as the question asks, in the singular where one value is asked for.
    several = len(draft.answers) > 1
    assert draft.prefix.endswith(" are" if several else " is")
    assert all(key in draft.prefix for key in asked)
    assert (f"{len(draft.answers)} secret" in question) == several


def test_needles_lie_at_all_depths_between_sentences(sources: Sources) -> None:
    sentences = sources.essay.cut(2000)
    depths = []
    for seed in range(60):
        context = make("niah_single_2", 2000, sources, seed=seed).prompt.split("\n\n")[1]
        before, _, after = re.split(r"(One secret .*? is \d+\.)", context)
        assert before + after.removeprefix(" " if before else "") in (
            " ".join(sentences),
            " ".join(sentences) + " ",
        )
        depths.append(len(before) / len(context))
        nearest = min(abs(100 * depths[-1] - depth) for depth in DEPTHS)
        assert nearest < 2
    assert min(depths) < 0.1
    assert max(depths) > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_variables_are_found_by_following_them(seed: int, sources: Sources) -> None:
    draft = make("vt", 40, sources, seed=seed)
    example, _, task = draft.prompt.rpartition("Variables get")
    value = re.findall(r"value (\d{5})", task)[-1]
    held: dict[str, str] = {}
    for name, given_ in re.findall(r"let ([A-Z]{5}) = (\w+)\.", task):
        assert given_.isdigit() or given_ in held  # assigned before it is used
        held[name] = held.get(given_, given_)
    assert [name for name in held if held[name] == value] == draft.answers
    assert len(draft.answers) == 5
    assert task.count(FILLER) == 40
    # The solved example is right, and has other variables.
    names = re.findall(r"let ([A-Z]{3}) = ", example)
    assert f"are {', '.join(names)}." in example
    assert len(names) == 5


@pytest.mark.parametrize(("length", "common", "other"), [(4095, 6, 1), (4096, 30, 3)])
def test_common_words(length: int, common: int, other: int, sources: Sources) -> None:
    draft = make("cwe", 50, sources, length=length)
    example, _, task = draft.prompt.rpartition("Some words")
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", task))
    assert counts == {word: common if word in draft.answers else other for word in counts}
    assert len(counts) == 50
    assert len(draft.answers) == 10
    listed = Counter(re.findall(r"\d+\. ([a-z]+)", example))
    expected = {10: 10, 3: 30} if length >= 4096 else {3: 10, 1: 10}
    assert Counter(listed.values()) == expected
    assert not set(listed) & set(counts)
    best = sorted(word for word, count in listed.most_common(10))
    assert sorted(re.findall(r"list are ([a-z, ]+)\.", example)[0].split(", ")) == best


def test_common_words_never_run_out(sources: Sources) -> None:
    draft = make("cwe", 12_000, sources)
    assert (
        len(set(re.findall(r"\d+\. ([a-z]+)", draft.prompt.rpartition("Some words")[2]))) > 11_900
    )


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_frequent_words_follow_zipf(size: int, sources: Sources) -> None:
    draft = make("fwe", size, sources, length=10_000)
    text = draft.prompt.split("\n\n")[1]
    ranked = Counter(text.split(" ")).most_common()
    assert [word for word, _ in ranked[:4]] == ["...", *draft.answers]
    for rank, (word, count) in enumerate(ranked, 1):
        assert count == int(size * 6 / math.pi**2 / rank**2)
        assert word == "..." or re.fullmatch("[a-z]{6}", word)
    assert len(ranked) <= 10_000 // 50


@pytest.mark.parametrize("seed", range(8))
def test_made_up_facts_answer_their_question(seed: int, sources: Sources) -> None:
    facts = {
        "town was": r"{} was born in ([\w ]+) in \d+",
        "year was": r"{} was born in [\w ]+ in (\d+)",
        "profession": r"The profession of {} was that of a ([\w ]+)\.",
        "animal": r"{} kept a ([\w ]+)\.",
    }
    for task in ("qa_1", "qa_2"):
        draft = make(task, 60, sources, seed=seed)
        context, _, question = draft.prompt.rpartition("\n\nQuestion: ")
        documents = re.findall(r"Document (\d+):\n(.*)", context)
        assert [int(number) for number, _ in documents] == list(range(1, 1 + len(documents)))
        assert len(documents) == (61 if task == "qa_1" else 62)
        if task == "qa_2":
            built = re.search(r"designed the (.*?)( born| keep|\?)", question)[1]  # type: ignore[index]
            (person,) = re.findall(rf"The {built} was built .* designed by (.*?),", context)
        else:
            person = re.search(r"\w+ [A-Z]\. \w+", question)[0]  # type: ignore[index]
        (pattern,) = (pattern for word, pattern in facts.items() if word in question)
        assert re.findall(pattern.format(re.escape(person)), context) == draft.answers


def test_published_files_serve_as_documents(tmp_path: Path, sources: Sources) -> None:
    squad, hotpotqa = tmp_path / "squad.json", tmp_path / "hotpotqa.json"
    squad.write_text(json.dumps(SQUAD))
    hotpotqa.write_text(json.dumps(HOTPOTQA))
    own = Sources(sources.essay, squad, hotpotqa)
    for seed in range(5):
        one = make("qa_1", 10, own, seed=seed)
        (number,) = re.findall(r"What is the (\d+)th hill called", one.prompt)
        assert one.answers == [f"Mount {chr(65 + int(number))}"]
        assert f"The {number}th hill is called {one.answers[0]}" in one.prompt
        assert one.prompt.count("hill is called") == 11
        two = make("qa_2", 9, own, seed=seed)
        (number,) = re.findall(r"ship of harbour (\d+)\?", two.prompt)
        assert f"Harbour {number} has one ship, the Gull {number}." in two.prompt
        assert two.answers == [f"Owner{number}"]
        assert two.prompt.count("Document ") == 2 + 9


def test_text_repeats_where_it_ends() -> None:
    text = Text(["One two three.", "Four five."])
    assert text.cut(0) == []
    assert text.cut(2) == ["One two"]
    assert text.cut(5) == ["One two three.", "Four five."]
    assert text.cut(9) == ["One two three.", "Four five.", "One two three.", "Four"]


def test_scores() -> None:
    assert score("niah_multivalue", ["12", "34", "56", "78"], "It is 34, and 78.") == 0.5
    assert score("vt", ["ABC"], "abc") == 1
    assert score("qa_1", ["Mount A", "the hill"], "on Mount a.") == 1
    assert score("qa_1", ["Mount A"], "no idea") == 0


# Sizes


@given(
    start=st.integers(0, 500),
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=400),
    room=st.integers(0, 8000),
    smallest=st.integers(0, 20),
    limited=st.booleans(),
)
def test_largest_size_is_the_largest(
    start: int, steps: list[int], room: int, smallest: int, limited: bool
) -> None:
    """However units differ in tokens; past the list they all have as many."""

    def tokens(size: int) -> int:
        return start + sum(steps[:size]) + max(size - len(steps), 0) * steps[-1]

    most = 300 if limited else None
    calls = []
    found = largest_size(lambda size: calls.append(size) or tokens(size), room, smallest, most)
    if found is None:
        assert tokens(smallest) > room
        return
    assert smallest <= found
    assert tokens(found) <= room
    assert found == most or tokens(found + 1) > room
    assert len(calls) == len(set(calls)) < 25
    assert most is None or max(calls) <= most


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length(task: str, sources: Sources, tokenizer: Any) -> None:
    form = PromptForm(tokenizer)
    for length in (3000, 6000):
        for index in range(2):
            question = ruler.make_question(form, sources, task, length, index, seed=1)
            used = len(question.ids) + question.new_tokens
            # A unit of hay: a word, a line, a needle, a document.
            unit = 12 if task in ESSAY_TASKS else 180
            assert length - unit < used <= length
            text = tokenizer.decode(question.ids)
            assert text.rpartition("\n")[2].startswith("Answer:")


def test_a_seed_and_an_index_make_a_prompt(tokenizer: Any) -> None:
    form = PromptForm(tokenizer)

    def prompts(samples: int, seed: int) -> list[list[int]]:
        made = ruler.make_questions(
            form, tasks=["vt", "niah_multikey_1"], lengths=[1500], samples=samples, seed=seed
        )
        return [question.ids.tolist() for question in made]

    once = prompts(3, 5)
    assert prompts(2, 5) == [once[0], once[1], once[3], once[4]]
    assert len({tuple(ids) for ids in once}) == 6
    assert not {tuple(ids) for ids in prompts(3, 6)} & {tuple(ids) for ids in once}


def test_chat_template(tokenizer: Any, sources: Sources) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    question = ruler.make_question(PromptForm(chatty), sources, "vt", 1500, 0, seed=0)
    text = chatty.decode(question.ids)
    assert text.startswith("<eos>user: Variables")
    assert re.search(r"in the end\?\nassistant: Answer: Following .* are$", text)
    assert len(question.ids) + question.new_tokens <= 1500
    plain = ruler.make_question(PromptForm(chatty, False), sources, "vt", 1500, 0, seed=0)
    assert "assistant" not in chatty.decode(plain.ids)
    with pytest.raises(ValueError, match="has no chat template; leave --chat out"):
        PromptForm(tokenizer, True)


# Answers


def ask_about(ids: list[int], index: int = 0, new_tokens: int = 12, **more: Any) -> Question:
    return Question(
        "vt", 400, index, torch.tensor(ids, dtype=torch.int32), new_tokens, ("x",), **more
    )


def random_prompts(count: int) -> list[Question]:
    random_ = random.Random(0)
    return [
        ask_about([random_.randrange(2, 600) for _ in range(180 + 13 * index)], index)
        for index in range(count)
    ]


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PREFILL_CHUNK", 32)


@pytest.mark.parametrize("attention", ["dense", "retro"])
@pytest.mark.usefixtures("chunks")
def test_batches_answer_as_single_prompts_do(
    attention: str, device: str, model: Any, tokenizer: Any
) -> None:
    """Padded, with the prompt in pieces, and with rows to spare; retro reads all clusters, and its
    step is compiled once on a GPU, as the commands do it."""
    questions = random_prompts(5)
    config = RetroConfig(
        local_tokens=16, cluster_size=8, segment_size=64, update_segment=32, retrieval_budget=1.0
    )
    own = copy.deepcopy(model).to(device)
    own.set_attn_implementation("sdpa")
    expected = []
    for question in questions:
        ids = question.ids[None].long().to(device)
        out = own.generate(ids, max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    answerer = Answerer(
        own,
        tokenizer,
        attention,
        batch_size=3,
        max_length=400,
        config=config,
        compile_step=device == "cuda",
    )
    answers = answerer.answer(questions[:3])
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers += answerer.answer(questions[3:])
    assert answers == expected
    assert len(set(answers)) == 5


def test_offloaded_batches_give_the_same_answers(device: str, model: Any, tokenizer: Any) -> None:
    """Padded rows, rows to spare, and a second batch in the same cache, of which few pages fit."""
    questions = random_prompts(5)
    config = RetroConfig(
        local_tokens=16,
        cluster_size=8,
        segment_size=64,
        update_segment=32,
        min_retrieved_clusters=6,
        cache_ratio=0.3,
    )
    own = copy.deepcopy(model).to(device)
    answers = {}
    for offload in (False, True):
        answerer = Answerer(
            own,
            tokenizer,
            "retro",
            batch_size=3,
            max_length=400,
            config=config,
            offload=offload,
            compile_step=device == "cuda",
        )
        answers[offload] = answerer.answer(questions[:3])
        assert (answerer.page_use is not None) is offload
        first = copy.copy(answerer.page_use)
        answers[offload] += answerer.answer(questions[3:])
    assert answers[True] == answers[False]
    assert len(set(answers[True])) == 5
    use = answerer.page_use
    assert first is not None
    assert use is not None
    # Both batches count: rows, and the steps of an answer but for its first token.
    assert (first.tokens, use.tokens) == (3 * 11, 2 * 3 * 11)
    assert use.hits > first.hits > 0
    assert use.misses > first.misses > 0
    assert use.hit_ratio == use.hits / (use.hits + use.misses)
    assert use.slow_bytes_per_token > 0


def test_stop_tokens_end_an_answer_but_do_not_begin_one(model: Any, tokenizer: Any) -> None:
    (question,) = random_prompts(1)
    model.set_attn_implementation("sdpa")
    ids = question.ids[None].long()
    out = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    end = next(i for i in range(1, 12) if out[i] not in out[:i])
    answerer = Answerer(model, tokenizer, "dense", batch_size=1, max_length=400)
    (stopped,) = answerer.answer([ask_about(question.ids.tolist(), stop_ids=(out[end],))])
    assert stopped == tokenizer.decode(out[: end + 1])
    (begun,) = answerer.answer([ask_about(question.ids.tolist(), stop_ids=(out[0],))])
    assert begun
    assert not begun.startswith(tokenizer.decode(out[:1]))


def run(
    model: Any, tokenizer: Any, questions: list[Question], path: Path, **changes: Any
) -> list[evaluation.Outcome]:
    arguments: dict[str, Any] = {
        "name": "tiny",
        "dtype": "float32",
        "attentions": ["dense", "retro"],
        "batch_size": 2,
        "config": RetroConfig(),
        "compile_step": False,
        "records": Records(path),
        **changes,
    }
    return evaluation.ask(lambda: model, tokenizer, questions, **arguments)


def test_a_run_goes_on_where_it_was_cut_off(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = random_prompts(4)
    path = tmp_path / "answers.jsonl"
    asked: list[list[int]] = []
    answer = Answerer.answer

    def counted(self: Answerer, batch: list[Question]) -> list[str]:
        asked.append([question.index for question in batch])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(Answerer, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, questions, path)
    assert asked == [[0, 1], [2, 3], [0, 1], [2, 3]]
    with path.open("a") as file:
        file.write('{"settings": {"mod')  # killed while it wrote
    outcomes = run(model, tokenizer, questions, path)
    assert asked[4:] == [[2, 3]]
    assert [outcome.reused for outcome in outcomes] == [4, 2]
    assert all(len(outcome.predictions) == 4 for outcome in outcomes)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    assert lines[0]["answers"] == ["x"]

    def load() -> Any:
        raise AssertionError("nothing is left to ask")

    again = evaluation.ask(
        load,
        tokenizer,
        questions,
        name="tiny",
        dtype="float32",
        attentions=["dense", "retro"],
        batch_size=2,
        config=RetroConfig(),
        compile_step=False,
        records=Records(path),
    )
    assert [each.predictions for each in again] == [each.predictions for each in outcomes]

    # Other settings, and another prompt of the same name, are asked anew.
    del asked[:]
    other = RetroConfig(retrieval_budget=0.5)
    outcomes = run(model, tokenizer, questions, path, config=other)
    assert [outcome.reused for outcome in outcomes] == [4, 0]
    # So is retro offloaded, once; dense has nothing to do with it.
    del asked[:]
    for reused in (0, 4):
        outcomes = run(model, tokenizer, questions, path, offload=True)
        assert [outcome.reused for outcome in outcomes] == [4, reused]
    outcomes = run(model, tokenizer, questions, path)
    assert [outcome.reused for outcome in outcomes] == [4, 4]
    outcomes = run(model, tokenizer, [ask_about([5] * 50, 0)], path, attentions=["dense"])
    assert [outcome.reused for outcome in outcomes] == [0]


def test_records_name_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"task": "vt"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl, line 1: not an answer of an earlier run"):
        Records(path)


def test_a_prompt_beyond_the_limit_is_refused(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vt of 9,012 tokens exceeds the 8,192 that the model"):
        run(model, tokenizer, [ask_about([5] * 9000)], tmp_path / "answers.jsonl")


# Figures


def rows_of(scores: Callable[[str, int, str], float]) -> list[dict[str, Any]]:
    return [
        {"task": task, "context": length, "attention": attention, "samples": 1}
        | {"score": scores(task, length, attention)}
        for task, length, attention in itertools.product(
            ("vt", "cwe", "qa_1"), (4096, 8192), ("dense", "retro")
        )
    ]


def test_summary_is_over_tasks_that_dense_attention_does(tmp_path: Path) -> None:
    dense = {"vt": 80.0, "cwe": 40.0, "qa_1": 50.0}
    rows = rows_of(
        lambda task, length, attention: (
            dense[task] - (attention == "retro") * (3 if length == 4096 else 1)
        )
    )
    lines = ruler.summary(rows)
    assert lines[0].startswith("4,096 tokens: dense 65.0, retro 62.0 (-3.0), mean of 2 of 3 tasks")
    assert lines[1].startswith("8,192 tokens: dense 65.0, retro 64.0 (-1.0)")
    assert lines[2].startswith("all lengths: dense 65.0, retro 63.0 (-2.0), mean of 4 of 6 tasks")
    assert lines[3:] == [
        "vt, 4,096 tokens: dense 80.0, retro 77.0 (-3.0)",
        "vt, 8,192 tokens: dense 80.0, retro 79.0 (-1.0)",
        "cwe, 4,096 tokens: dense 40.0, retro 37.0 (-3.0)",
        "cwe, 8,192 tokens: dense 40.0, retro 39.0 (-1.0)",
    ]
    assert ruler.table(rows)["4,096 retro"] == ["77.0", "37.0", "47.0", "53.7"]
    only = [row for row in rows if row["attention"] == "retro"]
    assert ruler.summary(only) == []
    low = ruler.summary(rows_of(lambda task, length, attention: 10.0))
    assert low[0] == "4,096 tokens: dense scores 50 or more in no task"


def test_heat_map(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "map.png"
    ruler.draw(rows_of(lambda task, length, attention: 90 - len(attention + task)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


# Command


def test_ruler_scores_a_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,300 tokens, where the index is used; ten tokens hold the answer."""
    monkeypatch.setitem(TASKS, "niah_single_2", TASKS["niah_single_2"]._replace(new_tokens=10))
    arguments = [
        *("ruler", "--model", "gemma", "--context", "1300", "--tasks", "niah_single_2"),
        *("--samples", "2", "--batch-size", "2", "--dtype", "bf16", "--device", "cpu"),
        *("--out", str(tmp_path / "answers.jsonl"), "--json", str(tmp_path / "figures.json")),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1,300 tokens: dense 100.0, retro 100.0 (+0.0), mean of 1 of 1 tasks" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["dtype"] == "bfloat16"
    assert figures["config"]["retrieval_budget"] == 0.018
    assert figures["answers"]["dense"]["of_earlier_runs"] == 0
    assert figures["answers"]["retro"]["new"] == 2
    dense, retro = figures["results"]
    assert (dense["attention"], retro["attention"]) == ("dense", "retro")
    assert retro["score"] == 100
    assert retro["samples"] == 2
    assert 1280 < retro["tokens_at_least"] <= 1300

    def load(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("all answers are there")

    monkeypatch.setattr("retro_ops.models.load_model", load)
    assert main(arguments) == 0
    assert "retro: 0 answers in 0 s, 2 of earlier runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "vt,sums"], "--tasks must be names out of niah_single_1,"),
        (["--context", "300", "--tasks", "vt"], "vt needs at least"),
        (["--chat"], "the tokenizer has no chat template; leave --chat out"),
        (["--essays", "."], "essays: no *.txt in '.'"),
        (["--squad", "/no/such.json"], "cannot read /no/such.json: No such file"),
        (["--squad", "FILE"], "is not a SQuAD file"),
        (["--hotpotqa", "FILE"], "is not a HotpotQA file"),
        (["--retrieval-budget", "2"], "retrieval_budget must lie in 0..1, got 2"),
        (["--attention", "dense", "--offload"], "--offload is for retro attention, got --att"),
        (["--model", "recall"], "model 'recall' has no tokenizer that loads"),
        (["--out", "FILE"], "line 1: not an answer of an earlier run; give another --out"),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    tokenizer: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text('{"data": [{"no": 1}]}\n')
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["ruler", "--model", "model", "--samples", "1", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_a_small_file_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(SQUAD))
    with pytest.raises(ValueError, match="the file of qa_1 has too little text for 4000 tokens"):
        ruler.make_questions(
            PromptForm(tokenizer), tasks=["qa_1"], lengths=[4000], samples=1, squad=file
        )
