"""Retro attention in a model of your own: a RetroLayer inside `torch.compile(fullgraph=True)`.

`Attention` below is all that changes: a prompt attends densely and goes into the layer, which
indexes it; a step is `RetroLayer.decode`. The layer's state is in buffers, so the whole model
compiles with `fullgraph=True`, once for all tokens. The weights are random; what comes out is
compared with dense attention over the same tokens.

    python examples/own_model.py
    python examples/own_model.py --retrieval-budget 1    # reads everything: equal up to rounding
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from retro_ops import RetroConfig, RetroLayer

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
WIDTH = HEADS * HEAD_DIM


class Attention(nn.Module):
    """Grouped-query attention. One with rotary embedding would apply it in `project`."""

    def __init__(self, config: RetroConfig, max_length: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.retro = RetroLayer(
            config,
            batch_size=1,
            num_query_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_length=max_length,
            dtype=torch.float32,
        )

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, `[B, heads, T, D]`, of `[B, T, WIDTH]`."""
        heads = self.qkv(x).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
        return heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """One new token if `x` is `[B, 1, WIDTH]`, else a prompt."""
        query, key, value = self.project(x)
        if x.shape[1] == 1:
            mixed = self.retro.decode(query, key, value)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
            self.retro.prefill(key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Blocks of attention and a feed-forward network, without an embedding."""

    def __init__(self, layers: int, config: RetroConfig, max_length: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(Attention(config, max_length) for _ in range(layers))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, network in zip(self.attentions, self.networks, strict=True):
            x = x + attention(F.rms_norm(x, (WIDTH,)))
            x = x + network(F.rms_norm(x, (WIDTH,)))
        return x


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Reads a prompt, decodes with the compiled model, and compares with dense attention."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens after it (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--retrieval-budget", type=float, default=RetroConfig().retrieval_budget)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.context < 2 or options.steps < 2 or options.layers < 1:
        parser.error("--context and --steps must be at least 2, --layers at least 1")
    torch.manual_seed(0)
    total = options.context + options.steps
    try:
        config = RetroConfig(retrieval_budget=options.retrieval_budget)
        model = Model(options.layers, config, total).eval().to(options.device)
    except (RuntimeError, ValueError, MemoryError) as error:
        parser.error(str(error))
    tokens = torch.randn(1, total, WIDTH, device=options.device)

    model(tokens[:, : options.context])
    step = torch.compile(model, fullgraph=True, dynamic=False)
    outs, seconds = [], []
    for number, token in enumerate(tokens[:, options.context :].split(1, dim=1)):
        begin = time.perf_counter()
        # The first step compiles; no later one may.
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            outs.append(step(token.contiguous()).cpu())
        seconds.append(time.perf_counter() - begin)
    first = model.attentions[0]
    assert isinstance(first, Attention)
    stats = first.retro.stats()

    # As one prompt, which attends densely.
    dense = model(tokens)[:, options.context :].cpu()
    difference = (torch.cat(outs, dim=1) - dense).norm() / dense.norm()
    print(f"one graph, compiled in {seconds[0]:.1f} s; a step takes "
          f"{1e3 * sorted(seconds[1:])[len(seconds) // 2 - 1]:.2f} ms (median)")  # fmt: skip
    print(f"layer 0: {stats['clusters']} clusters, {stats['bytes_read_per_token']:,} bytes a step")
    print(f"relative error against dense attention: {float(difference):.2e}")


if __name__ == "__main__":
    main()
