"""What the hostile campaigns share: a blocked network, a trap for code that runs, a look at files, one-sentence errors.

with no_network(), Trap(tmp_path) as trap: ...      # fails if a socket was opened or the trap's code ran
"""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from kvllm.errors import KvllmError

T = TypeVar("T")


@contextmanager
def no_network() -> Iterator[None]:
    """Refuse every connection and look-up, and fail if there was one, also where the caller swallowed the error."""
    tried: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(repr(arguments[:2]))
        raise OSError("the network is blocked in this test")

    with (
        mock.patch.object(socket.socket, "connect", refuse),
        mock.patch.object(socket.socket, "connect_ex", refuse),
        mock.patch.object(socket.socket, "sendto", refuse),
        mock.patch.object(socket, "getaddrinfo", refuse),
        mock.patch.object(socket, "create_connection", refuse),
    ):
        yield
    assert not tried, tried


class _Makes:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        import os

        return os.makedirs, (self.folder,)


class Trap:
    """Code in every form that leaves a folder behind if it runs; leaving the block asserts that it did not."""

    def __init__(self, place: Path) -> None:
        self.sprung = place / "the-trap-was-sprung"

    def pickle(self, protocol: int = 4) -> bytes:
        return pickle.dumps(_Makes(str(self.sprung)), protocol)

    @property
    def python(self) -> str:
        return f"import os\nos.makedirs({str(self.sprung)!r})\n"

    def __enter__(self) -> Trap:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            assert not self.sprung.exists(), "hostile code was run"


def one_sentence(said: str) -> bool:
    """Say whether an error is one line that begins and ends as a sentence (or begins with a path)."""
    return bool(said) and "\n" not in said and (said[0].isupper() or said[0] in "/'") and said.endswith((".", "?"))


def tree(folder: Path) -> dict[str, str]:
    """Return relative name to content hash (or link target, or "folder") of everything under a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
    return found


def attempt(action: Callable[[], T]) -> tuple[T | None, KvllmError | None]:
    """Return what the action returned, or the error that refused it in one sentence; any other exception passes on."""
    result, refusal = None, None
    try:
        result = action()
    except KvllmError as error:
        refusal = error
    assert refusal is None or one_sentence(str(refusal)), str(refusal)
    return result, refusal


def refused(action: Callable[[], object], name: str) -> KvllmError:
    """Return the error that must refuse the action in one sentence; `name` says which case was accepted instead."""
    _, error = attempt(action)
    assert error is not None, f"accepted: {name}"
    return error
