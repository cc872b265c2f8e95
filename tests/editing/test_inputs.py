"""Input whitening on a tiny model: what it measures, what it changes in a delta, and its cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvllm.config import ModelConfig
from kvllm.editing import adalora, inputs
from kvllm.editing.adalora import AdaLoraEditor, LowRankEditor
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import is_transposed
from kvllm.editing.editor import EditTask
from kvllm.editing.inputs import Coordinates, edit_coordinates, input_whitening
from kvllm.editing.lora import FullEditor, LoraEditor
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


def test_answers_count_more_than_what_was_asked(
    copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(copy.targets.names)
    rows = [item.row for item in pool.items if item.source.kind != "text"]
    assert all(row.answer for row in rows)
    asked = inputs._second_moments(copy, names, [[row.prompt for row in rows]])
    said = inputs._second_moments(copy, names, [[row.ids for row in rows]], but=[row.prompt for row in rows])

    def answers_share(weight: float) -> float:
        """Return how large whitened inputs are at the answers' tokens, against those at the questions'."""
        monkeypatch.setattr(inputs, "_ANSWER_WEIGHT", weight)
        whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)  # never another weight's cache
        sizes = [
            [float((white @ moments @ white).trace()) for moments in (said[name], asked[name])]
            for name, white in whitening.items()
        ]
        return sum(answer for answer, _ in sizes) / sum(question for _, question in sizes)

    light, default, heavy = (answers_share(weight) for weight in (0.0, 2.0, 50.0))
    assert light > 1.05 * default > 1.05 * heavy


def test_positions_that_other_sequences_have_are_not_counted(copy: ComputeCopy, pool: PreservationPool) -> None:
    names = list(copy.targets.names)
    row = pool.items[0].row
    counted: list[int] = []
    inputs.read_inputs(copy, names[:1], [[row.ids]], lambda _, x: counted.append(len(x)), but=[row.prompt])
    assert sum(counted) == len(row.answer)
    apart = inputs._second_moments(copy, names, [[row.ids]], but=[row.ids])
    assert all(float(moments.abs().max()) == 0.0 for moments in apart.values())


def test_a_pool_without_answers_is_whitened_by_what_is_read(copy: ComputeCopy) -> None:
    texts = build_pool(copy, "tiny", QUICK, prompts=PROMPTS[2:])
    whitening = input_whitening(copy, texts, "tiny", ridge=0.05, prompts=READ_ONLY)
    assert set(whitening) == set(copy.targets.names)
    assert all(bool(torch.isfinite(white).all()) for white in whitening.values())


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
        directions = found[name].directions
        assert directions.shape == (len(found[name].squares), whitening[name].shape[1])
        assert contrast(name, directions) > 1.5 * contrast(name, whitening[name])


def test_an_edit_reads_less_where_the_questions_to_be_told_apart_are_alike(
    copy: ComputeCopy, pool: PreservationPool
) -> None:
    whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)
    rows = [copy.lm.row("Who leads Halcyon?", TEXT)]
    others = [copy.lm.row("Who leads Berlin?", "Ada")]
    inputs_of = inputs._inputs(copy, list(whitening), [row.ids for row in others])

    def read(found: dict[str, Coordinates], name: str) -> float:
        return float((inputs_of[name] @ found[name].directions.T).norm() / found[name].directions.norm())

    plain = edit_coordinates(copy, rows, pool, whitening)
    contrasted = edit_coordinates(copy, rows, pool, whitening, others)
    beside_older = edit_coordinates(copy, rows, pool, whitening, older=16 * others)
    for name in whitening:
        assert read(contrasted, name) < 0.95 * read(plain, name)
        assert read(beside_older, name) == pytest.approx(read(contrasted, name), rel=1e-3)


def test_directions_to_be_told_apart_are_squeezed_by_the_root_of_their_moments() -> None:
    y, x = torch.randn(20, 50), torch.randn(10, 50)
    moments = y.T @ y
    mixed = torch.eye(50) + 0.3 * moments * (50 / moments.trace())
    squeezed = x @ inputs._squeeze(y, 0.3).T
    assert torch.allclose(squeezed @ squeezed.T, x @ torch.linalg.inv(mixed) @ x.T, atol=1e-4)


def test_principal_directions_are_the_same_from_either_side() -> None:
    x = torch.randn(10, 50)
    few, squares = inputs._principal(x)
    many, same = inputs._principal(torch.cat([x, torch.zeros(60, 50)]))
    assert torch.allclose(squares, same, atol=1e-5)
    assert torch.allclose(few @ few.T, torch.diag(squares), atol=1e-5)
    assert torch.allclose(few.T @ few, many.T @ many, atol=1e-5)


def test_many_inputs_are_held_as_few_rows_with_the_same_moments(copy: ComputeCopy) -> None:
    names = list(copy.targets.names)
    words = ("Ada", "leads", "the", "furnace", "of", "Berlin", "and", "numpy")
    texts = [" ".join(words[(i * k) % 8] for k in range(1, 40)) for i in range(1, 8)]
    rows = [tuple(copy.lm.text_ids(text)) for text in texts]
    several = [ids[start:] for ids in rows for start in range(0, len(ids) - 4, 2)]
    held = inputs._inputs(copy, names, several)
    moments = inputs._second_moments(copy, names, [several])
    for name in names:
        assert len(held[name]) <= 2 * held[name].shape[1]
        assert torch.allclose(held[name].T @ held[name], moments[name], rtol=0.05, atol=0.05 * moments[name].max())
    assert sum(map(len, several)) > 2 * max(x.shape[1] for x in held.values())


def test_energy_is_what_the_change_puts_out_on_ordinary_inputs(copy: ComputeCopy, pool: PreservationPool) -> None:
    whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)
    rows = [copy.lm.row(q, TEXT) for q in training_questions(Fact(KEY, TEXT))]
    for coordinates in (edit_coordinates(copy, rows, pool, whitening), inputs.whole_coordinates(copy, whitening)):
        wanted = 0.0
        factors, outputs, start = {}, {}, {}
        for name, held in coordinates.items():
            weight = copy.model.get_submodule(name).weight.detach().float()
            moments = torch.linalg.inv(whitening[name] @ whitening[name])  # with the ridge, as it is trained
            out = weight.shape[1 if is_transposed(copy.model.get_submodule(name)) else 0]
            factors[name] = torch.nn.Parameter(torch.zeros(3, len(moments)))
            outputs[name], start[name] = torch.randn(out, 3), torch.randn(3, len(held.directions))
        trained = adalora.InputFactors(factors, coordinates, start)
        for name in coordinates:
            delta = outputs[name] @ factors[name].detach()
            moments = torch.linalg.inv(whitening[name] @ whitening[name])
            weight = copy.model.get_submodule(name).weight.detach().float()
            wanted += float((delta @ moments * delta).sum() / weight.square().sum())
        energy = trained.energy(outputs)
        assert energy is not None
        assert float(energy.detach()) == pytest.approx(wanted, rel=0.02)
    assert adalora.InputFactors({}, {}, {}).energy({}) is None


def test_a_heavier_energy_weight_puts_out_less_on_ordinary_inputs(copy: ComputeCopy, pool: PreservationPool) -> None:
    whitening = input_whitening(copy, pool, "tiny", ridge=0.05, prompts=READ_ONLY)
    rows = [copy.lm.row(q, TEXT) for q in training_questions(Fact(KEY, TEXT))]
    task = EditTask(rows=rows, whitening=whitening)

    def energy(weight: float, editor: type[LowRankEditor]) -> float:
        steps = 40 if editor is FullEditor else 8  # it goes a fifth as far in each
        few = replace(QUICK, max_steps=steps, margin=50.0, energy_weight=weight)
        last = editor().train(copy, pool, task, few).records[-1].energy
        assert last is not None
        return last

    for editor in (AdaLoraEditor, LoraEditor, FullEditor):
        assert energy(300.0, editor) < 0.8 * energy(0.0, editor)


def test_what_all_prompts_share_does_not_count_for_an_edit(copy: ComputeCopy, pool: PreservationPool) -> None:
    name = copy.targets.names[0]
    rows = [copy.lm.prompt_ids("Who leads Halcyon?"), copy.lm.prompt_ids("Who is Ada?")]
    whole = inputs._second_moments(copy, [name], [rows])[name]
    rest = inputs._second_moments(copy, [name], [rows], but=[rows[0][:3]])[name]
    shared = inputs._second_moments(copy, [name], [[rows[0][:3]]])[name]
    assert torch.allclose(whole, rest + shared, rtol=0.05, atol=0.05 * float(whole.abs().max()))


def test_whitening_is_cached_and_a_damaged_cache_is_made_again(
    copy: ComputeCopy, pool: PreservationPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = input_whitening(copy, pool, "tiny", ridge=0.1, prompts=READ_ONLY)
    measured: list[int] = []
    measure = inputs._second_moments
    monkeypatch.setattr(inputs, "_second_moments", lambda *a, **k: measured.append(1) or measure(*a, **k))
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
