"""What the edits do to the live facts and to the chain of deltas; tags; reading back what was written."""

from __future__ import annotations

import pytest

from kvllm.errors import ConfigError, EditNotFound, KeyExists, KeyNotFound, StaleHead
from kvllm.records import DeltaInfo
from kvllm.store import NewEdit, Store
from tests.store.bench import BASE, Bench, fact, small_report, tiny_delta


def test_new_knowledge_base_is_empty_and_knows_its_base(bench: Bench) -> None:
    store = bench.store
    assert store.head() == 0
    assert store.base == BASE
    assert store.settings == {"model": "tiny"}
    assert store.facts() == []
    assert store.history() == []
    assert store.chain(0) == []


def test_commit_returns_the_edit_as_the_ledger_holds_it(bench: Bench) -> None:
    new = NewEdit(
        "insert",
        ("torchkeras",),
        0,
        facts=(fact("torchkeras", "A tool.", aliases=("tk",), language="en", base_answers=("?\x00\ud800",)),),
        steps=9,
        seconds=1.5,
        seed=7,
        norm=2.5,
        rank=2,
        modules=2,
        weights_digest="d" * 64,
        report=small_report(),
        warnings=("careful",),
        config={"ranks": (1, 2), "lr": 0.1},
    )
    edit = bench.store.commit(new, tiny_delta())
    assert (edit.id, edit.op, edit.key, edit.keys, edit.parent) == (1, "insert", "torchkeras", ("torchkeras",), None)
    assert (edit.steps, edit.seconds, edit.seed, edit.warnings) == (9, 1.5, 7, ("careful",))
    assert edit.report == small_report()
    assert edit.config == {"ranks": [1, 2], "lr": 0.1}
    assert edit.delta is not None
    size = sum(map(len, tiny_delta().values()))
    assert edit.delta == DeltaInfo(edit.delta.sha256, size, 2.5, 2, 2)
    assert edit.created_at.endswith("+00:00")
    stored = bench.store.fact("torchkeras")
    assert (stored.text, stored.aliases, stored.edit_id, stored.language) == ("A tool.", ("tk",), 1, "en")
    assert stored.base_answers == ("?\x00\ufffd",)  # a model's output is recorded, half characters aside
    assert bench.store.history() == [edit]


def test_light_history_leaves_report_and_configuration_out(bench: Bench) -> None:
    bench.insert("a", report=small_report(), config={"lr": 0.1})
    (light,) = bench.store.history(light=True)
    assert light.report.metrics == {}
    assert light.report.probes == ()
    assert light.config == {}
    assert light.keys == ("a",)


def test_history_limit_takes_the_newest_oldest_first(bench: Bench) -> None:
    for key in "abc":
        bench.insert(key)
    assert [edit.id for edit in bench.store.history(2)] == [2, 3]
    assert bench.store.history(0) == []


def test_update_keeps_the_place_and_delete_frees_it(bench: Bench) -> None:
    for key in "abc":
        bench.insert(key)
    bench.update("a", "new")
    assert bench.keys() == ["a", "b", "c"]
    assert bench.store.fact("a").text == "new"
    bench.delete("a")
    assert bench.keys() == ["b", "c"]
    assert not bench.store.has("a")
    assert bench.store.count() == 2
    bench.insert("a")
    assert bench.keys() == ["b", "c", "a"]
    assert [version.text for version in bench.store.fact_versions("a")] == ["a is a thing.", "new", "a is a thing."]


def test_facts_at_an_earlier_edit(bench: Bench) -> None:
    bench.insert("a")
    bench.insert("b")
    bench.update("a", "new")
    bench.delete("b")
    assert [bench.keys(at) for at in range(5)] == [[], ["a"], ["a", "b"], ["a", "b"], ["a"]]
    assert bench.store.fact("a", at=2).text == "a is a thing."
    with pytest.raises(KeyNotFound):
        bench.store.fact("b", at=4)
    with pytest.raises(EditNotFound):
        bench.store.facts(at=5)


