"""A report as Markdown, for a pull request or a wiki: tables, and each answer folded into a `<details>`.

GitHub's dialect. Other people's words are escaped by `text.markdown`, or stand in a `<pre>` escaped as HTML.

    markdown_page(document)     # '# What the model knows\\n…'
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from kvllm.metrics import shown
from kvllm.reports.document import Document, Entry, Table
from kvllm.reports.plots import Bars, Lines, in_text
from kvllm.reports.text import markdown, neutral

# GitHub cuts a comment at 65,536 characters: failing answers come first, and the rest stays in the other formats.
_MOST_PASSING = 50


def markdown_page(document: Document, *, failure: str | None = None) -> str:
    """Return the whole report."""
    parts = [f"# {markdown(document.title)}", *(markdown(finding) for finding in document.findings)]
    if document.checks:
        parts += [f"**{markdown(failure or 'The quality gate holds.')}**", _checks(document)]
    parts += [f"> ⚠ {markdown(warning)}" for warning in document.warnings]
    for section in document.sections:
        if not (section.note or section.entries or (section.table and section.table.rows)):
            continue
        parts.append(f"## {markdown(section.title)}")
        if section.note:
            parts.append(markdown(section.note))
        if section.table is not None and section.table.rows:
            parts.append(table(section.table))
        if isinstance(section.figure, Lines | Bars):
            parts.append(_text_plot(section.figure))
        parts += _entries(section.entries)
    origin = document.origin
    parts.append("## Where it was measured")
    rows = [
        ("knowledge base", origin.path),
        ("base model", origin.model),
        ("base digest", origin.base_digest),
        ("head", str(origin.head)),
        ("facts", str(origin.facts)),
        ("kvllm", origin.kvllm),
        ("made", origin.made),
    ]
    rows = list(document.measured) or rows
    parts.append(table(Table(("", ""), tuple(rows))))
    return "\n\n".join(parts) + "\n"


def table(given: Table) -> str:
    """Return a table; number columns are right-aligned."""
    head = [markdown(name.lstrip(">")) for name in given.columns]
    rule = ["---:" if name.startswith(">") else "---" for name in given.columns]
    lines = [head, rule, *([markdown(cell) for cell in row] for row in given.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text_plot(figure: Lines | Bars) -> str:
    """A plot as a block of plain text: Markdown shows no SVG that stands in the page itself."""
    inside = "&#10;".join(html.escape(neutral(line, keep="")) for line in in_text(figure))
    return f"<pre>{inside}</pre>"


def _checks(document: Document) -> str:
    rows = tuple(
        (
            check.metric,
            shown(check.value),
            f"{check.sense} {shown(check.limit)}",
            str(check.n),
            "yes" if check.passed else "NO",
        )
        for check in document.checks
    )
    return table(Table(("gate", ">value", ">limit", ">n", "holds"), rows))


def _entries(entries: Sequence[Entry]) -> list[str]:
    failing = [entry for entry in entries if not entry.passed]
    passing = [entry for entry in entries if entry.passed]
    parts = [_details(entry) for entry in [*failing, *passing[:_MOST_PASSING]]]
    if len(passing) > _MOST_PASSING:
        parts.append(f"… and {len(passing) - _MOST_PASSING} more that passed.")
    return parts


def _details(entry: Entry) -> str:
    mark = {True: "✅", False: "❌", None: "·"}[entry.passed]
    words = [entry.note, entry.score, f"({entry.scorer})", entry.kind, entry.group, entry.question]
    summary = html.escape(neutral(" · ".join(word for word in words if word), keep=""))
    texts = "".join(
        f"<p>{html.escape(label)}:</p><pre>{html.escape(neutral(text))}</pre>" for label, text in entry.texts
    )
    # No blank line may stand inside: it would end the HTML block, and what follows would be read as Markdown.
    inside = texts.replace("\n", "&#10;")
    return f"<details><summary>{mark} {summary}</summary>{inside}</details>"
