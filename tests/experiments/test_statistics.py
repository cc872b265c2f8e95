"""The experiments' statistics on numbers whose answer is known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable

import pytest

from kvllm.experiments.statistics import Loss, correlation, fit_retention, kind_test, paired_p, rank_test, ratio_test

STATES = (5, 10, 20, 40, 80, 160, 320)


def answers(share: Callable[[int], float], facts: int = 1000) -> dict[Hashable, list[tuple[int, int, int]]]:
    """Return a share of right answers in each state, drawn anew in each: every fact is asked in all."""
    rng = random.Random(0)
    return {i: [(n, int(rng.random() < share(n)), 1) for n in STATES] for i in range(facts)}


def test_fit_finds_where_half_are_recalled() -> None:
    fit = fit_retention(answers(lambda n: 1 / (1 + (n / 80) ** 3)))
    assert fit is not None
    assert fit.half == pytest.approx(80, rel=0.05)
    assert fit.steepness == pytest.approx(3, rel=0.1)
    assert fit.low is not None
    assert fit.high is not None
    assert fit.low < 80 < fit.high


def test_facts_that_stand_and_fall_in_all_states_alike_give_a_wider_interval() -> None:
    """The same shares from facts that differ: a fact is lost at its own number and stays lost."""
    rng = random.Random(0)
    own = [40 * math.exp(rng.gauss(0, 1)) for _ in range(60)]
    nested = {i: [(n, int(n < at), 1) for n in STATES] for i, at in enumerate(own)}
    shares = {n: sum(n < at for at in own) / len(own) for n in STATES}
    wide, narrow = fit_retention(nested), fit_retention(answers(shares.__getitem__, 60))
    widths = [math.log(fit.high / fit.low) for fit in (wide, narrow) if fit and fit.high and fit.low]
    assert len(widths) == 2
    assert widths[0] > 1.2 * widths[1]


def test_a_curve_above_half_up_to_the_last_state_says_no_more_than_that() -> None:
    for share in (1.0, 0.9):
        fit = fit_retention(answers(lambda _, share=share: share, 50))  # type: ignore[misc]
        assert fit is not None
        assert (fit.half, fit.low, fit.high, fit.last) == (None, None, None, 320)
    bending = fit_retention(answers(lambda n: 1 / (1 + n / 600)))
    assert bending is not None
    assert bending.half is None, "600 is beyond what was seen"
    assert fit_retention({i: [(1, 1, 1), (2, 1, 1)] for i in range(9)}) is None


def test_a_curve_that_does_not_fall_is_not_fitted() -> None:
    assert fit_retention(answers(lambda _: 0.4, 100)) is None
    assert fit_retention(answers(lambda n: n / 400, 100)) is None
    # Of twenty facts two are lost: one in eight draws of twenty has neither, (18/20)²⁰ = 0.12, and does not fall.
    level = {i: [(n, int(i < (11 if n <= 20 else 9)), 1) for n in STATES] for i in range(20)}
    assert fit_retention(level) is None
    steeper = {i: [(n, int(i < (16 if n <= 20 else 4)), 1) for n in STATES] for i in range(20)}
    assert fit_retention(steeper) is not None
    assert fit_retention(answers(lambda _: 0.0, 100)) is None, "half was before what was seen"


def test_losing_always_the_nearest_is_no_chance() -> None:
    test = rank_test([Loss(1, 20, f"edit {i}") for i in range(6)])
    assert test is not None
    assert test.mean == pytest.approx(0.025)
    assert test.nearest == 6
    assert test.expected_nearest == pytest.approx(0.3)
    assert test.p_value < 0.001


def test_one_nearest_of_twenty_has_the_p_value_worked_by_hand() -> None:
    for rank in (1, 20):  # the nearest and the farthest are as rare
        test = rank_test([Loss(rank, 20)])
        assert test is not None
        assert test.p_value == pytest.approx(0.1, abs=0.02)


def test_losing_everything_at_once_says_nothing() -> None:
    test = rank_test([Loss(rank, 5, "one edit") for rank in range(1, 6)])
    assert test is not None
    assert test.mean == pytest.approx(0.5)
    assert test.p_value == pytest.approx(1.0)
    assert rank_test([Loss(1, 1)]) is None


def test_correlation_is_the_mean_of_spearmans_inside_groups() -> None:
    rising = correlation([([1, 2, 3, 4, 5, math.inf], [1, 4, 9, 16, 25, 36])])
    assert rising is not None
    assert rising.rho == 1.0
    assert rising.p_value < 0.01
    assert correlation([([1, 2], [1, 2])]) is None
    assert correlation([([1, 1, 1, 1], [1, 2, 3, 4])]) is None
    # By hand: 1 − 6·Σd²/(n(n² − 1)) is 1 and 1 − 6·2/24 = 0.5.
    two = correlation([([1, 2, 3], [5, 6, 7]), ([1, 2, 3], [6, 5, 7])])
    assert two is not None
    assert (two.rho, two.lowest, two.highest, two.n, two.groups) == (0.75, 0.5, 1.0, 6, 2)
    # 36 orders, of which 1 + 4 are as high and as many as low: 10 / 36.
    assert two.p_value == pytest.approx(10 / 36, abs=0.02)


def test_what_groups_differ_in_is_no_correlation() -> None:
    """Groups that lie along a line, and whose members fall across it: pooled, the correlation would be positive."""
    groups = [([10.0 * g + i for i in range(5)], [10.0 * g - i for i in range(5)]) for g in range(8)]
    found = correlation(groups)
    assert found is not None
    assert found.rho == -1.0
    assert found.p_value < 0.001


def test_ratios_are_tested_on_their_logarithms() -> None:
    found = ratio_test([2.0, 8.0, 4.0, 4.0, 4.0])
    assert found is not None
    assert found.mean == 4.0
    # By hand: logs of mean 2 and deviation √½ (to base 2) give t = 2·√5/√½ = 6.32 with 4 degrees of freedom.
    assert found.p_value == pytest.approx(0.0032, abs=1e-4)
    few = ratio_test([4.0] * 4)
    assert few is not None
    assert few.p_value is None
    even = ratio_test([1.0] * 5)
    assert even is not None
    assert even.p_value == 1.0
    assert ratio_test([]) is None


def test_signed_rank_needs_differences() -> None:
    assert paired_p([0.0] * 10) is None
    found = paired_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found is not None
    assert math.isclose(found, 2 / 2**6)


def test_losses_of_the_edits_kind_are_set_against_random_ones() -> None:
    found = kind_test([(2, 2, 10, 40)] * 6)
    assert found is not None
    assert (found.same, found.n, found.expected) == (12, 12, 3.0)
    assert found.p_value < 0.001
    level = kind_test([(1, 4, 10, 40)] * 6)
    assert level is not None
    assert level.p_value > 0.5
    assert kind_test([(1, 1, 5, 5), (0, 1, 0, 5)]) is None, "there was no choice"
