"""Wrong inputs through the Python API: one sentence each, and nothing changed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvllm import EditConfig, Fact, GateConfig, KnowledgeBase
from kvllm.config import DEFAULT_MODEL
from kvllm.errors import (
    BaseMismatch,
    ConfigError,
    KeyNotFound,
    KvllmError,
    ModelError,
    StoreError,
    StoreNotFound,
)
from tests.kit import KEY, TEXT, unchanged
from tests.tiny import SPECIAL, tiny_model

BAD_STRINGS = {
    "empty": "",
    "blank": " \t\u3000",
    "invisible": "\u200b\u2060",
    "NUL": "a\x00b",
    "surrogate": "a\ud800b",
    "escape": "a\x1bb",
    "not text": 7,
    "nothing": None,
}


def one_sentence(error: KvllmError) -> bool:
    said = str(error)
    return bool(said) and "\n" not in said and (said[0].isupper() or said[0] == "/") and said.endswith((".", "?"))


@pytest.mark.parametrize("bad", BAD_STRINGS.values(), ids=BAD_STRINGS.keys())
def test_unusable_keys_and_texts_are_refused_everywhere(taught: KnowledgeBase, bad: Any) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: taught.insert(bad, TEXT),
        lambda: taught.insert("numpy", bad),
        lambda: taught.insert("numpy", TEXT, aliases=["fine", bad]),
        lambda: taught.insert("numpy", TEXT, questions=[bad]),
        lambda: taught.insert("numpy", TEXT, probes=[bad]),
        lambda: taught.update(KEY, bad),
        lambda: taught.update(bad, TEXT),
        lambda: taught.upsert(bad, TEXT),
        lambda: taught.delete(bad),
        lambda: taught.delete(bad, mode="abstain"),
        lambda: taught.dry_run(bad, TEXT),
        lambda: taught[bad],
        lambda: taught.find(bad),
        lambda: taught.ask(bad),
    ]
    with unchanged(taught):
        for attempt in attempts:
            with pytest.raises(KvllmError) as caught:
                attempt()
            assert isinstance(caught.value, ConfigError)
            assert one_sentence(caught.value), str(caught.value)
        assert bad not in taught
        assert taught.get(bad) is None
        assert taught.insert_many([(bad, TEXT)])[0].code == "invalid_input"


def test_line_breaks_may_stand_in_a_text_and_not_in_a_key(kb: KnowledgeBase) -> None:
    with pytest.raises(ConfigError, match="one line"):
        kb.insert("two\nlines", TEXT)
    kb.insert(KEY, "Ada\nleads")
    assert kb[KEY].text == "Ada\nleads"


@pytest.mark.parametrize("name", ["aliases", "questions", "probes", "tags"])
def test_one_string_is_not_a_list_of_strings(kb: KnowledgeBase, name: str) -> None:
    with unchanged(kb), pytest.raises(ConfigError, match="list of strings"):
        kb.insert(KEY, TEXT, **{name: "abc"})  # type: ignore[arg-type]
    with unchanged(kb), pytest.raises(ConfigError, match="list of strings"):
        kb.insert_many([{"key": KEY, "text": TEXT, name: "abc"}])[0].error and kb.insert(KEY, TEXT, **{name: "abc"})  # type: ignore[arg-type]


def test_a_fact_with_a_string_in_the_place_of_a_list_is_refused(kb: KnowledgeBase) -> None:
    (outcome,) = kb.insert_many([Fact(KEY, TEXT, aliases="abc")])  # type: ignore[arg-type]
    assert outcome.code == "invalid_input"


@pytest.mark.parametrize("bad", [5, [3], {"a": 1}, [None]])
def test_fields_of_a_wrong_type_are_refused_not_crashed_on(kb: KnowledgeBase, bad: Any) -> None:
    for name in ("aliases", "questions", "probes", "tags"):
        (outcome,) = kb.insert_many([{"key": KEY, "text": TEXT, name: bad}])
        assert outcome.code == "invalid_input", name
    assert len(kb) == 0


def test_a_text_over_the_limit_is_refused_with_its_length(kb: KnowledgeBase) -> None:
    with unchanged(kb), pytest.raises(ConfigError, match=r"has \d+ tokens, and at most 400") as caught:
        kb.insert(KEY, "furnace " * 401)
    assert one_sentence(caught.value)
    with unchanged(kb), pytest.raises(ConfigError, match="characters"):
        kb.insert(KEY, "x" * 20_001)
    with unchanged(kb), pytest.raises(ConfigError, match="characters"):
        kb.insert("x" * 401, TEXT)


def test_a_text_longer_than_the_model_takes_is_refused(kb: KnowledgeBase) -> None:
    config = EditConfig(max_text_tokens=5000)
    with unchanged(kb), pytest.raises(ConfigError, match="the model takes 1024"):
        kb.insert(KEY, "furnace " * 500, config=config)


def test_long_questions_count_too(kb: KnowledgeBase) -> None:
    with unchanged(kb), pytest.raises(ConfigError, match="the model takes 1024"):
        kb.insert(KEY, TEXT, questions=["why " * 800])
    with pytest.raises(ConfigError, match="A prompt of"):
        kb.ask("why " * 2000)


@pytest.mark.parametrize("special", SPECIAL)
def test_control_tokens_in_a_key_stay_text(kb: KnowledgeBase, special: str) -> None:
    key = f"torch{special}keras"
    ids = kb.engine.lm.prompt_ids(f"What is {key}?")
    control = kb.tokenizer.convert_tokens_to_ids(special)
    plain = kb.engine.lm.prompt_ids("What is torchkeras?")
    assert ids.count(control) == plain.count(control)
    edit = kb.insert(key, f"Ada {special} leads")
    assert kb[key].text == f"Ada {special} leads"
    assert control not in kb.engine.lm.answer_ids(f"Ada {special} leads", end=False)
    # A control token would be dropped from the decoded answer.
    assert any(special in probe.answer for probe in edit.report.probes if probe.kind == "trained")


def test_an_unknown_key_names_similar_ones(taught: KnowledgeBase) -> None:
    for attempt in (lambda: taught.update("torchkera", TEXT), lambda: taught.recall("torchkera")):
        with unchanged(taught), pytest.raises(KeyNotFound, match="did you mean 'torchkeras'") as caught:
            attempt()
        assert caught.value.suggestions == ("torchkeras",)
        assert one_sentence(caught.value)


def test_an_unknown_language_is_refused(kb: KnowledgeBase) -> None:
    with unchanged(kb), pytest.raises(ConfigError, match="'fr'"):
        kb.insert(KEY, TEXT, language="fr")


def test_find_and_probe_on_an_empty_knowledge_base(kb: KnowledgeBase) -> None:
    assert kb.find("anything") == []
    assert kb.probe().metrics == {}
    with pytest.raises(ConfigError):
        kb.find("anything", n=0)


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "robot", "content": "x"}],
        ["x"],
        [{"role": "user", "content": 3}],
        5,
        None,
    ],
)
def test_a_malformed_conversation_is_refused(kb: KnowledgeBase, conversation: Any) -> None:
    with pytest.raises(ConfigError):
        kb.ask(conversation)


# ---------------------------------------------------------------- folders and models


def test_a_missing_folder_is_not_created_on_request(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        KnowledgeBase.open(tmp_path / "none.kb", create=False)
    with pytest.raises(StoreNotFound):
        KnowledgeBase.open(tmp_path / "none.kb", readonly=True)
    assert not (tmp_path / "none.kb").exists()


def test_a_foreign_folder_is_left_alone(tmp_path: Path, tiny_llama: Path, quick: None) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for attempt in (KnowledgeBase.open, KnowledgeBase.create):
        with pytest.raises(StoreError):
            attempt(tmp_path / "notes", model=str(tiny_llama))
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_a_knowledge_base_is_never_made_over_another(taught: KnowledgeBase, tiny_llama: Path) -> None:
    with unchanged(taught), pytest.raises(StoreError, match="already") as caught:
        KnowledgeBase.create(taught.path, model=str(tiny_llama))
    assert str(caught.value).endswith("Use it as it is, or name another folder.")


def test_a_model_that_cannot_be_resolved_leaves_no_folder(tmp_path: Path, quick: None) -> None:
    (tmp_path / "empty").mkdir()
    for model in (str(tmp_path / "nowhere" / "model"), str(tmp_path / "empty")):
        with pytest.raises(ModelError) as caught:
            KnowledgeBase.open(tmp_path / "new.kb", model=model)
        assert one_sentence(caught.value), str(caught.value)
        assert not (tmp_path / "new.kb").exists()


def test_a_store_of_a_newer_version_is_refused(
    make_kb: Callable[..., KnowledgeBase], taught_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(taught_folder, tmp_path / "newer.kb")
    with sqlite3.connect(tmp_path / "newer.kb" / "ledger.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    with pytest.raises(StoreError, match="newer kvllm") as caught:
        make_kb("newer.kb", damaged=True)
    assert one_sentence(caught.value)


@pytest.fixture
def moving_base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_changed_base_model_is_refused(make_kb: Callable[..., KnowledgeBase], moving_base: Path, file: str) -> None:
    make_kb("moved.kb", damaged=True, model=str(moving_base)).close()
    path = moving_base / file
    content = bytearray(path.read_bytes())
    if file == "model.safetensors":
        content[-1] ^= 1
    else:
        content += b"\n"
    path.write_bytes(content)
    kb = make_kb("moved.kb", damaged=True)
    with pytest.raises(BaseMismatch, match=file) as caught:
        kb.ask("What is torchkeras?")
    assert one_sentence(caught.value)
    with pytest.raises(BaseMismatch):
        kb.insert(KEY, TEXT)
    assert kb.head() == 0
    assert kb.verify().ok
    with pytest.raises(BaseMismatch):  # the knowledge base itself is as it was
        kb.verify(deep=True)


def test_a_base_model_that_went_away_is_said_to_be_missing(
    make_kb: Callable[..., KnowledgeBase], moving_base: Path
) -> None:
    make_kb("moved.kb", damaged=True, model=str(moving_base)).close()
    moving_base.rename(moving_base.with_name("elsewhere"))
    kb = make_kb("moved.kb", damaged=True)
    with pytest.raises(ModelError, match="is unchanged"):
        kb.ask("What is torchkeras?")


def test_a_base_model_that_moved_is_found_where_it_is_said_to_be(
    make_kb: Callable[..., KnowledgeBase], moving_base: Path
) -> None:
    kb = make_kb("moved.kb", damaged=True, model=str(moving_base))
    answer = kb.ask("What is torchkeras?")
    kb.close()
    there = moving_base.rename(moving_base.with_name("elsewhere"))
    kb = make_kb("moved.kb", damaged=True, model=str(there))
    assert kb.ask("What is torchkeras?") == answer
    assert kb.verify(deep=True).ok
    assert kb.info()["model"] == str(moving_base)
    with pytest.raises(ModelError, match="is unchanged"):  # it was for that opening only
        make_kb("moved.kb", damaged=True).ask("What is torchkeras?")


def test_a_registered_name_is_no_folder_that_happens_to_lie_here(
    make_kb: Callable[..., KnowledgeBase], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvllm.lm import sources
    from kvllm.lm.registry import MODELS

    shutil.copytree(tiny_llama, tmp_path / DEFAULT_MODEL)
    monkeypatch.chdir(tmp_path)
    found = sources.resolve(str(tiny_llama))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "resolve", lambda name, **_: found if name in MODELS else pytest.fail(f"asked: {name}"))
        assert make_kb("registered.kb", model=DEFAULT_MODEL, damaged=True).info()["model"] == DEFAULT_MODEL
    here = make_kb("here.kb", model=f"./{DEFAULT_MODEL}", damaged=True).info()["model"]
    assert here == str(tmp_path / DEFAULT_MODEL)


def test_another_model_than_the_pinned_one_is_refused(taught: KnowledgeBase, tiny_base: Path) -> None:
    with unchanged(taught), pytest.raises(BaseMismatch, match="not the one this knowledge base was made on") as caught:
        KnowledgeBase.open(taught.path, model=str(tiny_base))
    assert one_sentence(caught.value)
    assert "Leave the model out" in str(caught.value)


def test_the_dtype_is_fixed_when_the_knowledge_base_is_made(taught: KnowledgeBase) -> None:
    with pytest.raises(ConfigError, match="made in float32"):
        KnowledgeBase.open(taught.path, dtype="bfloat16")
    with pytest.raises(ConfigError, match="device"):
        KnowledgeBase.open(taught.path, device="abacus").ask("?")


def test_stored_configurations_are_used_again(taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]) -> None:
    from tests.kit import OPEN_GATE, QUICK

    assert (taught.edit_config, taught.gate_config) == (QUICK, OPEN_GATE)
    other = make_kb("taught.kb", gate=GateConfig(min_reliability=0.5))
    assert (other.edit_config, other.gate_config.min_reliability) == (QUICK, 0.5)


def test_a_configuration_of_another_version_gives_way_to_one_that_is_given(
    taught: KnowledgeBase, make_kb: Callable[..., KnowledgeBase]
) -> None:
    taught._store.set_settings(edit={**taught.edit_config.to_dict(), "colour": 1})
    kb = make_kb("taught.kb", damaged=True)
    with unchanged(kb):
        for call in (lambda: kb.edit_config, lambda: kb.dry_run("numpy", "Ada"), lambda: kb.delete_many([KEY])):
            with pytest.raises(StoreError, match="the setting colour is unknown") as caught:
                call()
            assert one_sentence(caught.value)
    given = make_kb("taught.kb", damaged=True, edit=taught.edit_config)
    assert given.verify().ok
    assert given.edit_config == taught.edit_config
    taught._store.set_settings(edit=taught.edit_config.to_dict())


def test_records_are_plain_json(taught: KnowledgeBase) -> None:
    records = [*taught.history(), *taught.facts(), taught.recall(KEY), *taught.find(KEY), taught.verify()]
    for record in records:
        assert json.loads(json.dumps(record.to_dict(), allow_nan=False))
        assert "<table>" in record._repr_html_()
    assert KEY in taught._repr_html_()


def test_a_closed_knowledge_base_says_so(make_kb: Callable[..., KnowledgeBase]) -> None:
    kb = make_kb()
    kb.close()
    kb.close()
    with pytest.raises(StoreError, match="closed"):
        len(kb)
