"""The semantic keys of a ledger: which facts mean nearly the same, and which one a query means.

Vectors of the live keys are cached in the ledger and made again when missing. Knows the store and an encoder; nothing of
training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvllm.prompts import key_question
from kvllm.records import Fact, Match, Progress, StoredFact
from kvllm.store import Store

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel

Loader = Callable[[], "LanguageModel"]
Report = Callable[[Progress], None] | None


def nearest_facts(store: Store, query: str, lm_loader: Loader, *, n: int, progress: Report = None) -> list[Match]:
    """Return the n live facts whose key is nearest to the query by cosine."""
    facts = store.facts()
    if not facts:
        return []
    encoder, matrix = _live_matrix(store, facts, [query], lm_loader, progress)
    similarities = matrix @ encoder.encode([query])[0]
    order = sorted(range(len(facts)), key=lambda i: -float(similarities[i]))[:n]
    return [Match(facts[i].key, facts[i].text, round(float(similarities[i]), 4), encoder.name) for i in order]


def collision_warnings(
    store: Store, facts: Sequence[Fact], lm_loader: Loader, *, progress: Report = None
) -> tuple[str, ...]:
    """Return one sentence per pair of a new and another key that are so near that one may overwrite the other."""
    new_keys = {fact.key for fact in facts}
    live = [fact for fact in store.facts() if fact.key not in new_keys]
    if not live and len(facts) < 2:
        return ()
    asked = [key_question(fact.key) for fact in facts]
    encoder, matrix = _live_matrix(store, live, asked, lm_loader, progress)
    vectors = encoder.encode(asked)
    warnings = []
    for i, fact in enumerate(facts):
        others: list[tuple[str, Any]] = [(f.key, matrix[j]) for j, f in enumerate(live)]
        others += [(facts[j].key, vectors[j]) for j in range(i)]
        near = sorted(((float(vector @ vectors[i]), key) for key, vector in others), reverse=True)
        near = [(cosine, key) for cosine, key in near if cosine >= encoder.collision_similarity][:3]
        if near:
            names = ", ".join(f"{key!r} ({cosine:.2f})" for cosine, key in near)
            warnings.append(
                f"The key {fact.key!r} means nearly the same as {names}; check that both are still recalled."
            )
    return tuple(warnings)


def order_by_nearness(
    store: Store, fact: Fact, others: list[StoredFact], lm_loader: Loader, *, progress: Report = None
) -> list[StoredFact]:
    """Return the other facts, those nearest to the fact's key first."""
    query = key_question(fact.key)
    encoder, matrix = _live_matrix(store, others, [query], lm_loader, progress)
    similarities = matrix @ encoder.encode([query])[0]
    return [others[i] for i in sorted(range(len(others)), key=lambda i: -float(similarities[i]))]


def _live_matrix(
    store: Store, facts: Sequence[StoredFact], also: Sequence[str], lm_loader: Loader, progress: Report
) -> tuple[Any, Any]:
    """Return the encoder that speaks all of these, and the facts' unit vectors (n, d)."""
    import numpy as np

    from kvllm.probing.encoder import choose_encoder, pack, unpack

    questions = [key_question(fact.key) for fact in facts]
    encoder = choose_encoder([*questions, *also], lm_loader=lm_loader, progress=progress)
    cached = store.vectors(encoder.name)
    missing = [i for i, fact in enumerate(facts) if fact.id not in cached]
    if missing:
        fresh = encoder.encode([questions[i] for i in missing])
        new = {facts[i].id: pack(vector) for i, vector in zip(missing, fresh, strict=True)}
        cached |= new
        if not store.readonly:
            store.put_vectors(encoder.name, new)
    if not facts:
        return encoder, np.zeros((0, 1), dtype=np.float32)
    return encoder, np.stack([unpack(cached[fact.id]) for fact in facts])
