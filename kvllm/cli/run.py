"""Run one command line from arguments to exit code: streams, signals, errors.

It knows no command and no knowledge base.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from kvllm.cli import signals
from kvllm.cli.output import print_json, print_view
from kvllm.process import prepare_libraries

# What a shell reports for a program that wrote to a closed pipe, as in `kvllm ls my.kb | head -1`.
_BROKEN_PIPE = 128 + 13


def run(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every error becomes a sentence."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _prepare_streams()
    prepare_libraries()
    with signals.watched(last=argv is None):
        try:
            code = _invoke(arguments)
            sys.stdout.flush()
            signals.ignore()
        except BrokenPipeError:
            return _leave_quietly()
        except (Exception, KeyboardInterrupt) as error:
            try:
                code = _fail(error, as_json=_asked(arguments, "--json"), quiet=_asked(arguments, "--quiet", "-q"))
                sys.stdout.flush()
            except BrokenPipeError:
                return _leave_quietly()
            except OSError:  # stdout itself is full: there is only stderr to say it
                _drop_stdout()
                code = _fail(error, as_json=False)
    return code


def _prepare_streams() -> None:
    """Give a closed stream somewhere to go, and a terminal that lacks a character an escape instead of a traceback."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _invoke(arguments: list[str]) -> int:
    import typer

    from kvllm.cli.app import load
    from kvllm.cli.command import Outcome
    from kvllm.cli.failures import CannotPrint

    command: Any = typer.main.get_command(load())
    try:
        outcome = command.main(args=arguments, prog_name="kvllm", standalone_mode=False)
    except SystemExit as error:  # how typer and rich end when they meet a closed pipe while printing help
        raise BrokenPipeError from error
    if isinstance(outcome, Outcome):
        signals.check()
        try:
            outcome.out.emit(outcome.result)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise CannotPrint(error) from error
        return outcome.result.exit_code
    if outcome == 130:  # Ctrl-C while typer was still parsing
        raise KeyboardInterrupt
    return outcome if isinstance(outcome, int) else 0


def _fail(error: BaseException, *, as_json: bool, quiet: bool = False) -> int:
    from kvllm.cli.failures import describe

    debug = bool(os.environ.get("KVLLM_DEBUG"))
    if debug:
        traceback.print_exception(error)
    failure = describe(error)
    if as_json:
        print_json(failure.document(), sys.stdout)
        return failure.exit_code
    from rich.console import Console

    from kvllm.reports.terminal import inline, report_view

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    report = getattr(error, "report", None)
    if report is not None and not quiet:
        print_view(report_view(report, probes=True), sys.stderr)
    console.print(inline("error:", "bold red"), inline(failure.sentence))
    for name, intro in (("suggestions", "Did you mean: "), ("matches", "It matches: ")):
        if failure.attached.get(name):
            console.print(inline(intro + ", ".join(str(item) for item in failure.attached[name]) + "?"))
    if failure.code == "usage" and "usage" in failure.attached:
        usage = failure.attached["usage"]
        console.print(inline(f"Usage: {usage}"))
        console.print(inline(f"Try '{usage.split(' [')[0]} --help'."))
    if not failure.expected and not debug:
        console.print(inline("This is a bug, or a state of the machine that kvllm does not know. "
                             "Run it again with KVLLM_DEBUG=1 to see where it happened."))  # fmt: skip
    return failure.exit_code


def _asked(arguments: Sequence[str], *names: str) -> bool:
    """Whether an option was given, also where the arguments around it do not parse."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(name in options for name in names)


def _leave_quietly() -> int:
    _drop_stdout()
    return _BROKEN_PIPE


def _drop_stdout() -> None:
    """Send what is still buffered to nowhere, so that the interpreter's exit does not complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
