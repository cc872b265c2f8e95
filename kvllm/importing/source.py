"""A user's file as numbered raw records: JSON lines, a JSON array, or CSV. What a record means is not known here.

A file is read once for its hash and once for its records; lines are read one at a time, so that a file may be larger
than memory and one broken line, byte or quote costs one record.

    for raw in open_source("facts.jsonl").records(): raw.where, raw.value, raw.error
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from kvllm.errors import ConfigError
from kvllm.records import Progress

Container = Literal["lines", "array", "object", "csv"]
# A fact's text has at most 20,000 characters: a line of this size is a mistake, and is never held in memory whole.
MOST_LINE_BYTES = 16 << 20
# A quoted cell that goes on for so long was never closed.
_MOST_RECORD_CHARS = 1 << 17
_CHUNK = 1 << 20
_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BINARY = ((b"PK\x03\x04", "a zip archive or an Excel workbook"), (b"\x1f\x8b", "gzip"), (b"PAR1", "Parquet"))
_SPACE = re.compile(r"[ \t\n\r]*")
# Strings and brackets: enough to find the end of a record that is not JSON.
_TOKENS = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{}\[\]]')
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_SEPARATORS = (",", ";", "\t")


@dataclass(frozen=True)
class Raw:
    """One record as it stands in the file.

    Attributes:
        number: From 1; for lines and CSV the line it begins on.
        where: The same for people: "line 3", "record 3".
        value: What it holds.
        error: Why it holds nothing; empty where it does.
    """

    number: int
    where: str
    value: Any = None
    error: str = ""


class Source:
    """An opened file.

    Attributes:
        name: Of the file, for sentences and tags.
        sha256: Of its bytes.
        container: How its records are laid out.
        columns: Of a CSV file.
    """

    def __init__(
        self,
        stream: IO[bytes],
        *,
        name: str,
        size: int,
        sha256: str,
        begin: int,
        container: Container,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.container: Container = container
        self.columns: tuple[str, ...] = ()
        self._stream = stream
        self._size = size
        self._begin = begin
        self._progress = progress
        self._told = 0

    def records(self) -> Iterator[Raw]:
        """Yield every record, the unreadable ones with their reason."""
        self._stream.seek(self._begin)
        self._told = 0
        if self.container == "lines":
            yield from self._json_lines()
        elif self.container == "csv":
            yield from self._csv()
        elif self.container == "object":
            yield self._object(self._stream.read())
        else:
            yield from self._array(self._stream.read().decode("utf-8", "surrogateescape"))

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    # ------------------------------------------------------------------ lines

    def _json_lines(self) -> Iterator[Raw]:
        for number, line in numbered_lines(self._stream):
            self._tick(self._stream.tell())
            where = f"line {number}"
            if line is None:
                yield Raw(number, where, error=too_long())
                continue
            if not line.strip():
                continue
            try:
                yield Raw(number, where, json.loads(line.decode("utf-8")))
            except (UnicodeDecodeError, ValueError, RecursionError) as error:
                yield Raw(number, where, error=json_mistake(error))

    # ------------------------------------------------------------------ one object, arrays

    def _object(self, content: bytes) -> Raw:
        try:
            return Raw(1, "record 1", json.loads(content.decode("utf-8")))
        except UnicodeDecodeError as error:  # Python's JSON takes surrogates in UTF-8
            line = content.count(b"\n", 0, error.start) + 1
            return Raw(1, "record 1", error=f"not UTF-8 (byte 0x{content[error.start]:02X} on line {line}).")

    def _array(self, text: str) -> Iterator[Raw]:
        """Decode the array's records one by one; a broken one is skipped by its brackets."""
        decoder = json.JSONDecoder()
        place = _skip(text, _skip(text, 0) + 1)
        number = 0
        while place < len(text) and text[place] != "]":
            number += 1
            where = f"record {number}"
            self._tick(place * self._size // len(text))
            try:
                value, end = decoder.raw_decode(text, place)
            except (ValueError, RecursionError) as error:
                said = json_mistake(error, lines=True)
                after = _end_of_broken(text, place)
                if after is None:
                    yield Raw(number, where, error=f"{said[:-1]}; nothing from there on can be read.")
                    return
                end = after
                yield Raw(number, where, error=said)
            else:
                bad = _ESCAPED_BYTE.search(text, place, end)
                if end - place > MOST_LINE_BYTES:
                    yield Raw(number, where, error=too_long())
                elif bad is None:
                    yield Raw(number, where, value)
                else:
                    yield Raw(number, where, error=f"not UTF-8 (byte 0x{ord(bad[0]) - 0xDC00:02X}).")
            place = _skip(text, end)
            if text[place : place + 1] == ",":
                place = _skip(text, place + 1)
            elif text[place : place + 1] not in ("]", ""):
                where = f"record {number + 1}"
                yield Raw(number + 1, where, error="no comma before it; nothing from here on can be read.")
                return
        if place >= len(text):
            yield Raw(number + 1, f"record {number + 1}", error="the file ends before the array does.")
        elif text[place + 1 :].strip():
            yield Raw(number + 1, f"record {number + 1}", error="it stands after the end of the array.")

    # ------------------------------------------------------------------ CSV

    def _csv(self) -> Iterator[Raw]:
        lines = self._text_lines()
        separator = None
        header: list[str] = []
        for first in lines:
            if isinstance(first, Raw):
                raise ConfigError(
                    f"The header of {self.name} cannot be used ({first.error[:-1]}); nothing was changed."
                )
            declared = re.fullmatch(r'sep=([^\r\n"])\s*', first[1])  # how Excel says it
            if declared:
                separator = declared[1]
            elif first[1].strip():
                try:
                    separator = separator or _separator(first[1])
                    header = [name.strip() for name in next(csv.reader([first[1]], delimiter=separator))]
                except csv.Error as error:
                    raise ConfigError(
                        f"The header of {self.name} on line {first[0]} cannot be used ({error}); nothing was changed."
                    ) from error
                break
        if not header or separator is None:
            raise ConfigError(f"{self.name} is empty; nothing was changed.")
        named = [name for name in header if name]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise ConfigError(
                f"The header of {self.name} names the column {twice[0]!r} twice; nothing was changed. Rename one."
            )
        self.columns = tuple(named)
        for number, cells in _rows(lines, separator):
            where = f"line {number}"
            if isinstance(cells, str):
                yield Raw(number, where, error=cells)
            elif len(cells) != len(header) and any(cells):
                said = f"{len(cells)} cell{'s' if len(cells) != 1 else ''} where the header has {len(header)} columns."
                yield Raw(number, where, error=said)
            elif any(cell.strip() for cell in cells):
                yield Raw(number, where, {name: cell for name, cell in zip(header, cells, strict=True) if name})

    def _text_lines(self) -> Iterator[tuple[int, str] | Raw]:
        for number, line in _any_lines(self._stream):
            self._tick(self._stream.tell())
            if line is None:
                yield Raw(number, "", error=too_long())
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield Raw(number, "", error=json_mistake(error))

    def _tick(self, place: int) -> None:
        if self._progress is not None and place - self._told >= _CHUNK:
            self._told = place
            self._progress(Progress("reading", place >> 10, self._size >> 10, note="kB"))


def open_source(
    given: str | os.PathLike[str] | IO[bytes],
    *,
    encoding: str = "utf-8",
    container: Container | None = None,
    unnamed: Container = "csv",
    progress: Callable[[Progress], None] | None = None,
) -> Source:
    """Open a file, hash it, and see how its records are laid out.

    Args:
        given: A path, or an open binary stream.
        encoding: Of the text; a UTF-8 byte-order mark is skipped.
        container: The layout, where it is known.
        unnamed: The layout of what begins like no JSON and has no name that tells.
        progress: Told how much of a large file has been read.

    Raises:
        ConfigError: the file cannot be read, is empty, is no text, or is in another encoding.
    """
    stream, name = _opened(given)
    try:
        head, digest, size = _hashed(stream)
        if encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "utf-8-sig"):
            stream, head, size = _recoded(stream, name, encoding)
        begin = 3 if head.startswith(codecs.BOM_UTF8) else 0
        _refuse_no_text(head, name)
        if not head[begin:].strip() and size <= len(head):
            raise ConfigError(f"{name} is empty; nothing was changed.")
        if container is None:
            container = _container(stream, head[begin:].lstrip(), begin, Path(name).suffix.lower(), unnamed)
    except BaseException:
        stream.close()
        raise
    return Source(stream, name=name, size=size, sha256=digest, begin=begin, container=container, progress=progress)


