"""A real model answers from anywhere in a long context: the recall model and its task."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel

from retro_ops.cli import main
from retro_ops.models import RetroCache, load_model
from retro_ops.models.recall import is_recall, make_task, train
from retro_ops.models.recall.task import FILLER, KEYS, QUESTION, VALUES


@given(
    st.integers(8, 600).flatmap(
        lambda context: st.tuples(st.just(context), st.integers(1, context // 8))
    ),
    st.integers(1, 3),
    st.integers(0, 99),
    st.data(),
)
@settings(max_examples=50)
def test_answers_of_a_task_follow_their_keys(
    sizes: tuple[int, int], batch_size: int, seed: int, data: st.DataObject
) -> None:
    context, records = sizes
    questions = data.draw(st.integers(1, records))
    task = make_task(context, records, questions, batch_size=batch_size, seed=seed)
    assert task.body.shape == (batch_size, context)
    for body, asked, answers in zip(*task, strict=True):
        pairs = [tuple(pair) for pair in zip(body.tolist(), body[1:].tolist(), strict=False)]
        for question, answer in zip(asked.tolist(), answers.tolist(), strict=True):
            assert question[0] == QUESTION
            places = [t for t, pair in enumerate(pairs) if pair == tuple(question[1:])]
            assert len(places) == 1
            assert body[places[0] + 2 : places[0] + 4].tolist() == answer
        kinds = [sum(int(token) in kind for token in body) for kind in (KEYS, VALUES, FILLER)]
        assert kinds == [2 * records, 2 * records, context - 4 * records]
    again = make_task(context, records, questions, batch_size=batch_size, seed=seed)
    assert all(torch.equal(one, other) for one, other in zip(task, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 1, 1), "context must be at least 8 tokens, got 7"),
        ((80, 11, 1), r"records must lie in 1 .. 10 in a context of 80 tokens, got 11"),
        ((80, 0, 1), "records must lie in 1 .. 10"),
        ((80, 5, 6), r"questions must lie in 1 .. 5, one for each record, got 6"),
    ],
)
def test_task_rejects(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(*arguments)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_task(80, 5, 5, batch_size=0)


@pytest.mark.parametrize("tokens", [256, 1024])
def test_training_learns_answers_only(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 8192)
    ids, answers = train.make_batch(tokens, torch.Generator().manual_seed(0))
    assert ids.shape == (8192 // tokens, tokens)
    counts = []
    for row, places in zip(ids.tolist(), answers.tolist(), strict=True):
        body = row[: tokens // 4 * 3]
        records = {
            tuple(body[t : t + 2]): body[t + 2 : t + 4]
            for t in range(len(body) - 3)
            if body[t] in KEYS and body[t + 1] in KEYS
        }
        counts.append(len(records))
        for before_first, before_second in places:
            assert row[before_first - 2] == QUESTION
            asked = tuple(row[before_first - 1 : before_first + 1])
            assert [row[before_first + 1], row[before_second + 1]] == records[asked]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0.7 * (tokens // 4 * 3 // 8)
    assert counts[-1] in range(12, 15)


def test_training_keys_are_distinct() -> None:
    pairs = train.distinct_pairs(2, 65536, torch.Generator().manual_seed(0))
    for row in pairs.tolist():
        assert len({tuple(pair) for pair in row}) == 65536
    assert not torch.equal(pairs[0], pairs[1])


@given(count=st.sampled_from([1, 6, 24, 96, 3072]), seed=st.integers(0, 99))
def test_training_has_rows_with_few_keys(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    few = many = 0
    for row in train.key_pairs(32, count, generator).tolist():
        assert len({tuple(pair) for pair in row}) == count
        firsts, seconds = zip(*row, strict=True)
        assert set(firsts) | set(seconds) <= set(KEYS)
        most = math.ceil(math.sqrt(train.SPARE_KEYS * count))
        is_few = len(set(firsts)) <= most and len(set(seconds)) <= most
        few, many = few + is_few, many + (not is_few)
    if count > 1:
        assert few
    if count > 6:  # or chance makes them few
        assert many


@given(
    tokens=st.sampled_from([64, 256, 1024]),
    rows=st.integers(1, 4),
    span=st.integers(1, 1 << 17),
    seed=st.integers(0, 99),
)
def test_training_leaves_out_filler_between_records_only(
    tokens: int, rows: int, span: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = train.spread_positions(tokens, rows, span, generator)
    assert positions.shape == (rows, tokens)
    assert positions.dtype == torch.int64
    assert positions.min() >= 0
    assert positions.max() < max(tokens, span)
    body = tokens // 4 * 3
    pieces = [*range(0, body, 8), *range(body, tokens, 5), tokens]
    inside = torch.ones(tokens - 1, dtype=torch.bool)
    inside[torch.tensor(pieces[1:-1]) - 1] = False
    steps = positions.diff(dim=1)
    assert (steps[:, inside] == 1).all()
    assert (steps >= 1).all()
    if span <= tokens:
        assert torch.equal(positions, torch.arange(tokens).expand(rows, -1))


def test_training_leaves_out_more_or_less() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = train.spread_positions(64, 64, 32768, generator)
    last = positions[:, -1]
    assert last.unique().numel() > 48
    assert last.min() < 128
    assert last.max() > 16384
    for row in positions[last > 1024]:
        assert (row.diff() > 1).sum() > 4


@torch.compiler.set_stance("force_eager")
def test_training_computes_what_the_model_computes() -> None:
    torch.manual_seed(0)
    model = train.make_model()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.05)
    ids = torch.randint(1024, (3, 96))
    positions = train.spread_positions(96, 3, 4096, torch.Generator().manual_seed(0))
    by_transformers = model.model(
        ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
    )
    found = []
    for hidden in (
        by_transformers.last_hidden_state,
        train.hidden_states(model, ids, positions),
    ):
        gradients = torch.autograd.grad(hidden.square().sum(), list(model.parameters()))
        found.append((hidden, *gradients))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


@torch.compiler.set_stance("force_eager")
@pytest.mark.usefixtures("one_thread")
def test_a_step_of_training_changes_all_weights_for_the_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 1024)
    torch.manual_seed(0)
    model = train.make_model()
    before = copy.deepcopy(model.state_dict())
    optimizers = train.make_optimizers(model)
    generator = torch.Generator().manual_seed(0)
    ids, answers = train.make_batch(64, generator)
    positions = train.spread_positions(64, len(ids), 1024, generator)
    losses = []
    for _ in range(8):
        loss, right, norm = train.learn(model, optimizers, ids, answers, positions, 1e-3).tolist()
        assert 0 <= right <= 1
        assert norm > 0
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    same = [name for name, weight in model.state_dict().items() if weight.equal(before[name])]
    assert not same


def test_training_makes_the_model_of_the_package() -> None:
    ours, packaged = train.make_model(), load_model("recall", device="cpu")
    shapes = {name: parameter.shape for name, parameter in packaged.named_parameters()}
    assert {name: parameter.shape for name, parameter in ours.named_parameters()} == shapes
    for name, value in ours.config.to_diff_dict().items():
        if name not in ("transformers_version", "dtype"):
            assert getattr(packaged.config, name) == value, name
    assert train.accuracy(packaged, 2048, 100) == 1.0


def test_a_trained_model_is_asked_about_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "trained")
    model = train.make_model()
    model.load_state_dict(load_model("recall", device="cpu", dtype=torch.float32).state_dict())
    model.save_pretrained(folder)
    assert is_recall(folder)
    assert [is_recall(name) for name in ("recall", "recall-128k", "some/model")] == [
        True,
        True,
        False,
    ]
    asked = ["--questions", "4", "--attention", "retro"]
    assert main(["demo", "--model", folder, "--context", "1024", "--records", "64", *asked]) == 0
    assert "64 records in 1,024 tokens" in capsys.readouterr().out
    assert main(["bench", "recall", "--model", folder, "--context", "1024", *asked]) == 0
    capsys.readouterr()
    assert main(["bench", "recall", "--model", "some/model"]) == 2
    assert "'some/model' is no recall model; take recall," in capsys.readouterr().err


@torch.compiler.set_stance("force_eager")
@pytest.mark.usefixtures("one_thread")
def test_training_goes_from_length_to_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(train, "STEPS_BETWEEN", 2)
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)
    seen, spans, learn = [], [], train.learn
    right = {64: [0.9, 0.9, 0.94, 0.97], 128: [0.96, 0.96], 256: [0.99] * 12}

    def learn_so_much(*arguments: Any) -> Tensor:
        (_, tokens), positions, rate = arguments[2].shape, *arguments[4:]
        seen.append((tokens, rate))
        spans.append((tokens, int(positions.max())))
        loss, _, norm = learn(*arguments)
        shares = right[tokens]
        return torch.stack((loss, torch.tensor(shares.pop(0) if shares else 0.0), norm))

    monkeypatch.setattr(train, "learn", learn_so_much)
    model, reached = train.train(torch.device("cpu"), (64, 128, 256), 10)
    assert not model.training
    assert reached == 256
    # 95.5 % of the answers of steps 3 and 4 are right; what is learned again does not count.
    assert [line.split(" tokens: ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "     1 s, step 2, 64",
        "     2 s, step 4, 64",
        "     3 s, step 6, 128",
    ]
    assert all(last < 256 for _, last in spans)
    assert any(last > 2 * tokens for tokens, last in spans)
    sizes = [size for size, _ in seen]
    assert sizes == [64] * 4 + [64, 128] * 2 + [128, 256, 64, 256] * 6
    # Each of 18 steps in 9 seconds, with one batch or two: warming up, and falling in the end.
    rates = [rate for size, rate in seen if size == 64][:4]
    rates += [rate for size, rate in seen if size == 128][:2] + [r for s, r in seen if s == 256]
    steady = [rate * train.WARM_UP_STEPS / step for step, rate in enumerate(rates, 1)]
    assert len(steady) == 18
    assert steady[:8] == pytest.approx([train.FIRST_RATE] * 8)
    assert steady[-1] == pytest.approx(
        train.LAST_RATE + (train.FIRST_RATE - train.LAST_RATE) * 0.1 / (1 - train.STEADY)
    )


@torch.compiler.set_stance("force_eager")
def test_training_says_when_a_gradient_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(train, "FIRST_RATE", float("inf"))
    message = "the gradient's norm is nan within 5 steps: try another seed"
    with pytest.raises(FloatingPointError, match=message):
        train.train(torch.device("cpu"), (64,), 1000)


@pytest.fixture
def a_gpu_that_trains(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What training was asked for; it gives an untrained model that has come to 32,768 tokens."""
    asked: list[tuple[Any, ...]] = []

    def trained(*arguments: Any) -> tuple[PreTrainedModel, int]:
        asked.append(arguments[1:])
        return train.make_model(), 32768

    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(train, "accuracy", lambda model, tokens, records: records / tokens)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return asked


