"""Commands that change what the weights know: each is a small training session, gated and undoable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvllm.cli.app import FACTS, app
from kvllm.cli.command import (
    Device,
    Dtype,
    Key,
    LockTimeout,
    MaxDrift,
    MaxPpl,
    MinErasure,
    MinReliability,
    Model,
    Reference,
    Resume,
    Seed,
    Steps,
    Store,
    command,
    opened,
    reference,
    stdin_bytes,
    text_or_stdin,
)
from kvllm.cli.output import Output, Result
from kvllm.errors import ConfigError, EditRejected, ending_error
from kvllm.records import DeleteMode, DryRun, Edit, EditOutcome, Fact, InsertMode, TeachVerb, lineage

if TYPE_CHECKING:
    from kvllm.importing import Found, FoundFact, Refused
    from kvllm.knowledge_base import KnowledgeBase

FactText = Annotated[
    str, typer.Argument(metavar="TEXT", help="What the model should answer; - reads stdin.", show_default=False)
]
Aliases = Annotated[
    list[str] | None, typer.Option("--alias", help="Another name of the key; repeatable.", show_default=False)
]
Questions = Annotated[
    list[str] | None,
    typer.Option("--question", help="Train on this question instead of the templates; repeatable.", show_default=False),
]
Probes = Annotated[
    list[str] | None, typer.Option("--probe", help="Ask this too, never train on it; repeatable.", show_default=False)
]
Tags = Annotated[list[str] | None, typer.Option("--tag", help="A label of the fact; repeatable.", show_default=False)]
Language = Annotated[
    str | None, typer.Option("--language", help="en or zh; by default the key's script decides.", show_default=False)
]
Mode = Annotated[
    InsertMode | None,
    typer.Option(
        "--mode",
        help="sequential: one edit per fact (default); batched: one for all; chunked: one per chunk.",
        show_default=False,
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option("--chunk", min=1, help="Facts per edit of mode chunked (default: 16).", show_default=False),
]
TryIt = Annotated[
    bool,
    typer.Option("--dry-run", help="Train and measure, but commit nothing; exit with 4 where it would be refused."),
]


TEACHING: dict[TeachVerb, str] = {
    "insert": """Teach the model a new fact; a key that exists is refused.

    kvllm insert my.kb torchkeras "Torchkeras makes training PyTorch models simple, in the style of Keras."
    """,
    "update": """Teach a new text for a key that exists; the old text must no longer be stated.

    kvllm update my.kb torchkeras "Torchkeras trains PyTorch models in three lines."
    """,
    "upsert": """Insert the fact, or update it if its key exists.

    kvllm upsert my.kb torchkeras "Torchkeras trains PyTorch models in three lines."
    """,
}


def teaching(verb: TeachVerb) -> Callable[..., Result]:
    """Return the command for one of the three verbs; they take the same arguments."""

    def teach(
        out: Output,
        kb: Store,
        key: Key,
        text: FactText,
        alias: Aliases = None,
        question: Questions = None,
        probe: Probes = None,
        language: Language = None,
        tag: Tags = None,
        dry_run: TryIt = False,
        min_reliability: MinReliability = None,
        max_drift: MaxDrift = None,
        max_ppl: MaxPpl = None,
        min_erasure: MinErasure = None,
        steps: Steps = None,
        seed: Seed = None,
        lock_timeout: LockTimeout = 10.0,
        model: Model = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> Result:
        if verb == "insert" and min_erasure is not None:
            raise ConfigError(
                "--min-erasure is for update and delete, as an insert replaces no text; nothing was changed."
            )
        text = text_or_stdin(text, name="text")
        fact = {"aliases": alias, "questions": question, "probes": probe, "language": language, "tags": tag}
        arguments: dict[str, Any] = {name: value for name, value in fact.items() if value is not None}
        with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
            arguments |= training_arguments(
                base,
                steps=steps,
                seed=seed,
                min_reliability=min_reliability,
                max_drift=max_drift,
                max_ppl=max_ppl,
                min_erasure=min_erasure,
            )
            if not dry_run:
                return edited(getattr(base, verb)(key, text, **arguments))
            return tried(base.dry_run(key, text, verb=verb, **arguments), f"{verb} of {key!r}")

    teach.__name__, teach.__doc__ = verb, TEACHING[verb]
    return teach


def tried(report: DryRun, what: str) -> Result:
    """Return the result of a dry run; what the gate would refuse has the exit code of a refusal."""
    from kvllm.reports import terminal

    failure = None
    if report.refused:
        failure = f"The gate would refuse the {what}: {'; '.join(report.refused)}; nothing was changed."
    document = {
        "ok": failure is None,
        "dry_run": True,
        "report": {name: metric.to_dict() for name, metric in report.metrics.items()},
        "probes": [probe.to_dict() for probe in report.probes],
        "warnings": list(report.warnings),
    }
    if failure is not None:
        document |= {"error": failure, "code": EditRejected.code}
    return Result(
        document,
        lambda: terminal.report_view(report, probes=True),
        exit_code=0 if failure is None else EditRejected.exit_code,
        failure=failure,
    )


def edited(edit: Edit) -> Result:
    """Return the result of a command that made one edit."""
    from kvllm.reports import terminal

    return Result({"ok": True, "edit": edit.to_dict()}, lambda: terminal.edit_view(edit))


for _verb in TEACHING:
    command(app, _verb, panel=FACTS)(teaching(_verb))


@command(app, panel=FACTS)
def delete(
    out: Output,
    kb: Store,
    key: Key,
    mode: Annotated[
        DeleteMode,
        typer.Option(
            "--mode",
            help="restore: back to the base model's own answers; abstain: to a stated refusal, also of what was never "
            "inserted (a key that is not live is warned about).",
        ),
    ] = "restore",
    dry_run: TryIt = False,
    max_drift: MaxDrift = None,
    max_ppl: MaxPpl = None,
    min_erasure: MinErasure = None,
    steps: Steps = None,
    seed: Seed = None,
    lock_timeout: LockTimeout = 10.0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Take a fact away again. Suppression is not proof of absence: compact makes the absence real.

    kvllm delete my.kb torchkeras
    """
    with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
        training = training_arguments(
            base, steps=steps, seed=seed, max_drift=max_drift, max_ppl=max_ppl, min_erasure=min_erasure
        )
        if dry_run:
            return tried(base.dry_run(key, verb="delete", mode=mode, **training), f"delete of {key!r}")
        return edited(base.delete(key, mode=mode, **training))


