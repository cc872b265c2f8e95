"""Which matrices are adapted comes from a model's own structure: the same words mean the same in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kvllm.errors import ConfigError, ModelError
from kvllm.lm.targets import decoder_layers, find_targets
from tests.tiny import LAYERS, tiny_config

# family: (module list, matrices that write the residual stream from the MLP, from attention; matrices per layer)
EXPECTED = {
    "llama": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "mistral": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "qwen2": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "qwen3": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "gemma2": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "gemma3": ("model.layers", "mlp.down_proj", "self_attn.o_proj", 7),
    "gpt2": ("transformer.h", "mlp.c_proj", "attn.c_proj", 4),
    "neox": ("gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense", 4),
    "opt": ("model.decoder.layers", "fc2", "self_attn.out_proj", 6),
    "bloom": ("transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", 4),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return {family: AutoModelForCausalLM.from_config(tiny_config(family, 400)) for family in EXPECTED}


@pytest.mark.parametrize("family", EXPECTED)
def test_every_kind_finds_its_matrices_in_every_family(models: dict[str, Any], family: str) -> None:
    layers, mlp_out, attention_out, per_layer = EXPECTED[family]
    model = models[family]
    everywhere = (0.0, 1.0)

    def names(kind: str) -> list[str]:
        return list(find_targets(model, depth=everywhere, modules=kind).names)

    def per(ending: str) -> list[str]:
        return [f"{layers}.{i}.{ending}" for i in range(LAYERS)]

    assert decoder_layers(model)[0] == layers
    assert names("mlp-out") == per(mlp_out)
    assert names("attention-out") == per(attention_out)
    assert sorted(names("residual-out")) == sorted(per(mlp_out) + per(attention_out))
    assert len(names("all")) == per_layer * LAYERS
    assert sorted(names("mlp") + names("attention")) == sorted(names("all"))
    assert set(names("mlp-out")) < set(names("mlp"))
    assert set(names("attention-out")) < set(names("attention"))
    for name in names("all"):
        assert model.get_submodule(name).weight.ndim == 2


@pytest.mark.parametrize(
    ("depth", "layers"),
    [((0.0, 1.0), (0, 1, 2, 3)), ((0.5, 1.0), (2, 3)), ((0.6, 0.9), (2, 3)), ((0.0, 0.01), (0,)), ((0.99, 1.0), (3,))],
)
def test_a_band_of_depth_takes_at_least_one_layer(
    models: dict[str, Any], depth: tuple[float, float], layers: tuple[int, ...]
) -> None:
    targets = find_targets(models["llama"], depth=depth, modules="mlp-out")
    assert tuple(int(name.split(".")[2]) for name in targets.names) == layers
    assert (targets.first_layer, targets.n_layers, targets.layer_list) == (layers[0], LAYERS, "model.layers")


def test_endings_of_names_choose_too(models: dict[str, Any]) -> None:
    names = find_targets(models["llama"], depth=(0.75, 1.0), modules="q_proj, v_proj").names
    assert names == ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.v_proj")


def test_what_matches_nothing_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="'c_attn'"):
        find_targets(models["llama"], depth=(0, 1), modules="c_attn")
    with pytest.raises(ModelError, match="no list of decoder layers"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), depth=(0, 1), modules="all")
