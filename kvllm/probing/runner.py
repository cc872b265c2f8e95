"""Ask probes in batches and score the live answers. Knows a model and a suite; nothing of ledgers or training.

report = run_probes(lm, fact_suite(fact))
report.value("reliability")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from kvllm.lm.model import LanguageModel
from kvllm.metrics import harmonic_mean, leaks
from kvllm.probing.scorers import score_statement
from kvllm.probing.suites import FACT_SUITE, Probe
from kvllm.records import Metric, ProbeResult, Report

PROTOCOL = "live greedy decoding, natural stop"
# An answer may say a little more than the text before it counts as not stopping.
SPARE_TOKENS = 16

Before = dict[str, str]


def run_probes(
    lm: LanguageModel,
    probes: Sequence[Probe],
    *,
    before: Before | None = None,
    scorer: str = "auto",
    suite: str = FACT_SUITE,
    seed: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask every probe once and report by kind.

    Args:
        lm: The model as it is now.
        probes: Questions with what their answers are judged against; on neighbours the text must *not* be recited.
        before: Earlier answers by question, so that words a neighbour's answer always had are no leak.
        scorer: See `kvllm.probing.scorers`.
        suite: Name and version noted with each metric.
        seed: Noted with each metric.
        on_batch: Called with (done, total).
    """
    drafts = ["" if p.kind == "neighbour" else p.expected for p in probes]
    answers = ask_bounded(lm, [(p.question, p.expected) for p in probes], drafts=drafts, on_batch=on_batch)
    results = []
    for probe, answer in zip(probes, answers, strict=True):
        if probe.kind == "neighbour":
            leaked = leaks(answer, probe.expected, before=(before or {}).get(probe.question, ""))
            results.append(
                ProbeResult(
                    probe.kind, probe.question, answer, not leaked, float(not leaked), probe.expected, probe.key, "leak"
                )
            )
            continue
        scored = score_statement(answer, probe.expected, scorer=scorer)
        results.append(
            ProbeResult(
                probe.kind,
                probe.question,
                answer,
                scored.passed,
                scored.score,
                probe.expected,
                probe.key,
                scored.scorer,
            )
        )
    return Report(metrics=summarise(results, scorer=scorer, suite=suite, seed=seed), probes=tuple(results))


def ask_bounded(
    lm: LanguageModel,
    asked: Sequence[tuple[str, str]],
    *,
    drafts: Sequence[str] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer (question, expected text) pairs, each with room for its text and a little more.

    The longest expected text sets the room for all: a batch ends when its last answer stops. Drafts are guesses at the
    answers that save time where they are right (`LanguageModel.generate_ids`).
    """
    if not asked:
        return []
    room = max(len(lm.text_ids(expected)) for expected in {e for _, e in asked}) + SPARE_TOKENS
    room = min(room, lm.config.max_new_tokens * 4)
    return lm.generate([q for q, _ in asked], max_new_tokens=room, drafts=drafts, on_batch=on_batch)


def summarise(results: Sequence[ProbeResult], *, scorer: str, suite: str, seed: int | None = None) -> dict[str, Metric]:
    """Return the metrics of DESIGN.md's table that these results allow; those without probes are left out."""
    metrics: dict[str, Metric] = {}

    def add(name: str, kinds: tuple[str, ...], scorer_name: str) -> None:
        passed = [r.passed for r in results if r.kind in kinds]
        if passed:
            metrics[name] = Metric(sum(passed) / len(passed), len(passed), PROTOCOL, scorer_name, suite, seed)

    add("reliability", ("trained",), scorer)
    add("generalization", ("paraphrase",), scorer)
    add("portability", ("alias",), scorer)
    add("user", ("user",), scorer)
    add("locality", ("neighbour",), "leak")
    three = [metrics[name].value for name in ("reliability", "generalization", "locality") if name in metrics]
    if len(three) == 3:
        values = [v for v in three if v is not None]
        metrics["score"] = Metric(harmonic_mean(values), len(results), PROTOCOL, scorer, suite, seed)
    return metrics


def answer_status(
    kind: Literal["erasure", "restoration"], results: Sequence[ProbeResult], suite: str
) -> dict[str, Metric]:
    """Return the share of passed probes of one kind under its own name."""
    passed = [r.passed for r in results if r.kind == kind]
    if not passed:
        return {}
    scorer = next(r.scorer for r in results if r.kind == kind)
    return {kind: Metric(sum(passed) / len(passed), len(passed), PROTOCOL, scorer, suite)}
