"""Which key recites which fact: nearest other keys, their leaks, the matrix, and the pairs that a user should look at.

Knows facts, an encoder and a model; nothing of ledgers or training.

    found = find_collisions(lm, facts, encoder)
    found.matrix[0][1]       # share of the first key's questions whose answer states the second fact's text
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from kvllm.metrics import contains, distinctive_words, said_words
from kvllm.probing.runner import PROTOCOL, run_probes
from kvllm.probing.scorers import LONG_TEXT_CHARS, score_statement
from kvllm.probing.suites import Probe, pool_questions
from kvllm.prompts import asked_questions, held_out_questions, key_question, names_of
from kvllm.records import CollisionPair, Collisions, Metric, Neighbour, PairKind, Source, StoredFact

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel
    from kvllm.probing.encoder import Encoder, Vectors

NEAREST = 3
QUESTIONS = 6
MOST = 0.5  # what most of a key's questions do, the key does
# An answer that says fewer of a long text's words cannot reach chrF's threshold, which is slow to compute.
_CHRF_WORDS = 0.4


def find_collisions(
    lm: LanguageModel,
    facts: Sequence[StoredFact],
    encoder: Encoder,
    *,
    given: Sequence[str] = (),
    nearest: int = NEAREST,
    questions: int = QUESTIONS,
    base: Callable[[Sequence[Probe]], list[str]] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Collisions:
    """Ask every key some of its questions and its nearest neighbours, and say who recites whom.

    Args:
        lm: The model as it is now.
        facts: The live facts.
        encoder: Speaks all their keys.
        given: The user's own neighbours, as keys or questions; each is asked against every fact.
        nearest: How many of the nearest live keys, and of the nearest packaged neighbours, are asked per fact.
        questions: How many questions a key is asked: trained and held-out ones in turn.
        base: Answers neighbours that seem to leak with the base's weights: what the base says, too, is no leak.
        on_batch: Called with (done, total).
    """
    names = names_of(facts)
    near = nearest_questions(facts, facts, encoder, given=given, nearest=nearest, taken=names)
    own = [Probe("trained", q, fact.text, fact.key) for fact in facts for q in some_questions(fact, questions)]
    others = [Probe("neighbour", n.question, fact.text, fact.key) for fact in facts for n in near[fact.key]]
    report = run_probes(
        lm,
        [*own, *others],
        # What a live neighbour's own answer says is no leak.
        before={key_question(fact.key): fact.text for fact in facts},
        base=base,
        also=[fact.text for fact in facts],
        on_batch=on_batch,
    )
    probes, replies = report.probes[: len(own)], report.probes[len(own) :]
    answers: dict[str, list[str]] = {fact.key: [] for fact in facts}
    for probe in probes:
        answers[probe.key or ""].append(probe.answer)
    matrix = tuple(
        tuple(sum(states(a, other.text) for a in answers[fact.key]) / len(answers[fact.key]) for other in facts)
        for fact in facts
    )
    asked_near = [(fact.key, neighbour) for fact in facts for neighbour in near[fact.key]]
    neighbours = [
        Neighbour(key, n.question, n.source, n.similarity, reply.answer, not reply.passed)
        for (key, n), reply in zip(asked_near, replies, strict=True)
    ]
    leaked_share = sum(n.leaked for n in neighbours) / len(neighbours) if neighbours else None
    return Collisions(
        keys=tuple(fact.key for fact in facts),
        matrix=matrix,
        pairs=_pairs(facts, matrix, _similarities(facts, encoder), encoder.collision_similarity),
        neighbours=tuple(neighbours),
        leak_rate=Metric(leaked_share, len(neighbours), PROTOCOL, "leak"),
        questions=questions,
        encoder=encoder.name,
        probes=probes,
    )


def nearest_questions(
    facts: Sequence[StoredFact],
    live: Sequence[StoredFact],
    encoder: Encoder,
    *,
    given: Sequence[str] = (),
    nearest: int = NEAREST,
    taken: frozenset[str] = frozenset(),
) -> dict[str, list[Neighbour]]:
    """Return each fact's nearest other keys as questions, nearest first: live ones, packaged ones, then all given.

    What the encoder does not speak is no neighbour by distance: a packaged question is left out, a given one is kept
    without a similarity.
    """
    pool = [q for q in pool_questions(taken) if encoder.speaks(q)]
    asked = [key_question(name) for name in given]
    keys = [key_question(fact.key) for fact in live]
    vectors = _by_text(encoder, [*keys, *pool, *asked, *(key_question(fact.key) for fact in facts)])
    found: dict[str, list[Neighbour]] = {}
    for fact in facts:
        sources: tuple[tuple[Source, list[str], int], ...] = (
            ("ledger", keys, nearest),
            ("pool", pool, nearest),
            ("given", asked, len(asked)),
        )
        rows = [n for source, questions, most in sources for n in _ranked(fact, questions, source, vectors)[:most]]
        found[fact.key] = list({row.question: row for row in reversed(rows)}.values())[::-1]
    return found


def _ranked(
    fact: StoredFact, questions: Sequence[str], source: Source, vectors: Mapping[str, Vectors]
) -> list[Neighbour]:
    own = key_question(fact.key)
    mine = vectors.get(own)
    found = []
    for question in questions:
        theirs = vectors.get(question)
        near = None if mine is None or theirs is None else round(float(theirs @ mine), 4)
        if question != own and (near is not None or source == "given"):
            found.append(Neighbour(fact.key, question, source, near))
    return sorted(found, key=lambda n: -2.0 if n.similarity is None else n.similarity, reverse=True)


def some_questions(fact: StoredFact, n: int) -> list[str]:
    """Return n of a key's questions, trained and held-out ones in turn."""
    trained, held_out = list(asked_questions(fact)), list(held_out_questions(fact))
    turns = [q for pair in zip(trained, held_out, strict=False) for q in pair]
    return list(dict.fromkeys([*turns, *trained, *held_out]))[: max(n, 1)]


