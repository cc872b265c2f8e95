"""The fine-tuning methods on one task: AdaLoRA, LoRA, full fine-tuning, prompt tuning, prefix tuning and P-tuning.

The first three are merged: each fact is a single edit from the base. The last three cannot be merged; their adapters
are kept, and a question is answered with that of the semantically nearest key if it is near enough, else by the
unedited model: then what is measured is the choice as much as the method.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from kvllm.editing.editor import EditTask
from kvllm.editing.editors import EDITORS, KEPT
from kvllm.editing.soft_prompts import SoftPromptEditor, SoftPrompts
from kvllm.errors import ConfigError, EditFailed
from kvllm.experiments.bench import Bench, failed_row, judged, probes_of, shares
from kvllm.experiments.declared import UNTRAINED, Declared, Run
from kvllm.experiments.desk import Desk
from kvllm.experiments.facts import Case
from kvllm.experiments.single import single_edit
from kvllm.probing.runner import SPARE_TOKENS
from kvllm.probing.suites import Probe
from kvllm.prompts import training_questions

METHODS = (*UNTRAINED, *EDITORS, *KEPT)
# A question is near enough to a key from this cosine to one of its trained questions on.
_NEAR = 0.6


def runs(declared: Declared) -> list[Run]:
    """Return one run per method and seed.

    Raises:
        ConfigError: a method is unknown.
    """
    methods = declared.setting("methods", list(METHODS))
    strange = [method for method in methods if method not in METHODS]
    if strange or not methods:
        raise ConfigError(f"settings.methods names some of {', '.join(METHODS)}, not {strange}; nothing was run.")
    facts = tuple(f"fact-{place:04}" for place in range(1, declared.n + 1))
    found = []
    for method in dict.fromkeys(methods):
        alone = method in UNTRAINED
        steps = ("ask",) if alone else (*facts, "ask") if method in KEPT else facts
        for seed in declared.seeds[:1] if alone else declared.seeds:
            found.append(Run(f"{method}-{seed}", method, seed, steps, {"method": method}))
    return found


def execute(run: Run, desk: Desk) -> None:
    """Do what is left of a run."""
    declared, method = desk.declared, str(run.settings["method"])
    cases = declared.ordered(run.seed)
    with Bench(desk) as bench:
        if method in UNTRAINED:
            if desk.open("ask"):
                in_context = method == "in-context"
                rows = bench.ask(cases, in_context=in_context)
                drift = bench.drift(notes=cases if in_context else ())
                state = {"kind": "drift", **drift, "bytes": 0, "train_seconds": 0.0}
                if in_context:
                    state["bytes"] = sum(len(case.fact.text.encode()) for case in cases) // len(cases)
                desk.finish("ask", [*({"kind": "fact", **row} for row in rows), state])
        elif method in KEPT:
            _kept(run, desk, bench, cases, method)
        else:
            _merged(run, desk, bench, cases, method)


def _merged(run: Run, desk: Desk, bench: Bench, cases: Sequence[Case], method: str) -> None:
    config = desk.declared.edit_config(seed=run.seed, editor=method)
    for place, case in enumerate(cases, 1):
        if not desk.open(f"fact-{place:04}"):
            continue
        try:
            with single_edit(bench, case, config) as edit:
                fact = {"kind": "fact", **bench.ask([case])[0]}
                state = {"kind": "drift", "key": case.key, **bench.drift(), **edit.row}
            desk.finish(f"fact-{place:04}", [fact, state])
        except EditFailed as error:
            desk.finish(f"fact-{place:04}", [failed_row(case, desk.declared, error)])


def _kept(run: Run, desk: Desk, bench: Bench, cases: Sequence[Case], method: str) -> None:
    """Train one adapter per fact, keep them in files, and ask everything with the one that is near enough."""
    from kvllm.editing.files import read_tensors, write_tensors

    config = desk.declared.edit_config(seed=run.seed)
    shelf = SoftPrompts(bench.lm, method)
    taught = []
    for place, case in enumerate(cases, 1):
        step, path = f"fact-{place:04}", desk.folder / "kept" / f"{place:04}.safetensors"
        failure = path.with_suffix(".failed")
        if desk.open(step):
            started = time.perf_counter()
            try:
                training = SoftPromptEditor(method).train(
                    bench.engine.training_copy(config), None, _task(bench, case, run.seed), config
                )
            except EditFailed as error:
                failure.parent.mkdir(parents=True, exist_ok=True)
                failure.write_text(str(error), encoding="utf-8")
                desk.finish(step, [failed_row(case, desk.declared, error)])
                continue
            write_tensors(path, training.kept)
            shelf.put(case.key, training.kept)
            row = {"kind": "drift", "key": case.key, "steps": training.steps, "trained": training.recalled}
            row |= {"bytes": shelf.bytes(case.key), "train_seconds": round(time.perf_counter() - started, 3)}
            desk.finish(step, [row])
        elif failure.exists():
            continue
        elif not path.exists():
            raise desk.missing(path)
        else:
            shelf.put(case.key, read_tensors(path))
        taught.append(case)
    if desk.open("ask"):
        if not taught:
            desk.finish("ask", [])
            return
        near = desk.declared.setting("near", _NEAR)
        chosen = _Chooser(bench, taught, near)
        probes = [(case, probe) for case in taught for probe in probes_of(case, desk.declared)]
        routes = chosen.routes([probe.question for _, probe in probes])
        answers = _answers(bench, shelf, [probe for _, probe in probes], routes)
        rows = judged(bench, taught, probes, answers)
        hits = sum(route == case.key for (case, probe), route in zip(probes, routes, strict=True) if _own(probe))
        own = sum(_own(probe) for _, probe in probes)
        general = chosen.routes(bench.general_questions())
        state = {"kind": "routing", **shares(rows), "routed_right": hits, "routed_n": own}
        # Where no adapter is chosen the answer is the unedited model's: this is all the drift there can be.
        state |= {"general_routed": sum(route is not None for route in general), "general_n": len(general)}
        desk.finish("ask", [*({"kind": "fact", **row} for row in rows), state])


def _own(probe: Probe) -> bool:
    return probe.kind != "neighbour"


def _task(bench: Bench, case: Case, seed: int) -> EditTask:
    rows = [bench.lm.row(question, case.fact.text) for question in training_questions(case.fact)]
    return EditTask(rows=rows, seed=seed)


class _Chooser:
    """Says which key's adapter a question gets: the nearest by its trained questions, or none."""

    def __init__(self, bench: Bench, cases: Sequence[Case], near: float) -> None:
        self._bench = bench
        self._near = near
        self._owners = [case.key for case in cases for _ in training_questions(case.fact)]
        self._vectors = bench.encoder.encode([q for case in cases for q in training_questions(case.fact)])

    def routes(self, questions: Sequence[str]) -> list[str | None]:
        if not questions:
            return []
        cosines = self._bench.encoder.encode(list(questions)) @ self._vectors.T
        best = cosines.argmax(axis=1)
        return [self._owners[j] if row[j] >= self._near else None for row, j in zip(cosines, best, strict=True)]


def _answers(bench: Bench, shelf: SoftPrompts, probes: Sequence[Probe], routes: Sequence[str | None]) -> list[str]:
    """Answer each probe with its adapter, those without one by the unedited model."""
    lm = bench.lm
    found: dict[int, str] = {}
    plain = [i for i, route in enumerate(routes) if route is None]
    for i, answer in zip(plain, bench.plain_answers([probes[i] for i in plain]), strict=True):
        found[i] = answer
    texts: Mapping[str, str] = {case.key: case.fact.text for case in bench.declared.cases}
    for key in dict.fromkeys(route for route in routes if route is not None):
        for i in (i for i, route in enumerate(routes) if route == key):
            room = len(lm.answer_ids(probes[i].expected)) - 1 + SPARE_TOKENS
            draft = lm.answer_ids(texts[key])
            (found[i],) = shelf.answer(key, [lm.prompt_ids(probes[i].question)], [draft], room)
    return [found[i] for i in range(len(probes))]
