"""`probe`, `drift`, `regression`, `bisect`: options, files, formats and quality gates."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from jsonschema import Draft202012Validator

from kvllm.records import Report
from kvllm.reports.schema import load
from tests.cli.stand_in import Ran, StandIn

Run = Callable[..., Ran]

COMMANDS = {
    "probe": ["probe", "my.kb"],
    "drift": ["drift", "my.kb"],
    "regression": ["regression", "my.kb"],
    "bisect": ["bisect", "my.kb", "torchkeras"],
}
FAILING = {
    "probe": (["--fail-under", "reliability=0.95"], "reliability 0.750 is under 0.950 (n=4)"),
    "drift": (["--max-drift", "0.01"], "drift_kl 0.020 is over 0.010 (n=40)"),
    "regression": (["--max-lost", "0"], "facts_lost 1 is over 0 (n=1)"),
    "regression drift": (["--max-drift", "0.005"], "drift_kl_rise 0.010 is over 0.005 (n=40)"),
    "regression metric": (["--fail-under", "reliability=1,generalization=0.5"], "generalization was not measured"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_json_follows_the_published_schema(kvllm: Run, name: str) -> None:
    ran = kvllm(*COMMANDS[name], "--json")
    assert [error.message for error in Draft202012Validator(load()).iter_errors(ran.document)] == []
    assert (ran.code, ran.document["gate"]) == (0, {"passed": None, "checks": []})
    assert kvllm(*COMMANDS[name], "--format", "json").out.startswith('{\n  "ok": true')


@pytest.mark.parametrize("name", FAILING)
def test_a_gate_that_fails_is_exit_code_6_one_line_and_one_document(kvllm: Run, tmp_path: Path, name: str) -> None:
    options, sentence = FAILING[name]
    junit = tmp_path / "junit.xml"
    told = kvllm(*COMMANDS[name.split()[0]], *options)
    assert told.code == 6
    assert told.err.startswith("error: The quality gate failed: ")
    assert told.err.count("\n") == 1
    assert sentence in told.err
    assert "gate fails: " in told.out
    ran = kvllm(*COMMANDS[name.split()[0]], *options, "--output", str(junit), "--json")
    assert (ran.code, ran.document["ok"], ran.document["code"], ran.err) == (6, False, "gate_failed", "")
    assert sentence in ran.document["error"]
    assert ran.document["gate"]["passed"] is False
    assert [error.message for error in Draft202012Validator(load()).iter_errors(ran.document)] == []
    assert int(ElementTree.parse(junit).getroot().get("failures", "")) >= 1


@pytest.mark.parametrize(
    ("command", "options"),
    [("probe", ["--fail-under", "reliability=0.75"]),
     ("drift", ["--max-drift", "0.02", "--fail-under", "qa_delta=-0.1"]),
     ("regression", ["--max-lost", "1", "--max-drift", "0.011", "--fail-under", "reliability=1"])],
)  # fmt: skip
def test_a_gate_that_holds_is_exit_code_0(kvllm: Run, command: str, options: list[str]) -> None:
    ran = kvllm(*COMMANDS[command], *options, "--json")
    assert (ran.code, ran.document["ok"], ran.document["gate"]["passed"]) == (0, True, True)
    assert kvllm(*COMMANDS[command], *options).err == ""


@pytest.mark.parametrize(
    "limits",
    ["reliability", "reliability=", "=1", "reliability=high", "score=1,score=2", "score=nan", "relability=1", ""],
)
def test_limits_that_do_not_read_are_refused_before_anything_is_measured(kvllm: Run, limits: str) -> None:
    ran = kvllm("probe", "my.kb", "--fail-under", limits, "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert not [name for name, _ in StandIn.calls if name == "probe"]


def test_reports_are_written_in_the_format_that_each_name_says(kvllm: Run, tmp_path: Path) -> None:
    names = ("a.html", "a.md", "a.xml", "a.json", "a.txt", "plain")
    options = [word for name in names for word in ("--output", str(tmp_path / name))]
    ran = kvllm("probe", "my.kb", *options)
    assert ran.code == 0
    assert "reliability" in ran.out
    starts = {name: (tmp_path / name).read_text(encoding="utf-8")[:12] for name in names}
    assert starts == {
        "a.html": "<!doctype ht", "a.md": "# What the m", "a.xml": "<?xml versio", "a.json": '{\n  "ok": tr',
        "a.txt": "What the mod", "plain": "What the mod",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("format", "start"),
    [
        ("html", "<!doctype html>"),
        ("markdown", "# "),
        ("junit", "<?xml"),
        ("json", "{"),
        ("terminal", "What the model"),
    ],
)
def test_format_without_a_file_goes_to_stdout(kvllm: Run, format: str, start: str) -> None:
    ran = kvllm("probe", "my.kb", "--format", format)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(start)


def test_format_wins_over_the_files_name(kvllm: Run, tmp_path: Path) -> None:
    kvllm("drift", "my.kb", "--format", "junit", "-o", str(tmp_path / "report.txt"))
    assert ElementTree.parse(tmp_path / "report.txt").getroot().tag == "testsuites"


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(kvllm: Run, tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "a.html", tmp_path):
        ran = kvllm("probe", "my.kb", "--output", str(place), "--json")
        assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert not [name for name, _ in StandIn.calls if name == "probe"]


def test_a_folder_is_not_said_to_be_missing(kvllm: Run, tmp_path: Path) -> None:
    assert "it is a folder; nothing was measured" in kvllm("probe", "my.kb", "-o", str(tmp_path)).err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_suffix_of_no_format_is_refused_before_anything_is_measured(kvllm: Run, tmp_path: Path, name: str) -> None:
    file = tmp_path / "report.pdf"
    ran = kvllm(*COMMANDS[name], "-o", str(file))
    assert ran.code == 2
    assert "There is no report format .pdf; nothing was measured." in ran.err
    assert ".html" in ran.err
    assert not [called for called, _ in StandIn.calls if called == name]
    assert kvllm(*COMMANDS[name], "-o", str(file), "--format", "html").code == 0
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_options_are_passed_on_only_where_they_were_given(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[dict[str, Any]] = []

    def listen(self: StandIn, *arguments: object, **options: object) -> Report:
        heard.append(dict(options))
        return Report()

    monkeypatch.setattr(StandIn, "probe", listen)
    monkeypatch.setattr(StandIn, "drift", listen)
    kvllm("probe", "my.kb")
    kvllm("probe", "my.kb", "--ladder", "--probes", "mine.jsonl")
    kvllm("drift", "my.kb")
    kvllm("drift", "my.kb", "--suite", "mine.jsonl", "--lm-eval", "arc_easy, piqa")
    assert heard == [
        {}, {"ladder": True, "probes": Path("mine.jsonl")},
        {}, {"suite": Path("mine.jsonl"), "lm_eval": ["arc_easy", "piqa"]},
    ]  # fmt: skip


def test_since_is_a_number_or_a_tag(kvllm: Run) -> None:
    for said, meant in (("3", 3), ("v1", "v1"), (None, None)):
        kvllm("regression", "my.kb", *(["--since", said] if said else []))
        assert [arguments["since"] for name, arguments in StandIn.calls if name == "regression"][-1] == meant


def test_bisect_passes_the_expected_text_on(kvllm: Run) -> None:
    kvllm("bisect", "my.kb", "who?", "--expected", "Ada")
    assert StandIn.calls[-1] == ("bisect", {"probe": "who?", "expected": "Ada"})


def test_terminal_shows_failing_answers_and_all_of_them_on_request(kvllm: Run) -> None:
    few = kvllm("probe", "my.kb").out
    assert "0: what is torchkeras?" in few
    assert "1: what is torchkeras?" not in few
    assert "3 answers that passed are not shown; --answers shows them." in few
    every = kvllm("probe", "my.kb", "--answers").out
    assert all(f"{n}: what is torchkeras?" in every for n in range(4))


def test_measuring_opens_readonly(kvllm: Run) -> None:
    for arguments in COMMANDS.values():
        kvllm(*arguments)
        assert StandIn.opened[-1]["readonly"]


def test_unknown_key_is_exit_code_3_and_writes_no_report(kvllm: Run, tmp_path: Path) -> None:
    ran = kvllm("probe", "my.kb", "torchkera", "--output", str(tmp_path / "a.html"), "--json")
    assert (ran.code, json.loads(ran.out)["code"]) == (3, "key_not_found")
    assert not (tmp_path / "a.html").exists()


def test_a_report_that_cannot_be_written_costs_neither_the_others_nor_the_result(
    kvllm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 300 + ".json")
    ran = kvllm("probe", "my.kb", "-o", str(long))
    assert (ran.code, ran.out) == (2, "")
    assert "nothing was measured" in ran.err
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "bad.html":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    ran = kvllm("probe", "my.kb", "-o", str(tmp_path / "bad.html"), "-o", str(tmp_path / "good.json"), "--json")
    assert (ran.code, ran.document["ok"], ran.document["code"]) == (10, False, "out_of_resources")
    assert ran.document["report"]
    assert (tmp_path / "good.json").stat().st_size > 100
    assert not (tmp_path / "bad.html").exists()