def states(answer: str, text: str) -> bool:
    """Return what `score_statement` says, faster where the answer has little to do with the text."""
    if contains(answer, text):
        return True
    words = distinctive_words(text)
    if len(text) < LONG_TEXT_CHARS or (words and len(said_words(answer, words)) / len(words) < _CHRF_WORDS):
        return False
    return score_statement(answer, text).passed


def _pairs(
    facts: Sequence[StoredFact],
    matrix: Sequence[Sequence[float]],
    similarities: Mapping[tuple[int, int], float],
    threshold: float,
) -> tuple[CollisionPair, ...]:
    """Return the pairs to look at, the worst first: recitations by share, then keys that only mean nearly the same."""
    pairs: list[CollisionPair] = []
    for i, fact in enumerate(facts):
        for j in range(i):
            near = similarities.get((i, j))
            there, back = matrix[i][j], matrix[j][i]
            lost, other_lost = matrix[i][i] < MOST, matrix[j][j] < MOST
            first, second = (i, j) if there >= back else (j, i)
            kind: PairKind
            if states(fact.text, facts[j].text) or states(facts[j].text, fact.text):
                if not there and not back:
                    continue
                kind = "same text"
            elif min(there, back) >= MOST and lost and other_lost:
                kind = "swapped"
            elif (there >= MOST and lost) or (back >= MOST and other_lost):
                kind = "overwritten"
                first, second = (i, j) if there >= MOST and lost else (j, i)
            elif there or back:
                kind = "recites"
            elif near is not None and near >= threshold:
                kind = "near"
            else:
                continue
            pairs.append(
                CollisionPair(
                    facts[first].key, facts[second].key, kind, near, matrix[first][second], matrix[second][first]
                )
            )
    order = ("swapped", "overwritten", "recites", "near", "same text")
    return tuple(sorted(pairs, key=lambda p: (order.index(p.kind), -p.recites, -(p.similarity or 0.0))))


def _similarities(facts: Sequence[StoredFact], encoder: Encoder) -> dict[tuple[int, int], float]:
    vectors = _by_text(encoder, [key_question(fact.key) for fact in facts])
    rows = [vectors.get(key_question(fact.key)) for fact in facts]
    return {
        (i, j): round(float(a @ b), 4)
        for i, a in enumerate(rows)
        for j, b in enumerate(rows[:i])
        if a is not None and b is not None
    }


def _by_text(encoder: Encoder, texts: Sequence[str]) -> dict[str, Vectors]:
    spoken = [text for text in dict.fromkeys(texts) if encoder.speaks(text)]
    return dict(zip(spoken, encoder.encode(spoken), strict=True)) if spoken else {}
