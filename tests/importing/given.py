"""Rows as the commands read them, for tests that look at rows and at no command."""

from __future__ import annotations

import io

from kvllm.importing import FoundFact, NoFacts, Refused, read_facts


def parse_rows(text: str) -> tuple[list[FoundFact], list[Refused]]:
    """Return the usable rows of a JSONL text, and the others: those refused, and those that say a row again."""
    try:
        found = read_facts(io.BytesIO(text.encode()), format="jsonl")
    except NoFacts as error:
        return [], list(error.rows)
    return list(found.items), [*found.refused, *found.duplicates]
