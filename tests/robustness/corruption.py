"""Damage: a bit flipped anywhere, and files and rows that are wrong in every way a file or a row can be wrong.

Reading a damaged knowledge base either gives what was committed or raises a kvllm error; `verify --deep` must name
every damage that readers could notice. A repair without consent loses nothing that was committed and still lies there;
one with consent leaves a beginning of the true history.

    python -m tests.robustness.corruption --size 0.1
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvllm.errors import Corrupt, KvllmError
from kvllm.store import Store
from kvllm.store.repair import repair
from kvllm.store.sqlite import sqlite3
from kvllm.store.verify import verify_folder
from tests.robustness.harness import KB, Folder, Results, build_template, campaign, look, look_into, mine, spread
from tests.store.bench import Bench

FLIPS = 2000
REPAIR_EVERY = 5
VECTOR = b"\x07" * 64  # as build_template puts it


def build(work: Path) -> Path:
    """Make a knowledge base with every kind of edit, a tag, a snapshot and cached vectors."""
    build_template(work / "template")
    path = work / "template" / KB
    with Store.open(path) as store:
        bench = Bench(store)
        bench.seed = 50
        bench.delete("b")
        bench.rollback(2)
        bench.insert("c", "d")
        bench.compact()
        bench.insert("e")
        store.write_snapshot(store.head(), b"weights of the head" * 20)
    return path


def reads(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield every read by name, with its answer or the kvllm error it raised. Anything else passes through."""
    try:
        store = Store.open(path, readonly=True)
    except KvllmError as error:
        yield "open", error
        return
    with store:
        asked: dict[str, Callable[[], Any]] = {"everything": lambda: {**look_into(store), "vectors": None}}
        for key in "abcde?":
            asked[f"get {key}"] = lambda key=key: (store.has(key), store.has(key) and store.fact(key).to_dict())
        for number in range(1, 10):
            asked[f"edit {number}"] = lambda number=number: store.edit(number).to_dict()
            asked[f"chain {number}"] = lambda number=number: store.chain(number)
            asked[f"snapshot {number}"] = lambda number=number: store.read_snapshot(number)
        asked |= {
            "head": store.head,
            "tags": store.tags,
            "settings": lambda: store.settings,
            "count": store.count,
            "resolve": lambda: store.resolve("v1"),
            "facts": lambda: [fact.to_dict() for fact in store.facts()],
            "versions": lambda: [fact.to_dict() for key in "abcde" for fact in store.fact_versions(key)],
            "vectors": lambda: store.vectors("stub"),
            "base": lambda: store.base,
        }
        for name, ask in asked.items():
            try:
                yield name, ask()
            except KvllmError as error:
                yield name, error


def missing_at_worst(name: str, answer: Any) -> bool:
    """Say whether an answer that differs is only the loss of what can be made again."""
    return answer is None if name.startswith("snapshot") else name == "vectors" and set(answer.values()) <= {VECTOR}


def examine(results: Results, path: Path, true: dict[str, Any], where: str, *, try_repair: bool) -> None:
    """Read everything, verify deeply, and now and then repair."""
    try:
        noticed, refused = [], 0
        for name, answer in reads(path):
            if isinstance(answer, KvllmError):
                if name == "open" or not isinstance(true[name], KvllmError):
                    noticed.append(name)
                    refused += isinstance(answer, Corrupt)
            elif name in true and not isinstance(true[name], KvllmError) and answer != true[name]:
                noticed.append(name)
                if not missing_at_worst(name, answer):
                    results.check(f"{name} served something else", where)
        report = verify_folder(path, deep=True)
        results.counts["refused by a read"] += bool(refused)
        results.counts["found by verify"] += not report.ok
        results.counts["without effect"] += report.ok and not noticed
        if noticed and report.ok and not report.problems and noticed != ["vectors"]:
            results.check(f"verify found nothing, and {noticed[0]} noticed", where)
        if try_repair:
            repair_and_compare(results, path, true, where, damaged=not report.ok)
    except KvllmError as error:
        results.counts["refused altogether"] += 1
        if "\n" in str(error):
            results.check(f"more than a sentence: {error}", where)
    except Exception as error:
        results.check(f"{type(error).__name__}: {error}", where)


