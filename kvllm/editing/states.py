"""Ask the same questions of two or more states of the ledger: regression reports and the search for a culprit.

States are brought up by replay through the engine and put back whatever happens. The pairing and the statistics are
`kvllm.probing.regression`'s; nothing is written here.

    measure_regression(engine, since=3).lost       # ('numpy',)
    find_culprit(engine, "What is numpy?").edit    # the edit that broke it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvllm.editing.engine import Engine
from kvllm.errors import AmbiguousKey, ConfigError
from kvllm.metrics import RECALLED_SHARE, accepts
from kvllm.probing import regression as pairing
from kvllm.probing.drift import ANSWER_TOKENS
from kvllm.probing.ladder import ladder
from kvllm.probing.runner import run_probes
from kvllm.probing.suites import Probe, fact_suite, refusal_probes, whole_drift_suite
from kvllm.prompts import names_of
from kvllm.records import BisectReport, BisectStep, ProbeResult, RegressionReport, Report, StoredFact, lineage

MakeTick = Callable[[str], Callable[..., None]]


def measure_regression(
    engine: Engine,
    *,
    since: int,
    refused: Sequence[StoredFact] = (),
    neighbours: int = 0,
    seed: int = 0,
    tick: MakeTick | None = None,
) -> RegressionReport:
    """Measure every live fact, every refusal and the drift suite at the head and at an earlier edit; pair the answers.

    Args:
        engine: At the head's weights; it is there again afterwards.
        since: The earlier edit; 0 is the base.
        refused: What the head was trained to refuse, as facts whose text is the refusal and whose edit is the delete.
        neighbours: Packaged neighbour questions per fact, the same on both sides.
        seed: Chooses the neighbours and seeds the bootstrap.
        tick: Makes a progress function for a stage.
    """
    store, head = engine.store, engine.head
    facts, earlier = store.facts(head), {fact.key: fact for fact in store.facts(since)}
    live = {fact.key for fact in facts}
    taken = names_of([*facts, *earlier.values()])

    def ask(asked: Sequence[StoredFact], refused: Sequence[StoredFact], stage: str) -> Report:
        probes = [p for fact in asked for p in fact_suite(fact, neighbours=neighbours, seed=seed, taken=taken)]
        probes += refusal_probes(refused)
        show = tick(stage) if tick is not None else None
        return run_probes(engine.lm, probes, base=engine.base_answers, seed=seed, on_batch=show)

    def drift(stage: str) -> Report:
        # On both sides the same questions: what facts of either side answer, or the head refuses, may change.
        both = [*facts, *earlier.values(), *refused]
        return engine.drift(full=True, taught=both, tick=tick(stage) if tick is not None else None)

    after, drift_after = ask(facts, refused, "probing the head"), drift("drift of the head")
    if since == head:
        before, drift_before = after, drift_after
    else:
        with engine.at(since):
            stays = [fact for key, fact in earlier.items() if key in live]
            made = {edit.id for edit in lineage(edit for edit in store.history(light=True) if edit.id <= since)}
            then = [fact for fact in refused if fact.edit_id in made]
            before, drift_before = ask(stays, then, f"probing edit {since}"), drift(f"drift of edit {since}")
    sides = (*before.probes, *drift_before.probes), (*after.probes, *drift_after.probes)
    suites = pairing.compare(*sides, seed=seed)
    changes = pairing.fact_changes(before.probes, after.probes, earlier, facts, head)
    return RegressionReport(
        since=since,
        head=head,
        suites=tuple(suites),
        facts=tuple(changes),
        changes=tuple(pairing.changed_answers(*sides)),
        retention=tuple(pairing.retention(after.probes, facts, head)),
        edits=tuple(pairing.edit_points(store.history())),
        before=before,
        after=after,
        drift_before=drift_before,
        drift=drift_after,
        deleted=tuple(key for key in earlier if key not in live),
        seed=seed,
        warnings=tuple(pairing.regression_warnings(suites, changes, before, after)),
    )


def find_culprit(
    engine: Engine,
    probe: str,
    *,
    expected: str | None = None,
    refused: Sequence[StoredFact] = (),
    neighbours: int = 0,
    seed: int = 0,
    tick: MakeTick | None = None,
) -> BisectReport:
    """Find the edit after which a probe first failed, in log₂(n) replays.

    Args:
        engine: At the head's weights; it is there again afterwards.
        probe: A live or refused key (its trained questions together), a question of a live fact's suite or of a refused
            key, a general question of the drift suite, or any question together with `expected`.
        expected: What the answer must state; by default what the suite expects. The search begins at the edit that
            taught a live fact of this text, else at the base.
        refused: What the head was trained to refuse, as for `measure_regression`.
        neighbours: How many neighbour questions belong to a fact's suite.
        seed: Chooses them.
        tick: Makes a progress function for a stage.

    Raises:
        ConfigError: nobody knows what the probe should be answered with.
        AmbiguousKey: it is a question of several facts.
    """
    searched = _searched(engine, probe, expected, refused, neighbours, seed)
    head, start = engine.head, min(searched.start, engine.head)
    steps: dict[int, BisectStep] = {}
    show = tick("bisecting") if tick is not None else None

    def passes(edit_id: int) -> bool:
        if edit_id == head:
            results = _ask(engine, searched)
        else:
            with engine.at(edit_id):
                results = _ask(engine, searched)
        share = sum(result.passed for result in results) / len(results)
        steps[edit_id] = BisectStep(edit_id, share >= searched.share, results[0].answer)
        if show is not None:
            show(len(steps))
        return steps[edit_id].passed

    bad: int | None = None
    if passes(head):
        verdict = "still passes"
    elif start == head or not passes(start):
        verdict = "never passed"
    else:
        verdict = "broken"
        _, bad = pairing.bisect(start, head, passes)
    return BisectReport(
        question=probe,
        expected=searched.expected,
        key=searched.key,
        scorer=searched.scorer,
        verdict=verdict,  # type: ignore[arg-type]
        start=start,
        head=head,
        edit=engine.store.edit(bad) if bad is not None else None,
        steps=tuple(steps.values()),
        replays=len(steps) - 1,
    )


@dataclass(frozen=True)
class _Searched:
    """What is asked of each state: these probes, of which this share must pass."""

    probes: tuple[Probe, ...]
    start: int
    expected: str
    key: str | None
    scorer: str
    share: float = 1.0
    accepted: tuple[str, ...] = ()


def _searched(
    engine: Engine, probe: str, expected: str | None, refused: Sequence[StoredFact], neighbours: int, seed: int
) -> _Searched:
    facts = engine.store.facts(engine.head)
    if expected is not None:
        taught = next((fact for fact in facts if fact.text == expected), None)
        start, key = (taught.edit_id, taught.key) if taught is not None else (0, None)
        return _Searched((Probe("user", probe, expected, key),), start, expected, key, "auto")
    for fact in facts:
        if fact.key == probe:
            trained = tuple(p for p in fact_suite(fact) if p.kind == "trained")
            share = RECALLED_SHARE
            return _Searched(trained, fact.edit_id, fact.text, fact.key, pairing.FACTS_SCORER, share)
    for fact in refused:
        asked = tuple(p for p in refusal_probes([fact]) if probe in (fact.key, p.question))
        if asked:
            return _Searched(asked, fact.edit_id, fact.text, fact.key, "auto", RECALLED_SHARE)
    taken = names_of(facts)
    found = [p for f in facts for p in ladder(f, neighbours=neighbours, seed=seed, taken=taken) if p.question == probe]
    stating = [p for p in found if p.kind != "neighbour"]
    if len({p.key for p in stating}) > 1:
        keys = [str(p.key) for p in stating]
        raise AmbiguousKey(
            f"The question {probe!r} belongs to {', '.join(map(repr, keys))}; say which answer is expected.",
            matches=keys,
        )
    if stating:
        (fact,) = (f for f in facts if f.key == stating[0].key)
        return _Searched((stating[0],), fact.edit_id, stating[0].expected, fact.key, "auto")
    if found:
        return _Searched(tuple(found), 0, found[0].expected, found[0].key, "leak")
    for question in whole_drift_suite().questions:
        if question.question == probe:
            accepted = question.accept
            return _Searched((Probe("general", probe, ""),), 0, " / ".join(accepted), None, "accepts", 1.0, accepted)
    raise ConfigError(
        f"Nobody knows what {probe!r} should be answered with: it is no live key and no question of a suite; "
        f"nothing was changed. Give the expected text too (--expected)."
    )


def _ask(engine: Engine, searched: _Searched) -> Sequence[ProbeResult]:
    if searched.accepted:
        answer = engine.lm.generate([searched.probes[0].question], max_new_tokens=ANSWER_TOKENS)[0]
        right = accepts(answer, searched.accepted)
        return (ProbeResult("general", searched.probes[0].question, answer, right, float(right), scorer="accepts"),)
    return run_probes(engine.lm, searched.probes, base=engine.base_answers).probes
