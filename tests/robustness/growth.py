"""How a knowledge base grows: bytes, statements and memory by the number of edits, with no model and no training.

What does not depend on the machine is judged: opening takes as many statements at any length of the history, reading is
linear in it, gc removes what it said it would.
Times and curves are printed beside it; benchmarks/growth.py draws them.

    python -m tests.robustness.growth --size 0.1
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvllm.records import Metric, ProbeResult, Report
from kvllm.store import NewEdit, Store, files
from tests.robustness.harness import Results, campaign, digest
from tests.store.bench import BASE, fact, tiny_delta

EDITS, SMALLEST, POINTS = 2000, 120, 4
BYTES_A_FACT = 400  # each live key is read when a ledger is opened, to be compared with the seal over them
PROBES = 25  # as many as an edit of the engine brings
REPORT = Report(
    {name: Metric(1.0, 8, "live", "contains", "suite/1", 0) for name in ("reliability", "generalization", "locality")},
    tuple(ProbeResult("trained", f"What is it, {n}?", "It is a thing." * 3, True, 1.0) for n in range(PROBES)),
)


def grow(path: Path, edits: int, *, points: set[int], each: Callable[[int], None] | None = None) -> Iterator[int]:
    """Make edits as a person would: mostly inserts, some updates and deletes; yield at the asked numbers of edits."""
    Store.create(path, BASE, {"model": "tiny"}).close()
    with Store.open(path) as store:
        live: list[str] = []
        for number in range(1, edits + 1):
            head = number - 1
            if number % 10 == 0 and live:
                new = NewEdit("update", (live[0],), head, facts=(fact(live[0], f"text {number}"),), report=REPORT)
            elif number % 15 == 0 and live:
                key = live.pop(0)
                new = NewEdit("delete", (key,), head, retired=(key,), report=REPORT)
            else:
                live.append(f"key {number}")
                new = NewEdit("insert", (live[-1],), head, facts=(fact(live[-1]),), report=REPORT)
            store.commit(new, tiny_delta(number))
            if each is not None:
                each(number)
            if number in points:
                yield number


def measured(path: Path, *, memory_of_verify: bool = True) -> dict[str, Any]:
    """Open a knowledge base and use it once: seconds, SQL statements, the most memory, and bytes on disk.

    Args:
        path: The knowledge base.
        memory_of_verify: Ask for that too, which takes as long as all else.
    """
    found: dict[str, Any] = {"ledger_bytes": (path / "ledger.db").stat().st_size}
    with Store.open(path, readonly=True) as store:
        found["facts"] = store.count()
    found["delta_bytes"] = sum(file.stat().st_size for file in (path / "deltas").rglob("*") if file.is_file())
    uses: dict[str, Callable[[Store], object]] = {
        "head": lambda store: store.head(),
        "get": lambda store: store.fact(store.facts()[0].key),
        "ls": lambda store: store.facts(),
        "chain": lambda store: store.chain(store.head()),
        "history": lambda store: store.history(light=True),
        "verify": lambda store: store.verify(),
    }
    started = time.perf_counter()
    Store.open(path, readonly=True).close()
    found["open_seconds"] = time.perf_counter() - started
    for name, use in uses.items():
        statements: list[str] = []
        with Store.open(path, readonly=True) as store:
            started = time.perf_counter()
            use(store)
            found[f"{name}_seconds"] = time.perf_counter() - started
        if name == "verify" and not memory_of_verify:
            continue
        with Store.open(path, readonly=True) as store:
            store._connection().set_trace_callback(statements.append)
            tracemalloc.start()
            use(store)
            found[f"{name}_peak_bytes"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        found[f"{name}_statements"] = len(statements)
    return found


def judge(results: Results, small: dict[str, Any], large: dict[str, Any], times: float) -> None:
    """Compare two points of the curves, the second one with so many times the edits of the first."""

    def check(name: str, least: float, most: float) -> None:
        if not least <= large[name] <= most:
            results.check(f"{small[name]} became {large[name]}, with {times:.1f} times the edits", name)

    check("head_statements", 0, small["head_statements"])
    check("head_peak_bytes", 0, small["head_peak_bytes"] + BYTES_A_FACT * large["facts"])
    for name in ("ls", "chain", "history"):
        check(f"{name}_statements", small[f"{name}_statements"] + 1, 1.5 * times * small[f"{name}_statements"])
        check(f"{name}_peak_bytes", 0, 1.5 * times * small[f"{name}_peak_bytes"])
    for name in ("ledger_bytes", "delta_bytes"):
        check(name, 0.5 * times * small[name], 1.2 * times * small[name])


def collect_garbage(results: Results, path: Path) -> None:
    """Plant what a long life leaves behind: a dry run says what would go and touches nothing, gc removes just that."""
    with Store.open(path) as store:
        for edit_id in range(1, 8):
            store.write_snapshot(edit_id, b"weights" * 100)
        for name in ("deltas/.incoming-1-x", f"deltas/{'0' * 64}", "snapshots/9"):
            (path / name).mkdir()
            (path / name / "left").write_bytes(b"x" * 1000)
        before, looked = digest(path), [fact.to_dict() for fact in store.facts()]
        said = store.gc(dry_run=True)
        results.check(None if digest(path) == before else "a dry run changed something", "gc")
        did = store.gc()
        results.check(None if did.garbage == said.garbage else "gc removed other things than it had said", "gc")
        results.check(None if store.gc(dry_run=True).garbage == () else "gc left garbage", "gc")
        results.check(None if [fact.to_dict() for fact in store.facts()] == looked else "gc changed the facts", "gc")
        report = store.verify(deep=True)
        results.check(None if report.problems == () else f"verify: {report.problems[0]}", "gc")
    results.counts["pieces of garbage removed"] += len(did.garbage)


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    files.fsync_fd = lambda fd: None  # no power is cut
    edits = max(SMALLEST, round(EDITS * given.size))
    points = sorted({edits * n // POINTS for n in range(1, POINTS + 1)} if given.size >= 0.5 else {edits // 4, edits})
    path = work / "growing.kb"
    found = {n: measured(path, memory_of_verify=False) for n in grow(path, edits, points=set(points))}
    first, last = points[0], points[-1]
    judge(results, found[first], found[last], last / first)
    collect_garbage(results, path)
    results.counts["edits"] += edits
    results.lines.append("  edits   open ms   get ms  history ms  verify ms   ledger kB   history MB at most")
    for n in points:
        at = found[n]
        times = [at[f"{name}_seconds"] * 1000 for name in ("open", "get", "history", "verify")]
        results.lines.append(
            f"{n:>7,} {times[0]:>9.1f} {times[1]:>8.1f} {times[2]:>11.1f} {times[3]:>10.0f}"
            f" {at['ledger_bytes'] / 1024:>11,.0f} {at['history_peak_bytes'] / 1e6:>20.1f}"
        )


if __name__ == "__main__":
    campaign(run)
