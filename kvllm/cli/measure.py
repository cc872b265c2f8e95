"""Commands that measure: `probe`, `drift`, `regression`, `bisect`. They load the model and change nothing.

A quality gate (`--fail-under`, `--max-drift`, `--max-lost`) that does not hold ends in exit code 6 and one line that
says what failed; every report is written all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvllm.cli.app import MEASURE, app
from kvllm.cli.command import Device, Dtype, Model, Store, command, opened, reference
from kvllm.cli.failures import unwritable
from kvllm.cli.output import Output, Result
from kvllm.errors import ConfigError
from kvllm.reports.render import Format

if TYPE_CHECKING:
    from kvllm.knowledge_base import KnowledgeBase
    from kvllm.reports.document import Document, Origin

GATE_FAILED = 6

FailUnder = Annotated[
    str | None,
    typer.Option(
        "--fail-under",
        metavar="METRIC=X,…",
        help="Exit with 6 where a metric is under its limit, e.g. reliability=0.95,generalization=0.9.",
        show_default=False,
    ),
]
ReportFormat = Annotated[
    Format | None,
    typer.Option("--format", help="Of the report; by default what the file's name says.", show_default=False),
]
Outputs = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write the report there (.html, .md, .xml for JUnit, .json, .txt); may be given several times.",
        show_default=False,
    ),
]
Answers = Annotated[bool, typer.Option("--answers", "-a", help="Show every generated answer, not only the failing.")]


@command(app, panel=MEASURE)
def probe(
    out: Output,
    kb: Store,
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="Only this fact or refused key; all by default.", show_default=False),
    ] = None,
    ladder: Annotated[
        bool, typer.Option("--ladder", help="The whole ladder of questions, from trained ones to far uses.")
    ] = False,
    probes: Annotated[
        Path | None, typer.Option("--probes", metavar="FILE", help="Your own probes (JSONL).", show_default=False)
    ] = None,
    collisions: Annotated[
        bool, typer.Option("--collisions", help="Also ask which key recites which fact, and the nearest other keys.")
    ] = False,
    fail_under: FailUnder = None,
    answers: Answers = False,
    format: ReportFormat = None,
    output: Outputs = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Ask what the model knows of one fact or of all, and score every live answer against the ledger.

    Keys that were deleted with --mode abstain are asked, too: are they still refused?

    kvllm probe my.kb --fail-under reliability=0.95,generalization=0.9 --output report.html
    """
    from kvllm.probing.gates import at_least
    from kvllm.probing.regression import edit_points, retention
    from kvllm.prompts import clean_key
    from kvllm.reports.document import probe_document

    limits = _limits(fail_under)
    check_outputs(output, format)
    given: dict[str, Any] = {}
    if ladder:
        given["ladder"] = True
    if probes is not None:
        given["probes"] = probes
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        report = base.probe(key, **given)
        facts = [fact for fact in base.facts() if key is None or fact.key == clean_key(key)]
        found = base.collisions() if collisions else None
        origin, edits = _origin(base), edit_points(base.history())
    document = probe_document(
        report,
        origin,
        facts=facts,
        retention=retention(report.probes, facts, origin.head),
        edits=edits,
        checks=at_least(report.metrics, limits),
        key=None if key is None else clean_key(key),
        collisions=found,
    )
    return deliver(document, format, output, answers=answers)


@command(app, panel=MEASURE)
def drift(
    out: Output,
    kb: Store,
    suite: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE", help="Your own drift suite (JSONL).", show_default=False)
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Tasks of lm-eval (names or YAML files), with commas.",
            show_default=False,
        ),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            "--max-drift", min=0, help="Exit with 6 where drift_kl (nats per token) is over this.", show_default=False
        ),
    ] = None,
    fail_under: FailUnder = None,
    answers: Answers = False,
    format: ReportFormat = None,
    output: Outputs = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Measure how far the model has moved from its base: on fixed prompts, raw text and general questions.

    kvllm drift my.kb --max-drift 0.3
    """
    from kvllm.probing.gates import at_least, at_most
    from kvllm.probing.regression import edit_points
    from kvllm.records import Metric
    from kvllm.reports.document import drift_document

    limits = _limits(fail_under)
    check_outputs(output, format)
    given: dict[str, Any] = {}
    if suite is not None:
        given["suite"] = suite
    if lm_eval is not None:
        given["lm_eval"] = [task.strip() for task in lm_eval.split(",") if task.strip()]
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        report = base.drift(**given)
        origin, edits = _origin(base), edit_points(base.history())
    checks = at_least(report.metrics, limits)
    if max_drift is not None:
        measured = report.metrics.get("drift_kl", Metric(None, 0))
        checks.append(at_most("drift_kl", measured.value, max_drift, measured.n))
    return deliver(drift_document(report, origin, edits=edits, checks=checks), format, output, answers=answers)


@command(app, panel=MEASURE)
def regression(
    out: Output,
    kb: Store,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="EDIT|TAG",
            help="Compare with this edit or tag (base: the untouched model); by default the edit before the newest.",
            show_default=False,
        ),
    ] = None,
    max_drift: Annotated[
        float | None,
        typer.Option(
            "--max-drift",
            min=0,
            help="Exit with 6 where drift_kl rose by more than this (nats per token).",
            show_default=False,
        ),
    ] = None,
    max_lost: Annotated[
        int | None,
        typer.Option(
            "--max-lost",
            min=0,
            help="Exit with 6 where more facts were lost (--fail-under refusal=1 for refusals).",
            show_default=False,
        ),
    ] = None,
    fail_under: FailUnder = None,
    answers: Answers = False,
    format: ReportFormat = None,
    output: Outputs = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Compare the model with an earlier edit: which facts were lost, which answers changed, and is it chance?

    kvllm regression my.kb --since v1 --max-lost 0 --output junit.xml
    """
    from kvllm.probing.gates import regression_checks
    from kvllm.reports.document import regression_document

    limits = _limits(fail_under)
    check_outputs(output, format)
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        report = base.regression(None if since is None else reference(since))
        origin = _origin(base)
    checks = regression_checks(report, max_drift=max_drift, max_lost=max_lost, limits=limits)
    return deliver(regression_document(report, origin, checks=checks), format, output, answers=answers)


