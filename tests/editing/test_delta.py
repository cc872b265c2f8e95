"""The algebra of low-rank deltas: worked by hand, exact where the mathematics is exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvllm.config import ModelConfig
from kvllm.editing.delta import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdaptedWeights,
    check_finite,
    concatenate,
    fold_singular_values,
    from_files,
    norm,
    product,
    to_files,
)
from kvllm.errors import Corrupt, EditFailed, Untrusted
from kvllm.lm.model import LanguageModel

DOWN = "model.layers.3.mlp.down_proj"
UP = "model.layers.3.mlp.up_proj"


def factors(out_features: int, in_features: int, rank: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, in_features, generator=generator),
        torch.randn(out_features, rank, generator=generator),
    )


@pytest.fixture
def own(tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(tiny_llama, ModelConfig(device="cpu"))


def test_the_product_of_a_worked_example() -> None:
    a = torch.tensor([[1.0, 2.0], [0.0, 1.0]])  # (rank 2, in 2)
    b = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 5.0]])  # (out 3, rank 2)
    assert product((a, b)).tolist() == [[1.0, 2.0], [2.0, 7.0], [0.0, 5.0]]
    assert norm({"m": (a, b)}) == pytest.approx((1 + 4 + 4 + 49 + 25) ** 0.5)


def test_folding_keeps_alive_directions_only() -> None:
    a, b = torch.eye(3), torch.eye(3)
    e = torch.tensor([[2.0], [0.0], [-1.0]])
    folded = fold_singular_values(a, e, b, alpha=6.0, init_rank=3.0)
    assert folded is not None
    scale = 6.0 / (3.0 + 1e-5)
    assert folded[0].shape == (2, 3)
    assert torch.allclose(product(folded), torch.diag(torch.tensor([2.0, 0.0, -1.0])) * scale)
    assert fold_singular_values(a, torch.zeros(3, 1), b, alpha=6.0, init_rank=3.0) is None


@settings(deadline=None, max_examples=25)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_concatenating_deltas_sums_them(ranks: list[int], seed: int) -> None:
    deltas = [{"m": factors(5, 7, rank, seed + i)} for i, rank in enumerate(ranks)]
    joined = concatenate(deltas)
    assert joined["m"][0].shape[0] == sum(ranks)
    summed = sum(product(d["m"]).double() for d in deltas)
    assert torch.allclose(product(joined["m"]).double(), summed, atol=1e-5)


def test_concatenating_takes_every_module() -> None:
    joined = concatenate([{"x": factors(2, 3)}, {"y": factors(3, 2)}, {"x": factors(2, 3, seed=1)}])
    assert {name: a.shape[0] for name, (a, _) in joined.items()} == {"x": 4, "y": 2}
    assert concatenate([]) == {}


def test_files_give_back_the_same_change_and_the_same_bytes() -> None:
    delta = {"b": factors(4, 6, rank=3), "a": factors(5, 2, rank=1, seed=1)}
    files = to_files(delta, base_name="tiny")
    assert files == to_files(dict(reversed(list(delta.items()))), base_name="tiny")
    again = from_files(files)
    assert {name: a.shape[0] for name, (a, _) in again.items()} == {"a": 3, "b": 3}  # padded to one rank
    for name, pair in delta.items():
        assert torch.equal(product(again[name]), product(pair))
    config = json.loads(files[CONFIG_FILE])
    assert config["lora_alpha"] == config["r"] == 3
    assert config["peft_type"] == "LORA"


def test_a_self_scaling_or_incomplete_adapter_is_not_applied() -> None:
    files = to_files({"a": factors(5, 2)}, base_name="tiny")
    config = json.loads(files[CONFIG_FILE])
    for change in ({"lora_alpha": 64}, {"use_rslora": True}, {"use_dora": True}):
        with pytest.raises(Untrusted):
            from_files({**files, CONFIG_FILE: json.dumps(config | change).encode()})
    from safetensors.torch import load, save

    tensors = load(files[WEIGHTS_FILE])
    half = save({k: v for k, v in tensors.items() if "lora_A" in k})
    with pytest.raises(Corrupt, match="no lora_B for a"):
        from_files({**files, WEIGHTS_FILE: half})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    a, b = factors(3, 3)
    check_finite({"m": (a, b)})
    b[1, 1] = bad
    with pytest.raises(EditFailed, match="non-finite weights in m"):
        check_finite({"m": (a, b)})


def test_applied_then_replayed_from_nothing_is_the_base_bit_for_bit(own: LanguageModel) -> None:
    base = own.digest()
    weights = AdaptedWeights(own.model)
    weights.apply({DOWN: factors(64, 192)})
    assert own.digest() != base
    assert weights.touched == (DOWN,)
    weights.replay([])
    assert own.digest() == base
    assert (weights.touched, weights.known) == ((), (DOWN,))
    assert torch.equal(weights.base(DOWN), weights.master(DOWN))


def test_replay_sums_in_order_and_forgets_what_was_there(own: LanguageModel) -> None:
    one, two = {DOWN: factors(64, 192)}, {DOWN: factors(64, 192, seed=1), UP: factors(192, 64, seed=2)}
    weights = AdaptedWeights(own.model, base_digest="b")
    weights.apply(one)
    weights.apply(two)
    digest = weights.digest(), own.digest()
    weights.apply({UP: factors(192, 64, seed=3)})
    assert (weights.digest(), own.digest()) != digest
    weights.replay([one, two])
    assert (weights.digest(), own.digest()) == digest


def test_a_state_can_be_taken_and_restored_bit_for_bit(own: LanguageModel) -> None:
    weights = AdaptedWeights(own.model)
    weights.apply({DOWN: factors(64, 192)})
    state, digest = weights.state(), own.digest()
    weights.apply({DOWN: factors(64, 192, seed=1), UP: factors(192, 64)})
    weights.restore(state)
    assert own.digest() == digest
    assert weights.touched == (DOWN,)
    with pytest.raises(Corrupt, match="does not fit"):
        weights.restore({DOWN: torch.zeros(2, 2)})
    assert own.digest() == digest


def test_the_digest_depends_on_base_and_changed_matrices(own: LanguageModel) -> None:
    one, other = AdaptedWeights(own.model, base_digest="a"), AdaptedWeights(own.model, base_digest="b")
    assert one.digest() != other.digest()
    before = one.digest()
    one.apply({DOWN: factors(64, 192)})
    assert one.digest() != before


@pytest.mark.parametrize(
    ("delta", "sentence"),
    [
        ({"model.layers.9.mlp.down_proj": factors(64, 192)}, "does not have"),
        ({DOWN: factors(64, 64)}, "has shape"),
        ({DOWN: factors(64, 192), UP: factors(2, 2)}, "has shape"),
    ],
)
def test_a_delta_that_does_not_fit_changes_nothing(own: LanguageModel, delta: dict, sentence: str) -> None:
    base = own.digest()
    weights = AdaptedWeights(own.model)
    with pytest.raises(Untrusted, match=sentence):
        weights.apply(delta)
    assert own.digest() == base
    assert weights.touched == ()


def test_many_small_changes_are_not_lost_in_half_precision(tiny_llama: Path) -> None:
    """A hundred sums straight into bf16 lose most of a small change; fp32 masters beside it lose nothing."""
    half = LanguageModel.load(tiny_llama, ModelConfig(dtype="bfloat16", device="cpu"))
    weights = AdaptedWeights(half.model)
    base = half.model.get_submodule(DOWN).weight.detach().float().clone()
    a, b = factors(64, 192)
    small = {DOWN: (a * 1e-5, b)}
    for _ in range(100):
        weights.apply(small)
    wanted = base + 100 * product(small[DOWN])
    assert torch.allclose(weights.master(DOWN), wanted, atol=1e-6)
    assert torch.equal(half.model.get_submodule(DOWN).weight, weights.master(DOWN).bfloat16())
    weights.replay([])
    assert torch.equal(half.model.get_submodule(DOWN).weight.float(), base)
