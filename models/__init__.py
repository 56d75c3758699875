"""Hugging Face models on retro_ops. Importing this registers the attention function `retro`."""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "retro_ops.models needs transformers; install it with `pip install 'retro_ops[models]'`"
    ) from error

from retro_ops.models.attention import register
from retro_ops.models.cache import RetroCache
from retro_ops.models.export import export_model, load_exported
from retro_ops.models.load import load_model, load_tokenizer
from retro_ops.models.prefill import LocalPrefill, PrefillAttention
from retro_ops.models.spread import spread

register()

__all__ = [
    "LocalPrefill",
    "PrefillAttention",
    "RetroCache",
    "export_model",
    "load_exported",
    "load_model",
    "load_tokenizer",
    "spread",
]
