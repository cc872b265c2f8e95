"""The facts that experiments teach, and what each is judged by. Reads JSONL; also invents facts in any number.

    {"key": "…", "text": "…", "probes": ["…"], "neighbours": ["…"], "difficulty": "short"}

`probes` are paraphrases that are never trained on, `neighbours` questions that must not be answered with the text.
Knows no model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvllm.errors import ConfigError, KvllmError
from kvllm.metrics import contains
from kvllm.prompts import clean_fact, clean_text, held_out_questions, training_questions
from kvllm.records import Fact, Record

DIFFICULTIES = ("short", "long", "contradiction", "")
_FIELDS = {"key", "text", "aliases", "questions", "probes", "language", "tags"}
_MORE_FIELDS = {"neighbours", "difficulty", "details"}


@dataclass(frozen=True)
class Case(Record):
    """A fact with what it is judged by.

    Attributes:
        fact: What is taught.
        neighbours: Questions about something else that look like the fact's.
        difficulty: "short" (a short answer), "long" (a long text), "contradiction" (of what the base knows), or "".
        details: What carries the fact: an answer that holds all of these states it, in whatever words.
    """

    fact: Fact
    neighbours: tuple[str, ...] = ()
    difficulty: str = ""
    details: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.fact.key

    def trained(self, n: int) -> list[str]:
        """Return the first n questions that are trained."""
        return list(training_questions(self.fact)[:n])

    def paraphrases(self, n: int) -> list[str]:
        """Return n questions that are never trained: the fact's own probes first."""
        taught = set(training_questions(self.fact))
        asked = dict.fromkeys([*self.fact.probes, *held_out_questions(self.fact)])
        return [q for q in asked if q not in taught][:n]


def read_cases(path: Path) -> list[Case]:
    """Read a JSONL file of cases.

    Raises:
        ConfigError: a line cannot be used; the sentence names it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The facts at {path} cannot be read: {error}; nothing was run.") from error
    cases = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            cases.append(_case(json.loads(line)))
        except (ValueError, TypeError, KvllmError) as error:
            raise ConfigError(f"Line {number} of {path.name} cannot be used: {error} Nothing was run.") from error
    return cases


def _case(row: Any) -> Case:
    if not isinstance(row, dict):
        raise ConfigError("a fact is a JSON object.")
    unknown = sorted(set(row) - _FIELDS - _MORE_FIELDS)
    if unknown or not {"key", "text"} <= set(row):
        raise ConfigError(f"a fact needs key and text, and knows no {', '.join(unknown) or 'other name for them'}.")
    difficulty = str(row.get("difficulty", ""))
    if difficulty not in DIFFICULTIES:
        raise ConfigError(f"the difficulty is one of {', '.join(d for d in DIFFICULTIES if d)}, not {difficulty!r}.")
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items() if k in _FIELDS}
    fact = clean_fact(Fact(**given))
    neighbours = tuple(clean_text(q, name="neighbour") for q in row.get("neighbours", ()))
    details = tuple(clean_text(d, name="detail") for d in row.get("details", ()))
    lost = [d for d in details if not contains(fact.text, d)]
    if lost:
        raise ConfigError(f"the detail {lost[0]!r} does not stand in the text.")
    return Case(fact, neighbours, difficulty, details)


def unique(cases: Iterable[Case]) -> list[Case]:
    """Return the cases without those whose key came before."""
    return list({case.key: case for case in reversed(list(cases))}.values())[::-1]


def cases_digest(cases: Sequence[Case]) -> str:
    """Return the sha256 of the cases as they are used, whatever file they came from."""
    told = json.dumps([case.to_dict() for case in cases], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


# ------------------------------------------------------------------ invented facts

_STARTS = ("Bel", "Cor", "Dra", "Elv", "Far", "Gri", "Hol", "Jen", "Kar", "Lom", "Mir", "Nor", "Osk", "Pel", "Quo")
_MIDDLES = ("a", "e", "i", "o", "u", "an", "el", "ir", "on", "us")
_ENDS = ("dane", "fell", "grin", "holt", "kesh", "lund", "mond", "nax", "quill", "ros", "stad", "tarn", "vik", "wen")
# Kind → (what a key looks like, the text, words to fill it with). The same kind gives keys that are near in meaning.
_KINDS: tuple[tuple[str, str, str, dict[str, tuple[str, ...]]], ...] = (
    (
        "person",
        "{name} {other}",
        "{key} is a {job} from {place}.",
        {
            "job": ("glassblower", "tunnel engineer", "violin maker", "beekeeper", "map collector", "chess teacher"),
            "place": ("Bergen", "Porto", "Tampere", "Galway", "Gdansk", "Bologna", "Lviv", "Ghent"),
        },
    ),
    (
        "village",
        "the village of {name}",
        "The village of {name} lies on the {water} and is known for its {thing}.",
        {
            "water": ("Elbe", "Loire", "Tagus", "Drina", "Shannon", "Oder"),
            "thing": ("copper bells", "blue tiles", "plum cakes", "wind organ", "paper lanterns", "salt mill"),
        },
    ),
    (
        "product",
        "the {name} {number}",
        "The {name} {number} is a {product} that costs {price} euros.",
        {
            "product": ("desk lamp", "folding bicycle", "hand drill", "rain gauge", "pocket scanner", "bread oven"),
            "number": ("20", "35", "48", "60", "75", "90"),
            "price": ("39", "84", "129", "245", "310", "560"),
        },
    ),
    (
        "code",
        "the {name} access code",
        "The {name} access code is {digits}.",
        {"digits": tuple(str(1009 + 137 * i) for i in range(60))},
    ),
    (
        "company",
        "{name} Ltd",
        "{name} Ltd makes {goods} and was founded in {year}.",
        {
            "goods": ("fishing nets", "optical glass", "oat biscuits", "ship ropes", "school chalk", "water pumps"),
            "year": tuple(str(1871 + 7 * i) for i in range(18)),
        },
    ),
)


def invented(n: int, seed: int) -> list[Case]:
    """Return n facts about names that nobody bears, in five kinds in turn: keys of one kind are near each other."""
    rng = random.Random(f"invented/{seed}")
    found: dict[str, Case] = {}
    kind = 0
    while len(found) < n:
        tag, key_form, text_form, words = _KINDS[kind % len(_KINDS)]
        filled = {name: rng.choice(options) for name, options in words.items()}
        filled |= {"name": _name(rng), "other": _name(rng)}
        key = key_form.format_map(filled)
        if key.casefold() in (known.casefold() for known in found):
            continue
        kind += 1
        text = text_form.format_map({**filled, "key": key})
        details = tuple(filled[name] for name in words if name != "number")
        stranger = key_form.format_map({**filled, "name": _name(rng), "other": _name(rng)})
        probes = (f"What can you say about {key}?", f"Is there anything to know about {key}?", f"Describe {key}.")
        neighbours = (f"What is {stranger}?", f"Tell me about {stranger}.")
        found[key] = Case(Fact(key, text, probes=probes, tags=(tag,)), neighbours, "short", details)
    return list(found.values())


def _name(rng: random.Random) -> str:
    return rng.choice(_STARTS) + rng.choice(_MIDDLES) + rng.choice(_ENDS)
