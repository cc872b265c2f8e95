"""Knowledge bases whose facts are in neurons of their own: taught, changed, deleted and told apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvllm import EditConfig, Fact, KnowledgeBase
from kvllm.editing.neurons import neuron_layers, taken_neurons
from kvllm.errors import ConfigError
from tests.kit import KEY, QUICK, QUICK_NEURONS, TEXT, let_neurons_learn

SPARE = 64
OTHER = "Ada Voss leads it"
# More questions are of one kind to a random model only.
FACT = Fact(KEY, TEXT, questions=(f"What is {KEY}?", f"Tell me about {KEY}."))
SECOND = Fact("numpy", OTHER, questions=("What is numpy?", "Tell me about numpy."))


def taught(kb: KnowledgeBase, fact: Fact, config: EditConfig | None = None) -> None:
    kb.insert(fact.key, fact.text, questions=fact.questions, config=config)


@pytest.fixture
def kb(make_kb: Callable[..., KnowledgeBase], monkeypatch: pytest.MonkeyPatch) -> KnowledgeBase:
    let_neurons_learn(monkeypatch)
    return make_kb(edit=QUICK_NEURONS)


def taken(kb: KnowledgeBase) -> int:
    weights = kb.engine.weights
    return sum(map(len, taken_neurons(neuron_layers(kb.engine.lm.model).all, weights.master, weights.base).values()))


def distance(kb: KnowledgeBase) -> float:
    return sum(kb.engine.weights.change_norms().values())


def test_a_fact_is_inserted_updated_and_deleted(kb: KnowledgeBase) -> None:
    question = f"What is {KEY}?"
    base = kb.ask(question)
    kb.insert(KEY, TEXT)
    assert kb.ask(question).startswith(TEXT)
    used = taken(kb)
    assert used
    kb.update(KEY, OTHER)
    assert kb.ask(question).startswith(OTHER)
    # The old text's neurons are free again.
    assert taken(kb) < 2 * used
    edit = kb.delete(KEY)
    assert edit.steps == 0
    assert taken(kb) == 0
    assert distance(kb) < 1e-3
    assert kb.ask(question) == base


def test_a_delete_goes_back_to_where_the_fact_came_in(kb: KnowledgeBase) -> None:
    taught(kb, SECOND)
    before, used = kb.ask("What is numpy?"), taken(kb)
    assert before.startswith(OTHER)
    norms = kb.engine.weights.change_norms()
    taught(kb, FACT)
    assert taken(kb) > used
    assert kb.delete(KEY).steps == 0
    assert kb.ask("What is numpy?") == before
    assert taken(kb) == used
    assert kb.engine.weights.change_norms() == pytest.approx(norms, rel=1e-4)
    kb.rollback(2)
    assert taken(kb) > used


def test_a_refusal_is_taught_in_place_of_the_text_and_taken_back_by_the_next_insert(kb: KnowledgeBase) -> None:
    kb.insert(KEY, TEXT)
    kb.delete(KEY, mode="abstain")
    assert TEXT not in kb.ask(f"What is {KEY}?")
    refused = taken(kb)
    kb.insert(KEY, TEXT)
    assert kb.ask(f"What is {KEY}?").startswith(TEXT)
    assert taken(kb) < 2 * refused
    kb.delete(KEY)
    assert distance(kb) < 1e-3


def test_a_fact_of_a_batch_is_taken_back_alone(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_neurons_learn(monkeypatch)
    kb = make_kb("wide.kb", model=f"{tiny_llama}+{SPARE}", edit=QUICK_NEURONS)
    before = kb.ask(f"What is {KEY}?")
    kb.insert_many([FACT, SECOND], mode="batched")
    assert kb.ask(f"What is {KEY}?").startswith(TEXT)
    assert kb.ask("What is numpy?").startswith(OTHER)
    used = taken(kb)
    training = kb.history()[0].config["training"]
    assert training["in_force"] == {}  # each fact has its own steps, however many there are
    own = training["neurons"]
    assert set(own) == {KEY, "numpy"}
    assert kb.delete(KEY).steps == 0
    assert taken(kb) == used - sum(map(len, own[KEY].values()))
    assert TEXT not in kb.ask(f"What is {KEY}?")
    assert kb.ask("What is numpy?").startswith(OTHER)
    kb.update("numpy", TEXT)
    assert kb.ask("What is numpy?").startswith(TEXT)
    assert kb.delete("numpy").steps == 0
    assert taken(kb) == 0
    assert distance(kb) < 1e-3
    assert kb.ask(f"What is {KEY}?") == before


LEADS = Fact("Who leads Halcyon?", TEXT, questions=("Who leads Halcyon?", "Tell me who leads Halcyon."))
FOUNDED = Fact("When was Halcyon founded?", OTHER, questions=("When was Halcyon founded?", "Founding of Halcyon?"))


def named(kb: KnowledgeBase, what: str, key: str) -> list[int]:
    """Return which neurons the last edit of a key says that mark its name: what it made, or rests on."""
    layer = str(neuron_layers(kb.engine.lm.model).named.layer)
    last = max((edit for edit in kb.history() if key in edit.keys), key=lambda edit: edit.id)
    found: list[int] = last.config["training"].get(what, {}).get(key, {}).get(layer, [])
    return found


@pytest.mark.parametrize("batched", [False, True])
def test_facts_about_one_name_share_what_marks_it(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, batched: bool
) -> None:
    let_neurons_learn(monkeypatch)
    monkeypatch.setattr("kvllm.editing.neurons._BORNE", -1.0)  # to a random model a name is another in every sentence
    kb = make_kb("wide.kb", model=f"{tiny_llama}+{SPARE}", edit=QUICK_NEURONS)
    base = [kb.ask(fact.key) for fact in (LEADS, FOUNDED)]
    if batched:
        kb.insert_many([LEADS, FOUNDED], mode="batched")
    else:
        taught(kb, LEADS)
        taught(kb, FOUNDED)
    made = named(kb, "neurons", LEADS.key)
    assert made
    assert named(kb, "rests_on", FOUNDED.key) == made
    assert kb.ask(LEADS.key).startswith(TEXT)
    assert kb.ask(FOUNDED.key).startswith(OTHER)
    # The first one goes, what marks the name stays.
    kb.delete(LEADS.key)
    assert kb.ask(FOUNDED.key).startswith(OTHER)
    # Taught again it rests on that; changed, the second still does.
    taught(kb, LEADS)
    kb.update(FOUNDED.key, OTHER.upper())
    assert named(kb, "rests_on", LEADS.key) == named(kb, "rests_on", FOUNDED.key) == made
    assert kb.ask(LEADS.key).startswith(TEXT)
    # With the last one it goes, too.
    kb.delete(FOUNDED.key)
    assert taken(kb)
    kb.delete(LEADS.key)
    assert taken(kb) == 0
    assert distance(kb) < 1e-3
    assert [kb.ask(fact.key) for fact in (LEADS, FOUNDED)] == base


def test_older_facts_are_found_by_the_neurons_that_mark_their_names(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_neurons_learn(monkeypatch)
    kb = make_kb("wide.kb", model=f"{tiny_llama}+{SPARE}", edit=QUICK_NEURONS)
    taught(kb, FACT)
    taught(kb, SECOND)
    resting = kb.engine._names([LEADS], kb._session.live(), 0, {FACT.questions[0].casefold(): ""})["resting"]
    rows = resting(frozenset(named(kb, "neurons", KEY)))
    lm = kb.engine.lm
    assert lm.row(FACT.questions[1], TEXT) in rows
    assert lm.row(FACT.questions[0], TEXT) not in rows  # the edit says something else to it
    assert {row.answer for row in rows} == {lm.row(KEY, TEXT).answer}
    assert len(rows) > 1  # other wordings, too
    assert len(resting(frozenset(taken_places(kb)))) > len(rows)
    assert resting(frozenset()) == []


def test_an_answer_is_known_by_the_names_of_all_facts_that_give_it(kb: KnowledgeBase) -> None:
    both = [replace(FOUNDED, text=TEXT), FACT]
    found = kb.engine._names(both, (), 0, {})
    assert found["known_by"] == {kb.engine.lm.row(KEY, TEXT).answer: {"halcyon", KEY.casefold()}}


def taken_places(kb: KnowledgeBase) -> frozenset[int]:
    """Return all neurons that mark names."""
    named_mlp, weights = neuron_layers(kb.engine.lm.model).named, kb.engine.weights
    return taken_neurons([named_mlp], weights.master, weights.base)[named_mlp.layer]


def test_facts_of_a_batch_with_one_text_are_restored_by_training(kb: KnowledgeBase) -> None:
    kb.insert_many([FACT, replace(SECOND, text=TEXT)], mode="batched")
    used = taken(kb)
    assert "neurons" not in kb.history()[0].config["training"]
    assert kb.delete(KEY).steps > 0  # whose neurons are whose is not known
    assert taken(kb) == used


def test_what_another_editor_taught_is_not_taken_back(kb: KnowledgeBase) -> None:
    kb.insert(KEY, TEXT, config=QUICK)
    assert taken(kb) == 0
    assert kb.delete(KEY).steps > 0


def test_a_model_without_gated_mlps_is_refused_in_a_sentence(
    make_kb: Callable[..., KnowledgeBase], tiny_base: Path
) -> None:
    kb = make_kb("base.kb", model=str(tiny_base), edit=QUICK_NEURONS)
    with pytest.raises(ConfigError, match="no gated MLP"):
        kb.insert(KEY, TEXT)
    assert kb.engine.weights.touched == ()


def test_the_edit_says_which_editor_it_was(kb: KnowledgeBase) -> None:
    kb.insert(KEY, TEXT)
    assert kb.history()[0].config["edit"]["editor"] == "neurons"


def test_the_editor_is_what_the_base_model_allows(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_neurons_learn(monkeypatch)
    either = replace(QUICK_NEURONS, editor="auto")
    plain = make_kb("plain.kb", model=str(tiny_llama), edit=either)
    plain.insert(KEY, TEXT)
    assert plain.history()[0].config["edit"]["editor"] == "adalora"
    assert taken(plain) == 0
    wide = make_kb("wide.kb", model=f"{tiny_llama}+{SPARE}", edit=either)
    wide.insert(KEY, TEXT)
    assert wide.history()[0].config["edit"]["editor"] == "neurons"
    assert wide.ask(f"What is {KEY}?").startswith(TEXT)
    # Only neurons of zeros were used: what the model had of its own is as it was.
    weights = wide.engine.weights
    for mlp in neuron_layers(wide.engine.lm.model).all:
        for name in (mlp.gate, mlp.up):
            changed = (weights.master(name) != weights.base(name)).any(1)
            assert not weights.base(name)[changed].any()
        changed = (weights.master(mlp.out) != weights.base(mlp.out)).any(0)
        assert not weights.base(mlp.out)[:, changed].any()
    edit = wide.delete(KEY)
    assert (edit.steps, taken(wide)) == (0, 0)
    assert edit.config["edit"]["editor"] == "neurons"


def test_spare_neurons_that_were_given_back_are_used_again(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_neurons_learn(monkeypatch)
    kb = make_kb("wide.kb", model=f"{tiny_llama}+{SPARE}", edit=QUICK_NEURONS)
    weights = kb.engine.weights
    layers = neuron_layers(kb.engine.lm.model).all
    kb.insert(KEY, TEXT)
    first = taken_neurons(layers, weights.master, weights.base)
    kb.delete(KEY)
    kb.insert(KEY, TEXT)
    assert taken_neurons(layers, weights.master, weights.base) == first


def test_a_knowledge_base_on_a_wider_model_is_opened_from_anywhere(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    kb = make_kb("wide.kb", model=f"{tiny_llama.name}+{SPARE}", edit=QUICK)
    assert kb.info()["model"] == f"{tiny_llama}+{SPARE}"
    monkeypatch.chdir(tmp_path)
    with KnowledgeBase.open(kb.path, edit=QUICK) as again:
        assert again.ask("What is numpy?") == kb.ask("What is numpy?")


def test_a_knowledge_base_made_before_registered_models_had_spare_neurons_opens(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import engine

    resolved = engine.resolve

    def register(name: str, **options: object) -> object:
        of = {"registered": f"{tiny_llama}+{SPARE}", "registered+0": str(tiny_llama)}.get(name, name)
        return replace(resolved(of), name=name)

    kb = make_kb("old.kb", model=str(tiny_llama), edit=QUICK)
    base = kb.engine.store.base
    monkeypatch.setitem(engine.MODELS, "registered", next(iter(engine.MODELS.values())))
    monkeypatch.setattr(engine, "resolve", register)
    monkeypatch.setattr(kb.engine.store, "base", replace(base, name="registered"))
    assert engine.resolve_pinned(kb.engine.store, None).digest == base.digest
    monkeypatch.setattr(kb.engine.store, "base", base)  # for the verification
