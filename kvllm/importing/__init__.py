"""Read other people's files into facts: edit benchmarks, instruction data, conversations, CSV, and kvllm's own JSONL.

Good records are used, each bad one is named by line or record with its reason. Knows no model and no ledger.

    from kvllm.importing import read_facts
    found = read_facts("zsre.json", limit=10)      # found.facts, found.probes, found.refused, found.duplicates
    kb.insert_many(found)
"""

from kvllm.importing.formats import FORMATS
from kvllm.importing.found import Found, FoundFact, FoundProbe, Refused
from kvllm.importing.native import fact_to_row, facts_to_jsonl
from kvllm.importing.reader import NoFacts, read_facts

__all__ = [
    "FORMATS",
    "Found",
    "FoundFact",
    "FoundProbe",
    "NoFacts",
    "Refused",
    "fact_to_row",
    "facts_to_jsonl",
    "read_facts",
]
