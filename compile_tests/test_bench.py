"""Benchmarks measure what they say, and nothing when an answer is wrong. No test checks a time."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from retro_ops import RetroConfig, RetroLayer, cli_bench
from retro_ops.benchmarks import machine, throughput
from retro_ops.benchmarks.model import own_times
from retro_ops.benchmarks.prefill import make_model
from retro_ops.benchmarks.timing import Timing, time_in_turn
from retro_ops.cli import main
from retro_ops.models import RetroCache
from retro_ops.models.load import find_model
from retro_ops.models.shapes import SHAPES
from retro_ops.testing import make_kv, make_query

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


@pytest.mark.parametrize("what", ["decode", "prefill", "buffer", "export"])
@pytest.mark.parametrize(
    "error", [ValueError("too long"), torch.OutOfMemoryError("out of memory"), KeyboardInterrupt()]
)
def test_what_was_measured_is_not_lost(
    what: str,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where a benchmark fails or is stopped, it has shown and written the rows before."""
    benchmark = importlib.import_module(f"retro_ops.benchmarks.{what}")
    row = {**machine.facts(torch.device("cpu")), "dtype": "float32", "context": 77, "wrong": ""}

    def run(**options: object) -> Iterator[Any]:
        yield row if what == "prefill" else [row]
        raise error

    monkeypatch.setattr(benchmark, "run", run)
    file = tmp_path / "rows.json"
    command = ["bench", what, "--device", "cpu", "--json", str(file)]
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            main(command)
    else:
        assert main(command) == 2
    assert json.loads(file.read_text()) == [row]
    said = capsys.readouterr()
    assert "77" in said.out
    if isinstance(error, ValueError):
        assert "too long" in said.err


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


@pytest.mark.gpu
def test_bench_model_on_a_gpu(tmp_path: Path) -> None:
    """Shares of a step: by kind, together with what is idle all of it, and of single kernels."""
    file = tmp_path / "rows.json"
    small = ["--device", "cuda", "--rounds", "5", "--dtype", "bfloat16", "--shape", "tiny"]
    assert main(["bench", "model", "--context", "8192", *small, "--json", str(file)]) == 0
    dense, retro = json.loads(file.read_text())
    for row in (dense, retro):
        kinds = [row[f"{kind}_percent"] for kind in ("gemm", "attention", "other")]
        assert min(kinds) >= 0
        assert row["attention_percent"] > 0
        assert sum(kinds) + row["idle_percent"] == pytest.approx(100)
        assert row["kernels"] == "cuda"
    assert "retro::attend_kernel" in retro["largest"]
    assert "retro" not in dense["largest"]


def test_overlapping_kernels_count_once() -> None:
    spans = [("b", 2.0, 6.0), ("a", 0.0, 4.0), ("c", 3.0, 5.0), ("a", 8.0, 9.0), ("b", 8.5, 9.5)]
    assert own_times(spans) == {"a": 5.0, "b": 2.5, "c": 0.0}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(0, 9))))
def test_shares_are_those_of_the_time_in_which_any_kernel_ran(
    spans: list[tuple[str, int, int]],
) -> None:
    times = own_times((name, float(begin), float(begin + length)) for name, begin, length in spans)
    ran = {t for _, begin, length in spans for t in range(begin, begin + length)}
    assert sum(times.values()) == len(ran)
    for name, time in times.items():
        assert 0 <= time <= sum(length for own, _, length in spans if own == name)


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


