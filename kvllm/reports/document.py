"""What every format of a report shows: sections of tables, plots and answers, each number already as it is shown.

The five formats only lay it out, so that no number can differ between them. Built from records; knows no engine.

    document = probe_document(report, origin, facts=kb.facts(), edits=points, checks=checks)
    render(document, "html")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvllm.metrics import RECALLED_SHARE, shown, shown_p
from kvllm.paired import wilson
from kvllm.records import (
    BisectReport,
    Collisions,
    EditPoint,
    GateCheck,
    Metric,
    ProbeResult,
    Record,
    RegressionReport,
    Report,
    RetentionPoint,
    StoredFact,
)
from kvllm.reports import plots
from kvllm.reports.curves import Recitals, recall_by_distance, recitals

SCHEMA = "kvllm-report/1"
Kind = Literal["probe", "drift", "regression", "bisect", "experiment"]
# Larger matrices cannot be read; their pairs still stand in the list.
MOST_MATRIX_KEYS = 24
# Which metrics a probe counts for; of other kinds there is one of the kind's own name.
METRICS_OF_KIND = {
    "trained": ("reliability",),
    "paraphrase": ("generalization",),
    "alias": ("portability",),
    "inverse": ("portability", "inverse"),
    "recalled": ("portability", "far_recalled"),
    "consequence": ("portability", "consequence"),
    "neighbour": ("locality",),
    "general": ("qa_accuracy", "qa_delta"),
}


@dataclass(frozen=True)
class Origin(Record):
    """Where and when it was measured."""

    path: str
    model: str
    base_digest: str
    head: int
    facts: int
    kvllm: str
    made: str


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; columns whose name begins with `>` are numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Entry:
    """One measured question: its verdict and number at a glance, every text behind a click.

    Attributes:
        group: The fact's key, or what else it belongs to.
        kind: The rung of the ladder.
        question: As asked.
        passed: The verdict; None where there is none.
        score: The scorer's number, as shown.
        scorer: Its name.
        texts: (label, text) to read: the answer, what it was judged against.
        note: A few words for the list ("lost", "gained").
        metrics: Those that it counts for.
        distance: Of the question to the nearest trained one, where that was measured.
    """

    group: str
    kind: str
    question: str
    passed: bool | None
    score: str
    scorer: str
    texts: tuple[tuple[str, str], ...]
    note: str = ""
    metrics: tuple[str, ...] = ()
    distance: float | None = None


@dataclass(frozen=True)
class Section:
    """A part of a report: a table, a plot of it, questions with answers.

    `minor` ones are folded: on a terminal they come with `--answers`.
    """

    title: str
    note: str = ""
    table: Table | None = None
    figure: plots.Plot | plots.Lines | plots.Bars | plots.Matrix | None = None
    entries: tuple[Entry, ...] = ()
    minor: bool = False


@dataclass(frozen=True)
class Document:
    """A report, ready for any format.

    Attributes:
        kind: Of the report.
        title: One line.
        origin: Where it was measured.
        findings: What a reader wants to know first, in sentences.
        checks: The gate's rules; empty without a gate.
        metrics: Name to (value, n, scorer), as shown.
        sections: The body.
        warnings: What to know before the numbers.
        data: What the JSON format holds beside origin and gate, as plain data.
        measured: Where it was measured, in rows that stand instead of the origin's, for what is no knowledge base.
    """

    kind: Kind
    title: str
    origin: Origin
    findings: tuple[str, ...]
    checks: tuple[GateCheck, ...]
    metrics: Mapping[str, tuple[str, str, str]]
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    measured: tuple[tuple[str, str], ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a rule of the gate did not hold."""
        return any(not check.passed for check in self.checks)

    def json(self, failure: str | None = None) -> dict[str, Any]:
        """Return the document of the JSON format, described by `schema/report.schema.json`.

        Args:
            failure: The line that says what failed.
        """
        if self.kind == "experiment":  # has a shape of its own
            return dict(self.data)
        document: dict[str, Any] = {"ok": failure is None, "schema": SCHEMA, "kind": self.kind}
        if failure is not None:
            document |= {"error": failure, "code": "gate_failed"}
        document |= {"knowledge_base": self.origin.to_dict(), **self.data}
        passed = all(check.passed for check in self.checks) if self.checks else None
        return document | {"gate": {"passed": passed, "checks": [check.to_dict() for check in self.checks]}}


