"""A company's facts from a JSONL file: one line per fact, one edit per fact, and a table of what the weights answer.

A line has "key" and "text", and may have aliases, questions, probes, language and tags (see company_facts.jsonl). A
fact that the gate refuses never costs the others. The command line does the same: kvllm insert-many KB FILE.

    python examples/company_facts.py                    # makes company.kb in the current folder; eight edits
    python examples/company_facts.py --facts 2
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvllm import EditConfig, KnowledgeBase, Report

FACTS = Path(__file__).with_name("company_facts.jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Teach a model the facts of an invented company, and probe them.")
    parser.add_argument("folder", nargs="?", default="company.kb", help="the knowledge base (default: %(default)s)")
    parser.add_argument("--file", type=Path, default=FACTS, help="JSONL, one fact per line (default: the file beside)")
    parser.add_argument("--facts", type=int, metavar="N", help="only the first N facts")
    parser.add_argument("--steps", type=int, default=60, help="most training steps per fact (default: %(default)s)")
    given = parser.parse_args(argv)
    lines = given.file.read_text(encoding="utf-8").splitlines()
    facts = [json.loads(line) for line in lines if line.strip()][: given.facts]

    with KnowledgeBase.open(given.folder, edit=EditConfig(max_steps=given.steps)) as kb:
        new = [fact for fact in facts if fact["key"] not in kb]
        print(f"{len(new)} new facts; on two CPU cores each takes about a minute …")
        outcomes = kb.insert_many(new)
        for outcome in outcomes:
            if outcome.edit is not None:
                print(f"  edit {outcome.edit.id}: {outcome.key} ({outcome.edit.steps} steps)")
                for warning in outcome.edit.warnings:
                    print(f"    warning: {warning}")
            else:
                print(f"  refused: {outcome.key}: {outcome.error}")

        # All facts are asked again at the end: a later edit may have cost an earlier fact.
        print("\nAsked at the end (share of questions whose live answer states the text):")
        show(kb.probe())
        print("\nOne answer each:")
        for key in kb:
            question = (*kb[key].probes, *kb[key].trained_questions)[0]
            print(f"  {question}\n    {kb.ask(question, max_new_tokens=60)}")
    return 0 if all(outcome.ok for outcome in outcomes) else 4


def show(report: Report) -> None:
    """Print a row per key and a column per kind of question."""
    kinds = ("trained", "paraphrase", "alias", "user")
    print(f"  {'key':36}" + "".join(f"{kind:>12}" for kind in kinds))
    for key in dict.fromkeys(probe.key for probe in report.probes):
        cells = []
        for kind in kinds:
            passed = [probe.passed for probe in report.probes if (probe.key, probe.kind) == (key, kind)]
            cells.append(f"{sum(passed)}/{len(passed)}" if passed else "–")
        print(f"  {key:36}" + "".join(f"{cell:>12}" for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
