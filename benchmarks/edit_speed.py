"""How fast an edit is: kvllm's training and merge against the article's recipe, in the same run, on the same facts.

Each fact is inserted from the base by both, in turns that alternate, and its trained questions are asked afterwards by
live decoding, so that speed is not bought with recall. Then: the whole insert with its gate against the training alone;
the same facts inserted as edit number --early and as edit number --late of one history of real edits; the arithmetic
rate of the training against the measured bf16 peak; the peak memory of a process that makes one edit.

    python benchmarks/edit_speed.py                                   # three facts, a history of six: minutes
    python benchmarks/edit_speed.py --half final --n 15 --late 100    # as it is reported

Seconds are only worth something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, Bar, child, finish, model_facts, parser, progress, spread
from edit_bench.items import HALVES, SOURCES, DataMissing, Item, digests, select
from edit_bench.journal import Journal, OtherRun, code_digest

if TYPE_CHECKING:
    from edit_bench.columns import World

COLUMNS = ("kvllm", "article")
# Sizes of the matrix products that the peak is measured on, (m, k, n), beside those of the model itself.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
MEMORY = """
import json, resource, sys, tempfile
from pathlib import Path
sys.path[:0] = sys.argv[1].split(chr(0x1f))
from edit_bench.columns import World
from edit_bench.items import Item
asked = json.loads(sys.argv[2])

def peak_bytes():
    # On Linux ru_maxrss may still be that of the process which started this one.
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

with tempfile.TemporaryDirectory(prefix="kvllm-bench-", ignore_cleanup_errors=True) as folder:
    world = World(Path(folder), **asked["world"])
    fact = asked["item"]
    item = Item(**{name: tuple(v) if isinstance(v, list) else v for name, v in fact.items()})
    column = world.column(asked["column"])
    column.lm
    loaded = peak_bytes()
    column.edit(item, item.text)
    world.close()
