"""Small experiments on the tiny model: short facts, few questions, and what makes two outcomes equal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvllm.experiments.declared import Declared, declare
from tests.kit import QUICK

# A tiny random model learns a few words; each text is one word of its corpus, or two.
WORDS = ("The furnace of Berlin", "Ada Voss", "a tool", "numpy is simple", "Halcyon leads", "training models")
NAMES = ("torchkeras", "Halcyon", "Berlin", "PyTorch", "numpy", "furnace")
MEASURE = {
    "trained": 1, "paraphrases": 1, "neighbours": 1, "questions": 3, "instructions": 1, "texts": 2,
}  # fmt: skip


def write_facts(folder: Path, n: int = 6) -> Path:
    """Write n facts, in all three difficulties, and return the file."""
    rows = [
        {
            "key": name,
            "text": text,
            "probes": [f"Say what {name} is."],
            "neighbours": [f"What is {other}?"],
            "difficulty": ("short", "long", "contradiction")[place % 3],
        }
        for place, (name, text, other) in enumerate(zip(NAMES, WORDS, [*NAMES[1:], NAMES[0]], strict=True))
    ]
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:n]), encoding="utf-8")
    return path


def tiny(model: Path, folder: Path, kind: str, **given: Any) -> Declared:
    """Return a declaration of a small experiment on a tiny model."""
    facts = write_facts(folder)
    edit = {name: value for name, value in QUICK.to_dict().items() if name != "seed"}
    plain: dict[str, Any] = {"kind": kind, "model": str(model), "facts": [facts.name], "device": "cpu"}
    plain |= {"edit": edit | given.pop("edit", {}), "measure": MEASURE | given.pop("measure", {}), "n": 3, **given}
    return declare(plain, folder=folder)


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what depends on how fast the machine was."""
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in rows]
