"""Editing is a matter of data: the same code teaches every decoder family, and replays it exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm import Fact, KnowledgeBase
from kvllm.config import ModelConfig
from kvllm.editing import compute
from kvllm.editing.compute import ComputeCopy, Entered
from kvllm.lm.decoding import Opening
from kvllm.lm.model import LanguageModel, Row, shared_length
from kvllm.lm.targets import find_targets
from kvllm.prompts import training_questions
from tests.kit import KEY, QUICK
from tests.tiny import tiny_model

FAMILIES = {
    "gpt2": False,  # whether with a chat template
    "neox": False,
    "opt": False,
    "bloom": False,
    "mistral": True,
    "qwen3": True,
    "gemma2": True,
    "gemma3": True,
    "granite": True,
    "cohere": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            target = tmp_path_factory.mktemp("families") / family
            made[family] = tiny_model(target, family=family, chat=FAMILIES[family])
        return made[family]

    return get


@pytest.fixture
def lm(folder: Callable[[str], Path], family: str, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model of the test's family, whose compute copies have its own precision."""
    monkeypatch.setattr(compute, "compute_dtype", lambda device, dtype: dtype)
    return LanguageModel.load(folder(family), ModelConfig(device="cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_lower_layers_give_the_outputs_of_the_whole_model(lm: LanguageModel) -> None:
    rows = [lm.row("What is torchkeras?", "Ada leads"), lm.row("Who?", "The furnace of Berlin and of numpy")]
    for depth in ((0.0, 1.0), (0.5, 1.0)):
        copy = ComputeCopy(lm, find_targets(lm.model, depth=depth, modules="mlp-out"))
        lower = copy.lower_states([row.ids for row in rows])
        with torch.no_grad():
            states = copy.answer_states(list(zip(lower, rows, strict=True)))
            found = copy.logits(states)
        wanted = torch.cat([lm.logits(states) for states in lm.answer_states(rows)])
        assert torch.allclose(found, wanted, atol=2e-4), float((found - wanted).abs().max())
        for row, part in zip(rows, found.split([len(row.answer) for row in rows]), strict=True):
            with torch.no_grad():
                alone = lm.model(input_ids=torch.tensor([row.ids])).logits[0]
            assert torch.allclose(part, alone[len(row.prompt) - 1 : -1], atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_opening_that_is_run_once_gives_the_same_outputs_and_gradients_behind_it(lm: LanguageModel) -> None:
    rows = [lm.row("What is torchkeras?", "Ada leads"), lm.row("What is the furnace?", "The furnace of Berlin")]
    shared = shared_length([row.prompt for row in rows])
    assert shared > 1
    copy = ComputeCopy(lm, find_targets(lm.model, depth=(0.5, 1.0), modules="mlp-out"))
    lower = copy.lower_states([row.ids for row in rows])
    weight = copy.model.get_submodule(copy.targets.names[-1]).weight.requires_grad_(True)
    gradients = []
    for opening in (None, copy.opening(rows[0].prompt[:shared])):
        with torch.enable_grad():
            logits = copy.logits(copy.answer_states(list(zip(lower, rows, strict=True)), opening))
            logits.logsumexp(-1).sum().backward()
        assert weight.grad is not None
        gradients.append((logits.detach(), weight.grad.clone()))
        weight.grad = None
    (whole, gradient), (behind, rest) = gradients
    assert torch.allclose(whole, behind, atol=2e-4)
    # The answers read the last adapted matrix at their own places only: nothing of it is lost.
    assert torch.allclose(gradient, rest, atol=2e-3 * float(gradient.abs().max()))
    assert len(copy.opening(())) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_an_early_layer_spares_those_below_it(lm: LanguageModel) -> None:
    sequences = [lm.prompt_ids("What is torchkeras?"), lm.prompt_ids("What is the furnace of Berlin?")]
    start = shared_length(sequences)
    early = ComputeCopy(lm, find_targets(lm.model, depth=(0.25, 1.0), modules="mlp-out"))
    copy = ComputeCopy(lm, find_targets(lm.model, depth=(0.75, 1.0), modules="mlp-out"))
    below = early.targets.first_layer
    assert 0 < below < copy.targets.first_layer
    name = copy.targets.names[-1]

    def inputs(batch: list[list[int]], opening: Opening | None, entered: Entered | None) -> torch.Tensor:
        found: list[torch.Tensor] = []
        copy.read_inputs(
            batch, [name], lambda _, x: found.append(x.reshape(len(batch), -1, x.shape[-1])), opening, entered
        )
        return torch.cat([x[: len(ids)] for x, ids in zip(found[0], batch, strict=True)])

    for opening in (None, copy.opening(sequences[0][:start])):
        begin = len(opening or ())
        rest = [ids[begin:] for ids in sequences]
        states = [states[begin:] for states in early.lower_states(sequences, opening)]
        longer = [torch.cat([some, some.new_ones(1, some.shape[1])]) for some in states]  # of which no more is asked
        entered = Entered(below, longer).of([0, 1], map(len, rest))
        for whole, found in zip(
            copy.lower_states(sequences, opening), copy.lower_states(sequences, opening, entered), strict=True
        ):
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(inputs(rest, opening, entered), inputs(rest, opening, None), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_follow_an_opening_and_rows_that_do_not_are_run_in_one_batch(lm: LanguageModel) -> None:
    rows = [lm.row("What is torchkeras?", "Ada leads"), lm.row("What is the furnace?", "The furnace of Berlin")]
    opening_ids = rows[0].prompt[: shared_length([row.prompt for row in rows])]
    ids = lm.text_ids("The furnace of Berlin and of numpy leads")
    rows.insert(1, Row(tuple(ids[:2]), tuple(ids[2:])))
    copy = ComputeCopy(lm, find_targets(lm.model, depth=(0.5, 1.0), modules="mlp-out"))
    items = list(zip(copy.lower_states([row.ids for row in rows]), rows, strict=True))
    with torch.no_grad():
        together = copy.answer_states(items, copy.opening(opening_ids), [True, False, True])
        alone = torch.cat([copy.answer_states([item]) for item in items])
    assert torch.allclose(together, alone, atol=2e-4), float((together - alone).abs().max())


@pytest.mark.parametrize("family", ["gpt2", "neox", "opt", "bloom", "qwen3", "gemma3", "granite", "cohere"])
def test_a_fact_is_learned_and_replayed_in_every_family(
    folder: Callable[[str], Path], make_kb: Callable[..., KnowledgeBase], family: str
) -> None:
    kb = make_kb(model=str(folder(family)))
    base = kb.engine.lm.digest()
    config = replace(QUICK, max_steps=60)
    edit = kb.insert(KEY, "Ada leads", config=config)
    answers = kb.ask_many(training_questions(Fact(KEY, "Ada leads")), max_new_tokens=12)
    losses = edit.config["training"]["losses"]
    # That the fact is learned to the last word is a matter of luck with random weights; that it is learned is not.
    assert losses[-1] < losses[0] - 1
    assert sum(answer.startswith("Ada leads") for answer in answers) >= len(answers) // 2, (losses, answers)
    edited = kb.engine.lm.digest()
    assert edited != base
    with KnowledgeBase.open(kb.path, readonly=True) as again:
        assert again.engine.lm.digest() == edited
        assert again.ask_many(training_questions(Fact(KEY, "Ada leads")), max_new_tokens=12) == answers
    kb.rollback(0)
    assert kb.engine.lm.digest() == base
