"""What is read from the ledger is compared with its seals first, so that a damaged row is refused and never served.

Two seals: the chain of `seals` over every edit and its rows, and one over everything that may change (head, tags,
settings, live facts, snapshots, the pinned base), kept as a reserved setting and renewed in each transaction. SQLite
has no checksums of its own: a flipped bit in a text is to it just another text. Rows are read here the way they are
served: an index that disagrees with its table must not hide what the seal would show.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvllm.errors import Corrupt
from kvllm.store import history, rows
from kvllm.store.sqlite import sqlite3

RESERVED = "."  # settings whose names begin so are kvllm's own
STATE_SEAL = ".state"
VECTORS = ".vectors"  # names the cached vectors put last: no seal covers those, but each change must change a seal
SEALED = ".sealed"  # says that there must be a seal, so that a damaged name cannot make a ledger look like an older one

_STATE = (
    "SELECT id, head FROM ledger NOT INDEXED ORDER BY rowid",
    "SELECT name, source, revision, digest, license FROM base_model NOT INDEXED ORDER BY rowid",
    "SELECT name, sha256 FROM base_files NOT INDEXED ORDER BY rowid",
    f"SELECT name, value FROM settings NOT INDEXED WHERE name IS NOT '{STATE_SEAL}' ORDER BY rowid",
    "SELECT name, edit_id, created_at FROM tags NOT INDEXED ORDER BY rowid",
    "SELECT fact_id, key FROM live_facts NOT INDEXED ORDER BY rowid",
    "SELECT edit_id, bytes, sha256 FROM snapshots NOT INDEXED ORDER BY rowid",
)


def state_seal(db: sqlite3.Connection) -> str:
    """Return the hash over everything in the ledger that may change."""
    return rows.sha256_of_rows([db.execute(sql).fetchall() for sql in _STATE])


def recorded_state_seal(db: sqlite3.Connection) -> str | None:
    """Return the seal as it stands in the ledger; None in one that never had it (made by an earlier kvllm)."""
    row = db.execute("SELECT value FROM settings NOT INDEXED WHERE name = ?", (STATE_SEAL,)).fetchone()
    return None if row is None else str(row[0]).strip('"')


def state_fits(db: sqlite3.Connection) -> bool:
    """Say whether what may change is what the last transaction left, as far as a ledger of an earlier kvllm tells."""
    recorded = recorded_state_seal(db)
    if recorded is not None:
        return recorded == state_seal(db)
    names = [name for (name,) in db.execute("SELECT name FROM settings NOT INDEXED")]
    return bool(names) and SEALED not in names  # each knowledge base has settings


def seal_state(db: sqlite3.Connection) -> str:
    """Renew the seal, as the last thing in a transaction, and return it."""
    db.execute("INSERT OR IGNORE INTO settings (name, value) VALUES (?, 'true')", (SEALED,))
    seal = state_seal(db)
    value = f'"{seal}"'
    if not db.execute("UPDATE settings SET value = ? WHERE name = ?", (value, STATE_SEAL)).rowcount:
        db.execute("INSERT INTO settings (name, value) VALUES (?, ?)", (STATE_SEAL, value))
    return seal


def note_vectors(db: sqlite3.Connection, digest: str) -> None:
    """Write down, within a transaction, which vectors it caches, so that its COMMIT changes a seal."""
    value = f'"{digest}"'
    if not db.execute("UPDATE settings SET value = ? WHERE name = ?", (value, VECTORS)).rowcount:
        db.execute("INSERT INTO settings (name, value) VALUES (?, ?)", (VECTORS, value))


class Guard:
    """Remembers what one open ledger has been checked for; committed edits never change, so once is enough."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state: tuple[int, int] | None = None
        self._facts: dict[int, frozenset[int]] = {}  # of the edits found whole: ids of the facts they brought in

    def state(self, db: sqlite3.Connection) -> None:
        """Check what may change, unless nobody has written since the last time.

        Raises:
            Corrupt: It is not what the last transaction left.
        """
        # https://www.sqlite.org/pragma.html#pragma_data_version changes with other connections' commits only
        now = (db.execute("PRAGMA data_version").fetchone()[0], db.total_changes)
        if now == self._state:
            return
        if not state_fits(db):
            raise Corrupt(
                f"The ledger of {self.path} is damaged: its head, tags, settings or live facts are not those that were "
                f"committed; nothing was read or changed, run `kvllm verify {self.path}` or restore a backup."
            )
        self._state = now

    def edits(self, db: sqlite3.Connection, ids: Iterable[int]) -> None:
        """Check edits with all their rows against their seals.

        Raises:
            Corrupt: One is missing or was altered; it is named.
        """
        for edit_id in ids:
            if edit_id in self._facts:
                continue
            seals = rows.recorded_seals(db, edit_id - 1, edit_id)
            recorded, version = seals.get(edit_id, (None, 0))
            before = rows.base_seal(db) if edit_id == 1 else seals.get(edit_id - 1, (None, 0))[0]
            if before is None or recorded != rows.edit_seal(db, edit_id, before, version=version):
                raise self._damaged(f"edit {edit_id} is not as it was committed")
            brought = db.execute("SELECT id FROM facts WHERE edit_id = ?", (edit_id,)).fetchall()
            self._facts[edit_id] = frozenset(fact_id for (fact_id,) in brought)

    def history(self, db: sqlite3.Connection, up_to: int | None = None) -> None:
        """Check every edit up to one, by default up to the head."""
        self.edits(db, range(1, (history.head(db) if up_to is None else up_to) + 1))

    def facts(self, db: sqlite3.Connection, found: Iterable[tuple[int, int]], *, expected: int | None = None) -> None:
        """Check versions of facts by the seals of the edits that brought them in.

        Args:
            db: The ledger.
            found: (fact id, edit id), as read.
            expected: How many there must be.
        """
        pairs = list(found)
        if expected is not None and len(pairs) != expected:
            raise self._damaged(f"{expected} facts are live and {len(pairs)} can be read")
        self.edits(db, sorted({edit_id for _, edit_id in pairs if isinstance(edit_id, int)}))
        for fact_id, edit_id in pairs:
            if fact_id not in self._facts.get(edit_id, ()):
                raise self._damaged(f"fact {fact_id} does not belong to the edit it names")

    def _damaged(self, what: str) -> Corrupt:
        return Corrupt(
            f"The ledger of {self.path} is damaged: {what}; nothing was read or changed, run `kvllm verify "
            f"{self.path}` or restore a backup."
        )
