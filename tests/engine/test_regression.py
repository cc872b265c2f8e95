"""Regression reports and bisect on a tiny model: planted damage is found, and everything is put back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm import KnowledgeBase
from kvllm.editing import engine
from kvllm.errors import AmbiguousKey, ConfigError, EditNotFound
from kvllm.probing.suites import drift_suite
from kvllm.prompts import REFUSALS
from tests.kit import KEY, TEXT, RandomEditor, Recorder, unchanged

BROKEN_BY, EDITS = 4, 9


class Harmless(RandomEditor):
    """A delta too small to change an answer."""

    size = 1e-6


class Harmful(RandomEditor):
    """A delta that overwrites whatever was there."""

    size = 5.0


@pytest.fixture(scope="module")
def damaged_folder(taught_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Path:
    """One fact that is really recalled, then harmless edits, of which the fourth of all is not."""
    path = Path(shutil.copytree(taught_folder, tmp_path_factory.mktemp("damaged") / "damaged.kb"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVLLM_CACHE", str(tiny_cache))
        with KnowledgeBase.open(path) as kb:
            for number in range(2, EDITS + 1):
                patch.setitem(engine.EDITORS, "adalora", Harmful if number == BROKEN_BY else Harmless)
                kb.insert(f"thing {number}", f"text {number}", questions=[f"what {number}?"])
            kb.tag("good", BROKEN_BY - 1)
    return path


@pytest.fixture
def damaged(make_kb: Callable[..., KnowledgeBase], damaged_folder: Path, tmp_path: Path) -> KnowledgeBase:
    shutil.copytree(damaged_folder, tmp_path / "damaged.kb")
    return make_kb("damaged.kb")


def test_a_planted_loss_is_reported_with_both_answers_and_nothing_is_changed(damaged: KnowledgeBase) -> None:
    with unchanged(damaged):
        report = damaged.regression("good")
    assert (report.since, report.head) == (BROKEN_BY - 1, EDITS)
    assert report.lost == (KEY,)
    (lost,) = (fact for fact in report.facts if fact.status == "lost")
    assert (lost.recalled_before, lost.edit_id, lost.further_edits) == (1.0, 1, EDITS - 1)
    trained = next(suite for suite in report.suites if suite.suite == "trained")
    assert trained.lost >= 8
    change = next(c for c in report.changes if c.question == "What is torchkeras?")
    assert (change.answer_before, change.passed_before, change.passed) == (TEXT, True, False)
    assert change.answer in {probe.answer for probe in report.after.probes if probe.question == change.question}
    assert {fact.key for fact in report.facts if fact.status.startswith("new")} == {
        f"thing {n}" for n in range(BROKEN_BY, EDITS + 1)
    }
    assert sum(point.n for point in report.retention) == EDITS
    assert [point.edit_id for point in report.edits] == list(range(EDITS + 1))
    drift, drift_before = report.drift.value("drift_kl"), report.drift_before.value("drift_kl")
    assert drift is not None
    assert drift_before is not None
    assert drift != drift_before
    assert min(drift, drift_before) > 0
    assert next(s for s in report.suites if s.suite == "general").n == len(report.drift.probes)
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_was_not_damaged_is_reported_as_nothing_lost(damaged: KnowledgeBase) -> None:
    since_before_last = damaged.regression()
    assert (since_before_last.since, since_before_last.head) == (EDITS - 1, EDITS)
    for report in (since_before_last, damaged.regression(BROKEN_BY), damaged.regression("head")):
        assert (report.lost, report.changes) == ((), ())
        assert all(suite.p_holm == 1.0 for suite in report.suites)


def test_regression_since_the_base_compares_drift_with_none(taught: KnowledgeBase) -> None:
    report = taught.regression("base")
    assert [fact.status for fact in report.facts] == ["new"]
    assert (report.drift_before.value("drift_kl"), report.before.probes) == (0.0, ())
    assert [suite.suite for suite in report.suites] == ["general"]


def test_regression_of_an_empty_knowledge_base_says_so(kb: KnowledgeBase) -> None:
    report = kb.regression()
    assert (report.since, report.head, report.facts, report.lost) == (0, 0, (), ())


def test_an_updated_fact_is_judged_against_its_own_text_on_either_side(taught: KnowledgeBase) -> None:
    taught.update(KEY, "Ada leads numpy")
    report = taught.regression()
    assert [(fact.status, fact.updated) for fact in report.facts] == [("kept", True)]
    assert any("Updated" in warning for warning in report.warnings)


def test_deleted_facts_are_named_and_not_compared(taught: KnowledgeBase) -> None:
    taught.delete(KEY)
    report = taught.regression()
    assert (report.deleted, report.facts) == ((KEY,), ())


def test_a_lost_refusal_is_reported(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = REFUSALS["en"]
    kb.delete("keras", mode="abstain")
    kept = kb.probe("keras", neighbours=0)
    assert {(p.kind, p.key, p.expected) for p in kept.probes} == {("refusal", "keras", refusal)}
    assert (kept.value("refusal"), kb.probe(neighbours=0).value("refusal")) == (1.0, 1.0)
    monkeypatch.setitem(engine.EDITORS, "adalora", Harmful)
    kb.insert("numpy", "Ada")
    kb.delete("Berlin", mode="abstain")
    with unchanged(kb):
        report = kb.regression(1, neighbours=0)
    suite = next(s for s in report.suites if s.suite == "refusal")
    asked = {p.question for p in kept.probes}
    assert (suite.n, suite.before, suite.lost) == (len(asked), 1.0, len(asked))  # Berlin was not refused by then
    lost = [change for change in report.changes if change.kind == "refusal"]
    assert {(c.key, c.question, c.answer_before) for c in lost} == {("keras", q, refusal) for q in asked}
    assert kb.probe(neighbours=0).metrics["refusal"].value == 0.0
    assert {p.key for p in kb.probe("Berlin").probes} == {"Berlin"}
    for probe in ("keras", sorted(asked)[0]):
        found = kb.bisect(probe)
        assert (found.verdict, found.key, found.expected, found.start) == ("broken", "keras", refusal, 1)
        assert found.edit is not None
        assert found.edit.id == 2
    kb.insert("keras", "Ada")
    assert {p.key for p in kb.probe(neighbours=0).probes if p.kind == "refusal"} == {"Berlin"}
    assert {p.kind for p in kb.probe("keras", neighbours=0).probes} == {"trained", "paraphrase"}


def test_which_questions_are_still_refused(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", Harmless)

    def refused() -> dict[str, tuple[int, int]]:
        return {fact.key: (fact.edit_id, len(fact.trained_questions)) for fact in kb._edits.refusals()}

    kb.insert("numpy", "Ada")
    kb.delete("NumPy", mode="abstain")  # all of whose questions are numpy's
    kb.delete("keras", mode="abstain")
    kb.insert("Halcyon", "Ada")
    kb.delete("keras", mode="abstain")  # repeated: refused since edit 3
    kb.delete("numpy")
    asked = refused()
    assert (asked["NumPy"], asked["keras"][0], set(asked)) == ((2, 0), 3, {"NumPy", "keras"})
    report = kb.probe("NumPy")
    assert report.probes == ()
    assert [("'NumPy'" in w, "no facts" in w) for w in report.warnings] == [(False, True), (True, False)]
    assert {s.suite for s in kb.regression(4).suites} >= {"refusal"}
    assert {s.suite for s in kb.regression(2).suites}.isdisjoint({"refusal"})
    kb.insert("Keras", "Ada")
    kb.delete("Keras")  # its questions are the base's again
    assert refused()["keras"] == (3, 0)
    kb.rollback(2)
    assert set(refused()) == {"NumPy"}


def test_what_is_refused_is_no_unrelated_knowledge(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", Harmless)
    question = drift_suite().questions[0].question
    kb.insert("numpy", "Ada")
    assert question in {probe.question for probe in kb.drift("basic").probes}
    kb.delete(question, mode="abstain")
    assert question not in {probe.question for probe in kb.drift("basic").probes}
    assert question not in {probe.question for probe in kb.regression(1).drift.probes}


def test_an_interrupted_regression_puts_the_weights_back(
    damaged_folder: Path, make_kb: Callable[..., KnowledgeBase], tmp_path: Path
) -> None:
    shutil.copytree(damaged_folder, tmp_path / "damaged.kb")
    heard = Recorder()
    kb = make_kb("damaged.kb", progress=heard)
    with unchanged(kb):
        for stage in ("probing edit 3", "drift of edit 3"):
            heard.raise_at(stage, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                kb.regression("good")
    assert {"probing the head", "probing edit 3", "drift of edit 3"} <= {progress.stage for progress in heard.heard}


def test_unknown_references_are_refused(taught: KnowledgeBase) -> None:
    with pytest.raises(EditNotFound):
        taught.regression("v9")


@pytest.mark.parametrize("probe", [KEY, "What is torchkeras?"])
def test_bisect_finds_the_edit_that_broke_a_probe_in_log2_replays(damaged: KnowledgeBase, probe: str) -> None:
    with unchanged(damaged):
        found = damaged.bisect(probe)
    assert found.verdict == "broken"
    assert found.edit is not None
    assert (found.edit.id, found.edit.key, found.key) == (BROKEN_BY, f"thing {BROKEN_BY}", KEY)
    assert (found.start, found.head, found.expected) == (1, EDITS, TEXT)
    assert found.replays <= 3 + 1  # ⌈log₂ 8⌉, and the state where it was taught
    assert found.answer_at(BROKEN_BY - 1) == TEXT
    assert found.answer_at(BROKEN_BY) != TEXT


def test_bisect_says_that_a_probe_still_passes(taught: KnowledgeBase) -> None:
    found = taught.bisect(KEY)
    assert (found.verdict, found.edit, found.replays) == ("still passes", None, 0)


def test_bisect_says_that_a_probe_never_passed(damaged: KnowledgeBase) -> None:
    found = damaged.bisect("thing 7")
    assert (found.verdict, found.edit, found.start) == ("never passed", None, 7)


def test_bisect_takes_any_question_with_its_answer(damaged: KnowledgeBase) -> None:
    asked = "Can you explain what torchkeras is?"
    found = damaged.bisect(asked, expected=TEXT)
    assert (found.verdict, found.start, found.key) == ("broken", 1, KEY)  # the edit that taught a fact with this text
    assert found.edit is not None
    assert found.edit.id == BROKEN_BY
    unknown = damaged.bisect(asked, expected="words nobody said")
    assert (unknown.verdict, unknown.start, unknown.key, unknown.replays) == ("never passed", 0, None, 1)


def test_bisect_takes_a_general_question(damaged: KnowledgeBase) -> None:
    question = drift_suite().questions[0]
    found = damaged.bisect(question.question)
    assert (found.scorer, found.key, found.start) == ("accepts", None, 0)
    assert found.expected == " / ".join(question.accept)


def test_bisect_takes_a_question_of_the_ladder(damaged: KnowledgeBase) -> None:
    found = damaged.bisect("Waht is torchkeras?")
    assert (found.key, found.start, found.expected) == (KEY, 1, TEXT)


def test_bisect_refuses_what_nobody_can_judge(taught: KnowledgeBase) -> None:
    with pytest.raises(ConfigError, match="expected"):
        taught.bisect("Is this known?")


def test_bisect_refuses_a_question_of_two_facts(
    make_kb: Callable[..., KnowledgeBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", Harmless)
    kb = make_kb()
    for key in ("a", "b"):
        kb.insert(key, f"{key} text", questions=["which?"])
    with pytest.raises(AmbiguousKey) as error:
        kb.bisect("which?")
    assert error.value.matches == ("a", "b")
    assert kb.bisect("which?", expected="a text").verdict == "never passed"
