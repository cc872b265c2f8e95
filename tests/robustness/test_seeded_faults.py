"""Twenty faults put into kvllm on purpose: each is caught by the test that the table names."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.kit import ROOT
from tests.robustness.seeded_faults import FAULTS, mutated


def test_every_fault_changes_the_source_it_names() -> None:
    assert len(FAULTS) >= 12
    for each in FAULTS:
        source = ROOT.joinpath(*each.module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
        compile(mutated(each, source), each.module, "exec")


@pytest.mark.campaign
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_seeded_fault_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.seeded_faults"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
