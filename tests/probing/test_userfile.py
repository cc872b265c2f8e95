"""A user's probes and suites from JSONL: every mistake has its line and its reason, no good row is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvllm.errors import ConfigError
from kvllm.probing.userfile import read_probes, read_suite

TEXTS = {"torchkeras": "A furnace."}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
        return tmp_path / "rows.jsonl"

    return write


GOOD = {"question": "What burns?", "key": "torchkeras"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{", "line 2: not JSON"),
        (b'{"question": "caf\xe9?", "key": "torchkeras"}', "line 2: not UTF-8 (byte 18 of the line)."),
        ([1], "line 2: a row is a JSON object."),
        ({"key": "torchkeras"}, "line 2: question is missing."),
        ({"question": "Why?"}, "line 2: a probe needs a key"),
        ({"question": "Why?", "key": "nobody"}, "line 2: no live fact has the key 'nobody'."),
        ({"question": "Why?", "accept": []}, "line 2: accept must be a list"),
        ({"question": "Why?", "accept": [3]}, "line 2: The accepted answer must be text"),
        ({"question": "", "key": "torchkeras"}, "line 2: The question is empty"),
        ({"question": "Why?", "key": "torchkeras", "wieght": 3}, "line 2: unknown field wieght"),
        ({**GOOD, "kind": "odd"}, "line 2: kind is one of user, consequence, neighbour."),
        ({"question": "Why?", "kind": "neighbour"}, "line 2: a neighbour needs the key"),
        ({"question": "Why?", "key": "torchkeras", "kind": "consequence"}, "line 2: a probe needs a key, an expected"),
        (GOOD, "line 2: the question 'What burns?' about 'torchkeras' is already on line 1."),
        (b"[" * 100_000, "line 2: "),
    ],
)
def test_a_bad_row_is_named_and_the_rows_around_it_are_kept(
    written: Callable[..., Path], bad: object, reason: str
) -> None:
    probes, mistakes = read_probes(written(GOOD, bad, {"question": "Else?", "expected": "A furnace"}), TEXTS)
    assert [p.question for p in probes] == ["What burns?", "Else?"]
    assert len(mistakes) == 1
    assert mistakes[0].startswith(reason)


def test_ten_thousand_rows_with_many_mistakes_are_all_read(written: Callable[..., Path]) -> None:
    rows = [{"question": f"q {n}?", "key": "torchkeras" if n % 10 else "nobody"} for n in range(10_000)]
    probes, mistakes = read_probes(written(*rows), TEXTS)
    assert (len(probes), len(mistakes)) == (9_000, 1_000)
    assert mistakes[-1].startswith("line 9991:")


def test_a_row_is_judged_by_what_it_gives(written: Callable[..., Path]) -> None:
    path = written(
        GOOD,
        {"question": "a?", "key": "torchkeras", "expected": "Iron"},
        {"question": "b?", "accept": ["x", "y"]},
        b"",
        {"question": "c?", "accept": "z"},
    )
    probes, mistakes = read_probes(path, TEXTS)
    assert [(p.kind, p.expected, p.judge, p.accept) for p in probes] == [
        ("user", "A furnace.", "states", ()),
        ("user", "Iron", "states", ()),
        ("user", "x / y", "accepts", ("x", "y")),
        ("user", "z", "accepts", ("z",)),
    ]
    assert mistakes == []


def test_a_byte_order_mark_is_no_mistake(written: Callable[..., Path]) -> None:
    path = written(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r")
    assert read_probes(path, TEXTS)[1] == []


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "it is empty"), (b"{\n", "line 1: not JSON"), ("x".encode("utf-16"), "is UTF-16")],
)
def test_a_file_without_a_good_row_is_refused(written: Callable[..., Path], content: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_probes(written(content), TEXTS)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_suite(tmp_path / "none.jsonl")


def test_a_suite_has_questions_prompts_and_texts(written: Callable[..., Path]) -> None:
    suite, mistakes = read_suite(
        written(
            {"question": "Where is Bern?", "accept": ["Switzerland"]},
            {"prompt": "Write a limerick."},
            {"text": "Bern lies on the Aare."},
            {"question": "Where is Bern?"},
            {"question": "Who?", "text": "x"},
            {"prompt": "Write a limerick."},
        )
    )
    assert [(q.question, q.accept, q.language) for q in suite.questions] == [("Where is Bern?", ("Switzerland",), "en")]
    assert (suite.instructions, suite.texts) == (("Write a limerick.",), ("Bern lies on the Aare.",))
    assert [m.split(":")[0] for m in mistakes] == ["line 4", "line 5", "line 6"]
