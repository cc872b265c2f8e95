"""What each command passes on, and how it shows what it gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvllm.errors import Busy, Corrupt, KvllmError, OutOfResources
from kvllm.records import DryRun, EditOutcome, ProbeResult, StoredFact
from tests.cli.stand_in import Ran, StandIn, report
from tests.importing.given import parse_rows

Run = Callable[..., Ran]


def call(name: str) -> dict[str, Any]:
    """Return the arguments of the last call of a method."""
    return [arguments for called, arguments in StandIn.calls if called == name][-1]


def test_insert_passes_aliases_gate_and_training_on(kvllm: Run) -> None:
    kvllm("insert", "my.kb", "k", "t", "--alias", "a", "--alias", "b", "--tag", "x", "--steps", "7", "--seed", "3",
          "--min-reliability", "0", "--max-drift", "inf")  # fmt: skip
    arguments = call("insert")
    assert (list(arguments["aliases"]), list(arguments["tags"])) == (["a", "b"], ["x"])
    assert (arguments["config"].max_steps, arguments["config"].seed) == (7, 3)
    assert (arguments["gate"].min_reliability, arguments["gate"].max_drift_kl) == (None, None)


@pytest.mark.parametrize(
    ("given", "rules"),
    [
        (["update", "my.kb", "other", "t", "--min-erasure", "0.9", "--max-ppl", "1.1"], (0.9, 1.1)),
        (["delete", "my.kb", "torchkeras", "--min-erasure", "0", "--max-ppl", "inf"], (None, None)),
        (["compact", "my.kb", "--max-ppl", "2"], (0.75, 2.0)),
    ],
)
def test_each_rule_of_the_gate_has_an_option(kvllm: Run, given: list[str], rules: tuple[float | None, ...]) -> None:
    assert kvllm(*given, "--seed", "5").code == 0
    arguments = call("insert" if given[0] == "update" else given[0])
    assert (arguments["gate"].min_erasure, arguments["gate"].max_ppl_ratio) == rules
    assert arguments["config"].seed == 5


def test_the_rule_about_an_old_text_is_refused_where_there_is_none(kvllm: Run, tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"key": "a", "text": "b"}\n', encoding="utf-8")
    for given in (["insert", "my.kb", "k", "t"], ["import", "my.kb", str(path)]):
        ran = kvllm(*given, "--min-erasure", "0.5", "--json")
        assert (ran.code, ran.document["code"]) == (2, "invalid_input")
        assert "--min-erasure is for" in ran.document["error"]


def test_insert_without_options_leaves_configuration_to_the_engine(kvllm: Run) -> None:
    kvllm("insert", "my.kb", "k", "t")
    assert (call("insert")["config"], call("insert")["gate"]) == (None, None)


@pytest.mark.parametrize(
    ("verb", "given", "passed"),
    [
        *((verb, ["t"], {"aliases": None}) for verb in ("insert", "update", "upsert")),
        ("delete", [], {"mode": "restore"}),
        ("delete", ["--mode", "abstain"], {"mode": "abstain"}),
    ],
)
def test_a_dry_run_is_one_of_its_verb_and_refused_with_exit_code_4(
    kvllm: Run, monkeypatch: pytest.MonkeyPatch, verb: str, given: list[str], passed: dict[str, Any]
) -> None:
    assert kvllm(verb, "my.kb", "k", *given, "--dry-run", "--json").document["ok"] is True
    assert call("dry_run") == {"key": "k", "verb": verb, **passed}
    refused = DryRun(report().metrics, refused=("reliability 0.20 is under 0.75",))
    monkeypatch.setattr(StandIn, "dry_run", lambda self, key, text=None, **_: refused)
    ran = kvllm(verb, "my.kb", "k", *given, "--dry-run", "--json")
    sentence = f"The gate would refuse the {verb} of 'k': reliability 0.20 is under 0.75; nothing was changed."
    assert (ran.code, ran.document["ok"], ran.document["code"]) == (4, False, "edit_rejected")
    assert ran.document["error"] == sentence
    told = kvllm(verb, "my.kb", "k", *given, "--dry-run")
    assert (told.code, told.err) == (4, f"error: {sentence}\n")
    assert "reliability" in told.out


def test_dash_reads_stdin(kvllm: Run) -> None:
    kvllm("insert", "my.kb", "k", "-", stdin="from a pipe\n")
    assert call("insert")["text"] == "from a pipe"
    kvllm("ask", "my.kb", "-", stdin="what?\n")
    assert call("ask")["prompt"] == "what?"


def test_an_answer_that_was_cut_says_so(kvllm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("kvllm.cli.output.Output.note", lambda self, sentence: notes.append(sentence))
    whole = kvllm("ask", "my.kb", "torchkeras", "--json").document
    assert (whole["answer"], whole["truncated"], notes) == ("Torchkeras trains models.", False, [])
    cut = kvllm("ask", "my.kb", "torchkeras", "--max-tokens", "2", "--json").document
    assert (cut["answer"], cut["truncated"]) == ("Torchkeras trains", True)
    assert "--max-tokens" in notes[0]
    assert "(default: 128)" in " ".join(kvllm("ask", "--help").out.replace("│", " ").split())


def test_file_that_is_not_utf8_is_refused(kvllm: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin1.jsonl"
    path.write_bytes(b'{"key": "\xe9", "text": "x"}')
    ran = kvllm("insert-many", "my.kb", str(path), "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert "UTF-8" in ran.document["error"]


def test_readonly_commands_open_readonly_and_nothing_creates_by_accident(kvllm: Run) -> None:
    for arguments in (["ask", "my.kb", "x"], ["get", "my.kb", "torchkeras"], ["ls", "my.kb"], ["find", "my.kb", "x"],
                      ["history", "my.kb"], ["show", "my.kb", "1"], ["tag", "my.kb"], ["verify", "my.kb"],
                      ["info", "my.kb"]):  # fmt: skip
        kvllm(*arguments)
        assert StandIn.opened[-1]["readonly"], arguments
    kvllm("insert", "my.kb", "k", "t")
    assert not StandIn.opened[-1]["readonly"]
    assert not any(opened["create"] for opened in StandIn.opened)


def test_missing_folder_is_one_sentence_and_exit_code_2(kvllm: Run) -> None:
    ran = kvllm("insert", "typo.kb", "k", "t")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: There is no knowledge base at typo.kb; nothing was changed.\n"


def test_raw_prints_the_text_alone_and_as_it_is(kvllm: Run) -> None:
    text = "[bold]x[/bold] \x1b[31mred"
    StandIn.stores["my.kb"]._facts["k"] = StoredFact("k", text)
    assert kvllm("get", "my.kb", "k", "-r").out == text + "\n"
    assert kvllm("ask", "my.kb", "k", "-r").out == text + "\n"


def test_escape_sequences_and_markup_of_others_are_shown_not_obeyed(kvllm: Run) -> None:
    key, text = "k\x1b]0;pwned\x07", "[red]x[/red]\x1b[2J\u202edlrow\r\nnext"
    StandIn.stores["my.kb"]._facts[key] = StoredFact(key, text)
    for arguments in (["ls", "my.kb"], ["get", "my.kb", key], ["ask", "my.kb", key], ["find", "my.kb", "x"]):
        out = kvllm(*arguments).out
        assert not {"\x1b", "\x07", "\u202e", "\r"} & set(out), arguments
        assert "[red]x[/red]\\x1b[2J\\u202edlrow\\r" in out
    assert kvllm("get", "my.kb", "no\x1b[31m").err.count("\x1b") == 0
    assert kvllm("\x1b[31m").err.count("\x1b") == 0


def test_piped_table_has_one_line_per_fact(kvllm: Run) -> None:
    StandIn.stores["my.kb"]._facts["long"] = StoredFact("long", "word " * 100)
    assert len(kvllm("ls", "my.kb").out.splitlines()) == 2 + 2


def test_references_are_numbers_or_tags(kvllm: Run) -> None:
    kvllm("tag", "my.kb", "v1", "1")
    assert kvllm("tag", "my.kb", "--json").document["tags"] == {"v1": 1}
    kvllm("rollback", "my.kb", "1")
    assert call("rollback")["ref"] == 1
    kvllm("show", "my.kb", "v1")
    assert call("edit")["ref"] == "v1"
    kvllm("ls", "my.kb", "--at", "v1")
    assert call("facts")["at"] == "v1"


def test_a_tag_is_moved_or_removed_on_demand(kvllm: Run) -> None:
    kvllm("tag", "my.kb", "v1", "1")
    assert call("tag") == {"tag": "v1", "ref": 1, "move": False}
    assert kvllm("tag", "my.kb", "v1", "--move", "--json").document == {"ok": True, "tag": "v1", "edit": 1}
    assert call("tag") == {"tag": "v1", "ref": None, "move": True}
    ran = kvllm("tag", "my.kb", "v1", "--remove", "--json")
    assert ran.document == {"ok": True, "tag": "v1", "edit": 1, "removed": True}
    kvllm("tag", "my.kb", "v2", "1")
    assert kvllm("tag", "my.kb", "v2", "--remove").out == "removed the tag v2, which pointed to edit 1\n"


@pytest.mark.parametrize(
    "given", [["--move"], ["--remove"], ["v1", "--move", "--remove"], ["v1", "1", "--remove"]], ids=" ".join
)
def test_options_of_tag_that_contradict_each_other_are_refused(kvllm: Run, given: list[str]) -> None:
    ran = kvllm("tag", "my.kb", *given, "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert ran.document["error"].endswith("; nothing was changed.")
    assert not StandIn.opened


def test_insert_many_reports_bad_rows_with_their_lines_and_keeps_the_good_ones(kvllm: Run) -> None:
    rows = ['{"key": "a", "text": "A."}', "", "{oops", '{"key": "b"}', '{"key": "torchkeras", "text": "again"}',
            '{"key": "c", "text": "C."}']  # fmt: skip
    ran = kvllm("insert-many", "my.kb", "-", "--json", stdin="\n".join(rows))
    assert ran.code == 4
    assert [(r["line"], r["ok"], r["code"]) for r in ran.document["results"]] == [
        (1, True, None), (3, False, "invalid_input"), (4, False, "invalid_input"), (5, False, "key_exists"),
        (6, True, None),
    ]  # fmt: skip
    assert (ran.document["ok"], ran.document["inserted"], ran.document["failed"]) == (False, 2, 3)
    assert {"a", "c"} <= set(StandIn.stores["my.kb"]._facts)


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(OutOfResources("The disk is full."), 10), (Busy("Another writes."), 7), (Corrupt("It is damaged."), 8)],
)
@pytest.mark.parametrize("command", ["insert-many", "import"])
def test_an_error_that_ends_a_series_has_its_own_exit_code_and_keeps_the_results(
    kvllm: Run, monkeypatch: pytest.MonkeyPatch, command: str, error: KvllmError, exit_code: int
) -> None:
    def insert_many(self: StandIn, facts: Any, **_: object) -> list[EditOutcome]:
        first, *rest = facts
        done = EditOutcome(first.key, self.insert(first.key, first.text))
        return [done, *(EditOutcome(fact.key, error=str(error), code=error.code) for fact in rest)]

    monkeypatch.setattr(StandIn, "insert_many", insert_many)
    rows = '{"key": "a", "text": "A."}\n{"key": "b", "text": "B."}\n{"key": "c", "text": "C."}\n'
    ran = kvllm(command, "my.kb", "-", "--json", stdin=rows)
    assert (ran.code, ran.document["code"], ran.document["inserted"]) == (exit_code, error.code, 1)
    assert [result["ok"] for result in ran.document["results"]] == [True, False, False]
    sentence = f"1 of 3 facts were inserted and stay; then an error ended the series at 'b': {error}"
    assert ran.document["error"] == sentence
    del StandIn.stores["my.kb"]._facts["a"]
    told = kvllm(command, "my.kb", "-", stdin=rows)
    assert (told.code, told.err.splitlines()[-1]) == (exit_code, f"error: {sentence}")


@pytest.mark.parametrize("command", ["insert-many", "import"])
def test_what_an_edit_of_many_facts_warns_of_is_shown_once_and_each_fact_says_how_far_it_is_recalled(
    kvllm: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    untaught, near = "1 of 2 facts are not recalled by half of their questions: 'b'.", "'a' and 'torchkeras' are near."

    def insert_many(self: StandIn, facts: Any, **_: object) -> list[EditOutcome]:
        asked = [("a", True), ("a", True), ("b", True), ("b", False), ("b", False), ("b", False)]
        probes = [ProbeResult("trained", f"{n}: {key}?", "…", passed, 1.0, key=key) for n, (key, passed) in
                  enumerate(asked)]  # fmt: skip
        measured = replace(report(*probes), warnings=(untaught,))
        first = replace(self._commit("insert", None, measured), warnings=(near, untaught))
        second = replace(self._commit("insert", "c", report()), warnings=(near,))
        return [EditOutcome("a", first), EditOutcome("b", first), EditOutcome("c", second)]

    monkeypatch.setattr(StandIn, "insert_many", insert_many)
    rows = "".join(json.dumps({"key": key, "text": "T."}) + "\n" for key in "abc")
    ran = kvllm(command, "my.kb", "-", stdin=rows)
    told = [line for line in ran.out.splitlines() if line.startswith("warning: ")]
    assert (ran.code, told) == (0, [f"warning: edit 2: {untaught}", f"warning: 2 edits: {near}"])
    said = kvllm(command, "my.kb", "-", "--json", stdin=rows).document
    assert [(row["key"], row["recalled"]) for row in said["results"]] == [("a", 1.0), ("b", 0.25), ("c", None)]


def test_strict_insert_many_refuses_all(kvllm: Run) -> None:
    ran = kvllm("insert-many", "my.kb", "-", "--strict", "--json", stdin='{"key": "a", "text": "A."}\n{"key": "b"}\n')
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert ran.document["rows"] == [{"line": 2, "key": "b", "error": "line 2: text missing."}]
    assert not any(name == "insert_many" for name, _ in StandIn.calls)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_insert_many_of_nothing_is_refused(kvllm: Run, content: str) -> None:
    assert kvllm("insert-many", "my.kb", "-", stdin=content).code == 2


def test_a_file_without_a_usable_row_names_the_first_lines_number_once(kvllm: Run) -> None:
    said = kvllm("insert-many", "my.kb", "-", "--json", stdin='{"key": "a"}\n').document
    assert said["error"].endswith("nothing was changed: the first, line 1: text missing.")


def test_missing_file_is_refused(kvllm: Run) -> None:
    assert kvllm("insert-many", "my.kb", "absent.jsonl").code == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("7", "a row is a JSON object"),
        ('{"key": 1, "text": "t"}', "key must be text"),
        ('{"key": "k", "text": " "}', "text is empty"),
        ('{"key": "k", "text": null}', "text must be text"),
        ('{"key": "k", "text": "t", "alias": ["a"]}', "unknown field alias"),
        ('{"key": "k", "text": "t", "aliases": "a"}', "aliases must be a list of strings"),
        ('{"key": "k", "text": "t", "language": 1}', "language must be a string"),
        ('{"key": "k\\ud800", "text": "t"}', "surrogate"),
        ('{"key": "k\\u0000", "text": "t"}', "NUL"),
        ('{"key": ' + "[" * 100_000, "recursion"),
    ],
)
def test_bad_row_says_why(row: str, reason: str) -> None:
    rows, bad = parse_rows(row)
    assert not rows
    assert reason.lower() in bad[0].error.lower()
    assert bad[0].error.startswith("line 1: ")


def test_repeated_key_names_both_lines() -> None:
    rows, bad = parse_rows('{"key": "e\\u0301", "text": "1"}\n{"key": "\\u00e9", "text": "2"}')
    assert (len(rows), bad[0].error) == (1, "line 2: the key 'é' is already on line 1, with another text.")


def test_rows_of_ls_can_be_inserted_elsewhere(kvllm: Run) -> None:
    listed = kvllm("ls", "my.kb", "--json").document
    rows, bad = parse_rows("\n".join(json.dumps(row) for row in listed))
    assert ([row.fact.key for row in rows], bad) == (["torchkeras"], [])


def test_demo_tells_the_story_and_proves_the_rollback(kvllm: Run) -> None:
    document = kvllm("demo", "d.kb", "--json").document
    kinds = {question["kind"] for question in document["questions"]}
    assert {"trained", "paraphrase", "alias", "far"} == kinds
    assert document["weights"]["identical"] is True
    assert document["folder"] == "d.kb"
    trained = [question for question in document["questions"] if question["kind"] == "trained"]
    assert {question["verdict"] for question in trained} == {"states it"}
    shown = kvllm("demo", "d2.kb", "--language", "zh").out
    assert "梦中情炉" in shown
    assert "The knowledge base lies in d2.kb" in shown


def test_version(kvllm: Run) -> None:
    import kvllm as package

    assert kvllm("--version").out == f"kvllm {package.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_is_shown_with_exit_code_0(kvllm: Run, arguments: list[str]) -> None:
    ran = kvllm(*arguments)
    assert ran.code == 0
    assert "Start with:" in ran.out
