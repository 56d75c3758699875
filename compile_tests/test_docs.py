"""The documents keep their word: snippets run, commands are valid, and what they name is there."""

from __future__ import annotations

import argparse
import ast
import builtins
import functools
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

import retro_ops.models
from retro_ops import cli, cli_parts
from retro_ops.models import export_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
ROOMS = ("retro_ops", "models", "benchmarks", "csrc", "compile_tests", "examples", "docs", r"\.ci")


def docstring_commands(path: Path) -> list[str]:
    """How a script or module is called, says its docstring, in lines of their own."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return re.findall(r"^    ((?:python|retro|make) .*)", text, re.MULTILINE)


DOCSTRINGS = {
    path.relative_to(ROOT).as_posix(): commands
    for room in ("retro_ops", "models", "benchmarks", "examples", "compile_tests")
    for path in sorted((ROOT / room).rglob("*.py"))
    if (commands := docstring_commands(path))
}
# Programs of others, and what a document builds; what follows them is not checked.
FOREIGN = {
    "build/likely",
    *("apt-get", "brew", "c++", "cat", "cd", "cmake", "compute-sanitizer", "cuobjdump", "curl"),
    *("cut", "docker", "echo", "export", "g++", "gdb", "git", "head", "hf", "jq", "ldd", "ls"),
    *("ncu", "nm", "nproc", "nsys", "numactl", "nvidia-smi", "perf", "source", "sudo", "time"),
    *("unzip", "uv", "wc", "wget"),
}
# What takes the place of models of the hub, which no test asks: as small, and of the same class.
SIZES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STAND_INS: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen/Qwen2.5-": lambda: Qwen2Config(**SIZES, max_position_embeddings=32768),
    "meta-llama/": lambda: LlamaConfig(**SIZES, max_position_embeddings=131072),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    line: int  # of the fence, from 1 on


@dataclass
class Document:
    """What the tests ask of a document."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    code: list[str] = field(default_factory=list)  # in backticks
    links: list[str] = field(default_factory=list)
    anchors: list[str] = field(default_factory=list)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def read(path: Path, text: str | None = None) -> Document:
    document = Document(path)
    tokens = MarkdownIt("commonmark").enable("table").parse(text or path.read_text("utf-8"))
    for i, token in enumerate(tokens):
        if token.type == "fence":
            assert token.map is not None
            words = token.info.split()
            document.blocks.append(
                Block(words[0] if words else "", token.content, token.map[0] + 1)
            )
        elif token.type == "inline":
            if tokens[i - 1].type == "heading_open":
                anchor = slug("".join(child.content for child in token.children or []))
                same = sum(re.sub(r"-\d+$", "", each) == anchor for each in document.anchors)
                document.anchors.append(f"{anchor}-{same}" if same else anchor)
            for child in token.children or []:
                _read_inline(document, child)
    return document


def _read_inline(document: Document, token: Token) -> None:
    if token.type == "code_inline":
        document.code.append(" ".join(token.content.split()))
    elif token.type in ("link_open", "image"):
        document.links.append(str(token.attrGet("href") or token.attrGet("src")))


# Python


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a small model instead of one of the hub."""
    folder = tmp_path_factory.mktemp("stand_ins")

    def stand_in(name: str) -> Path:
        families = [family for family in STAND_INS if name.startswith(family)]
        assert families, f"no small model stands in for {name!r}: add one to STAND_INS"
        path = folder / name
        if not path.exists():
            AutoModelForCausalLM.from_config(STAND_INS[families[0]]()).save_pretrained(path)
        return path

    return stand_in


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A package like those that documents export, of one layer."""
    path = tmp_path_factory.mktemp("package") / "model.pt2"

    def export() -> Path:
        if not path.exists():
            sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 8192}
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(**sizes), attn_implementation="retro"
            )
            export_model(model.eval(), path, context=8192)
        return path

    return export


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of snippets and commands: the checkout's files, and room for others.

    Not the package itself, which Python would find here before the installed one.
    """
    for name in ("README.md", "docs", "models", "examples", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wants_gpu(block: Block) -> bool:
    """It names the device, and does not ask first whether it is there."""
    named = re.search(r"^[^#\n]*[\"']cuda", block.text, re.MULTILINE) is not None
    return named and "is_available" not in block.text


def snippets(document: Document) -> list[Block]:
    return [block for block in document.blocks if block.language in ("python", "py")]


def written_files(block: Block) -> Iterator[tuple[str, str]]:
    """Files that a console block writes: `$ cat > FILE`, and then their lines."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE):
        first, _, rest = part.partition("\n")
        if match := re.fullmatch(r"cat > ([\w.]+)(?: <<'?EOF'?)?", first):
            yield match[1], rest.removesuffix("EOF\n")


