"""Spherical k-means of the keys of each segment."""

from __future__ import annotations

import torch
from torch import Tensor

from retro_ops.ops import _contract as contract

OP = "cluster_keys"


def cluster_keys(
    keys: Tensor, spans: Tensor, cluster_size: int, segment_size: int, iterations: int
) -> Tensor:
    """Assigns each key of a row's span to a cluster of about `cluster_size` keys.

    The span is cut into round(tokens / segment_size) equal segments; each is centred on its own
    mean and clustered by itself, in `iterations` passes of

        assignment_t = argmax_c <key_t - mean, centroid_c>
        centroid_c   = direction of sum over assigned t of (key_t - mean)

    from evenly spaced keys; ties go to the lower cluster, an empty cluster keeps its centroid.

    The last eighth of a segment's clusters, o of them, is for outliers, and empty in the first two
    passes: before the third, cluster j of them gets the direction of the key that is farthest from
    the mean of its cluster, among the keys j, j + o, j + 2 o, ... of the segment (the first of
    equals). A key that is like no other, a number in a long text, is thus not drowned by a cluster
    whose mean says nothing of it. A segment with as many clusters as keys needs none of this.

    Source: RetroInfer (arXiv 2505.02922), section 4.2; departs in the outliers, in that the last
    pass, too, stays inside the segment, and that the mean is the segment's: indexing two segments
    one after the other gives the clusters of indexing them at once, and the work is linear in the
    context.

    Args:
        keys: `[B, Hkv, T, D]`, float32, bfloat16 or float16, any strides.
        spans: `[B, 2]` int64: first token to cluster and the one after the last; may be empty.
        cluster_size: tokens per cluster on average, at least 1.
        segment_size: tokens per segment, at least `cluster_size`.
        iterations: passes, at least 1.

    Returns:
        `[B, Hkv, T]` int32: cluster of each token, from 0, in the order of segments; -1 outside the
        span. A span of n tokens has round(n / cluster_size) clusters, halves up, at least one.

    Raises:
        RuntimeError: a shape, dtype, size or span is wrong; the message has the values.

    Mutates nothing. The same keys give the same clusters, bit for bit.
    """
    return torch.ops.retro.cluster_keys(keys, spans, cluster_size, segment_size, iterations)


def reference(
    keys: Tensor, spans: Tensor, cluster_size: int, segment_size: int, iterations: int
) -> Tensor:
    """`cluster_keys` in plain torch, in float64 for float64 keys, else in float32."""
    rows, heads, tokens, _ = keys.shape
    keys = keys if keys.dtype == torch.float64 else keys.float()
    assignment = keys.new_full((rows, heads, tokens), -1, dtype=torch.int32)
    for row in range(rows):
        first, last = spans[row].tolist()
        count = last - first
        if count <= 0:
            continue
        segments = contract.segment_count(count, segment_size)
        clusters = contract.cluster_count(count, cluster_size)
        for segment in range(segments):
            begin, end = (count * (segment + step) // segments for step in (0, 1))
            lowest, highest = (clusters * (segment + step) // segments for step in (0, 1))
            for head in range(heads):
                own = keys[row, head, first + begin : first + end]
                assignment[row, head, first + begin : first + end] = lowest + _cluster_segment(
                    own - own.mean(dim=0), highest - lowest, iterations
                )
    return assignment


def _cluster_segment(centred: Tensor, clusters: int, iterations: int) -> Tensor:
    tokens, outliers = len(centred), contract.outlier_count(len(centred), clusters)
    regular = clusters - outliers
    seeds = [(2 * cluster + 1) * tokens // (2 * regular) for cluster in range(regular)]
    centroids = _directions(centred[seeds])
    assigned = (centred @ centroids.T).argmax(dim=1)
    for step in range(1, iterations):
        sums = torch.zeros_like(centroids).index_add_(0, assigned, centred)
        norms = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(norms > 0, sums / norms, centroids)
        if step == contract.OUTLIER_PASS:
            sizes = torch.bincount(assigned, minlength=regular).clamp(min=1)
            distance = (centred - (sums / sizes[:, None])[assigned]).square().sum(dim=1)
            farthest = [
                outlier + outliers * int(distance[outlier::outliers].argmax())
                for outlier in range(outliers)
            ]
            centroids = torch.cat((centroids, _directions(centred[farthest])))
        assigned = (centred @ centroids.T).argmax(dim=1)
    return assigned.int()


def _directions(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1, eps=0.0).nan_to_num(0.0)


@torch.library.register_fake(f"retro::{OP}")
def _(keys: Tensor, spans: Tensor, cluster_size: int, segment_size: int, iterations: int) -> Tensor:
    contract.check_shape(OP, "keys", keys, "B, Hkv, T, D", (None, None, None, None))
    contract.check_element_dtype(OP, "keys", keys)
    contract.check_head_dim(OP, keys.shape[3])
    contract.check_shape(OP, "spans", spans, "B, 2", (keys.shape[0], 2))
    contract.check_dtype(OP, "spans", spans, torch.int64)
    contract.check_device(OP, "spans", spans, keys, "keys")
    contract.check_clustering(OP, cluster_size, "segment_size", segment_size, iterations)
    return keys.new_empty(keys.shape[:3], dtype=torch.int32)
