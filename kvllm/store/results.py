"""The results database of an experiment: which steps are finished, and the rows they gave. One SQLite file.

A step and its rows come in one transaction, so that whoever is killed has finished a step or has not begun it. Several
processes may write. It knows no experiment: rows are plain data, told apart by their `kind`.

    with Results("out/results.db") as results:
        results.open_experiment({"name": "injection"}, digest="ab…")
        results.finish("sequential-0", "edit-0001", [{"kind": "edit", "seconds": 12.5}], seconds=12.9)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from kvllm.errors import Corrupt, StoreError
from kvllm.store.lock import WriterLock
from kvllm.store.sqlite import connect, translated

SCHEMA = 1


class Results:
    """One open results database."""

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        """Open the file, or make it.

        Raises:
            StoreError: it is not there (readonly), cannot be opened, or is of a newer version.
            Corrupt: it is no results database.
        """
        self.path = Path(path)
        self._lock = WriterLock(self.path.with_name("LOCK"))
        if readonly and not self.path.exists():
            raise StoreError(f"There are no results at {self.path.parent}; run the experiment first.")
        if not readonly:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._translated("Opening the results"):
            self._connection = connect(self.path, readonly=readonly, create=not readonly)
        try:
            self._check(readonly)
        except BaseException:
            self._connection.close()
            raise

    def _check(self, readonly: bool) -> None:
        with self._translated("Opening the results"):
            if not readonly:
                self._create_tables()
            found = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            if not {"meta", "steps", "rows"} <= found:
                raise Corrupt(f"{self.path} is no results database; nothing was changed. Give another folder.")
            version = self._meta("schema")
        if version is not None and version > SCHEMA:
            raise StoreError(f"The results at {self.path} were made by a newer kvllm; nothing was changed.")

    def _translated(self, doing: str) -> AbstractContextManager[None]:
        return translated(self.path.parent, doing, file=self.path.name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Keep all that is written in the block, or nothing of it."""
        with self._translated("Writing the results"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _create_tables(self) -> None:
        import sqlite_utils

        database = sqlite_utils.Database(self._connection)
        if {"meta", "steps", "rows"} <= set(database.table_names()):
            return
        database["meta"].create({"name": str, "value": str}, pk="name", if_not_exists=True)  # type: ignore[union-attr]
        database["steps"].create(  # type: ignore[union-attr]
            {"run": str, "step": str, "seconds": float}, pk=("run", "step"), if_not_exists=True
        )
        database["rows"].create(  # type: ignore[union-attr]
            {"run": str, "step": str, "place": int, "kind": str, "data": str},
            pk=("run", "step", "place"),
            foreign_keys=(),
            if_not_exists=True,
        )
        self._set_meta("schema", SCHEMA)

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and give the lock back if it was taken."""
        self._lock.release()
        self._connection.close()

    def take(self, *, timeout: float = 0.0) -> None:
        """Take the experiment for this process: two may not lead it at once.

        Raises:
            Busy: another process leads it.
        """
        self._lock.acquire(timeout=timeout)

    # ------------------------------------------------------------------ the experiment

    def open_experiment(self, declared: Mapping[str, Any], *, digest: str) -> None:
        """Note what is being run; results of another declaration are refused, never mixed.

        Raises:
            StoreError: the folder holds the results of another declaration.
        """
        self.refuse_other(digest)
        if self._meta("digest") is None:
            with self._writing():
                self._set_meta("declared", dict(declared))
                self._set_meta("digest", digest)

    def refuse_other(self, digest: str) -> None:
        """Refuse results of another declaration.

        Raises:
            StoreError: these are.
        """
        if self._meta("digest") not in (None, digest):
            raise StoreError(
                f"The folder {self.path.parent} holds results of another declaration (or of other facts); nothing was "
                f"changed. Give another folder."
            )

    def declared(self) -> dict[str, Any]:
        """Return the declaration that the results belong to."""
        found = self._meta("declared")
        return dict(found) if found else {}

    def note(self, name: str, value: Any) -> None:
        """Keep something about the experiment as a whole, replacing what was noted under the name."""
        with self._translated("Writing the results"):
            self._set_meta(f"note/{name}", value)

    def noted(self, name: str) -> Any:
        """Return what was noted under a name, or None."""
        return self._meta(f"note/{name}")

    # ------------------------------------------------------------------ steps and rows

    def finish(self, run: str, step: str, rows: Sequence[Mapping[str, Any]], *, seconds: float) -> None:
        """Keep a finished step with its rows; a step that is there already stays as it is."""
        with self._writing():
            fresh = self._connection.execute(
                "INSERT OR IGNORE INTO steps (run, step, seconds) VALUES (?, ?, ?)", (run, step, seconds)
            ).rowcount
            if fresh:
                self._connection.executemany(
                    "INSERT INTO rows (run, step, place, kind, data) VALUES (?, ?, ?, ?, ?)",
                    [
                        (run, step, place, str(row["kind"]), json.dumps(dict(row), ensure_ascii=False))
                        for place, row in enumerate(rows)
                    ],
                )

    def forget(self, run: str) -> None:
        """Take a run's steps and rows away, so that it begins anew."""
        with self._writing():
            for table in ("rows", "steps"):
                self._connection.execute(f"DELETE FROM {table} WHERE run = ?", (run,))

    def finished(self, run: str | None = None) -> dict[str, set[str]]:
        """Return the finished steps by run."""
        found: dict[str, set[str]] = {}
        with self._translated("Reading the results"):
            for name, step in self._connection.execute("SELECT run, step FROM steps ORDER BY rowid"):
                if run is None or name == run:
                    found.setdefault(name, set()).add(step)
        return found

    def seconds(self) -> dict[tuple[str, str], float]:
        """Return how long each finished step took."""
        with self._translated("Reading the results"):
            told = self._connection.execute("SELECT run, step, seconds FROM steps")
            return {(run, step): seconds for run, step, seconds in told}

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows, each with its run and step, in an order that does not depend on who was faster."""
        with self._translated("Reading the results"):
            return [
                {"run": run, "step": step, **json.loads(data)}
                for run, step, data in self._connection.execute(
                    "SELECT run, step, data FROM rows ORDER BY run, step, place"
                )
            ]

    def _meta(self, name: str) -> Any:
        found = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def _set_meta(self, name: str, value: Any) -> None:
        self._connection.execute(
            "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, json.dumps(value, ensure_ascii=False)),
        )