def test_bench_long_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    small = ["--device", "cpu", "--context", "1100", "--tokens", "1200", "--window", "600"]
    assert main(["bench", "long", "--model", "tiny", *small, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["tokens"] for row in rows] == [1164, 1700, 2300]
    assert [row["updates"] for row in rows] == [0, 0, 1]
    assert [row["growth_us"] is None for row in rows] == [True, True, False]
    assert [row["merge_us"] for row in rows] == [None, None, None]
    for row in rows:
        assert row["graphs"] == 1
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        for kind in ("", "prompt_"):
            assert 0 < row[f"{kind}error"] < 0.1
            assert abs(row[f"{kind}kl"]) < 1e-3
            assert row[f"{kind}top1"] > 0.9
    assert 0 < rows[-1]["first_us"] < 100 * rows[-1]["last_us"]
    # Without growth in between, both are the same prompt and steps.
    assert rows[0]["error"] == pytest.approx(rows[0]["prompt_error"], rel=0.1)
    capsys.readouterr()
    assert main(["bench", "long", "--model", "tiny", "--tokens", "1200", "--window", "500"]) == 2
    assert "tokens must be a multiple of window" in capsys.readouterr().err


def test_bench_spread(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    small = ["--model", "tiny", "--device", "cpu", "--context", "700", "--rounds", "2"]
    assert main(["bench", "spread", *small, "--batch", "1,2", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    cases = [(row["devices"], row["batch"]) for row in rows]
    assert cases == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for row in rows:
        assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
        assert ("handover_percent" in row) == (row["devices"] == 2)


BUFFER = ["bench", "buffer", "--policy", "lru,lfu", "--cache-ratios", "0.1", "--steps", "40"]
BUFFER += ["--device", "cpu"]


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


@pytest.mark.gpu
def test_bench_buffer_on_a_gpu(tmp_path: Path) -> None:
    sizes = ["--context", "8192", "--batch", "1,2", "--overlap", "0,0.95", "--rounds", "5"]
    file = tmp_path / "rows.json"
    named = ["--device", "cuda", "--trace", "layer", "--policy", "lfu"]
    assert main([*BUFFER, *named, *sizes, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["trace"], row["batch"], row["layers"]) for row in rows] == [
        *(("layer 0", 1, 16), ("layer 0.95", 1, 16)),
        *(("layer 0", 2, 8), ("layer 0.95", 2, 8)),
    ]
    for often, seldom in ((rows[1], rows[0]), (rows[3], rows[2])):
        assert often["hit_ratio"] > seldom["hit_ratio"]
        assert often["overlap"] > seldom["overlap"]
        assert often["miss_bytes"] < seldom["miss_bytes"]
    for row in rows:
        assert 0 < row["us_20"] <= row["us"] <= row["us_80"]
        assert 0 < row["floor_us"] < row["bound_us"]
        assert row["update_us"] > 0


def test_bench_buffer_records_a_model(tmp_path: Path) -> None:
    """A built-in one, and one of a directory."""
    file, folder = tmp_path / "rows.json", tmp_path / "trained"
    shutil.copytree(find_model("recall"), folder)
    traces = ["--trace", f"recall,{folder}", "--context", "4096"]
    assert main([*BUFFER, *traces, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    half = len(rows) // 2
    assert [row["trace"] for row in rows] == half * ["recall"] + half * [str(folder)]
    assert [row["hit_ratio"] for row in rows[:half]] == [row["hit_ratio"] for row in rows[half:]]
    for row in rows:
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


SHAPE = ["--device", "cpu", "--model", "tiny", "--dtype", "float32"]


def test_bench_throughput(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    plot, file = tmp_path / "throughput.png", tmp_path / "rows.json"
    asked = ["--context", "2048", "--batch", "2", "--steps", "3", "--layers", "1", "--offload"]
    files = ["--json", str(file), "--csv", str(tmp_path / "rows.csv"), "--plot", str(plot)]
    found = ["--overlap", "0,1", "--cache-ratio", "0.3", "--min-retrieved-clusters", "8"]
    assert main(["bench", "throughput", *SHAPE, *asked, *found, *files]) == 0
    rows = json.loads(file.read_text())
    assert [(row["attention"], row.get("overlap")) for row in rows] == [
        ("dense", None),
        *(("retro", 0.0), ("retro", 1.0), ("retro offloaded", 0.0), ("retro offloaded", 1.0)),
    ]
    for row in rows:
        assert row["batch"] == 2
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / rows[0]["tokens_per_s"])
        assert row["best"] == "yes"
        assert row["bound_ms"] > 0
        assert 0 < row["end_to_end_tokens_per_s"] < row["tokens_per_s"]
        assert row["prefill_s"] > 0
        assert row["rows_host"] > 1
        assert row["note"] == throughput.FILL
        assert row["cache_ratio"] == 0.3
        assert row["machine"]
    # 8 clusters at least are more than 1.8 % of 124.
    assert all(0 < row["bound_no_floor_ms"] < row["bound_ms"] for row in rows[1:])
    anew, same = (row["hit_ratio"] for row in rows[3:])
    assert 0 < anew < same == 1
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_throughput_steps_are_those_of_the_model() -> None:
    """Layers of one compiled function, each with its own cache, write the tokens of the model."""
    torch.manual_seed(0)
    everything = RetroConfig(retrieval_budget=1.0)
    model = make_model(SHAPES["tiny"](), torch.float32, torch.device("cpu"))
    for parameter in model.parameters():  # logits that rounding does not turn
        parameter.data.mul_(8 if parameter.dim() > 1 else 1)
    whole = RetroCache(model.config, everything, max_cache_len=2400, batch_size=2)
    reference = copy.deepcopy(model)
    for layer in model.get_decoder().layers:
        layer.self_attn.layer_idx = 0
    study = throughput._Study(model, 2048, "clustered", everything, None, 4)
    caches, _ = study._fill(throughput.Case("retro", 2048, 2))
    for layer, cache in zip(whole.retro_layers, caches, strict=True):
        layer.lazy_initialization(*torch.zeros(2, 2, 2, 1, 16))
        layer.load_state(cache.retro_layers[0].state())
    counters.clear()
    with torch.no_grad():
        step, read, _ = study._step(caches, 2)
        written = [read.clone()]
        for _ in range(3):
            step()
            written.append(read.clone())
    assert counters["stats"]["unique_graphs"] == 2  # a layer, and the end
    reference.set_attn_implementation("retro")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (2, 64), generator=generator)[:, :1]
    expected = []
    with torch.no_grad():
        for _ in range(4):
            logits = reference(input_ids=ids, past_key_values=whole).logits[:, -1]
            best = logits.topk(2).values
            assert (best[:, 0] - best[:, 1] > 1e-3).all()
            ids = logits.argmax(dim=-1, keepdim=True)
            expected.append(ids)
    assert torch.cat(written, dim=1).tolist() == torch.cat(expected, dim=1).tolist()
    # What a dense step moves: weights of two layers and the output, keys and values of the rows.
    weights = 4 * (2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 128 * 64)
    kv = 2 * 2 * 2 * 16 * 4 * (2048 + throughput.SPARE_TOKENS)
    bound = study.bounds({"batch": 3}, gb_per_s=1.0, host_gb_per_s=1.0)
    assert bound["bound_ms"] * 1e6 == pytest.approx(weights + 3 * kv)


class FakeStudy:
    """Throughput by rows; what does not fit or run raises."""

    tokens, device = 1024, torch.device("cpu")

    def __init__(self, most: int, speeds: dict[int, float | Exception]) -> None:
        self.most, self.speeds = most, speeds

    def limits(self, attention: str) -> dict[str, int]:
        return {"rows_gpu": self.most, "rows_host": 99}

    def measure(self, case: throughput.Case) -> list[dict[str, float]]:
        speed = self.speeds[case.rows]
        if isinstance(speed, Exception):
            raise speed
        return [{"ms": 1.0, "tokens_per_s": speed}]


@pytest.mark.parametrize(
    ("most", "speeds", "tried", "best"),
    [
        (13, {13: 50, 12: 55, 8: 60, 4: 30}, [13, 12, 8, 4], 8),
        (8, {8: 50, 4: 40}, [8, 4], 8),
        (1, {1: 50}, [1], 1),
        (6, {6: torch.OutOfMemoryError(), 4: 5, 2: 4}, [6, 4, 2], 4),
        (6, {6: NotImplementedError("not built")}, [6], None),
        (0, {}, [0], None),
    ],
)
def test_throughput_looks_for_the_best_batch(
    most: int, speeds: dict[int, Any], tried: list[int], best: int | None
) -> None:
    study: Any = FakeStudy(most, speeds)
    rows = list(throughput._best(study, "retro", None, lambda *args: None))
    assert [row["batch"] for row in rows] == tried
    assert [row["batch"] for row in rows if row.get("best")] == ([best] if best else [])
    for row in rows:
        assert ("note" in row) != ("ms" in row)


def test_throughput_tries_no_more_rows_than_fit() -> None:
    study: Any = FakeStudy(2, {2: 5})
    rows = list(throughput._best(study, "retro", [4, 2], lambda *args: None))
    assert {row["batch"]: row.get("note") for row in rows} == {
        4: "does not fit in memory: at most 2 rows",
        2: None,
    }
    assert [row["batch"] for row in rows if row.get("best")] == [2]


def test_throughput_has_a_best_batch_for_each_overlap() -> None:
    study: Any = FakeStudy(4, {})
    speeds = {4: (9.0, 5.0), 2: (8.0, 6.0)}
    study.measure = lambda case: [
        {"ms": 1.0, "tokens_per_s": speed, "overlap": overlap}
        for speed, overlap in zip(speeds[case.rows], (0.2, 0.9), strict=True)
    ]
    rows = list(throughput._best(study, "retro", [4, 2], lambda *args: None))
    assert [(row["batch"], row["overlap"], row.get("best")) for row in rows] == [
        *((4, 0.2, "yes"), (4, 0.9, None)),
        *((2, 0.2, None), (2, 0.9, "yes")),
    ]


@given(
    overlaps=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=3),
    layers=st.integers(1, 3),
)
def test_throughput_looks_for_the_same_as_often_as_asked(
    overlaps: list[float], layers: int
) -> None:
    keys, _ = make_kv(1, 2, 64, 16)
    steps = 200
    queries = throughput._Queries(
        keys, 6, layers, [overlap for overlap in overlaps for _ in range(steps)]
    )
    changed = (queries.wanted[1:] != queries.wanted[:-1]).double()
    for overlap, changes in zip(overlaps, changed.split(steps), strict=True):
        # Some of those that look anew look for the same.
        share = changes.mean()
        assert {0.0: 0.7 < share < 1, 0.5: 0.3 < share < 0.6, 1.0: share == 0}[overlap]
    made = [make_query(keys, 6, seed=seed)[0] for seed in range(throughput.QUERIES)]
    for step in (0, 100):
        queries.choose(torch.tensor([[step]]))
        for layer in range(layers):
            for head in range(6):
                wanted = made[queries.wanted[step, layer, head // 3]]
                assert torch.equal(queries.asked[layer, head], wanted[head])


def test_throughput_attends_with_the_queries_that_were_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = make_model(SHAPES["tiny"](), torch.float32, torch.device("cpu"))
    for layer in model.get_decoder().layers:
        layer.self_attn.layer_idx = 0
    throughput.register()
    study = throughput._Study(model, 2048, "clustered", RetroConfig(), [0.5], 4)
    caches, _ = study._fill(throughput.Case("retro", 2048, 2))
    asked: list[torch.Tensor] = []
    decode = RetroLayer.decode

    def watched(self: RetroLayer, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(query.clone())
        return decode(self, query, *args, **kwargs)

    monkeypatch.setattr(RetroLayer, "decode", watched)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        step, *_ = study._step(caches, 2)
        for at in (0, 1, 2):
            own = [study.queries.asked[layer].expand(2, -1, -1, -1) for layer in range(2)]
            assert all(map(torch.equal, asked[-2:], own)), f"step {at}"
            step()
    assert len(asked) == 8


def test_bench_prefill(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    asked = ["--context", "2048", "--offload", "--rounds", "1"]
    assert main(["bench", "prefill", *SHAPE, *asked, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert [row["attention"] for row in rows] == ["retro", "retro offloaded"]
    for row in rows:
        assert row["added_ms"] == pytest.approx(row["layer_ms"] - row["dense_ms"])
        assert row["added_percent"] == pytest.approx(100 * row["added_ms"] / row["dense_ms"])
        assert 0 < row["build_ms"] < row["layer_ms"]
        assert 0 < row["whole_build_s"] < row["whole_s"]


def test_bench_shapes_are_those_of_models() -> None:
    assert list(cli_bench.SHAPES) == list(SHAPES)


def test_bench_memory_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "--device", "cpu"]) == 2
    assert "needs a GPU, got 'cpu'; `info --model` plans" in capsys.readouterr().err


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
        (["bench", "buffer", "--policy", "mru"], "names out of lru,lru2,lfu, got 'mru'"),
        (["bench", "buffer", "--cache-ratios", "0.1,2"], "must be numbers in 0..1, got '2'"),
        (["bench", "buffer", "--overlap", "all"], "must be numbers in 0..1, got 'all'"),
        (["bench", "throughput", "--batch", "all"], "whole number from 1 on, got 'all'"),
        (["bench", "throughput", "--overlap", "0.2,4"], "must be numbers in 0..1, got '4'"),
        (["bench", "throughput", "--model", "gpt"], "must be names out of llama-3-8b"),
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
