"""How a knowledge base grows: bytes, statements and memory by the number of edits, with no model and no training.

benchmarks/growth.py draws the curves with times; the test looks at what does not depend on the machine.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvllm.records import Metric, ProbeResult, Report
from kvllm.store import NewEdit, Store
from tests.store.bench import BASE, fact, tiny_delta

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


def measured(path: Path) -> dict[str, Any]:
    """Open a knowledge base and use it once: seconds, SQL statements, the most memory, and bytes on disk."""
    found: dict[str, Any] = {"ledger_bytes": (path / "ledger.db").stat().st_size}
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
        with Store.open(path, readonly=True) as store:
            store._connection().set_trace_callback(statements.append)
            tracemalloc.start()
            use(store)
            found[f"{name}_peak_bytes"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        found[f"{name}_statements"] = len(statements)
    return found
