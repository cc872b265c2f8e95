"""Creating and opening: what is refused, what is never touched, and how long it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.errors import ConfigError, Corrupt, StoreError, StoreNotFound
from kvllm.store import Base, NewEdit, Store
from kvllm.store.sqlite import connect, sqlite3  # the same library: two in one process ignore each other's locks
from tests.store.bench import BASE, Bench, fact, small_report, tiny_delta


def traces(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything about a tree that writing would change."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def test_readonly_touches_nothing(bench: Bench) -> None:
    bench.insert("a", report=small_report())
    bench.store.write_snapshot(1, b"weights")
    bench.store.close()
    before = traces(bench.store.path)
    with Store.open(bench.store.path, readonly=True) as store:
        store.facts(), store.history(), store.facts(0), store.tags(), store.settings, store.chain(1)
        store.read_delta(store.chain(1)[0]), store.nearest_snapshot(1), store.read_snapshot(1)
        assert store.verify(deep=True).ok
        assert traces(bench.store.path) == before
    assert traces(bench.store.path) == before


def test_readonly_works_in_a_folder_without_write_permission_and_without_a_lock_file(bench: Bench) -> None:
    bench.insert("a")
    path = bench.store.path
    bench.store.close()
    (path / "LOCK").unlink()
    path.chmod(0o555)
    try:
        with Store.open(path, readonly=True) as store:
            assert store.has("a")
    finally:
        path.chmod(0o755)
    assert not (path / "LOCK").exists()


def test_readonly_refuses_to_write(bench: Bench) -> None:
    bench.insert("a")
    with Store.open(bench.store.path, readonly=True) as store:
        for write in (
            lambda: store.commit(NewEdit("rollback", (), 1, target=0), None),
            lambda: store.tag("v1", 1),
            lambda: store.untag("v1"),
            lambda: store.set_settings(a=1),
            lambda: store.put_vectors("e", {1: b""}),
            lambda: store.write_snapshot(1, b"x"),
            lambda: store.drop_snapshots(),
            lambda: store.writer().__enter__(),
        ):
            with pytest.raises(StoreError, match="read-only"):
                write()


def test_missing_path_says_how_to_create(tmp_path: Path) -> None:
    for path in (tmp_path / "no.kb", tmp_path):  # an empty folder is none either
        for readonly in (True, False):
            with pytest.raises(StoreNotFound, match="create it with `kvllm init"):
                Store.open(path, readonly=readonly)
    assert list(tmp_path.iterdir()) == []
    assert not Store.exists(tmp_path)


def test_foreign_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "photo.jpg"):
        with pytest.raises(StoreError, match="not a knowledge base") as caught:
            Store.open(path)
        assert caught.value.code == "store_error"
        with pytest.raises(StoreError):
            Store.create(path, BASE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_another_programs_sqlite_file_is_refused(kb: Path) -> None:
    kb.mkdir()
    with sqlite3.connect(kb / "ledger.db") as other:
        other.execute("CREATE TABLE edits (id)")
    other.close()
    before = traces(kb)
    with pytest.raises(StoreError, match="not a knowledge base") as caught:
        Store.open(kb)
    assert caught.value.code == "store_error"
    assert traces(kb) == before


def test_newer_ledger_is_refused_untouched(damaged: Bench) -> None:
    path = damaged.store.path
    damaged.store.close()
    with sqlite3.connect(path / "ledger.db") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    before = traces(path)
    for readonly in (True, False):
        with pytest.raises(StoreError, match="upgrade kvllm"):
            Store.open(path, readonly=readonly)
    assert traces(path) == before


def test_damaged_ledger_is_corrupt(damaged: Bench) -> None:
    path = damaged.store.path
    damaged.store.close()
    whole = (path / "ledger.db").read_bytes()
    for content in (b"", b"rubbish" * 1000, whole[:5000], whole[:100] + b"\xff" * (len(whole) - 100)):
        (path / "ledger.db").write_bytes(content)
        with pytest.raises(Corrupt):
            Store.open(path)


def test_create_makes_parents_and_refuses_a_second_time(tmp_path: Path, verified: Callable[[Path], None]) -> None:
    path = tmp_path / "a" / "b c?#%" / "my.kb"
    verified(path)
    Store.create(path, BASE, {}).close()
    assert Store.exists(path)
    assert sorted(each.name for each in path.iterdir()) == ["LOCK", "deltas", "ledger.db", "snapshots"]
    with pytest.raises(StoreError, match="already is a knowledge base"):
        Store.create(path, BASE, {})


def test_create_in_an_empty_folder(kb: Path, verified: Callable[[Path], None]) -> None:
    kb.mkdir()
    verified(kb)
    Store.create(kb, BASE, {}).close()


def test_create_refuses_what_cannot_be_stored_and_leaves_nothing(kb: Path) -> None:
    with pytest.raises(ConfigError):
        Store.create(kb, BASE, {"a": float("nan")})
    with pytest.raises(ConfigError):
        Store.create(kb, Base("a\x00", "", None, {}, ""), {})
    with pytest.raises(ConfigError):
        Store.create(kb, Base("a", "", None, {"f": "not a hash"}, ""), {})
    assert not kb.exists()


def test_closed_store_says_so(bench: Bench) -> None:
    bench.store.close()
    bench.store.close()
    with pytest.raises(StoreError, match="closed"):
        bench.store.head()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_store_is_not_used_across_a_fork(bench: Bench) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            bench.store.head()
        except StoreError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_import_and_reading_load_no_heavy_module(bench: Bench) -> None:
    bench.insert("a")
    code = (
        "import sys; from kvllm.store import Store\n"
        f"with Store.open({str(bench.store.path)!r}, readonly=True) as s: s.facts(), s.history(), s.verify()\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'sqlite_utils', 'sentence_transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_writing_loads_no_torch(kb: Path, bench: Bench) -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import kvllm.store.verify, kvllm.store.schema, sqlite_utils\n"
        "from tests.store import bench\n"
        f"b = bench.Bench(bench.Store.open({str(kb)!r})); b.insert('a')\n"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_ledger_is_append_only(bench: Bench) -> None:
    bench.insert("a", report=small_report())
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        bench.store._connection().execute("DELETE FROM edits")
    connection = connect(bench.store.path / "ledger.db")
    for sql in (
        "UPDATE facts SET text = 'x'",
        "DELETE FROM facts",
        "UPDATE probes SET answer = ''",
        "UPDATE base_model SET name = 'x'",
        "INSERT OR REPLACE INTO seals VALUES (1, '" + "0" * 64 + "', 2)",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(sql)
    connection.close()


def test_views_read_well(bench: Bench) -> None:
    bench.insert("a", report=small_report())
    bench.update("a", "new")
    bench.store.tag("v1", 2)
    bench.rollback(1)
    other = sqlite3.connect(bench.store.path / "ledger.db")
    other.row_factory = sqlite3.Row
    (current,) = other.execute("SELECT * FROM current_facts")
    assert (current["key"], current["text"], current["taught_by_edit"]) == ("a", "a is a thing.", 1)
    log = other.execute("SELECT * FROM edit_log").fetchall()
    assert [(row["op"], row["keys"], row["rolled_back_to"], row["tags"], row["is_head"]) for row in log] == [
        ("insert", "a", None, None, 0),
        ("update", "a", None, "v1", 0),
        ("rollback", None, 1, None, 1),
    ]
    assert log[0]["reliability"] == 1.0
    events = [(row["edit"], row["event"], row["text"]) for row in other.execute("SELECT * FROM fact_history")]
    assert events == [
        (1, "begins", "a is a thing."),
        (2, "ends", "a is a thing."),
        (2, "begins", "new"),
        (3, "begins", "a is a thing."),
        (3, "ends", "new"),
    ]
    assert [row["edits"] for row in other.execute("SELECT * FROM delta_sizes")] == ["1", "2"]
    other.close()


def test_speed_with_500_edits_is_printed(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Not asserted: machines differ."""
    store = bench.store
    delta = tiny_delta()
    for head in range(500):
        new = NewEdit("insert", (f"key {head}",), head, facts=(fact(f"key {head}"),), report=small_report())
        store.commit(new, delta if head % 50 == 0 else None)
    store.close()
    code = f"""
import time
times = [time.perf_counter()]
from kvllm.store import Store
times.append(time.perf_counter())
store = Store.open({str(store.path)!r}, readonly=True)
for step in (store.head, store.facts, lambda: store.history(light=True), store.history, store.verify):
    times.append(time.perf_counter())
    step()
times.append(time.perf_counter())
names = ("import", "open", "head", "ls", "light history", "history", "verify")
print(", ".join(f"{{name}} {{b - a:.3f}} s" for name, a, b in zip(names, times, times[1:])))
"""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with capsys.disabled():
        print(f"\n500 edits: {done.stdout.strip()} (process {time.perf_counter() - begun:.2f} s)")


def test_commits_are_durable_by_setting(kb: Path) -> None:
    Store.create(kb, BASE, {}).close()
    connection = connect(kb / "ledger.db")
    assert connection.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()


def test_a_copy_of_the_folder_is_the_same_knowledge_base(bench: Bench, tmp_path: Path) -> None:
    bench.insert("a")
    shutil.copytree(bench.store.path, tmp_path / "copy.kb")
    with Store.open(tmp_path / "copy.kb") as copy:
        assert copy.verify(deep=True).problems == ()
        assert copy.history() == bench.store.history()