def cases() -> list[Any]:
    """Each document with snippets; on a GPU again, if it has some for that."""
    found = []
    for name in DOCUMENTS:
        blocks = snippets(read(ROOT / name))
        if blocks and name != "README.md":  # which has a process of its own
            found.append(pytest.param(name, False, id=name))
        if any(map(wants_gpu, blocks)):
            found.append(pytest.param(name, True, id=f"{name}-gpu", marks=pytest.mark.gpu))
    return found


@pytest.mark.parametrize(("name", "gpu"), cases())
def test_snippets_run(
    name: str,
    gpu: bool,
    folder: Path,
    stand_ins: Callable[[str], Path],
    package: Callable[[], Path],
) -> None:
    """One after another, in one namespace; those that want a GPU only where there is one."""
    run_snippets(read(ROOT / name), gpu, folder, stand_ins, package)


def run_snippets(
    document: Document,
    gpu: bool,
    folder: Path,
    stand_ins: Callable[[str], Path],
    package: Callable[[], Path],
) -> None:
    # Of a conversation with a tokenizer: what `tokenizer(text, return_tensors="pt")` gives.
    ids = torch.randint(3, 60, (1, 64), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"__name__": "__main__", "inputs": {"input_ids": ids}}
    for block in document.blocks:
        for file, text in written_files(block):
            (folder / file).write_text(text, "utf-8")
        for words in commands(block):
            run_written(words, folder)
        if block not in snippets(document):
            continue

        def small(match: re.Match[str]) -> str:
            here = (ROOT / match[2]).exists()
            return match[0] if here else f'{match[1]}"{stand_ins(match[2])}"'

        loads = r'((?:load_model|load_tokenizer|from_pretrained)\(\s*)"([\w-]+/[\w.-]+)"'
        text = re.sub(loads, small, block.text)
        for file in re.findall(r'load_exported\("([\w.]+)"', text):
            (folder / file).symlink_to(package())
        # Lines of a traceback are those of the document.
        code = compile("\n" * block.line + text, str(document.path), "exec")
        if gpu or not wants_gpu(block):
            exec(code, names)


def run_written(words: list[str], folder: Path) -> None:
    """Runs `python FILE > FILE` of a file that the document itself wrote."""
    match words:
        case ["python", file, ">", out] if (folder / file).exists():
            command = [sys.executable, file]
            ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
            assert ran.returncode == 0, ran.stderr
            (folder / out).write_text(ran.stdout, "utf-8")


def test_snippets_of_the_readme_run_in_a_fresh_process(folder: Path) -> None:
    """Nothing that they need is there because a test imported it."""
    blocks = [block for block in snippets(read(ROOT / "README.md")) if not wants_gpu(block)]
    assert len(blocks) >= 2
    code = "\n".join(block.text for block in blocks)
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# Commands


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words, operators of the shell among them.

    A block with prompts (`$ `) holds answers too. Other blocks without a language may be anything:
    of those, only lines that begin with a program of ours are commands.
    """
    if block.language not in ("", "console", "sh", "bash", "shell"):
        return
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    elif block.language in ("", "console"):
        ours = re.compile(r"(\w+=\S+ )*(python3?|retro|make|pip|pytest|(build/)?retro_runner)( |$)")
        lines = [line for line in lines if ours.match(line)]
    for line in lines:
        yield from split(line)


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line: `a && b | c` is three."""
    shell = shlex.shlex(line, posix=True, punctuation_chars=True)
    shell.whitespace_split = True
    words: list[str] = []
    for word in [*shell, ";"]:
        if word in ("&&", "||", "|", ";"):
            if words:
                yield words
            words = []
        elif words or not re.fullmatch(r"\w+=.*", word):  # variables of the command
            words.append(word)


class Parsed(Exception):  # noqa: N818 (it is none)
    """The arguments are right; raised instead of doing what they ask for."""


