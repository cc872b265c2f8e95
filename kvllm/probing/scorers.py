"""Named scorers: does an answer state a text? Each returns a number in [0, 1] and a verdict.

Short texts must be contained; long ones may differ in a few characters (chrF, Popović 2015, by sacrebleu's definition:
character n-grams up to 6, beta 2). The name of the scorer travels with every number.

    score_statement("It is Paris.", "Paris")    # Scored(score=1.0, passed=True, scorer='contains')
"""

from __future__ import annotations

from dataclasses import dataclass

from kvllm.errors import ConfigError
from kvllm.metrics import contains, exact, normalise

LONG_TEXT_CHARS = 40
CHRF_THRESHOLD = 0.8
SCORERS = ("auto", "exact", "contains", "chrf")


@dataclass(frozen=True)
class Scored:
    """A scorer's number, its verdict, and which scorer spoke."""

    score: float
    passed: bool
    scorer: str


def score_statement(answer: str, text: str, *, scorer: str = "auto") -> Scored:
    """Judge whether an answer states a text.

    Args:
        answer: As generated.
        text: What it should state.
        scorer: "exact", "contains", "chrf" (≥ 0.8), or "auto": contained, or for long texts chrF.

    Raises:
        ConfigError: unknown scorer.
    """
    if scorer == "exact":
        value = exact(answer, text)
        return Scored(value, value == 1.0, "exact")
    if scorer == "contains":
        value = contains(answer, text)
        return Scored(value, value == 1.0, "contains")
    if scorer not in ("auto", "chrf"):
        raise ConfigError(f"There is no scorer {scorer!r}; use one of {', '.join(SCORERS)}.")
    if scorer == "auto":
        if contains(answer, text):
            return Scored(1.0, True, "contains")
        if len(text) < LONG_TEXT_CHARS:
            return Scored(0.0, False, "contains")
    value = chrf(answer, text)
    return Scored(value, value >= CHRF_THRESHOLD, f"chrf>={CHRF_THRESHOLD}")


def chrf(answer: str, text: str) -> float:
    """Return chrF in [0, 1] of the normalised strings."""
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined, unused-ignore]

    return float(CHRF().sentence_score(normalise(answer), [normalise(text)]).score) / 100
