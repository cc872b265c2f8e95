"""The semantic-key ladder: every rung is there, judged as it should be, and nothing on it was trained."""

from __future__ import annotations

from collections import Counter

import pytest

from kvllm.metrics import contains
from kvllm.probing.ladder import ladder, statement, typo
from kvllm.prompts import training_questions
from kvllm.records import Fact, StoredFact

TEXT = "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras."
FACTS = {
    "name": Fact("torchkeras", TEXT, aliases=("梦中情炉",), probes=("Why the furnace?",)),
    "Chinese name": Fact("梦中情炉", "梦中情炉是 torchkeras 的昵称，它让 PyTorch 模型的训练变得简单。"),
    "question": Fact("Who leads Halcyon?", "Ada Voss"),
    "Chinese question": Fact("谁领导海棠公司？", "李明"),
}
RUNGS = {"trained", "paraphrase", "completion", "variant", "language", "inverse", "far", "recalled"}


@pytest.mark.parametrize("name", FACTS)
def test_every_fact_has_every_rung(name: str) -> None:
    fact = FACTS[name]
    rungs = Counter(probe.kind for probe in ladder(fact, neighbours=4))
    assert set(rungs) == RUNGS | {"neighbour"} | ({"alias", "user"} if fact.aliases else set())
    assert rungs["far"] == rungs["recalled"] == 7


@pytest.mark.parametrize("name", FACTS)
def test_no_question_stands_on_two_rungs_and_only_the_first_was_trained(name: str) -> None:
    fact = FACTS[name]
    probes = [probe for probe in ladder(fact, near=("What is Keras?",)) if probe.kind != "recalled"]
    assert len({probe.question for probe in probes}) == len(probes)
    trained = set(training_questions(fact))
    assert {p.question for p in probes if p.kind == "trained"} == trained
    assert not any("{" in probe.question for probe in probes)


@pytest.mark.parametrize("name", FACTS)
def test_the_same_fact_has_the_same_ladder(name: str) -> None:
    assert ladder(FACTS[name], neighbours=3) == ladder(FACTS[name], neighbours=3)


def test_a_stored_facts_first_turn_is_what_it_was_really_trained_on() -> None:
    probes = ladder(StoredFact("torchkeras", TEXT, trained_questions=("Why torchkeras?", "What is torchkeras?")))
    assert {p.first for p in probes if p.kind == "recalled"} == {"Why torchkeras?"}
    assert {p.first for p in probes if p.kind != "recalled"} == {""}


def test_the_inverse_question_does_not_name_what_it_asks_for() -> None:
    for fact in FACTS.values():
        for probe in ladder(fact):
            if probe.judge == "names":
                assert not any(contains(probe.question, name) for name in probe.accept)
                assert fact.key in (*probe.accept, *fact.aliases)


def test_a_text_that_repeats_its_whole_question_has_no_inverse() -> None:
    assert not [p for p in ladder(Fact("Who leads Halcyon?", "Ada Voss leads Halcyon.")) if p.kind == "inverse"]


def test_half_of_the_yes_no_questions_are_answered_with_yes() -> None:
    for fact in FACTS.values():
        answers = Counter(p.judge for p in ladder(fact) if p.kind == "far" and p.judge in ("yes", "no"))
        assert answers == {"yes": 2, "no": 2}


def test_what_is_false_of_a_fact_is_not_what_its_text_says() -> None:
    fish = Fact("fugu", "Fugu is a kind of freshwater fish of Japan.")
    false = [p.question for p in ladder(fish) if p.kind == "far" and p.judge == "no" and "true" in p.question]
    assert false == ["Is this true? Fugu is a river in the mountains of Peru. Answer yes or no."]


def test_completions_go_without_chat_template() -> None:
    plain = [p for p in ladder(FACTS["name"]) if p.plain]
    assert {p.kind for p in plain} == {"completion"}
    assert "Torchkeras is" in {p.question for p in plain}


def test_a_typo_swaps_two_inner_letters_of_the_longest_word() -> None:
    assert typo("torchkeras") == "torchekras"
    assert typo("Who leads Halcyon?") == "Who leads Halycon?"
    assert typo("abc 梦中情炉") == "abc 梦中情炉"
    assert typo("aaaaaa") == "aaaaaa"


def test_a_statement_is_whole_sentences() -> None:
    long = " ".join(f"Sentence number {n} is here." for n in range(40))
    cut = statement(long)
    assert len(cut) <= 300
    assert cut.endswith("is here.")
    assert statement("x" * 400) == "x" * 400
    assert statement("一句。两句。") == "一句。两句。"


def test_a_short_key_is_masked_as_a_word_of_its_own() -> None:
    fact = Fact("Go", "Go is a good language made at Google.")
    asked = [probe.question for probe in ladder(fact) if probe.kind == "inverse"]
    assert asked
    assert all("a good language made at Google" in question for question in asked)
    assert not any("Go is" in question for question in asked)


def test_any_key_that_is_accepted_has_a_ladder() -> None:
    for key in ("?", "!", "a?", "？"):
        assert ladder(Fact(key, "x"))


def test_sentences_of_any_script_keep_their_spaces() -> None:
    assert statement("First one. Zoë leads it. Last.") == "First one. Zoë leads it. Last."
    assert statement("一。二。") == "一。二。"
