"""Drift is nothing on the base itself, something on a changed model, and the same from the cache."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib import util
from pathlib import Path

import pytest

from kvllm import ConfigError, KnowledgeBase
from kvllm.config import ModelConfig
from kvllm.lm.model import LanguageModel
from kvllm.probing import drift, suites
from kvllm.probing.drift import base_reference, measure_drift
from kvllm.probing.suites import DRIFT_SUITE, DriftSuite
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
    drifted = taught.drift("basic")
    assert _value(taught.edit(1).report.value("drift_kl")) > 0.01
    assert _value(drifted.value("drift_kl")) > 0.01
    taught.rollback(0)
    assert taught.drift("basic").value("drift_kl") == pytest.approx(0, abs=1e-6)
    taught.rollback(1)
    assert taught.drift("basic").value("drift_kl") == drifted.value("drift_kl")
    assert KEY in taught


def _value(number: float | None) -> float:
    assert number is not None
    return number


def test_an_answer_shown_unchanged_by_a_forward_pass_is_the_decoded_answer(own: LanguageModel) -> None:
    """The shortcut must give what decoding everything gives, where some answers change and some do not."""
    reference = base_reference(own, "tiny")
    own.model.get_submodule("model.layers.3.mlp.down_proj").weight.data.mul_(1.05)
    report = measure_drift(own, reference)
    questions = reference.suite.questions
    decoded = own.generate([q.question for q in questions], max_new_tokens=drift.ANSWER_TOKENS)
    assert [p.answer for p in report.probes] == decoded
    unchanged = report.value("answers_unchanged")
    assert unchanged is not None
    assert 0 < unchanged < 1


def test_a_knowledge_base_reports_the_norm_of_every_changed_matrix(taught: KnowledgeBase) -> None:
    metrics = taught.drift("basic").metrics
    each = {name: m.value for name, m in metrics.items() if name.startswith("change_norm/")}
    info = taught.edit(1).delta
    assert info is not None
    assert len(each) == info.modules
    assert metrics["change_norm"].value == pytest.approx(info.norm, rel=1e-4)
    assert sum(_value(v) ** 2 for v in each.values()) == pytest.approx(_value(metrics["change_norm"].value) ** 2)
    taught.rollback(0)
    assert taught.drift("basic").value("change_norm") == 0


def test_the_whole_suite_is_measured_unless_another_is_asked_for(
    taught: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = suites.whole_drift_suite()
    short = DriftSuite(whole.questions[:5], whole.instructions[:3], whole.texts[:2], whole.name)
    monkeypatch.setattr(suites, "whole_drift_suite", lambda: short)
    metrics = taught.drift().metrics
    assert {metrics[name].suite for name in ("drift_kl", "ppl_ratio", "qa_delta")} == {"drift/1"}
    assert (metrics["drift_kl"].n, metrics["ppl_ratio"].n, metrics["qa_accuracy"].n) == (8, 2, 5)
    own = tmp_path / "mine.jsonl"
    own.write_text('{"question": "Who?", "accept": ["Ada"]}\n{"text": "A long enough line of raw text."}\nnonsense\n')
    report = taught.drift(own)
    assert (report.metrics["drift_kl"].n, report.metrics["ppl_ratio"].n, report.metrics["qa_accuracy"].n) == (1, 1, 1)
    assert str(report.metrics["drift_kl"].suite).startswith("mine.jsonl/")
    assert [w.split(":")[0] for w in report.warnings] == ["line 3"]
    own.write_text('{"prompt": "Write."}\n')
    assert set(taught.drift(own).metrics) >= {"drift_kl", "change_norm"}
    own.write_text('{"text": "A long enough line of raw text."}\n')
    assert "drift_kl" not in taught.drift(own).metrics


def test_what_a_stored_fact_answers_is_no_unrelated_knowledge(taught: KnowledgeBase, tmp_path: Path) -> None:
    question = "What is the capital of France?"
    asked = suites.drift_suite().questions
    assert question in {q.question for q in asked}
    before = taught.drift("basic")
    taught.insert(question, "Lyon")
    after = taught.drift("basic")
    assert {p.question for p in before.probes} - {p.question for p in after.probes} == {question}
    for name in ("drift_kl", "qa_accuracy", "answers_unchanged"):
        assert after.metrics[name].n == before.metrics[name].n - 1
    assert "1 that stored facts answer left out" in str(after.metrics["drift_kl"].protocol)
    # The gate's share is drawn before: leaving one question out changes no other.
    reference = taught.engine._drift_reference(suites.drift_suite(), None)
    whole, less = (
        measure_drift(taught.engine.lm, reference, full=False, own=own) for own in (frozenset(), frozenset({0}))
    )
    unasked = measure_drift(taught.engine.lm, reference, full=False, own=frozenset({1}))
    assert less.metrics["drift_kl"].n == whole.metrics["drift_kl"].n - 1
    assert unasked.metrics == whole.metrics
    report = taught.regression(since=1)  # on both sides the same questions
    for side in (report.drift_before, report.drift):
        assert question not in {p.question for p in side.probes}
    # A file of one's own is asked as it stands; a deleted fact leaves nothing out.
    own = tmp_path / "mine.jsonl"
    own.write_text(f'{{"question": "{question}", "accept": ["Paris"]}}\n')
    assert taught.drift(own).metrics["qa_accuracy"].n == 1
    taught.delete(question)
    assert taught.drift("basic").metrics["drift_kl"].n == before.metrics["drift_kl"].n


def test_a_model_changed_by_hand_is_measured_anew(taught: KnowledgeBase) -> None:
    before = taught.drift("basic")
    assert taught.drift("basic") == before
    taught.model.get_submodule("model.layers.0.self_attn.q_proj").weight.data.mul_(2)
    assert taught.drift("basic").value("drift_kl") != before.value("drift_kl")


def test_a_second_drift_does_not_ask_the_base_again(
    taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    taught.drift("basic")
    with KnowledgeBase.open(taught.path, readonly=True) as again:
        asked: list[int] = []
        generate = LanguageModel.generate_ids
        monkeypatch.setattr(
            LanguageModel, "generate_ids", lambda self, p, **k: (asked.append(len(p)), generate(self, p, **k))[1]
        )
        again.drift("basic")
    assert sum(asked) <= 80


class TestHarness:
    """lm-eval is not a dependency: a package of its shape stands in its place."""

    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        evaluated: list[object] = []

        class TaskManager:
            all_tasks = ("arc_easy", "piqa")

        class HFLM:
            def __init__(self, pretrained: object, tokenizer: object, batch_size: int) -> None:
                self.model = pretrained

        def simple_evaluate(model: HFLM, tasks: list[str], limit: int | None, log_samples: bool) -> dict[str, object]:
            evaluated.append(tasks)
            weight = model.model.get_submodule("model.layers.3.mlp.down_proj").weight  # type: ignore[attr-defined]
            values = {"alias": "x", "acc,none": float(weight.sum()), "acc_stderr,none": 0.1}
            return {"results": dict.fromkeys(tasks, values), "n-samples": {t: {"effective": 7} for t in tasks}}

        for name, attributes in (
            ("lm_eval", {"simple_evaluate": simple_evaluate}),
            ("lm_eval.tasks", {"TaskManager": TaskManager}),
            ("lm_eval.models", {}),
            ("lm_eval.models.huggingface", {"HFLM": HFLM}),
        ):
            module = types.ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("kvllm.probing.harness.metadata.version", lambda name: "0.0-test")
        return evaluated

    def test_without_the_package_one_sentence_says_so(self, taught: KnowledgeBase) -> None:
        if util.find_spec("lm_eval"):
            pytest.skip("lm-eval is installed")
        with pytest.raises(ConfigError, match="is not installed; nothing was measured"):
            taught.drift("basic", lm_eval=["arc_easy"])

    def test_an_unknown_task_is_named(self, taught: KnowledgeBase, installed: list[object]) -> None:
        with pytest.raises(ConfigError, match="no task nonsense"):
            taught.drift("basic", lm_eval=["arc_easy", "nonsense"])
        with pytest.raises(ConfigError, match="as a list"):
            taught.drift("basic", lm_eval="arc_easy")

    def test_base_and_edited_model_are_compared_and_the_base_is_asked_once(
        self, taught: KnowledgeBase, installed: list[object]
    ) -> None:
        weights = taught.weights_digest()
        metrics = taught.drift("basic", lm_eval=["arc_easy"]).metrics
        now, base = (_value(metrics[f"lm_eval/arc_easy/acc{end}"].value) for end in ("", "_base"))
        assert now != base
        assert metrics["lm_eval/arc_easy/acc_delta"].value == pytest.approx(now - base)
        assert metrics["lm_eval/arc_easy/acc"].n == 7
        assert taught.weights_digest() == weights
        assert len(installed) == 2
        taught.drift("basic", lm_eval=["arc_easy"])
        assert len(installed) == 3

    def test_a_task_of_your_own_is_a_file_and_never_remembered(
        self, taught: KnowledgeBase, installed: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine.yaml").write_text("task: mine\n")
        monkeypatch.chdir(tmp_path)
        for _ in range(2):
            taught.drift("basic", lm_eval=["mine.yaml"])
        assert installed == [[str(tmp_path / "mine.yaml")]] * 4  # base and edited model, twice
        with pytest.raises(ConfigError, match=r"no task other\.yaml"):
            taught.drift("basic", lm_eval=["mine.yaml", "other.yaml"])
