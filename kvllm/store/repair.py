"""Restoring what can be restored of a damaged knowledge base, and saying what cannot.

What can be worked out again is: live facts and the head from the history, indexes, rules and views from the schema,
snapshots from nothing (opening replays instead), a delta's file from any other place where its bytes still lie. The
history itself cannot: an edit whose rows or delta are lost stays reported, and only with consent (`yes`) is the history
cut back to before it. The new ledger is built beside the old one, checked, and put in its place by one rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from kvllm.errors import Corrupt, KvllmError
from kvllm.records import Problem, Repair, VerifyReport
from kvllm.store import artefacts, files, gc, guard, history, rows, schema
from kvllm.store.failpoints import failpoint
from kvllm.store.lock import WriterLock
from kvllm.store.opening import (
    DELTAS_NAME,
    LOCK_NAME,
    SNAPSHOTS_NAME,
    WRITER_SECONDS,
    connect_recovered,
    find_ledger,
    identify,
)
from kvllm.store.sqlite import LEDGER_NAME, connect, sqlite3, translated
from kvllm.store.verify import told, verify

REPAIRING_NAME = ".repairing"
# In an order in which no row names one that is not there yet. `ledger`, `live_facts` are worked out, not copied.
_COPIED = (
    "base_model",
    "base_files",
    "settings",
    "deltas",
    "delta_files",
    "edits",
    "edit_keys",
    "facts",
    "fact_events",
    "metrics",
    "probes",
    "tags",
    "snapshots",
    "key_vectors",
    "seals",
)
_OF_EDIT = ("edit_keys", "facts", "fact_events", "metrics", "probes", "tags", "snapshots", "seals")


class _Log:
    """Collects what was done, and what waits for consent."""

    def __init__(self, *, yes: bool) -> None:
        self.yes = yes
        self.repairs: list[Repair] = []

    def done(self, what: str, where: str) -> None:
        self.repairs.append(Repair(what, where))

    def consents(self, what: str, where: str) -> bool:
        """Note a step that gives up committed data, and say whether it may be taken."""
        self.repairs.append(Repair(what, where, done=self.yes))
        return self.yes


@contextmanager
def _unadvised() -> Iterator[None]:
    """Tell nobody to verify what is being repaired."""
    try:
        yield
    except Corrupt as error:
        raise Corrupt(told(error)) from error


def repair(
    path: Path, *, yes: bool = False, lock: WriterLock | None = None, lock_timeout: float = WRITER_SECONDS
) -> VerifyReport:
    """Restore what can be restored, and verify deeply what there is then.

    Args:
        path: The knowledge base.
        yes: Give up committed data too, where nothing else brings the rest back: cut the history back to the last whole
            edit, take tags and settings as they stand.
        lock: The writer lock, where the caller holds it.
        lock_timeout: Seconds to wait for another writer.

    Returns:
        `repairs`: what was done, and (`done` false) what only `yes` would do. `problems`: what is wrong still.

    Raises:
        StoreNotFound, StoreError: There is no knowledge base at the path, or a newer kvllm made it.
        Corrupt: The ledger is no longer a database.
        Busy: Another process is writing.
    """
    ledger = find_ledger(path)
    log = _Log(yes=yes)
    with _unadvised(), translated(path, "Repairing the knowledge base"):
        lock = lock or WriterLock(path / LOCK_NAME)
        lock.acquire(timeout=lock_timeout)
        try:
            files.remove(path / REPAIRING_NAME)  # of a repair that was killed
            for name in (DELTAS_NAME, SNAPSHOTS_NAME):
                if not (path / name).is_dir():
                    files.remove(path / name)
                    (path / name).mkdir()
                    log.done("made the missing folder again", name)
            db = connect_recovered(ledger, readonly=False)  # rolls back what a killed writer left
            try:
                identify(db, path)
                _restore_deltas(path, db, log)
                sound = not any(p.severity == "error" for p in _ledger_problems(path, db))
                if not sound:
                    db = _rebuild(path, db, log)
                    sound = not any(p.severity == "error" for p in _ledger_problems(path, db))
                if sound:
                    _cut_lost(path, db, log)
                _tidy(path, db, log, sound=sound)
                report = verify(path, db, deep=True)
            finally:
                db.close()
        finally:
            lock.release()
    return VerifyReport(
        report.ok, report.problems, report.edits, report.facts, report.deltas, deep=True, repairs=tuple(log.repairs)
    )


# -------------------------------------------------------------------- the ledger


def _ledger_problems(path: Path, db: sqlite3.Connection) -> list[Problem]:
    """Return what is wrong with the rows alone."""
    return [
        problem
        for problem in verify(path, db, deep=False).problems
        if not problem.where.startswith((f"{DELTAS_NAME}/", f"{SNAPSHOTS_NAME}/"))
    ]


def _rebuild(path: Path, db: sqlite3.Connection, log: _Log) -> sqlite3.Connection:
    """Copy every readable row into a new ledger, and take that one if its history is whole (or cut, with consent)."""
    folder = path / REPAIRING_NAME
    folder.mkdir()
    new = connect(folder / LEDGER_NAME, create=True)
    try:
        schema.migrate(new)
        _copy_rows(db, new)
        whole, newest = _whole_history(new)
        fits = _finish(new, whole, created_at=_created_at(db, new))
        _begin_rules(new)
        if any(problem.severity == "error" for problem in _ledger_problems(path, new)):
            return db  # not even that helps; what is wrong is reported
        if whole < newest:
            edits = f"edit {newest}" if whole + 1 == newest else f"edits {whole + 1} to {newest}"
            if not log.consents(f"cut the history back to edit {whole}, before the first that is damaged", edits):
                return db
        elif not fits and not log.consents(
            "took head, tags and settings as they stand, which do not fit their seal", "tables ledger, tags, settings"
        ):
            return db
        new.close()
        with open(folder / LEDGER_NAME, "rb") as handle:
            files.fsync_fd(handle.fileno())
        failpoint("repair.built")
        db.close()
        os.replace(folder / LEDGER_NAME, path / LEDGER_NAME)
        failpoint("repair.renamed")
        files.fsync_folder(path)
        log.done("rebuilt it from its rows: head, live facts, indexes, rules and views are made anew", LEDGER_NAME)
        return connect(path / LEDGER_NAME)
    finally:
        new.close()
        shutil.rmtree(folder, ignore_errors=True)


def _copy_rows(db: sqlite3.Connection, new: sqlite3.Connection) -> None:
    """Copy what can be read, table by table; a row that is lost or breaks its table's rules is missed by a seal."""
    new.execute("PRAGMA foreign_keys = OFF")
    for name, (kind, _) in schema.expected_objects().items():
        if kind == "trigger":
            new.execute(f"DROP TRIGGER {name}")
    new.execute("BEGIN IMMEDIATE")
    for table in _COPIED:
        # An older ledger lacks some columns; what the migration would put there is their default.
        there = {name for _, name, *_ in db.execute(f"PRAGMA table_info({table})")}
        columns = [name for _, name, *_ in new.execute(f"PRAGMA table_info({table})") if name in there]
        if not columns:
            continue
        insert = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
        with suppress(sqlite3.Error):
            for row in db.execute(f"SELECT {', '.join(columns)} FROM {table} NOT INDEXED ORDER BY rowid"):
                with suppress(sqlite3.Error):
                    new.execute(insert, row)
    new.execute("COMMIT")


