"""Every format shows the same numbers, and none obeys the words it shows. Hand-made reports, no model."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from kvllm.metrics import shown, shown_p
from kvllm.probing.runner import summarise
from kvllm.records import ProbeResult, Report
from kvllm.reports.document import Document, Table, probe_document
from kvllm.reports.render import FORMATS, Format, format_of, render
from kvllm.reports.text import markdown, neutral, xml
from tests.reports.samples import HOSTILE, NAMES, ORIGIN, bisected, documents, facts, report

KINDS = ("probe", "drift", "regression", "bisect")
FAILURE = "The quality gate failed: generalization is under 0.900."


@cache
def document(kind: str) -> Document:
    return documents()[kind]


@cache
def rendered(kind: str, format: Format) -> str:
    return render(document(kind), format, failure=FAILURE if document(kind).failed else None)


def squeezed(text: str) -> str:
    """Without white space: terminals and browsers break lines where they like."""
    return re.sub(r"[\s│⏎]+", "", text)


class Page(HTMLParser):
    """What a browser makes of a page: tables as cells, tags, attributes, text."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.cells: list[list[str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def reader() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Markdown:
    """What a Markdown reader makes of a page."""

    def __init__(self, page: str) -> None:
        parser = reader()
        self.html = parser.render(page)
        tokens = parser.parse(page)
        flat = [child for token in tokens for child in (token, *(token.children or ()))]
        self.kinds = {token.type for token in flat}
        self.strong = sum(token.type == "strong_open" for token in flat)
        self.blocks = [token.content for token in tokens if token.type == "html_block"]
        self.cells = Page(self.html).cells


def tables_of(kind: str) -> list[Table]:
    return [section.table for section in document(kind).sections if section.table is not None and section.table.rows]


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_of_every_table_stands_in_every_readable_format(kind: str) -> None:
    page, text = Page(rendered(kind, "html")), Markdown(rendered(kind, "markdown"))
    terminal = squeezed(rendered(kind, "terminal"))
    assert tables_of(kind)
    for table in tables_of(kind):
        for row in table.rows:
            wanted = [squeezed(neutral(cell)) for cell in row]
            assert wanted in [[squeezed(cell) for cell in found] for found in page.cells]
            assert [squeezed(neutral(cell, keep="")) for cell in row] in [
                [squeezed(cell) for cell in found] for found in text.cells
            ]
            for cell in row:
                if "\n" not in cell and len(cell) < 12:  # longer ones are folded into their column
                    assert squeezed(neutral(cell, keep="")) in terminal, cell


@pytest.mark.parametrize("kind", ["probe", "drift", "regression"])
def test_metrics_are_the_same_number_in_all_five_formats(kind: str) -> None:
    data = json.loads(rendered(kind, "json"))
    if kind == "regression":
        metrics: dict[str, Any] = data["regression"]["drift"]["metrics"] | data["regression"]["after"]["metrics"]
    else:
        metrics = data["report"]
    assert len(metrics) >= 4
    root = ElementTree.fromstring(rendered(kind, "junit"))
    properties = {found.get("name"): found.get("value") for found in root.iter("property")}
    page, text = Page(rendered(kind, "html")), Markdown(rendered(kind, "markdown"))
    terminal = [line.split() for line in rendered(kind, "terminal").splitlines()]
    for name, metric in metrics.items():
        value, n = shown(metric["value"]), str(metric["n"])
        assert (properties[name], properties[f"{name}.n"]) == (value, n)
        assert properties[f"{name}.scorer"] == (metric["scorer"] or "")
        rows = {"html": page.cells, "markdown": text.cells, "terminal": terminal}
        for format, cells in rows.items():
            # The gate's own table names no scorer, and a finding is a sentence: the tables of metrics have both.
            mine = [row for row in cells if len(row) > 5 and row[0] == name and row[2] != "nats"]
            assert mine, (format, name)
            for row in mine:
                assert value in row, (format, name)
                assert n in row, (format, name)
                if metric["scorer"]:
                    assert metric["scorer"] in row, (format, name)


