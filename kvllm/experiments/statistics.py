"""The experiments' statistics: a retention curve's fit, ranks against chance, correlations within groups.

Numbers in, numbers out.

fit_retention({"Ada": [(10, 1, 1), (100, 0, 1)], …}).half   # the number of facts at which half are recalled
rank_test([Loss(rank=1, candidates=20)])                # mean relative rank, and its p-value against random loss
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from kvllm.records import Record

Floats = NDArray[np.float64]
DRAWS = 10_000
RESAMPLES = 2_000
# Below this fall per ln n (a factor of e in facts moves the odds by a twentieth) a curve is level.
_FLAT = 0.05
_NEWTON_STEPS = 60
_FEWEST = 5


@dataclass(frozen=True)
class RetentionFit(Record):
    """recalled(n) = 1 / (1 + exp((ln n − ln half) · steepness)), by maximum likelihood on counts.

    Attributes:
        half: Facts at which half are recalled; None where the fitted curve stays above half up to the last state.
        low, high: 95 % bootstrap interval of `half`, None beyond the last state.
        steepness: Of the fall over ln n.
        last: Facts of the last state.
        n: Facts that were drawn by the bootstrap.
    """

    half: float | None
    low: float | None
    high: float | None
    steepness: float
    last: int
    n: int


def fit_retention(answers: Mapping[Hashable, Sequence[tuple[int, int, int]]], *, seed: int = 0) -> RetentionFit | None:
    """Fit a logistic curve over the logarithm of the number of facts.

    The facts of a state are those of the next one too, and a fact that is hard is hard in all: the bootstrap draws
    facts, each with its answers in every state. Answers drawn one by one would give far too narrow an interval.

    Args:
        answers: By fact: (facts taught, right, asked) in every state in which it was asked.
        seed: Of the bootstrap.

    Returns:
        The fit, or None with fewer than three states, where the curve is below half from the first state on, and where
        it does not fall: its steepness may be 0.
    """
    states = sorted({facts for told in answers.values() for facts, _, asked in told if asked > 0})
    if len(states) < 3:
        return None
    place = {facts: i for i, facts in enumerate(states)}
    right, asked = np.zeros((len(answers), len(states))), np.zeros((len(answers), len(states)))
    for i, told in enumerate(answers.values()):
        for facts, k, n in told:
            if n > 0:
                right[i, place[facts]] += k
                asked[i, place[facts]] += n
    x = np.log(np.array(states, dtype=float))
    ((level, slope),) = _logistic(x, right.sum(0)[None], asked.sum(0)[None])
    middle = x.mean()
    at_ends = level - slope * (x[[0, -1]] - middle)
    steepness = round(float(slope), 4)
    if at_ends[0] < 0:
        return None
    if at_ends[1] >= 0:
        return RetentionFit(None, None, None, steepness, states[-1], len(answers))
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(answers), np.full(len(answers), 1 / len(answers)), RESAMPLES).astype(float)
    levels, slopes = _logistic(x, drawn @ right, drawn @ asked).T
    if float(np.quantile(slopes, 0.025)) < _FLAT:
        return None
    # A draw that does not fall crosses half nowhere: beyond everything.
    falling = np.maximum(slopes, 1e-6)
    halves = np.sort(np.exp(np.minimum(middle + levels / falling, 700.0)))

    def within(value: float) -> float | None:
        return round(value, 2) if value <= states[-1] else None

    low, high = float(halves[int(0.025 * RESAMPLES)]), float(halves[math.ceil(0.975 * RESAMPLES) - 1])
    half = math.exp(min(middle + float(level) / float(slope), 700.0))
    return RetentionFit(within(half), within(low), within(high), steepness, states[-1], len(answers))


def _logistic(x: Floats, k: Floats, n: Floats) -> Floats:
    """Return (logit at mean x, fall per x) of greatest likelihood for each draw's counts (draws, states).

    Newton's method; a weak prior keeps perfect data finite.
    """
    design = np.stack([np.ones_like(x), -(x - x.mean())], axis=1)  # (states, 2)
    prior = np.diag([1e-3, 1e-2])
    found = np.zeros((len(k), 2))
    for _ in range(_NEWTON_STEPS):
        shares = special.expit(found @ design.T)
        slope = (k - n * shares) @ design - found @ prior
        curve = np.einsum("ds,si,sj->dij", n * shares * (1 - shares), design, design) + prior
        step = np.linalg.solve(curve, slope[..., None])[..., 0]
        found = found + step / np.maximum(1.0, np.abs(step).max(axis=1, keepdims=True))
    return found


@dataclass(frozen=True)
class Loss:
    """One lost fact: its rank among those that could have been lost, the nearest to the edit first.

    Attributes:
        rank: From 1.
        candidates: How many could have been lost.
        edit: What broke it; several losses of one edit are drawn without replacement.
    """

    rank: float
    candidates: int
    edit: str = ""


@dataclass(frozen=True)
class RankTest(Record):
    """Are lost facts nearer to the edit that broke them than chance would have it, or farther?

    Attributes:
        mean: Mean relative rank in (0, 1); 0.5 is chance, 0 the nearest.
        p_value: Twice the share of random losses with a mean as far on this side (two-sided), by Monte Carlo.
        n: Losses with more than one candidate.
        nearest: How many were the nearest of all.
        expected_nearest: How many chance would give.
    """

    mean: float
    p_value: float
    n: int
    nearest: int
    expected_nearest: float


def rank_test(losses: Sequence[Loss], *, seed: int = 0) -> RankTest | None:
    """Compare the mean relative rank of losses with that of losses drawn at random from the same candidates.

    A rank r of m has the relative rank (r − ½) / m. The p-value is 2 · (1 + draws as extreme) / (1 + draws) on the side
    where the mean lies, at most 1 and never 0. By hand: a loss of rank 1 of 20 has 0.025; one in twenty random losses
    is as near, so that p is 0.1.
    """
    used = [loss for loss in losses if loss.candidates > 1]
    if not used:
        return None
    mean = sum((loss.rank - 0.5) / loss.candidates for loss in used) / len(used)
    groups: dict[str, list[Loss]] = {}
    for place, loss in enumerate(used):
        groups.setdefault(loss.edit or f"#{place}", []).append(loss)
    rng = np.random.default_rng(seed)
    totals = np.zeros(DRAWS)
    for group in groups.values():
        m = group[0].candidates
        size = min(len(group), m)
        if size == 1:
            totals += (rng.integers(1, m + 1, DRAWS) - 0.5) / m
        else:
            order = rng.random((DRAWS, m)).argsort(axis=1)[:, :size] + 1
            totals += ((order - 0.5) / m).sum(axis=1)
    means = totals / len(used)
    return RankTest(
        round(mean, 4),
        _two_sided(means, mean),
        len(used),
        sum(loss.rank <= 1 for loss in used),
        round(sum(1 / loss.candidates for loss in used), 3),
    )


@dataclass(frozen=True)
class KindTest(Record):
    """Are lost facts of the kind of the edit that broke them more often than chance would have it, or more seldom?

    Attributes:
        same: Losses of the edit's kind.
        expected: How many chance would give.
        p_value: Twice the share of random losses with as many on this side (two-sided), by Monte Carlo.
        n: Losses.
    """

    same: int
    expected: float
    p_value: float
    n: int


def kind_test(edits: Sequence[tuple[int, int, int, int]], *, seed: int = 0) -> KindTest | None:
    """Compare how many losses are of the edit's kind with losses drawn at random from the same candidates.

    Args:
        edits: (losses of its kind, losses, candidates of its kind, candidates) of each edit that broke something.
        seed: Of the draws, without replacement within an edit: they are hypergeometric.

    Returns:
        The test, or None where no edit had both kinds among its candidates.
    """
    used = [edit for edit in edits if 0 < edit[2] < edit[3]]
    if not used:
        return None
    rng = np.random.default_rng(seed)
    drawn = np.sum([rng.hypergeometric(of_kind, m - of_kind, n, DRAWS) for _, n, of_kind, m in used], axis=0)
    same = sum(edit[0] for edit in used)
    expected = sum(n * of_kind / m for _, n, of_kind, m in used)
    return KindTest(same, round(expected, 2), _two_sided(drawn, same), sum(edit[1] for edit in used))


def _two_sided(drawn: NDArray[Any], found: float) -> float:
    """Return 2 · (1 + draws as extreme) / (1 + draws) on the side where a value lies, at most 1 and never 0."""
    extreme = min(int((drawn <= found + 1e-12).sum()), int((drawn >= found - 1e-12).sum()))
    return min(1.0, 2 * (1 + extreme) / (1 + len(drawn)))


@dataclass(frozen=True)
class Correlation(Record):
    """The mean of Spearman's rank correlations within groups.

    Attributes:
        rho: The mean over groups.
        p_value: Two-sided, by permutations inside groups.
        lowest, highest: Of the groups' own correlations.
        n: Pairs.
        groups: Groups with enough of them.
    """

    rho: float
    p_value: float
    lowest: float
    highest: float
    n: int
    groups: int


def correlation(groups: Iterable[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0) -> Correlation | None:
    """Correlate two measurements by rank inside each group, where what a group's members share plays no part.

    Members of a group are not independent of each other, and groups differ: under the null hypothesis a group's second
    measurements could stand in any order. The p-value is (1 + permutations as extreme) / (1 + permutations).

    Args:
        groups: (x, y) of each; those with fewer than three members, or constant ones, say nothing and are left out.
        seed: Of the permutations.

    Returns:
        The correlation, or None where every group was left out.
    """
    rng = np.random.default_rng(seed)
    own: list[float] = []
    totals, n = np.zeros(DRAWS), 0
    for x, y in groups:
        if len(x) != len(y):
            raise ValueError("a correlation needs pairs")
        if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
            continue
        a, b = _standardised(x), _standardised(y)
        own.append(float(a @ b))
        totals += rng.permuted(np.broadcast_to(b, (DRAWS, len(b))), axis=1) @ a
        n += len(x)
    if not own:
        return None
    rho = sum(own) / len(own)
    extreme = int((np.abs(totals / len(own)) >= abs(rho) - 1e-12).sum())
    return Correlation(round(rho, 4), (1 + extreme) / (1 + DRAWS), round(min(own), 4), round(max(own), 4), n, len(own))


def _standardised(values: Sequence[float]) -> Floats:
    """Return ranks with mean 0 and length 1; ties have their mean rank."""
    ranks = stats.rankdata(np.asarray(values, dtype=float))
    centred: Floats = ranks - ranks.mean()
    return centred / np.linalg.norm(centred)


@dataclass(frozen=True)
class Ratio(Record):
    """A geometric mean of ratios, and the two-sided p-value of Student's t-test on their logarithms against 1."""

    mean: float
    p_value: float | None
    n: int


def ratio_test(ratios: Sequence[float]) -> Ratio | None:
    """Compare positive ratios with 1; without a p-value below five of them, None of none.

    Of five, a signed-rank test cannot reach 0.05 (2 / 2⁵ = 0.0625), which is why the logarithms' sizes are used.
    """
    if not ratios:
        return None
    logs = np.log(np.asarray(ratios, dtype=float))
    p: float | None = None
    if len(logs) >= _FEWEST:
        level = np.ptp(logs) < 1e-12
        p = float(abs(logs.mean()) < 1e-12) if level else float(stats.ttest_1samp(logs, 0.0).pvalue)
    return Ratio(round(math.exp(logs.mean()), 4), p, len(logs))


def paired_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; None where nothing differs or too few are there."""
    nonzero = [d for d in differences if d != 0]
    return float(stats.wilcoxon(nonzero).pvalue) if len(nonzero) >= _FEWEST else None