def repair_and_compare(results: Results, path: Path, true: dict[str, Any], where: str, *, damaged: bool) -> None:
    """Repair without consent, which must lose nothing, and, if that was not enough, with it."""
    files_before, edits_before = kept(path)
    results.counts["repairs"] += 1
    try:
        once = repair(path)
    finally:
        files_after, edits_after = kept(path)
        committed = {content for files in true["everything"]["deltas"].values() for content in files.values()}
        if lost := (files_before & committed) - files_after:
            results.check(f"a repair without consent lost {len(lost)} files of committed deltas", where)
        if edits_after < edits_before:
            results.check(f"a repair without consent cut {edits_before} edits to {edits_after}", where)
    results.counts["repaired without consent"] += once.ok and damaged
    if once.ok:
        for name, answer in reads(path):
            differs = name in true and answer != true[name] and not isinstance(true[name], KvllmError)
            if differs and not missing_at_worst(name, answer):
                results.check(f"after a repair without consent {name} is {answer!r:.200}", where)
        return
    if not any(problem.severity == "error" for problem in once.problems):
        results.check("a repair that was not enough does not say what is missing", where)
    twice = repair(path, yes=True)
    if not twice.ok:
        results.counts["beyond repair, and said so"] += 1
        return
    results.counts["repaired with consent"] += 1
    left, whole = look(path), true["everything"]
    head = left["head"]
    for name in ("facts", "chains"):
        if left[name] != whole[name][: head + 1]:
            results.check(f"after a repair with consent {name} are no beginning of the true ones", where)
    # Where a tag was and where it pointed is written nowhere else: the repair asked for consent to take what is there.
    asked = any("tags" in repair.what for repair in twice.repairs)
    if asked and not left["tags"].keys() <= whole["tags"].keys():
        results.check(f"after a repair with consent there are other tags: {left['tags']}", where)
    history = [
        [{**edit, "tags": []} if asked else edit for edit in side] for side in (left["history"], whole["history"])
    ]
    if history[0] != history[1][:head]:
        results.check("after a repair with consent the history is no beginning of the true one", where)
    if any(whole["deltas"].get(sha) != content for sha, content in left["deltas"].items()):
        results.check("after a repair with consent a delta differs", where)


def kept(path: Path) -> tuple[set[bytes], int]:
    """Return the contents of all files of deltas, wherever they lie, and how many edits the ledger can count."""
    found = {file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name.startswith("adapter_")}
    try:
        ledger = sqlite3.connect(f"file:{path / 'ledger.db'}?mode=ro", uri=True)
        try:
            (edits,) = ledger.execute("SELECT count(*) FROM edits").fetchone()
        finally:
            ledger.close()
    except (sqlite3.Error, UnicodeDecodeError):
        edits = 0
    return found, edits


def flips(results: Results, given: argparse.Namespace, path: Path, true: dict[str, Any], case: Path) -> None:
    """Flip one bit. Half of the flips hit the ledger, and most of these a byte that is in use."""
    everything = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "LOCK")
    ledger = path / "ledger.db"
    others = [file for file in everything if file != ledger]
    used = [place for place, byte in enumerate(ledger.read_bytes()) if byte]
    template = Folder(path)
    for number in mine(given, range(max(10, round(FLIPS * given.size)))):
        rng = random.Random(f"{given.seed}-{number}")
        file = ledger if number % 2 else rng.choice(others)
        data = bytearray(file.read_bytes())
        place = rng.choice(used) if file == ledger and number % 8 != 1 else rng.randrange(len(data))
        bit = rng.randrange(8)
        data[place] ^= 1 << bit
        where = f"bit {bit} of byte {place} of {file.relative_to(path)}"
        template.lay_out(case)
        (case / file.relative_to(path)).write_bytes(bytes(data))
        results.counts["bits flipped"] += 1
        examine(results, case, true, where, try_repair=number % (2 * REPAIR_EVERY) < 2)
        shutil.rmtree(case)