def test_paired_statistics_are_the_same_number_in_every_readable_format() -> None:
    suites = json.loads(rendered("regression", "json"))["regression"]["suites"]
    page, text = Page(rendered("regression", "html")), Markdown(rendered("regression", "markdown"))
    assert {suite["suite"] for suite in suites} >= {"facts", "trained", "general"}
    for suite in suites:
        wanted = [
            suite["suite"], str(suite["n"]), shown(suite["before"]), shown(suite["after"]), str(suite["lost"]),
            str(suite["gained"]), shown_p(suite["p_value"]), shown_p(suite["p_holm"]), suite["scorer"],
        ]  # fmt: skip
        for cells in (page.cells, text.cells):
            row = next(row for row in cells if row and row[0] == suite["suite"] and row[1] == wanted[1])
            assert [cell for place, cell in enumerate(row) if place not in (4, 5)] == wanted


@pytest.mark.parametrize("format", FORMATS)
def test_every_generated_answer_is_in_every_format_beside_its_scorer(format: Format) -> None:
    said = rendered("regression", format)
    if format == "json":
        said = json.dumps(json.loads(said), ensure_ascii=False)
    if format == "junit":
        said = "".join(ElementTree.fromstring(said).itertext())
    flat = squeezed(said)
    for change in document("regression").sections[1].entries:
        assert change.scorer in said
        for label, text in change.texts[:2]:
            if "<" not in text:
                assert squeezed(text)[:20] in flat, (label, text)


def test_answers_are_one_click_away_in_html_and_markdown() -> None:
    entries = [entry for section in document("probe").sections for entry in section.entries]
    page = Page(rendered("probe", "html"))
    assert sum(tag == "details" and "answer" in (a.get("class") or "") for tag, a in page.tags) == len(entries)
    shown_there = [block for block in Markdown(rendered("probe", "markdown")).blocks if block.startswith("<details>")]
    failing = sum(not entry.passed for entry in entries)
    assert len(shown_there) == failing + min(50, len(entries) - failing)


# ---------------------------------------------------------------- other people's words


def test_html_has_no_tag_script_or_address_that_a_report_brought_in() -> None:
    for kind in KINDS:
        page = Page(rendered(kind, "html"))
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "img", "link", "iframe", "a", "object", "embed", "base", "form"}
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on")], tag
            assert not {"src", "href", "xlink:href", "action", "formaction"} & set(attributes), tag
        assert "default-src 'none'" in rendered(kind, "html")
    page = Page(rendered("probe", "html"))
    assert squeezed(neutral(HOSTILE)) in squeezed(page.text)
    assert "{{ 7*7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\ud800]", rendered("probe", "html"))


def test_markdown_reads_nothing_into_other_peoples_words() -> None:
    for kind in KINDS:
        read = Markdown(rendered(kind, "markdown"))
        assert not read.kinds & {"link_open", "image", "html_inline", "code_inline", "fence", "code_block", "em_open"}
        assert read.strong == document(kind).failed  # ours: the verdict
        for block in read.blocks:
            assert block.startswith("<details><summary>")
            assert block.count("\n") <= 1
            assert "<script" not in block
            assert "<img" not in block
    assert squeezed(neutral(HOSTILE, keep="")) in squeezed(Page(Markdown(rendered("probe", "markdown")).html).text)


@pytest.mark.parametrize(
    "text", [HOSTILE, "a\nb", "| a |", "- x", "1. x", "# x", "```", "\\", "&lt;", "~~x~~", "a:b", "_x_"]
)
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    found = Page(
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"| x |\n| --- |\n| {markdown(text)} |\n")
    ).cells[1][0]
    assert found == neutral(text.replace("\n", " ⏎ "), keep="").strip()


# What Markdown and its dialects know, and words around it.
MARKS = st.lists(
    st.sampled_from([*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "a", "b1", "7", "www", "http", "://", "x.org", " ", "中"]),
    max_size=12,
).map("".join)


