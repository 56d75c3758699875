"""Benchmarks of accuracy measure what they say: figures against definitions, on small cases."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_ops import RetroConfig
from retro_ops.benchmarks import estimators, fidelity, quality, recordings
from retro_ops.benchmarks.recordings import Recording
from retro_ops.cli import main
from retro_ops.models import load_model
from retro_ops.testing import KINDS, dense_attention, make_kv, relative_error

RECALL = ["bench", "recall", "--model", "recall", "--context", "2048", "--questions", "6"]


def small(kind: str = "clustered", *, queries: int = 5, tokens: int = 2000) -> Recording:
    """Two KV heads of two query heads each."""
    keys, values = make_kv(1, 2, tokens + queries, 64, kind=kind)
    generator = torch.Generator().manual_seed(2)

    def ask(count: int) -> torch.Tensor:
        place = torch.randint(tokens, (count,), generator=generator)
        noise = torch.randn(1, 4, count, 64, generator=generator)
        return keys[:, :, place].repeat_interleave(2, dim=1) + noise

    return Recording("small", 0, tokens, ask(queries), keys, values, 0.125, ask(16))


@pytest.mark.parametrize("kind", KINDS)
def test_made_keys(kind: str) -> None:
    keys, values = make_kv(2, 3, 300, 64, kind=kind, seed=5)
    again = make_kv(2, 3, 300, 64, kind=kind, seed=5)
    other, _ = make_kv(2, 3, 300, 64, kind=kind, seed=6)
    assert keys.shape == values.shape == (2, 3, 300, 64)
    assert torch.equal(keys, again[0])
    assert torch.equal(values, again[1])
    assert not torch.equal(keys, other)
    assert keys.isfinite().all()
    empty, _ = make_kv(1, 1, 0, 64, kind=kind)
    assert empty.shape == (1, 1, 0, 64)


def test_made_keys_are_what_their_names_say() -> None:
    def of(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = make_kv(1, 2, 4096, 64, kind=kind)
        return keys[0], values[0]

    def kurtosis(tensor: torch.Tensor) -> float:
        return float(tensor.pow(4).mean() / tensor.pow(2).mean() ** 2)

    assert kurtosis(of("heavy-tailed")[0]) > 10 > 4 > kurtosis(of("random")[0])
    cosine = torch.nn.functional.cosine_similarity
    halves = {kind: of(kind)[0].unflatten(1, (2, -1)).mean(dim=2) for kind in KINDS}
    assert float(cosine(*halves["adversarial"].unbind(1), dim=-1).mean()) > 0.5
    drift = halves["drifting"].diff(dim=1).norm() / halves["drifting"][:, 0].norm()
    assert float(drift) > 1
    keys, values = of("adversarial")
    norm = keys.norm(dim=2)
    hidden = norm > 2 * norm.median()
    assert 0.03 < float(hidden.double().mean()) < 0.1
    agree = (keys * values).sum(dim=2)
    assert float(agree[hidden].mean()) < 0 < float(agree[~hidden].mean())


def test_quality_of_everything_is_exact() -> None:
    recording = small()
    exact = quality.exact_outputs(recording)
    whole = quality.measure(recording, RetroConfig(retrieval_budget=1.0), exact)
    figures = whole.figures
    assert float(figures.error.max()) < 1e-5
    assert float(figures.unread_mass.max()) == 0
    assert float(figures.top_recall.min()) == 1
    assert whole.tokens_read == 2000 - 68
    # Of one query, in other words.
    one = dense_attention(
        recording.queries[:, :, 3:4].double(),
        recording.keys[:, :, :2004].double(),
        recording.values[:, :, :2004].double(),
        scale=0.125,
    )
    assert relative_error(exact[3], one[0, :, 0]) < 1e-12


@pytest.mark.parametrize("estimator", ["variance", "mean"])
@pytest.mark.parametrize("kind", ["clustered", "random"])
def test_figures_add_up(kind: str, estimator: str) -> None:
    recording = small(kind)
    config = RetroConfig(min_retrieved_clusters=8, estimator=estimator)
    exact = quality.exact_outputs(recording)
    few = quality.measure(recording, config, exact).figures
    more = quality.measure(recording, replace(config, min_retrieved_clusters=32), exact).figures
    for figures in (few, more):
        assert figures.error.shape == (5, 4)
        for figure in figures:
            assert float(figure.min()) >= 0
        for share in (figures.top_recall, figures.unread_mass, figures.left_out_mass):
            assert float(share.max()) <= 1 + 1e-9
        assert bool((figures.left_out_mass <= figures.unread_mass + 1e-12).all())
    if estimator == "variance":
        assert float(few.left_out_mass.abs().max()) == 0
    else:
        assert float(few.left_out_mass.mean()) > 0
        # A lower bound of each cluster's mass (Jensen's inequality), and no tail.
        rounding = 1e-5
        assert bool((few.mass_error <= few.unread_mass + rounding).all())
    assert bool((more.unread_mass <= few.unread_mass + 1e-12).all())
    assert bool((more.top_recall >= few.top_recall - 1e-12).all())
    nothing = RetroConfig(
        retrieval_budget=0.0, min_retrieved_clusters=0, estimation_budget=0.0, estimator="mean"
    )
    steady_only = quality.measure(recording, nothing, exact).figures
    torch.testing.assert_close(steady_only.left_out_mass, steady_only.unread_mass)
    torch.testing.assert_close(steady_only.mass_error, steady_only.unread_mass)


def test_equal_bytes() -> None:
    recording = small()
    exact = quality.exact_outputs(recording)
    config = RetroConfig(min_retrieved_clusters=8, estimator="mean")
    target = 300.0
    equal = quality.with_equal_bytes(recording, config, target)
    found = quality.measure(recording, equal, exact).tokens_read
    fewer = replace(equal, min_retrieved_clusters=equal.min_retrieved_clusters - 1)
    assert quality.measure(recording, fewer, exact).tokens_read < target <= found


def test_bench_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "rows.json"), "--csv", str(tmp_path / "rows.csv")]
    small_ = ["--context", "2048", "--queries", "4", "--keys", "clustered"]
    assert main(["bench", "quality", "--model", "recall", *small_, *files]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    kinds = ["variance", "mean", quality.EQUAL_BYTES]
    expected = [("made, clustered", 0, "all", kind) for kind in kinds]
    expected += [
        ("recall", layer, head, kind)
        for layer in range(4)
        for head in ("all", *range(8))
        for kind in kinds
    ]
    assert [(r["source"], r["layer"], r["head"], r["estimator"]) for r in rows] == expected
    for row in rows:
        assert row["machine"]
        if row["estimator"] == "mean":
            assert row["ratio"] == 1
    heads = [row["error"] for row in rows[6:30] if row["estimator"] == "variance"]
    assert sum(heads) / 8 == pytest.approx(rows[3]["error"])
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "unread_mass" in capsys.readouterr().out


def test_a_recording_is_what_the_model_attends_to() -> None:
    recorded = recordings.record("recall", "prose", 600, 20)
    assert [one.layer for one in recorded] == [0, 1, 2, 3]
    ids = recordings.input_ids("recall", "prose", 600, 20)
    model = load_model("recall", dtype=torch.float32, device="cpu", attention="sdpa")
    attention = model.model.layers[-1].self_attn
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    last = recorded[-1]
    torch.testing.assert_close(last.keys, cache.layers[3].keys, rtol=1e-4, atol=1e-4)
    out = quality.exact_outputs(last).flatten(1).float()  # [S, Hq * D]
    torch.testing.assert_close(out, seen[0][0, -20:], rtol=1e-3, atol=1e-4)
    assert last.earlier_queries is not None
    assert last.earlier_queries.shape == (1, 8, recordings.EARLIER_QUERIES, 64)


def test_texts(tmp_path: Path) -> None:
    for name in recordings.TEXTS:
        parts = [recordings.text_of(name, seed)() for seed in (0, 0, 1)]
        assert parts[0] == parts[1] != parts[2]
    file = tmp_path / "text.txt"
    file.write_text("one\n\ntwo")
    part = recordings.text_of(str(file), 0)
    assert [part() for _ in range(3)] == ["one", "two", "one"]
    with pytest.raises(FileNotFoundError, match="no text 'novel'"):
        recordings.text_of("novel", 0)
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        recordings.text_of(str(file), 0)


def test_bench_recall(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    budgets = ["--retrieval-budgets", "0,1", "--min-retrieved-clusters", "0"]
    no_estimate = ["--estimation-budget", "0", "--estimator", "mean"]
    assert main([*RECALL, "--density", "0.1", *budgets, *no_estimate, "--json", str(file)]) == 0
    dense, nothing, everything = json.loads(file.read_text())
    assert [row["attention"] for row in (dense, nothing, everything)] == ["dense", "retro", "retro"]
    assert dense["records"] == 26
    assert dense["right"] == everything["right"] == 6
    # The latest tokens alone do not hold the answers.
    assert nothing["right"] < 3
    assert nothing["nll"] > 1 > 0.01 > everything["nll"]
    assert everything["nll"] == pytest.approx(dense["nll"], rel=1e-2)
    assert (nothing["clusters"], everything["clusters"]) == (0, round((2048 - 68) / 16))
    assert nothing["kv_mb"] < everything["kv_mb"]


def test_recall_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    file = tmp_path / "curves.png"
    few = ["--context", "256,512", "--questions", "1", "--density", "0.1,1", "--attention", "dense"]
    assert main([*RECALL[:4], *few, "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_recall_needs_matplotlib_for_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*RECALL, "--plot", str(tmp_path / "curves.png")]) == 2
    assert "a plot needs matplotlib" in capsys.readouterr().err


def test_bench_fidelity(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = ["bench", "fidelity", "--model", "recall", "--context", "1500", "--positions", "8"]
    everything = ["--retrieval-budget", "1", "--estimator", "variance"]
    assert main([*command, "--batch", "2", *everything, "--json", str(file)]) == 0
    dense, steps, retro = json.loads(file.read_text())
    assert [row["attention"] for row in (dense, steps, retro)] == ["dense", "dense steps", "retro"]
    for row in (steps, retro):
        assert row["positions"] == 16
        assert abs(row["kl"]) < 1e-6
        assert row["top_1"] == 1
        assert row["ratio"] == pytest.approx(1, abs=1e-3)
        assert row["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)


def test_divergence_of_known_distributions() -> None:
    exact = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    other = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]).log() + 7.0
    kl, same, nll = fidelity._compare(other, exact, torch.tensor([0, 1]))
    log = torch.tensor([2.0, 4.0, 0.8]).double().log()
    torch.testing.assert_close(kl, torch.stack((0.25 * log[0], 0 * log[0])), atol=1e-6, rtol=0)
    assert same.tolist() == [0, 1]
    torch.testing.assert_close(nll, torch.stack((log[1], -log[2])), atol=1e-6, rtol=0)


def test_the_default_of_the_study_is_the_default_of_the_package() -> None:
    recording, config = small(), RetroConfig(min_retrieved_clusters=8)
    case = estimators.Case(recording, config)
    exact = quality.exact_outputs(recording)
    package = quality.measure(recording, config, exact)
    assert case.tokens == pytest.approx(package.tokens_read, rel=1e-6)
    # The study takes clusters up to a number of tokens, the package a number of clusters.
    ranked, order = estimators.by_mass(estimators.mass(case.index)).sort(dim=2, descending=True)
    sizes = case.index.sizes[:, None].expand_as(ranked).gather(2, order)
    count = sizes[..., :8].sum(dim=2)
    found = estimators.outcome(case.index, replace(case.plan(), tokens=count))
    assert found.tokens == pytest.approx(package.tokens_read, rel=1e-6)
    torch.testing.assert_close(found.error.double(), package.figures.error, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group, variants in estimators.VARIANTS.items() for name in variants],
)
def test_variants_read_no_more_than_the_default(group: str, name: str) -> None:
    config = RetroConfig(min_retrieved_clusters=8, segment_size=1024, kmeans_iterations=3)
    case = estimators.Case(small(), config)
    found = estimators.VARIANTS[group][name](case)
    assert found.error.shape == (5, 4)
    assert 0 < float(found.error.mean()) < 1
    if group not in ("estimated", "cluster size"):  # these read more tokens and less of the index
        # The cluster that reaches the number of tokens is taken whole.
        assert found.tokens <= case.tokens + float(case.index.sizes.max())


def test_oracles_are_not_worse() -> None:
    case = estimators.Case(small("random"), RetroConfig(min_retrieved_clusters=8))
    default = estimators.VARIANTS[""][estimators.DEFAULT](case).error.mean()
    oracle = estimators.VARIANTS["ranking"]["oracle: error of estimating it / size^0.5"]
    assert float(oracle(case).error.mean()) < float(default)
    everything = replace(case.plan(), tokens=1e9)
    assert float(estimators.outcome(case.index, everything).error.max()) < 1e-5


def test_bench_decode_compares_estimators(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = ["bench", "decode", "--device", "cpu", "--context", "4096", "--rounds", "2"]
    small_ = ["--dtype", "bfloat16", "--keys", "clustered", "--compare-estimators"]
    assert main([*command, *small_, "--json", str(file)]) == 0
    dense, variance, mean = json.loads(file.read_text())
    names = [row["attention"] for row in (variance, mean)]
    assert names == ["retro", "retro, mean"]
    assert max(dense["error"], variance["error"], mean["error"]) < 0.01
    assert variance["error"] != mean["error"]
    assert mean["estimator_time"] == pytest.approx(variance["us"] / mean["us"])
    # 4 bytes to mean key, mean value and offset of a cluster; and two float32 vectors of a head.
    clusters = round((4096 + 1024 - 68) / 16)
    per_head = 4 * clusters + 2 * 128 * 4
    assert mean["estimator_bytes"] == pytest.approx(
        per_head / (clusters * 2 * 128 * 2 + (clusters + 1) * 4), rel=1e-6
    )


@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=5),
)
@settings(max_examples=50)
def test_a_spread_budget_stays_in_the_budget(falls: list[list[float]]) -> None:
    shares = torch.tensor([0.25, 0.5, 1.0, 2.0])
    curves = torch.tensor(falls).T.flip(0).cumsum(dim=0).flip(0)  # errors fall with the share
    given_ = estimators.spread_budget(curves, shares)
    assert given_.shape == (len(falls),)
    assert float(given_.mean()) <= 1 + 1e-6
    assert all(share in shares.tolist() for share in given_.tolist())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["bench", "quality", "--keys", "odd"],
            "heavy-tailed,drifting,adversarial,none, got 'odd'",
        ),
        (["bench", "recall", "--density", "2"], "must be numbers in 0..1, got '2'"),
        (["bench", "fidelity", "--estimator", "exact"], "names out of variance,mean, got 'exact'"),
        (["bench", "estimators", "--context", "100"], "whole number from 2048 on, got '100'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quality", "--model", "none", "--keys", "none"], "nothing to measure"),
        (["estimators", "--change", "luck"], "--change must be names out of ranking, mass"),
        (["recall", "--context", "300000"], "the model reads 262144 tokens"),
        (["recall", "--context", "64", "--questions", "9"], "questions must lie in 1 .. "),
        (["fidelity", "--model", "recall", "--context", "300000"], "shorten --context"),
        (["quality", "--segment-size", "1"], "segment_size must be at least cluster_size"),
    ],
)
def test_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
