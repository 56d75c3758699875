"""A model as a package, run without Python, beside the same model compiled in Python."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro_ops import RetroConfig
from retro_ops._library import find_library
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.prefill import make_model as make_random_model
from retro_ops.benchmarks.recordings import check_model, token_ids
from retro_ops.benchmarks.timing import memory_note, synchronize
from retro_ops.models import RetroCache, export_model, load_exported, load_model
from retro_ops.models.export import state_of
from retro_ops.models.load import load_tokenizer
from retro_ops.models.recall import is_recall, make_task
from retro_ops.models.shapes import SHAPES
from retro_ops.models.support import head_dim_of

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    *("model", "layers", "dtype", "context", "batch", "tokens", "offload", "graph", "ms"),
    *("compiled_ms", "ratio", "equal_tokens", "compiled_tokens", "worst_gap", "error"),
    *("eager_error", "export_s", "gb", "load_s", "prompt_s", "note", "wrong"),
)
"""What a table shows of a row; the machine is in its title."""
RATIO = 1.05
"""What a step of the runner may cost, compared with one that is compiled in Python."""
UNEXPLAINED = 1e-3
"""Relative difference of float32 logits that rounding does not explain, even where it moves a token
to another cluster; there are no exact ones to compare with."""
WARM_UP = 3
"""Compiled steps that are not timed: the first compiles, two more record a CUDA graph."""


@dataclass
class Ran:
    """What the runner wrote, and its times."""

    tokens: Tensor
    load_ms: float
    prompt_ms: float
    step_ms: float
    graph: bool


def runner_program() -> Path:
    """The runner for the torch that is installed, built from the checkout if it is not there.

    Raises:
        FileNotFoundError: there is no checkout, or it does not build.
    """
    program = ROOT / "build" / f"torch-{torch.__version__}" / "retro_runner"
    sources = [ROOT / "setup.py", *(ROOT / "csrc" / "runner").glob("*")]
    if not sources[0].is_file():
        raise FileNotFoundError(
            "bench export: the runner is built from a checkout, and this is none; name one with "
            "--runner"
        )
    newest = max(path.stat().st_mtime for path in sources)
    if program.is_file() and program.stat().st_mtime > newest:
        return program
    # Another process may build it, too.
    own = program.with_name(f"retro_runner.{os.getpid()}")
    built = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_runner", "--output", str(own)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if built.returncode:
        raise FileNotFoundError(f"bench export: the runner does not build: {built.stderr[-2000:]}")
    own.replace(program)
    return program


def run_runner(
    program: Path, package: Path, ids: Tensor, new_tokens: int, *options: str, timeout: float
) -> Ran:
    """Runs a package without Python, on rows of ids `[B, T]`.

    Args:
        timeout: seconds.

    Raises:
        RuntimeError: it failed, or did not end in time.
    """
    libraries = [path for stem in ("_C", "_C_cuda") if (path := find_library(stem))]
    if not torch.version.cuda:
        libraries = libraries[:1]
    command = [str(program), str(package), "--new-tokens", str(new_tokens), "--eos", "none"]
    command += [word for path in libraries for word in ("--ops", str(path))]
    if torch.version.cuda is None or not torch.cuda.is_initialized():
        command += ["--threads", str(torch.get_num_threads())]
    # torch may have loaded CUDA's libraries from where a program without Python would not look.
    folders = [*_cuda_folders(), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    lines = "".join(" ".join(map(str, row)) + "\n" for row in ids.tolist())
    try:
        ran = subprocess.run(
            [*command, *options],
            input=lines,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "LD_LIBRARY_PATH": ":".join(folders)},
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"bench export: the runner did not end within {timeout:.0f} s; it had written "
            f"{error.stderr!r} and {len(error.stdout or b'')} bytes of tokens"
        ) from error
    said = re.search(
        r"load (\d+) ms, prompt of \d+ tokens ([\d.]+) ms, then ([\d.]+) ms per token", ran.stderr
    )
    if ran.returncode or said is None:
        raise RuntimeError(
            f"bench export: the runner ended with status {ran.returncode}: {ran.stderr[-2000:]}"
        )
    tokens = torch.tensor([list(map(int, line.split())) for line in ran.stdout.splitlines()])
    load, prompt, step = map(float, said.groups())
    return Ran(tokens, load, prompt, step, "one CUDA graph" in ran.stderr)


def _cuda_folders() -> list[str]:
    """Where this process has loaded libraries of CUDA from, except torch's own folder."""
    maps = Path("/proc/self/maps")
    if not torch.version.cuda or not maps.is_file():
        return []
    # The driver's own, libcuda and libnvidia, lie where every program looks.
    pattern = r"(/\S+)/lib(?:cu(?!da\.)|nv(?!idia)|nccl)[^/\s]*\.so[^/\s]*$"
    return sorted(set(re.findall(pattern, maps.read_text(), re.MULTILINE)))