def faults(path: Path) -> list[tuple[str, Callable[[Path], object]]]:
    """Return every structural fault: what is done to which file, folder or row."""
    found: list[tuple[str, Callable[[Path], object]]] = []
    names = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != "LOCK")

    def on(name: str, what: str, do: Callable[[Path], object]) -> None:
        found.append((f"{name} {what}", lambda kb: do(kb / name)))

    def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda file: file.write_bytes(change(file.read_bytes()))

    for name in names:
        on(name, "missing", lambda file: file.unlink())
        on(name, "emptied", rewrite(lambda data: b""))
        for share in (1, 2, 3):
            on(name, f"cut to {share}/4", rewrite(lambda data, share=share: data[: len(data) * share // 4]))
        on(name, "one byte short", rewrite(lambda data: data[:-1]))
        on(name, "extended", rewrite(lambda data: data + b"\0"))
        on(name, "zeros", rewrite(lambda data: bytes(len(data))))
        on(name, "noise", rewrite(lambda data: random.Random(1).randbytes(len(data))))
        on(name, "now a folder", lambda file: (file.unlink(), file.mkdir()))
        on(name, "now a link", lambda file: (file.unlink(), file.symlink_to("/etc/hostname")))
        on(name, "unreadable as text", rewrite(lambda data: b"\xff\xfe" + data))
    for one, two in zip(names, names[1:] + names[:1], strict=True):
        found.append((f"{one} swapped with {two}", lambda kb, one=one, two=two: swap(kb / one, kb / two)))
        found.append((f"{one} replaced by {two}", lambda kb, one=one, two=two: shutil.copy(kb / two, kb / one)))
    folders = sorted({os.path.dirname(name) for name in names if "/" in name} | {"deltas", "snapshots"})
    for folder in folders:
        on(folder, "missing", shutil.rmtree)
        on(folder, "renamed", lambda at: at.rename(at.with_name("0" * 64)))
        on(folder, "with a stranger in it", lambda at: (at / "pickle.bin").write_bytes(b"x"))
    size = (path / "ledger.db").stat().st_size
    for page in range(size // 4096):
        for what, change in (("zeroed", bytes(4096)), ("noise", random.Random(page).randbytes(4096))):
            on(
                "ledger.db",
                f"page {page + 1} {what}",
                rewrite(lambda data, page=page, new=change: data[: page * 4096] + new + data[page * 4096 + 4096 :]),
            )
    found += [(f"rows: {sql}", lambda kb, sql=sql: edit_rows(kb, sql)) for sql in row_faults(path)]
    return found


def row_faults(path: Path) -> Iterator[str]:
    """Yield a change of every column, and a loss and a doubling of rows, of every table."""
    connection = sqlite3.connect(path / "ledger.db")
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in sorted(set(tables) - {"_sqlite_migrations", "key_vectors", "sqlite_sequence"}):
        if not connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]:
            continue
        yield f"DELETE FROM {table}"
        yield f"DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})"
        yield f"DROP TABLE {table}"
        for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})"):
            if column == "created_at" and table in ("ledger", "deltas", "snapshots"):
                continue  # shown nowhere, so nothing depends on it
            last = f"WHERE rowid = (SELECT max(rowid) FROM {table})"
            if "INT" in kind or kind == "REAL":
                yield f"UPDATE {table} SET {column} = {column} + 1 {last}"
                yield f"UPDATE {table} SET {column} = 'text' {last}"
            else:
                yield f"UPDATE {table} SET {column} = {column} || 'x' {last}"
                yield f"UPDATE {table} SET {column} = x'ff00' {last}"
    connection.close()


def edit_rows(kb: Path, sql: str) -> None:
    """Change rows as someone would who means it: rules off, triggers dropped and made again."""
    other = sqlite3.connect(kb / "ledger.db", isolation_level=None)
    triggers = other.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    other.execute("PRAGMA ignore_check_constraints = ON")
    other.execute("PRAGMA synchronous = OFF")
    for name, _ in triggers:
        other.execute(f"DROP TRIGGER {name}")
    try:
        other.execute(sql)
    except sqlite3.Error:
        pass  # the table's own rules allow no such row: nothing is damaged then
    for _, made in triggers:
        try:
            other.execute(made)
        except sqlite3.Error:
            pass  # of a dropped table
    other.close()


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def structural(results: Results, given: argparse.Namespace, path: Path, true: dict[str, Any], case: Path) -> None:
    template = Folder(path)
    for number, (where, damage) in enumerate(spread(mine(given, faults(path)), given.size, least=10)):
        template.lay_out(case)
        damage(case)
        results.counts["structural faults"] += 1
        examine(results, case, true, where, try_repair=number % REPAIR_EVERY == 0)
        shutil.rmtree(case)


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    path = build(work)
    true = dict(reads(path))
    assert not isinstance(true["everything"], KvllmError), true["everything"]
    assert verify_folder(path, deep=True).problems == ()
    if given.what != "flips":
        structural(results, given, path, true, work / "case.kb")
    if given.what != "faults":
        flips(results, given, path, true, work / "case.kb")


if __name__ == "__main__":
    campaign(run)