def parse(run: Callable[[], object], whole: bool) -> str:
    """What the parsers of a program say of its arguments; nothing: they are right.

    Args:
        run: the program.
        whole: no argument may lack.
    """
    parse_args = argparse.ArgumentParser.parse_args

    def parse_only(parser: Any, *arguments: Any, **others: Any) -> Any:
        raise Parsed(parse_args(parser, *arguments, **others))

    def error(parser: Any, message: str) -> None:
        lacks = message.startswith("the following arguments are required")
        raise (Parsed() if lacks and not whole else ValueError(message))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(cli_parts.Parser, "error", error)
        # So that `--device cuda` is right wherever the test runs.
        patch.setattr(torch.cuda, "device_count", lambda: 8)
        patch.setattr(builtins, "print", lambda *words, **options: None)
        try:
            run()
        except Parsed as parsed:
            return budgets_fault(*parsed.args)
        except ValueError as wrong:
            return str(wrong)
        except SystemExit as end:
            return "" if not end.code else f"ends with {end.code}"
    return "parses no arguments"


def budgets_fault(options: argparse.Namespace | None = None) -> str:
    """What `RetroConfig` says of budgets, which the parsers take as they are."""
    if isinstance(getattr(options, "estimator", None), str):
        try:
            cli_parts.budgets(options)
        except ValueError as wrong:
            return str(wrong)
    return ""


def fault(words: list[str], whole: bool = True) -> str:
    """What is wrong with a command; nothing: it is right."""
    program, *arguments = words
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    # `--context N`: letters stand for numbers, or for names, which may look like numbers.
    arguments = ["4096" if re.fullmatch(r"[A-Z]", word) else word for word in arguments]
    if program == "retro":
        return parse(lambda: cli.main(arguments), whole)
    if re.fullmatch(r"(.*/)?python3?", program):
        return python_fault(arguments, whole)
    if program == "make":
        return make_fault(arguments)
    if program.rpartition("/")[2] == "retro_runner":
        known = re.findall(r'word == "(--[\w-]+)"', (ROOT / "csrc/runner/main.cpp").read_text())
        unknown = [word for word in arguments if word.startswith("--") and word not in known]
        return f"the runner has no {unknown[0]}" if unknown else ""
    if program in ("pip", "pytest"):
        return extras_fault(arguments)
    return "" if program in FOREIGN else f"{program} is unknown: add it to FOREIGN, or check it"


def python_fault(arguments: list[str], whole: bool) -> str:
    match arguments:
        case ["-m", "retro_ops", *words]:
            return parse(lambda: cli.main(words), whole)
        case ["-m", module, *_] if module.startswith("retro_ops."):
            run = functools.partial(runpy.run_module, module, None, "__main__")
            return main_fault(run, arguments[1:], whole)
        case ["-m", _, *words]:
            return extras_fault(words)
        case ["setup.py", *words]:
            text = (ROOT / "setup.py").read_text("utf-8")
            named = [word for word in words if re.fullmatch(r"[a-z_]+", word)]
            return "".join(f"setup.py has no {word}" for word in named if f'"{word}"' not in text)
        case [file, *_] if (ROOT / file).is_file():
            run = functools.partial(runpy.run_path, str(ROOT / file), None, "__main__")
            return main_fault(run, arguments, whole)
        case [file, *_] if not file.startswith("-") and not Path(file).is_file():
            return f"there is no {file}"
    return ""  # written by the document itself, or an option of Python's own


def main_fault(run: Callable[[], object], words: list[str], whole: bool) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        return parse(run, whole)


def make_fault(arguments: list[str]) -> str:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in arguments:
        name, equals, _ = word.partition("=")
        if equals:
            # Variables of setup.py reach it through make.
            known = name in makefile or name in (ROOT / "setup.py").read_text("utf-8")
        else:
            known = re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE) is not None
        if not known and not name.startswith("-"):
            return f"the Makefile has no {name}"
    return ""


