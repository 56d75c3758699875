"""What was tried to make the estimate better, on recorded queries and keys, at equal bytes.

Everything here is plain torch beside the package: a variant that pays would go into the ops. Every
variant reads as many bytes as the defaults do: the same number of tokens, clusters being taken in
the variant's order until that number is reached, or fewer, where the variant reads more of the
index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from retro_ops import RetroConfig, cluster_keys
from retro_ops.benchmarks import machine
from retro_ops.benchmarks.quality import made
from retro_ops.benchmarks.recordings import Progress, Recording, record
from retro_ops.ops._contract import cluster_count, retrieved_count, segment_count

DEFAULT = "default"
CALIBRATED = torch.linspace(0.0, 4.0, 41)
"""Factors on the spread that calibration chooses from."""


@dataclass(frozen=True)
class Built:
    """How the tokens of a layer are grouped."""

    config: RetroConfig
    metric: str = ""
    """"": cosine of centred keys, the default; "plain": the same without clusters for outliers;
    "euclidean": distance, without them; with "queries" or "queries,
    elements" behind it, the same after a linear map that makes squared lengths the mean squared
    products with the last prompt queries, with the correlations of elements or without."""
    flat: float = 0.1
    """Of the squared products with queries, what is replaced by that of queries without direction:
    few queries span few directions."""
    last_pass: str = ""
    """"": in the segment; "global": every token may go to any cluster of the row at the end."""


class Index:
    """One layer's clusters, and the exact logits of its queries; everything in float32.

    H is `Hkv`, S counts queries, N indexed tokens, C clusters, W steady tokens.
    """

    def __init__(self, recording: Recording, built: Built) -> None:
        config = built.config
        heads, head_dim = recording.keys.shape[1], recording.keys.shape[3]
        self.recording, self.config, self.scale = recording, config, recording.scale
        self.queries = recording.queries[0].unflatten(0, (heads, -1))  # [H, G, S, D]
        steps = self.queries.shape[2]
        first, last = config.sink_tokens, recording.prompt - config.local_tokens
        assignment = _assign(recording, built, first, last)
        self.clusters = cluster_count(last - first, config.cluster_size)

        # In cluster order, as in the KV store.
        order = assignment.argsort(dim=1, stable=True)
        self.cluster = assignment.gather(1, order)  # [H, N]
        place = order[..., None].expand(-1, -1, head_dim)
        keys = recording.keys[0, :, first:last].gather(1, place)
        self.values = recording.values[0, :, first:last].gather(1, place)  # [H, N, D]
        ones = torch.ones(self.cluster.shape)
        self.sizes = torch.zeros(heads, self.clusters).scatter_add_(1, self.cluster, ones)
        count = self.sizes.clamp(min=1)[..., None]
        self.mean_keys = self.sum_by_cluster(keys) / count  # [H, C, D]
        self.mean_values = self.sum_by_cluster(self.values) / count
        residual = keys - self.of_tokens(self.mean_keys)
        squares = self.sum_by_cluster(residual.square())
        self.variances = (squares / count).sum(dim=2)  # [H, C]
        self.diagonals = squares / count  # [H, C, D]
        self.residuals = squares.sum(dim=1)  # [H, D]
        difference = self.values - self.of_tokens(self.mean_values)
        self.value_variances = (self.sum_by_cluster(difference.square()) / count).sum(dim=2)
        self.mean_value = self.values.mean(dim=1)  # [H, D]

        self.logit = self.logits_of(self.queries, keys)  # [H, G, S, N]
        total = recording.prompt + steps
        steady = torch.cat((torch.arange(first), torch.arange(last, total)))
        steady_logit = self.logits_of(self.queries, recording.keys[0, :, steady])
        unseen = steady > recording.prompt + torch.arange(steps)[:, None]  # [S, W]
        steady_logit = steady_logit.masked_fill(unseen, -torch.inf)
        self.lse = torch.logaddexp(self.logit.logsumexp(dim=3), steady_logit.logsumexp(dim=3))
        weight = (steady_logit - self.lse[..., None]).exp()
        self.steady_sum = weight @ recording.values[0, :, steady][:, None]  # [H, G, S, D]
        self.steady_mass = weight.sum(dim=3)  # [H, G, S]
        self.weight = (self.logit - self.lse[..., None]).exp()
        self.exact = self.weight @ self.values[:, None] + self.steady_sum

        self.center = self.logits_of(self.queries, self.mean_keys)  # [H, G, S, C]
        log_size = self.sizes.log()[:, None, None]
        self.log_size = log_size  # -inf: no tokens
        self.spread = self.spread_of(self.queries)  # [H, G, S, C]

    def sum_by_cluster(self, tokens: Tensor) -> Tensor:
        """`[H, N, any]` to `[H, C, any]`."""
        sums = tokens.new_zeros(tokens.shape[0], self.clusters, tokens.shape[2])
        return sums.scatter_add_(1, self.cluster[..., None].expand_as(tokens), tokens)

    def of_tokens(self, clusters: Tensor) -> Tensor:
        """`[H, C, any]` to `[H, N, any]`."""
        index = self.cluster[..., None].expand(-1, -1, clusters.shape[2])
        return clusters.gather(1, index)

    def logits_of(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Queries `[H, G, any, D]` times keys `[H, more, D]`: `[H, G, any, more]`."""
        return self.scale * queries @ keys[:, None].transpose(2, 3)

    def spread_of(self, queries: Tensor) -> Tensor:
        """The spread of `wave_estimate` for queries `[H, G, any, D]`."""
        weighted = (queries.square() * self.residuals[:, None, None]).sum(dim=3, keepdim=True)
        total = self.residuals.sum(dim=1)[:, None, None, None]
        per_variance = self.scale**2 / 2 * weighted / total.clamp(min=1e-30)
        return per_variance * self.variances[:, None, None]

    def masses(self) -> Tensor:
        """The exact log-mass of each cluster, `[H, G, S, C]`."""
        index = self.cluster[:, None, None].expand_as(self.weight)
        sums = self.weight.new_zeros(*self.weight.shape[:3], self.clusters)
        return sums.scatter_add_(3, index, self.weight).log() + self.lse[..., None]


