"""SIGKILL: at random moments of a writer that does not stop, and at every failpoint of every verb, twice.

The oracle is a pipe: the writer says what it begins and what was acknowledged, and a pipe outlives its writer.

    python -m tests.robustness.kill --size 0.1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvllm.store import NewEdit, Store, failpoints
from tests.robustness.harness import (
    BASE,
    VERBS,
    Folder,
    Results,
    Stage,
    campaign,
    conclude,
    fact,
    forked,
    make_repeatable,
    mine,
    reaped,
    share_of,
    sigkill_at,
    spread,
    stages,
    tiny_delta,
)

OPS = ("insert", "insert", "insert", "update", "update", "delete", "rollback", "tag", "compact", "snapshot", "gc")
KILLS = 2000
KILLS_PER_STORE = 12
MOST_EDITS = 4  # acknowledged before a kill
LONGEST = 0.004  # seconds from there to the kill: about one edit
DELTAS = [tiny_delta(seed) for seed in range(40)]


@dataclass
class Model:
    """What the store must hold, as a dictionary and a list."""

    live: dict[str, str] = field(default_factory=dict)
    states: list[dict[str, str]] = field(default_factory=lambda: [{}])  # by edit
    tags: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Model:
        return Model(dict(self.live), list(self.states), dict(self.tags))

    def apply(self, op: str, key: str, text: str, target: int) -> None:
        if op == "tag":
            self.tags[key] = target
            return
        if op in ("snapshot", "gc"):
            return
        if op in ("insert", "update"):
            self.live = {**self.live, key: text}
        elif op == "delete":
            self.live = {k: v for k, v in self.live.items() if k != key}
        elif op == "rollback":
            self.live = dict(self.states[target])
        self.states.append(self.live)

    def choose(self, rng: random.Random, serial: str) -> tuple[str, str, str, int]:
        """Return an operation that makes sense now."""
        op = rng.choice(OPS)
        key, target = serial, rng.randrange(len(self.states))
        if op in ("update", "delete"):
            if not self.live:
                return ("insert", key, f"text {serial}", 0)
            key = rng.choice(sorted(self.live))
        if (op == "compact" and not self.live) or (op == "snapshot" and len(self.states) < 2):
            return ("insert", key, f"text {serial}", 0)
        if op == "tag":
            key = f"t{serial}"
        return (op, key, f"text {serial}", max(1, target) if op == "snapshot" else target)


def do(store: Store, op: str, key: str, text: str, target: int, delta: int) -> None:
    """Do one operation to the store."""
    files = DELTAS[delta % len(DELTAS)]
    if op == "tag":
        store.tag(key, target)
    elif op == "snapshot":
        store.write_snapshot(target, text.encode() * 20)
    elif op == "gc":
        store.gc()
    elif op in ("insert", "update"):
        store.commit(NewEdit(op, (key,), store.head(), facts=(fact(key, text),)), files)
    elif op == "delete":
        store.commit(NewEdit("delete", (key,), store.head(), retired=(key,), mode="restore"), files)
    elif op == "rollback":
        store.commit(NewEdit("rollback", (), store.head(), target=target), None)
    else:
        live = tuple(store.facts())
        keys = tuple(each.key for each in live)
        store.commit(NewEdit("compact", keys, store.head(), facts=live, retired=keys), files)


def write_on(path: Path, model: Model, seed: str, pipe: int) -> None:
    """Be the writer: open, and go on until killed."""
    rng = random.Random(seed)
    with Store.open(path) as store:
        for number in range(10_000):
            chosen = model.choose(rng, f"{seed}.{number}")
            os.write(pipe, (json.dumps(chosen) + "\n").encode())
            do(store, *chosen, delta=rng.randrange(1000))
            os.write(pipe, b"ok\n")
            model.apply(*chosen)


def progress(pipe: int, lines: int) -> bytes:
    """Wait until the writer has said so many lines: by its progress, not by the clock, however busy the machine is."""
    said = b""
    while said.count(b"\n") < lines:
        ready, _, _ = select.select([pipe], [], [], 30)
        chunk = os.read(pipe, 1 << 16) if ready else b""
        if not chunk:
            break
        said += chunk
    return said


def difference(store: Store, model: Model) -> str | None:
    """Compare what a store holds with the model."""
    if store.head() != len(model.states) - 1:
        return f"the head is {store.head()}, {len(model.states) - 1} edits were acknowledged"
    if {each.key: each.text for each in store.facts()} != model.live:
        return "the live facts are not those that were acknowledged"
    at = random.randrange(len(model.states))
    if {each.key: each.text for each in store.facts(at)} != model.states[at]:
        return f"the facts at edit {at} are not those that were acknowledged"
    if store.tags() != model.tags:
        return "the tags are not those that were acknowledged"
    return None


def random_kills(results: Results, given: argparse.Namespace, work: Path) -> None:
    """Kill a writer again and again; now and then kill the one that recovers at once."""
    Store.create(work / "empty.kb", BASE, {"model": "tiny"}).close()
    path, model = work / "0.kb", Model()
    for kill in range(share_of(given, KILLS)):
        if kill % KILLS_PER_STORE == 0:
            shutil.rmtree(path, ignore_errors=True)
            path, model = work / f"{kill}.kb", Model()
            shutil.copytree(work / "empty.kb", path)
        read, write = os.pipe()
        seed = f"{given.seed}-{given.part}-{kill}"
        pid = forked(partial(write_on, path, model.copy(), seed, write), said=write)
        os.close(write)
        # One in six dies while it still opens, which is where the one before it is recovered from.
        said = progress(read, random.randrange(2 * MOST_EDITS)) if kill % 6 else b""
        time.sleep(random.uniform(0, LONGEST))
        os.kill(pid, signal.SIGKILL)
        code = reaped(pid)
        while chunk := os.read(read, 1 << 16):
            said += chunk
        os.close(read)
        results.counts["SIGKILLs"] += 1
        if code != -signal.SIGKILL:
            results.check(f"the writer ended by itself: {said[-1000:].decode()}", seed)
            continue
        lines = said.decode().split("\n")[:-1]
        pending: Any = None
        for line in lines:
            if line == "ok":
                model.apply(*pending)
                pending = None
                results.counts["acknowledged"] += 1
            else:
                pending = json.loads(line)
        results.counts["kills within an operation"] += pending is not None
        results.counts["kills that left a journal"] += (path / "ledger.db-journal").exists()
        results.counts["recoveries killed"] += kill % 3 == 0
        wrong = difference_or_pending(path, model, pending, kill_recovery=kill % 3 == 0)
        results.check(wrong, f"kill {seed} in {pending}")
        if wrong is not None:
            shutil.rmtree(path, ignore_errors=True)
            model = Model()
            shutil.copytree(work / "empty.kb", path)


def difference_or_pending(path: Path, model: Model, pending: Any, *, kill_recovery: bool) -> str | None:
    """Verify, and compare with the model, or with what it becomes if the operation that was cut short did happen."""
    if kill_recovery:
        pid = forked(lambda: Store.open(path).close())
        time.sleep(random.uniform(0, 0.003))
        os.kill(pid, signal.SIGKILL)
        reaped(pid)
    try:
        with Store.open(path) as store:
            report = store.verify(deep=True)
            errors = [f"{p.where}: {p.what}" for p in report.problems if p.severity == "error"]
            if errors:
                return f"verify: {errors[0]}"
            wrong = difference(store, model)
            if wrong is not None and pending is not None:
                happened = model.copy()
                happened.apply(*pending)
                if difference(store, happened) is None:
                    model.live, model.states, model.tags = happened.live, happened.states, happened.tags
                    return None
            return wrong
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failpoint_kills(results: Results, given: argparse.Namespace, work: Path) -> None:
    """Kill every verb at every failpoint it reaches; then kill its repetition at every failpoint, and repeat again."""
    case = work / "case"
    for stage in stages(work, mine(given, VERBS)):
        verb = stage.verb
        reached: list[str] = []
        stage.template.lay_out(case)
        failpoints.hook = reached.append
        verb.act(case)
        failpoints.hook = None
        shutil.rmtree(case)
        steps = list(dict.fromkeys(reached))
        results.counts["verbs times failpoints"] += len(steps)
        results.counts.update(f"at {step}" for step in steps)
        for first in spread(steps, given.size):
            stage.template.lay_out(case)
            code = reaped(forked(partial(verb.act, case), before=partial(sigkill_at, first)))
            results.counts["first kills"] += 1
            where = f"{verb.name} killed at {first}"
            if code != -9:
                results.check(f"it was not killed but ended with {code}", where)
            left = Folder(case)
            place = concluded(results, stage, case, where)
            if place == "after":
                continue
            for second in spread(steps, given.size):
                left.lay_out(case)
                reaped(forked(partial(verb.act, case), before=partial(sigkill_at, second)))
                results.counts["second kills"] += 1
                concluded(results, stage, case, f"{where}, then at {second}")
    results.counts["failpoints"] = sum(name.startswith("at ") for name in results.counts)


def concluded(results: Results, stage: Stage, case: Path, where: str) -> str:
    """Judge what is left, finish the verb there, remove the folder; say where the kill had left things."""
    verdict = conclude(stage, case)
    results.check(verdict.wrong, where)
    results.check(verdict.afterwards, where)
    shutil.rmtree(case)
    return verdict.place


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    if given.what != "failpoints":
        random_kills(results, given, work)
    if given.what != "random":
        make_repeatable()
        failpoint_kills(results, given, work)


if __name__ == "__main__":
    campaign(run)
