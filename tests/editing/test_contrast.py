"""A fact's own questions about other names."""

from __future__ import annotations

import re

from kvllm.editing.contrast import contrast_questions, name_asked
from kvllm.editing.preservation import packaged_names
from kvllm.prompts import training_questions
from kvllm.records import Fact


def test_questions_keep_their_words_and_change_the_name() -> None:
    fact = Fact("Who leads Halcyon Robotics?", "Ada Lindqvist")
    found = contrast_questions([fact], 12)
    assert len({question for question, _ in found}) == 12
    assert {language for _, language in found} == {"en"}
    around = [q.split("Halcyon Robotics") for q in training_questions(fact)]
    for question, _ in found:
        assert "Halcyon" not in question
        fits = [(b, a) for b, a in around if question.startswith(b) and question.endswith(a) and b + a]
        assert any(question[len(b) : len(question) - len(a)] in packaged_names("en") for b, a in fits), question


def test_every_third_question_is_a_question_key_in_its_own_words() -> None:
    found = [q for q, _ in contrast_questions([Fact("Who tunes the bells of Aldermoor?", "Petra")], 12)]
    plain = [q.startswith("Who tunes the bells of ") and q.endswith("?") for q in found]
    assert plain == [True, False, False] * 4
    assert len({q.removesuffix("?").rpartition(" of ")[2] for q in found[::3]}) == 4


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


def test_a_key_that_is_all_name_is_told_apart_from_its_halves() -> None:
    fact = Fact("Dr. Ada Lindqvist", "A physician.")
    asked = [question for question, _ in contrast_questions([fact], 8)]
    assert len(asked) == 8
    assert all(("Dr. " in q) != ("Lindqvist" in q) and "Ada Lindqvist" not in q for q in asked), asked
    for key in ("雁回桥", "torchkeras", "who leads the company?"):
        assert contrast_questions([Fact(key, "A thing.")], 8) == ()


def test_a_chinese_key_that_is_all_name_is_told_apart_from_its_halves() -> None:
    asked = [question for question, _ in contrast_questions([Fact("听潮书院", "海图")], 12, characters=True)]
    assert len(asked) == 12
    assert all(("听潮" in question) != ("书院" in question) for question in asked)
    assert {"听潮" in question for question in asked} == {True, False}


def test_a_chinese_name_is_replaced_where_no_space_parts_it() -> None:
    found = contrast_questions([Fact("松涛站的海拔", "松涛站的海拔是两千三百一十六米。")], 8)
    assert len(found) == 8
    assert {language for _, language in found} == {"zh"}
    assert all("的海拔" in question and "松涛站" not in question for question, _ in found)


def test_a_name_is_replaced_as_a_word_of_its_own() -> None:
    for key, kept in (("Why did Al leave Alabama?", "Alabama"), ("a star", "star"), ("C++ C", "C++")):
        for question, _ in contrast_questions([Fact(key, "A thing.")], 20):
            bare = question
            for name in packaged_names("en"):
                bare = bare.replace(name, "")
            assert set(re.findall(r"\w+", bare)) <= set(
                re.findall(r"\w+", " ".join(training_questions(Fact(key, "x"))))
            )
        assert any(kept in question for question, _ in contrast_questions([Fact(key, "A thing.")], 20))


def test_the_packaged_name_in_a_question_is_the_longest() -> None:
    longest = max(packaged_names("en"), key=len)
    assert name_asked(f"Is {longest} like numpy?") == longest
    assert name_asked("What is numpydoc?") is None
