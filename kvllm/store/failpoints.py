"""Named places where a test may stop the store, as a crash would.

Every step that changes the disk calls `failpoint("commit.delta.renamed")` or the like; without a hook that does
nothing. A kill campaign sets `failpoints.hook` to a function that raises, or that ends its own process. No environment
variable and no configuration reaches it, so a shipped store cannot be stopped from outside.
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None

NAMES = (
    "create.folder",
    "create.ledger.built",
    "create.ledger.renamed",
    "create.done",
    "commit.begin",
    "commit.delta.written",
    "commit.delta.synced",
    "commit.delta.renamed",
    "commit.delta.folder_synced",
    "commit.delta.verified",
    "commit.transaction.begun",
    "commit.transaction.inserted",
    "commit.transaction.committed",
    "tag.inserted",
    "tag.removed",
    "tag.committed",
    "snapshot.written",
    "snapshot.renamed",
    "snapshot.committed",
    "gc.forgotten",
    "gc.removed",
    "backup.ledger",
    "backup.deltas",
    "backup.synced",
    "backup.renamed",
    "backup.done",
    "repair.deltas.prepared",
    "repair.delta.aside",
    "repair.built",
    "repair.renamed",
    "repair.cut",
)


def failpoint(name: str) -> None:
    """Tell the hook, if there is one, that this step has been reached."""
    if hook is not None:
        hook(name)
