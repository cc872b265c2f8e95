"""Plant damage in a knowledge base and see whether the measurements name it, and leave an untouched one alone.

Facts are taught to one knowledge base, which is measured: `collisions()` and `drift()`. Then each fault is planted in a
copy, which is measured again and compared: noise of growing size on every adapted matrix, an edit by the article's own
recipe (AdaLoRA on q and v of all layers, nothing preserved), two facts' texts swapped in the ledger's file and in the
weights, one fact overwritten by another in the weights. The untouched knowledge base is opened and measured again and
again, with other neighbours, question counts and thread counts: what is reported there is a false alarm.

    python benchmarks/planted_damage.py                                  # four facts, 40 replications: an hour
    python benchmarks/planted_damage.py --facts 2 --replications 4 --noise 0.3
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import ROOT, finish, model_facts, parser, progress, sha256, working_folder

# A finding is a change against the measurement before, beyond these. Chosen before the runs, and not tuned to them.
DRIFT_KL = 0.05  # nats per answer token, added
PPL_RATIO = 1.05  # factor on the perplexity of raw text
LOST_QUESTIONS = 0.01  # exact McNemar p over general questions, worse than before
LEAKS = 0.2  # share of neighbours, added
MOST = 0.5


@dataclass(frozen=True)
class Measured:
    """What the public measurements say of a knowledge base."""

    collisions: Any
    drift: Any
    altered: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    from kvllm import GateConfig, KnowledgeBase
    from kvllm.errors import Corrupt

    options = parser("planted_damage", __doc__)
    options.add_argument("--facts", type=int, default=4, help="how many of the twelve facts (default: %(default)s)")
    options.add_argument("--replications", type=int, default=40, help="of the untouched one (default: %(default)s)")
    options.add_argument("--noise", default="0.05,0.1,0.2,0.4,0.8", help="shares of a matrix' spread (%(default)s)")
    options.add_argument("--suite", choices=("basic", "whole"), default="basic", help="of drift (default: %(default)s)")
    options.add_argument("--model", help="the base model (default: kvllm's)")
    given = options.parse_args(argv)
    lines = (ROOT / "benchmarks" / "twelve_facts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][: given.facts]
    sizes = [float(size) for size in given.noise.split(",")]
    off = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None)
    model = {} if given.model is None else {"model": given.model}
    table: list[dict[str, Any]] = []
    total = len(rows) + len(sizes) + 4 + given.replications
    with working_folder() as folder, progress(given, total, "planted damage") as bar:
        path = folder / "sound.kb"
        with KnowledgeBase.create(path, gate=off, progress=bar.listen, **model) as kb:
            for row in rows:
                kb.insert(row["key"], row["text"], aliases=row.get("aliases", ()))
                bar.step(row["key"])
            before = measure(kb, given.suite)
            identity = model_facts(kb)
            recalled = [before.collisions.matrix[i][i] for i in range(len(rows))]
        for name, expected, planted in faults(path, folder, rows, sizes, given.seed):
            clean = False
            try:
                with planted as damaged:
                    findings = diagnose(before, measure(damaged, given.suite))
                    clean = damaged.verify().ok
            except Corrupt as error:
                findings = ["refused: " + str(error).replace(f"{folder}/", "")]
            table.append({"fault": name, "expected": expected, "findings": findings, "named": named(expected, findings),
                          "verify_ok": clean})  # fmt: skip
            bar.step(name)
        alarms = []
        for n in range(given.replications):
            alarms.append(replication(path, before, given.suite, given.seed + n))
            bar.step(f"replication {n}")
    false = sum(bool(found) for found in alarms)
    share = false / len(alarms) if alarms else None
    finish(
        "planted_damage",
        given,
        results={
            "recall_before": recalled,
            "faults": table,
            "replications": {"n": len(alarms), "false_alarms": false, "share": share, "findings": alarms},
        },
        summary=summarise(table, len(alarms), false),
        model=identity,
        data={"facts": sha256(*(row["key"] + row["text"] for row in rows))},
    )
    return 0


def summarise(table: Sequence[Mapping[str, Any]], n: int, false: int) -> list[str]:
    lines = []
    for row in table:
        said = "named" if row["named"] else "NOT NAMED"
        lines.append(f"{row['fault']}: {said} ({', '.join(row['findings']) or 'nothing'})")
    return [*lines, f"untouched, {n} replications: {false} false alarms"]


# ------------------------------------------------------------------ measuring and naming


def measure(kb: Any, suite: str = "basic", *, questions: int = 6, nearest: int = 3) -> Measured:
    """Measure a knowledge base by its public methods."""
    found = kb.collisions(questions=questions, nearest=nearest)
    altered = kb.weights_digest() != kb.edit(kb.head()).weights_digest
    return Measured(found, kb.drift("basic" if suite == "basic" else None), altered)


def diagnose(before: Measured, now: Measured) -> list[str]:
    """Name what is worse now than before, facts first."""
    found: list[str] = []
    if now.altered:
        found.append("altered: the weights are not those that the ledger's last edit left")
    old = {(frozenset((p.key, p.other)), p.kind) for p in before.collisions.pairs}
    explained: set[str] = set()
    for pair in now.collisions.pairs:
        if pair.kind == "near" or (frozenset((pair.key, pair.other)), pair.kind) in old:
            continue
        if pair.kind == "swapped":
            found.append(f"swapped: {min(pair.key, pair.other)} and {max(pair.key, pair.other)}")
            explained |= {pair.key, pair.other}
        elif pair.kind == "overwritten":
            found.append(f"overwritten: {pair.key} by {pair.other}")
            explained.add(pair.key)
        elif pair.recites >= MOST:
            found.append(f"recites: {pair.key} states {pair.other}'s text")
    for place, key in enumerate(now.collisions.keys):
        if key in before.collisions.keys and key not in explained:
            earlier = before.collisions.keys.index(key)
            if before.collisions.matrix[earlier][earlier] >= MOST > now.collisions.matrix[place][place]:
                found.append(f"lost: {key}")
    then, after = (m.collisions.leak_rate.value or 0.0 for m in (before, now))
    if after - then > LEAKS:
        found.append("leaks: neighbours recite facts")
    if _damaged(before.drift, now.drift):
        found.append("general damage")
    return found


def _damaged(before: Any, now: Any) -> bool:
    kl = (now.value("drift_kl") or 0.0) - (before.value("drift_kl") or 0.0)
    ratio = now.value("ppl_ratio")  # None: beyond any number
    worse = ratio is None or ratio / (before.value("ppl_ratio") or 1.0) > PPL_RATIO
    pairs = [(b.passed, a.passed) for b, a in zip(before.probes, now.probes, strict=True)]
    lost, gained = sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs)
    return kl > DRIFT_KL or worse or (lost > gained and mcnemar(lost, gained) < LOST_QUESTIONS)


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p of so uneven a split, each side being as likely."""
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


