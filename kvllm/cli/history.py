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
    move: Annotated[bool, typer.Option("--move", help="Take the name from the edit that has it.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the name; the edit stays.")] = False,
    lock_timeout: LockTimeout = 10.0,
) -> Result:
    """Give an edit a name, move or remove one, or list the names.

    kvllm tag my.kb v1
    """
    from kvllm.errors import ConfigError
    from kvllm.reports import terminal

    if name is None and (move or remove):
        raise ConfigError(f"{'--move' if move else '--remove'} needs the NAME of a tag; nothing was changed.")
    if remove and (move or edit is not None):
        other = "--move" if move else f"the edit {edit}"
        raise ConfigError(f"--remove takes a tag away, and {other} says where to put one; nothing was changed.")
    if name is None:
        with opened(out, kb, readonly=True) as base:
            tags = dict(base.tags())
        return Result({"ok": True, "tags": tags}, lambda: terminal.tags_table(tags))
    with opened(out, kb, lock_timeout=lock_timeout) as base:
        if remove:
            edit_id = base.untag(name)
            said = f"removed the tag {name}, which pointed to edit {edit_id}"
            return Result({"ok": True, "tag": name, "edit": edit_id, "removed": True}, lambda: terminal.inline(said))
        edit_id = base.tag(name, None if edit is None else reference(edit), move=move)
    return Result({"ok": True, "tag": name, "edit": edit_id}, lambda: terminal.tags_table({name: edit_id}))
