"""Processes at once: writers that wait for each other, readers and backups that see committed states only, locks of the
dead.

    python -m tests.robustness.concurrency --size 0.1
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from kvllm.errors import Busy, StaleHead
from kvllm.store import NewEdit, Store
from tests.robustness.harness import BASE, Results, campaign, fact, forked, reaped, tiny_delta

SECONDS, WRITERS, READERS = 60, 2, 4
INSERTERS, INSERTS = 8, 50
HOLDERS = 20
PATIENCE = 20.0
PAUSE = 0.03  # at most, between two uses: processes that never rest would measure the scheduler
DELTAS = [tiny_delta(seed) for seed in range(16)]


def write(store: Store, key: str, *, text: str = "", patience: float = PATIENCE) -> int:
    """Insert on the newest head, as the engine does: with the lock held from reading the head to the commit."""
    while True:
        try:
            with store.writer(timeout=patience):
                new = NewEdit("insert", (key,), store.head(), facts=(fact(key, text),))
                return store.commit(new, DELTAS[hash(key) % len(DELTAS)]).id
        except StaleHead:
            continue


def children(acts: list[Callable[[int], object]]) -> list[tuple[int, str]]:
    """Run each in a process of its own with a pipe to report on; return exit codes and what was said."""
    running = []
    for act in acts:
        read, pipe = os.pipe()
        running.append((forked(lambda act=act, pipe=pipe: act(pipe), said=pipe), read))
        os.close(pipe)
    found = []
    for pid, read in running:
        said = b""
        while chunk := os.read(read, 1 << 16):
            said += chunk
        os.close(read)
        found.append((reaped(pid), said.decode(errors="replace")))
    return found


def look_at(store: Store, newest: int) -> int:
    """Assert that what can be read is one committed state, not older than the last one seen; return its edit."""
    head = store.head()
    assert head >= newest, f"the head went back from {newest} to {head}"
    for each in store.facts(head):
        assert each.text == f"edit {each.edit_id}", f"{each} is no committed state"
        assert each.edit_id <= head
    if head:
        assert store.edit(head).id == head
        for sha in store.chain(head)[-2:]:
            store.read_delta(sha)
    return head


def told(results: Results, said: str) -> int:
    """Return how often a writer was told that another one writes; it must be told so, and not that SQLite says so."""
    lines = [line for line in said.split("\n") if line.startswith("busy ")]
    for line in lines:
        if not line.startswith("busy 7:") or "database is locked" in line:
            results.check(f"a writer was told {line}", "writers")
    return len(lines)


def readers_and_writers(results: Results, path: Path, seconds: float) -> None:
    """Two write, four read, one makes backups. Each text names its edit, so that a committed state can be told."""
    end = time.monotonic() + seconds

    def change(store: Store, rng: random.Random, key: str) -> int:
        with store.writer(timeout=PATIENCE):
            head = store.head()
            live = [each.key for each in store.facts()]
            text = f"edit {head + 1}"
            if live and rng.random() < 0.3:
                new = NewEdit("update", (live[0],), head, facts=(fact(live[0], text),))
            elif len(live) > 12:
                new = NewEdit("delete", (live[-1],), head, retired=(live[-1],))
            else:
                new = NewEdit("insert", (key,), head, facts=(fact(key, text),))
            return store.commit(new, DELTAS[rng.randrange(len(DELTAS))]).id

    def writer(name: int) -> Callable[[int], object]:
        def act(pipe: int) -> None:
            rng = random.Random(name)
            with Store.open(path) as store:
                number = 0
                while time.monotonic() < end:
                    number += 1
                    try:
                        edit_id = change(store, rng, f"{name}.{number}")
                        os.write(pipe, f"{edit_id}\n".encode())
                        if rng.random() < 0.05:
                            store.write_snapshot(edit_id, b"weights" * 99)
                            store.drop_snapshots(keep=1)
                    except Busy as error:  # only where the machine gives the other one no time
                        os.write(pipe, f"busy {error.exit_code}: {error}\n".encode())
                    time.sleep(rng.random() * PAUSE)

        return act

    def reader(name: int) -> Callable[[int], object]:
        def act(pipe: int) -> None:
            rng = random.Random(name)
            newest = looked = 0
            while time.monotonic() < end:
                with Store.open(path, readonly=bool(name % 2)) as store:
                    for _ in range(5):
                        newest = look_at(store, newest)
                        looked += 1
                        time.sleep(rng.random() * PAUSE)
            os.write(pipe, f"{looked}\n".encode())

        return act

    def keeper(pipe: int) -> None:
        newest = made = 0
        while time.monotonic() < end or not made:
            copy = path.with_name(f"copy-{made}.kb")
            with Store.open(path, readonly=True) as store:
                store.backup(copy)
            with Store.open(copy, readonly=True) as copied:
                newest = look_at(copied, newest)
                assert copied.verify(deep=True).problems == ()
            shutil.rmtree(copy)
            made += 1
            time.sleep(PAUSE)
        os.write(pipe, f"{made}\n".encode())

    acts = [writer(n) for n in range(WRITERS)] + [reader(n) for n in range(READERS)] + [keeper]
    ended = children(acts)
    for code, said in ended:
        if code:
            results.check(f"ended with {code}: {said[-600:]}", "readers and writers")
    acknowledged = sorted(int(line) for _, said in ended[:WRITERS] for line in said.split("\n") if line.isdigit())
    with Store.open(path) as store:
        if acknowledged != list(range(1, store.head() + 1)):
            results.check(f"{len(acknowledged)} edits acknowledged, the head is {store.head()}", "readers and writers")
        report = store.verify(deep=True)
        results.check(None if report.problems == () else f"verify: {report.problems[0]}", "readers and writers")
    counted = [int(said) if code == 0 else 0 for code, said in ended[WRITERS:]]
    results.counts["seconds of 2 writers and 4 readers"] += round(seconds)
    results.counts["edits by 2 writers"] += len(acknowledged)
    results.counts["waited in vain and were told exit 7"] += sum(told(results, said) for _, said in ended[:WRITERS])
    results.counts["states seen by 4 readers"] += sum(counted[:READERS])
    results.counts["backups while writers ran"] += counted[READERS]


def many_inserters(results: Results, path: Path, inserts: int) -> None:
    """Eight processes insert fifty facts each; half of them do not wait: they must be told Busy, and may try again."""

    def inserter(name: int) -> Callable[[int], object]:
        def act(pipe: int) -> None:
            with Store.open(path) as store:
                for number in range(inserts):
                    while True:
                        try:
                            write(store, f"{name}.{number}", patience=PATIENCE if name % 2 else 0.0)
                            break
                        except Busy as error:
                            os.write(pipe, f"busy {error.exit_code}: {error}\n".encode())
                            time.sleep(PAUSE)

        return act

    for code, said in children([inserter(n) for n in range(INSERTERS)]):
        results.counts["did not wait and were told exit 7"] += told(results, said)
        if code:
            results.check(f"ended with {code}: {said[-600:]}", "inserters")
    with Store.open(path) as store:
        results.counts["inserts by 8 processes"] += store.head()
        if not store.head() == store.count() == INSERTERS * inserts:
            results.check(f"{store.head()} edits, {store.count()} facts", "inserters")
        report = store.verify()
        results.check(None if report.problems == () else f"verify: {report.problems[0]}", "inserters")


def dead_holders(results: Results, path: Path, times: int) -> None:
    """Kill who holds the lock; the next writer must get it at once. Who waits for a living one must be told."""
    for number in range(times):
        read, pipe = os.pipe()

        def hold(pipe: int = pipe) -> None:
            with Store.open(path) as store, store.writer():
                os.write(pipe, b"held\n")
                time.sleep(60)

        pid = forked(hold)
        os.read(read, 5)
        with Store.open(path) as store:
            try:
                with store.writer(timeout=0):
                    results.check("a lock that is held was given away", "dead holders")
            except Busy as error:
                if str(pid) not in str(error):
                    results.check(f"the holder is not named: {error}", "dead holders")
            os.kill(pid, signal.SIGKILL)
            reaped(pid)
            try:
                write(store, f"after {number}")
            except Busy as error:
                results.check(f"a dead process's lock blocks: {error}", "dead holders")
        os.close(read)
        os.close(pipe)
        results.counts["locks of killed holders"] += 1


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    for name in "abc":
        Store.create(work / f"{name}.kb", BASE, {"model": "tiny"}).close()
    readers_and_writers(results, work / "a.kb", max(1.0, SECONDS * given.size))
    many_inserters(results, work / "b.kb", max(2, round(INSERTS * min(given.size, 1.0))))
    dead_holders(results, work / "c.kb", max(3, round(HOLDERS * min(given.size, 1.0))))


if __name__ == "__main__":
    campaign(run)
