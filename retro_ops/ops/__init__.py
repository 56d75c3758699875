"""The ops, in alphabetical order. Schemas, in data-flow order, and CPU kernels are in `csrc/`."""

from retro_ops import _library  # noqa: F401  (schemas first: fakes attach to them)
from retro_ops.ops.append_tokens import append_tokens
from retro_ops.ops.cluster_gather import cluster_gather
from retro_ops.ops.cluster_keys import cluster_keys
from retro_ops.ops.decode_attention import decode_attention
from retro_ops.ops.grow_index import grow_index
from retro_ops.ops.merged_attention import merged_attention
from retro_ops.ops.offloaded_attention import offloaded_attention
from retro_ops.ops.pack_clusters import pack_clusters
from retro_ops.ops.page_gather import page_gather
from retro_ops.ops.update_pages import update_pages
from retro_ops.ops.wave_estimate import wave_estimate

__all__ = [
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
