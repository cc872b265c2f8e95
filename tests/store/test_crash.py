"""A process that dies at any step: the knowledge base is the one before or the one after, and can go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.errors import Busy, Corrupt, OutOfResources, StoreError, StoreNotFound
from kvllm.store import NewEdit, Store, failpoints, files
from kvllm.store.sqlite import sqlite3  # the same library: two in one process ignore each other's locks
from tests.store.bench import BASE, Bench, fact, tiny_delta

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
COMMIT = [name for name in failpoints.NAMES if name.startswith("commit.")]
SNAPSHOT = [name for name in failpoints.NAMES if name.startswith("snapshot.")]
CREATE = [name for name in failpoints.NAMES if name.startswith("create.")]


class Stop(BaseException):
    """Stands for Ctrl-C: cleaning up runs."""


def killed_at(name: str, act: Callable[[], object]) -> None:
    """Run `act` in a child that dies, without any cleaning up, when it reaches the failpoint."""
    pid = os.fork()
    if pid == 0:
        try:
            failpoints.hook = lambda reached: os._exit(9) if reached == name else None
            act()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9, f"{name} was not reached"


def insert_b(path: Path) -> None:
    with Store.open(path) as store:
        store.commit(NewEdit("insert", ("b",), 1, facts=(fact("b"),)), tiny_delta(77))


def warnings_only(store: Store) -> list[str]:
    report = store.verify(deep=True)
    assert report.ok, report.problems
    return [problem.what for problem in report.problems]


@needs_fork
@pytest.mark.parametrize("name", COMMIT)
def test_killed_commit_is_whole_or_absent_and_can_be_repeated(bench: Bench, name: str) -> None:
    bench.insert("a")
    path = bench.store.path
    bench.store.close()
    killed_at(name, lambda: insert_b(path))
    with Store.open(path) as store:
        committed = name == "commit.transaction.committed"
        assert store.head() == (2 if committed else 1)
        assert [each.key for each in store.facts()] == (["a", "b"] if committed else ["a"])
        left = warnings_only(store)
        if name in ("commit.delta.written", "commit.delta.synced"):
            assert len(left) == 1
            assert "temporary" in left[0]
        elif not committed and name != "commit.begin":
            assert len(left) == 1
            assert "no edit" in left[0]
        else:
            assert left == []
        if not committed:
            insert_b(path)  # the orphan is taken over, the temporary folder is swept


@pytest.mark.parametrize("name", COMMIT)
def test_interrupted_commit_leaves_no_trace(bench: Bench, name: str) -> None:
    bench.insert("a")
    store = bench.store

    def stop(reached: str) -> None:
        if reached == name:
            raise Stop

    failpoints.hook = stop
    with pytest.raises(Stop):
        bench.insert("b")
    failpoints.hook = None
    committed = name == "commit.transaction.committed"
    assert store.head() == (2 if committed else 1)
    assert len(list((store.path / "deltas").iterdir())) == (2 if committed else 1)
    if not committed:
        bench.insert("b")


def test_commit_reaches_the_steps_in_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    failpoints.hook = steps.append
    for name in ("fsync_fd", "fsync_folder"):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda arg, real=real, name=name: (steps.append(name), real(arg))[1])
    real_rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), real_rename(a, b))[1])
    bench.insert("a")
    assert steps == [
        "commit.begin",
        "fsync_fd",
        "fsync_fd",
        "commit.delta.written",
        "fsync_folder",
        "fsync_fd",
        "commit.delta.synced",
        "rename",
        "commit.delta.renamed",
        "fsync_folder",
        "fsync_fd",
        "commit.delta.folder_synced",
        "commit.delta.verified",
        "commit.transaction.begun",
        "commit.transaction.inserted",
        "commit.transaction.committed",
    ]


@pytest.mark.parametrize("nth", range(4))
def test_failed_fsync_is_not_retried_and_leaves_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    calls = 0
    real = files.fsync_fd

    def failing(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(files, "fsync_fd", failing)
    with pytest.raises(OutOfResources, match="nothing was changed"):
        bench.insert("a")
    assert calls == nth + 1
    assert bench.store.head() == 0
    assert list((bench.store.path / "deltas").iterdir()) == []


def test_full_disk_in_the_ledger_leaves_nothing(bench: Bench) -> None:
    bench.insert("a")
    connection = bench.store._connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to be full
    with pytest.raises(OutOfResources):
        bench.insert("b", config={"long": "x" * 50_000})
    assert bench.store.head() == 1
    assert len(list((bench.store.path / "deltas").iterdir())) == 1
    assert not connection.in_transaction


def test_bytes_that_read_back_differently_are_not_committed(bench: Bench) -> None:
    def flip(reached: str) -> None:
        if reached == "commit.delta.folder_synced":
            (folder,) = (bench.store.path / "deltas").iterdir()
            file = folder / "adapter_model.safetensors"
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 1
            file.write_bytes(bytes(raw))

    failpoints.hook = flip
    with pytest.raises(Corrupt, match="reads back"):
        bench.insert("a")
    failpoints.hook = None
    assert bench.store.head() == 0
    assert list((bench.store.path / "deltas").iterdir()) == []


def test_delta_that_cannot_be_read_back_now_is_not_called_damaged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.sha256_of_file

    def failing(path: Path) -> tuple[str, int]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "sha256_of_file", failing)
    with pytest.raises(StoreError, match="Input/output error") as raised:
        bench.insert("a")
    assert not isinstance(raised.value, Corrupt)
    monkeypatch.setattr(files, "sha256_of_file", real)
    bench.insert("a")


def test_commit_that_the_disk_did_not_confirm_is_not_said_to_have_changed_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LastSyncFails:
        """SQLite's own order: the journal is gone, then its folder's sync fails, and COMMIT reports an error."""

        def __init__(self, connection: sqlite3.Connection) -> None:
            self._connection = connection

        def __getattr__(self, name: str) -> object:
            return getattr(self._connection, name)

        def execute(self, sql: str, *rest: object) -> object:
            done = self._connection.execute(sql, *rest)
            if sql == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return done

    store = bench.store
    connection = store._connection()
    monkeypatch.setattr(store, "_db", LastSyncFails(connection))
    with pytest.raises(StoreError, match="did not confirm") as raised:
        store.tag("v1", 0)
    assert "nothing was changed" not in str(raised.value)
    monkeypatch.setattr(store, "_db", connection)
    assert store.tags() == {"v1": 0}


def test_creation_whose_tidying_fails_is_a_creation(kb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.remove

    def failing(path: Path) -> None:
        if path.name == ".creating" and (kb / "ledger.db").exists():
            raise OSError(errno.EIO, "Input/output error")
        real(path)

    monkeypatch.setattr(files, "remove", failing)
    with Store.create(kb, BASE, {"model": "tiny"}) as store:
        assert [problem.severity for problem in store.verify().problems] == ["warning"]


@needs_fork
def test_killed_backup_can_be_repeated(bench: Bench, tmp_path: Path, verified: Callable[[Path], None]) -> None:
    bench.insert("a")
    path, copy = bench.store.path, tmp_path / "copy.kb"
    bench.store.close()

    def act() -> None:
        with Store.open(path) as store:
            store.backup(copy)

    for name in ("backup.ledger", "backup.deltas", "backup.synced"):
        killed_at(name, act)
        assert not Store.exists(copy)
    with Store.open(path) as store:
        assert store.backup(copy).head == 1
    verified(copy)


@needs_fork
@pytest.mark.parametrize("name", CREATE)
def test_killed_creation_can_be_redone(kb: Path, verified: Callable[[Path], None], name: str) -> None:
    verified(kb)
    killed_at(name, lambda: Store.create(kb, BASE, {"model": "tiny"}))
    if name in ("create.ledger.renamed", "create.done"):
        with Store.open(kb) as store:  # whole
            assert store.settings == {"model": "tiny"}
            assert store.verify().ok
            store.tag("v0", 0)
            with store.writer():
                store.commit(NewEdit("insert", ("a",), 0, facts=(fact("a"),)), tiny_delta())
    else:
        assert not Store.exists(kb)
        with pytest.raises(StoreNotFound):
            Store.open(kb)
        Store.create(kb, BASE, {}).close()


def test_failed_creation_leaves_nothing(kb: Path) -> None:
    def fail(reached: str) -> None:
        if reached == "create.ledger.built":
            raise OSError(errno.ENOSPC, "No space left on device")

    failpoints.hook = fail
    with pytest.raises(OutOfResources):
        Store.create(kb, BASE, {})
    assert not kb.exists()


@needs_fork
@pytest.mark.parametrize("name", SNAPSHOT)
def test_killed_snapshot_is_whole_or_absent(bench: Bench, name: str) -> None:
    bench.insert("a")
    store, path = bench.store, bench.store.path
    store.write_snapshot(1, b"old")

    def act() -> None:
        with Store.open(path) as other:
            other.write_snapshot(1, b"newer")

    killed_at(name, act)
    found = store.read_snapshot(1)
    assert found in (None, b"old", b"newer")
    warnings_only(store)
    store.write_snapshot(1, b"newest")
    assert store.read_snapshot(1) == b"newest"


@needs_fork
def test_killed_tag_is_absent(bench: Bench) -> None:
    path = bench.store.path

    def act() -> None:
        with Store.open(path) as other:
            other.tag("v1", 0)

    killed_at("tag.inserted", act)
    assert bench.store.tags() == {}
    bench.store.tag("v1", 0)


@needs_fork
def test_killed_removal_of_a_tag_leaves_it(bench: Bench) -> None:
    path = bench.store.path
    bench.store.tag("v1", 0)

    def act() -> None:
        with Store.open(path) as other:
            other.untag("v1")

    killed_at("tag.removed", act)
    assert bench.store.tags() == {"v1": 0}
    assert bench.store.untag("v1") == 0


HOT = """
import os, sys
from kvllm.store.sqlite import connect
from pathlib import Path
c = connect(Path(sys.argv[1]))
c.execute("PRAGMA cache_size = 5"); c.execute("PRAGMA cache_spill = 1")
c.execute("BEGIN IMMEDIATE")
for i in range(300):
    c.execute("INSERT INTO settings VALUES (?, ?)", (f"s{i}", '"' + "x" * 2000 + '"'))
