"""The scripts of `examples/`, each in small: they run, and what they show is so."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name: str, *arguments: object) -> Any:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]([*map(str, arguments)])


def test_document_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for _ in range(2):
        run("long_document_qa", "--model", "recall", "--tokens", 2048, "--folder", tmp_path)
        printed.append(capsys.readouterr().out)
    assert printed[0].startswith("read 2,048 tokens")
    assert printed[1].startswith("loaded 2,048 tokens")
    for text in printed:
        answers = re.findall(r"-> '(.*)' \(expected: (.*)\),", text)
        assert len(answers) == 3
        assert all(written == expected for written, expected in answers)
    assert len(list(tmp_path.iterdir())) == 1


def test_heat_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All is found with the default budgets, and not with hardly any."""
    image = tmp_path / "needles.png"
    size = ("--lengths", 2048, "--depths", 2, "--questions", 4, "--out", image)
    run("needle_heat_map", *size)
    assert re.search(r"2,048 tokens:  100  100 %", capsys.readouterr().out)
    assert image.read_bytes().startswith(b"\x89PNG")
    run("needle_heat_map", *size, "--retrieval-budget", 0, "--min-clusters", 0)
    scores = re.findall(r"\d+", capsys.readouterr().out.split(":")[1].split("%")[0])
    assert min(map(int, scores)) < 100


def test_hit_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "hit_ratio.png"
    size = ("--context", 2048, "--steps", 20, "--cache-ratios", 0, 1, "--out", image)
    run("hit_ratio", *size)
    ratios = re.findall(r"pages hit, ([\d.]+) %", capsys.readouterr().out)
    assert float(ratios[0]) == 0
    assert float(ratios[1]) > 20
    assert image.read_bytes().startswith(b"\x89PNG")


def test_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    """One graph for all steps, and dense attention where it reads everything."""
    size = ("--context", 1200, "--steps", 4, "--layers", 1, "--device", "cpu")
    run("own_model", *size, "--retrieval-budget", 1)
    error = re.search(r"dense attention: (.+)", capsys.readouterr().out)
    assert error is not None
    assert float(error[1]) < 1e-5


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("long_document_qa", ["missing.txt"], "a document needs --question"),
        ("needle_heat_map", ["--depths", "0"], "must be at least 1"),
        ("hit_ratio", ["--context", "64", "--steps", "4"], "give a larger --context"),
        ("own_model", ["--steps", "1"], "must be at least 2"),
        ("export_to_cpp", ["--context", "20", "--runner", __file__], "no room for a prompt"),
    ],
)
def test_refuses(
    name: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(name, *arguments)
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err


def test_readme_lists_every_example() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"^\| `examples/(\w+)\.py` \|", text, re.M) == [p.stem for p in SCRIPTS]