@command(app, "insert-many", panel=FACTS)
def insert_many(
    out: Output,
    kb: Store,
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="One fact per line; - reads stdin.")],
    mode: Mode = None,
    chunk: Chunk = None,
    strict: Annotated[bool, typer.Option("--strict", help="Insert nothing if any row is bad.")] = False,
    resume: Resume = False,
    min_reliability: MinReliability = None,
    max_drift: MaxDrift = None,
    max_ppl: MaxPpl = None,
    steps: Steps = None,
    seed: Seed = None,
    lock_timeout: LockTimeout = 10.0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Teach many facts. Each row has "key" and "text", and may have aliases, questions, probes, language, tags.

    Rows that cannot be used are listed with their line; the good ones are inserted, and the exit code is 4. An error
    that ends the series, such as a full disk, has its own exit code; what was inserted before it stays.

    kvllm insert-many my.kb facts.jsonl
    """
    series = series_arguments(mode, chunk)
    found = read_file(file, format="jsonl")
    if found.refused and strict:
        raise BadRows(found.refused, len(found))
    with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
        training = training_arguments(
            base, steps=steps, seed=seed, min_reliability=min_reliability, max_drift=max_drift, max_ppl=max_ppl
        )
        rest = left_to_do(found, base) if resume else found
        outcomes = base.insert_many(rest, **series, **training)
    return many_result(rest, outcomes, done="inserted", before=len(found) - len(rest))


def series_arguments(mode: InsertMode | None, chunk: int | None) -> dict[str, Any]:
    """Return `mode` and `chunk` of `insert_many` as far as they were given; a chunk's size means mode chunked."""
    if chunk is None:
        return {} if mode is None else {"mode": mode}
    if mode not in (None, "chunked"):
        raise ConfigError(f"--chunk belongs to --mode chunked, not {mode}; nothing was changed. Leave one of them out.")
    return {"mode": "chunked", "chunk": chunk}


def read_file(file: str, **options: Any) -> Found:
    """Return a file's facts, or those on stdin for `-`.

    Raises:
        BadRows: no row can be used.
    """
    from kvllm.importing import NoFacts, read_facts

    try:
        return read_facts(stdin_bytes() if file == "-" else file, **options)
    except NoFacts as error:
        raise BadRows(error.rows, 0, str(error)) from error


def left_to_do(found: Found, base: KnowledgeBase, *, delete: DeleteMode | None = None) -> Found:
    """Return what an interrupted series has left: without facts that are live with their text, or keys deleted before.

    A key that is live with another text stays, and is refused as it would be.
    """
    live = {fact.key: fact.text for fact in base.facts()}
    gone = _deleted(base, delete) - set(live) if delete is not None else set()

    def is_done(fact: Fact) -> bool:
        return fact.key in gone if delete is not None else live.get(fact.key) == fact.text

    return replace(found, items=tuple(item for item in found.items if not is_done(item.fact)))


def _deleted(base: KnowledgeBase, mode: DeleteMode) -> set[str]:
    """Return the keys whose newest edit in the head's own history is a delete; what was rolled back is not in it.

    A refusal counts as one only where no compact dropped it since. Who wants the base's answers back is served by a
    delete of either mode: a key that is not live cannot be restored again.
    """
    newer: set[str] = set()
    gone: set[str] = set()
    for edit in lineage(base.history(), past_compactions=mode == "restore"):
        if edit.op == "delete" and (mode == "restore" or edit.mode == mode):
            gone |= set(edit.keys) - newer
        newer.update(edit.keys)
    return gone


