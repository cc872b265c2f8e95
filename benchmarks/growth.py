"""How a knowledge base grows to 2,000 edits: opening time, ledger size and memory as curves, and what gc finds.

The store alone, with a stub in the place of training: what is measured is bookkeeping. Each edit brings a small delta,
a report of 25 probes and three metrics, as the engine's do.

    python benchmarks/growth.py --edits 200        # a look
    python benchmarks/growth.py                    # 2,000 edits
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import finish, parser, spread


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("growth", __doc__, seed=False)
    options.add_argument("--edits", type=int, default=2000, help="of the largest (default: %(default)s)")
    options.add_argument("--points", type=int, default=8, help="of each curve (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    given = options.parse_args(argv)
    from kvllm.store import Store
    from tests.robustness.growth import grow, measured

    points = {max(1, given.edits * n // given.points) for n in range(1, given.points + 1)}
    curves = []
    seconds = []

    with tempfile.TemporaryDirectory(prefix="kvllm-growth-") as folder:
        path = Path(folder) / "growing.kb"
        started = time.perf_counter()
        for edits in grow(path, given.edits, points=points):
            seconds.append((edits, time.perf_counter() - started))
            runs = [measured(path) for _ in range(given.repeats)]
            point = {"edits": edits} | {
                name: spread([run[name] for run in runs]) if name.endswith("seconds") else runs[0][name]
                for name in runs[0]
            }
            curves.append(point)
            if not given.quiet:
                print(f"{edits} edits", file=sys.stderr)
            started = time.perf_counter()
        with Store.open(path) as store:
            for edit_id in range(1, 6):
                store.write_snapshot(edit_id, os.urandom(100_000))
            (path / "deltas" / ("0" * 64)).mkdir()
            would = store.gc(dry_run=True)
            did = store.gc()
            clean = store.verify(deep=True)
    each = [took / (curves[n]["edits"] - (curves[n - 1]["edits"] if n else 0)) for n, (_, took) in enumerate(seconds)]
    results = {
        "curves": curves,
        "seconds_per_edit": each,
        "gc": {"dry_run": len(would.garbage), "removed": len(did.garbage), "bytes": did.bytes},
        "verifies": clean.problems == (),
    }
    first, last = curves[0], curves[-1]
    summary = [f"{'':24}{first['edits']:>10} edits{last['edits']:>10} edits"]
    for name in first:
        if name != "edits":
            cells = [p[name]["median"] if isinstance(p[name], dict) else p[name] for p in (first, last)]
            summary.append(f"{name:24}{cells[0]:>16.6g}{cells[1]:>16.6g}")
    summary.append(f"{'seconds per edit':24}{each[0]:>16.4f}{each[-1]:>16.4f}")
    finish("growth", given, results=results, summary=summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
