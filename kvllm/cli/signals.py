"""Ctrl-C and SIGTERM: raised as KeyboardInterrupt, and remembered.

Remembered, because what is being imported or loaded at that moment may swallow the exception, or turn it into one that
blames something else. Knows no command and no knowledge base.

    with watched():
        ...
        check()     # raises, where a signal came and nobody passed it on
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTHING_CHANGED = "Interrupted; nothing was changed."


class _State:
    came = False
    sentence = _NOTHING_CHANGED


@contextmanager
def watched(*, last: bool = False) -> Iterator[None]:
    """Turn both signals into KeyboardInterrupt while this is open.

    Args:
        last: Nothing comes after this but the interpreter's exit, which takes a second: a signal no longer counts then.
    """
    _State.came, _State.sentence = False, _NOTHING_CHANGED
    try:
        before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    except ValueError:  # not the main thread: signals are somebody else's business
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last else handler)


def ignore() -> None:
    """Let signals pass from now on: the command has done its work and said so."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _interrupt:
            signal.signal(number, signal.SIG_IGN)


def came() -> bool:
    """Say whether a signal came."""
    return _State.came


def check() -> None:
    """Raise KeyboardInterrupt where a signal came."""
    if _State.came:
        raise KeyboardInterrupt


def done(edits: str) -> None:
    """Remember what was committed, for whoever is interrupted after it."""
    _State.sentence = f"Interrupted; {edits} had been committed before and stay, anything later changed nothing."


def sentence() -> str:
    """Return what an interruption left behind."""
    return _State.sentence


def _interrupt(number: int, frame: FrameType | None) -> None:
    _State.came = True
    raise KeyboardInterrupt
