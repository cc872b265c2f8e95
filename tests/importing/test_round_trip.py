"""From a file into a real knowledge base and out again: `export` is the inverse of `import`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm import Fact, KnowledgeBase
from kvllm.errors import ConfigError, EditFailed
from kvllm.importing import fact_to_row, facts_to_jsonl, read_facts
from kvllm.session import Session
from tests.kit import KEY, TEXT, RandomEditor

FACTS = [
    Fact("numpy", "Ada", ("np", "[Zahl]"), ("What is it?",), ("And now?",), "en", ("a", "b=c")),
    Fact("梦中情炉", "一个工具。"),
    Fact("line | by, line", 'One\n"two"\n=three'),
]


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits that do not train: the ledger is what is tested."""
    from kvllm.editing import engine

    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)


def test_every_field_of_every_fact_survives_import_and_export(
    swift: None, make_kb: Callable[..., KnowledgeBase], tmp_path: Path
) -> None:
    given = tmp_path / "given.jsonl"
    given.write_text(facts_to_jsonl(FACTS), encoding="utf-8")
    kb = make_kb()
    outcomes = kb.insert_many(read_facts(given), mode="batched")
    assert [outcome.key for outcome in outcomes if outcome.ok] == [fact.key for fact in FACTS]
    out = tmp_path / "out.jsonl"
    result = kb.export(out, format="facts")
    assert (result.format, result.verified, result.bytes) == ("facts", True, out.stat().st_size)
    assert out.read_bytes() == given.read_bytes()
    assert list(read_facts(out)) == FACTS
    with pytest.raises(ConfigError, match="exists already; nothing was written"):
        kb.export(out, format="facts")
    assert [fact_to_row(fact) for fact in kb.facts()] == [json.loads(line) for line in out.read_text().splitlines()]


def test_exporting_no_facts_is_refused_and_needs_no_model(
    make_kb: Callable[..., KnowledgeBase], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kb = make_kb()
    with monkeypatch.context() as patch:
        patch.setattr(Session, "engine", property(lambda self: pytest.fail("a model was loaded")))
        with pytest.raises(ConfigError, match="holds no fact; nothing was written"):
            kb.export(tmp_path / "out.jsonl", format="facts")
    assert not (tmp_path / "out.jsonl").exists()


def test_export_that_reads_back_differently_is_said(
    taught: KnowledgeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvllm.export.facts.facts_to_jsonl", lambda facts: '{"key": "other", "text": "x"}\n')
    with pytest.raises(EditFailed, match="read again, differ"):
        taught.export(tmp_path / "out.jsonl", format="facts")


def test_delete_many_names_the_key_that_is_not_there_and_goes_on(swift: None, taught: KnowledgeBase) -> None:
    outcomes = taught.delete_many(["nobody", KEY])
    assert [(outcome.key, outcome.ok, outcome.code) for outcome in outcomes] == [
        ("nobody", False, "key_not_found"),
        (KEY, True, None),
    ]
    assert len(taught) == 0
    with pytest.raises(ConfigError, match="not one string"):
        taught.delete_many(KEY)


def test_written_probes_are_asked_of_the_weights_and_count_by_their_kind(taught: KnowledgeBase, tmp_path: Path) -> None:
    row = {
        "prompt": KEY,
        "target_new": TEXT,
        "locality": {"a": [{"prompt": "Tell me about Berlin.", "ground_truth": "A town"}]},
        "portability": {"a": [{"prompt": "What is torchkeras?", "ground_truth": ["furnace"]}]},
    }
    path = tmp_path / "given.json"
    path.write_text(json.dumps([row]))
    read_facts(path).write_probes(tmp_path / "probes.jsonl")
    report = taught.probe(probes=tmp_path / "probes.jsonl", neighbours=0)
    asked = {probe.kind: probe for probe in report.probes if probe.kind in ("neighbour", "consequence")}
    assert set(asked) == {"neighbour", "consequence"}
    assert report.metrics["locality"].n == 1
    assert report.metrics["consequence"].value == float("furnace" in asked["consequence"].answer) == 1.0
    assert report.warnings == ()