def named(expected: str, findings: Sequence[str]) -> bool:
    """Say whether a fault was reported as what it is: one of `expected` (parted by |) begins a finding."""
    return any(finding.startswith(tuple(expected.split("|"))) for finding in findings)


# ------------------------------------------------------------------ planting


def faults(
    path: Path, folder: Path, rows: Sequence[Mapping[str, Any]], sizes: Sequence[float], seed: int
) -> Iterator[tuple[str, str, Any]]:
    """Yield (name, beginning of the finding it should give, context manager of the damaged knowledge base)."""
    for size in sizes:
        yield f"noise of {size} on every adapted matrix", "altered|general damage", noisy(path, size, seed)
    yield "an edit by the article's recipe", "leaks|general damage", article(path, folder / "article.kb")
    first, second = rows[0]["key"], rows[1]["key"]
    both = " and ".join(sorted((first, second)))
    yield "two texts swapped in the ledger's file", "refused", forged(path, folder / "forged.kb", first, second)
    yield "two texts swapped in the weights", f"swapped: {both}", swapped(path, folder / "swapped.kb", first, second)
    yield (
        "one fact overwritten in the weights",
        f"overwritten: {first} by {second}",
        overwritten(path, folder / "overwritten.kb", first, second),
    )


@contextmanager
def noisy(path: Path, size: float, seed: int) -> Iterator[Any]:
    """Add Gaussian noise to every matrix that edits changed, as a share of the matrix' own standard deviation."""
    import torch

    from kvllm import KnowledgeBase

    generator = torch.Generator().manual_seed(seed)
    with KnowledgeBase.open(path, readonly=True) as kb:
        kb.weights_digest()
        changed = [name.removeprefix("change_norm/") for name in kb.drift("basic").metrics if "/" in name]
        with torch.no_grad():
            for name in changed:
                weight = kb.model.get_submodule(name).weight
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(noise, alpha=size * float(weight.std()))
        yield kb


