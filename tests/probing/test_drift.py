"""Drift is nothing on the base itself, something on a changed model, and the same from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvllm import KnowledgeBase
from kvllm.config import ModelConfig
from kvllm.lm.model import LanguageModel
from kvllm.probing import drift
from kvllm.probing.drift import base_reference, measure_drift
from kvllm.probing.suites import DRIFT_SUITE
from tests.kit import KEY


@pytest.fixture
def own(quick: None, tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(tiny_llama, ModelConfig(device="cpu"))


def test_the_base_has_no_drift(own: LanguageModel) -> None:
    report = measure_drift(own, base_reference(own, "tiny"))
    assert report.value("drift_kl") == pytest.approx(0, abs=1e-6)
    assert report.value("ppl_ratio") == pytest.approx(1, abs=1e-6)
    assert report.value("qa_accuracy") == report.value("qa_accuracy_base")
    assert report.value("qa_delta") in (None, 0.0)
    assert {p.kind for p in report.probes} == {"general"}
    assert {m.suite for m in report.metrics.values()} == {DRIFT_SUITE}
    assert report.metrics["drift_kl"].n == 92


def test_a_changed_model_drifts_and_its_logits_are_what_is_compared(own: LanguageModel) -> None:
    reference = base_reference(own, "tiny")
    own.model.get_submodule("model.layers.3.mlp.down_proj").weight.data.mul_(3)
    small = measure_drift(own, reference, full=False)
    large = measure_drift(own, reference)
    for report in (small, large):
        kl, ratio = report.value("drift_kl"), report.value("ppl_ratio")
        assert kl is not None
        assert ratio is not None
        assert kl > 0.01
        assert abs(ratio - 1) > 1e-3
    assert (small.metrics["drift_kl"].n, small.metrics["ppl_ratio"].n) == (6, 3)  # as the fixture `quick` says
    assert "qa_delta" not in small.metrics


def test_a_reference_comes_back_from_the_cache_and_a_damaged_one_is_made_again(
    own: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path))
    small = drift.DriftSuite(*(part[:3] for part in vars(drift.drift_suite()).values()))
    monkeypatch.setattr(drift, "drift_suite", lambda: small)
    asked: list[object] = []
    generate = LanguageModel.generate_ids
    monkeypatch.setattr(
        LanguageModel, "generate_ids", lambda self, *a, **k: (asked.append(a), generate(self, *a, **k))[1]
    )
    made = base_reference(own, "tiny")
    again = base_reference(own, "tiny")
    assert len(asked) == 1
    assert (again.rows, again.texts, again.text_nll) == (made.rows, made.texts, made.text_nll)
    assert all((a == b).all() for a, b in zip(again.outputs, made.outputs, strict=True))
    base_reference(own, "another model")
    assert len(asked) == 2
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-3] + b"abc")
    base_reference(own, "tiny")
    assert len(asked) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(
    own: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "file"))
    small = drift.DriftSuite(*(part[:3] for part in vars(drift.drift_suite()).values()))
    monkeypatch.setattr(drift, "drift_suite", lambda: small)
    assert measure_drift(own, base_reference(own, "tiny")).value("drift_kl") == pytest.approx(0, abs=1e-6)


def test_a_knowledge_base_measures_against_its_base_not_its_head(taught: KnowledgeBase) -> None:
    drifted = taught.drift()
    assert _value(taught.edit(1).report.value("drift_kl")) > 0.01
    assert _value(drifted.value("drift_kl")) > 0.01
    taught.rollback(0)
    assert taught.drift().value("drift_kl") == pytest.approx(0, abs=1e-6)
    taught.rollback(1)
    assert taught.drift().value("drift_kl") == drifted.value("drift_kl")
    assert KEY in taught


def _value(number: float | None) -> float:
    assert number is not None
    return number
