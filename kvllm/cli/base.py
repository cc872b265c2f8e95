"""Commands about a whole knowledge base: make it, check it, ship it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvllm.cli.app import BASE, app
from kvllm.cli.command import Device, Dtype, LockTimeout, Model, Store, command, opened
from kvllm.cli.output import Output, Result


@command(app, panel=BASE)
def init(out: Output, kb: Store, model: Model = None, device: Device = None, dtype: Dtype = None) -> Result:
    """Make an empty knowledge base on a base model; the model is downloaded if need be.

    The dtype stays with it. A device is only checked: every command chooses its own.

    kvllm init my.kb --model smollm2-135m-instruct
    """
    from kvllm.knowledge_base import KnowledgeBase
    from kvllm.reports import terminal

    settings = {"model": model, "device": device, "dtype": dtype}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    with KnowledgeBase.create(kb, progress=out.progress, **given) as base:
        info = base.info()
    return Result({"ok": True, "path": str(kb), "info": info}, lambda: terminal.mapping_view(info))


@command(app, panel=BASE)
def verify(
    out: Output,
    kb: Store,
    deep: Annotated[
        bool, typer.Option("--deep", help="Re-read every byte and replay the weights too; loads the model.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="First restore what can be restored; gives up nothing that was committed.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --repair: give up damaged edits too where nothing else helps.")
    ] = False,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    lock_timeout: LockTimeout = 10.0,
) -> Result:
    """Check that rows, files and hashes agree; the exit code is 8 where they do not.

    Where they do, and another version of kvllm stored a configuration that this one does not know, it is 5.

    kvllm verify my.kb --deep
    """
    from kvllm.errors import ConfigError, Corrupt, StoreError
    from kvllm.knowledge_base import KnowledgeBase
    from kvllm.reports import terminal

    if yes and not repair:
        raise ConfigError("--yes belongs to --repair; nothing was changed.")
    repaired = None
    if repair:
        repaired = KnowledgeBase.check(kb, repair=True, yes=yes, lock_timeout=lock_timeout)
    if repaired is not None and not (deep and repaired.ok):
        report = repaired
    else:
        try:
            with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
                report = base.verify(deep=deep)
        except Corrupt:  # too damaged to be opened: then what is wrong is the answer
            report = KnowledgeBase.check(kb, deep=deep)
        if repaired is not None:
            report = replace(report, repairs=repaired.repairs)
    document = {"ok": report.ok, "verify": report.to_dict()}
    if report.ok:
        return Result(document, lambda: terminal.verify_view(report))
    codes = [problem.code for problem in report.problems if problem.severity == "error"]
    kind = StoreError if codes and Corrupt.code not in codes else Corrupt
    document |= {"error": f"The knowledge base has {len(codes)} problem{'s' if len(codes) != 1 else ''}."}
    document |= {"code": kind.code}
    return Result(document, lambda: terminal.verify_view(report), exit_code=kind.exit_code)


@command(app, panel=BASE)
def export(
    out: Output,
    kb: Store,
    folder: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to write; for facts a file, - is stdout.", show_default=False),
    ],
    format: Annotated[
        Literal["hf", "peft", "facts"],
        typer.Option(
            "--format",
            help="hf: the whole merged model; peft: one LoRA adapter; facts: the live facts as JSONL, for import.",
        ),
    ],
    max_shard_size: Annotated[
        str | None,
        typer.Option("--max-shard-size", help="hf: largest weight file (default: 2GB).", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="hf: of the written weights; the base's by default.", show_default=False),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not re-load and re-ask the export.")] = False,
    model: Model = None,
    device: Device = None,
) -> Result:
    """Write the edited model for other tools; it is re-loaded and asked before the command says ok. Or only the facts.

    kvllm export my.kb out --format hf
    """
    from kvllm.errors import ConfigError
    from kvllm.reports import terminal

    given = {"dtype": dtype, "max_shard_size": max_shard_size}
    written: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if format != "hf" and written:
        name = "--" + next(iter(written)).replace("_", "-")
        raise ConfigError(f"{name} is for --format hf, not for {format}; nothing was written. Leave it out.")
    if format == "facts" and str(folder) == "-":
        from kvllm.importing import fact_to_row, facts_to_jsonl

        with opened(out, kb, readonly=True) as base:
            facts = base.facts()
        if not facts:
            raise ConfigError("The knowledge base holds no fact; nothing was written.")
        text = facts_to_jsonl(facts)
        return Result({"ok": True, "facts": [fact_to_row(fact) for fact in facts]}, lambda: None, raw=text)

    with opened(out, kb, readonly=True, model=model, device=device) as base:
        result = base.export(folder, format=format, verify=not no_verify, **written)
    return Result({"ok": True, "export": result.to_dict()}, lambda: terminal.export_view(result))
