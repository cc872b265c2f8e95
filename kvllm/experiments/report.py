"""An experiment's rows as a document that every report format lays out: findings, tables, plots.

Nothing is measured here; every sentence is made of the rows' numbers.

    document = experiment_document(declared, outcome); render(document, "html")
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

import kvllm
from kvllm.experiments.declared import UNTRAINED, Declared
from kvllm.experiments.runner import Outcome, in_words
from kvllm.experiments.statistics import (
    Loss,
    correlation,
    fit_retention,
    kind_test,
    paired_p,
    rank_test,
    ratio_test,
)
from kvllm.metrics import LEAK_RULE, mean, shown, shown_p
from kvllm.paired import Interval, bootstrap, holm, mcnemar, wilson
from kvllm.reports.document import Document, Origin, Section, Table
from kvllm.reports.plots import bars_plot, lines_plot

SCHEMA = "kvllm-experiment/1"
Row = Mapping[str, Any]
_SAME = 1e-9
# Share → its counts in a fact's row.
_NAMES = {
    "recalled": ("trained_right", "trained"),
    "generalized": ("paraphrases_right", "paraphrases"),
    "leak": ("leaked", "neighbours"),
    "unchanged": ("unchanged", "neighbours"),
}
_TITLES = {
    "injection": "Many facts: one by one, in chunks, or all at once?",
    "capacity": "Is there a limit, and who collides?",
    "factors": "Why does it work?",
    "editors": "The fine-tuning methods on one task",
}
_RECALLED = (
    "recalled: share of the asked trained questions whose live answer states the fact, with a 95 % Wilson interval of "
    "as many draws as there are facts, whose questions stand and fall together"
)
_FAILED_NOTE = "A fact whose training failed counts as not recalled; drift, steps and seconds are those of the others."
_REPAIRED = (
    "With replay an edit looks at the nearest older facts and repairs what it broke there: only a budget with replay 0 "
    "tests whether the nearest collide."
)


def _leak_rules(rows: Iterable[Row]) -> set[int]:
    """Return by which versions of `metrics.leaks` neighbours were judged; older code did not say so."""
    return {row.get("leak_rule", 1) for row in rows if "leak" in row or "leaked" in row}


def _columns_note(rows: Iterable[Row]) -> str:
    value = ", or with a short one's value" if max(_leak_rules(rows), default=LEAK_RULE) > 1 else ""
    return (
        f"{_RECALLED}; generalized: the same on paraphrases never trained on, with its interval; leak: share of "
        f"neighbour questions answered with most of the distinctive words of their own fact{value} (another fact's do "
        "not count, nor what the unedited model says: compare it at one number of facts); unchanged: share of "
        "neighbour answers that are the unedited model's, word for word. In-context: the unedited model with the "
        "nearest fact's text in the prompt, where its key is near enough to the question; drift is not measured "
        "where a general question gets one."
    )


def experiment_document(declared: Declared, outcome: Outcome) -> Document:
    """Return the document of a finished (or partly finished) experiment."""
    makers: dict[str, Callable[[Declared, Outcome], tuple[list[str], list[Section]]]] = {
        "injection": _injection,
        "capacity": _capacity,
        "factors": _factors,
        "editors": _editors,
    }
    findings, sections = makers[declared.kind](declared, outcome)
    done = {(row["run"], row["step"]) for row in outcome.rows}
    warnings = [f"The run {run} failed: {why}" for run, why in outcome.failed.items()]
    waiting = [run for run in outcome.unfinished if run not in outcome.failed]
    if waiting:
        warnings.append(f"{len(waiting)} of {len(outcome.runs)} runs are not finished: {', '.join(waiting)}.")
    whole = sum(len(run.steps) for run in outcome.runs)
    sessions = list(outcome.noted.get("sessions") or [])
    environments = [session["environment"] for session in sessions]
    model = dict(outcome.noted.get("model") or {})
    commits = list(dict.fromkeys(map(_commit_of, environments)))
    if len(commits) > 1:
        warnings.append(f"The runs were made by {len(commits)} versions of the code; see where they were measured.")
    for run in outcome.runs:
        threads = {str(s["environment"].get("threads")) for s in sessions if run.id in s["runs"]}
        if len(threads) > 1:
            warnings.append(f"The run {run.id} was made by sessions of {' and '.join(sorted(threads))} threads each.")
    if len(_leak_rules(outcome.rows)) > 1:
        warnings.append("Leaks were counted by two rules: rows of older code overlook the value of a short text.")
    made = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    measured = (
        ("experiment", f"{declared.name} ({declared.kind}), {len(outcome.runs)} runs, {whole} steps"),
        ("facts", f"{declared.n} of {len(declared.cases)}, sha256 {declared.facts_digest}"),
        ("seeds", ", ".join(map(str, declared.seeds))),
        ("base model", f"{model.get('name', '')} {model.get('digest', '')}"),
        ("commit", ", ".join(commits)),
        (
            "machine",
            "; ".join(
                dict.fromkeys(f"{e.get('cpu')}, {e.get('cpus')} cores, torch {e.get('torch')}" for e in environments)
            ),
        ),
        ("work", in_words(outcome.seconds)),
        ("made", f"{made} by kvllm {kvllm.__version__}"),
    )
    document = {
        "ok": not outcome.failed,
        "schema": SCHEMA,
        "experiment": dict(outcome.declared),
        "digest": declared.digest,
        "made": made,
        "environment": environments[0] if environments else {},
        "sessions": sessions,
        "model": model,
        "facts": {"n": declared.n, "of": len(declared.cases), "sha256": declared.facts_digest},
        "seconds": round(outcome.seconds, 3),
        "runs": [{"id": run.id, "arm": run.arm, "seed": run.seed, "steps": len(run.steps)} for run in outcome.runs],
        "steps_with_rows": len(done),
        "failed": dict(outcome.failed),
        "unfinished": list(outcome.unfinished),
        "findings": findings,
        "tables": [
            {
                "title": s.title,
                "columns": [c.lstrip(">") for c in s.table.columns],
                "rows": [list(r) for r in s.table.rows],
            }
            for s in sections
            if s.table is not None
        ],
        "rows": [dict(row) for row in outcome.rows],
    }
    if outcome.failed:
        document |= {"error": warnings[0], "code": "edit_failed"}
    origin = Origin(
        "", str(model.get("name", "")), str(model.get("digest", "")), 0, declared.n, kvllm.__version__, made
    )
    title = f"{_TITLES[declared.kind]} ({declared.name})"
    return Document(
        "experiment", title, origin, tuple(findings), (), {}, tuple(sections), tuple(warnings), document, measured
    )


# ------------------------------------------------------------------ question 1


def _commit_of(environment: Mapping[str, Any]) -> str:
    git = dict(environment.get("git") or {})
    return f"{git.get('commit') or 'unknown'}{' with changes' if git.get('changed') else ''}"


def _injection(declared: Declared, outcome: Outcome) -> tuple[list[str], list[Section]]:
    states = [row for row in outcome.rows if row["kind"] == "state"]
    facts = [row for row in outcome.rows if row["kind"] == "fact"]
    last = [row for row in states if row["facts"] == declared.n]
    keys = list(dict.fromkeys((row["arm"], row["after"]) for row in last))
    final = {key: [row for row in last if (row["arm"], row["after"]) == key] for key in keys}
    rows = []
    finished = [row for row in outcome.rows if row["run"] not in outcome.unfinished]
    steps = _steps_per_fact(finished, declared.n)
    for (arm, after), mine in final.items():
        edits = round(_mean(mine, "edits") or 0)
        live = _mean(mine, "live_bytes")
        rows.append(
            (
                _arm(arm, after),
                str(len(mine)),
                *_answer_cells(mine),
                *_drift_cells(mine),
                steps.get((arm, after), "–"),
                shown(_mean(mine, "train_seconds"), 1),
                shown((_mean(mine, "train_seconds") or 0.0) / declared.n, 1),
                f"{edits - 1} + 1" if after else str(edits),
                shown(((_mean(mine, "bytes") if live is None else live) or 0.0) / 1e6, 2),
            )
        )
    columns = (
        "arm", ">runs", *_ANSWER_COLUMNS, *_DRIFT_COLUMNS, ">steps per fact", ">train s", ">s per fact", ">edits",
        ">live delta MB",
    )  # fmt: skip
    note = f"{_columns_note(states)} A compacted arm's steps and seconds include those of the edits before it."
    sections = [Section(f"After {declared.n} facts", note, Table(columns, tuple(rows)))]
    sections += _curves(states)
    sections += _difficulty(facts, declared.n)
    compared, told = _against_sequential(facts, declared.n)
    sections += compared
    sections += _ages(outcome.rows, declared.n)
    # Arms of fewer seeds had other orders and trainings: they are not ranked among the others.
    whole = max((len(mine) for mine in final.values()), default=0)
    trained = {key: mine for key, mine in final.items() if key[0] not in UNTRAINED and len(mine) == whole}
    findings = []
    if len(trained) > 1:
        best = max(trained, key=lambda key: _merit(trained[key]))
        cheapest = min(trained, key=lambda key: _mean(trained[key], "train_seconds") or 0.0)
        findings.append(
            f"After {declared.n} facts {_arm(*best)} has the best harmonic mean of recall, generalization and absence "
            f"of leaks ({shown(_merit(trained[best]))}); {_arm(*cheapest)} trains the shortest "
            f"({shown((_mean(trained[cheapest], 'train_seconds') or 0.0) / declared.n, 1)} s per fact)."
        )
    return findings + told, sections


def _steps_per_fact(rows: Sequence[Row], n: int) -> dict[tuple[str, str], str]:
    """Return the optimizer steps of each arm's edits, shared out over its runs and facts."""
    found: dict[tuple[str, str], str] = {}
    edits = [row for row in rows if row["kind"] == "edit"]
    for arm in dict.fromkeys(row["arm"] for row in edits):
        mine = [row for row in edits if row["arm"] == arm]
        runs = len({row["seed"] for row in mine})
        found[arm, "compact"] = shown(sum(row["steps"] for row in mine) / runs / n, 1)
        found[arm, ""] = shown(sum(row["steps"] for row in mine if row["op"] != "compact") / runs / n, 1)
    return found


