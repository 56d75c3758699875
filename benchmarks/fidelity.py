"""Next-token distributions over a long text, dense against retro, fed the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retro_ops import RetroConfig
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.recall_curves import after_one_prompt
from retro_ops.benchmarks.recordings import Progress, check_length, input_ids
from retro_ops.models import RetroCache, load_model
from retro_ops.models.generate import Decoder
from retro_ops.models.recall import is_recall

COLUMNS = (
    *("model", "text", "dtype", "context", "positions", "attention", "estimator"),
    *("kl", "kl_95", "top_1", "perplexity", "ratio", "bytes"),
)
"""What a table shows of a row; the machine is in its title."""


def run(
    *,
    model_name: str,
    text: str,
    contexts: Sequence[int],
    positions: int,
    batch_size: int,
    estimators: Sequence[str],
    config: RetroConfig,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
) -> Iterator[list[dict[str, object]]]:
    """Rows of figures, for one context after another.

    A model reads `context` tokens of a text as a prompt and is then fed the next ones, one step a
    token, whatever it would have written. At each position the distribution of the token that
    follows is compared with that of dense attention, which reads all tokens at once. `kl` is the
    mean of KL(dense || other) in nats, `kl_95` the value that 95 % of positions stay under; `top_1`
    the share of positions with the same most likely token; `ratio` the perplexity over that of
    dense attention. The row "dense steps" is dense attention fed token by token: what rounding
    alone does.

    Args:
        model_name: as in `load_model`.
        text: as in `recordings.text_of`; recall models have their own.
        contexts: tokens before the first position.
        positions: of each row.
        batch_size: rows, each another text.
        estimators: of retro.
        config: budgets; the estimator is replaced.
        dtype, device: of the model.
        progress: told about every step.

    Raises:
        ValueError: the model reads fewer tokens.
    """
    facts = machine.facts(device)
    model = load_model(model_name, dtype=dtype, device=device)
    check_length(model.config, max(contexts) + positions + 1)
    for context in contexts:
        ids = input_ids(model_name, text, context, positions + 1, rows=batch_size).to(device)
        case = {
            "model": model_name,
            "text": "records" if is_recall(model_name) else text,
            "dtype": str(dtype).removeprefix("torch."),
            "context": context,
            "positions": positions * batch_size,
        }
        rows = _rows(model, ids, context, estimators, config, progress)
        yield [{**case, **row, **facts} for row in rows]


@torch.inference_mode()
def _rows(
    model: PreTrainedModel,
    ids: Tensor,
    context: int,
    estimators: Sequence[str],
    config: RetroConfig,
    progress: Progress,
) -> list[dict[str, object]]:
    rows, positions = ids.shape[0], ids.shape[1] - context - 1
    progress(f"{context:,} tokens: dense", 0, positions)
    truth = ids[:, context + 1 :]
    exact = _dense_log_probs(model, ids[:, :-1], positions)
    nll = -float(exact.gather(2, truth[..., None]).double().mean())
    figures: list[dict[str, object]] = [
        {"attention": "dense", "perplexity": math.exp(nll), "ratio": 1.0}
    ]
    decoder = Decoder(model, "dense", batch_size=rows, max_length=ids.shape[1])
    decoder.prefill(ids[:, :context])
    figures.append({"attention": "dense steps", **_read_on(decoder, ids, exact, nll, progress)})
    del decoder
    variants = [replace(config, estimator=estimator) for estimator in estimators]
    for variant, decoder in after_one_prompt(model, ids[:, :context], variants, ids.shape[1]):
        assert isinstance(decoder.cache, RetroCache)
        figure = _read_on(decoder, ids, exact, nll, progress)
        stats = decoder.cache.stats()
        figures.append(
            {
                "attention": "retro",
                "estimator": variant.estimator,
                **figure,
                "bytes": round(stats["bytes_read_per_token"]),
            }
        )
    return figures


def _read_on(
    decoder: Decoder, ids: Tensor, exact: Tensor, nll: float, progress: Progress
) -> dict[str, object]:
    """Figures of the tokens behind the prompt, fed one by one.

    Args:
        decoder: holds the prompt.
        ids: `[B, T + positions + 1]`.
        exact: log-probabilities of dense attention, `[B, positions, V]`.
        nll: mean negative log-likelihood of dense attention.
    """
    positions = exact.shape[1]
    following = ids[:, -positions - 1 :]
    measured = []
    for position in range(positions):
        progress("reads on", position, positions)
        logits = decoder.step(following[:, position, None])
        measured.append(_compare(logits, exact[:, position], following[:, position + 1]))
    kl, same, own_nll = (torch.stack(part) for part in zip(*measured, strict=True))
    mean_nll = float(own_nll.mean())
    return {
        "kl": float(kl.mean()),
        "kl_95": float(kl.quantile(0.95)),
        "top_1": float(same.mean()),
        "perplexity": math.exp(mean_nll),
        "ratio": math.exp(mean_nll - nll),
    }


def _dense_log_probs(model: PreTrainedModel, ids: Tensor, positions: int) -> Tensor:
    """Log-probabilities of dense attention at the last positions, `[B, positions, V]` float32."""
    decoder = Decoder(model, "dense", batch_size=ids.shape[0], max_length=ids.shape[1])
    logits = model(
        input_ids=ids, past_key_values=decoder.cache, use_cache=True, logits_to_keep=positions
    ).logits
    return logits.float().log_softmax(dim=2)


def _compare(logits: Tensor, exact: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL from `exact` `[B, V]`, whether the most likely token is the same, and the negative
    log-likelihood of `truth` `[B]`: `[B]` float64 each."""
    log_probs = logits.float().log_softmax(dim=1)
    # Near zero a sum of many terms of either sign: in float64.
    kl = (exact.double().exp() * (exact.double() - log_probs.double())).sum(dim=1)
    same = (log_probs.argmax(dim=1) == exact.argmax(dim=1)).double()
    return kl, same, -log_probs.double().gather(1, truth[:, None])[:, 0]
