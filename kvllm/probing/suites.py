"""Which questions are asked: the basic suite of a fact, and the packaged drift suite. No model here.

fact_suite(Fact("torchkeras", "…"))[0].kind      # 'trained'
drift_suite().questions[0].accept                # ('Paris',)
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any, TypeVar

from kvllm.probing.scorers import Judge
from kvllm.prompts import alias_questions, asked_questions, held_out_questions, language_of
from kvllm.records import Fact, ProbeKind, StoredFact

T = TypeVar("T")
FACT_SUITE = "fact-basic/4"
REFUSAL_SUITE = "refusals/1"
# The gate's suite, and the whole packaged one. The first is a spread over the rows below, and stays the same when rows
# are added behind them.
DRIFT_SUITE = "drift-basic/1"
WHOLE_DRIFT_SUITE = "drift/1"
_BASIC_ROWS = {"general.jsonl": 350, "instructions.jsonl": 53, "raw_text.jsonl": 116}


@dataclass(frozen=True)
class Probe:
    """One question to ask, and what its answer is judged against.

    Attributes:
        kind: Which rung of the ladder the question stands on.
        question: As asked.
        expected: What the answer should say.
        key: The fact the probe belongs to, if any.
        judge: How the answer is judged; see `kvllm.probing.scorers.judge`.
        accept: For the judges "names" and "accepts": any of these will do.
        plain: Asked as a plain completion, without chat template.
        first: The question of a first turn, asked before this one in the same conversation.
        tokens: Longest answer; 0 gives room for the expected text and a little more.
    """

    kind: ProbeKind
    question: str
    expected: str
    key: str | None = None
    judge: Judge = "states"
    accept: tuple[str, ...] = ()
    plain: bool = False
    first: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class GeneralQuestion:
    """A question that a small model may know, with accepted answers.

    Attributes:
        question: As asked.
        accept: One of these in the answer is enough.
        language: "en" or "zh".
        known: Whether the default model answers it (benchmarks/mark_known.py asked it); None for a user's question.
            `qa_delta` does not rest on this mark but on what the base at hand answers.
    """

    question: str
    accept: tuple[str, ...]
    language: str
    known: bool | None = None


@dataclass(frozen=True)
class DriftSuite:
    """Fixed, unrelated prompts: general questions, instructions, raw texts. None is in the preservation set."""

    questions: tuple[GeneralQuestion, ...]
    instructions: tuple[str, ...]
    texts: tuple[str, ...]
    name: str = DRIFT_SUITE


def fact_suite(fact: Fact, *, neighbours: int = 0, seed: int = 0, taken: frozenset[str] = frozenset()) -> list[Probe]:
    """Return a fact's probes: trained questions, held-out paraphrases, aliases, user probes, neighbours.

    Args:
        fact: A stored fact keeps the questions it was really trained on.
        neighbours: How many packaged neighbour questions to add, three quarters in the key's language.
        seed: Chooses them, for each key others.
        taken: Casefolded live keys; neighbours that name one are left out.
    """
    trained = asked_questions(fact)
    probes = [Probe("trained", q, fact.text, fact.key) for q in trained]
    seen = set(trained)
    for kind, questions in (
        ("paraphrase", held_out_questions(fact)),
        ("alias", alias_questions(fact)),
        ("user", fact.probes),
    ):
        for question in questions:
            if question not in seen:
                seen.add(question)
                probes.append(Probe(kind, question, fact.text, fact.key))  # type: ignore[arg-type]
    if neighbours:
        name = fact.key.casefold()
        others = taken if name in taken else taken | {name}
        probes += [
            Probe("neighbour", q, fact.text, fact.key)
            for q in neighbour_sample(language_of(fact.key), neighbours, seed=f"{seed}/{fact.key}", taken=others)
        ]
    return probes


def neighbour_sample(language: str, n: int, *, seed: int | str, taken: frozenset[str] = frozenset()) -> list[str]:
    """Return n held-out neighbour questions, three quarters in the given language, none naming a taken key."""
    rows = _not_naming(taken)
    own = [row["question"] for row in rows if row["lang"] == language]
    other = [row["question"] for row in rows if row["lang"] != language]
    rng = random.Random(seed)
    first = min(len(own), max(1, round(0.75 * n)))
    return rng.sample(own, first) + rng.sample(other, min(len(other), n - first))


def pool_questions(taken: frozenset[str] = frozenset()) -> list[str]:
    """Return every packaged neighbour question that names no taken (casefolded) key."""
    return [row["question"] for row in _not_naming(taken)]


@lru_cache(maxsize=4)  # the suites of many facts leave out the same names
def _not_naming(taken: frozenset[str]) -> tuple[dict[str, Any], ...]:
    rows = _read("neighbours.jsonl")
    return tuple(row for row in rows if not any(key in row["question"].casefold() for key in taken))


def refusal_probes(refused: Sequence[StoredFact]) -> list[Probe]:
    """Return what refused keys are asked: the questions that were trained to the refusal, which is each fact's text."""
    return [Probe("refusal", q, fact.text, fact.key) for fact in refused for q in fact.trained_questions]


@cache
def drift_suite(questions: int = 80, instructions: int = 12, texts: int = 30) -> DriftSuite:
    """Return the gate's drift suite: an even spread of each file's first rows (0 takes all of those)."""
    return DriftSuite(
        tuple(_spread(_general(_basic("general.jsonl")), questions)),
        tuple(_spread([row["prompt"] for row in _basic("instructions.jsonl")], instructions)),
        tuple(_spread([row["text"] for row in _basic("raw_text.jsonl")], texts)),
    )


@cache
def whole_drift_suite() -> DriftSuite:
    """Return every packaged question, instruction and text."""
    return DriftSuite(
        tuple(_general(_read("general.jsonl"))),
        tuple(row["prompt"] for row in _read("instructions.jsonl")),
        tuple(row["text"] for row in _read("raw_text.jsonl")),
        WHOLE_DRIFT_SUITE,
    )


def _basic(name: str) -> tuple[dict[str, Any], ...]:
    return _read(name)[: _BASIC_ROWS[name]]


def _general(rows: Sequence[dict[str, Any]]) -> list[GeneralQuestion]:
    return [GeneralQuestion(row["question"], tuple(row["accept"]), row["lang"], row.get("known")) for row in rows]


def _spread(items: Sequence[T], n: int) -> Sequence[T]:
    return items if not n or n >= len(items) else [items[(i * len(items)) // n] for i in range(n)]


@cache
def _read(name: str) -> tuple[dict[str, Any], ...]:
    source = resources.files("kvllm.probing") / "suite_data" / name
    return tuple(json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip())