def _curves(states: Sequence[Row]) -> list[Section]:
    mine = [row for row in states if not row.get("after")]
    usual: dict[str, int] = {}
    for row in mine:
        usual[row["arm"]] = min(row["drift_n"], usual.get(row["arm"], row["drift_n"]))
    # The last state of some arms was measured on more questions, which are other questions.
    return _courses(mine, [row for row in mine if row["drift_n"] == usual[row["arm"]]])


def _difficulty(facts: Sequence[Row], n: int) -> list[Section]:
    mine = [row for row in facts if row["facts"] == n]
    kinds = [d for d in ("short", "long", "contradiction") if any(row["difficulty"] == d for row in mine)]
    if not kinds:
        return []
    rows = []
    for arm, after in dict.fromkeys((row["arm"], row["after"]) for row in mine):
        for kind in kinds:
            some = [r for r in mine if (r["arm"], r["after"], r["difficulty"]) == (arm, after, kind)]
            if some:
                shares = _shares(some)
                n_facts = len({r["key"] for r in some})
                rows.append((_arm(arm, after), kind, str(n_facts), *_share_cells(shares, n_facts)))
    columns = ("arm", "difficulty", ">facts", *_ANSWER_COLUMNS)
    return [Section("By difficulty", "Labels of the facts' file.", Table(columns, tuple(rows)))]