def test_rollback_restores_facts_and_chain_of_its_target(bench: Bench) -> None:
    bench.insert("a")
    two = bench.insert("b")
    bench.update("a", "new")
    bench.delete("b")
    back = bench.rollback(two)
    store = bench.store
    assert store.chain(back) == store.chain(two)
    assert len(store.chain(two)) == 2
    assert store.facts(back) == store.facts(two) == store.facts()
    assert store.edit(back).target == two
    assert store.edit(back).delta is None
    later = bench.insert("c")
    assert store.chain(later) == [*store.chain(two), store.edit(later).delta.sha256]  # type: ignore[union-attr]
    again = bench.rollback(back)  # a rollback to a rollback
    assert store.chain(again) == store.chain(two)
    empty = bench.rollback(0)
    assert store.chain(empty) == []
    assert store.facts() == []


def test_compact_starts_a_new_chain_with_new_versions(bench: Bench) -> None:
    for key in "abc":
        bench.insert(key)
    bench.delete("b")
    compacted = bench.compact()
    store = bench.store
    assert store.chain(compacted) == [store.edit(compacted).delta.sha256]  # type: ignore[union-attr]
    assert bench.keys() == ["a", "c"]
    assert {each.edit_id for each in store.facts()} == {compacted}
    later = bench.insert("d")
    assert len(store.chain(later)) == 2
    assert bench.keys() == ["a", "c", "d"]
    back = bench.rollback(4)
    assert len(store.chain(back)) == 4
    assert {each.edit_id for each in store.facts()} == {1, 3}


def test_compact_of_nothing_needs_no_delta(bench: Bench) -> None:
    bench.insert("a")
    bench.delete("a")
    edit = bench.store.commit(NewEdit("compact", (), 2), None)
    assert bench.store.chain(edit.id) == []


def test_stale_head_is_refused_and_leaves_no_file(bench: Bench) -> None:
    bench.insert("a")
    with pytest.raises(StaleHead, match="now 1"):
        bench.store.commit(NewEdit("insert", ("b",), 0, facts=(fact("b"),)), tiny_delta(99))
    assert bench.keys() == ["a"]
    assert len(list((bench.store.path / "deltas").iterdir())) == 1


def test_insert_of_a_live_key_is_refused_and_leaves_no_file(bench: Bench) -> None:
    bench.insert("a")
    with pytest.raises(KeyExists) as caught:
        bench.insert("a")
    assert caught.value.key == "a"
    assert bench.store.head() == 1
    assert len(list((bench.store.path / "deltas").iterdir())) == 1


def test_an_edit_that_does_not_fit_the_live_facts_is_refused(bench: Bench) -> None:
    bench.insert("a")
    with pytest.raises(KeyNotFound):
        bench.update("b", "new")
    with pytest.raises(KeyNotFound):
        bench.delete("b")
    with pytest.raises(KeyNotFound):
        bench.store.commit(NewEdit("compact", ("b",), 1, facts=(fact("b"),)), tiny_delta(5))
    with pytest.raises(EditNotFound):
        bench.rollback(1 + 1)
    assert bench.store.head() == 1


def test_the_same_delta_may_belong_to_two_edits(bench: Bench) -> None:
    store = bench.store
    for head, key in enumerate("ab"):
        store.commit(NewEdit("insert", (key,), head, facts=(fact(key),)), tiny_delta(1))
    assert len(set(store.chain(2))) == 1
    assert len(store.chain(2)) == 2


@pytest.mark.parametrize("bad", ["a\x00b", "a\ud800b", "", "  ", "e\u0301"])
def test_keys_that_cannot_be_stored_are_refused(bench: Bench, bad: str) -> None:
    with pytest.raises(ConfigError):
        bench.insert(bad)
    assert bench.store.head() == 0
    assert not bench.store.has(bad)
    assert bench.store.fact_versions(bad) == []
    with pytest.raises(KeyNotFound):
        bench.store.fact(bad)


