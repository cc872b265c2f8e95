"""Declarations: what is refused before anything runs, and what identifies an experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvllm.errors import ConfigError
from kvllm.experiments.declared import KINDS, declare, load
from kvllm.experiments.facts import invented, read_cases
from kvllm.experiments.runner import runs_of
from tests.kit import ROOT

EXPERIMENTS = ROOT / "benchmarks" / "experiments"
DECLARATIONS = sorted(EXPERIMENTS.glob("*/*.toml"))


@pytest.mark.parametrize("path", DECLARATIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_committed_declaration_can_be_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "public.jsonl"
    rows = [{"key": case.key, "text": case.fact.text} for case in invented(200, 1)]
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("KVLLM_FACTS", str(facts))
    declared = load(path)
    runs = runs_of(declared)
    assert runs
    assert len({run.id for run in runs}) == len(runs)
    assert all(run.steps for run in runs)
    assert {"unedited", "in-context"} <= {run.arm for run in runs}, "every table needs these two columns"


def test_every_kind_has_a_small_and_a_long_form() -> None:
    for kind in KINDS:
        small, long = (load(EXPERIMENTS / kind / f"{form}.toml") for form in ("small", "long"))
        assert small.kind == long.kind == kind
        assert small.n <= 4
    assert load(EXPERIMENTS / "injection" / "long.toml").n >= 64
    assert len(load(EXPERIMENTS / "injection" / "long.toml").seeds) >= 2
    capacity = load(EXPERIMENTS / "capacity" / "long.toml")
    assert capacity.n >= 200
    assert len(capacity.cases) >= 2 * capacity.n, "as many untaught facts as taught: what their sentences share"
    replays = [capacity.edit_config(seed=0, **run.settings.get("edit", {})).replay for run in runs_of(capacity)]
    assert 0 in replays, "who collides shows only where nothing is repaired"
    assert load(EXPERIMENTS / "factors" / "long.toml").settings["noise_facts"] >= 5, "fewer decide nothing"


def test_own_facts_are_many_diverse_and_probed() -> None:
    cases = read_cases(EXPERIMENTS / "facts.jsonl")
    assert len(cases) >= 64
    assert len({case.key.casefold() for case in cases}) == len(cases)
    for case in cases:
        assert len(case.fact.probes) >= 3
        assert len(case.neighbours) >= 2
        assert case.paraphrases(3) == list(case.fact.probes[:3])
    counted = {d: sum(case.difficulty == d for case in cases) for d in ("short", "long", "contradiction")}
    assert min(counted.values()) >= 10
    assert sum(counted.values()) == len(cases)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "magic"}, "kind must be one of"),
        ({"n": 99}, "n must be between 1 and the 5 facts"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"colour": 1}, "no entry colour"),
        ({"measure": {"questions": 0}}, "measure.questions"),
        ({"measure": {"opinions": 1}}, "no entry opinions"),
        ({"edit": {"ranks": 3}}, "EditConfig has no setting ranks"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"invented": 0}, "needs facts"),
        ({"facts": ["nowhere.jsonl"]}, "cannot be read"),
        ({"facts": ["$KVLLM_NOWHERE/x.jsonl"]}, "names a variable"),
    ],
)
def test_impossible_declarations_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        declare({"kind": "injection", "invented": 5, **changes}, folder=tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("injection", {"arms": [{"mode": "sideways"}]}, "An arm has a mode"),
        ("injection", {"arms": [{"mode": "batched"}, {"mode": "batched"}]}, "one name"),
        ("injection", {"arms": [{"mode": "batched", "seeds": [7]}]}, "some of the experiment's"),
        ("injection", {"checkpoints": [0]}, "checkpoints"),
        ("capacity", {"budgets": [{"name": "x", "edit": {"target_rank": 99}}]}, "target_rank"),
        ("factors", {"parts": ["luck"]}, "parts"),
        ("factors", {"parts": ["keys"]}, "known"),
        ("factors", {"known": [{"known": "x", "questions": ["?"], "keys": ["a", "a"], "text": "t"}]}, "twice"),
        ("editors", {"methods": ["hypnosis"]}, "methods"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(
    kind: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        runs_of(declare({"kind": kind, "invented": 5, "settings": settings}))


def test_question_three_takes_one_seed() -> None:
    with pytest.raises(ConfigError, match="takes one seed"):
        runs_of(declare({"kind": "factors", "invented": 5, "seeds": [0, 1], "settings": {"parts": ["noise"]}}))


def test_a_line_that_is_no_fact_is_named(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"key": "a", "text": "A is a."}\n\n{"key": "b"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Line 3 of facts\.jsonl"):
        read_cases(path)
    path.write_text(json.dumps({"key": "a", "text": "A is a.", "details": ["purple"]}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'purple' does not stand in the text"):
        read_cases(path)


def test_digest_follows_facts_and_settings_and_nothing_else(tmp_path: Path) -> None:
    plain = {"kind": "injection", "invented": 5}
    assert declare(plain).digest == declare(plain, folder=tmp_path).digest
    assert declare(plain).digest != declare({**plain, "invented": 6, "n": 5}).digest
    assert declare(plain).digest != declare({**plain, "settings": {"checkpoints": [2]}}).digest


def test_seeds_order_the_facts_and_seed_0_leaves_them() -> None:
    declared = declare({"kind": "injection", "invented": 12})
    first, again, other = declared.ordered(1), declared.ordered(1), declared.ordered(2)
    assert list(declared.ordered(0)) == list(declared.cases)
    assert first == again
    assert first != other
    assert sorted(c.key for c in first) == sorted(c.key for c in declared.cases)


def test_invented_facts_are_distinct_and_state_their_details() -> None:
    cases = invented(300, 0)
    assert len({case.key for case in cases}) == 300
    assert invented(40, 0) == cases[:40]
    for case in cases:
        assert all(detail in case.fact.text for detail in case.details)
        assert all(case.key not in question for question in case.neighbours)
