"""The quality of one edit, and of many: kvllm beside the article's recipe, plain fine-tuning, retrieval and no edit.

Every column gets the same items in the same run and is asked the same questions by live decoding: the trained ones, the
item's paraphrases, its own neighbour questions, packaged neighbours, and all of them once more without chat template.
Raw text and general questions are measured on every K-th item (--damage-every) and at the end of a sequence.

    python benchmarks/edit_quality.py                                     # three own facts, minutes
    python benchmarks/edit_quality.py --half final --n 100 --items own,zsre,counterfact --resume single.jsonl
    python benchmarks/edit_quality.py --half final --sequence 100 --items own,zsre --resume sequence.jsonl
    python benchmarks/edit_quality.py --half final --mode update --n 40 --columns kvllm
    python benchmarks/edit_quality.py --half final --mode delete --n 40 --columns kvllm
    python benchmarks/edit_quality.py --half final --mode batched --n 50 --items own,zsre --columns kvllm
    python benchmarks/edit_quality.py --columns article,kvllm --variants '{"no energy": {"energy_weight": 0}}'

Modes: insert (each item from the base, or with --sequence one after the other), update (insert, then another text
under the same key), delete (insert, then delete), batched (all items by one call). A column that has no such operation
is left out. Variants are kvllm's column with other settings, for single edits: a curve of recall against damage, time.
Public items are read from $KVLLM_DATA or ../shared/data. A killed run with --resume goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Bar, finish, model_facts, parser, progress, spread
from edit_bench.intervals import mean_of
from edit_bench.items import HALVES, SOURCES, DataMissing, Item, digests, select
from edit_bench.journal import Journal, OtherRun, code_digest

if TYPE_CHECKING:
    from edit_bench.columns import Column, World
    from edit_bench.damage import Damage
    from edit_bench.scoring import Around

MODES = ("insert", "update", "delete", "batched")
COLUMNS = ("kvllm", "article", "down_proj", "context", "unedited")
_TOGETHER = 16  # items that are asked about at once, where many edits are scored in one model
# Metric → the scored lists that it is the mean of; each has a twin without chat template.
SHARES = {
    "reliability": ("trained",),
    "generalization": ("paraphrase",),
    "strict": ("strict",),
    "leak_rate": ("leak_strict", "leak_packaged"),
    "neighbour_kl": ("kl_strict", "kl_packaged"),
    "next_kl": ("kl_next",),
    "told_kl": ("kl_told",),
    "old_text_stated": ("old_stated",),
    "erasure": ("erased_trained", "erased_paraphrase"),
    "erasure_unseen": ("erased_paraphrase",),
    "restoration": ("restored_trained", "restored_paraphrase"),
    "restoration_unseen": ("restored_paraphrase",),
}


def main(argv: Sequence[str] | None = None) -> int:
    given = options().parse_args(argv)
    sources = given.items.split(",")
    columns = [*given.columns.split(","), *given.variants]
    try:
        check(given, sources, columns)
        items = chosen(given, sources)
        journal = Journal(given.resume, identity(given))
    except (DataMissing, OtherRun, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    from edit_bench.columns import described, discard, world_in

    with progress(given, units(given, items, columns), "edit quality") as bar:
        extra = {
            "items": items,
            "edit": given.edit,
            "variants": given.variants,
            "near": given.near,
            "progress": bar.listen,
            "open_gate": given.open_gate,
        }
        with world_in(journal.folder, model=given.model, seed=given.seed, **extra) as world:
            columns = [name for name in columns if given.mode in world.column(name).ops or passive(name, given.mode)]
            bench = Bench(world, journal, given, bar, items)
            measured = bench.run(columns)
            results = {
                "mode": "sequence" if given.sequence else given.mode,
                "half": given.half,
                "n_items": {source: sum(item.source == source for item in items) for source in sources},
                "protocol": protocol(),
                "columns": {
                    name: {"settings": described(name, world), **tables(measured[name], items, given.seed)}
                    for name in columns
                },
                "damage_suite": bench.damage_described(),
                "items": {name: shown(measured[name]["items"]) for name in columns},
            }
            model = model_facts(world.kb)
    finish("edit_quality", given, results=results, summary=summarise(results), model=model, data=digests(sources))
    if journal.folder is not None:
        discard(journal.folder)
    return 0


def options() -> argparse.ArgumentParser:
    made = parser("edit_quality", __doc__)
    made.add_argument("--n", type=int, default=3, help="items of each source (default: %(default)s)")
    made.add_argument("--items", default="own", help=f"comma-separated from {', '.join(SOURCES)} (default: own)")
    made.add_argument("--half", choices=HALVES, default="dev", help="of each source (default: %(default)s)")
    made.add_argument("--columns", default=",".join(COLUMNS), help="comma-separated (default: %(default)s)")
    made.add_argument("--mode", choices=MODES, default="insert", help="(default: %(default)s)")
    made.add_argument("--sequence", type=int, default=0, metavar="N", help="N edits one after the other, sources mixed")
    every = "measure raw text and general questions on every K-th item; 0: never (default: %(default)s)"
    made.add_argument("--damage-every", type=int, default=10, metavar="K", help=every)
    made.add_argument("--sentences", type=int, default=300, help="of raw text (default: %(default)s)")
    made.add_argument("--questions", type=int, default=200, help="that the base answers (default: %(default)s)")
    made.add_argument(
        "--singles", type=int, default=5, help="single inserts timed beside a batch (default: %(default)s)"
    )
    made.add_argument("--no-plain", action="store_true", help="ask nothing without chat template")
    made.add_argument("--near", type=float, default=0.5, help="cosine from which a note is retrieved")
    made.add_argument(
        "--edit", type=json.loads, default={}, metavar="JSON", help="kvllm's EditConfig, other than default"
    )
    variants = "more columns: kvllm's with other settings than --edit's, by name"
    made.add_argument("--variants", type=json.loads, default={}, metavar="JSON", help=variants)
    made.add_argument("--open-gate", action="store_true", help="commit every edit of kvllm's, whatever it measures")
    made.add_argument("--model", help="the base model (default: kvllm's)")
    made.add_argument("--resume", type=Path, metavar="FILE", help="keep finished items there, and repeat none of them")
    return made


def check(given: argparse.Namespace, sources: Sequence[str], columns: Sequence[str]) -> None:
    if given.variants and (given.sequence or given.mode == "batched"):
        raise ValueError("Variants are of single edits, neither of a sequence nor of a batch.")
    taken = [name for name in given.variants if name in COLUMNS]
    if taken:
        raise ValueError(f"The variant {taken[0]} has a column's name; choose another.")
    unknown = [name for name in columns if name not in COLUMNS and name not in given.variants]
    if unknown:
        raise ValueError(f"There is no column {', '.join(unknown)}; choose from {', '.join(COLUMNS)}.")
    if given.sequence and given.mode != "insert":
        raise ValueError("--sequence inserts; leave --mode out.")


def chosen(given: argparse.Namespace, sources: Sequence[str]) -> list[Item]:
    """Return the run's items; a sequence mixes its sources."""
    if given.sequence:
        found = select(sources, half=given.half, n=given.sequence, seed=given.seed)
        groups = [[item for item in found if item.source == source] for source in sources]
        shares = range(math.ceil(given.sequence / len(sources)), given.sequence)
        # Where a source has fewer, the others have more.
        n = next((n for n in shares if sum(len(some[:n]) for some in groups) >= given.sequence), given.sequence)
        found = [item for some in groups for item in some[:n]]
        random.Random(given.seed).shuffle(found)
        return found[: given.sequence]
    found = select(sources, half=given.half, n=given.n, seed=given.seed)
    return [item for item in found if item.new_text] if given.mode == "update" else found