def extras_fault(arguments: list[str]) -> str:
    """Extras of the package that pip is asked for."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = \[", section, re.MULTILINE)
    asked = [
        extra
        for word in arguments
        for group in re.findall(r"^(?:retro_ops|\.|dist/\S+)\[([\w,-]+)\]", word)
        for extra in group.split(",")
    ]
    return "".join(f"the package has no extra {extra}" for extra in asked if extra not in extras)


def inline_commands(document: Document) -> Iterator[list[str]]:
    """Commands in backticks; words that stand for others (`COMMAND`, `...`) say no more."""
    for code in document.code:
        if re.match(r"(python -m retro_ops|retro|make|python examples/\S+) ", code):
            for words in split(code):
                if not {"COMMAND", "WHAT", "...", "X"} & set(words):
                    yield words


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_valid(name: str, folder: Path) -> None:
    """The real parsers take them, with every option and choice; they are not run."""
    document = read(ROOT / name)
    assert faults_of_commands(document, folder) == []


def faults_of_commands(document: Document, folder: Path) -> list[str]:
    found = []
    for block in document.blocks:
        for file, text in written_files(block):
            (folder / file).write_text(text, "utf-8")
        found += [
            f"{document.path.name}:{block.line}: {shlex.join(words)}: {wrong}"
            for words in commands(block)
            if (wrong := fault(words))
        ]
    found += [
        f"{document.path.name}: `{shlex.join(words)}`: {wrong}"
        for words in inline_commands(document)
        if (wrong := fault(words, whole=False))
    ]
    return found


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_commands_of_docstrings_are_valid(name: str, folder: Path) -> None:
    wrong = [
        f"{line}: {why}"
        for line in DOCSTRINGS[name]
        for words in split(line)
        if (why := fault(words))
    ]
    assert wrong == []


def test_every_example_shows_its_command() -> None:
    scripts = {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")}
    assert scripts
    assert scripts - DOCSTRINGS.keys() == set()


# Names


def missing(document: Document) -> list[str]:
    """What a document names and nobody finds."""
    found = []
    for link in document.links:
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = document.path.parent / file if file else document.path
        if not target.exists():
            found.append(f"link to {link}: no such file")
        elif anchor and anchor not in (document if not file else read(target)).anchors:
            found.append(f"link to {link}: no such heading")
    for code in document.code:
        whys = (missing_path(code), missing_name(code), missing_option(code))
        found += [f"`{code}`: {why}" for why in whys if why]
    return found


def missing_path(code: str) -> str:
    if re.fullmatch(rf"(?:{'|'.join(ROOMS)})/[\w./*<>-]*", code):
        pattern = re.sub(r"<\w+>", "*", code).rstrip("/")
        return "" if any(ROOT.glob(pattern)) else "no such file"
    if re.fullmatch(r"[\w<>*-]+\.(md|h|cpp|cu|toml)", code):
        pattern = re.sub(r"<\w+>", "*", code)
        places = (".", "csrc", "csrc/runner", "docs")
        return "" if any(any((ROOT / place).glob(pattern)) for place in places) else "no such file"
    return ""


def missing_name(code: str) -> str:
    """A name of the package, with its module or in a class: `RetroCache.load(...)`."""
    match = re.match(r"(retro_ops(?:\.\w+)+|(?:Retro\w+)(?:\.\w+)+)", code)
    if match is None:
        return ""
    first, *rest = match[1].split(".")
    places = {"retro_ops": retro_ops, **vars(retro_ops), **vars(retro_ops.models)}
    if first not in places:
        return "no such name"
    place, so_far = places[first], first
    for name in rest:
        so_far += f".{name}"
        if not hasattr(place, name) and first == "retro_ops":
            try:
                importlib.import_module(so_far)
            except ModuleNotFoundError:
                return f"no {so_far}"
        if not hasattr(place, name) and name not in names_of_instances(place):
            return f"no {so_far}"
        place = getattr(place, name, None)
    return ""


def names_of_instances(place: Any) -> set[str]:
    """Fields of a dataclass, and what methods of a class set."""
    if not inspect.isclass(place):
        return set()
    return {
        *getattr(place, "__dataclass_fields__", {}),
        *re.findall(r"self\.(\w+)", inspect.getsource(place)),
    }


def missing_option(code: str) -> str:
    """`--option`, perhaps with a value."""
    match = re.match(r"--(?:no-)?([a-z][\w-]+)(?:[ =]|$)", code)
    return "no command has it" if match and match[1] not in known_options() else ""


@functools.cache
def known_options() -> set[str]:
    """Of commands, examples, scripts, the runner and make."""
    patterns = (
        *("retro_ops/*.py", "examples/*.py", "models/recall/*.py", "csrc/runner/main.cpp"),
        *("compile_tests/try_wheel.py", "setup.py", "Makefile"),
    )
    texts = [path.read_text("utf-8") for pattern in patterns for path in ROOT.glob(pattern)]
    return {option for text in texts for option in re.findall(r"--(?:no-)?([a-z][\w-]+)", text)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_named_is_there(name: str) -> None:
    """Links, their anchors, paths and names of the package."""
    assert missing(read(ROOT / name)) == []


def test_guide_lists_every_op() -> None:
    text = (ROOT / "docs/how_it_works.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert set(listed) == set(retro_ops.__all__) - {"RetroConfig", "RetroLayer"}


# The tests themselves


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[x](docs/nothing.md)", "no such file"),
        ("[x](docs/models.md#no-heading)", "no such heading"),
        ("[x](#no-heading)\n# Heading", "no such heading"),
        ("![x](docs/nothing.png)", "no such file"),
        ("`docs/nothing.md`", "no such file"),
        ("`csrc/<op>.rs`", "no such file"),
        ("| a |\n|---|\n| `benchmarks/results/*.json` |", "no such file"),
        ("`retro_ops.models.nothing`", "no retro_ops.models.nothing"),
        ("`RetroCache.explode()`", "no RetroCache.explode"),
        ("`--explode`", "no command has it"),
    ],
)
def test_finds_what_is_missing(text: str, words: str) -> None:
    (found,) = missing(read(ROOT / "README.md", text))
    assert words in found


@pytest.mark.parametrize(
    "text",
    [
        "[x](docs/models.md#longer-contexts) [y](#a-heading-1)\n# A heading\n# A *heading*",
        "[x](https://example.org/nothing)",
        "`csrc/<op>.h`, `csrc/`, `benchmarks/results/*.csv`, `models.py`, `a/b`, `<op>.cpp`",
        "`retro_ops.models.load.layer_devices(model)` `RetroConfig.page_size` `--no-compile`",
    ],
)
def test_finds_what_is_there(text: str) -> None:
    assert missing(read(ROOT / "README.md", text)) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```\npython -m retro_ops demo --contxt 5\n```", "--contxt"),
        ("```sh\nretro bench decode \\\n    --keys sorted\n```", "sorted"),
        ("```\n$ python -m retro_ops export recall\nsomething\n```", "required: --context"),
        ("```\npython -m retro_ops info --estimator odd\n```", "must be one of variance, mean"),
        ("`python -m retro_ops dance`", "invalid choice: 'dance'"),
        ("```\nmake tea\n```", "no tea"),
        ("`make test CUPS=1`", "no CUPS"),
        ("```\nbuild/retro_runner x.pt2 --explode\n```", "no --explode"),
        ("```\npip install 'retro_ops[sugar]'\n```", "no extra sugar"),
        ("```\npython examples/own_model.py --explode\n```", "--explode"),
        ("```\npython nothing.py\n```", "there is no nothing.py"),
        ("```sh\nfrobnicate --now\n```", "frobnicate is unknown"),
        ("```\nX=1 python -m retro_ops info && python -m retro_ops dance | head\n```", "'dance'"),
    ],
)
def test_finds_wrong_commands(text: str, words: str, folder: Path) -> None:
    (found,) = faults_of_commands(read(ROOT / "README.md", text), folder)
    assert words in found


@pytest.mark.parametrize(
    "text",
    [
        "```\nan answer: make nothing of it\n```",
        "```\n$ cat > a.py\nprint(1)\n$ python a.py > b.txt\n$ make runner ARGS=\n```",
        "`python -m retro_ops export`, `retro COMMAND`, `python -m retro_ops info --context N`",
        "```\npython -m retro_ops bench decode --device cuda:7 --json a.json  # a comment\n```",
    ],
)
def test_finds_right_commands(text: str, folder: Path) -> None:
    assert faults_of_commands(read(ROOT / "README.md", text), folder) == []


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("```python\na = 1\n```\n```python\n1 / (a - 1)\n```", ZeroDivisionError, "by zero"),
        ("```python\nfrom retro_ops import explode\n```", ImportError, "explode"),
        ('```python\nload_model("some/model")\n```', AssertionError, "no small model stands in"),
        ('```python\ndevice = = "cuda"\n```', SyntaxError, "invalid syntax"),
    ],
)
def test_finds_snippets_that_fail(
    text: str,
    error: type[Exception],
    words: str,
    folder: Path,
    stand_ins: Callable[[str], Path],
    package: Callable[[], Path],
) -> None:
    with pytest.raises(error, match=words):
        run_snippets(read(ROOT / "README.md", text), False, folder, stand_ins, package)
