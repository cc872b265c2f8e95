"""Which campaigns there are, how they are cut into tests, what is demanded of each, and the table of what was counted.

A campaign of the store is a process of its own without torch, in one or more shards, each of which is a test, so that
pytest-xdist can give them to several processors. The hooks at the end (tests/conftest.py takes them over) add up what
the tests counted, wherever they ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.sizes import SIZE, WHOLE

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Campaign:
    """A module to run, in how many shards at the whole size, with which options."""

    module: str
    shards: int
    options: tuple[str, ...] = ()


CAMPAIGNS = {
    "concurrency": Campaign("concurrency", 1),
    "syscalls": Campaign("syscalls", 16, ("--what", "fail")),
    "power": Campaign("syscalls", 2, ("--what", "power")),
    "left-out syncs": Campaign("syscalls", 1, ("--what", "seeded")),
    "disks": Campaign("syscalls", 1, ("--what", "disk")),
    "kill": Campaign("kill", 2, ("--what", "random")),
    "failpoints": Campaign("kill", 1, ("--what", "failpoints")),
    "corruption": Campaign("corruption", 2),
    "model": Campaign("model", 2),
    "growth": Campaign("growth", 1),
}

# The least that a run at the whole size must count.
DEMANDED: dict[str, dict[str, int]] = {
    "kill": {"SIGKILLs": 2000},
    "failpoints": {"failpoints": 30, "second kills": 300},
    "full stack": {"SIGKILLs in mid-training": 40, "moments of Ctrl-C and SIGTERM": 50},
    "syscalls": {"verbs": 16},
    "power": {"states after a power cut": 1000},
    "disks": {"full disks that refused": 100},
    "corruption": {"bits flipped": 2000, "structural faults": 200},
    "model": {"examples of 50 steps": 300},
    "concurrency": {
        "seconds of 2 writers and 4 readers": 60,
        "inserts by 8 processes": 400,
        "backups while writers ran": 10,
        "locks of killed holders": 20,
    },
    "numbers": {"faults at every step of training": 60},
    "hostile text": {"Unicode": 60, "SQL": 200, "paths": 150, "control tokens and templates": 100},
    "artefacts": {"poisoned artefacts": 200, "mutated headers": 2000},
    "growth": {"edits": 2000},
    "migrations": {"killed upgrades": 10},
    "seeded faults": {"caught": 12},
}


@dataclass(frozen=True)
class Shard:
    """One part of a campaign: what one test runs."""

    campaign: str
    part: int
    parts: int

    def __str__(self) -> str:
        return f"{self.part + 1} of {self.parts}"


def shards(name: str) -> pytest.MarkDecorator:
    """Let a test take the `outcome` of each shard of a campaign; in a small form there is one."""
    parts = CAMPAIGNS[name].shards if SIZE >= 0.5 else 1
    return pytest.mark.parametrize(
        "outcome", [Shard(name, part, parts) for part in range(parts)], ids=str, indirect=True
    )


@dataclass
class Outcome:
    """What a shard found."""

    shard: Shard
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Assert that nothing was found, and that as much was tried as is demanded."""
        assert self.failures == []
        share = min(SIZE, 1.0) / self.shard.parts
        for what, least in DEMANDED.get(self.shard.campaign, {}).items():
            assert self.counts[what] >= int(least * share), what


def run(shard: Shard) -> Outcome:
    """Run a shard as a process of its own."""
    campaign = CAMPAIGNS[shard.campaign]
    command = [sys.executable, "-m", f"tests.robustness.{campaign.module}", *campaign.options]
    command += ["--size", str(SIZE), "--shard", f"{shard.part}/{shard.parts}"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate()
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        return Outcome(shard, failures=[f"{' '.join(command)} ended with {process.returncode}: {err[-3000:]}"])
    found = json.loads(out)
    return Outcome(shard, Counter(found["counts"]), found["failures"], found["lines"])


# -------------------------------------------------------------------- the table

_COUNTED: dict[str, Counter[str]] = {}
_SHOWN: dict[str, list[str]] = {}
_TOOK: dict[str, list[float]] = {}  # seconds, and seconds of processor time


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Take over what a test counted, from another process too."""
    if report.when != "teardown":
        return
    for name, value in report.user_properties:
        if name == "counted":
            campaign, counts, lines = json.loads(str(value))
            _COUNTED.setdefault(campaign, Counter()).update(counts)
            _SHOWN.setdefault(campaign, []).extend(lines)
        elif name == "took":
            campaign, seconds, processor = json.loads(str(value))
            took = _TOOK.setdefault(campaign, [0.0, 0.0])
            took[0] += seconds
            took[1] += processor


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _COUNTED:
        size = "the whole size" if SIZE == 1 else f"size {SIZE:g}; KVLLM_CAMPAIGN=1 is the whole"
        terminalreporter.section(f"campaigns: {size}")
        for line in table():
            terminalreporter.write_line(line)


def table() -> list[str]:
    """Return what each campaign counted, beside what is demanded at the whole size, and what it took."""
    lines = []
    for campaign in [*(name for name in DEMANDED if name in _TOOK), *(name for name in _TOOK if name not in DEMANDED)]:
        seconds, processor = _TOOK[campaign]
        lines.append(f"{campaign}: {seconds:.0f} s, {processor:.0f} s of processor time")
        counts = _COUNTED.get(campaign, Counter())
        for what in [*DEMANDED.get(campaign, {}), *sorted(set(counts) - set(DEMANDED.get(campaign, {})))]:
            least = DEMANDED.get(campaign, {}).get(what)
            asked = "" if least is None else f"  (at least {least:,})"
            short = "  SHORT" if WHOLE and least is not None and counts[what] < least else ""
            lines.append(f"  {counts[what]:>9,} {what}{asked}{short}")
        lines += [f"    {line}" for line in _SHOWN.get(campaign, ())]
    seconds, processor = (sum(each[n] for each in _TOOK.values()) for n in (0, 1))
    lines.append(f"all campaigns: {seconds:.0f} s one after the other, {processor:.0f} s of processor time")
    return lines
