"""Reports on rows made by hand: the numbers of each table, and the verdicts that follow from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kvllm.experiments.declared import Declared, Run, declare
from kvllm.experiments.report import experiment_document
from kvllm.experiments.runner import Outcome
from kvllm.reports.document import Document
from kvllm.reports.render import render

DRIFT = {"drift_kl": 0.02, "drift_n": 10, "ppl_ratio": 1.01, "qa_known": 20, "qa_lost": 1, "qa_accuracy": 0.5}
COUNTS = {"trained": 2, "trained_right": 2, "paraphrases": 2, "paraphrases_right": 1, "neighbours": 2, "leaked": 0}


def document(kind: str, rows: Sequence[dict[str, Any]], n: int = 6, **settings: Any) -> Document:
    declared: Declared = declare({"kind": kind, "invented": n, "n": n, "settings": settings})
    runs = [Run(f"{row['arm']}-{row['seed']}", row["arm"], row["seed"], ("s",)) for row in rows]
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


def test_capacity_says_who_was_lost_against_chance() -> None:
    states = [
        {"kind": "state", "arm": "default", "seed": 0, "facts": n, **shared(share), "recalled_n": 100, **DRIFT,
         "bits": 500.0, "adapter_parameters": 1000, "matrix_parameters": 10_000}
        for n, share in ((5, 1.0), (20, 0.9), (80, 0.5), (200, 0.1))
    ]  # fmt: skip
    losses = [
        {"kind": "loss", "arm": "default", "seed": 0, "facts": n, "key": "a", "broken_by": "b", "age": 3,
         "candidates": 40, "edit": f"e{n}", "rank_encoder": 1.0, "rank_hidden": 20.5}
        for n in range(50, 58)
    ]  # fmt: skip
    found = document("capacity", [*states, *losses])
    (row,) = table(found, "At the last state of each budget")
    assert 70 < float(row["half at"]) < 90
    assert row["bits per adapter parameter"] == "0.50000"
    lost = {row["similarity by"]: row for row in table(found, "Who is lost") if row["budget"] == "all budgets"}
    assert lost["encoder"]["losses"] == "8"
    assert float(lost["hidden states"]["mean relative rank"]) == 0.5
    assert any("nearer than chance to the edit that broke them, by encoder" in said for said in found.findings)
    assert any("not nearer than chance to the edit that broke them, by hidden" in said for said in found.findings)


def test_capacity_without_a_loss_says_so() -> None:
    state = {"kind": "state", "arm": "default", "seed": 0, "facts": 5, **shared(1.0), **DRIFT}
    assert any("No fact was lost" in said for said in document("capacity", [state]).findings)


def test_factors_give_one_verdict_per_explanation() -> None:
    keys = [
        {"kind": "key", "arm": "Paris", "seed": 0, "known": "Paris", "key": f"k{i}", "level": i, "steps": 9,
         "distance_encoder": i / 10, "distance_hidden": 0.1, "recalled": 1.0, "near_kl": 1 - i / 10,
         "near_changed": 1, "near_recited": 0, "near_n": 2, **DRIFT}
        for i in range(8)
    ]  # fmt: skip
    real = {"kind": "noise", "arm": "noise", "seed": 0, "layer": "l", "scale": 1.0, "size": 2.0, **DRIFT}
    noise = [
        {**real, "noise": "real delta, its layers apart", "drift_kl": 0.01},
        *({**real, "noise": "gaussian", "depth": d / 10, "drift_kl": 0.05, "recalled": 1.0} for d in range(8)),
    ]
    rank = [
        {"kind": "rank", "arm": arm, "seed": 0, "key": f"k{i}", "facts": 1, "editor": arm, "dropout": 0.0,
         "declared_rank": None, "effective_rank": 2.0, "norm": 1.0, "steps": 9, "train_seconds": 3.0, "bytes": 1000,
         **shared(1.0), **DRIFT, "drift_kl": 0.02 + 0.01 * (arm == "full") + i / 1e4 * (arm == "full")}
        for arm in ("adalora", "full") for i in range(8)
    ]  # fmt: skip
    known = [{"known": "Paris", "questions": ["What is Paris?"], "keys": ["x"], "text": "{key}"}]
    found = document("factors", [*keys, *noise, *rank], known=known)
    verdicts = {row["explanation"]: row for row in table(found, "Which explanation survives")}
    assert verdicts["distinct inputs"]["verdict"] == "survives"
    assert verdicts["distinct inputs"]["number"].startswith("-1.000")
    assert verdicts["robust residual networks"]["verdict"] == "does not survive"
    assert verdicts["robust residual networks"]["number"] == "×5.00"
    assert verdicts["low rank regularises"]["verdict"] == "survives"
    assert verdicts["low rank regularises"]["p"] == "0.0078", "2 / 2^8 by hand"
    flipped = document("factors", [{**row, "near_kl": row["distance_encoder"]} for row in keys], known=known)
    assert table(flipped, "Which explanation survives")[0]["verdict"] == "does not survive"


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
    assert methods["prefix-tuning"]["drift_kl"] == "0 (not merged)"
    assert methods["unedited"]["recalled"] == "0.000"


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
