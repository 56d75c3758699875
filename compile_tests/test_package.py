"""The package as users get it: its wheel, what it needs, and which room imports which."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import retro_ops

ROOT = Path(__file__).resolve().parents[1]
# Where each room of the checkout is installed.
ROOMS = {
    "retro_ops": "retro_ops",
    "models": "retro_ops/models",
    "benchmarks": "retro_ops/benchmarks",
}
OPTIONAL = {
    "accelerate",
    "flash_attn",
    "gguf",
    "huggingface_hub",
    "hypothesis",
    "jieba",
    "matplotlib",
    "rapidfuzz",
    "rich",
    "rouge",
    "transformers",
    "triton",
    "wonderwords",
}


def run_python(code: str, *arguments: object, cwd: Path, path: Path | None = None) -> str:
    """What a fresh Python process in `cwd` prints; `path` comes first in its sys.path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def pip(*arguments: object, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout. setuptools works in a temporary folder, where nothing is left of
    earlier builds; the compiler's objects are those of the in-place build."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = folder / "setup.cfg"
    settings.write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
    pip(
        *("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT),
        DIST_EXTRA_CONFIG=str(settings),
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    assert re.fullmatch(r"retro_ops-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)


def test_wheel_holds_every_room_and_nothing_else(wheel: Path) -> None:
    expected = {"retro_ops/py.typed", "retro_ops/_C.abi3.so"}
    for room, installed in ROOMS.items():
        for path in (ROOT / room).rglob("*.py"):
            expected.add(f"{installed}/{path.relative_to(ROOT / room).as_posix()}")
    weights = list(ROOT.glob("models/recall/**/*.safetensors"))
    assert weights, "models/recall has no weights"
    for path in (*weights, *(path.with_name("config.json") for path in weights)):
        expected.add(f"retro_ops/models/{path.relative_to(ROOT / 'models').as_posix()}")

    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    assert expected - names == set()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"retro_ops"}


def test_wheel_has_its_licence(wheel: Path, metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("licenses/LICENSE"))
        assert archive.read(name) == (ROOT / "LICENSE").read_bytes()


def test_libraries_need_no_python(wheel: Path, tmp_path: Path) -> None:
    """Neither a symbol of any Python version nor its library: all versions load them."""
    if shutil.which("nm") is None:
        pytest.skip("no nm (binutils), which lists the symbols of a library")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, libraries)
    assert libraries
    for name in libraries:
        listed = subprocess.run(
            ["nm", "--dynamic", "--undefined-only", tmp_path / name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        symbols = [line.split()[-1] for line in listed.splitlines()]
        assert any("torch" in symbol for symbol in symbols)
        assert [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))] == []


def test_version_stands_in_one_place() -> None:
    """pyproject.toml; all else asks there, or what was installed from there."""
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert torch.ops.retro.library_version() == version == retro_ops.__version__
    code = [path for path in ROOT.rglob("*.*") if path.suffix in (".py", ".cpp", ".h", ".cu")]
    places = [
        path.relative_to(ROOT)
        for path in code
        if path.relative_to(ROOT).parts[0]
        in (*ROOMS, "csrc", "compile_tests", "examples", "setup.py")
        and f'"{version}"' in path.read_text("utf-8")
    ]
    assert places == []


def test_hard_dependencies_are_torch_and_numpy(metadata: Message) -> None:
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    hard = {
        requirement.name
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    assert hard == {"torch", "numpy"}
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "models",
        "triton",
        "flash",
        "eval",
        "plot",
        "dev",
    }


USE_INSTALLED = """
import json, sys
import torch
import torch.nn.functional as F
import retro_ops, retro_ops.models
from retro_ops import RetroConfig, RetroLayer

torch.manual_seed(0)
keys, values = torch.randn(2, 1, 2, 513, 32)
query = torch.randn(1, 4, 1, 32)
config = RetroConfig(retrieval_budget=1.0, local_tokens=16, update_segment=64)
layer = RetroLayer(config, batch_size=1, num_query_heads=4, num_kv_heads=2, head_dim=32,
                   max_length=600, dtype=torch.float32)
layer.prefill(keys[:, :, :512], values[:, :, :512])
out = layer.decode(query, keys[:, :, 512:], values[:, :, 512:])
dense = F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-4)

modules = [m for name, m in sys.modules.items() if name.partition(".")[0] == "retro_ops"]
print(json.dumps({
    "files": [m.__file__ for m in modules if m.__file__],
    "libraries": [path for path in torch.ops.loaded_libraries if "retro_ops" in path],
    "clusters": layer.stats()["clusters"],
    "version": retro_ops.__version__,
}))
"""


def test_installed_wheel_works_outside_the_checkout(
    wheel: Path, metadata: Message, tmp_path: Path
) -> None:
    """It imports, registers its ops and decodes: like dense attention where it retrieves all."""
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-index", "--no-deps", "--target", site, wheel)
    facts = json.loads(run_python(USE_INSTALLED, cwd=elsewhere, path=site))
    strangers = [
        file
        for file in (*facts["files"], *facts["libraries"])
        if not Path(file).is_relative_to(site / "retro_ops")
    ]
    assert strangers == []
    assert str(site / "retro_ops/models/__init__.py") in facts["files"]
    assert str(site / "retro_ops/_C.abi3.so") in facts["libraries"]
    assert facts["clusters"] > 0
    assert facts["version"] == metadata["Version"]


IMPORT_WITHOUT = """
import importlib, sys

blocked = set(sys.argv[1].split(","))

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocker())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def test_imports_without_optional_packages(tmp_path: Path) -> None:
    """Every module of `retro_ops/`, the commands too: they import what they need when they run."""
    modules = [module for module in MODULES if room_of(module) in ("ops", "core", "commands")]
    # Importing __main__ runs it.
    modules = [module for module in modules if not module.endswith(".__main__")]
    run_python(IMPORT_WITHOUT, ",".join(sorted(OPTIONAL)), *modules, cwd=tmp_path)


def installed_name(path: Path) -> str:
    """The module that a file of the checkout becomes, e.g. retro_ops.models.cache."""
    room, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [*ROOMS.get(room, room).split("/"), *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Every source file by the module that it becomes.
MODULES = {
    installed_name(path): path
    for room in (*ROOMS, "compile_tests", "examples")
    for path in sorted((ROOT / room).rglob("*.py"))
}
MODULES["setup"] = ROOT / "setup.py"


def room_of(module: str) -> str:
    first, _, rest = module.partition(".")
    if first != "retro_ops":
        own = {"compile_tests": "tests", "examples": "examples", "setup": "build"}
        return own.get(first, "third party")
    second = rest.partition(".")[0]
    if second in ("ops", "models", "benchmarks"):
        return second
    return "commands" if second in ("cli", "cli_bench", "cli_parts", "__main__") else "core"


def imports(module: str, path: Path) -> list[tuple[int, str, bool]]:
    """Line, imported name (`from a import b` is a.b), and whether importing `module` imports it."""
    tree = ast.parse(path.read_text("utf-8"))
    later = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    late = {id(inner) for node in later for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = module.split(".") + (["__init__"] if path.stem == "__init__" else [])
                base = [*package[: -node.level], *base]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        found += [(node.lineno, name, id(node) not in late) for name in names]
    return found


def complaint(module: str, name: str, on_import: bool) -> str | None:
    """Why `module` must not import `name`; None: it may."""
    room = room_of(module)
    top = name.partition(".")[0]
    target = name if name in MODULES else name.rpartition(".")[0]
    if top in ("models", "benchmarks"):
        return f"it is installed as retro_ops.{top}"
    if top == "compile_tests" and room != "tests":
        return "nobody imports tests"
    if top == "examples":
        return "nobody imports examples"
    users = ("models", "benchmarks", "examples", "tests", "commands")
    if top == "transformers" and room not in users:
        return "transformers belongs to models and benchmarks"
    if room in ("tests", "commands", "build"):
        return None
    if room_of(target) == "benchmarks" and room != "benchmarks":
        return "only the commands import benchmarks"
    if room == "models" and room_of(target) not in ("models", "third party"):
        public = {f"retro_ops.{public}" for public in retro_ops.__all__}
        return None if name in public or name == "retro_ops" else "models use public names only"
    if room == "examples" and room_of(target) not in ("models", "third party"):
        public = {f"retro_ops.{public}" for public in retro_ops.__all__}
        return None if name in public else "examples use public names only"
    if room in ("ops", "core"):
        return complaint_inside(module, room, name, target, on_import)
    return None


def complaint_inside(module: str, room: str, name: str, target: str, on_import: bool) -> str | None:
    """`complaint` for the op library and what stands on it."""
    top = name.partition(".")[0]
    if top != "retro_ops":
        allowed = {"torch", *(["triton"] if room == "ops" else ["numpy"])}
        if module == "retro_ops.testing" and not on_import:
            allowed.add("hypothesis")
        third_party = top not in sys.stdlib_module_names and top not in allowed
        return f"{room} may import {', '.join(sorted(allowed))} only" if third_party else None
    if room == "core":
        return None if room_of(target) in ("core", "ops") else f"{room_of(target)} stands above"
    # What ops share is private: retro_ops._library, retro_ops.ops._contract.
    if module == "retro_ops.ops" or target.rpartition(".")[2].startswith("_"):
        return None
    return "ops do not import one another, nor what stands on them"


@pytest.mark.parametrize("module", MODULES)
def test_room_imports_what_it_may(module: str) -> None:
    path = MODULES[module]
    complaints = [
        f"{path.relative_to(ROOT)}:{line}: {name}: {why}"
        for line, name, on_import in imports(module, path)
        if (why := complaint(module, name, on_import))
    ]
    assert complaints == []


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("compile_tests.test_x", "import models.cache", "installed as retro_ops.models"),
        ("retro_ops.cli", "def run():\n    import compile_tests", "nobody imports tests"),
        ("retro_ops.layer", "def f():\n    import transformers.cache_utils", "transformers"),
        ("retro_ops.layer", "from rich import print", "core may import"),
        ("retro_ops.layer", "from retro_ops.models import RetroCache", "models stands above"),
        ("retro_ops.testing", "import hypothesis", "core may import"),
        ("retro_ops.ops.grow_index", "import numpy", "ops may import"),
        ("retro_ops.ops.grow_index", "from .pack_clusters import pack_clusters", "one another"),
        ("retro_ops.ops.grow_index", "from retro_ops.config import RetroConfig", "one another"),
        ("retro_ops.ops.grow_index", "from retro_ops.ops import pack_clusters", "one another"),
        ("retro_ops.models.cache", "from retro_ops.layer import RetroLayer", "public names"),
        ("retro_ops.models.cache", "from retro_ops.benchmarks import ruler", "only the commands"),
        ("examples.hit_ratio", "from retro_ops.layer import RetroLayer", "public names"),
        ("examples.hit_ratio", "from retro_ops.benchmarks import buffer", "only the commands"),
        ("compile_tests.test_x", "import examples.hit_ratio", "nobody imports examples"),
    ],
)
def test_room_rules_find(module: str, source: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    ((_, name, on_import),) = imports(module, path)
    assert why in (complaint(module, name, on_import) or "allowed")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("retro_ops.cli", "def run():\n    from retro_ops.benchmarks import ruler"),
        ("retro_ops.testing", "def strategy():\n    import hypothesis"),
        ("retro_ops.testing", "if TYPE_CHECKING:\n    from hypothesis import strategies"),
        ("retro_ops.ops.grow_index", "from . import _contract"),
        ("retro_ops.models.cache", "from retro_ops import RetroLayer"),
        ("retro_ops.models.cache", "from .attention import register"),
    ],
)
def test_room_rules_allow(module: str, source: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    ((_, name, on_import),) = imports(module, path)
    assert complaint(module, name, on_import) is None


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/export.md",
        "docs/models.md",
        "docs/performance.md",
        "docs/wave_buffer.md",
    ],
)
def test_document_names_files_that_exist(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    rooms = "|".join((*ROOMS, "csrc", "compile_tests", "examples", r"\.ci"))
    paths = re.findall(rf"`((?:{rooms})/[\w./*-]*)`", text)
    assert [path for path in paths if not any(ROOT.glob(path.rstrip("/")))] == []


def test_snippets_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")  # for a path of the checkout
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    assert len(snippets) == 3
    for snippet in snippets:
        run_python(snippet, cwd=tmp_path)


def test_guide_lists_every_op() -> None:
    text = (ROOT / "docs/how_it_works.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(listed) == set(retro_ops.__all__) - {"RetroConfig", "RetroLayer"}
