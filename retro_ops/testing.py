"""Inputs, exact answers, the error budget and what every op promises, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retro_ops.ops._contract import (
    ELEMENT_DTYPES,
    Counter,
    DecisionHeader,
    FreeHeader,
    RequestHeader,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

KINDS = ("clustered", "random", "heavy-tailed", "drifting", "adversarial")
HEAD_DIMS = (16, 64, 80, 96, 128, 256)
LAYOUTS = ("contiguous", "permuted", "padded", "transposed")
MAGNITUDES = {"normal": 1.0, "large": 1e3, "tiny": 1e-6, "zero": 0.0}
CPU_KERNELS = ("avx512bf16", "avx512", "avx2", "portable")

Arguments = dict[str, Any]


def make_kv(
    batch_size: int,
    num_kv_heads: int,
    tokens: int,
    head_dim: int,
    *,
    kind: str = "clustered",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, T, D]`.

    Args:
        batch_size, num_kv_heads, tokens, head_dim: B, Hkv, T, D.
        kind: "clustered": keys near one of about T / 64 topics that drift along the context, as in
            real text; "random": independent normal keys, which no index can group; "heavy-tailed":
            topics as common as words are, keys with outliers in every sense: of length, in single
            elements, and in a few elements that are large in all keys; "drifting": few topics, each
            of which moves through space, and all of them in one direction, so that late keys are
            unlike early ones; "adversarial": behind every topic's mean hides one token in 16 with a
            key three times as long and a value of the opposite sign.
        dtype, device: of the results.
        seed: the same numbers for the same seed, on every device.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"make_kv: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_kv_heads, tokens, head_dim)
    keys = torch.randn(shape, generator=generator)
    values = torch.randn(shape, generator=generator)
    if kind == "clustered" and tokens > 0:
        count = max(tokens // 64, 1)
        topics = torch.randn(batch_size, num_kv_heads, count, head_dim, generator=generator)
        # Token t belongs to a topic near position t of the context: topics come and go.
        place = torch.arange(tokens) * count // tokens
        spread = torch.randint(-8, 9, (batch_size, num_kv_heads, tokens), generator=generator)
        topic = (place + spread).clamp(0, count - 1)
        index = topic[..., None].expand(shape)
        keys = topics.gather(2, index) + 0.4 * keys
        values = 0.5 * topics.gather(2, index) + values
    elif kind != "random" and tokens > 0:
        make = {"heavy-tailed": _heavy_tailed, "drifting": _drifting, "adversarial": _adversarial}
        keys, values = make[kind](keys, values, generator)
    return keys.to(device, dtype), values.to(device, dtype)


def _own_topics(keys: Tensor, topic: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The topic of each token, `[B, Hkv, T, D]`, of `count` random ones."""
    topics = torch.randn(*keys.shape[:2], count, keys.shape[3], generator=generator)
    return topics.gather(2, topic[..., None].expand(keys.shape))