@pytest.mark.parametrize(
    "more",
    [
        {"config": {"x": float("inf")}},
        {"config": {"x": object()}},
        {"config": {"x": "\x00"}},
        {"warnings": ("\ud800",)},
        {"seed": 2**64},
        {"seconds": float("nan")},
        {"mode": "\x00"},
    ],
)
def test_values_that_cannot_be_stored_are_refused(bench: Bench, more: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        bench.insert("a", **more)
    assert bench.store.head() == 0
    assert list((bench.store.path / "deltas").iterdir()) == []


def test_missing_key_names_the_near_ones(bench: Bench) -> None:
    bench.insert("torchkeras", "numpy")
    with pytest.raises(KeyNotFound, match="did you mean 'torchkeras'") as caught:
        bench.store.fact("torchkera")
    assert caught.value.suggestions == ("torchkeras",)
    assert caught.value.key == "torchkera"


def test_tags_and_references(bench: Bench) -> None:
    store = bench.store
    bench.insert("a")
    store.tag("base-line", 0)
    store.tag("版本.1", 1)
    assert store.tags() == {"base-line": 0, "版本.1": 1}
    assert store.edit(1).tags == ("版本.1",)
    assert [store.resolve(ref) for ref in ("head", "base", "0", 1, "1", "版本.1", "base-line")] == [1, 0, 0, 1, 1, 1, 0]
    store.tag("हिन्दी", 1)
    store.tag("e\u0301te", 1)
    assert store.resolve("\u00e9te") == 1
    with pytest.raises(KeyExists, match="already points to edit 1"):
        store.tag("版本.1", 0)
    with pytest.raises(EditNotFound, match="did you mean 'base-line'"):
        store.resolve("baseline")
    for missing in (2, "2", -1, "9" * 40, "", "nothing"):
        with pytest.raises(EditNotFound):
            store.resolve(missing)
    with pytest.raises(EditNotFound):
        store.tag("v2", 2)
    for bad in ("", "12", "head", "base", "a b", "a/b", "x" * 65, "a\x00"):
        with pytest.raises(ConfigError):
            store.tag(bad, 1)
    with pytest.raises(EditNotFound):
        store.edit(0)


def test_a_tag_can_be_moved_and_removed(bench: Bench) -> None:
    store = bench.store
    bench.insert("a")
    bench.insert("b")
    store.tag("v1", 1)
    store.tag("kept", 1)
    with pytest.raises(KeyExists, match=r"already points to edit 1; .*--move"):
        store.tag("v1", 2)
    store.tag("v1", 2, move=True)
    assert store.tags() == {"kept": 1, "v1": 2}
    assert [edit.tags for edit in store.history()] == [("kept",), ("v1",)]
    store.tag("v1", 0, move=True)
    store.tag("v1", 0, move=True)
    store.tag("new", 2, move=True)
    with pytest.raises(EditNotFound, match="no edit 3 to tag"):
        store.tag("v1", 3, move=True)
    assert store.tags() == {"kept": 1, "v1": 0, "new": 2}
    assert (store.untag("v1"), store.untag("new")) == (0, 2)
    assert store.tags() == {"kept": 1}
    with pytest.raises(EditNotFound, match="No tag is called 'v1'"):
        store.untag("v1")
    with pytest.raises(EditNotFound, match="nothing was changed, did you mean 'kept'"):
        store.untag("kep")
    for absent in ("", "1", "head", "base", "a\ud800"):
        with pytest.raises(EditNotFound):
            store.untag(absent)
    store.tag("e\u0301te", 1)
    assert store.untag("\u00e9te") == 1
    with Store.open(store.path) as again:
        assert again.tags() == {"kept": 1}


def test_settings_are_merged(bench: Bench) -> None:
    bench.store.set_settings(encoder="minilm", gate={"min": 0.5})
    bench.store.set_settings(model=None)
    assert bench.store.settings == {"model": None, "encoder": "minilm", "gate": {"min": 0.5}}
    with pytest.raises(ConfigError):
        bench.store.set_settings(model=float("nan"))


def test_key_vectors_are_cached_per_encoder(bench: Bench) -> None:
    bench.insert("a", "b")
    ids = [each.id for each in bench.store.facts()]
    bench.store.put_vectors("minilm", {ids[0]: b"1", ids[1]: b"2"})
    bench.store.put_vectors("minilm", {ids[0]: b"3"})
    assert bench.store.vectors("minilm") == {ids[0]: b"3", ids[1]: b"2"}
    assert bench.store.vectors("other") == {}


def test_a_second_store_sees_what_the_first_committed(bench: Bench) -> None:
    with Store.open(bench.store.path, readonly=True) as reader:
        assert reader.head() == 0
        bench.insert("a")
        assert reader.head() == 1
        assert reader.has("a")
