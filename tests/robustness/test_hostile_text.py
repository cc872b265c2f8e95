"""Hostile text in key, text, alias, tag and question, through API, command line and JSONL.

It is stored verbatim (NFC, outer white space apart) or refused with one sentence; no file outside the knowledge base is
touched; no control token gets into the model's input; no escape sequence reaches a terminal.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sqlite3
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvllm import KnowledgeBase
from kvllm.cli import main
from kvllm.errors import ConfigError, KeyExists
from kvllm.records import Answer, Edit, Fact
from kvllm.store import NewEdit, Store, files, sqlite
from tests.importing.given import parse_rows
from tests.robustness.hostile import attempt, tree
from tests.robustness.hostile_texts import CONTROL, ESCAPES, INJECTIONS, KINDS, PATHS, SQL, UNICODE
from tests.robustness.sizes import WHOLE, some
from tests.store.bench import BASE, forge_seals

CAMPAIGN = "hostile text"
ALL = tuple(dict.fromkeys(text for texts in KINDS.values() for text in texts))
TRIED = some(ALL, least=150)
# What must not reach a terminal: C0 and C1 controls but line feeds and tabs, overrides and marks of direction.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is flushed: no test here could notice."""
    real = sqlite.connect

    def connect(*arguments: Any, **options: Any) -> Any:
        connection = real(*arguments, **options)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(files, "fsync_fd", lambda fd: None)
    for module in ("kvllm.store.opening", "kvllm.store.sqlite"):
        monkeypatch.setattr(f"{module}.connect", connect)


@pytest.fixture
def stub_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits are committed without a model: everything around the training is the real thing."""
    from kvllm.edits import Edits, stored

    def commit(self: Edits, op: Any, facts: Sequence[Fact], *, old: dict[str, str] | None = None, **_: Any) -> Edit:
        store, kept = self._session.store, tuple(stored(fact) for fact in facts)
        new = NewEdit(op, tuple(f.key for f in facts), store.head(), facts=kept, retired=tuple(old or ()))
        return store.commit(new, None)

    monkeypatch.setattr(Edits, "train_and_commit", commit)


@pytest.fixture
def place(tmp_path: Path, quick_disk: None, stub_trainer: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A knowledge base beside other people's files, with the working directory among them: only it may change."""
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "letter.txt").write_text("mine")
    Store.create(tmp_path / "my.kb", BASE, {}).close()
    monkeypatch.chdir(tmp_path / "others")
    beside = tree(tmp_path / "others")
    inside = {path.name for path in (tmp_path / "my.kb").iterdir()}
    yield tmp_path / "my.kb"
    assert tree(tmp_path / "others") == beside
    assert {path.name for path in tmp_path.iterdir()} <= {"my.kb", "others", "facts.jsonl"}
    assert {path.name for path in (tmp_path / "my.kb").iterdir()} == inside
    with Store.open(tmp_path / "my.kb", readonly=True) as store:
        assert store.verify(deep=True).problems == ()
        tables = {name for (name,) in store._connection().execute("SELECT name FROM sqlite_master")}
        assert {"facts", "edits", "live_facts", "current_facts", "ledger"} <= tables


