"""Curves and matrices worked by hand."""

from __future__ import annotations

import pytest

from kvllm.records import EditPoint, ProbeResult, RetentionPoint
from kvllm.reports.curves import recall_by_distance, recitals
from kvllm.reports.plots import bars_plot, distance_plot, drift_plot, in_text, lines_plot, matrix_plot, retention_plot


def probe(key: str, answer: str, text: str, similarity: float | None = None, kind: str = "paraphrase") -> ProbeResult:
    return ProbeResult(kind, "q", answer, answer == text, 1.0, text, key, similarity=similarity)  # type: ignore[arg-type]


def test_recall_by_distance_bins_by_hand() -> None:
    asked = [probe("a", "t", "t", 1.0), probe("a", "t", "t", 0.999), probe("a", "t", "t", 0.85),
             probe("a", "no", "t", 0.89), probe("a", "no", "t", -0.2), probe("a", "t", "t", None),
             probe("a", "no", "t", 0.99, kind="neighbour"), probe("a", "t", "t", 0.5, kind="far"),
             probe("a", "t", "t", 0.5, kind="inverse")]  # fmt: skip
    points = recall_by_distance(asked)
    assert [(p.near, p.far, p.n, p.passed) for p in points] == [(0.0, 0.02, 2, 2), (0.1, 0.2, 2, 1), (0.8, 2.0, 1, 0)]
    assert points[1].distance == pytest.approx(0.13)
    assert (points[1].low, points[1].high) == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_recall_without_similarities_has_no_curve() -> None:
    assert recall_by_distance([probe("a", "t", "t")]) == []


def test_recitals_name_the_pairs_to_look_at() -> None:
    asked = [probe("a", "red stone", "red stone"), probe("a", "blue water", "red stone"),
             probe("b", "blue water", "blue water"), probe("c", "I say blue water", "green"),
             probe("c", "blue water", "green"), probe("c", "green", "green")]  # fmt: skip
    found = recitals(asked)
    assert found is not None
    assert found.keys == ("a", "b", "c")
    assert found.matrix == ((0.5, 0.5, 0.0), (0.0, 1.0, 0.0), (0.0, pytest.approx(2 / 3), pytest.approx(1 / 3)))
    assert found.pairs == (("c", "b", pytest.approx(2 / 3)), ("a", "b", 0.5))


def test_an_answer_that_was_cut_within_another_facts_text_recites_it() -> None:
    text = "a red stone that lies by the river and shines at night when nobody is looking"
    found = recitals([probe("a", text[:58], "red"), probe("a", "a red stone", "red"), probe("b", text, text)])
    assert found is not None
    assert found.pairs == (("a", "b", 0.5),)


def test_facts_with_one_text_are_no_collision() -> None:
    found = recitals([probe("a", "same", "same"), probe("b", "same", "same")])
    assert found is not None
    assert found.pairs == ()
    assert recitals([probe("a", "t", "t")]) is None


def test_points_of_a_plot_lie_on_their_ticks() -> None:
    points = [RetentionPoint(0, 4, 4, 1.0, 0.5, 1.0), RetentionPoint(6, 4, 2, 0.5, 0.15, 0.85)]
    plot = retention_plot(points)
    ticks_x, ticks_y = {t.label: t.at for t in plot.x_ticks}, {t.label: t.at for t in plot.y_ticks}
    assert [(dot.x, dot.y) for dot in plot.dots] == [(ticks_x["0"], ticks_y["1.00"]), (ticks_x["6"], ticks_y["0.50"])]
    assert plot.line == f"M{ticks_x['0']:g},{ticks_y['1.00']:g} L{ticks_x['6']:g},{ticks_y['0.50']:g}"
    assert plot.band.startswith("M")


def test_drift_plot_takes_any_size_of_drift() -> None:
    for kl in (0.0, 1e-9, 0.004, 0.3, 7.0, 1234.5):
        plot = drift_plot([EditPoint(0, "rollback", (), None, 0.0, 1.0), EditPoint(1, "insert", ("k",), 1.0, kl, 1.1)])
        assert 2 <= len(plot.y_ticks) <= 8
        assert all(plot.top - 0.1 <= dot.y <= plot.bottom + 0.1 for dot in plot.dots)


def test_one_point_still_has_a_band() -> None:
    plot = distance_plot(recall_by_distance([probe("a", "t", "t", 1.0)]))
    assert len({pair.split(",")[0] for pair in plot.band.strip("MZ ").split(" L")}) == 2


def test_a_matrix_has_one_cell_for_each_pair() -> None:
    found = matrix_plot(["a", "b"], [[1.0, 0.0], [0.25, 0.75]])
    assert [(cell.share, cell.diagonal) for cell in found.cells] == [
        (1.0, True), (0.0, False), (0.25, False), (0.75, True)
    ]  # fmt: skip
    assert "asked about b, recited a: 0.250" in {cell.told for cell in found.cells}


def test_several_lines_share_one_frame() -> None:
    figure = lines_plot("x", "X", [("a", [(10, 0.5), (0, 1.0)]), ("none", []), ("bb", [(5, 0.0)])], x_label="n",
                        y_label="share", most=1.0)  # fmt: skip
    assert figure is not None
    assert [series.label for series in figure.series] == ["a", "bb"]
    first, second = figure.series
    assert first.values == (1.0, 0.5)
    assert first.dots[0].y < first.dots[1].y, "more is higher"
    assert first.dots[0].x < second.dots[0].x < first.dots[1].x
    assert second.dots[0].y == figure.bottom
    assert [tick.label for tick in figure.y_ticks] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert in_text(figure) == ("X: share against n", "a   █▅  1.000 … 0.500", "bb  ▁  0.000 … 0.000")
    assert lines_plot("x", "X", [("a", [])], x_label="n", y_label="share") is None


def test_bars_stand_by_name_and_what_was_not_measured_has_none() -> None:
    rows = [("full", (1.0, 0.0)), ("lora", (0.5, None)), ("none", (None, None))]
    figure = bars_plot("x", "X", ("recalled", "kept"), rows, x_label="share")
    assert figure is not None
    assert [tick.label for tick in figure.names] == ["full", "lora"]
    assert [(bar.measure, bar.told) for bar in figure.bars] == [
        (0, "full: 1.000 recalled"), (1, "full: 0.000 kept"), (0, "lora: 0.500 recalled")
    ]  # fmt: skip
    whole, nothing, half = figure.bars
    assert figure.left + whole.width == figure.right == figure.x_ticks[-1].at
    assert (nothing.width, half.width) == (0, whole.width / 2)
    assert whole.y < figure.names[0].at < half.y < figure.names[1].at < figure.bottom, "groups do not overlap"
    assert in_text(figure) == ("X: share", "full  █▁  recalled 1.000, kept 0.000", "lora  ▅·  recalled 0.500")
    assert bars_plot("x", "X", ("recalled",), [("none", (None,))], x_label="share") is None
