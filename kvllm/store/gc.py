"""Removing what no history needs: deltas of no edit, temporary names of killed writers, old snapshots.

Every committed delta stays, also one that only a rollback could reach. The writer lock is held while something is
removed, so a commit on its way is never taken for garbage; a dry run takes no lock and changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from kvllm.records import Garbage, GcReport
from kvllm.store import artefacts, files
from kvllm.store.failpoints import failpoint
from kvllm.store.opening import CREATING_NAME, DELTAS_NAME, SNAPSHOT_FILE, SNAPSHOTS_NAME
from kvllm.store.sqlite import sqlite3

KEEP_SNAPSHOTS = 2


def find_garbage(path: Path, db: sqlite3.Connection, *, keep_snapshots: int = KEEP_SNAPSHOTS) -> list[Garbage]:
    """Return what may be removed, in the order in which it should be.

    Args:
        path: The knowledge base.
        db: Its ledger.
        keep_snapshots: So many of the newest usable snapshots stay.
    """
    owned = {sha for (sha,) in db.execute("SELECT sha256 FROM deltas")}
    owned |= {sha for (sha,) in db.execute("SELECT delta FROM edits WHERE delta IS NOT NULL")}
    recorded = dict(db.execute("SELECT edit_id, bytes FROM snapshots ORDER BY edit_id DESC").fetchall())
    found = find_temporary(path)
    for name in _names(path / DELTAS_NAME):
        if artefacts.is_address(name) and name not in owned:
            found.append(_garbage("a delta of no edit", path, f"{DELTAS_NAME}/{name}"))
    for name in _names(path / SNAPSHOTS_NAME):
        if re.fullmatch(r"[1-9][0-9]*", name) and int(name) not in recorded:
            found.append(_garbage("a snapshot that no row records", path, f"{SNAPSHOTS_NAME}/{name}"))
    kept = 0
    for edit_id, size in recorded.items():
        file = snapshot_file(path, edit_id)
        usable = file.is_file() and not file.is_symlink() and file.stat().st_size == size
        kept += usable
        if not usable:
            found.append(_garbage("a snapshot without its file", path, f"{SNAPSHOTS_NAME}/{edit_id}"))
        elif kept > keep_snapshots:
            found.append(_garbage("an old snapshot", path, f"{SNAPSHOTS_NAME}/{edit_id}"))
    return found


def find_temporary(path: Path) -> list[Garbage]:
    """Return the temporary names that a killed writer or creation left."""
    found = (
        [_garbage("a leftover of the creation", path, CREATING_NAME)] if os.path.lexists(path / CREATING_NAME) else []
    )
    return found + [
        _garbage("a temporary name of a writer that was stopped", path, f"{parent}/{name}")
        for parent in (DELTAS_NAME, SNAPSHOTS_NAME)
        for name in _names(path / parent)
        if name.startswith(files.INCOMING)
    ]


def snapshot_file(path: Path, edit_id: int) -> Path:
    """Return where the snapshot of an edit lies, if there is one."""
    return path / SNAPSHOTS_NAME / str(edit_id) / SNAPSHOT_FILE


def snapshot_of(garbage: Garbage) -> int | None:
    """Return the edit whose recorded snapshot this is; None for anything else."""
    if garbage.what in ("an old snapshot", "a snapshot without its file"):
        return int(garbage.where.rpartition("/")[2])
    return None


def remove(path: Path, garbage: list[Garbage]) -> None:
    """Remove what was found; rows that name a snapshot must be gone by now. The caller holds the writer lock."""
    for item in garbage:
        files.remove(path / item.where)
        failpoint("gc.removed")
    for name in (DELTAS_NAME, SNAPSHOTS_NAME):
        if (path / name).is_dir():
            files.fsync_folder(path / name)


def report(garbage: list[Garbage], *, dry_run: bool) -> GcReport:
    """Return what is told about it."""
    return GcReport(dry_run, tuple(garbage), sum(item.bytes for item in garbage))


def _garbage(what: str, path: Path, where: str) -> Garbage:
    return Garbage(what, where, _size(path / where))


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entry.name for entry in entries))
    except (FileNotFoundError, NotADirectoryError):
        return iter(())


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if os.path.lexists(path) else 0
    return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir() or file.is_symlink())
