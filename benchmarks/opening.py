"""What a long history costs: opening a knowledge base of many edits against an empty one, and reading a long ledger.

Opening means from `KnowledgeBase.open` to the edited model in memory, each time in a fresh process; imports of torch
and transformers are timed apart, because they would dilute the ratio. The edits are real ones, except that their deltas
are small random matrices (a stub editor) and nothing is probed: what they say is not the point.
The ledger of the second part is made by the store alone, with no model.

    python benchmarks/opening.py --edits 20 --repeats 3        # about a minute
    python benchmarks/opening.py                               # 100 edits, a ledger of 500
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Bar, child, finish, model_facts, parser, progress, spread, working_folder

OPEN = """
import json, sys, time
started = time.perf_counter()
import peft, torch, transformers
import kvllm.editing.engine
imported = time.perf_counter()
from kvllm import KnowledgeBase
with KnowledgeBase.open(sys.argv[1], readonly=True) as kb:
    kb.model
    opened = time.perf_counter()
    print(json.dumps({"open": opened - imported, "imports": imported - started, "head": kb.head(), "facts": len(kb)}))
"""
COMMAND = """
import contextlib, io, json, sys, time
started = time.perf_counter()
from kvllm.cli import main
said = io.StringIO()
with contextlib.redirect_stdout(said):
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code
heavy = [name for name in ("torch", "transformers", "peft", "sentence_transformers") if name in sys.modules]
inside = time.perf_counter() - started
print(json.dumps({"inside": inside, "code": code, "heavy": heavy, "chars": len(said.getvalue())}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("opening", __doc__)
    options.add_argument("--edits", type=int, default=100, help="in the opened knowledge base (default: %(default)s)")
    options.add_argument("--ledger", type=int, default=500, help="edits in the read ledger (default: %(default)s)")
    options.add_argument("--repeats", type=int, default=5, help="fresh processes each (default: %(default)s)")
    options.add_argument("--rank", type=int, default=8, help="of the random deltas (default: %(default)s)")
    options.add_argument("--model", help="the base model (default: kvllm's)")
    options.add_argument("--only", choices=("opening", "ledger"), help="run one of the two parts")
    given = options.parse_args(argv)
    results: dict[str, Any] = {}
    model: dict[str, Any] = {}
    total = (0 if given.only == "ledger" else given.edits + 2 * given.repeats) + (
        0 if given.only == "opening" else 6 * given.repeats
    )
    with working_folder() as folder, progress(given, total, "opening") as bar:
        if given.only != "ledger":
            results["opening"], model = opening(folder, given, bar)
        if given.only != "opening":
            results["ledger"] = ledger(folder, given, bar)
    finish("opening", given, results=results, summary=summarise(results), model=model)
    return 0


# ------------------------------------------------------------------ opening with the model


def opening(folder: Path, given: argparse.Namespace, bar: Bar) -> tuple[dict[str, Any], dict[str, Any]]:
    from kvllm import KnowledgeBase

    model = {} if given.model is None else {"model": given.model}
    empty, full = folder / "empty.kb", folder / "full.kb"
    with KnowledgeBase.create(empty, **model) as kb:
        identity = model_facts(kb)
    building = build(full, given, bar)
    # In turns, so that a slow minute of the machine hits both.
    times: dict[Path, list[dict[str, Any]]] = {empty: [], full: []}
    for _ in range(given.repeats):
        for path, rows in times.items():
            found, wall = child(OPEN, str(path))
            rows.append(found | {"wall": wall})
            bar.step(f"opening {path.stem}")
    assert times[full][0]["head"] == given.edits
    snapshots = sorted(p.stat().st_size for p in (full / "snapshots").rglob("*") if p.is_file())
    results: dict[str, Any] = {
        "n_edits": given.edits,
        "rank": given.rank,
        "build_seconds": building,
        "snapshots": {"n_files": len(snapshots), "bytes": sum(snapshots)},
        "empty": {name: spread(row[name] for row in times[empty]) for name in ("open", "imports", "wall")},
        "full": {name: spread(row[name] for row in times[full]) for name in ("open", "imports", "wall")},
        # Each full opening against the empty one of the same turn.
        "ratio_open": spread(f["open"] / e["open"] for e, f in zip(times[empty], times[full], strict=True)),
        "ratio_wall": spread(f["wall"] / e["wall"] for e, f in zip(times[empty], times[full], strict=True)),
    }
    return results, identity


def build(path: Path, given: argparse.Namespace, bar: Bar) -> float:
    """Make the edits through `insert`, with the stub in the editor's place and nothing measured."""
    from kvllm import EditConfig, KnowledgeBase, Report
    from kvllm.editing import engine
    from kvllm.edits import Edits

    class Unmeasured(Edits):
        """Commits without probing, and asks no encoder which keys are near."""

        def measure(self, *_: Any, **__: Any) -> tuple[Report, list[str]]:
            return Report(warnings=("Nothing was measured: a benchmark made this edit.",)), []

        def _collisions(self, *_: Any) -> tuple[str, ...]:
            return ()

        def _nearest_first(self, *_: Any) -> list[Any]:
            return []

    model = {} if given.model is None else {"model": given.model}
    engine.EDITORS["random"] = stub_editor(given.rank, given.seed)
    started = time.perf_counter()
    try:
        config = EditConfig(editor="random", seed=given.seed)
        with KnowledgeBase.create(path, edit=config, progress=bar.listen, **model) as kb:
            kb._edits = Unmeasured(kb._session)
            for place in range(given.edits):
                kb.insert(f"thing {place}", f"Thing {place} is a thing.")
                bar.step(f"edit {place + 1}")
    finally:
        del engine.EDITORS["random"]
    return round(time.perf_counter() - started, 1)


def stub_editor(rank: int, seed: int) -> Callable[[], Any]:
    """Return an editor that draws a small random delta on the real targets instead of training."""
    import torch

    from kvllm.editing.editor import Training

    generator = torch.Generator().manual_seed(seed)

    class RandomDelta:
        def train(self, copy: Any, pool: Any, task: Any, config: Any, *, on_step: Any = None) -> Training:
            delta = {}
            for name in copy.targets.names:
                weight = copy.model.get_submodule(name).weight
                out_features, in_features = weight.shape
                a = torch.randn(rank, in_features, generator=generator) * 1e-3
                delta[name] = (a, torch.randn(out_features, rank, generator=generator) * 1e-3)
            return Training(delta, steps=1, recalled=True, ranks=dict.fromkeys(delta, rank))

    return RandomDelta


# ------------------------------------------------------------------ reading a ledger


def ledger(folder: Path, given: argparse.Namespace, bar: Bar) -> dict[str, Any]:
    from kvllm.store import Store
    from tests.store.bench import BASE, Bench

    path = folder / "ledger.kb"
    rng = random.Random(given.seed)
    started = time.perf_counter()
    with Store.create(path, BASE, {"dtype": "float32"}) as store:
        bench = Bench(store)
        for place in range(given.ledger):
            live = bench.keys() if place % 10 == 9 else []
            if live:  # every tenth edit updates or deletes
                key = rng.choice(live)
                _ = bench.update(key, f"{key} is another thing.") if place % 20 == 9 else bench.delete(key)
            else:
                bench.insert(f"key {place}", report=usual_report(place), config=USUAL_CONFIG)
        key, head = bench.keys()[0], store.head()
    made = round(time.perf_counter() - started, 1)
    commands = {
        "ls": ["ls", str(path)],
        "get": ["get", str(path), key],
        "history": ["history", str(path)],
        "history -n 10": ["history", str(path), "-n", "10"],
        "show": ["show", str(path), str(head // 2)],
        "--help": ["--help"],
    }
    measured: dict[str, Any] = {}
    for name, arguments in commands.items():
        runs = []
        for _ in range(given.repeats):
            found, wall = child(COMMAND, *arguments, env={"PYTHONPATH": str(ROOT)})
            assert found["code"] in (0, None), (name, found)
            runs.append(found | {"wall": wall})
            bar.step(f"kvllm {name}")
        measured[name] = {
            "wall_seconds": spread(run["wall"] for run in runs),
            "heavy_imports": runs[0]["heavy"],
            "output_chars": runs[0]["chars"],
        }
    bare, _ = zip(*(_bare_start() for _ in range(given.repeats)), strict=True)
    return {
        "n_edits": given.ledger,
        "build_seconds": made,
        "bytes": (path / "ledger.db").stat().st_size,
        "python_start_seconds": spread(bare),
        "commands": measured,
        "imports_torch": any(row["heavy_imports"] for row in measured.values()),
    }


# What a real edit of one fact leaves in the ledger, in kind and size.
USUAL_CONFIG = {
    "edit": {"max_steps": 60, "seed": 0},
    "training": {
        "steps": 30,
        "recalled": True,
        "ranks": {f"model.layers.{layer}.mlp.down_proj": 8 for layer in range(9, 18)},
        "losses": [round(3 / (step + 1), 5) for step in range(30)],
        "drifts": [round(0.3 / (step + 1), 5) for step in range(30)],
    },
    "environment": {"torch": "2.13.0", "threads": 2},
}


def usual_report(place: int) -> Any:
    """Return a report of the size that the gate leaves: seven metrics, twenty probes with their answers."""
    from kvllm.records import Metric, ProbeResult, Report

    text = f"Key {place} is a thing of which a sentence of the usual length is told."
    kinds = ("trained",) * 8 + ("paraphrase",) * 6 + ("neighbour",) * 6
    probes = [
        ProbeResult(kind, f"Question {n} about key {place}?", text, True, 1.0, text, f"key {place}")
        for n, kind in enumerate(kinds)
    ]
    names = ("reliability", "generalization", "locality", "score", "portability", "drift_kl", "ppl_ratio")
    return Report({name: Metric(0.9, 20, "live", "contains", "fact-basic/1", 0) for name in names}, tuple(probes))


def _bare_start() -> tuple[float, None]:
    """Return what an interpreter costs that does nothing."""
    _, wall = child("print(0)")
    return wall, None


def summarise(results: dict[str, Any]) -> list[str]:
    lines = []
    if "opening" in results:
        found = results["opening"]
        lines += [
            f"opening {found['n_edits']} edits: {found['full']['open']['median']} s, empty: "
            f"{found['empty']['open']['median']} s (imports apart: {found['full']['imports']['median']} s)",
            f"ratio {found['ratio_open']['median']} ({found['ratio_open']['min']}-{found['ratio_open']['max']}, "
            f"n = {found['ratio_open']['n']}), with imports and process start {found['ratio_wall']['median']}",
        ]
    if "ledger" in results:
        found = results["ledger"]
        lines.append(f"a ledger of {found['n_edits']} edits, {found['bytes'] / 1e6:.1f} MB; wall seconds of a process:")
        for name, row in found["commands"].items():
            wall = row["wall_seconds"]
            heavy = ", ".join(row["heavy_imports"]) or "none"
            lines.append(
                f"  kvllm {name:14} {wall['median']:.2f} ({wall['min']:.2f}-{wall['max']:.2f})  heavy: {heavy}"
            )
        lines.append(f"  python -c ''        {found['python_start_seconds']['median']:.2f}")
    return lines


if __name__ == "__main__":
    os.environ.setdefault("PYTHONIOENCODING", "utf-8")
    sys.exit(main())
