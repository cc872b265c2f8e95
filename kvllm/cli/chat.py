"""`kvllm chat`: a conversation in the terminal with the edited model, if wanted beside the untouched base.

Reads a line, asks, shows; on a terminal with a prompt, otherwise line by line from stdin. It knows no weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from kvllm.cli.app import LOOKUP, app
from kvllm.cli.command import Device, Dtype, MaxTokens, Model, Store, command, decode, opened
from kvllm.cli.output import Output, Result
from kvllm.errors import ConfigError
from kvllm.records import Answer

Messages = list[dict[str, str]]
_HELP = "/forget starts the conversation anew, /quit (or Ctrl-D) ends it; anything else is asked."


@command(app, panel=LOOKUP)
def chat(
    out: Output,
    kb: Store,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Every question stands alone: nothing said before is seen.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show the untouched base's answer beside it.")] = False,
    max_tokens: MaxTokens = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Talk with the edited model; what was said before is seen by the next question. /forget drops it.

    Without a terminal, each line of stdin is one question. With --compare base and edited model each see their own
    conversation.

    kvllm chat my.kb --compare
    """
    turns: list[dict[str, Any]] = []
    talks = _is_terminal()
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        if talks:
            base.ask("Hello.", max_new_tokens=1)  # load the model before the first prompt, not after it
            out.pause()
            out.note(_HELP)
        edited, untouched = _Side(base.ask), _Side(base.ask_base) if compare else None
        sides = [side for side in (edited, untouched) if side is not None]
        for line in _lines(out):
            if isinstance(line, ConfigError):
                turns.append({"prompt": None, "error": str(line)})
                _show_error(out, str(line))
                continue
            said = line.strip()
            if not said:
                continue
            if said in ("/quit", "/exit"):
                break
            if said in ("/forget", "/help"):
                if said == "/forget":
                    for side in sides:
                        side.forget()
                    turns.append({"prompt": said, "forgot": True})
                out.note("Forgotten." if said == "/forget" else _HELP)
                continue
            try:
                answers = [side.ask(said, history=not no_history, max_tokens=max_tokens) for side in sides]
            except ConfigError as error:
                turns.append({"prompt": said, "error": str(error)})
                _show_error(out, str(error))
                continue
            turn: dict[str, Any] = {"prompt": said, "answer": answers[0], "truncated": answers[0].truncated}
            if untouched is not None:
                turn |= {"base": answers[1], "same": answers[0] == answers[1]}
            if any(side.dropped for side in sides):
                turn["dropped"] = max(side.dropped for side in sides)
                out.note("The conversation is longer than the model reads; its oldest turns are not seen any more.")
            turns.append(turn)
            _show(out, turn)
    failed = any("error" in turn for turn in turns)
    document = {"ok": not failed, "history": not no_history, "turns": turns}
    if failed:
        first = next(turn["error"] for turn in turns if "error" in turn)
        document |= {"error": first, "code": ConfigError.code}
    return Result(document, lambda: None, exit_code=ConfigError.exit_code if failed and not talks else 0)


class _Side:
    """One model's conversation.

    Attributes:
        dropped: How many messages the last question had to leave out.
    """

    def __init__(self, ask: Callable[..., Answer]) -> None:
        self._ask = ask
        self._said: Messages = []
        self.dropped = 0

    def ask(self, question: str, *, history: bool, max_tokens: int | None) -> Answer:
        """Ask with what was said before; where that is too long, without its oldest turns."""
        asked = {"role": "user", "content": question}
        seen = self._said if history else []
        self.dropped = 0
        while True:
            try:
                answer = self._ask([*seen, asked] if seen else question, max_new_tokens=max_tokens)
                break
            except ConfigError as error:
                if not seen or "tokens" not in str(error):
                    raise
                seen = seen[2:]
                self.dropped += 2
        if history and answer.strip():
            self._said = [*seen, asked, {"role": "assistant", "content": answer}]
        return answer

    def forget(self) -> None:
        self._said = []


def _is_terminal() -> bool:
    try:
        return sys.stdin.isatty()
    except (AttributeError, ValueError):  # no such stream, or closed
        return False


def _lines(out: Output) -> Iterator[str | ConfigError]:
    """Yield what is typed, until the end of the input, and for a line that is no text why not."""
    if _is_terminal():
        while True:
            out.pause()
            try:
                yield input("> ")  # sys.stdout is stderr here: the prompt is no data
            except EOFError:
                return
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    while stream is not None:
        line = stream.readline()
        if not line:
            return
        try:
            yield line if isinstance(line, str) else decode(line, name="line on stdin")
        except ConfigError as error:
            yield error


def _show(out: Output, turn: dict[str, Any]) -> None:
    from kvllm.reports import terminal

    if "base" not in turn:
        out.show(terminal.block(turn["answer"]))
        return
    verdict = "same" if turn["same"] else "changed"
    row = ("chat", turn["prompt"], turn["base"], turn["answer"], verdict)
    out.show(terminal.comparison_table([row], columns=("base", "edited")))


def _show_error(out: Output, sentence: str) -> None:
    from rich.console import Console

    from kvllm.reports.terminal import inline

    if not out.json:
        out.pause()
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(
            inline("error:", "bold red"), inline(sentence)
        )