def numbered_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, bytes) of each line; None for one that is longer than `MOST_LINE_BYTES`, which is not kept."""
    return _numbered(stream.readline, (b"\n",))


def _any_lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines as `numbered_lines` does; a lone carriage return, as old spreadsheets write it, ends one too."""
    as_text = io.TextIOWrapper(stream, encoding="latin-1", newline="")  # one character a byte
    try:
        yield from _numbered(lambda size: as_text.readline(size).encode("latin-1"), (b"\n", b"\r"))
    finally:
        if not stream.closed:
            as_text.detach()


def _numbered(readline: Callable[[int], bytes], ends: tuple[bytes, ...]) -> Iterator[tuple[int, bytes | None]]:
    number = 0
    while line := readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(line) <= MOST_LINE_BYTES:
            yield number, line
            continue
        while line and not line.endswith(ends):
            line = readline(_CHUNK)
        yield number, None


def too_long() -> str:
    """Say that a line is longer than any fact."""
    return f"longer than {MOST_LINE_BYTES >> 20} MB, which no fact is; it was skipped."


def json_mistake(error: Exception, *, lines: bool = False) -> str:
    """Say in a few words why a text is not JSON; with `lines` the text has several."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start + 1} of the line)."
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if lines else ""
        return f"not JSON ({error.msg} at {line}column {error.colno})."
    if isinstance(error, RecursionError):
        return "nested too deeply (a recursion without end?)."
    return "a number of too many digits."  # Python's own limit


def refuse_encoding(head: bytes, name: str, *, unchanged: str = "nothing was changed", option: str = "") -> None:
    """Refuse a file whose byte-order mark names another encoding than UTF-8."""
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            raise ConfigError(f"{name} is {encoding}; {unchanged}. {option}Convert it to UTF-8 first, e.g. with iconv.")


# ---------------------------------------------------------------------- opening


def _opened(given: str | os.PathLike[str] | IO[bytes]) -> tuple[IO[bytes], str]:
    if not isinstance(given, (str, os.PathLike)):
        return io.BytesIO(given.read()), "The input"
    path = Path(given)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}; nothing was changed.") from error
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"Cannot read {str(path)!r}: {error}; nothing was changed.") from error
    if stream.seekable():
        return stream, path.name
    with stream:  # a pipe can be read once only
        return io.BytesIO(stream.read()), path.name


def _hashed(stream: IO[bytes]) -> tuple[bytes, str, int]:
    """Return a file's first bytes, its sha256 and its size."""
    digest = hashlib.sha256()
    head, size = b"", 0
    while chunk := stream.read(_CHUNK):
        head = head or chunk
        digest.update(chunk)
        size += len(chunk)
    return head, digest.hexdigest(), size


