"""What memory a model with a RetroCache takes, before anything is loaded.

Nothing here repeats the size of a buffer: the model and its cache are made on torch's meta device,
where tensors have shapes and no memory, a prompt and a step are run there, and what is allocated
is added up. Only what torch does not see from Python is a formula or an allowance: the memory that
CUDA kernels work in (`workspace_bytes`), `LIBRARY_BYTES` and `CONTEXT_BYTES`.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from retro_ops import RetroConfig, RetroLayer
from retro_ops.models.cache import RetroCache, RetroCacheLayer
from retro_ops.models.load import find_model, read_config
from retro_ops.models.memory import (
    HOST,
    Memory,
    bytes_of,
    free_on,
    host_buffers,
    in_gib,
    layer_bytes,
    place_of,
)
from retro_ops.models.shapes import SHAPES, first_layers

LIBRARY_BYTES = 64 << 20
"""Of torch's allocator on a GPU, taken by cuBLAS: 32 MiB for eager calls on Hopper, and as much for
those in CUDA graphs."""
CONTEXT_BYTES = 1 << 30
"""Of a GPU, outside of torch's allocator: the CUDA context, kernels and CUDA graphs, about half of
it, and what the allocator cannot use between its blocks."""
ZONES = {
    "steady": "steady zone",
    "store": "KV store",
    **dict.fromkeys(("centroids", "offsets", "variances", "totals", "counters"), "wave index"),
    **dict.fromkeys(("pages", "page_table", "free_pages"), "page cache"),
    **dict.fromkeys(("decisions", "requests", "cached", "history"), "page cache"),
    **dict.fromkeys(("keys", "values"), "sliding windows"),
}
"""What the buffers of a cache's layers are."""
ACTIVATIONS = ("prefill activations", "decode activations")
"""Never there at the same time."""
PARTS = (
    *("weights", "wave index", "steady zone", "page cache", "KV store", "sliding windows"),
    *("kernel workspace", "libraries", *ACTIVATIONS, "context"),
)
"""Rows of a plan, in order."""


@dataclass(frozen=True)
class Plan:
    """Bytes by place ("cuda:0" and so on, "host") and part (a name of `PARTS`)."""

    batch_size: int
    context: int
    places: dict[str, dict[str, int]]

    def total(self, place: str, *, prefill: bool = True) -> int:
        """The most bytes that a place has to hold at one time, from the prompt on or after it."""
        parts = dict(self.places[place])
        activations = [parts.pop(name, 0) for name in ACTIVATIONS]
        return sum(parts.values()) + max(activations[not prefill :])

    def allocated(self, place: str, *, prefill: bool = True) -> int:
        """`total`, as far as torch's allocator knows of it."""
        return self.total(place, prefill=prefill) - self.places[place].get("context", 0)

    def fits(self, memory: Memory, *, prefill: bool = True) -> bool:
        """Whether every place has room."""
        return all(self.total(place, prefill=prefill) <= memory.of(place) for place in self.places)

    def lacks(self, memory: Memory) -> str:
        """What does not fit, as a sentence; empty if all does."""
        return "; ".join(
            f"{in_gib(self.total(place))} needed on {place}, {in_gib(memory.of(place))} there"
            for place in self.places
            if self.total(place) > memory.of(place)
        )


