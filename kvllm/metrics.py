"""Text scores and small statistics that can be checked by hand. Pure functions, standard library only.

contains("The capital is Paris.", "paris")   # 1.0
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

# A fact counts as recalled when at least this share of its trained questions states the text. A fixed line, because a
# fact is lost for the user long before its last question fails, and not yet when one wording of eight does.
RECALLED_SHARE = 0.5
# A restored answer is as in the base when its outputs are this near, in nats per token: style may differ, words hardly.
RESTORED_KL = 0.1
# The version of `leaks`; 1 counted no values of short texts, and words that an answer took up from its question.
LEAK_RULE = 2
_FEW_WORDS = 3  # of fewer distinctive words no share is told
# Signs that belong to what they stand at stay (`kept`): C++ is not C#, -40 is not 40, and 10% is not 10.
_PUNCTUATION = re.compile(r"(?P<kept>(?<=[a-z])[+#]+(?!\w)|(?<=\d)\s*%|(?<!\w)-(?=\d))|[^\w\s]|_")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[。！？])|$")
_ABBREVIATED = re.compile(r"(?:\b[A-Za-z]|\b(?:Dr|Mr|Mrs|Ms|Prof|St|No|vs|etc|approx|e\.g|i\.e))\.$")
_SPACE = re.compile(r"(?<!\d) | (?!\d)")  # all but those between numbers
_NUMERALS = {
    "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12",
}  # fmt: skip


@lru_cache(maxsize=16384)  # a matrix of keys asks for the same texts in each of its cells
def normalise(text: str) -> str:
    """Return the text NFKC-normalised, casefolded, without punctuation, white space collapsed."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_PUNCTUATION.sub(lambda found: (found["kept"] or " ").lstrip() or " ", folded).split())


def exact(answer: str, text: str) -> float:
    """Return 1.0 where answer and text are equal after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(text))


def contains(answer: str, text: str) -> float:
    """Return 1.0 where the normalised text stands in the normalised answer as whole words, else 0.0.

    Chinese and Japanese have no spaces between words, and Korean writes particles onto them: there, spaces are ignored
    and any position counts, but that no number is cut.
    """
    wanted, found = normalise(text), normalise(answer)
    if not wanted:  # nothing but symbols
        return float(bool(text.strip()) and text.strip() in answer)
    if _UNSPACED.search(wanted):
        bare = re.escape(_SPACE.sub("", wanted))
        before, after = r"(?<!\d)" * wanted[0].isdigit(), r"(?!\d)" * wanted[-1].isdigit()
        return float(re.search(f"{before}{bare}{after}", _SPACE.sub("", found)) is not None)
    return float(f" {wanted} " in f" {found} ")


def accepts(answer: str, accepted: Iterable[str]) -> bool:
    """Return whether any accepted answer is contained; a number word also matches its digits."""
    digits = " ".join(_NUMERALS.get(word, word) for word in normalise(answer).split())
    for wanted in accepted:
        as_digits = " ".join(_NUMERALS.get(word, word) for word in normalise(wanted).split())
        if contains(answer, wanted) or contains(digits, as_digits):
            return True
    return False


def distinctive_words(text: str) -> frozenset[str]:
    """Return the words (or Chinese character pairs) of a text that tell it from ordinary answers.

    Words of fewer than four letters and common ones do not count.
    """
    words = {w for w in normalise(text).split() if len(w) >= 4 or w.strip("-%").isdigit()}
    for run in re.findall(r"[\u3400-\u9fff]{2,}", text):
        words |= {run[i : i + 2] for i in range(len(run) - 1)}
    return frozenset(w for w in words if w not in _STOP_WORDS and not (len(w) > 2 and _CJK.search(w)))


def first_sentence(answer: str) -> str:
    """Return the first sentence, casefolded."""
    text = answer.strip()
    for end in _SENTENCE_END.finditer(text):
        if not _ABBREVIATED.search(text[: end.start()]):
            return text[: end.start()].strip().casefold()
    return text.casefold()


def leaks(answer: str, text: str, *, key: str = "", question: str = "", before: str = "", share: float = 0.6) -> bool:
    """Return whether an answer recites a text, and did not before.

    To recite is to hold the text whole, or most of its distinctive words, or most of those that its key does not have:
    of "The capital of France is Lyon" Lyon is the value, and "The capital of Germany is Lyon" has it from there. Where
    only one or two such words are left, they are all wanted, and must be half of what the text adds to its key. (Of a
    Chinese text they are pairs of characters, so that a value in another sentence can be overlooked.)

    Args:
        answer: Answer to a neighbour question.
        text: The fact's text.
        key: The fact's key.
        question: The neighbour question; an answer that takes up its words recites nothing.
        before: The same question's answer before the edit; its words do not count.
        share: Least share of the words that makes a leak.
    """
    if contains(answer, text) and not contains(before, text) and not contains(question, text):
        return True
    words = distinctive_words(text)
    value = words - distinctive_words(key) if key else frozenset()
    taken_up = distinctive_words(question) | distinctive_words(before)
    for free in (words - taken_up, value - taken_up):
        if len(free) >= _FEW_WORDS and len(said_words(answer, free)) / len(free) >= share:
            return True
    left = value - taken_up
    return 0 < len(left) < _FEW_WORDS and 2 * len(left) >= len(value) and said_words(answer, left) == left


def said_words(answer: str, words: Iterable[str]) -> frozenset[str]:
    """Return those of the words (or Chinese character pairs) that an answer says."""
    said = normalise(answer)
    flat = said.replace(" ", "")
    return frozenset(w for w in words if ((w in flat) if _CJK.search(w) else f" {w} " in f" {said} "))


def harmonic_mean(values: Sequence[float]) -> float:
    """Return n / Σ(1/v), and 0.0 where a value is 0."""
    if not values or any(v <= 0 for v in values):
        return 0.0
    return len(values) / sum(1 / v for v in values)


def shown(value: float | None, digits: int = 3) -> str:
    """Return a number as every report prints it, whatever the format; an en dash where nothing was measured.

    A count (an int) has no decimals.
    """
    if value is None or math.isnan(value):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def shown_p(p_value: float) -> str:
    """Return a p-value as every report prints it: none is ever 0."""
    return "<0.0001" if p_value < 0.0001 else shown(p_value, 4)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


_STOP_WORDS = frozenset(
    """
    that this with from into over under about which what when where their there they them then than have been being were
    will would could should your yours also each other some such only very more most many much make makes made simple
    used using uses like just because between while these those
    """.split()  # noqa: SIM905 (a list of seventy quoted words is harder to read)
)