def _assign(recording: Recording, built: Built, first: int, last: int) -> Tensor:
    """The cluster of each token `[H, N]` int64."""
    config = built.config
    keys = recording.keys[:, :, first:last]
    if "queries" in built.metric:
        assert recording.earlier_queries is not None, "no queries of the prompt were recorded"
        heads = keys.shape[1]
        asked = recording.earlier_queries[0].unflatten(0, (heads, -1)).flatten(1, 2)
        second = asked.transpose(1, 2) @ asked / asked.shape[1]  # [H, D, D]
        if "elements" in built.metric:
            second = torch.diag_embed(second.diagonal(dim1=1, dim2=2))
        mean = second.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        second = (1 - built.flat) * second + built.flat * mean * torch.eye(keys.shape[3])
        keys = keys @ torch.linalg.cholesky(second)
    tokens = last - first
    if built.metric.startswith("euclidean"):
        assignment = _plain(keys[0], config, by_distance=True)
    elif built.metric == "plain":
        assignment = _plain(keys[0], config, by_distance=False)
    else:
        assignment = cluster_keys(
            keys.contiguous(),
            torch.tensor([[0, tokens]]),
            config.cluster_size,
            config.segment_size,
            config.kmeans_iterations,
        )[0].long()
    if built.last_pass == "global":
        clusters = cluster_count(tokens, config.cluster_size)
        centred = keys[0] - keys[0].mean(dim=1, keepdim=True)
        sums = torch.zeros(keys.shape[1], clusters, keys.shape[3])
        sums.scatter_add_(1, assignment[..., None].expand_as(centred), centred)
        directions = torch.nn.functional.normalize(sums, dim=2)
        assignment = (centred @ directions.transpose(1, 2)).argmax(dim=2)
    return assignment


