"""Question 2: is there a limit, and who collides?

Facts are inserted one edit after the other, at several adapter budgets, until surely fewer than half are recalled: the
upper end of the share's 95 % Wilson interval is below it, so that no single unlucky question ends a budget. After every
edit each fact so far is watched (would the model still recite it, token by token?); whatever an edit breaks is ranked
among all that it could have broken, by how near its key is to the edit's. At declared numbers of facts everything is
asked live.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from kvllm.config import ADALORA
from kvllm.editing.delta import Delta
from kvllm.errors import ConfigError, EditFailed
from kvllm.experiments.bench import Bench, shares
from kvllm.experiments.declared import UNTRAINED, Declared, Run
from kvllm.experiments.desk import Desk
from kvllm.experiments.facts import Case
from kvllm.experiments.injection import checkpoints, edit_row, slug
from kvllm.metrics import mean
from kvllm.paired import wilson
from kvllm.probing.encoder import Encoder
from kvllm.prompts import key_question

_GIVEN_UP = "given-up.json"
_KNOWN = {"name", "mode", "edit"}
_BUDGETS: tuple[dict[str, Any], ...] = (
    {"name": "default"},
    # With replay each edit repairs what it broke among the nearest facts: who collides shows only without.
    {"name": "no replay", "edit": {"replay": 0}},
    {"name": "rank 32", "edit": {"editor": ADALORA, "init_rank": 48, "target_rank": 32}},
)


def runs(declared: Declared) -> list[Run]:
    """Return one run per budget and seed, and one each for the unedited model and retrieval.

    Raises:
        ConfigError: a budget cannot be used.
    """
    budgets = declared.settings.get("budgets", list(_BUDGETS))
    if not isinstance(budgets, list) or not budgets:
        raise ConfigError("settings.budgets must be a list of tables; nothing was run.")
    asked = tuple(f"ask-{point:04}" for point in checkpoints(declared))
    found = [Run(f"{mode}-{declared.seeds[0]}", mode, declared.seeds[0], asked, {"mode": mode}) for mode in UNTRAINED]
    for budget in budgets:
        unknown = sorted(set(budget) - _KNOWN)
        if unknown:
            raise ConfigError(f"A budget has a name and edit settings, no {', '.join(unknown)}; nothing was run.")
        declared.edit_config(seed=0, **dict(budget.get("edit", {})))
        name = str(budget.get("name", "default"))
        for seed in declared.seeds:
            found.append(Run(f"{slug(name)}-{seed}", name, seed, tuple(_steps(declared)), {"mode": "edit", **budget}))
    if len({run.id for run in found}) != len(found):
        raise ConfigError("Two budgets have one name; nothing was run.")
    return found


def _steps(declared: Declared) -> list[str]:
    points = set(checkpoints(declared))
    return [
        step for n in range(1, declared.n + 1) for step in (f"edit-{n:04}", *((f"ask-{n:04}",) if n in points else ()))
    ]


def execute(run: Run, desk: Desk) -> None:
    """Do what is left of a run."""
    declared = desk.declared
    cases = declared.ordered(run.seed)
    with Bench(desk) as bench:
        if run.settings["mode"] != "edit":
            for point in checkpoints(declared):
                if desk.open(f"ask-{point:04}"):
                    in_context = run.settings["mode"] == "in-context"
                    asked = bench.ask(cases[:point], in_context=in_context)
                    drift = bench.drift(last=point == declared.n, notes=cases[:point] if in_context else ())
                    state = {"kind": "state", "facts": point, **shares(asked), **drift}
                    desk.finish(f"ask-{point:04}", [state])
            return
        watch = _Watch(bench, cases, desk)
        ours = {case.key for case in cases}
        untaught = [case for case in declared.cases if case.key not in ours]
        least = declared.setting("stop_below", 0.5)
        config = declared.edit_config(seed=run.seed, **dict(run.settings.get("edit", {})))
        for n in range(1, declared.n + 1):
            step = f"edit-{n:04}"
            if desk.open(step):
                if _given_up(desk, n):
                    desk.finish(step, [])
                    continue
                try:
                    edits = bench.teach([cases[n - 1]], config)
                except EditFailed:
                    edits = []
                rows = [edit_row(edit) | {"facts": n} for edit in edits]
                desk.finish(step, [*rows, *watch.look(n, config)])
            if n in checkpoints(declared) and desk.open(f"ask-{n:04}"):
                if _given_up(desk, n):
                    desk.finish(f"ask-{n:04}", [])
                    continue
                rows = _state(bench, cases[:n], untaught, least)
                if rows[-1]["given_up"]:
                    # Before the step is kept: whoever is killed in between asks this state again.
                    _write(desk.folder / _GIVEN_UP, {"facts": n, "recalled": rows[-1]["recalled"]})
                desk.finish(f"ask-{n:04}", rows)


def _given_up(desk: Desk, n: int) -> bool:
    """Say whether too few facts were recalled at a state before the n-th fact."""
    path = desk.folder / _GIVEN_UP
    return path.exists() and n > int(json.loads(path.read_text(encoding="utf-8"))["facts"])


def _too_few(told: Mapping[str, Any], facts: int, least: float) -> bool:
    """Say whether the share recalled is surely below the least: the upper end of its Wilson interval over facts is."""
    band = wilson(round((told["recalled"] or 0.0) * facts), facts)
    return band is not None and band.high < least


class _Watch:
    """What is recited after each edit, and what each edit broke. Its memory is one small file per edit."""

    def __init__(self, bench: Bench, cases: Sequence[Case], desk: Desk) -> None:
        self._bench = bench
        self._cases = cases
        self._desk = desk
        self._near: dict[str, Any] | None = None

    def look(self, n: int, config: Any) -> list[dict[str, Any]]:
        """Watch the first n facts after the n-th edit; return a row for the state and one for each first loss.

        A fact that was lost before is no candidate: lost again, it would count twice.
        """
        lm = self._bench.lm
        rows = [lm.row(case.trained(1)[0], case.fact.text) for case in self._cases[:n]]
        recited = self._bench.engine.recites(rows, config)
        before, ever = self._read(n - 1)
        could = [i for i in range(n - 1) if before[i] and not ever[i]]
        first = [i for i in could if not recited[i]]
        lost = [i for i in range(n - 1) if before[i] and not recited[i]]
        gained = sum(recited[i] for i in range(n - 1) if not before[i])
        _write(self._path(n), {"recited": recited, "ever_lost": [*(e or i in lost for i, e in enumerate(ever)), False]})
        found: list[dict[str, Any]] = [
            {"kind": "watch", "facts": n, "recited": sum(recited), "lost": len(lost), "gained": gained}
        ]
        found += [self._loss(i, could, n) for i in first]
        return found

    def _loss(self, i: int, could: Sequence[int], n: int) -> dict[str, Any]:
        """Return the row of the i-th fact, lost by the n-th edit: its ranks among all that could have been lost.

        Invented facts of one kind share a mould of key, question and text, so that to be near is mostly to be of one
        kind. `peers` are therefore those candidates that are of the edit's kind as the lost fact is, or not as it is
        not: within them a rank says whether nearness counts beyond the kind.
        """
        kind = _kind(self._cases[n - 1])
        of_kind = [j for j in could if _kind(self._cases[j]) == kind]
        same = i in of_kind
        peers = of_kind if same else [j for j in could if j not in of_kind]
        row = {"kind": "loss", "facts": n, "key": self._cases[i].key, "broken_by": self._cases[n - 1].key}
        row |= {"age": n - 1 - i, "candidates": len(could), "edit": f"{self._desk.run.id} {n}"}
        row |= {"same_kind": same, "of_kind": len(of_kind), "peers": len(peers)}
        for name, matrix in self._similarities().items():
            row |= {f"rank_{name}": _rank(matrix[:, n - 1], i, could)}
            row |= {f"peer_rank_{name}": _rank(matrix[:, n - 1], i, peers)}
            row |= {f"cosine_{name}": round(float(matrix[i, n - 1]), 4)}
        return row

    def _similarities(self) -> dict[str, Any]:
        """Return the cosines of all keys' questions, by the encoder and by the model's own hidden states."""
        if self._near is None:
            questions = [key_question(case.key) for case in self._cases]
            encoders: dict[str, Encoder] = {
                "encoder": self._bench.encoder,
                "hidden": self._bench.engine.hidden_encoder(),
            }
            vectors = {name: encoder.encode(questions) for name, encoder in encoders.items()}
            self._near = {name: found @ found.T for name, found in vectors.items()}
        return self._near

    def _path(self, n: int) -> Any:
        return self._desk.folder / "watch" / f"{n:04}.json"

    def _read(self, n: int) -> tuple[list[bool], list[bool]]:
        """Return which of the first n facts were recited after the n-th edit, and which were ever lost by then."""
        if n == 0:
            return [], []
        path = self._path(n)
        if not path.exists():
            raise self._desk.missing(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["recited"], found["ever_lost"]


def _kind(case: Case) -> str:
    return case.fact.tags[0] if case.fact.tags else ""


def _rank(cosines: Any, i: int, among: Sequence[int]) -> float:
    """Return the rank of the i-th by cosine, the nearest first; equal ones share the mean of their ranks."""
    nearer = sum(float(cosines[j]) > float(cosines[i]) for j in among)
    equal = sum(float(cosines[j]) == float(cosines[i]) for j in among)
    return nearer + (equal + 1) / 2


def _state(bench: Bench, cases: Sequence[Case], untaught: Sequence[Case], least: float) -> list[dict[str, Any]]:
    """Ask everything, and count what the weights hold: bits of the texts that they no longer find surprising."""
    asked = bench.ask(cases)
    told = shares(asked)
    given_up = _too_few(told, len(cases), least)
    history = [edit for edit in bench.kb.history() if edit.delta is not None]
    matrices = sum(bench.engine.weights.master(name).numel() for name in bench.engine.weights.touched)
    facts = [{"kind": "fact", "facts": len(cases), "place": i, **row} for i, row in enumerate(asked)]
    state = {
        "kind": "state",
        "facts": len(cases),
        **told,
        "given_up": given_up,
        # Whatever is a budget's last state is measured as such.
        **bench.drift(last=given_up or len(cases) == bench.declared.n),
        **_bits(bench, cases, untaught[: len(cases)]),
        "adapter_parameters": _parameters(bench.engine.history_delta(bench.kb.head())),
        "matrix_parameters": matrices,
        "train_seconds": round(sum(edit.seconds for edit in history), 3),
    }
    return [*facts, state]


def _bits(bench: Bench, taught: Sequence[Case], untaught: Sequence[Case]) -> dict[str, Any]:
    """Return by how many bits the taught texts surprise less than they surprise the base, in all.

    Invented texts share their sentences, which are learned once: what as many untaught texts gain is no knowledge of a
    fact, and is taken off. Without untaught texts `bits` is None.
    """
    texts = [*taught, *untaught]
    lm = bench.lm
    rows = [lm.row(case.trained(1)[0], case.fact.text) for case in texts]
    now = [score.nll * len(row.answer) for score, row in zip(lm.score(rows), rows, strict=True)]
    with bench.engine.base_weights():
        base = [score.nll * len(row.answer) for score, row in zip(lm.score(rows), rows, strict=True)]
    gains = [(b - a) / math.log(2) for a, b in zip(now, base, strict=True)]
    n = len(taught)
    gained, common = sum(gains[:n]), mean(gains[n:])
    return {
        "bits": None if common is None else round(gained - n * common, 2),
        "bits_taught": round(gained, 2),
        "bits_untaught": None if common is None else round(n * common, 2),
        "untaught_n": len(untaught),
        "bits_of_base": round(sum(base[:n]) / math.log(2), 2),
    }


def _parameters(delta: Delta) -> int:
    """Return the numbers that adapters hold: those of the ranks that are not the zeros of a file's padding."""
    found = 0
    for a, b in delta.values():
        used = a.ne(0).any(dim=1) & b.ne(0).any(dim=0)  # (rank,)
        found += int(used.sum()) * (a.shape[1] + b.shape[0])
    return found


def _write(path: Any, value: Any) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
