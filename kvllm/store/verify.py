"""Compare rows, files and hashes of a knowledge base, in both directions, and report every disagreement.

Rows: SQLite's own checks, the schema, the chain of seals, the order of edits, and the live facts worked out anew from
the operations. Files: every delta and snapshot that a row names, and everything on disk that no row names. Damage is
returned, not raised. Whether a replay gives the recorded weights is the engine's question, not asked here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from kvllm.errors import Corrupt, KvllmError
from kvllm.records import Problem, VerifyReport
from kvllm.store import artefacts, files, guard, rows, schema
from kvllm.store.opening import (
    CREATING_NAME,
    DELTAS_NAME,
    LOCK_NAME,
    SNAPSHOT_FILE,
    SNAPSHOTS_NAME,
    connect_recovered,
    find_ledger,
    identify,
)
from kvllm.store.sqlite import LEDGER_NAME, sqlite3, translated

_FOLDERS = (DELTAS_NAME, SNAPSHOTS_NAME)
_KNOWN = (LEDGER_NAME, f"{LEDGER_NAME}-journal", LOCK_NAME, CREATING_NAME, *_FOLDERS)
_MAX_REPORTED = 20


class _Problems:
    """Collects problems; long lists of one kind are cut."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def add(self, what: str, where: str, severity: Literal["error", "warning"] = "error") -> None:
        self.found.append(Problem(what, where, severity))


