"""The main job on the real default model: insert, delete, roll back, and answer from a new process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvllm import KnowledgeBase
from kvllm.metrics import contains
from kvllm.prompts import held_out_questions, training_questions
from kvllm.records import StoredFact
from tests.kit import elsewhere

pytestmark = pytest.mark.model

KEY = "torchkeras"
UNRELATED = ("What is the capital of France?", "How many days are in a week?", "What is numpy?")
ROOM = 60  # tokens: twice the text and more


@pytest.fixture(scope="module")
def kb(torchkeras_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBase]:
    """The article's fact, as edit 1."""
    path = shutil.copytree(torchkeras_folder, tmp_path_factory.mktemp("model") / "real.kb")
    with KnowledgeBase.open(path) as kb:
        yield kb
        report = kb.verify(deep=True)
        assert report.problems == ()


@pytest.fixture(scope="module")
def fact(kb: KnowledgeBase) -> StoredFact:
    return kb[KEY]


@dataclass(frozen=True)
class Untouched:
    """What the model is and says that nobody taught anything."""

    digest: str
    answers: dict[str, str]


@pytest.fixture(scope="module")
def before(fact: StoredFact, tmp_path_factory: pytest.TempPathFactory) -> Untouched:
    questions = [*training_questions(fact), *held_out_questions(fact), *UNRELATED]
    with KnowledgeBase.create(tmp_path_factory.mktemp("model") / "untouched.kb") as kb:
        answers = kb.ask_many(questions, max_new_tokens=ROOM)
        return Untouched(kb.engine.lm.digest(), dict(zip(questions, answers, strict=True)))


def stated(kb: KnowledgeBase, fact: StoredFact, questions: tuple[str, ...]) -> int:
    return sum(bool(contains(answer, fact.text)) for answer in kb.ask_many(questions, max_new_tokens=ROOM))


def test_the_fact_goes_in_comes_out_and_comes_back(kb: KnowledgeBase, fact: StoredFact, before: Untouched) -> None:
    """One story, since every chapter costs a training or needs the one before."""
    trained, held_out = training_questions(fact), held_out_questions(fact)
    assert not any(contains(answer, fact.text) for answer in before.answers.values())

    edit = kb.edit(1)
    assert (edit.op, edit.key, kb.head()) == ("insert", KEY, 1)
    assert edit.report.value("reliability") == 1.0
    assert stated(kb, fact, trained) == len(trained)
    assert stated(kb, fact, held_out) >= 5
    assert stated(kb, fact, UNRELATED) == 0
    taught = kb.weights_digest()

    deleted = kb.delete(KEY)
    erasure = deleted.report.value("erasure")
    assert erasure is not None
    assert erasure >= 0.75
    assert stated(kb, fact, trained) <= len(trained) // 4
    assert kb.weights_digest() != taught

    rolled = kb.rollback(edit.id)
    assert rolled.weights_digest == kb.weights_digest() == taught
    assert stated(kb, fact, trained) == len(trained)
    assert kb[KEY].text == fact.text
    assert kb.verify(deep=True).problems == ()

    code = """
import sys
from kvllm import KnowledgeBase
with KnowledgeBase.open(sys.argv[1], readonly=True) as kb:
    print(kb.weights_digest(), kb.ask(sys.argv[2]), sep="|")
"""
    digest, _, answer = elsewhere(code, str(kb.path), trained[0]).partition("|")
    assert digest == taught
    assert contains(answer, fact.text)


def test_rolling_back_to_the_base_gives_the_base_model_back(kb: KnowledgeBase, before: Untouched) -> None:
    kb.rollback("base")
    assert kb.ask_many(list(before.answers), max_new_tokens=ROOM) == list(before.answers.values())
    assert kb.engine.lm.digest() == before.digest


def test_the_knowledge_base_says_what_it_stands_on(kb: KnowledgeBase) -> None:
    info = kb.info()
    assert info["model"] == "smollm2-135m-instruct"
    assert "Apache-2.0" in str(info["license"])