def _plain(keys: Tensor, config: RetroConfig, *, by_distance: bool) -> Tensor:
    """k-means without clusters for outliers, otherwise as `cluster_keys`: `[H, N]` int64."""
    heads, tokens, head_dim = keys.shape
    segments = segment_count(tokens, config.segment_size)
    clusters = cluster_count(tokens, config.cluster_size)
    assignment = torch.empty(heads, tokens, dtype=torch.int64)
    for segment in range(segments):
        begin, end = (tokens * (segment + step) // segments for step in (0, 1))
        lowest, highest = (clusters * (segment + step) // segments for step in (0, 1))
        count, own = highest - lowest, keys[:, begin:end]
        seeds = (2 * torch.arange(count) + 1) * (end - begin) // (2 * count)
        own = own - own.mean(dim=1, keepdim=True)
        means = own[:, seeds]
        for step in range(config.kmeans_iterations):
            if by_distance:
                distance = means.square().sum(dim=2)[:, None] - 2 * own @ means.transpose(1, 2)
            else:
                distance = -own @ torch.nn.functional.normalize(means, dim=2).transpose(1, 2)
            assigned = distance.argmin(dim=2)
            if step + 1 < config.kmeans_iterations:
                index = assigned[..., None].expand(-1, -1, head_dim)
                sums = torch.zeros_like(means).scatter_add_(1, index, own)
                sizes = torch.zeros(heads, count)
                sizes.scatter_add_(1, assigned, torch.ones(assigned.shape))
                means = torch.where(sizes[..., None] > 0, sums / sizes[..., None], means)
        assignment[:, begin:end] = lowest + assigned
    return assignment


# ---- masses, `[H, G, S, C]`, natural logarithms


def mass(index: Index, factor: float | Tensor = 1.0, center: Tensor | None = None) -> Tensor:
    """The default: the spread damped by log1p; `factor` on the spread, `center` for the index's."""
    center = index.center if center is None else center
    return center + index.log_size + (factor * index.spread).log1p()


def mass_of_mean(index: Index) -> Tensor:
    """The paper's."""
    return index.center + index.log_size


def mass_of_gaussian(index: Index) -> Tensor:
    """The spread undamped: exact for a Gaussian cluster of infinite size."""
    return index.center + index.log_size + index.spread


def mass_by_element(index: Index) -> Tensor:
    """Each cluster has the variance of each element: D more numbers of a cluster."""
    spread = index.queries.square() @ index.diagonals[:, None].transpose(2, 3)
    return index.center + index.log_size + (index.scale**2 / 2 * spread).log1p()


def mass_of_rounded_keys(index: Index, bits: int, share: int = 0) -> Tensor:
    """With mean keys as integers, or in `torch.float8_e4m3fn` where `bits` is 0.

    Args:
        share: elements in a row that share a scale, 0: all of a key. A scale has 16 bits.
    """
    keys = index.mean_keys.unflatten(2, (-1, share or index.mean_keys.shape[2]))
    largest = 2 ** (bits - 1) - 1 if bits else torch.finfo(torch.float8_e4m3fn).max
    scale = (keys.abs().amax(dim=3, keepdim=True).clamp(min=1e-30) / largest).bfloat16().float()
    scaled = (keys / scale).clamp(-largest, largest)
    rounded = scaled.round() if bits else scaled.to(torch.float8_e4m3fn).float()
    return mass(index, center=index.logits_of(index.queries, (rounded * scale).flatten(2)))


def calibration(index: Index) -> Tensor:
    """The factor on the spread with the best total masses of the last prompt queries `[H, G]`.

    The total of what the default would leave to the estimate; half of its clusters see less than
    these queries do, which all see everything that is indexed but the local tokens.
    """
    earlier = index.recording.earlier_queries
    assert earlier is not None, "no queries of the prompt were recorded"
    queries = earlier[0].unflatten(0, (index.queries.shape[0], -1))
    config = index.config
    keys = index.recording.keys[0, :, config.sink_tokens : -config.local_tokens]
    keys = keys[:, : index.cluster.shape[1]]
    # In cluster order the logits would need the keys again; totals do not.
    exact = index.logits_of(queries, keys).logsumexp(dim=3)
    center = index.logits_of(queries, index.mean_keys) + index.log_size
    spread = index.spread_of(queries)
    errors = torch.stack(
        [
            ((center + (factor * spread).log1p()).logsumexp(dim=3) - exact).square().mean(dim=2)
            for factor in CALIBRATED
        ]
    )
    return CALIBRATED[errors.argmin(dim=0)][:, :, None, None]


# ---- scores, `[H, S, C]`, by which clusters are ranked


def by_mass(log_mass: Tensor) -> Tensor:
    """The default: the sum of the group's softmaxes."""
    return log_mass.softmax(dim=3).sum(dim=1)


def by_mean(index: Index) -> Tensor:
    """The paper's: without sizes."""
    return index.center.masked_fill(index.log_size == -torch.inf, -torch.inf).softmax(3).sum(1)


def by_size_power(index: Index, power: float) -> Tensor:
    """Mass for each byte, at 1; the default at 0."""
    return mass(index).softmax(dim=3).sum(dim=1) / index.sizes[:, None].clamp(min=1) ** power


def by_largest(index: Index) -> Tensor:
    """The largest of the group instead of the sum."""
    return mass(index).softmax(dim=3).amax(dim=1)


def by_share(index: Index) -> Tensor:
    """Shares of all mass, that of the steady zone included: sharp heads ask for less."""
    share = (mass(index) - index.lse[..., None]).exp()
    return share.sum(dim=1)


def by_error(index: Index, power: float, values: float = 0.0) -> Tensor:
    """Mass times a power of the spread, which makes the estimate of a cluster wrong.

    Args:
        power: of spread / (1 + spread).
        values: power of the standard deviation of the cluster's values: one more number of it.
    """
    uncertain = (index.spread / (1 + index.spread)) ** power
    score = (mass(index).softmax(dim=3) * uncertain).sum(dim=1)
    return score * index.value_variances[:, None].clamp(min=1e-12) ** (values / 2)


def by_error_of_estimate(index: Index) -> Tensor:
    """An oracle: by how much estimating the cluster would change the output, group summed."""
    log_mass = mass(index) - index.lse[..., None]
    heads, groups, steps, _ = index.weight.shape
    score = torch.zeros(heads, steps, index.clusters)
    exact = index.exact / (index.steady_mass + index.weight.sum(3))[..., None]
    for head in range(heads):
        lengths = index.sizes[head].long()
        distances = index.mean_values[head]
        for group in range(groups):
            for step in range(steps):
                own = index.weight[head, group, step, :, None] * (
                    index.values[head] - exact[head, group, step]
                )
                true = torch.segment_reduce(own, "sum", lengths=lengths, axis=0)
                guess = log_mass[head, group, step].exp()[:, None] * (
                    distances - exact[head, group, step]
                )
                size = exact[head, group, step].norm()
                score[head, step] += (true - guess).norm(dim=1) / size
    return score


# ---- what is read and estimated


@dataclass(frozen=True)
class Plan:
    """What one variant does with an index."""

    score: Tensor
    """`[H, S, C]`."""
    log_mass: Tensor
    """`[H, G, S, C]`."""
    estimated: float
    """Fraction of clusters whose mean values are read."""
    tokens: float | Tensor
    """Tokens that may be read, of each head and query: a number, `[H, 1]` or `[H, S]`."""
    tail: str = "mean"
    """What stands for the values of the tail: "mean", "none"; "rest": the mean of what is neither
    retrieved nor estimated, which needs the mean values of retrieved clusters; "groups": means of
    16 clusters that follow one another."""
    estimated_score: Tensor | None = None
    """`[H, S, C]`, of which clusters are estimated; None: `score`."""
    tail_share: float = 1.0
    """Of the tail's mass, what counts; without the rest, its values are as if those of all else."""
    ratio: float = 0.0
    """Power of exact / estimated mass of the retrieved clusters, by which the estimate is
    corrected."""


@dataclass(frozen=True)
class Outcome:
    """Errors `[S, Hq]`, and tokens read of a head and query."""

    error: Tensor
    tokens: float


def tokens_of_default(index: Index) -> float:
    """Tokens that the default reads of a head and query, mean."""
    config = index.config
    count = retrieved_count(config.retrieval_budget, config.min_retrieved_clusters, index.clusters)
    best = by_mass(mass(index)).topk(count, dim=2).indices
    sizes = index.sizes[:, None].expand(-1, best.shape[1], -1)
    return float(sizes.gather(2, best).sum(dim=2).mean())


def outcome(index: Index, plan: Plan) -> Outcome:
    """Attention as the plan has it, against exact attention."""
    order = plan.score.sort(dim=2, descending=True, stable=True).indices
    sizes = index.sizes[:, None].expand_as(plan.score)
    ranked = sizes.gather(2, order)
    tokens = plan.tokens[..., None] if isinstance(plan.tokens, Tensor) else plan.tokens
    taken = ranked.cumsum(dim=2) - ranked < tokens
    read = torch.zeros_like(plan.score, dtype=torch.bool).scatter_(2, order, taken)
    second = plan.score if plan.estimated_score is None else plan.estimated_score
    rest = second.masked_fill(read, -torch.inf).sort(dim=2, descending=True, stable=True).indices
    count = round(plan.estimated * index.clusters)
    estimated = torch.zeros_like(read).scatter_(2, rest[..., :count], True) & ~read
    tail = ~read & ~estimated

    of_token = index.cluster[:, None].expand(-1, read.shape[1], -1)
    seen = read.gather(2, of_token)[:, None]  # [H, 1, S, N]
    weight = index.weight * seen
    weighted = weight @ index.values[:, None] + index.steady_sum
    total = weight.sum(dim=3) + index.steady_mass
    guess = (plan.log_mass - index.lse[..., None]).exp()  # [H, G, S, C]
    if plan.ratio:
        caught = weight.sum(dim=3) / (guess * read[:, None]).sum(dim=3).clamp(min=1e-30)
        guess = guess * caught[..., None] ** plan.ratio
    part = guess * estimated[:, None]
    weighted = weighted + part @ index.mean_values[:, None]
    total = total + part.sum(dim=3)
    if plan.tail != "none":
        left = plan.tail_share * guess * tail[:, None]
        weighted = weighted + _tail_values(index, plan.tail, left, tail)
        total = total + left.sum(dim=3)
    out = weighted / total[..., None]
    error = (out - index.exact).norm(dim=3) / index.exact.norm(dim=3)  # [H, G, S]
    return Outcome(error.flatten(0, 1).T, float(seen.sum(dim=3).double().mean()))


def _tail_values(index: Index, kind: str, left: Tensor, tail: Tensor) -> Tensor:
    if kind == "rest":
        inside = tail * index.sizes[:, None]
        mean = inside @ index.mean_values / inside.sum(dim=2, keepdim=True).clamp(min=1)
        return left.sum(dim=3, keepdim=True) * mean[:, None]
    if kind == "groups":
        group = torch.arange(index.clusters) // 16
        groups = int(group[-1]) + 1
        onto = torch.zeros(index.clusters, groups).scatter_(1, group[:, None], 1.0)
        sizes = (index.sizes @ onto)[..., None].clamp(min=1)
        means = onto.T @ (index.mean_values * index.sizes[..., None]) / sizes
        return left @ onto @ means[:, None]
    return left.sum(dim=3, keepdim=True) * index.mean_value[:, None, None]


# ---- the study


Variant = Callable[["Case"], Outcome]


class Case:
    """A recorded layer, its default index, and what the default reads."""

    def __init__(self, recording: Recording, config: RetroConfig) -> None:
        self.recording, self.config = recording, config
        self.index = self.built(Built(config))
        self.tokens = tokens_of_default(self.index)

    @functools.lru_cache(maxsize=1)  # noqa: B019  (a case lives as long as its index)
    def built(self, built: Built) -> Index:
        """The index of another grouping."""
        return Index(self.recording, built)

    def bytes_of(self, index: Index, tokens: float, estimated: float, extra: float = 0.0) -> float:
        """What a head reads in a step, in vectors of D elements: keys and values of tokens, mean
        keys, mean values, and `extra` vectors of a cluster."""
        return 2 * tokens + index.clusters * (1 + estimated + extra)

    def plan(
        self,
        index: Index | None = None,
        *,
        score: Tensor | None = None,
        log_mass: Tensor | None = None,
        estimated: float | None = None,
        extra: float = 0.0,
        tail: str = "mean",
        tail_share: float = 1.0,
        estimated_score: Tensor | None = None,
        ratio: float = 0.0,
    ) -> Plan:
        """The default but for what is given, at the bytes of the default.

        Args:
            extra: vectors of D elements that a cluster has more, and that are read.
        """
        index = index or self.index
        masses = mass(index) if log_mass is None else log_mass
        estimated = self.config.estimation_budget if estimated is None else estimated
        budget = self.bytes_of(self.index, self.tokens, self.config.estimation_budget)
        tokens = (budget - self.bytes_of(index, 0.0, estimated, extra)) / 2
        return Plan(
            by_mass(masses) if score is None else score,
            masses,
            estimated,
            max(tokens, 0.0),
            tail,
            estimated_score,
            tail_share,
            ratio,
        )


def _with(**changes: Callable[[Index], Tensor] | float | str) -> Variant:
    """A variant of the default: functions of the index are called."""

    def variant(case: Case) -> Outcome:
        given = {
            name: what(case.index) if callable(what) else what for name, what in changes.items()
        }
        return outcome(case.index, case.plan(**given))  # type: ignore[arg-type]

    return variant


def _built(
    metric: str = "",
    last_pass: str = "",
    flat: float = 0.1,
    score: Callable[[Index], Tensor] | None = None,
    **changes: int,
) -> Variant:
    def variant(case: Case) -> Outcome:
        config = replace(case.config, **changes)  # type: ignore[arg-type]
        index = Index(case.recording, Built(config, metric, flat, last_pass))
        return outcome(index, case.plan(index, score=score(index) if score else None))

    return variant


def _paper(case: Case) -> Outcome:
    index = case.index
    return outcome(
        index,
        case.plan(score=by_mean(index), log_mass=mass_of_mean(index), tail="none"),
    )


def top_p(case: Case, share: float) -> Plan:
    """As many clusters of each query as hold a share of the estimated mass; `share` in 0..1."""
    plan = case.plan()
    ranked, order = plan.score.sort(dim=2, descending=True, stable=True)
    groups = case.index.queries.shape[1]
    needed = ranked.cumsum(dim=2) - ranked < share * groups
    sizes = case.index.sizes[:, None].expand_as(ranked).gather(2, order)
    return replace(plan, tokens=(sizes * needed).sum(dim=2))


def _top_p(case: Case) -> Outcome:
    """The share that reads as many tokens as the default, on average over queries and heads."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        plan = top_p(case, middle)
        assert isinstance(plan.tokens, Tensor)
        low, high = (low, middle) if plan.tokens.mean() > case.tokens else (middle, high)
    return outcome(case.index, top_p(case, low))


def _across_heads(case: Case) -> Outcome:
    """KV heads get tokens by their errors on the first half of the queries; the second half is
    measured, so compare with the default on it."""
    heads = case.index.queries.shape[0]
    plan = case.plan()
    shares = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])
    curves = []
    half = case.index.queries.shape[2] // 2
    for share in shares:
        errors = outcome(case.index, replace(plan, tokens=float(share) * case.tokens)).error
        curves.append(errors[:half].unflatten(1, (heads, -1)).mean(dim=(0, 2)))
    given = spread_budget(torch.stack(curves), shares)
    spread = replace(plan, tokens=(given * case.tokens)[:, None])
    whole = outcome(case.index, plan).error
    found = outcome(case.index, spread)
    # As if all queries had been measured: the gain of the second half.
    gain = found.error[half:].mean() / whole[half:].mean()
    return Outcome(whole * gain, found.tokens)


def spread_budget(curves: Tensor, shares: Tensor) -> Tensor:
    """Shares of the budget, 1 on average, that make the sum of errors small.

    Starts with the smallest shares and always gives where the error falls most for a token.

    Args:
        curves: `[shares, places]` errors.
        shares: `[shares]`, rising.

    Returns:
        `[places]`.
    """
    places = curves.shape[1]
    level = [0] * places
    room = places - float(shares[0]) * places
    while True:
        best, best_gain = -1, 0.0
        for place in range(places):
            if level[place] + 1 >= len(shares):
                continue
            cost = float(shares[level[place] + 1] - shares[level[place]])
            gain = float(curves[level[place], place] - curves[level[place] + 1, place]) / cost
            if cost <= room + 1e-9 and gain > best_gain:
                best, best_gain = place, gain
        if best < 0:
            return shares[level]
        room -= float(shares[level[best] + 1] - shares[level[best]])
        level[best] += 1


VARIANTS: dict[str, dict[str, Variant]] = {
    "": {
        DEFAULT: _with(),
        "the paper's: rank and mass of the mean, no tail": _paper,
    },
    "ranking": {
        "paper's (no sizes)": _with(score=by_mean),
        "size x exp(score), no spread": _with(score=lambda index: by_mass(mass_of_mean(index))),
        "spread undamped": _with(score=lambda index: by_mass(mass_of_gaussian(index))),
        "mass / size^0.25": _with(score=lambda index: by_size_power(index, 0.25)),
        "mass / size^0.5": _with(score=lambda index: by_size_power(index, 0.5)),
        "mass / size": _with(score=lambda index: by_size_power(index, 1.0)),
        "largest of the group": _with(score=by_largest),
        "shares of all mass, steady zone included": _with(score=by_share),
        "mass x (s / (1 + s))^0.5, s: spread": _with(score=lambda index: by_error(index, 0.5)),
        "mass x s / (1 + s)": _with(score=lambda index: by_error(index, 1.0)),
        "mass x (s / (1 + s))^0.5 / size^0.5": _with(
            score=lambda index: by_error(index, 0.5) / index.sizes[:, None].clamp(min=1) ** 0.5
        ),
        "mass x spread of the values": _with(score=lambda index: by_error(index, 0.0, 1.0)),
        "oracle: exact mass": _with(score=lambda index: by_mass(index.masses())),
        "oracle: exact mass / size^0.5": _with(
            score=lambda index: by_mass(index.masses()) / index.sizes[:, None].clamp(min=1) ** 0.5
        ),
        "oracle: error of estimating it / size^0.5": _with(
            score=lambda index: (
                by_error_of_estimate(index) / index.sizes[:, None].clamp(min=1) ** 0.5
            )
        ),
    },
    "mass": {
        "no spread": _with(score=lambda index: by_mass(mass(index)), log_mass=mass_of_mean),
        "spread undamped": _with(
            score=lambda index: by_mass(mass(index)), log_mass=mass_of_gaussian
        ),
        "spread x 0.5": _with(log_mass=lambda index: mass(index, 0.5)),
        "spread x 1.5": _with(log_mass=lambda index: mass(index, 1.5)),
        "spread x 2": _with(log_mass=lambda index: mass(index, 2.0)),
        "spread x a factor of each head, from the last prompt queries": _with(
            log_mass=lambda index: mass(index, calibration(index))
        ),
        "variance of each element of each cluster (+ 1 vector)": _with(
            log_mass=mass_by_element, extra=1.0
        ),
        "the same, bytes not counted": _with(log_mass=mass_by_element),
        "x exact / estimated mass of what is retrieved": _with(ratio=1.0),
        "the same, its square root": _with(ratio=0.5),
        "oracle: exact mass, default's ranking": _with(
            score=lambda index: by_mass(mass(index)), log_mass=Index.masses
        ),
    },
    "mean keys": {
        f"{name}{given}": _with(
            log_mass=functools.partial(mass_of_rounded_keys, bits=bits, share=share),
            # Mean keys have 16 bits elsewhere, and so has a scale; D as of Llama's.
            extra=((bits or 8) / 16 - 1 + 1 / (share or 128)) * spent,
        )
        for name, bits, share in (
            ("8 bits, a scale for each", 8, 0),
            ("float8, a scale for each", 0, 0),
            ("8 bits, a scale for 32 elements", 8, 32),
            ("6 bits, a scale for 32 elements", 6, 32),
            ("4 bits, a scale for 32 elements", 4, 32),
        )
        for given, spent in (("", True), (", its bytes not spent", False))
    },
    "tail": {
        "none": _with(tail="none"),
        "a quarter of its mass": _with(tail_share=0.25),
        "half of its mass": _with(tail_share=0.5),
        "three quarters of its mass": _with(tail_share=0.75),
        "mean of the tail only": _with(tail="rest"),
        "means of 16 clusters": _with(tail="groups", extra=1 / 16),
    },
    "estimated": {
        f"{100 * share:g} % of clusters": _with(estimated=share)
        for share in (0.0, 0.05, 0.1, 0.15, 0.4, 0.7, 1.0)
    }
    | {
        "those farthest from the mean value (+ 1 number of a cluster)": _with(
            estimated_score=lambda index: (
                by_mass(mass(index))
                * (index.mean_values - index.mean_value[:, None]).norm(dim=2)[:, None]
            )
        )
    },
    "cluster size": {
        # A segment that grows the index has to be a multiple of it; prompts do not care.
        f"{size} tokens": _built(cluster_size=size, update_segment=64 * size)
        for size in (8, 12, 20, 24, 32)
    },
    "grouping": {
        "no clusters for outliers": _built(metric="plain"),
        "segments of 4,096": _built(segment_size=4096),
        "segments of 16,384, 5 passes": _built(segment_size=16384, kmeans_iterations=5),
        "segments of 16,384, 10 passes": _built(segment_size=16384),
        "segments of 32,768, 3 passes": _built(segment_size=32768, kmeans_iterations=3),
        "segments of 32,768, 10 passes": _built(segment_size=32768),
        "3 passes": _built(kmeans_iterations=3),
        "5 passes": _built(kmeans_iterations=5),
        "20 passes": _built(kmeans_iterations=20),
        "global last pass": _built(last_pass="global"),
        "distance instead of cosine": _built(metric="euclidean"),
        "cosine, elements weighted by the last prompt queries": _built(metric="queries, elements"),
        "the same, weights half flat": _built(metric="queries, elements", flat=0.5),
        "cosine in the metric of the last prompt queries": _built(metric="queries"),
        "distance, elements weighted by the last prompt queries": _built(
            metric="euclidean queries, elements"
        ),
        "the same, half flat": _built(metric="euclidean queries, elements", flat=0.5),
        "distance in the metric of the last prompt queries, half flat": _built(
            metric="euclidean queries", flat=0.5
        ),
        "distance, mass / size^0.5": _built(
            metric="euclidean", score=lambda index: by_size_power(index, 0.5)
        ),
        "distance, elements weighted by the last prompt queries, mass / size^0.5": _built(
            metric="euclidean queries, elements", score=lambda index: by_size_power(index, 0.5)
        ),
        "distance, 20 tokens": _built(metric="euclidean", cluster_size=20, update_segment=1280),
        "distance, segments of 16,384, 5 passes": _built(
            metric="euclidean", segment_size=16384, kmeans_iterations=5
        ),
        "distance, 5 passes": _built(metric="euclidean", kmeans_iterations=5),
    },
    "budgets": {
        "top-p of the estimated mass, equal bytes on average": _top_p,
        "KV heads by measured error": _across_heads,
    },
}
"""By what they change."""


def run(
    *,
    kinds: Sequence[str],
    models: Sequence[str],
    text: str,
    context: int,
    queries: int,
    config: RetroConfig,
    groups: Sequence[str],
    recordings: Sequence[Recording] = (),
    progress: Progress = lambda what, done, total: None,
) -> list[dict[str, object]]:
    """A row for each variant: mean errors of each layer, and `ratio`, the geometric mean over
    layers of error / error of the default.

    Args:
        kinds, models, text, queries, config: as in `quality.run`.
        context: tokens.
        groups: keys of `VARIANTS`; the default is always there.
        recordings: further layers.
        progress: told about every variant.
    """
    facts = machine.facts(torch.device("cpu"))
    layers = [made(kind, context, queries) for kind in kinds]
    for model in models:
        layers += record(model, text, context, queries, progress=progress)
    layers += recordings
    chosen = {"": VARIANTS[""], **{group: VARIANTS[group] for group in groups}}
    rows: dict[tuple[str, str], dict[str, object]] = {
        (group, name): {"changed": group, "variant": name}
        for group, variants in chosen.items()
        for name in variants
    }
    logs: dict[tuple[str, str], list[float]] = {key: [] for key in rows}
    for done, recording in enumerate(layers):
        case = Case(recording, config)
        column = f"{recording.source} {recording.layer}"
        first = 0.0
        for key, row in rows.items():
            progress(f"{column}: {key[1]}", done, len(layers))
            if recording.earlier_queries is None and "prompt queries" in key[1]:
                continue
            found = chosen[key[0]][key[1]](case)
            error = float(found.error.mean())
            first = first or error
            row[column] = error
            logs[key].append(math.log(error / first))
    for key, row in rows.items():
        row["ratio"] = math.exp(sum(logs[key]) / len(logs[key])) if logs[key] else math.nan
    return [{**row, **facts} for row in rows.values()]


def columns(rows: Sequence[dict[str, object]]) -> Iterator[str]:
    """What a table shows of the rows; the machine is in its title."""
    facts = machine.facts(torch.device("cpu"))
    return (name for name in rows[0] if name not in facts)
