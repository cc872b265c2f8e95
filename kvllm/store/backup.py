"""A consistent copy of a knowledge base, made while others read and write it.

The ledger is copied first, in one SQLite snapshot; the deltas that this copy names never change and are never removed,
so they can be copied afterwards in peace. The copied ledger gets its name last, as in a creation: a killed backup is no
knowledge base and can be repeated. Every byte is compared before the copy is called one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvllm.errors import ConfigError, Corrupt
from kvllm.store import artefacts, files, guard, opening
from kvllm.store.failpoints import failpoint
from kvllm.store.lock import WriterLock
from kvllm.store.opening import CREATING_NAME, DELTAS_NAME, LOCK_NAME, SNAPSHOT_FILE, SNAPSHOTS_NAME
from kvllm.store.sqlite import LEDGER_NAME, connect, sqlite3, translated


def copy(source: Path, db: sqlite3.Connection, target: Path, *, tick: Callable[[int, int], None] | None = None) -> None:
    """Copy the knowledge base at `source`, whose ledger is open as `db`, to a new or empty folder.

    Args:
        source, db, target: From where to where.
        tick: Called with deltas copied, of how many.

    Raises:
        StoreError: The target holds something.
        Corrupt: The source is damaged; nothing is left at the target.
    """
    if _inside(target, source):
        raise ConfigError(f"{target} lies in the knowledge base itself; no backup was made, choose another folder.")
    with translated(target, "Making the backup"):
        opening.refuse_foreign(target)
        missing = [parent for parent in (target, *target.parents) if not parent.exists()]
        target.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(target / LOCK_NAME)
        lock.acquire(timeout=0)
        try:
            opening.refuse_foreign(target)  # another process may have been faster
            _fill(source, db, target, tick)
            for made in missing:
                files.fsync_folder(made.parent)
        except BaseException:
            discard(target, remove_folder=target in missing)
            raise
        finally:
            lock.release()
    failpoint("backup.done")


def discard(target: Path, *, remove_folder: bool) -> None:
    """Remove what a failed backup made; what cannot be removed is no knowledge base without its ledger."""
    try:
        (target / LEDGER_NAME).unlink(missing_ok=True)
        for name in (CREATING_NAME, DELTAS_NAME, SNAPSHOTS_NAME):
            files.remove(target / name)
        (target / LOCK_NAME).unlink(missing_ok=True)
        if remove_folder:
            target.rmdir()
    except OSError:
        pass


def _fill(source: Path, db: sqlite3.Connection, target: Path, tick: Callable[[int, int], None] | None) -> None:
    creating = target / CREATING_NAME
    files.remove(creating)
    creating.mkdir()
    copied = connect(creating / LEDGER_NAME, create=True)
    try:
        db.backup(copied)
        failpoint("backup.ledger")
        for name in (DELTAS_NAME, SNAPSHOTS_NAME):
            files.remove(target / name)
            (target / name).mkdir()
        _copy_deltas(source / DELTAS_NAME, copied, target / DELTAS_NAME, tick)
        failpoint("backup.deltas")
        _copy_snapshots(source / SNAPSHOTS_NAME, copied, target / SNAPSHOTS_NAME)
    finally:
        copied.close()
    with open(creating / LEDGER_NAME, "rb") as handle:
        files.fsync_fd(handle.fileno())
    for name in (DELTAS_NAME, SNAPSHOTS_NAME):
        files.fsync_folder(target / name)
    files.fsync_folder(creating)
    files.fsync_folder(target)
    failpoint("backup.synced")
    os.rename(creating / LEDGER_NAME, target / LEDGER_NAME)
    failpoint("backup.renamed")
    files.remove(creating)
    files.fsync_folder(target)


def _copy_deltas(
    source: Path, copied: sqlite3.Connection, target: Path, tick: Callable[[int, int], None] | None
) -> None:
    recorded: dict[str, dict[str, tuple[int, str]]] = {}
    for sha256, name, size, digest in copied.execute("SELECT delta, name, bytes, sha256 FROM delta_files"):
        recorded.setdefault(sha256, {})[name] = (size, digest)
    for done, (sha256, listing) in enumerate(recorded.items(), 1):
        if not artefacts.is_address(sha256) or set(listing) != set(artefacts.FILE_NAMES):
            raise Corrupt(f"The ledger has no complete delta {sha256[:12]!r}; no backup was made, run `kvllm verify`.")
        content = {}
        for name, (size, digest) in listing.items():
            try:
                content[name] = files.read_regular(source / sha256 / name, limit=size)
            except OSError as error:
                if not files.is_no_file(error):
                    raise
                raise _damaged(sha256) from error
            if len(content[name]) != size or files.sha256_of(content[name]) != digest:
                raise _damaged(sha256)
        folder = files.write_folder(target, content, reached=lambda _: None)
        os.rename(folder, target / sha256)
        if tick is not None:
            tick(done, len(recorded))


def _damaged(sha256: str) -> Corrupt:
    return Corrupt(f"The delta {sha256[:12]} is missing or damaged; no backup was made, run `kvllm verify`.")


def _copy_snapshots(source: Path, copied: sqlite3.Connection, target: Path) -> None:
    """Take along the snapshots that are whole; a writer may replace or drop them meanwhile, and nothing needs them."""
    gone = []
    for edit_id, size, digest in copied.execute("SELECT edit_id, bytes, sha256 FROM snapshots").fetchall():
        try:
            (target / str(edit_id)).mkdir()
            found = files.copy_durably(source / str(edit_id) / SNAPSHOT_FILE, target / str(edit_id) / SNAPSHOT_FILE)
            files.fsync_folder(target / str(edit_id))
        except FileNotFoundError:
            found = ("", 0)
        if found != (digest, size):
            files.remove(target / str(edit_id))
            gone.append((edit_id,))
    if gone:
        copied.execute("BEGIN IMMEDIATE")
        copied.executemany("DELETE FROM snapshots WHERE edit_id = ?", gone)
        guard.seal_state(copied)
        copied.execute("COMMIT")


def _inside(target: Path, source: Path) -> bool:
    return target.resolve() == source.resolve() or source.resolve() in target.resolve().parents
