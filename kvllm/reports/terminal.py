"""Records as rich renderables: what a person reads on a terminal.

It knows records, not the engine, and it prints nothing. Keys, texts and answers are other people's words: every one of
them passes `inline` or `block`, so that no escape sequence, bidirectional override or rich markup in them is obeyed.

    Console().print(facts_table(kb.facts()))
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from kvllm.metrics import shown as number
from kvllm.records import (
    Edit,
    EditOutcome,
    ExportResult,
    GateCheck,
    GcReport,
    Match,
    Metric,
    ProbeResult,
    Report,
    StoredFact,
    VerifyReport,
)
from kvllm.reports.plots import Bars, Lines, in_text
from kvllm.reports.text import neutral

if TYPE_CHECKING:
    from kvllm.reports.document import Document, Entry
    from kvllm.reports.document import Table as DocumentTable


def inline(text: object, style: str = "") -> Text:
    """Return untrusted text for a table cell: on one line, nothing in it interpreted."""
    return Text(neutral(str(text), keep=""), style=style)


def block(text: object, style: str = "") -> Text:
    """Return untrusted text as a paragraph: line breaks and tabs stay, nothing else is interpreted."""
    return Text(neutral(str(text)), style=style)


def size(n_bytes: float) -> str:
    """Return a size in decimal units: 1_234_000 → '1.2 MB'."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


_VERDICT = {"states it": "green", "same": "green", "does not": "red", "changed": "yellow"}


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left", title_style="bold"
    )
    for column in columns:
        # `>name` is a number: right-aligned and never wrapped; `!name` is never wrapped.
        table.add_column(
            column.lstrip(">!"),
            justify="right" if column[0] == ">" else "left",
            no_wrap=column[0] in ">!",
            overflow="fold",
        )
    return table


def verdict(passed: bool) -> Text:
    """Return the mark of a probe or a check."""
    return Text("yes", style="green") if passed else Text("no", style="red")


def metrics_table(metrics: Mapping[str, Metric], *, title: str | None = None) -> Table:
    """Return each metric with what is needed to read it: value, n, scorer, protocol, suite."""
    table = _table("!metric", ">value", ">n", "scorer", "protocol", "suite", title=title)
    for name, metric in metrics.items():
        table.add_row(
            inline(name),
            number(metric.value),
            str(metric.n),
            inline(metric.scorer or ""),
            inline(metric.protocol),
            inline(metric.suite or ""),
        )
    return table


def probes_table(probes: Sequence[ProbeResult], *, title: str | None = None) -> Table:
    """Return every probe: kind, question, live answer, verdict."""
    table = _table("!kind", "question", "answer", "!passed", title=title)
    for probe in probes:
        table.add_row(inline(probe.kind), inline(probe.question), inline(probe.answer), verdict(probe.passed))
    return table


def warnings_view(warnings: Iterable[str]) -> list[RenderableType]:
    """Return one line per warning."""
    return [Text.assemble(("warning: ", "yellow"), inline(warning)) for warning in warnings]


def report_view(report: Report, *, probes: bool = False) -> Group:
    """Return a report's metrics and warnings, with `probes=True` also the questions behind them."""
    parts: list[RenderableType] = []
    if report.metrics:
        parts.append(metrics_table(report.metrics))
    if probes and report.probes:
        parts.append(probes_table(report.probes))
    return Group(*parts, *warnings_view(report.warnings))


def edit_line(edit: Edit) -> Text:
    """Return an edit in one line: number, what it did, to which key, at what cost."""
    line = Text.assemble(("edit ", "bold"), (str(edit.id), "bold cyan"), f" · {edit.op}")
    if edit.mode:
        line.append(f" ({neutral(edit.mode, keep='')})")
    if edit.key is not None:
        line.append(" · ").append_text(inline(edit.key, "bold"))
    elif len(edit.keys) > 1:
        line.append(f" · {len(edit.keys)} keys")
    if edit.op == "rollback" and edit.target is not None:
        line.append(" to the untouched base" if edit.target == 0 else f" to edit {edit.target}")
    if edit.steps:
        line.append(f" · {edit.steps} steps")
    if edit.seconds:
        line.append(f" · {edit.seconds:.1f} s")
    if edit.delta is not None:
        line.append(f" · delta {size(edit.delta.bytes)}, norm {edit.delta.norm:.3g}")
    return line


