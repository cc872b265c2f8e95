"""Progress bars: on a terminal only, never on stdout, gone when the command ends."""

from __future__ import annotations

import io
import os
import signal
from contextlib import suppress

import pytest
from rich.console import Console

from kvllm.cli import signals
from kvllm.cli.output import Output
from kvllm.cli.progress import ProgressBars, detail
from kvllm.records import Progress


def test_numbers_of_a_tick_stand_in_one_line() -> None:
    assert (
        detail(Progress("training", 3, 40, loss=1.234, recall=0.5, drift=0.0123))
        == "loss 1.23  recall 0.50  drift 0.012"
    )
    assert detail(Progress("model", note="download\x1b[31m")) == "download\\x1b[31m"


def test_bars_appear_for_each_stage_and_can_come_back_after_a_pause() -> None:
    stream = io.StringIO()
    bars = ProgressBars(Console(file=stream, force_terminal=True, width=100))
    bars(Progress("model"))
    bars(Progress("training", 1, 2, loss=1.0))
    bars(Progress("training", 2, 2, loss=0.5))
    bars(Progress("training", 1, 3, loss=0.5))
    bars.pause()
    assert "training" in stream.getvalue()
    stream.truncate(0)
    bars(Progress("probing", 1, 2))
    bars.pause()
    assert "probing" in stream.getvalue()
    bars.pause()


def test_nothing_is_drawn_where_nobody_would_see_it(capsys: pytest.CaptureFixture[str]) -> None:
    for out in (Output(), Output(quiet=True)):  # pytest's stderr is not a terminal
        out.progress(Progress("probing", 1, 2))
        out.pause()
    assert capsys.readouterr() == ("", "")


def test_a_signal_that_was_swallowed_ends_the_command_at_its_next_step() -> None:
    with signals.watched():
        with suppress(KeyboardInterrupt):  # as an import does that is interrupted
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            Output().progress(Progress("commit"))
    with signals.watched():
        Output().progress(Progress("commit"))