def _against_sequential(facts: Sequence[Row], n: int) -> tuple[list[Section], list[str]]:
    """Compare every arm with the first sequential one, fact by fact: the same facts in the same orders.

    The draws are facts: a fact's questions, and its seeds, stand and fall together.
    """
    mine = [row for row in facts if row["facts"] == n]
    arms = [key for key in dict.fromkeys((row["arm"], row["after"]) for row in mine) if key != ("sequential", "")]
    found: dict[tuple[str, str], tuple[int, int, int, float, Interval | None]] = {}
    for name in ("recalled", "generalized"):
        base = _counts(mine, "sequential", "", name)
        for arm, after in arms:
            other = _counts(mine, arm, after, name)
            if arm in UNTRAINED:  # of one seed: every seed of the other side is compared with it
                by_key = {key: value for (key, _), value in other.items()}
                other = {pair: by_key[pair[0]] for pair in base if pair[0] in by_key}
            shared = [pair for pair in base if pair in other]
            keys = list(dict.fromkeys(key for key, _ in shared))
            if not keys:
                continue
            change = dict.fromkeys(keys, 0.0)
            for pair in shared:
                change[pair[0]] += other[pair][0] / other[pair][1] - base[pair][0] / base[pair][1]
            lost = sum(value < -_SAME for value in change.values())
            gained = sum(value > _SAME for value in change.values())
            # Answers of one pair in any order: what is drawn is the fact with all of them.
            earlier = [place < base[p][0] for p in shared for place in range(base[p][1])]
            later = [place < other[p][0] for p in shared for place in range(base[p][1])]
            band = bootstrap(earlier, later, groups=[p[0] for p in shared for _ in range(base[p][1])])
            found[_arm(arm, after), name] = (len(keys), lost, gained, mcnemar(lost, gained), band)
    if not found:
        return [], []
    adjusted = holm({f"{arm}/{name}": p for (arm, name), (_, _, _, p, _) in found.items()})
    rows = tuple(
        (
            arm,
            name,
            str(n_facts),
            str(lost),
            str(gained),
            _interval(band),
            shown_p(p),
            shown_p(adjusted[f"{arm}/{name}"]),
        )
        for (arm, name), (n_facts, lost, gained, p, band) in found.items()
    )
    note = (
        "Facts of which the arm answers fewer (worse) or more (better) questions than `sequential`, all seeds of a "
        "fact together; exact sign test over facts, Holm's adjustment over the whole table; interval of the change of "
        "the share by a bootstrap that draws facts."
    )
    columns = ("arm", "of", ">facts", ">worse", ">better", ">95 % interval of the change", ">p", ">p (Holm)")
    trained = {key: value for key, value in found.items() if key[0] not in UNTRAINED}
    told = [
        f"{arm}: {name} of {gained} facts is better than by sequential insertion, of {lost} worse (n={n_facts}, "
        f"p={shown_p(adjusted[f'{arm}/{name}'])} after Holm)."
        for (arm, name), (n_facts, lost, gained, _, _) in trained.items()
        if adjusted[f"{arm}/{name}"] < 0.05
    ]
    if trained and not told:
        told = ["No trained arm differs from sequential insertion by more than chance would give (p ≥ 0.05, Holm)."]
    return [Section("Against sequential insertion", note, Table(columns, rows))], told


def _counts(facts: Sequence[Row], arm: str, after: str, name: str) -> dict[tuple[str, int], tuple[int, int]]:
    """Return an arm's (right, asked) of a share by fact and seed, where anything was asked."""
    right, asked = _NAMES[name]
    chosen = [row for row in facts if (row["arm"], row["after"]) == (arm, after) and row[asked]]
    return {(row["key"], row["seed"]): (row[right], row[asked]) for row in chosen}


