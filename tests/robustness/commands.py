"""The command line as a verb of the campaigns: a real `kvllm …` whose training is a stub, so that no torch is needed.

commands()                  # a Verb for each command that writes
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvllm.cli import main
from kvllm.edits import Edits, stored
from kvllm.records import Edit, Fact
from kvllm.store import NewEdit
from tests.robustness.harness import COPY, KB, VERBS, Ended, Verb, look, tiny_delta

ARGUMENTS: Mapping[str, Sequence[str]] = {
    "insert": (KB, "x", "plain"),
    "update": (KB, "a", "newest"),
    "upsert": (KB, "y", "plain"),
    "tag": (KB, "v9"),
    "backup": (KB, COPY),
    "gc": (KB,),
    "verify": (KB, "--repair"),
}
LIKE = {"gc": "gc", "verify": "repair-ledger"}  # which of the harness's verbs begins on the same knowledge base


def commands() -> tuple[Verb, ...]:
    """Return the commands as verbs; the training of this process is a stub from now on."""
    Edits.train_and_commit = _commit  # type: ignore[method-assign,assignment]
    known = {verb.name: verb for verb in VERBS}
    found = []
    for name in ARGUMENTS:
        like = known.get(LIKE.get(name, ""))
        found.append(
            Verb(
                f"kvllm {name}",
                _run(name),
                prepare=like.prepare if like else lambda folder: None,
                seen=like.seen if like else (lambda f: look(f / COPY)) if name == "backup" else lambda f: look(f / KB),
                repairs=bool(like and like.repairs),
            )
        )
    return tuple(found)


def _commit(self: Edits, op: Any, facts: Sequence[Fact], *, old: Mapping[str, str] | None = None, **_: object) -> Edit:
    store, kept = self._session.store, tuple(stored(fact) for fact in facts)
    new = NewEdit(op, tuple(fact.key for fact in facts), store.head(), facts=kept, retired=tuple(old or ()))
    return store.commit(new, tiny_delta(77))


def _run(name: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        arguments = [str(folder / each) if each in (KB, COPY) else each for each in ARGUMENTS[name]]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = main([name, *arguments])
        if code:
            raise Ended(code, said.getvalue())

    return act


assert "torch" not in sys.modules, "a fork would cost more than the campaign"
