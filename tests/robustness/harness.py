"""What the store's campaigns share: every verb with a state before and after it, forked children, shards, results.

A campaign is a module that is run as a process of its own (`python -m tests.robustness.kill --size 0.1`): no torch, so
that a fork costs a millisecond, and no pytest between a signal and the store. It prints one JSON document: counts, and
failures as sentences. The tests run the campaigns in shards and read the documents.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kvllm.errors import Corrupt, KvllmError, OutOfResources, StoreNotFound
from kvllm.store import NewEdit, Store, failpoints, files, rows
from kvllm.store.repair import repair
from tests.robustness.sizes import spread
from tests.store.bench import BASE, Bench, fact, small_report, tiny_delta

KB, COPY = "my.kb", "copy.kb"
T = TypeVar("T")


# -------------------------------------------------------------------- what a reader sees


def look(path: Path) -> Any:
    """Return all that readers see of a knowledge base, times left out; None where there is none.

    Reads the way the engine and the commands do, so damage raises kvllm's own errors.
    """
    try:
        store = Store.open(path, readonly=True)
    except StoreNotFound:
        return None
    with store:
        return look_into(store)


def look_into(store: Store) -> dict[str, Any]:
    head = store.head()
    return {
        "head": head,
        "base": store.base,
        "settings": store.settings,
        "tags": store.tags(),
        "history": [_timeless(edit.to_dict()) for edit in store.history()],
        "facts": [[_timeless(each.to_dict()) for each in store.facts(at)] for at in range(head + 1)],
        "live": [_timeless(each.to_dict()) for each in store.facts()],
        "one": [_timeless(store.fact(each.key).to_dict()) for each in store.facts() if store.has(each.key)],
        "chains": [store.chain(at) for at in range(head + 1)],
        "deltas": {sha: dict(store.read_delta(sha).files) for at in range(head + 1) for sha in store.chain(at)},
        "vectors": store.vectors("stub"),
        "absent": (store.has("nobody"), store.fact_versions("nobody")),
    }


def _timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "created_at"}


def errors_of(path: Path, *, deep: bool = True) -> list[str]:
    """Return what `verify` calls an error."""
    with Store.open(path) as store:
        report = store.verify(deep=deep)
    return [f"{problem.where}: {problem.what}" for problem in report.problems if problem.severity == "error"]


# -------------------------------------------------------------------- every verb


@dataclass(frozen=True)
class Verb:
    """One thing the store can be asked to do.

    Attributes:
        name: As in the tables.
        act: Does it, to the folder that holds `my.kb`.
        prepare: Changes a copy of the template first.
        seen: What must be as before or as after; by default all that readers see of `my.kb`.
        repairs: Begins on a damaged knowledge base, so only the end must be right.
    """

    name: str
    act: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda folder: None
    seen: Callable[[Path], Any] = lambda folder: look(folder / KB)
    repairs: bool = False


def _with_bench(use: Callable[[Bench], object]) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        with Store.open(folder / KB) as store:
            bench = Bench(store)
            bench.seed = 100
            use(bench)

    return act


def _snapshots(folder: Path) -> Any:
    """A snapshot may be lost at any time: what counts is that a wrong one is never read, and nothing else changed."""
    found = look(folder / KB)
    with Store.open(folder / KB, readonly=True) as store:
        for edit_id in range(1, found["head"] + 1):
            assert store.read_snapshot(edit_id) in (None, b"weights" * 50, b"newer" * 50)
    return found


def _litter(folder: Path) -> None:
    for name in ("deltas/.incoming-1-x", f"deltas/{'0' * 64}", "snapshots/1", "snapshots/3", ".creating"):
        (folder / KB / name).mkdir(exist_ok=True)
        (folder / KB / name / "weights.safetensors").write_bytes(b"x" * 100)


def _break_ledger(folder: Path) -> None:
    from kvllm.store.sqlite import sqlite3

    other = sqlite3.connect(folder / KB / "ledger.db", isolation_level=None)
    other.execute("DELETE FROM live_facts")
    other.execute("DROP VIEW current_facts")
    other.close()


def _swap_deltas(folder: Path) -> None:
    one, two = sorted((folder / KB / "deltas").iterdir())[:2]
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)


def _lose_delta(folder: Path) -> None:
    with Store.open(folder / KB) as store:
        sha = store.chain(store.head())[-1]
    shutil.rmtree(folder / KB / "deltas" / sha)


VERBS = (
    Verb(
        "create",
        lambda folder: Store.create(folder / KB, BASE, {"model": "tiny", "dtype": "float32"}).close(),
        prepare=lambda folder: shutil.rmtree(folder / KB),
    ),
    Verb("insert", _with_bench(lambda b: b.insert("x", report=small_report()))),
    Verb("insert-many", _with_bench(lambda b: b.insert("x", "y", "z"))),
    Verb("update", _with_bench(lambda b: b.update("a", "newest"))),
    Verb("delete", _with_bench(lambda b: b.delete("b"))),
    Verb("rollback", _with_bench(lambda b: b.rollback(1))),
    Verb("compact", _with_bench(lambda b: b.compact())),
    Verb("tag", _with_bench(lambda b: b.store.tag("v9", 2))),
    Verb("tag --move", _with_bench(lambda b: b.store.tag("v1", 1, move=True))),
    Verb("tag --remove", _with_bench(lambda b: b.store.untag("v1"))),
    Verb("settings", _with_bench(lambda b: b.store.set_settings(dtype="bfloat16", more=[1, 2]))),
    Verb("vectors", _with_bench(lambda b: b.store.put_vectors("stub", {1: b"\x01" * 64, 2: b"\x02" * 64}))),
    Verb("snapshot", _with_bench(lambda b: b.store.write_snapshot(2, b"newer" * 50)), seen=_snapshots),
    Verb("gc", _with_bench(lambda b: b.store.gc()), prepare=_litter, seen=_snapshots),
    Verb("backup", _with_bench(lambda b: b.store.backup(b.store.path.parent / COPY)), seen=lambda f: look(f / COPY)),
    Verb("repair-ledger", lambda folder: repair(folder / KB), prepare=_break_ledger, repairs=True),
    Verb("repair-deltas", lambda folder: repair(folder / KB), prepare=_swap_deltas, repairs=True),
    Verb("repair-cut", lambda folder: repair(folder / KB, yes=True), prepare=_lose_delta, repairs=True),
)


class Folder:
    """A folder's content in memory, laid out again and again: half the time of copying it from the disk."""

    def __init__(self, path: Path) -> None:
        found = sorted((str(each.relative_to(path)), each) for each in path.rglob("*"))
        self._folders = [name for name, each in found if each.is_dir()]
        self._files = [(name, each.read_bytes()) for name, each in found if not each.is_dir()]

    def lay_out(self, path: Path) -> None:
        os.mkdir(path)
        for name in self._folders:
            os.mkdir(f"{path}/{name}")
        for name, content in self._files:
            with open(f"{path}/{name}", "xb", buffering=0) as handle:
                handle.write(content)


