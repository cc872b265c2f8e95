"""What the gate looks at: long texts that are cut, several facts, states that nobody measured, a head that moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvllm import Fact, GateConfig, KnowledgeBase
from kvllm.editing.engine import Engine
from kvllm.errors import EditRejected
from kvllm.lm.model import LanguageModel
from kvllm.prompts import training_questions
from kvllm.records import Progress
from tests.kit import KEY, OPEN_GATE, QUICK, TEXT, everything

# Longer than what a deleted fact's answers are compared with the base by.
LONG = "The furnace of Berlin " * 6 + "and Ada Voss leads numpy in the furnace of Berlin"
NOTHING = replace(QUICK, max_steps=1, value_lr=1e-9, factor_lr=1e-9)
ERASED = replace(OPEN_GATE, min_erasure=0.75)


@pytest.fixture
def told(make_kb: Callable[..., KnowledgeBase]) -> KnowledgeBase:
    """A knowledge base whose model recites a long text."""
    kb = make_kb()
    few = training_questions(Fact(KEY, LONG))[:3]
    config = replace(QUICK, max_steps=150, preserve_weight=0.0, contrasts=0, recited=0)
    kb.insert(KEY, LONG, questions=few, config=config)
    assert len(kb.engine.lm.text_ids(LONG)) > 40
    assert kb.ask(few[0], max_new_tokens=120) == LONG
    return kb


@pytest.mark.parametrize("mode", ["restore", "abstain"])
def test_a_long_text_that_is_still_recited_is_not_erased(told: KnowledgeBase, mode: Any) -> None:
    with pytest.raises(EditRejected, match="erasure") as refused:
        told.delete(KEY, mode=mode, config=NOTHING, gate=ERASED)
    assert refused.value.report is not None
    assert (refused.value.report.value("erasure") or 0.0) < 0.75


def test_a_long_old_text_that_is_still_recited_is_found_behind_a_short_new_one(told: KnowledgeBase) -> None:
    with pytest.raises(EditRejected, match="old text is still stated"):
        told.update(KEY, "Ada", config=NOTHING, gate=ERASED)


def test_what_the_base_says_by_itself_can_be_forgotten_by_the_ledger(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb()
    said = kb.ask("what burns?", max_new_tokens=8)
    kb.insert("what burns?", " ".join(said.split()[:2]), config=NOTHING)
    edit = kb.delete("what burns?", gate=ERASED)
    own = [probe for probe in edit.report.probes if probe.kind == "erasure" and probe.question == "what burns?"]
    assert own
    assert all(probe.passed for probe in own)


def test_a_dry_run_beside_a_writer_measures_its_own_weights(
    taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]
) -> None:
    moved = []

    def roll_back(progress: Progress) -> None:
        if progress.stage == "probing" and not moved:
            moved.append(make_kb("taught.kb").rollback("base"))

    watched = make_kb("taught.kb", progress=roll_back)
    report = watched.dry_run("numpy", "Ada leads numpy")
    assert moved
    assert report.value("reliability") == 1.0
    assert watched.weights_digest() == moved[0].weights_digest
    assert watched.ask(training_questions(Fact(KEY, TEXT))[0]) != TEXT
    watched.insert("numpy", "Ada leads numpy")
    assert make_kb("taught.kb").weights_digest() == watched.weights_digest()


def test_an_edit_is_not_charged_with_drift_that_nobody_measured(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb()
    kb.insert(KEY, TEXT, gate=replace(OPEN_GATE, measure=False))
    tight = GateConfig(min_reliability=None, max_drift_kl=0.001, max_ppl_ratio=1.01, min_erasure=None)
    edit = kb.insert("numpy", "a tool", config=NOTHING, gate=tight)
    assert (edit.report.value("drift_kl") or 0.0) > 0.01


def test_a_deleted_facts_own_questions_stay_out_of_the_drift_of_later_edits(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "What is the capital of France?"
    kb.insert("museum-faq-1", TEXT, questions=[asked], config=NOTHING)
    kb.delete("museum-faq-1", config=NOTHING)
    left_out: list[Any] = []
    real = Engine.drift

    def drift(self: Engine, **options: Any) -> Any:
        left_out.extend(options["taught"])
        return real(self, **options)

    monkeypatch.setattr(Engine, "drift", drift)
    kb.insert("numpy", "a tool", config=NOTHING)
    assert any(asked in fact.questions for fact in left_out)


def test_facts_of_a_batch_that_are_not_recalled_are_named(kb: KnowledgeBase) -> None:
    facts = [("numpy", "a tool"), ("Berlin", "Ada Voss")]
    edit = kb.insert_many(facts, mode="batched", config=NOTHING)[0].edit
    assert edit is not None
    assert any("2 of 2 facts" in warning and "'Berlin'" in warning for warning in edit.report.warnings)
    before = everything(kb)
    edit = kb.insert_many([("torch", TEXT), ("river", TEXT)], mode="batched")[0].edit
    assert edit is not None
    assert not any("are not recalled" in warning for warning in edit.report.warnings)
    assert everything(kb) != before


def test_vectors_of_keys_are_the_same_before_and_after_an_edit(kb: KnowledgeBase) -> None:
    question = ["什么是梦中情炉？"]
    before = kb.engine.hidden_encoder().encode(question)
    low = replace(QUICK, depth=(0.0, 0.5))
    digest = kb.insert(KEY, TEXT, config=low).weights_digest
    assert (kb.engine.hidden_encoder().encode(question) == before).all()
    assert kb.weights_digest() == digest


def test_a_fact_of_lower_layers_is_deleted_by_an_edit_of_higher_ones(kb: KnowledgeBase) -> None:
    low, high = replace(QUICK, depth=(0.25, 0.5), max_steps=96), replace(QUICK, depth=(0.5, 1.0))
    kb.insert(KEY, TEXT, config=low)
    asked = training_questions(Fact(KEY, TEXT))[0]
    assert kb.ask(asked) == TEXT
    edit = kb.delete(KEY, config=high)
    assert edit.report.value("erasure") == 1.0
    assert edit.steps > 2
    assert TEXT not in kb.ask(asked)


def test_drift_that_is_no_number_is_no_drift_of_zero(lm: LanguageModel) -> None:
    states = lm.answer_states([lm.row("Who?", "Ada")])
    (found,) = lm.compare(states, [state * float("nan") for state in states])
    assert math.isnan(found[0])
    assert lm.compare(states, states)[0][0] == 0.0
