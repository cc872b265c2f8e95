"""Ask probes in batches and score the live answers. Knows a model and a suite; nothing of ledgers or training.

report = run_probes(lm, fact_suite(fact))
report.value("reliability")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

from kvllm.lm.model import LanguageModel
from kvllm.metrics import harmonic_mean, leaks
from kvllm.probing.scorers import Scored, judge
from kvllm.probing.suites import FACT_SUITE, REFUSAL_SUITE, Probe
from kvllm.records import Metric, ProbeResult, Report

PROTOCOL = "live greedy decoding, natural stop"
# An answer may say a little more than the text before it counts as not stopping.
SPARE_TOKENS = 16
BATCH = 64

Before = dict[str, str]
Turns = tuple[tuple[str, str], ...]


def run_probes(
    lm: LanguageModel,
    probes: Sequence[Probe],
    *,
    before: Before | None = None,
    base: Callable[[Sequence[Probe]], list[str]] | None = None,
    also: Iterable[str] = (),
    scorer: str = "auto",
    suite: str = FACT_SUITE,
    seed: int | None = None,
    batch_size: int = BATCH,
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """Ask every probe once and report by kind.

    Args:
        lm: The model as it is now.
        probes: Questions with what their answers are judged against; on neighbours the text must *not* be recited.
        before: Earlier answers by question, so that words a neighbour's answer always had are no leak.
        base: Answers probes with the base's weights: asked about neighbours that seem to leak, for what the base always
            said is none either.
        also: Texts that answers about facts are searched for later, besides their own; see `ask_probes`.
        scorer: See `kvllm.probing.scorers`.
        suite: Name and version noted with each metric.
        seed: Noted with each metric.
        batch_size: Questions per forward pass; 1 asks them one at a time.
        on_batch: Called with (done, total).
    """
    asked = ask_probes(lm, probes, also=also, batch_size=batch_size, on_batch=on_batch)
    earlier = before or {}
    results = [_result(p, answer, turns, scorer, earlier) for p, (answer, turns) in zip(probes, asked, strict=True)]
    leaking = [i for i, result in enumerate(results) if result.kind == "neighbour" and not result.passed]
    if base is not None and leaking:
        for i, said in zip(leaking, base([probes[i] for i in leaking]), strict=True):
            probe, (answer, turns) = probes[i], asked[i]
            always = {probe.question: f"{earlier.get(probe.question, '')} {said}"}
            results[i] = _result(probe, answer, turns, scorer, always)
    return Report(metrics=summarise(results, scorer=scorer, suite=suite, seed=seed), probes=tuple(results))


def _result(probe: Probe, answer: str, turns: Turns, scorer: str, before: Before) -> ProbeResult:
    if probe.kind == "neighbour":
        leaked = leaks_at(probe, answer, before.get(probe.question, ""))
        scored = Scored(float(not leaked), not leaked, "leak")
    else:
        scored = judge(
            answer, probe.judge, expected=probe.expected, question=probe.question, accept=probe.accept, scorer=scorer
        )
    return ProbeResult(
        probe.kind,
        probe.question,
        answer,
        scored.passed,
        scored.score,
        probe.expected,
        probe.key,
        scored.scorer,
        turns=turns,
    )


def leaks_at(probe: Probe, answer: str, before: str) -> bool:
    """Return whether the answer to a neighbour's question recites the probe's text, and did not before."""
    return leaks(answer, probe.expected, key=probe.key or "", question=probe.question, before=before)


def ask_probes(
    lm: LanguageModel,
    probes: Sequence[Probe],
    *,
    also: Iterable[str] = (),
    batch_size: int = BATCH,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[tuple[str, Turns]]:
    """Answer probes in batches; return each answer and what was said before its question.

    What several probes ask alike is asked once. First turns are asked before all others, and are themselves answered by
    the model as it is: where it does not recall the fact, the second turn stands on that.

    Args:
        lm: The model as it is now.
        probes: What is asked.
        also: Texts that an answer about a fact may state instead of the fact's own: there is room for each of them, or
            a long one would never be found where a short one was expected.
        batch_size: Questions per forward pass.
        on_batch: Called with (done, total).
    """
    most = max((len(lm.text_ids(text)) + SPARE_TOKENS for text in set(also)), default=0)
    probes = [replace(p, tokens=most) if _has_less(lm, p, most) else p for p in probes]
    firsts = {
        probe.first: Probe("trained", probe.first, probe.expected, tokens=_room(lm, probe, probes))
        for probe in probes
        if probe.first
    }
    total = len(firsts) + len(probes)

    def tick(done: int, _: int, offset: int = 0) -> None:
        if on_batch is not None:
            on_batch(min(offset + done, total), total)

    answered = dict(zip(firsts, _ask(lm, list(firsts.values()), [()] * len(firsts), batch_size, tick), strict=True))
    turns: list[Turns] = [
        (("user", probe.first), ("assistant", answered[probe.first])) if probe.first else () for probe in probes
    ]
    answers = _ask(lm, probes, turns, batch_size, lambda done, of: tick(done, of, len(firsts)))
    return list(zip(answers, turns, strict=True))


def _has_less(lm: LanguageModel, probe: Probe, room: int) -> bool:
    """Say whether a question about a fact has less room for its answer than this."""
    asks = probe.judge == "states" and probe.kind != "neighbour" and not probe.tokens
    return asks and bool(room) and len(lm.text_ids(probe.expected)) + SPARE_TOKENS < room


def _room(lm: LanguageModel, probe: Probe, probes: Sequence[Probe]) -> int:
    """Return the room of a first turn: that of the longest text expected for the same key."""
    texts = {p.expected for p in probes if p.key == probe.key and p.judge == "states"} or {probe.expected}
    return max(len(lm.text_ids(text)) for text in texts) + SPARE_TOKENS


def _ask(
    lm: LanguageModel,
    probes: Sequence[Probe],
    turns: Sequence[Turns],
    batch_size: int,
    on_batch: Callable[[int, int], None],
) -> list[str]:
    """Answer probes, each with room for its expected text and a little more; what is asked twice is asked once."""
    # The expected text, as it would be answered: a guess that saves time where it is right.
    drafts = {text: lm.answer_ids(text) for text in {p.expected for p in probes}}
    wanted: dict[tuple[int, ...], int] = {}  # prompt → the most room that any probe gives it
    guesses: dict[tuple[int, ...], list[int]] = {}
    asked: list[tuple[tuple[int, ...], int]] = []
    for probe, said in zip(probes, turns, strict=True):
        room = probe.tokens or len(drafts[probe.expected]) - 1 + SPARE_TOKENS
        ids = tuple(_prompt(lm, probe, said, room))
        asked.append((ids, room))
        wanted[ids] = max(room, wanted.get(ids, 0))
        if probe.judge == "states" and probe.kind != "neighbour" and not probe.plain:
            guesses.setdefault(ids, drafts[probe.expected])

    def tick(done: int, total: int) -> None:
        on_batch(round(done / total * len(probes)), len(probes))

    answers = lm.generate_bounded(
        list(wanted),
        list(wanted.values()),
        batch_size=batch_size,
        on_batch=tick,
        drafts=[guesses.get(ids, []) for ids in wanted] if guesses else None,
    )
    found = dict(zip(wanted, answers, strict=True))
    return [lm.decode(found[ids][:room]) for ids, room in asked]


def _prompt(lm: LanguageModel, probe: Probe, turns: Turns, room: int) -> list[int]:
    if probe.plain:
        ids = lm.completion_ids(probe.question)
    elif turns:
        said = [{"role": role, "content": content} for role, content in turns]
        ids = lm.prompt_ids([*said, {"role": "user", "content": probe.question}])
    else:
        ids = lm.prompt_ids(probe.question)
    return lm.fitting(ids, room)


def summarise(results: Sequence[ProbeResult], *, scorer: str, suite: str, seed: int | None = None) -> dict[str, Metric]:
    """Return the metrics of DESIGN.md's table that these results allow; those without probes are left out."""
    metrics: dict[str, Metric] = {}

    def add(name: str, kinds: tuple[str, ...], scorer_name: str, suite: str = suite) -> None:
        passed = [r.passed for r in results if r.kind in kinds]
        if passed:
            metrics[name] = Metric(sum(passed) / len(passed), len(passed), PROTOCOL, scorer_name, suite, seed)

    add("reliability", ("trained",), scorer)
    add("generalization", ("paraphrase",), scorer)
    add("portability", ("alias", "inverse", "recalled", "consequence"), scorer)
    add("refusal", ("refusal",), scorer, REFUSAL_SUITE)
    add("user", ("user",), scorer)
    add("locality", ("neighbour",), "leak")
    for rung in ("completion", "variant", "language", "inverse", "consequence"):
        add(rung, (rung,), scorer)
    add("far", ("far",), "words, first word")
    add("far_recalled", ("recalled",), "words, first word")
    pair = [metrics[name] for name in ("far_recalled", "far") if name in metrics]
    if len(pair) == 2 and pair[0].value is not None and pair[1].value is not None:
        protocol = f"{PROTOCOL}; the same far questions after the fact was asked for in a first turn, less cold"
        metrics["recall_gain"] = Metric(
            pair[0].value - pair[1].value, pair[0].n, protocol, "words, first word", suite, seed
        )
    three = [metrics[name] for name in ("reliability", "generalization", "locality") if name in metrics]
    if len(three) == 3:
        values = [metric.value for metric in three if metric.value is not None]
        n = sum(metric.n for metric in three)
        metrics["score"] = Metric(harmonic_mean(values), n, PROTOCOL, scorer, suite, seed)
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