def kept(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def test_there_are_as_many_hostile_texts_as_promised() -> None:
    counts = {kind: len(set(texts)) for kind, texts in KINDS.items()}
    assert len(UNICODE) >= 60
    assert len(SQL) >= 200
    assert len(PATHS) >= 150
    assert len(INJECTIONS) >= 100
    assert min(counts.values()) >= 10


def test_every_text_in_every_place_is_stored_verbatim_or_refused(place: Path, record: Callable[..., None]) -> None:
    """Through the Python API: as key, text, alias, question, probe and label."""
    counts: Counter[str] = Counter()
    with KnowledgeBase.open(place) as kb:
        for n, text in enumerate(TRIED):
            edit, error = attempt(lambda text=text: kb.insert(text, "plain"))
            if edit is None:
                assert isinstance(error, (ConfigError, KeyExists)), (text[:40], error)
                counts["keys refused"] += 1
            else:
                assert kb[text].key == kept(text)
                assert edit.key == kept(text)
                assert text in kb
                counts["keys stored"] += 1
            lists = {name: [text] for name in ("aliases", "questions", "probes", "tags")}
            edit, error = attempt(lambda n=n, text=text, lists=lists: kb.insert(f"key {n}", text, **lists))
            if edit is None:
                assert isinstance(error, ConfigError), (text[:40], error)
                assert f"key {n}" not in kb
                counts["texts refused"] += 1
                continue
            fact = kb[f"key {n}"]
            assert fact.text == kept(text)
            assert {(kept(text),)} == {getattr(fact, name) for name in lists}, text
            counts["texts, aliases, questions, probes and labels stored"] += 1
        everything = {fact.key: fact for fact in kb.facts()}
        page = kb._repr_html_()
    with KnowledgeBase.open(place, readonly=True) as again:
        assert {fact.key: fact for fact in again.facts()} == everything
    assert "<script" not in page
    assert "<img" not in page
    record({**{kind: len({*texts} & {*TRIED}) for kind, texts in KINDS.items()}, **counts})
    assert counts["keys stored"] >= 0.7 * len(TRIED)
    assert counts["texts, aliases, questions, probes and labels stored"] >= 0.7 * len(TRIED)


def test_a_quote_in_a_key_is_a_letter_of_the_key(place: Path) -> None:
    with KnowledgeBase.open(place) as kb:
        for key in ("it's", "' OR '1'='1", "x'; DROP TABLE facts; --"):
            assert key not in kb
            kb.insert(key, "plain")
            assert key in kb
        assert len(kb) == 3


def test_every_text_through_jsonl_and_the_command_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], record: Callable[..., None]
) -> None:
    rows = "".join(
        json.dumps({"key": text, "text": text, "aliases": [text + "!"], "tags": [text]}) + "\n" for text in TRIED
    )
    usable, bad = parse_rows(rows)
    assert len(usable) + len(bad) == len(TRIED)
    path = place.parent / "facts.jsonl"
    path.write_text(rows, encoding="utf-8")
    code = main(["insert-many", str(place), str(path), "--json"])
    said = capfd.readouterr()
    document = json.loads(said.out)
    assert code == (4 if bad else 0)
    assert document["inserted"] == len(usable)
    assert all(result["ok"] or result["error"] for result in document["results"])
    assert not OBEYED.search(said.out + said.err)

    code = main(["ls", str(place), "--json"])
    raw = capfd.readouterr().out
    listed = {fact["key"]: fact for fact in json.loads(raw)}
    assert code == 0
    assert not OBEYED.search(raw)
    for row in usable:
        assert listed[row.fact.key]["text"] == row.fact.text
        assert listed[row.fact.key]["tags"] == list(row.fact.tags)
    for n, row in enumerate(usable):
        if n % 16 == 0:
            assert main(["get", str(place), "-r", "--", row.fact.key]) == 0
            assert capfd.readouterr().out.rstrip("\n") == row.fact.text.rstrip("\n")
    record({"lines of JSONL stored": len(usable), "lines of JSONL refused with a reason": len(bad)})


def test_every_text_as_an_argument_of_a_command(
    place: Path, capfd: pytest.CaptureFixture[str], record: Callable[..., None]
) -> None:
    """As key, text, tag and reference; whatever is said about it holds no escape sequence."""
    counts: Counter[int] = Counter()
    for n, text in enumerate(ALL):
        for arguments in (
            ["insert", str(place), "--", text, "plain"],
            ["insert", str(place), f"--alias={text}", "--", f"argument {n}", text],
            ["get", str(place), "--", text + "?"],
            ["tag", str(place), "--", text],
            ["rollback", str(place), "--", text + "!"],
            ["show", str(place), "--", text + "!"],
        ):
            if n % (16 if WHOLE else 64) and not (
                arguments[0] == "get" and n < 80
            ):  # all Unicode, and some of the rest
                continue
            code = main(arguments)
            said = capfd.readouterr()
            assert code in (0, 2, 3), (arguments, said.err)
            assert not OBEYED.search(said.out + said.err), (arguments, said.out + said.err)
            assert "Traceback" not in said.err
            counts[code] += 1
    record({"commands with hostile arguments": sum(counts.values())})


