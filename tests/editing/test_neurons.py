"""The neuron editor on a tiny model: what it teaches, what it leaves, which neurons it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kvllm.config import ModelConfig, cache_folder
from kvllm.editing import compute, neurons
from kvllm.editing.compute import ComputeCopy, Entered
from kvllm.editing.delta import AdaptedWeights, product
from kvllm.editing.editor import EditTask, StepRecord, leads
from kvllm.editing.marks import learned_marks, marked_ends, marking
from kvllm.editing.neurons import NeuronEditor, neuron_layers, taken_neurons
from kvllm.editing.ordinary import Ordinary, answered, composed_answers, ends, ordinary_inputs
from kvllm.editing.preservation import PreservationPool, Prompt, build_pool, packaged_answers, packaged_names
from kvllm.errors import ConfigError, EditFailed, ModelError
from kvllm.lm.decoding import Opening
from kvllm.lm.model import LanguageModel, Row
from kvllm.lm.targets import GatedMlp, gated_mlp
from tests.kit import KEY, QUICK_NEURONS, TEXT, let_neurons_learn
from tests.tiny import tiny_model

PROMPTS = (
    Prompt("neighbour", "What is numpy?", "en", "numpy"),
    Prompt("neighbour", "Tell me about Berlin.", "en", "Berlin"),
    Prompt("question", "Who leads Halcyon?", "en"),
    Prompt("text", "Torchkeras is a tool that makes training PyTorch models simple, and Ada leads it.", "en"),
)
OTHERS = ("What is numpy?", "Tell me about Berlin.", "Who leads Halcyon?", "什么是长城？")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: its two layers of neurons are one."""
    return tiny_model(tmp_path_factory.mktemp("neurons") / "llama")


@pytest.fixture
def own(spread: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LanguageModel:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compute, "compute_dtype", lambda device, dtype: dtype)
    let_neurons_learn(monkeypatch)
    return LanguageModel.load(spread, ModelConfig(max_new_tokens=12, device="cpu"))


@pytest.fixture
def copy(own: LanguageModel) -> ComputeCopy:
    return ComputeCopy(own, neuron_layers(own.model).targets(own.model))


@pytest.fixture
def pool(copy: ComputeCopy) -> PreservationPool:
    return build_pool(copy, "tiny", QUICK_NEURONS, prompts=PROMPTS)


@pytest.fixture
def ordinary(copy: ComputeCopy, pool: PreservationPool) -> Mapping[int, Ordinary]:
    return ordinary_inputs(
        copy, pool, "tiny", neuron_layers(copy.model).all, prompts=(), answers=(), questions=[(q, q) for q in OTHERS]
    )


@pytest.fixture
def marks(own: LanguageModel, copy: ComputeCopy, ordinary: Mapping[int, Ordinary]) -> torch.Tensor:
    layers = neuron_layers(copy.model)
    names = [("Berlin", "en"), ("numpy", "en")]
    return learned_marks(copy, "tiny", layers.named, layers.said[:1], ordinary, names=names)


@pytest.fixture
def task(own: LanguageModel, ordinary: Mapping[int, Ordinary], marks: torch.Tensor) -> EditTask:
    rows = rows_of(own, KEY, TEXT)
    apart = [own.row(q, "It is a tool") for q in OTHERS[:2]]
    return EditTask(rows=rows, ordinary=ordinary, apart=apart, marks=marks, named=named(own, KEY, rows))


def named(lm: LanguageModel, name: str, rows: Sequence[Row]) -> dict[Row, tuple[tuple[int, ...], ...]]:
    return {row: (lm.name_ends(row.ids, name),) for row in rows}


def rows_of(lm: LanguageModel, name: str, text: str) -> list[Row]:
    """Two questions: more are of one kind to a random model only."""
    return [lm.row(question, text) for question in (f"What is {name}?", f"Tell me about {name}.")]


@torch.no_grad()
def least_lead(lm: LanguageModel, rows: Sequence[Row]) -> float:
    """Return the smallest lead of any target token in the model itself."""
    found = [
        leads(lm.logits(states), torch.tensor(row.answer))
        for states, row in zip(lm.answer_states(list(rows)), rows, strict=True)
    ]
    return float(torch.cat(found).min())


