"""The command line: what it prints, what it writes, and what it says of bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

from retro_ops import RetroConfig
from retro_ops.cli import main
from retro_ops.models import demo, load_model, memory
from retro_ops.models.prose import haystack, make_needle, prose

SMALL = ["demo", "--context", "2048", "--questions", "4"]


def test_demo_shows_and_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--batch-size", "2", "--json", str(file)]) == 0
    dense, retro = json.loads(file.read_text())
    assert (dense["attention"], retro["attention"]) == ("dense", "retro")
    for result in (dense, retro):
        assert result["right"] == result["questions"] == 8
        assert result["step_milliseconds"] > 0
    assert dense["build_seconds"] == 0 < retro["build_seconds"] < retro["prefill_seconds"]
    # 4 layers, keys and values, 2 KV heads, 64 numbers of 4 bytes, for every token so far
    assert dense["kv_bytes_per_token"] == 4 * 2 * 2 * 64 * 4 * (2048 + 4 * 5)
    assert 0 < retro["kv_bytes_per_token"] < dense["kv_bytes_per_token"]

    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.isascii()
    assert "128 records in 2,048 tokens" in printed.out
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["attention", "dense", "retro"]
    assert all("8 of 8" in line for line in lines[2:])
    assert "slow memory" not in printed.out
    assert dense["offloaded"] is retro["offloaded"] is False


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "offloaded"])
@pytest.mark.usefixtures("fresh_compiler")
def test_demo_compiles(offload: bool, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = [*SMALL, "--attention", "retro", "--compile", "--json", str(file)]
    assert main([*arguments, *["--offload"] * offload]) == 0
    (retro,) = json.loads(file.read_text())
    assert retro["right"] == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert retro["offloaded"] is offload
    assert (retro["hit_ratio"] is not None) is offload


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Of the steps of every demo, in order."""
    seen = []
    step = demo.Decoder.step

    def noted(self: demo.Decoder, ids: Tensor) -> Tensor:
        out = step(self, ids)
        seen.append(out.cpu())
        return out

    monkeypatch.setattr(demo.Decoder, "step", noted)
    return seen


def run_both(arguments: list[str], logits: list[Tensor], file: Path) -> list[dict[str, Any]]:
    """Figures of retro, not offloaded and offloaded; the logits of all steps are the same."""
    results = []
    for more in ([], ["--offload"]):
        assert main([*arguments, "--attention", "retro", "--json", str(file), *more]) == 0
        results += json.loads(file.read_text())
    half = len(logits) // 2
    assert half > 0
    for plain, offloaded in zip(logits[:half], logits[half:], strict=True):
        assert torch.equal(plain, offloaded)
    plain, offloaded = results
    assert plain["right"] == offloaded["right"]
    assert (plain["offloaded"], offloaded["offloaded"]) == (False, True)
    return results