@dataclass
class Stage:
    """A folder to lay out before each case, and what the verb makes of it."""

    verb: Verb
    template: Folder
    before: Any
    after: Any
    known: dict[str, Verdict] = field(default_factory=dict)


def build_template(folder: Path) -> None:
    """Make a small knowledge base with something of everything."""
    folder.mkdir(parents=True)
    Store.create(folder / KB, BASE, {"model": "tiny", "dtype": "float32"}).close()
    with Store.open(folder / KB) as store:
        bench = Bench(store)
        bench.insert("a", report=small_report())
        bench.insert("b")
        bench.update("a", "new")
        store.write_snapshot(2, b"weights" * 50)
        store.tag("v1", 2)
        store.put_vectors("stub", {1: b"\x07" * 64})


def stages(work: Path, verbs: Sequence[Verb] = VERBS) -> list[Stage]:
    """Prepare every verb once, and run it once undisturbed."""
    if not (work / "template").exists():
        build_template(work / "template")
    found = []
    for verb in verbs:
        prepared, once = work / f"before-{verb.name}", work / "once"
        shutil.copytree(work / "template", prepared)
        verb.prepare(prepared)
        before = None if verb.repairs else verb.seen(prepared)
        template = Folder(prepared)
        template.lay_out(once)
        verb.act(once)
        after = verb.seen(once)
        assert verb.repairs or verb.name.endswith(("snapshot", "gc")) or before != after, verb.name
        for name in (KB, COPY):
            assert not (once / name).exists() or errors_of(once / name) == [], verb.name
        shutil.rmtree(once)
        found.append(Stage(verb, template, before, after))
    return found


@dataclass(frozen=True)
class Verdict:
    """Where an interrupted verb left things, and what is wrong with that, or with doing it again."""

    place: str
    wrong: str | None
    afterwards: str | None


def conclude(stage: Stage, folder: Path) -> Verdict:
    """Judge a folder and finish the verb there. The same bytes are judged once."""
    key = digest(folder)
    if key not in stage.known:
        place, wrong = judge(stage, folder)
        stage.known[key] = Verdict(place, wrong, finish(stage, folder, place))
    return stage.known[key]


def digest(folder: Path) -> str:
    """Return a hash over every name and byte, but the process id in a lock."""
    found = hashlib.sha256()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            place = entry.path[len(str(folder)) :]
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
                found.update(f"{place}/\n".encode())
            else:
                with open(entry.path, "rb", buffering=0) as handle:
                    data = b"" if entry.name == "LOCK" else handle.read()
                found.update(f"{place}\t{len(data)}\n".encode() + data)
    return found.hexdigest()


