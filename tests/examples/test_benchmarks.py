"""The benchmark scripts: each says how it is used, and what they share does what it says. None of them is run here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from kvllm.records import CollisionPair, Collisions, Metric, ProbeResult, Report
from tests.kit import planted_damage

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path for path in BENCHMARKS.glob("*.py") if path.stem != "common")


def load(name: str) -> ModuleType:
    spec = util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_shows_a_command(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "utf8", str(script), "--help"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    assert f"python benchmarks/{script.name}" in done.stdout


def test_twelve_facts_are_twelve_of_different_kinds() -> None:
    lines = (BENCHMARKS / "twelve_facts.jsonl").read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines]
    assert len({fact["key"] for fact in facts}) == 12
    assert sum("chinese" in fact["tags"] for fact in facts) == 2
    assert {"person", "place", "product", "rule", "number", "date", "long text", "question key"} <= {
        tag for fact in facts for tag in fact["tags"]
    }
    for fact in facts:
        assert all(detail in fact["text"] for detail in fact["details"])


def test_journal_gives_back_whole_rows_and_refuses_another_configuration(tmp_path: Path) -> None:
    common = load("common")
    path = tmp_path / "rows.jsonl"
    common.Journal(path, {"seed": 0}).add({"key": "炉", "steps": 3})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut o')

    again = common.Journal(path, {"seed": 0})
    again.add({"key": "b"})

    assert common.Journal(path, {"seed": 0}).rows == [{"key": "炉", "steps": 3}, {"key": "b"}]
    with pytest.raises(SystemExit, match="another configuration"):
        common.Journal(path, {"seed": 1})


def test_document_says_what_was_run_and_names_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = load("common")
    options = common.parser("speed", "Measures nothing.")
    options.add_argument("--model")
    given = options.parse_args(["--out", str(tmp_path), "--seed", "3", "--model", str(tmp_path / "tiny")])

    stored = common.finish("speed", given, results={"ratio": 1.5}, summary=["ratio 1.5"], data={"rows": "ab"})

    text = stored.read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["config"] == {"seed": 3, "model": "tiny"}
    assert document["results"] == {"ratio": 1.5}
    assert document["environment"]["python"]
    assert set(document["git"]) == {"commit", "changed"}
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert capsys.readouterr().out == f"ratio 1.5\n\nstored as {stored.name}\n"


def test_json_prints_the_stored_document_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = load("common")
    given = argparse.Namespace(out=tmp_path / "x.json", json=True, quiet=True)
    stored = common.finish("speed", given, results={}, summary=["not shown"])
    assert stored.name == "x.json"
    assert capsys.readouterr().out == stored.read_text(encoding="utf-8")


def test_spread_is_median_and_extremes() -> None:
    common = load("common")
    assert common.spread([3, 1, 10]) == {"median": 3, "min": 1, "max": 10, "n": 3}
    assert common.spread([])["median"] is None


def test_opening_is_timed_after_edits_that_measure_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "common", load("common"))
    few = ["--edits", "2", "--repeats", "1", "--rank", "2", "--only", "opening"]
    load("opening").main([*few, "--model", str(tiny_llama), "--out", str(tmp_path), "--json", "--quiet"])
    opening = json.loads(capsys.readouterr().out)["results"]["opening"]
    assert opening["n_edits"] == 2
    assert opening["ratio_open"]["n"] == 1


def test_transcript_replaces_what_stood_between_the_markers() -> None:
    module = load("readme_transcript")
    readme = f"before\n{module.START}\nold\n{module.END}\nafter\n"
    once = module.placed(readme, "1. Insert")
    assert once == f"before\n{module.START}\n```text\n$ kvllm demo demo.kb\n1. Insert\n```\n{module.END}\nafter\n"
    assert module.placed(once, "1. Insert") == once
    with pytest.raises(ValueError, match="left unchanged"):
        module.placed("no markers", "x")


def test_transcript_is_cleaned_of_colours_and_folders() -> None:
    module = load("readme_transcript")
    assert module.cleaned("\n\x1b[1mOn\x1b[0m  \n/tmp/q/demo.kb\n", ["/tmp/q"]) == "On\ndemo.kb"


def test_readme_has_the_markers_once_and_both_commands() -> None:
    module = load("readme_transcript")
    readme = module.README.read_text(encoding="utf-8")
    assert module.placed(readme, "x")
    lines = readme.splitlines()
    install = "python3 -m venv .venv && .venv/bin/pip install -c .ci/constraints.txt -e"
    assert f"{install} . && .venv/bin/kvllm demo" in lines
    assert f"{install} '.[test]' && .venv/bin/pytest" in lines


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return planted_damage(monkeypatch)


def measured(
    module: ModuleType,
    diagonal: float = 1.0,
    *pairs: CollisionPair,
    kl: float = 0.02,
    ratio: float | None = 1.01,
    leaks: float = 0.0,
    passed: str = "1" * 20,
) -> object:
    collisions = Collisions(("a", "b"), ((diagonal, 0.0), (0.0, 1.0)), pairs, leak_rate=Metric(leaks, 6))
    answers = tuple(ProbeResult("general", f"{n}?", "", mark == "1", float(mark)) for n, mark in enumerate(passed))
    return module.Measured(collisions, Report({"drift_kl": Metric(kl, 9), "ppl_ratio": Metric(ratio, 9)}, answers))


def test_planted_damage_names_each_fault_by_what_changed(planted: ModuleType) -> None:
    before = measured(planted)
    swap = CollisionPair("b", "a", "swapped", 0.2, 1.0, 1.0)
    over = CollisionPair("a", "b", "overwritten", 0.2, 1.0, 0.0)
    for now, findings in (
        (measured(planted, 1.0), []),
        (measured(planted, 0.5, kl=0.06, ratio=1.05), []),
        (measured(planted, 0.0), ["lost: a"]),
        (measured(planted, 0.0, swap), ["swapped: a and b"]),
        (measured(planted, 0.0, over), ["overwritten: a by b"]),
        (measured(planted, 1.0, CollisionPair("a", "b", "near", 0.9, 0.0, 0.0)), []),
        (measured(planted, leaks=0.5), ["leaks: neighbours recite facts"]),
        (measured(planted, kl=0.2), ["general damage"]),
        (measured(planted, ratio=None), ["general damage"]),
        (measured(planted, passed="1" * 12 + "0" * 8), ["general damage"]),
        (measured(planted, passed="1" * 18 + "0" * 2), []),
    ):
        assert planted.diagnose(before, now) == findings
    assert planted.diagnose(measured(planted, 0.0, over), measured(planted, 0.0, over)) == []


def test_exact_mcnemar_worked_by_hand(planted: ModuleType) -> None:
    assert planted.mcnemar(0, 0) == 1.0
    assert planted.mcnemar(5, 0) == pytest.approx(2 / 32)
    assert planted.mcnemar(3, 1) == pytest.approx(2 * 5 / 16)
