"""Scores all clusters, chooses those to retrieve, estimates the others from means."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract
from retro_ops.ops._contract import ESTIMATORS as ESTIMATORS
from retro_ops.ops._contract import Counter, retrieved_count

OP = "wave_estimate"


def wave_estimate(
    query: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the clusters to read exactly, estimates the next best from centroids and the tail.

    For query head g of a KV head and cluster i, with mean key k_i, mean value v_i and size s_i:

        mass_gi = s_i (1 + spread_gi) exp(scale q_g . k_i)
        spread_gi = scale^2 / 2 variances_i sum_d q_gd^2 totals_0d / sum_d totals_0d
        score_i = sum over g of mass_gi / sum_j mass_gj
        tail_g = sum over the tail of mass_gi    v_mean = totals_1 / indexed tokens of the row
        estimate_g = (sum_i mass_gi v_i + tail_g v_mean) / (sum_i mass_gi + tail_g)
        lse_g = log(sum_i mass_gi + tail_g)

    where the clusters of a row are sorted by score: the first max(round(retrieval_budget C),
    min_retrieved_clusters) are retrieved, the next round(estimation_budget C), over which sum_i
    runs, are estimated, all others are the tail, and C are the live clusters of the row.
    `estimator="mean"` has spread 0 and no tail, and ranks by the softmax of scale q . k alone, as
    the paper does. Ties go to the lower cluster, a cluster without tokens comes last, and on a CPU
    a mass below e^-87 of the largest of its query counts as 0.

    Source: RetroInfer (arXiv 2505.02922), sections 4.1 and 4.2; departs in ranking by mass, in the
    spread and in the tail: exp is convex, so the centroid alone gives a lower bound of the mass
    (the paper's eq. 3), and (1 + spread) is the log1p-damped second-order correction of it. The
    paper leaves the tail out, as if it had no mass.

    Args:
        query: `[B, Hq, D]`, float32, bfloat16 or float16, any strides.
        centroids, offsets, variances, totals, counters: the wave index, as in `pack_clusters`.
        max_retrieved: R, at least what `C` live clusters would retrieve.
        retrieval_budget: fraction of live clusters to retrieve, in 0..1.
        min_retrieved_clusters: floor under it, at least 0.
        estimation_budget: fraction of live clusters to estimate, in 0..1.
        estimator: "variance" or "mean".
        scale: factor on q . k.

    Returns:
        retrieved `[B, Hkv, R]` int32 cluster ids, best first, -1 behind the last; estimate
        `[B, Hq, D]` float32; lse `[B, Hq]` float32, natural log, -inf where nothing is estimated
        and there is no tail.

    Raises:
        RuntimeError: a shape, dtype or number is wrong; the message has the values.

    Mutates nothing. Has no backward pass.
    """
    return torch.ops.retro.wave_estimate(
        query,
        centroids,
        offsets,
        variances,
        totals,
        counters,
        max_retrieved,
        retrieval_budget,
        min_retrieved_clusters,
        estimation_budget,
        estimator,
        scale,
    )


class Scores(NamedTuple):
    """What `wave_estimate` ranks and sums."""

    log_mass: Tensor  # [B, Hkv, G, C]; -inf: no tokens, or not live
    score: Tensor  # [B, Hkv, C]; -1: no tokens, or not live


def reference_scores(
    query: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    estimator: str,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> Scores:
    """Scores of all clusters in plain torch; arithmetic in `dtype`."""
    rows, query_heads, head_dim = query.shape
    heads, clusters = centroids.shape[2:4]
    grouped = query.to(dtype).view(rows, heads, query_heads // heads, head_dim)
    logit = scale * grouped @ centroids[0].to(dtype).transpose(-1, -2)
    size = offsets.diff(dim=-1).to(dtype)[:, :, None]
    live = torch.arange(clusters, device=query.device) < counters[:, Counter.CLUSTERS, None]
    live = live[:, None, None] & (size > 0)
    spread = torch.zeros_like(logit)
    if estimator == "variance":
        residuals = totals[0].to(dtype)
        total = residuals.sum(dim=-1)[:, :, None, None]
        weighted = (grouped.square() * residuals[:, :, None]).sum(dim=-1, keepdim=True)
        per_variance = torch.where(total > 0, scale**2 / 2 * weighted / total, 0.0)
        spread = per_variance * variances.to(dtype)[:, :, None]
    log_mass = (logit + size.log() + spread.log1p()).masked_fill(~live, -torch.inf)
    ranked = log_mass if estimator == "variance" else logit.masked_fill(~live, -torch.inf)
    score = ranked.softmax(dim=-1).sum(dim=2).masked_fill(~live[:, :, 0], -1.0)
    return Scores(log_mass, score)


def reference(
    query: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`wave_estimate` in plain torch; arithmetic in `dtype`, weights rounded to `weights_dtype`."""
    scores = reference_scores(
        query, centroids, offsets, variances, totals, counters, estimator, scale, dtype
    )
    rows, heads, clusters = scores.score.shape
    order = scores.score.sort(dim=-1, descending=True, stable=True).indices
    retrieved = order.new_full((rows, heads, max_retrieved), -1)
    estimated = torch.zeros(rows, heads, 1, clusters, dtype=torch.bool, device=query.device)
    tail = torch.zeros_like(estimated)
    for row in range(rows):
        live = int(counters[row, Counter.CLUSTERS])
        count = retrieved_count(retrieval_budget, min_retrieved_clusters, live)
        retrieved[row, :, :count] = order[row, :, :count]
        last = min(count + round(estimation_budget * live), live)
        estimated[row].scatter_(2, order[row, :, None, count:last], True)
        if estimator == "variance":
            tail[row].scatter_(2, order[row, :, None, last:live], True)
    log_mass = scores.log_mass.masked_fill(~estimated, -torch.inf)
    log_tail = scores.log_mass.masked_fill(~tail, -torch.inf).logsumexp(dim=-1)
    lse = torch.logaddexp(log_mass.logsumexp(dim=-1), log_tail)
    weights = (log_mass - lse[..., None]).exp().nan_to_num(0.0)
    weights = weights.to(weights_dtype or dtype).to(dtype)
    tail_weight = (log_tail - lse).exp().nan_to_num(0.0)
    indexed = counters[:, Counter.INDEXED_TOKENS].clamp(min=1)[:, None, None]
    mean_value = (totals[1].to(dtype) / indexed.to(dtype))[:, :, None]
    estimate = weights @ centroids[1].to(dtype) + tail_weight[..., None] * mean_value
    return retrieved.int(), estimate.flatten(1, 2), lse.flatten(1, 2)


@torch.library.register_fake(f"retro::{OP}")
def _(
    query: Tensor,
    centroids: Tensor,
    offsets: Tensor,
    variances: Tensor,
    totals: Tensor,
    counters: Tensor,
    max_retrieved: int,
    retrieval_budget: float,
    min_retrieved_clusters: int,
    estimation_budget: float,
    estimator: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, query_heads, heads, head_dim = contract.check_estimate(
        OP,
        query,
        (centroids, offsets, variances, totals),
        counters,
        max_retrieved,
        retrieval_budget,
        min_retrieved_clusters,
        estimation_budget,
        estimator,
    )
    return (
        query.new_empty((rows, heads, max_retrieved), dtype=torch.int32),
        query.new_empty((rows, query_heads, head_dim), dtype=torch.float32),
        query.new_empty((rows, query_heads), dtype=torch.float32),
    )


contract.refuse_backward(OP, differentiable=(0, 1, 3, 4), arguments=12)
