"""Paired statistics on yes/no results: was a difference between two states chance, and how large may it be?

Exact where the mathematics is exact, seeded where it resamples. Numbers in, numbers out: it knows no probes, no model.

    mcnemar(lost=8, gained=2)                 # 0.109375
    wilson(8, 10)                             # Interval(low=0.4902…, high=0.9433…)
    holm({"trained": 0.01, "alias": 0.04})    # {"trained": 0.02, "alias": 0.04}
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    Under the null hypothesis each pair that changed was as likely to change in either direction, so that the smaller
    count is Binomial(lost + gained, 1/2); pairs that did not change carry no information. McNemar, "Note on the
    sampling error of the difference between correlated proportions", Psychometrika 12 (1947) 153-157, in its exact
    (binomial) form. By hand: 8 lost and 2 gained give 2 · (1 + 10 + 45) / 2¹⁰ = 0.109375.

    Args:
        lost: Pairs that passed before and fail now.
        gained: Pairs that failed before and pass now.
    """
    if lost < 0 or gained < 0:
        raise ValueError("counts of pairs cannot be negative")
    n = lost + gained
    ways = tail = 1  # n choose 0
    for k in range(min(lost, gained)):
        ways = ways * (n - k) // (k + 1)  # n choose k + 1, exactly
        tail += ways
    return min(1.0, 2 * tail / (1 << n))


def wilson(passed: int, n: int, *, confidence: float = CONFIDENCE) -> Interval | None:
    """Return the Wilson score interval of a share, or None of nothing.

    Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American Statistical
    Association 22 (1927) 209-212: with z the normal quantile, the ends are
    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). It stays within 0 and 1 and has a width at 0 of n and n of n too.
    By hand: 8 of 10 give 0.4902 to 0.9433; 0 of 10 give 0 to z²/(n + z²) = 0.2775.
    """
    if not 0 <= passed <= n:
        raise ValueError("a share is of at most all")
    if n == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, stretch = passed / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / stretch
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / stretch
    # At the ends the terms cancel, but for rounding.
    return Interval(0.0 if passed == 0 else middle - half, 1.0 if passed == n else middle + half)


def bootstrap(
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """Return the percentile bootstrap interval of share(after) − share(before) over pairs, or None of nothing.

    Pairs are drawn, never single results, so that what two results of one question share cancels. Questions about one
    fact stand and fall together; given `groups`, whole groups are drawn, or the interval would be too narrow.
    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile interval); Davison and
    Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8 (drawing groups).

    Args:
        before, after: The results of the same questions in the same order.
        groups: The group of each pair; every pair is its own by default.
        seed: Of the draws: the same seed gives the same interval.
        resamples: How often to draw.
        confidence: Of the interval.
    """
    if len(before) != len(after) or (groups is not None and len(groups) != len(before)):
        raise ValueError("pairs need as many results before as after")
    if not before:
        return None
    sums: dict[Hashable, list[int]] = {}
    for place, (was, now) in enumerate(zip(before, after, strict=True)):
        drawn = sums.setdefault(place if groups is None else groups[place], [0, 0])
        drawn[0] += int(now) - int(was)
        drawn[1] += 1
    pool = list(sums.values())
    if all(difference == 0 for difference, _ in pool):
        return Interval(0.0, 0.0)
    rng = random.Random(seed)
    means = []
    for _ in range(resamples):
        sample = rng.choices(pool, k=len(pool))
        means.append(sum(difference for difference, _ in sample) / sum(size for _, size in sample))
    means.sort()
    outside = (1 - confidence) / 2
    return Interval(means[math.floor(outside * resamples)], means[math.ceil((1 - outside) * resamples) - 1])


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number, in the order given.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979) 65-70:
    the k-th smallest of m is multiplied by m − k + 1, and none may be smaller than the one before it. Comparing these
    with α keeps the chance of any false alarm at most α, whatever the dependence. By hand: 0.01, 0.04, 0.03 become
    0.03, 0.06, 0.06.
    """
    adjusted: dict[str, float] = {}
    floor = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        floor = max(floor, min(1.0, p * (len(p_values) - place)))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}
