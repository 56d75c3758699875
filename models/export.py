"""A whole model as two compiled programs in one file that run without Python.

`export_model` traces the prompt and the step of a model with retro attention, compiles both with
AOTInductor and writes one package. All that changes from token to token is in tensors that both
programs take as inputs, so they share it, and one package serves any number of conversations.
`load_exported` runs a package in Python; the runner in `csrc/runner/` runs it without.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export.pt2_archive._package import load_pt2, package_pt2
from transformers import PreTrainedModel

from retro_ops import RetroConfig, RetroLayer
from retro_ops.models.attention import NAME
from retro_ops.models.cache import RetroCache, RetroCacheLayer
from retro_ops.models.memory import HOST as HOST_MEMORY
from retro_ops.models.memory import host_buffers, in_gib, lacking, place_of
from retro_ops.models.rope import longest_context

FORMAT = "3"
"""Of the metadata and the weights; the runner in `csrc/runner/` has the same number."""
PROGRAMS = ("decode", "prefill")
OP = "append_tokens"
"""Which every program calls: where it has no kernel for a device, a library is missing."""
MIN_CONTEXT = 16
"""Tokens; a program for prompts of any length is no program for prompts of one length."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
"""Types of state and weights by the names that a package has for them."""

State = dict[str, Tensor]
"""What a conversation has come to, by name: `layer.tensor` for every layer, then `position` and
`starts`."""

DEVICE, HOST = "device", "host"
"""Where a tensor of the state lies, in the words of a package; on a CPU that is one memory."""


class Program(nn.Module):
    """Tokens and state in, logits out: what is traced, once for a prompt and once for a step.

    Args:
        model: with retro attention.
        cache: of the model, allocated; its tensors give way to those of the state.
        context: tokens that a row can hold.
    """

    def __init__(self, model: PreTrainedModel, cache: RetroCache, context: int) -> None:
        super().__init__()
        self.model = model
        self._cache = cache
        self._context = context

    def forward(self, ids: Tensor, state: State) -> Tensor:
        """The logits that follow `ids`; the state changes in place.

        Args:
            ids: `[B, T]` int64. More than one token is a prompt: what the state held is forgotten.
            state: as `state_of` gives it. `starts` says how many tokens of each row, at the
                beginning of a prompt, are padding: 0 <= starts < T.

        Returns:
            `[B, V]` in the dtype of the model.
        """
        position, starts = state["position"], state["starts"][:, None]
        tokens = ids.shape[1]
        if tokens > 1:
            position.zero_()
        place = torch.arange(tokens, device=ids.device) + position
        # A step has a mask of fixed size, for sliding windows: later tokens are not looked at. A
        # row comes to hold `context` tokens besides its padding, of which there are fewer.
        known = torch.arange(tokens if tokens > 1 else 2 * self._context, device=ids.device)
        with _attached(self._cache, state):
            out = self.model(
                input_ids=ids,
                attention_mask=known >= starts,
                # As `generate` counts, from the first real token of each row.
                position_ids=(place - starts).clamp(min=0),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        position.add_(tokens)
        return out.logits[:, -1]


def state_of(cache: RetroCache) -> State:
    """The tensors of an allocated cache, the cache's own.

    Layers that count tokens do so in step: one `position` stands for all of them.
    """
    state: State = {}
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RetroCacheLayer):
            assert layer.retro is not None
            state |= {f"{number}.{name}": tensor for name, tensor in layer.retro.named_buffers()}
        else:
            state |= {f"{number}.keys": layer.keys, f"{number}.values": layer.values}
    state["position"] = cache.layers[0].cumulative_length
    state["starts"] = state["position"].new_zeros(cache.batch_size)
    return state


def _on_host(cache: RetroCache) -> set[str]:
    """Names of tensors of the state that an offloaded cache on a GPU has in the host's memory."""
    return {
        f"{number}.{name}"
        for number, layer in enumerate(cache.layers)
        for name in host_buffers(layer)
    }