def probe_document(
    report: Report,
    origin: Origin,
    *,
    facts: Sequence[StoredFact],
    retention: Sequence[RetentionPoint] = (),
    edits: Sequence[EditPoint] = (),
    checks: Sequence[GateCheck] = (),
    key: str | None = None,
    collisions: Collisions | None = None,
) -> Document:
    """Return the document of a probe report.

    Args:
        report: What was measured.
        origin: Where.
        facts: The facts that were asked about.
        retention: retention@n of these facts.
        edits: What each edit of the history reported.
        checks: The gate's rules.
        key: The fact, where only one was asked about.
        collisions: Which key recites which fact, where that was asked; otherwise it is read off the probes.
    """
    curve, told = recall_by_distance(report.probes), recitals(report.probes)
    sections = [
        *_metrics_sections("Metrics", report.metrics),
        *_facts_section(report.probes, facts, origin.head),
        *_refusals_section(report.probes),
        *_distance_section(report.probes),
        *_retention_section(retention),
        *(_recitals_section(told) if collisions is None else _collisions_sections(collisions)),
        *_drift_section(edits),
        Section("Questions and answers", _ANSWERS_NOTE, entries=tuple(_entry(probe) for probe in report.probes)),
    ]
    asked = _asked_about(key, len(facts), len({probe.key for probe in report.probes if probe.kind == "refusal"}))
    failing = [probe for probe in report.probes if not probe.passed]
    findings = [f"{len(report.probes)} questions about {asked}; {len(failing)} did not pass."]
    data = {
        "report": _metrics_data(report),
        "probes": [probe.to_dict() for probe in report.probes],
        "warnings": list(report.warnings),
        "distance": [point.to_dict() for point in curve],
        "retention": [point.to_dict() for point in retention],
        "recitals": told.to_dict() if told is not None else None,
        "collisions": collisions.to_dict() if collisions is not None else None,
        "edits": [point.to_dict() for point in edits],
    }
    title = f"What the model knows of {key!r}" if key is not None else "What the model knows"
    metrics = _properties(report.metrics)
    return Document(
        "probe", title, origin, tuple(findings), tuple(checks), metrics, tuple(sections), report.warnings, data
    )


def drift_document(
    report: Report, origin: Origin, *, edits: Sequence[EditPoint] = (), checks: Sequence[GateCheck] = ()
) -> Document:
    """Return the document of a drift report."""
    sections = [
        *_metrics_sections("Drift against the base model", report.metrics),
        *_drift_section(edits),
        Section("Questions and answers", _ANSWERS_NOTE, entries=tuple(_entry(probe) for probe in report.probes)),
    ]
    kl, n = report.value("drift_kl"), report.metrics.get("drift_kl", Metric(None, 0)).n
    findings = (f"drift_kl {shown(kl)} nats per answer token of the base (n={n}).",)
    data = {
        "report": _metrics_data(report),
        "probes": [probe.to_dict() for probe in report.probes],
        "warnings": list(report.warnings),
        "edits": [point.to_dict() for point in edits],
    }
    metrics = _properties(report.metrics)
    return Document("drift", "Drift", origin, findings, tuple(checks), metrics, tuple(sections), report.warnings, data)


