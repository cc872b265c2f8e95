"""Means over items with intervals: results of one item stand and fall together, so whole items are drawn.

mean_of([[True, True], [False]], seed=0)     # {"value": 0.667, "low": …, "high": …, "n": 3, "items": 2, …}
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from kvllm.paired import CONFIDENCE, RESAMPLES, wilson


def mean_of(groups: Sequence[Sequence[float]], *, share: bool = True, seed: int = 0) -> dict[str, Any]:
    """Return mean, 95 % interval and sizes of results that belong to groups (items).

    The interval is the percentile bootstrap over groups (Davison and Hinkley 1997, section 3.8). Where every result is
    the same that has no width: a share of yes/no results gets Wilson's interval over the groups then, as if each were
    one result.
    """
    filled = [[float(v) for v in group] for group in groups if len(group)]
    values = [v for group in filled for v in group]
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0, "items": 0, "interval": None}
    mean = math.fsum(values) / len(values)
    low: float | None = None
    high: float | None = None
    if share and len(set(values)) == 1:
        found = wilson(len(filled) if values[0] else 0, len(filled))
        assert found is not None
        low, high, kind = found.low, found.high, "Wilson over items"
    elif len(filled) < 2:
        kind = None
    else:
        low, high = bootstrapped(filled, seed=seed)
        kind = "bootstrap over items"
    return {
        "value": round(mean, 5),
        "low": None if low is None else round(low, 5),
        "high": None if high is None else round(high, 5),
        "n": len(values),
        "items": len(filled),
        "interval": kind,
    }


def bootstrapped(groups: Sequence[Sequence[float]], *, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean over all results when whole groups are drawn."""
    rng = random.Random(seed)
    sums = [(math.fsum(group), len(group)) for group in groups]
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(sums, k=len(sums))
        means.append(math.fsum(total for total, _ in drawn) / sum(size for _, size in drawn))
    means.sort()
    outside = (1 - CONFIDENCE) / 2
    return means[math.floor(outside * RESAMPLES)], means[math.ceil((1 - outside) * RESAMPLES) - 1]
