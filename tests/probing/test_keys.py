"""Semantic keys of a ledger: nearest first, near ones warned about, vectors cached and made again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from kvllm.probing.encoder import Vectors
from kvllm.probing.keys import collision_warnings, nearest_facts, order_by_nearness
from kvllm.prompts import key_question
from kvllm.records import Fact, StoredFact
from kvllm.store import Base, NewEdit, Store

ANGLES = {"torchkeras": 0, "keras": 20, "numpy": 50, "Berlin": 90, "the furnace": 5}


class Compass:
    """An encoder whose meanings are directions in the plane."""

    name = "compass"
    collision_similarity = 0.93  # cos 21.6°

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        degrees = [next(a for key, a in ANGLES.items() if key_question(key) == text) for text in texts]
        radians = np.deg2rad(np.array(degrees, dtype=np.float32)).reshape(-1)
        return np.stack([np.cos(radians), np.sin(radians)], axis=1) if len(texts) else np.zeros((0, 2), np.float32)

    def speaks(self, text: str) -> bool:
        return True


@pytest.fixture
def compass() -> Compass:
    return Compass()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    base = Base("tiny", "folder:/tiny", None, {"config.json": "0" * 64}, "1" * 64, None)
    with Store.create(tmp_path / "k.kb", base, {}) as store:
        for parent, key in enumerate(("torchkeras", "numpy", "Berlin")):
            store.commit(NewEdit("insert", (key,), parent, facts=(StoredFact(key, f"text of {key}"),)), None)
        yield store


def test_the_nearest_fact_comes_first_with_its_cosine(store: Store, compass: Compass) -> None:
    found = nearest_facts(store, "keras", lambda texts: compass, n=2)
    assert [(m.key, m.text, m.encoder) for m in found] == [
        ("torchkeras", "text of torchkeras", "compass"),
        ("numpy", "text of numpy", "compass"),
    ]
    assert found[0].similarity == pytest.approx(np.cos(np.deg2rad(20)), abs=1e-3)
    assert len(nearest_facts(store, "keras", lambda texts: compass, n=50)) == 3


def test_near_keys_are_warned_about_with_their_names(store: Store, compass: Compass) -> None:
    def warned(*keys: str) -> tuple[str, ...]:
        return collision_warnings(store, [Fact(key, "x") for key in keys], lambda texts: compass)

    (warning,) = warned("keras")
    assert "'keras'" in warning
    assert "'torchkeras' (0.94)" in warning
    assert "numpy" not in warning
    assert "Berlin" not in warning
    assert len(warned("keras", "the furnace")) == 2  # the second collides with the first, too
    assert "'keras'" in warned("keras", "the furnace")[1]
    assert warned("torchkeras") == ()  # an update does not collide with itself


def test_other_facts_are_ordered_by_nearness(store: Store, compass: Compass) -> None:
    ordered = order_by_nearness(store, [Fact("keras", "x")], store.facts(), lambda texts: compass)
    assert [fact.key for fact in ordered] == ["torchkeras", "numpy", "Berlin"]
    ordered = order_by_nearness(store, [Fact("Berlin", "x")], store.facts()[:2], lambda texts: compass)
    assert [fact.key for fact in ordered] == ["numpy", "torchkeras"]
    both = [Fact("Berlin", "x"), Fact("keras", "x")]
    ordered = order_by_nearness(store, both, store.facts(), lambda texts: compass)
    assert [fact.key for fact in ordered] == ["Berlin", "torchkeras", "numpy"]


def test_facts_without_a_row_are_ordered_each_by_its_own_key_and_not_cached(store: Store, compass: Compass) -> None:
    refused = [StoredFact("the furnace", "x"), StoredFact("keras", "x")]
    ordered = order_by_nearness(store, [Fact("torchkeras", "x")], [*store.facts()[1:], *refused], lambda texts: compass)
    assert [fact.key for fact in ordered] == ["the furnace", "keras", "numpy", "Berlin"]
    assert set(store.vectors("compass")) == {2, 3}


def test_vectors_of_live_keys_are_made_once(store: Store, compass: Compass) -> None:
    nearest_facts(store, "keras", lambda texts: compass, n=1)
    assert sorted(compass.asked) == sorted(map(key_question, ["torchkeras", "numpy", "Berlin", "keras"]))
    compass.asked.clear()
    nearest_facts(store, "keras", lambda texts: compass, n=1)
    assert compass.asked == [key_question("keras")]
    assert len(store.vectors("compass")) == 3


def test_a_reader_makes_vectors_without_writing_them(store: Store, compass: Compass) -> None:
    with Store.open(store.path, readonly=True) as reader:
        assert nearest_facts(reader, "keras", lambda texts: compass, n=1)[0].key == "torchkeras"
    assert store.vectors("compass") == {}


def test_an_empty_ledger_needs_no_encoder(tmp_path: Path) -> None:
    base = Base("tiny", "folder:/tiny", None, {"config.json": "0" * 64}, "1" * 64, None)
    with Store.create(tmp_path / "e.kb", base, {}) as store:

        def refuse(texts: Sequence[str]) -> Compass:
            raise AssertionError("no encoder is needed")

        assert nearest_facts(store, "keras", refuse, n=1) == []
        assert collision_warnings(store, [Fact("keras", "x")], refuse) == ()
