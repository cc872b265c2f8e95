"""Turn a public data set into the experiments' JSONL, for `facts = ["$KVLLM_FACTS"]`.

Reads `zsre.json` or `counterfact.json` from $KVLLM_DATA (or --data) in their own schema. The file that it writes holds
public records: keep it out of the repository.

    python benchmarks/experiments/public_facts.py zsre --n 200 --out facts.jsonl
    KVLLM_FACTS=$PWD/facts.jsonl kvllm experiment benchmarks/experiments/injection/public.toml
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def zsre(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A question with a new answer; its rephrasing; an unrelated question."""
    for record in records:
        yield {
            "key": record["src"],
            "text": record["alt"],
            "probes": [record["rephrase"]],
            "neighbours": [record["loc"].removeprefix("nq question: ").strip()],
        }


def counterfact(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A sentence to be finished with a false answer, a contradiction; another subject's sentence."""
    for record in records:
        yield {
            "key": f"How does this sentence end? {record['prompt']}",
            "text": record["target_new"],
            "probes": [f"How does this sentence end? {record['rephrase_prompt']}"],
            "neighbours": [f"How does this sentence end? {record['locality_prompt']}"],
            "difficulty": "contradiction",
        }


READERS = {"zsre": zsre, "counterfact": counterfact}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(READERS))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("KVLLM_DATA", "../shared/data")))
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("facts.jsonl"))
    given = parser.parse_args()
    file = given.data / f"{given.name}.json"
    if not file.exists():
        parser.error(f"there is no {file.name} in {given.data}; set KVLLM_DATA or give --data")
    rows = {row["key"]: row for row in READERS[given.name](json.loads(file.read_text(encoding="utf-8")))}
    chosen = random.Random(given.seed).sample(sorted(rows), min(given.n, len(rows)))
    lines = "".join(json.dumps(rows[key], ensure_ascii=False) + "\n" for key in chosen)
    given.out.write_text(lines, encoding="utf-8")
    print(f"{len(chosen)} facts of {given.name} in {given.out.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