def _whole_history(new: sqlite3.Connection) -> tuple[int, int]:
    """Return the newest edit up to which every seal fits, and the newest edit there is any row of."""
    seals = rows.recorded_seals(new)
    (newest,) = new.execute("SELECT max(coalesce((SELECT max(id) FROM edits), 0), "
                            "coalesce((SELECT max(edit_id) FROM seals), 0))").fetchone()  # fmt: skip
    whole, before = 0, rows.base_seal(new)
    while whole < newest:
        recorded, version = seals.get(whole + 1, (None, 0))
        if recorded is None or rows.edit_seal(new, whole + 1, before, version=version) != recorded:
            break
        whole += 1
        before = recorded
    return whole, newest


def _created_at(db: sqlite3.Connection, new: sqlite3.Connection) -> str:
    try:
        row = db.execute("SELECT created_at FROM ledger NOT INDEXED").fetchone()
    except sqlite3.Error:
        row = None
    if row is None or not isinstance(row[0], str):
        row = new.execute("SELECT created_at FROM edits WHERE id = 1").fetchone()
    return str(row[0]) if row is not None else rows.now()


def _finish(new: sqlite3.Connection, whole: int, *, created_at: str) -> bool:
    """Cut the new ledger at an edit, work out what follows from the history; return whether the state's seal fits."""
    new.execute("BEGIN IMMEDIATE")
    _cut_rows(new, whole)
    new.execute("DELETE FROM ledger")
    new.execute("INSERT INTO ledger (id, head, created_at) VALUES (1, ?, ?)", (whole or None, created_at))
    fits = guard.state_fits(new)
    guard.seal_state(new)
    new.execute("COMMIT")
    return fits


