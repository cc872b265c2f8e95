"""Reports as small pieces of HTML for a notebook cell. Everything in them is other people's words and is escaped.

The standard library only, so that records can show themselves wherever they are; the full page is `kvllm.reports`'.

    report_html(kb.probe("torchkeras"))     # '<div …>'
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvllm.metrics import shown, shown_p

if TYPE_CHECKING:
    from kvllm.records import Metric, ProbeResult, RegressionReport, Report

_MOST_PROBES = 200


def report_html(report: Report) -> str:
    """Return metrics with their n and scorer, and each question behind a click."""
    return _framed("Report", [_warnings(report.warnings), _metrics(report), _probes(report.probes)])


def regression_html(report: RegressionReport) -> str:
    """Return the verdict, the suites before and after, and each changed answer behind a click."""
    suites = _table(
        ("suite", "n", "before", "after", "95 % interval of the change", "lost", "gained", "p (Holm)", "scorer"),
        (
            (
                suite.suite,
                str(suite.n),
                shown(suite.before),
                shown(suite.after),
                f"{shown(suite.low)} to {shown(suite.high)}",
                str(suite.lost),
                str(suite.gained),
                shown_p(suite.p_holm),
                suite.scorer,
            )
            for suite in report.suites
        ),
    )
    drift = _table(
        ("drift against the base", "before", "after", "n", "scorer"),
        (
            (name, shown(report.drift_before.value(name)), shown(metric.value), str(metric.n), metric.scorer or "")
            for name, metric in report.drift.metrics.items()
        ),
    )
    changed = [
        _details(
            f"{'gained' if change.passed else 'lost'} · {change.kind} · {change.question}",
            [("before", change.answer_before), ("now", change.answer), ("expected", change.expected)],
        )
        for change in report.changes[:_MOST_PROBES]
    ]
    if len(report.changes) > _MOST_PROBES:
        changed.append(f"<p>… and {len(report.changes) - _MOST_PROBES} more</p>")
    lost = ", ".join(report.lost) if report.lost else "none"
    title = f"Regression from edit {report.since} to edit {report.head}: lost facts: {lost}"
    return _framed(title, [_warnings(report.warnings), suites, drift, *changed])


def _metrics(report: Report) -> str:
    def row(name: str, metric: Metric) -> tuple[str, ...]:
        return name, shown(metric.value), str(metric.n), metric.scorer or "", metric.protocol, metric.suite or ""

    rows = (row(name, metric) for name, metric in report.metrics.items())
    return _table(("metric", "value", "n", "scorer", "protocol", "suite"), rows)


def _probes(probes: Sequence[ProbeResult]) -> str:
    shown_probes = [
        _details(
            f"{'✓' if probe.passed else '✗'} {shown(probe.score)} ({probe.scorer}) · {probe.kind} · {probe.question}",
            [("answer", probe.answer), ("judged against", probe.expected)],
        )
        for probe in probes[:_MOST_PROBES]
    ]
    more = f"<p>… and {len(probes) - _MOST_PROBES} more</p>" if len(probes) > _MOST_PROBES else ""
    return "".join(shown_probes) + more


def _details(summary: str, texts: Iterable[tuple[str, str]]) -> str:
    inside = "".join(
        f"<p><b>{html.escape(name)}:</b> <span style='white-space:pre-wrap'>{html.escape(text)}</span></p>"
        for name, text in texts
    )
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _warnings(warnings: Iterable[str]) -> str:
    return "".join(f"<p>⚠ {html.escape(warning)}</p>" for warning in warnings)


def _framed(title: str, parts: Iterable[str]) -> str:
    return f"<div><p><b>{html.escape(title)}</b></p>{''.join(parts)}</div>"
