"""Hashes that identify a model: of one file, and of a set of named files. Standard library only.

The identity of a base model (`files_digest`) covers every file that decides what the model says: weights, index,
tokenizer and chat template, and the JSON configurations; not the licence, the readme or kvllm's own manifest.

    files_digest({"config.json": "ab…", "model.safetensors": "cd…"})  # 64 hex digits, independent of the order
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

CHUNK = 1 << 20


def file_sha256(path: Path | str, *, progress: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file's bytes as 64 hex digits.

    Args:
        path: The file.
        progress: Called with the number of bytes read since the last call.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def files_digest(files: Mapping[str, str]) -> str:
    """Return one sha256 for a set of files, whatever the order they are given in.

    It is the sha256 of the lines "<sha256>  <name>\\n" in the order of the names (code points), encoded as UTF-8: what
    `LC_ALL=C sha256sum $(ls | sort) | sha256sum` prints.

    Args:
        files: Relative name (with forward slashes) to the file's sha256.
    """
    lines = "".join(f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()
