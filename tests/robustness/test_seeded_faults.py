"""Faults put into kvllm on purpose: each is caught by the test that the table names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.kit import ROOT
from tests.robustness.seeded_faults import FAULTS, mutated
from tests.robustness.sizes import WHOLE, some

CAMPAIGN = "seeded faults"
IN_ONE_RUN = 10 if WHOLE else 3
PARTS = [FAULTS[n : n + IN_ONE_RUN] for n in range(0, len(FAULTS), IN_ONE_RUN)]


def test_every_fault_changes_the_source_it_names() -> None:
    assert len(FAULTS) >= 12
    for each in FAULTS:
        source = ROOT.joinpath(*each.module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        compile(mutated(each, source), each.module, "exec")


@pytest.mark.parametrize("part", some(range(len(PARTS))))
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_seeded_fault_is_caught(part: int, record: Callable[..., None]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.seeded_faults", *(each.name for each in PARTS[part])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    record({"caught": len(PARTS[part])}, done.stdout.split("\n")[:-1])