print(json.dumps({"loaded_bytes": loaded, "peak_bytes": peak_bytes()}))
"""


def main(argv: Sequence[str] | None = None) -> int:
    given = options().parse_args(argv)
    sources = given.items.split(",")
    try:
        if given.late and not 1 <= given.early < given.late:
            raise ValueError("A history needs --early from 1, and --late after it (or 0 for none).")
        items = select(sources, half=given.half, n=given.n, seed=given.seed)[: given.n]
        history = stretch(given)
        journal = Journal(given.resume, identity(given))
    except (DataMissing, OtherRun, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    from edit_bench.columns import described, discard, world_in

    probes = min(given.probes, len(items)) if given.late else 0
    total = len(items) * len(COLUMNS) + (given.late - 1 + 2 * probes if given.late else 0) + 2
    with progress(given, total, "edit speed") as bar:
        extra = {"items": items, "edit": given.edit, "progress": bar.listen, "open_gate": given.open_gate}
        with world_in(journal.folder, model=given.model, seed=given.seed, **extra) as world:
            rows = side_by_side(world, items, journal, bar)
            results: dict[str, Any] = compared(rows)
            results["rate"] = journal.get("rate") or journal.put(rate(world, items[0]), "rate")
            bar.step("arithmetic rate")
            if given.late:
                results["history"] = in_history(world, items[:probes], history, given, journal, bar)
            results["memory"] = journal.get("memory") or journal.put(memory(items[0], given), "memory")
            bar.step("memory")
            results["settings"] = {name: described(name, world) for name in COLUMNS}
            results["items"] = rows
            model = model_facts(world.kb)
    used = dict.fromkeys([*sources, *(item.source for item in history)])
    finish("edit_speed", given, results=results, summary=summarise(results), model=model, data=digests(used))
    if journal.folder is not None:
        discard(journal.folder)
    return 0


def options() -> argparse.ArgumentParser:
    made = parser("edit_speed", __doc__)
    made.add_argument("--n", type=int, default=3, help="timed facts (default: %(default)s)")
    made.add_argument("--items", default="own", help=f"comma-separated from {', '.join(SOURCES)} (default: own)")
    made.add_argument("--half", choices=HALVES, default="dev", help="(default: %(default)s)")
    made.add_argument("--early", type=int, default=5, help="edit number to compare with (default: %(default)s)")
    made.add_argument(
        "--late", type=int, default=6, help="edit number that is compared; 0: none (default: %(default)s)"
    )
    made.add_argument("--probes", type=int, default=3, help="facts timed at both numbers (default: %(default)s)")
    made.add_argument("--open-gate", action="store_true", help="commit every edit of kvllm's, whatever it measures")
    made.add_argument(
        "--edit", type=json.loads, default={}, metavar="JSON", help="kvllm's EditConfig, other than default"
    )
    made.add_argument("--model", help="the base model (default: kvllm's)")
    made.add_argument("--resume", type=Path, metavar="FILE", help="keep finished measurements there, and repeat none")
    return made


def stretch(given: argparse.Namespace) -> list[Item]:
    """Return more facts than a history needs: own ones, and zsRE's where those do not suffice.

    They may come from both halves: only the time of an edit after them is reported.
    """
    if not given.late:
        return []
    wanted = given.late + given.n + given.late // 4  # the gate may refuse some
    found = [item for half in HALVES for item in select(["own"], half=half, n=10**6, seed=given.seed)]
    if len(found) < wanted:
        found += select(["zsre"], half=given.half, n=wanted - len(found), seed=given.seed)
    return found[:wanted]


def identity(given: argparse.Namespace) -> dict[str, Any]:
    shared = ("seed", "half", "items", "early", "late", "probes", "edit", "open_gate", "model")
    return json.loads(json.dumps({**{name: getattr(given, name) for name in shared}, "code": code_digest()}))  # type: ignore[no-any-return]


# ------------------------------------------------------------------ against the article


def side_by_side(world: World, items: Sequence[Item], journal: Journal, bar: Bar) -> list[dict[str, Any]]:
    """Insert each fact by both columns from the base; who comes first changes from fact to fact."""
    rows: list[dict[str, Any]] = []
    warm = False
    if any(journal.get(item.name, name) is None for item in items for name in COLUMNS):
        world.column("kvllm").reset()
    for place, item in enumerate(items):
        row: dict[str, Any] = {"item": item.name}
        for name in COLUMNS if place % 2 == 0 else COLUMNS[::-1]:
            found = journal.get(item.name, name)
            if found is None:
                if not warm:  # caches, encoder, the first call of every kernel
                    for each in COLUMNS:
                        insert(world, each, items[-1])
                    warm = True
                found = journal.put(insert(world, name, item), item.name, name)
            row[name] = found
            bar.step(f"{name}: {item.key[:30]}")
        rows.append(row)
    return rows


def insert(world: World, name: str, item: Item) -> dict[str, Any]:
    """Insert from the base, ask the trained questions, and go back."""
    from kvllm.probing.runner import ask_probes
    from kvllm.probing.scorers import score_statement
    from kvllm.probing.suites import Probe

    column = world.column(name)
    try:
        row = column.edit(item, item.text)
        probes = [Probe("trained", q, item.text, item.key) for q in (*item.trained(), *item.paraphrases)]
        passed = [score_statement(answer, item.text).passed for answer, _ in ask_probes(column.lm, probes)]
    finally:
        column.reset()
    n = len(item.trained())
    return {**row, "recall": sum(passed[:n]) / n, "recall_unseen": _share(passed[n:])}


def compared(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the speed-up, times and recall of both, and what the gate adds."""
    done = [row for row in rows if all(row[name].get("train_seconds") for name in COLUMNS)]
    ratios = [row["article"]["train_seconds"] / row["kvllm"]["train_seconds"] for row in done]
    gate = [row["kvllm"]["seconds"] / row["kvllm"]["train_seconds"] for row in done]
    found = spread(ratios)
    return {
        "speedup": {name: found[name] for name in ("median", "min", "max")},
        "n": found["n"],
        "speedup_of": "training and merge of the article's recipe over kvllm's, fact by fact",
        "insert_over_training": spread(gate),
        "columns": {
            name: {
                **{
                    measure: spread(row[name][measure] for row in rows if row[name].get(measure) is not None)
                    for measure in ("train_seconds", "seconds", "steps")
                },
                "recall": _share([row[name]["recall"] for row in rows]),
                "recall_unseen": _share([v for row in rows if (v := row[name]["recall_unseen"]) is not None]),
                "rejected": sum("rejected" in row[name] for row in rows),
            }
            for name in COLUMNS
        },
    }


# ------------------------------------------------------------------ early and late in a history