class Planner:
    """Plans for one model, whatever the context and the number of rows.

    Args:
        config: the model's.
        retro_config: budgets and sizes; None: the defaults.
        dtype: of weights and KV; None: that of the config, bfloat16 if it names none.
        offload: KV stores in host memory, behind page caches.
        devices: bytes of each GPU, over which layers are spread as `device_map="auto"` spreads
            them; none: all is on the CPU.
        prefill_chunk: tokens of each row that one forward of the prompt takes in, as
            `prefill_chunk_size` of `generate`; None: the whole prompt.

    Raises:
        ValueError: retro attention cannot serve the model, a number is out of range, or the weights
            do not fit on the GPUs.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        retro_config: RetroConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        offload: bool = False,
        devices: tuple[int, ...] = (),
        prefill_chunk: int | None = None,
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 2:
            raise ValueError(f"plan: prefill_chunk must be at least 2 tokens, got {prefill_chunk}")
        self.config = config
        self.retro_config = RetroConfig() if retro_config is None else retro_config
        self.dtype = dtype or config.dtype or torch.bfloat16
        self.offload = offload
        self.prefill_chunk = prefill_chunk
        model = meta_model(config, self.dtype)
        where = _spread(model, devices)
        self._weights = _weights(model, where)
        self.layer_places = _layer_places(model, where)
        """Of each layer."""
        self._heads = self._probe(model)
        self._few = meta_model(_few_layers(config), self.dtype)
        self._activations: dict[tuple[int, int, int], tuple[int, int]] = {}

    def plan(self, context: int, batch_size: int) -> Plan:
        """What `batch_size` rows take, of `context` tokens each, prompt and answer together."""
        cache = self._cache(self.config, context, batch_size)
        places: dict[str, dict[str, int]] = {
            place: {"weights": bytes_} for place, bytes_ in self._weights.items()
        }
        known: dict[tuple[Any, ...], dict[str, int]] = {}
        for layer, place, heads in zip(cache.layers, self.layer_places, self._heads, strict=True):
            own = getattr(layer, "growth_delay", None), getattr(layer, "past", None)
            kind = (type(layer), *own, heads)
            if kind not in known:
                known[kind] = layer_bytes(layer, *self._tokens(heads, batch_size))
            for name, bytes_ in known[kind].items():
                parts = places.setdefault(HOST if name in host_buffers(layer) else place, {})
                parts[ZONES[name]] = parts.get(ZONES[name], 0) + bytes_
        for place, parts in places.items():
            if place in self.layer_places:
                peaks = self.activations(context, batch_size)
                parts |= dict(zip(ACTIVATIONS, peaks, strict=True))
            if place != HOST:
                parts["kernel workspace"] = self._workspace(cache, batch_size)
                parts["libraries"] = LIBRARY_BYTES
                parts["context"] = CONTEXT_BYTES
        ordered = {
            place: {part: places[place][part] for part in PARTS if part in places[place]}
            for place in sorted(places)
        }
        return Plan(batch_size, context, ordered)

    def activations(self, context: int, batch_size: int) -> tuple[int, int]:
        """Most bytes that a prompt of `context` tokens and a step allocate, the cache left out."""
        chunk = min(self.prefill_chunk or context, context)
        key = (chunk, context, batch_size)
        if key not in self._activations:
            cache = self._cache(self._few.config, context, batch_size)
            for layer, heads in zip(cache.layers, self._heads, strict=False):
                layer.lazy_initialization(*self._tokens(heads, batch_size))
            for layer in cache.retro_layers:  # as all but the last: what they stage stays
                if layer.retro is not None:
                    layer.retro.joins = False
            prefill, decode = (peak_bytes(self._few, cache, tokens) for tokens in (chunk, 1))
            cache.reset()
            if chunk < context:  # later chunks are turns
                retro = (layer.retro for layer in cache.retro_layers if layer.retro)
                prefill += max((layer.extend_bytes(chunk) for layer in retro), default=0)
            self._activations[key] = prefill, decode
        return self._activations[key]

    def largest_batch(self, context: int, memory: Memory, *, prefill: bool = True) -> int:
        """The most rows of `context` tokens that fit; 0: not even one does."""
        return largest(lambda rows: self.plan(context, rows).fits(memory, prefill=prefill), 1 << 16)

    def longest_context(self, batch_size: int, memory: Memory) -> int:
        """The most tokens that each of `batch_size` rows can hold; 0: none."""
        return largest(lambda tokens: self.plan(tokens, batch_size).fits(memory), 1 << 30)

    def _cache(self, config: PreTrainedConfig, context: int, batch_size: int) -> RetroCache:
        return RetroCache(
            config,
            self.retro_config,
            max_cache_len=context,
            batch_size=batch_size,
            offload=self.offload,
        )

    def _probe(self, model: PreTrainedModel) -> list[_Heads]:
        """Heads and head dimensions of each layer, from the tokens that it gives to its cache."""
        cache = self._cache(model.config, 4, 1)
        peak_bytes(model, cache, 2)
        heads = []
        for layer in cache.layers:
            retro = layer.retro if isinstance(layer, RetroCacheLayer) else None
            if retro is None:
                heads.append(_Heads(0, layer.keys.shape[1], layer.keys.shape[3]))
            else:
                heads.append(_Heads(retro.num_query_heads, retro.num_kv_heads, retro.head_dim))
        return heads

    def _tokens(self, heads: _Heads, batch_size: int) -> tuple[Tensor, Tensor]:
        shape = (batch_size, heads.kv, 1, heads.dim)
        tokens = torch.empty(shape, dtype=self.dtype, device="meta")
        return tokens, tokens

    def _workspace(self, cache: RetroCache, batch_size: int) -> int:
        kinds = {
            heads: layer
            for layer, heads in zip(cache.layers, self._heads, strict=True)
            if isinstance(layer, RetroCacheLayer)
        }
        sizes = [0]
        for heads, layer in kinds.items():
            layer.lazy_initialization(*self._tokens(heads, batch_size))
            assert layer.retro is not None
            sizes.append(workspace_bytes(layer.retro))
        return max(sizes)


@dataclass(frozen=True)
class _Heads:
    query: int
    kv: int
    dim: int


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model, without its weights.

    Args:
        name: of `SHAPES`, or as for `load_model`.

    Raises:
        FileNotFoundError, ValueError: as `read_config`.
    """
    if name in SHAPES:
        return SHAPES[name]()
    return read_config(name, find_model(name))


