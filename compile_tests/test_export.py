"""Programs that leave Python: torch.export, TorchScript, packages, and the runner that needs none.

Models are exported in fresh processes, as users do, and run by `csrc/runner/`, compiled once.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import math
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.pt2_archive._package import AOTICompiledModel
from torch.testing import assert_close
from torch.utils.cpp_extension import include_paths
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

import retro_ops
from retro_ops import RetroConfig, RetroLayer, cli_bench, wave_buffer
from retro_ops._library import find_library
from retro_ops.benchmarks import export as bench_export
from retro_ops.cli import main
from retro_ops.models import RetroCache, export_model, load_exported, load_model
from retro_ops.models import export as models_export
from retro_ops.models.export import FORMAT, ExportedModel, Program, State, state_of
from retro_ops.models.load import load_tokenizer
from retro_ops.ops._contract import Counter, FreeHeader
from retro_ops.testing import assert_same, example_arguments

ROOT = Path(__file__).resolve().parents[1]
OPS = sorted(set(retro_ops.__all__) - {"RetroConfig", "RetroLayer"})
# The index is used from 52 tokens on, and grows every 32.
SMALL = RetroConfig(
    local_tokens=16, cluster_size=8, segment_size=64, update_segment=32, min_retrieved_clusters=2
)
# The page cache holds three tokens in ten, so that pages come and go.
PAGED = dataclasses.replace(SMALL, cache_ratio=0.3)
PROGRAM = ROOT / "compile_tests" / "package_program.cpp"
VOCABULARY = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

pytestmark = pytest.mark.usefixtures("one_thread")
forms = pytest.mark.parametrize("form", ["traced", "decomposed", "loaded"])
strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


def in_form(program: ExportedProgram, form: str) -> Any:
    """A module that runs a program: as traced, after decomposition, or saved and loaded."""
    if form == "decomposed":
        return program.run_decompositions().module()
    if form == "loaded":
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()
    return program.module()


# Ops


class Call(nn.Module):
    """An op with its tensors as inputs."""

    def __init__(self, name: str, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.numbers = name, numbers

    def forward(self, tensors: dict[str, Tensor]) -> Any:
        return getattr(torch.ops.retro, self.name)(**tensors, **self.numbers)


def arguments_of(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers for an op that does something: random ones, and a prompt to cluster."""
    generator = torch.Generator().manual_seed(0)
    tensors, numbers = {}, {}
    for key, value in example_arguments(name).items():
        if not isinstance(value, Tensor):
            numbers[key] = value
        elif value.is_floating_point():
            tensors[key] = torch.rand(value.shape, generator=generator)
        else:
            tensors[key] = value
    if "spans" in tensors:
        tensors["spans"][:, 1] = tensors["keys"].shape[2]
    return tensors, numbers


def rows_axis(key: str) -> int:
    return 1 if key in ("steady", "store", "centroids", "totals", "pages") else 0


def resized(tensors: dict[str, Tensor], rows: int, tokens: int) -> dict[str, Tensor]:
    """The same with other numbers of rows and, where an op takes several, of new tokens."""
    out = {}
    for key, tensor in tensors.items():
        axis = rows_axis(key)
        tensor = torch.cat([tensor] * rows, dim=axis).narrow(axis, 0, rows)
        if key in ("keys", "values", "assignment"):
            tensor = torch.cat([tensor] * tokens, dim=2).narrow(2, 0, tokens)
        if key == "mask":
            tensor = torch.cat([tensor] * tokens, dim=1).narrow(1, 0, tokens)
        if key == "spans":
            tensor = tensor.clamp(max=tokens)
        out[key] = tensor.contiguous()
    return out


