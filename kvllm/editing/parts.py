"""Which part of an edit holds a fact: what a delete takes back. Plain records, nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Places = Mapping[int, Sequence[int]]  # layer to neurons


@dataclass(frozen=True)
class Part:
    """A part of a change of weights.

    Attributes:
        sha: The delta's sha256; None for all that the weights of now are more than the base's.
        of: Only what it changes of these neurons; None for all.
        kept: But not what it changes of these.
    """

    sha: str | None
    of: Places | None = None
    kept: Places = field(default_factory=dict)
