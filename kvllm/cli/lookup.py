"""Commands that change nothing: `ask` and `find` use a model, `get` and `ls` read the ledger only."""

from __future__ import annotations

from typing import Annotated

import typer

from kvllm.cli.app import LOOKUP, app
from kvllm.cli.command import (
    At,
    Device,
    Dtype,
    Key,
    MaxTokens,
    Model,
    Raw,
    Store,
    command,
    opened,
    reference,
    text_or_stdin,
)
from kvllm.cli.output import Output, Result


@command(app, panel=LOOKUP)
def ask(
    out: Output,
    kb: Store,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; - reads stdin.", show_default=False)],
    raw: Raw = False,
    max_tokens: MaxTokens = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Ask the edited weights. The ledger is not consulted: this is what the model itself answers.

    kvllm ask my.kb "What is torchkeras?"
    """
    from kvllm.reports import terminal

    prompt = text_or_stdin(prompt, name="prompt")
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        answer = base.ask(prompt, max_new_tokens=max_tokens)
    if answer.truncated:
        out.note("The answer is longer and was cut here; --max-tokens gives it more room.")
    document = {"ok": True, "prompt": prompt, "answer": answer, "truncated": answer.truncated}
    return Result(document, lambda: terminal.block(answer), raw=answer if raw else None)


@command(app, panel=LOOKUP)
def get(out: Output, kb: Store, key: Key, raw: Raw = False) -> Result:
    """Show a fact as the ledger holds it: what was taught. No model is loaded.

    kvllm get my.kb torchkeras
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=True) as base:
        fact = base[key]
    document = {"ok": True, "fact": fact.to_dict()}
    return Result(document, lambda: terminal.fact_view(fact), raw=fact.text if raw else None)


@command(app, "ls", panel=LOOKUP)
def list_facts(out: Output, kb: Store, at: At = None) -> Result:
    """List the live facts. No model is loaded. With --json: a list of facts.

    kvllm ls my.kb --json
    """
    from kvllm.reports import terminal

    with opened(out, kb, readonly=True) as base:
        facts = base.facts(None if at is None else reference(at))
    return Result([fact.to_dict() for fact in facts], lambda: terminal.facts_table(facts))


@command(app, panel=LOOKUP)
def find(
    out: Output,
    kb: Store,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="Words or a question; - reads stdin.", show_default=False)
    ],
    number: Annotated[int, typer.Option("--number", "-n", min=1, help="At most so many facts.")] = 5,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Result:
    """Find the facts whose keys are nearest in meaning.

    kvllm find my.kb "that furnace tool" -n 3
    """
    from kvllm.reports import terminal

    query = text_or_stdin(query, name="query")
    with opened(out, kb, readonly=True, model=model, device=device, dtype=dtype) as base:
        matches = base.find(query, n=number)
    document = {"ok": True, "query": query, "matches": [match.to_dict() for match in matches]}
    return Result(document, lambda: terminal.matches_table(matches))
