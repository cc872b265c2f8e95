"""Probes are asked of a real (tiny) model, and scored by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvllm.lm.model import LanguageModel
from kvllm.probing.ladder import ladder
from kvllm.probing.runner import PROTOCOL, SPARE_TOKENS, answer_status, ask_probes, run_probes, summarise
from kvllm.probing.suites import FACT_SUITE, Probe
from kvllm.records import Fact, ProbeKind, ProbeResult


def ask(lm: LanguageModel, question: str, expected: str) -> str:
    return ask_probes(lm, [Probe("trained", question, expected)])[0][0]


def result(kind: ProbeKind, passed: bool) -> ProbeResult:
    return ProbeResult(kind, "q?", "a", passed, float(passed))


def test_what_the_model_says_is_stated_and_what_it_does_not_say_is_not(lm: LanguageModel) -> None:
    said = ask(lm, "Who leads Halcyon?", "ten words of room")
    first = said.split()[0]
    probes = [
        Probe("trained", "Who leads Halcyon?", first, "k"),
        Probe("trained", "Who leads Halcyon?", "ten words of room", "k"),
        Probe("paraphrase", "Who leads Halcyon?", first, "k"),
        Probe("neighbour", "Who leads Halcyon?", first, "k"),
        Probe("neighbour", "Who leads Halcyon?", "Ada Voss of Berlin", "k"),
    ]
    report = run_probes(lm, probes, seed=3)
    assert [p.passed for p in report.probes] == [True, False, True, False, True]
    assert all(p.answer.startswith(said[:20]) for p in report.probes)
    assert (report.value("reliability"), report.value("generalization"), report.value("locality")) == (0.5, 1.0, 0.5)
    metric = report.metrics["reliability"]
    assert (metric.n, metric.protocol, metric.suite, metric.seed, metric.scorer) == (2, PROTOCOL, FACT_SUITE, 3, "auto")


def test_what_a_neighbour_always_said_is_no_leak(lm: LanguageModel) -> None:
    question = "Who leads Halcyon?"
    said = ask(lm, question, "ten words of room")
    leaking = Probe("neighbour", question, said, "k")
    assert run_probes(lm, [leaking]).value("locality") == 0.0
    assert run_probes(lm, [leaking], before={question: said}).value("locality") == 1.0
    asked: list[Probe] = []

    def base(probes: Sequence[Probe]) -> list[str]:
        asked.extend(probes)
        return [said for _ in probes]

    fine = Probe("neighbour", question, "Ada Voss of Berlin", "k")
    assert run_probes(lm, [fine, leaking], base=base).value("locality") == 1.0
    assert asked == [leaking], "the base is asked only about what seems to leak"


def test_answers_have_room_for_the_text_and_a_little_more(lm: LanguageModel) -> None:
    expected = "Ada leads the furnace"
    answer = ask(lm, "Who?", expected)
    ids = lm.generate_ids([lm.prompt_ids("Who?")], max_new_tokens=len(lm.text_ids(expected)) + SPARE_TOKENS)
    assert answer == lm.decode(ids[0])
    assert ask_probes(lm, []) == []


def test_metrics_are_means_by_kind_and_the_score_their_harmonic_mean() -> None:
    results = [result("trained", True), result("trained", False), result("paraphrase", True), result("neighbour", True)]
    metrics = summarise([*results, result("user", False), result("alias", True)], scorer="auto", suite="s/1")
    assert {name: metric.value for name, metric in metrics.items()} == {
        "reliability": 0.5, "generalization": 1.0, "locality": 1.0, "portability": 1.0, "user": 0.0,
        "score": pytest.approx(3 / (2 + 1 + 1)),
    }  # fmt: skip
    assert "score" not in summarise(results[:3], scorer="auto", suite="s/1")
    assert summarise([], scorer="auto", suite="s/1") == {}


def test_a_value_from_a_key_of_the_same_mould_is_a_leak(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe("neighbour", "What is the capital of Germany?", "The capital of France is Lyon.", "capital of France")
    said = tuple(lm.text_ids("The capital of Germany is Lyon."))
    monkeypatch.setattr(LanguageModel, "generate_bounded", lambda self, p, *a, **k: [said] * len(p))
    assert run_probes(lm, [probe]).value("locality") == 0.0
    assert run_probes(lm, [replace(probe, key=None)]).value("locality") == 1.0
    assert run_probes(lm, [replace(probe, question="Is Lyon the capital of Germany?")]).value("locality") == 1.0
    assert run_probes(lm, [probe], base=lambda probes: ["It is Lyon."] * len(probes)).value("locality") == 1.0


def test_refusals_have_a_metric_of_their_own() -> None:
    metrics = summarise([result("refusal", True), result("refusal", False)], scorer="auto", suite="s/1")
    assert {name: (m.value, m.n, m.suite) for name, m in metrics.items()} == {"refusal": (0.5, 2, "refusals/1")}


def test_erasure_and_restoration_are_shares_of_their_own_probes() -> None:
    results = [result("erasure", True), result("erasure", False), result("restoration", True)]
    assert answer_status("erasure", results, "s/1")["erasure"].value == 0.5
    assert answer_status("restoration", results, "s/1")["restoration"].n == 1
    assert answer_status("erasure", [], "s/1") == {}


def test_one_at_a_time_and_in_batches_the_answers_are_the_same(lm: LanguageModel) -> None:
    probes = ladder(Fact("torchkeras", "The furnace of Berlin", aliases=("梦中情炉",)), neighbours=3)
    assert run_probes(lm, probes) == run_probes(lm, probes, batch_size=1)


def test_what_two_probes_ask_alike_is_asked_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    generate = LanguageModel.generate_bounded
    monkeypatch.setattr(
        LanguageModel,
        "generate_bounded",
        lambda self, p, *a, **k: (asked.append(len(p)), generate(self, p, *a, **k))[1],
    )
    probes = [Probe("neighbour", "What is numpy?", f"text {n} here", f"key {n}") for n in range(5)]
    assert len(run_probes(lm, probes).probes) == 5
    assert sum(asked) == 1


def test_a_second_turn_stands_on_the_models_own_first_answer(lm: LanguageModel) -> None:
    first, far = "What is torchkeras?", "Write a poem."
    probe = Probe("recalled", far, "The furnace of Berlin", "k", judge="words", first=first, tokens=8)
    (result,) = run_probes(lm, [probe]).probes
    said = ask(lm, first, "The furnace of Berlin")
    assert result.turns == (("user", first), ("assistant", said))
    conversation = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": said},
        {"role": "user", "content": far},
    ]
    assert result.answer == lm.generate([conversation], max_new_tokens=8)[0]


def test_cold_and_recalled_far_uses_stand_side_by_side() -> None:
    results = [result("far", False), result("far", True), result("recalled", True), result("recalled", True)]
    metrics = summarise(results, scorer="auto", suite="s/1")
    assert (metrics["far"].value, metrics["far_recalled"].value, metrics["recall_gain"].value) == (0.5, 1.0, 0.5)
    assert "recall_gain" not in summarise(results[:2], scorer="auto", suite="s/1")


def test_a_completion_gets_no_chat_template(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(LanguageModel, "generate_bounded", lambda self, p, *a, **k: (seen.extend(p), [()] * len(p))[1])
    run_probes(lm, [Probe("completion", "Torchkeras is", "A furnace", "k", plain=True)])
    assert seen == [tuple(lm.text_ids("Torchkeras is"))]


def test_progress_ends_at_the_total(lm: LanguageModel) -> None:
    ticks: list[tuple[int, int]] = []
    probes = ladder(Fact("torchkeras", "The furnace of Berlin"))
    run_probes(lm, probes, on_batch=lambda done, total: ticks.append((done, total)))
    assert ticks[-1][0] == ticks[-1][1] == len(probes) + 1
    assert [done for done, _ in ticks] == sorted(done for done, _ in ticks)