def edit_view(edit: Edit, *, full: bool = False) -> Group:
    """Return an edit with its metrics; `full` adds provenance (parent, time, seed, digests, tags) and the probes."""
    parts: list[RenderableType] = [edit_line(edit)]
    if full:
        rows: dict[str, object] = {
            "made": edit.created_at,
            "on edit": "the untouched base" if not edit.parent else edit.parent,
            "keys": ", ".join(edit.keys),
            "tags": ", ".join(edit.tags),
            "seed": edit.seed,
            "delta sha256": edit.delta.sha256 if edit.delta else None,
            "rank, modules": f"{edit.delta.rank}, {edit.delta.modules}" if edit.delta else None,
            "weights digest": edit.weights_digest,
        }
        parts.append(mapping_view({name: value for name, value in rows.items() if value not in (None, "")}))
    parts.append(report_view(edit.report, probes=full))
    # A warning about the edit may also stand in its report; once is enough.
    parts.extend(warnings_view(w for w in edit.warnings if w not in edit.report.warnings))
    return Group(*parts)


def fact_view(fact: StoredFact) -> Group:
    """Return one fact: its text first, then what the ledger knows of it."""
    rows: dict[str, object] = {
        "key": fact.key,
        "aliases": ", ".join(fact.aliases),
        "tags": ", ".join(fact.tags),
        "language": fact.language or "",
        "taught by": f"edit {fact.edit_id}" + (f", {fact.created_at}" if fact.created_at else ""),
    }
    return Group(block(fact.text), mapping_view({name: value for name, value in rows.items() if value}))


def facts_table(facts: Sequence[StoredFact]) -> RenderableType:
    """Return the live facts, one a row."""
    if not facts:
        return Text("no facts")
    with_tags = any(fact.tags for fact in facts)
    table = _table("key", "text", ">edit", *(["tags"] if with_tags else []))
    for fact in facts:
        cells: list[RenderableType] = [inline(fact.key, "bold"), inline(fact.text), str(fact.edit_id)]
        table.add_row(*cells, *([inline(", ".join(fact.tags))] if with_tags else []))
    return table


def history_table(edits: Sequence[Edit]) -> RenderableType:
    """Return the edits, one a row, in the order given."""
    if not edits:
        return Text("no edits")
    table = _table(">edit", "!op", "key", ">steps", ">seconds", ">reliability", ">drift_kl", "made", "tags")
    for edit in edits:
        if edit.key is not None:
            key = inline(edit.key, "bold")
        elif edit.op == "rollback":
            key = Text("to the untouched base" if edit.target == 0 else f"to edit {edit.target}", style="dim")
        else:
            key = Text(f"{len(edit.keys)} keys", style="dim")
        table.add_row(
            str(edit.id),
            edit.op,
            key,
            str(edit.steps) if edit.steps else "–",
            f"{edit.seconds:.1f}" if edit.seconds else "–",
            number(edit.report.value("reliability"), 2),
            number(edit.report.value("drift_kl")),
            inline(edit.created_at),
            inline(", ".join(edit.tags)),
        )
    return table


def tags_table(tags: Mapping[str, int]) -> RenderableType:
    """Return each tag and the edit it points to."""
    if not tags:
        return Text("no tags")
    table = _table("tag", ">edit")
    for name, edit_id in tags.items():
        table.add_row(inline(name, "bold"), str(edit_id))
    return table


def matches_table(matches: Sequence[Match]) -> RenderableType:
    """Return the facts nearest in meaning, nearest first."""
    if not matches:
        return Text("no facts")
    table = _table(">similarity", "key", "text")
    for match in matches:
        table.add_row(number(match.similarity), inline(match.key, "bold"), inline(match.text))
    if not matches[0].encoder.startswith("hidden-states"):
        return table
    note = f"Compared by the model's own hidden states ({matches[0].encoder}), not by a sentence encoder."
    return Group(table, Text(note, style="dim"))


