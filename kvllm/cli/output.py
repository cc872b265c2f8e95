"""Where a command's words go: data to stdout, progress and notes to stderr, nothing else to either.

A command returns a `Result`; it is printed once, after the knowledge base is closed, either as one JSON document or as
a view for people. While a command runs, `sys.stdout` points to stderr (`command.py`), so that a chatty library cannot
spoil the data.

    Result({"ok": True, "answer": "…"}, lambda: block("…"), raw="…")
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from kvllm.cli import signals

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvllm.cli.progress import ProgressBars
    from kvllm.records import Progress

# JSON lets these stand as they are, and a terminal obeys them: C1 controls, bidirectional overrides, lone surrogates.
_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# Off a terminal a table is not folded to 80 columns: one record is one line, for grep and awk.
_UNFOLDED = 10_000


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        document: What `--json` prints, or a function that makes it where that costs something.
        view: Makes what people see; not called for `--json`.
        raw: What `-r` prints instead of the view.
        exit_code: 0 unless the answer itself is bad news (some facts refused, the store not clean, a gate that fails).
        failure: The line that says so on stderr; with `--json` it stands in the document.
    """

    document: Any
    view: Callable[[], RenderableType | None]
    raw: str | None = None
    exit_code: int = 0
    failure: str | None = None


class Output:
    """The two streams of one command.

    Attributes:
        json: Print exactly one JSON document.
        quiet: Say nothing on stderr but errors.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self._stdout = sys.stdout
        self._bars: ProgressBars | None = None
        self._talks = not quiet and _is_terminal(sys.stderr)

    @property
    def progress(self) -> Callable[[Progress], None]:
        """The callback that draws progress bars where somebody would see them, and ends a command that is to stop."""
        if self._talks and self._bars is None:
            from kvllm.cli.progress import ProgressBars

            self._bars = ProgressBars()
        return self._on_progress

    def _on_progress(self, progress: Progress) -> None:
        signals.check()
        if self._bars is not None:
            self._bars(progress)

    def note(self, sentence: str) -> None:
        """Say something on stderr, if a person is there to read it."""
        if self._talks:
            self.pause()
            from rich.console import Console

            from kvllm.reports.terminal import inline

            Console(stderr=True).print(inline(sentence, "dim"))

    def show(self, view: RenderableType, *, width: int | None = None) -> None:
        """Print a part of a long story at once (nothing with `--json`: the document comes at the end)."""
        if not self.json:
            self.pause()
            print_view(view, self._stdout, width=width)

    def emit(self, result: Result) -> None:
        """Print a command's result."""
        self.pause()
        if self.json:
            document = result.document() if callable(result.document) else result.document
            print_json(document, self._stdout)
        elif result.raw is not None:
            from kvllm.reports.text import neutral

            # As it is for a program that reads it; on a terminal, an answer's escape sequences are shown, not obeyed.
            raw = neutral(result.raw) if _is_terminal(self._stdout) else result.raw
            self._stdout.write(raw if raw.endswith("\n") else raw + "\n")
        else:
            view = result.view()
            if view is not None:
                print_view(view, self._stdout)
        if result.failure is not None and not self.json:
            from rich.console import Console

            from kvllm.reports.terminal import inline

            console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
            console.print(inline("error:", "bold red"), inline(result.failure))

    def pause(self) -> None:
        """Take the progress bars off the screen; the next tick brings them back."""
        if self._bars is not None:
            self._bars.pause()


def print_view(view: RenderableType, stream: IO[str], *, width: int | None = None) -> None:
    """Print a renderable; NO_COLOR and COLUMNS are honoured by rich. Off a terminal no line ends in padding."""
    from rich.console import Console

    if _is_terminal(stream):
        Console(file=stream, highlight=False, markup=False).print(view)
        return
    if width is None and "COLUMNS" not in os.environ:
        width = _UNFOLDED
    console = Console(file=stream, width=width, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(view)
    stream.write("".join(line.rstrip(" ") + "\n" for line in captured.get().removesuffix("\n").split("\n")))


def print_json(document: Any, stream: IO[str]) -> None:
    """Print one JSON document; a number that JSON does not have (NaN, infinity) becomes null."""
    from kvllm.reports.text import finite

    ascii_only = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "") != "utf8"
    text = json.dumps(finite(document), ensure_ascii=ascii_only, indent=2, allow_nan=False, default=str)
    stream.write(_UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # no such stream, or closed
        return False
