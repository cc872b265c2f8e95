"""The command line's stand-in for the engine must not drift away from the engine."""

from __future__ import annotations

import inspect

import pytest

from tests.cli.stand_in import StandIn

METHODS = [name for name, value in vars(StandIn).items() if callable(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", [*METHODS, "open", "create", "__getitem__"])
def test_every_method_and_parameter_of_the_stand_in_exists_on_the_real_class(name: str) -> None:
    real = pytest.importorskip("kvllm.knowledge_base").KnowledgeBase
    mine = inspect.signature(getattr(StandIn, name)).parameters
    theirs = inspect.signature(getattr(real, name)).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in theirs.values()):
        return
    assert set(mine) <= set(theirs)
