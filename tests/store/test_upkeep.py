"""Repair, backup and garbage: what is brought back, what is said to be lost, what is never touched."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.errors import Busy, ConfigError, Corrupt, StoreError
from kvllm.records import VerifyReport
from kvllm.store import Store, failpoints
from kvllm.store.repair import repair
from kvllm.store.sqlite import sqlite3
from kvllm.store.verify import verify_folder
from tests.store.bench import Bench, small_report, tiny_delta
from tests.store.test_verify import edit_ledger, flip, weights_of


@pytest.fixture
def full(damaged: Bench) -> Bench:
    """Six edits with everything in them."""
    damaged.insert("a", report=small_report())
    damaged.insert("b")
    damaged.update("a", "new")
    damaged.rollback(2)
    damaged.insert("c")
    damaged.insert("d")
    damaged.store.write_snapshot(2, b"weights of two")
    damaged.store.tag("v1", 2)
    return damaged


def state(store: Store) -> dict[str, object]:
    """Everything a reader can see."""
    return {
        "history": [edit.to_dict() for edit in store.history()],
        "facts": [[fact.to_dict() for fact in store.facts(at)] for at in range(store.head() + 1)],
        "tags": store.tags(),
        "settings": store.settings,
        "deltas": [store.read_delta(sha).files for sha in store.chain(store.head())],
    }


def done(report: VerifyReport) -> str:
    return " | ".join(f"{each.done}: {each.where}: {each.what}" for each in report.repairs)


@pytest.mark.parametrize(
    "statements",
    [
        ["DELETE FROM live_facts WHERE key = 'b'"],
        ["UPDATE live_facts SET key = 'x' WHERE key = 'b'"],
        ["UPDATE ledger SET head = 3"],
        ["DELETE FROM ledger"],
        ["DROP VIEW current_facts", "DROP INDEX facts_by_key"],
        ["CREATE VIEW edits_too AS SELECT 1", "DROP TABLE live_facts"],
    ],
)
def test_what_follows_from_the_history_is_worked_out_again(full: Bench, statements: list[str]) -> None:
    before = state(full.store)
    edit_ledger(full, *statements)
    assert not full.store.verify().ok
    report = full.store.verify(repair=True)
    assert report.problems == ()
    assert "rebuilt" in done(report)
    assert state(full.store) == before
    full.insert("e")


def test_dropped_trigger_and_foreign_trigger_are_put_right(full: Bench) -> None:
    before = state(full.store)
    other = sqlite3.connect(full.store.path / "ledger.db")
    other.execute("DROP TRIGGER edits_no_update")
    other.execute("CREATE TRIGGER evil AFTER INSERT ON tags BEGIN DELETE FROM live_facts; END")
    other.close()
    assert not full.store.verify().ok
    assert full.store.verify(repair=True).problems == ()
    assert state(full.store) == before


def test_damaged_edit_is_given_up_only_with_consent(full: Bench) -> None:
    edit_ledger(full, "UPDATE facts SET text = 'forged' WHERE key = 'c'")
    with pytest.raises(Corrupt, match="edit 5"):
        full.store.facts()
    with pytest.raises(Corrupt, match="edit 5"):
        full.store.fact("c")
    assert full.store.fact("b").text == "b is a thing."
    report = full.store.verify(repair=True)
    assert not report.ok
    assert "False: edits 5 to 6: cut the history back to edit 4" in done(report)
    assert full.store.head() == 6
    report = full.store.verify(repair=True, yes=True)
    assert report.problems == ()
    assert "True: edits 5 to 6" in done(report)
    assert (full.store.head(), full.keys(), full.store.tags()) == (4, ["a", "b"], {"v1": 2})
    full.insert("c")


def test_altered_tag_is_not_served_and_taken_as_it_stands_only_with_consent(full: Bench) -> None:
    edit_ledger(full, "UPDATE tags SET edit_id = 1")
    for read in (
        full.store.tags,
        full.store.head,
        lambda: full.store.resolve("v1"),
        lambda: Store.open(full.store.path),
    ):
        with pytest.raises(Corrupt, match="tags"):
            read()
    with pytest.raises(Corrupt):
        full.store.tag("v2", 1)  # must not be sealed as if it were meant
    assert not verify_folder(full.store.path, deep=True).ok
    report = repair(full.store.path)
    assert not report.ok
    assert "False: tables ledger, tags, settings" in done(report)
    assert repair(full.store.path, yes=True).ok
    with Store.open(full.store.path) as store:
        assert store.tags() == {"v1": 1}


def test_damaged_snapshot_is_dropped(full: Bench) -> None:
    flip(full.store.path / "snapshots" / "2" / "weights.safetensors")
    report = full.store.verify(repair=True)
    assert report.problems == ()
    assert "snapshots/2" in done(report)
    assert full.store.nearest_snapshot(2) is None


def test_temporary_names_and_orphans_are_removed_but_no_strangers_file(full: Bench) -> None:
    path = full.store.path
    before = state(full.store)
    for name in ("deltas/.incoming-1-x", "snapshots/.incoming-1-x", f"deltas/{'0' * 64}", "snapshots/1", ".creating"):
        (path / name).mkdir()
        (path / name / "x").write_text("x")
    (path / "notes.txt").write_text("mine")
    report = full.store.verify(repair=True)
    assert [problem.where for problem in report.problems] == ["notes.txt"]
    assert len(report.repairs) == 5
    assert state(full.store) == before


def test_swapped_deltas_and_a_shared_file_are_put_back(full: Bench) -> None:
    before = state(full.store)
    one, two, five = (weights_of(full, edit_id).parent for edit_id in (1, 2, 5))
    os.rename(one, one.with_name("x"))
    os.rename(two, one)
    os.rename(one.with_name("x"), two)
    (five / "adapter_config.json").unlink()  # the same bytes lie in the other deltas
    (five / "pickle.bin").write_bytes(b"x")
    assert not full.store.verify().ok
    report = full.store.verify(repair=True)
    assert report.problems == ()
    assert state(full.store) == before
    assert sorted(os.listdir(five)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_lost_delta_is_reported_and_the_history_cut_only_with_consent(full: Bench) -> None:
    shutil.rmtree(weights_of(full, 5).parent)
    report = full.store.verify(repair=True)
    assert not report.ok
    assert "False: edits 5 to 6: cut the history back to edit 4" in done(report)
    assert full.store.head() == 6
    assert len(list((full.store.path / "deltas").iterdir())) == 4
    report = full.store.verify(repair=True, yes=True)
    assert report.problems == ()
    assert full.store.head() == 4
    full.insert("c")


def test_lost_delta_that_nothing_in_force_needs_costs_no_edit(full: Bench) -> None:
    flip(weights_of(full, 3))  # the update that was rolled back
    report = full.store.verify(repair=True, yes=True)
    assert not report.ok
    assert len(report.problems) == 1
    assert "(edit 3)" in report.problems[0].where
    assert full.store.head() == 6
    assert report.repairs == ()


def test_ledger_that_is_no_database_is_said_to_be_lost_and_left_alone(full: Bench) -> None:
    path = full.store.path
    full.store.close()
    (path / "ledger.db").write_bytes(b"no database" * 1000)
    report = verify_folder(path, deep=True)
    assert not report.ok
    with pytest.raises(Corrupt, match="restore a backup") as refused:
        repair(path, yes=True)
    for said in (report.problems[0].what, str(refused.value)):  # whoever verifies is not told to verify
        assert "restore a backup" in said
        assert "run `kvllm verify" not in said
    assert (path / "ledger.db").read_bytes() == b"no database" * 1000
    assert len(list((path / "deltas").iterdir())) == 5


def test_repair_of_what_is_whole_changes_nothing(full: Bench) -> None:
    before = state(full.store)
    ledger = (full.store.path / "ledger.db").read_bytes()
    report = full.store.verify(repair=True, yes=True)
    assert (report.ok, report.repairs, report.problems) == (True, (), ())
    assert state(full.store) == before
    assert (full.store.path / "ledger.db").read_bytes() == ledger


def test_repair_waits_for_the_writer(full: Bench) -> None:
    with full.store.writer(), pytest.raises(Busy):
        repair(full.store.path, lock_timeout=0)
    with Store.open(full.store.path, readonly=True) as reader, pytest.raises(StoreError, match="read-only"):
        reader.verify(repair=True)


def test_a_writer_that_missed_the_repair_cannot_write_into_the_old_ledger(full: Bench) -> None:
    edit_ledger(full, "DROP VIEW current_facts")
    assert repair(full.store.path).ok
    with pytest.raises(StoreError, match="replaced"):
        full.insert("e")
    with Store.open(full.store.path) as store:
        assert store.head() == 6
        assert store.verify(deep=True).problems == ()


# -------------------------------------------------------------------- backup


def test_copying_and_checking_say_how_far_they_are(full: Bench, tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    full.store.backup(tmp_path / "copy.kb", tick=lambda *at: ticks.append(at))
    full.store.verify(deep=True, tick=lambda *at: ticks.append(at))
    assert ticks == [(n, 5) for n in range(1, 6)] * 2


def test_backup_is_the_same_knowledge_base(bench: Bench, tmp_path: Path, verified: Callable[[Path], None]) -> None:
    for key in "abc":
        bench.insert(key)
    bench.store.write_snapshot(2, b"two")
    bench.store.tag("v1", 2)
    made = bench.store.backup(tmp_path / "new" / "copy.kb")
    verified(tmp_path / "new" / "copy.kb")
    assert (made.head, made.edits, made.facts, made.deltas) == (3, 3, 3, 3)
    with Store.open(tmp_path / "new" / "copy.kb") as copied:
        assert state(copied) == state(bench.store)
        assert copied.read_snapshot(2) == b"two"
        Bench(copied).rollback(1)
    assert bench.store.head() == 3


def test_backup_while_a_writer_commits_is_one_moment_of_it(bench: Bench, tmp_path: Path) -> None:
    bench.insert("a")

    def meanwhile(reached: str) -> None:
        if reached == "backup.ledger":
            failpoints.hook = None
            with Store.open(bench.store.path) as other:
                Bench(other).insert("b")
                other.write_snapshot(1, b"one")

    failpoints.hook = meanwhile
    assert bench.store.backup(tmp_path / "copy.kb").head == 1
    assert bench.store.head() == 2
    with Store.open(tmp_path / "copy.kb") as copied:
        assert [fact.key for fact in copied.facts()] == ["a"]
        assert copied.verify(deep=True).problems == ()


def test_snapshot_dropped_during_a_backup_is_left_out(bench: Bench, tmp_path: Path) -> None:
    bench.insert("a")
    bench.store.write_snapshot(1, b"one")

    def meanwhile(reached: str) -> None:
        if reached == "backup.deltas":
            with Store.open(bench.store.path) as other:
                other.drop_snapshots(keep=0)

    failpoints.hook = meanwhile
    bench.store.backup(tmp_path / "copy.kb")
    failpoints.hook = None
    with Store.open(tmp_path / "copy.kb") as copied:
        assert copied.verify(deep=True).problems == ()


def test_backup_of_a_damaged_knowledge_base_is_refused_and_leaves_nothing(full: Bench, tmp_path: Path) -> None:
    flip(weights_of(full, 3))
    with pytest.raises(Corrupt, match="no backup"):
        full.store.backup(tmp_path / "copy.kb")
    assert not (tmp_path / "copy.kb").exists()
    flip(weights_of(full, 3))
    edit_ledger(full, "DROP VIEW current_facts")
    with pytest.raises(Corrupt, match="does not verify"):
        full.store.backup(tmp_path / "copy.kb")
    assert not (tmp_path / "copy.kb").exists()


def test_copy_that_cannot_be_read_back_is_removed(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.insert("a")
    real = os.scandir

    def failing(path: str | Path) -> object:
        if str(path).startswith(str(tmp_path / "copy.kb")) and Store.exists(tmp_path / "copy.kb"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", failing)
        with pytest.raises(StoreError) as raised:
            bench.store.backup(tmp_path / "copy.kb")
    assert not isinstance(raised.value, Corrupt)
    assert not Store.exists(tmp_path / "copy.kb")
    assert bench.store.verify(deep=True).problems == ()


def test_backup_does_not_write_over_anything(bench: Bench, tmp_path: Path) -> None:
    bench.insert("a")
    bench.store.backup(tmp_path / "copy.kb")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    for target in (tmp_path / "copy.kb", tmp_path / "mine"):
        before = sorted(target.rglob("*"))
        with pytest.raises(StoreError):
            bench.store.backup(target)
        assert sorted(target.rglob("*")) == before
    for target in (bench.store.path, bench.store.path / "copy.kb"):
        with pytest.raises(ConfigError, match="itself"):
            bench.store.backup(target)


# -------------------------------------------------------------------- garbage


def test_gc_removes_what_no_history_needs_and_nothing_else(bench: Bench) -> None:
    path = bench.store.path
    for key in "abcd":
        bench.insert(key)
    bench.rollback(1)
    for edit_id in (1, 2, 3):
        bench.store.write_snapshot(edit_id, b"x")
    before = state(bench.store)
    for name in ("deltas/.incoming-1-x", "snapshots/.incoming-1-x", f"deltas/{'0' * 64}", "snapshots/4", ".creating"):
        (path / name).mkdir()
        (path / name / "file").write_text("12345")
    seen = bench.store.gc(dry_run=True)
    assert (seen.dry_run, seen.bytes) == (True, 26)
    assert {item.where for item in seen.garbage} == {
        ".creating", "deltas/.incoming-1-x", "snapshots/.incoming-1-x", f"deltas/{'0' * 64}", "snapshots/4",
        "snapshots/1",
    }  # fmt: skip
    assert (path / "snapshots" / "1").exists()
    assert bench.store.gc().garbage == seen.garbage
    assert bench.store.gc().garbage == ()
    assert state(bench.store) == before
    assert sorted(each.name for each in (path / "snapshots").iterdir()) == ["2", "3"]


def test_gc_waits_for_the_writer_whose_delta_has_no_row_yet(bench: Bench) -> None:
    bench.insert("a")
    bench.store._connection().execute("PRAGMA busy_timeout = 50")
    with Store.open(bench.store.path) as other:
        seen = []

        def meanwhile(reached: str) -> None:
            if reached == "commit.delta.verified":
                seen.append(other.gc(dry_run=True).garbage)
                with pytest.raises(Busy), other.writer(timeout=0):
                    pass

        failpoints.hook = meanwhile
        bench.insert("b")
        failpoints.hook = None
    assert len(seen[0]) == 1  # a dry run may name what is on its way; only the lock's holder removes


def test_reserved_settings_cannot_be_set(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="dot"):
        bench.store.set_settings(**{".state": "x"})
    assert bench.store.settings == {"model": "tiny"}


def test_tiny_deltas_differ_by_seed() -> None:
    assert tiny_delta(1) != tiny_delta(2)
