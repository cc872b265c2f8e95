"""Paired statistics: numbers worked by hand, and what must hold of any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvllm.paired import Interval, bootstrap, holm, mcnemar, wilson


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (2, 8, 0.109375),
        (3, 3, 1.0),
        (20, 0, 2 / 2**20),
    ],
)
def test_mcnemar_by_hand(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == p


def test_mcnemar_takes_thousands_of_pairs() -> None:
    # The normal approximation with continuity correction: z = (|b − c| − 1) / √(b + c).
    z = (5200 - 4800 - 1) / math.sqrt(10_000)
    assert mcnemar(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


@pytest.mark.parametrize(
    ("passed", "n", "low", "high"),
    [(8, 10, 0.490164, 0.943320), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (1, 1, 0.206549, 1.0)],
)
def test_wilson_by_hand(passed: int, n: int, low: float, high: float) -> None:
    found = wilson(passed, n)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-6)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_within_zero_and_one(counts: tuple[int, int]) -> None:
    passed, n = counts
    found = wilson(passed, n)
    assert found is not None
    assert 0 <= found.low <= passed / n <= found.high <= 1


def test_nothing_measured_has_no_interval() -> None:
    assert wilson(0, 0) is None
    assert bootstrap([], []) is None


def test_wrong_counts_are_refused() -> None:
    for wrong in (lambda: mcnemar(-1, 0), lambda: wilson(3, 2), lambda: bootstrap([True], []),
                  lambda: bootstrap([True], [True], groups=["a", "b"])):  # fmt: skip
        with pytest.raises(ValueError):
            wrong()


def test_bootstrap_of_unchanged_pairs_is_zero() -> None:
    assert bootstrap([True, False] * 9, [True, False] * 9) == Interval(0.0, 0.0)


def test_bootstrap_of_pairs_that_all_fell_is_minus_one() -> None:
    assert bootstrap([True] * 7, [False] * 7) == Interval(-1.0, -1.0)


def test_bootstrap_of_two_opposite_pairs_reaches_both_ends() -> None:
    """A draw of two gives −1, 0, 1 with chances 1/4, 1/2, 1/4: both 2.5 % tails lie at the ends."""
    assert bootstrap([True, False], [False, True]) == Interval(-1.0, 1.0)


def test_bootstrap_agrees_with_the_normal_approximation_where_that_is_good() -> None:
    """100 of 1000 pairs fell: −0.1 ± 1.96 · √(0.1 · 0.9 / 1000) = −0.1186 to −0.0814."""
    found = bootstrap([True] * 1000, [False] * 100 + [True] * 900, seed=3)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((-0.1186, -0.0814), abs=0.003)


def test_bootstrap_is_the_same_for_the_same_seed_only() -> None:
    before, after = [True] * 997, [i % 7 != 0 for i in range(997)]
    assert bootstrap(before, after, seed=1) == bootstrap(before, after, seed=1)
    assert len({bootstrap(before, after, seed=seed, resamples=200) for seed in range(8)}) > 1


def test_drawing_whole_facts_widens_the_interval() -> None:
    """Ten facts of ten questions, two of them lost with all their questions: ten results, not a hundred."""
    before, after = [True] * 100, [i >= 20 for i in range(100)]
    alone = bootstrap(before, after)
    together = bootstrap(before, after, groups=[i // 10 for i in range(100)])
    assert alone is not None
    assert together is not None
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lowers_nothing(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    ranked = sorted(p_values, key=lambda name: p_values[name])
    assert [adjusted[name] for name in ranked] == sorted(adjusted.values())
    assert all(p <= adjusted[name] <= 1 for name, p in p_values.items())


def test_false_alarms_of_mcnemar_are_at_most_its_level() -> None:
    """Exactly, not by simulation: the chance that p ≤ 0.05 with 20 changed pairs and no true difference."""
    chance = sum(math.comb(20, lost) for lost in range(21) if mcnemar(lost, 20 - lost) <= 0.05) / 2**20
    assert 0 < chance <= 0.05
