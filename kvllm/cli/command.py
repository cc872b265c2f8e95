"""How a function becomes a command, and the options that several commands share.

@command(app)
def get(out: Output, kb: Store, key: Key) -> Result: ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from kvllm.cli import signals
from kvllm.cli.failures import Interrupted
from kvllm.cli.output import Output, Result
from kvllm.config import ModelConfig
from kvllm.errors import ConfigError, KvllmError

if TYPE_CHECKING:
    from kvllm.knowledge_base import KnowledgeBase

Store = Annotated[Path, typer.Argument(metavar="KB", help="The knowledge base's folder.", show_default=False)]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The fact's key.", show_default=False)]
Reference = Annotated[str, typer.Argument(metavar="EDIT|TAG", help="An edit's number or a tag.", show_default=False)]
At = Annotated[str | None, typer.Option("--at", metavar="EDIT|TAG", help="As of this edit or tag.", show_default=False)]
Raw = Annotated[bool, typer.Option("--raw", "-r", help="Print the text alone, as it is.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="The base model: a registered name, a folder, a GGUF file or a hub id; with +256 behind it, so many spare "
        "neurons are added (+0: a registered model without any). An existing knowledge base takes "
        "only the model it was made on (from another place, if it moved: the files are compared by hash).",
        show_default=False,
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, mps, cuda:1 …", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16: of the computation.", show_default=False
    ),
]
LockTimeout = Annotated[
    float, typer.Option("--lock-timeout", metavar="SECONDS", min=0, help="Wait so long for another writer.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        min=1,
        help=f"Longest answer, in tokens; it is cut there (default: {ModelConfig.max_new_tokens}).",
        show_default=False,
    ),
]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Most training steps.", show_default=False)]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted series: what it has done already is no error."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the training.", show_default=False)]
MinReliability = Annotated[
    float | None,
    typer.Option(
        "--min-reliability",
        min=0,
        max=1,
        help="Gate: least share of the trained questions whose answer states the text; 0 switches the rule off.",
        show_default=False,
    ),
]
MaxDrift = Annotated[
    float | None,
    typer.Option(
        "--max-drift",
        min=0,
        help="Gate: largest drift_kl that the edit may add (nats per token); inf switches the rule off.",
        show_default=False,
    ),
]
MaxPpl = Annotated[
    float | None,
    typer.Option(
        "--max-ppl",
        min=0,
        help="Gate: largest factor by which the edit may raise perplexity (ppl_ratio); inf switches the rule off.",
        show_default=False,
    ),
]
MinErasure = Annotated[
    float | None,
    typer.Option(
        "--min-erasure",
        min=0,
        max=1,
        help="Gate of update and delete: least share of the questions whose answer no longer states the old text; 0 "
        "switches the rule off.",
        show_default=False,
    ),
]

_JSON = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document, on errors too.")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]


@dataclass(frozen=True)
class Outcome:
    """A finished command: what it found, and where to print it."""

    out: Output
    result: Result


def command(app: typer.Typer, name: str | None = None, *, panel: str | None = None) -> Callable[..., Any]:
    """Register `function(out, …) -> Result` as a command that also takes `--json` and `--quiet`.

    While the function runs, `sys.stdout` is stderr: whatever a library prints is not data.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def run(*, json: bool, quiet: bool, **arguments: Any) -> Outcome:
            out = Output(json=json, quiet=quiet)
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    return Outcome(out, function(out, **arguments))
            except KeyboardInterrupt as error:
                raise Interrupted(signals.sentence()) from error
            except (EOFError, BrokenPipeError) as error:
                # typer would end the program without a word; this came from within, not from our reader.
                raise RuntimeError(f"{type(error).__name__} {error}") from error
            finally:
                out.pause()

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        flags = [
            inspect.Parameter(flag, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for flag, annotation in (("json", _JSON), ("quiet", _QUIET))
        ]
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *flags]}
        app.command(name, rich_help_panel=panel)(run)
        return function

    return register


@contextlib.contextmanager
def opened(out: Output, kb: Path, *, readonly: bool = False, **settings: Any) -> Iterator[KnowledgeBase]:
    """Open an existing knowledge base; settings that are None are left to the engine.

    An interruption says which edits were committed before it, if any: they stay.
    """
    from kvllm.knowledge_base import KnowledgeBase

    given = {name: value for name, value in settings.items() if value is not None}
    with KnowledgeBase.open(kb, create=False, readonly=readonly, progress=out.progress, **given) as base:
        head = 0 if readonly else _head(base)
        try:
            yield base
        finally:
            with contextlib.suppress(KvllmError):  # whatever ends this block has more to say
                kept = 0 if readonly else _head(base) - head
                if kept:
                    signals.done(f"edit {head + 1}" if kept == 1 else f"edits {head + 1} to {head + kept}")


def _head(base: KnowledgeBase) -> int:
    newest = base.history(limit=1)
    return newest[0].id if newest else 0


def reference(text: str) -> int | str:
    """Return an edit's number, or a tag's name."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text


def text_or_stdin(text: str, *, name: str) -> str:
    """Return the argument; for `-` what stdin holds, without its last line break.

    Raises:
        ConfigError: stdin is not UTF-8.
    """
    return read_stdin(name=name).removesuffix("\n").removesuffix("\r") if text == "-" else text


def stdin_bytes() -> IO[bytes]:
    """Return stdin as a stream of bytes."""
    stream: IO[bytes] | None = getattr(sys.stdin, "buffer", None)
    return io.BytesIO() if stream is None else stream


def read_stdin(*, name: str) -> str:
    """Return all of stdin as UTF-8 text."""
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    read = stream.read() if stream is not None else b""
    if isinstance(read, str):
        return read
    return decode(read, name=f"{name} on stdin")


def decode(raw: bytes, *, name: str) -> str:
    """Return UTF-8 bytes as text, without a byte-order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The {name} is not UTF-8 (byte {error.start}); nothing was changed. Convert it first, e.g. with iconv."
        ) from error
