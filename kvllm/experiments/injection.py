"""Question 1: many facts, one by one with a merge each, all at once, or in chunks?

Every arm teaches the same facts in the same order and is asked the same questions when it has reached the declared
numbers of facts. Arms: how many facts an edit takes, whether `compact` follows, and what the sums are kept in; beside
them the unedited model and retrieval. The last two train nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvllm.config import EditConfig
from kvllm.errors import ConfigError, EditFailed, EditRejected
from kvllm.experiments.bench import UNMEASURED, Bench, shares
from kvllm.experiments.declared import UNTRAINED, Declared, Run
from kvllm.experiments.desk import Desk
from kvllm.experiments.facts import Case
from kvllm.records import Edit

MODES = ("sequential", "chunked", "batched", *UNTRAINED)
_ARMS: tuple[dict[str, Any], ...] = (
    {"name": "unedited", "mode": "unedited"},
    {"name": "in-context", "mode": "in-context"},
    # One run gives two arms: the facts one by one, and the same after `compact`.
    {"name": "sequential", "mode": "sequential", "compact": True},
    {"name": "chunked-4", "mode": "chunked", "chunk": 4},
    {"name": "chunked-16", "mode": "chunked", "chunk": 16},
    {"name": "batched", "mode": "batched"},
    {"name": "sequential, bf16 sums", "mode": "sequential", "masters": "bfloat16"},
)
_KNOWN = {"name", "mode", "chunk", "compact", "masters", "edit", "seeds"}


def runs(declared: Declared) -> list[Run]:
    """Return one run per arm and seed; the arms that train nothing need one seed only.

    An arm has all of the experiment's seeds, or those that it names itself.

    Raises:
        ConfigError: an arm or a checkpoint cannot be used.
    """
    arms = declared.settings.get("arms", list(_ARMS))
    if not isinstance(arms, list) or not arms:
        raise ConfigError("settings.arms must be a list of tables; nothing was run.")
    found = []
    for arm in arms:
        unknown = sorted(set(arm) - _KNOWN)
        mode = arm.get("mode")
        if unknown or mode not in MODES:
            raise ConfigError(
                f"An arm has a mode ({', '.join(MODES)}) and may have {', '.join(sorted(_KNOWN - {'mode'}))}; "
                f"{', '.join(unknown) or repr(mode)} was given; nothing was run."
            )
        if arm.get("compact", False) not in ((True, False) if mode not in UNTRAINED else (False,)):
            raise ConfigError("compact is true or false, and only for an arm that trains; nothing was run.")
        name = str(arm.get("name", mode))
        seeds = arm.get("seeds", declared.seeds if mode not in UNTRAINED else declared.seeds[:1])
        if not isinstance(seeds, (list, tuple)) or not seeds or not set(seeds) <= set(declared.seeds):
            raise ConfigError("An arm's seeds are some of the experiment's; nothing was run.")
        for seed in seeds:
            identity = f"{slug(name)}-{seed}"
            found.append(Run(identity, name, seed, tuple(_steps(declared, arm)), dict(arm)))
    if len({run.id for run in found}) != len(found):
        raise ConfigError("Two arms have one name; nothing was run.")
    return found


def execute(run: Run, desk: Desk) -> None:
    """Do what is left of a run."""
    declared = desk.declared
    arm = run.settings
    cases = declared.ordered(run.seed)
    mode = str(arm["mode"])
    config = declared.edit_config(seed=run.seed, **dict(arm.get("edit", {})))
    with Bench(desk, masters=str(arm.get("masters", "float32"))) as bench:
        taught = 0
        for place, size in enumerate(_chunks(declared, arm), 1):
            chunk = cases[taught : taught + size]
            taught += size
            step = f"edit-{place:04}"
            if mode not in UNTRAINED and desk.open(step):
                desk.finish(step, _edit_rows(bench, chunk, taught, config))
            reached = f"ask-{taught:04}"
            if reached in run.steps and desk.open(reached):
                desk.finish(reached, _ask(bench, cases[:taught], mode, last=taught == declared.n))
        if arm.get("compact"):
            if desk.open("compact"):
                desk.finish("compact", [_compact(bench, cases, config)])
            if desk.open("ask-compact"):
                desk.finish("ask-compact", _ask(bench, cases, mode, last=True, after="compact"))


def _steps(declared: Declared, arm: Mapping[str, Any]) -> list[str]:
    points = checkpoints(declared)
    found = []
    taught = 0
    for place, size in enumerate(_chunks(declared, arm), 1):
        earlier, taught = taught, taught + size
        if arm["mode"] not in UNTRAINED:
            found.append(f"edit-{place:04}")
        if any(earlier < point <= taught for point in points):
            found.append(f"ask-{taught:04}")
    return [*found, "compact", "ask-compact"] if arm.get("compact") else found


def checkpoints(declared: Declared) -> list[int]:
    """Return the numbers of facts at which everything is asked: those declared, and the last."""
    given = declared.settings.get("checkpoints", [])
    if not isinstance(given, list) or any(type(p) is not int or p < 1 for p in given):
        raise ConfigError("settings.checkpoints must be a list of numbers of facts; nothing was run.")
    return sorted({*(p for p in given if p < declared.n), declared.n})


def _chunks(declared: Declared, arm: Mapping[str, Any]) -> list[int]:
    """Return the sizes of an arm's edits; the arms that train nothing go from checkpoint to checkpoint."""
    mode, n = arm["mode"], declared.n
    if mode in UNTRAINED:
        points = checkpoints(declared)
        return [b - a for a, b in zip([0, *points], points, strict=False)]
    size = {"sequential": 1, "batched": n}.get(str(mode)) or int(arm.get("chunk", 4))
    if size < 1:
        raise ConfigError(f"A chunk holds at least one fact, not {size}; nothing was run.")
    return [min(size, n - start) for start in range(0, n, size)]


