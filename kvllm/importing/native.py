"""kvllm's own rows: one JSON object per fact, with the fields of `Fact`. The same rows go in and come out.

fact_from_row({"key": "torchkeras", "text": "A furnace."})
facts_to_jsonl(kb.facts())
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from kvllm.errors import ConfigError
from kvllm.records import Fact, StoredFact

FIELDS = tuple(field.name for field in fields(Fact))
LISTS = ("aliases", "questions", "probes", "tags")
# What `kvllm ls --json` prints beside the fact: allowed, so that its rows can be inserted elsewhere, and not used.
LEDGER_FIELDS = frozenset(field.name for field in fields(StoredFact)) - set(FIELDS)


def fact_from_row(row: Mapping[str, Any]) -> Fact:
    """Return a row's fact, not cleaned yet.

    Raises:
        ConfigError: a field is missing, unknown or of the wrong type.
    """
    missing = [name for name in ("key", "text") if name not in row]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing.")
    unknown = sorted(set(row) - set(FIELDS) - LEDGER_FIELDS)
    if unknown:
        raise ConfigError(f"unknown field {', '.join(unknown)}; known are {', '.join(FIELDS)}.")
    values: dict[str, Any] = {name: row[name] for name in FIELDS if row.get(name) is not None}
    for name in LISTS:
        items = values.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{name} must be a list of strings.")
        values[name] = tuple(items)
    if not isinstance(values.get("language", ""), str):
        raise ConfigError("language must be a string.")
    return Fact(**{"key": row["key"], "text": row["text"], **values})


def fact_to_row(fact: Fact) -> dict[str, Any]:
    """Return the row of a fact; fields that say nothing are left out."""
    row: dict[str, Any] = {"key": fact.key, "text": fact.text}
    for name in FIELDS[2:]:
        value = getattr(fact, name)
        if value:
            row[name] = list(value) if isinstance(value, tuple) else value
    return row


def facts_to_jsonl(facts: Iterable[Fact]) -> str:
    """Return facts as JSONL, one a line."""
    return "".join(json.dumps(fact_to_row(fact), ensure_ascii=False) + "\n" for fact in facts)
