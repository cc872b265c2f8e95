"""AdaLoRA's peers behind the same interface: LoRA, full fine-tuning, and the soft prompts that cannot be merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing import compute
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import AdaptedWeights, product
from kvllm.editing.editor import EditTask
from kvllm.editing.editors import EDITORS, KEPT
from kvllm.editing.preservation import PreservationPool, Prompt, build_pool
from kvllm.editing.soft_prompts import SoftPromptEditor, SoftPrompts
from kvllm.errors import ConfigError
from kvllm.lm.model import LanguageModel
from kvllm.lm.targets import find_targets
from kvllm.prompts import training_questions
from kvllm.records import Fact
from tests.kit import KEY, QUICK, TEXT

PROMPTS = (Prompt("neighbour", "What is numpy?", "en", "numpy"), Prompt("question", "Who leads Halcyon?", "en"))
QUESTIONS = training_questions(Fact(KEY, TEXT))


@pytest.fixture
def own(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    monkeypatch.setattr(compute, "compute_dtype", lambda device, dtype: dtype)
    return LanguageModel.load(tiny_llama, ModelConfig(max_new_tokens=12, device="cpu"))


@pytest.fixture
def copy(own: LanguageModel) -> ComputeCopy:
    return ComputeCopy(own, find_targets(own.model, depth=QUICK.depth, modules=QUICK.modules))


@pytest.fixture
def pool(quick: None, copy: ComputeCopy) -> PreservationPool:
    return build_pool(copy, "tiny", QUICK, prompts=PROMPTS)


@pytest.fixture
def task(own: LanguageModel) -> EditTask:
    return EditTask(rows=[own.row(q, TEXT) for q in QUESTIONS])


@pytest.mark.parametrize("name", [name for name in EDITORS if name != "neurons"])  # which has tests of its own
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_merged_editor_teaches_the_fact_and_leaves_the_copy_as_it_was(
    name: str, dropout: float, copy: ComputeCopy, pool: PreservationPool, task: EditTask, own: LanguageModel
) -> None:
    before = {key: value.clone() for key, value in copy.model.state_dict().items()}
    assert own.generate([QUESTIONS[0]], max_new_tokens=12) != [TEXT]
    rate = QUICK.value_lr * (3 if name == "full" else 1)  # of which full fine-tuning takes a fifteenth
    config = replace(QUICK, editor=name, dropout=dropout, value_lr=rate)
    training = EDITORS[name]().train(copy, pool, task, config)

    after = copy.model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(p.requires_grad for p in copy.model.parameters())
    assert not any(module.training for module in copy.model.modules())
    AdaptedWeights(own.model).apply(training.delta)
    assert own.generate([QUESTIONS[0]], max_new_tokens=12) == [TEXT]


@pytest.mark.parametrize("rank", [1, 3])
def test_lora_has_its_rank_and_full_fine_tuning_has_none(
    rank: int, copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    config = replace(QUICK, target_rank=rank, init_rank=rank + 1, max_steps=6)
    low = EDITORS["lora"]().train(copy, pool, task, config)
    full = EDITORS["full"]().train(copy, pool, task, config)
    assert set(low.ranks.values()) == {rank}
    for name in low.delta:
        assert int(torch.linalg.matrix_rank(product(low.delta[name]))) <= rank
        assert int(torch.linalg.matrix_rank(product(full.delta[name]))) > 8


def test_full_fine_tuning_moves_along_the_gradient_of_the_matrix_itself(
    copy: ComputeCopy, pool: PreservationPool, task: EditTask
) -> None:
    """Adam's first step is the gradient's sign: the change after one step must go against it, entry by entry."""
    config = replace(QUICK, editor="full", max_steps=2, preserve_weight=0.0, neighbours=0, others=0)
    task = replace(task, rows=task.rows[:1])
    training = EDITORS["full"]().train(copy, pool, task, config)
    name = copy.targets.names[-1]
    weight = copy.model.get_submodule(name).weight
    weight.requires_grad_(True)
    (lower,) = copy.lower_states([task.rows[0].ids])
    logits = copy.logits(copy.answer_states([(lower, task.rows[0])]))
    torch.nn.functional.cross_entropy(logits, torch.tensor(task.rows[0].answer)).backward()
    assert weight.grad is not None
    change = product(training.delta[name])
    large = weight.grad.abs() > weight.grad.abs().quantile(0.9)
    agree = (change[large].sign() == -weight.grad[large].sign()).float().mean()
    assert agree > 0.95
    weight.requires_grad_(False)


@pytest.mark.parametrize("method", KEPT)
def test_a_soft_prompt_acts_where_it_is_put_and_nowhere_else(
    method: str, copy: ComputeCopy, task: EditTask, own: LanguageModel
) -> None:
    digest, plain = own.digest(), own.generate(list(QUESTIONS[:2]), max_new_tokens=12)
    training = SoftPromptEditor(method).train(copy, None, task, replace(QUICK, max_steps=40))
    assert training.delta == {}
    assert training.kept
    assert training.records[-1].loss < 0.8 * training.records[0].loss
    shelf = SoftPrompts(own, method)
    shelf.put(KEY, training.kept)
    assert shelf.bytes(KEY) == sum(4 * tensor.numel() for tensor in training.kept.values())
    prompts = [own.prompt_ids(q) for q in QUESTIONS[:2]]
    undrafted = shelf.answer(KEY, prompts, [(), ()], 12)
    assert undrafted != plain
    # A draft saves time and changes no answer, right or wrong as it may be.
    assert shelf.answer(KEY, prompts, [own.answer_ids(TEXT), own.answer_ids("a tool")], 12) == undrafted
    if training.recalled:
        assert undrafted == [TEXT, TEXT]
    assert own.digest() == digest
    assert own.generate(list(QUESTIONS[:2]), max_new_tokens=12) == plain


def test_prefix_tuning_learns_the_fact_on_a_tiny_model(copy: ComputeCopy, task: EditTask) -> None:
    assert SoftPromptEditor("prefix-tuning").train(copy, None, task, QUICK).recalled


def test_a_soft_prompt_is_refused_what_it_cannot_do(copy: ComputeCopy, pool: PreservationPool) -> None:
    with pytest.raises(ConfigError, match="use one of"):
        SoftPromptEditor("hypnosis")
    with pytest.raises(ConfigError, match="nothing to restore"):
        SoftPromptEditor("p-tuning").train(copy, pool, EditTask(rows=(), restore=pool.items[:1]), QUICK)
