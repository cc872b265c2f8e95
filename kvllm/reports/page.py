"""A report as one HTML file: no script, no other file, nothing fetched; plots are SVG in the page's own colours.

Everything in it is other people's words: jinja2 escapes it all, and the page's own policy forbids scripts anyway.

    html_page(document)     # '<!doctype html>…'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from kvllm.metrics import shown
from kvllm.reports.document import Document, Entry
from kvllm.reports.plots import Bars, Lines, Matrix, Strip, distance_strip
from kvllm.reports.text import neutral

if TYPE_CHECKING:
    from jinja2 import Template


@dataclass(frozen=True)
class Group:
    """The questions about one fact; open where there is little to open, or something to see."""

    name: str
    entries: tuple[Entry, ...]
    count: str
    open: bool
    strip: Strip | None


def html_page(document: Document, *, failure: str | None = None) -> str:
    """Return the whole page.

    Args:
        document: The report.
        failure: The line that says which rule of the gate did not hold.
    """
    return _template().render(document=document, failure=failure) + "\n"


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kvllm.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Control characters and overrides of the reading direction would be obeyed by a browser, too.
        finalize=lambda value: neutral(value) if type(value) is str else value,
    )
    environment.filters["shown"] = shown
    environment.filters["groups"] = _groups
    environment.tests["bars"] = lambda figure: isinstance(figure, Bars)
    environment.tests["lines"] = lambda figure: isinstance(figure, Lines)
    environment.tests["matrix"] = lambda figure: isinstance(figure, Matrix)
    return environment.get_template("page.html.j2")


def _groups(entries: Sequence[Entry]) -> list[Group]:
    """Return the questions by fact, in the order of the report; within a fact those that did not pass come first."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.group, []).append(entry)
    changes = any(entry.note for entry in entries)
    return [
        Group(
            name,
            tuple(sorted(mine, key=lambda entry: bool(entry.passed))),
            _count(mine),
            changes or len(by_name) == 1,
            distance_strip([(e.distance, bool(e.passed), e.question) for e in mine if e.distance is not None]),
        )
        for name, mine in by_name.items()
    ]


def _count(entries: Sequence[Entry]) -> str:
    passed = sum(bool(entry.passed) for entry in entries)
    if any(entry.note for entry in entries):
        return f"{len(entries) - passed} lost, {passed} gained"
    return f"{passed} of {len(entries)} passed"
