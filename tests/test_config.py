"""Configurations are refused at the door, and survive being stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvllm.config import EditConfig, GateConfig, ModelConfig, cache_folder
from kvllm.errors import ConfigError

BAD = [
    (EditConfig, {"depth": (0.9, 0.2)}),
    (EditConfig, {"depth": (0.5, 0.5)}),
    (EditConfig, {"depth": (-0.1, 0.5)}),
    (EditConfig, {"depth": (0.5, 1.1)}),
    (EditConfig, {"depth": (0.5,)}),
    (EditConfig, {"init_rank": 4, "target_rank": 4}),
    (EditConfig, {"target_rank": 0}),
    (EditConfig, {"value_lr": 0.0}),
    (EditConfig, {"factor_lr": -1.0}),
    (EditConfig, {"margin": 0.0}),
    (EditConfig, {"max_steps": 0}),
    (EditConfig, {"max_text_tokens": 0}),
    (EditConfig, {"preserve_tokens": 0}),
    (EditConfig, {"preserve_weight": -1.0}),
    (EditConfig, {"neighbours": -1}),
    (EditConfig, {"replay": -1}),
    (EditConfig, {"value_lr": float("nan")}),
    (EditConfig, {"orthogonality": float("nan")}),
    (GateConfig, {"min_reliability": 1.5}),
    (GateConfig, {"min_erasure": -0.1}),
    (GateConfig, {"max_drift_kl": -0.1}),
    (EditConfig, {"seed": 2**63}),
    (GateConfig, {"max_ppl_ratio": -1.0}),
    (ModelConfig, {"dtype": "int8"}),
    (ModelConfig, {"max_new_tokens": 0}),
]


@pytest.mark.parametrize(
    ("kind", "settings"), BAD, ids=lambda part: str(part) if isinstance(part, dict) else part.__name__
)
def test_unusable_settings_are_refused_by_name(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings)).split("_")[0]):
        kind(**settings)


@pytest.mark.parametrize("kind", [EditConfig, GateConfig, ModelConfig])
def test_a_configuration_survives_json(kind: Any) -> None:
    config = kind()
    assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no setting steps; it knows .*max_steps"):
        EditConfig.from_dict({"steps": 3})


def test_gate_rules_can_be_switched_off_one_by_one() -> None:
    for name in ("min_reliability", "max_drift_kl", "max_ppl_ratio", "min_erasure"):
        assert GateConfig(**{name: None}).to_dict()[name] is None


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("KVLLM_CACHE", "~/kv")
    assert cache_folder() == Path.home() / "kv"
    monkeypatch.delenv("KVLLM_CACHE")
    assert cache_folder().name == "kvllm"


def test_many_facts_get_more_steps_and_share_the_energy() -> None:
    config = EditConfig(max_steps=100, energy_weight=30.0, preserve_weight=32.0)
    assert [config.shared_among(n).max_steps for n in (0, 1, 4, 5, 64)] == [100, 100, 100, 125, 1600]
    assert [config.shared_among(n).energy_weight for n in (0, 1, 4, 60)] == [30.0, 30.0, 7.5, 0.5]
    assert [config.shared_among(n).preserve_weight for n in (0, 1, 4, 64)] == [32.0, 32.0, 16.0, 4.0]
    ranks = [(shared.init_rank, shared.target_rank) for shared in map(config.shared_among, (0, 1, 8, 12, 64))]
    assert ranks == [(12, 8), (12, 8), (12, 8), (18, 12), (96, 64)]
    # Never beyond a quarter of the width, and never less than what one fact has.
    assert [config.shared_among(64, width).init_rank for width in (16, 200, 4096)] == [12, 50, 96]
    assert config.shared_among(1, 16) == config.shared_among(1) == config
