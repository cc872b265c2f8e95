"""Cache files that are whole or absent: written beside, renamed, and checked by hash when read.

A cache is never the only copy of anything: a reader that gets None computes the content again, and a full disk costs
the cache, not the work. Standard library only.

    write_checked(path, data); read_checked(path)     # data, or None if missing or damaged
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def read_checked(path: Path) -> bytes | None:
    """Return the file's bytes where they fit the hash recorded beside it, else None."""
    try:
        data = path.read_bytes()
        recorded = _hash_path(path).read_text().strip()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == recorded else None


def write_checked(path: Path, data: bytes) -> bool:
    """Write the file and its hash; return whether that worked. Two writers of the same content do no harm."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
        _replace(_hash_path(path), hashlib.sha256(data).hexdigest().encode())
    except OSError:
        return False
    return True


def _hash_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _replace(target: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
