"""Wall time and peak memory of `kvllm demo` with an empty cache, split into its stages.

The demo runs in a fresh process through kvllm's own `main`; its calls to the engine are timed from outside and change
nothing. Memory is the high-water mark of the resident set so far, so a stage that adds nothing repeats the number
before it. The installation is not part of it. Two to three minutes, and about 100 MB of downloads, unless the cache is
kept.

    python benchmarks/demo_memory.py
    python benchmarks/demo_memory.py --warm            # with the user's cache: no download, no conversion
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import finish, model_facts, parser, spread

CHILD = """
import json, resource, sys, time
started = time.perf_counter()
unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
rows, ticks = [], []

def peak(who=resource.RUSAGE_SELF):
    return resource.getrusage(who).ru_maxrss * unit

def hear(tick):
    key = (tick.stage, tick.note)
    if not ticks or ticks[-1][0] != key:
        ticks.append((key, time.perf_counter() - started, peak()))

def timed(name, call):
    def run(*arguments, **options):
        begun = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            rows.append({"stage": name, "seconds": time.perf_counter() - begun, "peak_bytes": peak()})
    return run

from kvllm import KnowledgeBase
from kvllm.cli import main
rows.append({"stage": "start", "seconds": time.perf_counter() - started, "peak_bytes": peak()})
create = KnowledgeBase.create.__func__

def listening(cls, path, *, progress=None, **options):
    return create(cls, path, progress=lambda tick: (hear(tick), progress and progress(tick)), **options)

KnowledgeBase.create = classmethod(timed("create (download, convert, hash)", listening))
for name in ("ask_many", "insert", "drift", "delete", "rollback", "verify"):
    setattr(KnowledgeBase, name, timed(name, getattr(KnowledgeBase, name)))
code = main(["demo", *sys.argv[2:]])
seconds = time.perf_counter() - started
document = {
    "code": code, "seconds": seconds, "peak_bytes": peak(), "stages": rows,
    "largest_child_bytes": peak(resource.RUSAGE_CHILDREN),
    "ticks": [{"stage": s, "note": n, "at": at, "peak_bytes": p} for (s, n), at, p in ticks],
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(document, file)
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("demo_memory", __doc__, seed=False)
    options.add_argument("--warm", action="store_true", help="use the user's cache instead of an empty one")
    options.add_argument("--language", choices=("en", "zh"), default="en", help="of the demo (default: %(default)s)")
    options.add_argument("--model", help="the base model (default: kvllm's)")
    options.add_argument("--repeats", type=int, default=1, help="(default: %(default)s)")
    given = options.parse_args(argv)
    if os.name != "posix":
        options.error("peak memory is read through getrusage, which this system does not have")
    runs = [once(given) for _ in range(given.repeats)]
    models = [run.pop("model") for run in runs]
    results = {
        "wall_seconds": spread((run["wall_seconds"] for run in runs), 1),
        "peak_bytes": spread((run["peak_bytes"] for run in runs), 0),
        "runs": runs,
    }
    finish("demo_memory", given, results=results, summary=summarise(results), model=models[0])
    return 0


def once(given: argparse.Namespace) -> dict[str, Any]:
    from kvllm import KnowledgeBase

    model: list[str] = []
    if given.model is not None:
        local = Path(given.model)
        model = ["--model", str(local.resolve()) if local.exists() else given.model]
    with tempfile.TemporaryDirectory(prefix="kvllm-demo-", ignore_cleanup_errors=True) as work:
        env = dict(os.environ) if given.warm else {**os.environ, "KVLLM_CACHE": str(Path(work, "cache"))}
        report = Path(work, "report.json")
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(report), "demo.kb", "--language", given.language, *model],
            cwd=work,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if given.quiet else None,
            check=False,
        )
        wall = time.perf_counter() - started
        if not report.exists():
            raise RuntimeError(f"kvllm demo ended with exit code {done.returncode} before it could report")
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        with KnowledgeBase.open(Path(work, "demo.kb"), readonly=True) as kb:
            found["model"] = model_facts(kb)
    ticks = found.pop("ticks")
    # Each tick lasts until the next one of another stage or note.
    ends = [tick["at"] for tick in ticks[1:]] + [found["seconds"]]
    inside: dict[str, float] = {}
    for tick, end in zip(ticks, ends, strict=True):
        inside[tick["stage"]] = round(inside.get(tick["stage"], 0.0) + end - tick["at"], 1)
    for row in found["stages"]:
        row["seconds"] = round(row["seconds"], 2)
    found["peak_bytes_with_children"] = max(found["peak_bytes"], found["largest_child_bytes"])
    return found | {"wall_seconds": round(wall, 1), "seconds_by_progress_stage": inside}


def summarise(results: dict[str, Any]) -> list[str]:
    run = results["runs"][-1]
    lines = [f"{'stage':36}{'s':>8}{'peak so far':>14}"]
    lines += [f"{row['stage']:36}{row['seconds']:>8.1f}{row['peak_bytes'] / 2**30:>10.2f} GiB" for row in run["stages"]]
    lines.append(
        f"wall {results['wall_seconds']['median']} s, peak {run['peak_bytes'] / 2**30:.2f} GiB, largest child process "
        f"{run['largest_child_bytes'] / 2**30:.2f} GiB, exit code {run['code']}"
    )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
