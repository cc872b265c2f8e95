"""The program itself: its name, its help, and the modules that hold its commands, in the order that help shows them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

import kvllm

COMMAND_MODULES = (
    "demo",
    "edits",
    "importing",
    "lookup",
    "chat",
    "measure",
    "experiment",
    "history",
    "base",
    "upkeep",
    "about",
)
FACTS, LOOKUP, HISTORY, BASE = "Change facts", "Ask and look up", "History", "Knowledge base and models"
MEASURE = "Measure"

app = typer.Typer(
    name="kvllm",
    help="Facts in the weights of a language model: insert, ask, update, delete, undo, export.",
    epilog="Every command takes --json and --quiet. Start with:  kvllm demo",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def load() -> typer.Typer:
    """Return the program with all commands registered."""
    for module in COMMAND_MODULES:
        import_module(f"kvllm.cli.{module}")
    return app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvllm {kvllm.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
