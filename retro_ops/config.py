"""All numbers of RetroInfer in one frozen record, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields

from retro_ops.ops.wave_estimate import ESTIMATORS


@dataclass(frozen=True)
class RetroConfig:
    """How a long KV cache is indexed and how much of it a step reads.

    The defaults are the paper's (arXiv 2505.02922, section 5.1), but for `min_retrieved_clusters`
    and `estimator`, which are ours. Budgets are fractions of a row's live clusters, rounded; their
    sum may exceed 1 (estimation takes what retrieval leaves).

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range; the message has the value and the range.
    """

    sink_tokens: int = 4
    """Tokens; first tokens of a row, always read exactly. At least 0."""
    local_tokens: int = 64
    """Tokens; latest tokens of a row, always read exactly. At least 1: a token reads itself."""
    cluster_size: int = 16
    """Tokens per cluster on average. At least 1."""
    segment_size: int = 8192
    """Tokens clustered together in a prompt. At least `cluster_size`."""
    kmeans_iterations: int = 10
    """Passes of k-means. At least 1; with fewer than 3 an eighth of the clusters stays empty."""
    retrieval_budget: float = 0.018
    """Fraction of clusters read exactly, in 0..1; 1 is dense attention up to rounding."""
    min_retrieved_clusters: int = 64
    """Clusters; floor under the retrieval zone, for short contexts. At least 0, which is none."""
    estimation_budget: float = 0.232
    """Fraction of clusters estimated from their centroids, in 0..1; one mean value stands for those
    that are left, the tail."""
    estimator: str = "variance"
    """"variance" corrects a centroid's mass by the spread of its keys; "mean" is the paper's, and
    leaves the tail out."""
    update_segment: int = 1024
    """Tokens that are indexed at once while decoding, and the shortest indexed prompt (besides sink
    and local tokens). A positive multiple of `cluster_size`."""
    page_size: int = 8
    """Tokens per page of the page cache. At least 1."""
    cache_ratio: float = 0.05
    """Fraction of the KV that the page cache holds when offloaded, in 0..1."""
    merged_updates: int = 4
    """Segments indexed while decoding that become one, clustered anew, once there are so many in a
    row: clusters err less if there are more tokens to group. At least 1, which is never."""

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str):
            raise TypeError(f"RetroConfig: estimator must be a str, got {self.estimator!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"RetroConfig: {field.name} must be an int, got {value!r}")
            if field.type == "float" and (
                not isinstance(value, int | float) or isinstance(value, bool)
            ):
                raise TypeError(f"RetroConfig: {field.name} must be a number, got {value!r}")
            if field.type == "float" and not 0 <= value <= 1:  # NaN, too
                raise ValueError(f"RetroConfig: {field.name} must lie in 0..1, got {value}")
            # One type a field, whatever it was given as: a compiled graph is made for types.
            if field.type == "float":
                object.__setattr__(self, field.name, float(value))
        lowest = {
            "sink_tokens": 0,
            "local_tokens": 1,
            "cluster_size": 1,
            "kmeans_iterations": 1,
            "min_retrieved_clusters": 0,
            "merged_updates": 1,
            "page_size": 1,
        }
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"RetroConfig: {name} must be at least {low}, got {getattr(self, name)}"
                )
        if self.segment_size < self.cluster_size:
            raise ValueError(
                f"RetroConfig: segment_size must be at least cluster_size ({self.cluster_size}), "
                f"got {self.segment_size}"
            )
        if self.update_segment < 1 or self.update_segment % self.cluster_size:
            raise ValueError(
                "RetroConfig: update_segment must be a positive multiple of cluster_size "
                f"({self.cluster_size}), got {self.update_segment}"
            )
        if self.estimator not in ESTIMATORS:
            raise ValueError(
                f"RetroConfig: estimator must be one of {', '.join(ESTIMATORS)}, "
                f"got {self.estimator!r}"
            )

    @property
    def steady_capacity(self) -> int:
        """Tokens of the steady zone at which `update_segment` of them become clusters."""
        return self.sink_tokens + self.local_tokens + self.update_segment