def _ages(rows: Sequence[Row], n: int) -> list[Section]:
    # A fact whose edit failed has no age.
    failed = {(r["run"], r["key"]) for r in rows if r["kind"] == "failed"}
    facts = [r for r in rows if r["kind"] == "fact" and (r["run"], r["key"]) not in failed]
    mine = [r for r in facts if r["facts"] == n and not r["after"]]
    edges = sorted({0, *(n * share // 4 for share in (1, 2, 3)), n})
    series, told = [], []
    for arm in dict.fromkeys(row["arm"] for row in mine):
        if arm in UNTRAINED:  # nothing is taught, so that nothing has an age
            some = [row for row in mine if row["arm"] == arm]
            told.append((arm, "any", str(len(some)), *_share_cells(_shares(some), len(some))[:4]))
            continue
        points = []
        for low, high in pairwise(edges):
            some = [row for row in mine if row["arm"] == arm and low <= row["age"] < high]
            if some:
                shares = _shares(some)
                points.append(((low + high - 1) / 2, shares["recalled"][0] / max(1, shares["recalled"][1])))
                n_facts = len({row["key"] for row in some})
                told.append((arm, f"{low} to {high - 1}", str(n_facts), *_share_cells(shares, n_facts)[:4]))
        series.append((arm, points))
    figure = lines_plot(
        "ages", "Recall by age", series, x_label="facts taught after it", y_label="share recalled", most=1.0
    )
    columns = ("arm", "facts after it", ">facts", *_ANSWER_COLUMNS[:4])
    note = f"At the end, after {n} facts: how a fact's recall depends on how many came after its own edit."
    return [Section("Retention by age", note, Table(columns, tuple(told)), figure)] if told else []


# ------------------------------------------------------------------ question 2


def _capacity(declared: Declared, outcome: Outcome) -> tuple[list[str], list[Section]]:
    states = [row for row in outcome.rows if row["kind"] == "state"]
    arms = list(dict.fromkeys(row["arm"] for row in states))
    findings, rows = [], []
    for arm in arms:
        mine = [row for row in states if row["arm"] == arm]
        # Runs may give up at different points: each has its own last state.
        last = [max((r for r in mine if r["run"] == run), key=_facts) for run in dict.fromkeys(r["run"] for r in mine)]
        reached = " and ".join(str(n) for n in sorted({row["facts"] for row in last}))
        edited = arm not in UNTRAINED
        half, band = _half(outcome.rows, arm) if edited else ("–", "–")
        bits, adapter = _mean(last, "bits"), _mean(last, "adapter_parameters")
        matrices = _mean(last, "matrix_parameters")
        rows.append(
            (
                arm,
                reached,
                *_answer_cells(last),
                *_drift_cells(last),
                " and ".join(str(n) for n in sorted({row["drift_n"] for row in last})),
                half,
                band,
                shown(bits, 0),
                shown(bits / adapter, 5) if bits is not None and adapter else "–",
                shown(bits / matrices, 6) if bits is not None and matrices else "–",
            )
        )
        if edited:
            if half == "–":
                told = "where half are recalled cannot be said"
            else:
                told = f"{half} facts" if band == "–" else f"half are recalled at {half} facts (95 % interval {band})"
            findings.append(f"{arm}: {shown(_mean(last, 'recalled'))} recalled after {reached} facts; {told}.")
    columns: tuple[str, ...] = (
        "budget", ">facts", *_ANSWER_COLUMNS, *_DRIFT_COLUMNS, ">drift n", ">half at", ">95 %", ">bits",
        ">bits per adapter parameter",
        ">bits per matrix parameter",
    )  # fmt: skip
    note = (
        f"{_columns_note(outcome.rows)} Drift n: prompts that drift_kl is measured on, more at a budget's last "
        "state. Half at: facts at which half are recalled, by a logistic fit over the logarithm of their "
        "number, with a bootstrap interval that draws facts; a dash where the curve does not fall. Bits: by how much "
        "less surprising the taught texts are than to the base (teacher-forced), less what as many untaught texts "
        "gain: the sentences that all invented facts share. Adapter parameters: without a file's padding."
    )
    sections = [Section("At the last state of each budget", note, Table(columns, tuple(rows)))]
    # Drift on other questions is another number: the plot holds what was measured on as many.
    usual = Counter(row["drift_n"] for row in states).most_common(1)
    alike = [row for row in states if [row["drift_n"]] == [n for n, _ in usual]]
    sections += _courses(states, alike)
    who, collided = _collisions(declared, outcome)
    return findings + collided, [*sections, *who]


def _courses(states: Sequence[Row], alike: Sequence[Row]) -> list[Section]:
    """Return the plots of recall, and of drift in the states that were measured on as many questions."""
    alike = [row for row in alike if not row.get("general_noted")]
    recall = _course(states, "recalled", "Recall of all facts so far", "share recalled", most=1.0)
    return [*recall, *_course(alike, "drift_kl", "Drift", "drift_kl (nats per token)")]


def _course(states: Sequence[Row], name: str, title: str, label: str, *, most: float | None = None) -> list[Section]:
    """Return the plot of a measurement over the number of facts, one line an arm, and its table."""
    series = []
    for arm in dict.fromkeys(row["arm"] for row in states):
        mine = [row for row in states if row["arm"] == arm and row[name] is not None]
        points = sorted({row["facts"] for row in mine})
        series.append((arm, [(float(n), _mean([r for r in mine if r["facts"] == n], name) or 0.0) for n in points]))
    figure = lines_plot(name, title, series, x_label="facts", y_label=label, most=most)
    if figure is None:
        return []
    cells = tuple((arm, str(int(x)), shown(y)) for arm, points in series for x, y in points)
    return [Section(title, "", Table(("arm", ">facts", f">{name}"), cells), figure, minor=True)]


def _facts(row: Row) -> int:
    return int(row["facts"])


def _half(rows: Sequence[Row], arm: str) -> tuple[str, str]:
    """Return where half of a budget's facts are recalled, and the interval of that; dashes where it cannot be said."""
    answers: dict[Hashable, list[tuple[int, int, int]]] = {}
    for row in rows:
        if row["kind"] == "fact" and row["arm"] == arm:
            answers.setdefault(row["key"], []).append((row["facts"], row["trained_right"], row["trained"]))
    fit = fit_retention(answers)
    if fit is None:
        return "–", "–"
    if fit.half is None:
        return f"not below half up to {fit.last}", "–"
    low = f"over {fit.last}" if fit.low is None else f"{fit.low:.0f}"
    return f"{fit.half:.0f}", f"{low} to {f'over {fit.last}' if fit.high is None else f'{fit.high:.0f}'}"


def _collisions(declared: Declared, outcome: Outcome) -> tuple[list[Section], list[str]]:
    """Set lost facts against chance, budget by budget: budgets share facts and order, so that none are put together."""
    asked = {row["arm"] for row in outcome.rows if row["kind"] == "state"}
    replays = {
        run.arm: declared.edit_config(seed=0, **dict(run.settings.get("edit", {}))).replay
        for run in outcome.runs
        if run.arm not in UNTRAINED and run.arm in asked
    }
    if not replays:
        return [], []
    losses = {arm: [r for r in outcome.rows if r["kind"] == "loss" and r["arm"] == arm] for arm in replays}
    found = {
        f"{arm}, by {what}": (arm, what, test)
        for arm, mine in losses.items()
        for name, what in (("encoder", "encoder"), ("hidden", "hidden states"))
        for test in [rank_test([Loss(r[f"rank_{name}"], r["candidates"], r["edit"]) for r in mine])]
        if test is not None
    }
    adjusted = holm({name: test.p_value for name, (_, _, test) in found.items()})
    rows = tuple(
        (
            arm,
            what,
            str(replays[arm]),
            str(test.n),
            shown(test.mean),
            shown_p(test.p_value),
            shown_p(adjusted[name]),
            f"{test.nearest} ({shown(test.expected_nearest, 1)})",
            shown(mean(r["age"] for r in losses[arm]), 1),
        )
        for name, (arm, what, test) in found.items()
    )
    free = [arm for arm, replay in replays.items() if replay == 0]
    told = []
    for arm in free or replays:
        if not losses[arm]:
            told.append(f"{arm}: no fact was lost, so that nothing can be said of collisions.")
    for name, (arm, what, test) in found.items():
        if free and arm not in free:
            continue
        side = "nearer than chance" if test.mean < 0.5 else "farther than chance"
        told.append(
            f"{arm}: lost facts are {side if adjusted[name] < 0.05 else 'neither nearer nor farther than chance'} "
            f"to the edit that broke them, by {what}: mean relative rank {shown(test.mean)} (0.5 is chance), "
            f"p={shown_p(adjusted[name])} after Holm, n={test.n}; the very nearest was lost {test.nearest} times, "
            f"by chance {shown(test.expected_nearest, 1)}.{' ' + _REPAIRED if replays[arm] else ''}"
        )
    columns = (
        "budget",
        "similarity by",
        ">replay",
        ">losses",
        ">mean relative rank",
        ">p",
        ">p (Holm)",
        ">nearest of all (chance)",
        ">mean age",
    )
    note = (
        "Each fact that is lost for the first time is ranked among all that were recited before the edit and had never "
        "been lost, the nearest to the edit's key first. p: twice the share of random losses with a mean rank as far "
        "on this side (two-sided, Monte Carlo); Holm over all rows. "
        f"Watched after every edit, teacher-forced: every token the greedy choice. {_REPAIRED}"
    )
    beyond, of_kind = _beyond_kind(losses)
    return [Section("Who is lost", note, Table(columns, rows)), *beyond], told + of_kind


def _beyond_kind(losses: Mapping[str, Sequence[Row]]) -> tuple[list[Section], list[str]]:
    """Take kind and nearness apart: are losses of the edit's kind, and are they the nearest of those that are?"""
    kinds, ranks = {}, {}
    for arm, every in losses.items():
        mine = [row for row in every if "peers" in row]
        edits = [[row for row in mine if row["edit"] == edit] for edit in dict.fromkeys(row["edit"] for row in mine)]
        kind = kind_test([(sum(r["same_kind"] for r in e), len(e), e[0]["of_kind"], e[0]["candidates"]) for e in edits])
        if kind is None:
            continue
        kinds[arm] = kind
        for name, what in (("encoder", "encoder"), ("hidden", "hidden states")):
            for same in (True, False):
                peers = [r for r in mine if r["same_kind"] == same]
                test = rank_test([Loss(r[f"peer_rank_{name}"], r["peers"], r["edit"]) for r in peers])
                if test is not None:
                    ranks[arm, what, "its own kind" if same else "other kinds"] = test
    adjusted = holm({"/".join(name): test.p_value for name, test in ranks.items()})
    rows = tuple(
        (arm, what, among, str(t.n), shown(t.mean), shown_p(t.p_value), shown_p(adjusted[f"{arm}/{what}/{among}"]),
         f"{t.nearest} ({shown(t.expected_nearest, 1)})")
        for (arm, what, among), t in ranks.items()
    )  # fmt: skip
    told = [
        f"{arm}: {kind.same} of {kind.n} lost facts are of the kind of the edit that broke them, by chance "
        f"{shown(kind.expected, 1)} (p={shown_p(kind.p_value)})."
        for arm, kind in kinds.items()
    ]
    for (arm, what, among), test in ranks.items():
        if adjusted[f"{arm}/{what}/{among}"] < 0.05:
            side = "nearer" if test.mean < 0.5 else "farther"
            told.append(
                f"{arm}: among {among}, lost facts are {side} than chance by {what}: mean relative rank "
                f"{shown(test.mean)}, p={shown_p(adjusted[f'{arm}/{what}/{among}'])} after Holm, n={test.n}."
            )
    if ranks and len(told) == len(kinds):
        told.append("Within a kind, and among the other kinds, nearness says nothing of who is lost (p ≥ 0.05, Holm).")
    columns = (
        "budget", "similarity by", "among", ">losses", ">mean relative rank", ">p", ">p (Holm)",
        ">nearest of all (chance)",
    )  # fmt: skip
    note = (
        "Invented facts of one kind share the mould of key, question and text, so that the nearest are of one kind. "
        "Here a lost fact is ranked among those alone that are of the edit's kind as it is, or of another as it is: "
        "what is nearer than chance here is so beyond the kind. Tests as above."
    )
    return [Section("Who is lost, beyond the kind", note, Table(columns, rows))] if rows else [], told


# ------------------------------------------------------------------ question 3


def _factors(declared: Declared, outcome: Outcome) -> tuple[list[str], list[Section]]:
    sections: list[Section] = []
    verdicts: list[tuple[str, ...]] = []
    plain = [row for row in outcome.rows if row["kind"] == "rank" and row["arm"] in UNTRAINED]
    keys = [row for row in outcome.rows if row["kind"] == "key"]
    noise = [row for row in outcome.rows if row["kind"] == "noise"]
    rank = [row for row in outcome.rows if row["kind"] == "rank" and row not in plain]
    if keys:
        untaught = [row for row in outcome.rows if row["kind"] == "key, untaught"]
        sections += _key_sections(keys, untaught, _of_part(outcome, "keys"))
        verdicts.append(_key_verdict(keys))
    if noise:
        sections += _noise_sections(plain, noise, _of_part(outcome, "noise"))
        verdicts.append(_noise_verdict(noise, declared.edit_config(seed=0).depth))
    failed = _of_part(outcome, "rank")
    if rank or failed:
        sections += _rank_sections(plain, rank, failed)
        verdicts += [*_rank_verdicts(rank), _editor_verdict(rank), _dropout_verdict(rank)]
    note = (
        "One rule per explanation: it survives, does not, or was not decided (p ≥ 0.05). "
        "Distinct inputs: the farther a key, the less damage, among the keys of one known thing. Robust residual "
        "networks: random changes of layers of the edited band cost no more, per squared norm, than the same fact's "
        "real change of that layer. Low rank regularises: the higher the rank (full fine-tuning last), the more drift, "
        "among one fact's edits that reached the stop; beside it the same among all that recall the fact."
    )
    columns = ("explanation", "measured", ">number", ">p", ">n", "verdict")
    table = Section("Which explanation survives", note, Table(columns, tuple(verdicts)))
    return [f"{v[0]}: {v[5]} ({v[1]} {v[2]}, p={v[3]}, n={v[4]})." for v in verdicts], [table, *sections]


def _of_part(outcome: Outcome, part: str) -> list[Row]:
    return [row for row in outcome.rows if row["kind"] == "failed" and row["part"] == part]


def _untaught(failed: Sequence[Row]) -> str:
    """Return a sentence on edits that failed, where there are any."""
    return (
        f" Training failed, and nothing was measured, of: {', '.join(row['key'] for row in failed)}." if failed else ""
    )


def _key_sections(keys: Sequence[Row], untaught: Sequence[Row], failed: Sequence[Row]) -> list[Section]:
    beside = {(row["arm"], row["known"], row["key"]): row["recalled"] for row in untaught}
    rows = tuple(
        (
            str(row["known"]),
            str(row["key"]),
            shown(row["distance_encoder"]),
            shown(row["distance_hidden"]),
            shown(row["recalled"]),
            *(shown(beside.get((arm, row["known"], row["key"]))) for arm in UNTRAINED),
            shown(row["near_kl"]),
            f"{row['near_changed']} of {row['near_n']}",
            f"{row['near_recited']} of {row['near_n']}",
            shown(row["drift_kl"]),
            str(row["steps"]),
        )
        for row in keys
    )
    columns = (
        "known thing", "key taught", ">distance (encoder)", ">distance (hidden)", ">recalled",
        *(f">{arm}" for arm in UNTRAINED), ">KL on the known thing",
        ">answers changed", ">recite", ">drift_kl", ">steps",
    )  # fmt: skip
    series = []
    for known in dict.fromkeys(row["known"] for row in keys):
        mine = [row for row in keys if row["known"] == known]
        series.append((str(known), [(10 * row["distance_encoder"], row["near_kl"]) for row in mine]))
    figure = lines_plot(
        "keys", "Damage to the known thing", series, x_label="distance of the taught key (tenths)", y_label="KL (nats)"
    )
    note = (
        "Each key is taught alone; damage is measured on questions about the known thing that it may be near. Unedited "
        "and in-context: recalled by the unedited model, and with the nearest text of all keys in the prompt."
    )
    note += _untaught(failed)
    return [Section("Distinctness of keys against damage", note, Table(columns, rows), figure)]


def _key_verdict(keys: Sequence[Row]) -> tuple[str, ...]:
    what = "mean Spearman of distance and damage within a known thing"
    groups = [[row for row in keys if row["known"] == known] for known in dict.fromkeys(row["known"] for row in keys)]
    found = correlation(([r["distance_encoder"] for r in g], [r["near_kl"] for r in g]) for g in groups)
    if found is None:
        return ("distinct inputs", what, "–", "–", str(len(keys)), "not decided: too few")
    number = f"{shown(found.rho)} ({shown(found.lowest)} to {shown(found.highest)} by thing)"
    n = f"{found.n} keys in {found.groups} groups"
    return ("distinct inputs", what, number, shown_p(found.p_value), n, _verdict(found.rho < 0, found.p_value))


def _verdict(holds: bool, p_value: float | None) -> str:
    """Return what follows from a number on one side or the other, and its p-value."""
    if p_value is None:
        return "not decided: too few"
    return "not decided" if p_value >= 0.05 else "survives" if holds else "does not survive"


def _noise_sections(plain: Sequence[Row], noise: Sequence[Row], failed: Sequence[Row]) -> list[Section]:
    order = dict.fromkeys((row["noise"], row.get("depth"), row["scale"]) for row in noise)
    rows = [
        (
            row["arm"],
            "",
            "",
            str(row["facts"]),
            "",
            *_drift_cells([row]),
            shown(row["recalled"]),
        )
        for row in plain
    ]
    for kind, depth, scale in order:
        mine = [r for r in noise if (r["noise"], r.get("depth"), r["scale"]) == (kind, depth, scale)]
        recalled = [r["recalled"] for r in mine if r.get("recalled") is not None]
        rows.append(
            (
                kind,
                "" if depth is None else shown(depth, 2),
                f"×{scale:g}",
                str(len(mine)),
                shown(_mean(mine, "size"), 2),
                shown(_mean(mine, "drift_kl"), 4),
                shown(_mean(mine, "ppl_ratio")),
                f"{sum(r['qa_lost'] for r in mine)} of {sum(r['qa_known'] for r in mine)}",
                shown(mean(recalled)),
            )
        )
    columns = (
        "change",
        ">depth",
        ">scale",
        ">n",
        ">norm",
        ">drift_kl",
        ">ppl_ratio",
        ">known answers lost",
        ">recalled",
    )
    series = []
    for depth in dict.fromkeys(row["depth"] for row in noise if "depth" in row):
        some = [row for row in noise if row.get("depth") == depth and row["noise"] == "gaussian"]
        points = [
            (float(scale), _mean([r for r in some if r["scale"] == scale], "drift_kl") or 0.0)
            for scale in sorted({r["scale"] for r in some})
        ]
        series.append((f"depth {shown(depth, 2)}", points))
    figure = lines_plot(
        "noise", "Drift under gaussian noise", series, x_label="norm, in real layers' norms", y_label="drift_kl (nats)"
    )
    note = (
        "A random change of one layer, as large as a real delta is in one layer (times scale); recalled: with the real "
        f"edit in place beside it.{_untaught(failed)}"
    )
    return [Section("Random changes of the same norm", note, Table(columns, tuple(rows)), figure)]


def _noise_verdict(noise: Sequence[Row], band: tuple[float, float]) -> tuple[str, ...]:
    """Set each fact's noise against the real change of the same layer; facts are the independent values.

    Small changes drift by the square of their norm, and real layers' norms differ: both sides are taken per squared
    norm. Noise in a layer that the edit left alone is set against the geometric mean of the fact's real layers.
    """
    name = "robust residual networks"
    what = "drift_kl per squared norm of noise over that of the same fact's real change there, geometric mean"
    ratios: dict[float, dict[str, list[float]]] = {}
    for key in dict.fromkeys(row["key"] for row in noise):
        mine = [row for row in noise if row["key"] == key]
        real = {r["layer"]: _log_cost(r) for r in mine if r["noise"].startswith("real delta, its layers")}
        for row in mine:
            if real and row.get("depth") is not None and row["scale"] == 1.0:
                logs = ratios.setdefault(row["depth"], {}).setdefault(key, [])
                logs.append(_log_cost(row) - real.get(row["layer"], sum(real.values()) / len(real)))
    own: dict[str, list[float]] = {}
    for depth, by_fact in ratios.items():
        if band[0] <= depth < band[1]:
            for key, logs in by_fact.items():
                own.setdefault(key, []).extend(logs)
    found = ratio_test([math.exp(sum(logs) / len(logs)) for logs in own.values()])
    if found is None:
        return (name, what, "–", "–", "0", "not decided: no noise within the edited band")
    by_depth = [
        math.exp(mean(sum(logs) / len(logs) for logs in by_fact.values()) or 0.0) for by_fact in ratios.values()
    ]
    number = f"×{shown(found.mean, 2)} (×{shown(min(by_depth), 2)} to ×{shown(max(by_depth), 2)} over all depths)"
    p = "–" if found.p_value is None else shown_p(found.p_value)
    return (name, what, number, p, f"{found.n} facts", _verdict(found.mean <= 1, found.p_value))


def _log_cost(row: Row) -> float:
    """Return the logarithm of a change's drift_kl per squared norm."""
    return math.log(max(row["drift_kl"], 5e-7)) - 2 * math.log(max(row["size"], 1e-4))  # as fine as rows are rounded


def _rank_sections(plain: Sequence[Row], rank: Sequence[Row], failed: Sequence[Row]) -> list[Section]:
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in [*plain, *rank, *failed]):
        mine = [row for row in [*plain, *rank] if row["arm"] == arm]
        lost = [row for row in failed if row["arm"] == arm]
        rows.append(
            (
                arm,
                _of_taught(sum(row["facts"] for row in mine), len(lost)),
                *_answer_cells([*mine, *lost], sum(row["facts"] for row in mine) + len(lost)),
                *_drift_cells(mine),
                shown(_mean(mine, "effective_rank"), 1),
                shown(_mean(mine, "norm"), 1),
                shown(_mean(mine, "steps"), 1),
                shown(_mean(mine, "train_seconds"), 1),
                shown((_mean(mine, "bytes") or 0.0) / 1e6, 2),
            )
        )
    columns = (
        "editor", ">facts", *_ANSWER_COLUMNS, *_DRIFT_COLUMNS, ">effective rank", ">norm", ">steps", ">train s", ">MB",
    )  # fmt: skip
    told = _columns_note([*plain, *rank, *failed])
    note = f"Single edits from the base, all trained to the same stop rule. {_FAILED_NOTE} {told}"
    loras = [row for row in rank if row.get("declared_rank") and not row["dropout"]]
    points = [
        (float(r), _mean([row for row in loras if row["declared_rank"] == r], "drift_kl") or 0.0)
        for r in sorted({row["declared_rank"] for row in loras})
    ]
    full = [row for row in rank if row["editor"] == "full" and not row["dropout"]]
    series = [("LoRA", points)]
    if full and points:
        level = _mean(full, "drift_kl") or 0.0
        series.append(("full fine-tuning", [(points[0][0], level), (points[-1][0], level)]))
    figure = lines_plot("rank", "Drift by rank", series, x_label="rank", y_label="drift_kl (nats per token)")
    return [Section("Low rank against full fine-tuning", note, Table(columns, tuple(rows)), figure)]


def _rank_verdicts(rank: Sequence[Row]) -> list[tuple[str, ...]]:
    ladder = [r for r in rank if not r["dropout"] and (r["declared_rank"] or r["editor"] == "full")]
    return [
        _rank_verdict("low rank regularises", ladder, [r for r in ladder if r["trained"]], "not trained to the stop"),
        _rank_verdict(
            "low rank, at equal recall", ladder, [r for r in ladder if r["recalled"] == 1.0], "that do not recall all"
        ),
    ]


def _rank_verdict(name: str, ladder: Sequence[Row], used: Sequence[Row], others: str) -> tuple[str, ...]:
    what = "mean Spearman of rank and drift_kl within a fact"
    groups = [[row for row in used if row["key"] == key] for key in dict.fromkeys(row["key"] for row in used)]
    found = correlation(([r["declared_rank"] or math.inf for r in g], [r["drift_kl"] for r in g]) for g in groups)
    left_out = f"{len(ladder) - len(used)} {others} left out"
    if found is None:
        return (name, what, "–", "–", f"0 facts, {left_out}", "not decided: too few")
    number = f"{shown(found.rho)} ({shown(found.lowest)} to {shown(found.highest)} by fact)"
    n = f"{found.n} edits of {found.groups} facts, {left_out}"
    return (name, what, number, shown_p(found.p_value), n, _verdict(found.rho > 0, found.p_value))


def _editor_verdict(rank: Sequence[Row]) -> tuple[str, ...]:
    """Compare AdaLoRA with full fine-tuning on the facts that both were trained on to the stop."""
    full, low = (
        {row["key"]: row for row in rank if row["editor"] == editor and not row["dropout"]}
        for editor in ("full", "adalora")
    )
    pairs = [(full[key], low[key]) for key in full if key in low]
    trained = [(a, b) for a, b in pairs if a["trained"] and b["trained"]]
    name, what = "AdaLoRA beside full fine-tuning", "drift_kl of full fine-tuning less AdaLoRA's, fact by fact"
    return _difference(name, what, [a["drift_kl"] - b["drift_kl"] for a, b in trained], len(pairs) - len(trained))


def _dropout_verdict(rank: Sequence[Row]) -> tuple[str, ...]:
    """Compare dropout with none, by the mean over the editors that have both; a fact is one value."""
    plain = {_same(row): row for row in rank if not row["dropout"]}
    pairs = [(plain[same], row) for row in rank if row["dropout"] for same in [_same(row)] if same in plain]
    differences: dict[str, list[float]] = {}
    for without, row in pairs:
        if without["trained"] and row["trained"]:
            differences.setdefault(row["key"], []).append(without["drift_kl"] - row["drift_kl"])
    left_out = len(pairs) - sum(map(len, differences.values()))
    what = "drift_kl without dropout less that with it, fact by fact"
    return _difference("dropout", what, [mean(found) or 0.0 for found in differences.values()], left_out)


def _same(row: Row) -> tuple[Any, ...]:
    return row["key"], row["editor"], row["declared_rank"]


def _difference(name: str, what: str, differences: Sequence[float], left_out: int) -> tuple[str, ...]:
    p, size = paired_p(differences), mean(differences)
    more = "has less drift" if (size or 0.0) > 0 else "has more drift"
    n = f"{len(differences)} facts, {left_out} pairs not trained to the stop left out"
    verdict = "not decided: too few" if p is None else "not decided" if p >= 0.05 else more
    return (name, what, shown(size, 4), "–" if p is None else shown_p(p), n, verdict)


# ------------------------------------------------------------------ editors

# What a picture of the methods shows: more is better in each.
_DRAWN = ("recalled", "generalized", "unchanged")


def _editors(declared: Declared, outcome: Outcome) -> tuple[list[str], list[Section]]:
    rows, findings, bars = [], [], []
    for arm in dict.fromkeys(run.arm for run in outcome.runs):
        facts = [row for row in outcome.rows if row["arm"] == arm and row["kind"] == "fact"]
        drift = [row for row in outcome.rows if row["arm"] == arm and row["kind"] == "drift"]
        routing = [row for row in outcome.rows if row["arm"] == arm and row["kind"] == "routing"]
        failed = [row for row in outcome.rows if row["arm"] == arm and row["kind"] == "failed"]
        if not facts and not failed:
            continue
        shares = _shares([*facts, *failed])
        routed = (
            f"{sum(r['routed_right'] for r in routing)} of {sum(r['routed_n'] for r in routing)}" if routing else ""
        )
        stray = (
            f"{sum(r['general_routed'] for r in routing)} of {sum(r['general_n'] for r in routing)}" if routing else ""
        )
        rows.append(
            (
                arm,
                _of_taught(len(facts), len(failed)),
                *_share_cells(shares, len({row["key"] for row in [*facts, *failed]})),
                *(_drift_cells(drift) if any("drift_kl" in row for row in drift) else (_kept_drift(routing), "", "")),
                shown(_mean(drift, "steps"), 1),
                shown(_mean(drift, "train_seconds"), 1),
                shown((_mean(drift, "bytes") or 0.0) / 1000, 1),
                routed,
                stray,
            )
        )
        bars.append((arm, [right / n if n else None for right, n in map(shares.__getitem__, _DRAWN)]))
        right, n = shares["recalled"]
        findings.append(
            f"{arm}: {shown(right / n if n else None)} recalled, {shown(_mean(drift, 'train_seconds'), 1)} s per fact."
        )
    columns = (
        "method", ">facts", *_ANSWER_COLUMNS, *_DRIFT_COLUMNS, ">steps", ">s per fact", ">kB per fact", ">routed right",
        ">general routed",
    )  # fmt: skip
    note = (
        f"{_columns_note(outcome.rows)} {_FAILED_NOTE} Merged methods: each fact is a single edit from the base. "
        "Prompt tuning, prefix tuning and P-tuning: one adapter a fact, all at once; a question gets the nearest key's "
        "adapter if it is near enough (routed right: questions about a fact that got its own; general routed: general "
        "questions that got any; where one does, drift is not none, and is not measured)."
    )
    title = "What each method teaches, and what it leaves alone"
    figure = bars_plot("methods", title, _DRAWN, bars, x_label="share of the questions asked")
    shown_too = "The shares of the table above: of a perfect editor every bar is full."
    return findings, [Section("Methods", note, Table(columns, tuple(rows))), Section(title, shown_too, figure=figure)]


def _kept_drift(routing: Sequence[Row]) -> str:
    """Return the drift of adapters that are kept: none, as long as no general question gets one."""
    if not routing:
        return "–"
    return "not measured" if any(row["general_routed"] for row in routing) else "0 (not merged)"


# ------------------------------------------------------------------ cells

_ANSWER_COLUMNS = (">recalled", ">95 %", ">generalized", ">95 % of it", ">leak", ">unchanged")
_DRIFT_COLUMNS = (">drift_kl", ">ppl_ratio", ">known answers lost")


def _shares(facts: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Return (right, asked) of fact rows."""
    return {name: (sum(r[a] for r in facts), sum(r[b] for r in facts)) for name, (a, b) in _NAMES.items()}


def _answer_cells(states: Sequence[Row], facts: int | None = None) -> tuple[str, ...]:
    """Return the cells of state rows, whose shares carry their n: of so many facts, by default as in the largest."""
    counts = {
        "recalled": "recalled_n",
        "generalized": "generalized_n",
        "leak": "neighbours_n",
        "unchanged": "neighbours_n",
    }
    found = {
        name: (round(sum((r[name] or 0.0) * r[n] for r in states)), sum(r[n] for r in states))
        for name, n in counts.items()
    }
    return _share_cells(found, max((int(row["facts"]) for row in states), default=None) if facts is None else facts)


def _share_cells(shares: Mapping[str, tuple[int, int]], facts: int | None = None) -> tuple[str, ...]:
    """Return the cells of shares of questions about so many facts; by default every question is its own draw."""
    cells = {name: shown(a / b) if b else "–" for name, (a, b) in shares.items()}
    bands = [_band(*shares[name], facts) for name in ("recalled", "generalized")]
    return (cells["recalled"], bands[0], cells["generalized"], bands[1], cells["leak"], cells["unchanged"])


def _band(right: int, n: int, facts: int | None) -> str:
    """Return the interval of a share of n questions, with no more draws than there are facts."""
    draws = n if facts is None else min(n, facts)
    return _interval(wilson(round(right / n * draws), draws) if n else None)


def _interval(band: Interval | None) -> str:
    return "" if band is None else f"{shown(band.low)} to {shown(band.high)}"


def _of_taught(trained: int, failed: int) -> str:
    """Return how many facts were trained, and where training failed, of how many."""
    return f"{trained} of {trained + failed} taught" if failed else str(trained)


def _drift_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    if any(row.get("general_noted") for row in rows):  # the weights are the base's, and some prompts are not
        return "not measured", "", ""
    lost, known = (sum(row.get(name, 0) for row in rows) for name in ("qa_lost", "qa_known"))
    return shown(_mean(rows, "drift_kl")), shown(_mean(rows, "ppl_ratio")), f"{lost} of {known}"


def _mean(rows: Iterable[Row], name: str) -> float | None:
    return mean(float(row[name]) for row in rows if row.get(name) is not None)


def _merit(states: Sequence[Row]) -> float:
    from kvllm.metrics import harmonic_mean

    leak = _mean(states, "leak")
    three = [_mean(states, "recalled"), _mean(states, "generalized"), None if leak is None else 1 - leak]
    return harmonic_mean([value for value in three if value is not None])


def _arm(arm: str, after: str) -> str:
    return f"{arm}, compacted" if after else arm
