"""Fixtures: the engine replaced by its stand-in, and a function that runs a command line in this process."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable

import pytest

from kvllm.cli import main
from kvllm.records import ProbeResult, StoredFact
from tests.cli.stand_in import Ran, StandIn, report


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Put the stand-in in the place of the engine, with one knowledge base `my.kb` that holds one fact."""
    module = types.ModuleType("kvllm.knowledge_base")
    module.KnowledgeBase = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvllm.knowledge_base", module)
    for name, empty in (("stores", {}), ("opened", []), ("calls", []), ("raises", {})):
        monkeypatch.setattr(StandIn, name, empty)
    store = StandIn.create("my.kb")
    store._facts["torchkeras"] = StoredFact("torchkeras", "Torchkeras trains models.", edit_id=1)
    store._commit("insert", "torchkeras", report(ProbeResult("trained", "What is torchkeras?", "…", True, 1.0)))
    return StandIn


@pytest.fixture
def kvllm(
    base: type[StandIn], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Ran]:
    """Run `kvllm …` in this process; `stdin` is what it can read."""
    for name in ("COLUMNS", "KVLLM_DEBUG", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, stdin: str = "") -> Ran:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape")), encoding="utf-8")
        )
        capsys.readouterr()
        code = main(list(arguments))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run
