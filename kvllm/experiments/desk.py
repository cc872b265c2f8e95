"""Where one run works: its folder, its declaration, and the record of its finished steps. Knows no kind of experiment.

for step in desk.open_steps():
    started = desk.begin(); …; desk.finish(step, rows)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvllm.errors import EditFailed, StoreError
from kvllm.experiments.declared import Declared, Run
from kvllm.records import Progress


class Recorder(Protocol):
    """Where finished steps go: a results database, or something far away that writes to one."""

    def finish(self, run: str, step: str, rows: Sequence[Mapping[str, Any]], *, seconds: float) -> None:
        """Keep a step and its rows, both or neither."""
        ...

    def finished(self, run: str | None = None) -> dict[str, set[str]]:
        """Return the finished steps by run."""
        ...


class Desk:
    """One run at work."""

    def __init__(
        self,
        declared: Declared,
        run: Run,
        folder: Path,
        recorder: Recorder,
        *,
        progress: Callable[[Progress], None] | None = None,
        on_step: Callable[[str, float], None] | None = None,
    ) -> None:
        """Open the desk.

        Args:
            declared: The experiment.
            run: The part of it that is done here.
            folder: For whatever the run keeps between sessions; made if missing.
            recorder: Keeps finished steps.
            progress: Called with what the engine says.
            on_step: Called with each step that was finished, and its seconds.
        """
        self.declared = declared
        self.run = run
        self.folder = folder
        self.progress = progress
        self._recorder = recorder
        self._on_step = on_step
        self._done = recorder.finished(run.id).get(run.id, set())
        self._started = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, step: str) -> bool:
        """Say whether a step is still to be done, and start its clock."""
        self._started = time.perf_counter()
        return step not in self._done

    def finish(self, step: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a step with its rows; each gets the run's arm and seed."""
        if step not in self.run.steps:
            raise EditFailed(f"The run {self.run.id} has no step {step}.")
        seconds = round(time.perf_counter() - self._started, 3)
        told = [{"kind": row["kind"], "arm": self.run.arm, "seed": self.run.seed, **row} for row in rows]
        self._recorder.finish(self.run.id, step, told, seconds=seconds)
        self._done.add(step)
        if self._on_step is not None:
            self._on_step(step, seconds)

    def begun(self, steps: str) -> bool:
        """Say whether a step whose name begins so is finished."""
        return any(step.startswith(steps) for step in self._done)

    def missing(self, path: Path) -> StoreError:
        """Return the error for what a finished step kept and is there no more: the rest would be another experiment."""
        inside = path.relative_to(self.folder).as_posix()
        return StoreError(
            f"The run {self.run.id} has finished steps kept in {inside} of its folder runs/{self.folder.name}, "
            f"which is not there; nothing was run. Put the folder back, or begin anew with --again {self.run.id}."
        )

    @property
    def complete(self) -> bool:
        """Whether every step of the run is finished."""
        return set(self.run.steps) <= self._done