def judge(stage: Stage, folder: Path) -> tuple[str, str | None]:
    """Say where an interrupted verb has left things ("before", "after", "damaged"), and what is wrong with that."""
    verb = stage.verb
    if verb.repairs:
        return "damaged", None
    try:
        now = verb.seen(folder)
        place = "after" if now == stage.after else "before" if now == stage.before else "torn"
        if place == "torn":
            return place, "neither the state before nor the one after"
        for name in (KB, COPY):
            if Store.exists(folder / name) and (problems := errors_of(folder / name)):
                return "torn", f"{name} does not verify: {problems[0]}"
    except Exception as error:
        return "torn", f"reading it raised {type(error).__name__}: {error}"
    return place, None


def finish(stage: Stage, folder: Path, place: str) -> str | None:
    """Do the verb again, undisturbed, if it has not happened; return what is wrong then."""
    try:
        if place != "after" or stage.before == stage.after:
            stage.verb.act(folder)
        if stage.verb.seen(folder) != stage.after:
            return "repeating it does not give the state after"
        for name in (KB, COPY):
            if Store.exists(folder / name) and (problems := errors_of(folder / name)):
                return f"after repeating it {name} does not verify: {problems[0]}"
    except Exception as error:
        return f"repeating it raised {type(error).__name__}: {error}"
    return None


# -------------------------------------------------------------------- children

FINISHED, FULL, REFUSED, CORRUPT, UNEXPECTED = 0, 10, 20, 21, 99


class Ended(Exception):
    """A command ended with an exit code and with words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(f"exit code {code}: {words}")
        self.code, self.words = code, words


def forked(act: Callable[[], object], *, before: Callable[[], object] | None = None, said: int | None = None) -> int:
    """Run something in a child that leaves without cleaning up; return its process id.

    Its exit code is one of the numbers above; `said` is a file descriptor that takes the error's words.
    """
    pid = os.fork()
    if pid:
        return pid
    code = UNEXPECTED
    _serials["child"] = 0
    try:
        if before is not None:
            before()
        act()
        code = FINISHED
    except Ended as ended:
        code = _say(said, ended.code, ended.words)
    except OutOfResources as error:
        code = _say(said, FULL, error)
    except Corrupt as error:
        code = _say(said, CORRUPT, error)
    except KvllmError as error:
        code = _say(said, REFUSED, error)
    except BaseException:
        code = _say(said, UNEXPECTED, traceback.format_exc())
    finally:
        os._exit(code)


def _say(said: int | None, code: int, words: object) -> int:
    if said is not None:
        os.write(said, str(words).encode()[-4000:])
    return code


def reaped(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def sigkill_at(name: str, nth: int = 1) -> None:
    """Die at the nth time that a failpoint is reached, as by SIGKILL."""
    left = nth

    def hook(reached: str) -> None:
        nonlocal left
        if reached == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    failpoints.hook = hook


# -------------------------------------------------------------------- results


@dataclass
class Results:
    """Counts and failures of one run, and lines to show below the counts."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def check(self, sentence: str | None, where: str) -> None:
        if sentence is not None:
            self.counts["failures"] += 1
            if len(self.failures) < 20:
                self.failures.append(f"{where}: {sentence}")


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder in memory where there is such a thing: a kill or a forged error needs no disk, and tmpfs is fast."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 1 << 29
    path = Path(tempfile.mkdtemp(prefix="kvllm-campaign-", dir=memory if usable else None))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def campaign(run: Callable[[Results, argparse.Namespace, Path], None]) -> None:
    """Parse the options that every campaign takes, run it in a working folder, print its document."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=float, default=1.0, help="1 is the whole campaign")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", help="this part of how many")
    parser.add_argument("--only", help="one verb")
    parser.add_argument("--what", default="", help="parts of the campaign")
    given = parser.parse_args()
    given.part, given.parts = map(int, given.shard.split("/"))
    results = Results()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the working folder goes too
    random.seed(given.seed)
    gc.freeze()  # a collection in a forked child would copy every page of the parent
    with working_folder() as work:
        run(results, given, work)
    json.dump({"counts": results.counts, "failures": results.failures, "lines": results.lines}, sys.stdout)


def mine(given: argparse.Namespace, items: Sequence[T]) -> list[T]:
    """Return this shard's share."""
    return list(items[given.part :: given.parts])


def share_of(given: argparse.Namespace, n: int) -> int:
    """Return how many of n random cases are this shard's, at the size that was asked for."""
    whole = max(1, round(n * given.size))
    return -(-whole // given.parts)


_serials = {"child": 0}


def make_repeatable() -> None:
    """Let a verb that is interrupted at one place leave the same bytes each time: no clock, no process id, no dice.

    Most cases then leave a folder that has been judged before.
    """

    def incoming_name(parent: Path) -> Path:
        _serials["child"] += 1
        return parent / f"{files.INCOMING}{_serials['child']}"

    rows.now = lambda: "2020-01-01T00:00:00.000+00:00"  # type: ignore[assignment]
    files.incoming_name = incoming_name  # type: ignore[assignment]


__all__ = ["BASE", "Bench", "NewEdit", "fact", "spread", "tiny_delta"]
