"""SIGKILL in mid-training of the full stack: command line, engine, AdaLoRA, probes, gate, store.

Forty-two kills, spread over a whole `kvllm insert`. Afterwards the knowledge base is the one before or the one after,
verifies without an error, and takes the next command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.kit import ROOT

KILLS = 42


def staged(folder: Path, model: Path, cache: Path, *campaigns: str) -> dict[str, list[dict[str, Any]]]:
    """Run campaigns of tests/robustness/stage.py in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.stage", str(folder), str(model), str(cache), *campaigns],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return found


@pytest.mark.campaign
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_mid_training_leaves_the_knowledge_base_before_or_after(
    tmp_path: Path, tiny_llama: Path, tiny_cache: Path
) -> None:
    outcomes = staged(tmp_path / "stage", tiny_llama, tiny_cache, f"kills:{KILLS}")["kills"]
    assert len(outcomes) == KILLS
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        assert outcome["code"] in (-9, 0), outcome
        assert outcome["ok"], outcome
        assert all("harmless" in problem for problem in outcome["problems"]), outcome
        # Whole or absent; a command that had ended before the kill came was acknowledged, and its edit is there.
        assert (outcome["head"], outcome["keys"]) in ((1, ["torchkeras"]), (2, ["torchkeras", "numpy"])), outcome
        assert outcome["code"] == -9 or outcome["head"] == 2, outcome
        if "next" in outcome:
            assert (outcome["next"], outcome["deep"]) == (0, 0), outcome
            counts["next command worked"] += 1
        counts["killed" if outcome["code"] == -9 else "too late"] += 1
        counts[f"head {outcome['head']}"] += 1
    print(f"\nSIGKILL of the full stack: {dict(counts)}")
    assert counts["killed"] >= 40