def identity(given: argparse.Namespace) -> dict[str, Any]:
    """Return what must agree for pieces to be of one run; more items or columns may come to it."""
    shared = (
        "seed",
        "mode",
        "sequence",
        "half",
        "sentences",
        "questions",
        "no_plain",
        "open_gate",
        "near",
        "edit",
        "model",
        "singles",
    )
    whole = {"items": given.items, "n": given.n} if given.sequence or given.mode == "batched" else {}
    return json.loads(json.dumps({**{name: getattr(given, name) for name in shared}, **whole, "code": code_digest()}))  # type: ignore[no-any-return]


def passive(name: str, mode: str) -> bool:
    """Say whether a column without a mode's operation is asked nevertheless: for a batch, what one edit is, too."""
    return name == "unedited" or (mode == "batched" and name == "context")


def units(given: argparse.Namespace, items: Sequence[Item], columns: Sequence[str]) -> int:
    steps = len(items) * (2 if given.sequence else 1)
    return len(columns) * (steps + (1 if given.sequence or given.mode == "batched" else 0))


def protocol() -> dict[str, Any]:
    from edit_bench import scoring

    from kvllm.probing.suites import FACT_SUITE, WHOLE_DRIFT_SUITE

    return {
        "protocol": scoring.PROTOCOL,
        "plain": "the bare question without chat template, as a completion; every number that ends in _plain",
        "suites": [scoring.SUITE, FACT_SUITE, WHOLE_DRIFT_SUITE],
        "compared_tokens": scoring.ANSWER_TOKENS,
        "strict": "the item's own neighbour questions: the normalised answer is the unedited model's",
        "neighbours": f"the same and {scoring.PACKAGED_NEIGHBOURS} packaged ones an item",
        "interval": "95 %; items are drawn, not answers",
    }