def make_model(
    name: str, dtype: torch.dtype, device: torch.device, layers: int | None, context: int
) -> PreTrainedModel:
    """A model of random weights in the shape `name`, or one as in `load_model`."""
    if name not in SHAPES:
        return load_model(name, dtype=dtype, device=device, context=context)
    config = SHAPES[name]()
    config.max_position_embeddings = 1 << 21
    config.bos_token_id = config.eos_token_id = None
    torch.manual_seed(0)
    return make_random_model(config, dtype, device, layers)


def make_prompt(model: PreTrainedModel, name: str, rows: int, tokens: int) -> Tensor:
    """`[B, tokens]`: a task for a recall model, random tokens for random weights, or a text."""
    if is_recall(name):
        records = max(tokens // 64, 1)
        body, questions, _ = make_task(
            context=tokens - 3, records=records, questions=1, batch_size=rows
        )
        return torch.cat((body, questions[:, 0]), dim=1)
    if name not in SHAPES:
        return token_ids(load_tokenizer(name), "prose", tokens, rows=rows)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, model.config.vocab_size, (rows, tokens), generator=generator)


class Steps:
    """A model in Python, fed a token of each row at a time."""

    def __init__(self, model: PreTrainedModel, cache: RetroCache, *, compiled: bool) -> None:
        self.cache = cache
        self._ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=model.device)
        self._forward: Callable[..., Any] = model.forward
        if compiled:
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self._forward = torch.compile(model.forward, mode=mode, fullgraph=True, dynamic=False)

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits `[B, V]`, which the next step may overwrite."""
        self._ids.copy_(ids)
        return self._forward(
            input_ids=self._ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]


def forced(step: Callable[[Tensor], Tensor], first: Tensor, tokens: Tensor) -> Tensor:
    """Logits `[M, B, V]` float32 on the CPU where tokens `[B, M]` are written, whatever is best.

    Args:
        step: takes `[B, 1]`, gives `[B, V]`.
        first: `[B, V]`, of the first token.
        tokens: `[B, M]`.
    """
    logits = [first.float().cpu()]
    for t in range(tokens.shape[1] - 1):
        logits.append(step(tokens[:, t : t + 1]).float().cpu())
    return torch.stack(logits)


def relative(logits: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact logits, without their mean."""
    spread = exact - exact.mean(dim=-1, keepdim=True)
    return float((logits - exact).norm() / spread.norm())


def worst_gap(logits: Tensor, tokens: Tensor) -> float:
    """How far tokens `[B, M]` are at most from the best by logits `[M, B, V]`.

    In units of the standard deviation of the logits: 0 if each of them is the best.
    """
    own = logits.gather(2, tokens.T[:, :, None])[:, :, 0]
    return float(((logits.amax(dim=2) - own) / logits.std(dim=2)).max())


def run(
    *,
    device: torch.device,
    models: Sequence[str],
    dtypes: Sequence[torch.dtype],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    tokens: int,
    layers: int | None,
    config: RetroConfig,
    offload: bool,
    runner: Path | None,
    folder: Path | None,
    exact: bool,
    timeout: float,
    progress: Callable[[str], None],
) -> Iterator[list[dict[str, object]]]:
    """A row of figures for one combination after another; see `docs/export.md`.

    `wrong` is empty where the runner wrote the tokens of the package in Python, and those of the
    compiled model but for near ties, and logits are within the error budget. `note` says what else
    is not as it should be.

    Args:
        device: where to.
        models: names of `SHAPES`, or models as in `load_model`.
        dtypes, contexts, batch_sizes: of the package; a context is the length of the prompt.
        tokens: generated after it.
        layers: of models with random weights; None: as many as the shape has.
        config: budgets and sizes.
        offload: KV stores in slow memory, of the package and in Python.
        runner: the program; None: build it.
        folder: keeps the packages; None: they go.
        exact: compare with float32 too, where `dtype` is another: without it there is no error
            budget.
        timeout: seconds that the runner may take.
        progress: told what is being done.

    Raises:
        FileNotFoundError, ValueError: as in `check_model`; nothing is measured then.
    """
    for name in models:
        if name not in SHAPES:
            check_model(name, max(contexts) + tokens, others=SHAPES)
    facts = machine.facts(device)
    progress("building the runner")
    program = runner_program() if runner is None else runner
    for name in models:
        for dtype in dtypes:
            for context in contexts:
                for rows in batch_sizes:
                    with TemporaryDirectory() as temporary:
                        row = _case(
                            *(name, dtype, context, rows, tokens, layers, device, config, program),
                            offload=offload,
                            folder=Path(temporary) if folder is None else folder,
                            exact=exact,
                            timeout=timeout,
                            progress=progress,
                        )
                    torch.compiler.reset()
                    _free(device)
                    yield [{**row, **facts}]


