"""Two reports of one suite, paired: what was lost, what was gained, and whether that may be chance. Pure functions.

It knows reports and statistics; nothing of models or stores. `KnowledgeBase.regression` asks the questions.

    compare(before, after, seed=0)[0]          # SuiteComparison(suite="trained", lost=3, …, p_value=0.25)
    bisect(1, 40, passes=lambda edit: …)       # (good, bad): neighbours in the history
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from kvllm.metrics import RECALLED_SHARE
from kvllm.paired import bootstrap, holm, mcnemar, wilson
from kvllm.records import (
    AnswerChange,
    Edit,
    EditPoint,
    Fact,
    FactChange,
    ProbeResult,
    Report,
    RetentionPoint,
    StoredFact,
    SuiteComparison,
)

FACTS_SCORER = f"trained>={RECALLED_SHARE}"
FACTS_SUITE = "facts"
Pair = tuple[ProbeResult, ProbeResult]


def pairs_of(before: Iterable[ProbeResult], after: Iterable[ProbeResult]) -> list[Pair]:
    """Return the probes that were asked on both sides, paired by key, kind and question, in the later order."""
    earlier = {_identity(probe): probe for probe in before}
    return [(earlier[_identity(probe)], probe) for probe in after if _identity(probe) in earlier]


def compare(before: Sequence[ProbeResult], after: Sequence[ProbeResult], *, seed: int = 0) -> list[SuiteComparison]:
    """Compare each suite that was asked on both sides, and the facts as wholes; p-values are adjusted over all.

    Args:
        before, after: Results of both sides; what was asked on one side only does not count.
        seed: Of the bootstrap.
    """
    pairs = pairs_of(before, after)
    found: list[SuiteComparison] = []
    whole = _facts_as_pairs(pairs)
    if whole:
        found.append(_comparison(FACTS_SUITE, list(whole.values()), list(whole), FACTS_SCORER, seed))
    for kind in dict.fromkeys(now.kind for _, now in pairs):
        of_kind = [(was, now) for was, now in pairs if now.kind == kind]
        groups = [now.key if now.key is not None else now.question for _, now in of_kind]
        scorers = " or ".join(dict.fromkeys(now.scorer for _, now in of_kind))
        verdicts = [(was.passed, now.passed) for was, now in of_kind]
        found.append(_comparison(kind, verdicts, groups, scorers, seed))
    adjusted = holm({comparison.suite: comparison.p_value for comparison in found})
    return [replace(comparison, p_holm=adjusted[comparison.suite]) for comparison in found]


def changed_answers(before: Sequence[ProbeResult], after: Sequence[ProbeResult]) -> list[AnswerChange]:
    """Return every question whose verdict changed, with both answers; the lost ones first."""
    changes = [
        AnswerChange(
            now.kind,
            now.key,
            now.question,
            was.passed,
            now.passed,
            was.answer,
            now.answer,
            was.expected,
            now.expected,
            now.scorer,
        )
        for was, now in pairs_of(before, after)
        if was.passed != now.passed
    ]
    return sorted(changes, key=lambda change: change.passed)


def fact_changes(
    before: Sequence[ProbeResult],
    after: Sequence[ProbeResult],
    earlier: Mapping[str, Fact],
    facts: Sequence[StoredFact],
    head: int,
) -> list[FactChange]:
    """Return one row per live fact.

    Args:
        before, after: Results of both sides.
        earlier: The facts that were live before, by key; each side is judged against its own text.
        facts: The facts that are live now.
        head: The newest edit.
    """
    was, now = recall_by_key(before), recall_by_key(after)
    rows = []
    for fact in facts:
        share, n = now.get(fact.key, (None, 0))
        share_before = was.get(fact.key, (None, 0))[0] if fact.key in earlier else None
        recalled = share is not None and share >= RECALLED_SHARE
        if fact.key not in earlier:
            status = "new" if recalled else "new, missing"
        else:
            recalled_before = share_before is not None and share_before >= RECALLED_SHARE
            status = {(True, True): "kept", (True, False): "lost", (False, True): "gained"}.get(
                (recalled_before, recalled), "missing"
            )
        updated = fact.key in earlier and earlier[fact.key].text != fact.text
        further = max(0, head - fact.edit_id)
        rows.append(FactChange(fact.key, fact.edit_id, further, status, share, share_before, n, updated))  # type: ignore[arg-type]
    return rows


def retention(probes: Sequence[ProbeResult], facts: Sequence[StoredFact], head: int) -> list[RetentionPoint]:
    """Return retention@n at the head: of the facts that n further edits followed, the share that is recalled."""
    recall = recall_by_key(probes)
    by_age: dict[int, list[tuple[str, bool]]] = {}
    for fact in facts:
        share = recall.get(fact.key, (None, 0))[0]
        if share is not None:
            by_age.setdefault(max(0, head - fact.edit_id), []).append((fact.key, share >= RECALLED_SHARE))
    points = []
    for further, found in sorted(by_age.items()):
        recalled = sum(ok for _, ok in found)
        band = wilson(recalled, len(found))
        assert band is not None
        keys = tuple(key for key, _ in found)
        points.append(RetentionPoint(further, len(found), recalled, recalled / len(found), band.low, band.high, keys))
    return points


def edit_points(history: Iterable[Edit]) -> list[EditPoint]:
    """Return what each edit reported when it was committed, oldest first, after the base, which has drifted nowhere.

    A rollback has no report of its own: it is again what its target was.
    """
    points = {0: EditPoint(0, "rollback", (), None, 0.0, 1.0)}
    for edit in sorted(history, key=lambda edit: edit.id):
        report = edit.report
        values = report.value("reliability"), report.value("drift_kl"), report.value("ppl_ratio")
        if edit.op == "rollback" and (edit.target or 0) in points:
            target = points[edit.target or 0]
            values = target.reliability, target.drift_kl, target.ppl_ratio
        points[edit.id] = EditPoint(edit.id, edit.op, edit.keys, *values)
    return list(points.values())


def regression_warnings(
    suites: Sequence[SuiteComparison], facts: Sequence[FactChange], before: Report, after: Report
) -> list[str]:
    """Return what a reader should know before the numbers."""
    warnings = []
    updated = [fact.key for fact in facts if fact.updated]
    if updated:
        warnings.append(f"Updated in between, each side is judged against its own text: {', '.join(updated)}.")
    small = [s.suite for s in suites if s.lost + s.gained and s.groups < 6]
    if small:
        warnings.append(
            f"Fewer than six facts or questions stand behind {', '.join(small)}: no test can tell such a change from "
            f"chance; read the answers."
        )
    return [*warnings, *dict.fromkeys((*before.warnings, *after.warnings))]


def bisect(good: int, bad: int, passes: Callable[[int], bool]) -> tuple[int, int]:
    """Narrow two states, of which the earlier passes and the later fails, to neighbours.

    Halves the distance with each call of `passes`: ⌈log₂(bad − good)⌉ calls. Where the probe passed and failed more
    than once in between, one of the edits that broke it is found.
    """
    while bad - good > 1:
        middle = (good + bad) // 2
        if passes(middle):
            good = middle
        else:
            bad = middle
    return good, bad


def _identity(probe: ProbeResult) -> tuple[str | None, str, str]:
    # Not what was said before: in a second turn that is the model's own first answer, which may differ.
    return probe.key, probe.kind, probe.question


def recall_by_key(probes: Iterable[ProbeResult]) -> dict[str, tuple[float, int]]:
    """Return each key's share of passed trained questions, and how many were asked."""
    asked: dict[str, list[bool]] = {}
    for probe in probes:
        if probe.kind == "trained" and probe.key is not None:
            asked.setdefault(probe.key, []).append(probe.passed)
    return {key: (sum(passed) / len(passed), len(passed)) for key, passed in asked.items()}


def _facts_as_pairs(pairs: Sequence[Pair]) -> dict[str, tuple[bool, bool]]:
    was, now = recall_by_key(was for was, _ in pairs), recall_by_key(now for _, now in pairs)
    return {key: (was[key][0] >= RECALLED_SHARE, now[key][0] >= RECALLED_SHARE) for key in now if key in was}


def _comparison(
    suite: str, verdicts: Sequence[tuple[bool, bool]], groups: Sequence[str], scorer: str, seed: int
) -> SuiteComparison:
    before, after = [was for was, _ in verdicts], [now for _, now in verdicts]
    n = len(verdicts)
    lost = sum(was and not now for was, now in verdicts)
    gained = sum(now and not was for was, now in verdicts)
    interval = bootstrap(before, after, groups=groups, seed=seed)
    assert interval is not None
    net: dict[str, int] = {}
    for group, (was, now) in zip(groups, verdicts, strict=True):
        net[group] = net.get(group, 0) + now - was
    p = mcnemar(sum(change < 0 for change in net.values()), sum(change > 0 for change in net.values()))
    shares = sum(before) / n, sum(after) / n
    return SuiteComparison(suite, n, len(set(groups)), *shares, interval.low, interval.high, lost, gained, p, p, scorer)
