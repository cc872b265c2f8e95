"""Write a ledger's live facts as kvllm's own JSONL: the inverse of `kvllm import`. No model is needed.

export_facts(Path("facts.jsonl"), kb.facts())
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvllm.errors import ConfigError, EditFailed
from kvllm.importing import fact_to_row, facts_to_jsonl, read_facts
from kvllm.importing.found import write_new
from kvllm.records import ExportResult, Fact


def export_facts(path: Path, facts: Sequence[Fact], *, verify: bool = True) -> ExportResult:
    """Write facts to a new file, one a line, and (verify) read them again as an import would.

    Raises:
        ConfigError: there is no fact, or the file exists or cannot be written.
        EditFailed: what was read again differs.
    """
    if not facts:
        raise ConfigError("The knowledge base holds no fact; nothing was written.")
    text = facts_to_jsonl(facts)
    write_new(path, text)
    if verify:
        again = read_facts(path, format="jsonl")
        if [fact_to_row(fact) for fact in again] != [fact_to_row(fact) for fact in facts]:
            raise EditFailed(f"The facts at {path}, read again, differ; the file was left there for inspection.")
    return ExportResult(str(path), "facts", verify, (path.name,), len(text.encode("utf-8")))
