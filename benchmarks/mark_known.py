"""Ask the default model every general question of the drift suite, and mark each row by whether it answers it.

The mark (`"known"`) is written into the packaged file; the answers go into the JSON. Run it again when the questions or
the default model change: `kvllm drift` does not depend on the marks, but readers of the suite do.

    python benchmarks/mark_known.py            # asks and writes the marks
    python benchmarks/mark_known.py --dry-run  # asks, counts, writes nothing into the suite
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from common import ROOT, finish, parser, progress, sha256

FILE = ROOT / "kvllm" / "probing" / "suite_data" / "general.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    from kvllm.config import DEFAULT_MODEL, ModelConfig
    from kvllm.lm.model import LanguageModel
    from kvllm.lm.sources import resolve
    from kvllm.metrics import accepts
    from kvllm.probing.drift import ANSWER_TOKENS

    options = parser("mark_known", __doc__, seed=False)
    options.add_argument("--dry-run", action="store_true", help="leave the suite's file as it is")
    given = options.parse_args(argv)
    rows: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    files = resolve(DEFAULT_MODEL)
    lm = LanguageModel.load(files.path, ModelConfig())
    with progress(given, len(rows), "questions") as bar:
        answers = lm.generate(
            [row["question"] for row in rows],
            max_new_tokens=ANSWER_TOKENS,
            on_batch=lambda done, of: bar.step(f"{done}/{of}"),
        )
    known = [accepts(answer, row["accept"]) for answer, row in zip(answers, rows, strict=True)]
    if not given.dry_run:
        marked = [{**row, "known": mark} for row, mark in zip(rows, known, strict=True)]
        FILE.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in marked), encoding="utf-8")
    counts = {
        language: {"known": sum(k for k, r in zip(known, rows, strict=True) if r["lang"] == language), "n": n}
        for language in ("en", "zh")
        if (n := sum(row["lang"] == language for row in rows))
    }
    finish(
        "mark_known",
        given,
        results={
            "by_language": counts,
            "answers": [
                {"question": row["question"], "answer": answer, "known": mark}
                for row, answer, mark in zip(rows, answers, known, strict=True)
            ],
        },
        summary=[f"{language}: {c['known']} of {c['n']} answered" for language, c in counts.items()],
        model={"name": DEFAULT_MODEL, "revision": files.revision, "digest": files.digest},
        data={"questions": sha256(*(row["question"] for row in rows))},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
