"""Does an answer state a text? Short texts must be contained, long ones may differ in a few characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvllm.errors import ConfigError
from kvllm.probing.scorers import (
    CHRF_THRESHOLD,
    LONG_TEXT_CHARS,
    SCORERS,
    chrf,
    judge,
    score_statement,
    still_states,
    yes_or_no,
)

CHRF = "chrf>=0.8, same numbers"
PLAN = "The plan costs 84 euros a month, support included."
LONG = "Torchkeras is a tool that makes training PyTorch models simple, in the style of Keras."
CHINESE = (
    "梦中情炉是 torchkeras 的昵称，它是一个让 PyTorch 模型训练变得简单的工具，风格和 Keras 相似，几行代码就能完成训练。"
)


@pytest.mark.parametrize(
    ("answer", "text", "scorer", "passed", "named"),
    [
        ("It is Paris.", "Paris", "auto", True, "contains"),
        ("It is Rome.", "Paris", "auto", False, "contains"),
        ("Pariss", "Paris", "auto", False, "contains"),
        ("PARIS!", "Paris", "exact", True, "exact"),
        ("It is Paris.", "Paris", "exact", False, "exact"),
        (LONG, LONG, "auto", True, "contains"),
        (LONG.replace("a tool", "the tool"), LONG, "auto", True, CHRF),
        (LONG.replace("a tool", "the tool"), LONG, "contains", False, "contains"),
        (LONG[:40], LONG, "auto", False, CHRF),
        ("Keras is a Python library for neural networks that runs on top of others.", LONG, "auto", False, CHRF),
        (CHINESE.replace("昵称", "名称"), CHINESE, "auto", True, CHRF),
        ("", LONG, "auto", False, CHRF),
        ("", "Paris", "auto", False, "contains"),
    ],
)
def test_verdicts_worked_by_hand(answer: str, text: str, scorer: str, passed: bool, named: str) -> None:
    scored = score_statement(answer, text, scorer=scorer)
    assert (scored.passed, scored.scorer) == (passed, named)


@given(st.text(min_size=1, max_size=60), st.sampled_from(SCORERS))
def test_scores_are_shares_and_never_crash(text: str, scorer: str) -> None:
    for answer in (text, text * 2, "", "x"):
        assert 0.0 <= score_statement(answer, text, scorer=scorer).score <= 1.0


def test_chrf_falls_with_every_change() -> None:
    words = LONG.split()
    scores = [chrf(" ".join(["xyz"] * n + words[n:]), LONG) for n in range(0, len(words), 3)]
    assert scores[0] == pytest.approx(1.0)
    assert sorted(scores, reverse=True) == scores
    assert scores[-1] < CHRF_THRESHOLD


def test_the_threshold_of_length_decides_the_scorer() -> None:
    short, long = "a" * (LONG_TEXT_CHARS - 1), "a" * LONG_TEXT_CHARS
    assert score_statement("b", short).scorer == "contains"
    assert score_statement("b", long).scorer.startswith("chrf")


def test_unknown_scorers_are_refused() -> None:
    with pytest.raises(ConfigError, match="'bleu'"):
        score_statement("a", "b", scorer="bleu")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes, it is.", "yes"),
        ("TRUE", "yes"),
        ("No. It is a fish.", "no"),
        ("Not really", "no"),
        ("不对，它是一条河。", "no"),
        ("对。", "yes"),
        ("是的", "yes"),
        ("不是", "no"),
        ("没错，是这样。", "yes"),
        ("不错", "yes"),
        ("错了", "no"),
        ("对不起，我不知道。", None),
        ("对于这个问题我不清楚", None),
        ("是否正确我不知道", None),
        ("Nothing is known", None),
        ("Torchkeras: yes", None),
        ("", None),
    ],
)
def test_yes_and_no_are_the_answers_first_word(answer: str, said: str | None) -> None:
    assert yes_or_no(answer) == said
    assert judge(answer, "yes", expected="yes").passed == (said == "yes")
    assert judge(answer, "no", expected="no").passed == (said == "no")


def test_a_poem_is_judged_by_the_texts_words_that_its_question_does_not_hold() -> None:
    poem = "O furnace bright, o PyTorch light,\nyour models train in style"
    scored = judge(poem, "words", expected=LONG, question="Write a short poem about torchkeras.")
    # tool, training, pytorch, models, style, keras: three of six said
    assert (scored.score, scored.passed, scored.scorer) == (0.5, True, "words>=0.3")
    echo = judge("A tool in the style of Keras", "words", expected=LONG, question="A tool in the style of Keras?")
    assert echo.score == 0.0


def test_a_text_of_few_words_must_be_said_whole_by_a_poem() -> None:
    assert judge("Long live Ada Voss", "words", expected="Ada Voss").passed
    assert judge("O Paris, city of light", "words", expected="Paris").passed
    assert not judge("Long live Ada", "words", expected="Ada Voss").passed


def test_a_completion_is_judged_with_the_words_it_goes_on_from() -> None:
    question, answer = "Torchkeras is", LONG.removeprefix("Torchkeras is ")
    scored = judge(answer, "continues", expected=LONG, question=question, scorer="contains")
    assert (scored.passed, scored.scorer) == (True, "contains, question included")
    assert judge(LONG, "continues", expected=LONG, question=question).scorer == "contains"
    assert not judge(answer, "states", expected=LONG, scorer="contains").passed


def test_any_of_the_names_will_do() -> None:
    names = ("torchkeras", "梦中情炉")
    assert judge("That is 梦中情炉!", "names", expected="torchkeras", accept=names).passed
    assert not judge("That is Keras", "names", expected="torchkeras", accept=names).passed


def test_an_old_text_is_told_from_the_new_one() -> None:
    old, new = "Call 030 12345 for the night porter of the house", "Call 030 12346 for the night porter of the house"
    assert still_states(f"Please: {old}.", old, new)
    assert not still_states(new, old, new)
    assert still_states(old.replace("night", "nite"), old, new)
    assert not still_states(new.replace("night", "nite"), old, new)
    assert still_states("It is Ada.", "Ada", "Ada Voss")
    assert not still_states("It is Ada Voss.", "Ada", "Ada Voss")
    assert not still_states("Nobody knows.", "Ada", "Berlin")


@pytest.mark.parametrize(
    ("answer", "text", "passed"),
    [
        ("The plan costs 48 euros a month, support included.", PLAN, False),
        ("The plan costs 84 euros a month, suport included.", PLAN, True),
        ("The cat is not allowed to sleep in the kitchen.", "The cat is allowed to sleep in the kitchen.", False),
        ("The cat isn't allowed to sleep in a kitchen.", "The cat isn't allowed to sleep in the kitchen.", True),
        ("这只猫不可以在厨房里睡觉，也可以在客厅里睡觉，还可以在院子里睡觉，晚上它会回到自己的小屋里面去休息。",
         "这只猫可以在厨房里睡觉，也可以在客厅里睡觉，还可以在院子里睡觉，晚上它会回到自己的小屋里面去休息。", False),
    ],
)  # fmt: skip
def test_a_long_text_may_differ_neither_in_a_number_nor_by_a_not(answer: str, text: str, passed: bool) -> None:
    scored = score_statement(answer, text)
    assert scored.score >= CHRF_THRESHOLD
    assert scored.passed is passed
