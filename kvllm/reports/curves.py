"""Curves and matrices read off probes: recall against semantic distance, and which key recites which fact's text.

Pure functions of records.

    recall_by_distance(report.probes)[0]    # DistancePoint(near=0.0, far=0.02, n=8, passed=8, value=1.0, …)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvllm.metrics import contains
from kvllm.paired import wilson
from kvllm.records import ProbeResult, Record

# The first bin holds the trained questions themselves, whose distance is 0 but for rounding.
DISTANCES = (0.0, 0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 2.0)
# Kinds that ask for something else than the fact, and questions of a second turn, which the first has answered.
_NOT_ASKING = frozenset(
    {"neighbour", "general", "instruction", "erasure", "restoration", "refusal", "recalled", "consequence"}
)
# These are not answered with the text, and may well be answered with another fact.
_FREE = frozenset({"inverse", "far"})
_CUT_CHARS = 40  # of an answer that may be the beginning of a longer text


@dataclass(frozen=True)
class DistancePoint(Record):
    """Probes whose question lies between two distances (1 − cosine) of the nearest trained question.

    Attributes:
        near, far: The bin; `far` does not belong to it.
        distance: Mean distance of its probes.
        n, passed: Probes, and those whose answer states the text.
        value, low, high: The share that passed, with its 95 % Wilson interval.
    """

    near: float
    far: float
    distance: float
    n: int
    passed: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Recitals(Record):
    """Which key recites which text.

    Attributes:
        keys: The facts.
        matrix: Share of the questions about key i whose answer holds the text of key j.
        pairs: (key asked about, key whose text was recited, share) off the diagonal, most first: what to look at.
    """

    keys: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    pairs: tuple[tuple[str, str, float], ...]


def recall_by_distance(probes: Sequence[ProbeResult]) -> list[DistancePoint]:
    """Return recall in bins of semantic distance; empty where no probe carries a similarity."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probe in probes:
        if probe.similarity is None or probe.kind in _NOT_ASKING | _FREE:
            continue
        distance = max(0.0, 1 - probe.similarity)
        place = max(i for i, edge in enumerate(DISTANCES[:-1]) if distance >= edge)
        bins.setdefault(place, []).append((distance, probe.passed))
    points = []
    for place, found in sorted(bins.items()):
        n, passed = len(found), sum(ok for _, ok in found)
        band = wilson(passed, n)
        assert band is not None
        mean = sum(distance for distance, _ in found) / n
        near, far = DISTANCES[place], DISTANCES[place + 1]
        points.append(DistancePoint(near, far, mean, n, passed, passed / n, band.low, band.high))
    return points


def recitals(probes: Sequence[ProbeResult]) -> Recitals | None:
    """Return which key recites which fact's text; None with fewer than two facts.

    Two facts with one text, or of which one's text holds the other's, are not told apart and do not count as a pair.
    """
    texts: dict[str, str] = {}
    answers: dict[str, list[str]] = {}
    for probe in probes:
        if probe.key is not None and probe.expected and probe.kind not in _NOT_ASKING | _FREE:
            texts.setdefault(probe.key, probe.expected)
            answers.setdefault(probe.key, []).append(probe.answer)
    keys = tuple(texts)
    if len(keys) < 2:
        return None
    matrix = tuple(
        tuple(sum(_recites(answer, texts[told]) for answer in answers[asked]) / len(answers[asked]) for told in keys)
        for asked in keys
    )
    pairs = [
        (asked, told, matrix[i][j])
        for i, asked in enumerate(keys)
        for j, told in enumerate(keys)
        if i != j and matrix[i][j] > 0 and not contains(texts[asked], texts[told])
    ]
    return Recitals(keys, matrix, tuple(sorted(pairs, key=lambda pair: -pair[2])))


def _recites(answer: str, text: str) -> bool:
    """Say whether an answer holds a text, or is nothing but a part of it, as one that was cut may be."""
    return bool(contains(answer, text)) or (len(answer) >= _CUT_CHARS and bool(contains(text, _whole_words(answer))))


def _whole_words(answer: str) -> str:
    return answer.rsplit(maxsplit=1)[0]
