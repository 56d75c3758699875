"""Installs a wheel into a fresh environment for each of several torch versions, and tries it there.

Not a test for every day: a torch for GPUs, which is what PyPI has, takes gigabytes. `make
test-wheel` runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("2.11.0", "2.13.0", "2.14.1")
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "expecttest")
OPS = sorted(path.stem for path in (ROOT / "retro_ops" / "ops").glob("*.py") if path.stem[0] != "_")
# Of the tests of an op, those that say what it computes and refuses, and what torch knows of it.
CORE = "matches_reference or rejects or opcheck"
# Of an environment, beside the packages.
NEEDED_GB = 8


class FailedError(Exception):
    """What an environment could not do, in a line, and what it printed."""


def run(*command: object, cwd: Path) -> str:
    """What a command prints; nothing of this process's Python is to be found by it."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = [str(word) for word in command]
    ran = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    if ran.returncode:
        print(ran.stdout[-4000:], ran.stderr[-4000:], file=sys.stderr)
        raise FailedError(f"`{' '.join(words[:6])} ...` ended with status {ran.returncode}")
    return ran.stdout


def pins() -> dict[str, str]:
    """Requirements of the test tools by name, as pinned."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    names = {re.split("[=;]", line)[0]: line for line in lines if not line.startswith("#")}
    return {name: names[name] for name in TOOLS}


def try_torch(version: str, wheel: Path, folder: Path) -> str:
    """A line of figures.

    Raises:
        FailedError: something is wrong.
    """
    place = folder / f"torch-{version}"
    begin = time.perf_counter()
    run(sys.executable, "-m", "venv", place, cwd=folder)
    python = place / "bin" / "python"
    pip = (python, "-m", "pip", "--quiet", "install", "--no-cache-dir")
    run(*pip, f"torch=={version}", wheel, *pins().values(), cwd=folder)
    installed = time.perf_counter() - begin
    size = sum(path.lstat().st_size for path in place.rglob("*"))

    tests = place / "tests"
    tests.mkdir()
    for name in ("conftest", *(f"test_{op}" for op in OPS)):
        shutil.copy(ROOT / "compile_tests" / f"{name}.py", tests)
    shutil.copy(ROOT / "pyproject.toml", place)
    found = run(
        *(python, "-P", "-c"),
        "import torch, retro_ops; print(torch.__version__, retro_ops.__file__)",
        cwd=place,
    ).split()
    if not found[0].startswith(version) or not Path(found[1]).is_relative_to(place):
        raise FailedError(f"torch and retro_ops are {found}, not {version} in {place}")
    run(python, "-P", "-m", "retro_ops", "info", "--check", cwd=place)
    begin = time.perf_counter()
    printed = run(
        *(python, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0"),
        *("--timeout", "600", "-m", "not gpu", "-k", CORE, tests),
        cwd=place,
    )
    passed = re.search(r"^(\d+) passed.* in ", printed, re.MULTILINE)
    if passed is None:
        raise FailedError(f"no test ran: {printed[-500:]}")
    tested = time.perf_counter() - begin
    return (
        f"torch {found[0]}: {passed[1]} tests of {len(OPS)} ops passed in {tested:.0f} s; "
        f"self-test passed; installed in {installed:.0f} s, {size / 1e9:.1f} GB"
    )


def main() -> int:
    """0 if the wheel works with each torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", default=",".join(VERSIONS), help="versions, with commas")
    parser.add_argument("--folder", type=Path, help="for the environments (a temporary one)")
    options = parser.parse_args()
    if not options.wheel.is_file():
        parser.error(f"no wheel '{options.wheel}'; make wheel builds one")
    failed = []
    for version in options.torch.split(","):
        # One at a time: it goes before the next one comes.
        with tempfile.TemporaryDirectory(prefix="retro_wheel_", dir=options.folder) as folder:
            free = shutil.disk_usage(folder).free / 1e9
            if free < NEEDED_GB:
                parser.error(f"{folder} has {free:.0f} GB free, {NEEDED_GB} are needed: --folder")
            try:
                line = try_torch(version, options.wheel.resolve(), Path(folder))
            except FailedError as error:
                line = f"torch {version}: FAILED: {error}"
                failed.append(version)
        print(line, flush=True)
    if failed:
        print(f"the wheel does not work with torch {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
