"""Which campaigns there are, how they are run, and the table of what they did.

Every campaign runs as processes of its own, two at a time, from the beginning of the test run. The size is
the environment variable KVLLM_CAMPAIGN: 1 is the whole size, 0.1 a quick look, 10 a night. Where it is not set,
the campaigns are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
SIZE = float(os.environ.get("KVLLM_CAMPAIGN", "1"))
AT_ONCE = 2
_NICE = 19
Test = TypeVar("Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Campaign:
    """A module to run, in how many shards, with which `--n` at size 1 (None: all there is) and other options."""

    module: str
    shards: int
    n: int | None = None
    options: tuple[str, ...] = ()


# The long ones first: the last one alone would leave a processor idle.
CAMPAIGNS = {
    "syscalls": Campaign("syscalls", 4, None, ("--what", "fail")),
    "model": Campaign("model", 4, 300),
    "kill": Campaign("kill", 2, 2000, ("--only", "random")),
    "corruption": Campaign("corruption", 2, 2000),
    "failpoints": Campaign("kill", 2, None, ("--only", "failpoints")),
    "power": Campaign("syscalls", 2, None, ("--what", "power,seeded")),
    "concurrency": Campaign("concurrency", 1, 10),
    "disks": Campaign("syscalls", 1, 144, ("--what", "disk")),
}


def enough(n: int) -> int:
    """Return how many cases a test may demand at the present size."""
    return max(1, int(n * min(SIZE, 1.0)))


def asks_for(name: str) -> Callable[[Test], Test]:
    """Mark a test as one that waits for a campaign, so that it is started early."""

    def mark(test: Test) -> Test:
        test.campaign = name  # type: ignore[attr-defined]
        return test

    return mark


@dataclass
class Outcome:
    """What a campaign's shards found, together."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Runner:
    """Runs campaigns in the background; `outcome` waits for one."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._running: list[subprocess.Popen[str]] = []
        self._futures: dict[str, list[Future[dict[str, Any]]]] = {}
        asked = set(wanted)
        for name in CAMPAIGNS:
            if name in asked:
                self._start(name)

    def _start(self, name: str) -> None:
        campaign = CAMPAIGNS[name]
        size = [] if campaign.n is None else ["--n", str(max(1, int(campaign.n * SIZE)))]
        self._futures[name] = [
            self._pool.submit(
                self._run,
                [f"tests.robustness.{campaign.module}", *campaign.options, *size, "--shard", f"{i}/{campaign.shards}"],
            )
            for i in range(campaign.shards)
        ]

    def _run(self, command: list[str]) -> dict[str, Any]:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._running.append(process)
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICE)  # the tests that run meanwhile come first
        out, err = process.communicate()
        if process.returncode:
            return {"counts": {}, "failures": [f"{' '.join(command)} ended with {process.returncode}: {err[-3000:]}"]}
        found: dict[str, Any] = json.loads(out)
        return found

    def outcome(self, name: str) -> Outcome:
        """Wait for a campaign."""
        if name not in self._futures:
            self._start(name)
        found = Outcome()
        for future in self._futures[name]:
            shard = future.result()
            found.counts.update(shard["counts"])
            found.failures += shard["failures"]
        return found

    def close(self) -> None:
        """End what still runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._running:
            if process.poll() is None:
                process.terminate()


def table(outcomes: dict[str, Outcome]) -> list[str]:
    """Return a line per campaign: its counts, failures last."""
    width = max(map(len, outcomes), default=0)
    lines = []
    for name, outcome in outcomes.items():
        counts = {key: n for key, n in outcome.counts.items() if not key.startswith("at ") and key != "failures"}
        said = ", ".join(f"{n:,} {key}" for key, n in counts.items())
        lines.append(f"{name:<{width}}  {said}; {len(outcome.failures)} failures")
    return lines
