"""Folders of bytes that are either whole or absent.

Write to a temporary name, fsync every file, fsync the folder, rename, fsync the parent: after a power cut a reader
finds the complete folder or none. Knows nothing of SQLite, of tensors, or of what the bytes mean.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

INCOMING = ".incoming-"
_CHUNK = 1 << 20
_NOT_A_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


def sha256_of(content: bytes) -> str:
    """Return the hex sha256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def sha256_of_file(path: Path) -> tuple[str, int]:
    """Return the hex sha256 and the size of a file, read in pieces; a symbolic link is refused (OSError)."""
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as handle:
        while chunk := os.read(handle.fd, _CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


class open_regular:
    """A file descriptor for reading that never follows a link: `with open_regular(path) as f: os.read(f.fd, n)`."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY
        for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NONBLOCK"):  # the last: a pipe must not hold us up
            flags |= getattr(os, name, 0)
        self.fd = os.open(path, flags)

    def __enter__(self) -> open_regular:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def read_regular(path: Path, *, limit: int | None = None) -> bytes:
    """Return a file's bytes; a symbolic link is refused (OSError), and no more than `limit` + 1 bytes are read."""
    parts, size = [], 0
    with open_regular(path) as handle:
        while chunk := os.read(handle.fd, _CHUNK):
            parts.append(chunk)
            size += len(chunk)
            if limit is not None and size > limit:
                break
    return b"".join(parts)


def is_no_file(error: OSError) -> bool:
    """Say whether a read failed because no plain file is there; other errors say nothing about what is on the disk."""
    return error.errno in _NOT_A_FILE


def fsync_fd(fd: int) -> None:
    """Flush one open file to the disk itself."""
    if sys.platform == "darwin":  # fsync only reaches the drive's cache there
        import fcntl

        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def fsync_folder(folder: Path) -> None:
    """Make the names inside a folder durable; Windows has no such call."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        fsync_fd(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and fsync it. A failed fsync is never retried: the kernel may have dropped the pages."""
    with open(path, "xb") as handle:
        handle.write(content)
        handle.flush()
        fsync_fd(handle.fileno())


def copy_durably(source: Path, path: Path) -> tuple[str, int]:
    """Copy a file, fsync the copy, and return sha256 and size of what was written."""
    digest, size = hashlib.sha256(), 0
    with open(source, "rb") as read, open(path, "xb") as handle:
        while chunk := read.read(_CHUNK):
            handle.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        handle.flush()
        fsync_fd(handle.fileno())
    return digest.hexdigest(), size


def incoming_name(parent: Path) -> Path:
    """Return an unused temporary name inside `parent`; the process id is for the person who finds it."""
    return parent / f"{INCOMING}{os.getpid()}-{secrets.token_hex(6)}"


def write_folder(parent: Path, files: Mapping[str, bytes], *, reached: Callable[[str], None]) -> Path:
    """Write files into a new temporary folder inside `parent`, durable, not yet renamed.

    Args:
        parent: Where the folder will live.
        files: File name to content.
        reached: Called with "written" and "synced".

    Returns:
        The temporary folder; removed again if anything fails.
    """
    folder = incoming_name(parent)
    try:
        folder.mkdir()
        for name, content in sorted(files.items()):
            write_durably(folder / name, content)
        reached("written")
        fsync_folder(folder)
        reached("synced")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def sweep(parent: Path) -> None:
    """Remove temporary folders that a killed writer left; only to be called by the holder of the writer lock."""
    try:
        stale = [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(INCOMING)]
    except FileNotFoundError:
        return
    for path in stale:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a folder or a file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
