"""Questions like a fact's own, about other names: "Who leads Toyota?" beside "Who leads Halcyon Robotics?".

With one sample a model cannot know what distinguishes the key. Packaged neighbours tell it for a key that is a name and
is asked through templates; where the name is a part of the key, or the key is a question, only the same words around
another name do. Pure strings.

    contrast_questions([Fact("Who leads Halcyon Robotics?", "Ada Lindqvist")], 2)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle

from kvllm.editing.preservation import packaged_names
from kvllm.prompts import is_question, language_of, name_place, names_in, training_questions
from kvllm.records import Fact

_PLACE = "\x00"  # where a name goes; no question has one


def contrast_questions(
    facts: Sequence[Fact], n: int, *, seed: int = 0, excluded: frozenset[str] = frozenset(), characters: bool = False
) -> tuple[tuple[str, str], ...]:
    """Return up to n questions, shared out evenly over the facts, each with the language it is in.

    Args:
        facts: What is taught. One whose key is a single name, and is asked through templates only, gives no question:
            the packaged neighbours are those.
        n: Most questions.
        seed: Chooses the names.
        excluded: Casefolded names and questions that live facts are about.
        characters: Whether a Chinese name is told apart from its halves, too, as one of several words is.
    """
    rng = random.Random(seed)
    rows = [_variants(fact, rng, excluded, characters) for fact in facts]
    found: dict[str, str] = {}
    for turn in range(n):
        for fact, questions in zip(facts, rows, strict=True):
            if turn < len(questions) and len(found) < n:
                found.setdefault(questions[turn], fact.language or language_of(fact.key))
    return tuple(found.items())


def name_asked(question: str) -> str | None:
    """Return the packaged name that a question has, the longest, or None."""
    names = packaged_names(language_of(question))
    found = [name for name in names if name in question and name_place(name).search(question)]
    return max(found, key=len, default=None)


def _variants(fact: Fact, rng: random.Random, excluded: frozenset[str], characters: bool) -> list[str]:
    """Return a fact's questions with another name in each, in rotation, as long as there are names.

    Every third one is a question key in its own words.
    """
    asked = training_questions(fact)
    places = [(name_place(name).sub(_PLACE, q), name) for q in asked for name in names_in(q, fact.key)]
    places = [(open_, name) for open_, name in places if _PLACE in open_] or _halves(fact, characters)
    if not places:
        return []
    if asked[0] == fact.key:  # others are likeliest to be asked about in these words
        others = places[1:] or places
        turn = cycle(others)
        places = [place for _ in others for place in (places[0], next(turn), next(turn))]
    taken = " ".join(asked).casefold()
    names = [
        name
        for name in packaged_names(language_of(places[0][1]))
        if name.casefold() not in excluded and name.casefold() not in taken
    ]
    rng.shuffle(names)
    # Names of the same shape first: a person's for a person's, more often than not.
    shape = len(places[0][1].split())
    names.sort(key=lambda name: (not name[0].isupper(), abs(len(name.split()) - shape)))
    filled = [places[i % len(places)][0].replace(_PLACE, name) for i, name in enumerate(names)]
    return [q for q in dict.fromkeys(filled) if q.casefold() not in excluded]


def _halves(fact: Fact, characters: bool) -> list[tuple[str, str]]:
    """Return the questions about a key of several words that is all name, its end and its beginning open in turn.

    "Dr. Ada Lindqvist" is told apart from another doctor, and from another Lindqvist; 听潮书院 from another academy.
    """
    words, gap, middle = fact.key.split(), " ", len(fact.key) // 2
    if characters and language_of(fact.key) == "zh" and len(words) == 1 and middle:
        words, gap = [fact.key[:middle], fact.key[middle:]], ""
    if len(words) < 2 or is_question(fact.key):
        return []
    ends = ((f"{words[0]}{gap}{_PLACE}", gap.join(words[1:])), (f"{_PLACE}{gap}{words[-1]}", gap.join(words[:-1])))
    asked = [q for q in training_questions(fact) if fact.key in q]
    return [(q.replace(fact.key, ends[i % 2][0]), ends[i % 2][1]) for i, q in enumerate(asked)]
