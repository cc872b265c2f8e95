"""Real signals and limits of memory, on the full stack: command line, engine, AdaLoRA, probes, gate, store.

SIGKILL, SIGINT and SIGTERM at moments spread over a whole `kvllm insert`, Ctrl-C into one open knowledge base, and
limits of address space. Afterwards the knowledge base is the one before or the one after, in memory too, verifies
without an error, and takes the next command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit import ROOT
from tests.robustness.sizes import SIZE, WHOLE

CAMPAIGN = "full stack"
Outcomes = list[dict[str, Any]]
# Name: how many at the whole size.
STOPS = {"kills": 42, "interrupts": 50, "in_memory": 50, "memory": 8}
# Two processes where they are long; where they are short, the imports are the greater part.
GROUPS = [["kills", "memory"], ["interrupts", "in_memory"]] if WHOLE else [list(STOPS)]
MOMENTS = "moments of Ctrl-C and SIGTERM"


def staged(folder: Path, model: Path, cache: Path, names: list[str]) -> dict[str, Outcomes]:
    """Run campaigns of tests/robustness/stage.py in a process of their own."""
    wanted = [f"{name}:{max(3, round(STOPS[name] * SIZE))}" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.stage", str(folder), str(model), str(cache), *wanted],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Outcomes] = json.loads(done.stdout)
    return found


def judge_kills(outcomes: Outcomes) -> Counter[str]:
    """Whole or absent; a command that had ended before the kill came was acknowledged, and its edit is there."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome["code"] in (-9, 0), outcome
        assert outcome["ok"], outcome
        assert all("harmless" in problem for problem in outcome["problems"]), outcome
        assert (outcome["head"], outcome["keys"]) in ((1, ["torchkeras"]), (2, ["torchkeras", "numpy"])), outcome
        assert outcome["code"] == -9 or outcome["head"] == 2, outcome
        if "next" in outcome:
            assert (outcome["next"], outcome["deep"]) == (0, 0), outcome
            counts["next commands that worked"] += 1
        counts["SIGKILLs in mid-training" if outcome["code"] == -9 else "SIGKILLs too late"] += 1
    assert counts["SIGKILLs too late"] <= 2
    return counts


def judge_interrupts(outcomes: Outcomes) -> Counter[str]:
    """Exit code 130, and what is said about the knowledge base is so."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome["code"] in (0, 130, -2, -15), outcome  # a signal before Python's handler stands just kills
        assert outcome["ok"], outcome
        assert "Traceback" not in outcome["said"], outcome
        assert (outcome["head"], outcome["keys"]) in ((1, ["torchkeras"]), (2, ["torchkeras", "numpy"])), outcome
        assert outcome["code"] or outcome["head"] == 2, outcome
        if outcome["code"] == 130:
            stays = "had been committed before and stay" in outcome["said"]
            assert stays == (outcome["head"] == 2), outcome
            assert stays or "nothing was changed" in outcome["said"], outcome
        assert outcome.get("next", 0) == outcome.get("deep", 0) == 0, outcome
        counts[f"{outcome['signal']}: exit code {outcome['code']}"] += 1
    assert sum(n for name, n in counts.items() if "130" in name) >= len(outcomes) * 2 // 3, counts
    counts[MOMENTS] = len(outcomes)
    return counts


def judge_in_memory(outcomes: Outcomes) -> Counter[str]:
    """The weights in memory are those of the ledger's head each time."""
    counts: Counter[str] = Counter()
    *each, deep = outcomes
    assert deep == {"ok": True, "problems": 0}
    for outcome in each:
        assert outcome["as the ledger says"], outcome
        assert outcome["moved"] in (0, 1), outcome
        assert outcome["moved"] == 1 or (outcome["interrupted"] and outcome["model as before"]), outcome
        counts["in one process: interrupted" if outcome["interrupted"] else "in one process: too late"] += 1
    counts[MOMENTS] = len(each)
    return counts


def judge_memory(outcomes: Outcomes) -> Counter[str]:
    """Weights as before, and a new process always goes on.

    10: refused as OutOfResources; 14: as a library's own error that does not speak of memory; 15: refused, and oneDNN
    stays unusable in this process. Negative: a library ended the process, which is a kill.
    """
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome["code"] in (0, 10, 14, 15) or outcome["code"] < 0, outcome
        assert outcome["ok"], outcome
        assert outcome["next"] == 0, outcome
        counts[f"little memory: exit code {outcome['code']}"] += 1
    return counts


JUDGES = {"kills": judge_kills, "interrupts": judge_interrupts, "in_memory": judge_in_memory, "memory": judge_memory}


@pytest.mark.parametrize("names", GROUPS, ids="-".join)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_insert_that_is_stopped_leaves_the_knowledge_base_before_or_after(
    tmp_path: Path, tiny_llama: Path, tiny_cache: Path, names: list[str], record: Callable[..., None]
) -> None:
    found = staged(tmp_path / "stage", tiny_llama, tiny_cache, names)
    assert list(found) == names
    for name, outcomes in found.items():
        counts = JUDGES[name](outcomes)
        assert sum(counts.values()) >= max(3, round(STOPS[name] * SIZE))
        record(counts)