def dynamic_axes(tensors: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    axes = {key: {rows_axis(key): Dim("rows", min=2, max=9)} for key in tensors}
    for key, axis in (("keys", 2), ("values", 2), ("assignment", 2), ("mask", 1)):
        if key in axes:
            axes[key][axis] = Dim("tokens", min=2, max=99)
    return axes


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@strictness
@pytest.mark.parametrize("name", OPS)
def test_op_exports(name: str, strict: bool, sizes: str) -> None:
    """Traced, decomposed and loaded programs change and return what the op does, bit for bit."""
    tensors, numbers = arguments_of(name)
    axes = {"tensors": dynamic_axes(tensors)} if sizes == "dynamic" else None
    program = torch.export.export(
        Call(name, numbers), ({**tensors},), dynamic_shapes=axes, strict=strict
    )
    assert [str(node.target) for node in program.graph.nodes if "retro" in str(node.target)] == [
        f"retro.{name}.default"
    ]
    others = [(2, 5), (3, 7), (4, 2)] if sizes == "dynamic" else [(2, 5)]
    for form in ("traced", "decomposed", "loaded"):
        run = in_form(program, form)
        for rows, tokens in others:
            given = resized(tensors, rows, tokens)
            mine, theirs = ({key: t.clone() for key, t in given.items()} for _ in range(2))
            expected = getattr(torch.ops.retro, name)(**theirs, **numbers)
            got = run(mine)
            for one, other in zip(as_list(got), as_list(expected), strict=True):
                assert_same(one, other, f"{form}, {rows} rows, {tokens} tokens")
            for key in given:
                assert_same(mine[key], theirs[key], f"{form}, {key}")


def as_list(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [] if result is None else list(result)


def test_torchscript_calls_the_ops(tmp_path: Path) -> None:
    """A scripted function, saved and loaded; TorchScript takes the ops by their schemas."""

    def step(
        query: Tensor, steady: Tensor, keys: Tensor, values: Tensor, counters: Tensor
    ) -> tuple[Tensor, Tensor]:
        torch.ops.retro.append_tokens(keys, values, None, steady, counters, 50)
        nothing = torch.zeros(query.shape[0], steady.shape[2], 0, 2, dtype=torch.int64)
        store = steady[:, :, :, :0]
        estimate_lse = torch.full(query.shape[:2], float("-inf"))
        return torch.ops.retro.merged_attention(
            query,
            steady,
            store,
            nothing,
            counters,
            torch.zeros_like(query),
            estimate_lse,
            0.25,
        )

    torch.manual_seed(0)
    query, keys = torch.randn(2, 4, 16), torch.randn(2, 2, 30, 16)
    file = tmp_path / "step.pt"
    torch.jit.script(step).save(str(file))
    results = []
    for function in (step, torch.jit.load(str(file))):
        steady = torch.zeros(2, 2, 2, 50, 16)
        counters = torch.zeros(2, len(Counter), dtype=torch.int64)
        out, lse = function(query, steady, keys, keys + 1, counters)
        results.append((out, lse, steady, counters))
    assert int(results[0][3][0, 0]) == 30
    for one, other in zip(*results, strict=True):
        assert_same(one, other)
    expected = nn.functional.scaled_dot_product_attention(
        query[:, :, None], keys, keys + 1, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(results[1][0], expected[:, :, 0])


# The layer


class Layer(nn.Module):
    """A layer as a program: a prompt, or a step where `query` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = RetroLayer(
            SMALL,
            batch_size=2,
            num_query_heads=4,
            num_kv_heads=2,
            head_dim=16,
            max_length=200,
            dtype=torch.float32,
        )

    def forward(self, keys: Tensor, values: Tensor, query: Tensor | None = None) -> Any:
        if query is None:
            return self.layer.prefill(keys, values)
        return self.layer.decode(query, keys, values)


@forms
@strictness
def test_layer_exports(strict: bool, form: str) -> None:
    """Prompts of any length and the steps behind them, over three growths of the index."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 200, 16)
    queries = torch.randn(2, 4, 200, 16)
    prompt = (keys[:, :, :60].contiguous(), values[:, :, :60].contiguous())
    length = {2: Dim("tokens", min=2, max=200)}
    prefill = in_form(
        torch.export.export(Layer(), prompt, dynamic_shapes=(length, length), strict=strict),
        form,
    )
    one = [tensor[:, :, :1].contiguous() for tensor in (keys, values, queries)]
    decode = in_form(torch.export.export(Layer(), tuple(one), strict=strict), form)
    for tokens in (3, 51, 52, 100):
        expected = Layer().layer
        expected.prefill(keys[:, :, :tokens], values[:, :, :tokens])
        prefill(keys[:, :, :tokens], values[:, :, :tokens])
        for name, buffer in prefill.named_buffers():
            # Behind what the counters say, memory may hold anything.
            decode.get_buffer(name).copy_(buffer)
        for t in range(tokens, tokens + 98):
            token = [tensor[:, :, t : t + 1] for tensor in (keys, values, queries)]
            assert_same(
                decode(*token), expected.decode(token[2], token[0], token[1]), f"{tokens}, {t}"
            )
        assert expected.stats()["updates"] >= 2 * 2
        for name, buffer in decode.named_buffers():
            if name.endswith(("counters", "offsets")):
                assert_same(buffer, expected.get_buffer(name.removeprefix("layer.")), name)


# Models


def make_model(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="retro").eval()
    model.generation_config.pad_token_id = 0
    return model


def gemma() -> Any:
    """Sliding and full layers."""
    return Gemma3TextConfig(
        **{**BASE, "head_dim": 32},
        sliding_window=24,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"],
    )


def make_prompt(rows: int, tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)


def padded(ids: Tensor, starts: list[int]) -> Tensor:
    """The attention mask of rows that begin at `starts`; `ids` is zero before."""
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None]).long()
    ids.mul_(mask)
    return mask


def generate(
    model: PreTrainedModel,
    ids: Tensor,
    config: RetroConfig,
    new_tokens: int,
    cache: RetroCache | None = None,
    **options: Any,
) -> Tensor:
    """What `model.generate` writes, `[B, new_tokens]` at most."""
    if cache is None:
        cache = RetroCache(
            model.config, config, max_cache_len=ids.shape[1] + new_tokens, batch_size=len(ids)
        )
    settings = {"max_new_tokens": new_tokens, "do_sample": False, **options}
    out = model.generate(ids, past_key_values=cache, **settings)
    return out[:, ids.shape[1] :]


def run_process(*command: Any, **arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **arguments)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="session")
def llama(folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model, and its package of two rows with default settings, made by the command."""
    model = make_model(LlamaConfig(**BASE))
    model.save_pretrained(folder / "llama")
    package = folder / "llama.pt2"
    command = (sys.executable, "-m", "retro_ops", "export", folder / "llama")
    options = ("--context", 2400, "--batch-size", 2, "--out", package, "--device", "cpu")
    ran = run_process(*command, *options, "--json", folder / "llama.json", cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert "batch 2, up to 2,400 tokens" in ran.stdout
    # torch says so where it was built for GPUs and there is none.
    said = [line for line in ran.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert said == []
    return model, package


EXPORT = """
import json, sys
import torch
from retro_ops import RetroConfig
from retro_ops.models import export_model, load_model

folder, package, config, context, offload = sys.argv[1:]
model = load_model(folder, device="cpu")
settings = RetroConfig(**json.loads(config))
options = {"config": settings, "offload": offload == "yes"}
export_model(model, package, context=int(context), batch_size=2, **options)
"""


def export_small(model: PreTrainedModel, package: Path, config: RetroConfig, offload: str) -> None:
    """A package of two rows of 200 tokens, beside a folder with the model."""
    model.save_pretrained(package.with_suffix(""))
    ran = run_process(
        *(sys.executable, "-c", EXPORT, package.with_suffix(""), package),
        *(json.dumps(vars(config)), 200, offload),
        cwd=package.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # see the test of threads
    )
    assert ran.returncode == 0, ran.stderr


@pytest.fixture(scope="session")
def small_gemma(folder: Path) -> tuple[PreTrainedModel, Path]:
    """A model with sliding windows, and its package of two rows whose index grows soon."""
    model, package = make_model(gemma()), folder / "gemma.pt2"
    export_small(model, package, SMALL, "no")
    return model, package


@pytest.fixture(scope="session")
def offloaded(folder: Path) -> tuple[PreTrainedModel, Path]:
    """The same model, its package with a store behind a page cache."""
    model, package = make_model(gemma()), folder / "offloaded.pt2"
    export_small(model, package, PAGED, "yes")
    return model, package


@pytest.fixture(scope="session")
def runner(folder: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}), which builds the runner")
    program = folder / "retro_runner"
    ran = run_process(
        *(sys.executable, "setup.py", "--quiet", "build_runner", "--output", program), cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    return program


def library() -> Path:
    path = find_library("_C")
    assert path is not None
    return path


def as_lines(ids: Tensor, starts: list[int] | None = None) -> str:
    """A row a line, without its padding."""
    starts = starts or [0] * len(ids)
    rows = zip(ids.tolist(), starts, strict=True)
    return "".join(" ".join(map(str, row[start:])) + "\n" for row, start in rows)


def run_runner(
    program: Path,
    package: Path,
    ids: Tensor | str,
    *options: Any,
    ops: Path | None = None,
    threads: int = 1,
) -> subprocess.CompletedProcess[str]:
    """The runner on rows of ids, in an environment in which no Python is to be found."""
    return run_process(
        *(program, package, "--ops", ops or library(), "--threads", threads, *options),
        input=ids if isinstance(ids, str) else as_lines(ids),
        env={"TMPDIR": str(package.parent)},
    )


def tokens_of(ran: subprocess.CompletedProcess[str]) -> Tensor:
    assert ran.returncode == 0, ran.stderr
    return torch.tensor([list(map(int, line.split())) for line in ran.stdout.splitlines()])


def test_runner_writes_the_tokens_of_generate(
    llama: tuple[PreTrainedModel, Path], runner: Path
) -> None:
    """Default settings: the index is built of 1,093 tokens, and grows at 2,116."""
    model, package = llama
    for prompt, new_tokens in ((1, 40), (2, 3), (1091, 40), (1092, 40), (1200, 1150), (2400, 1)):
        ids = make_prompt(2, prompt, seed=prompt)
        ran = run_runner(runner, package, ids, "--new-tokens", new_tokens)
        got = tokens_of(ran)
        expected = generate(model, ids, RetroConfig(), new_tokens)
        assert torch.equal(got, expected), (prompt, int((got != expected).sum()))
        assert re.search(rf"prompt of {prompt} tokens [\d.]+ ms", ran.stderr)
        assert ("ms per token" in ran.stderr) == (new_tokens > 1)


def test_package_writes_the_tokens_of_generate(
    llama: tuple[PreTrainedModel, Path], small_gemma: tuple[PreTrainedModel, Path], runner: Path
) -> None:
    """In Python and in the runner, around a window of 24 tokens and around the first segment.

    The second row is padded.
    """
    model, package = small_gemma
    exported = load_exported(package)
    state = exported.new_state()
    for prompt, start in ((1, 0), (2, 1), (23, 3), (24, 0), (25, 24), (52, 1), (90, 38), (120, 60)):
        ids = make_prompt(2, prompt, seed=prompt)
        mask = padded(ids, [0, start])
        new_tokens = min(120, 201 - prompt)
        expected = generate(model, ids, SMALL, new_tokens, attention_mask=mask)
        # A state that was used before is as good as a new one.
        got = exported.generate(ids, new_tokens, state, attention_mask=mask)
        assert torch.equal(got, expected), (prompt, start)
        assert min(row.unique().numel() for row in expected) > 5
        counters = state["1.counters"]
        assert int(counters[:, 3].min()) >= 1, "the index did not grow"
        if prompt in (1, 24, 90):
            ran = run_runner(runner, package, as_lines(ids, [0, start]), "--new-tokens", new_tokens)
            assert torch.equal(tokens_of(ran), expected), (prompt, start)

    model, package = llama
    exported, ids = load_exported(package), make_prompt(2, 1500)
    logits = exported.prefill(ids, state := exported.new_state())
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)
    # Two conversations at once.
    other = exported.new_state()
    exported.prefill(ids + 1 - 97 * (ids == 96), other)
    assert not torch.equal(state["0.store"], other["0.store"])
    expected = generate(model, ids, RetroConfig(), 20)
    assert torch.equal(exported.generate(ids, 20, state), expected)


def test_offloaded_package_writes_the_same(
    small_gemma: tuple[PreTrainedModel, Path], offloaded: tuple[PreTrainedModel, Path], runner: Path
) -> None:
    """As the package that is not, and as `generate`, page by page; conversation after conversation.

    The index grows up to five times; a single token goes on to the last one that a row can hold.
    """
    model, package = offloaded
    plain, exported = load_exported(small_gemma[1]), load_exported(package)
    assert (plain.offload, exported.offload) == (False, True)
    state, evicted = exported.new_state(), 0
    for prompt, start, new_tokens in ((90, 38, 111), (1, 0, 200), (199, 2, 2), (30, 29, 150)):
        ids = make_prompt(2, prompt, seed=prompt)
        mask = padded(ids, [0, start])
        cache = RetroCache(model.config, PAGED, max_cache_len=200, batch_size=2, offload=True)
        expected = generate(model, ids, PAGED, new_tokens, cache, attention_mask=mask)
        got = exported.generate(ids, new_tokens, state, attention_mask=mask)
        assert torch.equal(got, expected), (prompt, start)
        assert torch.equal(plain.generate(ids, new_tokens, attention_mask=mask), expected)
        ran = run_runner(runner, package, as_lines(ids, [0, start]), "--new-tokens", new_tokens)
        assert torch.equal(tokens_of(ran), expected), (prompt, start)
        own = cache.retro_layers[0].retro
        assert own is not None
        for name in ("counters", "page_table", "free_pages", "decisions", "cached"):
            here, there = state[f"1.{name}"].clone(), own.get_buffer(name).clone()
            if name == "counters" and prompt == 1:  # a prompt here, a step there
                here[:, Counter.STEPS] += 1
            elif prompt == 1:  # which stand for the number of a step
                here, there = here[:, :, 2:], there[:, :, 2:]
            assert_same(here, there, f"{prompt}, {name}")
        evicted += int(state["1.counters"][:, Counter.EVICTIONS].sum())
        assert int(state["1.counters"][:, Counter.PAGE_MISSES].min()) > 0
    assert evicted > 100


def test_a_package_in_python_frees_its_weights(
    llama: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it goes, or fails to load; another one of the same file keeps its own."""
    held: list[Tensor] = []
    read = models_export._read_weights

    def recorded(*arguments: Any) -> Any:
        weights = read(*arguments)
        held[:] = [tensor for program in weights.values() for tensor in program.values()]
        return weights

    monkeypatch.setattr(models_export, "_read_weights", recorded)
    ids = make_prompt(2, 30)
    other = load_exported(llama[1])
    kept = list(held)
    expected = other.prefill(ids, other.new_state())
    with torch.inference_mode():
        exported = load_exported(llama[1])
    assert all(tensor.untyped_storage().nbytes() for tensor in held)
    assert torch.equal(exported.prefill(ids, exported.new_state()), expected)
    with FakeTensorMode():  # the collector may come in the middle of a trace
        del exported
        gc.collect()
    assert not any(tensor.untyped_storage().nbytes() for tensor in held)
    assert torch.equal(other.prefill(ids, other.new_state()), expected)
    assert all(tensor.untyped_storage().nbytes() for tensor in kept)

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no such weight")

    monkeypatch.setattr(AOTICompiledModel, "load_constants", fails)
    with pytest.raises(RuntimeError, match="no such weight"):
        load_exported(llama[1])
    gc.collect()
    assert not any(tensor.untyped_storage().nbytes() for tensor in held)


def test_an_exported_model_has_no_copies(llama: tuple[PreTrainedModel, Path]) -> None:
    exported = load_exported(llama[1])
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled; call load_exported"):
            copied(exported)


def build_programs(*programs: tuple[Path, Path]) -> None:
    """Of sources, each around `package.h`, as a user would."""
    builds = [
        subprocess.Popen(
            [sys.executable, "setup.py", "--quiet", "build_runner", "-o", program, "-m", source],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, program in programs
    ]
    for build in builds:
        _, said = build.communicate()
        assert build.returncode == 0, said


def written_by_program(program: Path, package: Path, ids: Tensor, ops: list[Path]) -> list[int]:
    """Five tokens after a prompt, by four packages in turn that leave no memory behind."""
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(bench_export._cuda_folders())}
    ran = run_process(program, package, *ops, "--", *ids.tolist(), env=env)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    tokens, live = zip(*(line.split(":") for line in ran.stdout.splitlines()), strict=True)
    assert len(tokens) == 4
    assert len(set(live)) == 1, live
    (same,) = {tuple(map(int, words.split())) for words in tokens}
    return list(same)


def test_a_program_of_ones_own(llama: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Built around `package.h`, as that of the docs is: tokens as in Python."""
    text = (ROOT / "docs" / "export.md").read_text("utf-8")
    (sample,) = re.findall(r"^\$ cat > likely\.cpp\n(.*?)^\$ ", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "likely.cpp").write_text(sample)
    program = tmp_path / "program"
    build_programs((PROGRAM, program), (tmp_path / "likely.cpp", tmp_path / "likely"))
    ids, exported = make_prompt(2, 30), load_exported(llama[1])
    expected = exported.generate(ids[:1].expand(2, -1), 5, eos=[])[0].tolist()
    assert written_by_program(program, llama[1], ids[0], [library()]) == expected


def forced(
    exported: ExportedModel, ids: Tensor, starts: list[int], steps: int, state: State
) -> Tensor:
    """Logits `[1 + steps, B, V]` of a padded prompt, and of steps that take tokens 1, 2, ..."""
    out = [exported.prefill(ids, state, padded(ids, starts)).clone()]
    for step in range(steps):
        token = torch.full((len(ids), 1), 1 + step % (VOCABULARY - 1))
        out.append(exported.decode(token, state).clone())
    return torch.stack(out)


@pytest.mark.parametrize(("prompt", "starts"), [(1, [0, 0]), (5, [3, 0]), (150, [140, 20])])
def test_a_prompt_forgets_all_that_the_state_held(
    offloaded: tuple[PreTrainedModel, Path], prompt: int, starts: list[int]
) -> None:
    """Whatever that is, as steps on a state of zeros, or a conversation that came to infinities."""
    exported, ids = load_exported(offloaded[1]), make_prompt(2, prompt)
    generator = torch.Generator().manual_seed(prompt)
    expected = forced(exported, ids, starts, 40, exported.new_state())
    assert expected.isfinite().all()
    state = exported.new_state()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
        else:
            high = min(torch.iinfo(tensor.dtype).max, 1 << 30)
            tensor.copy_(torch.randint(high, tensor.shape, generator=generator))
    assert torch.equal(forced(exported, ids, starts, 40, state), expected)


def test_rows_are_full_without_their_padding(offloaded: tuple[PreTrainedModel, Path]) -> None:
    """Steps go on until a row holds all the tokens that it can, however much padding there is."""
    model, exported = offloaded[0], load_exported(offloaded[1])
    model.set_attn_implementation("retro")
    ids, starts, steps = make_prompt(2, 180), [150, 170], 170
    state = exported.new_state()
    got = forced(exported, ids, starts, steps, state)
    with pytest.raises(RuntimeError, match="row 0 "):
        exported.decode(ids[:, :1], state)
    mask = padded(ids, starts)
    cache = RetroCache(model.config, PAGED, max_cache_len=200, batch_size=2, offload=True)
    with torch.no_grad():
        for step in range(1 + steps):
            token = ids if step == 0 else torch.full((2, 1), 1 + (step - 1) % (VOCABULARY - 1))
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -token.shape[1] :]
            out = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            assert_close(got[step], out.logits[:, -1], rtol=1e-4, atol=1e-4)
            mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)


def test_steps_of_a_state_that_has_not_begun(
    small_gemma: tuple[PreTrainedModel, Path], offloaded: tuple[PreTrainedModel, Path]
) -> None:
    """They are those behind a prompt of one token, past several growths of the index."""
    for model, package in (small_gemma, offloaded):
        exported, token = load_exported(package), make_prompt(2, 1)
        expected = generate(model, token, PAGED, 150)
        state, written = exported.new_state(), []
        for _ in range(150):
            token = exported.decode(token, state).argmax(dim=1, keepdim=True)
            written.append(token)
        assert torch.equal(torch.cat(written, dim=1), expected)


def test_offloaded_package_says_what_lies_where(offloaded: tuple[PreTrainedModel, Path]) -> None:
    exported = load_exported(offloaded[1])
    lines = exported.metadata["retro.state"].splitlines()
    words = [line.split() for line in lines]
    assert {word[3] for word in words} == {"host", "device"}
    assert {word[0] for word in words if word[3] == "host"} == {
        f"1.{name}" for name in wave_buffer.ON_HOST
    }
    assert json.loads(exported.metadata["retro.config"])["cache_ratio"] == PAGED.cache_ratio
    # As a new layer has it.
    state = exported.new_state()
    cache = RetroCache(offloaded[0].config, PAGED, max_cache_len=200, batch_size=2, offload=True)
    cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
    assert state.keys() == state_of(cache).keys()
    for name, tensor in state_of(cache).items():
        assert_same(state[name], tensor, name)
    free = state["1.free_pages"]
    assert int(free[:, :, FreeHeader.COUNT].min()) == free.shape[2] - len(FreeHeader) > 0


def test_rows_of_different_length(llama: tuple[PreTrainedModel, Path], runner: Path) -> None:
    """Default settings: one row is indexed and grows, the other is too short for both."""
    model, package = llama
    for prompt, starts in ((1200, [0, 1000]), (1100, [1099, 0])):
        ids = make_prompt(2, prompt, seed=prompt)
        mask = padded(ids, starts)
        expected = generate(model, ids, RetroConfig(), 30, attention_mask=mask)
        ran = run_runner(runner, package, as_lines(ids, starts), "--new-tokens", 30)
        assert torch.equal(tokens_of(ran), expected)
        # The same as each row by itself.
        for row, start in enumerate(starts):
            alone = ids[row : row + 1, start:]
            assert torch.equal(generate(model, alone, RetroConfig(), 30), expected[[row]])


def test_any_number_of_threads(small_gemma: tuple[PreTrainedModel, Path], runner: Path) -> None:
    """Of the process that runs a package, not of the one that exported it: that had one."""
    model, package = small_gemma
    ids = make_prompt(2, 30)
    expected = generate(model, ids, SMALL, 60)
    for threads in (2, 3):
        ran = run_runner(runner, package, ids, "--new-tokens", 60, threads=threads)
        assert torch.equal(tokens_of(ran), expected)


def test_end_tokens_stop_a_row(
    small_gemma: tuple[PreTrainedModel, Path], runner: Path, tmp_path: Path
) -> None:
    """Those of the model, which the package knows, or others; as in `generate`."""
    model, package = small_gemma
    ids = make_prompt(2, 40)
    free = generate(model, ids, SMALL, 60)
    first, second = int(free[0, 7]), int(free[1, 20])
    for ends in ([first], [first, second], []):
        expected = generate(
            model, ids, SMALL, 60, eos_token_id=ends or None, pad_token_id=VOCABULARY - 1
        )
        changed = with_metadata(
            package, tmp_path / "e.pt2", eos=" ".join(map(str, ends)), pad=str(VOCABULARY - 1)
        )
        lines = []
        for row in expected.tolist():
            stops = [place for place, token in enumerate(row) if token in ends]
            lines.append(row[: min(stops) + 1 if stops else None])
        assert torch.equal(load_exported(changed).generate(ids, 60), expected)
        # The same by the option.
        option = ",".join(map(str, ends)) or "none"
        for command in ((changed,), (package, "--eos", option)):
            ran = run_runner(runner, command[0], ids, "--new-tokens", 60, *command[1:])
            assert ran.returncode == 0, ran.stderr
            assert [list(map(int, line.split())) for line in ran.stdout.splitlines()] == lines
        written = load_exported(changed).generate(ids, 60, eos=[])
        assert torch.equal(written, free)


def test_tokens_come_from_a_file_too(
    llama: tuple[PreTrainedModel, Path], runner: Path, tmp_path: Path
) -> None:
    ids = make_prompt(2, 30)
    file = tmp_path / "ids.txt"
    file.write_text(as_lines(ids))
    ran = run_runner(runner, llama[1], "", "--tokens", file, "--new-tokens", 5)
    assert torch.equal(tokens_of(ran), generate(llama[0], ids, RetroConfig(), 5))


def test_there_is_no_python_in_the_process(
    llama: tuple[PreTrainedModel, Path], runner: Path
) -> None:
    """Nor in what it loads later: the op library, and the programs of the package."""
    linked = run_process("ldd", runner).stdout
    assert "libtorch_cpu.so" in linked
    assert "python" not in Path(runner).name + "".join(
        line.split()[0] for line in linked.splitlines()
    )
    command = (runner, llama[1], "--ops", library())
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        # It has loaded everything when it waits for the prompt.
        maps, end = "", time.monotonic() + 60
        while maps.count("wrapper.so") == 0 and time.monotonic() < end:
            time.sleep(0.05)
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        process.communicate(as_lines(make_prompt(2, 4)))
    assert process.returncode == 0
    files = {Path(line.split()[-1]).name for line in maps.splitlines() if "/" in line}
    assert library().name in files
    assert any(name.endswith("wrapper.so") for name in files)
    assert not [name for name in files if "libpython" in name or "libtorch_python" in name]


def test_package_says_what_it_is(llama: tuple[PreTrainedModel, Path], folder: Path) -> None:
    package = llama[1]
    metadata = load_exported(package).metadata
    config = json.loads(metadata["retro.config"])
    assert RetroConfig(**config) == RetroConfig()
    facts = {key.removeprefix("retro."): value for key, value in metadata.items()}
    assert facts["ops"] == retro_ops.__version__
    assert facts["torch"] == torch.__version__
    assert (facts["context"], facts["batch_size"], facts["vocabulary"]) == ("2400", "2", "97")
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert (facts["eos"], facts["pad"]) == ("", "0")
    assert facts["offload"] == "no"
    lines = facts["state"].splitlines()
    assert lines[-2:] == ["position int64 - device", "starts int64 2 device"]
    assert f"0.counters int64 2x{len(Counter)} device" in lines
    assert not [line for line in lines if not line.endswith(" device")]
    figures = json.loads((folder / "llama.json").read_text())
    assert figures["retro.state"] == metadata["retro.state"]
    assert figures["megabytes"] == package.stat().st_size / 1e6


def test_weights_are_there_once(small_gemma: tuple[PreTrainedModel, Path]) -> None:
    """For both programs."""
    model, package = small_gemma
    with zipfile.ZipFile(package) as archive:
        records = [info for info in archive.infolist() if "/weights/" in info.filename]
        kept = sum(info.file_size for info in records if not info.filename.endswith("list"))
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    assert needed <= kept < needed + 4096


def test_a_window_costs_its_length() -> None:
    """No tensor of the program for a prompt grows with the square of it."""
    model, tokens = make_model(MistralConfig(**BASE, sliding_window=24)), 2000
    cache = RetroCache(model.config, SMALL, max_cache_len=tokens)
    ids = torch.ones(1, tokens, dtype=torch.int64)
    with torch.no_grad():
        model(ids[:, :2], past_key_values=cache)
        state = state_of(cache)
        program = torch.export.export(
            Program(model, cache, tokens),
            (ids, state),
            dynamic_shapes=({1: Dim("tokens", min=2, max=tokens)}, dict.fromkeys(state)),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    values = [node.meta.get("val") for node in program.graph.nodes]
    sizes = [int(value.numel()) for value in values if isinstance(value, Tensor)]
    assert 2000 < max(sizes) < tokens**2 / 10


# Refusals


def with_metadata(package: Path, changed: Path, **facts: str) -> Path:
    """A copy of a package that says something else of itself."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("metadata.json"):
                own = json.loads(data)
                own.update({f"retro.{key}": value for key, value in facts.items()})
                data = json.dumps(own).encode()
            # The folder inside has the name of the file.
            new.writestr(f"{changed.stem}/{name.partition('/')[2]}", data)
    return changed


PACKAGES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "version": (
        lambda package, path: with_metadata(package, path / "v.pt2", ops="9.8.7"),
        f"needs version 9.8.7 of the op library, version {retro_ops.__version__} is loaded",
    ),
    "format": (
        lambda package, path: with_metadata(package, path / "f.pt2", format="2"),
        f"is not a package of this version of retro_ops (format 2, not {FORMAT})",
    ),
    "missing": (lambda package, path: path / "none.pt2", "no package '"),
    "text": (lambda package, path: ROOT / "README.md", f"(format unknown, not {FORMAT}); make"),
    "gpu": (
        lambda package, path: with_metadata(package, path / "g.pt2", device="cuda"),
        "was exported for cuda, and there is no GPU here",
    ),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_refuses_packages(
    name: str, llama: tuple[PreTrainedModel, Path], runner: Path, tmp_path: Path
) -> None:
    if name == "gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    make, words = PACKAGES[name]
    package = make(llama[1], tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_exported(package)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    check_refusal(run_runner(runner, package, "1\n2\n"), words)


def check_refusal(ran: subprocess.CompletedProcess[str], words: str) -> None:
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    assert words in ran.stderr
    assert ran.stderr.startswith("retro_runner: ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ("1 2\n", [], "exported for batch size 2, got 1 rows; export it with --batch-size 1"),
        ("1\n2\n3\n", [], "exported for batch size 2, got 3 rows; export it with --batch-size 3"),
        ("1 2\n3 97\n", [], "token ids must lie in 0..96, got 97"),
        ("1 2\n3 -4\n", [], "token ids must be a whole number from 0 on, got '-4'"),
        ("1 2\n3 x\n", [], "token ids must be a whole number from 0 on, got 'x'"),
        ("", [], "no token ids given"),
        ("1\n2\n", ["--new-tokens", 2401], "1 tokens and 2401 new ones exceed the context of 2400"),
        ("1 " * 2401 + "\n" + "1 " * 2401, ["--new-tokens", 1], "a prompt of 2401 tokens and 1"),
        ("1\n2\n", ["--new-tokens", 0], "--new-tokens must be a whole number from 1 on, got '0'"),
        ("1\n2\n", ["--device", "cuda"], "was exported for cpu, not for cuda; export it with"),
        ("1\n2\n", ["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        ("1\n2\n", ["--tokens", "/no/such/file"], "cannot read '/no/such/file'"),
        ("1\n2\n", ["--ops", "/no/such/lib.so"], "cannot load op library: /no/such/lib.so"),
        ("1\n2\n", ["--threads"], "--threads needs a value"),
        ("1\n2\n", ["--eos", "5,x"], "--eos must be a whole number from 0 on, got 'x'"),
        ("1\n2\n", ["--fast"], "unknown argument '--fast'"),
    ],
)
def test_runner_refuses(
    ids: str, options: list[Any], words: str, llama: tuple[PreTrainedModel, Path], runner: Path
) -> None:
    check_refusal(run_runner(runner, llama[1], ids, *options), words)


def test_runner_needs_an_op_library(llama: tuple[PreTrainedModel, Path], runner: Path) -> None:
    check_refusal(run_process(runner, llama[1]), "no op library named; give --ops")
    other = Path(torch.__file__).parent / "lib" / "libc10.so"
    ran = run_runner(runner, llama[1], "1\n2\n", ops=other)
    check_refusal(ran, "no op library of retro_ops is loaded")
    check_refusal(run_process(runner), "no package named")
    assert "one row of the batch per line" in run_process(runner, "--help").stdout


def test_python_refuses(llama: tuple[PreTrainedModel, Path]) -> None:
    exported = load_exported(llama[1])
    state = exported.new_state()
    for call, words in (
        (lambda: exported.prefill(make_prompt(3, 5), state), "batch size 2, got 3 rows"),
        (lambda: exported.prefill(make_prompt(2, 2401), state), "a prompt of 2401 tokens and 1"),
        (lambda: exported.generate(make_prompt(2, 2400), 2), "2400 tokens and 2 new ones exceed"),
        (lambda: exported.generate(make_prompt(2, 5), 0), "new tokens must be at least 1, got 0"),
        (lambda: exported.prefill(make_prompt(2, 5) + 90, state), "must lie in 0..96, got"),
        (lambda: exported.prefill(make_prompt(2, 5).int(), state), "[2, 5] of torch.int32"),
        (lambda: exported.decode(make_prompt(2, 5), state), "one token of each row, got 5"),
        (
            lambda: exported.prefill(make_prompt(2, 5), state, torch.ones(2, 4)),
            "the attention_mask must have the shape of the ids, [2, 5], got [2, 4]",
        ),
        (
            lambda: exported.generate(
                make_prompt(2, 3), 5, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]])
            ),
            "padding must be on the left, and at least one token in every row",
        ),
        (lambda: load_exported(llama[1], "cuda"), "was exported for cpu, not for cuda"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


def test_export_refuses(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**BASE))
    windows = make_model(MistralConfig(**BASE, sliding_window=24))
    out = tmp_path / "x.pt2"
    for call, words in (
        (lambda: export_model(model, tmp_path / "x.bin", context=99), "must be a file *.pt2"),
        (lambda: export_model(model, out, context=15), "context must be at least 16 tokens"),
        (lambda: export_model(model, out, context=99, batch_size=0), "got 99 and 0"),
        (lambda: export_model(model, out, context=4097), "exceeds the 4096 that the model reads"),
        (lambda: export_model(windows, out, context=99), "no full-attention layers"),
        (lambda: export_model(model.train(), out, context=99), "in training mode"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recall"], "required: --context"),
        (["recall", "--context", "0"], "whole number from 1 on, got '0'"),
        (["recall", "--context", "99", "--batch-size", "any"], "whole number from 1 on, got 'any'"),
        (["recall", "--context", "99", "--device", "cuda:99"], "must be one of cpu"),
        (["recall", "--context", "99", "--out", "model.bin"], "must be a file *.pt2"),
        (["recall", "--context", "99", "--out", "/no/such/x.pt2"], "cannot write"),
        (["recall", "--context", "9"], "context must be at least 16 tokens"),
        (["recall", "--context", "300000"], "exceeds the 262144 that the model reads"),
        (["/no/such/model", "--context", "99"], "no model '/no/such/model'"),
    ],
)
def test_command_refuses(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.pt2")]
    try:
        status: Any = main(["export", *arguments, *out])
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status == 2
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_command_offloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The options reach `export_model`, and the command says so."""
    asked: dict[str, Any] = {}

    def export(model: Any, path: Path, **options: Any) -> dict[str, str]:
        asked.update(options)
        path.touch()
        return {"retro.device": "cpu", "retro.ops": retro_ops.__version__}

    monkeypatch.setattr("retro_ops.models.export_model", export)
    out = ["--out", str(tmp_path / "x.pt2"), "--device", "cpu"]
    command = ["export", "recall", "--context", "99", *out]
    assert main([*command, "--offload", "--cache-ratio", "0.25"]) == 0
    assert (asked["offload"], asked["config"].cache_ratio) == (True, 0.25)
    assert "up to 99 tokens, offloaded, " in capsys.readouterr().out
    assert main(command) == 0
    assert (asked["offload"], asked["config"]) == (False, RetroConfig())
    assert "offloaded" not in capsys.readouterr().out


def test_export_needs_a_compiler(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**BASE))
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(OSError, match=r"no C\+\+ compiler found.*install g\+\+"),
    ):
        export_model(model, tmp_path / "x.pt2", context=99)


STATE = "0.store float32 2x2x1048576x64 {}\n0.counters int64 2x8 device\nstarts int64 2 device"
"""1 GiB, 128 bytes and 16 bytes, the first anywhere."""


@pytest.mark.parametrize(
    ("device", "place", "lacks", "others"),
    [
        ("cpu", "device", "host", 144),
        ("cpu", "host", "host", 144),
        ("cuda:0", "host", "host", 0),
        ("cuda:0", "device", "cuda:0", 144),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    device: str,
    place: str,
    lacks: str,
    others: int,
    llama: tuple[PreTrainedModel, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the byte, by what the helpers say is free, and nothing is allocated."""
    exported = load_exported(llama[1])
    exported.metadata["retro.state"] = STATE.format(place)
    exported.device = torch.device(device)
    free = {"host": 1 << 40, "cuda:0": 1 << 40, lacks: (1 << 30) + others}
    monkeypatch.setattr(wave_buffer, "free_host_bytes", lambda: free["host"])
    monkeypatch.setattr(wave_buffer, "free_device_bytes", lambda device: free[str(device)])
    made: list[Any] = []
    for module, name in ((wave_buffer, "host_tensor"), (torch, "zeros")):
        monkeypatch.setattr(module, name, lambda *args, **options: made.append(args))
    exported.new_state()
    assert len(made) == 3
    free[lacks] -= 1
    with pytest.raises(MemoryError) as error:
        exported.new_state()
    assert len(made) == 3
    said = str(error.value)
    assert f"a state of the package needs 1.00 GiB on {lacks}, 1.00 GiB are free; export" in said
    assert said.endswith("--offload") == (lacks == "cuda:0")
    assert "\n" not in said


def test_a_state_counts_against_a_cgroup(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may leave less than the machine has."""
    for name, text in (
        ("memory.max", "20000000"),
        ("memory.current", "19000000"),
        ("memory.stat", "inactive_file 500000"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(wave_buffer, "CGROUPS", tmp_path)
    with pytest.raises(MemoryError, match=r"MiB on host, 1\.43 MiB are free"):
        load_exported(llama[1]).new_state()


@pytest.mark.parametrize("place", ["device", "host"])
def test_runner_says_that_a_state_does_not_fit(
    place: str, offloaded: tuple[PreTrainedModel, Path], runner: Path, tmp_path: Path
) -> None:
    """4 PiB of it; which does not depend on what memory there is."""
    state = load_exported(offloaded[1]).metadata["retro.state"]
    huge = re.sub(r"(1\.store float32) \S+ \S+", rf"\1 2x1048576x512x1048576 {place}", state)
    assert huge != state
    package = with_metadata(offloaded[1], tmp_path / "huge.pt2", state=huge)
    ran = run_runner(runner, package, "1\n2\n")
    check_refusal(ran, "GiB on the host for its state, which cannot be had; export it with ")
    (gibibytes,) = re.findall(r"needs ([\d.]+) GiB on the host", ran.stderr)
    assert 1 << 22 <= float(gibibytes) < (1 << 22) + 1


@pytest.fixture(scope="session")
def no_kernels(folder: Path) -> Path:
    """An op library with the schemas and the version, as where another library is missing."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    path = folder / "no_kernels.so"
    ran = run_process(
        *(*compiler, "-std=c++20", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
        f'-DRETRO_OPS_VERSION="{retro_ops.__version__}"',
        *(f"-isystem{folder}" for folder in include_paths("cpu")),
        *(ROOT / "csrc" / name for name in ("library.cpp", "library_version.cpp")),
        *("-o", path),
    )
    assert ran.returncode == 0, ran.stderr
    return path


def test_runner_needs_kernels(
    llama: tuple[PreTrainedModel, Path], runner: Path, no_kernels: Path
) -> None:
    """Of the package's device: a GPU's lie in a library of their own."""
    ran = run_runner(runner, llama[1], "1\n2\n", ops=no_kernels)
    words = "was exported for cpu, and no op library with kernels for it is loaded; add --ops "
    check_refusal(ran, words + "retro_ops/_C.abi3.so")
    # With both it runs.
    check_refusal(run_runner(runner, llama[1], "1\n", ops=library()), "got 1 rows")


def test_python_needs_kernels(
    llama: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A torch that sees a GPU, and ops that were built without CUDA."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("retro::append_tokens", "CUDA"):
        pytest.skip("the ops were built with CUDA")
    package = with_metadata(llama[1], tmp_path / "g.pt2", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        ValueError, match=r"exported for cuda, and the ops .* have no kernels for it"
    ):
        load_exported(package)


# Measuring


@pytest.mark.parametrize("case", ["right", "other weights", "offloaded", "no room"])
def test_bench_compares(
    case: str,
    llama: tuple[PreTrainedModel, Path],
    runner: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The package of a model, of one that is not the model in Python, and an offloaded one.

    Where eager Python does not fit in memory, what was measured before it is not lost.
    """
    (model, package), context, config = llama, 2400, RetroConfig()
    other, offload = case == "other weights", case == "offloaded"
    if offload:
        (model, package), context, config = request.getfixturevalue("offloaded"), 200, PAGED
    if other:
        model = make_model(LlamaConfig(**BASE))
        with torch.no_grad():
            model.lm_head.weight[:60].mul_(1.1)

    def export(model: PreTrainedModel, path: Path, **options: Any) -> None:
        assert (options["context"], options["batch_size"]) == (context, 2)
        assert options["offload"] == offload
        shutil.copy(package, path)

    def no_room(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if case == "no room":
        monkeypatch.setattr(bench_export, "_eager", no_room)
    compiled = torch.compile
    monkeypatch.setattr(bench_export, "make_model", lambda *args: model)
    monkeypatch.setattr(bench_export, "export_model", export)
    monkeypatch.setattr(cli_bench, "budgets", lambda options: config)
    monkeypatch.setattr(
        torch, "compile", lambda call, mode, **options: compiled(call, backend="eager", **options)
    )
    file = tmp_path / "rows.json"
    command = ["bench", "export", "--device", "cpu", "--model", "tiny"]
    command += ["--context", str(context - 20), *["--offload"] * offload]
    command += ["--tokens", "20", "--batch", "2", "--runner", str(runner), "--json", str(file)]
    command += ["--folder", str(tmp_path)]
    if other:
        with pytest.raises(SystemExit, match="wrong where a row says so"):
            main(command)
    else:
        assert main(command) == 0
    (row,) = json.loads(file.read_text())
    assert row["ms"] > 0
    assert row["compiled_ms"] > 0
    assert (row["graph"], row["offload"]) == ("no", "yes" if offload else "no")
    if other:
        assert "logits differ by" in row["wrong"]
        assert "from the package's own" not in row["wrong"]
    else:
        assert row["wrong"] == ""
        assert row["equal_tokens"] == row["compiled_tokens"] == 2 * 20
    if case == "no room":
        assert row["note"].startswith("eager does not fit in memory")
        assert "error" not in row
    elif not other:
        assert row["error"] < 1e-5
    assert "running the package without Python" in capsys.readouterr().err


def test_bench_takes_configs_without_head_dim() -> None:
    sizes = {name: size for name, size in BASE.items() if name != "head_dim"}
    model = make_model(Qwen2Config(**sizes))
    assert not hasattr(model.config, "head_dim")
    cache = bench_export._new_cache(model, SMALL, 200, 2, False)
    state = {**state_of(cache), "position": torch.zeros((), dtype=torch.int64)}
    assert state["0.store"].shape[1] == BASE["num_key_value_heads"]
    bench_export._restore(cache, state)


def test_bench_prompts(llama: tuple[PreTrainedModel, Path]) -> None:
    """Of random weights, a recall model and one that reads text: rows of their own."""
    for name in ("llama-3-8b", "recall", "gemma"):
        ids = bench_export.make_prompt(llama[0], name, 2, 200)
        assert ids.shape == (2, 200)
        assert not torch.equal(ids[0], ids[1])
    text = load_tokenizer("gemma").decode(ids[0])
    assert len(set(text.split())) > 20, text
    assert text.isascii()


def test_bench_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "runner"
    program.write_text("#!/bin/sh\necho 'no such op' >&2\nexit 2\n")
    program.chmod(0o755)
    ids = make_prompt(1, 3)
    with pytest.raises(RuntimeError, match=r"the runner ended with status 2: no such op"):
        bench_export.run_runner(program, tmp_path / "x.pt2", ids, 2, timeout=60)
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(RuntimeError, match=r"the runner did not end within 0 s"):
        bench_export.run_runner(program, tmp_path / "x.pt2", ids, 2, timeout=0.2)
    assert main(["bench", "export", "--folder", "/no/such/folder"]) == 2
    assert "--folder must be a folder that is there" in capsys.readouterr().err
    assert main(["bench", "export", "--runner", "/no/such/program"]) == 2
    assert "--runner must be the program retro_runner" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True], ids=["on the GPU", "offloaded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_runner_replays_one_graph(dtype: str, offload: bool, tmp_path: Path) -> None:
    """The recall model past a growth of its index, in a process without Python.

    The same tokens as the package in Python, as a compiled step (but for near ties) and as steps
    that are not recorded.
    """
    file, tokens = tmp_path / "rows.json", 1100
    ran = run_process(
        *(sys.executable, "-m", "retro_ops", "bench", "export", "--device", "cuda"),
        *("--model", "recall", "--context", 2048, "--tokens", tokens, "--dtype", dtype),
        *("--folder", tmp_path, "--json", file, *["--offload"] * offload),
        cwd=ROOT,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (row,) = json.loads(file.read_text())
    assert row["graph"] == "yes"
    assert row["wrong"] == ""
    if dtype == "float32":
        assert row["equal_tokens"] == tokens

    model = load_model("recall", dtype=getattr(torch, dtype), device="cuda")
    ids = bench_export.make_prompt(model, "recall", 1, 2048)
    (package,) = tmp_path.glob("*.pt2")
    program = bench_export.runner_program()
    recorded = bench_export.run_runner(program, package, ids, 40, timeout=120)
    plain = bench_export.run_runner(program, package, ids, 40, "--no-graph", timeout=120)
    assert recorded.graph
    assert not plain.graph
    assert torch.equal(recorded.tokens, plain.tokens)

    ran = run_process(program, package, "--ops", library(), input=as_lines(ids))
    check_refusal(ran, "was exported for cuda, and no op library with kernels for it is loaded")
    assert ran.stderr.endswith("add --ops retro_ops/_C_cuda.abi3.so\n")


@pytest.mark.gpu
def test_gpu_program_of_ones_own(tmp_path: Path) -> None:
    """Tokens as in Python; one stream, and no memory, is left by packages that come and go."""
    model, package = load_model("recall", dtype=torch.float32, device="cuda"), tmp_path / "a.pt2"
    export_model(model, package, context=1024)
    build_programs((PROGRAM, tmp_path / "program"))
    kernels = find_library("_C_cuda")
    assert kernels is not None
    ids, exported = make_prompt(1, 30), load_exported(package)
    expected = exported.generate(ids, 5, eos=[])[0].tolist()
    assert (
        written_by_program(tmp_path / "program", package, ids[0], [library(), kernels]) == expected
    )


EXIT = """
import sys
import torch
from retro_ops.models import load_exported

exported = load_exported(sys.argv[1])
state = exported.new_state()
exported.prefill(torch.arange(1, 1301)[None] % 97 + 300, state)
token = torch.full((1, 1), 300)
for _ in range(200):
    exported.decode(token, state)
print("done")
"""


@pytest.mark.gpu
def test_gpu_offloaded_package(tmp_path: Path) -> None:
    """Its tokens are those of the package that is not, and of `generate` with the same cache.

    The store lies in the host's memory, and no step copies it; a process may end while threads of
    the host decide about pages.
    """
    context, new_tokens = 16384, 40
    config = RetroConfig(cache_ratio=0.05)
    model = load_model("recall", dtype=torch.float32, device="cuda")
    packages = {name: tmp_path / f"{name}.pt2" for name in ("plain", "offloaded")}
    for name, package in packages.items():
        export_model(model, package, context=context, config=config, offload=name == "offloaded")
    program = bench_export.runner_program()
    before = torch.cuda.memory_allocated()
    exported = load_exported(packages["offloaded"])
    weights = torch.cuda.memory_allocated() - before
    assert weights > 1e7
    like = torch.empty(0, device="cuda")
    pinned, allocated = torch.ops.retro.host_bytes(like), torch.cuda.memory_allocated()
    state = exported.new_state()
    lines = [line.split() for line in exported.metadata["retro.state"].splitlines()]
    hosts = [state[word[0]] for word in lines if word[3] == "host"]
    held = sum(tensor.nbytes for tensor in state.values())
    on_host = sum(tensor.nbytes for tensor in hosts)
    assert on_host > held / 3
    assert torch.ops.retro.host_bytes(like) - pinned >= on_host
    # The allocator rounds up, by 511 bytes a tensor.
    assert torch.cuda.memory_allocated() - allocated <= held - on_host + 512 * len(state)

    for seed, prompt in enumerate((4096, 1, 12000, 2048)):
        torch.manual_seed(seed)
        ids = (
            bench_export.make_prompt(model, "recall", 1, prompt)
            if prompt > 1
            else like.new_ones(1, 1, dtype=torch.int64).cpu()
        )
        cache = RetroCache(model.config, config, max_cache_len=context, offload=True)
        expected = generate(
            model, ids.cuda(), config, new_tokens, cache, eos_token_id=None, disable_compile=True
        ).cpu()
        # One state, conversation after conversation.
        assert torch.equal(exported.generate(ids, new_tokens, state, eos=[]), expected), prompt
        for name, package in packages.items():
            ran = bench_export.run_runner(program, package, ids, new_tokens, timeout=120)
            assert ran.graph, name
            assert torch.equal(ran.tokens, expected), (name, prompt)
        ran = bench_export.run_runner(
            program, packages["offloaded"], ids, new_tokens, "--no-graph", timeout=120
        )
        assert not ran.graph
        assert torch.equal(ran.tokens, expected), prompt
    layers = {word[0].partition(".")[0] for word in lines if word[0].endswith(".store")}
    counters = sum(state[f"{layer}.counters"] for layer in layers)
    assert int(counters[0, Counter.PAGE_MISSES]) > 0
    assert int(counters[0, Counter.PAGE_HITS]) > 0

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    exported.decode(ids[:, :1], state)
    torch.cuda.synchronize()
    smallest = min(state[word[0]].nbytes for word in lines if word[0].endswith(".store"))
    assert torch.cuda.max_memory_allocated() - before < smallest / 2

    del state, hosts, counters, cache
    gc.collect()
    assert torch.ops.retro.host_bytes(like) <= pinned
    before = torch.cuda.memory_allocated()
    del exported
    gc.collect()
    assert before - torch.cuda.memory_allocated() >= weights
    ran = run_process(sys.executable, "-c", EXIT, packages["offloaded"], cwd=tmp_path, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
