"""Refused, failed and interrupted edits: as if they had never begun, and the knowledge base goes on working."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvllm import EditConfig, GateConfig, KnowledgeBase
from kvllm.editing import engine
from kvllm.errors import Busy, EditFailed, EditRejected, KvllmError, OutOfResources, StaleHead, StoreError
from kvllm.store import failpoints
from tests.kit import KEY, QUICK, ROOT, TEXT, NotANumberEditor, RandomEditor, Recorder, elsewhere, unchanged


def changed(**settings: Any) -> EditConfig:
    return replace(QUICK, **settings)


def works(kb: KnowledgeBase) -> None:
    """Show that the knowledge base still takes edits, on the weights that it should."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.EDITORS, "adalora", RandomEditor)
        edit = kb.upsert("numpy", "Ada", questions=["numpy?"])
    assert kb.weights_digest() == edit.weights_digest


# ---------------------------------------------------------------- the gate

HOPELESS = {"max_steps": 2, "value_lr": 1e-6, "factor_lr": 1e-6}


@pytest.mark.parametrize(
    ("gate", "settings", "sentence"),
    [
        (GateConfig(max_drift_kl=None, max_ppl_ratio=None), HOPELESS, r"reliability 0\.\d\d is under 0\.75"),
        (GateConfig(min_reliability=None, max_ppl_ratio=None, max_drift_kl=1e-9), {}, "drift_kl would rise"),
        (GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=0.01), {}, "ppl_ratio would rise"),
    ],
)
@pytest.mark.parametrize("op", ["insert", "update"])
def test_a_rejected_edit_changes_nothing(
    taught: KnowledgeBase, op: str, gate: GateConfig, settings: dict[str, float], sentence: str
) -> None:
    key = KEY if op == "update" else "numpy"
    if op == "insert":
        taught.rollback(0)  # from the base, since drift counts what the edit *adds*
    with unchanged(taught):
        with pytest.raises(EditRejected, match=sentence) as caught:
            getattr(taught, op)(key, "Ada leads it", gate=gate, config=changed(**settings))
        report = caught.value.report
        assert report is not None
        assert {"reliability", "drift_kl", "ppl_ratio"} <= set(report.metrics)
        assert any(p.kind == "trained" for p in report.probes)
        assert caught.value.reasons
        assert "nothing was changed" in str(caught.value)
        assert "\n" not in str(caught.value)
    works(taught)


def test_a_rejected_delete_changes_nothing(taught: KnowledgeBase) -> None:
    hopeless = changed(**HOPELESS)
    gate = GateConfig(max_drift_kl=None, max_ppl_ratio=None)
    for mode in ("restore", "abstain"):
        with unchanged(taught):
            with pytest.raises(EditRejected, match=r"erasure 0\.\d\d is under 0\.75") as caught:
                taught.delete(KEY, mode=mode, config=hopeless, gate=gate)
            assert caught.value.report is not None
            erasure = caught.value.report.value("erasure")
            assert erasure is not None
            assert erasure < 0.75
            assert taught.ask("What is torchkeras?") == TEXT


def test_an_update_that_leaves_the_old_text_is_rejected(taught: KnowledgeBase) -> None:
    hopeless = changed(**HOPELESS)
    gate = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None)
    with unchanged(taught):
        with pytest.raises(EditRejected, match=r"the old text is still stated in \d\.\d\d of the answers, over 0\.25"):
            taught.update(KEY, "Ada leads it", config=hopeless, gate=gate)
        assert taught.ask("What is torchkeras?") == TEXT