def verify(
    path: Path, db: sqlite3.Connection, *, deep: bool, tick: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check the knowledge base at `path`, whose ledger is open as `db`; see `Store.verify`."""
    problems = _Problems()
    counts = {"edits": 0, "live_facts": 0, "deltas": 0}
    deltas: dict[str, dict[str, tuple[int, str]]] = {}
    owners: dict[str, list[int]] = {}
    snapshots: dict[int, tuple[int, str]] = {}
    try:
        db.execute("BEGIN")  # one state, even if another process commits meanwhile; ended before the slow part
        try:
            for table in counts:
                (counts[table],) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
            _check_sqlite(db, problems)
            _check_schema(db, problems)
            _check_history(db, problems)
            _check_state(db, problems)
            _check_records(db, problems)
            for sha256, name, size, digest in db.execute("SELECT delta, name, bytes, sha256 FROM delta_files"):
                deltas.setdefault(sha256, {})[name] = (size, digest)
            for sha256, size in db.execute("SELECT sha256, bytes FROM deltas"):
                if sum(each for each, _ in deltas.setdefault(sha256, {}).values()) != size:
                    problems.add("the sizes of the files do not add up to the recorded size", f"delta {sha256}")
            for edit_id, sha256 in db.execute("SELECT id, delta FROM edits WHERE delta IS NOT NULL ORDER BY id"):
                owners.setdefault(sha256, []).append(edit_id)
            snapshots = {
                i: (size, digest) for i, size, digest in db.execute("SELECT edit_id, bytes, sha256 FROM snapshots")
            }
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
    except (sqlite3.Error, TypeError, ValueError, LookupError, KvllmError) as error:
        problems.add(f"the ledger cannot be read to its end ({told(error)})", "ledger.db")
    try:
        _check_top(path, problems)
        _check_deltas(path / DELTAS_NAME, deltas, owners, problems, deep=deep, tick=tick)
        _check_snapshots(path / SNAPSHOTS_NAME, snapshots, problems, deep=deep)
    except OSError as error:
        problems.add(f"the folder cannot be read ({error.strerror or error})", str(error.filename or path))
    return VerifyReport(
        ok=not any(problem.severity == "error" for problem in problems.found),
        problems=tuple(problems.found),
        edits=counts["edits"],
        facts=counts["live_facts"],
        deltas=counts["deltas"],
        deep=deep,
    )


def verify_folder(path: Path, *, deep: bool) -> VerifyReport:
    """Check a knowledge base that may be too damaged to be opened; a ledger that cannot be read is one more problem.

    Raises:
        StoreNotFound, StoreError: There is none at the path, or a newer kvllm made it.
    """
    ledger = find_ledger(path)
    try:
        with translated(path, "Reading the ledger"):
            db = connect_recovered(ledger, readonly=True)
            try:
                identify(db, path)
                return verify(path, db, deep=deep)
            finally:
                db.close()
    except Corrupt as error:
        return VerifyReport(False, (Problem(told(error), LEDGER_NAME),), deep=deep)


def told(error: BaseException) -> str:
    """Return an error's sentence without the advice to run what is running already."""
    return re.sub(r"([;,]) run `kvllm verify[^`]*`( or)?", lambda found: found[1] if found[2] else "", str(error))


# -------------------------------------------------------------------- rows


def _check_sqlite(db: sqlite3.Connection, problems: _Problems) -> None:
    for (message,) in db.execute(f"PRAGMA integrity_check({_MAX_REPORTED})").fetchall():
        if message != "ok":
            problems.add(f"SQLite's integrity check: {message}", "ledger.db")
    for table, rowid, parent, _ in db.execute("PRAGMA foreign_key_check").fetchmany(_MAX_REPORTED):
        problems.add(f"a row refers to a row of {parent} that does not exist", f"table {table}, row {rowid}")


def _check_schema(db: sqlite3.Connection, problems: _Problems) -> None:
    found = schema.objects(db)
    expected = schema.expected_objects(schema.version(db))
    for name, (kind, sql) in expected.items():
        if name not in found:
            problems.add(f"the {kind} is missing", name)
        elif found[name] != (kind, sql):
            problems.add(f"the {kind} is not as kvllm made it", name)
    for name, (kind, _) in found.items():
        if kind == "trigger" and name not in expected:
            problems.add("the trigger is not kvllm's, and may change what is committed", name)


def _check_history(db: sqlite3.Connection, problems: _Problems) -> None:
    ids = [edit_id for (edit_id,) in db.execute("SELECT id FROM edits ORDER BY id")]
    newest = ids[-1] if ids else 0
    if ids != list(range(1, newest + 1)):
        gap = next(n for n in range(1, newest + 1) if n > len(ids) or ids[n - 1] != n)
        problems.add(f"edit {gap} is missing: the history has a gap", "table edits")
    heads = [head for (head,) in db.execute("SELECT coalesce(head, 0) FROM ledger")]
    if heads != [newest]:
        problems.add(f"the head is {', '.join(map(str, heads)) or 'missing'}, the newest edit {newest}", "table ledger")
    for edit_id, parent in db.execute("SELECT id, coalesce(parent, 0) FROM edits WHERE coalesce(parent, 0) != id - 1"):
        problems.add(f"its parent is {parent}: the history is not linear", f"edit {edit_id}")
    seals = rows.recorded_seals(db)
    before = rows.base_seal(db)
    for edit_id in ids:
        recorded, version = seals.get(edit_id, (None, 0))
        if recorded is None:
            problems.add("it has no seal", f"edit {edit_id}")
        elif rows.edit_seal(db, edit_id, before, version=version) != recorded:
            problems.add(
                "its rows (or the base model's, for edit 1) are not those that were committed: the seal does not fit",
                f"edit {edit_id}",
            )
        before = recorded or ""  # go on from what is recorded, so that one altered edit is one problem
    if any(edit_id not in set(ids) for edit_id in seals):
        problems.add("a seal belongs to no edit", "table seals")


def _check_state(db: sqlite3.Connection, problems: _Problems) -> None:
    """Work out every state from the operations alone, and compare it with the events and the live facts."""
    brought: dict[int, dict[str, int]] = {}
    for edit_id, key, fact_id in db.execute("SELECT edit_id, key, id FROM facts ORDER BY id"):
        brought.setdefault(edit_id, {})[key] = fact_id
    events: dict[int, dict[str, set[int]]] = {}
    for fact_id, edit_id, event in db.execute("SELECT fact_id, edit_id, event FROM fact_events"):
        events.setdefault(edit_id, {"begins": set(), "ends": set()})[event].add(fact_id)
    targets = {target for (target,) in db.execute("SELECT target FROM edits WHERE target IS NOT NULL")}
    kept: dict[int, dict[str, int]] = {0: {}}
    state: dict[str, int] = {}
    nothing: dict[str, set[int]] = {"begins": set(), "ends": set()}
    for edit_id, op, target in db.execute("SELECT id, op, target FROM edits ORDER BY id"):
        before, happened = set(state.values()), events.get(edit_id, nothing)
        if op == "rollback":
            state = dict(kept.get(target, {}))
        elif op == "compact":
            state = dict(brought.get(edit_id, {}))
        else:
            state = {key: i for key, i in state.items() if i not in happened["ends"]} | brought.get(edit_id, {})
        after = set(state.values())
        if happened["begins"] != after - before or happened["ends"] != before - after:
            problems.add("the facts that begin and end with it do not fit its operation", f"edit {edit_id}")
        if edit_id in targets:
            kept[edit_id] = dict(state)
    live = dict(db.execute("SELECT key, fact_id FROM live_facts").fetchall())
    for key in sorted(set(state) | set(live)):
        if state.get(key) != live.get(key):
            problems.add(
                f"the history says version {state.get(key)} is live, the list of live facts says {live.get(key)}",
                f"fact {key!r}",
            )
    if not guard.state_fits(db):
        problems.add("head, tags, settings or live facts are not those that were committed", LEDGER_NAME)


def _check_records(db: sqlite3.Connection, problems: _Problems) -> None:
    """Every row must still turn into the record that the API returns."""
    (newest,) = db.execute("SELECT coalesce(max(id), 0) FROM edits").fetchone()
    for edit_id in range(1, newest + 1):
        try:
            rows.read_edits(db, edit_id, edit_id)
        except (KvllmError, TypeError, ValueError) as error:
            problems.add(f"it cannot be read: {told(error)}", f"edit {edit_id}")
    for row in db.execute(f"SELECT {rows.FACT_COLUMNS} FROM facts"):
        try:
            rows.fact_from_row(row)
        except (KvllmError, TypeError, ValueError) as error:
            problems.add(f"it cannot be read: {told(error)}", f"fact {row[0]}")
    for name, value in db.execute("SELECT name, value FROM settings"):
        try:
            rows.loaded(value, f"setting {name!r}")
        except KvllmError as error:
            problems.add(f"it cannot be read: {told(error)}", f"setting {name!r}")
    if damaged := rows.damaged_vectors(db):
        problems.add(f"{len(damaged)} are damaged; they are not used, and are computed again", "key vectors", "warning")


# -------------------------------------------------------------------- files


def _check_top(path: Path, problems: _Problems) -> None:
    for entry in _entries(path):
        if entry.name == CREATING_NAME:
            problems.add("a leftover of the creation; harmless, may be removed", entry.name, "warning")
        elif entry.name not in _KNOWN:
            problems.add("is not part of a knowledge base", entry.name, "warning")
    for name in _FOLDERS:
        if not (path / name).is_dir():
            problems.add("the folder is missing", name, "error" if name == DELTAS_NAME else "warning")


def _check_deltas(
    parent: Path,
    recorded: dict[str, dict[str, tuple[int, str]]],
    owners: dict[str, list[int]],
    problems: _Problems,
    *,
    deep: bool,
    tick: Callable[[int, int], None] | None,
) -> None:
    present = {entry.name: entry for entry in _entries(parent)}
    for name in sorted(set(present) - set(recorded)):
        _stray(
            name,
            f"deltas/{name}",
            "a delta of no edit (a commit was interrupted)",
            artefacts.is_address(name),
            problems,
        )
    for done, (sha256, listing) in enumerate(recorded.items(), 1):
        edits = owners.get(sha256, [])
        where = f"deltas/{sha256} (edit {', '.join(map(str, edits)) or 'none'})"
        if not edits:
            problems.add("no edit refers to the delta", where)
        if set(listing) != set(artefacts.FILE_NAMES) or artefacts.address(listing) != sha256:
            problems.add("the recorded files do not give the recorded sha256", where)
        entry = present.get(sha256)
        if entry is None:
            problems.add("the folder is missing", where)
        elif not entry.is_dir(follow_symlinks=False):
            problems.add("is not a folder", where)
        else:
            _check_delta_folder(parent / sha256, listing, where, problems, deep=deep)
        if tick is not None:
            tick(done, len(recorded))


def _check_delta_folder(
    folder: Path, listing: dict[str, tuple[int, str]], where: str, problems: _Problems, *, deep: bool
) -> None:
    present = {entry.name: entry for entry in _entries(folder)}
    for name in sorted(set(present) - set(listing)):
        problems.add(f"contains {name!r}, which was not committed", where)
    content: dict[str, bytes] = {}
    for name, (size, digest) in listing.items():
        entry = present.get(name)
        if entry is None:
            problems.add(f"{name} is missing", where)
        elif not entry.is_file(follow_symlinks=False):
            problems.add(f"{name} is not a file", where)
        elif entry.stat(follow_symlinks=False).st_size != size:
            problems.add(f"{name} has {entry.stat(follow_symlinks=False).st_size} bytes instead of {size}", where)
        elif deep:
            content[name] = files.read_regular(folder / name)
            if files.sha256_of(content[name]) != digest:
                problems.add(f"{name} is not the file that was committed: its sha256 differs", where)
    if deep and set(content) == set(listing):
        try:
            artefacts.check_delta(content, max_norm=None)
        except KvllmError as error:
            problems.add(told(error), where)


def _check_snapshots(parent: Path, recorded: dict[int, tuple[int, str]], problems: _Problems, *, deep: bool) -> None:
    present = {entry.name for entry in _entries(parent)}
    for name in sorted(present - {str(edit_id) for edit_id in recorded}):
        is_edit = re.fullmatch(r"[1-9][0-9]*", name) is not None
        _stray(name, f"snapshots/{name}", "a snapshot that no row records", is_edit, problems)
    for edit_id, (size, digest) in recorded.items():
        where = f"snapshots/{edit_id}"
        file = parent / str(edit_id) / SNAPSHOT_FILE
        if not file.is_file():
            problems.add("the snapshot is missing; opening replays the deltas instead", where, "warning")
        elif (
            file.is_symlink() or file.stat().st_size != size or (deep and files.sha256_of_file(file) != (digest, size))
        ):
            problems.add("the snapshot is damaged; it is not used, and the deltas are replayed instead", where)


def _stray(name: str, where: str, orphan: str, is_orphan: bool, problems: _Problems) -> None:
    if name.startswith(files.INCOMING):
        problems.add(
            "a temporary folder of a writer that was stopped; harmless, the next commit removes it", where, "warning"
        )
    elif is_orphan:
        problems.add(f"{orphan}; harmless, may be removed", where, "warning")
    else:
        problems.add("is not part of a knowledge base", where, "warning")


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Return a folder's entries by name; none if it is not there."""
    try:
        with os.scandir(folder) as found:
            return iter(sorted(found, key=lambda entry: entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return iter(())
