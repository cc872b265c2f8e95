"""Which rows a step trains, and when all of them count as recalled. No model: leads are made up."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from kvllm.editing.adalora import _MAX_ROWS, Item, _RowStages
from kvllm.lm.model import Row

MARGIN = 0.5
GOOD, NEARLY, BAD = (torch.tensor([9.0, lead]) for lead in (9.0, 0.1, -1.0))


def stages(n: int, tokens: int = 6) -> _RowStages:
    rows = [Row(tuple(range(tokens)), (i, i)) for i in range(n)]
    items: list[Item] = [(torch.empty(0), row) for row in rows]
    return _RowStages(items, [], random.Random(0))


def step(of: _RowStages, recalled: Callable[[int], bool] = lambda row: True, weak: torch.Tensor = BAD) -> list[int]:
    """Hand out the rows of one step, say which of them are recalled (the others are `weak`), and return them all."""
    rows, restored = of.next(check=True)
    handed = [row.answer[0] for _, row in rows]
    assert restored == []
    of.saw([GOOD if recalled(row) else weak for row in handed], [], MARGIN)
    return handed


def test_few_rows_are_done_when_one_step_finds_all_of_them_recalled() -> None:
    found = stages(8)
    seen: set[int] = set()
    while len(seen) < 8:
        seen |= set(step(found))
        assert not found.done
    assert step(found) == list(range(8))
    assert found.done


def test_few_rows_are_all_looked_at_again_after_one_failed() -> None:
    found = stages(8)
    while found.recall < 1.0:
        step(found)
    assert step(found, lambda row: row != 3) == list(range(8))
    assert not found.done
    assert 3 in step(found)
    assert not found.done, "the others have not been looked at since"
    assert step(found) == list(range(8))
    assert found.done


@pytest.mark.parametrize(("n", "tokens"), [(11, 200), (8, 400)])
def test_long_rows_are_looked_at_in_steps_that_follow_each_other(n: int, tokens: int) -> None:
    found = stages(n, tokens)
    while found.recall < 1.0:
        step(found)
    looked: set[int] = set()
    while not found.done:
        fresh = set(step(found))
        assert not fresh & looked
        looked |= fresh
    assert looked == set(range(n))


def test_of_many_rows_a_step_draws_at_even_distances() -> None:
    # Rows of one fact stand together: one row of every six, whichever, so that each fact has its share.
    found = stages(6 * _MAX_ROWS)
    steps = [sorted(step(found, lambda row: False)) for _ in range(5)]
    assert all([row // 6 for row in handed] == list(range(_MAX_ROWS)) for handed in steps)
    assert len({row % 6 for row in steps[0]}) > 1, "a fixed stride would always meet the same template"


def test_of_many_rows_a_late_failure_costs_its_own_repair_alone() -> None:
    n = 20 * _MAX_ROWS
    found, steps = stages(n), 0
    failed: list[int] = []

    def fails_late(row: int) -> bool:
        # Row 300 is recalled when it is first seen, and once fails when all others are.
        late = row == 300 and found.recall == 1.0 and not failed
        failed.extend([row] * late)
        return not late

    while not found.done:
        step(found, fails_late)
        steps += 1
        assert steps < 100
    assert failed == [300] or not failed
    assert steps <= 42, "one pass, one repair, and what two sweeps had seen before"


def test_a_few_of_many_rows_may_lack_the_margin_and_none_may_be_wrong() -> None:
    n = 4 * _MAX_ROWS
    for weak, may in ((NEARLY, True), (BAD, False)):
        found = stages(n)
        for _ in range(6):
            step(found, lambda row: row > 2, weak)
        assert found.done is may
    handed = [step(found, lambda row: row > 3, NEARLY) for _ in range(12)]
    assert not found.done
    assert all({0, 1, 2, 3} <= set(rows) for rows in handed[3:]), "what lacks it stays in training"
    assert {row for rows in handed[-6:] for row in rows} == set(range(n)), "the others are looked at meanwhile"


@pytest.mark.parametrize(("n", "tokens"), [(8, 345), (8, 380), (8, 600), (14, 300), (2, 700), (16, 64), (5, 1100)])
def test_rows_of_any_length_are_found_recalled(n: int, tokens: int) -> None:
    found = stages(n, tokens)
    for _ in range(4 * n):
        step(found)
        if found.done:
            return
    raise AssertionError("every row was recalled at every step, and the training would go on")


def test_rows_are_trained_up_to_what_does_not_lead_yet_and_looked_at_whole() -> None:
    row = Row((1, 2, 3), tuple(range(20)))
    found = _RowStages([(torch.zeros(23, 4), row) for _ in range(8)], [], random.Random(0))
    early = torch.cat([torch.full((4,), -1.0), torch.full((16,), 9.0)])
    for _ in range(12):  # every row is seen
        rows, _ = found.next(check=True)
        found.saw([early[: len(r.answer)] for _, r in rows], [], MARGIN)
    rows, _ = found.next(check=True)
    assert sorted(len(r.answer) for _, r in rows) == [6, 6, 20, 20]
    assert all(len(lower) == len(r.ids) for lower, r in rows)
    found.saw([torch.full((len(r.answer),), 9.0) for _, r in rows], [], MARGIN)
    while found.recall < 1.0:
        rows, _ = found.next(check=True)
        found.saw([torch.full((len(r.answer),), 9.0) for _, r in rows], [], MARGIN)
    rows, _ = found.next(check=True)
    assert [len(r.answer) for _, r in rows] == [20] * 8


def test_further_rows_end_where_those_with_the_same_answer_do_and_turn_where_they_turn() -> None:
    answers = [tuple(range(20)), tuple(range(20, 40))]
    fact: list[Item] = [(torch.zeros(23, 4), Row((1, 2, 3), answers[i % 2])) for i in range(4)]
    other: list[Item] = [(torch.zeros(24, 4), Row((1, 2, 3, 4), answer)) for answer in answers]
    found = _RowStages(fact, [], random.Random(0), other)
    items, marks = found.further(2)
    assert sorted(row.answer for _, row in items) == answers, "nothing is known yet: they are trained whole"
    assert marks == [[], []]
    leads = {answers[0]: torch.tensor([-1.0] * 4 + [9.0] * 16), answers[1]: torch.tensor([9.0] * 10 + [-1.0] * 10)}
    for _ in range(6):  # every row is seen
        rows, _ = found.next(check=True)
        whole = [next(answer for answer in answers if row.answer[0] == answer[0]) for _, row in rows]
        found.saw([leads[answer][: len(row.answer)] for answer, (_, row) in zip(whole, rows, strict=True)], [], MARGIN)
    items, marks = found.further(2)
    assert sorted((row.answer, turns) for (_, row), turns in zip(items, marks, strict=True)) == [
        (answers[0][:6], [0, 1, 2]),
        (answers[1], [0, 10, 11, 12]),
    ]
    assert all(len(lower) == len(row.ids) for lower, row in items)
    assert [len(found.further(n)[0]) for n in (0, 1, 5)] == [0, 1, 2]