def regression_document(report: RegressionReport, origin: Origin, *, checks: Sequence[GateCheck] = ()) -> Document:
    """Return the document of a regression report."""
    lost = len(report.lost)
    suites = Table(
        (
            "suite",
            ">n",
            ">before",
            ">after",
            ">change",
            ">95 % interval",
            ">lost",
            ">gained",
            ">p",
            ">p (Holm)",
            "scorer",
        ),
        tuple(
            (
                suite.suite,
                str(suite.n),
                shown(suite.before),
                shown(suite.after),
                _signed(suite.after - suite.before),
                f"{_signed(suite.low)} to {_signed(suite.high)}",
                str(suite.lost),
                str(suite.gained),
                shown_p(suite.p_value),
                shown_p(suite.p_holm),
                suite.scorer,
            )
            for suite in report.suites
        ),
    )
    drift = Table(
        ("metric", ">before", ">after", ">n", "scorer", "protocol", "suite"),
        tuple(
            (
                name,
                shown(report.drift_before.value(name)),
                shown(metric.value),
                str(metric.n),
                metric.scorer or "",
                metric.protocol,
                metric.suite or "",
            )
            for name, metric in report.drift.metrics.items()
        ),
    )
    facts = Table(
        ("fact", "status", ">before", ">now", ">n", ">taught by edit", ">further edits"),
        tuple(
            (
                fact.key,
                fact.status + (", updated" if fact.updated else ""),
                shown(fact.recalled_before),
                shown(fact.recalled),
                str(fact.n),
                str(fact.edit_id),
                str(fact.further_edits),
            )
            for fact in report.facts
        ),
    )
    changes = tuple(
        Entry(
            change.key or "",
            change.kind,
            change.question,
            change.passed,
            "",
            change.scorer,
            (
                (f"answer at edit {report.since}", change.answer_before),
                (f"answer at edit {report.head}", change.answer),
                ("judged against", change.expected),
                *((("judged against before", change.expected_before),) if _differ(change) else ()),
            ),
            "gained" if change.passed else "lost",
            METRICS_OF_KIND.get(change.kind, (change.kind,)),
        )
        for change in report.changes
    )
    sections = [
        Section("Suites before and after", _SUITES_NOTE, suites),
        Section(
            "Answers that changed", "Lost first; both answers side by side." if changes else "None.", entries=changes
        ),
        Section("Facts", f"Recalled: {_RECALLED}.", facts),
        Section("Drift against the base model", "", drift),
        *_retention_section(report.retention),
        *_distance_section(report.after.probes),
        *_recitals_section(recitals(report.after.probes)),
        *_drift_section(report.edits),
        *_metrics_sections(f"Metrics at edit {report.head}", report.after.metrics),
        Section(
            f"Questions and answers at edit {report.head}",
            _ANSWERS_NOTE,
            entries=tuple(_entry(probe) for probe in report.after.probes),
        ),
    ]
    findings = [
        f"From edit {report.since} to edit {report.head}: {_count(lost, 'fact')} lost"
        + (f" ({', '.join(map(repr, report.lost))})" if lost else "")
        + f", {_count(sum(not change.passed for change in report.changes), 'answer')} lost, "
        f"{_count(sum(change.passed for change in report.changes), 'answer')} gained."
    ]
    if report.deleted:
        findings.append(f"Deleted in between and not compared: {', '.join(map(repr, report.deleted))}.")
    metrics = _properties({**report.drift.metrics, **report.after.metrics})
    title = f"Regression from edit {report.since} to edit {report.head}"
    data = {"regression": report.to_dict() | {"lost": list(report.lost)}}
    return Document(
        "regression", title, origin, tuple(findings), tuple(checks), metrics, tuple(sections), report.warnings, data
    )


def bisect_document(report: BisectReport, origin: Origin) -> Document:
    """Return the document of a search for the edit that broke a probe."""
    steps = sorted(report.steps, key=lambda step: step.edit_id)
    table = Table(
        (">edit", "passed", "answer"),
        tuple((str(step.edit_id), "yes" if step.passed else "no", step.answer) for step in steps),
    )
    if report.edit is not None:
        touched = ", ".join(map(repr, report.edit.keys)) or "no key"
        finding = (
            f"Edit {report.edit.id} ({report.edit.op} of {touched}) broke {report.question!r}: it passed at edit "
            f"{report.edit.id - 1} and does not at edit {report.edit.id}; {_count(report.replays, 'replay')}."
        )
    elif report.verdict == "still passes":
        finding = f"{report.question!r} still passes at edit {report.head}: no edit broke it."
    else:
        taught = "the base" if report.start == 0 else f"edit {report.start}"
        finding = f"{report.question!r} passes neither at edit {report.head} nor at {taught}: it never passed there."
    data = {"bisect": report.to_dict()}
    note = f"Judged by: {report.scorer}. Looked for: {report.expected}"
    sections = (Section("States looked at", note, table),)
    return Document("bisect", f"What broke {report.question!r}", origin, (finding,), (), {}, sections, (), data)


_RECALLED = f"at least {RECALLED_SHARE:.0%} of the trained questions state the text"
_SUITES_NOTE = (
    "The same questions on both sides, as pairs. p: exact McNemar test, two-sided, of the facts that lost more answers "
    "than they gained against those that gained more; Holm adjusts it for the number of suites. 95 % interval of the "
    "change: paired bootstrap that draws whole facts."
)
_ANSWERS_NOTE = "Open a line to read what the model generated and what it was judged against."


