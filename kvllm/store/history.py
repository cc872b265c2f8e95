"""Reading the ledger's history: the head, the chain of deltas behind an edit, the facts live at an edit.

Plain functions of an open ledger; they know nothing of folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvllm.errors import Corrupt
from kvllm.store.sqlite import sqlite3

# Ids of the facts whose newest event up to an edit says they begin. SQLite takes the bare column `event` from the row
# that has max(edit_id): https://www.sqlite.org/lang_select.html#bareagg. Read through the index that the seals are read
# through: another one may be damaged without a seal showing it.
LIVE_AT = (
    "SELECT fact_id FROM (SELECT fact_id, event, max(edit_id) FROM fact_events INDEXED BY fact_events_by_edit "
    "WHERE edit_id <= ? GROUP BY fact_id) "
    "WHERE event = 'begins'"
)

Links = Mapping[int, tuple[str, int | None, str | None]]


def head(db: sqlite3.Connection) -> int:
    """Return the newest edit's id; 0 is the untouched base."""
    row = db.execute("SELECT coalesce(head, 0) FROM ledger").fetchone()
    if row is None:
        raise Corrupt("The ledger has no head; run `kvllm verify`.")
    return int(row[0])


def links(db: sqlite3.Connection) -> Links:
    """Return edit id → (op, target, delta)."""
    found = db.execute("SELECT id, op, target, delta FROM edits")
    return {edit_id: (op, target, delta) for edit_id, op, target, delta in found}


def chain(history: Links, edit_id: int) -> list[str]:
    """Walk back to the base, or to the newest compact, and return the deltas met, oldest first."""
    deltas: list[str] = []
    current = edit_id
    while current > 0:
        if current not in history:
            raise Corrupt(f"The ledger has no edit {current}, which a later one builds on; run `kvllm verify`.")
        op, target, delta = history[current]
        if op == "rollback":
            current = target if target is not None and target < current else 0
            continue
        if delta is not None:
            deltas.append(delta)
        if op == "compact":
            break
        current -= 1
    return deltas[::-1]


def state(db: sqlite3.Connection, edit_id: int) -> dict[str, int]:
    """Return key → fact id of what was live at an edit."""
    return dict(db.execute(f"SELECT key, id FROM facts WHERE id IN ({LIVE_AT})", (edit_id,)).fetchall())


@contextmanager
def snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """Let several SELECTs see one state, whatever another process commits meanwhile."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN")
    try:
        yield
    finally:
        roll_back(db)


def roll_back(db: sqlite3.Connection) -> None:
    """End the open transaction, if there is one, without a further error."""
    if db.in_transaction:
        try:
            db.execute("ROLLBACK")
        except sqlite3.Error:
            pass  # the first error is the one to report; SQLite rolls back when the connection closes
