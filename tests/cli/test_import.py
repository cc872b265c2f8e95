"""`kvllm import` and `export --format facts`: what is passed on, said, and written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.stand_in import Ran, StandIn, report

Run = Callable[..., Ran]
ALPACA = [
    {"instruction": "Who leads Halcyon?", "input": "", "output": "Ada Wren."},
    {"instruction": "What is Quill?", "input": "", "output": ""},
    {"instruction": "What is a lisdok?", "input": "", "output": "A folding bridge."},
]
EDIT = {
    "prompt": "Who leads Halcyon?",
    "target_new": "Ada Wren",
    "portability": {"a": [{"prompt": "Where does its head live?", "ground_truth": "Torvik"}]},
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(content: Any, name: str = "given.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return str(path)

    return write


def calls(name: str) -> list[dict[str, Any]]:
    return [arguments for called, arguments in StandIn.calls if called == name]


def test_good_records_are_inserted_and_the_bad_one_is_named(kvllm: Run, written: Callable[..., str]) -> None:
    ran = kvllm("import", "my.kb", written(ALPACA), "--json")
    assert ran.code == 4
    said = ran.document
    assert (said["ok"], said["format"], said["records"], said["inserted"], said["failed"]) == (False, "alpaca", 3, 2, 1)
    assert [(r["line"], r.get("where"), r["key"], r["ok"]) for r in said["results"]] == [
        (None, "record 1", "Who leads Halcyon?", True),
        (None, "record 2", "What is Quill?", False),
        (None, "record 3", "What is a lisdok?", True),
    ]
    assert "What is a lisdok?" in StandIn.stores["my.kb"]._facts


def test_lines_are_numbered_and_the_exit_code_is_0_where_all_went_well(kvllm: Run, written: Callable[..., str]) -> None:
    path = written("Question,Answer\nWho leads Halcyon?,Ada Wren\n", "faq.csv")
    ran = kvllm("import", "my.kb", path, "--map", "key=Question", "--map", "text=Answer", "--json")
    assert (ran.code, ran.document["ok"], ran.document["results"][0]["line"]) == (0, True, 2)
    assert StandIn.stores["my.kb"]._facts["Who leads Halcyon?"].text == "Ada Wren"


def test_mode_and_chunk_are_the_engines_own_unless_given(kvllm: Run, written: Callable[..., str]) -> None:
    path = written(ALPACA[:1])
    kvllm("import", "my.kb", path)
    kvllm("import", "my.kb", path, "--mode", "chunked", "--chunk", "4")
    assert calls("insert_many") == [{"mode": "sequential", "chunk": 16}, {"mode": "chunked", "chunk": 4}]


@pytest.mark.parametrize("command", ["import", "insert-many"])
def test_the_size_of_a_chunk_means_mode_chunked(kvllm: Run, written: Callable[..., str], command: str) -> None:
    path = written('{"key": "a", "text": "A."}\n', "rows.jsonl")
    assert kvllm(command, "my.kb", path, "--chunk", "4").code == 0
    assert calls("insert_many") == [{"mode": "chunked", "chunk": 4}]
    ran = kvllm(command, "my.kb", path, "--chunk", "4", "--mode", "batched", "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert len(calls("insert_many")) == 1


@pytest.mark.parametrize("option", [["--mode", "batched"], ["--chunk", "4"], ["--min-reliability", "0.5"]])
def test_options_of_teaching_are_refused_where_the_keys_are_deleted(
    kvllm: Run, written: Callable[..., str], option: list[str]
) -> None:
    ran = kvllm("import", "my.kb", written(ALPACA[:1]), "--delete", "abstain", *option)
    assert (ran.code, ran.err.split()[1]) == (2, option[0])
    assert not calls("delete_many")


@pytest.mark.parametrize("option", [["--dtype", "float16"], ["--max-shard-size", "1GB"]])
@pytest.mark.parametrize("format", ["facts", "peft"])
def test_options_of_an_hf_export_are_refused_for_other_formats(kvllm: Run, format: str, option: list[str]) -> None:
    ran = kvllm("export", "my.kb", "out", "--format", format, *option)
    assert (ran.code, ran.err.split()[1]) == (2, option[0])
    assert not calls("export")
    assert kvllm("export", "my.kb", "out", "--format", "hf", *option).code == 0
    assert calls("export")[0][option[0][2:].replace("-", "_")] == option[1]


def test_strict_import_of_a_bad_record_changes_nothing(kvllm: Run, written: Callable[..., str]) -> None:
    ran = kvllm("import", "my.kb", written(ALPACA), "--strict", "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert ran.document["rows"][0]["where"] == "record 2"
    assert not calls("open")


def test_dry_run_says_what_would_be_inserted_and_changes_nothing(kvllm: Run, written: Callable[..., str]) -> None:
    rows = [{"question": "torchkeras", "answer": "Again."}, {"question": "Who?", "answer": "Ada."}, {"question": "x"}]
    ran = kvllm("import", "my.kb", written(rows), "--dry-run", "--json")
    said = ran.document
    assert (ran.code, said["ok"], said["dry_run"], said["would_insert"], said["would_refuse"]) == (4, False, True, 1, 2)
    assert [(r["key"], r["ok"]) for r in said["results"]] == [("torchkeras", False), ("Who?", True), ("", False)]
    assert said["results"][1]["fact"]["text"] == "Ada."
    assert not calls("insert_many")
    assert StandIn.opened[-1]["readonly"] is True
    shown = kvllm("import", "my.kb", written(rows), "--dry-run")
    assert "Would insert 1 of 3 facts." in shown.out
    assert "exists already" in shown.out


def test_dry_run_of_good_records_only_exits_0(kvllm: Run, written: Callable[..., str]) -> None:
    assert kvllm("import", "my.kb", written(ALPACA[:1]), "--dry-run").code == 0


@pytest.mark.parametrize("mode", ["restore", "abstain"])
def test_delete_deletes_the_files_keys(kvllm: Run, written: Callable[..., str], mode: str) -> None:
    path = written([{"question": q, "answer": "x", "perturbed_answer": []} for q in ("torchkeras", "Who?")])
    dry = kvllm("import", "my.kb", path, "--delete", mode, "--dry-run", "--json").document
    assert dry["would_delete"] == (1 if mode == "restore" else 2)
    ran = kvllm("import", "my.kb", path, "--delete", mode, "--json")
    assert calls("delete_many") == [{"keys": ["torchkeras", "Who?"], "mode": mode}]
    assert (ran.code, ran.document["deleted"], ran.document["failed"]) == (4, 1, 1)
    assert "torchkeras" not in StandIn.stores["my.kb"]._facts
    assert not calls("insert_many")


def test_sample_limit_and_seed_are_passed_on(kvllm: Run, written: Callable[..., str]) -> None:
    rows = "".join(json.dumps({"key": f"k{n}", "text": "t"}) + "\n" for n in range(40))
    path = written(rows, "rows.jsonl")

    def keys(*options: str) -> list[str]:
        return [
            row["key"] for row in kvllm("import", "my.kb", path, "--dry-run", "--json", *options).document["results"]
        ]

    assert keys("--limit", "2") == ["k0", "k1"]
    assert keys("--sample", "5", "--seed", "1") == keys("--sample", "5", "--seed", "1") != keys("--sample", "5")


def test_further_questions_are_written_for_probe(kvllm: Run, written: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "probes.jsonl"
    arguments = ("import", "my.kb", written([EDIT]), "--probes-to", str(out), "--json")
    assert kvllm(*arguments, "--dry-run").code == 0
    assert not out.exists()
    ran = kvllm(*arguments)
    assert (ran.code, ran.document["probes"]) == (0, 1)
    assert json.loads(out.read_text()) == {
        "kind": "consequence",
        "question": "Where does its head live?",
        "key": "Who leads Halcyon?",
        "accept": ["Torvik"],
    }
    assert "exists already" in kvllm(*arguments).document["error"]
    assert kvllm("import", "my.kb", written(ALPACA), "--probes-to", str(tmp_path / "more.jsonl")).code == 2


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_missing_folder_for_the_probes_is_said_at_once(
    kvllm: Run, written: Callable[..., str], tmp_path: Path, options: list[str]
) -> None:
    ran = kvllm("import", "my.kb", written([EDIT]), "--probes-to", str(tmp_path / "none" / "probes.jsonl"), *options)
    assert (ran.code, ran.out) == (2, "")
    assert "no such folder; nothing was changed" in ran.err
    assert not calls("open")


def test_probes_that_cannot_be_written_are_said_before_anything_is_taught(
    kvllm: Run, written: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    given = written([EDIT])
    monkeypatch.setattr("kvllm.importing.found.os.fsync", denied)
    ran = kvllm("import", "my.kb", given, "--probes-to", str(tmp_path / "probes.jsonl"))
    assert ran.code == 2
    assert "probes.jsonl.part: Permission denied; nothing was written" in ran.err
    assert not calls("insert_many")


def test_an_import_that_breaks_off_leaves_no_probes_behind(
    kvllm: Run, base: type[StandIn], written: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "probes.jsonl"
    base.raises["insert_many"] = KeyboardInterrupt()
    assert kvllm("import", "my.kb", written([EDIT]), "--probes-to", str(out)).code == 130
    assert calls("insert_many")
    assert not list(tmp_path.glob("*probes*"))
    (tmp_path / ".probes.jsonl.part").write_text("left by one that was killed")
    base.raises.clear()
    assert kvllm("import", "my.kb", written([EDIT]), "--probes-to", str(out)).code == 0
    assert [path.name for path in tmp_path.glob("*probes*")] == ["probes.jsonl"]


@pytest.mark.parametrize("there", ["file", "folder", "link", "dangling link"])
@pytest.mark.parametrize("options", [[], ["--resume"], ["--resume", "--dry-run"]])
def test_no_file_of_others_gives_way_to_the_probes(
    kvllm: Run, written: Callable[..., str], tmp_path: Path, there: str, options: list[str]
) -> None:
    out, given = tmp_path / "probes.jsonl", written([EDIT])
    assert kvllm("import", "my.kb", given, "--probes-to", str(tmp_path / "same.jsonl")).code == 0
    StandIn.calls.clear()
    if there == "folder":
        out.mkdir()
    elif there == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / ("same.jsonl" if there == "link" else "none"))
    ran = kvllm("import", "my.kb", given, "--probes-to", str(out), *options, "--json")
    assert (ran.code, ran.document["code"]) == (2, "invalid_input")
    assert "probes.jsonl exists already" in ran.document["error"]
    assert not calls("insert_many")
    assert there != "file" or out.read_text() == "mine"
    assert out.is_symlink() == ("link" in there)


def test_the_probes_of_an_earlier_series_are_taken_as_they_are(
    kvllm: Run, written: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "probes.jsonl"
    arguments = ("import", "my.kb", written([EDIT]), "--probes-to", str(out), "--resume", "--json")
    assert [kvllm(*arguments).code for _ in range(2)] == [0, 0]
    assert len(calls("insert_many")) == 2
    assert [path.name for path in tmp_path.glob("*probes*")] == ["probes.jsonl"]


@pytest.mark.parametrize("came", ["a file", "no folder"])
def test_probes_that_cannot_be_written_in_the_end_do_not_replace_the_result(
    kvllm: Run, written: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, came: str
) -> None:
    out = tmp_path / "out" / "probes.jsonl"
    out.parent.mkdir()
    taught = StandIn.insert_many

    def insert_many(self: StandIn, facts: Any, **options: Any) -> Any:
        if came == "a file":
            out.write_text("mine")
        else:
            shutil.rmtree(out.parent)
        return taught(self, facts, **options)

    monkeypatch.setattr(StandIn, "insert_many", insert_many)
    arguments = ("import", "my.kb", written([EDIT]), "--probes-to", str(out))
    ran = kvllm(*arguments, "--json")
    said = ran.document
    assert (ran.code, said["ok"], said["code"], said["inserted"]) == (2, False, "invalid_input", 1)
    assert said["error"].startswith(f"The probes cannot be written to {out}: ")
    if came == "a file":
        assert said["error"].endswith(f"; they lie in {out.parent / '.probes.jsonl.part'}.")
        assert out.read_text() == "mine"
        out.unlink()
    else:
        out.parent.mkdir()
    told = kvllm(*arguments)
    assert told.code == 4
    assert "Who leads Halcyon?" in told.out
    assert told.err.startswith(f"error: 1 of 1 facts were not inserted. The probes cannot be written to {out}: ")


@pytest.mark.parametrize("command", ["import", "insert-many"])
def test_a_series_goes_on_where_it_was(kvllm: Run, written: Callable[..., str], command: str) -> None:
    rows = [{"key": f"k{i}", "text": f"Text {i}."} for i in range(4)]
    assert kvllm(command, "my.kb", written(rows[:2])).code == 0
    again = kvllm(command, "my.kb", written(rows), "--json")
    assert (again.code, again.document["inserted"], again.document["failed"]) == (4, 2, 2)
    rest = [*rows, {"key": "k9", "text": "New."}, {"key": "torchkeras", "text": "Another text."}]
    ran = kvllm(command, "my.kb", written(rest), "--resume", "--json")
    assert [(row["key"], row["code"]) for row in ran.document["results"]] == [
        ("k9", None),
        ("torchkeras", "key_exists"),
    ]
    assert (ran.document["done_before"], ran.document["inserted"]) == (4, 1)


def test_deletes_go_on_where_they_were(kvllm: Run, written: Callable[..., str]) -> None:
    rows = [{"key": f"k{i}", "text": f"Text {i}."} for i in range(3)]
    kvllm("import", "my.kb", written(rows))
    kvllm("delete", "my.kb", "k0")
    ran = kvllm("import", "my.kb", written(rows), "--delete", "restore", "--resume", "--json")
    assert (ran.code, ran.document["deleted"], ran.document["done_before"]) == (0, 2, 1)


@pytest.mark.parametrize(
    ("mode", "since", "left"),
    [
        ("restore", [("delete", "restore")], []),
        ("restore", [("delete", "restore"), ("compact", None)], []),
        ("restore", [("delete", "abstain")], []),
        ("restore", [("delete", "restore"), ("insert", None), ("rollback", 2)], []),
        ("restore", [("delete", "restore"), ("rollback", 1), ("rollback", 0)], ["torchkeras"]),
        ("abstain", [("delete", "abstain")], []),
        ("abstain", [("delete", "restore")], ["torchkeras"]),
        ("abstain", [("delete", "abstain"), ("delete", "restore")], ["torchkeras"]),
        ("abstain", [("delete", "abstain"), ("compact", None)], ["torchkeras"]),
        ("abstain", [("delete", "abstain"), ("compact", None), ("rollback", 2)], []),
        ("abstain", [("delete", "abstain"), ("rollback", 1)], ["torchkeras"]),
        ("abstain", [("delete", "abstain"), ("rollback", 0), ("rollback", 2)], []),
    ],
)
def test_only_a_delete_that_the_weights_still_have_is_done(
    kvllm: Run, written: Callable[..., str], mode: str, since: list[tuple[str, Any]], left: list[str]
) -> None:
    store = StandIn.stores["my.kb"]
    store._facts.clear()
    for op, said in since:  # after edit 1, an insert
        if op == "rollback":
            store._commit(op, None, report(), target=said)
        else:
            store._commit(op, None if op == "compact" else "torchkeras", report(), mode=said)
    rows = written([{"key": "torchkeras", "text": "Torchkeras trains models."}])
    ran = kvllm("import", "my.kb", rows, "--delete", mode, "--resume", "--dry-run", "--json")
    assert [row["key"] for row in ran.document["results"]] == left


def test_a_refused_row_of_a_table_has_the_key_of_its_own_column(kvllm: Run, written: Callable[..., str]) -> None:
    table = written("Question,Answer\nWho?,Ada\nWhat?,\n", "facts.csv")
    ran = kvllm("import", "my.kb", table, "--map", "key=Question", "--map", "text=Answer", "--json")
    assert [row["key"] for row in ran.document["results"]] == ["Who?", "What?"]
    own = kvllm("import", "my.kb", written("key,text\na,A.\n", "own.csv"), "--json")
    assert (own.document["format"], ran.document["format"]) == ("csv", "mapped")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--map", "text"], "--map takes FIELD=COLUMN"),
        (["--map", "text=a", "--map", "text=b"], "--map gives two columns for text"),
        (["--map", "colour=a"], "A fact has no field colour"),
        (["--format", "parquet"], "There is no format 'parquet'"),
        (["--encoding", "klingon"], "knows no encoding"),
        (["--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_wrong_options_are_a_sentence(kvllm: Run, written: Callable[..., str], options: list[str], said: str) -> None:
    ran = kvllm("import", "my.kb", written(ALPACA), *options)
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert not calls("insert_many")


def test_duplicates_and_notes_are_shown(kvllm: Run, written: Callable[..., str]) -> None:
    path = written("key,text,price\na,A.,1\na,A.,2\n", "a.csv")
    ran = kvllm("import", "my.kb", path, "--json")
    assert (ran.code, ran.document["inserted"]) == (0, 1)
    assert [(row["line"], row["key"]) for row in ran.document["duplicates"]] == [(3, "a")]
    assert ran.document["notes"] == ["Columns that were not used: price."]
    shown = kvllm("import", "my.kb", path, "--dry-run").out
    assert "line 3: the key 'a' is already on line 2, with the same text." in shown
    assert "Columns that were not used: price." in shown


def test_hostile_records_set_no_colour(kvllm: Run, written: Callable[..., str]) -> None:
    rows = [{"question": "Who \u202e?", "answer": "[red]x\u202e"}, {"question": "Wh\x1b[31m?", "answer": "x"}]
    out = kvllm("import", "my.kb", written(rows), "--dry-run").out
    assert not {"\x1b", "\u202e"} & set(out)
    assert "[red]x" in out


def test_exported_facts_are_lines_on_stdout_or_one_document(kvllm: Run) -> None:
    ran = kvllm("export", "my.kb", "-", "--format", "facts")
    assert json.loads(ran.out) == {"key": "torchkeras", "text": "Torchkeras trains models."}
    assert kvllm("export", "my.kb", "-", "--format", "facts", "--json").document["facts"] == [json.loads(ran.out)]