def _metrics_sections(title: str, metrics: Mapping[str, Metric]) -> list[Section]:
    """The metrics, and apart from them those of parts: "change_norm/model.layers.9" is a part of "change_norm"."""
    parts = {name: metric for name, metric in metrics.items() if "/" in name}
    found = [_metrics_section(title, {name: metric for name, metric in metrics.items() if name not in parts})]
    for whole in dict.fromkeys(name.split("/")[0] for name in parts):
        mine = {name: metric for name, metric in parts.items() if name.split("/")[0] == whole}
        found.append(replace(_metrics_section(f"Parts of {whole}", mine), minor=True))
    return found


def _metrics_section(title: str, metrics: Mapping[str, Metric]) -> Section:
    rows = tuple(
        (
            name,
            shown(metric.value),
            _interval(name, metric),
            str(metric.n),
            metric.scorer or "",
            metric.protocol,
            metric.suite or "",
            "" if metric.seed is None else str(metric.seed),
        )
        for name, metric in metrics.items()
    )
    columns = ("metric", ">value", ">95 % interval", ">n", "scorer", "protocol", "suite", ">seed")
    return Section(
        title, "95 % interval of a share: Wilson." if rows else "Nothing was measured.", Table(columns, rows)
    )


def _asked_about(key: str | None, facts: int, refused: int) -> str:
    """Return what questions were about: one fact or refused key, or how many of them."""
    if key is not None:
        return f"the {'refused key' if refused else 'fact'} {key!r}"
    told = f"{facts} fact{'' if facts == 1 else 's'}"
    return told + (f" and {refused} refused key{'' if refused == 1 else 's'}" if refused else "")


def _facts_section(probes: Sequence[ProbeResult], facts: Sequence[StoredFact], head: int) -> list[Section]:
    if not facts:
        return []
    by_key: dict[str | None, list[ProbeResult]] = {}
    for probe in probes:
        by_key.setdefault(probe.key, []).append(probe)
    rows = []
    for fact in facts:
        mine = by_key.get(fact.key, [])
        trained = [probe.passed for probe in mine if probe.kind == "trained"]
        rows.append(
            (
                fact.key,
                shown(sum(trained) / len(trained) if trained else None),
                str(len(trained)),
                f"{sum(probe.passed for probe in mine)} of {len(mine)}",
                str(fact.edit_id),
                str(max(0, head - fact.edit_id)),
            )
        )
    columns = ("fact", ">trained", ">n", ">passed of all", ">taught by edit", ">further edits")
    note = "trained: share of the trained questions whose answer states the text."
    return [Section("Facts", note, Table(columns, tuple(rows)))]


def _refusals_section(probes: Sequence[ProbeResult]) -> list[Section]:
    passed: dict[str, list[bool]] = {}
    for probe in probes:
        if probe.kind == "refusal":
            passed.setdefault(probe.key or "", []).append(probe.passed)
    if not passed:
        return []
    rows = tuple((key, shown(sum(found) / len(found)), str(len(found))) for key, found in passed.items())
    note = "refused: share of the questions trained to the refusal (delete of mode abstain) that are answered with it."
    return [Section("Refused keys", note, Table(("key", ">refused", ">n"), rows))]


def _distance_section(probes: Sequence[ProbeResult]) -> list[Section]:
    points = recall_by_distance(probes)
    if not points:
        return []
    rows = tuple(
        (
            f"{shown(point.near, 2)} to {shown(point.far, 2)}",
            shown(point.distance),
            shown(point.value),
            f"{shown(point.low)} to {shown(point.high)}",
            str(point.n),
        )
        for point in points
    )
    note = (
        "Distance: 1 − cosine similarity of a question to the nearest trained one. Share of answers that state the "
        "text, with its 95 % Wilson interval."
    )
    figure = plots.distance_plot(points)
    columns = ("distance", ">mean distance", ">recall", ">95 % interval", ">n")
    return [Section("Recall against semantic distance", note, Table(columns, rows), figure)]


def _retention_section(points: Sequence[RetentionPoint]) -> list[Section]:
    if not points:
        return []
    rows = tuple(
        (
            str(point.further_edits),
            shown(point.value),
            f"{shown(point.low)} to {shown(point.high)}",
            str(point.n),
            ", ".join(point.keys),
        )
        for point in points
    )
    note = f"Of the facts that n further edits followed, the share that is still recalled ({_RECALLED})."
    columns = (">further edits", ">retention", ">95 % interval", ">facts", "keys")
    return [Section("Retention over edits", note, Table(columns, rows), plots.retention_plot(points))]