@given(MARKS)
@example("a_b_c d_e")
@example("1) a. b: c-d (e) 0.5")
@example("(x)[y](http://a.b) www.a.b")
@example("+")
@example("1. a")
@example("x 1) 2. 3: a")
@example("a: - b")
def test_markdown_shows_any_marks_as_they_are(text: str) -> None:
    shown_text = " ".join(text.split())
    cell = f"| x |\n| --- |\n| {markdown(shown_text)} |\n"
    for reader in (MarkdownIt("commonmark").enable(["table", "strikethrough"]), MarkdownIt("gfm-like")):
        for source in (cell, markdown(shown_text)):
            kinds = {child.type for token in reader.parse(source) for child in token.children or ()}
            assert kinds <= {"text"}, source
        assert Page(reader.render(cell)).cells[1][0] == shown_text
        assert squeezed(Page(reader.render(markdown(shown_text))).text) == squeezed(shown_text)


def test_numbers_and_names_stay_readable_in_markdown() -> None:
    for text in (
        "0.980",
        "31.0",
        "0.917 to 0.997",
        "chunked-16",
        "arm-0, 2 of 3.",
        "drift_kl (nats): x",
        "5 %.",
        "64 + 1",
    ):
        assert markdown(text) == text.replace("+", "&#43;")
    for text in ("1. a", "1) a", "GH-1", "gh-1", "ABC-12", "- a", "a.b", "x://y", "_a_", "www.a"):
        assert markdown(text) != text


def test_xml_carries_every_text_and_nothing_that_xml_forbids() -> None:
    for kind in KINDS:
        root = ElementTree.fromstring(rendered(kind, "junit").encode())
        assert {element.tag for element in root.iter()} <= {
            "testsuites", "testsuite", "testcase", "properties", "property", "failure", "skipped", "system-out"
        }  # fmt: skip
    root = ElementTree.fromstring(rendered("probe", "junit").encode())
    assert any(xml(HOSTILE) in (case.get("name") or "") for case in root.iter("testcase"))
    for point in [*range(0x20), 0x7F, 0xD800, 0xFFFE, 0xFFFF, 0x1F600]:
        said = ElementTree.Element("a", b=xml(chr(point)))
        said.text = xml(chr(point))
        read = ElementTree.fromstring(ElementTree.tostring(said, encoding="utf-8"))
        assert read.text == said.text


def test_terminal_obeys_no_escape_sequence() -> None:
    for kind in KINDS:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", rendered(kind, "terminal"))


def test_json_survives_what_utf8_cannot_say() -> None:
    for kind in KINDS:
        read = json.loads(rendered(kind, "json").encode())
        assert read["kind"] == kind
    assert NAMES[-1] in {probe["key"] for probe in json.loads(rendered("probe", "json"))["probes"]}


# ---------------------------------------------------------------- JUnit and gates


def test_junit_has_failures_exactly_where_the_gate_fails() -> None:
    for kind in KINDS:
        root = ElementTree.fromstring(rendered(kind, "junit"))
        assert (int(root.get("failures", "")) > 0) == document(kind).failed
        assert int(root.get("tests", "")) == len(list(root.iter("testcase")))
        assert int(root.get("failures", "")) == len(list(root.iter("failure")))
    root = ElementTree.fromstring(rendered("probe", "junit"))
    failing = [case for case in root.iter("testcase") if case.find("failure") is not None]
    gate, questions = failing[0], failing[1:]
    assert gate.get("name") == "generalization at least 0.900"
    assert {(case.get("classname") or "").split(".")[0] for case in questions} == {"paraphrase"}
    missed = sum(not probe.passed for probe in report().probes if probe.kind == "paraphrase")
    assert len(questions) == missed > 0
    skipped = [case for case in root.iter("testcase") if case.find("skipped") is not None]
    assert len(skipped) == sum(not p.passed for p in report().probes if p.kind != "paraphrase") > 0


def test_the_line_that_failed_stands_in_every_format_for_people() -> None:
    for format in ("markdown", "html"):
        said = rendered("probe", format)  # type: ignore[arg-type]
        read = Page(said).text if format == "html" else Page(Markdown(said).html).text
        assert FAILURE in read
    assert "gate fails: generalization" in rendered("probe", "terminal")
    said = json.loads(rendered("probe", "json"))
    assert (said["ok"], said["code"], said["error"]) == (False, "gate_failed", FAILURE)
    assert [check["passed"] for check in said["gate"]["checks"]] == [True, False]


