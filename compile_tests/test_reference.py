"""The API reference: docstrings say what a caller has to know, and pdoc makes pages of them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import retro_ops
import retro_ops.models

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(set(retro_ops.__all__) - {"RetroConfig", "RetroLayer"})
# In the entry of a tensor: its shape, and the kind of its elements.
SHAPE = re.compile(r"`\[[^`]*\]`")
DTYPE = re.compile(r"\b(u?int\d+|float\d+|bool|integers|dtype)\b")
# Where an entry is to be found instead.
ELSEWHERE = re.compile(r"\b(?:as in|like) `?(\w+)`?")


def module_names() -> list[str]:
    """The modules of which `make docs` makes pages."""
    text = (ROOT / "Makefile").read_text("utf-8")
    match = re.search(r"^DOCUMENTED := ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    assert match is not None
    return match[1].replace("\\\n", " ").split()


def public() -> Iterator[tuple[str, Any]]:
    """Public names, and what public classes define under public names."""
    for package in (retro_ops, retro_ops.models):
        for name in package.__all__:
            member = getattr(package, name)
            yield f"{package.__name__}.{name}", member
            if inspect.isclass(member):
                for own, value in vars(member).items():
                    value = (
                        value.__func__ if isinstance(value, staticmethod | classmethod) else value
                    )
                    value = value.fget if isinstance(value, property) else value
                    if not own.startswith("_") and inspect.isfunction(value):
                        yield f"{package.__name__}.{name}.{own}", value


PUBLIC = dict(public())


def sections(docstring: str) -> dict[str, str]:
    """What stands behind `Args:`, `Returns:`, `Raises:` ..., and before all of them ("")."""
    parts = re.split(r"^(\w+):", docstring, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section: str) -> dict[str, str]:
    """The entries of `Args:` by name; several names may share one."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    [\w*])", section):
        names, colon, text = entry.strip().partition(":")
        if colon:
            found.update(dict.fromkeys(re.split(r",\s+", names), " ".join(text.split())))
    return found


def parameters(function: Any) -> list[str]:
    """Names that a caller gives."""
    given = inspect.signature(function).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each.name
        for each in given
        if each.name not in ("self", "cls") and each.name[0] != "_" and each.kind not in several
    ]


def is_tensor(hint: Any) -> bool:
    return hint is Tensor or hint == Tensor | None


def raises(function: Any) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree))


def docstring(member: Any) -> str:
    return inspect.cleandoc(member.__doc__ or "")


def entry_of(op: Any, name: str, seen: tuple[Any, ...] = ()) -> str:
    """The entry of an op's argument, with those that it refers to."""
    documented = entries(sections(docstring(op)).get("Args", ""))
    entry = documented.get(name, "")
    for other in ELSEWHERE.findall(entry):
        if other in OPS and getattr(retro_ops, other) not in seen:
            entry += " " + entry_of(getattr(retro_ops, other), name, (*seen, op))
        elif other in documented and other != name:
            entry += " " + entry_of(op, other, seen)
    return entry


def complaints(member: Any) -> list[str]:
    """What the docstring of a public name does not say."""
    text = docstring(member)
    if not text:
        return ["no docstring"]
    found = []
    parts = sections(text)
    documented = entries(parts.get("Args", ""))
    if not is_dataclass(member) and not is_protocol(member):  # their fields and methods do
        for name in parameters(member):
            if name not in documented:
                found.append(f"no entry for {name}")
    if not inspect.isfunction(member):
        return found
    hints = typing.get_type_hints(member)
    for name, entry in documented.items():
        known = SHAPE.search(entry) or ELSEWHERE.search(entry)
        if is_tensor(hints.get(name)) and not known:
            found.append(f"{name} has no shape: {entry!r}")
    if hints.get("return") is Tensor and not SHAPE.search(text):
        found.append("what it returns has no shape")
    if raises(member) and "Raises" not in parts:
        found.append("it raises, and does not say when")
    return found


def is_protocol(member: Any) -> bool:
    return getattr(member, "_is_protocol", False)


def op_complaints(op: Any) -> list[str]:
    """What the docstring of an op does not say, besides."""
    text = docstring(op)
    parts = sections(text)
    hints = typing.get_type_hints(op)
    returned = hints["return"] is not type(None)
    wanted = ("Args", "Raises", "Source", *(["Returns"] if returned else []))
    found = [f"no {part}" for part in wanted if part not in parts]
    if returned:
        found += [] if SHAPE.search(parts.get("Returns", "")) else ["Returns has no shape"]
        found += [] if DTYPE.search(parts.get("Returns", "")) else ["Returns has no dtype"]
    for name in parameters(op):
        entry = entry_of(op, name)
        if is_tensor(hints[name]):
            found += [] if SHAPE.search(entry) else [f"{name} has no shape: {entry!r}"]
            found += [] if DTYPE.search(entry) else [f"{name} has no dtype: {entry!r}"]
    if not re.search(r"^Mutates\b", text, re.MULTILINE):
        found.append("does not say what it mutates")
    if not re.search(r"arXiv 2505\.02922\), sections? \d", parts.get("Source", "")):
        found.append("Source names no section of the paper")
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    """Each argument, shapes, and what is raised."""
    assert complaints(PUBLIC[name]) == []


@pytest.mark.parametrize("name", OPS)
def test_ops_are_documented(name: str) -> None:
    """Shapes and dtypes of all tensors, what changes, what is raised, and where it is from."""
    assert op_complaints(getattr(retro_ops, name)) == []


def test_fields_are_documented() -> None:
    """Each field of `RetroConfig` says its range or its choices below it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(retro_ops.RetroConfig)))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    told = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert list(told) == [field.name for field in dataclasses.fields(retro_ops.RetroConfig)]
    words = re.compile(r'[Aa]t least|0\.\.1|multiple of|"\w+"')
    assert [name for name, text in told.items() if not words.search(str(text))] == []


def silent(count: int, tensor: Tensor) -> Tensor:
    """Says little.

    Args:
        tensor: something.
    """
    raise ValueError(count, tensor)


def test_finds_what_is_not_said() -> None:
    assert complaints(lambda: 0) == ["no docstring"]
    assert complaints(silent) == [
        "no entry for count",
        "tensor has no shape: 'something.'",
        "what it returns has no shape",
        "it raises, and does not say when",
    ]
    assert op_complaints(silent) == [
        "no Raises",
        "no Source",
        "no Returns",
        "Returns has no shape",
        "Returns has no dtype",
        "tensor has no shape: 'something.'",
        "tensor has no dtype: 'something.'",
        "does not say what it mutates",
        "Source names no section of the paper",
    ]


def test_pages_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the modules that `make docs` names, with all that is public, without a warning."""
    import pdoc  # as a rule not beside the GPU tests, which are collected with this file

    monkeypatch.chdir(tmp_path)  # the checkout has a folder `retro_ops` too
    names = module_names()
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pdoc.pdoc(*names, output_directory=tmp_path)
    for name in names:
        page = tmp_path / f"{name.replace('.', '/')}.html"
        if name.startswith("!"):
            continue
        text = page.read_text("utf-8")
        for each in getattr(sys.modules[name], "__all__", []):
            assert f'id="{each}"' in text, f"{page.name} lacks {each}"