def _recitals_section(found: Recitals | None) -> list[Section]:
    if found is None:
        return []
    rows = tuple((asked, told, shown(share)) for asked, told, share in found.pairs)
    note = "Share of the questions about one key whose answer holds another fact's text (scorer: contains). " + (
        "Look at these pairs." if rows else "No key recites another's text."
    )
    figure = plots.matrix_plot(found.keys, found.matrix) if len(found.keys) <= MOST_MATRIX_KEYS else None
    return [Section("Collisions", note, Table(("asked about", "recited the text of", ">share"), rows), figure)]


def _collisions_sections(found: Collisions) -> list[Section]:
    pairs = tuple(
        (pair.key, pair.other, pair.kind, shown(pair.similarity), shown(pair.recites), shown(pair.recited))
        for pair in found.pairs
    )
    note = (
        f"Of up to {found.questions} questions per key, the share whose answer states another fact's text. "
        f"Similarity: cosine of both keys' questions by {found.encoder or 'no encoder'}. "
    ) + ("Look at these pairs, the worst first." if pairs else "No pair to look at.")
    columns = ("key", "other", "what", ">similarity", ">recites the other", ">is recited")
    figure = plots.matrix_plot(found.keys, found.matrix) if 1 < len(found.keys) <= MOST_MATRIX_KEYS else None
    neighbours = tuple(
        Entry(
            near.key,
            f"neighbour ({near.source})",
            near.question,
            not near.leaked,
            "" if near.similarity is None else shown(near.similarity),
            "leak",
            (("answer", near.answer),),
            metrics=("leak_rate",),
        )
        for near in found.neighbours
    )
    told = f"leak_rate {shown(found.leak_rate.value)} (n={found.leak_rate.n}); the number is the keys' similarity."
    return [
        Section("Collisions", note, Table(columns, pairs), figure),
        *([Section("Nearest other keys", told, entries=neighbours)] if neighbours else []),
    ]


def _drift_section(edits: Sequence[EditPoint]) -> list[Section]:
    measured = [point for point in edits if point.drift_kl is not None]
    if len(measured) < 2:
        return []
    rows = tuple(
        (
            str(point.edit_id),
            point.op if point.edit_id else "base",
            ", ".join(point.keys),
            shown(point.drift_kl),
            shown(point.ppl_ratio),
        )
        for point in measured
    )
    note = "What each edit's own report said when it was committed (the gate's share of the drift suite; scorer: kl)."
    columns = (">edit", "op", "keys", ">drift_kl", ">ppl_ratio")
    return [Section("Drift over edits", note, Table(columns, rows), plots.drift_plot(measured))]


def _entry(probe: ProbeResult) -> Entry:
    texts = [("answer", probe.answer), *((f"{role}, before", content) for role, content in probe.turns)]
    if probe.expected:
        texts.append(("must not recite" if probe.kind == "neighbour" else "judged against", probe.expected))
    if probe.similarity is not None:
        texts.append(("similarity to the nearest trained question", shown(probe.similarity)))
    return Entry(
        probe.key or "",
        probe.kind,
        probe.question,
        probe.passed,
        shown(probe.score),
        probe.scorer,
        tuple(texts),
        metrics=METRICS_OF_KIND.get(probe.kind, (probe.kind,)),
        distance=None if probe.similarity is None else max(0.0, 1 - probe.similarity),
    )


def _interval(name: str, metric: Metric) -> str:
    """The Wilson interval of a metric that is a share of its n, else nothing."""
    if name == "score" or name.endswith(("_delta", "_gain")):  # a mean of shares, and differences
        return ""
    if metric.value is None or metric.scorer in (None, "kl") or not 0 <= metric.value <= 1:
        return ""
    passed = round(metric.value * metric.n)
    if metric.n == 0 or abs(metric.value * metric.n - passed) > 1e-6:
        return ""
    band = wilson(passed, metric.n)
    return "" if band is None else f"{shown(band.low)} to {shown(band.high)}"


def _metrics_data(report: Report) -> dict[str, Any]:
    return {name: metric.to_dict() for name, metric in report.metrics.items()}


def _properties(metrics: Mapping[str, Metric]) -> dict[str, tuple[str, str, str]]:
    return {name: (shown(metric.value), str(metric.n), metric.scorer or "") for name, metric in metrics.items()}


def _signed(value: float) -> str:
    return f"+{shown(value)}" if value > 0 else shown(value)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _differ(change: Any) -> bool:
    return bool(change.expected_before != change.expected)
