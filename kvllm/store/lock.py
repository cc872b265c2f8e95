"""The writer lock: one process at a time trains and commits.

An advisory exclusive lock on the file LOCK, which the kernel releases when the process dies, however it dies. Readers
never take it. The file's text (the holder's process id) is only a hint for the message that others see.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvllm.errors import Busy

if sys.platform != "win32":
    import fcntl

_POLL_SECONDS = 0.05


class WriterLock:
    """Re-entrant within one object, exclusive between objects and processes.

    lock = WriterLock(Path("my.kb/LOCK")); lock.acquire(timeout=5.0); …; lock.release()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._depth = 0
        self._held: Any = None  # a file descriptor, or filelock's object on Windows
        self._mutex = threading.Lock()

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._depth > 0

    def acquire(self, *, timeout: float) -> None:
        """Take the lock, waiting up to `timeout` seconds.

        Raises:
            Busy: Another process (or another Store object) still holds it; its process id is named if known.
        """
        with self._mutex:
            if self._depth == 0:
                self._held = self._lock(timeout)
            self._depth += 1

    def release(self) -> None:
        """Give the lock back when the outermost holder is done."""
        with self._mutex:
            if self._depth == 0:
                return
            self._depth -= 1
            if self._depth:
                return
            held, self._held = self._held, None
            self._unlock(held)

    if sys.platform != "win32":

        def _lock(self, timeout: float) -> int:
            # flock, not lockf: closing another descriptor of the file must not drop it. Never O_TRUNC: a waiter would
            # erase the holder's name.
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                deadline = time.monotonic() + timeout
                while True:
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except (BlockingIOError, PermissionError):
                        if time.monotonic() >= deadline:
                            raise self._busy(self._hint(fd), timeout) from None
                        time.sleep(_POLL_SECONDS)
                try:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                except OSError:
                    pass  # a full disk must not stop a rollback; the text is only a hint
            except BaseException:
                os.close(fd)
                raise
            return fd

        def _unlock(self, fd: int) -> None:
            try:
                os.ftruncate(fd, 0)
            except OSError:
                pass  # the text is only a hint
            os.close(fd)  # closing the last descriptor releases the lock

        @staticmethod
        def _hint(fd: int) -> str:
            """Return the process id written in the lock file, if it looks like one."""
            text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            return text if text.isdigit() else ""

    else:

        def _lock(self, timeout: float) -> Any:
            import filelock

            lock = filelock.FileLock(self.path)
            try:
                lock.acquire(timeout=timeout, poll_interval=_POLL_SECONDS)
            except filelock.Timeout:
                raise self._busy("", timeout) from None
            return lock

        def _unlock(self, lock: Any) -> None:
            lock.release()

    def _busy(self, holder: str, timeout: float) -> Busy:
        who = f"process {holder}" if holder else "another process"
        return Busy(
            f"{self.path.parent} is being written by {who} (waited {timeout:g} s); nothing was changed, "
            "try again when it has finished."
        )
