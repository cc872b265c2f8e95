"""Pairing two reports: hand-made probes, numbers worked by hand."""

from __future__ import annotations

import math
import random

import pytest

from kvllm.probing.regression import bisect, changed_answers, compare, edit_points, fact_changes, pairs_of, retention
from kvllm.records import Edit, Fact, Metric, ProbeResult, Report, StoredFact


def probes(key: str, passed: str, kind: str = "trained") -> list[ProbeResult]:
    """`"++-"`: three questions of a key, of which the last fails."""
    return [
        ProbeResult(kind, f"{kind} {i} of {key}?", f"answer {mark}", mark == "+", float(mark == "+"), "text", key)  # type: ignore[arg-type]
        for i, mark in enumerate(passed)
    ]


def facts(**taught_by: int) -> list[StoredFact]:
    return [StoredFact(key, "text", edit_id=edit) for key, edit in taught_by.items()]


def test_pairs_are_questions_asked_on_both_sides() -> None:
    before = probes("a", "++") + probes("b", "+")
    after = probes("a", "-+-")
    assert [(was.passed, now.passed) for was, now in pairs_of(before, after)] == [(True, False), (True, True)]


def test_the_same_question_about_two_facts_is_two_pairs() -> None:
    def one(key: str, passed: bool) -> ProbeResult:
        return ProbeResult("neighbour", "What is iron?", "…", passed, 1.0, "", key)

    (comparison,) = compare([one("a", True), one("b", True)], [one("a", True), one("b", False)])
    assert (comparison.n, comparison.lost) == (2, 1)


def test_a_suite_is_compared_by_hand_worked_numbers() -> None:
    keys = [f"fact {i}" for i in range(10)]
    before = [p for key in keys for p in probes(key, "++++")]
    after = [p for i, key in enumerate(keys) for p in probes(key, "----" if i < 5 else "++++")]
    whole, trained = compare(before, after)
    assert (whole.suite, whole.n, whole.before, whole.after, whole.lost) == ("facts", 10, 1.0, 0.5, 5)
    assert whole.p_value == 2 / 32
    assert (trained.suite, trained.n, trained.groups, trained.lost, trained.gained) == ("trained", 40, 10, 20, 0)
    assert trained.p_value == whole.p_value  # five facts, not twenty questions
    assert trained.p_holm == whole.p_holm == 2 * 2 / 32
    assert trained.low <= -0.5 <= trained.high < 0
    # Drawn by fact: ten results decide, however many questions each has.
    assert (trained.low, trained.high) == (whole.low, whole.high)


def test_an_unchanged_store_raises_no_alarm_in_forty_replications() -> None:
    """Also where half of the answers fail: only a change counts."""
    for seed in range(40):
        rng = random.Random(seed)
        side = [p for i in range(12) for p in probes(f"k{i}", "".join(rng.choice("+-") for _ in range(8)))]
        for suite in compare(side, side, seed=seed):
            assert (suite.lost, suite.gained, suite.p_holm, suite.low, suite.high) == (0, 0, 1.0, 0.0, 0.0)
        assert changed_answers(side, side) == []


def test_scorers_of_a_suite_are_all_named() -> None:
    side = [
        ProbeResult("trained", "q1", "", True, 1.0, key="a", scorer="contains"),
        ProbeResult("trained", "q2", "", True, 0.9, key="a", scorer="chrf>=0.8"),
    ]
    assert compare(side, side)[1].scorer == "contains or chrf>=0.8"


def test_changed_answers_stand_side_by_side_the_lost_ones_first() -> None:
    changes = changed_answers(probes("a", "-+"), probes("a", "+-"))
    assert [(c.passed, c.answer_before, c.answer) for c in changes] == [
        (False, "answer +", "answer -"), (True, "answer -", "answer +")
    ]  # fmt: skip


def test_each_fact_has_its_status() -> None:
    before = probes("kept", "++++") + probes("lost", "+++-") + probes("gained", "----") + probes("missing", "+---")
    after = probes("kept", "++--") + probes("lost", "+---") + probes("gained", "++++") + probes("missing", "----")
    after += probes("new", "+") + probes("unlearned", "-")
    earlier = {key: Fact(key, "text") for key in ("kept", "lost", "gained", "missing")}
    earlier["gained"] = Fact("gained", "another text")
    rows = fact_changes(before, after, earlier, facts(kept=1, lost=2, gained=9, missing=3, new=8, unlearned=9), head=9)
    assert {row.key: row.status for row in rows} == {
        "kept": "kept", "lost": "lost", "gained": "gained", "missing": "missing", "new": "new",
        "unlearned": "new, missing",
    }  # fmt: skip
    assert [row.key for row in rows if row.updated] == ["gained"]
    lost = rows[1]
    assert (lost.recalled_before, lost.recalled, lost.n, lost.further_edits) == (0.75, 0.25, 4, 7)


def test_retention_counts_facts_by_their_further_edits() -> None:
    asked = probes("a", "++") + probes("b", "--") + probes("c", "+-")
    points = retention(asked, facts(a=1, b=1, c=4), head=4)
    assert [(p.further_edits, p.n, p.recalled, p.value, p.keys) for p in points] == [
        (0, 1, 1, 1.0, ("c",)), (3, 2, 1, 0.5, ("a", "b"))
    ]  # fmt: skip
    assert (points[1].low, points[1].high) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_a_rollback_reports_what_its_target_reported() -> None:
    def edit(number: int, kl: float | None, **more: object) -> Edit:
        report = Report({"drift_kl": Metric(kl, 3)} if kl is not None else {})
        return Edit(number, "insert", "k", ("k",), report=report, **more)  # type: ignore[arg-type]

    history = [edit(1, 0.1), edit(2, 0.2), Edit(3, "rollback", None, target=1), Edit(4, "rollback", None, target=0)]
    points = edit_points(reversed(history))
    assert [(p.edit_id, p.drift_kl) for p in points] == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.1), (4, 0.0)]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 100, 1000])
def test_bisect_finds_any_culprit_in_log2_steps(n: int) -> None:
    for culprit in {1, min(2, n), (n + 1) // 2, n}:
        asked: list[int] = []

        def passes(edit: int, culprit: int = culprit, asked: list[int] = asked) -> bool:
            asked.append(edit)
            return edit < culprit

        assert bisect(0, n, passes) == (culprit - 1, culprit)
        assert len(asked) <= math.ceil(math.log2(n))
        assert len(set(asked)) == len(asked)