def _heavy_tailed(
    keys: Tensor, values: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    groups, tokens, head_dim = keys.shape[:2], keys.shape[2], keys.shape[3]
    count = max(tokens // 16, 1)
    # Zipf's law: topic r is as common as 1 / (r + 1).
    common = 1 / torch.arange(1.0, count + 1)
    topic = torch.multinomial(
        common, groups.numel() * tokens, replacement=True, generator=generator
    ).view(*groups, tokens)
    own = _own_topics(keys, topic, count, generator)
    # Student's t with 3 degrees of freedom, of variance 1.
    degrees = torch.randn(3, *keys.shape, generator=generator).square().mean(dim=0)
    noise = keys / degrees.sqrt() / 3**0.5
    length = (0.5 * torch.randn(*groups, tokens, 1, generator=generator)).exp()
    large = torch.ones(*groups, 1, head_dim)
    large[..., : max(head_dim // 32, 1)] = 4.0
    return (own + 0.4 * noise) * length * large, 0.5 * own + values


def _drifting(keys: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    groups, tokens, head_dim = keys.shape[:2], keys.shape[2], keys.shape[3]
    count = max(tokens // 512, 1)
    topic = torch.randint(count, (*groups, tokens), generator=generator)
    begin = _own_topics(keys, topic, count, generator)
    end = _own_topics(keys, topic, count, generator)
    # From one random topic to another on an arc, so that no place of the context has longer keys.
    angle = torch.linspace(0, torch.pi / 2, tokens)[:, None]
    own = begin * angle.cos() + end * angle.sin()
    direction = torch.randn(*groups, 1, head_dim, generator=generator)
    return own + direction * angle.sin() + 0.4 * keys, 0.5 * own + values


def _adversarial(keys: Tensor, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    groups, tokens = keys.shape[:2], keys.shape[2]
    count = max(tokens // 64, 1)
    topic = torch.randint(count, (*groups, tokens), generator=generator)
    own = _own_topics(keys, topic, count, generator)
    hidden = torch.rand(*groups, tokens, 1, generator=generator) < 1 / 16
    keys = (own + 0.4 * keys) * torch.where(hidden, 1.5, 0.5)
    return keys, own * torch.where(hidden, -1.0, 1.0) + values


def make_query(keys: Tensor, num_query_heads: int, *, seed: int = 1) -> Tensor:
    """Queries `[B, Hq, 1, D]` that look for tokens of `keys` `[B, Hkv, T, D]`.

    Each KV head's queries look for the same random token, as the heads of a group tend to, with
    noise of their own.
    """
    rows, heads, tokens, head_dim = keys.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, num_query_heads, 1, head_dim, generator=generator)
    if tokens > 0:
        token = torch.randint(tokens, (rows, heads), generator=generator).to(keys.device)
        wanted = keys.float().gather(2, token[..., None, None].expand(rows, heads, 1, head_dim))
        noise = noise.to(keys.device) + wanted.repeat_interleave(num_query_heads // heads, dim=1)
    return noise.to(keys.device, keys.dtype)


def dense_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query per head to all tokens, `[B, Hq, 1, D]`, in the arguments' dtype.

    Args:
        query: `[B, Hq, 1, D]`.
        keys, values: `[B, Hkv, T, D]`.
        starts: `[B]`, first token of a left-padded row; None: no padding.
        scale: factor on q . k; None: 1 / sqrt(D).
    """
    rows, query_heads, _, head_dim = query.shape
    heads = keys.shape[1]
    grouped = query.reshape(rows, heads, query_heads // heads, head_dim)
    logit = grouped @ keys.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if starts is not None:
        padding = torch.arange(keys.shape[2], device=keys.device) < starts[:, None]
        logit = logit.masked_fill(padding[:, None, None], -torch.inf)
    return (logit.softmax(dim=-1) @ values).reshape(query.shape)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """|actual - exact| / |exact|, over all elements, in float64."""
    difference = (actual.double() - exact.double()).norm()
    return float(difference / exact.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def assert_within_budget(actual: Tensor, exact: Tensor, eager: Tensor, name: str = "out") -> None:
    """Asserts that a kernel is about as exact as plain torch in the same dtype.

    At every element the error against `exact` may be twice the largest error of `eager`, plus one
    rounding of `actual`'s dtype at the size of that element; infinities and NaN must be where
    `exact` has them.

    Args:
        actual: what the kernel gave.
        exact: float64.
        eager: the same in plain torch in the kernel's dtype of arithmetic or storage; several such
            runs, in orders of summation that are as good, may stand on a further first axis.
        name: for the message.

    Raises:
        AssertionError: with the worst coordinate and both values.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert exact.dtype == torch.float64, f"{name}: exact must be float64, got {exact.dtype}"
    actual64, eager64 = actual.double().cpu(), eager.double().cpu()
    exact = exact.cpu()
    for kind, test in (("NaN", torch.isnan), ("infinity", torch.isinf)):
        wrong = test(actual64) != test(exact)
        assert not wrong.any(), f"{name}: {kind} misplaced at {wrong.nonzero()[0].tolist()}"
    same_infinity = torch.isinf(exact) & (actual64 == exact)
    assert bool((same_infinity == torch.isinf(exact)).all()), f"{name}: infinity of the wrong sign"
    finite = torch.isfinite(exact)
    if not finite.any():
        return
    step = torch.finfo(actual.dtype).eps
    error = torch.where(finite, (actual64 - exact).abs(), 0.0)
    largest = torch.where(finite, (eager64 - exact).abs(), 0.0).max()
    excess = error - torch.where(finite, 2 * largest + step * exact.abs(), 0.0)
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), excess.shape)]
        raise AssertionError(
            f"{name} at {at}: {actual64.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}; "
            f"error {error.flatten()[worst]:.3g}, plain torch errs by at most {float(largest):.3g}"
        )


def in_orders_of_head_dim(
    arguments: Arguments, names: tuple[str, ...]
) -> Iterator[tuple[Arguments, Tensor]]:
    """The arguments with the last axis of `names` in other orders, and what puts it back.

    Sums over head_dim round differently in each: one run may happen to be exact, several are not.
    """
    head_dim = arguments[names[0]].shape[-1]
    generator = torch.Generator().manual_seed(head_dim)
    orders = [torch.arange(head_dim), torch.arange(head_dim).flip(0)]
    orders += [torch.randperm(head_dim, generator=generator) for _ in range(14)]
    for order in orders:
        yield (
            {
                name: value[..., order]
                if name in names
                else value.clone()
                if isinstance(value, Tensor)
                else value
                for name, value in arguments.items()
            },
            order.argsort(),
        )


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`, `[elements, bytes of one]`, on the CPU: a NaN equals itself."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).view(flat.numel(), flat.element_size())


def assert_same(actual: Tensor, expected: Tensor, name: str = "out") -> None:
    """Asserts equal shape, dtype and bits.

    Raises:
        AssertionError: with the first coordinate that differs and both values.
    """
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    wrong = (bits_of(actual) != bits_of(expected)).any(dim=1)
    if wrong.any():
        first = wrong.nonzero()[0]
        at = [int(i) for i in torch.unravel_index(first, actual.shape)]
        raise AssertionError(
            f"{name} at {at}: {actual[tuple(at)].item()}, expected {expected[tuple(at)].item()}; "
            f"{int(wrong.sum())} of {wrong.numel()} differ"
        )


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The values of `tensor` in other places of memory.

    Args:
        tensor: of two or more axes.
        layout: "contiguous"; "permuted": the axes before the last lie in the opposite order, as
            heads and tokens do behind a projection; "padded": a part of a larger tensor, which has
            NaN around it and rows at odd elements; "aligned": the same with rows at multiples of
            16 bytes; "transposed": the last two axes lie in the opposite order, so that no row is
            contiguous.
    """
    if layout == "permuted":
        axes = (*reversed(range(tensor.dim() - 1)), tensor.dim() - 1)
        return tensor.permute(axes).clone(memory_format=torch.contiguous_format).permute(axes)
    if layout in ("padded", "aligned"):
        before = [1] * tensor.dim()
        if layout == "aligned":
            before[-1] = 16 // tensor.element_size()
        larger = tensor.new_full(
            [
                size + (3 if one == 1 else 2 * one)
                for size, one in zip(tensor.shape, before, strict=True)
            ],
            math.nan if tensor.is_floating_point() else 1,
        )
        part = larger[
            tuple(slice(one, one + size) for size, one in zip(tensor.shape, before, strict=True))
        ]
        return part.copy_(tensor)
    if layout == "transposed":
        swapped = tensor.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
        return swapped.transpose(-1, -2)
    return tensor.clone(memory_format=torch.contiguous_format)


def to_float64(arguments: Arguments) -> Arguments:
    """Copies of the arguments, floating-point tensors in float64."""
    return {
        name: value.double()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value.clone()
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


@dataclass(frozen=True)
class Variant:
    """What a test of any op varies."""

    rows: int = 2
    heads: int = 2
    groups: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    magnitude: str = "normal"
    seed: int = 0
    device: str = "cpu"  # where the op runs; tensors are made on the CPU

    @property
    def generator(self) -> torch.Generator:
        """A new one at every call."""
        return torch.Generator().manual_seed(self.seed)

    @property
    def writable_layout(self) -> str:
        """`layout`, or one like it where `device` cannot change rows of that layout in place."""
        if self.layout == "padded" and self.device != "cpu":
            return "aligned"
        return "permuted" if self.layout == "transposed" else self.layout

    def normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        """Normal numbers of this magnitude and dtype, contiguous."""
        return (torch.randn(shape, generator=generator) * MAGNITUDES[self.magnitude]).to(self.dtype)

    def counters(self, **columns: list[int]) -> Tensor:
        """`[B, len(Counter)]` int64: the named columns (in lower case), others random.

        Finished heads, which are 0 between ops, are 0 unless named.
        """
        shape = (self.rows, len(Counter))
        counters = torch.randint(1000, shape, generator=self.generator)
        counters[:, [Counter.FINISHED_HEADS, Counter.OPEN_TOKENS]] = 0
        for name, column in columns.items():
            counters[:, Counter[name.upper()]] = torch.tensor(column, dtype=torch.int64)
        return counters


def variants() -> SearchStrategy[Variant]:
    """Every dtype, head_dim, layout and magnitude, heads of MHA, GQA and MQA, and no row at all."""
    from hypothesis import strategies as st

    return st.builds(
        Variant,
        rows=st.sampled_from((1, 2, 3, 0)),
        heads=st.sampled_from((1, 2, 3)),
        groups=st.sampled_from((1, 2, 3, 4, 7)),
        head_dim=st.sampled_from(HEAD_DIMS),
        dtype=st.sampled_from(ELEMENT_DTYPES),
        layout=st.sampled_from(LAYOUTS),
        magnitude=st.sampled_from(tuple(MAGNITUDES)),
        seed=st.integers(0, 2**16),
    )


def example_arguments(op: str, device: torch.device | str = "cpu") -> Arguments:
    """Small arguments that `torch.ops.retro.<op>` accepts, every size another.

    Tensors are zero, but for `retrieved`, which names no cluster; optional arguments are left out.
    """
    rows, heads, query_heads, tokens, head_dim = 2, 3, 6, 5, 64
    slots, capacity, clusters, retrieved = 7, 11, 4, 8
    page_size, pages = 2, 5
    groups, index = (rows, heads), (2, rows, heads)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "keys": ((*groups, tokens, head_dim), torch.float32),
        "values": ((*groups, tokens, head_dim), torch.float32),
        "spans": ((rows, 2), torch.int64),
        "assignment": ((*groups, tokens), torch.int32),
        "mask": ((rows, tokens), torch.bool),
        "steady": ((*index, slots, head_dim), torch.float32),
        "store": ((*index, capacity, head_dim), torch.float32),
        "centroids": ((*index, clusters, head_dim), torch.float32),
        "offsets": ((*groups, clusters + 1), torch.int32),
        "variances": ((*groups, clusters), torch.float32),
        "totals": ((*index, head_dim), torch.float32),
        "counters": ((rows, len(Counter)), torch.int64),
        "query": ((rows, query_heads, head_dim), torch.float32),
        "retrieved": ((*groups, retrieved), torch.int32),
        "addresses": ((*groups, retrieved, 2), torch.int64),
        "pages": ((*index, pages * page_size, head_dim), torch.float32),
        "page_table": ((*groups, capacity // page_size + clusters), torch.int32),
        "free_pages": ((*groups, len(FreeHeader) + pages), torch.int32),
        "decisions": ((*groups, len(DecisionHeader) + pages), torch.int32),
        "requests": ((*groups, len(RequestHeader) + retrieved), torch.int32),
        "cached": ((*groups, clusters), torch.uint8),
        "history": ((*groups, clusters + 1, 2), torch.int64),
        "estimate": ((rows, query_heads, head_dim), torch.float32),
        "estimate_lse": ((rows, query_heads), torch.float32),
        "grad": ((rows, query_heads, head_dim), torch.float32),
        "argument": ((*groups, tokens, head_dim), torch.float32),
        "like": ((1,), torch.float32),
    }
    numbers: Arguments = {
        "cluster_size": 2,
        "segment_size": 4,
        "iterations": 2,
        "max_length": 100,
        "sink_tokens": 1,
        "local_tokens": 1,
        "update_segment": 4,
        "max_retrieved": retrieved,
        "retrieval_budget": 0.5,
        "min_retrieved_clusters": 1,
        "estimation_budget": 0.5,
        "estimator": "mean",
        "scale": 1.0,
        "page_size": page_size,
        "policy": "lru",
        "op": "wave_estimate",
        "select": "",
        "seconds": 0.0,
        "size": [rows, heads],
        "join": True,
    }
    arguments: Arguments = {}
    for argument in getattr(torch.ops.retro, op).default._schema.arguments:
        if argument.has_default_value():
            arguments[argument.name] = argument.default_value
        elif argument.name in tensors:
            shape, dtype = tensors[argument.name]
            fill = -1 if argument.name == "retrieved" else 0
            arguments[argument.name] = torch.full(shape, fill, dtype=dtype, device=device)
        else:
            arguments[argument.name] = numbers[argument.name]
    return arguments


def on_device(arguments: Arguments, device: torch.device | str) -> Arguments:
    """The arguments of an op, tensors on `device` in the same layout."""
    return {
        name: _copy(value, device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def host_copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy in memory of the host that the GPU `device` sees as its own; on a CPU a plain one."""
    like = torch.empty(0, dtype=tensor.dtype, device=device)
    copy: Tensor = torch.ops.retro.host_tensor(like, list(tensor.shape))
    return copy.copy_(tensor)


def _copy(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    # clone() would make a padded tensor contiguous.
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device
    )
    copy.copy_(tensor)
    return copy.requires_grad_(tensor.requires_grad)


def _copies(arguments: Arguments) -> Arguments:
    return {
        name: _copy(value) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _results(outputs: Any) -> dict[str, Tensor]:
    if outputs is None:
        return {}
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    return {f"result {place}": output for place, output in enumerate(outputs)}


def _assert_same_effect(
    actual: Any, actual_arguments: Arguments, expected: Any, expected_arguments: Arguments
) -> None:
    results = _results(actual)
    expectations = _results(expected)
    assert results.keys() == expectations.keys()
    for name, result in results.items():
        assert_same(result, expectations[name], name)
    for name, value in actual_arguments.items():
        if isinstance(value, Tensor):
            assert_same(value, expected_arguments[name], name)


def cpu_kernel_sets() -> list[str]:
    """The names of the CPU kernels that this machine runs, best first."""
    selected = torch.ops.retro.cpu_kernels("")
    runnable = []
    for name in CPU_KERNELS:
        try:
            torch.ops.retro.cpu_kernels(name)
        except RuntimeError:
            continue
        runnable.append(name)
    torch.ops.retro.cpu_kernels(selected)
    return runnable


def every_kernel(device: torch.device | str) -> Iterator[str]:
    """Selects one kind of kernels of `device` after the other and yields its name."""
    if torch.device(device).type != "cpu":
        yield str(device)
        return
    selected = torch.ops.retro.cpu_kernels("")
    try:
        for name in cpu_kernel_sets():
            torch.ops.retro.cpu_kernels(name)
            yield name
    finally:
        torch.ops.retro.cpu_kernels(selected)


def assert_repeats(op: Callable[..., Any], arguments: Arguments) -> None:
    """Asserts the same results and effects, bit for bit, on every call and number of threads."""
    expected_arguments = _copies(arguments)
    expected = op(**expected_arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            actual_arguments = _copies(arguments)
            actual = op(**actual_arguments)
            _assert_same_effect(actual, actual_arguments, expected, expected_arguments)
    finally:
        torch.set_num_threads(threads)


def assert_refused(
    op: Callable[..., Any], arguments: Arguments, message: str, *, by_fake: bool = True
) -> None:
    """Asserts that `op` raises RuntimeError with just this message and has changed nothing by then.

    Args:
        by_fake: the op's fake must raise the same; False for what depends on values.
    """
    from torch._subclasses import FakeTensorMode

    given = _copies(arguments)
    refusal = _refusal(op, given)
    assert refusal == message, f"the op says {refusal!r}, expected {message!r}"
    _assert_same_effect(None, given, None, arguments)
    if by_fake:
        with FakeTensorMode() as mode:
            fakes = {
                name: mode.from_tensor(value) if isinstance(value, Tensor) else value
                for name, value in arguments.items()
            }
            refusal = _refusal(op, fakes)
        assert refusal == message, f"the fake says {refusal!r}, expected {message!r}"


def _refusal(op: Callable[..., Any], arguments: Arguments) -> str | None:
    try:
        op(**arguments)
    except RuntimeError as error:
        return str(error)
    return None


def assert_compiles(
    op: Callable[..., Any],
    arguments: Arguments,
    others: Arguments | None = None,
    backend: str = "aot_eager",
) -> None:
    """Asserts that a graph without breaks does what the op does, bit for bit.

    Args:
        others: arguments of other sizes, which the graph must take without being compiled again;
            the sizes that differ are the dynamic ones, at least 2 in both.
        backend: of torch.compile.
    """
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    first = _copies(arguments)
    for name, other in (others or {}).items():
        if isinstance(other, Tensor):
            for axis, size in enumerate(other.shape):
                if size != first[name].shape[axis]:
                    torch._dynamo.mark_dynamic(first[name], axis)
    for given in (first, others):
        if given is None:
            continue
        actual_arguments, expected_arguments = _copies(given), _copies(given)
        expected = op(**expected_arguments)
        if given is first:
            actual_arguments = first
            actual = compiled(**first)
        else:
            with torch._dynamo.config.patch(error_on_recompile=True):
                actual = compiled(**actual_arguments)
        _assert_same_effect(actual, actual_arguments, expected, expected_arguments)


def assert_captures(op: Callable[..., Any], arguments: Arguments, others: Arguments) -> None:
    """Asserts that a CUDA graph of `op`, replayed with other values, does what the op does.

    Args:
        arguments: on a CUDA device; what the graph is captured with.
        others: the same shapes and numbers, other values.
    """
    static = _copies(arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(**_copies(arguments))  # first calls may load kernels, which a capture forbids
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(**static)
    for given in (others, arguments):
        expected_arguments = _copies(given)
        expected = op(**expected_arguments)
        for name, value in given.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        _assert_same_effect(captured, static, expected, expected_arguments)