@contextmanager
def _attached(cache: RetroCache, state: State) -> Iterator[None]:
    """Has a cache work on other tensors than its own, every layer as if it were new."""
    kept = []
    for number, layer in enumerate(cache.layers):
        kept.append(dict(vars(layer)))
        if isinstance(layer, RetroCacheLayer):
            assert layer.retro is not None
            kept[-1]["retro"] = dict(layer.retro._buffers)
            for name in layer.retro._buffers:
                layer.retro._buffers[name] = state[f"{number}.{name}"]
        else:
            layer.keys, layer.values = state[f"{number}.keys"], state[f"{number}.values"]
        # Each layer counts by itself: a copy, which nobody looks at afterwards.
        layer.cumulative_length = state["position"].clone()
        layer.is_filled = False
    try:
        yield
    finally:
        for layer, had in zip(cache.layers, kept, strict=True):
            if isinstance(layer, RetroCacheLayer):
                assert layer.retro is not None
                layer.retro._buffers.update(had.pop("retro"))
            vars(layer).update(had)


def export_model(
    model: PreTrainedModel,
    path: str | Path,
    *,
    context: int,
    batch_size: int = 1,
    config: RetroConfig | None = None,
    offload: bool = False,
    name: str = "",
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, str]:
    """Writes a model as a package of two programs: prompts of any length, and a step.

    The package is for the device, the dtype and the attention implementation of `model`, and for
    the version of the op library that is loaded now.

    Args:
        model: on its device, ready for inference; it is set to retro attention.
        path: the file to write, `*.pt2`.
        context: N, tokens that a row can hold, prompt and generated ones.
        batch_size: B, rows; a package has one number of rows.
        config: budgets and sizes; None: the defaults.
        offload: KV stores in slow memory behind page caches, as of `RetroCache`.
        name: of the model, for the record.
        progress: told what is being done, steps done, steps in all.

    Returns:
        The metadata of the package: see `docs/export.md`.

    Raises:
        ValueError: a number is out of range, or retro attention cannot serve the model.
        OSError: there is no C++ compiler, or no folder for the package.
        MemoryError: the state of a conversation does not fit in the memory here.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"a package must be a file *.pt2, got {str(path)!r}")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise FileNotFoundError(
            f"cannot write {str(path)!r}: '{path.parent}' is no folder that can be written to"
        )
    if context < MIN_CONTEXT or batch_size < 1:
        raise ValueError(
            f"context must be at least {MIN_CONTEXT} tokens and batch_size at least 1, "
            f"got {context} and {batch_size}"
        )
    text_config = model.config.get_text_config(decoder=True)
    limit = longest_context(model.config)
    if limit is not None and context > limit:
        raise ValueError(
            f"a context of {context} tokens exceeds the {limit} that the model reads; "
            "export it with a smaller one"
        )
    devices = sorted({str(each.device) for each in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"a package is for one device, the model is spread over {', '.join(devices)}; load it "
            "on one"
        )
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() before")
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise OSError(
            "no C++ compiler found, which AOTInductor needs; install g++, or name one in the "
            "environment variable CXX"
        ) from error
    config = RetroConfig() if config is None else config
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()  # a package keeps no strides
    model.set_attn_implementation(NAME)
    cache = RetroCache(
        model.config, config, max_cache_len=context, batch_size=batch_size, offload=offload
    )
    if not cache.retro_layers:
        raise ValueError(
            f"{type(model).__name__} has no full-attention layers, so there is nothing to export "
            "with retro attention"
        )
    progress("looking at the model", 0, 5)
    # The model allocates its cache, and refuses what it cannot do before it is traced.
    ids = torch.zeros(batch_size, context - 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model(input_ids=ids[:, :2], past_key_values=cache, use_cache=True, logits_to_keep=1)
    state, on_host = state_of(cache), _on_host(cache)

    metadata = {
        "retro.format": FORMAT,
        "retro.ops": torch.ops.retro.library_version(),
        "retro.model": name,
        "retro.context": str(context),
        "retro.batch_size": str(batch_size),
        "retro.vocabulary": str(text_config.vocab_size),
        **_end_tokens(model),
        "retro.dtype": str(model.dtype).removeprefix("torch."),
        "retro.device": model.device.type,
        "retro.config": json.dumps(dataclasses.asdict(config)),
        "retro.torch": torch.__version__,
        "retro.offload": "yes" if offload else "no",
        "retro.state": "\n".join(
            f"{key} {_described(value)} {HOST if key in on_host else DEVICE}"
            for key, value in state.items()
        ),
    }
    weights: dict[str, dict[str, Tensor]] = {}
    files: dict[str, Any] = {}
    options = {
        "aot_inductor.package": True,
        # Once for both programs, beside them: `_write_weights`.
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": metadata,
        # As many threads as the process that runs it has, not as this one. For one thread torch
        # leaves out what keeps several from each adding to a counter.
        "cpp.dynamic_threads": True,
        "cpp.threads": max(torch.get_num_threads(), 2),
    }
    prompt = {1: torch.export.Dim("prompt", min=2, max=context)}
    program = Program(model, cache, context)
    for step, which in enumerate(PROGRAMS):
        example = ids[:, :1] if which == "decode" else ids
        sizes = {} if which == "decode" else prompt
        progress(f"tracing {which}", 1 + 2 * step, 5)
        with warnings.catch_warnings(), torch.no_grad():
            # Of torch about itself.
            warnings.simplefilter("ignore", FutureWarning)
            traced = torch.export.export(
                program,
                (example.contiguous(), state),
                dynamic_shapes=(sizes, dict.fromkeys(state)),
                strict=False,
                # What torch cannot prove of all lengths at once is looked at when it runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            weights[which] = {**traced.state_dict, **traced.constants}
            progress(f"compiling {which}", 2 + 2 * step, 5)
            arguments, _ = traced.example_inputs
            files[which] = torch._inductor.aot_compile(
                traced.module(), arguments, options=dict(options)
            )
    progress("writing", 5, 5)
    package_pt2(str(path), aoti_files=files)
    programs = load_pt2(str(path)).aoti_runners
    _write_weights(
        path,
        {
            (which, fqn): weights[which][fqn].detach()
            for which in PROGRAMS
            for fqn in sorted(programs[which].get_constant_fqns())
        },
    )
    return metadata


def _end_tokens(model: PreTrainedModel) -> dict[str, str]:
    """The tokens after which `generate` ends a row, and the one that it writes from there on."""
    settings = model.generation_config
    ends = settings.eos_token_id if settings is not None else model.config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    fill = settings.pad_token_id if settings is not None else model.config.pad_token_id
    if fill is None:
        fill = ends[0] if ends else 0
    return {"retro.eos": " ".join(map(str, ends)), "retro.pad": str(fill)}


def _described(tensor: Tensor) -> str:
    """The dtype and shape of a tensor, e.g. `float32 2x1x8x64`, and `float32 -` for a scalar."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {'x'.join(map(str, tensor.shape)) or '-'}"


