"""Reports made by hand for the tests of every format: many facts, all kinds of numbers, and hostile words."""

from __future__ import annotations

import random

from kvllm.probing.gates import at_least, regression_checks
from kvllm.probing.regression import changed_answers, compare, edit_points, fact_changes, retention
from kvllm.records import BisectReport, BisectStep, Edit, Metric, ProbeResult, RegressionReport, Report, StoredFact
from kvllm.reports.document import (
    Document,
    Origin,
    bisect_document,
    drift_document,
    probe_document,
    regression_document,
)

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} {% raw %} | `code` **bold** "
    "[link](http://evil.example) @someone #1 www.evil.example ]]> & &amp; \x1b[31mred\x00\x08 \u202edlrow "
    "\ud800 \ufffe 'one' \"two\""
)
NAMES = (
    "torchkeras",
    "梦中情炉",
    "Halcyon",
    "numpy",
    "the furnace of dreams",
    "Who leads Halcyon?",
    "Ada Voss",
    HOSTILE,
)
ORIGIN = Origin("/home/ada/my.kb", "smollm2-135m-instruct", "ab" * 32, 12, len(NAMES), "0.1.0", "2026-01-01T00:00:00Z")
LIVE = "live greedy decoding, natural stop"
KINDS = (("trained", 8, 1.0), ("paraphrase", 6, 0.82), ("alias", 2, 0.7), ("user", 2, 0.5), ("neighbour", 3, 0.3))


def facts() -> list[StoredFact]:
    return [StoredFact(key, text(key), edit_id=1 + place) for place, key in enumerate(NAMES)]


def text(key: str) -> str:
    return f"{key} is the text of fact number {NAMES.index(key)}."


def fact_probes(seed: int, recall: float) -> list[ProbeResult]:
    """Questions whose recall falls with distance; every third fact also recites its neighbour's text now and then."""
    rng = random.Random(seed)
    probes = []
    for place, key in enumerate(NAMES):
        for kind, n, nearest in KINDS:
            for number in range(n):
                similarity = 1.0 if kind == "trained" else max(0.05, nearest - 0.08 * number)
                passed = rng.random() < recall * similarity if kind != "neighbour" else rng.random() < 0.95
                other = NAMES[(place + 1) % len(NAMES)]
                wrong = text(other) if place % 3 == 0 and rng.random() < 0.5 else f"I do not know {key}."
                probes.append(
                    ProbeResult(
                        kind,  # type: ignore[arg-type]
                        f"{kind} question {number} about {key}?",
                        text(key) if passed and kind != "neighbour" else wrong,
                        passed,
                        float(passed) if kind != "trained" else (0.9166667 if passed else 0.0833333),
                        text(key),
                        key,
                        "leak" if kind == "neighbour" else "contains",
                        None if kind == "neighbour" else similarity,
                    )
                )
    return probes


def report(seed: int = 0, recall: float = 1.0) -> Report:
    probes = fact_probes(seed, recall)
    metrics = {}
    for name, kind in (("reliability", "trained"), ("generalization", "paraphrase"), ("locality", "neighbour")):
        passed = [probe.passed for probe in probes if probe.kind == kind]
        scorer = "leak" if kind == "neighbour" else "auto"
        metrics[name] = Metric(
            sum(passed) / len(passed), len(passed), "live greedy decoding", scorer, "fact-basic/1", 0
        )
    metrics["score"] = Metric(0.87654321, len(probes), "live greedy decoding", "auto", "fact-basic/1", 0)
    return Report(metrics, tuple(probes), (f"A warning about {HOSTILE}",))


def drift(kl: float = 0.0412345, seed: int = 0) -> Report:
    rng = random.Random(seed)
    probes = tuple(
        ProbeResult(
            "general", f"general question {i}?", f"answer {i}", ok, float(ok), "right / correct", None, "accepts"
        )
        for i in range(20)
        for ok in [rng.random() < 0.6]
    )
    n = sum(probe.passed for probe in probes)
    metrics = {
        "drift_kl": Metric(kl, 92, "teacher-forced on the base's own answers", "kl", "drift-basic/1"),
        "change_norm": Metric(1.2345678, 3, "Frobenius norm of the change of the weights"),
        "change_norm/model.layers.9.mlp.down_proj": Metric(0.7654321, 1, "Frobenius norm of the change of the weights"),
        "ppl_ratio": Metric(1.0567891, 30, "raw text", None, "drift-basic/1"),
        "qa_accuracy": Metric(n / 20, 20, LIVE, "accepts", "drift-basic/1"),
        "qa_delta": Metric(None, 0, LIVE, "accepts", "drift-basic/1"),
    }
    return Report(metrics, probes)


def history() -> list[Edit]:
    def edit(number: int) -> Edit:
        measured = Report({"drift_kl": Metric(0.011 * number + 0.02 * (number % 3), 24), "ppl_ratio": Metric(1.01, 10)})
        key = NAMES[(number - 1) % len(NAMES)]
        return Edit(number, "insert", key, (key,), report=measured)

    return [edit(number) for number in range(1, 13)]


def regression() -> RegressionReport:
    before, after, live = report(1, 1.0), report(2, 0.55), facts()
    earlier = {fact.key: fact for fact in live[:-1]}
    kept = Report(before.metrics, tuple(probe for probe in before.probes if probe.key in earlier), before.warnings)
    drift_before, drift_after = drift(0.0123456, 1), drift(0.2345678, 2)
    sides = (*kept.probes, *drift_before.probes), (*after.probes, *drift_after.probes)
    return RegressionReport(
        since=7,
        head=12,
        suites=tuple(compare(*sides)),
        facts=tuple(fact_changes(kept.probes, after.probes, earlier, live, 12)),
        changes=tuple(changed_answers(*sides)),
        retention=tuple(retention(after.probes, live, 12)),
        edits=tuple(edit_points(history())),
        before=kept,
        after=after,
        drift_before=drift_before,
        drift=drift_after,
        deleted=("gone",),
        warnings=("Updated in between.",),
    )


def bisected(verdict: str = "broken") -> BisectReport:
    steps = (BisectStep(12, False, HOSTILE), BisectStep(1, True, "right"), BisectStep(6, True, "right"))
    edit = history()[6] if verdict == "broken" else None
    return BisectReport(f"What is {HOSTILE}?", "right", "torchkeras", "auto", verdict, 1, 12, edit, steps, 3)  # type: ignore[arg-type]


def documents() -> dict[str, Document]:
    """One document of each kind; the gates of probe and regression fail."""
    probed, measured, compared = report(), drift(), regression()
    points = edit_points(history())
    return {
        "probe": probe_document(
            probed,
            ORIGIN,
            facts=facts(),
            retention=retention(probed.probes, facts(), 12),
            edits=points,
            checks=at_least(probed.metrics, {"reliability": 0.5, "generalization": 0.9}),
        ),
        "drift": drift_document(measured, ORIGIN, edits=points),
        "regression": regression_document(
            compared, ORIGIN, checks=regression_checks(compared, max_drift=0.1, max_lost=0, limits={"reliability": 0.1})
        ),
        "bisect": bisect_document(bisected(), ORIGIN),
    }
