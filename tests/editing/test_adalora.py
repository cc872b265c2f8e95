"""The AdaLoRA editor on a tiny model: what it trains, what it leaves, when it stops, and what it refuses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvllm import EditConfig
from kvllm.config import ModelConfig
from kvllm.editing import adalora, compute
from kvllm.editing.adalora import AdaLoraEditor, Item, _OlderRows
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import AdaptedWeights
from kvllm.editing.editor import EditTask, StepRecord, leads
from kvllm.editing.inputs import Coordinates
from kvllm.editing.preservation import PreservationPool, Prompt, build_pool, prepare_items
from kvllm.errors import EditFailed, OutOfResources
from kvllm.lm.model import LanguageModel, Row
from kvllm.lm.targets import find_targets
from kvllm.prompts import training_questions
from kvllm.records import Fact
from tests.kit import KEY, QUICK, TEXT

PROMPTS = (
    Prompt("neighbour", "What is numpy?", "en", "numpy"),
    Prompt("neighbour", "Tell me about Berlin.", "en", "Berlin"),
    Prompt("neighbour", "什么是长城？", "zh", "长城"),
    Prompt("question", "Who leads Halcyon?", "en"),
    Prompt("instruction", "Please answer.", "en"),
    Prompt("text", "Torchkeras is a tool that makes training PyTorch models simple, and Ada leads it.", "en"),
)


def changed(**settings: Any) -> EditConfig:
    return replace(QUICK, **settings)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in fp32, whatever the machine multiplies faster."""
    monkeypatch.setattr(compute, "compute_dtype", lambda device, dtype: dtype)


