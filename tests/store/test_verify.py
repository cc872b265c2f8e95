"""Every kind of damage is found and named; and the damage of each test really is damage."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.errors import ConfigError, Corrupt
from kvllm.records import VerifyReport
from kvllm.store import NewEdit, Store
from kvllm.store.artefacts import address, listing
from kvllm.store.sqlite import sqlite3  # the same library: two in one process ignore each other's locks
from tests.store.bench import Bench, fact, small_report, tiny_delta


@pytest.fixture
def full(damaged: Bench) -> Bench:
    """Five edits with everything in them: verifies before the damage."""
    damaged.insert("a", report=small_report())
    damaged.insert("b")
    damaged.update("a", "new")
    damaged.rollback(2)
    damaged.insert("c")
    damaged.store.write_snapshot(2, b"weights of two")
    damaged.store.tag("v1", 2)
    assert damaged.store.verify(deep=True).problems == ()
    return damaged


def weights_of(bench: Bench, edit_id: int) -> Path:
    delta = bench.store.edit(edit_id).delta
    assert delta is not None
    return bench.store.delta_path(delta.sha256) / "adapter_model.safetensors"


def flip(path: Path, position: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(bytes(raw))


def said(report: VerifyReport) -> str:
    return " | ".join(f"{problem.severity}: {problem.where}: {problem.what}" for problem in report.problems)


def edit_ledger(bench: Bench, *statements: str) -> None:
    """Change the ledger as someone would who means it: rules off, triggers dropped and made again."""
    other = sqlite3.connect(bench.store.path / "ledger.db")
    triggers = other.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    other.execute("PRAGMA ignore_check_constraints = ON")
    other.execute("PRAGMA synchronous = OFF")
    for name, _ in triggers:
        other.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        other.execute(statement)
    for _, sql in triggers:
        other.execute(sql)
    other.commit()
    other.close()


def test_flipped_byte_is_found_by_reading_and_by_deep_verify_only(full: Bench) -> None:
    flip(weights_of(full, 2))
    with pytest.raises(Corrupt, match=r"edit 2 .*kvllm verify"):
        full.store.read_delta(full.store.chain(2)[1])
    assert full.store.verify().ok  # sizes are right
    report = full.store.verify(deep=True)
    assert not report.ok
    assert "(edit 2)" in said(report)
    assert "sha256 differs" in said(report)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
        (lambda path: path.unlink(), "safetensors is missing"),
        (lambda path: shutil.rmtree(path.parent), "folder is missing"),
        (lambda path: (path.unlink(), path.mkdir()), "not a file"),
        (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "not a file"),
    ],
)
def test_damaged_delta_is_found(full: Bench, damage: Callable[[Path], object], words: str, deep: bool) -> None:
    damage(weights_of(full, 2))
    for verify in (True, False):
        with pytest.raises(Corrupt, match="edit 2"):
            full.store.read_delta(full.store.chain(2)[1], verify=verify)
    report = full.store.verify(deep=deep)
    assert not report.ok
    assert words in said(report)
    assert "(edit 2)" in said(report)


def test_delta_behind_a_link_is_refused(full: Bench, tmp_path: Path) -> None:
    folder = weights_of(full, 2).parent
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="link"):
        full.store.read_delta(folder.name)
    assert "is not a folder" in said(full.store.verify())


def test_read_delta_returns_what_was_committed(full: Bench) -> None:
    sha = full.store.chain(1)[0]
    delta = full.store.read_delta(sha)
    assert delta.sha256 == sha == address(listing(delta.files))
    assert delta.files == full.store.read_delta(sha, verify=False).files == tiny_delta(1)
    with pytest.raises(Corrupt, match="no edit"):
        full.store.read_delta("0" * 64)
    with pytest.raises(ConfigError):
        full.store.read_delta("../../etc")


def test_strays_are_warnings(full: Bench) -> None:
    deltas = full.store.path / "deltas"
    (deltas / ("0" * 64)).mkdir()
    (deltas / ".incoming-1-x").mkdir()
    (deltas / "notes.txt").write_text("x")
    (full.store.path / "snapshots" / "1").mkdir()
    (full.store.path / "README.md").write_text("x")
    report = full.store.verify(deep=True)
    assert report.ok
    assert len(report.problems) == 5
    assert {problem.severity for problem in report.problems} == {"warning"}


def test_extra_file_in_a_delta_is_an_error(full: Bench) -> None:
    (weights_of(full, 1).parent / "adapter_model.bin").write_bytes(b"pickle")
    report = full.store.verify()
    assert not report.ok
    assert "which was not committed" in said(report)


def test_damaged_snapshot_is_not_used(full: Bench) -> None:
    store = full.store
    assert store.read_snapshot(2) == b"weights of two"
    assert store.read_snapshot(1) is None
    flip(store.path / "snapshots" / "2" / "weights.safetensors")
    assert store.read_snapshot(2) is None
    assert not store.verify(deep=True).ok
    shutil.rmtree(store.path / "snapshots")
    assert store.read_snapshot(2) is None
    assert store.nearest_snapshot(2) is None
    report = store.verify(deep=True)
    assert report.ok
    assert "missing" in said(report)
    store.write_snapshot(2, b"again")
    assert store.verify(deep=True).problems == ()


@pytest.mark.parametrize(
    ("statements", "words"),
    [
        (["UPDATE facts SET text = 'forged' WHERE id = 1"], "edit 1: its rows"),
        (["UPDATE edits SET steps = 5 WHERE id = 2"], "edit 2: its rows"),
        (["UPDATE metrics SET value = 0.5"], "edit 1: its rows"),
        (["UPDATE probes SET answer = 'forged'"], "edit 1: its rows"),
        (["UPDATE deltas SET norm = 0.1 WHERE sha256 = (SELECT delta FROM edits WHERE id = 3)"], "edit 3: its rows"),
        (["UPDATE base_model SET digest = 'forged'"], "edit 1: its rows"),
        (["UPDATE base_files SET sha256 = replace(sha256, 'a', 'e')"], "edit 1: its rows"),
        (["UPDATE edits SET config = x'00'"], "edit 1: it cannot be read"),
        (["UPDATE edits SET config = '{'"], "edit 1: it cannot be read"),
        (["UPDATE facts SET aliases = '3'"], "fact 1: it cannot be read"),
        (["UPDATE ledger SET head = 4"], "the head is 4, the newest edit 5"),
        (["DELETE FROM ledger"], "head is missing"),
        (["UPDATE edits SET parent = 1 WHERE id = 3"], "edit 3: its parent is 1"),
        (["DELETE FROM live_facts WHERE key = 'a'"], "fact 'a'"),
        (["UPDATE live_facts SET fact_id = 3 WHERE key = 'a'"], "fact 'a'"),
        (["DELETE FROM fact_events WHERE edit_id = 4"], "edit 4: the facts that begin and end"),
        (["DELETE FROM seals WHERE edit_id = 2"], "edit 2: it has no seal"),
        (["DELETE FROM edits WHERE id = 2"], "edit 2 is missing"),
        (["UPDATE tags SET edit_id = 99"], "does not exist"),
        (["UPDATE facts SET edit_id = 99 WHERE id = 1"], "does not exist"),
        (["DELETE FROM delta_files"], "do not give the recorded sha256"),
        (["DROP VIEW current_facts"], "the view is missing"),
        (
            ["UPDATE settings SET value = '{'", "INSERT INTO settings VALUES ('x', '{')"],
            "setting 'x': it cannot be read",
        ),
    ],
)
def test_edited_rows_are_found(full: Bench, statements: list[str], words: str) -> None:
    edit_ledger(full, *statements)
    report = full.store.verify()
    assert not report.ok
    assert words in said(report)


def test_dropped_table_is_reported_not_raised(full: Bench) -> None:
    other = sqlite3.connect(full.store.path / "ledger.db")
    other.execute("DROP TABLE seals")
    other.close()
    report = full.store.verify()
    assert not report.ok
    assert "seals: the table is missing" in said(report)


def test_dropped_trigger_is_found(full: Bench) -> None:
    other = sqlite3.connect(full.store.path / "ledger.db")
    other.execute("DROP TRIGGER edits_no_update")
    other.close()
    assert "the trigger is missing" in said(full.store.verify())


def test_damaged_pages_are_reported_not_raised(full: Bench) -> None:
    ledger = full.store.path / "ledger.db"
    full.store.close()
    raw = bytearray(ledger.read_bytes())
    (root,) = sqlite3.connect(ledger).execute("SELECT rootpage FROM sqlite_master WHERE name = 'facts'").fetchone()
    raw[(root - 1) * 4096 : (root - 1) * 4096 + 200] = os.urandom(200)
    ledger.write_bytes(bytes(raw))
    with Store.open(ledger.parent) as store:
        report = store.verify(deep=True)
    assert not report.ok
    assert "ledger.db" in said(report)


def test_altered_ledger_is_not_served(full: Bench) -> None:
    edit_ledger(full, "UPDATE facts SET text = 'forged' WHERE id = 1", "UPDATE metrics SET n = 9 WHERE edit_id = 1")
    with Store.open(full.store.path) as store:
        for read in (
            lambda: store.fact_versions("a"),
            lambda: store.facts(1),
            lambda: store.edit(1),
            store.history,
            lambda: store.chain(1),
            lambda: Bench(store).rollback(1),
        ):
            with pytest.raises(Corrupt, match=r"edit 1 .*kvllm verify"):
                read()
        assert store.fact("b").text == "b is a thing."


def test_damaged_vector_is_forgotten_and_not_used(full: Bench) -> None:
    full.store.put_vectors("mini", {1: b"\x01" * 8, 2: b"\x02" * 8})
    edit_ledger(full, "UPDATE key_vectors SET vector = x'03' WHERE fact_id = 2")
    assert full.store.vectors("mini") == {1: b"\x01" * 8}
    report = full.store.verify()
    assert report.ok
    assert "key vectors" in said(report)


@pytest.mark.parametrize(
    "statement", ["DELETE FROM settings", "UPDATE settings SET name = ',state' WHERE name = '.state'"]
)
def test_ledger_that_lost_its_seal_is_not_taken_for_an_older_one(full: Bench, statement: str) -> None:
    edit_ledger(full, statement)
    with pytest.raises(Corrupt, match="settings"):
        full.store.tags()
    assert not full.store.verify().ok


def test_damage_in_a_name_is_one_sentence(full: Bench) -> None:
    path = full.store.path / "ledger.db"
    full.store.close()
    raw = path.read_bytes()
    assert raw.count(b"CREATE TABLE metrics (") == 1
    for altered in (b'CREATE TABLE metrics "', b"CREATE TABLE metric\xc1 ("):
        path.write_bytes(raw.replace(b"CREATE TABLE metrics (", altered))
        with pytest.raises(Corrupt) as raised:
            Store.open(path.parent)
        assert "\n" not in str(raised.value)


def test_nearest_snapshot_is_the_longest_beginning_of_the_chain(bench: Bench) -> None:
    store = bench.store
    for key in "abcd":
        bench.insert(key)
    assert store.nearest_snapshot(4) is None
    store.write_snapshot(2, b"two")
    store.write_snapshot(3, b"three")
    two, three = (store.path / "snapshots" / name / "weights.safetensors" for name in "23")
    assert store.nearest_snapshot(4) == (3, three, 3)
    assert store.nearest_snapshot(2) == (2, two, 2)
    assert store.nearest_snapshot(1) is None
    back = bench.rollback(2)
    assert store.nearest_snapshot(back) == (2, two, 2)  # 3 is not a beginning of the chain of 2
    later = bench.insert("e")
    assert store.nearest_snapshot(later) == (2, two, 2)
    assert store.nearest_snapshot(bench.compact()) is None


def test_snapshot_from_a_file_and_dropping(bench: Bench, tmp_path: Path) -> None:
    store = bench.store
    for key in "abc":
        bench.insert(key)
    (tmp_path / "w").write_bytes(b"x" * 3_000_000)
    assert store.write_snapshot(1, tmp_path / "w").stat().st_size == 3_000_000
    for edit_id in (2, 3):
        store.write_snapshot(edit_id, b"y")
    assert store.drop_snapshots(keep=2) == 1
    assert sorted(path.name for path in (store.path / "snapshots").iterdir()) == ["2", "3"]
    assert store.drop_snapshots(keep=0) == 2


def test_verify_counts(full: Bench) -> None:
    report = full.store.verify()
    assert (report.edits, report.facts, report.deltas, report.deep) == (5, 3, 4, False)


def test_an_owned_delta_with_other_content_is_not_overwritten(full: Bench) -> None:
    path = weights_of(full, 1)
    flip(path)
    before = path.read_bytes()
    with pytest.raises(Corrupt, match="other content"):
        full.store.commit(NewEdit("insert", ("d",), 5, facts=(fact("d"),)), tiny_delta(1))
    assert path.read_bytes() == before
    assert full.store.head() == 5


def test_a_damaged_orphan_is_replaced(bench: Bench) -> None:
    orphan = bench.store.path / "deltas" / address(listing(tiny_delta(1)))
    orphan.mkdir()
    (orphan / "adapter_model.safetensors").write_bytes(b"half")
    bench.insert("a")
    assert bench.store.read_delta(orphan.name).files == tiny_delta(1)
