"""Experiments on the tiny model: every kind runs whole, resumes after any interruption, and gives the same rows."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvllm import KnowledgeBase
from kvllm.editing.editor import EditTask, Training
from kvllm.editing.engine import Engine
from kvllm.editing.soft_prompts import SoftPromptEditor
from kvllm.errors import Busy, ConfigError, Corrupt, EditFailed, ModelError, StoreError
from kvllm.experiments.capacity import _bits, _parameters, _Watch
from kvllm.experiments.declared import Declared
from kvllm.experiments.desk import Desk
from kvllm.experiments.factors import _real_edit
from kvllm.experiments.facts import Case
from kvllm.experiments.report import experiment_document
from kvllm.experiments.runner import Outcome, read_outcome, remaining, run_experiment, runs_of
from kvllm.experiments.single import SingleEdit
from kvllm.records import Fact, Progress
from kvllm.reports.render import render
from kvllm.store.results import Results
from tests.experiments.kit import tiny, without_times

ARMS = [
    {"name": "unedited", "mode": "unedited"},
    {"name": "in-context", "mode": "in-context"},
    {"name": "sequential", "mode": "sequential", "compact": True},
    {"name": "chunked-2", "mode": "chunked", "chunk": 2},
    {"name": "sequential, bf16 sums", "mode": "sequential", "masters": "bfloat16"},
]
Make = Callable[..., Declared]


@pytest.fixture
def make(quick: None, tiny_llama: Path, tmp_path: Path) -> Make:
    """Declare small experiments on the tiny model."""

    def made(kind: str, **given: Any) -> Declared:
        return tiny(tiny_llama, tmp_path, kind, **given)

    return made


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The folder of an experiment, whose knowledge bases are all verified in the end."""
    folder = tmp_path / "out"
    yield folder
    for path in folder.glob("runs/*/my.kb"):
        with KnowledgeBase.open(path, readonly=True) as kb:
            assert kb.verify().problems == ()


def of(outcome: Outcome, kind: str, arm: str | None = None) -> list[dict[str, Any]]:
    return [row for row in outcome.rows if row["kind"] == kind and arm in (None, row["arm"])]


def test_injection_teaches_every_arm_the_same_facts_and_asks_each_of_them(make: Make, home: Path) -> None:
    declared = make("injection", settings={"arms": ARMS, "checkpoints": [1]})
    ticks: list[Progress] = []
    outcome = run_experiment(declared, home, progress=ticks.append)

    assert outcome.failed == {}
    assert {run.arm for run in outcome.runs} == {arm["name"] for arm in ARMS}
    for arm in ARMS:
        last = [row for row in of(outcome, "state", str(arm["name"])) if row["facts"] == 3]
        assert last, arm
        asked = [row for row in of(outcome, "fact", str(arm["name"])) if row["facts"] == 3]
        assert {row["key"] for row in asked} == {"torchkeras", "Halcyon", "Berlin"}
        assert {row["difficulty"] for row in asked} == {"short", "long", "contradiction"}
    # First that there is an effect: the taught are recalled, the unedited model knows nothing, and its weights stand.
    assert [row["after"] for row in of(outcome, "state", "sequential")] == ["", "", "compact"]
    assert of(outcome, "state", "sequential")[1]["recalled"] > of(outcome, "state", "unedited")[-1]["recalled"] == 0
    assert of(outcome, "state", "unedited")[-1]["drift_kl"] == 0
    assert of(outcome, "state", "sequential")[-1]["drift_kl"] > 0
    assert [row["age"] for row in of(outcome, "fact", "sequential") if row["facts"] == 3 and not row["after"]] == [
        2,
        1,
        0,
    ]
    assert [row["keys"] for row in of(outcome, "edit", "chunked-2")] == [2, 1]
    assert [row["op"] for row in of(outcome, "edit", "sequential")] == ["insert"] * 3 + ["compact"]
    # Rounding each sum gives other weights, and nothing else differs.
    rounded, exact = (of(outcome, "state", f"sequential{end}")[1]["drift_kl"] for end in (", bf16 sums", ""))
    assert rounded != exact
    steps = [tick for tick in ticks if tick.stage == "experiment"]
    assert steps[-1].step == steps[-1].total == sum(len(run.steps) for run in outcome.runs)
    assert "left" in steps[-1].note

    _check_report(declared, outcome)


