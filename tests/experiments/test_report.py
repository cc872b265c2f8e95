"""Reports on rows made by hand: the numbers of each table, and the verdicts that follow from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from kvllm.errors import EditFailed
from kvllm.experiments.bench import failed_row, judged, shares
from kvllm.experiments.declared import Declared, Run, declare
from kvllm.experiments.facts import Case
from kvllm.experiments.report import experiment_document
from kvllm.experiments.runner import Outcome
from kvllm.metrics import LEAK_RULE
from kvllm.probing.suites import Probe
from kvllm.records import Fact
from kvllm.reports.document import Document
from kvllm.reports.render import render

DRIFT = {"drift_kl": 0.02, "drift_n": 10, "ppl_ratio": 1.01, "qa_known": 20, "qa_lost": 1, "qa_accuracy": 0.5}
COUNTS = {"trained": 2, "trained_right": 2, "paraphrases": 2, "paraphrases_right": 1, "neighbours": 2, "leaked": 0}


def document(
    kind: str, rows: Sequence[dict[str, Any]], n: int = 6, edits: dict[str, Any] | None = None, **settings: Any
) -> Document:
    declared: Declared = declare({"kind": kind, "invented": n, "n": n, "settings": settings})
    runs = [
        Run(f"{row['arm']}-{row['seed']}", row["arm"], row["seed"], ("s",), {"edit": (edits or {}).get(row["arm"], {})})
        for row in rows
    ]
    unique = tuple({run.id: run for run in runs}.values())
    whole = tuple({"run": f"{row['arm']}-{row['seed']}", "step": "s", **row} for row in rows)
    return experiment_document(declared, Outcome(declared.configuration(), unique, whole, {}, 60.0, {}, ()))


def table(found: Document, title: str) -> list[dict[str, str]]:
    (section,) = [s for s in found.sections if s.title == title]
    assert section.table is not None
    columns = [name.lstrip(">") for name in section.table.columns]
    return [dict(zip(columns, row, strict=True)) for row in section.table.rows]


def shared(recalled: float) -> dict[str, Any]:
    return {
        "recalled": recalled, "recalled_n": 12, "generalized": 0.5, "generalized_n": 12, "leak": 0.25,
        "unchanged": 0.75, "neighbours_n": 12,
    }  # fmt: skip


def injection_rows(arm: str, right: int, seconds: float, after: str = "") -> list[dict[str, Any]]:
    base = {"arm": arm, "seed": 0, "after": after, "facts": 6}
    facts = [
        {**base, "kind": "fact", "key": f"k{i}", "difficulty": ("short", "long")[i % 2], "place": i, "age": 5 - i,
         "edits_after": 5 - i, "unchanged": 1, **COUNTS, "trained_right": 2 if i < right else 0}
        for i in range(6)
    ]  # fmt: skip
    state = {**base, "kind": "state", **shared(right / 6), **DRIFT, "edits": 6, "bytes": 2_000_000}
    return [*facts, state | {"train_seconds": seconds}]


@pytest.mark.parametrize(
    ("answer", "leaked"),
    [("The capital of Germany is Lyon.", 1), ("The capital of Germany is Nice.", 0), ("It is Berlin, not Lyon.", 0)],
)
def test_a_neighbour_that_gets_the_facts_value_leaks(answer: str, leaked: int) -> None:
    case = Case(Fact("capital of France", "The capital of France is Lyon."))
    probe = Probe("neighbour", "What is the capital of Germany?", case.fact.text, case.key)
    base: Any = SimpleNamespace(base_answers=lambda probes: {(p.question, p.expected): "It is Nice." for p in probes})
    if "not" in answer:  # the unedited model says so, too
        base = SimpleNamespace(base_answers=lambda probes: {(p.question, p.expected): answer for p in probes})
    (row,) = judged(base, [case], [(case, probe)], [answer])
    assert (row["leaked"], row["neighbours"], row["leak_rule"]) == (leaked, 1, LEAK_RULE)
    assert (shares([row])["leak"], shares([row])["leak_rule"]) == (leaked, LEAK_RULE)


def test_rows_of_an_older_rule_about_leaks_are_named() -> None:
    def noted(*rules: dict[str, Any]) -> tuple[Document, str]:
        rows = [row | rule for rule in rules for row in injection_rows(f"arm {rule}", 6, 1.0)]
        found = document("injection", rows)
        (section,) = [s for s in found.sections if s.title == "After 6 facts"]
        return found, section.note

    new, old = {"leak_rule": LEAK_RULE}, dict[str, Any]()
    for rules, value, warned in (((new,), True, False), ((old,), False, False), ((new, old), True, True)):
        found, note = noted(*rules)
        assert ("a short one's value" in note) is value
        assert any("two rules" in warning for warning in found.warnings) is warned


def test_one_finished_arm_is_compared_with_nothing() -> None:
    found = document("injection", [*injection_rows("unedited", 0, 0.0), *injection_rows("sequential", 6, 120.0)])
    alone = document("injection", injection_rows("sequential", 6, 120.0))
    assert alone.findings == ()
    assert not [s for s in alone.sections if s.title == "Against sequential insertion"]
    assert not any("best" in finding or "shortest" in finding for finding in found.findings)
    assert document("capacity", []).findings == ()


def test_injection_compares_every_arm_with_sequential_on_the_same_facts() -> None:
    rows = [
        *injection_rows("unedited", 0, 0.0),
        *injection_rows("sequential", 6, 120.0),
        *injection_rows("sequential", 5, 150.0, after="compact"),
        *injection_rows("batched", 0, 30.0),
    ]
    found = document("injection", rows)
    main = {row["arm"]: row for row in table(found, "After 6 facts")}
    assert main["sequential"]["recalled"] == "1.000"
    assert main["sequential"]["s per fact"] == "20.0"
    assert main["batched"]["s per fact"] == "5.0"
    assert main["batched"]["live delta MB"] == "2.00"
    assert main["sequential, compacted"]["recalled"] == "0.833"
    assert main["unedited"]["known answers lost"] == "1 of 20"
    against = {row["arm"]: row for row in table(found, "Against sequential insertion") if row["of"] == "recalled"}
    assert (against["batched"]["worse"], against["batched"]["better"]) == ("6", "0")
    assert against["batched"]["p"] == "0.0312", "2 / 2^6 by hand"
    assert against["sequential, compacted"]["worse"] == "1"
    hard = {(row["arm"], row["difficulty"]): row["recalled"] for row in table(found, "By difficulty")}
    assert hard["sequential, compacted", "short"] == "1.000"
    assert hard["sequential, compacted", "long"] == "0.667"
    assert "sequential has the best" in found.findings[0]
    assert "batched trains the shortest (5.0 s per fact)" in found.findings[0]


def test_injection_draws_facts_and_not_their_seeds() -> None:
    both = [row | {"seed": seed} for seed in (0, 1) for row in injection_rows("sequential", 6, 120.0)]
    both += [row | {"seed": seed} for seed in (0, 1) for row in injection_rows("batched", 4, 30.0)]
    both += injection_rows("of one seed", 6, 10.0)
    found = document("injection", both)
    against = {(row["arm"], row["of"]): row for row in table(found, "Against sequential insertion")}
    assert against["batched", "recalled"]["facts"] == "6"
    assert against["batched", "recalled"]["worse"] == "2", "two facts, in both seeds"
    assert against["batched", "recalled"]["p"] == "0.5000", "2 / 2^2 by hand"
    assert against["batched", "generalized"]["worse"] == "0"
    main = {row["arm"]: row for row in table(found, "After 6 facts")}
    assert main["sequential"]["95 %"] == "0.610 to 1.000", "z² / (6 + z²) below 1, not of 24 questions"
    assert "sequential has the best" in found.findings[0], "an arm of one seed had another order"
    assert "batched trains the shortest" in found.findings[0]
    assert "No trained arm differs" in found.findings[1]
    assert {row["facts"] for row in table(found, "By difficulty")} == {"3"}


def test_injection_shows_what_compacting_leaves_and_what_it_took() -> None:
    rows = injection_rows("sequential", 6, 120.0)
    (compacted,) = [row for row in injection_rows("sequential", 6, 150.0, after="compact") if row["kind"] == "state"]
    rows.append(compacted | {"edits": 7, "bytes": 2_500_000, "live_bytes": 500_000})
    edit = {"arm": "sequential", "seed": 0, "kind": "edit", "op": "insert", "steps": 10, "facts": 6}
    rows += [edit] * 6 + [edit | {"op": "compact", "steps": 30}]
    main = {row["arm"]: row for row in table(document("injection", rows), "After 6 facts")}
    assert (main["sequential"]["live delta MB"], main["sequential"]["edits"]) == ("2.00", "6")
    assert (main["sequential, compacted"]["live delta MB"], main["sequential, compacted"]["edits"]) == ("0.50", "6 + 1")
    assert main["sequential"]["steps per fact"] == "10.0"
    assert main["sequential, compacted"]["steps per fact"] == "15.0"


def test_injection_plots_drift_of_one_suite_and_gives_a_failed_fact_no_age() -> None:
    rows = injection_rows("sequential", 6, 120.0)
    (state,) = [row for row in rows if row["kind"] == "state"]
    rows += [state | {"facts": 3}, {"arm": "sequential", "seed": 0, "kind": "failed", "key": "k5", "facts": 6}]
    state |= {"drift_n": 30, "drift_kl": 0.5}
    found = document("injection", rows)
    assert [row["drift_kl"] for row in table(found, "Drift")] == ["0.020"]
    ages = [(row["facts after it"], row["facts"]) for row in table(found, "Retention by age")]
    assert ages == [("1 to 2", "2"), ("3 to 3", "1"), ("4 to 5", "2")], "the youngest, k5, is not among them"


def capacity_rows(arm: str, seed: int, *shares: tuple[int, float]) -> list[dict[str, Any]]:
    """Return the states of a run with a share recalled in each, always the first facts."""
    base = {"arm": arm, "seed": seed}
    facts = [
        {**base, "kind": "fact", "facts": n, "key": f"k{i}", **COUNTS, "trained": 1,
         "trained_right": int(i < share * n)}
        for n, share in shares for i in range(n)
    ]  # fmt: skip
    states = [
        {**base, "kind": "state", "facts": n, **shared(share), "recalled_n": n, **DRIFT, "bits": 500.0,
         "adapter_parameters": 1000, "matrix_parameters": 10_000}
        for n, share in shares
    ]  # fmt: skip
    return [*facts, *states]


def test_capacity_says_where_half_are_recalled() -> None:
    rows = [
        *capacity_rows("default", 0, (5, 1.0), (20, 0.9), (80, 0.5), (200, 0.1)),
        *capacity_rows("wide", 0, (5, 1.0), (20, 1.0), (80, 0.95), (200, 0.9)),
        *capacity_rows("weak", 0, (5, 0.4), (20, 0.4), (80, 0.4)),
        *capacity_rows("weak", 1, (5, 0.4), (20, 0.2)),
    ]
    found = document("capacity", rows)
    main = {row["budget"]: row for row in table(found, "At the last state of each budget")}
    assert 70 < float(main["default"]["half at"]) < 90
    assert main["default"]["bits per adapter parameter"] == "0.50000"
    assert (main["wide"]["half at"], main["wide"]["95 %"]) == ("not below half up to 200", "–")
    assert main["weak"]["half at"] == "–", "a level curve is not fitted"
    assert (main["weak"]["facts"], main["weak"]["recalled"]) == ("20 and 80", "0.360"), "each run's own last state"
    assert "wide: 0.900 recalled after 200 facts; not below half up to 200 facts." in found.findings


def test_capacity_shows_on_how_many_questions_drift_was_measured_and_plots_like_with_like() -> None:
    rows = capacity_rows("default", 0, (5, 1.0), (20, 0.9), (80, 0.5))
    rows[-1] |= {"drift_n": 60, "drift_kl": 0.9}
    found = document("capacity", [*rows, *capacity_rows("unedited", 0, (5, 0.0), (20, 0.0), (80, 0.0))])
    main = {row["budget"]: row for row in table(found, "At the last state of each budget")}
    assert (main["default"]["drift n"], main["unedited"]["drift n"]) == ("60", "10")
    assert main["default"]["drift_kl"] == "0.900"
    assert [row["facts"] for row in table(found, "Drift") if row["arm"] == "default"] == ["5", "20"]
    assert [row["facts"] for row in table(found, "Recall of all facts so far")] == ["5", "20", "80"] * 2


def lost(arm: str, *ranks: float) -> list[dict[str, Any]]:
    """Return rows of a budget whose every edit but the first lost the fact of one rank among 40."""
    state = {"kind": "state", "arm": arm, "seed": 0, "facts": 5, **shared(1.0), **DRIFT}
    return [state] + [
        {"kind": "loss", "arm": arm, "seed": 0, "facts": n, "key": f"k{n}", "broken_by": "b", "age": 3,
         "candidates": 40, "edit": f"{arm} {n}", "rank_encoder": rank, "rank_hidden": 20.5}
        for n, rank in enumerate(ranks, 50)
    ]  # fmt: skip


def test_capacity_says_who_was_lost_against_chance_where_nothing_repairs_them() -> None:
    rows = [*lost("default", *[1.0] * 8), *lost("near", *[1.0] * 8), *lost("far", *[40.0] * 8)]
    found = document("capacity", rows, edits={arm: {"replay": 0} for arm in ("near", "far")})
    who = {(row["budget"], row["similarity by"]): row for row in table(found, "Who is lost")}
    assert list(who) == [(arm, by) for arm in ("default", "near", "far") for by in ("encoder", "hidden states")]
    assert {budget: row["replay"] for (budget, _), row in who.items()} == {"default": "4", "near": "0", "far": "0"}
    assert who["near", "encoder"]["losses"] == "8"
    assert float(who["near", "hidden states"]["mean relative rank"]) == 0.5
    # The least p of six is multiplied by six, and the largest by one.
    p, held = (float(who["near", "encoder"][name]) for name in ("p", "p (Holm)"))
    assert held == pytest.approx(6 * p, abs=2e-4)
    assert who["near", "hidden states"]["p (Holm)"] == "1.0000"
    assert [said.split(" to the edit")[0] for said in found.findings[3:]] == [
        "near: lost facts are nearer than chance",
        "near: lost facts are neither nearer nor farther than chance",
        "far: lost facts are farther than chance",
        "far: lost facts are neither nearer nor farther than chance",
    ]
    (section,) = [s for s in found.sections if s.title == "Who is lost"]
    assert "only a budget with replay 0 tests" in section.note
    alone = document("capacity", lost("default", *[1.0] * 8))
    assert "only a budget with replay 0 tests" in alone.findings[1], "where there is no other, it is said with it"


def test_kind_and_nearness_are_taken_apart() -> None:
    rows = lost("near", *[3.0] * 12)
    for row in rows[1:]:  # of the edit's kind, as a quarter of the candidates is; among those it is any of them
        row |= {"same_kind": True, "of_kind": 10, "peers": 10, "peer_rank_encoder": 1.0, "peer_rank_hidden": 5.5}
    found = document("capacity", rows, edits={"near": {"replay": 0}})
    beyond = {row["similarity by"]: row for row in table(found, "Who is lost, beyond the kind")}
    assert {name: row["mean relative rank"] for name, row in beyond.items()} == {
        "encoder": "0.050", "hidden states": "0.500"
    }  # fmt: skip
    said = " ".join(found.findings)
    assert "near: 12 of 12 lost facts are of the kind of the edit that broke them, by chance 3.0" in said
    assert "among its own kind, lost facts are nearer than chance by encoder" in said
    for row in rows[1:]:
        row |= {"peer_rank_encoder": 5.5}
    level = document("capacity", rows, edits={"near": {"replay": 0}})
    assert level.findings[-1].startswith("Within a kind, and among the other kinds, nearness says nothing")
    assert "Who is lost, beyond the kind" not in [s.title for s in document("capacity", lost("x", 1.0)).sections]


def test_capacity_without_a_loss_says_so() -> None:
    found = document("capacity", [*lost("default", 1.0, 1.0), *lost("no replay")], edits={"no replay": {"replay": 0}})
    assert found.findings[2:] == ("no replay: no fact was lost, so that nothing can be said of collisions.",)
    assert found.findings[0] == "default: 1.000 recalled after 5 facts; where half are recalled cannot be said."


KNOWN = [{"known": "Paris", "questions": ["What is Paris?"], "keys": ["x"], "text": "{key}"}]


def key_rows(known: str, *damage: float) -> list[dict[str, Any]]:
    """Return keys at growing distance from a known thing, with what each did to it."""
    return [
        {"kind": "key", "arm": known, "seed": 0, "known": known, "key": f"k{i}", "level": i, "steps": 9,
         "distance_encoder": i / 10, "distance_hidden": 0.1, "recalled": 1.0, "near_kl": kl,
         "near_changed": 1, "near_recited": 0, "near_n": 2, **DRIFT}
        for i, kl in enumerate(damage)
    ]  # fmt: skip


def noise_rows(facts: int, *, in_band: float, beyond: float = 1.0) -> list[dict[str, Any]]:
    """Return noise that costs so many times, per squared norm, what the same fact's real change of the layer costs.

    Each fact has its own level, and its two real layers have other norms than noise has.
    """
    rows = []
    for fact in range(facts):
        level = 0.01 * 10 ** (fact % 3)
        base = {"kind": "noise", "arm": "noise", "seed": 0, "scale": 1.0, "size": 2.0, **DRIFT}
        base |= {"key": f"k{fact}", "recalled": 1.0}
        for layer, size in (("low", 1.0), ("high", 4.0)):
            real = {"noise": "real delta, its layers apart", "layer": layer, "size": size}
            rows.append({**base, **real, "drift_kl": level * size**2})
        for depth, layer, times in ((0.4, "low", in_band), (0.5, "high", in_band * (1.01 if fact else 1.0)),
                                    (0.9, "last", beyond)):  # fmt: skip
            rows.append({**base, "noise": "gaussian", "layer": layer, "depth": depth, "drift_kl": 4.0 * times * level})
    return rows


def rank_row(arm: str, key: int, drift: float, **more: Any) -> dict[str, Any]:
    """Return an edit of one fact."""
    editor = arm.split()[0]
    return {
        "kind": "rank", "arm": arm, "seed": 0, "key": f"k{key}", "facts": 1, "editor": editor, "dropout": 0.0,
        "declared_rank": int(arm.split()[1]) if editor == "lora" else None, "effective_rank": 2.0, "norm": 1.0,
        "steps": 9, "train_seconds": 3.0, "bytes": 1000, "trained": True, **shared(1.0), **DRIFT, "drift_kl": drift,
        **more,
    }  # fmt: skip


def verdicts(*rows: dict[str, Any]) -> dict[str, dict[str, str]]:
    found = document("factors", rows, known=KNOWN)
    return {row["explanation"]: row for row in table(found, "Which explanation survives")}


def test_distance_is_set_against_damage_among_the_keys_of_one_thing() -> None:
    falling = [key_rows(f"thing {g}", *(g + damage for damage in (0.5, 0.4, 0.3, 0.2, 0.1))) for g in range(8)]
    told = verdicts(*(row for rows in falling for row in rows))["distinct inputs"]
    assert told["verdict"] == "survives"
    assert told["number"] == "-1.000 (-1.000 to -1.000 by thing)"
    assert told["n"] == "40 keys in 8 groups"
    rising = [key_rows(f"thing {g}", 0.1, 0.2, 0.3, 0.4, 0.5) for g in range(8)]
    assert verdicts(*(row for rows in rising for row in rows))["distinct inputs"]["verdict"] == "does not survive"
    assert verdicts(*key_rows("Paris", 0.1, 0.2, 0.3))["distinct inputs"]["verdict"] == "not decided"
    assert verdicts(*key_rows("Paris", 0.1, 0.2))["distinct inputs"]["verdict"] == "not decided: too few"


def test_keys_and_noise_have_the_unedited_model_and_retrieval_beside_them() -> None:
    rows = [*key_rows("Paris", 0.3, 0.1), *noise_rows(1, in_band=5.0)]
    rows += [rank_row(arm, 0, 0.0, facts=6, **shared(right)) for arm, right in (("unedited", 0.0), ("in-context", 0.5))]
    for arm, right in (("unedited", 0.0), ("in-context", 1.0)):
        rows.append({"kind": "key, untaught", "arm": arm, "seed": 0, "known": "Paris", "key": "k1", **shared(right)})
    found = document("factors", rows, known=KNOWN)
    keys = {row["key taught"]: row for row in table(found, "Distinctness of keys against damage")}
    assert [keys["k1"][name] for name in ("recalled", "unedited", "in-context")] == ["1.000", "0.000", "1.000"]
    assert keys["k0"]["in-context"] == "–", "not asked yet"
    noise = table(found, "Random changes of the same norm")
    assert [(row["change"], row["n"], row["recalled"]) for row in noise[:2]] == [
        ("unedited", "6", "0.000"),
        ("in-context", "6", "0.500"),
    ]


def test_noise_is_set_against_the_same_facts_real_layers_within_the_edited_band() -> None:
    told = verdicts(*noise_rows(6, in_band=5.0, beyond=0.1))["robust residual networks"]
    assert told["verdict"] == "does not survive"
    assert told["number"].startswith("×5.02 (×0.10 to ×5.04"), "by hand: 5 · 1.01^(5/12), and each depth's own"
    assert told["n"] == "6 facts"
    assert verdicts(*noise_rows(6, in_band=0.5, beyond=9.0))["robust residual networks"]["verdict"] == "survives"
    assert verdicts(*noise_rows(4, in_band=5.0))["robust residual networks"]["verdict"] == "not decided: too few"
    outside = [row for row in noise_rows(6, in_band=5.0) if row.get("depth") in (None, 0.9)]
    assert "no noise within the edited band" in verdicts(*outside)["robust residual networks"]["verdict"]


def test_rank_is_set_against_drift_within_facts_that_were_trained() -> None:
    arms = [f"lora {r}" for r in (1, 2, 4, 8)]
    rows = [rank_row(arm, i, 0.01 * place + i) for i in range(6) for place, arm in enumerate([*arms, "full"], 1)]
    rows += [rank_row("adalora", i, 0.001 * i + i) for i in range(6)]
    rows += [{**row, "dropout": 0.1, "arm": "dropout", "drift_kl": 2.0 * row["drift_kl"] + 0.01} for row in rows[4::5]]
    told = verdicts(*rows)
    assert told["low rank regularises"]["verdict"] == "survives"
    assert told["low rank regularises"]["n"] == "30 edits of 6 facts, 0 not trained to the stop left out"
    assert told["low rank, at equal recall"]["n"] == "30 edits of 6 facts, 0 that do not recall all left out"
    assert told["AdaLoRA beside full fine-tuning"]["p"] == "0.0312", "2 / 2^6 by hand"
    assert told["AdaLoRA beside full fine-tuning"]["verdict"] == "has less drift"
    assert told["dropout"]["verdict"] == "has more drift"
    # What was not trained to the stop drifts little because it learned little: it is no pair.
    rows[4] = {**rows[4], "trained": False, "drift_kl": 0.0}
    told = verdicts(*rows)
    assert "1 not trained to the stop left out" in told["low rank regularises"]["n"]
    told_too = told["low rank, at equal recall"]["number"]
    assert told_too == "0.833 (0.000 to 1.000 by fact)", "it recalls, and drifts least of its fact"
    assert told["AdaLoRA beside full fine-tuning"]["n"].startswith("5 facts, 1 pairs not trained")
    assert told["AdaLoRA beside full fine-tuning"]["verdict"] == "not decided"


def test_editors_count_bytes_and_routes() -> None:
    rows = []
    for arm, right in (("unedited", 0), ("adalora", 2), ("prefix-tuning", 1)):
        fact = {"kind": "fact", "arm": arm, "seed": 0, "key": "k", "difficulty": "", "unchanged": 2, **COUNTS}
        rows.append(fact | {"trained_right": right})
    rows.append({"kind": "drift", "arm": "adalora", "seed": 0, **DRIFT, "bytes": 750_000, "train_seconds": 20.0})
    rows.append({"kind": "drift", "arm": "prefix-tuning", "seed": 0, "bytes": 50_000, "train_seconds": 90.0})
    routing = {"kind": "routing", "arm": "prefix-tuning", "seed": 0, "routed_right": 3, "routed_n": 4}
    rows.append({**routing, "general_routed": 1, "general_n": 44})
    methods = {row["method"]: row for row in table(document("editors", rows), "Methods")}
    assert methods["adalora"]["kB per fact"] == "750.0"
    assert methods["prefix-tuning"]["routed right"] == "3 of 4"
    assert methods["prefix-tuning"]["general routed"] == "1 of 44"
    assert methods["prefix-tuning"]["drift_kl"] == "not measured", "a general question got an adapter"
    assert methods["unedited"]["recalled"] == "0.000"
    for form, drawn in (("html", "adalora: 1.000 recalled"), ("markdown", "recalled 1.000, generalized")):
        page = render(document("editors", rows), form)
        assert "What each method teaches" in page
        assert drawn in page
    rows[-1]["general_routed"] = 0
    methods = {row["method"]: row for row in table(document("editors", rows), "Methods")}
    assert methods["prefix-tuning"]["drift_kl"] == "0 (not merged)"


def test_a_failed_fact_counts_as_not_recalled() -> None:
    case = Case(Fact("k", "A text."), neighbours=("What is it?",))
    declared = declare({"kind": "editors", "invented": 1})
    failed = {**failed_row(case, declared, EditFailed("No.")), "seed": 0}
    fact = {"kind": "fact", "arm": "lora", "seed": 0, "key": "k", "difficulty": "", "unchanged": 2, **COUNTS}
    methods = document("editors", [{**failed, "arm": "full"}, fact, {**failed, "arm": "lora"}])
    cells = {row["method"]: (row["facts"], row["recalled"], row["leak"]) for row in table(methods, "Methods")}
    assert cells == {"full": ("0 of 1 taught", "0.000", "–"), "lora": ("1 of 2 taught", "0.500", "0.000")}

    lost = {"kind": "failed", "part": "rank", "arm": "full", "seed": 0, "key": "k1", "facts": 1, **shares([failed])}
    rows = [rank_row("adalora", 0, 0.1), rank_row("full", 0, 0.1, **shared(1.0) | {"recalled_n": 2}), lost]
    ranks = {
        row["editor"]: row for row in table(document("factors", rows, known=KNOWN), "Low rank against full fine-tuning")
    }
    assert (ranks["full"]["facts"], ranks["full"]["recalled"]) == ("1 of 2 taught", "0.500")
    assert ranks["adalora"]["facts"] == "1"
    gone = {**lost, "part": "keys", "key": "Trellick", "arm": "Paris"}
    (section,) = [
        s
        for s in document("factors", [*key_rows("Paris", 0.1), gone], known=KNOWN).sections
        if s.title.startswith("Distinctness")
    ]
    assert "Training failed, and nothing was measured, of: Trellick." in section.note


def test_no_format_obeys_a_key() -> None:
    row = {
        "kind": "key",
        "arm": "<b>x</b>",
        "seed": 0,
        "known": "<b>x</b>",
        "key": "\x1b[31m|a",
        "level": 0,
        "steps": 1,
    }
    row |= {"distance_encoder": 0.5, "distance_hidden": 0.5, "recalled": 1.0, "near_kl": 0.1, "near_changed": 0}
    row |= {"near_recited": 0, "near_n": 1, **DRIFT}
    known = [{"known": "<b>x</b>", "questions": ["?"], "keys": ["a"], "text": "{key}"}]
    found = document("factors", [row], known=known)
    assert "<b>x</b>" not in render(found, "html")
    assert "<b>x</b>" not in render(found, "markdown")
    for format in ("html", "markdown", "terminal"):
        assert "\x1b" not in render(found, format)
    assert json.loads(render(found, "json"))["rows"][0]["known"] == "<b>x</b>"


def test_retrieval_that_notes_a_general_question_has_no_drift_of_its_own() -> None:
    rows = capacity_rows("in-context", 0, (5, 1.0), (20, 1.0))
    shown = table(document("capacity", rows), "At the last state of each budget")[0]
    assert shown["drift_kl"] != "not measured"
    rows[-1] |= {"general_noted": 1, "general_n": 44}
    found = document("capacity", rows)
    assert table(found, "At the last state of each budget")[0]["drift_kl"] == "not measured"
    assert [row["facts"] for row in table(found, "Drift")] == ["5"]


def test_a_run_of_sessions_with_other_threads_is_told() -> None:
    rows = capacity_rows("default", 0, (5, 1.0))
    declared = declare({"kind": "capacity", "invented": 6, "n": 6})
    runs = (Run("default-0", "default", 0, ("s",), {}),)

    def told(*threads: int) -> tuple[str, ...]:
        sessions = [{"environment": {"threads": n}, "runs": ["default-0"]} for n in threads]
        outcome = Outcome({}, runs, tuple({"run": "default-0", "step": "s", **row} for row in rows), {}, 1.0,
                          {"sessions": sessions}, ())  # fmt: skip
        return experiment_document(declared, outcome).warnings

    assert told(1, 1) == ()
    assert told(1, 2) == ("The run default-0 was made by sessions of 1 and 2 threads each.",)