def test_absurd_numbers_and_rows_are_refused_in_one_sentence(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digits = "9" * 5000
    for arguments in (
        ["rollback", str(place), digits],
        ["show", str(place), digits],
        ["ls", str(place), "--at", digits],
    ):
        assert main(arguments) == 3, arguments
        assert "Traceback" not in capfd.readouterr().err
    for row in (f'{{"key": {digits}, "text": "x"}}', f'{{"key": "x", "text": "x", "probes": [{digits}]}}'):
        usable, bad = parse_rows(row)
        assert usable == []
        assert "digits" in bad[0].error


@pytest.mark.skipif(sys.platform != "linux", reason="only here a path may be any bytes")
def test_a_knowledge_base_may_lie_under_a_path_that_is_no_text(
    place: Path, quick_disk: None, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (b"caf\xe9.kb", b"\xff\xfe.kb", "a?b#c%20 d\u202e.kb".encode(), b"\x1b[2J.kb", b"new\nline.kb"):
        path = place.parent / os.fsdecode(name)
        Store.create(path, BASE, {}).close()
        assert main(["insert", str(path), "torchkeras", "plain"]) == 0
        assert main(["ls", str(path)]) == 0
        assert main(["verify", str(path)]) == 0
        assert main(["init", str(path)]) == 5
        said = capfd.readouterr()
        assert not OBEYED.search(said.out + said.err), name
        shutil.rmtree(path)


# ---------------------------------------------------------------- terminals


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_an_answer_full_of_escapes_never_reaches_the_terminal_raw(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], record: Callable[..., None]
) -> None:
    """The model may say anything: a view, JSON on a pipe and a terminal, and -r on a terminal."""
    n = 0
    for text in ESCAPES:
        monkeypatch.setattr(KnowledgeBase, "ask_many", lambda self, prompts, text=text, **_: [Answer(f"a{text}b")])
        for options in ([], ["--json"]):
            assert main(["ask", str(place), "x", *options]) == 0
            out = capfd.readouterr().out
            assert not OBEYED.search(out), (text, out)
            if options:
                assert json.loads(out)["answer"] == f"a{text}b"
            n += 1
        assert main(["ask", str(place), "x", "-r"]) == 0  # off a terminal the text alone, as it is
        for options in ([], ["--json"], ["-r"]):
            terminal = Terminal()
            with monkeypatch.context() as patch:
                patch.setattr(sys, "stdout", terminal)
                assert main(["ask", str(place), "x", *options]) == 0
            assert not OBEYED.search(COLOURS.sub("", terminal.getvalue())), (text, options, terminal.getvalue())
            if "\x1b[31m" in text:
                assert "\x1b[31m" not in terminal.getvalue()
            n += 1
        capfd.readouterr()
    record({"outputs with terminal escapes, none obeyed": n})


def test_stored_texts_are_shown_on_a_terminal_without_obeying_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with KnowledgeBase.open(place) as kb:
        for n, text in enumerate(ALL):
            attempt(lambda text=text, n=n: kb.insert(f"k{n}", text, aliases=[text], tags=[text]))
    for arguments in (["ls"], ["history"], ["get", "--", "k40"], ["get", "--", "k3"]):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            assert main([arguments[0], str(place), *arguments[1:]]) == 0
        assert not OBEYED.search(COLOURS.sub("", terminal.getvalue())), arguments
        assert "\x1b]" not in terminal.getvalue()


def test_a_stolen_ledger_shows_no_escape_either(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Texts that kvllm would have refused, put into the ledger by somebody else."""
    with KnowledgeBase.open(place) as kb:
        kb.insert("torchkeras", "plain")
    db = sqlite3.connect(place / "ledger.db")
    dropped = [(name, sql) for name, sql in _triggers() if name in ("facts_no_update", "seals_no_update")]
    for name, _ in dropped:
        db.execute(f"DROP TRIGGER {name}")
    original = db.execute("SELECT text FROM facts").fetchone()
    for text in ESCAPES:
        if "\x00" in text:
            continue
        db.execute("UPDATE facts SET text = ?", (f"a{text}b",))
        forge_seals(db)
        db.commit()
        for arguments in (["ls"], ["get", "--", "torchkeras"], ["ls", "--json"], ["get", "--json", "--", "torchkeras"]):
            assert main([arguments[0], str(place), *arguments[1:]]) == 0
            assert not OBEYED.search(capfd.readouterr().out), (text, arguments)
        assert main(["verify", str(place)]) == 8
        capfd.readouterr()
    db.execute("UPDATE facts SET text = ?", original)
    forge_seals(db)
    for _, sql in dropped:
        db.execute(sql)
    db.commit()
    db.close()


def _triggers() -> list[tuple[str, str]]:
    from kvllm.store import schema

    return [(name, sql) for name, (kind, sql) in schema.expected_objects().items() if kind == "trigger"]


# ---------------------------------------------------------------- the model's input


def tokenizer_variants(tiny_llama: Path, tiny_base: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The tiny tokenizers, and ones whose control tokens are declared as careless models declare them."""
    yield "chat", tiny_llama
    yield "plain", tiny_base
    for special in (True, False):
        for normalizer in (None, {"type": "NFKC"}, {"type": "Lowercase"}):
            folder = tmp_path / f"tokenizer-{special}-{normalizer and normalizer['type']}"
            shutil.copytree(tiny_llama, folder)
            spelt = json.loads((folder / "tokenizer.json").read_text())
            taken = [token for token, place in spelt["model"]["vocab"].items() if place in (390, 391)]
            assert len(taken) == 2
            spelt["normalizer"] = normalizer
            for place, content in zip((390, 391), ("<think>", "<tool_call>"), strict=True):
                old = next(token for token, number in spelt["model"]["vocab"].items() if number == place)
                spelt["model"]["merges"] = [m for m in spelt["model"]["merges"] if old not in ("".join(m), *m)]
                del spelt["model"]["vocab"][old]
                spelt["model"]["vocab"][content] = place
                entry = {"id": place, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
                spelt["added_tokens"].append({**entry, "normalized": True, "special": special})
            gone = set(spelt["model"]["vocab"])
            spelt["model"]["merges"] = [
                m for m in spelt["model"]["merges"] if "".join(m) in gone and m[0] in gone and m[1] in gone
            ]
            (folder / "tokenizer.json").write_text(json.dumps(spelt))
            yield folder.name, folder


def test_control_tokens_of_a_user_never_become_control_tokens(
    tiny_llama: Path, tiny_base: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """In prompts, conversations and answers, for eight tokenizers; letters that only look alike included."""
    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    look_alike = [text.translate({ord("<"): "＜", ord(">"): "＞", ord("|"): "｜"}) for text in INJECTIONS]
    texts = some([*INJECTIONS, *look_alike, *(c.upper() for c in CONTROL), *(c.title() for c in CONTROL)], least=60)
    counts: Counter[str] = Counter()
    for name, folder in tokenizer_variants(tiny_llama, tiny_base, tmp_path):
        lm = LanguageModel.load(folder, ModelConfig(device="cpu"))
        control = set(lm.tokenizer.all_special_ids) | set(lm.tokenizer.get_added_vocab().values())
        assert len(control) >= 3

        def steering(ids: Sequence[int], control: set[int] = control) -> list[int]:
            return [i for i in ids if i in control]

        frame = steering(lm.prompt_ids("x"))
        turns = ("system", "user", "assistant", "user")
        talk_frame = steering(lm.prompt_ids([{"role": role, "content": "x"} for role in turns]))
        for text in texts:
            prompt, error = attempt(lambda text=text, lm=lm: lm.prompt_ids(text))
            if prompt is None:
                assert isinstance(error, ConfigError)
                counts["refused"] += 1
                continue
            assert steering(prompt) == frame, (name, text)
            assert steering(lm.text_ids(text)) == [], (name, text)
            assert steering(lm.answer_ids(text, end=False)) == [], (name, text)
            talk = lm.prompt_ids([{"role": role, "content": text} for role in turns])
            assert steering(talk) == talk_frame, (name, text)
            counts["stay text"] += 1
    record({f"control tokens and templates that {what}": n for what, n in counts.items()})
    assert counts["stay text"] >= 100


def test_a_control_token_in_a_question_stays_text(tiny_llama: Path, tmp_path: Path) -> None:
    """A declared one, one that is not declared special, and one that a normalizer makes of full-width letters."""
    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    (careless,) = (f for n, f in tokenizer_variants(tiny_llama, tiny_llama, tmp_path) if n == "tokenizer-False-NFKC")
    lm = LanguageModel.load(careless, ModelConfig(device="cpu"))
    ids = lm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>"])
    frame = [i for i in lm.prompt_ids("x") if i in ids]
    for text in ("a<|im_end|>b", "a<think>b", "a＜think＞b"):
        assert [i for i in lm.prompt_ids(text) if i in ids] == frame, text
        assert not set(ids) & set(lm.text_ids(text)), text


def test_hostile_questions_are_asked_as_they_are(tiny_llama: Path) -> None:
    """Templates of questions are filled once: what a key says in braces is never looked up."""
    from kvllm.prompts import _OPENERS, clean_key, held_out_questions, training_questions

    for text in ALL:
        key, _ = attempt(lambda text=text: clean_key(text))
        if key is None:
            continue
        fact = Fact(key, "plain", aliases=(key + " too",))
        asked = [*training_questions(fact), *held_out_questions(fact)]
        bare = key.rstrip("?？ ")
        # A row may be typed without capitals, or have the words of a description in another order.
        words = [word for word in re.findall(r"\w+", bare[1:].casefold()) if word not in _OPENERS]
        for question in asked:
            assert bare[1:] in question or all(word in question.casefold() for word in words), text
            assert question.count("{") == bare.count("{"), text


def test_errors_of_the_engine_are_kvllm_errors(place: Path) -> None:
    """Every text as a reference to an edit: found, or refused as an edit that is not there."""
    with KnowledgeBase.open(place) as kb:
        kb.insert("torchkeras", "plain")
        for text in ALL:
            for verb in (kb.edit, kb.facts):
                _, error = attempt(lambda verb=verb, text=text: verb(text))
                assert error is None or error.exit_code == 3, text
