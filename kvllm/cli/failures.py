"""Every way to fail, as a sentence, a machine-readable code and an exit code (DESIGN.md, section 7).

describe(KeyNotFound("No fact has the key 'x'."))   # Failure(sentence="No fact …", code="key_not_found", exit_code=3)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import typer

from kvllm.cli import signals
from kvllm.errors import ConfigError, EditRejected, KvllmError, OutOfResources
from kvllm.records import Record

# typer carries its own copy of click since 0.26 and used the package before: the classes are reached through typer.
_CLICK_EXCEPTION: type[BaseException] = typer.BadParameter.__mro__[2]
_FULL = {errno.ENOSPC, errno.ENOMEM, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FULL_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "no space left on device", "disk is full")


def unwritable(error: OSError) -> type[KvllmError]:
    """Return what kind of error it is that a file of the user's cannot be written."""
    return OutOfResources if error.errno in _FULL else ConfigError


class Interrupted(KvllmError):
    """Ctrl-C or SIGTERM."""

    code = "interrupted"
    exit_code = 130


class CannotPrint(KvllmError):
    """The command did its work, and stdout refused the result."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"The result cannot be printed ({error.strerror}); what the command did is done.")
        if error.errno in _FULL:
            self.code, self.exit_code = "out_of_resources", 10


@dataclass(frozen=True)
class Failure:
    """What is told about an error.

    Attributes:
        sentence: For people.
        code: For programs.
        exit_code: For shells.
        attached: Data that travelled with the error: report, suggestions, matches, usage.
        expected: Whether kvllm raised it on purpose; otherwise a traceback helps.
    """

    sentence: str
    code: str
    exit_code: int
    attached: dict[str, Any] = field(default_factory=dict)
    expected: bool = True

    def document(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {"ok": False, "error": self.sentence, "code": self.code, **self.attached}


def describe(error: BaseException) -> Failure:
    """Return what to tell about an error; the type decides, its attributes travel along."""
    if signals.came() and not isinstance(error, Interrupted):
        # Whatever it says, it is what became of the interruption on its way up.
        return Failure(signals.sentence(), Interrupted.code, Interrupted.exit_code)
    if isinstance(error, KvllmError):
        return Failure(str(error), error.code, error.exit_code, _attached(error))
    if isinstance(error, _CLICK_EXCEPTION):
        return _usage(error)
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Failure(signals.sentence(), Interrupted.code, Interrupted.exit_code)
    if any(_is_full(link) for link in _chain(error)):
        sentence = (
            f"The disk or the memory is full ({_one_line(error)}); an edit that was running changed nothing. "
            "Free some and try again."
        )
        return Failure(sentence, "out_of_resources", 10)
    sentence = f"Unexpected {type(error).__name__}: {_one_line(error)}."
    return Failure(sentence.replace("..", "."), "unexpected", 1, expected=False)


def _attached(error: KvllmError) -> dict[str, Any]:
    attached: dict[str, Any] = {}
    for name, value in vars(error).items():
        if name.startswith("_") or name in ("code", "exit_code") or not value:
            continue
        if isinstance(error, EditRejected) and name == "report" and error.report is not None:
            # The shape of `edit.to_dict()`: metrics under `report`, the questions beside them.
            attached["report"] = {metric: found.to_dict() for metric, found in error.report.metrics.items()}
            attached["probes"] = [probe.to_dict() for probe in error.report.probes]
        elif isinstance(value, (tuple, list)):
            attached[name] = [item.to_dict() if isinstance(item, Record) else item for item in value]
        else:
            attached[name] = value.to_dict() if isinstance(value, Record) else value
    return attached


def _usage(error: Any) -> Failure:
    context = getattr(error, "ctx", None)
    attached = {"usage": " ".join(context.get_usage().removeprefix("Usage: ").split())} if context is not None else {}
    return Failure(" ".join(error.format_message().split()), "usage", 2, attached)


def _is_full(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return True
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    # torch's CPU allocator, safetensors and SQLite have only words for it.
    return any(words in str(error).lower() for words in _FULL_WORDS) and not isinstance(error, (ValueError, TypeError))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or "no message"
    return words if len(words) <= 300 else words[:297] + "…"
