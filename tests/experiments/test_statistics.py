"""The experiments' statistics on numbers whose answer is known."""

from __future__ import annotations

import math

import pytest

from kvllm.experiments.statistics import Loss, correlation, fit_retention, paired_p, rank_test


def test_fit_finds_where_half_are_recalled() -> None:
    points = [(n, round(1000 / (1 + (n / 80) ** 3)), 1000) for n in (5, 10, 20, 40, 80, 160, 320)]
    fit = fit_retention(points)
    assert fit is not None
    assert fit.half == pytest.approx(80, rel=0.05)
    assert fit.steepness == pytest.approx(3, rel=0.1)
    assert fit.low is not None
    assert fit.high is not None
    assert fit.low < 80 < fit.high


def test_a_curve_that_never_falls_has_no_half() -> None:
    fit = fit_retention([(n, 50, 50) for n in (1, 10, 50, 100)])
    assert fit is not None
    assert fit.half is None
    assert fit_retention([(1, 1, 1), (2, 2, 2)]) is None


def test_losing_always_the_nearest_is_no_chance() -> None:
    test = rank_test([Loss(1, 20, f"edit {i}") for i in range(6)])
    assert test is not None
    assert test.mean == pytest.approx(0.025)
    assert test.nearest == 6
    assert test.expected_nearest == pytest.approx(0.3)
    assert test.p_value < 0.001


def test_one_nearest_of_twenty_has_the_p_value_worked_by_hand() -> None:
    test = rank_test([Loss(1, 20)])
    assert test is not None
    assert test.p_value == pytest.approx(0.05, abs=0.01)


def test_losing_everything_at_once_says_nothing() -> None:
    test = rank_test([Loss(rank, 5, "one edit") for rank in range(1, 6)])
    assert test is not None
    assert test.mean == pytest.approx(0.5)
    assert test.p_value == pytest.approx(1.0)
    assert rank_test([Loss(1, 1)]) is None


def test_correlation_is_spearmans() -> None:
    rising = correlation([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36])
    assert rising is not None
    assert rising.rho == 1.0
    assert rising.p_value < 0.01
    assert correlation([1, 2, 3], [1, 2, 3]) is None
    assert correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    noise = correlation([1, 2, 3, 4, 5, 6, 7, 8], [3, 1, 4, 1, 5, 9, 2, 6])
    assert noise is not None
    assert noise.low < noise.rho < noise.high


def test_signed_rank_needs_differences() -> None:
    assert paired_p([0.0] * 10) is None
    found = paired_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert found is not None
    assert math.isclose(found, 2 / 2**6)
