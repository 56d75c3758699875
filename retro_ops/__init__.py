"""RetroInfer (arXiv 2505.02922) as custom ops: long contexts at the cost of short ones."""

from importlib.metadata import version as _version

from retro_ops.config import RetroConfig
from retro_ops.layer import RetroLayer
from retro_ops.ops import (
    append_tokens,
    cluster_gather,
    cluster_keys,
    decode_attention,
    grow_index,
    merged_attention,
    offloaded_attention,
    pack_clusters,
    page_gather,
    update_pages,
    wave_estimate,
)

__version__ = _version("retro_ops")

__all__ = [
    "RetroConfig",
    "RetroLayer",
    "append_tokens",
    "cluster_gather",
    "cluster_keys",
    "decode_attention",
    "grow_index",
    "merged_attention",
    "offloaded_attention",
    "pack_clusters",
    "page_gather",
    "update_pages",
    "wave_estimate",
]