def _edit_rows(bench: Bench, chunk: Sequence[Case], taught: int, config: EditConfig) -> list[dict[str, Any]]:
    try:
        edits = bench.teach(chunk, config)
    except (EditFailed, EditRejected):
        edits = []  # the facts of a failed edit are missing, which the next questions show
    held = {key for edit in edits for key in edit.keys}
    failed = [case.key for case in chunk if case.key not in held]
    rows = [edit_row(edit) | {"facts": taught} for edit in edits]
    return rows + [{"kind": "failed", "key": key, "facts": taught} for key in failed]


def edit_row(edit: Edit) -> dict[str, Any]:
    """Return what the ledger keeps of an edit that experiments compare."""
    training = edit.config.get("training", {})
    return {
        "kind": "edit",
        "edit": edit.id,
        "op": edit.op,
        "keys": len(edit.keys),
        "steps": edit.steps,
        "trained": bool(training.get("recalled")),
        "loss": (training.get("losses") or [None])[-1],
        "norm": round(edit.delta.norm, 4) if edit.delta is not None else 0.0,
        "bytes": edit.delta.bytes if edit.delta is not None else 0,
        "train_seconds": edit.seconds,
    }


def _compact(bench: Bench, cases: Sequence[Case], config: EditConfig) -> dict[str, Any]:
    newest = bench.kb.history(limit=1)
    edit = newest[0] if newest and newest[0].op == "compact" else bench.kb.compact(config=config, gate=UNMEASURED)
    return edit_row(edit) | {"facts": len(cases)}


def _ask(bench: Bench, cases: Sequence[Case], mode: str, *, last: bool, after: str = "") -> list[dict[str, Any]]:
    """Ask every fact so far, and measure drift; age counts the facts that came after a fact's own edit."""
    asked = bench.ask(cases, in_context=mode == "in-context")
    history = [edit for edit in bench.kb.history() if edit.delta is not None]
    order = {key: edit.id for edit in reversed(history) if edit.op == "insert" for key in edit.keys}
    newest = max(order.values(), default=0)
    rows = []
    for place, row in enumerate(asked):
        mine = order.get(row["key"])
        later = sum(1 for edit_id in order.values() if mine is not None and edit_id > mine)
        rows.append(
            {"kind": "fact", "facts": len(cases), "after": after, "place": place, "age": later}
            | {"edits_after": 0 if mine is None else newest - mine}
            | row
        )
    state = {
        "kind": "state",
        "facts": len(cases),
        "after": after,
        **shares(asked),
        **bench.drift(last=last, notes=cases if mode == "in-context" else ()),
        "edits": len(history),
        "bytes": sum(edit.delta.bytes for edit in history if edit.delta is not None),
        "live_bytes": history[0].delta.bytes if after and history and history[0].delta is not None else None,
        "train_seconds": round(sum(edit.seconds for edit in history), 3),
    }
    return [*rows, state]


def slug(name: str) -> str:
    """Return a name as part of a file's name."""
    kept = "".join(ch if ch.isalnum() else "-" for ch in name.casefold())
    return "-".join(part for part in kept.split("-") if part)