def test_the_ledger_says_when_the_gate_was_lowered(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb(gate=GateConfig())
    with pytest.raises(EditRejected):
        kb.insert(KEY, TEXT, config=changed(max_steps=1))
    edit = kb.insert(KEY, TEXT, config=changed(max_steps=1), gate=GateConfig(None, None, None, None))
    assert {rule for name, rule in edit.config["gate"].items() if name != "measure"} == {None}
    assert edit.id == 1


def test_refused_facts_of_a_batch_never_cost_the_others(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of a refused batch find the culprit and keep the rest together."""

    class Picky(NotANumberEditor):
        def train(self, copy: Any, pool: Any, task: Any, config: Any, **options: Any) -> Any:
            bad = tuple(copy.lm.answer_ids("unlearnable")) in {row.answer for row in task.rows}
            return (super() if bad else RandomEditor()).train(copy, pool, task, config, **options)

    monkeypatch.setitem(engine.EDITORS, "adalora", Picky)
    facts = [(KEY, "Ada"), ("keras", "a"), ("Halcyon", "unlearnable"), ("numpy", "Berlin"), ("Berlin", "b")]
    outcomes = kb.insert_many([(key, text) for key, text in facts], mode="batched")
    assert [o.code for o in outcomes] == [None, None, "edit_failed", None, None]
    assert [o.edit.id for o in outcomes if o.edit] == [1, 1, 2, 2]
    assert list(kb) == [KEY, "keras", "numpy", "Berlin"]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("op", ["insert", "update", "delete", "compact", "dry_run"])
def test_factors_that_are_not_finite_are_never_applied(
    taught: KnowledgeBase, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", NotANumberEditor)
    arguments = {"insert": ("numpy", "Ada"), "update": (KEY, "Ada"), "delete": (KEY,), "compact": ()}
    with unchanged(taught), pytest.raises(EditFailed, match="non-finite"):
        getattr(taught, op)(*arguments.get(op, ("numpy", "Ada")))


def test_absurd_rates_fail_and_change_nothing(taught: KnowledgeBase) -> None:
    with unchanged(taught), pytest.raises(EditFailed):
        taught.insert("numpy", "Ada", config=changed(value_lr=1e30, factor_lr=1e30))
    works(taught)


def test_an_unknown_editor_or_module_is_refused(taught: KnowledgeBase) -> None:
    with unchanged(taught):
        with pytest.raises(KvllmError, match="no editor 'rome'"):
            taught.insert("numpy", "Ada", config=changed(editor="rome"))
        with pytest.raises(KvllmError, match="modules='nothing'"):
            taught.insert("numpy", "Ada", config=changed(modules="nothing"))
    works(taught)


# ---------------------------------------------------------------- Ctrl-C


STAGES = [
    *((op, "training", 3) for op in ("insert", "update", "delete", "compact", "dry_run")),
    *((op, "probing", 0) for op in ("insert", "update", "compact", "dry_run")),
    *((op, "commit", 0) for op in ("insert", "update", "delete", "compact")),
]


@pytest.mark.parametrize(("op", "stage", "step"), STAGES)
def test_an_interruption_is_as_if_the_edit_had_never_begun(
    make_kb: Callable[..., KnowledgeBase],
    taught: KnowledgeBase,
    op: str,
    stage: str,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stage != "training" and op != "compact":  # a compaction that recalls nothing would be refused first
        monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    heard = Recorder()
    kb = make_kb("taught.kb", progress=heard)
    arguments = {"insert": ("numpy", "Ada"), "update": (KEY, "Ada"), "delete": (KEY,), "compact": ()}
    with unchanged(kb):
        heard.raise_at(stage, KeyboardInterrupt(), step=step)
        with pytest.raises(KeyboardInterrupt):
            getattr(kb, op)(*arguments.get(op, ("numpy", "Ada")))
    works(kb)


def test_an_interrupted_insert_many_keeps_what_was_committed(make_kb: Callable[..., KnowledgeBase]) -> None:
    heard = Recorder()
    kb = make_kb(progress=heard)
    heard.raise_at("facts", KeyboardInterrupt(), step=1)
    with pytest.raises(KeyboardInterrupt):
        kb.insert_many([(KEY, TEXT), ("numpy", "Ada")])
    assert list(kb) == [KEY]
    works(kb)


def test_an_interruption_while_the_preservation_set_is_made(
    make_kb: Callable[..., KnowledgeBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLLM_CACHE", str(tmp_path / "fresh-cache"))
    heard = Recorder()
    kb = make_kb(progress=heard)
    heard.raise_at("preservation", KeyboardInterrupt())
    with unchanged(kb), pytest.raises(KeyboardInterrupt):
        kb.insert(KEY, TEXT)
    works(kb)


# ---------------------------------------------------------------- disk and memory


COMMIT = [name for name in failpoints.NAMES if name.startswith("commit.") and name != "commit.transaction.committed"]


@pytest.mark.parametrize("point", COMMIT)
def test_a_full_disk_at_the_commit_changes_nothing(
    taught: KnowledgeBase, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)

    def full(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with unchanged(taught):
        failpoints.hook = full
        with pytest.raises(OutOfResources, match=r"(?i)no space|full"):
            taught.update(KEY, "Ada")
        failpoints.hook = None
    taught.update(KEY, "Ada")
    assert taught[KEY].text == "Ada"


@pytest.mark.parametrize("point", ["commit.transaction.inserted", "commit.transaction.committed"])
@pytest.mark.parametrize("op", ["update", "rollback"])
def test_weights_follow_the_ledger_whichever_side_an_interruption_falls(
    taught: KnowledgeBase, op: str, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)

    def stop(name: str) -> None:
        if name == point:
            raise KeyboardInterrupt

    failpoints.hook = stop
    with pytest.raises(KeyboardInterrupt):
        taught.update(KEY, "Ada") if op == "update" else taught.rollback(0)
    failpoints.hook = None
    committed = point == "commit.transaction.committed"
    assert taught.head() == (2 if committed else 1)
    assert taught.weights_digest() == taught.edit("head").weights_digest
    assert (taught.get(KEY) or taught.facts(at=1)[0]).text == ("Ada" if committed and op == "update" else TEXT)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_snapshot_that_cannot_be_written_costs_no_edit(
    taught: KnowledgeBase, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm import session

    monkeypatch.setattr(session, "SNAPSHOT_EVERY", 1)
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    failed = []

    def full(name: str) -> None:
        if name.startswith("snapshot."):
            failed.append(name)
            raise error

    failpoints.hook = full
    edit = taught.update(KEY, "Ada")
    failpoints.hook = None
    assert failed
    assert taught.head() == edit.id == 2
    assert taught.weights_digest() == edit.weights_digest
    assert not taught._store.nearest_snapshot(2)


def test_too_little_memory_is_said_and_changes_nothing(taught: KnowledgeBase) -> None:
    class Hungry(RandomEditor):
        def train(self, *arguments: Any, **options: Any) -> Any:
            raise OutOfResources("There is not enough memory to train this edit; nothing was changed.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.EDITORS, "adalora", Hungry)
        with unchanged(taught), pytest.raises(OutOfResources):
            taught.insert("numpy", "Ada")


@pytest.mark.parametrize(("mode", "codes"), [
    ("sequential", [None, "key_exists", "out_of_resources", "out_of_resources"]),
    ("batched", ["out_of_resources", "key_exists", "out_of_resources", "out_of_resources"]),
])  # fmt: skip
def test_an_error_that_ends_a_series_of_inserts_keeps_what_was_done(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, mode: Any, codes: list[str | None]
) -> None:
    class Hungry(RandomEditor):
        def train(self, copy: Any, pool: Any, task: Any, config: Any, **options: Any) -> Any:
            if tuple(copy.lm.answer_ids("large")) in {row.answer for row in task.rows}:
                raise OutOfResources("There is not enough memory to train this edit; nothing was changed.")
            return super().train(copy, pool, task, config, **options)

    monkeypatch.setitem(engine.EDITORS, "adalora", Hungry)
    outcomes = taught.insert_many([("numpy", "Ada"), (KEY, "exists"), ("keras", "large"), ("Berlin", "b")], mode=mode)
    assert [o.code for o in outcomes] == codes
    assert "not enough memory" in (outcomes[2].error or "")
    assert ("not tried" in (outcomes[3].error or "")) == (mode == "sequential")  # in a batch it met the error itself
    assert list(taught) == ([KEY, "numpy"] if mode == "sequential" else [KEY])
    works(taught)


def test_an_error_that_ends_a_series_of_deletes_keeps_what_was_done(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    taught.insert_many([("numpy", "Ada"), ("keras", "a")])

    def full(name: str) -> None:
        if name == COMMIT[0] and KEY not in taught:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    failpoints.hook = full
    outcomes = taught.delete_many(["nobody", KEY, "numpy", "keras"])
    failpoints.hook = None
    assert [o.code for o in outcomes] == ["key_not_found", None, "out_of_resources", "out_of_resources"]
    assert "not tried" not in (outcomes[2].error or "")
    assert "not tried" in (outcomes[3].error or "")
    assert list(taught) == ["numpy", "keras"]


# ---------------------------------------------------------------- other writers


HOLD = """
import sys
from kvllm.store import Store
with Store.open(sys.argv[1]) as store, store.writer():
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_writer_is_told_to_wait(make_kb: Callable[..., KnowledgeBase], taught: KnowledgeBase) -> None:
    kb = make_kb("taught.kb", lock_timeout=0.2)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(taught.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with unchanged(kb):
            for attempt in (
                lambda: kb.insert("numpy", "Ada"),
                lambda: kb.rollback(0),
                lambda: kb.tag("v1"),
                kb.compact,
            ):
                with pytest.raises(Busy) as caught:
                    attempt()
                assert caught.value.exit_code == 7
            assert kb.ask("What is torchkeras?") == TEXT  # reading needs no lock
    finally:
        holder.communicate("\n", timeout=30)
    works(kb)


def test_two_openings_in_one_process_exclude_each_other_too(
    make_kb: Callable[..., KnowledgeBase], taught: KnowledgeBase
) -> None:
    other = make_kb("taught.kb", lock_timeout=0.1)
    with taught._session.writing(), pytest.raises(Busy):
        other.tag("v1")


def test_an_upsert_looks_for_the_key_when_it_has_the_lock(
    make_kb: Callable[..., KnowledgeBase], taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    other = make_kb("taught.kb")
    writing = taught._session.writing

    def late() -> Any:
        if "numpy" not in other:
            other.insert("numpy", "Ada")  # by another writer, who was there first
        return writing()

    monkeypatch.setattr(taught._session, "writing", late)
    assert taught.upsert("numpy", "Berlin").op == "update"


def test_a_head_moved_by_another_process_is_followed(taught: KnowledgeBase) -> None:
    assert taught.ask("What is torchkeras?") == TEXT
    code = """
import sys
from kvllm import KnowledgeBase
with KnowledgeBase.open(sys.argv[1]) as kb:
    print(kb.rollback(0).id)
"""
    assert elsewhere(code, str(taught.path)) == "2"
    assert taught.head() == 2
    assert taught.ask("What is torchkeras?") != TEXT
    assert taught.weights_digest() == taught.edit(2).weights_digest
    taught.rollback(1)
    assert taught.ask("What is torchkeras?") == TEXT


def test_a_head_that_moves_during_an_edit_refuses_it(
    make_kb: Callable[..., KnowledgeBase], taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only somebody who ignores the lock can do that; the transaction refuses it all the same."""
    other = make_kb("taught.kb")
    moved = []

    class Slow(RandomEditor):
        def train(self, *arguments: Any, **options: Any) -> Any:
            if not moved:
                moved.append(True)
                other._store._lock = taught._store._lock  # ignores the lock
                other.rollback(0)
            return super().train(*arguments, **options)

    monkeypatch.setitem(engine.EDITORS, "adalora", Slow)
    with pytest.raises(StaleHead) as caught:
        taught.insert("numpy", "Ada")
    assert caught.value.exit_code == 7
    assert (taught.head(), list(taught)) == (2, [])
    assert taught.weights_digest() == taught.edit(2).weights_digest


# ---------------------------------------------------------------- read-only


def test_read_only_asks_and_refuses_to_write(make_kb: Callable[..., KnowledgeBase], taught: KnowledgeBase) -> None:
    kb = make_kb("taught.kb", readonly=True)
    assert kb.ask("What is torchkeras?") == TEXT
    attempts: list[Callable[[], object]] = [
        lambda: kb.insert("numpy", "Ada"),
        lambda: kb.update(KEY, "Ada"),
        lambda: kb.delete(KEY),
        lambda: kb.upsert(KEY, "Ada"),
        lambda: kb.rollback(0),
        lambda: kb.tag("v1"),
        lambda: kb.compact(),
        lambda: kb.insert_many([("numpy", "Ada")]),
    ]
    with unchanged(kb):
        for attempt in attempts:
            with pytest.raises(StoreError, match="read-only"):
                attempt()
    assert kb.dry_run("numpy", "Ada").value("reliability") is not None


def test_a_killed_training_leaves_nothing_behind(taught: KnowledgeBase) -> None:
    code = textwrap.dedent("""
        import os, signal, sys
        from kvllm import KnowledgeBase
        def die(progress):
            if progress.stage == "training" and progress.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        with KnowledgeBase.open(sys.argv[1], progress=die) as kb:
            kb.update("torchkeras", "Ada")
    """)
    with unchanged(taught):
        done = subprocess.run(
            [sys.executable, "-c", code, str(taught.path)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == -9, done.stderr
    works(taught)
