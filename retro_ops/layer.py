"""RetroLayer: the KV of one attention layer, and attention over it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from retro_ops import turn, wave_buffer, wave_index
from retro_ops.config import RetroConfig
from retro_ops.decode import decode_step
from retro_ops.ops._contract import (
    ELEMENT_DTYPES,
    Counter,
    retrieved_count,
    without_backward,
)
from retro_ops.ops.update_pages import DEFAULT_POLICY, POLICIES

INT32_MAX = 2**31 - 1
_INTEGERS = (torch.int32, torch.int64)


class RetroLayer(nn.Module):
    """Keys and values of one attention layer, read sparsely by every new token.

    All mutable state is in persistent buffers of fixed size, and counts live in `counters` on the
    device: a step never depends on a Python number, so it compiles into one graph, and `state_dict`
    saves the layer. For inference: a backward pass raises.

    Args:
        config: budgets and sizes.
        batch_size: B, rows.
        num_query_heads: Hq, a multiple of `num_kv_heads`.
        num_kv_heads: Hkv.
        head_dim: D, a multiple of 16 from 16 to 256.
        max_length: tokens that a row can hold, prompt and generated ones.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        device: where the state lives.
        offload: keep the KV store in slow memory behind a page cache of `config.cache_ratio` of it.
            Changes no result, bit for bit. On a CPU both are plain memory. On a GPU the store is
            pinned memory of the host; such a layer stays where it is: it cannot be moved, copied by
            `copy.deepcopy` (see `fork`) or exported by itself.

    Raises:
        TypeError: `config` or a number is something else.
        ValueError: a number or dtype is out of range, or the device is not there.
        MemoryError: the host has no room for the layer, or host or GPU have none for an offloaded
            one on a GPU. Others on a GPU raise torch.OutOfMemoryError.
    """

    steady: Tensor  # [2, B, Hkv, S, D]
    store: Tensor  # [2, B, Hkv, N, D]
    centroids: Tensor  # [2, B, Hkv, C, D]
    offsets: Tensor  # [B, Hkv, C + 1] int32
    variances: Tensor  # [B, Hkv, C] float32
    totals: Tensor  # [2, B, Hkv, D] float32
    counters: Tensor  # [B, len(Counter)] int64
    # Offloaded only; see wave_buffer.py. P pages of S tokens for each row and KV head.
    pages: Tensor  # [2, B, Hkv, P * S, D]
    page_table: Tensor  # [B, Hkv, N / S + C] int32
    free_pages: Tensor  # [B, Hkv, 2 + P] int32
    decisions: Tensor  # [B, Hkv, 2 + P] int32
    requests: Tensor  # [B, Hkv, 3 + R] int32
    cached: Tensor  # [B, Hkv, C] uint8
    history: Tensor  # [B, Hkv, C + 1, 2] int64

    host_buffers = wave_buffer.ON_HOST
    """Names of the buffers that are memory of the host where a layer on a GPU is offloaded."""

    def __init__(
        self,
        config: RetroConfig,
        *,
        batch_size: int,
        num_query_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_length: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        offload: bool = False,
        _policy: str = DEFAULT_POLICY,
        _layers_to_come: int = 1,
        _growth_delay: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(config, RetroConfig):
            raise TypeError(f"RetroLayer: config must be a RetroConfig, got {config!r}")
        numbers = {
            "batch_size": batch_size,
            "num_query_heads": num_query_heads,
            "num_kv_heads": num_kv_heads,
            "max_length": max_length,
            "head_dim": head_dim,
        }
        for name, number in numbers.items():
            if not isinstance(number, int):
                raise TypeError(f"RetroLayer: {name} must be an int, got {number!r}")
            if name != "head_dim" and not 1 <= number <= INT32_MAX:  # int32 counts slots
                bound = "at least 1" if number < 1 else f"at most {INT32_MAX}"
                raise ValueError(f"RetroLayer: {name} must be {bound}, got {number}")
        if num_query_heads % num_kv_heads:
            raise ValueError(
                "RetroLayer: num_query_heads must be a multiple of num_kv_heads, "
                f"got {num_query_heads} and {num_kv_heads}"
            )
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(
                f"RetroLayer: head_dim must be a multiple of 16 from 16 to 256, got {head_dim}"
            )
        if dtype not in ELEMENT_DTYPES:
            names = ", ".join(str(allowed) for allowed in ELEMENT_DTYPES)
            raise ValueError(f"RetroLayer: dtype must be one of {names}, got {dtype}")
        if _policy not in POLICIES:
            names = ", ".join(POLICIES)
            raise ValueError(f"RetroLayer: _policy must be one of {names}, got {_policy!r}")
        self.config = config
        self.batch_size = batch_size
        self.num_query_heads = num_query_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.max_length = max_length
        self.offload = offload
        self.policy = _policy
        # Tokens by which the index grows later than it could: layers of a model take turns.
        self.growth_delay = _growth_delay
        # Offloaded on a GPU: whether this layer is the device's last one of a model, whose prompt
        # ends with everything written, and whose step is the last one in a CUDA graph. Who has
        # several layers says which of them it is.
        self.joins = True

        tokens, clusters = wave_index.indexed_capacity(config, max_length)
        self.max_retrieved = retrieved_count(
            config.retrieval_budget, config.min_retrieved_clusters, clusters
        )
        groups = (batch_size, num_kv_heads)
        buffers: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "steady": (
                (2, *groups, min(config.steady_capacity + _growth_delay, max_length), head_dim),
                dtype,
            ),
            "store": ((2, *groups, tokens, head_dim), dtype),
            "centroids": ((2, *groups, clusters, head_dim), dtype),
            "offsets": ((*groups, clusters + 1), torch.int32),
            "variances": ((*groups, clusters), torch.float32),
            "totals": ((2, *groups, head_dim), torch.float32),
            "counters": ((batch_size, len(Counter)), torch.int64),
        }
        if offload:
            buffers |= wave_buffer.shapes(
                config, groups, tokens, clusters, self.max_retrieved, head_dim, dtype
            )
        for name, buffer in self._made(buffers, _known_device(device), _layers_to_come).items():
            self.register_buffer(name, buffer)
        if offload:
            wave_buffer.clear(self)

    def _made(
        self, buffers: wave_buffer.Shapes, device: torch.device, layers_to_come: int
    ) -> dict[str, Tensor]:
        """The buffers, allocated."""
        try:
            if self._shares_host_memory(device):
                return wave_buffer.allocate(buffers, device, layers_to_come)
            return {
                name: torch.zeros(shape, dtype=kind, device=device)
                for name, (shape, kind) in buffers.items()
            }
        except (AssertionError, RuntimeError) as error:  # the former where torch has no CUDA
            if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
                raise ValueError(
                    f"RetroLayer: there is no device '{device}', torch {torch.__version__} sees "
                    f"{torch.cuda.device_count()} GPUs; `python -m retro_ops info` says what there "
                    "is"
                ) from error
            if "allocate memory" not in str(error) and "Storage size" not in str(error):
                raise
            bytes_ = wave_buffer.bytes_of(buffers)
            raise MemoryError(
                f"RetroLayer: {self.batch_size} rows of max_length {self.max_length:,} tokens take "
                f"{bytes_ / 1e9:,.2f} GB, which {device} has not; make max_length or batch_size "
                "smaller"
            ) from error

    @staticmethod
    def free_bytes(device: torch.device) -> int:
        """Bytes that can be allocated now.

        Args:
            device: a GPU, or any other device for the host.

        Returns:
            Of a GPU what the driver and torch's allocator have left, of the host what the machine
            and the process's cgroup have.
        """
        if device.type == "cuda":
            return wave_buffer.free_device_bytes(device)
        return wave_buffer.free_host_bytes()

    @staticmethod
    def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros as what `host_buffers` names: memory of the host that a GPU sees as its own.

        Args:
            shape: (N1, N2, ...), sizes, any number of them.
            dtype: of its elements.
            device: the GPU; of a CPU the memory is like any other.

        Returns:
            `[N1, N2, ...]` of `dtype`, on `device`.

        Raises:
            RuntimeError: there is no room.
        """
        return wave_buffer.host_tensor(shape, dtype, device)

    @staticmethod
    def empty_page_cache(buffers: Mapping[str, Tensor]) -> None:
        """An offloaded layer's page cache comes to hold nothing, which is not all zeros.

        Args:
            buffers: of such a layer, by name; those of its page cache are changed.
        """
        wave_buffer.clear_buffers(buffers)

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The wave index: centroids, offsets, variances, totals."""
        return self.centroids, self.offsets, self.variances, self.totals

    def prefill(self, keys: Tensor, values: Tensor, starts: Tensor | None = None) -> None:
        """Replaces whatever the layer holds with a prompt, and indexes it.

        Args:
            keys: `[B, Hkv, T, D]`, any strides, after rotary embedding.
            values: like `keys`.
            starts: `[B]` integers: first real token of a left-padded row; None: no padding. Values
                out of 0..T are refused on the CPU; a GPU is not waited for, they are clamped.

        Raises:
            ValueError: a shape, dtype, device or length does not fit the layer; it keeps what it
                held.
        """
        self._check_tokens("prefill", keys, values)
        tokens = keys.shape[2]
        if tokens > self.max_length:
            raise ValueError(
                f"RetroLayer.prefill: a prompt of {tokens} tokens exceeds max_length "
                f"{self.max_length}; make the layer or cache with a larger max_length"
            )
        if starts is not None:
            self._check_tensor("prefill", "starts", starts)
        if starts is None:
            starts = torch.zeros(self.batch_size, dtype=torch.int64, device=keys.device)
        elif tuple(starts.shape) != (self.batch_size,) or starts.dtype not in (
            torch.int32,
            torch.int64,
        ):
            raise ValueError(
                f"RetroLayer.prefill: starts must be [{self.batch_size}] integers, got "
                f"{list(starts.shape)} of {starts.dtype}"
            )
        elif starts.device != keys.device:
            raise ValueError(
                f"RetroLayer.prefill: starts must be on {keys.device} like keys, "
                f"got {starts.device}"
            )
        elif (
            starts.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and bool(((starts < 0) | (starts > tokens)).any())
        ):
            raise ValueError(
                f"RetroLayer.prefill: starts must lie in 0..{tokens}, got {starts.tolist()}"
            )
        self.reset()
        wave_index.build(self, keys, values, starts.long().clamp(0, tokens), first=True)
        if self.joins:
            self.finish_prefill()

    def finish_prefill(self) -> None:
        """Lets the device wait for what a prompt has still to write to stores in the host's memory.

        `prefill` does it in the last layer of a device, which `joins`.
        """
        if self.offload and not torch.compiler.is_compiling():
            wave_buffer.finish_writes(self.store.device)

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Appends one token per row, then attends to everything the rows hold.

        Args:
            query: `[B, Hq, 1, D]`, any strides, after rotary embedding.
            key: `[B, Hkv, 1, D]`, any strides, after rotary embedding.
            value: like `key`.
            scale: factor on q . k; None: 1 / sqrt(D).
            sinks: `[Hq]`, attention sinks: logits of one more token of value zero, which is not
                stored; None: none.

        Returns:
            `[B, Hq, 1, D]` in query's dtype.

        Raises:
            ValueError: a shape, dtype or device does not fit the layer.
            RuntimeError: a row is full; the layer keeps what it held. A GPU is not waited for:
                there the token is dropped and counted, in `stats()["dropped_tokens"]`.
        """
        self._check_tokens("decode", key, value)
        self._check_query("decode", query, 1)
        self._check_sinks("decode", sinks)
        self.finish_prefill()  # of a cache whose last layer never came
        out = decode_step(
            self,
            query.squeeze(2),
            key,
            value,
            self.head_dim**-0.5 if scale is None else scale,
            sinks,
        )
        return out.unsqueeze(2)

    def extend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Takes in many tokens at once, as the next turn of a conversation brings them.

        Each new token attends exactly, whatever the budgets are, to everything its row holds and
        to the new tokens up to itself. Fewer than `update_segment` tokens leave the layer as if
        they had been decoded one by one, bit for bit, but for the counters of decode steps; more
        are clustered in segments of `segment_size` as those of a prompt, with the steady tokens
        that leave. Rows may be empty: a long prompt may come in parts.

        Args:
            query: `[B, Hq, T, D]`, any strides, after rotary embedding.
            keys: `[B, Hkv, T, D]`, any strides, after rotary embedding.
            values: like `keys`.
            scale: factor on q . k; None: 1 / sqrt(D).
            mask: `[B, T]` bool, False for padding, anywhere; what it holds does not matter. A row
                may be all padding. None: no padding.
            sinks: as in `decode`.

        Returns:
            `[B, Hq, T, D]` in query's dtype; zero for padding.

        Raises:
            ValueError: a shape, dtype or device does not fit the layer.
            RuntimeError: a row has no room for its tokens. After either the layer keeps what it
                held. The device is waited for, except in compiled code, where tokens without room
                are dropped on a GPU and counted, as in `decode`.
        """
        self._check_tokens("extend", keys, values)
        self._check_query("extend", query, keys.shape[2])
        self._check_sinks("extend", sinks)
        self.finish_prefill()
        mask = self._checked_mask(keys, mask)
        self._check_room("extend", mask.sum(dim=1))
        with torch.no_grad():
            out = turn.attend(
                self,
                query,
                keys,
                values,
                mask,
                self.head_dim**-0.5 if scale is None else scale,
                sinks,
            )
            turn.append(self, keys, values, mask)
        for argument in (query, keys, values):
            out = without_backward("extend", out, argument)
        return out

    def extend_bytes(self, tokens: int) -> int:
        """About the bytes that `extend` works in, besides its result.

        Args:
            tokens: T, new tokens of each row.
        """
        return turn.working_bytes(self, tokens)

    def crop(self, lengths: Tensor | int) -> None:
        """Forgets the latest tokens of each row, exactly, as far as they are in the steady zone.

        Indexed tokens cannot go one by one: a cluster does not know the order of its tokens, so
        nothing says which of them came last. The latest `local_tokens` tokens are not indexed when
        a segment is, so that many can go, once; `fork` before what may have to be undone further.

        Args:
            lengths: `[B]` integers or one number: tokens that each row keeps, up to what it holds.
                A row that keeps none is reset.

        Raises:
            ValueError: a row holds fewer tokens, or would lose indexed ones; no row has changed
                then. The device is waited for.
        """
        kept_of_rows = torch.as_tensor(lengths)
        if (
            list(kept_of_rows.shape) not in ([], [1], [self.batch_size])
            or kept_of_rows.dtype not in _INTEGERS
        ):
            raise ValueError(
                f"RetroLayer.crop: lengths must be one whole number, or [{self.batch_size}] of "
                f"them, got {lengths!r}"
            )
        keep = kept_of_rows.long().cpu().expand(self.batch_size).tolist()
        for row, (kept, counts) in enumerate(zip(keep, self.counters.tolist(), strict=True)):
            indexed, steady = counts[Counter.INDEXED_TOKENS], counts[Counter.STEADY_TOKENS]
            if not 0 <= kept <= indexed + steady:
                raise ValueError(
                    f"RetroLayer.crop: row {row} holds {indexed + steady} tokens and cannot keep "
                    f"{kept}; keep 0..{indexed + steady}"
                )
            lowest = indexed + self.config.sink_tokens if indexed else 0
            if 0 < kept < lowest:
                raise ValueError(
                    f"RetroLayer.crop: row {row} must keep {lowest} of its {indexed + steady} "
                    f"tokens, got {kept}: the others are in clusters, which do not know the order "
                    "of their tokens; reset() and prefill again, or fork() before what may have to "
                    "be undone"
                )
        for row, kept in enumerate(keep):
            if kept == 0:
                self._reset_row(row)
            else:
                self.counters[row, Counter.STEADY_TOKENS] = (
                    kept - self.counters[row, Counter.INDEXED_TOKENS]
                )

    def reset(self) -> None:
        """Forgets all tokens and statistics; the memory stays."""
        for buffer in (self.offsets, self.totals, self.counters):
            buffer.zero_()
        if self.offload:
            wave_buffer.clear(self)

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was, in place (beam search).

        Args:
            rows: `[B]` integers.

        Raises:
            ValueError: `rows` has another shape or dtype, or, on the CPU, names a row that is not
                there.
        """
        self._check_tensor("reorder", "rows", rows)
        fits = tuple(rows.shape) == (self.batch_size,) and rows.dtype in _INTEGERS
        if not fits or (
            rows.device.type == "cpu" and bool(((rows < 0) | (rows >= self.batch_size)).any())
        ):
            raise ValueError(
                f"RetroLayer.reorder: rows must be [{self.batch_size}] integers in "
                f"0..{self.batch_size - 1}, got {rows.tolist()}"
            )
        for name, buffer in self.named_buffers():
            axis, own_rows = _row_axis(name), rows.to(buffer.device)
            if name == "store" and self.offload:
                wave_buffer.reorder_store(buffer, own_rows)
            else:
                buffer.copy_(buffer.index_select(axis, own_rows))

    def fork(self, rows: Tensor | None = None) -> RetroLayer:
        """A copy that goes on by itself: a shared prefix, several continuations.

        Args:
            rows: `[R]` integers: row i of the copy is row `rows[i]` of this layer, so that one row
                may become several; None: the same rows.

        Raises:
            ValueError: `rows` names a row that is not there.
        """
        if rows is None:
            rows = torch.arange(self.batch_size)
        self._check_tensor("fork", "rows", rows)
        chosen = rows.tolist()
        if (
            rows.dim() != 1
            or rows.dtype not in _INTEGERS
            or not chosen
            or not all(0 <= row < self.batch_size for row in chosen)
        ):
            raise ValueError(
                f"RetroLayer.fork: rows must be one or more of 0..{self.batch_size - 1}, "
                f"got {chosen}"
            )
        twin = RetroLayer(
            self.config,
            batch_size=len(chosen),
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_length=self.max_length,
            dtype=self.store.dtype,
            device=self.store.device,
            offload=self.offload,
            _policy=self.policy,
            _growth_delay=self.growth_delay,
        )
        twin.joins = self.joins
        for name, buffer in self.named_buffers():
            wave_buffer.copy_rows(twin.get_buffer(name), buffer, _row_axis(name), chosen)
        return twin.train(self.training)

    def used_state(self) -> dict[str, Tensor]:
        """Copies of the buffers as far as they are in use, for `load_used_state`.

        The page cache of an offloaded layer is left out: it changes no result. The copy of a store
        in host memory is on the CPU.
        """
        ends = self._used_ends(self.counters)
        state = {}
        for name, buffer in self.named_buffers():
            if name in wave_buffer.NAMES:
                continue
            used = buffer[_up_to(ends.get(name), buffer)]
            if name == "store" and self._shares_host_memory(buffer.device):
                state[name] = wave_buffer.store_on_cpu(used)
            else:
                state[name] = used.clone(memory_format=torch.contiguous_format)
        return state

    def load_used_state(self, state: dict[str, Tensor]) -> None:
        """Replaces whatever the layer holds with what `used_state` of another layer gave.

        The other one may have had another `max_length` and `offload`; everything else is the same.

        Args:
            state: buffers by name, each as far as it is in use, on any device.

        Raises:
            ValueError: a tensor is missing or not one of this layer's, or does not fit into it; the
                layer keeps what it held.
        """
        own = {name: b for name, b in self.named_buffers() if name not in wave_buffer.NAMES}
        if state.keys() != own.keys():
            raise ValueError(
                f"RetroLayer.load_used_state: a layer has the tensors {sorted(own)}, "
                f"got {sorted(state)}"
            )
        counters = state["counters"]
        if counters.shape != self.counters.shape or counters.dtype != self.counters.dtype:
            raise ValueError(
                f"RetroLayer.load_used_state: counters must be {list(self.counters.shape)} of "
                f"{self.counters.dtype}, got {list(counters.shape)} of {counters.dtype}"
            )
        ends = self._used_ends(counters)
        for name, buffer in own.items():
            given, expected = state[name], [*buffer.shape]
            if name in ends:
                axis, end = ends[name]
                if not 0 <= end <= expected[axis]:
                    raise ValueError(
                        f"RetroLayer.load_used_state: {name} has room for {expected[axis]} entries "
                        f"at max_length {self.max_length}, not for {end}; make the layer or cache "
                        "with a larger max_length"
                    )
                expected[axis] = end
            if [*given.shape] != expected or given.dtype != buffer.dtype:
                raise ValueError(
                    f"RetroLayer.load_used_state: {name} must be {expected} of {buffer.dtype}, "
                    f"got {[*given.shape]} of {given.dtype}"
                )
        longest = int(_lengths(counters).max())
        if longest > self.max_length:
            raise ValueError(
                f"RetroLayer.load_used_state: a row of {longest} tokens exceeds max_length "
                f"{self.max_length}; make the layer or cache with a larger max_length"
            )
        self.reset()
        for name, buffer in own.items():
            if name == "store" and self.offload:
                wave_buffer.load_store(buffer, state[name])
            else:
                buffer[_up_to(ends.get(name), buffer)].copy_(state[name])

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Another layer's KV without its page cache, if `strict=False` lets that pass.
        if self.offload and any(prefix + name not in state_dict for name in wave_buffer.NAMES):
            wave_buffer.clear(self)

    def _apply(self, fn: Any, recurse: bool = True) -> RetroLayer:
        if self._shares_host_memory(self.store.device):
            raise RuntimeError(
                "RetroLayer: an offloaded layer on a GPU cannot be moved or cast: graphs and "
                "threads know its memory by its address; make another one, and have it "
                "load_used_state(layer.used_state())"
            )
        if fn(torch.empty(0, device=self.variances.device)).dtype != torch.float32:
            raise RuntimeError(
                "RetroLayer: a layer cannot be cast, what it knows of clusters stays in float32; "
                "make one with another dtype"
            )
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> RetroLayer:
        if self._shares_host_memory(self.store.device):
            raise RuntimeError(
                "RetroLayer: an offloaded layer on a GPU cannot be copied by copy.deepcopy, which "
                "would put its store into GPU memory; fork() it"
            )
        twin = RetroLayer.__new__(RetroLayer)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _shares_host_memory(self, device: torch.device) -> bool:
        return self.offload and device.type == "cuda"

    def lengths(self) -> Tensor:
        """Tokens that each row holds, padding not included: `[B]` int64, on the device."""
        return _lengths(self.counters)

    def croppable(self) -> Tensor:
        """Tokens that `crop` can take from each row without resetting it: `[B]` int64."""
        steady = self.counters[:, Counter.STEADY_TOKENS]
        indexed = self.counters[:, Counter.INDEXED_TOKENS] > 0
        return steady - self.config.sink_tokens * indexed

    def stats(self) -> dict[str, int]:
        """Counters since the last prefill or reset, summed over rows; waits for the device.

        Returns:
            - `steps`: decode steps (of the batch).
            - `steady_tokens`, `indexed_tokens`, `clusters`: what the rows hold now.
            - `updates`: segments that became clusters while decoding, or in a short turn.
            - `retrieved_tokens`: tokens retrieved, over KV heads and steps.
            - `page_hits`, `page_misses`: pages of retrieved clusters that were in the page cache,
              and those that were not; 0 unless offloaded, like the next four.
            - `slow_bytes_per_token`: bytes of KV that one row's step reads from the slow memory, on
              average: the tokens of missed pages.
            - `page_admissions`, `page_evictions`: clusters that came into the page cache and left
              it.
            - `late_decisions`: times that a KV head's step found no decision of the step before on
              what may leave the page cache; always 0 on a CPU, which decides between two steps.
            - `page_updates`, `page_update_us`: decisions that threads of the host have made beside
              the steps of a GPU since the layer was made, and microseconds from the end of their
              gather to theirs, in sum.
            - `truncated_clusters`: clusters dropped for want of room; always 0: the working set has
              no buffer that could overflow.
            - `dropped_tokens`: tokens that found no room in a full row on a GPU; the CPU raises.
            - `bytes_read_per_token`: bytes of KV and index that one row's step reads, on average.
        """
        rows = self.counters.tolist()
        totals = dict(zip(Counter, map(sum, zip(*rows, strict=True)), strict=True))
        steps = rows[0][Counter.STEPS]
        rows_steps = max(totals[Counter.STEPS], 1)
        token_bytes = 2 * self.head_dim * self.store.element_size()
        estimated = sum(self._estimated(row[Counter.CLUSTERS]) for row in rows)
        per_head = (
            (totals[Counter.STEADY_TOKENS] * token_bytes)
            + totals[Counter.CLUSTERS] * (token_bytes // 2 + 8)  # mean key, offset, variance
            + estimated * (token_bytes // 2)  # mean value
        ) / self.batch_size
        retrieved = totals[Counter.RETRIEVED_TOKENS] / rows_steps * token_bytes
        updates = nanoseconds = 0
        if self.offload:
            _, updates, nanoseconds = torch.ops.retro.update_counts(self.history)
        return {
            "steps": steps,
            "steady_tokens": totals[Counter.STEADY_TOKENS],
            "indexed_tokens": totals[Counter.INDEXED_TOKENS],
            "clusters": totals[Counter.CLUSTERS],
            "updates": totals[Counter.UPDATES],
            "retrieved_tokens": totals[Counter.RETRIEVED_TOKENS],
            "page_hits": totals[Counter.PAGE_HITS],
            "page_misses": totals[Counter.PAGE_MISSES],
            "slow_bytes_per_token": round(totals[Counter.MISSED_TOKENS] / rows_steps * token_bytes),
            "page_admissions": totals[Counter.ADMISSIONS],
            "page_evictions": totals[Counter.EVICTIONS],
            "late_decisions": totals[Counter.LATE_DECISIONS],
            "page_updates": updates,
            "page_update_us": nanoseconds // 1000,
            "truncated_clusters": 0,
            "dropped_tokens": totals[Counter.DROPPED_TOKENS],
            "bytes_read_per_token": round(per_head * self.num_kv_heads + retrieved),
        }

    def extra_repr(self) -> str:
        """What `print(layer)` shows in brackets."""
        return (
            f"batch_size={self.batch_size}, num_query_heads={self.num_query_heads}, "
            f"num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"max_length={self.max_length}, dtype={self.store.dtype}, device={self.store.device}, "
            f"offload={self.offload}"
        )

    def _estimated(self, clusters: int) -> int:
        config = self.config
        retrieved = retrieved_count(
            config.retrieval_budget, config.min_retrieved_clusters, clusters
        )
        return min(round(config.estimation_budget * clusters), clusters - retrieved)

    def _reset_row(self, row: int) -> None:
        for name, buffer in self.named_buffers():
            if name not in wave_buffer.NAMES:
                buffer.narrow(_row_axis(name), row, 1).zero_()
        if self.offload:
            wave_buffer.clear_buffers(
                {
                    name: self.get_buffer(name).narrow(_row_axis(name), row, 1)
                    for name in wave_buffer.NAMES
                }
            )

    def _used_ends(self, counters: Tensor) -> dict[str, tuple[int, int]]:
        """Of each buffer that fills up: the axis on which it does, and where what is used ends."""
        columns = (Counter.STEADY_TOKENS, Counter.INDEXED_TOKENS, Counter.CLUSTERS)
        steady, indexed, clusters = (int(counters[:, column].max()) for column in columns)
        return {
            "steady": (3, steady),
            "store": (3, indexed),
            "centroids": (3, clusters),
            "offsets": (2, clusters + 1),
            "variances": (2, clusters),
        }

    def _check_tokens(self, method: str, key: Tensor, value: Tensor) -> None:
        name, other, letter = (
            ("key", "value", "1") if method == "decode" else ("keys", "values", "T")
        )
        self._check_tensor(method, name, key)
        self._check_tensor(method, other, value)
        fits = key.dim() == 4 and (key.shape[0], key.shape[1], key.shape[3]) == (
            self.batch_size,
            self.num_kv_heads,
            self.head_dim,
        )
        if not fits or (method == "decode" and key.shape[2] != 1):
            raise ValueError(
                f"RetroLayer.{method}: {name} must be [B, Hkv, {letter}, D] = [{self.batch_size}, "
                f"{self.num_kv_heads}, {letter}, {self.head_dim}], got {list(key.shape)}"
            )
        if value.shape != key.shape:
            raise ValueError(
                f"RetroLayer.{method}: {other} must have the shape of {name}, "
                f"got {list(value.shape)} and {list(key.shape)}"
            )
        self._check_like_layer(method, name, key)
        self._check_like_layer(method, other, value)

    def _check_query(self, method: str, query: Tensor, tokens: int) -> None:
        self._check_tensor(method, "query", query)
        expected = (self.batch_size, self.num_query_heads, tokens, self.head_dim)
        if tuple(query.shape) != expected:
            letter = "1" if method == "decode" else "T"
            raise ValueError(
                f"RetroLayer.{method}: query must be [B, Hq, {letter}, D] = {list(expected)}, "
                f"got {list(query.shape)}"
            )
        self._check_like_layer(method, "query", query)

    def _check_tensor(self, method: str, name: str, tensor: object) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"RetroLayer.{method}: {name} must be a tensor, got {type(tensor).__name__}"
            )

    def _check_sinks(self, method: str, sinks: Tensor | None) -> None:
        if sinks is None:
            return
        self._check_tensor(method, "sinks", sinks)
        if tuple(sinks.shape) != (self.num_query_heads,) or not sinks.is_floating_point():
            raise ValueError(
                f"RetroLayer.{method}: sinks must be [Hq] = [{self.num_query_heads}] floating-point"
                f" logits, got {list(sinks.shape)} of {sinks.dtype}"
            )
        if sinks.device != self.store.device:
            raise ValueError(
                f"RetroLayer.{method}: sinks must be on {self.store.device} like the layer, "
                f"got {sinks.device}"
            )

    def _checked_mask(self, keys: Tensor, mask: Tensor | None) -> Tensor:
        shape = (self.batch_size, keys.shape[2])
        if mask is None:
            return torch.ones(shape, dtype=torch.bool, device=keys.device)
        self._check_tensor("extend", "mask", mask)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"RetroLayer.extend: mask must be [B, T] = {list(shape)} of torch.bool, "
                f"got {list(mask.shape)} of {mask.dtype}"
            )
        if mask.device != keys.device:
            raise ValueError(
                f"RetroLayer.extend: mask must be on {keys.device} like keys, got {mask.device}"
            )
        return mask

    def _check_room(self, method: str, new: Tensor) -> None:
        """Raises if a row has no room for its `new` `[B]` tokens."""
        lengths = self.lengths()
        if torch.compiler.is_compiling():
            if lengths.device.type == "cpu":
                torch._assert_async(
                    (lengths + new <= self.max_length).all(),
                    f"RetroLayer.{method}: a row has no room for its tokens in max_length "
                    f"{self.max_length}; make the layer or cache with a larger max_length",
                )
            return
        for row, (held, more) in enumerate(zip(lengths.tolist(), new.tolist(), strict=True)):
            if held + more > self.max_length:
                raise RuntimeError(
                    f"RetroLayer.{method}: row {row} holds {held} of max_length {self.max_length} "
                    f"tokens, {more} more do not fit; make the layer or cache with a larger "
                    "max_length"
                )

    def _check_like_layer(self, method: str, name: str, tensor: Tensor) -> None:
        if tensor.dtype != self.store.dtype or tensor.device != self.store.device:
            raise ValueError(
                f"RetroLayer.{method}: {name} must be {self.store.dtype} on {self.store.device} "
                f"like the layer, got {tensor.dtype} on {tensor.device}"
            )


def _known_device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"RetroLayer: device must be a device of torch, as 'cpu' or 'cuda:0', got {device!r}"
        ) from None


def _row_axis(name: str) -> int:
    """The axis of a buffer that counts rows."""
    return 1 if name in ("steady", "store", "centroids", "totals", "pages") else 0


def _up_to(end: tuple[int, int] | None, buffer: Tensor) -> tuple[slice, ...]:
    """Everything of a buffer, or what lies before an end on an axis."""
    whole = [slice(None)] * buffer.dim()
    if end is not None:
        whole[end[0]] = slice(end[1])
    return tuple(whole)


def _lengths(counters: Tensor) -> Tensor:
    return counters[:, Counter.STEADY_TOKENS] + counters[:, Counter.INDEXED_TOKENS]
