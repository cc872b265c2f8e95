"""Questions like a fact's own, about other names: "Who leads Toyota?" beside "Who leads Halcyon Robotics?".

With one sample a model cannot know what distinguishes the key. Packaged neighbours tell it for a key that is a name and
is asked through templates; where the name is a part of the key, or the key is a question, only the same words around
another name do. Pure strings.

    contrast_questions([Fact("Who leads Halcyon Robotics?", "Ada Lindqvist")], 2)
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kvllm.editing.preservation import packaged_names
from kvllm.prompts import is_question, language_of, training_questions
from kvllm.records import Fact

# A run of words with capitals or digits; small words may stand between them, not at its ends.
_WORD = r"(?:[^\W\d_]*[A-ZÀ-ÖØ-Þ\d][\w’'./-]*)"
_NAME = re.compile(rf"\b{_WORD}(?:(?: (?:of|the|de|la|le|van|von|du|and|for)){{0,2}} ?(?:& )?{_WORD})*")
_QUOTED = re.compile(r"[“\"《「『]([^”\"》」』]{2,60})[”\"》」』]")
# Words that begin a sentence with a capital and name nothing.
_OPENING = """
what who whom whose which where when why how is are was were do does did can could would will has have had in on at of
the a an to from by for with tell name give please explain describe complete finish answer question and but if this that
these those it its he she they his her their i i'm we our my your you hey hi so as about define
"""
_OPENERS = frozenset(_OPENING.split())
_ARTICLES = frozenset(("the", "a", "an"))


def contrast_questions(
    facts: Sequence[Fact], n: int, *, seed: int = 0, excluded: frozenset[str] = frozenset()
) -> tuple[tuple[str, str], ...]:
    """Return up to n questions, shared out evenly over the facts, each with the language it is in.

    Args:
        facts: What is taught. One whose key is all name, and is asked through templates only, gives no question: the
            packaged neighbours are those.
        n: Most questions.
        seed: Chooses the names.
        excluded: Casefolded names and questions that live facts are about.
    """
    rng = random.Random(seed)
    rows = [_variants(fact, rng, excluded) for fact in facts]
    found: dict[str, str] = {}
    for turn in range(n):
        for fact, questions in zip(facts, rows, strict=True):
            if turn < len(questions) and len(found) < n:
                found.setdefault(questions[turn], fact.language or language_of(fact.key))
    return tuple(found.items())


def _variants(fact: Fact, rng: random.Random, excluded: frozenset[str]) -> list[str]:
    """Return a fact's questions with another name in each, in rotation, as long as there are names."""
    parts = [(q, name) for q in training_questions(fact) for name in names_in(q, fact.key)]
    if not parts:
        return []
    taken = " ".join(q.casefold() for q, _ in parts)
    names = [
        name
        for name in packaged_names(language_of(parts[0][1]))
        if name.casefold() not in excluded and name.casefold() not in taken
    ]
    rng.shuffle(names)
    # Names of the same shape first: a person's for a person's, more often than not.
    shape = len(parts[0][1].split())
    names.sort(key=lambda name: (not name[0].isupper(), abs(len(name.split()) - shape)))
    filled = [parts[i % len(parts)][0].replace(parts[i % len(parts)][1], name) for i, name in enumerate(names)]
    return [q for q in dict.fromkeys(filled) if q.casefold() not in excluded]


def names_in(question: str, key: str) -> list[str]:
    """Return what a question names: quoted words, runs of capitals, or in Chinese what stands before a key's 的.

    Nothing where that is the whole key: then other names are asked through the packaged templates.
    """
    asks = is_question(key) or key not in question
    within = question if asks else key
    head = key.rpartition("的")[0] if language_of(key) == "zh" and not asks else ""
    found = _QUOTED.findall(within) or ([head] if len(head) > 1 else _capitals(within))
    return [name for name in found if asks or name != key]


def _capitals(text: str) -> list[str]:
    found = []
    for match in _NAME.finditer(text):
        words = match.group().split()
        while words and words[0].casefold() in _OPENERS and (words[0].casefold() not in _ARTICLES or len(words) == 1):
            words.pop(0)
        name = re.sub(r"['’]s$", "", " ".join(words).rstrip(".'’-/"))
        if len(name) > 1 and name in text:
            found.append(name)
    return list(dict.fromkeys(found))
