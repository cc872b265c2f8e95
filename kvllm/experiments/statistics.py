"""The experiments' statistics: a retention curve's fit, ranks against chance, correlation. Numbers in, numbers out.

fit_retention([(10, 10, 10), (100, 40, 100)]).half      # the number of facts at which half are recalled
rank_test([Loss(rank=1, candidates=20)])                # mean relative rank, and its p-value against random loss
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from kvllm.records import Record

Floats = NDArray[np.float64]
DRAWS = 10_000
RESAMPLES = 400


@dataclass(frozen=True)
class RetentionFit(Record):
    """recalled(n) = 1 / (1 + exp((ln n − ln half) · steepness)), by maximum likelihood on counts.

    Attributes:
        half: Facts at which half are recalled; None where the curve never bends within ten times what was seen.
        low, high: 95 % parametric bootstrap interval of `half`, None likewise.
        steepness: Of the fall over ln n.
        n: Points.
    """

    half: float | None
    low: float | None
    high: float | None
    steepness: float
    n: int


def fit_retention(points: Sequence[tuple[int, int, int]], *, seed: int = 0) -> RetentionFit | None:
    """Fit a logistic curve over the logarithm of the number of facts.

    Args:
        points: (facts, recalled, asked) per state.
        seed: Of the bootstrap.

    Returns:
        The fit, or None with fewer than three states.
    """
    used = [(facts, recalled, asked) for facts, recalled, asked in points if facts > 0 and asked > 0]
    if len(used) < 3:
        return None
    x = np.log([float(facts) for facts, _, _ in used])
    k = np.array([recalled for _, recalled, _ in used], dtype=float)
    n = np.array([asked for _, _, asked in used], dtype=float)
    found = _logistic(x, k, n)
    rng = np.random.default_rng(seed)
    shares = special.expit(-(x - found[0]) * math.exp(found[1]))
    halves = sorted(
        math.exp(min(_logistic(x, rng.binomial(n.astype(int), shares).astype(float), n)[0], 700.0))
        for _ in range(RESAMPLES)
    )
    far = 10 * max(facts for facts, _, _ in used)

    def within(value: float) -> float | None:
        return round(value, 2) if value <= far else None

    low, high = halves[int(0.025 * RESAMPLES)], halves[int(0.975 * RESAMPLES) - 1]
    half = math.exp(min(float(found[0]), 700.0))
    return RetentionFit(within(half), within(low), within(high), round(math.exp(float(found[1])), 4), len(used))


def _logistic(x: Floats, k: Floats, n: Floats) -> Floats:
    """Return (ln half, ln steepness) of greatest likelihood, with a weak prior that keeps perfect data finite."""

    def cost(given: Floats) -> float:
        middle, log_steepness = given
        at = -(x - middle) * math.exp(min(log_steepness, 6.0))
        likelihood = k * special.log_expit(at) + (n - k) * special.log_expit(-at)
        return float(-likelihood.sum() + 0.001 * (middle - x.mean()) ** 2 + 0.2 * log_steepness**2)

    starts = [np.array([start, 0.7]) for start in (x.mean(), x.max(), x.max() + 2.0)]
    best = min((optimize.minimize(cost, start, method="Nelder-Mead") for start in starts), key=lambda r: r.fun)
    found: Floats = best.x
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
    """Are lost facts nearer to the edit that broke them than chance would have it?

    Attributes:
        mean: Mean relative rank in (0, 1); 0.5 is chance, 0 the nearest.
        p_value: Share of random losses with a mean at most this (one-sided), by Monte Carlo.
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

    A rank r of m has the relative rank (r − ½) / m. The p-value is (1 + draws as extreme) / (1 + draws), which is never
    0. By hand: a loss of rank 1 of 20 has 0.025, and one in twenty random losses is as near.
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
    extreme = int((totals / len(used) <= mean + 1e-12).sum())
    return RankTest(
        round(mean, 4),
        (1 + extreme) / (1 + DRAWS),
        len(used),
        sum(loss.rank <= 1 for loss in used),
        round(sum(1 / loss.candidates for loss in used), 3),
    )


@dataclass(frozen=True)
class Correlation(Record):
    """Spearman's rank correlation with its two-sided p-value and 95 % bootstrap interval."""

    rho: float
    p_value: float
    low: float
    high: float
    n: int


def correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0) -> Correlation | None:
    """Correlate two measurements of the same things by rank; None of fewer than four, or of constants."""
    if len(x) != len(y):
        raise ValueError("a correlation needs pairs")
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) < 4 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    found = stats.spearmanr(a, b)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        picked = rng.integers(0, len(a), len(a))
        if np.ptp(a[picked]) > 0 and np.ptp(b[picked]) > 0:
            drawn.append(float(stats.spearmanr(a[picked], b[picked]).statistic))
    low, high = (float(v) for v in np.quantile(drawn, [0.025, 0.975])) if drawn else (-1.0, 1.0)
    return Correlation(round(float(found.statistic), 4), float(found.pvalue), round(low, 4), round(high, 4), len(a))


def paired_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of Wilcoxon's signed-rank test; None where nothing differs or too few are there."""
    nonzero = [d for d in differences if d != 0]
    return float(stats.wilcoxon(nonzero).pvalue) if len(nonzero) >= 5 else None
