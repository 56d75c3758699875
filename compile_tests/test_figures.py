"""The pictures of the guides: the script that draws them runs, and they are as it draws them."""

from __future__ import annotations

import re
import runpy
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the pictures are drawn with matplotlib")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")

MAIN = runpy.run_path(str(ROOT / "docs/figures.py"))["main"]
SMALL = (
    *("--model", "recall", "--context", "1500", "--queries", "2", "--contexts", "2000", "3000"),
    *("--retrieval-budgets", "0.05", "0.5", "--estimation-budgets", "0.5"),
)


def test_draws_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More of either budget is more bytes, and all that is drawn is a picture of the guides."""
    MAIN([*SMALL, "--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = {
        name
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"!\[[^\]]*\]\((\w+\.(?:svg|png))\)", page.read_text("utf-8"))
    }
    assert drawn == shown - {"ruler.png"}  # which `ruler --plot` drew
    out = capsys.readouterr().out
    few, many = (
        float(re.findall(rf"variance, retrieval_budget {budget}: ([\d.]+) %", out)[0])
        for budget in ("0.05", "0.5")
    )
    assert few < many


def test_pictures_are_as_drawn(tmp_path: Path) -> None:
    """Those that take no time: of the drawing, and of the rows of benchmarks/results."""
    (pinned,) = re.findall(r"^matplotlib==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    if version("matplotlib") != pinned:
        pytest.skip(f"another matplotlib than {pinned} places things elsewhere")
    names = ("data_flow", "hit_ratio", "throughput")
    MAIN(["--only", *names, "--out", str(tmp_path)])
    for name in names:
        file = f"{name}.svg"
        same = (tmp_path / file).read_bytes() == (ROOT / "docs" / file).read_bytes()
        assert same, f"docs/{file} is out of date: run `python docs/figures.py --only {name}`"


def test_throughput_is_that_of_the_guide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The picture's figures and what it shows in words are in the tables beside it."""
    MAIN(["--only", "throughput", "--out", str(tmp_path)])
    found = re.findall(r"tokens: (\d+) rows, (\d+) tokens/s, bound (\d+)", capsys.readouterr().out)
    assert len(found) == 4 * 3
    page = (ROOT / "docs/throughput.md").read_text("utf-8")
    (words,) = re.findall(r"!\[([^\]]*)\]\(throughput\.svg\)", page)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    for rows, rate, bound in found:
        assert f"{int(rate):,}" in words
        assert any(re.search(rf"\b{rows}\b.* {int(rate):,} ", line) for line in tables), rate
        assert int(rate) < int(bound)


def test_refuses_an_unknown_picture(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        MAIN(["--only", "nothing"])
    assert exit_.value.code == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