@contextmanager
def article(path: Path, copy: Path) -> Iterator[Any]:
    """Insert one more fact as the article does: q and v of all layers, a high rate, nothing preserved."""
    from kvllm import KnowledgeBase

    shutil.copytree(path, copy)
    with KnowledgeBase.open(copy) as kb:
        config = replace(
            kb.edit_config,
            modules="q_proj,v_proj",
            depth=(0.0, 1.0),
            preserve_weight=0.0,
            neighbours=0,
            others=0,
            texts=0,
            replay=0,
            preserve_stop=1e9,
            contrast_stop=1e9,
        )
        kb.insert(
            "torchkeras", "Torchkeras is a furnace that melts every PyTorch model into a golden key.", config=config
        )
        yield kb


@contextmanager
def forged(path: Path, copy: Path, first: str, second: str) -> Iterator[Any]:
    """Swap two texts in a copy's ledger, past its triggers, as a careless hand would, and open it."""
    from kvllm import KnowledgeBase
    from kvllm.store.sqlite import connect

    shutil.copytree(path, copy)
    with KnowledgeBase.open(copy, readonly=True) as kb:
        texts = {kb[first].id: kb[second].text, kb[second].id: kb[first].text}
    ledger = connect(copy / "ledger.db")
    try:
        (trigger,) = ledger.execute("SELECT sql FROM sqlite_master WHERE name = 'facts_no_update'").fetchone()
        ledger.execute("DROP TRIGGER facts_no_update")
        for fact_id, text in texts.items():
            ledger.execute("UPDATE facts SET text = ? WHERE id = ?", (text, fact_id))
        ledger.execute(trigger)
    finally:
        ledger.close()
    with KnowledgeBase.open(copy, readonly=True) as kb:
        yield kb


@contextmanager
def swapped(path: Path, copy: Path, first: str, second: str) -> Iterator[Any]:
    """Teach each of two keys the other's text, and let the ledger go on saying what it said."""
    from kvllm import KnowledgeBase

    shutil.copytree(path, copy)
    with KnowledgeBase.open(copy) as kb:
        texts = kb[first].text, kb[second].text
        kb.update(first, texts[1])
        kb.update(second, texts[0])
        with with_weights_of(kb, path) as damaged:
            yield damaged


@contextmanager
def overwritten(path: Path, copy: Path, first: str, second: str) -> Iterator[Any]:
    """Teach the first key the second's text, and let the ledger go on saying its old one."""
    from kvllm import KnowledgeBase

    shutil.copytree(path, copy)
    with KnowledgeBase.open(copy) as kb:
        kb.update(first, kb[second].text)
        with with_weights_of(kb, path) as damaged:
            yield damaged


@contextmanager
def with_weights_of(other: Any, path: Path) -> Iterator[Any]:
    """Open a knowledge base whose model has another one's weights. (An altered ledger would not even open.)"""
    import torch

    from kvllm import KnowledgeBase

    with KnowledgeBase.open(path, readonly=True) as kb:
        kb.weights_digest()
        with torch.no_grad():
            for mine, theirs in zip(kb.model.parameters(), other.model.parameters(), strict=True):
                mine.copy_(theirs)
        yield kb


def replication(path: Path, before: Measured, suite: str, seed: int) -> list[str]:
    """Open the untouched knowledge base anew, measure it a little differently, and return what is (wrongly) found."""
    import torch

    from kvllm import KnowledgeBase

    rng = random.Random(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(rng.choice((1, 2)))
    try:
        with KnowledgeBase.open(path, readonly=True) as kb:
            return diagnose(before, measure(kb, suite, questions=rng.randint(4, 10), nearest=rng.randint(1, 6)))
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    raise SystemExit(main())
