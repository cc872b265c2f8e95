"""Spare neurons: the wider model says the same, its name resolves to a cached folder, and what cannot have any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvllm.errors import ModelError
from kvllm.lm import sources
from kvllm.lm.widening import widen
from tests.tiny import tiny_model

SPARE = 32
IDS = torch.tensor([[1, 7, 30, 5, 9, 120]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_a_wider_model_says_the_same(tmp_path: Path, family: str) -> None:
    folder = tiny_model(tmp_path / family, family=family)
    files = sources.resolve(f"{folder}+{SPARE}")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    wide = AutoModelForCausalLM.from_pretrained(files.path)
    size = plain.config.intermediate_size
    assert wide.config.intermediate_size == size + SPARE
    for layer in wide.model.layers:
        assert layer.mlp.gate_proj.weight.shape[0] == size + SPARE
        for zeros in (
            layer.mlp.gate_proj.weight[size:],
            layer.mlp.up_proj.weight[size:],
            layer.mlp.down_proj.weight[:, size:],
        ):
            assert zeros.shape[0] == SPARE or zeros.shape[1] == SPARE
            assert not zeros.any()
    with torch.no_grad():
        torch.testing.assert_close(wide(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_name_of_a_wider_model_is_kept_and_its_folder_made_once(tmp_path: Path, cache: Path) -> None:
    folder = tiny_model(tmp_path / "llama")
    name = f"{folder}+{SPARE}"
    files, plain = sources.resolve(name), sources.resolve(str(folder))
    assert files.name == name
    assert files.path.parent == cache / "models"
    assert files.source == f"spare{SPARE}:{plain.source}"
    assert files.digest != plain.digest
    assert {n for n in files.files if files.files[n] != plain.files[n]} == {"config.json", "model.safetensors"}
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, files.path))
    assert after == {**before, "intermediate_size": before["intermediate_size"] + SPARE}
    written = (files.path / "model.safetensors").stat().st_mtime_ns
    assert sources.resolve(name, offline=True, verify=True) == files
    assert (files.path / "model.safetensors").stat().st_mtime_ns == written


def test_a_folder_whose_name_ends_so_is_that_folder(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / f"llama+{SPARE}")
    assert sources.resolve(str(folder)).path == folder
    assert sources.without_spare(str(folder)) == (str(folder), "")
    assert sources.without_spare("some/model+0064") == ("some/model", "+64")


@pytest.mark.parametrize(("family", "said"), [("gpt2", "not gated"), ("opt", "not gated")])
def test_models_without_gates_are_refused(tmp_path: Path, cache: Path, family: str, said: str) -> None:
    folder = tiny_model(tmp_path / family, family=family, chat=False)
    with pytest.raises(ModelError, match=said):
        sources.resolve(f"{folder}+{SPARE}")
    assert not [entry for entry in (cache / "models").iterdir() if "spare" in entry.name and entry.is_dir()]


def test_impossible_numbers_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "llama")
    for n in (0, 900_000):
        with pytest.raises(ModelError, match="from 1 to"):
            sources.resolve(f"{folder}+{n}")
    with pytest.raises(ModelError, match="No model 'nobody'"):
        sources.resolve(f"nobody+{SPARE}")


def test_a_model_whose_size_is_not_what_its_configuration_says_is_left_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "llama"))
    model.config.intermediate_size += 1
    with pytest.raises(ModelError, match="differ in size"):
        widen(model, SPARE)
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {model.config.intermediate_size - 1}