def in_history(
    world: World,
    probes: Sequence[Item],
    history: Sequence[Item],
    given: argparse.Namespace,
    journal: Journal,
    bar: Bar,
) -> dict[str, Any]:
    """Insert the same facts as edit number `early` and as edit number `late` of one history of real edits.

    The history's own edits go on as nothing had happened in between: each timed edit is rolled back.
    """
    column, kb = world.column("kvllm"), world.kb
    timed = {item.key for item in probes}
    rest = [item for item in dict.fromkeys(history) if item.key not in timed]
    head = kb.head()
    newest = kb.edit(head) if head else None
    if newest is not None and timed & set(newest.keys):  # a killed run left a timed edit
        kb.rollback(newest.parent or 0)
    if not set(kb) <= {item.key for item in rest}:
        column.reset()
    taken_up = len(kb)
    queue = iter([item for item in rest if item.key not in kb])
    refused = 0
    found: dict[str, list[dict[str, Any]]] = {}
    for number in (given.early, given.late):
        kept = journal.get("history", str(number))
        while kept is None and len(kb) < number - 1:
            item = next(queue, None)
            if item is None:
                raise RuntimeError(f"There are not enough facts for a history of {number - 1} edits.")
            refused += "rejected" in column.edit(item, item.text)
            bar.step(f"history: {len(kb)} facts")
        if kept is None:
            head = kb.head()
            rows = []
            for item in probes:
                rows.append({"item": item.name, **column.edit(item, item.text)})
                if kb.head() != head:
                    kb.rollback(head)
                bar.step(f"as edit {number}: {item.key[:30]}")
            kept = journal.put({"rows": rows}, "history", str(number))
        found[str(number)] = kept["rows"]
    column.reset()
    pairs = [
        (a, b)
        for a, b in zip(found[str(given.early)], found[str(given.late)], strict=True)
        if a.get("train_seconds") and b.get("train_seconds")
    ]
    return {
        "early": given.early,
        "late": given.late,
        "refused_on_the_way": refused,
        "taken_up_from_a_killed_run": taken_up,
        "train_ratio": spread(b["train_seconds"] / a["train_seconds"] for a, b in pairs),
        "insert_ratio": spread(b["seconds"] / a["seconds"] for a, b in pairs),
        "step_ratio": spread(
            (b["train_seconds"] / b["steps"]) / (a["train_seconds"] / a["steps"])
            for a, b in pairs
            if a.get("steps") and b.get("steps")
        ),
        "rows": found,
    }


# ------------------------------------------------------------------ arithmetic rate and memory


def rate(world: World, item: Item) -> dict[str, Any]:
    """Return how fast kvllm's training computes: operations of its matrix products over its seconds.

    The same insert runs twice, first with a clock, then counted: counting slows it, and one seed gives one training.
    Steps are taken from the first to the last, so that what comes before them is apart.
    """
    column, kb = world.column("kvllm"), world.kb
    clock: list[float] = []
    timed = _listened(column, kb, item, lambda: clock.append(time.perf_counter()))
    counter = counting()
    counts: list[int] = []
    kb.edits.around = counter
    try:
        _listened(column, kb, item, lambda: counts.append(counter.operations))
    finally:
        kb.edits.around = None
    seconds = timed["train_seconds"]
    steps = min(len(clock), len(counts))
    in_steps = counts[steps - 1] - counts[0] if steps > 1 else None
    step_seconds = clock[steps - 1] - clock[0] if steps > 1 else None
    best = peak(world)
    whole = counter.operations / seconds if seconds else None
    per_step = in_steps / step_seconds if in_steps and step_seconds else None
    return {
        "item": item.name,
        "operations": counter.operations,
        "train_seconds": seconds,
        "steps": steps,
        "same_steps_when_counted": len(clock) == len(counts),
        "gflops_training": _giga(whole),
        "gflops_steps": _giga(per_step),
        "peak_bf16": best,
        "share_of_peak_training": _rounded(whole, best["gflops"]),
        "share_of_peak_steps": _rounded(per_step, best["gflops"]),
        "compute_dtype": kb.engine.environment()["compute_dtype"],
    }


def _listened(column: Any, kb: Any, item: Item, on_step: Any) -> dict[str, Any]:
    """Insert and go back, telling `on_step` of every training step."""
    before = kb._session.progress

    def listen(tick: Any) -> None:
        if tick.stage == "training":
            on_step()
        if before is not None:
            before(tick)

    kb._session.progress = listen
    try:
        found: dict[str, Any] = column.edit(item, item.text)
    finally:
        kb._session.progress = before
        column.reset()
    return found


