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