def _case(
    name: str,
    dtype: torch.dtype,
    context: int,
    rows: int,
    tokens: int,
    layers: int | None,
    device: torch.device,
    config: RetroConfig,
    program: Path,
    *,
    offload: bool,
    folder: Path,
    exact: bool,
    timeout: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    notes: list[str] = []
    progress(f"making {name}")
    capacity = context + tokens
    model = make_model(name, dtype, device, layers, capacity)
    ids = make_prompt(model, name, rows, context)
    short = str(dtype).removeprefix("torch.")
    words = (*name.strip("/").split("/"), short, context, rows, *["offload"] * offload)
    package = folder / f"{'-'.join(map(str, words))}.pt2"

    def new_cache() -> RetroCache:
        return _new_cache(model, config, capacity, rows, offload)

    _check_disk(folder, model)

    begin = time.perf_counter()
    export_model(
        model,
        package,
        context=capacity,
        batch_size=rows,
        config=config,
        offload=offload,
        name=name,
        progress=lambda what, done, total: progress(what),
    )
    export_seconds = time.perf_counter() - begin
    # The runner has the GPU nearly to itself: two copies of the weights at a time are enough.
    _free(device)
    progress("running the package without Python")
    ran = run_runner(program, package, ids, tokens, timeout=timeout)
    progress(
        f"the runner took {ran.load_ms / 1e3:.1f} s to load, {ran.prompt_ms / 1e3:.2f} s for the "
        f"prompt, {ran.step_ms:.3f} ms per token, {'with a' if ran.graph else 'without'} CUDA graph"
    )

    progress("running the package in Python")
    of_package, first, prompt_state = _in_python(package, ids, ran.tokens)
    _free(device)
    progress("compiling the step in Python")
    of_compiled, written, milliseconds = _compiled(
        model, new_cache(), first, prompt_state, ran.tokens
    )
    torch.compiler.reset()
    _free(device)
    progress(f"a compiled step took {milliseconds:.3f} ms; running eager Python")

    def eager(
        what: str, made: Callable[[], PreTrainedModel], state: dict[str, Tensor] | None
    ) -> Tensor | None:
        """None, with a note, where there is no room: what is known by then is not lost."""
        try:
            return _eager(made(), new_cache(), ids, ran.tokens, state)
        except (MemoryError, RuntimeError) as no_memory:
            notes.append(f"{what} {memory_note(no_memory)}")
            return None

    # In float32 it goes on from the same clusters: there is no budget for others.
    same = prompt_state if dtype == torch.float32 else None
    of_eager = eager("eager", lambda: model, same)
    del prompt_state, same
    of_float32 = None
    if exact and dtype != torch.float32:
        progress("running in float32")
        _free(device)
        of_float32 = eager("float32", model.float, None)

    wrong = []
    package_gap = worst_gap(of_package, ran.tokens)
    if not package_gap <= 6 * torch.finfo(dtype).eps:
        wrong.append(f"the runner wrote a token {package_gap:.2g} from the package's own in Python")
    exact_logits = of_eager if of_float32 is None else of_float32
    error = None if exact_logits is None else relative(of_package, exact_logits)
    eager_error, allowed = None, UNEXPLAINED if dtype == torch.float32 else float("inf")
    if of_eager is not None and of_float32 is not None:
        eager_error = relative(of_eager, of_float32)
        allowed = 2 * (eager_error + torch.finfo(dtype).eps)
    if error is not None and not error <= allowed:
        wrong.append(f"logits differ by {error:.2g}, {allowed:.2g} is allowed")
    gap, difference = worst_gap(of_compiled, ran.tokens), relative(of_package, of_compiled)
    # Six standard deviations of the difference of two logits are no tie any more.
    if not gap <= 6 * difference:
        wrong.append(f"a token is {gap:.2g} from the best, logits differ by {difference:.2g} only")
    ratio = ran.step_ms / milliseconds
    if ratio > RATIO:
        notes.append(f"slower than {RATIO} x compiled")
    if device.type == "cuda" and not ran.graph:
        notes.append("no CUDA graph")
    best = of_compiled.argmax(dim=2).T
    return {
        "model": name,
        "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "dtype": short,
        "context": context,
        "batch": rows,
        "tokens": tokens,
        "offload": "yes" if offload else "no",
        "graph": "yes" if ran.graph else "no",
        "ms": ran.step_ms,
        "compiled_ms": milliseconds,
        "ratio": ratio,
        # Out of `tokens * batch`: behind the runner's tokens, and behind those of its own.
        "equal_tokens": int((best == ran.tokens).sum()),
        "compiled_tokens": int((written == ran.tokens).sum()),
        "worst_gap": gap,
        "difference": difference,
        **({} if error is None else {"error": error}),
        **({} if eager_error is None else {"eager_error": eager_error}),
        "export_s": export_seconds,
        "gb": package.stat().st_size / 1e9,
        "load_s": ran.load_ms / 1e3,
        "prompt_s": ran.prompt_ms / 1e3,
        "note": "; ".join(notes),
        "wrong": "; ".join(wrong),
    }


@torch.inference_mode()
def _in_python(
    package: Path, ids: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits of forced tokens by a package, those of the first, and the state after the prompt.

    The state lies on the host.
    """
    exported = load_exported(package)
    state = exported.new_state()
    first = exported.prefill(ids, state).clone()
    # The GPU has the weights and a state of the model in Python beside it later on.
    prompt_state = {key: tensor.to("cpu", copy=True) for key, tensor in state.items()}
    return forced(lambda one: exported.decode(one, state), first, tokens), first, prompt_state


@torch.inference_mode()
def _compiled(
    model: PreTrainedModel,
    cache: RetroCache,
    first: Tensor,
    state: dict[str, Tensor],
    tokens: Tensor,
) -> tuple[Tensor, Tensor, float]:
    """Logits of forced tokens by a compiled step, tokens of its own choice, and its milliseconds.

    It begins with the state of the package after the prompt: a prompt is not compiled in Python.
    """
    step = Steps(model, cache, compiled=True)
    _restore(cache, state)
    for _ in range(WARM_UP):
        step(tokens[:, :1])
    _restore(cache, state)
    chosen = first.argmax(dim=1, keepdim=True)
    written, seconds = [chosen.cpu()], []
    synchronize(model.device)
    begin = time.perf_counter()
    while len(written) < tokens.shape[1]:
        chosen = step(chosen).argmax(dim=1, keepdim=True)
        written.append(chosen.cpu())  # on the host, as the runner's
        end = time.perf_counter()
        seconds.append(end - begin)
        begin = end
    _restore(cache, state)
    milliseconds = 1e3 * float(torch.tensor(seconds).median())
    return forced(step, first, tokens), torch.cat(written, dim=1), milliseconds


@torch.inference_mode()
def _eager(
    model: PreTrainedModel,
    cache: RetroCache,
    ids: Tensor,
    tokens: Tensor,
    state: dict[str, Tensor] | None,
) -> Tensor:
    """Logits of forced tokens by the model as it is, the prompt included.

    Args:
        state: after the prompt, to go on from; None: the model's own.
    """
    out = model(
        input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    if state is not None:
        _restore(cache, state)
    return forced(Steps(model, cache, compiled=False), out.logits[:, -1], tokens)


def _new_cache(
    model: PreTrainedModel, config: RetroConfig, capacity: int, rows: int, offload: bool
) -> RetroCache:
    """Allocated, and empty."""
    cache = RetroCache(
        model.config, config, max_cache_len=capacity, batch_size=rows, offload=offload
    )
    text_config = model.config.get_text_config(decoder=True)
    cache.early_initialization(
        *(rows, text_config.num_key_value_heads, head_dim_of(text_config)),
        *(model.dtype, model.device),
    )
    return cache


def _restore(cache: RetroCache, state: dict[str, Tensor]) -> None:
    """Puts the state of a package, after a prompt, into a cache."""
    for key, tensor in state_of(cache).items():
        tensor.copy_(state[key])
    for layer in cache.layers:
        layer.cumulative_length.copy_(state["position"])
        layer.is_filled = True


def _check_disk(folder: Path, model: PreTrainedModel) -> None:
    needed = 1.1 * sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"bench export: a package of {needed / 1e9:.1f} GB does not fit in {folder}, which has "
            f"{free / 1e9:.1f} GB; name another --folder, or fewer --layers"
        )


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
