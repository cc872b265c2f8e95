"""Live progress of an edit on stderr: a bar per stage, with loss, recall and drift.

bars = ProgressBars()
bars(Progress("training", step=3, total=40, loss=1.2, recall=0.6, drift=0.01))
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvllm.records import Progress as Tick
from kvllm.reports.text import neutral


class ProgressBars:
    """A callback for `KnowledgeBase(progress=…)`; the bars vanish when it pauses and return with the next tick."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._stages: dict[str, TaskID] = {}
        self._current = ""

    def __call__(self, tick: Tick) -> None:
        if self._live is None:
            self._live = self._start()
        live = self._live
        if tick.stage not in self._stages:
            self._stages[tick.stage] = live.add_task(neutral(tick.stage, keep=""), total=tick.total, detail="")
        task = self._stages[tick.stage]
        if tick.stage != self._current:
            if self._current:
                live.stop_task(self._stages[self._current])
            # A stage that comes again (the next fact of many) starts its clock anew.
            live.reset(task, total=tick.total)
            self._current = tick.stage
        live.update(task, completed=tick.step, total=tick.total, detail=detail(tick))

    def pause(self) -> None:
        """Take the bars off the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._stages.clear()
            self._current = ""

    def _start(self) -> Progress:
        live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _Steps("", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            refresh_per_second=4,  # drawing competes with training for the processor
        )
        live.start()
        return live


class _Steps(TextColumn):
    """`3/40`, or `3` while the total is unknown."""

    def render(self, task: object) -> Text:
        total = getattr(task, "total", None)
        completed = int(getattr(task, "completed", 0))
        return Text(f"{completed}" if total is None else f"{completed}/{int(total)}")


def detail(tick: Tick) -> str:
    """Return the numbers of a tick in one short line."""
    parts = [
        f"{name} {value:.{digits}f}"
        for name, value, digits in (("loss", tick.loss, 2), ("recall", tick.recall, 2), ("drift", tick.drift, 3))
        if value is not None
    ]
    return "  ".join([*parts, neutral(tick.note, keep="")]) if tick.note else "  ".join(parts)
