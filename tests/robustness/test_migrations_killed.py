"""An upgrade of an older ledger, killed anywhere: the ledger is the old one or the new one, and can be upgraded again.

Every earlier schema version has a dump in tests/store (`ledger_v1.sql`, …), made by the kvllm of its time. A version
that does not exist yet is tried too, so that the harness itself is tested while there is only one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.store import Store, schema
from kvllm.store.sqlite import connect, sqlite3
from tests.robustness import ptrace
from tests.robustness.harness import KB, build_template, forked, look, reaped
from tests.robustness.sizes import WHOLE

CAMPAIGN = "migrations"
POINTS = 10 if WHOLE else 3
DUMPS = Path(__file__).parents[1] / "store"
needs_tracing = pytest.mark.skipif(not ptrace.supported(), reason="system calls can be traced on Linux x86-64 only")


def version(path: Path) -> int:
    connection = connect(path / "ledger.db", readonly=True)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def upgrade(path: Path) -> None:
    """What a user does: open it and write."""
    with Store.open(path) as store:
        store.set_settings(upgraded=True)


def next_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be one more version, whose migration changes a table and fills several pages."""
    real, now = schema.migrate, schema.SCHEMA_VERSION

    def migrate(connection: sqlite3.Connection) -> None:
        real(connection)
        if connection.execute("PRAGMA user_version").fetchone()[0] <= now:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE of_the_future (id INTEGER PRIMARY KEY, text TEXT)")
            connection.executemany("INSERT INTO of_the_future (text) VALUES (?)", [("x" * 900,)] * 40)
            connection.execute(f"PRAGMA user_version = {now + 1}")
            connection.execute("COMMIT")

    monkeypatch.setattr(schema, "migrate", migrate)
    monkeypatch.setattr(schema, "SCHEMA_VERSION", now + 1)


@pytest.mark.parametrize("old", range(1, schema.SCHEMA_VERSION + 1))
@needs_tracing
def test_killed_upgrade_is_whole_or_absent(
    old: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    build_template(tmp_path / "old")
    if old == schema.SCHEMA_VERSION:
        next_version(monkeypatch)
    else:
        (tmp_path / "old" / KB / "ledger.db").unlink()
        shutil.rmtree(tmp_path / "old" / KB / "snapshots" / "2")
        ledger = sqlite3.connect(tmp_path / "old" / KB / "ledger.db")
        ledger.executescript((DUMPS / f"ledger_v{old}.sql").read_text(encoding="utf-8"))
        ledger.close()
    path = tmp_path / "my.kb"

    def attempt(kill: int | None) -> list[ptrace.Call]:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "old" / KB, path)
        calls: list[ptrace.Call] = []

        def answer(call: ptrace.Call) -> object:
            calls.append(call)
            return ptrace.KILL if call.number == kill else None

        code = ptrace.trace(lambda: upgrade(path), root=path, answer=answer)
        assert code == (0 if kill is None else -9)
        return calls

    calls = attempt(None)
    after, before = look(path), look(tmp_path / "old" / KB) if old < schema.SCHEMA_VERSION - 1 else None
    assert version(path) == schema.SCHEMA_VERSION
    assert len(calls) > 10
    for point in range(POINTS):
        attempt(point * len(calls) // POINTS)
        with_journal = os.path.exists(path / "ledger.db-journal")
        reaped(forked(lambda: Store.open(path).close()))  # recovers
        assert version(path) in range(old, schema.SCHEMA_VERSION + 1), with_journal
        upgrade(path)
        assert version(path) == schema.SCHEMA_VERSION
        assert look(path) == after
        with Store.open(path) as store:
            assert [p for p in store.verify().problems if p.severity == "error" and "deltas/" not in p.where] == []
    assert before is None or before["live"] == after["live"]
    record({"killed upgrades": POINTS})


def test_every_earlier_version_has_a_dump() -> None:
    assert [old for old in range(1, schema.SCHEMA_VERSION) if not (DUMPS / f"ledger_v{old}.sql").is_file()] == []
