"""The semantic keys of a ledger: which facts mean nearly the same, and which one a query means.

Vectors of the live keys are cached in the ledger and made again when missing. Knows the store and an encoder; nothing
of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvllm.prompts import key_question
from kvllm.records import Fact, Match, StoredFact
from kvllm.store import Store

if TYPE_CHECKING:
    from kvllm.probing.encoder import Encoder

# Gives the encoder that speaks all of the texts: vectors of two encoders do not compare.
EncoderFor = Callable[[Sequence[str]], "Encoder"]


def nearest_facts(store: Store, query: str, encoder_for: EncoderFor, *, n: int) -> list[Match]:
    """Return the n live facts whose key is nearest to the query by cosine."""
    facts = store.facts()
    if not facts:
        return []
    from kvllm.probing.encoder import nearest

    asked = key_question(query)
    encoder, matrix = _live_matrix(store, facts, [asked], encoder_for)
    found = nearest(encoder.encode([asked])[0], matrix, n)
    return [Match(facts[i].key, facts[i].text, round(cosine, 4), encoder.name) for i, cosine in found]


def collision_warnings(store: Store, facts: Sequence[Fact], encoder_for: EncoderFor) -> tuple[str, ...]:
    """Return one sentence per pair of a new and another key that are so near that one may overwrite the other."""
    new_keys = {fact.key for fact in facts}
    live = [fact for fact in store.facts() if fact.key not in new_keys]
    if not live and len(facts) < 2:
        return ()
    asked = [key_question(fact.key) for fact in facts]
    encoder, matrix = _live_matrix(store, live, asked, encoder_for)
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
    store: Store, facts: Sequence[Fact], others: list[StoredFact], encoder_for: EncoderFor
) -> list[StoredFact]:
    """Return the other facts, those nearest to any of the facts' keys first."""
    import numpy as np

    asked = [key_question(fact.key) for fact in facts]
    encoder, matrix = _live_matrix(store, others, asked, encoder_for)
    cosines = (matrix @ encoder.encode(asked).T).max(axis=1)  # (others,)
    return [others[i] for i in np.argsort(-cosines, kind="stable")]


def _live_matrix(
    store: Store, facts: Sequence[StoredFact], also: Sequence[str], encoder_for: EncoderFor
) -> tuple[Any, Any]:
    """Return the encoder that speaks all of these, and the facts' unit vectors (n, d)."""
    import numpy as np

    from kvllm.probing.encoder import pack, unpack

    questions = [key_question(fact.key) for fact in facts]
    encoder = encoder_for([*questions, *also])
    cached = store.vectors(encoder.name)
    missing = [i for i, fact in enumerate(facts) if fact.id not in cached]
    fresh: dict[int, bytes] = {}
    if missing:
        vectors = encoder.encode([questions[i] for i in missing])
        fresh = {i: pack(vector) for i, vector in zip(missing, vectors, strict=True)}
        # What the weights were taught to refuse is compared, too, and has no row and no id.
        new = {facts[i].id: vector for i, vector in fresh.items() if facts[i].id}
        if new and not store.readonly:
            store.put_vectors(encoder.name, new)
    if not facts:
        return encoder, np.zeros((0, 1), dtype=np.float32)
    return encoder, np.stack([unpack(fresh[i] if i in fresh else cached[fact.id]) for i, fact in enumerate(facts)])