def outcomes_table(outcomes: Sequence[tuple[str, EditOutcome]], *, done: str = "inserted") -> Group:
    """Return the result for each fact of an `insert_many`, with its line (or record) in the file it came from.

    Below it stand the edits' warnings; what several edits say stands there once.
    """
    table = _table(">line", "key", f"!{done}", "result")
    for line, outcome in outcomes:
        result = inline(outcome.error or "") if outcome.edit is None else edit_line(outcome.edit)
        table.add_row(line, inline(outcome.key), verdict(outcome.ok), result)
    warned: dict[str, list[int]] = {}
    for edit in {outcome.edit.id: outcome.edit for _, outcome in outcomes if outcome.edit is not None}.values():
        for warning in dict.fromkeys((*edit.report.warnings, *edit.warnings)):
            warned.setdefault(warning, []).append(edit.id)
    of = {said: f"edit {ids[0]}" if len(ids) == 1 else f"{len(ids)} edits" for said, ids in warned.items()}
    return Group(table, *warnings_view(f"{of[said]}: {said}" for said in warned))


def found_table(rows: Sequence[tuple[str, str, str, str]]) -> RenderableType:
    """Return what an import would do: line (or record), key, text, and why not."""
    table = _table(">line", "key", "!fine", "text")
    for line, key, text, error in rows:
        table.add_row(line, inline(key), verdict(not error), inline(error, "yellow") if error else inline(text))
    return table


def verify_view(report: VerifyReport) -> Group:
    """Return what `verify` checked and each disagreement it found."""
    depth = "every byte re-read" if report.deep else "rows, files and hashes"
    depth += ", the weights replayed" if report.replayed else ""
    checked = f"{report.edits} edits, {report.facts} facts, {report.deltas} deltas checked ({depth})"
    repairs: list[RenderableType] = []
    if report.repairs:
        done = _table("!repair", "what", "where")
        for repair in report.repairs:
            said = Text("done", style="green") if repair.done else Text("needs --yes", style="yellow")
            done.add_row(said, inline(repair.what), inline(repair.where))
        repairs = [done, Text()]
    if not report.problems:
        return Group(*repairs, Text.assemble(("ok: ", "green"), checked))
    table = _table("!severity", "what", "where")
    for problem in report.problems:
        style = "red" if problem.severity == "error" else "yellow"
        table.add_row(Text(problem.severity, style=style), inline(problem.what), inline(problem.where))
    mark = ("ok, with warnings: ", "yellow") if report.ok else ("not ok: ", "red")
    return Group(*repairs, Text.assemble(mark, checked), table)


def gc_view(report: GcReport) -> Group:
    """Return what was removed, or would be."""
    verb = "would be removed" if report.dry_run else "removed"
    total = Text(f"{len(report.garbage)} things {verb}, {size(report.bytes)}")
    if not report.garbage:
        return Group(Text("nothing to remove", style="green"))
    table = _table("what", "where", ">size")
    for item in report.garbage:
        table.add_row(inline(item.what), inline(item.where), size(item.bytes))
    return Group(total, table)


def export_view(result: ExportResult) -> Group:
    """Return where an export lies and whether it answered as the knowledge base does."""
    lines: list[RenderableType] = [
        Text.assemble(
            ("exported ", "bold"), f"{result.format} to ", inline(result.path, "bold"), f", {size(result.bytes)} in ",
            f"{len(result.files)} file{'s' if len(result.files) != 1 else ''}",
        )
    ]  # fmt: skip
    if result.verified and result.format == "facts":
        lines.append(Text("read again, the same facts", style="green"))
    elif result.verified:
        agreement = "" if result.agreement is None else f", agreement {result.agreement:.2f}"
        lines.append(Text(f"re-loaded and asked {result.probes} questions{agreement}", style="green"))
    else:
        lines.append(Text("not re-loaded (--no-verify)", style="yellow"))
    return Group(*lines)


