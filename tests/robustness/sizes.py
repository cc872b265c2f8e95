"""How large the campaigns are: the environment variable KVLLM_CAMPAIGN, and a share of a list. Imports nothing.

1 is the whole size, 10 a night; where the variable is not set, a small form of every campaign runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
SMALL = 0.02
SIZE = float(os.environ.get("KVLLM_CAMPAIGN") or SMALL)
WHOLE = SIZE >= 1


def spread(items: Sequence[T], size: float, *, least: int = 1) -> list[T]:
    """Return a share of the items, evenly spread over all; at least a few, and all at size 1 or more."""
    n = min(len(items), max(least, round(len(items) * min(size, 1.0))))
    return [items[i * len(items) // n] for i in range(n)]


def some(items: Sequence[T], *, least: int = 1) -> list[T]:
    """Return the share of the items that the present size asks for."""
    return spread(items, SIZE, least=least)


def enough(n: int) -> int:
    """Return how many of so many a test may demand at the present size."""
    return int(n * min(SIZE, 1.0))