@command(app, panel=MEASURE)
def bisect(
    out: Output,
    kb: Store,
    probe: Annotated[
        str,
        typer.Argument(
            metavar="PROBE", help="A live or refused key, a question of a report, or any question.", show_default=False
        ),
    ],
    expected: Annotated[
        str | None,
        typer.Option("--expected", metavar="TEXT", help="What the answer must state.", show_default=False),
    ] = None,
    format: ReportFormat = None,
    output: Outputs = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Find the edit that broke a probe, looking at log2(n) states of the history.

    kvllm bisect my.kb "What is torchkeras?"
    """
    from kvllm.reports.document import bisect_document

    check_outputs(output, format)
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        report = base.bisect(probe, expected=expected)
        origin = _origin(base)
    return deliver(bisect_document(report, origin), format, output)


def _limits(fail_under: str | None) -> dict[str, float]:
    from kvllm.probing.gates import parse_limits

    return {} if fail_under is None else parse_limits(fail_under)


def check_outputs(files: Sequence[Path] | None, format: Format | None) -> None:
    """Refuse a file that cannot be written before minutes are spent on what would stand in it.

    A name that ends in something else than a format's suffix is refused too; one without any takes plain text.
    """
    from kvllm.reports.render import SUFFIXES, format_of

    for file in files or ():
        try:
            if file.is_dir():
                raise ConfigError(f"The report cannot be written to {file}: it is a folder; nothing was measured.")
            if not file.absolute().parent.is_dir():
                raise ConfigError(f"The report cannot be written to {file}: no such folder; nothing was measured.")
            fresh = not file.exists()
            file.open("ab").close()
            if fresh:
                file.unlink()
        except OSError as error:
            raise ConfigError(
                f"The report cannot be written to {file}: {error.strerror}; nothing was measured."
            ) from error
        if format is None and file.suffix and format_of(file) is None:
            raise ConfigError(
                f"There is no report format {file.suffix}; nothing was measured. Give --format, or a name that ends in "
                f"{', '.join(SUFFIXES)}."
            )


def _origin(base: KnowledgeBase) -> Origin:
    import kvllm
    from kvllm.reports.document import Origin

    info = base.info()
    return Origin(
        str(info.get("path", "")),
        str(info.get("model", "")),
        str(info.get("base_digest", "")),
        int(info["edits"]),
        int(info["facts"]),
        kvllm.__version__,
        datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )


def deliver(
    document: Document, format: Format | None, files: Sequence[Path] | None, *, answers: bool = False
) -> Result:
    """Write the files, and return what goes to stdout and the exit code."""
    from kvllm.probing.gates import failure_line
    from kvllm.reports import terminal
    from kvllm.reports.render import format_of, render

    failure = failure_line(document.checks, list(document.metrics))
    exit_code = 0 if failure is None else GATE_FAILED
    unwritten: list[str] = []
    code = ConfigError.code
    for file in files or ():
        text = render(document, format or format_of(file) or "terminal", failure=failure)
        try:
            # As it was rendered: on Windows, too, the line ends are those that the format's tests have seen.
            file.write_bytes(text.encode())
        except OSError as error:  # what was measured is not lost with it: the other files and stdout have it
            unwritten.append(f"The report cannot be written to {file}: {error.strerror}.")
            why = unwritable(error)
            code, exit_code = why.code, why.exit_code
    if unwritten:
        failure = " ".join([*unwritten, *([failure] if failure else [])])
    told = {"ok": False, "error": failure, "code": code} if unwritten else {}
    to_stdout = format not in (None, "terminal") and not files
    return Result(
        lambda: document.json(failure) | told,
        lambda: terminal.document_view(document, answers=answers),
        raw=render(document, format, failure=failure) if to_stdout and format is not None else None,
        exit_code=exit_code,
        failure=failure,
    )
