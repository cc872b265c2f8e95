"""`kvllm import`: facts from other people's files, seen first (`--dry-run`), then taught or deleted."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvllm.cli.app import FACTS, app
from kvllm.cli.command import (
    Device,
    Dtype,
    LockTimeout,
    MaxDrift,
    MaxPpl,
    MinErasure,
    MinReliability,
    Model,
    Resume,
    Steps,
    Store,
    command,
    opened,
)
from kvllm.cli.edits import (
    BadRows,
    Chunk,
    Mode,
    left_to_do,
    many_result,
    place,
    read_file,
    series_arguments,
    training_arguments,
)
from kvllm.cli.failures import unwritable
from kvllm.cli.output import Output, Result
from kvllm.errors import ConfigError, KvllmError
from kvllm.records import DeleteMode

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvllm.importing import Found
    from kvllm.knowledge_base import KnowledgeBase


@command(app, "import", panel=FACTS)
def import_facts(
    out: Output,
    kb: Store,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON, JSONL or CSV; - reads stdin.", show_default=False)],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="jsonl, csv, zsre, counterfact, wikibigedit, knowedit, cknowedit, mquake, tofu, alpaca, sharegpt, "
            "messages or qa; by default the first record's fields decide.",
            show_default=False,
        ),
    ] = None,
    map: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="FIELD=COLUMN",
            help="Read this field of a fact (key, text, aliases, questions, probes, language, tags) from that column; "
            "repeatable. Dots lead into nested objects: text=target_new.str.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many usable records.", show_default=False)
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Only so many records, by chance.", show_default=False)
    ] = None,
    encoding: Annotated[str, typer.Option("--encoding", metavar="NAME", help="Of the file.")] = "utf-8",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done; no model is loaded.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Change nothing if any record is bad.")] = False,
    resume: Resume = False,
    delete: Annotated[
        DeleteMode | None,
        typer.Option("--delete", help="Delete the file's keys instead: restore or abstain.", show_default=False),
    ] = None,
    probes_to: Annotated[
        Path | None,
        typer.Option(
            "--probes-to",
            metavar="FILE",
            help="Write the records' further questions (locality, portability) there, for probe --probes.",
            show_default=False,
        ),
    ] = None,
    mode: Mode = None,
    chunk: Chunk = None,
    min_reliability: MinReliability = None,
    max_drift: MaxDrift = None,
    max_ppl: MaxPpl = None,
    min_erasure: MinErasure = None,
    steps: Steps = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the sample and of the training.", show_default=False)
    ] = None,
    lock_timeout: LockTimeout = 10.0,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Teach the facts of a data set, a CSV table or a JSON file. Bad records are named; the good ones are used.

    kvllm import my.kb faq.csv --map key=Question --map text=Answer --dry-run
    """
    series = series_arguments(mode, chunk)
    if delete is not None and (series or min_reliability is not None):
        name = "--min-reliability" if not series else "--mode" if mode is not None else "--chunk"
        raise ConfigError(f"{name} is for facts that are taught, not for --delete; nothing was changed. Leave it out.")
    if delete is None and min_erasure is not None:
        raise ConfigError("--min-erasure is for --delete, not for facts that are taught; nothing was changed.")
    if probes_to is not None and os.path.lexists(probes_to) and not resume:
        raise ConfigError(f"{probes_to} exists already; nothing was changed. Give another name or remove it.")
    if probes_to is not None and not probes_to.absolute().parent.is_dir():
        raise ConfigError(f"The probes cannot be written to {probes_to}: no such folder; nothing was changed.")
    found = read_file(
        file,
        format=format,
        columns=_columns(map or []),
        limit=limit,
        sample=sample,
        seed=seed or 0,
        encoding=encoding,
        progress=out.progress,
    )
    if found.refused and strict:
        raise BadRows(found.refused, len(found))
    if probes_to is not None and not found.probes:
        raise ConfigError(f"The records of {file} have no further questions for --probes-to; nothing was changed.")
    if probes_to is not None and os.path.lexists(probes_to):
        if not _holds(probes_to, found.probes_text()):
            raise ConfigError(
                f"{probes_to} exists already, and does not hold the further questions of {file}; nothing was changed. "
                "Give another name or remove it."
            )
        probes_to = None  # an earlier series wrote them
    for note in found.notes:
        out.note(note)
    if dry_run:
        with opened(out, kb, readonly=True) as base:
            return _dry(left_to_do(found, base, delete=delete) if resume else found, base, delete)
    with opened(out, kb, lock_timeout=lock_timeout, model=model, device=device, dtype=dtype) as base:
        training = training_arguments(
            base,
            steps=steps,
            seed=seed,
            min_reliability=min_reliability,
            max_drift=max_drift,
            max_ppl=max_ppl,
            min_erasure=min_erasure,
        )
        rest = left_to_do(found, base, delete=delete) if resume else found
        with _written(found, probes_to) as unwritten:
            if delete is None:
                outcomes = base.insert_many(rest, **series, **training)
            else:
                outcomes = base.delete_many(rest.keys(), mode=delete, **training)
    done = "inserted" if delete is None else "deleted"
    result = many_result(rest, outcomes, done=done, before=len(found) - len(rest))
    for sentence, kind in unwritten:
        result = _also_failed(result, sentence, kind)
    return replace(result, document=_about(found) | result.document, view=lambda: _with_notes(result.view(), found))