def _cut_rows(db: sqlite3.Connection, last: int) -> None:
    """Remove everything after an edit, within the open transaction; the triggers are gone by now."""
    for table in _OF_EDIT:
        db.execute(f"DELETE FROM {table} WHERE edit_id > ?", (last,))
    db.execute("DELETE FROM edits WHERE id > ?", (last,))
    db.execute("DELETE FROM key_vectors WHERE fact_id NOT IN (SELECT id FROM facts)")
    for table, column in (("delta_files", "delta"), ("deltas", "sha256")):
        db.execute(f"DELETE FROM {table} WHERE {column} NOT IN (SELECT delta FROM edits WHERE delta IS NOT NULL)")
    db.execute("DELETE FROM live_facts")
    db.execute(
        f"INSERT INTO live_facts (fact_id, key) SELECT id, key FROM facts WHERE id IN ({history.LIVE_AT})", (last,)
    )


def _begin_rules(new: sqlite3.Connection) -> None:
    for kind, sql in schema.expected_objects().values():
        if kind == "trigger":
            new.execute(sql)
    new.execute("PRAGMA foreign_keys = ON")


# -------------------------------------------------------------------- deltas


def _recorded(db: sqlite3.Connection) -> dict[str, dict[str, tuple[int, str]]]:
    found: dict[str, dict[str, tuple[int, str]]] = {}
    try:
        for sha256, name, size, digest in db.execute("SELECT delta, name, bytes, sha256 FROM delta_files NOT INDEXED"):
            found.setdefault(sha256, {})[name] = (size, digest)
    except sqlite3.Error:
        return {}
    # Only what proves itself: the listing's own hash is the folder's name.
    return {
        sha: listing
        for sha, listing in found.items()
        if isinstance(sha, str)
        and artefacts.is_address(sha)
        and set(listing) == set(artefacts.FILE_NAMES)
        and artefacts.address(listing) == sha
    }


def _damaged_deltas(path: Path, recorded: Mapping[str, Mapping[str, tuple[int, str]]]) -> list[str]:
    """Return the deltas of which a committed file is missing or altered, or whose folder holds something else too."""
    damaged = []
    for sha, listing in recorded.items():
        folder = path / DELTAS_NAME / sha
        try:
            names = set() if folder.is_symlink() else set(os.listdir(folder))
            fine = names == set(listing) and all(
                files.sha256_of_file(folder / name) == (digest, size) for name, (size, digest) in listing.items()
            )
        except OSError as error:
            if not files.is_no_file(error):
                raise  # cannot be read just now: no reason to give it up
            fine = False
        if not fine:
            damaged.append(sha)
    return damaged


def _unless_no_file(error: OSError) -> None:
    """Raise what says nothing about the file: what cannot be read just now may be what is looked for."""
    if not files.is_no_file(error):
        raise error


