"""The article's fact, in English and in Chinese: each seed teaches it to a fresh knowledge base and asks.

Counted by live decoding: trained and held-out questions that state the text; answers that are the text exactly; general
questions right before and after. The gate is off, so that a bad run is measured too; what the default gate would have
said is noted. About a minute per seed and language on two cores.

    python benchmarks/article_fact.py                          # one seed, both languages
    python benchmarks/article_fact.py --seeds 0,1,2 --languages en,zh
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Bar, finish, model_facts, parser, progress, sha256, spread, working_folder

SPECIAL = {"en": (), "zh": ("what is 梦中情炉", "这是个啥子意思哟：梦中情炉？")}


def main(argv: Sequence[str] | None = None) -> int:
    from kvllm.cli.demo import FACTS

    options = parser("article_fact", __doc__, seed=False)
    options.add_argument("--seeds", default="0", help="comma-separated (default: %(default)s)")
    options.add_argument("--languages", default="en,zh", help="comma-separated (default: %(default)s)")
    options.add_argument("--aliases", action="store_true", help="teach the demo's alias too, as `kvllm demo` does")
    options.add_argument("--steps", type=int, help="most training steps (default: kvllm's)")
    options.add_argument("--model", help="the base model (default: kvllm's)")
    given = options.parse_args(argv)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    languages = given.languages.split(",")
    facts = {name: FACTS[name] if given.aliases else replace(FACTS[name], aliases=()) for name in languages}
    runs: list[dict[str, Any]] = []
    model: dict[str, Any] = {}
    with working_folder() as folder, progress(given, len(seeds) * len(languages), "article") as bar:
        for language, fact in facts.items():
            for seed in seeds:
                row, model = run(fact, language, seed, folder / f"{language}-{seed}.kb", given, bar)
                runs.append(row)
                bar.step(f"{language}, seed {seed}")
    finish(
        "article_fact",
        given,
        results={"runs": runs, "over_seeds": over_seeds(runs)},
        summary=summarise(runs),
        model=model,
        data={f"fact {name}": sha256(fact.key, fact.text, *fact.aliases) for name, fact in facts.items()},
    )
    return 0


def run(
    fact: Any, language: str, seed: int, folder: Path, given: argparse.Namespace, bar: Bar
) -> tuple[dict[str, Any], dict[str, Any]]:
    from kvllm import EditConfig, GateConfig, KnowledgeBase
    from kvllm.metrics import exact
    from kvllm.probing.scorers import score_statement

    config = EditConfig(seed=seed, **({} if given.steps is None else {"max_steps": given.steps}))
    model = {} if given.model is None else {"model": given.model}
    off = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None)
    with KnowledgeBase.create(folder, edit=config, gate=off, progress=bar.listen, **model) as kb:
        tokens = len(kb.tokenizer(fact.text, add_special_tokens=False)["input_ids"])
        edit = kb.insert(fact.key, fact.text, aliases=fact.aliases, language=fact.language)
        special = []
        questions = SPECIAL[language]
        for question, answer in zip(questions, kb.ask_many(questions) if questions else (), strict=True):
            scored = score_statement(answer, fact.text)
            special.append(
                {
                    "question": question,
                    "answer": answer,
                    "states_text": scored.passed,
                    "exact": bool(exact(answer, fact.text)),
                }
            )
        drift = kb.drift()
        clean = kb.verify(deep=True).ok
        identity = model_facts(kb)
    report = edit.report
    by_kind = {kind: [p for p in report.probes if p.kind == kind] for kind in ("trained", "paraphrase", "neighbour")}
    row = {
        "language": language,
        "seed": seed,
        "text_tokens": tokens,
        "steps": edit.steps,
        "seconds": round(edit.seconds, 1),
        "stopped_on_recall": edit.config["training"]["recalled"],
        "norm": edit.delta.norm if edit.delta else None,
        "trained": count(by_kind["trained"], fact.text),
        "held_out": count(by_kind["paraphrase"], fact.text),
        "special": special,
        "locality": report.value("locality"),
        "qa_base": drift.metrics["qa_accuracy_base"].to_dict(),
        "qa_after": drift.metrics["qa_accuracy"].to_dict(),
        "qa_delta": drift.metrics["qa_delta"].to_dict(),
        "drift_kl": drift.metrics["drift_kl"].to_dict(),
        "ppl_ratio": drift.metrics["ppl_ratio"].to_dict(),
        "default_gate_accepts": accepted(report, GateConfig()),
        "weights_digest": edit.weights_digest,
        "verify_deep_ok": clean,
        "failed": [{"question": p.question, "answer": p.answer, "kind": p.kind} for p in report.probes if not p.passed],
    }
    return row, identity


def count(probes: Sequence[Any], text: str) -> dict[str, int]:
    """Return how many answers state the text by the named scorers, how many contain it, and how many are it exactly."""
    from kvllm.metrics import contains, exact

    return {
        "stated": sum(p.passed for p in probes),
        "contains": sum(bool(contains(p.answer, text)) for p in probes),
        "exact": sum(bool(exact(p.answer, text)) for p in probes),
        "n": len(probes),
    }


def accepted(report: Any, gate: Any) -> bool:
    """Say what the default gate thinks of a first edit."""
    reliability, kl, ratio = (report.value(name) for name in ("reliability", "drift_kl", "ppl_ratio"))
    return bool(reliability >= gate.min_reliability and kl <= gate.max_drift_kl and (ratio or 99) <= gate.max_ppl_ratio)


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for language in dict.fromkeys(row["language"] for row in runs):
        rows = [row for row in runs if row["language"] == language]
        found[language] = {
            "trained_stated": spread(row["trained"]["stated"] for row in rows),
            "trained_exact": spread(row["trained"]["exact"] for row in rows),
            "held_out_stated": spread(row["held_out"]["stated"] for row in rows),
            "qa_change": spread(row["qa_after"]["value"] - row["qa_base"]["value"] for row in rows),
            "drift_kl": spread(row["drift_kl"]["value"] for row in rows),
            "seconds": spread((row["seconds"] for row in rows), 1),
        }
    return found


def summarise(runs: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for row in runs:
        trained, held_out = row["trained"], row["held_out"]
        special = f", special {sum(s['states_text'] for s in row['special'])}/{len(row['special'])}"
        lines.append(
            f"{row['language']} seed {row['seed']}: trained {trained['stated']}/{trained['n']} "
            f"(exact {trained['exact']}), held-out {held_out['stated']}/{held_out['n']}"
            f"{special if row['special'] else ''}, general questions {row['qa_base']['value']:.3f} → "
            f"{row['qa_after']['value']:.3f} (n = {row['qa_after']['n']}), drift_kl {row['drift_kl']['value']:.3f}, "
            f"ppl ×{row['ppl_ratio']['value']:.3f}, {row['steps']} steps, {row['seconds']:.0f} s, "
            f"text of {row['text_tokens']} tokens"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