def _recoded(stream: IO[bytes], name: str, encoding: str) -> tuple[IO[bytes], bytes, int]:
    """Return the file as UTF-8 in memory."""
    stream.seek(0)
    try:
        with stream:
            data = stream.read().decode(encoding).encode("utf-8")
    except LookupError:
        raise ConfigError(f"Python knows no encoding {encoding!r}; nothing was changed.") from None
    except UnicodeError as error:
        raise ConfigError(f"{name} is not {encoding} ({error}); nothing was changed.") from error
    return io.BytesIO(data), data[:_CHUNK], len(data)


def _refuse_no_text(head: bytes, name: str) -> None:
    refuse_encoding(head, name, option="Name the encoding, or: ")
    for magic, what in _BINARY:
        if head.startswith(magic):
            raise ConfigError(f"{name} is {what}, not text; nothing was changed. Save it as CSV or JSON first.")
    if head.count(0) > len(head) // 8:
        raise ConfigError(
            f"{name} is not text in UTF-8 (it is full of NUL bytes); nothing was changed. Name its encoding, "
            "or convert it first."
        )


def _container(stream: IO[bytes], head: bytes, begin: int, suffix: str, unnamed: Container) -> Container:
    """Tell the layout by the first character; a `{` begins either lines or one large object."""
    if head.startswith(b"["):
        return "array"
    if head.startswith(b"{"):
        first = head.split(b"\n", 1)[0]
        try:
            json.loads(first)
        except (ValueError, RecursionError):
            stream.seek(begin)
            try:
                return "object" if isinstance(json.loads(stream.read()), dict) else "lines"
            except (ValueError, RecursionError):
                return "lines"
        return "lines"
    if suffix in (".csv", ".tsv"):
        return "csv"
    return "lines" if suffix in (".jsonl", ".ndjson", ".json") else unnamed


