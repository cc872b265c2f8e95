"""Facts from a JSONL file: each bad line with its number and its reason, so that one pass finds them all.

rows, bad = read_rows("facts.jsonl")
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvllm.cli.command import decode, read_stdin
from kvllm.errors import ConfigError
from kvllm.prompts import clean_fact
from kvllm.records import Fact, StoredFact

_LISTS = ("aliases", "questions", "probes", "tags")
_KNOWN = tuple(field.name for field in fields(Fact))
# What `kvllm ls --json` prints beside the fact: allowed, so that its rows can be inserted elsewhere, and not used.
_LEDGER = {field.name for field in fields(StoredFact)} - set(_KNOWN)


@dataclass(frozen=True)
class Row:
    """A usable line."""

    line: int
    fact: Fact


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used, and why; `key` is empty where none could be read."""

    line: int
    key: str
    error: str


def read_rows(file: str) -> tuple[list[Row], list[BadRow]]:
    """Read facts from a file, or from stdin for `-`; empty lines are skipped.

    Raises:
        ConfigError: the file is missing or not UTF-8.
    """
    if file == "-":
        text = read_stdin(name="rows")
    else:
        try:
            text = decode(Path(file).read_bytes(), name=f"file {file}")
        except OSError as error:
            raise ConfigError(f"Cannot read {file}: {error.strerror}; nothing was changed.") from error
    return parse_rows(text)


def parse_rows(text: str) -> tuple[list[Row], list[BadRow]]:
    """Return the usable rows of a JSONL text, and the others."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    lines_of_keys: dict[str, int] = {}
    for line, content in enumerate(text.split("\n"), start=1):  # not splitlines(): it also cuts inside JSON strings
        if not content.strip():
            continue
        row: Any = None
        try:
            row = json.loads(content)
            fact = _fact(row)
            if fact.key in lines_of_keys:
                raise ConfigError(f"the key {fact.key!r} is already on line {lines_of_keys[fact.key]}.")
        except json.JSONDecodeError as error:
            bad.append(BadRow(line, "", f"line {line}: not JSON ({error.msg} at column {error.colno})."))
        except ValueError:  # Python's own limit
            bad.append(BadRow(line, "", f"line {line}: a number of too many digits."))
        except (ConfigError, RecursionError) as error:
            key = row.get("key") if isinstance(row, dict) else ""
            reason = str(error).replace("; nothing was changed", "")
            bad.append(BadRow(line, key if isinstance(key, str) else "", f"line {line}: {reason}"))
        else:
            lines_of_keys[fact.key] = line
            rows.append(Row(line, fact))
    return rows, bad


def _fact(row: Any) -> Fact:
    if not isinstance(row, dict):
        raise ConfigError('a row is a JSON object like {"key": "…", "text": "…"}.')
    missing = [name for name in ("key", "text") if name not in row]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing.")
    unknown = sorted(set(row) - set(_KNOWN) - _LEDGER)
    if unknown:
        raise ConfigError(f"unknown field {', '.join(unknown)}; known are {', '.join(_KNOWN)}.")
    values: dict[str, Any] = {name: row[name] for name in _KNOWN if row.get(name) is not None}
    for name in _LISTS:
        items = values.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} must be a list of strings.")
        values[name] = tuple(items)
    if not isinstance(values.get("language", ""), str):
        raise ConfigError("language must be a string.")
    return clean_fact(Fact(**{"key": row["key"], "text": row["text"], **values}))