os._exit(9)
"""


@pytest.mark.parametrize("readonly", [True, False])
def test_hot_journal_is_rolled_back(bench: Bench, readonly: bool) -> None:
    bench.insert("a")
    path = bench.store.path
    bench.store.close()
    assert subprocess.run([sys.executable, "-c", HOT, str(path / "ledger.db")], check=False).returncode == 9
    assert (path / "ledger.db-journal").stat().st_size > 512
    with Store.open(path, readonly=readonly) as store:
        assert store.settings == {"model": "tiny"}
        assert store.has("a")
        assert store.verify().ok


def test_reader_that_blocks_the_commit_leaves_nothing(bench: Bench) -> None:
    bench.insert("a")
    reader = sqlite3.connect(bench.store.path / "ledger.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM edits").fetchall()
    bench.store._connection().execute("PRAGMA busy_timeout = 50")
    with pytest.raises(Busy):
        bench.insert("b")
    assert len(list((bench.store.path / "deltas").iterdir())) == 1
    reader.close()
    bench.insert("b")


def test_ledger_in_wal_mode_is_taken_back(bench: Bench) -> None:
    bench.insert("a")
    bench.store.close()
    other = sqlite3.connect(bench.store.path / "ledger.db")
    other.execute("PRAGMA journal_mode = WAL")
    other.close()
    with Store.open(bench.store.path) as store:
        assert store._connection().execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert not (bench.store.path / "ledger.db-wal").exists()


def test_ledger_held_by_someone_else_is_busy(bench: Bench) -> None:
    other = sqlite3.connect(bench.store.path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    bench.store._connection().execute("PRAGMA busy_timeout = 50")
    with pytest.raises(Busy):
        bench.store.tag("v1", 0)
    with pytest.raises(Busy):
        bench.insert("a")
    other.execute("ROLLBACK")
    other.close()
    assert list((bench.store.path / "deltas").iterdir()) == []
    bench.insert("a")
