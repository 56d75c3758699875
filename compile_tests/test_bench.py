"""Benchmarks measure what they say, and nothing when an answer is wrong. No test checks a time."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from retro_ops import RetroLayer
from retro_ops.benchmarks.timing import Timing, time_in_turn
from retro_ops.cli import main

SMALL = ["--device", "cpu", "--rounds", "2", "--dtype", "float32", "--keys", "clustered"]


def test_bench_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    assert main(["bench", "decode", "--context", "2048,4096", *SMALL, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["context"], row["attention"][:5]) for row in rows] == [
        (2048, "dense"),
        (2048, "retro"),
        (4096, "dense"),
        (4096, "retro"),
    ]
    for row in rows:
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
        assert row["machine"]
        assert row["torch"] == torch.__version__
    dense, retro = rows[2:]
    assert dense["bytes"] == 2 * 4096 * 8 * 128 * 4
    assert retro["bytes"] < dense["bytes"]
    assert retro["ratio"] == pytest.approx(dense["us"] / retro["us"])
    assert dense["error"] < 1e-5 < retro["error"] < 0.1
    with (tmp_path / "rows.csv").open() as file:
        assert [row["context"] for row in csv.DictReader(file)] == ["2048"] * 2 + ["4096"] * 2
    assert "copy_percent" in capsys.readouterr().out


def test_bench_build(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main(["bench", "build", "--context", "4096", *SMALL, "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert row["clusters"] == round((4096 - 68) / 16)
    shares = [row[f"{op}_percent"] for op in ("cluster_keys", "pack_clusters", "append_tokens")]
    assert all(share > 0 for share in shares)
    assert sum(shares) <= 100


def test_bench_model(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    small = ["--device", "cpu", "--rounds", "2", "--dtype", "float32", "--shape", "tiny"]
    assert main(["bench", "model", "--context", "2048", *small, "--json", str(file)]) == 0
    dense, retro = json.loads(file.read_text())
    assert (dense["attention"], retro["attention"]) == ("dense", "retro")
    for row in (dense, retro):
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["ms"])
        assert row["ratio"] == pytest.approx(dense["ms"] / row["ms"])


def test_bench_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    small = ["--device", "cpu", "--context", "1100", "--tokens", "1200", "--window", "600"]
    assert main(["bench", "long", *small, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows] == [1700, 2300]
    assert [row["updates"] for row in rows] == [0, 1]
    for row in rows:
        assert row["graphs"] == 1
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        assert 0 < row["error"] <= row["worst_error"] < 0.1
        assert 0 < row["prompt_error"] <= row["prompt_worst_error"] < 0.1
    capsys.readouterr()
    assert main(["bench", "long", "--tokens", "1200", "--window", "500"]) == 2
    assert "tokens must be a multiple of window" in capsys.readouterr().err


BUFFER = ["bench", "buffer", "--policy", "lru,lfu", "--cache-ratio", "0.1", "--steps", "40"]


def test_bench_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    sizes = ["--context", "4096", "--batch", "1,2", "--overlap", "0,0.75", "--rounds", "2"]
    assert main([*BUFFER, "--trace", "synthetic,layer", *sizes, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = ["synthetic 0", "synthetic 0.75", "synthetic 0", "synthetic 0.75", "layer", "layer"]
    batches = [1, 1, 2, 2, 1, 2]
    assert [(row["trace"], row["batch"], row["policy"]) for row in rows] == [
        (name, batch, policy)
        for name, batch in zip(names, batches, strict=True)
        for policy in ("lru", "lfu")
    ]
    for row in rows:
        assert 0 < row["hit_ratio"] < 1
        assert row["missed_tokens_per_step"] > 0
        assert row["machine"]
    for row in rows[:8]:
        assert row["overlap"] == pytest.approx(float(row["trace"].split()[1]), abs=0.1)
        assert 0 < row["update_us_20"] <= row["update_us"] <= row["update_us_80"]
    assert min(row["hit_ratio"] for row in rows[2:4]) > max(row["hit_ratio"] for row in rows[:2])
    for row in rows[8:]:
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        assert row["plain_us"] > 0
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "hit_ratio" in capsys.readouterr().out


def test_bench_buffer_records_a_model(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert main([*BUFFER, "--trace", "recall", "--context", "4096", "--json", str(file)]) == 0
    for row in json.loads(file.read_text()):
        assert row["layers"] == 4
        assert row["worst_layer"] <= row["hit_ratio"] < 1
        assert 0 < row["overlap"] < 1


def test_bench_buffer_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    file = tmp_path / "hits.png"
    small = ["--trace", "synthetic", "--context", "4096", "--overlap", "0.5"]
    assert main([*BUFFER, *small, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_bench_buffer_needs_matplotlib_for_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*BUFFER, "--plot", str(tmp_path / "hits.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = "retro_ops bench buffer: a plot needs matplotlib; pip install 'retro_ops[plot]'\n"
    assert printed.err == expected


def test_bench_buffer_measures_nothing_when_offloading_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = RetroLayer.decode

    def wrong(layer: RetroLayer, *tensors: torch.Tensor) -> torch.Tensor:
        return right(layer, *tensors) * (1.01 if layer.offload else 1)

    monkeypatch.setattr(RetroLayer, "decode", wrong)
    with pytest.raises(AssertionError, match="offloading changes the result"):
        main([*BUFFER, "--trace", "layer", "--context", "4096"])
    assert capsys.readouterr().out == ""


def test_bench_measures_nothing_when_retro_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = RetroLayer.decode
    monkeypatch.setattr(RetroLayer, "decode", lambda *tensors: 1.01 * right(*tensors))
    with pytest.raises(AssertionError, match="retro at"):
        main(["bench", "decode", "--context", "2048", *SMALL])
    assert capsys.readouterr().out == ""


def test_calls_take_turns() -> None:
    calls: list[str] = []
    timings = time_in_turn(
        torch.device("cpu"),
        {"one": lambda: calls.append("one"), "two": lambda: calls.append("two")},
        rounds=4,
    )
    assert calls == ["one", "two"] * 7  # three rounds of warm-up
    assert set(timings) == {"one", "two"}
    assert Timing.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Timing(3.5, 2.0, 5.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench"], "required: WHAT"),
        (["bench", "decode", "--context", "1,x"], "whole number from 1 on, got 'x'"),
        (["bench", "decode", "--dtype", "int8"], "names out of float32,bfloat16,float16"),
        (
            ["bench", "build", "--keys", "real"],
            "names out of clustered,random,heavy-tailed,drifting,adversarial, got 'real'",
        ),
        (["bench", "buffer", "--trace", "llama"], "names out of synthetic,layer,recall"),
        (["bench", "buffer", "--policy", "mru"], "names out of lru,lru2,lfu, got 'mru'"),
        (["bench", "buffer", "--cache-ratio", "0.1,2"], "must be numbers in 0..1, got '2'"),
        (["bench", "buffer", "--overlap", "all"], "must be numbers in 0..1, got 'all'"),
        (["bench", "buffer", "--plot", "/no/such/folder/f.png"], "cannot write"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