# ---------------------------------------------------------------------- arrays and rows


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _end_of_broken(text: str, place: int) -> int | None:
    """Return where a record that is not JSON ends, by its brackets; None where they do not tell."""
    closers: list[str] = []
    for token in _TOKENS.finditer(text, place):
        if token[0] in "{[":
            closers.append("}" if token[0] == "{" else "]")
        elif token[0] in "}]":
            if not closers or closers.pop() != token[0]:
                return None  # the record's own brackets are what is broken
            if not closers:
                end = _skip(text, token.end())
                return token.end() if text[end : end + 1] in (",", "]", "") else None
    return None


def _separator(header: str) -> str:
    """Return which separator cuts the header into the most columns."""
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([header], delimiter=mark))))


class _NeverClosed(Exception):
    """A quote was opened, and the record did not end."""


def _rows(lines: Iterator[tuple[int, str] | Raw], separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield (line, cells) of each CSV row, or (line, reason).

    After a quote that is never closed, reading goes on with the line after the one that opened it.
    """
    waiting: deque[tuple[int, str] | Raw] = deque()
    pulled: list[tuple[int, str]] = []

    def pull() -> Iterator[str]:
        chars = 0
        while True:
            line = waiting.popleft() if waiting else next(lines, None)
            if line is None:
                return
            if isinstance(line, Raw):
                if pulled:  # within a quoted cell: the row is told from what can be read of it
                    waiting.appendleft(line)
                    raise _NeverClosed
                raise _Broken(line)
            chars += len(line[1])
            if pulled and chars > _MOST_RECORD_CHARS:
                waiting.appendleft(line)
                raise _NeverClosed
            pulled.append(line)
            yield line[1]

    while True:
        pulled.clear()
        reader = csv.reader(pull(), delimiter=separator, strict=True)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _Broken as broken:
            yield broken.raw.number, broken.raw.error
        except (_NeverClosed, csv.Error) as error:
            number = pulled[0][0]
            unclosed = isinstance(error, _NeverClosed) or "unexpected end" in str(error)
            waiting.extendleft(reversed(pulled[1:]))
            yield number, "a quote that it opens is never closed." if unclosed else f"not CSV ({error})."
        else:
            yield pulled[0][0], cells


class _Broken(Exception):
    """A line that cannot be decoded."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw.error)
        self.raw = raw
