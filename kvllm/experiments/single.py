"""One edit at a time, each from the base: what the experiments on factors and editors share.

The weights are put back after each edit and the ledger never hears of it; a step that is killed is done again, and
gives the same numbers.

    with single_edit(bench, case, config) as edit: rows = bench.ask([case])
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvllm.config import EditConfig
from kvllm.editing.delta import Delta, norm, to_files
from kvllm.experiments.bench import Bench
from kvllm.experiments.facts import Case
from kvllm.metrics import normalise
from kvllm.probing.runner import ask_probes, leaks_at
from kvllm.probing.suites import Probe
from kvllm.records import Fact, Progress


@dataclass(frozen=True)
class SingleEdit:
    """What was trained: the delta, and the numbers for a row."""

    delta: Delta
    row: dict[str, Any]


@contextmanager
def single_edit(bench: Bench, case: Case, config: EditConfig) -> Iterator[SingleEdit]:
    """Hold the base's weights with one fact edited in, for as long as this is open."""
    with bench.engine.elsewhere():
        bench.engine.weights.replay([])
        edit = train(bench, case, config)
        bench.engine.weights.apply(edit.delta)
        yield edit


def train(bench: Bench, case: Case, config: EditConfig) -> SingleEdit:
    """Train a delta for one fact from the weights as they are; they are not changed."""

    def ticker(stage: str) -> Any:
        def tick(step: int, total: int | None = None, **numbers: Any) -> None:
            if bench.progress is not None:
                bench.progress(Progress(stage, step, total, **numbers))

        return tick

    started = time.perf_counter()
    training = bench.engine.train([case.fact], config, tick=ticker)
    seconds = time.perf_counter() - started
    size = sum(map(len, to_files(training.delta, base_name="").values())) if training.delta else 0
    row = {
        "steps": training.steps,
        "trained": training.recalled,
        "norm": round(norm(training.delta), 4),
        "rank": sum(training.ranks.values()),
        "bytes": size,
        "train_seconds": round(seconds, 3),
    }
    return SingleEdit(training.delta, row)


class DamageProbe:
    """Questions with the base's own answers and outputs, to compare with after an edit.

    Attributes:
        fact: Whose text the answers must not recite.
    """

    def __init__(self, bench: Bench, questions: Sequence[str], fact: Fact, tokens: int) -> None:
        self._bench = bench
        self._questions = list(questions)
        self.fact = fact
        self._tokens = tokens
        config = bench.declared.edit_config(seed=0)
        self._items, _ = bench.engine.base_items(self._questions, [], tokens, config)
        with bench.engine.base_weights():
            self._answers = self._ask()

    def _ask(self) -> list[str]:
        return [answer for answer, _ in ask_probes(self._bench.lm, self._probes())]

    def _probes(self) -> list[Probe]:
        return [Probe("neighbour", q, self.fact.text, self.fact.key, tokens=self._tokens) for q in self._questions]

    def row(self) -> dict[str, Any]:
        """Return what is different now: mean KL on the base's answers, changed answers, and those that recite."""
        now = self._ask()
        kls = self._bench.engine.kl_from(self._items)
        changed = sum(normalise(a) != normalise(b) for a, b in zip(now, self._answers, strict=True))
        recited = sum(leaks_at(p, a, b) for p, a, b in zip(self._probes(), now, self._answers, strict=True))
        return {
            "near_kl": round(sum(kls) / len(kls), 6),
            "near_changed": changed,
            "near_recited": recited,
            "near_n": len(now),
        }
