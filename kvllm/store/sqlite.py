"""Connections to the ledger, and SQLite's errors in kvllm's words.

The driver is pysqlite3 where it is installed (it bundles a recent SQLite, and sqlite-utils picks it too), else the
standard library's. sqlite-utils itself is imported only where a schema is made (schema.py): it costs 0.2-0.6 s, which a
read-only `ls` should not pay. This module knows no table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from kvllm.errors import Busy, ConfigError, Corrupt, KvllmError, OutOfResources, StoreError

if TYPE_CHECKING:
    import sqlite3 as sqlite3
else:
    try:
        from pysqlite3 import dbapi2 as sqlite3
    except ImportError:
        import sqlite3

BUSY_SECONDS = 30.0

# Primary result codes, https://www.sqlite.org/rescode.html
_BUSY, _LOCKED, _NOMEM, _READONLY, _IOERR, _CORRUPT, _FULL, _CANTOPEN = 5, 6, 7, 8, 10, 11, 13, 14
_TOOBIG, _CONSTRAINT, _NOTADB = 18, 19, 26
_IOERR_SHORT_READ = 522
# Before Python 3.11 the standard driver has no error codes, only SQLite's fixed English messages.
_MESSAGES = {
    "database is locked": _BUSY,
    "database table is locked": _LOCKED,
    "database or disk is full": _FULL,
    "database disk image is malformed": _CORRUPT,
    "file is not a database": _NOTADB,
    "attempt to write a readonly database": _READONLY,
    "unable to open database file": _CANTOPEN,
    "disk i/o error": _IOERR,
    "out of memory": _NOMEM,
    "constraint failed": _CONSTRAINT,
}


def connect(ledger: Path, *, readonly: bool = False, create: bool = False) -> sqlite3.Connection:
    """Open a ledger in autocommit mode; the caller says BEGIN.

    The journal is a rollback journal with `synchronous=EXTRA`: SQLite's WAL mode had a corruption bug with several
    connections until 3.51.3, creates files for readers, and does not work on network drives.

    Args:
        ledger: The file.
        readonly: Never write, not even to roll back another process's interrupted transaction.
        create: Make the file if it is missing.
    """
    mode = "ro" if readonly else ("rwc" if create else "rw")
    uri = f"file:{quote(os.fsencode(ledger.absolute()))}?mode={mode}"  # bytes: a path need not be UTF-8
    # Threads are kept apart by the mutex in Store, so the driver's own per-thread check is not wanted.
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")  # so that REPLACE cannot bypass the append-only triggers
        connection.execute("PRAGMA trusted_schema = OFF")  # a ledger may come from a stranger
        if not readonly:
            connection.execute("PRAGMA journal_mode = DELETE")  # a tool may have left the file in WAL mode
            connection.execute("PRAGMA synchronous = EXTRA")
            connection.execute("PRAGMA fullfsync = ON")  # macOS: a plain fsync does not reach the disk
    except BaseException:
        connection.close()
        raise
    return connection


def error_code(error: sqlite3.Error) -> int:
    """Return SQLite's extended result code, from the message where the driver has none; 0 if unknown."""
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int):
        return code
    message = str(error).lower()
    return next((code for text, code in _MESSAGES.items() if text in message), 0)


def is_readonly_rollback(error: sqlite3.Error) -> bool:
    """Say whether a read-only connection met a journal that must be rolled back first."""
    return error_code(error) & 0xFF == _READONLY


LEDGER_NAME = "ledger.db"
UNCHANGED = "nothing was changed"
UNCONFIRMED = "it was done all the same, but the disk did not confirm it, and a power cut may undo it"


def translate(
    error: BaseException, path: Path, doing: str, unchanged: str = UNCHANGED, file: str = LEDGER_NAME
) -> KvllmError | None:
    """Return the kvllm error for a failure of SQLite or of the file system, or None for anything else.

    Args:
        error: What was raised.
        path: The knowledge base.
        doing: What was being done, as the beginning of a sentence: "Committing the edit".
        unchanged: What was left as it was.
        file: The database, whose name is told; only a ledger is verified.
    """
    advice = f"run `kvllm verify {path}` or restore a backup" if file == LEDGER_NAME else "restore a copy of it"
    full = "the disk or memory is full"
    said = " ".join(str(error).split())[:200]  # SQLite quotes whole table definitions
    if isinstance(error, sqlite3.Error):
        code = error_code(error)
        primary = code & 0xFF
        where = f"{doing} in {path}"
        if primary in (_BUSY, _LOCKED):
            return Busy(f"{where} was not possible, another process holds the ledger; {unchanged}, try again later.")
        if primary in (_FULL, _NOMEM):
            return OutOfResources(f"{where} failed because {full}; {unchanged}, free some space and repeat.")
        if primary in (_CORRUPT, _NOTADB) or code == _IOERR_SHORT_READ:
            return Corrupt(f"{where} failed because {file} is damaged ({said}); {unchanged}, {advice}.")
        if primary == _READONLY:
            return StoreError(
                f"{where} failed because the ledger cannot be written, was replaced by a repair meanwhile, or has an "
                f"interrupted write to roll back; {unchanged}, open it again with write permission."
            )
        if primary == _CANTOPEN:
            return StoreError(f"{where} failed because {file} cannot be opened; check the folder's permissions.")
        if primary == _CONSTRAINT:
            return StoreError(f"{where} was refused by the ledger's own rules ({said}); {unchanged}.")
        if primary == _TOOBIG:
            return ConfigError(f"{where} failed because a value is too long for SQLite; {unchanged}.")
        if any(sign in str(error).lower() for sign in ("no such table", "no such column", "no such index", "decode")):
            return Corrupt(
                f"{where} failed because {file} does not hold what it should ({said}); {unchanged}, {advice}."
            )
        return StoreError(f"{where} failed: {said}; {unchanged}.")
    if isinstance(error, UnicodeDecodeError):  # SQLite's own message quotes what it found, and the driver decodes it
        return Corrupt(
            f"{doing} in {path} failed because {file} is damaged (a name in it is not text); {unchanged}, {advice}."
        )
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
            return OutOfResources(f"{doing} in {path} failed because {full}; {unchanged}, free some space and repeat.")
        name = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes)) else ""
        return StoreError(f"{doing} in {path} failed: {error.strerror or error}{name}; {unchanged}.")
    return None


@contextmanager
def translated(path: Path, doing: str, unchanged: str = UNCHANGED, *, file: str = LEDGER_NAME) -> Iterator[None]:
    """Turn SQLite's and the file system's errors into kvllm's within the block."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        known = translate(error, path, doing, unchanged, file)
        if known is None:  # pragma: no cover - translate knows both classes
            raise
        raise known from error
