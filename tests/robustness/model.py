"""A state machine over every verb, against a dictionary and a list (hypothesis).

python -m tests.robustness.model --size 0.1
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvllm.errors import EditNotFound, KeyExists, KeyNotFound, StaleHead
from kvllm.store import NewEdit, Store, files
from tests.robustness.harness import BASE, Results, campaign, fact, share_of, tiny_delta

EXAMPLES, STEPS = 300, 50
DELTAS = [tiny_delta(number) for number in range(12)]
ALL_KEYS = ("a", "b", "c", "Who leads Halcyon?", "ключ", "钥匙", "it's", 'say "x"', "a%b", " padded ")
KEYS = st.sampled_from(ALL_KEYS)
FITS = st.sampled_from([True, True, True, False])  # whether to look for a key with which the verb makes sense
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
WORK = [Path(tempfile.gettempdir())]
WHOLE_EXAMPLES = f"examples of {STEPS} steps"
COUNTS: dict[str, int] = {"examples": 0, WHOLE_EXAMPLES: 0, "steps": 0, "edits": 0, "refusals": 0, "reopened": 0}


class KnowledgeBaseMachine(RuleBasedStateMachine):
    """The store beside what it must be: a dictionary of live facts, and a list of such dictionaries by edit."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=WORK[0]))
        self.path = self.folder / "m.kb"
        shutil.copytree(WORK[0] / "empty.kb", self.path)
        self.store = self.opened()
        self.reader = Store.open(self.path, readonly=True)
        self.live: dict[str, str] = {}
        self.states: list[dict[str, str]] = [{}]
        self.chains: list[list[int]] = [[]]  # which delta each edit added, along its history
        self.tagged: dict[str, int] = {}
        self.snapshots: dict[int, bytes] = {}
        self.delta = 0
        self.steps = -1  # the first look is before the first step
        COUNTS["examples"] += 1

    def opened(self) -> Store:
        store = Store.open(self.path)
        store._connection().execute("PRAGMA synchronous = OFF")  # no power is cut here
        return store

    def commit(self, op: Any, keys: tuple[str, ...], state: dict[str, str], chain: list[int], **more: Any) -> None:
        delta = None if op == "rollback" else DELTAS[self.delta % len(DELTAS)]
        edit = self.store.commit(NewEdit(op, keys, self.store.head(), **more), delta)
        self.live = state
        self.states.append(state)
        self.chains.append(chain if delta is None else [*chain, self.delta % len(DELTAS)])
        self.delta += delta is not None
        assert edit.id == len(self.states) - 1
        COUNTS["edits"] += 1

    def chain(self) -> list[int]:
        return self.chains[-1]

    def fitting(self, key: str, fits: bool, *, live: bool) -> str:
        """Return a key that is live, or is not, if one is wanted and there is one; else the key itself."""
        possible = [each for each in ALL_KEYS if (each in self.live) == live]
        return possible[len(key) % len(possible)] if fits and possible and key not in possible else key

    @rule(key=KEYS, text=TEXTS, fits=FITS)
    def insert(self, key: str, text: str, fits: bool) -> None:
        key = self.fitting(key, fits, live=False)
        if key in self.live:
            self.refused(KeyExists, "insert", key, facts=(fact(key, text),))
        else:
            state = {**self.live, key: text or f"{key} is a thing."}
            self.commit("insert", (key,), state, self.chain(), facts=(fact(key, text),))

    @rule(key=KEYS, text=TEXTS, fits=FITS)
    def update(self, key: str, text: str, fits: bool) -> None:
        key = self.fitting(key, fits, live=True)
        if key not in self.live:
            self.refused(KeyNotFound, "update", key, facts=(fact(key, text),))
        else:
            state = {**self.live, key: text or f"{key} is a thing."}
            self.commit("update", (key,), state, self.chain(), facts=(fact(key, text),))

    @rule(key=KEYS, fits=FITS)
    def delete(self, key: str, fits: bool) -> None:
        key = self.fitting(key, fits, live=True)
        if key not in self.live:
            self.refused(KeyNotFound, "delete", key, retired=(key,))
        else:
            state = {k: v for k, v in self.live.items() if k != key}
            self.commit("delete", (key,), state, self.chain(), retired=(key,), mode="restore")

    def refused(self, kind: type[Exception], op: Any, key: str, **more: Any) -> None:
        try:
            self.store.commit(NewEdit(op, (key,), self.store.head(), **more), DELTAS[self.delta % len(DELTAS)])
        except kind:
            COUNTS["refusals"] += 1
        else:
            raise AssertionError(f"{op} of {key!r} was not refused")

    @rule(key=KEYS)
    def stale(self, key: str) -> None:
        try:
            self.store.commit(NewEdit("insert", (key,), self.store.head() + 1, facts=(fact(key),)), DELTAS[0])
        except StaleHead:
            COUNTS["refusals"] += 1
        else:
            raise AssertionError("an edit on another head was not refused")

    @rule(where=st.floats(0, 1))
    def rollback(self, where: float) -> None:
        target = round(where * (len(self.states) - 1))
        self.commit("rollback", (), self.states[target], list(self.chains[target]), target=target)

    @rule(data=st.data())
    @precondition(lambda self: self.tagged)
    def rollback_to_tag(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tagged)))
        target = self.store.resolve(name)
        assert target == self.tagged[name]
        self.commit("rollback", (), self.states[target], list(self.chains[target]), target=target)

    @rule()
    @precondition(lambda self: self.live)
    def compact(self) -> None:
        live = tuple(self.store.facts())
        keys = tuple(each.key for each in live)
        self.commit("compact", keys, dict(self.live), [], facts=live, retired=keys)

    @rule(name=st.sampled_from(["v1", "v2", "α", "a.b", "x-1"]), where=st.floats(0, 1))
    def tag(self, name: str, where: float) -> None:
        target = round(where * (len(self.states) - 1))
        try:
            self.store.tag(name, target)
            assert name not in self.tagged
            self.tagged[name] = target
        except KeyExists:
            assert name in self.tagged
            COUNTS["refusals"] += 1

    @rule(name=st.sampled_from(["v1", "v2", "α"]), where=st.floats(0, 1))
    def move_tag(self, name: str, where: float) -> None:
        self.tagged[name] = round(where * (len(self.states) - 1))
        self.store.tag(name, self.tagged[name], move=True)

    @rule(data=st.data())
    @precondition(lambda self: self.tagged)
    def untag(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.tagged)))
        assert self.store.untag(name) == self.tagged.pop(name)

    @rule(where=st.floats(0, 1), data=st.binary(min_size=1, max_size=40))
    @precondition(lambda self: len(self.states) > 1)
    def snapshot(self, where: float, data: bytes) -> None:
        target = max(1, round(where * (len(self.states) - 1)))
        self.store.write_snapshot(target, data)
        self.snapshots[target] = data

    @rule()
    def gc(self) -> None:
        self.store.gc()
        self.snapshots = dict(sorted(self.snapshots.items())[-2:])
        assert self.store.gc().garbage == ()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.opened()
        COUNTS["reopened"] += 1

    @rule()
    def restore_a_backup(self) -> None:
        """Go on from a copy, which must be the same knowledge base."""
        copy = self.folder / f"{COUNTS['steps']}.kb"
        self.store.backup(copy)
        self.store.close()
        self.reader.close()
        self.path = copy
        self.store = self.opened()
        self.reader = Store.open(copy, readonly=True)

    @rule()
    def verify(self) -> None:
        report = self.store.verify(deep=True)
        assert report.problems == (), report.problems
        assert report.edits == len(self.states) - 1

    @rule(where=st.floats(0, 1))
    def look_back(self, where: float) -> None:
        """What was live at an earlier edit, and what gives its weights."""
        at = round(where * (len(self.states) - 1))
        assert {each.key: each.text for each in self.reader.facts(at)} == self.states[at]
        chain = self.reader.chain(at)
        assert [self.reader.read_delta(sha).files for sha in chain] == [DELTAS[n] for n in self.chains[at]]

    @rule()
    def ask_for_what_is_not_there(self) -> None:
        for ask in (lambda: self.reader.edit(len(self.states)), lambda: self.reader.resolve("nobody")):
            try:
                ask()
            except EditNotFound:
                COUNTS["refusals"] += 1
            else:
                raise AssertionError("an edit that does not exist was found")

    @invariant()
    def reader_and_writer_agree_with_the_model(self) -> None:
        self.steps += 1
        COUNTS["steps"] += self.steps > 0
        for store in (self.store, self.reader):
            assert store.head() == len(self.states) - 1
            assert {each.key: each.text for each in store.facts()} == self.live
            assert store.tags() == self.tagged
        assert self.reader.count() == len(self.live)
        for edit_id, data in self.snapshots.items():
            assert self.reader.read_snapshot(edit_id) == data

    def teardown(self) -> None:
        COUNTS[WHOLE_EXAMPLES] += self.steps >= STEPS
        report = self.store.verify(deep=True)
        self.store.close()
        self.reader.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        assert report.problems == (), report.problems


def run(results: Results, given: argparse.Namespace, work: Path) -> None:
    WORK[0] = work
    Store.create(work / "empty.kb", BASE, {"model": "tiny"}).close()
    files.fsync_fd = lambda fd: None  # most of the time would go there, and no power is cut
    wanted = share_of(given, EXAMPLES)
    for again in range(5):  # hypothesis ends some examples early: as often as it takes
        missing = wanted - COUNTS[WHOLE_EXAMPLES]
        if missing <= 0 or results.failures:
            break
        machine = seed(given.seed * 1000 + given.part * 10 + again)(KnowledgeBaseMachine)
        try:
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=missing,
                    stateful_step_count=STEPS,
                    deadline=None,
                    database=None,
                    phases=(Phase.generate, Phase.shrink),
                    suppress_health_check=list(HealthCheck),
                ),
            )
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            results.check(f"{type(error).__name__}: {error}\n{notes}"[:4000], "the state machine")
    results.counts.update(COUNTS)


if __name__ == "__main__":
    campaign(run)
