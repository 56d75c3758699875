"""LongBench: a small data set in the published form, its prompts, metrics and scores."""

from __future__ import annotations

import json
import string
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from retro_ops.benchmarks import longbench
from retro_ops.benchmarks.evaluation import Outcome, PromptForm
from retro_ops.benchmarks.longbench_tasks import (
    METRICS,
    TASKS,
    f1,
    f1_zh,
    rouge,
    rouge_zh,
    score,
)
from retro_ops.cli import main

STORY = "The ferry leaves at noon {and} returns with the mail. "
TALE = "渡船中午出发，傍晚带着邮件回来。"


def sample(task: str, number: int) -> dict[str, Any]:
    """A line of the published form."""
    chinese = TASKS[task].language == "zh"
    story = TALE if chinese else STORY
    known: dict[str, Any] = {
        "classes": {
            "answers": ["军事" if chinese else "Food"],
            "all_classes": ["军事", "体育"] if chinese else ["Food", "City"],
        },
        "retrieval": {"answers": ["Paragraph 7"]},
        "retrieval_zh": {"answers": ["段落7"]},
        "count": {"answers": ["7"]},
        "code": {"answers": ["    return ferry.leave(noon)"]},
    }
    return {
        "input": f"第{number}个问题" if chinese else f"Question {number} about the ferry?",
        "context": "开头。" + story * 40 if chinese else "Beginning. " + story * 40 + "Ending.",
        "answers": ["渡船中午出发", "中午"] if chinese else ["The ferry leaves at noon", "noon"],
        "length": 400,
        "dataset": task,
        "language": "zh" if chinese else "en",
        "all_classes": None,
        "_id": f"{task}-{number}",
        **known.get(TASKS[task].metric, {}),
    }