def _holds(path: Path, text: str) -> bool:
    """Say whether a plain file, and no link to one, holds exactly this text."""
    content = text.encode()
    try:
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


@contextlib.contextmanager
def _written(found: Found, probes_to: Path | None) -> Iterator[list[tuple[str, type[KvllmError]]]]:
    """Write the probes before minutes are spent on training; they get their name when it is over.

    Whoever is interrupted, or killed, can give the same command again. Where they cannot get their name, what was
    taught is not lost with it: the list that the block is given then holds the sentence, and what kind of error it is.
    """
    failed: list[tuple[str, type[KvllmError]]] = []
    if probes_to is None:
        yield failed
        return
    waiting = probes_to.with_name(f".{probes_to.name}.part")
    try:
        waiting.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{waiting} is in the way: {error.strerror}; nothing was changed. Remove it.") from error
    found.write_probes(waiting)
    try:
        yield failed
    except BaseException:
        waiting.unlink(missing_ok=True)
        raise
    try:
        if os.path.lexists(probes_to):  # since the training began
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.replace(waiting, probes_to)
    except OSError as error:
        where = f"; they lie in {waiting}" if waiting.exists() else ""
        sentence = f"The probes cannot be written to {probes_to}: {error.strerror}{where}."
        failed.append((sentence, unwritable(error)))


def _also_failed(result: Result, sentence: str, kind: type[KvllmError]) -> Result:
    """Return a result that also says what else went wrong; an exit code that it has already stays."""
    failure = sentence if result.failure is None else f"{result.failure} {sentence}"
    told = {"ok": False, "error": failure}
    if result.exit_code:
        return replace(result, document=result.document | told, failure=failure)
    told["code"] = kind.code
    return replace(result, document=result.document | told, exit_code=kind.exit_code, failure=failure)


def _dry(found: Found, base: KnowledgeBase, delete: DeleteMode | None) -> Result:
    """Say what would be inserted or deleted, and what would be refused."""
    from kvllm.reports import terminal

    rows: list[tuple[int, dict[str, Any]]] = []
    for item in found.items:
        live = item.fact.key in base
        error = ""
        if delete is None and live:
            error = f"The key {item.fact.key!r} exists already; it would be left unchanged."
        elif delete == "restore" and not live:
            error = (
                f"No live fact has the key {item.fact.key!r}; with --delete abstain it would be trained to a refusal."
            )
        said = {
            **place(item),
            "key": item.fact.key,
            "ok": not error,
            "error": error or None,
            "fact": item.fact.to_dict(),
        }
        rows.append((item.number, said))
    for row in found.refused:
        rows.append((row.number, {**place(row), "key": row.key, "ok": False, "error": row.error, "fact": None}))
    results = [said for _, said in sorted(rows, key=lambda row: row[0])]
    fine = sum(said["ok"] for said in results)
    verb = "insert" if delete is None else "delete"
    document = _about(found) | {
        "ok": fine == len(results),
        "dry_run": True,
        f"would_{verb}": fine,
        "would_refuse": len(results) - fine,
        "results": results,
    }
    if fine < len(results):
        document |= {"error": f"{len(results) - fine} of {len(results)} facts would be refused.", "code": "some_failed"}

    def view() -> RenderableType:
        shown = [
            (
                str(said["line"] or said.get("where", "")),
                said["key"],
                "" if said["fact"] is None else said["fact"]["text"],
                said["error"] or "",
            )
            for said in results
        ]
        return _with_notes(terminal.found_table(shown), found, f"Would {verb} {fine} of {len(results)} facts.")

    return Result(document, view, exit_code=0 if fine == len(results) else 4)


def _about(found: Found) -> dict[str, Any]:
    """Return what the file is, and what of it is no fact."""
    return {
        "ok": True,
        "file": found.path,
        "format": found.format,
        "sha256": found.sha256,
        "records": found.records,
        "probes": len(found.probes),
        "duplicates": [{**place(row), "key": row.key, "error": row.error} for row in found.duplicates],
        "refused_probes": [row.to_dict() for row in found.refused_probes],
        "notes": list(found.notes),
    }


def _with_notes(view: RenderableType | None, found: Found, *more: str) -> RenderableType:
    from rich.console import Group

    from kvllm.reports.terminal import inline

    lines = [f"{found.records} records read as {found.format}, {len(found.probes)} further questions.", *more]
    lines += [row.error for row in (*found.duplicates, *found.refused_probes)]
    lines += found.notes
    return Group(*([] if view is None else [view]), *(inline(line, "dim") for line in lines))


def _columns(given: Sequence[str]) -> dict[str, str]:
    """Return `--map` as fields and their columns."""
    columns: dict[str, str] = {}
    for pair in given:
        name, sign, column = pair.partition("=")
        if not sign or not column.strip():
            raise ConfigError(f"--map takes FIELD=COLUMN, like text=Answer, not {pair!r}; nothing was changed.")
        if name.strip() in columns:
            raise ConfigError(f"--map gives two columns for {name.strip()}; nothing was changed. Name one.")
        columns[name.strip()] = column.strip()
    return columns
