"""A report's document in any of the five formats, as text. Each format's library is imported when it is asked for.

Path("report.html").write_text(render(document, "html"), encoding="utf-8")
"""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal, get_args

from kvllm.reports.text import finite

if TYPE_CHECKING:
    from kvllm.reports.document import Document

Format = Literal["terminal", "json", "markdown", "junit", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {
    ".json": "json",
    ".md": "markdown",
    ".markdown": "markdown",
    ".xml": "junit",
    ".html": "html",
    ".htm": "html",
    ".txt": "terminal",
}
_TEXT_WIDTH = 160


def format_of(path: PurePath) -> Format | None:
    """Return the format that a file's name asks for, or None where it asks for none."""
    return SUFFIXES.get(path.suffix.lower())


def render(document: Document, format: Format, *, failure: str | None = None) -> str:
    """Return the report as text.

    Args:
        document: The report.
        format: One of `FORMATS`.
        failure: The line that says which rule of the gate did not hold.
    """
    if format == "json":
        data = finite(document.json(failure))
        told = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False)
        # A lone surrogate has no UTF-8; JSON can still say it.
        return (told if _encodable(told) else json.dumps(data, indent=2, allow_nan=False)) + "\n"
    if format == "markdown":
        from kvllm.reports.markdown import markdown_page

        return markdown_page(document, failure=failure)
    if format == "junit":
        from kvllm.reports.junit import junit_file

        return junit_file(document)
    if format == "html":
        from kvllm.reports.page import html_page

        return html_page(document, failure=failure)
    import io

    from rich.console import Console

    from kvllm.reports.terminal import document_view

    stream = io.StringIO()
    Console(file=stream, width=_TEXT_WIDTH, highlight=False, markup=False).print(document_view(document, answers=True))
    return "".join(line.rstrip() + "\n" for line in stream.getvalue().splitlines())


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