# ------------------------------------------------------------------ measuring


class Bench:
    """One run: what was asked for, the models, and what was finished before."""

    def __init__(
        self, world: World, journal: Journal, given: argparse.Namespace, bar: Bar, items: Sequence[Item]
    ) -> None:
        self.world = world
        self.journal = journal
        self.given = given
        self.bar = bar
        self.items = list(items)
        self._damage: Damage | None = None

    def run(self, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return, by column: rows by item name, and rows of the whole."""
        if self.given.sequence or self.given.mode == "batched":
            arounds: dict[str, Around] = {}
            return {name: self._together(name, arounds) for name in columns}
        found: dict[str, dict[str, Any]] = {name: {"items": {}} for name in columns}
        for name in columns:  # a killed run may have left an edit in the knowledge base
            self.world.column(name).reset()
        for place, item in enumerate(self.items):
            around: list[Around] = []
            for name in columns:
                due = self._damage_due(place, name)
                key = (item.name, self._label(name))
                row = self.journal.get(*key)
                if row is None or (due and "damage" not in row):
                    if not around:
                        around += self._arounds([item])
                    row = self.journal.put(self._single(name, item, around[0], due), *key)
                found[name]["items"][item.name] = row
                self.bar.step(f"{name}: {item.key[:30]}")
        return found

    def damage_described(self) -> dict[str, Any]:
        return self.journal.get("damage suite") or {}

    def _label(self, name: str) -> str:
        """Return a column's name among the finished pieces.

        Retrieval depends on what else there is to be found, a variant on its settings.
        """
        depends: Any = self.given.variants.get(name)
        if name == "context":
            depends = [item.name for item in self.items]
        return name if depends is None else f"{name}@{hashlib.sha256(repr(depends).encode()).hexdigest()[:12]}"

    def _damage_due(self, place: int, name: str) -> bool:
        every = self.given.damage_every
        # The unedited model is measured once, to show that nothing is found where nothing was changed.
        return bool(every) and (place == 0 if name == "unedited" else place % every == 0)

    def _single(self, name: str, item: Item, around: Around, due: bool) -> dict[str, Any]:
        """Edit from the base, score, and go back."""
        from edit_bench.scoring import score, unlearned

        column, mode, plain = self.world.column(name), self.given.mode, not self.given.no_plain
        if due:
            self._prepared_damage()  # while the peer holds the base's weights
        try:
            first = column.edit(item, item.text)
            row: dict[str, Any] = {"edit": first}
            if mode == "delete" and name != "unedited":
                if "rejected" in first:
                    return row
                row = {"insert": first, "edit": column.delete(item)}
            elif mode == "update":
                row = {"insert": first, "edit": column.edit(item, item.new_text)}
            if mode == "delete":
                row |= unlearned(column.lm, item, around)
            else:
                text, old = (item.new_text, item.text) if mode == "update" else (item.text, None)
                asked = {"prompts": column.prompts, "plain": plain, "old": old}
                row |= score(column.lm, item, text, around, **asked)
            if due:
                row["damage"] = self._measure_damage(name)
        finally:
            column.reset()
        return row

    def _together(self, name: str, arounds: dict[str, Around]) -> dict[str, Any]:
        """Bring all items in, one after the other or in one batch, and score all of them at the end."""
        from edit_bench.scoring import score_all

        column, label = self.world.column(name), self._label(name)
        wanted = [item for item in self.items if self.journal.get(label, item.name) is None]
        for some in _chunks([item for item in wanted if item.name not in arounds]):  # before anything is edited
            arounds |= dict(zip((item.name for item in some), self._arounds(some), strict=True))
        damage_wanted = self.journal.get(label, "damage") is None and bool(self.given.damage_every)
        if damage_wanted:
            self._prepared_damage()
        if wanted or damage_wanted:
            edits = self._batch(column, label) if self.given.mode == "batched" else self._sequence(column, label)
        else:
            edits = {key: self.journal.get(label, "edit", key) or {} for key in self._edit_names(label)}
        found: dict[str, Any] = {"items": {}, "edits": edits}
        for some in _chunks(wanted):
            told = [(item, item.text, arounds[item.name]) for item in some]
            scored = score_all(column.lm, told, prompts=column.prompts, plain=not self.given.no_plain)
            for item, row in zip(some, scored, strict=True):
                self.journal.put(row, label, item.name)
                self.bar.step(f"{name}: {item.key[:30]}")
        for item in self.items:
            found["items"][item.name] = {**(self.journal.get(label, item.name) or {}), "edit": edits.get(item.name, {})}
            if item not in wanted:
                self.bar.step(f"{name}: {item.key[:30]}")
        if self.given.damage_every:
            found["damage"] = self.journal.get(label, "damage") or self.journal.put(
                self._measure_damage(name), label, "damage"
            )
        self.bar.step(f"{name}: damage")
        column.reset()
        return found

    def _edit_names(self, label: str) -> list[str]:
        names = [item.name for item in self.items] + ["batch", *(f"single {i}" for i in range(self.given.singles))]
        return [name for name in names if self.journal.get(label, "edit", name) is not None]

    def _sequence(self, column: Column, label: str) -> dict[str, Any]:
        """Edit one after the other; a killed run goes on after the last edit whose state was kept."""
        finished = [self.journal.get(label, "edit", item.name) for item in self.items]
        done = next((i for i, row in enumerate(finished) if row is None), len(self.items))
        state = None if self.journal.folder is None else self.journal.folder / label
        kept = column.take_up(state, self.items[: done + 1], done)
        if kept is not None:  # killed after the state was kept, before it was noted here
            self.journal.put(kept, label, "edit", self.items[done].name)
            done += 1
        for place, item in enumerate(self.items):
            if place >= done:
                row = column.edit(item, item.text)
                if state is not None:
                    column.keep(state, place + 1, row)
                self.journal.put(row, label, "edit", item.name)
            self.bar.step(f"{label}: edit {place + 1}")
        return {item.name: self.journal.get(label, "edit", item.name) or {} for item in self.items}

    def _batch(self, column: Column, label: str) -> dict[str, Any]:
        """Insert some items singly for their time, then all of them by one call."""
        column.reset()
        if "batched" not in column.ops:
            for item in self.items:
                column.edit(item, item.text)
            return {}
        for place, item in enumerate(self.items[: self.given.singles]):
            if self.journal.get(label, "edit", f"single {place}") is None:
                row = column.edit(item, item.text)
                column.reset()
                self.journal.put(row, label, "edit", f"single {place}")
        many: Any = column
        # After a kill the batch is made again: it is one edit.
        self.journal.put(many.many(self.items), label, "edit", "batch")
        return {name: self.journal.get(label, "edit", name) or {} for name in self._edit_names(label)}

    def _arounds(self, items: Sequence[Item]) -> list[Around]:
        from edit_bench.scoring import look_around_all

        plain, own = not self.given.no_plain, self.given.mode == "delete"
        return look_around_all(self.world.peer, items, seed=self.given.seed, plain=plain, own=own)

    def _prepared_damage(self) -> Damage:
        from edit_bench.damage import Damage

        if self._damage is None:
            sizes = {"sentences": self.given.sentences, "questions": self.given.questions, "seed": self.given.seed}
            digest = str(self.world.kb.info()["base_digest"])
            self._damage = Damage.prepare(self.world.peer, digest, **sizes)
            if not self.damage_described():
                self.journal.put(self._damage.described(), "damage suite")
        return self._damage

    def _measure_damage(self, name: str) -> dict[str, Any]:
        column = self.world.column(name)
        prompts = column.prompts if name == "context" else None
        return self._prepared_damage().measure(column.lm, prompts=prompts)


def _chunks(items: Sequence[Item]) -> list[Sequence[Item]]:
    return [items[start : start + _TOGETHER] for start in range(0, len(items), _TOGETHER)]


# ------------------------------------------------------------------ from rows to numbers


def tables(measured: Mapping[str, Any], items: Sequence[Item], seed: int) -> dict[str, Any]:
    """Return a column's metrics over all items and by source, its damage and its times."""
    by_source: dict[str, list[Mapping[str, Any]]] = {"all": []}
    for item in items:
        row = measured["items"][item.name]
        by_source["all"].append(row)
        by_source.setdefault(item.source, []).append(row)
    if len(by_source) == 2:
        del by_source["all"]
    found: dict[str, Any] = {"metrics": {name: metrics(rows, seed) for name, rows in by_source.items()}}
    rows = list(measured["items"].values())
    damaged = [measured["damage"]] if "damage" in measured else [row["damage"] for row in rows if "damage" in row]
    found["damage"] = damage(damaged, seed)
    edits = [row["edit"] for row in rows if row.get("edit")]
    found["times"] = times(edits)
    found["rejected"] = {"n": sum("rejected" in edit for edit in edits), "of": len(edits)}
    batch = measured.get("edits", {}).get("batch")
    if batch:
        singles = [row["seconds"] for name, row in measured["edits"].items() if name.startswith("single ")]
        per_fact = batch["seconds"] / len(items)
        found["batch"] = {
            **batch,
            "seconds_per_fact": round(per_fact, 3),
            "single_seconds": spread(singles),
            "ratio": round(per_fact / statistics.median(singles), 3) if singles else None,
        }
    return found


def metrics(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    found = {}
    for name, lists in SHARES.items():
        for suffix in ("", "_plain"):
            groups = [[v for part in lists for v in row.get(part + suffix, ())] for row in rows]
            if any(groups):
                found[name + suffix] = mean_of(groups, share=not name.endswith("_kl"), seed=seed)
    return found


def shown(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows as they are stored: a public record's words stay out, and so do answers to public questions."""
    found = {}
    for name, row in rows.items():
        hidden = () if name.startswith("own/") else ("failed", "changed")
        kept = {key: value for key, value in row.items() if key not in hidden}
        if "damage" in kept:
            kept["damage"] = {key: value for key, value in kept["damage"].items() if key != "lost"}
        found[name] = kept
    return found


def damage(measured: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return qa_delta, ppl_ratio and the KL of general answers over the edits that were measured."""
    if not measured:
        return {}
    alone = len(measured) == 1
    # After one state only, questions are what could have been others; else edits.
    groups = [[v] for v in measured[0]["qa"]] if alone else [m["qa"] for m in measured]
    kept = mean_of(groups, seed=seed)
    less = {k: None if kept[k] is None else round(kept[k] - 1, 5) for k in ("value", "low", "high")}
    logs = [m["log_ppl"] for m in measured]
    broken = sum(log is None for log in logs)
    ppl = mean_of([[log] for log in logs if log is not None], share=False, seed=seed)
    ratio = {k: None if ppl[k] is None else round(math.exp(ppl[k]), 5) for k in ("value", "low", "high")}
    worst = max((log for log in logs if log is not None), default=None)
    return {
        "edits_measured": len(measured),
        "qa_delta": {
            **less,
            "n": len(measured[0]["qa"]),
            "interval": "bootstrap or Wilson over questions" if alone else "bootstrap or Wilson over edits",
        },
        "ppl_ratio": {**ratio, "worst": None if worst is None else round(math.exp(worst), 5), "infinite": broken},
        "general_kl": mean_of([[m["kl"]] for m in measured if m["kl"] is not None], share=False, seed=seed),
    }


def times(edits: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    rows = list(edits)
    return {
        name: spread(row[name] for row in rows if row.get(name) is not None)
        for name in ("train_seconds", "seconds", "steps")
    }


def summarise(results: Mapping[str, Any]) -> list[str]:
    """Return the table: a row per metric and source, a column per editor; after the dot, without chat template."""
    columns: Mapping[str, Any] = results["columns"]
    names = list(columns)
    lines = [f"{'':34}" + "".join(f"{name:>30}" for name in names)]
    groups = list(dict.fromkeys(group for column in columns.values() for group in column["metrics"]))
    for group in groups:
        for metric in SHARES:
            found = [columns[name]["metrics"].get(group, {}) for name in names]
            if any(metric in each for each in found):
                cells = [_cell(each.get(metric), each.get(f"{metric}_plain")) for each in found]
                lines.append(f"{group + ' ' + metric:34}" + "".join(f"{cell:>30}" for cell in cells))
    for metric in ("qa_delta", "ppl_ratio", "general_kl"):
        cells = [columns[name]["damage"].get(metric) for name in names]
        if any(cells):
            lines.append(f"{'damage ' + metric:34}" + "".join(f"{_cell(cell, digits=4):>30}" for cell in cells))
    for metric in ("train_seconds", "seconds", "steps"):
        found = [columns[name]["times"][metric] for name in names]
        shown = [f"{t['median']:.1f} ({t['min']:.1f}-{t['max']:.1f})" if t["n"] else "–" for t in found]
        lines.append(f"{metric + ', median':34}" + "".join(f"{cell:>30}" for cell in shown))
    rejected = [f"{columns[name]['rejected']['n']}/{columns[name]['rejected']['of']}" for name in names]
    lines.append(f"{'rejected by the gate':34}" + "".join(f"{cell:>30}" for cell in rejected))
    for name in names:
        if "batch" in columns[name]:
            batch = columns[name]["batch"]
            lines.append(
                f"{name}, batched: {batch['seconds_per_fact']} s a fact in {batch['edits']} edits, "
                f"×{batch['ratio']} of a single insert; refused {len(batch['rejected'])}"
            )
    suite = results["damage_suite"]
    if suite:
        lines.append(f"damage: {suite['questions']} questions, {suite['sentences']} sentences; {suite['sources']}")
    return lines


def _cell(cell: Mapping[str, Any] | None, plain: Mapping[str, Any] | None = None, *, digits: int = 3) -> str:
    if not cell or cell.get("value") is None:
        return "–"
    beside = "" if plain is None or plain["value"] is None else f" · {plain['value']:.2f}"
    shown = f"{cell['value']:.{digits}f}"
    if cell.get("low") is not None:
        shown += f" [{cell['low']:.{digits}f}, {cell['high']:.{digits}f}]"
    return shown + beside


if __name__ == "__main__":
    raise SystemExit(main())
