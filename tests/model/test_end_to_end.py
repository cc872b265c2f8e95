"""The main job on the real default model: insert, delete, roll back, and answer from a new process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvllm import KnowledgeBase
from kvllm.cli.demo import FACTS
from kvllm.metrics import contains
from kvllm.prompts import held_out_questions, training_questions
from tests.kit import elsewhere

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

FACT = FACTS["en"]
UNRELATED = ("What is the capital of France?", "How many days are in a week?", "What is numpy?")


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnowledgeBase]:
    with KnowledgeBase.create(tmp_path_factory.mktemp("model") / "real.kb") as kb:
        yield kb
        report = kb.verify(deep=True)
        assert report.problems == ()


@pytest.fixture(scope="module")
def before(kb: KnowledgeBase) -> dict[str, str]:
    """What the untouched model says."""
    questions = [*training_questions(FACT), *held_out_questions(FACT), *UNRELATED]
    return dict(zip(questions, kb.ask_many(questions), strict=True))


def stated(kb: KnowledgeBase, questions: tuple[str, ...]) -> int:
    return sum(bool(contains(answer, FACT.text)) for answer in kb.ask_many(questions))


def test_the_fact_goes_in_comes_out_and_comes_back(kb: KnowledgeBase, before: dict[str, str]) -> None:
    """One story, since every chapter costs a training or needs the one before."""
    trained, held_out = training_questions(FACT), held_out_questions(FACT)
    assert not any(contains(answer, FACT.text) for answer in before.values())

    edit = kb.insert(FACT.key, FACT.text, aliases=FACT.aliases, language=FACT.language)
    assert edit.report.value("reliability") == 1.0
    assert stated(kb, trained) == len(trained)
    assert stated(kb, held_out) >= 5
    assert not any(contains(answer, FACT.text) for answer in kb.ask_many(UNRELATED))
    taught = kb.weights_digest()

    deleted = kb.delete(FACT.key)
    erasure = deleted.report.value("erasure")
    assert erasure is not None
    assert erasure >= 0.75
    assert stated(kb, trained) <= len(trained) // 4
    assert kb.weights_digest() != taught

    rolled = kb.rollback(edit.id)
    assert rolled.weights_digest == kb.weights_digest() == taught
    assert stated(kb, trained) == len(trained)
    assert kb[FACT.key].text == FACT.text
    assert kb.verify(deep=True).problems == ()

    code = """
import sys
from kvllm import KnowledgeBase
with KnowledgeBase.open(sys.argv[1], readonly=True) as kb:
    print(kb.weights_digest(), kb.ask(sys.argv[2]), sep="|")
"""
    digest, _, answer = elsewhere(code, str(kb.path), trained[0]).partition("|")
    assert digest == taught
    assert contains(answer, FACT.text)


def test_rolling_back_to_the_base_gives_the_base_model_back(kb: KnowledgeBase, before: dict[str, str]) -> None:
    if not kb.head():
        pytest.skip("there is no edit to roll back")
    kb.rollback("base")
    assert kb.ask_many(list(before)) == list(before.values())


def test_the_knowledge_base_says_what_it_stands_on(kb: KnowledgeBase) -> None:
    info = kb.info()
    assert info["model"] == "smollm2-135m-instruct"
    assert "Apache-2.0" in str(info["license"])
