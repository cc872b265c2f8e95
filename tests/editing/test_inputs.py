"""Input whitening on a tiny model: what it measures, what it changes in a delta, and its cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing import inputs
from kvllm.editing.adalora import AdaLoraEditor
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.editor import EditTask
from kvllm.editing.inputs import edit_coordinates, input_whitening
from kvllm.editing.preservation import PreservationPool, Prompt, build_pool
from kvllm.lm.model import LanguageModel
from kvllm.lm.targets import find_targets
from kvllm.prompts import training_questions
from kvllm.records import Fact
from tests.kit import KEY, QUICK, TEXT
from tests.tiny import tiny_model

PROMPTS = (
    Prompt("neighbour", "What is numpy?", "en", "numpy"),
    Prompt("neighbour", "什么是长城？", "zh", "长城"),
    Prompt("text", "Torchkeras is a tool that makes training PyTorch models simple, and Ada leads it.", "en"),
)
READ_ONLY = (
    Prompt("question", "Who leads Halcyon?", "en"),
    Prompt("neighbour", "Tell me about Berlin.", "en", "Berlin"),
)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose matrices are transposed."""
    return tiny_model(tmp_path_factory.mktemp("inputs") / "gpt2", family="gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def copy(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    tiny_gpt2: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ComputeCopy:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "cache"))
    lm = LanguageModel.load({"llama": tiny_llama, "gpt2": tiny_gpt2}[request.param], ModelConfig(device="cpu"))
    return ComputeCopy(lm, find_targets(lm.model, depth=QUICK.depth, modules=QUICK.modules))


@pytest.fixture
def pool(copy: ComputeCopy) -> PreservationPool:
    return build_pool(copy, "tiny", QUICK, prompts=PROMPTS)


def sequences(copy: ComputeCopy, pool: PreservationPool) -> list[list[int]]:
    return [list(item.row.ids) for item in pool.items] + [copy.lm.prompt_ids(p.prompt) for p in READ_ONLY]


def test_moments_count_every_distinct_past_once(copy: ComputeCopy, pool: PreservationPool) -> None:
    names = list(copy.targets.names)
    rows = sequences(copy, pool)
    once = inputs._second_moments(copy, names, [rows])
    twice = inputs._second_moments(copy, names, [[*rows, *rows]])
    alone = inputs._second_moments(copy, names, [rows[:1]])
    apart = inputs._second_moments(copy, names, [[row] for row in rows])  # nothing is shared within a group
    for name in names:
        assert torch.allclose(once[name], apart[name], rtol=0.05, atol=0.05 * float(once[name].abs().max()))
        assert torch.allclose(once[name], twice[name], rtol=0.05, atol=0.05 * float(once[name].abs().max()))
        assert float(alone[name].trace()) < float(once[name].trace())
        assert torch.allclose(once[name], once[name].T)


def test_whitened_inputs_have_like_size_in_every_direction(copy: ComputeCopy, pool: PreservationPool) -> None:
    name = copy.targets.names[0]
    moments = inputs._second_moments(copy, [name], [sequences(copy, pool)])[name]
    found = inputs._whitening(moments, 1e-3)
    before = torch.linalg.eigvalsh(moments / torch.linalg.eigvalsh(moments).mean())
    after = torch.linalg.eigvalsh(found @ (moments / torch.linalg.eigvalsh(moments).mean()) @ found)
    assert float(before.max()) > 5
    assert float(after.max()) <= 1.01  # e / (e + ridge) of each eigenvalue e
    assert float(after[before > 0.1].min()) >= 0.9


def test_a_whitened_edit_reads_less_of_what_usually_enters(copy: ComputeCopy, pool: PreservationPool) -> None:
    whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)
    assert set(whitening) == set(copy.targets.names)
    moments = inputs._second_moments(copy, list(copy.targets.names), [sequences(copy, pool)])
    task = EditTask(rows=[copy.lm.row(q, TEXT) for q in training_questions(Fact(KEY, TEXT))])
    few = replace(QUICK, max_steps=6)

    def share_read(task: EditTask) -> float:
        delta = AdaLoraEditor().train(copy, pool, task, few).delta
        shares = []
        for name, (a, _) in delta.items():
            rows = torch.nn.functional.normalize(a, dim=1)
            shares.append(float(((rows @ moments[name]) * rows).sum(1).mean() / moments[name].trace()))
        return sum(shares) / len(shares)

    assert share_read(replace(task, whitening=whitening)) < 0.8 * share_read(task)


def test_an_edit_reads_where_its_own_inputs_stand_out(copy: ComputeCopy, pool: PreservationPool) -> None:
    whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)
    rows = [copy.lm.row(q, TEXT) for q in training_questions(Fact(KEY, TEXT))]
    names = list(copy.targets.names)
    ordinary = inputs._second_moments(copy, names, [sequences(copy, pool)])
    own = inputs._second_moments(copy, names, [[row.ids for row in rows]])

    def contrast(name: str, directions: torch.Tensor) -> float:
        """Return how much more of the edit's inputs than of ordinary ones is read."""
        read, usual = ((directions @ moments[name] * directions).sum() for moments in (own, ordinary))
        return float(read / usual)

    found = edit_coordinates(copy, rows, pool, whitening)
    for name in names:
        assert found[name].shape[1] == whitening[name].shape[1]
        assert contrast(name, found[name]) > 1.5 * contrast(name, whitening[name])


def test_what_all_prompts_share_does_not_count_for_an_edit(copy: ComputeCopy, pool: PreservationPool) -> None:
    name = copy.targets.names[0]
    rows = [copy.lm.prompt_ids("Who leads Halcyon?"), copy.lm.prompt_ids("Who is Ada?")]
    whole = inputs._second_moments(copy, [name], [rows])[name]
    rest = inputs._second_moments(copy, [name], [rows], skip=3)[name]
    shared = inputs._second_moments(copy, [name], [[rows[0][:3]]])[name]
    assert torch.allclose(whole, rest + shared, rtol=0.05, atol=0.05 * float(whole.abs().max()))


def test_whitening_is_cached_and_a_damaged_cache_is_made_again(
    copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = input_whitening(copy, pool, "tiny", ridge=0.1, prompts=READ_ONLY)
    measured: list[int] = []
    measure = inputs._second_moments
    monkeypatch.setattr(inputs, "_second_moments", lambda *a: measured.append(1) or measure(*a))
    again = input_whitening(copy, pool, "tiny", ridge=0.1, prompts=READ_ONLY)
    assert not measured
    assert all(torch.equal(first[name], again[name]) for name in first)
    for path in inputs.cache_folder().glob("preservation/whitening-*"):
        path.write_bytes(path.read_bytes()[:-7])
    repaired = input_whitening(copy, pool, "tiny", ridge=0.1, prompts=READ_ONLY)
    assert measured
    assert all(torch.equal(first[name], repaired[name]) for name in first)


def test_no_ridge_or_very_wide_inputs_mean_plain_coordinates(
    copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert input_whitening(copy, pool, "tiny", ridge=0.0) == {}
    monkeypatch.setattr(inputs, "MAX_WIDTH", 8)
    assert input_whitening(copy, pool, "tiny", ridge=0.1) == {}