def test_demo_offloads(
    logits: list[Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that ask several questions, with the same logits; a larger page cache hits more."""
    file = tmp_path / "figures.json"
    plain, offloaded = run_both([*SMALL, "--batch-size", "2"], logits, file)
    assert plain["hit_ratio"] is plain["slow_bytes_per_token"] is None
    assert 0 < offloaded["hit_ratio"] < 1
    # Steady tokens and the index are never in slow memory.
    assert 0 < offloaded["slow_bytes_per_token"] < offloaded["kv_bytes_per_token"]
    heading, row = capsys.readouterr().out.splitlines()[-2:]
    assert "of it from slow memory" in heading
    assert "page hit ratio" in heading
    shown = [f"{offloaded['slow_bytes_per_token'] / 1e6:.2f}", f"{offloaded['hit_ratio']:.2f}"]
    assert row.split()[-2:] == shown

    # Room for all: a page misses once.
    assert main([*SMALL, "--offload", "--cache-ratio", "1", "--json", str(file)]) == 0
    dense, all_cached = json.loads(file.read_text())
    assert dense["offloaded"] is False
    assert dense["hit_ratio"] is dense["slow_bytes_per_token"] is None
    assert offloaded["hit_ratio"] < all_cached["hit_ratio"] < 1
    assert 0 < all_cached["slow_bytes_per_token"] < offloaded["slow_bytes_per_token"]


def test_demo_offloads_what_is_too_short_to_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    arguments = ["demo", "--context", "64", "--questions", "1", "--attention", "retro", "--offload"]
    assert main([*arguments, "--json", str(file)]) == 0
    (retro,) = json.loads(file.read_text())
    assert retro["offloaded"] is True
    assert retro["hit_ratio"] is None
    assert retro["slow_bytes_per_token"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["--compile"]], ids=["eager", "compiled"])
@pytest.mark.usefixtures("fresh_compiler")
def test_demo_offloads_on_a_gpu(more: list[str], logits: list[Tensor], tmp_path: Path) -> None:
    arguments = ["demo", "--model", "recall", "--context", "4096", "--questions", "8"]
    arguments += ["--batch-size", "2", "--device", "cuda", *more]
    _, offloaded = run_both(arguments, logits, tmp_path / "figures.json")
    assert offloaded["right"] == offloaded["questions"] == 16
    assert 0 < offloaded["hit_ratio"] < 1
    assert 0 < offloaded["slow_bytes_per_token"] < offloaded["kv_bytes_per_token"]


def test_a_batch_that_does_not_fit_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys and values fit, and the page cache beside them does not; short rows have none."""
    model = load_model("recall", dtype=torch.float32, device="cpu")
    rows, tokens = 4, 8192
    kv_bytes = rows * tokens * 4 * 2 * 2 * 64 * 4  # layers, keys and values, KV heads, D, float32
    room = int(1.3 * kv_bytes)
    monkeypatch.setattr(demo, "free_memory", lambda: memory.Memory(room))
    monkeypatch.setattr(memory, "free_on", lambda device: room)
    demo.check_batch(model, rows, tokens)
    demo.check_batch(model, rows, tokens, offload=True)
    large = RetroConfig(cache_ratio=0.5)
    demo.check_batch(model, rows, tokens, config=large)
    with pytest.raises(MemoryError, match=r"4 rows of max_cache_len 8,192 .* batch_size at most 3"):
        demo.check_batch(model, rows, tokens, config=large, offload=True)
    demo.check_batch(model, 3, tokens, config=large, offload=True)
    with pytest.raises(MemoryError, match=r"6 prompts of 8,192 tokens need .* at most 5"):
        demo.check_batch(model, 6, tokens, config=large, offload=True)


def test_a_batch_that_does_not_fit_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, and the host has room: retro attention alone may do, offloaded."""
    model = load_model("recall", dtype=torch.float32, device="cpu")
    rows, tokens = 4, 8192
    row = tokens * 4 * 2 * 2 * 64 * 4  # layers, keys and values, KV heads, D, float32
    monkeypatch.setattr(type(model), "device", torch.device("cuda:0"))

    def cache(*args: Any, **options: Any) -> None:
        raise MemoryError("retro is next")

    monkeypatch.setattr(demo, "RetroCache", cache)

    def check(free: int, *attentions: str, offload: bool = True) -> str:
        """What is said where so much is free on the GPU."""
        monkeypatch.setattr(demo, "free_memory", lambda: memory.Memory(1 << 40, (free,)))
        try:
            demo.check_batch(model, rows, tokens, attentions=attentions, offload=offload)
        except MemoryError as error:
            return str(error)
        return ""

    assert check(rows * row, "dense", "retro") == "retro is next"
    assert check(rows * row, "dense") == ""
    said = check(rows * row - 1, "dense", "retro")
    assert "4 prompts of 8,192 tokens need 0.12 GiB for dense attention, 0.12 GiB are free" in said
    assert said.endswith("the batch size at most 3, or leave dense out with --attention retro")
    assert "make the context shorter, or leave" in check(row - 1, "dense", "retro")
    assert check(row - 1, "retro") == "retro is next"
    for said in (check(row, "dense"), check(row, "dense", "retro", offload=False)):
        assert said.endswith("make the batch size at most 1")


def test_text_that_does_not_fit_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is refused before any prompt is read, by dense attention either."""
    model = load_model("recall", dtype=torch.float32, device="cpu")
    monkeypatch.setattr(demo, "free_memory", lambda: memory.Memory(1 << 30))
    monkeypatch.setattr(memory, "free_on", lambda device: 1 << 24)
    begun: list[str] = []

    def tokenizer(texts: list[str], **options: Any) -> BatchEncoding:
        length = 16 * max(map(len, texts))
        return BatchEncoding({"input_ids": torch.ones(len(texts), length, dtype=torch.int64)})

    with pytest.raises(MemoryError, match=r"2 rows of max_cache_len 8,200 tokens need .* on host"):
        demo.text_demo(
            model,
            tokenizer,
            [demo.Prompt("x" * length, "") for length in (1, 3, 512, 4, 600)],
            batch_size=2,
            max_new_tokens=8,
            attentions=["dense", "retro"],
            offload=True,
            progress=lambda what, done, total: begun.append(what),
        )
    assert begun == []


def test_module_and_script_run(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("retro")
    for command in ([sys.executable, "-m", "retro_ops"], [str(script)]):
        ran = subprocess.run([*command, "info"], capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert "CPU kernels" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["demo", "--attention", "sparse"], "names out of dense,retro, got 'sparse'"),
        (["demo", "--context", "0"], "whole number from 1 on, got '0'"),
        (["demo", "--context", "many"], "whole number from 1 on, got 'many'"),
        (["demo", "--max-new-tokens", "1"], "whole number from 2 on, got '1'"),
        (["demo", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["demo", "--device", "abacus"], "must be one of cpu"),
        (["demo", "--device", "cuda:99"], "got 'cuda:99'"),
        (["demo", "--json", "/no/such/folder/figures.json"], "cannot write '/no/such/folder"),
        (["demo", "--cache-ratio", "2"], "--cache-ratio: must be a number in 0..1, got '2'"),
        (["ruler", "--model", "gemma", "--cache-ratio", "-1"], "a number in 0..1, got '-1'"),
        (["longbench", "--model", "gemma", "--cache-ratio", "half"], "in 0..1, got 'half'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    check_one_line(capsys, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--retrieval-budget", "1.5"], "retrieval_budget must lie in 0..1, got 1.5"),
        (["--estimation-budget", "-1"], "estimation_budget must lie in 0..1, got -1"),
        (["--estimator", "guess"], "estimator must be one of variance, mean, got 'guess'"),
        (
            ["--attention", "dense", "--offload"],
            "--offload is for retro attention, got --attention dense; add retro, or leave",
        ),
        (["--cache-ratio", "0.1"], "--cache-ratio 0.1 is for --offload: give both, or neither"),
        (["--records", "300"], "records must lie in 1 .. 256"),
        (["--questions", "129"], "questions must lie in 1 .. 128"),
        (["--model", "/no/such/model"], "no model '/no/such/model'"),
        (["--data-path", "/no/such/file.json"], "cannot read /no/such/file.json: No such file"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    check_one_line(capsys, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "is not JSON"),
        ("[]", "must hold a list of prompts"),
        ('{"input": "x"}', "must hold a list of prompts"),
        ('[{"outputs": "x"}]', "prompt 0 has no text 'input'"),
        ('[{"input": 3}]', "prompt 0 has no text 'input'"),
        ('[{"input": "a", "outputs": "b"}, {"input": " \\n"}]', "'input' of prompt 1 is empty"),
        ('[{"input": "a", "outputs": ["b"]}]', "'outputs' of prompt 0 must be a text"),
    ],
)
def test_bad_prompts(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(text)
    assert main(["demo", "--data-path", str(file)]) == 2
    check_one_line(capsys, words)


def check_one_line(capsys: pytest.CaptureFixture[str], words: str) -> None:
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("retro_ops")


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_haystack_hides_its_needle(depth: float) -> None:
    needle = make_needle(3)
    text = haystack(needle, 500, depth, lambda text: len(text.split()), seed=1)
    assert text.count(needle.fact) == 1
    assert text.count(needle.answer) == 1
    assert text.endswith(needle.question)
    assert 400 <= len(text.split()) <= 500
    before = len(text.split(needle.fact)[0].split()) / len(text.split())
    assert abs(before - depth) < 0.1


def test_haystack_rejects() -> None:
    with pytest.raises(ValueError, match=r"depth must lie in 0\.\.1, got 1\.5"):
        haystack(make_needle(0), 500, 1.5, len)
    with pytest.raises(ValueError, match="do not fit in 10 tokens"):
        haystack(make_needle(0), 10, 0.5, len)


def test_prose_varies_and_repeats_itself() -> None:
    one, same, other = prose(0), prose(0), prose(1)
    paragraphs = [one() for _ in range(50)]
    assert paragraphs == [same() for _ in range(50)]
    assert paragraphs != [other() for _ in range(50)]
    sentences = [s for paragraph in paragraphs for s in paragraph.split(". ")]
    assert len(set(sentences)) > 0.95 * len(sentences)
    assert "{" not in "".join(paragraphs)