def test_command_trains(
    a_gpu_that_trains: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "some" / "my model"
    assert train.main([str(new), "--seed", "3"]) == 0
    assert a_gpu_that_trains == [(train.LENGTHS, train.SECONDS, 3)]
    assert is_recall(new)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "4096 tokens, density 0.1 and 0.5: 0.01 and 0.06"
    assert out[3] == f"python -m retro_ops demo --model '{new}'"

    assert train.main([str(tmp_path / "long"), "--long", "--seconds", "30"]) == 1
    assert a_gpu_that_trains[1] == (train.LONG_LENGTHS, 30.0, 0)
    said = capsys.readouterr()
    assert "131072 tokens, density" in said.out
    assert "time ran out at 32768 of 131072 tokens; more --seconds help" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recall"], "'recall' is the name of a built-in model: take another one"),
        (["./gemma"], "'gemma' is the name of a built-in model"),
        (["full"], "'full' is there already: take another name"),
        (["file"], "'file' is there already"),
        (["file/new"], "cannot make 'file/new': Not a directory"),
        (["new", "--seconds", "0"], "--seconds must be more than 0, got 0.0"),
    ],
)
def test_command_refuses(
    arguments: list[str],
    message: str,
    a_gpu_that_trains: list[tuple[Any, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for file in ("full/config.json", "file"):
        (tmp_path / file).write_text("")
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert message in capsys.readouterr().err
    assert not a_gpu_that_trains
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(SystemExit):
        train.main(["new"])
    assert "compute capability 8.0 or later" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.main(["new"])
    assert "training needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", [None, "", "[]", '{"model_type": "llama"}'])
def test_other_models_are_not_asked_about_records(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert not is_recall(tmp_path)
    assert not is_recall("some/model")


def ask(
    model: PreTrainedModel, cache: Cache, body: Tensor, questions: Tensor, **kwargs: object
) -> Tensor:
    """Answers `[Q, 2]` to questions `[Q, 3]`, one after another in one context, by generate."""
    ids, answers = body, []
    for question in questions:
        ids = torch.cat((ids, question[None]), dim=1)
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            **kwargs,
        )
        answers.append(ids[0, -2:])
    return torch.stack(answers)


def test_recalls_wherever_dense_attention_does() -> None:
    """2,048 records in 32,768 tokens, 64 questions, default settings, eager and compiled."""
    context, questions = 32768, 64
    task = make_task(context, 2048, questions)
    truth = task.answers[0]
    model = load_model("recall", dtype=torch.bfloat16, device="cpu")
    max_length = context + 5 * questions
    retro = RetroCache(model.config, max_cache_len=max_length)
    model(task.body, past_key_values=retro, logits_to_keep=1)
    assert retro.stats()["clusters"] == 4 * 2044  # layers, round(32700 / 16)
    compiled = copy.deepcopy(retro)

    answers = {"eager": ask(model, retro, task.body, task.questions[0])}
    torch.compiler.reset()
    every_device = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    every_device._compile_all_devices = True
    answers["compiled"] = ask(
        model, compiled, task.body, task.questions[0], compile_config=every_device
    )
    assert compiled.stats() | {"build_seconds": 0} == retro.stats() | {"build_seconds": 0}

    model.set_attn_implementation("sdpa")
    dense_cache = DynamicCache(config=model.config)
    model(task.body, past_key_values=dense_cache, logits_to_keep=1)
    dense = ask(model, dense_cache, task.body, task.questions[0])
    dense_right = (dense == truth).all(dim=1)
    assert int(dense_right.sum()) == questions  # so that the question has a meaning
    for kind, given_answers in answers.items():
        right = (given_answers == truth).all(dim=1)
        assert int((right & dense_right).sum()) == questions, kind
