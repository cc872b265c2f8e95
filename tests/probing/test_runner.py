"""Probes are asked of a real (tiny) model, and scored by kind."""

from __future__ import annotations

import pytest

from kvllm.lm.model import LanguageModel
from kvllm.probing.runner import PROTOCOL, SPARE_TOKENS, answer_status, ask_bounded, run_probes, summarise
from kvllm.probing.suites import FACT_SUITE, Probe
from kvllm.records import ProbeKind, ProbeResult


def result(kind: ProbeKind, passed: bool) -> ProbeResult:
    return ProbeResult(kind, "q?", "a", passed, float(passed))


def test_what_the_model_says_is_stated_and_what_it_does_not_say_is_not(lm: LanguageModel) -> None:
    said = ask_bounded(lm, [("Who leads Halcyon?", "ten words of room")])[0]
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
    said = ask_bounded(lm, [(question, "ten words of room")])[0]
    leaking = Probe("neighbour", question, said, "k")
    assert run_probes(lm, [leaking]).value("locality") == 0.0
    assert run_probes(lm, [leaking], before={question: said}).value("locality") == 1.0


def test_answers_have_room_for_the_text_and_a_little_more(lm: LanguageModel) -> None:
    expected = "Ada leads the furnace"
    (answer,) = ask_bounded(lm, [("Who?", expected)])
    ids = lm.generate_ids([lm.prompt_ids("Who?")], max_new_tokens=len(lm.text_ids(expected)) + SPARE_TOKENS)
    assert answer == lm.decode(ids[0])
    assert ask_bounded(lm, []) == []


def test_metrics_are_means_by_kind_and_the_score_their_harmonic_mean() -> None:
    results = [result("trained", True), result("trained", False), result("paraphrase", True), result("neighbour", True)]
    metrics = summarise([*results, result("user", False), result("alias", True)], scorer="auto", suite="s/1")
    assert {name: metric.value for name, metric in metrics.items()} == {
        "reliability": 0.5, "generalization": 1.0, "locality": 1.0, "portability": 1.0, "user": 0.0,
        "score": pytest.approx(3 / (2 + 1 + 1)),
    }  # fmt: skip
    assert "score" not in summarise(results[:3], scorer="auto", suite="s/1")
    assert summarise([], scorer="auto", suite="s/1") == {}


def test_erasure_and_restoration_are_shares_of_their_own_probes() -> None:
    results = [result("erasure", True), result("erasure", False), result("restoration", True)]
    assert answer_status("erasure", results, "s/1")["erasure"].value == 0.5
    assert answer_status("restoration", results, "s/1")["restoration"].n == 1
    assert answer_status("erasure", [], "s/1") == {}