def _restore_deltas(path: Path, db: sqlite3.Connection, log: _Log) -> None:
    """Put together again the deltas whose files still lie somewhere under deltas/, under whatever name."""
    parent = path / DELTAS_NAME
    recorded = _recorded(db)
    damaged = _damaged_deltas(path, recorded)
    wanted = {digest for sha in damaged for _, digest in recorded[sha].values()}
    lying: dict[str, Path] = {}
    for folder, _, names in os.walk(parent, onerror=_unless_no_file) if wanted else ():
        for name in sorted(names):
            try:
                digest, _ = files.sha256_of_file(Path(folder) / name)
            except OSError as error:
                _unless_no_file(error)
                continue
            if digest in wanted:
                lying[digest] = Path(folder) / name
    # Everything is prepared, durably, before any name is changed: two folders may have been swapped. No commit sweeps
    # these names away if this is killed.
    prepared = {}
    for sha in damaged:
        if all(digest in lying for _, digest in recorded[sha].values()):
            found = {name: files.read_regular(lying[digest]) for name, (_, digest) in recorded[sha].items()}
            incoming = files.write_folder(parent, found, reached=lambda _: None)
            prepared[sha] = parent / f"{REPAIRING_NAME}-{sha}"
            files.remove(prepared[sha])
            os.rename(incoming, prepared[sha])
    files.fsync_folder(parent)
    failpoint("repair.deltas.prepared")
    for sha, ready in prepared.items():
        if os.path.lexists(parent / sha):
            os.rename(parent / sha, parent / f"{REPAIRING_NAME}-old-{sha}")
        failpoint("repair.delta.aside")
        os.rename(ready, parent / sha)
        log.done("put it together again from files that still lay there", f"{DELTAS_NAME}/{sha}")
    files.fsync_folder(parent)
    for name in os.listdir(parent):
        if name.startswith(REPAIRING_NAME):
            files.remove(parent / name)


def _cut_lost(path: Path, db: sqlite3.Connection, log: _Log) -> None:
    """If the head cannot be replayed because a delta is lost, cut the history back to where it can, with consent."""
    recorded = _recorded(db)
    lost = set(_damaged_deltas(path, recorded))
    try:
        head = history.head(db)
        links = history.links(db)
        if not lost or not lost & set(history.chain(links, head)):
            return  # other lost deltas stay reported: nothing that is in force needs them
        last = next(n for n in range(head - 1, -1, -1) if not lost & set(history.chain(links, n)))
    except (sqlite3.Error, KvllmError):
        return
    edits = f"edit {last + 1}" if last + 1 == head else f"edits {last + 1} to {head}"
    if not log.consents(f"cut the history back to edit {last}, the newest whose deltas are all there", edits):
        return
    triggers = [(name, sql) for name, (kind, sql) in schema.expected_objects().items() if kind == "trigger"]
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("BEGIN IMMEDIATE")
    try:
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        db.execute("UPDATE ledger SET head = ?", (last or None,))
        _cut_rows(db, last)
        for _, sql in triggers:
            db.execute(sql)
        guard.seal_state(db)
        failpoint("repair.cut")
        db.execute("COMMIT")
    except BaseException:
        history.roll_back(db)
        raise
    db.execute("PRAGMA foreign_keys = ON")


# -------------------------------------------------------------------- files


def _tidy(path: Path, db: sqlite3.Connection, log: _Log, *, sound: bool) -> None:
    """Drop damaged snapshots; remove temporary names, and what no row names where the rows can be believed."""
    if not sound:
        for item in gc.find_temporary(path):
            files.remove(path / item.where)
            log.done(f"removed {item.what}", item.where)
        return
    recorded = db.execute("SELECT edit_id, bytes, sha256 FROM snapshots").fetchall()
    damaged = []
    for edit_id, size, digest in recorded:
        try:
            fine = files.sha256_of_file(gc.snapshot_file(path, edit_id)) == (digest, size)
        except OSError:
            fine = False
        if not fine:
            damaged.append(edit_id)
    if damaged:
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM snapshots WHERE edit_id = ?", [(edit_id,) for edit_id in damaged])
        guard.seal_state(db)
        db.execute("COMMIT")
    for edit_id in damaged:
        files.remove(path / SNAPSHOTS_NAME / str(edit_id))
        log.done("dropped the damaged snapshot; opening replays the deltas instead", f"{SNAPSHOTS_NAME}/{edit_id}")
    if vectors := rows.damaged_vectors(db):
        db.execute("BEGIN IMMEDIATE")
        db.executemany("DELETE FROM key_vectors WHERE rowid = ?", [(row,) for row in vectors])
        db.execute("COMMIT")
        log.done("dropped damaged ones; they are computed again", "key vectors")
    for item in gc.find_garbage(path, db, keep_snapshots=len(recorded)):
        files.remove(path / item.where)
        log.done(f"removed {item.what}", item.where)
