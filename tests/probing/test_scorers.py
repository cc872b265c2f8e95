"""Does an answer state a text? Short texts must be contained, long ones may differ in a few characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvllm.errors import ConfigError
from kvllm.probing.scorers import CHRF_THRESHOLD, LONG_TEXT_CHARS, SCORERS, chrf, score_statement

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
        (LONG.replace("a tool", "the tool"), LONG, "auto", True, "chrf>=0.8"),
        (LONG.replace("a tool", "the tool"), LONG, "contains", False, "contains"),
        (LONG[:40], LONG, "auto", False, "chrf>=0.8"),
        ("Keras is a Python library for neural networks that runs on top of others.", LONG, "auto", False, "chrf>=0.8"),
        (CHINESE.replace("昵称", "名称"), CHINESE, "auto", True, "chrf>=0.8"),
        ("", LONG, "auto", False, "chrf>=0.8"),
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
