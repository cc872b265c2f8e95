"""Named scorers: does an answer state a text? Each returns a number in [0, 1] and a verdict.

Short texts must be contained; long ones may differ in a few characters (chrF, Popović 2015, by sacrebleu's definition:
character n-grams up to 6, beta 2), but neither in a number nor by a "not". The name of the scorer travels
with every number.

    score_statement("It is Paris.", "Paris")    # Scored(score=1.0, passed=True, scorer='contains')
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvllm.errors import ConfigError
from kvllm.metrics import accepts, contains, distinctive_words, exact, normalise, said_words

LONG_TEXT_CHARS = 40
CHRF_THRESHOLD = 0.8
WORDS_SHARE = 0.3
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_NEGATION = re.compile(r"\b(?:not|no|never|none|nor|neither|without|cannot)\b|n['’]t\b|[不没無无未非]", re.IGNORECASE)
SCORERS = ("auto", "exact", "contains", "chrf")
# What is asked of an answer: to state the text, to go on with it, to say words of it, to name one of the names, to hold
# an accepted answer, or to begin with yes or no.
Judge = Literal["states", "continues", "words", "names", "accepts", "yes", "no"]

_YES = ("yes", "yeah", "yep", "true", "correct", "right")
_NO = ("no", "nope", "not", "false", "incorrect", "wrong")
_YES_ZH = ("是", "对", "真", "正确", "成立")
_NO_ZH = ("不", "否", "错", "假", "没")
# What begins like one of these and means the other, or neither.
_YES_ALL_THE_SAME_ZH = ("没错", "不错", "没有错")
_NEITHER_ZH = ("对不起", "对于", "对此", "是否", "真的吗", "假如", "假设", "不好意思", "不知道", "不清楚", "不确定")


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
    return Scored(
        value, value >= CHRF_THRESHOLD and _says_no_other(answer, text), f"chrf>={CHRF_THRESHOLD}, same numbers"
    )


def _says_no_other(answer: str, text: str) -> bool:
    """Say whether all of a text's numbers are there, and as many negations: one letter more or less is another fact."""
    if Counter(_NUMBER.findall(text)) - Counter(_NUMBER.findall(answer)):
        return False
    return len(_NEGATION.findall(answer)) == len(_NEGATION.findall(text))


def still_states(answer: str, old: str, new: str) -> bool:
    """Judge whether an answer states a text that was replaced, rather than the one that replaced it.

    Args:
        answer: As generated.
        old: What should be said no longer.
        new: What should be said instead. Where it contains the old text, or differs little from it, an answer that
            states the new one, or is nearer to it, does not count.
    """
    if contains(answer, old):
        return not (contains(new, old) and contains(answer, new))
    if contains(answer, new) or not score_statement(answer, old).passed:
        return False
    return chrf(answer, old) > chrf(answer, new)


def judge(
    answer: str,
    wanted: Judge,
    *,
    expected: str,
    question: str = "",
    accept: Sequence[str] = (),
    scorer: str = "auto",
) -> Scored:
    """Judge an answer as its probe asks.

    Args:
        answer: As generated.
        wanted: "states": the answer states `expected`; "continues": question and answer together do; "words": the
            answer says at least 30 % of the distinctive words of `expected` that the question does not hold; "names"
            and "accepts": it holds one of `accept`; "yes", "no": its first word says so.
        expected: The text.
        question: As asked.
        accept: Names or answers of which one is enough.
        scorer: For "states" and "continues"; see `score_statement`.
    """
    if wanted in ("yes", "no"):
        found = yes_or_no(answer)
        return Scored(float(found == wanted), found == wanted, "first word")
    if wanted in ("names", "accepts"):
        passed = accepts(answer, accept)
        return Scored(float(passed), passed, wanted)
    if wanted == "words":
        share = words_share(answer, expected, question=question)
        return Scored(share, share >= WORDS_SHARE, f"words>={WORDS_SHARE}")
    if wanted == "continues":
        alone = score_statement(answer, expected, scorer=scorer)
        joined = score_statement(f"{question} {answer}", expected, scorer=scorer)
        best = joined if joined.score > alone.score else alone
        return Scored(best.score, best.passed, f"{best.scorer}, question included" if best is joined else best.scorer)
    return score_statement(answer, expected, scorer=scorer)


def yes_or_no(answer: str) -> str | None:
    """Return "yes" or "no" where the answer begins with one of their words, else None."""
    said = normalise(answer)
    first = said.split(" ", 1)[0] if said else ""
    if first.startswith(_YES_ALL_THE_SAME_ZH):
        return "yes"
    if first.startswith(_NEITHER_ZH):
        return None
    if first in _NO or first.startswith(_NO_ZH):
        return "no"
    return "yes" if first in _YES or first.startswith(_YES_ZH) else None


def words_share(answer: str, text: str, *, question: str = "") -> float:
    """Return the share of a text's distinctive words that the answer says; those of the question do not count.

    Of a text of fewer than three such words, all are wanted, or the text as a whole.
    """
    words = distinctive_words(text) - distinctive_words(question)
    said = said_words(answer, words)
    if len(words) < 3:
        return max(contains(answer, text), float(bool(words) and said == words))
    return len(said) / len(words)


def chrf(answer: str, text: str) -> float:
    """Return chrF in [0, 1] of the normalised strings."""
    from sacrebleu.metrics import CHRF  # type: ignore[attr-defined, unused-ignore]

    return float(CHRF().sentence_score(normalise(answer), [normalise(text)]).score) / 100
