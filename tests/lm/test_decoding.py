"""How a batch is put together and taken apart while it is decoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvllm.config import ModelConfig
from kvllm.lm.cache import RoomyLayer, joined, kept
from kvllm.lm.decoding import _PASS, of_like_length
from kvllm.lm.model import LanguageModel


@pytest.fixture
def lm(tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(tiny_llama, ModelConfig(device="cpu"))


def cost(parts: Sequence[slice], lengths: Sequence[int]) -> int:
    return sum(_PASS + len(lengths[part]) * lengths[part][-1] for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_partition_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = sorted(rng.choice((3, 20, 90)) + rng.randrange(10) for _ in range(rng.randrange(1, 9)))
    found = of_like_length(lengths)
    assert [place for part in found for place in range(part.start, part.stop)] == list(range(len(lengths)))
    for n in range(len(lengths)):
        for cuts in combinations(range(1, len(lengths)), n):
            ends = [*cuts, len(lengths)]
            other = [slice(start, end) for start, end in zip([0, *cuts], ends, strict=True)]
            assert cost(found, lengths) <= cost(other, lengths)


def test_equal_lengths_are_read_together_and_nothing_is_nothing() -> None:
    assert of_like_length([14] * 60) == [slice(0, 60)]
    assert of_like_length([5] * 30 + [200] * 30) == [slice(0, 30), slice(30, 60)]
    assert of_like_length([]) == []


def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 4)


def test_a_roomy_layer_holds_what_a_dynamic_one_holds() -> None:
    torch.manual_seed(0)
    plain, roomy = DynamicLayer(), RoomyLayer()
    for columns in (5, 1, 1, 40, *[1] * 70):
        new = states(3, columns)
        for a, b in zip(plain.update(*new), roomy.update(*new), strict=True):
            assert torch.equal(a, b)
    assert roomy.get_seq_length() == plain.get_seq_length() == 117


def test_rows_of_two_caches_are_joined_and_some_are_kept_while_the_originals_stay() -> None:
    torch.manual_seed(0)
    caches, written = [], [states(2, 3), states(1, 6)]
    for keys, values in written:
        cache = DynamicCache()
        cache.update(keys, values, 0)
        caches.append(cache)
    both = joined(caches)
    (layer,) = both.layers
    assert torch.equal(layer.keys[2], written[1][0][0])
    assert torch.equal(layer.values[:2, :, 3:], written[0][1])
    assert not layer.keys[:2, :, :3].any()

    few = kept(both, torch.tensor([1, 0]), first=3)
    few.update(*states(2, 1), 0)
    assert torch.equal(few.layers[0].keys[:, :, :3], written[0][0].flip(0))
    assert both.get_seq_length() == 6
    assert few.get_seq_length() == 4
    assert torch.equal(caches[0].layers[0].keys, written[0][0])


def test_waiting_prompts_take_the_places_of_those_that_have_ended(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [lm.prompt_ids(f"{word} leads Halcyon?") for word in ("Who", "Ada", "What", "Berlin", "numpy", "torch")]
    rooms = [30, 4, 4, 4, 4, 4]
    expected = [lm.generate_bounded([p], [room])[0] for p, room in zip(prompts, rooms, strict=True)]
    assert [len(answer) for answer in expected] == rooms  # none of them stops early
    widths: list[tuple[int, ...]] = []
    told: list[tuple[int, int]] = []
    passes = lm.last_states

    def counted(ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        widths.append(tuple(ids.shape))
        return passes(ids, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lm, "last_states", counted)
    found = lm.generate_bounded(prompts, rooms, batch_size=2, on_batch=lambda *t: told.append(t))
    assert found == expected
    # Were the long answer's batch not refilled, the four others would take steps of their own.
    assert sum(width == 1 for _, width in widths) == max(rooms) - 1
    assert max(rows for rows, _ in widths) == 2
    assert told == sorted(told)
    assert told[-1] == (6, 6)


def test_a_draft_right_in_part_saves_its_steps(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = lm.prompt_ids("Who leads Halcyon?")
    (answer,) = lm.generate_bounded([prompt], [12])
    steps: list[int] = []
    passes = lm.last_states

    def counted(ids: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        steps.append(int(ids.shape[1] == 1))
        return passes(ids, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lm, "last_states", counted)
    other = next(token for token in (5, 6) if token != answer[8])
    assert lm.generate_bounded([prompt], [12], drafts=[(*answer[:8], other, 7)]) == [answer]
    assert sum(steps) == len(answer) - 9  # the first of the prompt's pass, eight of the draft's
