"""Every error kvllm raises on purpose.

One sentence each: what was asked, what is so, what was left unchanged, what to do next. Data travels as attributes,
never encoded in the text. `code` is the machine-readable name that `--json` prints, `exit_code` what a shell sees
(DESIGN.md, section 7). This module knows nothing of models, stores or terminals.

    raise KeyNotFound("No fact has the key 'torchkera'.", key="torchkera", suggestions=("torchkeras",))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvllm.records import Report


class KvllmError(Exception):
    """Base class; catch it to catch everything kvllm raises on purpose."""

    code = "error"
    exit_code = 1


class ConfigError(KvllmError):
    """An argument, option or input value that cannot be used as given."""

    code = "invalid_input"
    exit_code = 2


class KeyNotFound(KvllmError, KeyError):
    """No live fact has the key."""

    code = "key_not_found"
    exit_code = 3

    def __init__(self, message: str, *, key: str = "", suggestions: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.key = key
        self.suggestions = tuple(suggestions)

    def __str__(self) -> str:  # KeyError would show the repr of the sentence
        return str(self.args[0]) if self.args else ""


class EditNotFound(KvllmError):
    """No edit or tag has the name."""

    code = "edit_not_found"
    exit_code = 3


class KeyExists(KvllmError):
    """The key is already live (insert), or the tag already taken."""

    code = "key_exists"
    exit_code = 3

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class AmbiguousKey(KvllmError):
    """The name matches several keys or edits; `matches` lists them."""

    code = "ambiguous_key"
    exit_code = 3

    def __init__(self, message: str, *, matches: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.matches = tuple(matches)


class EditFailed(KvllmError):
    """Training could not finish (a non-finite number, no trainable module), or an export answers differently.

    The knowledge base is unchanged; such an export stays where it is, for inspection.
    """

    code = "edit_failed"
    exit_code = 4


class EditRejected(KvllmError):
    """The gate refused the edit; `report` carries what was measured. Nothing was changed."""

    code = "edit_rejected"
    exit_code = 4

    def __init__(self, message: str, *, report: Report | None = None, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.report = report
        self.reasons = tuple(reasons)


class ModelError(KvllmError):
    """A model's name cannot be resolved to files, its files cannot be used, or its weights were changed by hand."""

    code = "model_error"
    exit_code = 5


class OutOfResources(KvllmError):
    """The disk or the memory is full. Nothing was changed."""

    code = "out_of_resources"
    exit_code = 10


_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "could not create a primitive",  # oneDNN's
    "failed to map segment",  # the dynamic linker's, behind a late import
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error of any library means that the memory is full.

    torch's CPU allocator has only words for it, in a plain RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, ImportError, OSError)) and any(
        words in str(error).lower() for words in _MEMORY_WORDS
    )


class StoreError(KvllmError):
    """The folder is not a knowledge base that this version can open."""

    code = "store_error"
    exit_code = 5


class StoreNotFound(StoreError):
    """There is no knowledge base at the path."""

    code = "store_not_found"
    exit_code = 2


class Busy(StoreError):
    """Another process is writing to the knowledge base."""

    code = "busy"
    exit_code = 7


class StaleHead(StoreError):
    """The head moved while the edit was being made; it was not committed."""

    code = "stale_head"
    exit_code = 7


class Corrupt(StoreError):
    """Rows, files and hashes of the knowledge base disagree."""

    code = "store_corrupt"
    exit_code = 8


class BaseMismatch(StoreError):
    """The base model's files are not those that the knowledge base was made on."""

    code = "base_mismatch"
    exit_code = 9


class Untrusted(StoreError):
    """An artefact (delta, adapter, model folder) contains what it must not contain."""

    code = "untrusted"
    exit_code = 5


# What refuses one fact of many and says nothing about the next; any other error would meet the next one as well.
OF_ONE_FACT = (ConfigError, KeyExists, KeyNotFound, EditRejected, EditFailed)


def ending_error(code: str | None) -> type[KvllmError] | None:
    """Return the class of an error that ended a series of edits; None for no error, or one of a single fact."""
    if code is None or code in {error.code for error in OF_ONE_FACT}:
        return None
    known: list[type[KvllmError]] = [KvllmError]
    for error in known:
        known += error.__subclasses__()
    return next((error for error in known if error.code == code), KvllmError)
