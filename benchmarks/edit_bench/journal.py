"""Finished pieces of a long run, a line of JSON each, so that a killed run goes on where it was.

The first line says what the run was: pieces of another configuration, model or state of the code are not mixed in. A
line that was cut off by a kill is dropped. Knows nothing of what it keeps.

    journal = Journal(Path("run.jsonl"), {"seed": 0})
    row = journal.get("zsre/7", "kvllm") or journal.put(measured(), "zsre/7", "kvllm")
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import ROOT


class OtherRun(Exception):
    """The file holds the pieces of a run with other settings."""


class Journal:
    """Rows by name, in memory and, if a path is given, in a file."""

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self.path = path
        self._rows: dict[tuple[str, ...], dict[str, Any]] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if not lines:
            self._append({"run": dict(run)})
            return
        earlier = json.loads(lines[0])["run"]
        other = sorted(name for name in {*earlier, *run} if earlier.get(name) != run.get(name))
        if other:
            raise OtherRun(
                f"{path.name} holds the pieces of a run that differs in {', '.join(other)}; nothing was measured. "
                f"Give another file, or remove it."
            )
        for line in lines[1:]:
            piece = json.loads(line)
            self._rows[tuple(piece["name"])] = piece["row"]

    @property
    def folder(self) -> Path | None:
        """Where a run's working state lies beside the file."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.work")

    def get(self, *name: str) -> dict[str, Any] | None:
        return self._rows.get(name)

    def put(self, row: Mapping[str, Any], *name: str) -> dict[str, Any]:
        """Keep a row, and return it as a later run will read it."""
        plain: dict[str, Any] = json.loads(json.dumps(row))
        self._rows[name] = plain
        if self.path is not None:
            self._append({"name": list(name), "row": plain})
        return plain

    def _append(self, piece: Mapping[str, Any]) -> None:
        assert self.path is not None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(piece, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> list[str]:
    """Return a file's lines, and cut off one that has no end."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return whole.decode("utf-8").splitlines()


def code_digest() -> str:
    """Return the sha256 over the sources of kvllm and of these benchmarks: other code, another run."""
    digest = hashlib.sha256()
    scripts = [*(ROOT / "benchmarks").glob("edit_*.py"), *(ROOT / "benchmarks" / "edit_bench").glob("*.py")]
    for path in sorted([*(ROOT / "kvllm").rglob("*.py"), *(ROOT / "kvllm").rglob("*.jsonl"), *scripts]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\x00" + path.read_bytes())
    return digest.hexdigest()
