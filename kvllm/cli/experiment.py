"""The command `experiment`: run a declared experiment, or go on with it, and show its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from kvllm.cli.app import MEASURE, app
from kvllm.cli.command import command
from kvllm.cli.failures import Interrupted
from kvllm.cli.measure import Outputs, ReportFormat, check_outputs, deliver
from kvllm.cli.output import Output, Result
from kvllm.errors import ConfigError, EditFailed


@command(app, panel=MEASURE)
def experiment(
    out: Output,
    declaration: Annotated[
        Path, typer.Argument(metavar="FILE.toml", help="What to run; see benchmarks/experiments/.", show_default=False)
    ],
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            metavar="FOLDER",
            help="Where results are kept, and resumed from; by default beside the file.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Independent runs at once.")] = 1,
    ray: Annotated[
        bool, typer.Option("--ray", help="On the Ray cluster that RAY_ADDRESS names, or on one that is started here.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="ARM", help="This arm or run alone; may be repeated.", show_default=False),
    ] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(
            "--again",
            metavar="ARM",
            help="Forget what this arm or run has found, and begin it anew; may be repeated.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; show what is there.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Another base model.", show_default=False)
    ] = None,
    format: ReportFormat = None,
    output: Outputs = None,
) -> Result:
    """Run an experiment on the open questions of injection, capacity, causes and editors; interrupt it at will.

    kvllm experiment benchmarks/experiments/injection/small.toml --into runs/injection -o report.html
    """
    from kvllm.experiments.declared import load
    from kvllm.experiments.report import experiment_document
    from kvllm.experiments.runner import read_outcome, run_experiment

    check_outputs(output, format)
    if report and (only or again):
        named = "--only" if only else "--again"
        raise ConfigError(
            f"--report shows all that is there, so that {named} has no meaning beside it; nothing was run."
        )
    declared = load(declaration, model=model)
    folder = into or declaration.parent / f"{declaration.stem}.run"
    if report:
        outcome = read_outcome(declared, folder)
    else:
        try:
            outcome = run_experiment(
                declared, folder, jobs=jobs, ray=ray, only=only or (), again=again or (), progress=out.progress
            )
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"Interrupted; the finished steps are kept in {folder}. Give the same command again to go on."
            ) from error
    result = deliver(experiment_document(declared, outcome), format, output)
    if not outcome.failed:
        return result
    run, why = next(iter(outcome.failed.items()))
    failure = f"{len(outcome.failed)} of {len(outcome.runs)} runs failed, first {run}: {why}"
    if result.failure is None:
        return replace(result, exit_code=EditFailed.exit_code, failure=failure)
    return replace(result, failure=f"{result.failure} {failure}")  # a report that could not be written goes first
