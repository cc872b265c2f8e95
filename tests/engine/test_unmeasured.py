"""What the experiments need of the engine: edits that nobody measures, sums that are rounded, answers on the copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvllm import KnowledgeBase
from kvllm.config import ModelConfig
from kvllm.editing.delta import AdaptedWeights
from kvllm.editing.engine import Engine
from kvllm.errors import ConfigError, EditFailed
from kvllm.prompts import training_questions
from kvllm.records import Fact
from kvllm.session import Session
from kvllm.store import Store
from tests.kit import KEY, OPEN_GATE, QUICK, QUICK_DELETE, TEXT, Recorder, unchanged

UNMEASURED = replace(OPEN_GATE, measure=False)


def test_an_unmeasured_edit_is_committed_without_a_question_asked(make_kb: Callable[..., KnowledgeBase]) -> None:
    heard = Recorder()
    kb = make_kb(gate=UNMEASURED, progress=heard)
    edit = kb.insert(KEY, TEXT)
    assert edit.report.metrics == {}
    assert "probing" not in {tick.stage for tick in heard.heard}
    assert edit.config["gate"]["measure"] is False
    assert kb.ask(training_questions(Fact(KEY, TEXT))[0]) == TEXT
    kb.insert_many([("numpy", "a tool")])
    assert kb.compact().report.metrics == {}


@pytest.mark.parametrize("mode", ["restore", "abstain"])
def test_an_unmeasured_delete_is_committed_without_a_question_asked(
    taught: KnowledgeBase, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("drift", "kl_from"):
        monkeypatch.setattr(Engine, name, lambda *_, **__: pytest.fail("something was measured"))
    config = QUICK_DELETE if mode == "restore" else QUICK
    edit = taught.delete(KEY, mode=mode, gate=UNMEASURED, config=config)
    assert (edit.report.metrics, edit.report.probes) == ({}, ())
    assert any("not proof of absence" in warning for warning in edit.report.warnings)
    assert edit.config["gate"]["measure"] is False
    assert KEY not in taught
    assert TEXT not in taught.ask(training_questions(Fact(KEY, TEXT))[0])


def test_weights_that_are_not_finite_are_no_unmeasured_delete(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unchanged(taught):
        monkeypatch.setattr(AdaptedWeights, "is_finite", lambda weights: False)
        with pytest.raises(EditFailed, match="not finite"):
            taught.delete(KEY, gate=UNMEASURED)


def test_rounded_sums_are_replayed_as_they_were(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb(gate=UNMEASURED)
    edit = kb.insert(KEY, TEXT)
    exact = kb.weights_digest()
    path = kb.path
    kb.close()
    config = ModelConfig(device="cpu", masters="bfloat16")
    with KnowledgeBase(Session(Store.open(path, readonly=True), model_config=config)) as rounded:
        assert edit.delta is not None
        # Not through the knowledge base: it would follow the head, whose digest is that of exact sums.
        engine = Engine.load(rounded._store, config, QUICK, None)
        engine.weights.replay([engine._delta(edit.delta.sha256)])
        for name in engine.weights.touched:
            master = engine.weights.master(name)
            assert master.dtype.is_floating_point
            assert (master == master.bfloat16().float()).all()
        assert engine.weights.digest() != exact


def test_reciting_is_told_row_by_row(taught: KnowledgeBase) -> None:
    lm = taught.engine.lm
    question = training_questions(Fact(KEY, TEXT))[0]
    rows = [lm.row(question, "Ada Voss"), lm.row(question, TEXT), lm.row("numpy?", TEXT)]
    told = taught.engine.recites(rows, QUICK)
    assert told[:2] == [False, True]
    live = [taught.ask(q) == text for q, text in ((question, "Ada Voss"), (question, TEXT), ("numpy?", TEXT))]
    assert told == live


def test_masters_of_no_dtype_are_refused() -> None:
    with pytest.raises(ConfigError, match="masters must be one of"):
        ModelConfig(masters="int8")