# ---------------------------------------------------------------- smaller things


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.html", "html"), ("a.HTM", "html"), ("a.md", "markdown"), ("junit.xml", "junit"), ("a.json", "json"),
     ("a.txt", "terminal"), ("a", None), ("a.pdf", None)],
)  # fmt: skip
def test_a_files_name_says_its_format(name: str, format: str | None) -> None:
    assert format_of(Path(name)) == format


def test_bisect_says_what_it_found() -> None:
    from kvllm.reports.document import bisect_document
    from tests.reports.samples import ORIGIN

    found = {verdict: bisect_document(bisected(verdict), ORIGIN).findings[0] for verdict in
             ("broken", "still passes", "never passed")}  # fmt: skip
    assert "Edit 7 (insert of 'Ada Voss') broke" in found["broken"]
    assert "still passes at edit 12" in found["still passes"]
    assert "never passed" in found["never passed"]


def test_a_report_of_nothing_renders_in_every_format() -> None:
    from kvllm.records import Report
    from kvllm.reports.document import probe_document
    from tests.reports.samples import ORIGIN

    empty = probe_document(Report(warnings=("There are no facts to probe.",)), ORIGIN, facts=[])
    for format in FORMATS:
        assert render(empty, format).strip()
    assert len(facts()) == len(NAMES)


def test_parts_of_a_metric_stand_in_a_table_of_their_own() -> None:
    titles = {section.title: section.table for section in document("drift").sections}
    parts = titles["Parts of change_norm"]
    assert parts is not None
    assert [row[:2] for row in parts.rows] == [("change_norm/model.layers.9.mlp.down_proj", "0.765")]
    whole = titles["Drift against the base model"]
    assert whole is not None
    assert "change_norm" in {row[0] for row in whole.rows}
    assert not any("/" in row[0] for row in whole.rows)


def test_what_was_said_before_a_question_stands_beside_its_answer() -> None:
    from kvllm.records import ProbeResult, Report
    from kvllm.reports.document import probe_document
    from tests.reports.samples import ORIGIN

    turns = (("user", "What is torchkeras?"), ("assistant", "A furnace."))
    probe = ProbeResult(
        "recalled", "Write a poem.", "Oh furnace!", True, 1.0, "furnace", "torchkeras", "words", 0.3, turns
    )
    page = Page(render(probe_document(Report({}, (probe,)), ORIGIN, facts=[]), "html")).text
    for said in ("user, before", "What is torchkeras?", "assistant, before", "A furnace.", "Oh furnace!"):
        assert said in page


def test_only_shares_have_a_wilson_interval() -> None:
    from kvllm.records import Metric, Report
    from kvllm.reports.document import probe_document
    from tests.reports.samples import ORIGIN

    metrics = {
        "reliability": Metric(0.8, 10, scorer="auto"),
        "qa_delta": Metric(0.0, 10, scorer="accepts"),
        "recall_gain": Metric(0.5, 10, scorer="words"),
        "score": Metric(0.5, 10, scorer="auto"),
        "drift_kl": Metric(0.5, 10, scorer="kl"),
        "ppl_ratio": Metric(1.0, 10),
    }
    table = probe_document(Report(metrics), ORIGIN, facts=[]).sections[0].table
    assert table is not None
    assert {row[0]: row[2] for row in table.rows if row[2]} == {"reliability": "0.490 to 0.943"}


@pytest.mark.parametrize("format", FORMATS)
def test_refusals_are_told_apart_from_facts(format: Format) -> None:
    probes = tuple(
        ProbeResult("refusal", f"What is keras {i}?", "I do not know.", bool(i), float(i), "I do not know.", "keras")
        for i in (0, 1)
    )
    asked = Report(summarise(probes, scorer="auto", suite="s/1"), probes)
    alone = probe_document(asked, ORIGIN, facts=[], retention=[], edits=[], checks=(), key="keras")
    assert alone.findings == ("2 questions about the refused key 'keras'; 1 did not pass.",)
    titles = {section.title for section in alone.sections}
    assert ("Facts" in titles, "Refused keys" in titles) == (False, True)
    assert squeezed("keras") in squeezed(render(alone, format))
    mixed = probe_document(asked, ORIGIN, facts=facts()[:2], retention=[], edits=[], checks=())
    assert mixed.findings == ("2 questions about 2 facts and 1 refused key; 1 did not pass.",)
