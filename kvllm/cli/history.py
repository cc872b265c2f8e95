"""Commands that read the ledger's edits, and name them. No model is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from kvllm.cli.app import HISTORY, app
from kvllm.cli.command import LockTimeout, Reference, Store, command, opened, reference
from kvllm.cli.output import Output, Result


@command(app, panel=HISTORY)
def history(
    out: Output,
    kb: Store,
    number: Annotated[
        int | None, typer.Option("--number", "-n", min=1, help="Only the newest so many.", show_default=False)
    ] = None,
) -> Result:
    """List the edits, newest first.

    kvllm history my.kb -n 10
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=True) as base:
        edits = base.history(limit=number)
    return Result(
        lambda: {"ok": True, "edits": [edit.to_dict() for edit in edits]}, lambda: terminal.history_table(edits)
    )


@command(app, panel=HISTORY)
def show(out: Output, kb: Store, edit: Reference) -> Result:
    """Show one edit with everything that was measured before it was committed.

    kvllm show my.kb 3
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=True) as base:
        found = base.edit(reference(edit))
    return Result({"ok": True, "edit": found.to_dict()}, lambda: terminal.edit_view(found, full=True))


@command(app, panel=HISTORY)
def tag(
    out: Output,
    kb: Store,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The tag; none: list all.", show_default=False)
    ] = None,
    edit: Annotated[
        str | None,
        typer.Argument(metavar="EDIT|TAG", help="What it points to; the head by default.", show_default=False),
    ] = None,
    lock_timeout: LockTimeout = 10.0,
) -> Result:
    """Give an edit a name, or list the names.

    kvllm tag my.kb v1
    """
    from kvllm.reports import terminal

    if name is None:
        with opened(out, kb, readonly=True) as base:
            tags = dict(base.tags())
        return Result({"ok": True, "tags": tags}, lambda: terminal.tags_table(tags))
    with opened(out, kb, lock_timeout=lock_timeout) as base:
        edit_id = base.tag(name, None if edit is None else reference(edit))
    return Result({"ok": True, "tag": name, "edit": edit_id}, lambda: terminal.tags_table({name: edit_id}))