def test_capacity_watches_every_edit_and_counts_bits(make: Make, home: Path) -> None:
    declared = make("capacity", settings={"budgets": [{"name": "one"}], "checkpoints": [1, 2], "stop_below": 0.0})
    outcome = run_experiment(declared, home)

    assert [row["facts"] for row in of(outcome, "watch")] == [1, 2, 3]
    states = of(outcome, "state", "one")
    assert [row["facts"] for row in states] == [1, 2, 3]
    assert 0 < states[-1]["bits_taught"] <= states[-1]["bits_of_base"]
    for row in states:
        assert row["untaught_n"] == row["facts"]
        assert row["bits"] == pytest.approx(row["bits_taught"] - row["bits_untaught"], abs=0.02)
    assert states[-1]["bits"] > 0
    # Twice the matrices' sizes is what full rank would take; the adapters of three edits are counted one by one.
    assert states[0]["adapter_parameters"] < states[1]["adapter_parameters"] < states[2]["adapter_parameters"]
    for row in of(outcome, "loss"):
        assert 1 <= row["rank_encoder"] <= row["candidates"]
    _check_report(declared, outcome)


def test_capacity_stops_where_surely_too_little_is_recalled_and_keeps_that_state_through_a_kill(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = {"name": "one step", "edit": {"max_steps": 1, "value_lr": 1e-6}}
    settings = {"budgets": [budget], "checkpoints": [1, 4]}
    declared = make("capacity", n=5, settings=settings, measure={"last_questions": 6})
    finish = Desk.finish

    class Enough(Exception):
        """Stands for whatever ends a process."""

    def killed(desk: Desk, step: str, rows: Any) -> None:
        if desk.run.arm == "one step" and step == "ask-0004":
            raise Enough
        finish(desk, step, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Desk, "finish", killed)
        with pytest.raises(Enough):
            run_experiment(declared, home)
    outcome = run_experiment(declared, home)
    # None of one question is no proof: its interval reaches 0.79. None of four reaches 0.49.
    assert [row["facts"] for row in of(outcome, "edit", "one step")] == [1, 2, 3, 4]
    states = of(outcome, "state", "one step")
    assert [(row["facts"], row["recalled"], row["given_up"]) for row in states] == [(1, 0, False), (4, 0, True)]
    assert states[1]["drift_n"] > states[0]["drift_n"], "the last state of a budget is measured as the last"
    assert len(outcome.rows) == len(read_outcome(declared, home).rows)


def test_bits_take_off_what_untaught_texts_gain_and_a_loss_counts_too() -> None:
    """By hand, in bits a text: taught 8 to 2 and 8 to 9, untaught 8 to 7 and 8 to 6: 5 less 2 times 1.5 is 2."""
    bits = {"a": 2.0, "b": 9.0, "c": 7.0, "d": 6.0}

    class Scores:
        base = False

        def row(self, question: str, text: str) -> Any:
            return SimpleNamespace(text=text, answer=[0, 0])

        def score(self, rows: list[Any]) -> list[Any]:
            return [SimpleNamespace(nll=(8.0 if self.base else bits[r.text]) * math.log(2) / 2) for r in rows]

        @contextmanager
        def base_weights(self) -> Iterator[None]:
            self.base = True
            yield
            self.base = False

    lm = Scores()
    bench: Any = SimpleNamespace(lm=lm, engine=lm)
    taught, untaught = ([Case(Fact(f"key {text}", text)) for text in texts] for texts in ("ab", "cd"))
    assert _bits(bench, taught, untaught) == {
        "bits": 2.0, "bits_taught": 5.0, "bits_untaught": 3.0, "untaught_n": 2, "bits_of_base": 16.0,
    }  # fmt: skip
    assert _bits(bench, taught, [])["bits"] is None


def test_padding_holds_no_parameters() -> None:
    a, b = torch.ones(3, 5), torch.ones(4, 3)
    padded = torch.cat([a, torch.zeros(2, 5)]), torch.cat([b, torch.zeros(4, 2)], dim=1)
    assert _parameters({"one": (a, b), "two": padded}) == 2 * 3 * (5 + 4)


def test_a_fact_that_is_lost_twice_counts_once(make: Make, tmp_path: Path) -> None:
    """The tiny model forgets at random: what is recited is given here, edit by edit."""
    declared = make("capacity", n=4)
    told = iter([[True], [True, True], [False, True, True], [True, True, True, True], [False, False, True, True, True]])

    class Says:
        def row(self, question: str, text: str) -> str:
            return question + text

        def recites(self, rows: list[str], config: Any) -> list[bool]:
            return next(told)

    says = Says()
    bench: Any = SimpleNamespace(lm=says, engine=says)
    desk: Any = SimpleNamespace(folder=tmp_path, run=SimpleNamespace(id="one-0"))
    watch = _Watch(bench, declared.cases[:5], desk)
    watch._near = {"encoder": np.array([[0.1 * i + 0.01 * j for j in range(5)] for i in range(5)])}
    rows = [row for n in range(1, 6) for row in watch.look(n, None)]
    assert [row["lost"] for row in rows if row["kind"] == "watch"] == [0, 0, 1, 0, 2]
    losses = [(row["facts"], row["key"], row["candidates"]) for row in rows if row["kind"] == "loss"]
    first, second = (case.key for case in declared.cases[:2])
    assert losses == [(3, first, 2), (5, second, 3)], "a fact lost before is no candidate either"


def test_a_lost_fact_is_ranked_among_all_and_among_those_of_its_kind(tmp_path: Path) -> None:
    kinds = ("village", "person", "village", "person", "village", "village")
    cases = [Case(Fact(f"k{i}", "A text.", tags=(kind,))) for i, kind in enumerate(kinds)]
    desk: Any = SimpleNamespace(folder=tmp_path, run=SimpleNamespace(id="one-0"))
    watch = _Watch(SimpleNamespace(), cases, desk)  # type: ignore[arg-type]
    near = np.zeros((6, 6))
    near[:, 5] = [0.2, 0.9, 0.5, 0.1, 0.5, 1.0]  # to the edit that breaks them, a village
    watch._near = {"encoder": near}
    could = [0, 1, 2, 3, 4]
    village, person = (watch._loss(i, could, 6) for i in (2, 3))
    assert (village["same_kind"], village["of_kind"], village["peers"], village["candidates"]) == (True, 3, 3, 5)
    assert (village["rank_encoder"], village["peer_rank_encoder"]) == (2.5, 1.5), "equal ones share their ranks"
    assert (person["same_kind"], person["of_kind"], person["peers"]) == (False, 3, 2)
    assert (person["rank_encoder"], person["peer_rank_encoder"]) == (5.0, 2.0)


def test_factors_measure_all_three_explanations(make: Make, home: Path) -> None:
    known = {"known": "Berlin", "questions": ["What is Berlin?"], "keys": ["Quorvane", "Berlim"], "text": "a tool"}
    editors = [{"name": "AdaLoRA"}, {"name": "LoRA 2", "editor": "lora", "rank": 2}, {"name": "full", "editor": "full"}]
    settings = {"known": [known], "depths": [0.5], "scales": [1.0, 30.0], "noise_facts": 1, "editors": editors}
    declared = make("factors", n=1, settings=settings)
    outcome = run_experiment(declared, home)

    assert outcome.failed == {}
    assert [row["key"] for row in of(outcome, "key")] == ["Quorvane", "Berlim"]
    assert all(row["near_n"] == 1 and row["near_kl"] > 0 for row in of(outcome, "key"))
    untaught = [(row["arm"], row["key"], row["recalled_n"]) for row in of(outcome, "key, untaught")]
    assert untaught == [(arm, key, 1) for arm in ("unedited", "in-context") for key in ("Quorvane", "Berlim")]
    gaussian = {row["scale"]: row for row in of(outcome, "noise") if row["noise"] == "gaussian"}
    assert gaussian[30.0]["drift_kl"] > gaussian[1.0]["drift_kl"] > 0
    assert gaussian[30.0]["size"] == pytest.approx(30 * gaussian[1.0]["size"], rel=1e-3)
    same = {row["scale"]: row for row in of(outcome, "noise") if row["noise"] == "same singular values"}
    assert same[1.0]["size"] == pytest.approx(gaussian[1.0]["size"], rel=1e-3)
    ranks = {row["arm"]: row["effective_rank"] for row in of(outcome, "rank") if "effective_rank" in row}
    assert ranks["LoRA 2"] <= 2.001
    assert ranks["full"] > ranks["LoRA 2"]
    _check_report(declared, outcome)


def test_editors_all_learn_the_fact_and_leave_the_weights(make: Make, home: Path) -> None:
    declared = make("editors", n=1, settings={"near": 0.3}, edit={"max_steps": 60})
    outcome = run_experiment(declared, home)

    assert outcome.failed == {}
    merged = ("adalora", "lora", "full")
    for arm in (*merged, "prefix-tuning"):
        assert [row["trained_right"] for row in of(outcome, "fact", arm)] == [1], arm
    assert [row["trained_right"] for row in of(outcome, "fact", "unedited")] == [0]
    for arm in ("prompt-tuning", "prefix-tuning", "p-tuning"):
        (routing,) = of(outcome, "routing", arm)
        assert routing["routed_right"] > 0
        assert all(row["bytes"] > 0 for row in of(outcome, "drift", arm))
    assert not of(outcome, "failed")
    _check_report(declared, outcome)


def test_training_that_fails_ends_no_run_of_a_kept_method(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = make("editors", n=2, settings={"methods": ["prompt-tuning"]}, edit={"max_steps": 2})
    train, finish = SoftPromptEditor.train, Desk.finish
    calls: list[EditTask] = []

    def fails_once(self: SoftPromptEditor, copy: Any, pool: Any, task: EditTask, config: Any) -> Training:
        calls.append(task)
        if len(calls) == 1:
            raise EditFailed("The loss was not finite at step 3.")
        return train(self, copy, pool, task, config)

    class Enough(Exception):
        """Stands for whatever ends a process."""

    def killed(desk: Desk, step: str, rows: Any) -> None:
        if step == "ask":
            raise Enough
        finish(desk, step, rows)

    monkeypatch.setattr(SoftPromptEditor, "train", fails_once)
    with monkeypatch.context() as patched:
        patched.setattr(Desk, "finish", killed)
        with pytest.raises(Enough):
            run_experiment(declared, home)
    outcome = run_experiment(declared, home)
    assert (outcome.failed, len(calls)) == ({}, 2)
    (failed,) = of(outcome, "failed")
    assert (failed["key"], failed["trained"], failed["trained_right"]) == (declared.cases[0].key, 1, 0)
    assert [row["key"] for row in of(outcome, "fact")] == [declared.cases[1].key], "it is not asked with another's"


def test_training_that_fails_ends_no_run_of_the_factors(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"known": "Berlin", "questions": ["What is Berlin?"], "keys": ["Quorvane", "Berlim"], "text": "a tool"}
    settings = {"known": [known], "depths": [0.5], "scales": [1.0], "noise_facts": 1, "editors": [{"name": "AdaLoRA"}]}
    declared = make("factors", n=1, settings=settings)

    def fails(*_: Any, **__: Any) -> None:
        raise EditFailed("The loss was not finite at step 3.")

    monkeypatch.setattr(Engine, "train", fails)
    outcome = run_experiment(declared, home)
    assert (outcome.failed, outcome.unfinished) == ({}, ())
    assert [row["part"] for row in of(outcome, "failed")] == ["keys", "keys", "noise", "rank"]
    assert [(row["recalled"], row["recalled_n"]) for row in of(outcome, "failed", "AdaLoRA")] == [(0.0, 1)]
    assert experiment_document(declared, outcome).sections


def _check_report(declared: Declared, outcome: Outcome) -> None:
    document = experiment_document(declared, outcome)
    assert document.findings
    data = json.loads(render(document, "json"))
    assert data["ok"] is True
    assert data["experiment"]["facts_sha256"] == declared.facts_digest
    assert data["environment"]["torch"]
    assert set(data["environment"]["git"]) == {"commit", "changed"}
    assert data["model"]["digest"]
    assert len(data["rows"]) == len(outcome.rows)
    assert str(Path(declared.model).parent) not in json.dumps(data)
    for table in data["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["title"]
    titles = [section.title for section in document.sections]
    for format in ("markdown", "html", "terminal"):
        text = html.unescape(render(document, format))
        assert "unedited" in text
        assert titles[0] in text
        assert "in-context" in text or format == "terminal"  # where a narrow column may fold it
    if any(section.figure is not None for section in document.sections):
        assert "<svg" in render(document, "html")
        assert "▁" in render(document, "markdown") or "█" in render(document, "markdown")


def test_a_run_that_is_finished_by_another_commit_says_so(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = make("injection", n=1, settings={"arms": ARMS[:2]}, measure={"last_questions": 6})
    at = {"commit": "a" * 40, "changed": False}
    monkeypatch.setattr("kvllm.experiments.environment.git_state", lambda: dict(at))
    run_experiment(declared, home, only=["unedited"])
    outcome = run_experiment(declared, home, only=["unedited"])  # nothing is left to do: no session
    assert [session["runs"] for session in outcome.noted["sessions"]] == [["unedited-0"]]
    assert not any("versions" in warning for warning in experiment_document(declared, outcome).warnings)
    at["commit"] = "b" * 40
    document = experiment_document(declared, run_experiment(declared, home))
    assert any("2 versions of the code" in warning for warning in document.warnings)
    assert dict(document.measured)["commit"] == f"{'a' * 40}, {'b' * 40}"
    assert [session["runs"] for session in document.data["sessions"]] == [["unedited-0"], ["in-context-0"]]


def test_an_interrupted_run_goes_on_where_it_was(make: Make, home: Path) -> None:
    declared = make("injection", n=2, settings={"arms": ARMS[2:4]}, edit={"max_steps": 8})

    class Enough(Exception):
        """Stands for whatever ends a process."""

    def stop(tick: Progress) -> None:
        if tick.stage == "experiment" and tick.step == 3:
            raise Enough

    with pytest.raises(Enough):
        run_experiment(declared, home, progress=stop)
    with Results(home / "results.db", readonly=True) as results:
        before = results.seconds()
    assert len(before) == 3
    with KnowledgeBase.open(home / "runs" / "sequential-0" / "my.kb", readonly=True) as kb:
        made = [edit.created_at for edit in reversed(kb.history())]

    outcome = run_experiment(declared, home)
    with Results(home / "results.db", readonly=True) as results:
        after = results.seconds()
    assert {key: after[key] for key in before} == before, "finished steps are not done again"
    with KnowledgeBase.open(home / "runs" / "sequential-0" / "my.kb", readonly=True) as kb:
        assert [edit.created_at for edit in reversed(kb.history())][: len(made)] == made
    assert without_times(outcome.rows) == without_times(run_experiment(declared, home.parent / "whole").rows)


@pytest.mark.parametrize(
    ("kind", "settings", "last", "removed", "gone"),
    [
        ("injection", {"arms": [ARMS[2]]}, "ask-0002", "", "my.kb"),
        ("capacity", {"budgets": [{"name": "sequential"}]}, "ask-0002", "", "my.kb"),
        ("capacity", {"budgets": [{"name": "sequential"}]}, "edit-0002", "watch", "watch/0001.json"),
        ("editors", {"methods": ["prompt-tuning"]}, "ask", "", "kept/0001.safetensors"),
    ],
)
def test_a_run_whose_folder_is_gone_does_not_go_on_untaught(
    make: Make,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    settings: Any,
    last: str,
    removed: str,
    gone: str,
) -> None:
    declared = make(kind, n=2, settings=settings, edit={"max_steps": 2})
    finish = Desk.finish

    class Enough(Exception):
        """Stands for whatever ends a process."""

    def killed(desk: Desk, step: str, rows: Any) -> None:
        if step == last and desk.run.arm not in ("unedited", "in-context"):
            raise Enough
        finish(desk, step, rows)

    with monkeypatch.context() as patched:
        patched.setattr(Desk, "finish", killed)
        with pytest.raises(Enough):
            run_experiment(declared, home)
    rows = read_outcome(declared, home).rows
    (run,) = read_outcome(declared, home).unfinished
    shutil.rmtree(home / "runs" / run / removed)
    outcome = run_experiment(declared, home)
    assert list(outcome.failed) == [run]
    assert f"{gone} of its folder runs/{run}, which is not there; nothing was run" in outcome.failed[run]
    assert outcome.rows == rows
    assert list(run_experiment(declared, home).failed) == [run], "nor at the next attempt"


def test_a_start_that_fails_leaves_the_folder_free(make: Make, home: Path) -> None:
    arms = {"arms": ARMS[:1]}
    with pytest.raises(ModelError):
        run_experiment(replace(make("injection", n=1, settings=arms), model="no such model"), home)
    assert not run_experiment(make("injection", n=1, settings=arms), home).unfinished


def test_damaged_results_are_called_by_their_name(make: Make, home: Path) -> None:
    declared = make("injection", n=1, settings={"arms": ARMS[:1]})
    run_experiment(declared, home)
    data = (home / "results.db").read_bytes()
    (home / "results.db").write_bytes(data[:8192] + b"x" * (len(data) - 8192))
    with pytest.raises(Corrupt, match=r"results\.db is damaged") as told:
        read_outcome(declared, home)
    assert "kvllm verify" not in str(told.value)


def test_results_of_another_declaration_are_never_mixed(make: Make, home: Path) -> None:
    arms = {"arms": ARMS[:1]}
    run_experiment(make("injection", n=1, settings=arms), home)
    with pytest.raises(StoreError, match="another declaration"):
        read_outcome(make("injection", n=2, settings=arms), home)
    with pytest.raises(StoreError, match="another declaration"):
        run_experiment(make("injection", n=2, settings=arms), home)
    with pytest.raises(StoreError, match="no results"):
        read_outcome(make("injection", n=1, settings=arms), home.parent / "nowhere")


def test_chosen_arms_are_run_alone_and_the_report_names_the_rest(make: Make, home: Path) -> None:
    declared = make("injection", n=1, settings={"arms": ARMS[:2]})
    with pytest.raises(ConfigError, match=r"no arm 'elsewhere'.*unedited, in-context;"):
        run_experiment(declared, home, only=["unedited", "elsewhere"])
    outcome = run_experiment(declared, home, only=["unedited"])
    assert {row["run"] for row in outcome.rows} == {"unedited-0"}
    assert outcome.unfinished == ("in-context-0",)
    document = experiment_document(declared, outcome)
    assert document.warnings == ("1 of 2 runs are not finished: in-context-0.",)
    whole = run_experiment(declared, home, only=["in-context-0"])
    assert (whole.unfinished, experiment_document(declared, whole).warnings) == ((), ())
    assert {row["run"] for row in whole.rows} == {"unedited-0", "in-context-0"}


def test_two_sessions_do_not_lead_one_experiment(make: Make, home: Path) -> None:
    declared = make("injection", n=1, settings={"arms": ARMS[:1]})
    with Results(home / "results.db") as results:
        results.take()
        with pytest.raises(Busy):
            run_experiment(declared, home)
    assert run_experiment(declared, home).failed == {}


def test_a_run_that_fails_leaves_the_others_and_says_why(
    make: Make, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import adalora
    from kvllm.errors import KvllmError

    declared = make("editors", n=1, settings={"methods": ["unedited", "prompt-tuning"]})

    def broken(*_: Any, **__: Any) -> None:
        raise KvllmError("No shelf today.")

    monkeypatch.setattr("kvllm.experiments.editors.SoftPrompts", broken)
    outcome = run_experiment(declared, home)
    assert outcome.failed == {"prompt-tuning-0": "No shelf today."}
    assert of(outcome, "fact", "unedited")
    document = experiment_document(declared, outcome)
    assert document.json()["ok"] is False
    assert any("No shelf today" in warning for warning in document.warnings)
    assert adalora.ADAPTER


def test_the_rest_is_estimated_from_steps_of_the_same_kind() -> None:
    steps = [("a", "edit-1"), ("a", "edit-2"), ("a", "ask-2"), ("b", "edit-1")]
    assert remaining(steps, {}, 5.0, 0) is None
    seconds = {("a", "edit-1"): 10.0}
    assert remaining(steps, seconds, 10.0, 0) == pytest.approx(30.0)
    seconds[("a", "ask-2")] = 2.0
    assert remaining(steps, seconds, 12.0, 0) == pytest.approx(20.0)
    # Two runs at once: twice the work in the same time.
    assert remaining(steps, seconds, 6.0, 0) == pytest.approx(10.0)


def _script(declared: dict[str, Any], facts: Path, home: Path, jobs: int, ray: bool = False) -> str:
    return (
        "from pathlib import Path\n"
        "from kvllm.experiments.declared import declare\n"
        "from kvllm.experiments.runner import run_experiment\n"
        "if __name__ == '__main__':\n"
        f"    declared = declare({declared!r}, folder=Path({str(facts)!r}))\n"
        f"    outcome = run_experiment(declared, {str(home)!r}, jobs={jobs}, ray={ray})\n"
        "    assert not outcome.failed, outcome.failed\n"
    )


def _plain(declared: Declared) -> dict[str, Any]:
    """Return a declaration as it can be given to another process."""
    measure = declared.measure.to_dict()
    edit = {k: list(v) if isinstance(v, tuple) else v for k, v in declared.edit.items()}
    return {
        "kind": declared.kind, "name": declared.name, "model": declared.model, "device": declared.device,
        "facts": ["facts.jsonl"], "n": declared.n, "seeds": list(declared.seeds), "edit": edit, "measure": measure,
        "settings": dict(declared.settings),
    }  # fmt: skip


@pytest.fixture
def elsewhere(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes use the session's cache and fetch nothing: their encoder is the tiny model."""
    monkeypatch.setenv("KVLLM_CACHE", str(tiny_cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", str(root))


KILLED: dict[str, dict[str, Any]] = {
    "injection": {"n": 3, "settings": {"arms": [ARMS[2]], "checkpoints": [1, 2]}},
    "capacity": {"n": 3, "settings": {"budgets": [{"name": "one"}], "checkpoints": [1, 2], "stop_below": 0.0}},
    "factors": {
        "n": 1,
        "settings": {
            "known": [{"known": "Berlin", "questions": ["What is Berlin?"], "keys": ["Quorvane"], "text": "a tool"}],
            "depths": [0.5],
            "scales": [1.0],
            "noise_facts": 1,
            "editors": [{"name": "AdaLoRA"}, {"name": "full", "editor": "full"}],
        },
    },
    "editors": {"n": 2, "settings": {"methods": ["unedited", "lora", "prompt-tuning"]}},
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", KILLED)
def test_killed_ten_times_at_random_moments_the_rows_are_those_of_an_undisturbed_run(
    make: Make, home: Path, tmp_path: Path, elsewhere: None, kind: str
) -> None:
    """Each attempt is a forked process that kills itself at a random moment, so that no kill comes too late.

    A moment is a tick of the engine, or just before or after a file or a finished step is written.
    """
    declared = make(kind, edit={"max_steps": 12}, **KILLED[kind])
    script = tmp_path / "attempts.py"
    script.write_text(
        f"""
import json, os, random, signal
from pathlib import Path
import kvllm.editing.engine, kvllm.editing.files as files, kvllm.experiments.{kind} as module
import kvllm.experiments.runner as runner
from kvllm.experiments.declared import declare
from kvllm.experiments.desk import Desk

declared = declare({_plain(declared)!r}, folder=Path({str(tmp_path)!r}))
left = [10**9]

def tick(*_):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def between(owner, name):
    call = getattr(owner, name)
    def watched(*given, **named):
        tick()
        found = call(*given, **named)
        tick()
        return found
    setattr(owner, name, watched)

between(Desk, "finish")
for owner in (files, module):
    for name in ("write_tensors", "_write"):
        if hasattr(owner, name):
            between(owner, name)

def attempt(home, after):
    left[0] = after
    child = os.fork()
    if child == 0:
        runner.run_experiment(declared, home, progress=tick)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

rng = random.Random(0)
codes = []
while codes.count(-9) < 10 or codes[-1] != 0:
    assert len(codes) < 40 and codes[-1:] != [0], codes  # it must not be finished before it was killed ten times
    after = rng.randint(0, {10 if kind == "editors" else 24}) if codes.count(-9) < 10 else 10**9
    codes.append(attempt({str(home)!r}, after))
assert attempt({str(tmp_path / "whole")!r}, 10**9) == 0
print(json.dumps(codes))
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes.count(-9) >= 10
    assert codes[-1] == 0
    killed, whole = read_outcome(declared, home), read_outcome(declared, tmp_path / "whole")
    assert len(whole.rows) >= 7
    assert without_times(killed.rows) == without_times(whole.rows)


def test_a_delta_that_is_read_back_has_the_order_of_the_layers(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["layers.2", "layers.9", "layers.10"]
    delta = {name: (torch.full((2, 3), float(i)), torch.zeros(4, 2)) for i, name in enumerate(names)}
    monkeypatch.setattr("kvllm.experiments.factors.train", lambda *_: SingleEdit(delta, {}))
    model = SimpleNamespace(named_modules=lambda: [("", None), *((name, None) for name in names)])
    bench: Any = SimpleNamespace(lm=SimpleNamespace(model=model))
    done: set[str] = set()
    desk: Any = SimpleNamespace(
        folder=tmp_path, open=lambda step: step not in done, declared=make("factors"), run=SimpleNamespace(seed=0)
    )
    fresh = _real_edit(desk, bench, make("factors").cases[0]).delta
    done.add("real-edit")
    again = _real_edit(desk, bench, make("factors").cases[0]).delta
    assert list(fresh) == list(again) == names
    assert [float(a[0, 0]) for a, _ in again.values()] == [0.0, 1.0, 2.0]


def test_a_run_begins_anew_where_that_is_asked_for(make: Make, home: Path) -> None:
    declared = make("injection", n=1, settings={"arms": [*ARMS[:2], {"mode": "batched"}]}, edit={"max_steps": 2})
    before = run_experiment(declared, home)
    impossible = 1e6
    with closing(sqlite3.connect(home / "results.db", isolation_level=None)) as database:
        database.execute("UPDATE steps SET seconds = ?", [impossible])  # a step that is done anew may take as long
    shutil.rmtree(home / "runs" / "in-context-0")
    with pytest.raises(ConfigError, match="no arm 'elsewhere'"):
        run_experiment(declared, home, again=["elsewhere"])
    after = run_experiment(declared, home, only=["unedited"], again=["batched", "in-context"])
    with Results(home / "results.db", readonly=True) as results:
        anew = {run for (run, _), seconds in results.seconds().items() if seconds != impossible}
    assert anew == {"batched-0", "in-context-0"}
    assert without_times(after.rows) == without_times(before.rows)
    assert (after.failed, after.unfinished) == ({}, ())


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_processes_side_by_side_give_the_rows_of_one_and_outlive_a_killed_worker(
    make: Make, home: Path, tmp_path: Path, elsewhere: None
) -> None:
    declared = make("injection", n=2, settings={"arms": ARMS[3:5]}, edit={"max_steps": 8})
    script = tmp_path / "experiment.py"
    # The first worker that begins its second step is killed, once.
    fuse = (
        "import os, signal, kvllm.experiments.desk as desk\n"
        "finish = desk.Desk.finish\n"
        "def once(self, step, rows):\n"
        "    finish(self, step, rows)\n"
        f"    mark = {str(tmp_path / 'killed')!r}\n"
        "    try: os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "    except FileExistsError: return\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "desk.Desk.finish = once\n"
    )
    script.write_text(fuse + _script(_plain(declared), tmp_path, home, 2), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True)
    assert (tmp_path / "killed").exists()
    side = read_outcome(declared, home)
    assert without_times(side.rows) == without_times(run_experiment(declared, tmp_path / "alone").rows)


@pytest.mark.skipif(os.name == "nt", reason="the fuse stands in a file that is no module")
def test_workers_on_a_full_disk_end_the_experiment_as_one_process_does(
    make: Make, home: Path, tmp_path: Path, elsewhere: None
) -> None:
    declared = make("injection", n=1, settings={"arms": ARMS[:2]})
    script = tmp_path / "experiment.py"
    fuse = (
        "import kvllm.experiments.desk as desk\n"
        "from kvllm.errors import OutOfResources\n"
        "def full(*_): raise OutOfResources('The disk is full.')\n"
        "desk.Desk.finish = full\n"
    )
    for jobs in (1, 2):
        script.write_text(fuse + _script(_plain(declared), tmp_path, home, jobs), encoding="utf-8")
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1] == "kvllm.errors.OutOfResources: The disk is full.", jobs


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM")
def test_an_interrupted_leader_waits_for_no_worker(make: Make, home: Path, tmp_path: Path, elsewhere: None) -> None:
    declared = make("injection", n=2, settings={"arms": ARMS[3:5]}, edit={"max_steps": 8})
    script = tmp_path / "experiment.py"
    # Every worker takes its time after its first step; the leader alone is told to stop.
    fuse = (
        "import os, signal, time, kvllm.experiments.desk as desk\n"
        "finish = desk.Desk.finish\n"
        "def slowly(self, step, rows):\n"
        "    finish(self, step, rows)\n"
        f"    open({str(tmp_path / 'worker')!r} + str(os.getpid()), 'w').close()\n"
        "    time.sleep(600)\n"
        "desk.Desk.finish = slowly\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler if __name__ == '__main__' else signal.SIG_DFL)\n"
    )
    script.write_text(fuse + _script(_plain(declared), tmp_path, home, 2), encoding="utf-8")
    leader = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    workers: list[int] = []
    while len(workers) < 2 and leader.poll() is None:
        time.sleep(0.1)
        workers = [int(path.name.removeprefix("worker")) for path in tmp_path.glob("worker*")]
    leader.terminate()
    assert leader.wait(timeout=60) != 0
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert len(read_outcome(declared, home).rows) > 0


@pytest.mark.skipif("KVLLM_CAMPAIGN" not in os.environ, reason="starts a cluster; set KVLLM_CAMPAIGN=1")
def test_a_ray_cluster_gives_the_same_rows_and_outlives_a_killed_worker(
    make: Make, home: Path, tmp_path: Path, elsewhere: None
) -> None:
    pytest.importorskip("ray")
    declared = make("injection", n=2, settings={"arms": [ARMS[3]]}, edit={"max_steps": 8})
    script = tmp_path / "experiment.py"
    # The worker kills itself after its first finished step: workers read this file's module through sitecustomize.
    patch = tmp_path / "site" / "sitecustomize.py"
    patch.parent.mkdir()
    patch.write_text(
        "import os, signal, sys\n"
        "if any('default_worker' in argument for argument in sys.argv) or 'RAY_JOB_ID' in os.environ:\n"
        "    import importlib.abc, importlib.util\n"
        "    class Finder(importlib.abc.MetaPathFinder):\n"
        "        def find_spec(self, name, path, target=None):\n"
        "            if name != 'kvllm.experiments.desk': return None\n"
        "            sys.meta_path.remove(self)\n"
        "            spec = importlib.util.find_spec(name)\n"
        "            load = spec.loader.exec_module\n"
        "            def exec_module(module):\n"
        "                load(module)\n"
        "                finish = module.Desk.finish\n"
        "                def once(self, step, rows):\n"
        "                    finish(self, step, rows)\n"
        f"                    mark = {str(tmp_path / 'killed')!r}\n"
        "                    try: os.close(os.open(mark, os.O_CREAT | os.O_EXCL))\n"
        "                    except FileExistsError: return\n"
        "                    os.kill(os.getpid(), signal.SIGKILL)\n"
        "                module.Desk.finish = once\n"
        "            spec.loader.exec_module = exec_module\n"
        "            return spec\n"
        "    sys.meta_path.insert(0, Finder())\n",
        encoding="utf-8",
    )
    script.write_text(_script(_plain(declared), tmp_path, home, 1, ray=True), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{patch.parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
    environment.pop("RAY_ADDRESS", None)
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=600)
    assert (tmp_path / "killed").exists(), "no worker was killed"
    found = read_outcome(declared, home)
    assert without_times(found.rows) == without_times(run_experiment(declared, tmp_path / "alone").rows)


def test_runs_are_independent_of_each_other(make: Make) -> None:
    declared = make("injection", settings={"arms": ARMS}, seeds=[0, 1])
    runs = runs_of(declared)
    assert len(runs) == 2 + 2 * (len(ARMS) - 2), "what trains nothing has one seed"
    assert len({run.id for run in runs}) == len(runs)