def test_the_delta_teaches_the_model_itself(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    before = {name: tensor.clone() for name, tensor in copy.model.state_dict().items()}
    steps: list[StepRecord] = []
    training = NeuronEditor().train(copy, pool, task, QUICK_NEURONS, on_step=steps.append)
    assert training.recalled
    assert training.steps == len(steps)
    assert steps[-1].recall == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.model.state_dict().items())
    assert least_lead(own, task.rows) < 0
    AdaptedWeights(own.model).apply(training.delta)
    # What the neurons' columns were trained with is what the merged weights do.
    assert least_lead(own, task.rows) > QUICK_NEURONS.margin / 2
    assert own.generate([f"What is {KEY}?"])[0].startswith(TEXT)


def test_new_gates_are_silent_on_what_is_ordinary_and_on_what_is_set_apart(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    said = neuron_layers(copy.model).said[0]
    training = NeuronEditor().train(copy, pool, task, QUICK_NEURONS)
    AdaptedWeights(own.model).apply(training.delta)
    new = [place for place in range(192) if training.delta[said.gate][1][place].abs().sum() > 0]
    gates = own.model.get_submodule(said.gate).weight[new].detach()
    changed = ComputeCopy(own, neuron_layers(own.model).targets(own.model))  # the name is marked in it
    asked = ends(changed, [said.gate], [own.prompt_ids(q) for q in OTHERS])[said.gate]
    fact = ends(changed, [said.gate], [row.prompt for row in task.rows])[said.gate]
    first = (fact @ gates.T).amin(0).argmax()
    assert float((fact @ gates[first]).min()) > 0
    assert float((asked @ gates[first]).max()) < 0


def test_a_name_is_marked_where_it_was_said_and_nowhere_else(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    mlp = neuron_layers(copy.model).named
    delta = NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta
    before = copy.model.get_submodule(mlp.out)
    AdaptedWeights(own.model).apply({name: delta[name] for name in (mlp.gate, mlp.up, mlp.out)})
    row = task.rows[0]
    caught: list[torch.Tensor] = []
    for model in (copy.model, own.model):
        handle = model.get_submodule(mlp.out).register_forward_hook(lambda *args: caught.append(args[2][0]))
        model(torch.tensor([row.ids]))
        handle.remove()
    assert before is copy.model.get_submodule(mlp.out)
    assert task.marks is not None
    mark = task.marks[0]  # no name bears one yet
    put = (caught[1] - caught[0]).detach() @ mark / mark.square().sum()
    (places,) = task.named[row]
    assert float(put[list(places)].min()) > 0.5
    elsewhere = [i for i in range(len(row.ids)) if i not in places and i - 1 not in places]
    assert float(put[elsewhere].abs().max()) < 0.3


def test_rows_without_a_name_are_learned_without_a_mark(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    delta = NeuronEditor().train(copy, pool, replace(task, named={}), QUICK_NEURONS).delta
    assert neuron_layers(copy.model).named.gate not in delta
    AdaptedWeights(own.model).apply(delta)
    assert least_lead(own, task.rows) > 0


def test_names_bear_the_marks_by_turns(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    layers = neuron_layers(copy.model)
    weights, borne = AdaptedWeights(own.model), []
    assert task.marks is not None
    for name in (KEY, "Velmora", "Skarholm"):
        rows = rows_of(own, name, TEXT)
        taken = taken_neurons(layers.all, weights.master, weights.base)
        turn = replace(task, rows=rows, named=named(own, name, rows), taken=taken)
        delta = NeuronEditor().train(copy, pool, turn, QUICK_NEURONS).delta
        weights.apply(delta)
        copy.load({name: weights.master(name) for name in weights.known})
        now = taken_neurons([layers.named], weights.master, weights.base)[layers.named.layer]
        columns = weights.master(layers.named.out)[:, sorted(now - taken[layers.named.layer])]
        alike = F.normalize(columns, dim=0).T @ F.normalize(task.marks, dim=1).T
        borne.append(int(alike.amax(0).argmax()))
    assert len(set(borne)) == 3
    assert borne[1] == int(F.cosine_similarity(task.marks, task.marks[borne[:1]]).argmin())  # as far as there is one


def test_each_mark_is_read_by_itself(copy: ComputeCopy, ordinary: Mapping[int, Ordinary], marks: torch.Tensor) -> None:
    layers = neuron_layers(copy.model)
    white = ordinary[layers.said[0].layer].whitening
    row = copy.lm.row("What is Berlin?", "x")
    places = [copy.lm.name_ends(row.prompt, "Berlin")]
    before = ends(copy, [layers.said[0].gate], [row.prompt])[layers.said[0].gate]
    ways = []
    for mark in marks:
        during = marking(copy, layers.named.out, mark[None], places)
        (after,) = answered(copy, [layers.said[0].gate], [Row(row.prompt, ())], None, during)[layers.said[0].gate]
        ways.append(F.normalize((after - before) @ white, dim=-1)[0])
    alike = torch.stack(ways) @ torch.stack(ways).T
    assert len(marks) > 1
    assert float((alike - torch.eye(len(marks))).max()) < 0.9


def test_marks_are_sums_of_two(marks: torch.Tensor) -> None:
    n = len(marks)
    assert int(torch.linalg.matrix_rank(marks)) < n
    assert torch.allclose(marks.norm(dim=1), marks.norm(dim=1).mean().expand(n), rtol=1e-4)
    alike = F.normalize(marks, dim=1) @ F.normalize(marks, dim=1).T - 2 * torch.eye(n)
    assert float(alike.max()) < 0.9


def test_a_mark_moves_what_is_read_and_is_cached(
    copy: ComputeCopy, ordinary: Mapping[int, Ordinary], marks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import marks as module

    layers = neuron_layers(copy.model)
    white = ordinary[layers.said[0].layer].whitening
    monkeypatch.setattr(module, "_learned", lambda *args: pytest.fail("learned again"))
    names = [("Berlin", "en"), ("numpy", "en")]
    again = learned_marks(copy, "tiny", layers.named, layers.said[:1], {}, names=names)  # from the cache
    assert torch.equal(marks, again)
    rows = [copy.lm.row(f"What is {name}?", "x") for name, _ in names]
    places = [copy.lm.name_ends(row.prompt, name) for row, (name, _) in zip(rows, names, strict=True)]
    before = ends(copy, [layers.said[0].gate], [row.prompt for row in rows])[layers.said[0].gate]

    def moved(vector: torch.Tensor) -> float:
        during = marking(copy, layers.named.out, vector[None], places)
        prompts = [Row(row.prompt, ()) for row in rows]
        after = answered(copy, [layers.said[0].gate], prompts, None, during)[layers.said[0].gate]
        return float(((torch.cat(after) - before) @ white).norm(dim=1).mean())

    drawn = torch.randn(marks.shape, generator=torch.Generator().manual_seed(1))
    drawn = drawn / drawn.norm(dim=1, keepdim=True) * marks.norm(dim=1, keepdim=True)
    assert sum(map(moved, marks)) > 1.2 * sum(map(moved, drawn))
    assert min(map(moved, marks)) > 0.8 * sum(map(moved, drawn)) / len(drawn)


def test_as_many_neurons_change_as_the_answer_needs(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    layers = neuron_layers(copy.model)
    delta = NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta
    assert set(delta) == {name for mlp in layers.all for name in (mlp.gate, mlp.up, mlp.out)}
    tokens = len(task.rows[0].answer)
    changed = [int((product(delta[mlp.gate]).abs().sum(1) > 0).sum()) for mlp in layers.all]
    assert changed[0] == 2  # the name's
    assert 1 <= sum(changed[1:]) <= tokens


def test_taken_neurons_are_left_alone(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    mlps = neuron_layers(copy.model).all
    weights = AdaptedWeights(own.model)
    assert set().union(*taken_neurons(mlps, weights.master, weights.base).values()) == set()
    first = NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta
    weights.apply(first)
    taken = taken_neurons(mlps, weights.master, weights.base)
    copy.load({name: weights.master(name) for name in weights.known})
    rows = rows_of(own, "Voss", "Ada leads Berlin")
    other = replace(
        task,
        rows=rows,
        named=named(own, "Voss", rows),
        taken=taken,
        apart=(),
        replay=task.rows,
    )
    second = NeuronEditor().train(copy, pool, other, QUICK_NEURONS).delta
    for mlp in mlps:
        places = sorted(taken[mlp.layer])
        assert places
        assert float(product(second[mlp.gate])[places].abs().max()) == 0
        assert float(product(second[mlp.out])[:, places].abs().max()) == 0
    weights.apply(second)
    assert least_lead(own, other.rows) > 0
    assert least_lead(own, task.rows) > 0
    # Taken back in any order, nothing is left but rounding.
    weights.apply({name: (a, -b) for name, (a, b) in first.items()})
    assert all(
        len(some) < 2 * len(taken[layer]) for layer, some in taken_neurons(mlps, weights.master, weights.base).items()
    )
    weights.apply({name: (a, -b) for name, (a, b) in second.items()})
    assert set().union(*taken_neurons(mlps, weights.master, weights.base).values()) == set()


def test_several_facts_of_one_session_have_neurons_of_their_own(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    last = rows_of(own, "Voss", "Ada leads Berlin")
    task = replace(task, apart=(), named={**task.named, **named(own, "Voss", last)})
    alone = NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta
    training = NeuronEditor().train(copy, pool, replace(task, rows=[*task.rows, *last]), QUICK_NEURONS)
    AdaptedWeights(own.model).apply(training.delta)
    assert least_lead(own, last) > 0
    gates = [mlp.gate for mlp in neuron_layers(copy.model).all]
    changed = [
        sum(int((product(delta[gate]).abs().sum(1) > 0).sum()) for gate in gates) for delta in (alone, training.delta)
    ]
    assert changed[1] >= changed[0] + 2
    assert sum(training.delta[gate][0].shape[0] for gate in gates) == changed[1]  # none is written twice


def test_a_full_layer_is_refused(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    before = {name: tensor.clone() for name, tensor in copy.model.state_dict().items()}
    full = {mlp.layer: frozenset(range(60)) for mlp in neuron_layers(copy.model).all}
    with pytest.raises(EditFailed, match="free neurons"):
        NeuronEditor().train(copy, pool, replace(task, taken=full), QUICK_NEURONS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy.model.state_dict().items())


def test_a_model_without_gated_mlps_is_refused(tmp_path: Path) -> None:
    model = LanguageModel.load(tiny_model(tmp_path / "gpt2", family="gpt2"), ModelConfig(device="cpu")).model
    with pytest.raises(ConfigError, match="no gated MLP"):
        neuron_layers(model)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3"])
def test_the_parts_of_a_gated_mlp_are_found(family: str, tmp_path: Path) -> None:
    model = LanguageModel.load(tiny_model(tmp_path / family, family=family), ModelConfig(device="cpu")).model
    mlp = gated_mlp(model, 0.8)
    assert mlp.layer == 3
    assert (mlp.gate, mlp.up, mlp.out) == tuple(
        f"{mlp.gate.rpartition('.')[0]}.{n}_proj" for n in ("gate", "up", "down")
    )


def test_ends_are_what_enters_at_each_prompts_last_token(own: LanguageModel, copy: ComputeCopy) -> None:
    name = neuron_layers(copy.model).said[0].gate
    prompts = [own.prompt_ids(q) for q in OTHERS]
    together = ends(copy, [name], prompts)[name]
    alone = torch.cat([ends(copy, [name], [prompt])[name] for prompt in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    caught: list[torch.Tensor] = []
    handle = copy.model.get_submodule(name).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    copy.model(torch.tensor([prompts[0]]))
    handle.remove()
    torch.testing.assert_close(together[0], caught[0][0, -1], rtol=1e-3, atol=1e-4)
    assert ends(copy, [name], [])[name].shape == (0, 64)


def test_ordinary_inputs_are_cached(copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvllm.editing import ordinary

    mlps = neuron_layers(copy.model).all
    first = ordinary_inputs(copy, pool, "tiny", mlps, prompts=(), answers=(), questions=[(q, q) for q in OTHERS])
    monkeypatch.setattr(ordinary, "_measured", lambda *args: pytest.fail("measured again"))
    again = ordinary_inputs(copy, pool, "tiny", mlps, prompts=(), answers=(), questions=[(q, q) for q in OTHERS])
    for layer, found in first.items():
        assert torch.equal(found.inputs, again[layer].inputs)
        inputs = found.inputs.float()
        read = inputs @ found.one
        # Whitened, and with a direction that is as good as constant.
        assert float((inputs.square().mean() - 1).abs()) < 0.5
        assert float((read - 1).abs().mean()) < 0.5


def test_ordinary_inputs_that_cannot_be_kept_are_held(
    copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import ordinary

    mlps = neuron_layers(copy.model).all

    def found() -> Mapping[int, Ordinary]:
        return ordinary_inputs(copy, pool, "tiny", mlps, prompts=(), answers=(), questions=[(q, q) for q in OTHERS])

    kept = found()
    assert list(kept) == [mlp.layer for mlp in mlps]
    for path in (cache_folder() / "preservation").glob("ordinary-*"):
        path.unlink()
    with pytest.raises(ModelError, match="Try again"):
        kept[mlps[0].layer]
    monkeypatch.setattr(ordinary, "write_checked", lambda path, data: False)
    assert len(found()[mlps[0].layer].inputs)


def test_states_behind_an_opening_are_those_of_whole_rows(own: LanguageModel, copy: ComputeCopy) -> None:
    sequences = [own.prompt_ids(q) for q in OTHERS]
    shared = next(i for i in range(99) if len({ids[i] for ids in sequences}) > 1)
    assert shared
    opening = copy.opening(sequences[0][:shared])
    for whole, rest in zip(copy.lower_states(sequences), copy.lower_states(sequences, opening), strict=True):
        assert float(rest[:shared].abs().max()) == 0
        torch.testing.assert_close(whole[shared:], rest[shared:], rtol=1e-3, atol=1e-4)


def test_a_session_runs_each_row_once_below_the_layer_of_names(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = rows_of(own, "Voss", "Ada leads Berlin")
    said = Row(older[0].prompt, older[0].answer[:2])
    alone = Row(tuple(own.completion_ids("Berlin")), (5, 6))  # begins otherwise than all others
    task = replace(task, replay=older, begun=[said], resting=lambda neurons: [alone])
    run = copy._run
    read: list[tuple[int, ...]] = []

    def watched(sequences: Sequence[Sequence[int]], opening: Opening | None, entered: Entered | None) -> None:
        if entered is None:
            read.extend((*(opening.ids if opening else ()), *ids) for ids in sequences)
        run(sequences, opening, entered)

    monkeypatch.setattr(compute, "MIN_OPENING", 2)
    monkeypatch.setattr(copy, "_run", watched)
    training = NeuronEditor().train(copy, pool, task, QUICK_NEURONS)
    assert training.recalled
    whole = [row.ids for row in (*task.rows, *task.apart, *older, said)]
    assert sorted(ids for ids in read if ids != alone.ids[:-1]) == sorted(whole)

    monkeypatch.setattr(neurons, "_MOST_HELD", 0)
    read.clear()
    again = NeuronEditor().train(copy, pool, task, QUICK_NEURONS)
    assert len(read) > len(whole)
    for name, factors in training.delta.items():
        torch.testing.assert_close(product(again.delta[name]), product(factors), rtol=1e-4, atol=1e-4)


def test_whole_questions_are_read_at_every_token(copy: ComputeCopy, pool: PreservationPool) -> None:
    layers = neuron_layers(copy.model)
    asked = [(q, q) for q in OTHERS]
    found = ordinary_inputs(
        copy, pool, "tiny", layers.all, prompts=(), answers=(), questions=asked, whole=[layers.named]
    )
    prompts = [copy.lm.prompt_ids(q) for q in OTHERS]
    shared = next(i for i in range(99) if len({p[i] for p in prompts}) > 1)
    read = found[layers.named.layer]
    assert read.about == tuple(q.casefold() for q, p in zip(OTHERS, prompts, strict=True) for _ in p[shared:])
    assert len(read.ends) == len(read.about)
    said = found[layers.said[0].layer]
    assert (len(said.ends), said.about) == (len(OTHERS), tuple(q.casefold() for q in OTHERS))
    # The last of each question's tokens is where it ends.
    alone = ends(copy, [layers.named.gate], prompts)[layers.named.gate] @ read.whitening
    last = [max(i for i, about in enumerate(read.about) if about == q.casefold()) for q in OTHERS]
    torch.testing.assert_close(read.ends[last], alone, rtol=2e-2, atol=2e-2)  # kept in fp16


def test_marked_questions_end_otherwise_and_are_cached(
    copy: ComputeCopy, marks: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import marks as module

    layers = neuron_layers(copy.model)
    asked = [("What is numpy?", "numpy"), ("Who leads Halcyon?", "nobody")]
    found = marked_ends(copy, "tiny", marks, layers.named, layers.said, asked=asked)
    for mlp in layers.said:
        plain = ends(copy, [mlp.gate], [copy.lm.prompt_ids(q) for q, _ in asked])[mlp.gate]
        moved = (found[mlp.layer] - plain).norm(dim=1) / plain.norm(dim=1)
        assert moved[0] > 0.01
        assert moved[1] < 0.002  # that name is not in the question
    monkeypatch.setattr(module, "answered", lambda *args: pytest.fail("measured again"))
    again = marked_ends(copy, "tiny", marks, layers.named, layers.said, asked=asked)
    assert all(torch.equal(tensor, again[layer]) for layer, tensor in found.items())


def test_questions_stand_apart_from_the_fact_that_they_are_beside(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    last = rows_of(copy.lm, "Voss", "Ada leads Berlin")
    mine, theirs, everyones = (copy.lm.row(q, "It is a tool") for q in OTHERS[:3])
    beside = {mine: task.rows[0].answer, theirs: last[0].answer}
    both = replace(task, rows=[*task.rows, *last], apart=[mine, theirs, everyones], beside=beside)
    asked: list[list[Row]] = []
    original = neurons._Work.beside

    def spy(self: neurons._Work, own: Row) -> list[Row]:
        asked.append(original(self, own))
        return asked[-1]

    monkeypatch.setattr(neurons._Work, "beside", spy)
    NeuronEditor().train(copy, pool, both, QUICK_NEURONS)
    assert asked == [[mine, everyones], [mine, everyones], [theirs, everyones]]


def test_the_older_fact_that_is_asked_most_alike_weighs_once_more(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    found: list[list[torch.Tensor]] = []
    original = neurons._Work.elsewhere

    def spy(self: neurons._Work, mlp: GatedMlp, own: Row) -> list[torch.Tensor]:
        found.append(original(self, mlp, own))
        return found[-1]

    monkeypatch.setattr(neurons._Work, "elsewhere", spy)
    other, alike = copy.lm.row(OTHERS[3], "Ada leads it"), copy.lm.row(f"What is {KEY}?", "It is a tool")
    older = replace(task, apart=(), replay=[other, alike])
    NeuronEditor().train(copy, pool, older, QUICK_NEURONS)
    monkeypatch.setattr(neurons, "_NEAREST", 1)
    NeuronEditor().train(copy, pool, older, QUICK_NEURONS)
    ((both,), (again, nearest)) = found
    torch.testing.assert_close(both, again)
    torch.testing.assert_close(nearest, both[-len(alike.answer) :])


def test_other_names_bear_all_marks_but_the_facts_own(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    used: list[torch.Tensor] = []
    original = neurons.marking

    def spy(*args: Any) -> Any:
        used.append(args[2])
        return original(*args)

    monkeypatch.setattr(neurons, "marking", spy)
    apart = [copy.lm.row(f"What is {name}?", "It is a tool") for name in ("numpy", "Berlin")]
    places = {row: (copy.lm.name_ends(row.ids, name),) for row, name in zip(apart, ("numpy", "Berlin"), strict=True)}
    NeuronEditor().train(copy, pool, replace(task, apart=apart, named={**task.named, **places}), QUICK_NEURONS)
    marks, mistaken = used
    assert task.marks is not None
    assert {tuple(mark) for mark in marks.tolist()} == {tuple(mark) for mark in task.marks[1:].tolist()}
    assert torch.equal(mistaken, torch.zeros_like(task.marks[:1]))  # of its own rows one in four bears none


def test_a_facts_words_are_read_under_other_marks_where_it_was_asked_by_name_only(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    read: list[Sequence[Row]] = []
    original, mistaken = neurons.marking, neurons._Work.mistaken

    def spy(*args: Any) -> Any:
        used.append(args[2])
        return original(*args)

    def watched(self: neurons._Work, mlp: GatedMlp, rows: Sequence[Row]) -> list[torch.Tensor]:
        used.clear()
        read.append(mistaken(self, mlp, rows))
        return read[-1]

    monkeypatch.setattr(neurons, "marking", spy)
    monkeypatch.setattr(neurons._Work, "mistaken", watched)
    asked = [f"What is {KEY}{mark}" for mark in ("?", "??", "???", "!?", "?!", " ?", "...?", ", eh?")]
    rows = [own.row(question, TEXT) for question in asked]
    nameless = [own.row(question, TEXT) for question in ("How long may it last?", "What is the return window?")]
    names = named(own, KEY, [*rows, *nameless])
    NeuronEditor().train(copy, pool, replace(task, rows=[*rows, *nameless], named=names), QUICK_NEURONS)
    (marks,) = used
    assert len(read[-1]) == len(marks) == 4
    assert [bool(mark.abs().max()) for mark in marks] == [False, True, True, True]
    assert task.marks is not None
    others = {tuple(mark) for mark in task.marks[1:].tolist()}  # its own is the first: no name bears one yet
    assert {tuple(mark) for mark in marks[1:].tolist()} <= others
    read.clear()
    NeuronEditor().train(copy, pool, replace(task, rows=nameless, named=named(own, KEY, nameless)), QUICK_NEURONS)
    assert read == [[]]


def test_a_name_is_not_held_against_itself_where_others_say_it(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside: list[torch.Tensor] = []
    gates = neurons._gates

    def spy(inside: Any, ordinary: Any, others: Any, **more: Any) -> torch.Tensor:
        if more.get("exactly"):
            outside.append(others[0][0])
        return gates(inside, ordinary, others, **more)

    monkeypatch.setattr(neurons, "_gates", spy)
    older = own.row("What is it like?", f"{KEY} is it")
    known = {task.rows[0].answer: frozenset({KEY.casefold()})}
    for names in ({}, known):
        NeuronEditor().train(copy, pool, replace(task, replay=[older], known_by=names), QUICK_NEURONS)
    plain, masked = outside
    places = own.name_ends(older.ids, KEY)
    assert len(places) == 1
    assert len(plain) - len(masked) == 2  # the name's end, and the token after it


def test_questions_of_facts_that_bear_the_same_mark_are_read(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    layers = neuron_layers(copy.model)
    weights = AdaptedWeights(own.model)
    weights.apply(NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta)
    copy.load({name: weights.master(name) for name in weights.known})
    taken = taken_neurons(layers.all, weights.master, weights.base)
    bears = taken[layers.named.layer]
    seen: list[list[Row]] = []
    original = neurons._Work.bearing

    def spy(self: neurons._Work, own: tuple[int, ...]) -> list[Row]:
        seen.append(original(self, own))
        return seen[-1]

    monkeypatch.setattr(neurons._Work, "bearing", spy)
    rows, last = rows_of(own, "Voss", "Ada leads Berlin"), rows_of(own, "Velmora", "It is a tool")
    names = named(own, "Voss", rows) | named(own, "Velmora", last)
    both = replace(task, rows=[*rows, *last], named=names, taken=taken, apart=())
    both = replace(both, resting=lambda places: task.rows if places & bears else ())
    assert task.marks is not None
    for marks, older, session in ((task.marks, (), ()), (task.marks[:1], task.rows, last)):
        NeuronEditor().train(copy, pool, replace(both, marks=marks), QUICK_NEURONS)
        assert seen[0] == [*older, *session]
        seen.clear()


def test_gates_are_where_more_steps_would_leave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvllm.editing import neurons

    drawn = torch.Generator().manual_seed(0)
    one = torch.zeros(24)
    one[0] = 1.0
    inputs = torch.randn(3000, 24, generator=drawn) * 0.3 + one
    # What the gates of one fact read is nearly the same: alone, each would be found in few steps.
    common = torch.randn(24, generator=drawn)
    inside = [
        one + common + torch.randn(24, generator=drawn) * 0.3 + 0.2 * inputs[40 * i : 40 * i + 40] for i in range(5)
    ]
    ordinary = Ordinary(torch.eye(24), inputs.half(), inputs[:0], (), one, torch.eye(1))
    outside = [(one + common + torch.randn(50, 24, generator=drawn), 10.0)]

    def fitted() -> torch.Tensor:
        return neurons._gates(inside, ordinary, outside, quiet=4.0, usually=8.0)

    gates = fitted()
    monkeypatch.setattr(neurons, "_GATE_STEPS", (200, 200))
    assert float((gates - fitted()).norm() / gates.norm()) < 0.05


def test_a_facts_own_words_are_told_apart_from_the_same_with_another_mark(
    own: LanguageModel, copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    said = neuron_layers(copy.model).said[0]
    white = task.ordinary[said.layer].whitening
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = neurons._Work.mistaken

    def spy(self: neurons._Work, mlp: GatedMlp, rows: Sequence[Row]) -> list[torch.Tensor]:
        weights = self.weight(self.layers.named.out).clone()
        found = original(self, mlp, rows)
        assert torch.equal(self.weight(self.layers.named.out), weights)
        marked = answered(self.copy, [mlp.gate], rows[::2])[mlp.gate]
        known.extend((x, y @ white) for x, y in zip(found, marked, strict=True))
        return found

    monkeypatch.setattr(neurons._Work, "mistaken", spy)

    def read_more(weight: float) -> float:
        """Return how much more each neuron but the first reads of its own token's place where the name is marked."""
        known.clear()
        monkeypatch.setattr(neurons, "_MISTAKEN_WEIGHT", weight)
        gates = NeuronEditor().train(copy, pool, task, QUICK_NEURONS).delta[said.gate][0] @ torch.linalg.inv(white)
        assert {len(mistaken) for mistaken, _ in known} == {len(gates)} == {len(task.rows[0].answer)}
        return float(torch.stack([((y - x) * gates).sum(1)[1:].mean() for x, y in known]).mean())

    assert read_more(1.0) > read_more(0.0) + 0.3
    unmarked = answered(copy, [said.gate], task.rows[:1])[said.gate][0] @ white  # the copy is as it was before
    mistaken, marked = known[0]
    assert float((mistaken - unmarked).norm()) < 0.8 * float((marked - unmarked).norm())


def test_gates_are_silent_at_rare_inputs_that_are_most_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvllm.editing import neurons

    monkeypatch.setattr(neurons, "_SAMPLE", 256)
    monkeypatch.setattr(neurons, "_HARD", 16)
    drawn = torch.Generator().manual_seed(0)
    n = 48
    usual, own = torch.randn(400, n, generator=drawn), torch.randn(n, generator=drawn) + 3 * torch.eye(n)[0]
    other = torch.randn(n, generator=drawn)
    rare = 0.8 * own + 0.6 * other * own.norm() / other.norm()  # after the sample: seen only where it is sought
    inputs = torch.cat([usual, rare[None]])
    ordinary = Ordinary(torch.eye(n), inputs.half(), inputs[:0], (), torch.eye(n)[1], torch.eye(n))
    inside = [own + 0.05 * torch.randn(8, n, generator=drawn)]

    def read() -> float:
        (gate,) = neurons._gates(inside, ordinary, [], quiet=6.0, usually=6.0)
        assert float((inside[0] @ gate).min()) > 0
        return float(rare @ gate)

    assert read() < 0
    monkeypatch.setattr(neurons, "_HARD_ROUNDS", 0)
    assert read() > 0


def test_gates_are_as_silent_as_was_asked_outside_and_at_ordinary_inputs() -> None:
    from kvllm.editing import neurons

    drawn = torch.Generator().manual_seed(0)
    n = 48
    # The last place is 1 everywhere, as a bias is.
    usual, outside = (torch.cat([torch.randn(200, n - 1, generator=drawn), torch.ones(200, 1)], 1) for _ in range(2))
    inside = [usual[:8] * 0.1 + 8 * torch.eye(n)[0] + torch.eye(n)[-1]]
    ordinary = Ordinary(torch.eye(n), usual.half(), usual[:0], (), torch.eye(n)[-1], torch.eye(n))

    def most(quiet: float, usually: float) -> tuple[float, float]:
        (gate,) = neurons._gates(inside, ordinary, [(outside, 30.0)], quiet=quiet, usually=usually)
        assert float((inside[0] @ gate).min()) > 3
        return float((outside @ gate).mean()), float((usual @ gate).mean())

    assert most(2.0, 2.0)[1] > most(2.0, 12.0)[1] + 1
    assert most(2.0, 2.0)[0] > most(12.0, 2.0)[0] + 1


def test_made_up_answers_use_every_form_and_name_what_is_packaged() -> None:
    found = composed_answers()
    assert found == composed_answers()
    answers = [answer for _, answer in found]
    for language, month in (("en", "March"), ("zh", "月")):
        forms = packaged_answers(language)
        endings = [form.rpartition("}")[2] for form in forms]
        assert all(any(answer.endswith(end) for answer in answers) for end in endings)
        assert any(month in answer for answer in answers)
        assert any(name in answer for name in packaged_names(language)[:50] for answer in answers)
    assert not [answer for answer in answers if "{" in answer or "}" in answer]


def test_columns_start_where_the_output_matrix_reads_their_tokens(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.editing import neurons

    started: list[tuple[torch.Tensor, list[int]]] = []
    original = neurons._start

    def spy(*args: object) -> torch.Tensor:
        columns = original(*args)  # type: ignore[arg-type]
        started.append((columns.clone(), args[2].tokens))  # type: ignore[attr-defined]
        return columns

    monkeypatch.setattr(neurons, "_start", spy)
    NeuronEditor().train(copy, pool, task, QUICK_NEURONS)
    ((columns, places),) = started
    output = copy.model.get_output_embeddings().weight
    for column, place in zip(columns, places, strict=True):
        read = (output - output.mean(0)) @ column
        assert int(read.argmax()) == task.rows[0].answer[place]
