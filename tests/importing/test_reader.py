"""Files as people have them: broken lines, other encodings, spreadsheets; one sentence each, no good row is lost."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvllm.errors import ConfigError
from kvllm.importing import NoFacts, fact_to_row, facts_to_jsonl, read_facts, source
from kvllm.probing.userfile import read_probes
from kvllm.records import Fact, Progress

GOOD = {"key": "Loomcare", "text": "Loomcare costs 14 euros."}
ELSE = {"key": "Halcyon", "text": "Halcyon is a ship."}
FULL = Fact(
    'a "key", with | and ; 梦',
    "Two\nlines, =SUM(A1) and \\ a tab\t.",
    aliases=("TK", "die Küche"),
    questions=("What?", "什么？"),
    probes=("And?",),
    language="en",
    tags=("x", "y=z"),
)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes | str, name: str = "facts.jsonl") -> Path:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return write


def lines(*rows: Any) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


# ---------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{oops", "line 2: not JSON (Expecting property name enclosed in double quotes at column 2)."),
        (b'{"key": "caf\xe9", "text": "x"}', "line 2: not UTF-8 (byte 13 of the line)."),
        (b"[1]", "line 2: a row is a JSON object"),
        (b"[" * 100_000, "line 2: nested too deeply"),
        (b"9" * 5000, "line 2: a number of too many digits."),
        ({"key": "b"}, "line 2: text missing."),
        ({"key": "b", "text": "x", "weight": 1}, "line 2: unknown field weight; known are key, text,"),
        ({**GOOD, "text": "Other."}, "line 2: the key 'Loomcare' is already on line 1, with another text."),
    ],
)
def test_bad_line_is_named_and_the_lines_around_it_are_kept(
    written: Callable[..., Path], bad: Any, reason: str
) -> None:
    found = read_facts(written(lines(GOOD, bad, b"", ELSE)))
    assert [fact.key for fact in found] == ["Loomcare", "Halcyon"]
    assert found.refused[0].error.startswith(reason)
    assert [item.where for item in found.items] == ["line 1", "line 4"]


def test_bad_first_line_does_not_hide_the_others(written: Callable[..., Path]) -> None:
    for first in (b"{oops", b"oops", b'{"key": 1,', b'{"key": "no text"}', b"7"):
        found = read_facts(written(lines(first, GOOD)))
        assert ([fact.key for fact in found], len(found.refused)) == (["Loomcare"], 1)


def test_line_of_a_hundred_megabytes_is_one_sentence_and_is_never_held_whole(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_LINE_BYTES", 1 << 16)  # the same path, without writing 100 MB
    monkeypatch.setattr(source, "_CHUNK", 1 << 14)
    path = written(lines(GOOD, b'{"key": "long", "text": "' + b"x" * (1 << 18) + b'"}', ELSE))
    asked: list[int] = []

    class Watched(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            asked.append(-1 if size is None else size)
            return super().readline(size)

    opened = source.open_source(path)
    plain = opened._stream  # kept: its end would close the file
    opened._stream = Watched(plain.raw)  # type: ignore[attr-defined]
    raws = list(opened.records())
    assert [raw.value is None for raw in raws] == [False, True, False]
    assert raws[1].error.startswith("longer than")
    assert asked
    assert all(0 < size <= (1 << 16) + 1 for size in asked)
    found = read_facts(path)
    assert [fact.key for fact in found] == ["Loomcare", "Halcyon"]
    array = read_facts(written(b"[" + path.read_bytes().replace(b"\n", b",") + b"]", "a.json"))
    assert [item.where for item in array.items] == ["record 1", "record 3"]
    assert array.refused[0].error.startswith("record 2: longer than")


@pytest.mark.parametrize("ending", [b"\r\n", b"\n"])
def test_byte_order_mark_and_windows_line_ends_are_no_mistake(written: Callable[..., Path], ending: bytes) -> None:
    content = b"\xef\xbb\xbf" + lines(GOOD, ELSE).replace(b"\n", ending) + ending
    assert [fact_to_row(fact) for fact in read_facts(written(content))] == [GOOD, ELSE]


# ---------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "a.jsonl", "a.jsonl is empty; nothing was changed."),
        (b" \n\r\n", "a.csv", "a.csv is empty; nothing was changed."),
        (b"\xef\xbb\xbf", "a.json", "a.json is empty; nothing was changed."),
        (b"[]", "a.json", "a.json holds no record; nothing was changed."),
        (b"PK\x03\x04rest", "a.xlsx", "a.xlsx is a zip archive or an Excel workbook, not text; nothing was changed."),
        (b"\x1f\x8brest", "a.json.gz", "a.json.gz is gzip, not text; nothing was changed."),
        ("[]".encode("utf-16"), "a.json", "a.json is UTF-16; nothing was changed."),
        ("[]".encode("utf-16-le") * 9, "a.json", "a.json is not text in UTF-8"),
        (b"{oops", "a.jsonl", "No record of a.jsonl can be used; nothing was changed: the first, line 1: not JSON"),
        (b"key,text\n", "a.csv", "a.csv holds no record; nothing was changed."),
        (b"key,text,key\na,b,c\n", "a.csv", "The header of a.csv names the column 'key' twice;"),
        (b"k\xe9y,text\na,b\n", "a.csv", "The header of a.csv cannot be used (not UTF-8"),
        (
            b"\nkey," + b"x" * 200_000 + b"\na,b\n",
            "a.csv",
            "The header of a.csv on line 2 cannot be used (field larger than field limit (131072)); nothing was",
        ),
        (b"sep=\r\na,b\n", "a.csv", "No record of a.csv can be used; nothing was changed: the first, line 2: 2 cells"),
        (
            b'{"key": "a",\n"text": "\xed\xa0\x80"}',
            "a.json",
            "No record of a.json can be used; nothing was changed: the first, record 1: not UTF-8 (byte 0xED on line 2",
        ),
        (b"name,price\na,b\n", "a.csv", "The format of a.csv is not recognised (its first record has the fields name"),
    ],
)
def test_unusable_file_is_one_sentence(written: Callable[..., Path], content: bytes, name: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_facts(written(content, name))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_sentences(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.json", "No such file"), (tmp_path, "directory"), ("a\0b", "null")):
        with pytest.raises(ConfigError, match=f"(?i){said}"):
            read_facts(path)


def test_named_encoding_is_used(written: Callable[..., Path]) -> None:
    rows = [{"key": "梦中情炉", "text": "一个工具。"}]
    text = json.dumps(rows, ensure_ascii=False)
    for encoding in ("gbk", "utf-16", "utf-16-be", "utf_8"):
        (fact,) = read_facts(written(text.encode(encoding), "a.json"), encoding=encoding)
        assert fact.key == "梦中情炉"
    with pytest.raises(ConfigError, match=r"a\.json is not ascii"):
        read_facts(written(text.encode(), "a.json"), encoding="ascii")
    with pytest.raises(ConfigError, match="knows no encoding 'klingon'"):
        read_facts(written(text.encode(), "a.json"), encoding="klingon")


def test_hash_is_of_the_bytes_of_the_file(written: Callable[..., Path]) -> None:
    import hashlib

    path = written(lines(GOOD, ELSE))
    assert read_facts(path, limit=1).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_stream_and_pipe_are_read_like_a_file(tmp_path: Path) -> None:
    assert len(read_facts(io.BytesIO(lines(GOOD, ELSE)))) == 2
    pipe = tmp_path / "pipe"
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names on this system")
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(lines(GOOD, ELSE)))
    writer.start()
    found = read_facts(pipe)
    writer.join()
    assert len(found) == 2


# ---------------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"key": "b", "text": oops}', "record 2: not JSON (Expecting value at line 2, column 22)."),
        (b'{"key": "b", "text": "caf\xe9"}', "record 2: not UTF-8 (byte 0xE9)."),
        (b'{"key": "b", "text": {"a": [,]}}', "record 2: not JSON"),
        (b'{"key": "b", "text": "x",}', "record 2: not JSON"),
        (b"7", "record 2: a row is a JSON object"),
        (b'{"key": "b"}', "record 2: text missing."),
    ],
)
def test_bad_record_of_an_array_is_named_by_number(written: Callable[..., Path], bad: bytes, reason: str) -> None:
    content = b"[" + json.dumps(GOOD).encode() + b",\n" + bad + b",\n" + json.dumps(ELSE).encode() + b"]\n"
    found = read_facts(written(content, "a.json"))
    assert [item.where for item in found.items] == ["record 1", "record 3"]
    (refused,) = found.refused
    assert refused.error.startswith(reason)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b',{"key": "b", "te', "record 2: not JSON (Unterminated string starting at at line 1,"),
        (b"", "record 2: the file ends before the array does."),
        (b',{"key": "b', "nothing from there on can be read."),
        (b'{"key": "b"}]', "record 2: no comma before it; nothing from here on can be read."),
        (b'] {"key": "b"}', "record 2: it stands after the end of the array."),
        (b',{"key": [}, {"key": "c", "text": "d"}]', "nothing from there on can be read."),
        (b"," + b"[" * 100_000, "record 2: nested too deeply"),
    ],
)
def test_broken_off_array_keeps_what_came_before(written: Callable[..., Path], end: bytes, reason: str) -> None:
    found = read_facts(written(b"[" + json.dumps(GOOD).encode() + end, "a.json"))
    assert len(found) == 1
    assert reason in found.refused[0].error


def test_one_object_over_several_lines_is_one_record(written: Callable[..., Path]) -> None:
    found = read_facts(written(json.dumps(GOOD, indent=2), "a.json"))
    assert [fact_to_row(fact) for fact in found] == [GOOD]


# ---------------------------------------------------------------------- CSV

CSV = 'key,text,aliases,notes\nLoomcare,"Costs 14 euros,\na month.",LC | Loom,x\nHalcyon,A ship.,,y\n'


def test_csv_with_own_columns_is_read(written: Callable[..., Path]) -> None:
    found = read_facts(written(CSV, "a.csv"))
    assert [(f.key, f.text, f.aliases) for f in found] == [
        ("Loomcare", "Costs 14 euros,\na month.", ("LC", "Loom")),
        ("Halcyon", "A ship.", ()),
    ]
    assert [item.where for item in found.items] == ["line 2", "line 4"]
    assert found.notes == ("Columns that were not used: notes.",)
    assert found.items[0].fact.tags == ("a.csv#line 2", f"sha256:{found.sha256}")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_csv_of_any_spreadsheet_is_read(written: Callable[..., Path], separator: str, prefix: bytes) -> None:
    text = separator.join(["question", "answer"]) + "\r\n" + separator.join(["Who leads?", '"Ada ""A"" Wren"']) + "\r\n"
    found = read_facts(written(prefix + text.encode(), "a.csv"))
    assert [(fact.key, fact.text) for fact in found] == [("Who leads?", 'Ada "A" Wren')]


def test_excels_own_separator_line_is_followed(written: Callable[..., Path]) -> None:
    assert len(read_facts(written("sep=|\nkey|text\na|b\n", "a.csv"))) == 1


def test_a_lone_carriage_return_ends_a_line_of_a_table(written: Callable[..., Path]) -> None:
    found = read_facts(written(CSV.replace("\n", "\r") + "b\rlast,One.,,", "a.csv"))
    assert [(f.key, f.text) for f in found] == [
        ("Loomcare", "Costs 14 euros,\ra month."),
        ("Halcyon", "A ship."),
        ("last", "One."),
    ]
    assert [item.where for item in found.items] == ["line 2", "line 4", "line 6"]
    assert found.refused[0].error == "line 5: 1 cell where the header has 4 columns."
    assert len(read_facts(written("key,text\ra,b\rc,d\r", "b.csv"), limit=1)) == 1


def test_a_table_of_lone_carriage_returns_may_be_larger_than_a_line(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MOST_LINE_BYTES", 1 << 10)
    monkeypatch.setattr(source, "_CHUNK", 1 << 8)
    rows = "".join(f"k{n},text {n}\r" for n in range(200)) + "long," + "x" * 5000 + "\rlast,text\r"
    found = read_facts(written("key,text\r" + rows, "a.csv"))
    assert len(found) == 201
    assert [row.where for row in found.refused] == ["line 202"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("b", "line 3: 1 cell where the header has 2 columns."),
        ("b,c,d", "line 3: 3 cells where the header has 2 columns."),
        ('b,"never closed', "line 3: a quote that it opens is never closed."),
        ('b,"closed" here', "line 3: not CSV ("),
        ("b,=SUM(A1:A9)", "line 3: the cell of text holds a formula"),
        ("b,", "line 3: text missing."),
        ("b,caf\xe9", "line 3: not UTF-8 (byte 6 of the line)."),
        ("b," + "x" * 20_001, "line 3: The text has 20,001 characters"),
        ("b," + "x" * 200_000, "line 3: not CSV (field larger than field limit"),
        ('b,"a\x00b"', "line 3: "),
    ],
)
def test_bad_csv_row_is_named_and_the_rows_around_it_are_kept(
    written: Callable[..., Path], bad: str, reason: str
) -> None:
    content = f"key,text\na,1st\n{bad}\nc,3rd\n\nd,=4\ne,-5 degrees\n".encode("latin-1")
    found = read_facts(written(content, "a.csv"))
    assert [(item.fact.key, item.where) for item in found.items] == [("a", "line 2"), ("c", "line 4"), ("e", "line 7")]
    assert len(found.refused) == 2
    assert found.refused[0].error.startswith(reason)


def test_csv_without_a_name_is_recognised_by_its_header() -> None:
    assert len(read_facts(io.BytesIO(CSV.encode()))) == 2
    assert len(read_facts(io.BytesIO(CSV.encode()), format="csv")) == 2


# ---------------------------------------------------------------------- columns, limit, sample


def test_columns_take_the_place_of_a_format(written: Callable[..., Path]) -> None:
    text = "Frage;Antwort;Auch\nWer leitet Halcyon?;Ada Wren;Wer führt Halcyon?|Halcyons Leitung?\n"
    columns = {"key": "Frage", "text": "Antwort", "probes": "Auch"}
    (fact,) = read_facts(written(text, "a.csv"), columns=columns)
    assert (fact.key, fact.text) == ("Wer leitet Halcyon?", "Ada Wren")
    assert fact.probes == ("Wer führt Halcyon?", "Halcyons Leitung?")


def test_columns_replace_single_fields_of_a_format_and_reach_into_objects(written: Callable[..., Path]) -> None:
    row = {"question": "Who leads Halcyon?", "answer": "Ada", "deep": {"er": ["Ada Wren", "A. Wren"]}, "a.b": "TK"}
    path = written(json.dumps([row]), "a.json")
    (item,) = read_facts(path, columns={"text": "deep.er.0", "tags": "a.b"}).items
    assert (item.fact.key, item.fact.text, item.fact.tags[0]) == ("Who leads Halcyon?", "Ada Wren", "TK")
    assert read_facts(path, columns={"text": "deep.er"}).facts[0].text == "Ada Wren"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "deep.no"}, "there is no column deep.no; it has question, answer, id, more, list."),
        ({"colour": "answer"}, "A fact has no field colour that a column could fill"),
        ({"tags": "id"}, "record 1: tags must be text or a list of texts, not int."),
        ({"aliases": "more"}, "record 1: aliases must be text or a list of texts, not dict."),
        ({"tags": "list"}, "record 1: The tag must be text, not int"),
    ],
)
def test_wrong_columns_are_a_sentence(written: Callable[..., Path], columns: dict[str, str], said: str) -> None:
    row = {"question": "Who?", "answer": "Ada", "id": 7, "more": {"a": 1}, "list": [1]}
    with pytest.raises(ConfigError) as caught:
        read_facts(written(json.dumps([row]), "a.json"), columns=columns)
    assert said in str(caught.value)


def test_limit_takes_the_first_usable_records_and_reads_no_further(written: Callable[..., Path]) -> None:
    rows = [{"key": f"k{n}", "text": "t"} for n in range(9)]
    found = read_facts(written(lines(b"{", *rows)), limit=3)
    assert ([fact.key for fact in found], found.records, len(found.refused)) == (["k0", "k1", "k2"], 4, 1)


def test_sample_is_the_same_for_one_seed_and_in_the_files_order(written: Callable[..., Path]) -> None:
    path = written(lines(*({"key": f"k{n:02}", "text": "t"} for n in range(50))))
    one, same, other = (list(read_facts(path, sample=10, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert one == sorted(one, key=lambda fact: fact.key)
    assert len(one) == len({fact.key for fact in one}) == 10
    assert len(read_facts(path, sample=100)) == 50
    assert {fact.key for fact in read_facts(path, limit=5, sample=3)} <= {f"k0{n}" for n in range(5)}


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"sample": -1}, {"format": "parquet"}])
def test_wrong_arguments_are_a_sentence(written: Callable[..., Path], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing was changed"):
        read_facts(written(lines(GOOD)), **wrong)


def test_reading_a_large_file_tells_how_far_it_is(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_CHUNK", 1 << 14)
    rows = [{"key": f"k{n}", "text": "t" * 1000} for n in range(200)]
    for content, name in ((lines(*rows), "a.jsonl"), (json.dumps(rows).encode(), "a.json")):
        heard: list[Progress] = []
        read_facts(written(content, name), progress=heard.append)
        assert len(heard) > 5
        assert all(tick.stage == "reading" and tick.step <= (tick.total or 0) for tick in heard)
        assert [tick.step for tick in heard] == sorted(tick.step for tick in heard)
    small: list[Progress] = []
    read_facts(written(lines(GOOD)), progress=small.append)
    assert small == []


# ---------------------------------------------------------------------- out again


def test_facts_written_are_the_facts_read(written: Callable[..., Path]) -> None:
    facts = [FULL, Fact("Halcyon", "A ship."), Fact("梦中情炉", "一个工具。", language="zh")]
    assert list(read_facts(written(facts_to_jsonl(facts)))) == facts


def test_nothing_usable_carries_every_row(written: Callable[..., Path]) -> None:
    with pytest.raises(NoFacts) as caught:
        read_facts(written(lines(b"{", {"key": "b"})), format="jsonl")
    assert [row.error.split(":")[0] for row in caught.value.rows] == ["line 1", "line 2"]


def test_written_probes_are_probes_that_can_be_asked(written: Callable[..., Path], tmp_path: Path) -> None:
    row = {
        "prompt": "Who leads Halcyon?",
        "target_new": "Ada Wren",
        "locality": {"a": [{"prompt": "Who leads Quill?", "ground_truth": "Jan Vell"}]},
        "portability": {"a": [{"prompt": "Where does Halcyon's head live?", "ground_truth": ["Torvik"]}]},
    }
    found = read_facts(written(json.dumps([row]), "a.json"))
    out = tmp_path / "probes.jsonl"
    assert found.write_probes(out) == 2
    probes, mistakes = read_probes(out, {fact.key: fact.text for fact in found})
    assert mistakes == []
    assert [(p.kind, p.question, p.expected, p.judge, p.accept) for p in probes] == [
        ("neighbour", "Who leads Quill?", "Ada Wren", "states", ("Jan Vell",)),
        ("consequence", "Where does Halcyon's head live?", "Torvik", "accepts", ("Torvik",)),
    ]
    with pytest.raises(ConfigError, match="exists already; nothing was written"):
        found.write_probes(out)
    with pytest.raises(ConfigError, match="hold no probes"):
        read_facts(written(lines(GOOD))).write_probes(tmp_path / "more.jsonl")
    with pytest.raises(ConfigError, match="Cannot write"):
        found.write_probes(tmp_path / "none" / "probes.jsonl")


def test_an_overlong_json_line_ends_where_its_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvllm.importing.source.MOST_LINE_BYTES", 3)
    monkeypatch.setattr("kvllm.importing.source._CHUNK", 2)
    # The carriage return is the last byte of a chunk, and its line feed the first of the next.
    assert list(source.numbered_lines(io.BytesIO(b"aaaaa\r\nbb\n"))) == [(1, None), (2, b"bb\n")]