def check_weights(
    name: str | Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device: torch.device | str,
) -> None:
    """Raises MemoryError unless a device has room for the weights of a model; loads none.

    Args:
        name: for the message.
        config: the model's.
        dtype: of the weights; "auto": as stored.
        device: where to.
    """
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or torch.float32
    model = meta_model(config, dtype)
    device = torch.device(device)
    need, free = bytes_of((*model.parameters(), *model.buffers())), free_on(device)
    if need > free:
        raise MemoryError(
            f"the weights of {str(name)!r} take {in_gib(need)} on {place_of(device)}, "
            f"{in_gib(free)} are free; load it in a smaller dtype, on another device, or "
            "over several with device_map='auto'"
        )


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model on the meta device, with retro attention."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="retro"
        )
    return model.eval()


def peak_bytes(model: PreTrainedModel, cache: RetroCache, tokens: int) -> int:
    """The most bytes that a forward of `[B, tokens]` has allocated at one time.

    Args:
        model, cache: on the meta device; the cache takes the tokens in.
    """
    ids = torch.zeros(cache.batch_size, tokens, dtype=torch.int64, device="meta")
    with torch.no_grad(), _FusedAttention(), _Allocations() as allocations:
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return allocations.peak


def workspace_bytes(layer: RetroLayer) -> int:
    """About what the CUDA kernels of one layer allocate to work in, at most.

    The larger of a prompt of `max_length` tokens, which is clustered, and a step. What an op
    allocates is free again when it returns, so that layers share it.
    """
    tasks = layer.batch_size * layer.num_kv_heads
    group = layer.num_query_heads // layer.num_kv_heads
    clusters, dim, item = layer.centroids.shape[3], layer.head_dim, layer.store.element_size()
    # csrc/cluster_keys.cu: tokens in order, and centroids as they are multiplied.
    build = tasks * (4 * layer.max_length + clusters * (item * dim + 8))
    # csrc/wave_estimate.cu: ids, masses and bits of all clusters; ranks of the retrieved ones.
    choice = tasks * (clusters * (4 * group + 4) + clusters // 8 + 8 * layer.max_retrieved)
    # csrc/attend.cu: softmax states of the pieces, for at most 16 queries and two parts of each.
    states = 2 * 16 * max(tasks * -(-group // 8), _PIECES)
    # csrc/grow_index.cu: tokens of an update, or keys and values of several that become one.
    config = layer.config
    merged = config.merged_updates * config.update_segment * (config.merged_updates > 1)
    merged *= merged <= layer.store.shape[3]
    most = max(merged, config.update_segment)
    means = most // config.cluster_size * (item * dim + 8)
    grow = tasks * (2 * merged * dim * item + 8 * most + means)
    return max(build, grow, choice + states * (4 * dim + 8))


_PIECES = 4 * 132
"""Blocks of csrc/attend.cu that run at a time on the 132 processors of an H100, and are to come."""


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel allocates it: the meta device would give it all its logits."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        rows, heads, tokens, _ = given["query"].shape
        out = given["query"].new_empty(rows, tokens, heads, given["value"].shape[3])
        given["query"].new_empty(rows, heads, tokens, dtype=torch.float32)  # log-sum-exp
        return out.transpose(1, 2)


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what is allocated and not yet freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and _storage_id(leaf) not in before:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, bytes_ = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            del self._seen[key]
            self._now -= bytes_

        self._seen[key] = weakref.ref(storage, freed)
        self._now += bytes_
        self.peak = max(self.peak, self._now)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _few_layers(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same model with as few layers as allocate as much as all of them, besides the cache: all
    kinds, and one that is not the first, which has the embeddings for its residual."""
    kinds = list(get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0])
    last = max(kinds.index(kind) for kind in set(kinds))
    return first_layers(config, min(max(last + 1, 2), len(kinds)))


def _spread(model: PreTrainedModel, devices: tuple[int, ...]) -> dict[str, str]:
    """Places by names of modules; "" is the whole model."""
    if not devices:
        return {"": HOST}
    if len(devices) == 1:
        return {"": "cuda:0"}
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    memory: dict[Any, Any] = {**dict(enumerate(devices)), "cpu": 1 << 62}
    with _quiet("accelerate.utils.modeling"):  # about GPUs that are planned for and not here
        memory = get_balanced_memory(model, memory, model._no_split_modules)
        where = infer_auto_device_map(model, memory, model._no_split_modules)
    if any(device in ("cpu", "disk") for device in where.values()):
        raise ValueError(
            f"plan: the weights take {in_gib(bytes_of(model.parameters()))}, which do not fit on "
            f"{len(devices)} GPUs of {', '.join(map(in_gib, devices))}"
        )
    return {name: f"cuda:{device}" for name, device in where.items()}


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _place(name: str, where: dict[str, str]) -> str:
    while name not in where:
        name = name.rpartition(".")[0]
    return where[name]


def _weights(model: PreTrainedModel, where: dict[str, str]) -> dict[str, int]:
    tensors: dict[str, list[Tensor]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            tensors.setdefault(_place(name, where), []).append(tensor)
    return {place: bytes_of(each) for place, each in tensors.items()}


def _layer_places(model: PreTrainedModel, where: dict[str, str]) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [_place(names[layer], where) for layer in model.get_decoder().layers]


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, of numbers that fit up to some number."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
