"""Reports in a notebook cell: every number, every answer, nothing interpreted."""

from __future__ import annotations

from html.parser import HTMLParser

from kvllm.records import (
    AnswerChange,
    FactChange,
    Metric,
    ProbeResult,
    RegressionReport,
    Report,
    SuiteComparison,
)

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> & 'quoted' \"twice\""


class Reader(HTMLParser):
    """Collects text and tags, and checks that tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.open = "", [], []  # type: ignore[var-annotated]
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_shows_its_numbers_with_scorer_and_each_answer_behind_a_click() -> None:
    probe = ProbeResult("trained", HOSTILE, HOSTILE, True, 0.9166666, HOSTILE, "k", "chrf>=0.8")
    report = Report({"reliability": Metric(11 / 12, 12, "live", "auto", "fact-basic/1")}, (probe,), (HOSTILE,))
    read = Reader(report._repr_html_())
    assert set(read.tags) <= {"div", "p", "b", "span", "table", "tr", "th", "td", "details", "summary"}
    assert read.text.count(HOSTILE) == 4
    for shown in ("0.917", "12", "auto", "fact-basic/1", "chrf>=0.8"):
        assert shown in read.text
    assert read.tags.count("details") == 1


def test_a_regression_shows_what_was_lost_with_both_answers() -> None:
    report = RegressionReport(
        3, 9,
        suites=(SuiteComparison("trained", 8, 1, 1.0, 0.25, -0.9, -0.5, 6, 0, 0.03125, 0.0625, "contains"),),
        facts=(FactChange("k<b>", 1, 8, "lost", 0.25, 1.0, 8),),
        changes=(AnswerChange("trained", "k", "what?", True, False, "said before", HOSTILE, "text", "text", "auto"),),
        drift=Report({"drift_kl": Metric(0.5, 40, scorer="kl")}),
        drift_before=Report({"drift_kl": Metric(0.1, 40, scorer="kl")}),
    )  # fmt: skip
    read = Reader(report._repr_html_())
    for shown in ("k<b>", "0.250", "-0.900 to -0.500", "0.0625", "said before", HOSTILE, "0.500", "0.100"):
        assert shown in read.text, shown
    assert "script" not in read.tags


def test_a_long_report_says_how_much_it_leaves_out() -> None:
    probes = tuple(ProbeResult("trained", f"q{i}", "a", True, 1.0) for i in range(1000))
    assert "and 800 more" in Report(probes=probes)._repr_html_()