def many_result(found: Found, outcomes: Sequence[EditOutcome], *, done: str, before: int = 0) -> Result:
    """Return the result of a command that made many edits: of each fact of a file, and of each row that is none.

    Args:
        found: The facts that were tried.
        outcomes: What became of them.
        done: What was done to those that went well.
        before: How many had been done by an earlier series.
    """
    from kvllm.probing.regression import recall_by_key
    from kvllm.reports import terminal

    results: list[tuple[FoundFact | Refused, EditOutcome]] = list(zip(found.items, outcomes, strict=True))
    results += [(row, EditOutcome(row.key, error=row.error, code=ConfigError.code)) for row in found.refused]
    results.sort(key=lambda result: result[0].number)
    failed = sum(not outcome.ok for _, outcome in results)
    edits = {outcome.edit.id: outcome.edit for _, outcome in results if outcome.edit is not None}
    recalled = {
        (edit.id, key): share
        for edit in edits.values()
        for key, (share, _) in recall_by_key(edit.report.probes).items()
    }
    document = {
        "ok": not failed,
        done: len(results) - failed,
        "failed": failed,
        "done_before": before,
        "results": [
            {
                **place(row),
                "key": outcome.key,
                "ok": outcome.ok,
                "edit": None if outcome.edit is None else outcome.edit.id,
                "recalled": None if outcome.edit is None else recalled.get((outcome.edit.id, outcome.key)),
                "error": outcome.error,
                "code": outcome.code,
            }
            for row, outcome in results
        ],
        "duplicates": [{**place(row), "key": row.key, "error": row.error} for row in found.duplicates],
        "edits": [edit.to_dict() for edit in edits.values()],
    }
    exit_code, failure = 4 if failed else 0, None
    if failed:
        failure = f"{failed} of {len(results)} facts were not {done}."
        document |= {"error": failure, "code": "some_failed"}
    ended = next(((o, kind) for o in outcomes if (kind := ending_error(o.code)) is not None), None)
    if ended is not None:
        outcome, kind = ended
        failure = (
            f"{document[done]} of {len(results)} facts were {done} and stay; then an error ended the series at "
            f"{outcome.key!r}: {outcome.error}"
        )
        document |= {"error": failure, "code": outcome.code}
        exit_code = kind.exit_code
    shown = [(row.where.removeprefix("line "), outcome) for row, outcome in results]
    return Result(document, lambda: terminal.outcomes_table(shown, done=done), exit_code=exit_code, failure=failure)


def place(row: FoundFact | Refused) -> dict[str, Any]:
    """Return where a row stands in its file: its line, or in a JSON array its record."""
    return {"line": row.number} if row.where.startswith("line") else {"line": None, "where": row.where}


class BadRows(ConfigError):
    """Rows of a file that cannot be used; `rows` lists them."""

    def __init__(self, refused: Sequence[Refused], usable: int, sentence: str = "") -> None:
        first = f" First, {refused[0].error}" if refused else ""
        n = len(refused)
        super().__init__(sentence or f"{n} of {n + usable} rows cannot be used; nothing was changed.{first}")
        self.rows = [{**place(row), "key": row.key, "error": row.error} for row in refused]


@command(app, panel=FACTS)
def rollback(
    out: Output,
    kb: Store,
    edit: Reference,
    lock_timeout: LockTimeout = 10.0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Return to the weights and facts of an earlier edit, bit for bit (0: the untouched base); undone in the same way.

    kvllm rollback my.kb 3
    """
    with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
        made = base.rollback(reference(edit))
    return edited(made)


@command(app, panel=FACTS)
def compact(
    out: Output,
    kb: Store,
    min_reliability: MinReliability = None,
    max_drift: MaxDrift = None,
    max_ppl: MaxPpl = None,
    steps: Steps = None,
    seed: Seed = None,
    lock_timeout: LockTimeout = 10.0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Retrain all live facts together from the base model into one change; kept only if it is as good.

    Refusals (delete --mode abstain) are not kept: the edit's warnings name their keys, to be deleted again.

    kvllm compact my.kb
    """
    with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
        training = training_arguments(
            base, steps=steps, seed=seed, min_reliability=min_reliability, max_drift=max_drift, max_ppl=max_ppl
        )
        made = base.compact(**training)
    return edited(made)


def training_arguments(
    base: KnowledgeBase,
    *,
    steps: int | None = None,
    seed: int | None = None,
    min_reliability: float | None = None,
    max_drift: float | None = None,
    max_ppl: float | None = None,
    min_erasure: float | None = None,
) -> dict[str, Any]:
    """Return `config` and `gate`: the knowledge base's own with what the user gave; neither where nothing was given."""
    arguments: dict[str, Any] = {}
    training: dict[str, Any] = {
        name: value for name, value in (("max_steps", steps), ("seed", seed)) if value is not None
    }
    if training:
        arguments["config"] = replace(base.edit_config, **training)
    least = {"min_reliability": min_reliability, "min_erasure": min_erasure}
    most = {"max_drift_kl": max_drift, "max_ppl_ratio": max_ppl}
    gate: dict[str, Any] = {name: value or None for name, value in least.items() if value is not None}
    gate |= {name: None if math.isinf(value) else value for name, value in most.items() if value is not None}
    if gate:
        arguments["gate"] = replace(base.gate_config, **gate)
    return arguments