def counting() -> Any:
    """Return a context that counts the operations of every matrix product in it, forward and backward.

    torch's own FlopCounterMode follows the tree of modules, and loses its way where a forward pass is left early; its
    formulas are used here without that.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Counting(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            packet = func._overloadpacket
            if packet not in flop_registry and func.namespace != "prim":
                with self:  # an operation that consists of others, in inference mode
                    made = func.decompose(*args, **kwargs)
                if made is not NotImplemented:
                    return made
            out = func(*args, **kwargs)
            if packet in flop_registry:
                self.operations += flop_registry[packet](*args, **kwargs, out_val=out)
            return out

    return Counting()


def peak(world: World, seconds: float = 0.5) -> dict[str, Any]:
    """Return the best bf16 rate of a few matrix products, sizes of the model's own MLP among them."""
    import torch

    device = world.column("kvllm").lm.device
    config = world.column("kvllm").lm.model.config.get_text_config()
    hidden, wide = int(config.hidden_size), int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    found: list[dict[str, Any]] = []
    for m, k, n in (*PRODUCTS, (512, hidden, wide), (512, wide, hidden)):
        a = torch.randn(m, k, device=device).to(torch.bfloat16)
        b = torch.randn(k, n, device=device).to(torch.bfloat16)
        times: list[float] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds or len(times) < 3:
            started = time.perf_counter()
            _ = a @ b
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - started)
        found.append({"product": [m, k, n], "gflops": _giga(2 * m * k * n / statistics.median(times[1:]))})
    return {**max(found, key=lambda row: row["gflops"]), "all": found, "threads": torch.get_num_threads()}


def memory(item: Item, given: argparse.Namespace) -> dict[str, Any]:
    """Return the peak memory of a fresh process that makes one edit, for each column."""
    from dataclasses import asdict

    paths = "\x1f".join([str(ROOT), str(ROOT / "benchmarks")])
    shared = {"model": given.model, "seed": given.seed, "edit": given.edit, "open_gate": given.open_gate}
    found: dict[str, Any] = {"measured": "resident peak of a child process: imports, model, one insert with its gate"}
    for name in COLUMNS:
        told, _ = child(MEMORY, paths, json.dumps({"world": shared, "item": asdict(item), "column": name}))
        found[name] = {measure: round(value / 2**30, 3) for measure, value in told.items()}
        found[name] = {f"{measure.removesuffix('_bytes')}_gib": value for measure, value in found[name].items()}
    return found


def _share(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _giga(operations_per_second: float | None) -> float | None:
    return None if operations_per_second is None else round(operations_per_second / 1e9, 1)


def _rounded(value: float | None, of_giga: float) -> float | None:
    return None if value is None else round(value / 1e9 / of_giga, 3)


def summarise(results: Mapping[str, Any]) -> list[str]:
    up, gate, columns = results["speedup"], results["insert_over_training"], results["columns"]
    lines = [
        f"speedup of training + merge: ×{up['median']} (×{up['min']} to ×{up['max']}), n = {results['n']}",
        f"insert with its gate over training alone: ×{gate['median']} (×{gate['min']} to ×{gate['max']})",
    ]
    for name, column in columns.items():
        seconds, steps = column["train_seconds"], column["steps"]
        lines.append(
            f"{name}: {seconds['median']} s ({seconds['min']}-{seconds['max']}), {steps['median']} steps, "
            f"recall {column['recall']}, on unseen questions {column['recall_unseen']}, refused {column['rejected']}"
        )
    if "history" in results:
        history = results["history"]
        train, whole, step = (history[f"{name}_ratio"] for name in ("train", "insert", "step"))
        lines.append(
            f"edit {history['late']} against edit {history['early']}: training ×{train['median']} "
            f"({train['min']}-{train['max']}), whole insert ×{whole['median']}, a step ×{step['median']}"
        )
    found, best = results["rate"], results["rate"]["peak_bf16"]
    lines.append(
        f"arithmetic: {found['gflops_steps']} GFLOP/s in the steps, {found['gflops_training']} over the training "
        f"({found['compute_dtype']}); peak bf16 {best['gflops']} at {best['product']}, {best['threads']} threads: "
        f"{found['share_of_peak_steps']} and {found['share_of_peak_training']} of it"
    )
    for name in COLUMNS:
        used = results["memory"][name]
        lines.append(f"memory, {name}: peak {used['peak_gib']} GiB, {used['loaded_gib']} after loading")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
