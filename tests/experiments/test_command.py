"""The command `experiment`: one document, exit codes, and reports of what is there."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from kvllm.cli import main
from tests.experiments.kit import write_facts


@pytest.fixture
def declaration(tmp_path: Path, tiny_llama: Path, quick: None) -> Path:
    """A declaration that trains nothing."""
    write_facts(tmp_path)
    file = tmp_path / "nothing.toml"
    file.write_text(
        f'kind = "editors"\nname = "nothing"\nmodel = "{tiny_llama.as_posix()}"\nfacts = ["facts.jsonl"]\nn = 1\n'
        "[measure]\ntrained = 1\nparaphrases = 0\nneighbours = 0\nquestions = 3\ninstructions = 1\ntexts = 2\n"
        '[settings]\nmethods = ["unedited"]\n',
        encoding="utf-8",
    )
    return file


def test_runs_once_reports_ever_after_and_keeps_rows_in_sqlite(
    declaration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "out", tmp_path / "report.html"
    arguments = ["experiment", str(declaration), "--into", str(folder), "--json"]
    assert main([*arguments, "-o", str(page)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert document["ok"] is True
    assert document["schema"] == "kvllm-experiment/1"
    assert document["experiment"]["name"] == "nothing"
    assert [row["kind"] for row in document["rows"]] == ["fact", "drift"]
    assert "unedited" in page.read_text(encoding="utf-8")

    before = (folder / "results.db").read_bytes()
    assert main([*arguments, "--report"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == document["rows"]
    assert (folder / "results.db").read_bytes() == before
    ledger = sqlite3.connect(folder / "results.db")
    kinds = [kind for (kind,) in ledger.execute("SELECT kind FROM rows ORDER BY place")]
    ledger.close()
    assert kinds == ["fact", "drift"]

    assert main(["experiment", str(declaration), "--into", str(folder), "--report"]) == 0
    assert "unedited" in capsys.readouterr().out


def test_mistakes_are_sentences_with_their_codes(
    declaration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, said in (
        ([str(tmp_path / "none.toml")], 2, "cannot be read"),
        ([str(declaration), "--report", "--into", str(tmp_path / "empty")], 5, "no results"),
        ([str(declaration), "-o", str(tmp_path / "no" / "report.html")], 2, "no such folder"),
        ([str(declaration), "--only", "adalora"], 2, "no arm 'adalora' in this experiment, but unedited;"),
        ([str(declaration), "--only", "unedited", "--report"], 2, "no meaning"),
    ):
        assert main(["experiment", *arguments, "--json"]) == code
        document = json.loads(capsys.readouterr().out)
        assert document["ok"] is False
        assert said in document["error"]
    other = tmp_path / "other.db" / "results.db"
    other.parent.mkdir()
    other.write_bytes(b"not a database at all, only some text that stands here")
    assert main(["experiment", str(declaration), "--into", str(other.parent), "--json"]) == 8
    assert json.loads(capsys.readouterr().out)["code"] == "store_corrupt"
