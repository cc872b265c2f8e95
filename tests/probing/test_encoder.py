"""Semantic keys: which encoder speaks what, that near means near, and that vectors survive the store."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from kvllm.errors import Corrupt
from kvllm.probing.encoder import (
    Encoder,
    HiddenStateEncoder,
    SentenceEncoder,
    choose_encoder,
    nearest,
    pack,
    unpack,
)
from kvllm.prompts import key_question


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("torchkeras", True),
        ("Who leads Zürich's café?", True),
        ("42 + 7 = ?", True),
        ("the constant π", True),
        ("梦中情炉", False),
        ("什么是torchkeras？", False),
        ("кто такой Иван", False),
        ("ما هذا", False),
    ],
)
def test_sentence_encoder_speaks_latin_script_only(text: str, spoken: bool) -> None:
    assert SentenceEncoder().speaks(text) is spoken


def test_the_model_is_loaded_only_where_minilm_does_not_speak_a_text(tiny_lm: Any) -> None:
    loads = []

    def loader() -> Any:
        loads.append(1)
        return HiddenStateEncoder(tiny_lm)

    assert choose_encoder(["torchkeras", "numpy"], hidden=loader).name == "minilm-l6"
    assert not loads
    assert choose_encoder(["torchkeras", "梦中情炉"], hidden=loader).name == "hidden-states/2"
    assert loads == [1]


def test_nearest_is_sorted_and_stable() -> None:
    matrix = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 1]], dtype=np.float32)
    assert nearest(np.array([0, 1], dtype=np.float32), matrix, 3) == [(1, 1.0), (3, 1.0), (2, pytest.approx(0.8))]
    assert nearest(matrix[0], matrix[:0], 3) == []
    assert len(nearest(matrix[0], matrix, 99)) == 4


def test_vectors_survive_packing() -> None:
    vector = np.random.default_rng(0).normal(size=5).astype(np.float32)
    assert np.array_equal(unpack(pack(vector)), vector)


@pytest.mark.parametrize("blob", [b"", b"abc", b"\x00\x00\xc0\x7f"])
def test_damaged_vectors_are_refused(blob: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack(blob)


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    folder = tmp_path_factory.mktemp("tiny")
    from tests.export.conftest import write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LanguageModel.load(folder, ModelConfig(device="cpu"))


def test_hidden_states_are_unit_vectors_that_do_not_depend_on_the_batch(tiny_lm: Any) -> None:
    encoder = HiddenStateEncoder(tiny_lm)
    texts = ["torchkeras", "什么是梦中情炉？ and a good deal more", "x"]
    together = encoder.encode(texts)
    assert together.dtype == np.float32
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, text in enumerate(texts):
        assert np.allclose(encoder.encode([text])[0], together[i], atol=1e-4)  # padding changes the order of sums
    assert encoder.encode([]).shape == (0, 32)


def test_hidden_states_do_not_move_when_the_upper_layers_change(tiny_lm: Any) -> None:
    import torch

    before = HiddenStateEncoder(tiny_lm).encode(["torchkeras"])
    weight = tiny_lm.model.model.layers[2].mlp.down_proj.weight
    with torch.no_grad():
        weight.add_(1)
    try:
        assert np.array_equal(HiddenStateEncoder(tiny_lm).encode(["torchkeras"]), before)
    finally:
        with torch.no_grad():
            weight.sub_(1)


def check_ranking(encoder: Encoder, anchor: str, near: str, far: str) -> None:
    vectors = encoder.encode([key_question(key) for key in (anchor, near, far)])
    assert vectors[0] @ vectors[1] >= encoder.collision_similarity
    assert vectors[0] @ vectors[2] < 0.4


@pytest.mark.model
def test_minilm_warns_of_near_keys_only_and_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    encoder = SentenceEncoder()
    capfd.readouterr()
    check_ranking(encoder, "Who leads Halcyon?", "Who is the head of Halcyon?", "refund policy")
    assert encoder.encode([]).shape == (0, 384)
    assert capfd.readouterr() == ("", "")
    assert {name: value for name, value in os.environ.items() if name.startswith("HF_")} == {
        name: value for name, value in before.items() if name.startswith("HF_")
    }


@pytest.mark.model
def test_hidden_states_of_the_default_model_warn_of_near_keys_only() -> None:
    from kvllm.config import DEFAULT_MODEL, ModelConfig
    from kvllm.lm.model import LanguageModel
    from kvllm.lm.sources import resolve

    def load() -> HiddenStateEncoder:
        return HiddenStateEncoder(LanguageModel.load(resolve(DEFAULT_MODEL).path, ModelConfig()))

    encoder = choose_encoder(["梦中情炉"], hidden=load)
    check_ranking(encoder, "Who leads Halcyon?", "Who is the head of Halcyon?", "baklava")
    check_ranking(encoder, "谁是顾问舟？", "顾问舟是谁？", "水在多少摄氏度沸腾？")
    check_ranking(encoder, "梦中情炉", "我的梦中情炉", "退款政策")
