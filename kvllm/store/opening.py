"""Making a knowledge base's folder, and finding out whether a folder is one.

The layout's names live here. `build` puts the ledger in place with one rename, so that a killed creation leaves nothing
that counts as a knowledge base. Knows nothing of edits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kvllm.errors import ConfigError, Corrupt, StoreError, StoreNotFound
from kvllm.store import artefacts, files, guard, rows, schema
from kvllm.store.failpoints import failpoint
from kvllm.store.rows import Base
from kvllm.store.sqlite import LEDGER_NAME, connect, is_readonly_rollback, sqlite3, translated

DELTAS_NAME = "deltas"
SNAPSHOTS_NAME = "snapshots"
LOCK_NAME = "LOCK"
SNAPSHOT_FILE = "weights.safetensors"
CREATING_NAME = ".creating"
WRITER_SECONDS = 30.0


def refuse_foreign(folder: Path) -> None:
    """Refuse to create in a folder that holds anything but an interrupted creation."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} is a file, not a folder for a knowledge base; nothing was changed.")
    names = {entry.name for entry in os.scandir(folder)}
    if LEDGER_NAME in names:
        raise StoreError(
            f"{folder} already is a knowledge base; nothing was changed, open it or choose another folder."
        )
    # An interrupted backup has deltas before it has a ledger; its `.creating` goes last.
    empty = CREATING_NAME in names or all(
        not any(os.scandir(folder / name))
        for name in (DELTAS_NAME, SNAPSHOTS_NAME)
        if name in names and (folder / name).is_dir()
    )
    if names - {LOCK_NAME, CREATING_NAME, DELTAS_NAME, SNAPSHOTS_NAME} or not empty:
        raise StoreError(
            f"{folder} is not empty and is not a knowledge base; nothing was changed, choose another folder."
        )


def build(folder: Path, base: Base, settings: Mapping[str, str]) -> None:
    """Build ledger and folders; the ledger's rename makes the folder a knowledge base, and is yet to be synced."""
    creating = folder / CREATING_NAME
    files.remove(creating)
    creating.mkdir()
    ledger = creating / LEDGER_NAME
    connection = connect(ledger, create=True)
    try:
        schema.migrate(connection)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO ledger (id, head, created_at) VALUES (1, NULL, ?)", (rows.now(),))
        connection.execute(
            "INSERT INTO base_model (id, name, source, revision, digest, license) VALUES (1, ?, ?, ?, ?, ?)",
            (base.name, base.source, base.revision, base.digest, base.license),
        )
        connection.executemany("INSERT INTO base_files (name, sha256) VALUES (?, ?)", sorted(base.files.items()))
        connection.executemany("INSERT INTO settings (name, value) VALUES (?, ?)", list(settings.items()))
        guard.seal_state(connection)
        connection.execute("COMMIT")
    finally:
        connection.close()
    for name in (DELTAS_NAME, SNAPSHOTS_NAME):
        files.remove(folder / name)
        (folder / name).mkdir()
    failpoint("create.ledger.built")
    files.fsync_folder(creating)
    files.fsync_folder(folder)
    os.rename(ledger, folder / LEDGER_NAME)
    failpoint("create.ledger.renamed")
    with suppress(OSError):
        files.remove(creating)  # it exists now, and an empty folder does no harm


def undo_create(folder: Path, *, remove_folder: bool) -> None:
    """Remove what a failed creation made; what cannot be removed does no harm, since create can be repeated."""
    try:
        if (folder / LEDGER_NAME).exists():
            return
        files.remove(folder / CREATING_NAME)
        for name in (DELTAS_NAME, SNAPSHOTS_NAME):
            if (folder / name).is_dir():
                (folder / name).rmdir()
        (folder / LOCK_NAME).unlink(missing_ok=True)
        if remove_folder:
            folder.rmdir()
    except OSError:
        pass


def find_ledger(folder: Path) -> Path:
    """Return the ledger of an existing knowledge base, or say what stands at the path instead."""
    missing = f"There is no knowledge base at {folder}; create it with `kvllm init {folder}`."
    foreign = f"{folder} is not a knowledge base; nothing was changed."
    if not folder.exists():
        raise StoreNotFound(missing)
    if not folder.is_dir():
        raise StoreError(foreign)
    ledger = folder / LEDGER_NAME
    if not ledger.is_file():
        with translated(folder, "Opening the knowledge base"):
            try:
                refuse_foreign(folder)
            except StoreError:
                raise StoreError(foreign) from None
        raise StoreNotFound(missing)  # an empty folder, or an interrupted creation
    return ledger


def connect_recovered(ledger: Path, *, readonly: bool) -> sqlite3.Connection:
    """Connect; if a killed writer's journal stands in a reader's way, let SQLite roll it back."""
    connection = connect(ledger, readonly=readonly)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
        return connection
    except sqlite3.Error as error:
        connection.close()
        if not (readonly and is_readonly_rollback(error)):
            raise
    except BaseException:
        connection.close()
        raise
    recovering = connect(ledger)
    try:
        recovering.execute("PRAGMA schema_version").fetchone()
    finally:
        recovering.close()
    return connect(ledger, readonly=True)


def identify(connection: sqlite3.Connection, folder: Path) -> None:
    """Refuse what is not a ledger, or one from a newer kvllm. An older one is read as it is; see `Store`."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    if application != schema.APPLICATION_ID:
        if application == 0 and not connection.execute("PRAGMA page_count").fetchone()[0]:
            raise Corrupt(f"The ledger of {folder} is empty; restore it from a backup.")
        raise StoreError(f"{folder} is not a knowledge base: its {LEDGER_NAME} belongs to another program.")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > schema.SCHEMA_VERSION:
        raise StoreError(
            f"{folder} was written by a newer kvllm (ledger version {version}, this one knows "
            f"{schema.SCHEMA_VERSION}); nothing was changed, upgrade kvllm."
        )
    if version < 1:
        raise Corrupt(f"The ledger of {folder} has no version; restore it from a backup.")


def read_base(connection: sqlite3.Connection, folder: Path) -> Base:
    """Return the base model that the ledger pins."""
    row = connection.execute("SELECT name, source, revision, digest, license FROM base_model").fetchone()
    if row is None or connection.execute("SELECT 1 FROM ledger").fetchone() is None:
        raise Corrupt(f"The ledger of {folder} does not name its base model; restore it from a backup.")
    listed = dict(connection.execute("SELECT name, sha256 FROM base_files ORDER BY name").fetchall())
    name, source, revision, digest, license_name = row
    return Base(name, source, revision, listed, digest, license_name)


def check_base(base: Base) -> None:
    """Refuse a base model that the ledger could not hold."""
    for text in (base.name, base.source, base.digest, *base.files):
        rows.checked(text, "A text of the base model")
    for optional in (base.revision, base.license):
        if optional is not None:
            rows.checked(optional, "A text of the base model")
    for name, digest in base.files.items():
        if not artefacts.is_address(digest):
            raise ConfigError(f"The base model's file {name!r} has {digest!r} where its sha256 should be.")