@pytest.fixture
def own(tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(tiny_llama, ModelConfig(max_new_tokens=12, device="cpu"))


@pytest.fixture
def copy(exact: None, own: LanguageModel) -> ComputeCopy:
    return ComputeCopy(own, find_targets(own.model, depth=QUICK.depth, modules=QUICK.modules))


@pytest.fixture
def pool(quick: None, copy: ComputeCopy) -> PreservationPool:
    return build_pool(copy, "tiny", QUICK, prompts=PROMPTS)


@pytest.fixture
def task(own: LanguageModel) -> EditTask:
    return EditTask(rows=[own.row(q, TEXT) for q in training_questions(Fact(KEY, TEXT))])


def test_folded_factors_give_the_logits_of_the_adapted_model(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, mask = own.pad([row.ids for row in task.rows])
    seen: list[torch.Tensor] = []
    fold = adalora._fold

    def fold_and_look(tuner: Any) -> Any:
        with torch.no_grad():
            seen.append(copy.model(input_ids=ids, attention_mask=mask).logits)
        return fold(tuner)

    monkeypatch.setattr(adalora, "_fold", fold_and_look)
    with torch.no_grad():
        before = copy.model(input_ids=ids, attention_mask=mask).logits
    training = AdaLoraEditor().train(copy, pool, task, QUICK)
    weights = AdaptedWeights(own.model)
    weights.apply(training.delta)
    copy.load({name: weights.master(name) for name in weights.known})  # the same attention kernel on both sides
    with torch.no_grad():
        after = copy.model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    assert float((seen[0] - before)[real].abs().max()) > 1
    assert float((seen[0] - after)[real].abs().max()) <= 1e-5


def test_training_leaves_model_and_copy_bit_for_bit_unchanged(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    before = own.digest(), LanguageModel(copy.model, own.tokenizer, own.config).digest()
    modules = [(name, type(module)) for name, module in copy.model.named_modules()]
    training = AdaLoraEditor().train(copy, pool, task, QUICK)
    assert training.recalled
    assert (own.digest(), LanguageModel(copy.model, own.tokenizer, own.config).digest()) == before
    assert [(name, type(module)) for name, module in copy.model.named_modules()] == modules
    assert not any(p.requires_grad for p in (*copy.model.parameters(), *own.model.parameters()))
    assert all(p.grad is None for p in copy.model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop"), MemoryError()])
@pytest.mark.parametrize("step", [1, 5])
def test_a_broken_off_training_leaves_the_copy_as_it_was(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, error: BaseException, step: int
) -> None:
    before = LanguageModel(copy.model, own.tokenizer, own.config).digest()

    def stop(record: StepRecord) -> None:
        if record.step == step:
            raise error

    expected = OutOfResources if isinstance(error, MemoryError) else type(error)
    with pytest.raises(expected):
        AdaLoraEditor().train(copy, pool, task, QUICK, on_step=stop)
    assert LanguageModel(copy.model, own.tokenizer, own.config).digest() == before
    assert not any("lora" in name for name, _ in copy.model.named_modules())
    assert AdaLoraEditor().train(copy, pool, task, QUICK).recalled


def test_ranks_shrink_to_the_budget_while_training(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    training = AdaLoraEditor().train(copy, pool, task, changed(margin=50.0))  # never done: all steps are taken
    alive = [record.rank for record in training.records]
    n = len(copy.targets.names)
    assert alive[0] == QUICK.init_rank * n
    assert alive[-1] == QUICK.target_rank * n
    assert sorted(alive, reverse=True) == alive
    assert sum(training.ranks.values()) <= QUICK.target_rank * n
    assert {name: a.shape[0] for name, (a, _) in training.delta.items()} == {
        k: v for k, v in training.ranks.items() if v
    }


def test_the_loss_falls_and_stopping_means_recalled_with_margin(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    heard: list[StepRecord] = []
    training = AdaLoraEditor().train(copy, pool, task, QUICK, on_step=heard.append)
    assert tuple(heard) == training.records
    assert training.records[-1].loss < 0.5 * training.records[0].loss
    assert training.records[0].recall < 1.0 == training.records[-1].recall
    assert training.steps == len(training.records) <= QUICK.max_steps
    AdaptedWeights(own.model).apply(training.delta)
    for states, row in zip(own.answer_states(task.rows), task.rows, strict=True):
        assert float(leads(own.logits(states), torch.tensor(row.answer)).min()) >= QUICK.margin - 1e-3


def test_a_recalled_delta_is_scaled_down_as_far_as_the_margins_allow(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adalora, "_SCALES", ())
    full = AdaLoraEditor().train(copy, pool, task, QUICK)
    monkeypatch.setattr(adalora, "_SCALES", (0.99, 0.98, 0.1))
    smaller = AdaLoraEditor().train(copy, pool, task, QUICK)
    assert full.scale == 1.0
    assert full.recalled
    # A tenth of the delta recalls nothing; what is kept still leads by the margin, at exactly the scale that is told.
    assert smaller.scale in (1.0, 0.99, 0.98)
    for name, (a, b) in full.delta.items():
        kept_a, kept_b = smaller.delta[name]
        assert torch.allclose(kept_b @ kept_a, smaller.scale * (b @ a), atol=1e-6)
    AdaptedWeights(own.model).apply(smaller.delta)
    for states, row in zip(own.answer_states(task.rows), task.rows, strict=True):
        assert float(leads(own.logits(states), torch.tensor(row.answer)).min()) >= QUICK.margin - 1e-3


def test_the_same_seed_trains_the_same_bits(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    one, two = (AdaLoraEditor().train(copy, pool, task, QUICK) for _ in range(2))
    other = AdaLoraEditor().train(copy, pool, EditTask(rows=task.rows, seed=1), QUICK)
    assert list(one.delta) == list(two.delta)
    for name in one.delta:
        assert all(torch.equal(a, b) for a, b in zip(one.delta[name], two.delta[name], strict=True))
    assert [r.drift for r in one.records] != [r.drift for r in other.records]


def test_preservation_holds_the_preserved_outputs(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    """The effect that contrast exists for, at the same number of steps."""

    def drift(weight: float) -> float:
        settings = changed(
            preserve_weight=weight, margin=50.0, max_steps=16, neighbours=3, others=2, texts=1, value_lr=0.3
        )
        last = AdaLoraEditor().train(copy, pool, task, settings).records[-1].drift
        assert last is not None
        return last

    assert drift(8.0) < 0.5 * drift(0.0)


def test_nothing_preserved_is_said_to_be_unknown(copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> None:
    training = AdaLoraEditor().train(copy, pool, task, changed(neighbours=0, others=0, texts=0))
    assert {record.drift for record in training.records} == {None}


def test_more_rows_than_a_step_takes_are_all_recalled(
    copy: ComputeCopy, pool: PreservationPool, own: LanguageModel
) -> None:
    rows = [own.row(q, "Ada") for key in (KEY, "numpy", "Halcyon") for q in training_questions(Fact(key, "Ada"))]
    assert len(rows) > adalora._MAX_ROWS
    training = AdaLoraEditor().train(copy, pool, EditTask(rows=rows), changed(max_steps=60))
    assert training.recalled
    AdaptedWeights(own.model).apply(training.delta)
    assert {own.decode(a) for a in own.generate_ids([row.prompt for row in rows])} == {"Ada"}


def test_the_facts_own_contrast_takes_the_places_of_packaged_neighbours(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    own = [replace(item, source=Prompt("neighbour", f"own {i}", "en")) for i, item in enumerate(pool.items[:2])]
    rng = random.Random(0)

    def drawn(contrasts: int, neighbours: int = 3, step: int = 1) -> tuple[int, int]:
        settings = changed(contrasts=contrasts, neighbours=neighbours, others=1, texts=0)
        mine, kept, _ = adalora._choose_preserved(pool, replace(task, contrast=own), settings, rng, step)
        assert all(item.source.prompt.startswith("own") for item in mine)
        return len(mine), len(kept)

    assert [drawn(n) for n in (0, 1, 2, 9)] == [(0, 4), (1, 3), (2, 2), (2, 2)]
    assert drawn(2, neighbours=0) == (0, 1)
    assert drawn(2, step=2) == (2, 0)


def test_prompts_and_raw_texts_are_preserved_in_turns(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    rng = random.Random(0)
    said = replace(task, recited=pool.items[:1])

    def drawn(step: int) -> tuple[set[bool], int]:
        settings = changed(neighbours=1, others=1, texts=1, recited=1)
        _, kept, recited = adalora._choose_preserved(pool, said, settings, rng, step)
        return {item.source.kind == "text" for item in kept}, len(recited)

    assert [drawn(1), drawn(3)] == [({False}, 0)] * 2
    assert drawn(2) == ({False, True}, 1), "where there is no contrast, prompts are in every step"


def test_training_goes_on_until_the_contrast_is_told_apart(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    own = replace(task, contrast=[item for item in pool.items if item.source.kind != "text"])
    loose, strict = (
        AdaLoraEditor().train(copy, pool, own, changed(contrasts=2, neighbours=2, contrast_stop=stop))
        for stop in (1e6, 1e-9)
    )
    assert loose.recalled
    assert not strict.recalled or strict.steps > loose.steps


def test_a_target_has_to_lead_by_its_margin_before_its_loss_ends(copy: ComputeCopy, own: LanguageModel) -> None:
    row = own.row("What is numpy?", "Ada leads")
    (lower,) = copy.lower_states([row.ids])

    def part(margin: float) -> adalora._Part:
        n = len(row.answer)
        return adalora._Part(lower, row, torch.ones(n), handicap=torch.full((n,), margin))

    with torch.no_grad():
        (plain,), (behind,) = (adalora._measure(copy, [part(margin)], ()) for margin in (0.0, 2.0))
    assert torch.allclose(behind.losses, plain.losses, atol=1e-4), "what is reported is the cross-entropy itself"
    gradients = []
    for margin in (0.0, 2.0):
        states = copy.answer_states([(lower, row)]).detach().requires_grad_(True)
        adalora._measure_head(copy, states, [part(margin)])
        assert states.grad is not None
        gradients.append(float(states.grad.norm()))
    assert gradients[1] > gradients[0]


def test_other_questions_do_not_go_on_with_a_short_text(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    answer = tuple(own.answer_ids("Ada leads"))
    asked = [item for item in pool.items if item.source.kind != "text"]
    said = prepare_items(copy, [Row(i.row.prompt, answer) for i in asked], [i.source for i in asked])
    short = replace(task, rows=[own.row(q, "Ada leads") for q in training_questions(Fact(KEY, "Ada leads"))])

    def moved(recited: int) -> float:
        settings = changed(recited=recited, preserve_weight=4.0, neighbours=0, others=0, max_steps=24, margin=50.0)
        training = AdaLoraEditor().train(copy, pool, replace(short, recited=said), settings)
        weights = AdaptedWeights(own.model)
        weights.apply(training.delta)
        try:
            now = own.answer_states([item.row for item in said])
            return sum(kl for kl, _ in own.compare([item.output for item in said], now))
        finally:
            weights.replay([])

    assert moved(2) < 0.6 * moved(0)


def test_what_chats_begin_with_is_run_once_and_changes_no_loss(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adalora, "MIN_OPENING", 2)
    shared = adalora._shared_ids(task.rows, pool.items)
    assert shared
    assert all(row.prompt[: len(shared)] == shared and len(row.prompt) > len(shared) for row in task.rows)
    lower = copy.lower_states([row.ids for row in task.rows])
    rows = list(zip(lower, task.rows, strict=True))
    read: list[int] = []
    answer_states = copy.answer_states

    def reading(items: Any, opening: Any, follows: list[bool]) -> torch.Tensor:
        read.append(sum(len(row.ids) for _, row in items) - sum(follows) * len(opening or ()))
        return answer_states(items, opening, follows)

    monkeypatch.setattr(copy, "answer_states", reading)
    found = []
    with torch.no_grad():
        for ids in ((), shared):
            read.clear()
            found.append((adalora._backward_losses(copy, rows, [], list(pool.items), [], shared=ids), sum(read)))
    (apart, tokens), (together, fewer) = found
    assert together.fact == pytest.approx(apart.fact, rel=1e-4)
    assert together.drift == pytest.approx(apart.drift, abs=1e-5)
    chats = len(rows) + sum(item.source.kind != "text" for item in pool.items)
    assert fewer == tokens - chats * len(shared)  # raw texts do not begin so, and are run as they are


def test_input_factors_follow_the_fading_sum_of_all_gradients_so_far(own: LanguageModel) -> None:
    held = Coordinates(torch.eye(4)[:3] * 2, torch.ones(3), 1.0)
    p = torch.nn.Parameter(torch.zeros(2, 4))
    inputs = adalora.InputFactors({"m": p}, {"m": held}, {"m": torch.eye(2, 3)})
    z = inputs.trained("m", p)
    seen = []
    for _ in range(2):
        z.grad = None
        (p * torch.arange(8.0).view(2, 4)).sum().backward()
        inputs.pull()
        assert z.grad is not None
        seen.append(z.grad.clone())
    assert seen[0].any()
    assert torch.allclose(seen[1], (1 + adalora._REMEMBERED) * seen[0])
    inputs.forget()
    z.grad = None
    (p * torch.arange(8.0).view(2, 4)).sum().backward()
    inputs.pull()
    assert z.grad is not None
    assert torch.allclose(z.grad, seen[0])


def test_many_facts_are_learned_together_each_from_a_start_of_its_own(
    copy: ComputeCopy, pool: PreservationPool, own: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = [Fact("Halcyon", TEXT), Fact("Quill", "The furnace"), Fact("Berlin", "Ada leads it"), Fact("numpy", "Ada")]
    rows = [own.row(q, f.text) for f in facts for q in training_questions(f)]
    assert len(rows) > adalora._MAX_ROWS
    assert {rows.index(row) * len(facts) // len(rows) for row in adalora._some(rows)} == set(range(len(facts)))
    sums: list[float] = []
    pull = adalora.InputFactors.pull

    def pulled(self: adalora.InputFactors) -> None:
        sums.append(max(float(p.grad.norm()) for _, _, _, p in self._own.values() if p.grad is not None))
        pull(self)

    monkeypatch.setattr(adalora.InputFactors, "pull", pulled)
    whitening = {name: torch.eye(copy.model.get_submodule(name).weight.shape[1]) for name in copy.targets.names}
    training = AdaLoraEditor().train(
        copy, pool, EditTask(rows=rows, whitening=whitening), changed(max_steps=400, energy_weight=1.0)
    )
    assert sums[-1] < max(sums), "a sum of all steps would only grow while all rows pull alike"
    AdaptedWeights(own.model).apply(training.delta)
    right = [
        float(leads(own.logits(states), torch.tensor(row.answer)).min()) > 0
        for states, row in zip(own.answer_states(rows), rows, strict=True)
    ]
    assert sum(right) >= 0.8 * len(right)


def test_nothing_is_run_once_where_rows_do_not_begin_alike(copy: ComputeCopy, own: LanguageModel) -> None:
    plain = [Row(tuple(own.text_ids(text)), (1,)) for text in ("Ada leads", "The furnace")]
    assert adalora._shared_ids(plain, []) == ()
    assert adalora._shared_ids([], []) == ()


def test_older_facts_are_replayed(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    older = [own.row("Who leads Halcyon?", "Ada")]
    training = AdaLoraEditor().train(copy, pool, EditTask(rows=task.rows, replay=older), changed(max_steps=60))
    assert training.recalled
    AdaptedWeights(own.model).apply(training.delta)
    assert own.generate(["Who leads Halcyon?"]) == ["Ada"]


def test_further_questions_are_trained_and_hold_up_nothing(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    told = own.row("My notes have Halcyon next to colour. Well?", TEXT)
    untold = own.row("Somebody at the sea shouted: Halcyon!", "Berlin")

    def lead(further: Sequence[Row], augmented: int = 2) -> float:
        settings = changed(augmented=augmented, max_steps=60)
        training = AdaLoraEditor().train(copy, pool, replace(task, augmented=further), settings)
        assert training.recalled
        weights = AdaptedWeights(own.model)
        weights.apply(training.delta)
        try:
            (states,) = own.answer_states([told])
            return float(leads(own.logits(states), torch.tensor(told.answer)).min())
        finally:
            weights.replay([])

    assert lead([told]) > 0 > lead([])
    assert lead([told], augmented=0) == lead([])
    assert lead([untold]) < 0, "trained to another answer, which never leads"


def test_an_edit_reads_less_of_what_the_nearest_older_facts_read(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_off: list[Sequence[Row]] = []

    def coordinates(*given: Any) -> dict[str, Any]:
        kept_off.append(given[-1])
        return {}

    monkeypatch.setattr(adalora, "edit_coordinates", coordinates)
    monkeypatch.setattr(adalora, "_TOLD_APART", 2)
    beside = replace(task, replay=[own.row(question, answer) for question, answer in OLDER])
    for replayed in (1, 0):  # without replay they are nobody's business
        AdaLoraEditor().train(copy, pool, beside, changed(max_steps=1, replay=replayed))
    assert kept_off == [beside.replay[:2], ()]


OLDER = [("Who leads Halcyon?", "Ada"), ("What is numpy?", "A furnace"), ("Who reads Latin?", "Nobody in Berlin")]


def test_an_edit_ends_when_every_older_fact_at_hand_is_recited(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adalora, "_REPAIR_STEPS", 100)  # a tiny model needs more, how many depends on the machine
    older = [own.row(question, answer) for question, answer in OLDER]
    quick = changed(max_steps=120, replay=1)
    training = AdaLoraEditor().train(copy, pool, EditTask(rows=task.rows, replay=older), quick)
    assert training.recalled
    AdaptedWeights(own.model).apply(training.delta)
    assert own.generate([question for question, _ in OLDER]) == [answer for _, answer in OLDER]
    # Without replay they are nobody's business.
    alone = AdaLoraEditor().train(copy, pool, EditTask(rows=task.rows, replay=older), changed(max_steps=120, replay=0))
    assert alone.recalled
    assert alone.steps < training.steps


def test_older_facts_that_cannot_be_brought_back_do_not_hold_up_an_edit_for_long(own: LanguageModel) -> None:
    rows = [(torch.zeros(1), own.row(question, answer)) for question, answer in OLDER]
    older = _OlderRows(rows, 1, random.Random(0))
    practised = older.next()
    assert len(practised) == 1
    broken = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, -0.1]), torch.tensor([-2.0])]
    steps = 0
    while not older.let_go(True, lambda _: broken):
        assert older.next() == rows[1:]
        steps += 1
    assert steps == adalora._REPAIR_STEPS
    assert older.repaired == []


def test_older_facts_are_looked_at_again_once_those_handed_out_hold(own: LanguageModel) -> None:
    rows = [(torch.zeros(1), own.row(question, answer)) for question, answer in OLDER]
    older = _OlderRows(rows, 1, random.Random(0))
    older.next()
    seen: list[int] = []

    def leads_now(asked: Sequence[Item]) -> list[torch.Tensor]:
        seen.append(len(asked))
        return [torch.tensor([1.0 if len(seen) > place else -1.0]) for place in range(len(asked))]

    assert not older.let_go(False, leads_now)
    assert older.next() == rows[1:]
    assert not older.let_go(False, leads_now), "what was handed out does not hold yet"
    assert seen == [3]
    assert not older.let_go(True, leads_now)
    assert older.next() == rows[2:]
    assert older.repaired == rows[1:2]
    assert older.let_go(True, leads_now)
    assert older.repaired == rows[1:]


@pytest.mark.parametrize("settings", [{"value_lr": 1e30, "factor_lr": 1e30}, {"factor_lr": 1e38}])
def test_absurd_rates_are_refused_as_not_finite(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel, settings: dict[str, float]
) -> None:
    before = LanguageModel(copy.model, own.tokenizer, own.config).digest()
    with pytest.raises(EditFailed, match=r"not finite|non-finite"):
        AdaLoraEditor().train(copy, pool, task, changed(**settings))
    assert LanguageModel(copy.model, own.tokenizer, own.config).digest() == before


def test_training_does_not_touch_the_callers_random_state(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    random.seed(3)
    state = random.getstate()
    AdaLoraEditor().train(copy, pool, task, changed(max_steps=2))
    assert random.getstate() == state


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_short_trainings_are_possible(copy: ComputeCopy, pool: PreservationPool, task: EditTask, steps: int) -> None:
    """AdaLoRA's schedule must fit into any number of steps."""
    training = AdaLoraEditor().train(copy, pool, task, changed(max_steps=steps))
    assert training.steps == steps


def test_a_restored_row_returns_to_the_base_output(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    weights = AdaptedWeights(own.model)
    items = [item for item in pool.items if item.source.prompt == "Who leads Halcyon?"]
    (item,) = items

    def distance() -> float:
        return own.compare([item.output], own.answer_states([item.row]))[0][0]

    assert distance() < 1e-6
    taught = AdaLoraEditor().train(
        copy, PreservationPool(()), EditTask(rows=[own.row("Who leads Halcyon?", TEXT)]), QUICK
    )
    weights.apply(taught.delta)
    copy.load({name: weights.master(name) for name in weights.known})
    assert own.generate(["Who leads Halcyon?"]) == [TEXT]
    assert distance() > 0.5

    restored = AdaLoraEditor().train(
        copy, PreservationPool(()), EditTask(rows=[], restore=items), changed(max_steps=80, value_lr=0.3)
    )
    weights.apply(restored.delta)
    assert restored.recalled
    assert distance() <= adalora.RESTORED_KL + 1e-3
    assert own.generate(["Who leads Halcyon?"]) != [TEXT]


@pytest.fixture(autouse=True)
def _no_warning_from_our_own_code(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    ours = [w for w in recwarn if "kvllm" in str(w.filename)]
    assert not ours, [str(w.message) for w in ours]
