"""A ledger of an older kvllm is read as it is, upgraded by the first write, and its seals stay what they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvllm.records import ProbeResult, Report
from kvllm.store import NewEdit, Store, schema
from kvllm.store.sqlite import connect, sqlite3
from tests.store.bench import fact, small_report

VERSION_1 = Path(__file__).with_name("ledger_v1.sql")


@pytest.fixture
def old(kb: Path, empty_kb: Path, verified: Callable[[Path], None]) -> Path:
    """A knowledge base whose ledger was written before probes had a similarity."""
    shutil.copytree(empty_kb, kb)
    (kb / "ledger.db").unlink()
    ledger = sqlite3.connect(kb / "ledger.db")
    ledger.executescript(VERSION_1.read_text(encoding="utf-8"))
    ledger.close()
    verified(kb)
    return kb


def version(path: Path) -> int:
    connection = connect(path / "ledger.db", readonly=True)
    try:
        return schema.version(connection)
    finally:
        connection.close()


@pytest.mark.parametrize("readonly", [True, False])
def test_an_older_ledger_is_read_without_being_changed(old: Path, readonly: bool) -> None:
    before = (old / "ledger.db").read_bytes()
    with Store.open(old, readonly=readonly) as store:
        assert [f.text for f in store.facts()] == ["new"]
        assert store.fact("a").text == "new"
        assert [edit.op for edit in store.history()] == ["insert", "update"]
        assert store.edit(1).report == small_report()
        assert store.tags() == {"v1": 2}
        assert store.verify(deep=True).problems == ()
    assert (old / "ledger.db").read_bytes() == before
    assert version(old) == 1


def test_the_first_write_upgrades_and_old_seals_stay_valid(old: Path) -> None:
    with Store.open(old) as store:
        seals = dict(store._connection().execute("SELECT edit_id, sha256 FROM seals").fetchall())
        history = store.history()
        far = ProbeResult("recalled", "And a poem?", "It is …", True, 1.0, "it", "a", "words", 0.25, (("user", "a?"),))
        edit = store.commit(NewEdit("insert", ("b",), 2, facts=(fact("b"),), report=Report({}, (far,))), None)
        assert edit.report.probes == (far,)
        assert version(old) == schema.SCHEMA_VERSION
        assert store.history()[:2] == history
        kept = store._connection().execute("SELECT edit_id, sha256 FROM seals WHERE version = 1").fetchall()
        assert dict(kept) == seals
        assert store.verify(deep=True).problems == ()
    with Store.open(old, readonly=True) as again:
        assert again.edit(3).report.probes == (far,)


def test_a_tag_upgrades_too(old: Path) -> None:
    with Store.open(old) as store:
        store.tag("again", 1)
    assert version(old) == schema.SCHEMA_VERSION


def test_another_process_that_upgrades_does_no_harm_to_an_open_reader(old: Path) -> None:
    with Store.open(old, readonly=True) as reader, Store.open(old) as writer:
        before = reader.history()
        writer.tag("again", 1)
        assert [replace(edit, tags=()) for edit in reader.history()] == [replace(edit, tags=()) for edit in before]
        assert reader.verify().problems == ()


def test_an_upgraded_ledger_has_the_schema_of_a_new_one(old: Path, empty_kb: Path) -> None:
    with Store.open(old) as store:
        store.set_settings(model="tiny")
    upgraded, fresh = (connect(path / "ledger.db", readonly=True) for path in (old, empty_kb))
    assert schema.objects(upgraded) == schema.objects(fresh)
    upgraded.close(), fresh.close()


def test_a_forged_similarity_or_turn_breaks_the_seal_of_a_new_edit(bench_with_probe: Store) -> None:
    db = bench_with_probe._connection()
    db.execute("DROP TRIGGER probes_no_update")
    for change in ("similarity = 0.9", 'turns = \'[["user", "x"]]\''):
        before = db.execute("SELECT similarity, turns FROM probes").fetchone()
        db.execute(f"UPDATE probes SET {change}")
        assert any("the seal does not fit" in problem.what for problem in bench_with_probe.verify().problems)
        db.execute("UPDATE probes SET similarity = ?, turns = ?", before)
    assert [p.where for p in bench_with_probe.verify().problems] == ["probes_no_update"]


@pytest.fixture
def bench_with_probe(kb: Path, empty_kb: Path) -> Store:
    shutil.copytree(empty_kb, kb)
    store = Store.open(kb)
    probe = ProbeResult("trained", "q", "a", True, 1.0, "a", "a", "contains", 1.0)
    store.commit(NewEdit("insert", ("a",), 0, facts=(fact("a"),), report=Report({}, (probe,))), None)
    return store
