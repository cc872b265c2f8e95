"""Commands that look after a knowledge base's folder: copy it, free what nobody needs. No model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.app import BASE, app
from kvllm.cli.command import LockTimeout, Store, command, opened
from kvllm.cli.output import Output, Result


@command(app, panel=BASE)
def backup(
    out: Output,
    kb: Store,
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="The folder to make: new, or empty.", show_default=False)
    ],
) -> Result:
    """Copy a knowledge base as it is at one moment, also while another process writes; the copy is verified.

    kvllm backup my.kb my-backup.kb
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=True) as base:
        result = base.backup(target)
    return Result({"ok": True, "backup": result.to_dict()}, lambda: terminal.mapping_view(result.to_dict()))


@command(app, panel=BASE)
def gc(
    out: Output,
    kb: Store,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    lock_timeout: LockTimeout = 10.0,
) -> Result:
    """Remove what no history needs: deltas of no edit, temporary files, old snapshots.

    kvllm gc my.kb --dry-run
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=dry_run, lock_timeout=lock_timeout) as base:
        report = base.gc(dry_run=dry_run)
    return Result({"ok": True, "gc": report.to_dict()}, lambda: terminal.gc_view(report))