def _made(description: str) -> tuple[torch.dtype, list[int]]:
    dtype, _, shape = description.partition(" ")
    return DTYPES[dtype], [] if shape == "-" else [int(size) for size in shape.split("x")]


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, which must outlive it.

    Of torch's own ways there is one, through NumPy, and it forbids for good to free the memory.
    """
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _write_weights(path: Path, weights: Mapping[tuple[str, str], Tensor]) -> None:
    """Adds weights to a package: their bytes, and a list of `program name record dtype shape`."""
    lines = []
    records: dict[tuple[Any, ...], str] = {}
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        (root,) = {name.partition("/")[0] for name in archive.namelist()}
        for (which, fqn), tensor in weights.items():
            if not tensor.is_contiguous():
                raise RuntimeError(
                    f"weight {fqn} has strides {tensor.stride()}, which a package does not keep"
                )
            same = (tensor.data_ptr(), tensor.dtype, tensor.shape)
            if same not in records:
                records[same] = f"weights/{len(records)}"
                on_host = tensor.cpu()
                with archive.open(f"{root}/{records[same]}", "w", force_zip64=True) as record:
                    record.write(_bytes(on_host))
            lines.append(f"{which} {fqn} {records[same]} {_described(tensor)}")
        archive.writestr(f"{root}/weights/list", "\n".join(lines))


def _read_weights(path: Path, device: torch.device) -> dict[str, dict[str, Tensor]]:
    weights: dict[str, dict[str, Tensor]] = {which: {} for which in PROGRAMS}
    records: dict[str, Tensor] = {}
    with zipfile.ZipFile(path) as archive:
        (root,) = {name.partition("/")[0] for name in archive.namelist()}
        for line in archive.read(f"{root}/weights/list").decode().splitlines():
            which, fqn, record, description = line.split(" ", 3)
            if record not in records:
                dtype, shape = _made(description)
                whole = torch.empty(shape, dtype=dtype)
                plain = _bytes(whole)
                with archive.open(f"{root}/{record}") as file:
                    done = 0
                    while done < len(plain):
                        done += file.readinto(plain[done:])  # type: ignore[attr-defined]
                records[record] = whole.to(device)
            weights[which][fqn] = records[record]
    return weights


def _free(weights: Sequence[Tensor]) -> None:
    """Frees the memory of weights that an AOTInductor program has pointed to.

    Such a program takes a reference to each tensor that is `user_managed`, which it never gives
    back, whatever becomes of it and of the caller's own.
    """
    for tensor in weights:
        tensor.untyped_storage().resize_(0)  # no op, which a mode of torch might take for its own


class ExportedModel:
    """A package in this process; make it with `load_exported`.

    Attributes:
        metadata: what the package says of itself.
        context: N, tokens that a row can hold.
        batch_size: B, rows.
        offload: whether KV stores lie in slow memory.
        vocabulary: V, tokens that there are.
        eos: the tokens that end a row.
        pad: the token that stands behind the end of a row.
        device: where it runs.

    The weights are freed when it goes away.
    """

    def __init__(
        self,
        metadata: dict[str, str],
        programs: dict[str, Any],
        weights: Mapping[str, dict[str, Tensor]],
        device: torch.device,
    ) -> None:
        self.metadata = metadata
        self.context = int(metadata["retro.context"])
        self.batch_size = int(metadata["retro.batch_size"])
        self.offload = metadata["retro.offload"] == "yes"
        self.vocabulary = int(metadata["retro.vocabulary"])
        self.eos = tuple(map(int, metadata["retro.eos"].split()))
        self.pad = int(metadata["retro.pad"])
        self.device = device
        self._programs = programs
        tensors = [tensor for of_program in weights.values() for tensor in of_program.values()]
        weakref.finalize(self, _free, tensors).atexit = False
        for which, program in programs.items():
            program.load_constants(weights[which], check_full_update=True, user_managed=True)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an ExportedModel cannot be copied or pickled; call load_exported again")

    def new_state(self) -> State:
        """The state of a conversation that has not begun.

        Raises:
            MemoryError: host or device have no room for it; nothing is allocated then.
            RuntimeError: there seemed to be room, and an allocation failed.
        """
        self._check_room()
        state = {}
        for name, dtype, shape, place in self._tensors():
            if place == HOST:
                state[name] = RetroLayer.host_tensor(tuple(shape), dtype, self.device)
            else:
                state[name] = torch.zeros(shape, dtype=dtype, device=self.device)
        if self.offload:  # all zeros are an empty index, but no empty page cache
            for layer in {key.partition(".")[0] for key in state if key.endswith(".page_table")}:
                RetroLayer.empty_page_cache(
                    {
                        name.removeprefix(f"{layer}."): tensor
                        for name, tensor in state.items()
                        if name.startswith(f"{layer}.")
                    }
                )
        return state

    def _tensors(self) -> Iterator[tuple[str, torch.dtype, list[int], str]]:
        """Of the state: name, dtype, shape, and `DEVICE` or `HOST`."""
        for line in self.metadata["retro.state"].splitlines():
            name, kind, sizes, place = line.split()
            yield name, *_made(f"{kind} {sizes}"), place

    def _check_room(self) -> None:
        """Raises MemoryError unless a state can be allocated."""
        own = place_of(self.device)
        need = {own: 0, HOST_MEMORY: 0}
        for _, dtype, shape, place in self._tensors():
            need[HOST_MEMORY if place == HOST else own] += math.prod(shape) * dtype.itemsize
        for where, bytes_, free in lacking(need, self.device):
            less = "" if where == HOST_MEMORY or self.offload else ", or with --offload"
            raise MemoryError(
                f"a state of the package needs {in_gib(bytes_)} on {where}, {in_gib(free)} are "
                f"free; export it with a smaller --context or --batch-size{less}"
            )

    def prefill(self, ids: Tensor, state: State, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, V]` of the token that follows a prompt; whatever the state held is forgotten.

        Args:
            ids: `[B, T]` int64, 1 <= T <= N.
            state: of `new_state`; changed in place.
            attention_mask: `[B, T]`, 0 for padding, which must be on the left; None: no padding.

        Raises:
            ValueError: another number of rows, more tokens than a row can hold, or padding that
                is not on the left.
        """
        starts = self._starts(ids, attention_mask)
        self._check(ids)
        if ids.shape[1] == 1:  # the program takes two tokens or more: padding goes before it
            ids, starts = nn.functional.pad(ids, (1, 0)), starts + 1
        state["starts"].copy_(starts)
        return self._run("prefill", ids, state)

    def decode(self, ids: Tensor, state: State) -> Tensor:
        """Logits `[B, V]` of the token that follows `ids` `[B, 1]`; the state changes in place.

        Raises:
            ValueError: another shape.
            RuntimeError: a row is full.
        """
        self._check(ids)
        if ids.shape[1] != 1:
            raise ValueError(f"a step takes one token of each row, got {ids.shape[1]}")
        return self._run("decode", ids, state)

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        state: State | None = None,
        *,
        attention_mask: Tensor | None = None,
        eos: Sequence[int] | None = None,
    ) -> Tensor:
        """Greedy tokens `[B, M]` after a prompt `[B, T]`, M <= max_new_tokens.

        A row ends with the first token of `eos` that it writes, and is filled with `pad` from there
        on; when all rows have ended, nothing more is generated.

        Args:
            ids: `[B, T]` int64.
            max_new_tokens: M at most.
            state: of `new_state`; None: a new one.
            attention_mask: as in `prefill`.
            eos: tokens that end a row; None: those of the package.

        Raises:
            ValueError: as `prefill`, or there is no room for the new tokens.
        """
        self._check(ids, max_new_tokens)
        state = self.new_state() if state is None else state
        ends = torch.tensor(self.eos if eos is None else list(eos), dtype=torch.int64)
        ended = torch.zeros(self.batch_size, 1, dtype=torch.bool)
        logits = self.prefill(ids, state, attention_mask)
        chosen: list[Tensor] = []
        while True:
            token = logits.argmax(dim=-1, keepdim=True).cpu()
            chosen.append(token.where(~ended, self.pad))
            ended |= torch.isin(token, ends)
            if len(chosen) == max_new_tokens or bool(ended.all()):
                return torch.cat(chosen, dim=1).to(ids.device)
            logits = self.decode(chosen[-1], state)

    def _run(self, which: str, ids: Tensor, state: State) -> Tensor:
        with torch.inference_mode():
            return self._programs[which](ids.to(self.device).contiguous(), state)

    def _starts(self, ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Tokens of each row that are padding, `[B]`."""
        if attention_mask is None:
            return torch.zeros(len(ids), dtype=torch.int64)
        if attention_mask.shape != ids.shape:
            raise ValueError(
                f"the attention_mask must have the shape of the ids, {list(ids.shape)}, got "
                f"{list(attention_mask.shape)}"
            )
        real = attention_mask.bool()
        if not real[:, -1].all() or (real[:, :-1] > real[:, 1:]).any():
            raise ValueError(
                "padding must be on the left, and at least one token in every row; "
                "set tokenizer.padding_side = 'left'"
            )
        return (~real).sum(dim=1)

    def _check(self, ids: Tensor, new_tokens: int = 1) -> None:
        if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
            raise ValueError(
                f"ids must be [B, T] int64 with at least one token, got {list(ids.shape)} of "
                f"{ids.dtype}"
            )
        if ids.shape[0] != self.batch_size:
            raise ValueError(
                f"the package was exported for batch size {self.batch_size}, got {ids.shape[0]} "
                f"rows; export it with --batch-size {ids.shape[0]}"
            )
        if new_tokens < 1:
            raise ValueError(f"new tokens must be at least 1, got {new_tokens}")
        # The last token is never fed back.
        if ids.shape[1] + new_tokens - 1 > self.context:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens and {new_tokens} new ones exceed the context "
                f"of {self.context} that the package was exported for; export it with a larger "
                "--context"
            )
        low, high = ids.aminmax()
        if int(low) < 0 or int(high) >= self.vocabulary:
            raise ValueError(
                f"token ids must lie in 0..{self.vocabulary - 1}, got "
                f"{int(low) if int(low) < 0 else int(high)}"
            )


def load_exported(path: str | Path, device: torch.device | str | None = None) -> ExportedModel:
    """Loads a package that `export_model` wrote.

    Args:
        path: the package.
        device: where to run it; None: where it was exported for. Another one is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a package, one for another device or for another version of the op
            library, or there are no kernels for its device.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no package {str(path)!r}")
    metadata = _metadata(path)
    place = torch.device(metadata["retro.device"] if device is None else device)
    if place.type != metadata["retro.device"]:
        raise ValueError(
            f"{path} was exported for {metadata['retro.device']}, not for {place.type}; export it "
            f"with --device {place.type}"
        )
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"{path} was exported for cuda, and there is no GPU here; export it with --device cpu"
        )
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"retro::{OP}", place.type.upper()):
        raise ValueError(
            f"{path} was exported for {place.type}, and the ops of retro_ops have no kernels for "
            "it here; build them where nvcc is, `CUDA_HOME=/usr/local/cuda pip install "
            "--no-build-isolation -e .`"
        )
    programs = load_pt2(
        str(path),
        run_single_threaded=True,
        device_index=-1 if place.index is None else place.index,
    ).aoti_runners
    return ExportedModel(metadata, programs, _read_weights(path, place), place)


def _metadata(path: Path) -> dict[str, str]:
    """What a package says of itself, if it can be run here."""
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        metadata = loader.load_metadata_from_package(str(path), "decode")
    except RuntimeError:
        metadata = {}
    if metadata.get("retro.format") != FORMAT:
        raise ValueError(
            f"{path} is not a package of this version of retro_ops (format "
            f"{metadata.get('retro.format', 'unknown')}, not {FORMAT}); make one with "
            "`python -m retro_ops export`"
        )
    loaded = torch.ops.retro.library_version()
    if metadata["retro.ops"] != loaded:
        raise ValueError(
            f"{path} needs version {metadata['retro.ops']} of the op library, version {loaded} is "
            "loaded; export it anew, or install retro_ops "
            f"{metadata['retro.ops']}"
        )
    return metadata