RIGHT = {
    "retrieval": "Paragraph 7",
    "retrieval_zh": "段落7",
    "count": "7",
    "code": "\n# it leaves\n    return ferry.leave(noon)\nprint()",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longbench")
    for task in TASKS:
        lines = [json.dumps(sample(task, number), ensure_ascii=False) for number in range(3)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def test_all_tasks_of_version_1() -> None:
    published = {
        "f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
        "f1_zh": "multifieldqa_zh",
        "rouge": "gov_report qmsum multi_news samsum",
        "rouge_zh": "dureader vcsum",
        "classes": "trec lsht",
        "retrieval": "passage_retrieval_en",
        "retrieval_zh": "passage_retrieval_zh",
        "count": "passage_count",
        "code": "lcc repobench-p",
    }
    assert {name: task.metric for name, task in TASKS.items()} == {
        name: metric for metric, names in published.items() for name in names.split()
    }
    chinese = {name for name, task in TASKS.items() if task.language == "zh"}
    assert chinese == {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    for name, task in TASKS.items():
        fields = {field for _, field, _, _ in string.Formatter().parse(task.prompt) if field}
        asks = name not in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
        assert fields == {"context", *(["input"] if asks else [])}


# Metrics


def test_f1_counts_words() -> None:
    assert f1("The Ferry, at noon!", "a ferry at NOON") == 1
    # Two of four and of three words: precision 1/2, recall 2/3.
    assert f1("ferry noon mail boat", "noon mail bag") == pytest.approx(4 / 7)
    assert f1("noon noon", "noon") == pytest.approx(2 / 3)
    assert f1("mail", "noon") == 0
    assert f1("", "noon") == 0
    assert f1_zh("渡船，中午出发。", "渡船中午出发") == 1
    assert 0 < f1_zh("渡船傍晚出发", "渡船中午出发") < 1
    assert f1_zh("。", "中午") == 0


def test_rouge_counts_the_longest_common_subsequence() -> None:
    assert rouge("the ferry leaves at noon", "the ferry leaves at noon") == pytest.approx(1)
    # "the ferry noon": 3 of 4 and 3 of 5 words.
    assert rouge("the ferry waits noon", "the ferry leaves at noon") == pytest.approx(2 / 3)
    assert rouge("mail", "noon") == 0
    assert rouge(" . ..", "noon") == rouge("", "noon") == rouge("noon", "") == 0
    assert rouge_zh("渡船中午出发", "渡船中午出发") == pytest.approx(1)
    assert 0 < rouge_zh("渡船傍晚出发", "渡船中午出发") < 1
    # One sentence of many words: deeper than Python's own limit, which is as it was afterwards.
    limit = sys.getrecursionlimit()
    long = " ".join(f"word{i}" for i in range(700))
    assert rouge(f"{long} a b c", f"{long} d e f {' '.join('xyz')}") > 0.9
    assert sys.getrecursionlimit() == limit


def test_choices() -> None:
    choice = METRICS["classes"]
    classes = ["Food", "City", "Other city", "Other"]
    assert choice("Type: Food", "Food", classes) == 1
    assert choice("Food or City", "Food", classes) == 0.5
    assert choice("City", "Food", classes) == 0
    # "Other" is named along with "Other city".
    assert choice("Other city", "Other city", classes) == 1
    assert choice("Other city", "Other", classes) == 0.5


def test_numbers() -> None:
    assert METRICS["retrieval"]("Paragraph 12", "Paragraph 12", ()) == 1
    assert METRICS["retrieval"]("Paragraph 12 or 3", "Paragraph 12", ()) == 0.5
    assert METRICS["retrieval"]("none", "Paragraph 12", ()) == 0
    assert METRICS["retrieval_zh"]("段落3", "段落3", ()) == 1
    assert METRICS["count"]("There are 17.", "17", ()) == 1
    assert METRICS["count"]("171", "17", ()) == 0


def test_code_is_compared_by_its_first_line() -> None:
    code = METRICS["code"]
    assert code("\n# why\n```python\nx = 1\ny = 2", "x = 1", ()) == 1
    assert code("x = 2", "x = 1", ()) == pytest.approx(0.8)
    assert code("// nothing", "x = 1", ()) == 0


@given(st.sampled_from(sorted(METRICS)), st.text(max_size=40), st.text(max_size=40))
def test_metrics_give_a_share(metric: str, prediction: str, answer: str) -> None:
    classes = [answer, "other"]
    assert 0 <= METRICS[metric](prediction, answer, classes) <= 1


def test_the_best_answer_counts_and_examples_end_with_their_line() -> None:
    assert score("hotpotqa", ["at noon", "noon"], (), "noon") == 1
    assert score("triviaqa", ["noon"], (), "\nnoon\n\nPassage: more words") == 1
    assert score("hotpotqa", ["noon"], (), "noon\nmore words") == pytest.approx(0.5)
    assert score("trec", ["Food"], ("Food", "City"), "Food\nType: City") == 1


# Prompts


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_the_sample(task: str, data: Path, tokenizer: Any) -> None:
    samples = longbench.read_samples(str(data), [task])
    questions = longbench.make_questions(PromptForm(tokenizer), samples, length=20_000)
    assert sorted(question.index for question in questions) == [0, 1, 2]
    own = samples[task][questions[0].index]
    text = tokenizer.decode(questions[0].ids)
    assert own["context"] in text
    assert (own["input"] in text) == ("{input}" in TASKS[task].prompt)
    assert "{input}" not in text
    assert questions[0].answers == tuple(own["answers"])
    newline = tokenizer("\n")["input_ids"]
    assert list(questions[0].stop_ids) == (newline if task == "samsum" else [])


@pytest.mark.parametrize("length", [600, 1100, 1101])
@pytest.mark.parametrize("chat", [False, True])
def test_the_middle_is_left_out(length: int, chat: bool, data: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "<eos>{{ messages[0].content }}<eos>" if chat else None
    samples = longbench.read_samples(str(data), ["qasper", "triviaqa"])
    for question in longbench.make_questions(PromptForm(tokenizer), samples, length=length):
        used = len(question.ids) + question.new_tokens
        assert length - 2 <= used <= length
        text = tokenizer.decode(question.ids, skip_special_tokens=True)
        prompt = TASKS[question.task].prompt
        assert text.startswith(prompt[:50])
        assert text.endswith(
            samples[question.task][question.index]["input"]
            + prompt[-9:][0 if question.task == "qasper" else 9 :]
        )
        # Examples go on as they are, without a chat.
        in_chat = int(question.ids[0]) == tokenizer.eos_token_id
        assert in_chat == (chat and question.task == "qasper")
    tokenizer.chat_template = None


def test_a_length_without_room_is_refused(data: Path, tokenizer: Any) -> None:
    samples = longbench.read_samples(str(data), ["qasper"])
    with pytest.raises(ValueError, match="no prompt fits in 1 tokens; give a larger --context"):
        longbench.make_questions(PromptForm(tokenizer), samples, length=129)


# Data


def test_the_published_archive(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "data.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in data.glob("*.jsonl"):
            file.write(path, f"data/{path.name}")
    expected = longbench.read_samples(str(data), list(TASKS))
    assert longbench.read_samples(str(archive), list(TASKS)) == expected

    def download(repository: str, name: str, *, repo_type: str) -> str:
        assert (repository, name, repo_type) == ("THUDM/LongBench", "data.zip", "dataset")
        return str(archive)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert longbench.read_samples("hub", ["trec"]) == {"trec": expected["trec"]}


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*arguments: object, **more: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(OSError, match=r"did not give data.zip .* --data \(no network\)"):
        longbench.read_samples("hub", ["trec"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "line 1 is not JSON"),
        ('{"input": "a", "context": "b"}', "line 1: a sample needs texts 'input'"),
        ('{"input": "a", "context": "b", "answers": []}', "line 1: a sample needs"),
        ('{"input": "a", "context": "b", "answers": [3]}', "line 1: a sample needs"),
        ('{"input": "a", "context": "b", "answers": ["c"]}', "line 1 needs a list 'all_classes'"),
        ("", "has no samples"),
    ],
)
def test_bad_data(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "trec.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        longbench.read_samples(str(tmp_path), ["trec"])


# Figures and command


def test_right_answers_score_100_in_every_task(data: Path, tokenizer: Any) -> None:
    samples = longbench.read_samples(str(data), list(TASKS))
    questions = longbench.make_questions(PromptForm(tokenizer), samples, length=20_000, most=2)
    right = {q.name: RIGHT.get(TASKS[q.task].metric, q.answers[0]) for q in questions}
    wrong = {q.name: "" for q in questions}
    rows = longbench.results(questions, [Outcome("dense", right), Outcome("retro", wrong)])
    assert len(rows) == 2 * 21
    assert all(row["samples"] == 2 for row in rows)
    for row in rows:
        expected = 100 if row["attention"] == "dense" else 0
        assert row["score"] == pytest.approx(expected, abs=1e-4), row["task"]
    columns = longbench.table(rows)
    assert columns["task"][-1] == "mean"
    assert columns["task"][21:-1] == [
        f"mean of {group}"
        for group in ("question answering", "summaries", "by example", "synthetic", "code")
    ]
    assert columns["dense"] == ["100.0"] * 27


def test_command(
    data: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of random weights, of the sizes that an index needs."""
    config = Gemma3TextConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "figures.json"
    arguments = [
        *("longbench", "--model", str(tmp_path / "model"), "--data", str(data), "--device", "cpu"),
        *("--context", "1500", "--batch-size", "2", "--json", str(file)),
        *("--out", str(tmp_path / "answers.jsonl")),
    ]
    assert main([*arguments, "--tasks", "hotpotqa,samsum,lcc,passage_retrieval_zh"]) == 0
    figures = json.loads(file.read_text())
    assert figures["context"] == 1500
    assert [(row["task"], row["attention"], row["samples"]) for row in figures["results"]] == [
        (task, attention, 3)
        for task in ("hotpotqa", "samsum", "lcc", "passage_retrieval_zh")
        for attention in ("dense", "retro")
    ]
    assert all(0 <= row["score"] <= 100 for row in figures["results"])
    printed = capsys.readouterr().out
    assert "LongBench" in printed
    assert "repobench-p" not in printed
    # Only what is new is asked.
    assert main([*arguments, "--tasks", "zh", "--samples", "1", "--attention", "dense"]) == 0
    printed = capsys.readouterr().out
    assert "dense: 4 answers in" in printed
    assert " 1 of earlier runs" in printed
    # Offloaded, retro is asked anew, and writes the same.
    assert main([*arguments, "--tasks", "hotpotqa,lcc", "--offload", "--cache-ratio", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "dense: 0 answers in" in printed
    assert "retro: 6 answers in" in printed
    assert "retro, offloaded: page hit ratio 0." in printed
    offloaded = json.loads(file.read_text())
    assert (figures["offload"], offloaded["offload"]) == (False, True)
    assert offloaded["config"]["cache_ratio"] == 0.3
    assert 0 < offloaded["answers"]["retro"]["hit_ratio"] < 1
    assert offloaded["answers"]["retro"]["slow_bytes_per_token"] > 0
    assert "hit_ratio" not in figures["answers"]["retro"]
    lines = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    written: dict[bool, dict[str, str]] = {False: {}, True: {}}
    for line in lines:
        if line["settings"]["attention"] == "retro":
            own = written[line["settings"].get("offload", False)]
            own[line["name"]] = line["prediction"]
    assert len(written[True]) == 6
    assert written[True] == {name: written[False][name] for name in written[True]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "trek"], "--tasks must be names out of narrativeqa"),
        (["--data", "/no/such/place"], "must be a directory, a .zip or 'hub'"),
        (["--data", "."], "has no narrativeqa.jsonl; choose from the tasks"),
    ],
)
def test_bad_input(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["longbench", "--model", "gemma", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
