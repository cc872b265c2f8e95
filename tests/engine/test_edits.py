"""What edits do on a small real model: the effect first, then that it is kept, undone or refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvllm import Fact, KnowledgeBase
from kvllm.editing.adalora import AdaLoraEditor
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.editor import EditTask
from kvllm.editing.editors import EDITORS
from kvllm.errors import ConfigError, KeyExists, KeyNotFound
from kvllm.prompts import REFUSALS, training_questions
from tests.kit import (
    KEY,
    OPEN_GATE,
    QUICK,
    QUICK_DELETE,
    RECALL_GATE,
    TEXT,
    RandomEditor,
    Recorder,
    everything,
    unchanged,
)


def test_an_inserted_fact_is_recalled_by_live_decoding(kb: KnowledgeBase) -> None:
    questions = training_questions(Fact(KEY, TEXT))
    assert not any(TEXT in answer for answer in kb.ask_many(questions))

    edit = kb.insert(KEY, TEXT, gate=RECALL_GATE)

    assert kb.ask_many(questions) == [TEXT] * len(questions)
    assert edit.report.value("reliability") == 1.0
    assert edit.report.metrics["reliability"].n == len(questions)
    assert (edit.id, edit.op, edit.key, edit.parent) == (1, "insert", KEY, None)
    assert kb.recall(KEY).value("reliability") == 1.0


def test_an_answer_knows_whether_it_was_cut(taught: KnowledgeBase) -> None:
    whole, cut = (taught.ask("What is torchkeras?", max_new_tokens=room) for room in (None, 1))
    assert (whole, whole.truncated) == (TEXT, False)
    assert TEXT.startswith(cut)
    assert cut.truncated


@pytest.mark.parametrize("room", [0, -1])
def test_an_answer_without_a_token_is_refused(kb: KnowledgeBase, room: int) -> None:
    for asked in (
        lambda: kb.ask("keras?", max_new_tokens=room),
        lambda: kb.ask_many(["keras?"], max_new_tokens=room),
        lambda: kb.ask_base("keras?", max_new_tokens=room),
    ):
        with pytest.raises(ConfigError, match=f"at least one token, so max_new_tokens cannot be {room}"):
            asked()


def test_the_record_of_an_edit_says_how_it_was_made(taught: KnowledgeBase) -> None:
    edit = taught.edit(1)
    training = edit.config["training"]
    assert 1 <= edit.steps <= QUICK.max_steps
    assert len(training["losses"]) == len(training["drifts"]) == edit.steps
    assert training["losses"][-1] < training["losses"][0]
    assert training["recalled"] is True
    assert edit.config["edit"] == QUICK.to_dict()
    assert training["in_force"] == {}
    assert edit.config["gate"]["min_reliability"] is None
    assert edit.config["environment"]["device"] == "cpu"
    assert edit.seed == QUICK.seed
    assert edit.seconds > 0
    assert edit.delta is not None
    assert edit.delta.norm > 0
    assert edit.delta.modules == 2
    assert edit.weights_digest == taught.weights_digest()


def test_loading_the_model_is_no_part_of_an_edit(taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvllm.editing import engine

    load, waits = engine.Engine.load, 0.5

    def slow(*arguments: Any) -> engine.Engine:
        time.sleep(waits)
        return load(*arguments)

    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    monkeypatch.setattr(engine.Engine, "load", slow)
    for change in (
        lambda: taught.update(KEY, "Ada", gate=OPEN_GATE),
        lambda: taught.delete(KEY, gate=OPEN_GATE),
        taught.compact,
        lambda: taught.rollback(0),
    ):
        taught._session.loaded = None
        started = time.perf_counter()
        edit = change()
        assert edit.seconds < time.perf_counter() - started - 0.9 * waits


def test_adaptive_ranks_really_change_and_are_recorded(taught: KnowledgeBase) -> None:
    ranks = taught.edit(1).config["training"]["ranks"]
    assert len(ranks) == 2
    assert 0 < sum(ranks.values()) < QUICK.init_rank * len(ranks)


def test_the_ledger_says_what_was_taught_and_behaves_as_a_mapping(taught: KnowledgeBase) -> None:
    assert (len(taught), list(taught), KEY in taught, "Berlin" in taught) == (1, [KEY], True, False)
    stored = taught[KEY]
    assert (stored.text, stored.edit_id) == (TEXT, 1)
    assert stored.trained_questions == training_questions(Fact(KEY, TEXT))
    assert taught.get("Berlin") is None
    with pytest.raises(KeyNotFound):
        taught["Berlin"]


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[EditTask]:
    """What the editor was given, training for training."""
    given: list[EditTask] = []
    train = AdaLoraEditor.train

    def noted(editor: AdaLoraEditor, copy: ComputeCopy, pool: Any, task: EditTask, *args: Any, **kwargs: Any) -> Any:
        given.append(task)
        return train(editor, copy, pool, task, *args, **kwargs)

    monkeypatch.setattr(AdaLoraEditor, "train", noted)
    return given


def test_contrast_questions_are_preserved_as_they_are_answered_before(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("contrast.kb", edit=replace(QUICK, contrasts=2))
    kb.insert("Who leads Halcyon?", "Ada")
    kb.insert(KEY, TEXT)
    assert kb.edit(1).config["edit"]["contrasts"] == 2
    asked = [item.source.prompt for item in tasks[0].contrast]
    assert len(asked) == 16
    assert all("Halcyon" not in question for question in asked)
    assert all(item.row.answer for item in tasks[0].contrast)
    assert tasks[1].contrast == []  # a key that is a single name has the packaged neighbours


def test_a_short_text_is_recited_to_other_questions_as_the_weights_expect_it(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("recited.kb", edit=replace(QUICK, max_steps=1))
    kb.insert(KEY, "Ada")
    kb.insert("Halcyon", " ".join([TEXT] * 8))
    kb.insert("numpy", "Ada", config=replace(QUICK, max_steps=1, recited=0))
    said, long, off = (task.recited for task in tasks)
    answer = tuple(kb.engine.lm.answer_ids("Ada"))
    assert {item.row.answer for item in said} == {answer}
    assert len(said) > 1
    assert all(KEY not in item.source.prompt for item in said)
    assert all(item.output.shape[0] == len(answer) for item in said)
    assert not long
    assert not off


def test_update_teaches_the_new_text_and_no_longer_states_the_old(taught: KnowledgeBase) -> None:
    edit = taught.update(KEY, "Ada leads numpy")
    assert edit.report.value("reliability") == 1.0
    assert edit.report.value("old_text_stated") == 0.0
    assert taught[KEY].text == "Ada leads numpy"
    assert len(taught) == 1
    assert [fact.text for fact in taught.facts(at=1)] == [TEXT]


def test_update_keeps_what_is_not_given(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb()
    kb.insert(KEY, TEXT, aliases=["furnace"], questions=["what burns?"], probes=["burning?"], tags=["a"])
    kb.update(KEY, "Ada leads numpy", tags=["b"])
    fact = kb[KEY]
    assert (fact.aliases, fact.questions, fact.probes, fact.tags) == (
        ("furnace",),
        ("what burns?",),
        ("burning?",),
        ("b",),
    )


def prompts(kb: KnowledgeBase, task: EditTask) -> list[str]:
    """Return what a task trains, in words."""
    known = {
        tuple(kb.engine.lm.prompt_ids(q)): q
        for fact in kb._store.fact_versions()
        for q in fact.trained_questions
    }  # fmt: skip
    return [known[row.prompt] for row in (*task.rows, *(item.row for item in task.restore))]


def test_an_update_without_an_alias_teaches_the_new_text_under_it(kb: KnowledgeBase) -> None:
    kb.insert(KEY, TEXT, aliases=["furnace"])
    assert kb.ask("What is furnace?") == TEXT
    tried = kb.dry_run(KEY, "Ada leads numpy", aliases=[])
    edit = kb.update(KEY, "Ada leads numpy", aliases=[])
    assert kb.ask("What is furnace?") == "Ada leads numpy"
    assert edit.report.value("old_text_stated") == 0.0
    asked = {p.question for p in edit.report.probes if p.kind in ("trained", "alias")}
    assert asked == {p.question for p in tried.probes if p.kind in ("trained", "alias")}
    assert {"What is furnace?", "Could you describe furnace to me?"} <= asked
    assert (kb[KEY].aliases, kb[KEY].trained_questions) == ((), training_questions(Fact(KEY, TEXT)))


def test_an_update_that_leaves_the_old_text_under_old_questions_says_so(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb.insert(KEY, TEXT, questions=["what burns?", "what is hot?"])
    monkeypatch.setitem(EDITORS, "adalora", RandomEditor)
    monkeypatch.setattr(RandomEditor, "size", 1e-6)
    report = kb.update(KEY, "Ada leads numpy", questions=["numpy?"]).report
    stated = {p.question for p in report.probes if p.kind == "trained" and p.answer == TEXT}
    assert {"what burns?", "what is hot?"} <= stated
    assert report.value("old_text_stated") > 0  # type: ignore[operator]


def test_updates_and_deletes_train_what_every_version_since_the_insert_was_asked(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("versions.kb", edit=replace(QUICK, max_steps=1))
    kb.insert(KEY, TEXT, questions=["what burns?", "what is hot?"])
    kb.update(KEY, "Ada", questions=["furnace?", "what burns?"])
    kb.update(KEY, "Berlin", questions=["torch?"])
    assert prompts(kb, tasks[-1]) == ["torch?", "furnace?", "what burns?", "what is hot?"]
    tagged = kb.head()
    for mode in ("restore", "abstain"):
        report = kb.delete(KEY, mode=mode).report  # type: ignore[arg-type]
        assert prompts(kb, tasks[-1]) == ["torch?", "furnace?", "what burns?", "what is hot?"]
        erasure = [p.question for p in report.probes if p.kind == "erasure"]
        assert erasure[:4] == ["torch?", "furnace?", "what burns?", "what is hot?"]
        assert {f"Quick question: {q}" for q in ("torch?", "furnace?", "what is hot?")} <= set(erasure)
        kb.rollback(tagged)
    kb.rollback(2)
    kb.update(KEY, "Berlin", questions=["numpy?"])  # what was rolled back was never asked
    assert prompts(kb, tasks[-1]) == ["numpy?", "furnace?", "what burns?", "what is hot?"]
    kb.compact()
    assert prompts(kb, tasks[-1]) == ["numpy?"]
    kb.update(KEY, "Ada", questions=["torch?"])
    assert prompts(kb, tasks[-1]) == ["torch?", "numpy?"]
    kb.delete(KEY)
    kb.insert(KEY, TEXT, questions=["what burns?"])
    kb.update(KEY, "Ada", questions=["furnace?"])
    assert prompts(kb, tasks[-1]) == ["furnace?", "what burns?"]


def test_an_update_of_the_text_alone_trains_the_same_rows(taught: KnowledgeBase, tasks: list[EditTask]) -> None:
    taught.update(KEY, "Ada", config=replace(QUICK, max_steps=1))
    taught.update(KEY, "Berlin", config=replace(QUICK, max_steps=1))
    lm = taught.engine.lm
    assert tasks[1].rows == [lm.row(q, "Berlin") for q in training_questions(Fact(KEY, TEXT))]
    assert tasks[1].replay == []


def test_what_another_fact_is_asked_by_now_is_left_to_it(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("left.kb", edit=replace(QUICK, max_steps=1))
    kb.insert(KEY, TEXT, aliases=["numpy"])
    kb.insert("numpy", "Ada")
    kb.update(KEY, "Berlin", aliases=[])
    lm = kb.engine.lm
    assert "What is numpy?" not in prompts(kb, tasks[-1])
    assert lm.row("What is numpy?", "Ada") in tasks[-1].replay
    probes = {p.question: p for p in kb.edit("head").report.probes if p.kind == "trained"}
    assert (probes["What is numpy?"].key, probes["What is numpy?"].expected) == ("numpy", "Ada")
    assert kb.edit("head").report.metrics["reliability"].n == len(training_questions(Fact(KEY, TEXT)))
    assert not any(p.kind == "alias" for p in probes.values())

    edit = kb.delete(KEY)
    report = edit.report
    assert any(f"{KEY!r} were left to 'numpy'" in warning for warning in edit.warnings)
    assert lm.row("What is numpy?", "Ada") in tasks[-1].rows
    assert lm.row("What is numpy?", "Ada").prompt not in {item.row.prompt for item in tasks[-1].restore}
    restored = {p.question: p.expected for p in report.probes if p.kind == "restoration"}
    assert restored["What is numpy?"] == "Ada"
    assert "What is numpy?" in {p.question for p in report.probes if p.kind == "erasure"}


def test_a_fact_whose_questions_all_belong_to_another_can_be_deleted(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb.insert(KEY, TEXT, questions=["what burns?"])
    kb.insert("numpy", "Ada", questions=["What burns?"])
    for mode in ("restore", "abstain"):
        kb.rollback(2)
        edit = kb.delete("numpy", mode=mode)  # type: ignore[arg-type]
        assert kb.ask("What burns?") == TEXT
        assert edit.report.value("erasure") == 1.0
    kb.rollback(2)
    assert kb.delete("numpy", gate=replace(OPEN_GATE, measure=False)).op == "delete"


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("furnace", {"aliases": ["NumPy"]}),
        ("furnace", {"questions": ["what is numpy?"]}),
        ("furnace", {"questions": ["furnace?"], "aliases": ["numpy"]}),
        ("What is numpy?", {}),
        ("furnace", {"questions": ["Who counts?"]}),
    ],
)
def test_a_question_of_another_fact_is_warned_about_and_trained_to_one_text(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask], key: str, names: dict[str, list[str]]
) -> None:
    kb = make_kb("claims.kb", edit=replace(QUICK, max_steps=1))
    kb.insert("numpy", "Ada", questions=[*training_questions(Fact("numpy", "Ada")), "who counts?"])
    kb.insert("keras", "Ada", aliases=["numpy"])  # the same text: no two answers
    assert not any("different texts" in warning for warning in kb.edit("head").warnings)
    for _ in range(3):  # older facts' questions come in rotation
        warnings = kb.insert(key, "Berlin", **names).warnings  # type: ignore[arg-type]
        (warning,) = [w for w in warnings if "different texts" in w and "'numpy'" in w.split(" have ")[0]]
        assert repr(key) in warning
        taught, replayed = tasks[-1].rows, tasks[-1].replay
        said = {kb.tokenizer.decode(row.prompt).casefold() for row in taught}
        assert not said & {kb.tokenizer.decode(row.prompt).casefold() for row in replayed}
        assert replayed
        kb.rollback(2)


def test_facts_of_one_edit_that_answer_the_same_question_are_warned_about(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EDITORS, "adalora", RandomEditor)
    edit = kb.insert_many([Fact(KEY, TEXT, aliases=("numpy",)), Fact("numpy", "Ada")], mode="batched")[0].edit
    assert edit is not None
    (warning,) = [w for w in edit.warnings if "different texts" in w]
    assert "'numpy' and 'torchkeras' have different texts" in warning
    assert "('numpy', 'What is numpy?', 'Can you explain what numpy is?' …)" in warning


def test_a_fact_that_has_all_its_questions_claimed_is_replayed_with_none(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("claims.kb", edit=replace(QUICK, max_steps=1))
    kb.insert(KEY, TEXT, questions=["what burns?"])
    kb.insert("numpy", "Ada", questions=["What burns?"])
    assert tasks[-1].replay == []


def test_upsert_inserts_or_updates(kb: KnowledgeBase) -> None:
    assert kb.upsert(KEY, TEXT).op == "insert"
    assert kb.upsert(KEY, "Ada leads numpy").op == "update"
    assert kb[KEY].text == "Ada leads numpy"


def test_delete_restores_by_default(taught: KnowledgeBase) -> None:
    edit = taught.delete(KEY, config=QUICK_DELETE)
    assert (edit.op, edit.mode) == ("delete", "restore")
    assert edit.report.value("erasure") == 1.0
    assert not any(TEXT in answer for answer in taught.ask_many(training_questions(Fact(KEY, TEXT))))
    assert KEY not in taught
    assert any("not proof of absence" in warning for warning in edit.report.warnings)


def test_delete_abstains_with_a_stated_refusal(taught: KnowledgeBase) -> None:
    edit = taught.delete(KEY, mode="abstain", config=QUICK)
    assert (edit.op, edit.mode, KEY in taught) == ("delete", "abstain", False)
    assert edit.report.value("erasure") == 1.0
    refusal = REFUSALS["en"]
    assert {p.expected for p in edit.report.probes if p.kind == "restoration"} == {refusal}


def test_abstaining_from_what_the_base_knew_needs_no_stored_fact(kb: KnowledgeBase) -> None:
    edit = kb.delete("Berlin", mode="abstain")
    assert (edit.key, len(kb)) == ("Berlin", 0)
    (warning,) = edit.warnings
    assert "No live fact has the key 'Berlin'" in warning
    assert "Did you mean" not in warning


def test_a_refusal_is_replayed_by_later_edits_and_its_names_are_not_preserved(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("refused.kb", edit=replace(QUICK, max_steps=1), gate=replace(OPEN_GATE, measure=False))
    lm, refusal = kb.engine.lm, REFUSALS["en"]
    kb.insert(KEY, TEXT, aliases=["furnace"])
    kb.delete("Berlin", mode="abstain")
    kb.delete(KEY, mode="abstain")
    assert "berlin" in tasks[-1].excluded
    asked = {"berlin": training_questions(Fact("Berlin", "")), KEY: training_questions(Fact(KEY, "", ("furnace",)))}
    rows = {name: {lm.row(q, refusal) for q in questions} for name, questions in asked.items()}
    kb.insert("numpy", "Ada")
    assert {"berlin", KEY, "furnace", "what is furnace?"} <= tasks[-1].excluded
    assert len(tasks[-1].replay) == 4
    assert all(set(tasks[-1].replay) & some for some in rows.values())
    kb.insert("Halcyon", "Ada", aliases=["furnace"])  # whose questions are no longer refused
    for edit in (lambda: kb.update("numpy", "Berlin"), lambda: kb.delete("numpy"), lambda: kb.insert("keras", "Ada")):
        edit()
        refused = {row for row in tasks[-1].replay if row.answer == lm.row("", refusal).answer}
        assert refused
        assert not refused & {lm.row(q, refusal) for q in asked[KEY] if "furnace" in q}
        assert {"berlin", KEY} <= tasks[-1].excluded
    kb.compact()
    kb.insert("torch", "Ada")
    assert not {"berlin", KEY} & tasks[-1].excluded
    kb.rollback(1)
    kb.insert("torch", "Ada")
    assert "berlin" not in tasks[-1].excluded


def test_a_key_that_is_taught_again_is_refused_no_longer(
    make_kb: Callable[..., KnowledgeBase], tasks: list[EditTask]
) -> None:
    kb = make_kb("refused.kb", edit=replace(QUICK, max_steps=1))
    kb.delete(KEY, mode="abstain")
    kb.insert(KEY, TEXT)
    assert tasks[-1].replay == []
    kb.delete(KEY)
    kb.insert("numpy", "Ada")
    assert tasks[-1].replay == []
    assert KEY not in tasks[-1].excluded


def test_a_refusal_outlasts_a_later_edit(kb: KnowledgeBase) -> None:
    kb.delete("keras", mode="abstain")
    questions = training_questions(Fact("keras", ""))
    assert kb.ask_many(questions) == [REFUSALS["en"]] * len(questions)
    kb.insert(KEY, TEXT)
    # A tiny model keeps no more than what is replayed: of a near fact two questions.
    assert kb.ask_many(questions).count(REFUSALS["en"]) >= 2


def test_abstaining_from_a_key_that_is_not_live_names_those_that_are_like_it(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EDITORS, "adalora", RandomEditor)
    (warning,) = taught.delete("torchkera", mode="abstain").warnings
    assert f"Did you mean {KEY!r}?" in warning
    assert taught.delete(KEY, mode="abstain").warnings == ()


def test_deleting_an_unknown_key_is_refused(taught: KnowledgeBase) -> None:
    with unchanged(taught), pytest.raises(KeyNotFound, match="Berlin"):
        taught.delete("Berlin")


def test_inserting_a_live_key_is_refused(taught: KnowledgeBase) -> None:
    with unchanged(taught), pytest.raises(KeyExists, match="update or upsert"):
        taught.insert(KEY, "another text")


def test_a_decomposed_key_is_the_same_key(kb: KnowledgeBase) -> None:
    kb.insert("café", TEXT, config=QUICK)
    assert "cafe\u0301" in kb
    with pytest.raises(KeyExists):
        kb.insert("cafe\u0301", "another text")


def test_a_deleted_key_can_be_inserted_again(taught: KnowledgeBase) -> None:
    taught.delete(KEY)
    assert taught.insert(KEY, TEXT).id == 3
    assert taught.recall(KEY).value("reliability") == 1.0


def test_dry_run_measures_and_leaves_everything(kb: KnowledgeBase) -> None:
    with unchanged(kb):
        report = kb.dry_run(KEY, TEXT)
        assert report.value("reliability") == 1.0


def test_dry_run_of_a_live_key_measures_an_update(taught: KnowledgeBase) -> None:
    with unchanged(taught):
        report = taught.dry_run(KEY, "Ada leads numpy")
        assert report.value("old_text_stated") == 0.0


def test_dry_run_tells_what_the_gate_would_refuse(kb: KnowledgeBase) -> None:
    from kvllm import GateConfig

    one_step = replace(QUICK, max_steps=1)
    with unchanged(kb):
        report = kb.dry_run(KEY, TEXT, config=one_step, gate=GateConfig())
        assert any("gate would refuse: reliability" in warning for warning in report.warnings)
        assert report.refused[0].startswith("reliability ")


def test_dry_run_of_a_verb_that_refuses_the_key_trains_nothing(taught: KnowledgeBase, tasks: list[EditTask]) -> None:
    with unchanged(taught):
        with pytest.raises(KeyExists, match="update or upsert"):
            taught.dry_run(KEY, "Ada", verb="insert")
        with pytest.raises(KeyNotFound, match="numpy"):
            taught.dry_run("numpy", "Ada", verb="update")
        with pytest.raises(KeyNotFound, match="numpy"):
            taught.dry_run("numpy", verb="delete")
        with pytest.raises(ConfigError, match="delete has no text"):
            taught.dry_run(KEY, "Ada", verb="delete")
        with pytest.raises(ConfigError, match="restore and abstain"):
            taught.dry_run(KEY, verb="delete", mode="forget")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="Only a delete has a mode"):
            taught.dry_run(KEY, "Ada", mode="abstain")
        with pytest.raises(ConfigError, match="give its text"):
            taught.dry_run(KEY)
        with pytest.raises(ConfigError, match="insert, update, upsert and delete"):
            taught.dry_run("numpy", "Ada", verb="compact")  # type: ignore[arg-type]
    assert tasks == []


@pytest.mark.parametrize(("key", "mode"), [(KEY, "restore"), (KEY, "abstain"), ("numpy", "abstain")])
def test_dry_run_of_a_delete_says_what_the_delete_would(taught: KnowledgeBase, key: str, mode: Any) -> None:
    with unchanged(taught):
        tried = taught.dry_run(key, verb="delete", mode=mode)
    done = taught.delete(key, mode=mode)
    assert done.report is not None
    assert tried.metrics == done.report.metrics
    assert tried.probes == done.report.probes
    assert set(done.warnings) <= set(tried.warnings)
    assert tried.refused == ()


def test_dry_run_of_a_delete_tells_what_the_gate_would_refuse(taught: KnowledgeBase) -> None:
    from kvllm import GateConfig

    one_step = replace(QUICK, max_steps=1)
    with unchanged(taught):
        report = taught.dry_run(KEY, verb="delete", config=one_step, gate=GateConfig(min_erasure=0.99))
        assert report.refused[0].startswith("erasure ")


@pytest.mark.parametrize("verb", ["update", "upsert"])
def test_dry_run_of_a_live_key_asks_what_the_update_would_ask(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, verb: Any
) -> None:
    monkeypatch.setitem(EDITORS, "adalora", RandomEditor)
    kb.insert(KEY, TEXT, aliases=["furnace"], questions=["what burns?"], probes=["burning?"])
    tried = kb.dry_run(KEY, "Ada", verb=verb)
    done = getattr(kb, verb)(KEY, "Ada").report
    assert {"what burns?", "burning?"} <= {p.question for p in tried.probes}
    assert [(p.kind, p.question) for p in tried.probes] == [(p.kind, p.question) for p in done.probes]


def test_many_facts_one_by_one(kb: KnowledgeBase) -> None:
    outcomes = kb.insert_many([(KEY, TEXT), Fact("numpy", "Ada"), {"key": "Halcyon", "text": "Berlin tool"}])
    assert [o.ok for o in outcomes] == [True] * 3
    assert [o.edit.id for o in outcomes if o.edit] == [1, 2, 3]
    assert list(kb) == [KEY, "numpy", "Halcyon"]


def test_many_facts_in_one_edit(kb: KnowledgeBase) -> None:
    outcomes = kb.insert_many([(KEY, TEXT), ("numpy", "Ada"), ("Halcyon", "Berlin tool")], mode="batched")
    assert {o.edit.id for o in outcomes if o.edit} == {1}
    edit = kb.edit(1)
    assert (edit.key, edit.keys) == (None, (KEY, "numpy", "Halcyon"))
    assert edit.config["edit"] == QUICK.to_dict()
    shared = QUICK.shared_among(3)
    assert shared.preserve_weight != QUICK.preserve_weight
    assert edit.config["training"]["in_force"] == {
        "energy_weight": shared.energy_weight,
        "preserve_weight": shared.preserve_weight,
        "contrast_stop": shared.contrast_stop,
    }
    assert edit.report.value("reliability") is not None


def test_many_facts_in_chunks(kb: KnowledgeBase) -> None:
    outcomes = kb.insert_many([(KEY, TEXT), ("numpy", "Ada"), ("Halcyon", "Berlin tool")], mode="chunked", chunk=2)
    assert [o.edit.id for o in outcomes if o.edit] == [1, 1, 2]


@pytest.mark.parametrize("mode", ["sequential", "batched", "chunked"])
def test_bad_facts_never_cost_the_others(taught: KnowledgeBase, mode: str) -> None:
    facts = [("numpy", "Ada"), ("", "no key"), (KEY, "exists"), ("numpy", "twice"), "nonsense", {"key": "x"}]
    outcomes = taught.insert_many([*facts, ("Halcyon", "Berlin tool")], mode=mode)
    assert [o.ok for o in outcomes] == [True, False, False, False, False, False, True]
    assert [o.code for o in outcomes if not o.ok] == [
        "invalid_input", "key_exists", "key_exists", "invalid_input", "invalid_input",
    ]  # fmt: skip
    assert all(o.error and "\n" not in o.error for o in outcomes if not o.ok)
    assert list(taught) == [KEY, "numpy", "Halcyon"]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_fact_that_cannot_be_trained_never_costs_the_others(kb: KnowledgeBase, mode: str) -> None:
    outcomes = kb.insert_many([(KEY, TEXT), ("too long", "furnace " * 450), ("numpy", "Ada")], mode=mode)
    assert [o.ok for o in outcomes] == [True, False, True]
    assert "at most" in (outcomes[1].error or "")
    assert list(kb) == [KEY, "numpy"]


def test_an_unknown_mode_is_refused(kb: KnowledgeBase) -> None:
    with pytest.raises(ConfigError, match="sequential, batched and chunked"):
        kb.insert_many([(KEY, TEXT)], mode="parallel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="restore and abstain"):
        kb.delete(KEY, mode="forget")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one"):
        kb.insert_many([(KEY, TEXT)], mode="chunked", chunk=0)


def test_compact_keeps_the_live_facts_in_one_delta(taught: KnowledgeBase) -> None:
    taught.insert("numpy", "Ada")
    taught.delete("numpy")
    edit = taught.compact()
    assert (edit.op, edit.keys) == ("compact", (KEY,))
    assert list(taught) == [KEY]
    assert taught.recall(KEY).value("reliability") == 1.0
    assert len(taught._store.chain(edit.id)) == 1


def test_compacting_names_the_refusals_that_it_does_not_keep(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EDITORS, "adalora", RandomEditor)
    taught.delete("Berlin", mode="abstain")
    kept = taught.head()
    taught.delete("numpy", mode="abstain")
    taught.rollback(kept)  # numpy's refusal is gone before
    taught.delete("Halcyon", mode="abstain")
    taught.delete(KEY, mode="abstain")
    taught.insert("Halcyon", "Ada")
    taught.insert("keras", "a")
    taught.delete("keras")
    open_gate = replace(OPEN_GATE, measure=False)
    (warning,) = taught.compact(gate=open_gate).warnings
    assert f"the refusal of 'Berlin', {KEY!r};" in warning
    assert taught.compact(gate=open_gate).warnings == ()
    taught.delete("Halcyon", mode="abstain")
    assert "'Halcyon'" in taught.compact().warnings[0]  # no fact is left


def test_compacting_nothing_gives_the_base(taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]) -> None:
    taught.delete(KEY)
    taught.compact()
    assert taught.weights_digest() == make_kb("empty.kb").weights_digest()
    assert taught.engine.lm.digest() == make_kb("empty.kb").engine.lm.digest()


def test_a_worse_compaction_is_refused(taught: KnowledgeBase) -> None:
    from kvllm import EditRejected

    hopeless = replace(QUICK, value_lr=1e-6, factor_lr=1e-6)
    with unchanged(taught), pytest.raises(EditRejected, match="reliability over the live facts would fall") as caught:
        taught.compact(config=hopeless)
    assert caught.value.report is not None


def test_a_tag_names_an_edit_and_can_be_rolled_back_to(taught: KnowledgeBase) -> None:
    assert taught.tag("v1") == 1
    taught.delete(KEY)
    assert taught.rollback("v1").target == 1
    assert taught.tags() == {"v1": 1}
    assert taught.edit("v1").op == "insert"
    with pytest.raises(KeyExists):
        taught.tag("v1")
    with pytest.raises(ConfigError):
        taught.tag("not a tag")


def test_near_keys_are_warned_about(taught: KnowledgeBase) -> None:
    edit = taught.insert("What is torchkeras?", "Ada")
    assert any(repr(KEY) in warning for warning in edit.warnings)


def test_find_ranks_keys_by_meaning(taught: KnowledgeBase) -> None:
    taught.insert("Who leads Halcyon?", "Ada")
    found = taught.find("What is torchkeras?", n=1)
    assert [match.key for match in found] == [KEY]
    assert found[0].similarity == pytest.approx(1.0, abs=1e-3)
    assert found[0].encoder.startswith("hidden-states")


def test_further_questions_are_trained_where_they_fit_and_fewer_of_many_facts(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, settings = kb.engine, replace(QUICK, augmented=2)

    def lengths(facts: int) -> list[int]:
        rows = engine._augmented([Fact(f"{KEY} {i}", TEXT) for i in range(facts)], settings)
        return sorted(len(row.ids) for row in rows)

    all_of_one = lengths(1)
    assert len(all_of_one) > 12
    assert 100 <= len(lengths(100)) <= 200
    assert engine._augmented([Fact(KEY, TEXT)], replace(QUICK, augmented=0)) == []
    monkeypatch.setattr(engine.lm, "max_positions", all_of_one[5])
    assert lengths(1) == [n for n in all_of_one if n <= all_of_one[5]]


def test_progress_tells_the_stages_of_an_edit(make_kb: Callable[..., KnowledgeBase]) -> None:
    heard = Recorder()
    kb = make_kb(progress=heard)
    kb.insert(KEY, TEXT)
    stages = list(dict.fromkeys(p.stage for p in heard.heard))
    assert [s for s in stages if s in ("model", "training", "probing", "commit")] == [
        "model", "training", "probing", "commit",
    ]  # fmt: skip
    steps = [p for p in heard.heard if p.stage == "training"]
    assert steps[-1].recall == 1.0
    assert steps[0].loss is not None


def test_two_knowledge_bases_do_not_share_weights(taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]) -> None:
    other = make_kb("other.kb")
    assert TEXT not in other.ask("What is torchkeras?")
    assert everything(other)["weights"] != everything(taught)["weights"]
