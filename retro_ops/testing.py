"""Inputs, exact answers and the error budget, for tests and benchmarks of attention over long contexts."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("clustered", "random")


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
        kind: "random": independent normal keys, which no index can group; "clustered": keys near one
            of about T / 64 topics that drift along the context, as in real text.
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
    return keys.to(device, dtype), values.to(device, dtype)


def make_query(keys: Tensor, num_query_heads: int, *, seed: int = 1) -> Tensor:
    """Queries `[B, Hq, 1, D]` that look for tokens of `keys` `[B, Hkv, T, D]`.

    Each KV head's queries look for the same random token, as the heads of a group tend to, with noise
    of their own.
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
    """Attention of one query per head to all tokens, `[B, Hq, 1, D]`, in the dtype of the arguments.

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
    rounding of `actual`'s dtype at the size of that element; infinities and NaN must be where `exact`
    has them.

    Args:
        actual: what the kernel gave.
        exact: float64.
        eager: the same in plain torch in the kernel's dtype of arithmetic or storage.
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
