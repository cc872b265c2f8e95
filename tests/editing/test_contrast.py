"""A fact's own questions about other names."""

from __future__ import annotations

import pytest

from kvllm.editing.contrast import contrast_questions, names_in
from kvllm.editing.preservation import packaged_names
from kvllm.prompts import training_questions
from kvllm.records import Fact


@pytest.mark.parametrize(
    ("question", "key", "names"),
    [
        ("Who leads Halcyon Robotics?", "Who leads Halcyon Robotics?", ["Halcyon Robotics"]),
        ("What was Craig Pedersen's trade?", "What was Craig Pedersen's trade?", ["Craig Pedersen"]),
        ("The mother tongue of Ada de la Cruz is", "The mother tongue of Ada de la Cruz is", ["Ada de la Cruz"]),
        ("A Chairy Tale, where is it from", "A Chairy Tale, where is it from", ["A Chairy Tale"]),
        ("Is it true that Oslo is north of Rome?", "Is it true that Oslo is north of Rome?", ["Oslo", "Rome"]),
        ("What does port 8080 do?", "What does port 8080 do?", ["8080"]),
        ('Who wrote "the green door"?', 'Who wrote "the green door"?', ["the green door"]),
        ("What is the Halden rule?", "Halden rule", ["Halden"]),
        ("什么是松涛站的海拔？", "松涛站的海拔", ["松涛站"]),
        ("《青灯记》是谁写的？", "《青灯记》是谁写的？", ["青灯记"]),
        # All name, or no name at all: the packaged neighbours are what there is.
        ("What is torchkeras?", "torchkeras", []),
        ("Tell me about Mirela Vantongeren.", "Mirela Vantongeren", []),
        ("什么是梦中情炉？", "梦中情炉", []),
        ("who leads the company?", "who leads the company?", []),
        ("What is it?", "What is it?", []),
    ],
)
def test_what_a_question_names(question: str, key: str, names: list[str]) -> None:
    assert names_in(question, key) == names


def test_questions_keep_their_words_and_change_the_name() -> None:
    fact = Fact("Who leads Halcyon Robotics?", "Ada Lindqvist")
    found = contrast_questions([fact], 12)
    assert len({question for question, _ in found}) == 12
    assert {language for _, language in found} == {"en"}
    endings = {q.rpartition("Halcyon Robotics")[0].casefold() for q in training_questions(fact)}
    for question, _ in found:
        assert "Halcyon" not in question
        assert any(question.casefold().startswith(ending) for ending in endings)
        assert any(name in question for name in packaged_names("en"))


def test_live_names_and_questions_are_no_contrast() -> None:
    fact = Fact("Who leads Halcyon Robotics?", "Ada Lindqvist")
    every = contrast_questions([fact], 1000)
    taken = every[0][0]
    name = next(name for name in packaged_names("en") if name in taken)
    assert taken not in dict(contrast_questions([fact], 1000, excluded=frozenset({taken.casefold()})))
    without = contrast_questions([fact], 1000, excluded=frozenset({name.casefold()}))
    assert len(without) < len(every)
    assert taken not in dict(without)


def test_the_seed_chooses_and_facts_share_evenly() -> None:
    facts = [
        Fact("Who leads Halcyon Robotics?", "Ada"),
        Fact("Halden rule", "No noise."),
        Fact("torchkeras", "A tool."),
    ]
    found = contrast_questions(facts, 8, seed=1)
    assert found == contrast_questions(facts, 8, seed=1)
    assert found != contrast_questions(facts, 8, seed=2)
    assert sum(" rule" in question for question, _ in found) == 4
    assert contrast_questions([facts[2]], 8) == ()
    assert contrast_questions([], 8) == ()