def mapping_view(rows: Mapping[str, object]) -> RenderableType:
    """Return names and values in two columns; nested mappings are indented."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(inline(name.replace("_", " ")), _value(name, value))
    return Padding(table, (0, 0, 0, 2), expand=False)


def _value(name: str, value: object) -> RenderableType:
    if isinstance(value, Mapping):
        return mapping_view({str(k): v for k, v in value.items()})
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    if isinstance(value, int) and (name == "bytes" or name.endswith("_bytes")):
        return Text(size(value))
    if isinstance(value, (list, tuple)):
        return inline(", ".join(str(item) for item in value) or "–")
    return inline("–" if value is None else value)


def models_table(models: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return the registered models: name, description, licence, download and disk size, whether the cache has it."""
    table = _table("!name", "what", "license", ">download", ">on disk", "!in cache")
    for model in models:
        table.add_row(
            inline(model.get("name", ""), "bold"),
            inline(model.get("what", "")),
            inline(model.get("license", "")),
            *(size(model[name]) if model.get(name) else "–" for name in ("download_bytes", "disk_bytes")),
            "–" if model.get("cached") is None else verdict(bool(model["cached"])),
        )
    return table


def comparison_table(
    rows: Iterable[tuple[str, str, str, str, str]], *, columns: tuple[str, str], title: str | None = None
) -> Table:
    """Return answers side by side: (kind, question, earlier answer, later answer, verdict in a word or two)."""
    table = _table("!kind", "question", *columns, "!verdict", title=title)
    for kind, question, earlier, later, word in rows:
        table.add_row(
            inline(kind), inline(question), inline(earlier, "dim"), inline(later), inline(word, _VERDICT.get(word, ""))
        )
    return table


def drift_table(report: Report, *, title: str = "Drift against the base model") -> Table:
    """Return the drift metrics (drift_kl, ppl_ratio, qa_delta, …), each with its n."""
    return metrics_table(report.metrics, title=title)


def document_view(document: Document, *, answers: bool = False) -> Group:
    """Return a measured report: findings, gate, tables, and the questions that did not pass with their answers.

    Args:
        document: The report.
        answers: Show every question with its answer, not only those that did not pass.
    """
    parts: list[RenderableType] = [inline(document.title, "bold"), *(inline(f) for f in document.findings)]
    parts += [_check_line(check) for check in document.checks]
    parts += warnings_view(document.warnings)
    passing = 0
    for section in document.sections:
        if section.table is not None and section.table.rows and (answers or not section.minor):
            parts += [Text(""), _section_table(section.title, section.table), inline(section.note, "dim")]
        if isinstance(section.figure, Lines | Bars):
            head, *lines = in_text(section.figure)
            parts += [Text(""), inline(head, "dim"), *map(inline, lines)]
        listed = [entry for entry in section.entries if answers or not entry.passed or entry.note]
        passing += len(section.entries) - len(listed)
        if listed:
            parts += [Text(""), _entries_table(section.title, listed)]
    if passing:
        parts.append(Text(f"{passing} answers that passed are not shown; --answers shows them.", style="dim"))
    return Group(*parts)


def _check_line(check: GateCheck) -> Text:
    mark = ("gate holds: ", "green") if check.passed else ("gate fails: ", "bold red")
    said = f"{check.metric} {number(check.value)}, {check.sense} {number(check.limit)} (n={check.n})"
    return Text.assemble(mark, inline(said))


def _section_table(title: str, given: DocumentTable) -> Table:
    table = _table(*given.columns, title=neutral(title, keep=""))
    for row in given.rows:
        table.add_row(*(inline(cell) for cell in row))
    return table


def _entries_table(title: str, entries: Sequence[Entry]) -> Table:
    """One row per text, so that both answers of a change stand under each other."""
    table = _table(
        "!kind", "question", "!which", "text", ">score", "!scorer", "!verdict", title=neutral(title, keep="")
    )
    for entry in entries:
        word = entry.note or {True: "passed", False: "not passed", None: ""}[entry.passed]
        style = {True: "green", False: "red", None: ""}[entry.passed]
        for place, (label, text) in enumerate(entry.texts):
            first = place == 0
            table.add_row(
                inline(entry.kind if first else ""),
                inline(entry.question if first else ""),
                inline(label, "dim"),
                inline(text),
                entry.score if first else "",
                inline(entry.scorer if first else ""),
                Text(word if first else "", style=style),
            )
    return table
