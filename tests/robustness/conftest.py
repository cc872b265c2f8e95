"""Starts the campaigns that the selected tests ask for, and prints one table of their counts at the end."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.robustness.campaigns import Outcome, Runner, table

_RUNNERS: list[Runner] = []
_OUTCOMES: dict[str, Outcome] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the long campaigns out unless KVLLM_CAMPAIGN asks for them: they take as long as all other tests."""
    if os.environ.get("KVLLM_CAMPAIGN"):
        return
    skipped = pytest.mark.skip(reason="a campaign of minutes; set KVLLM_CAMPAIGN=1 (or 0.1 for a quick look)")
    for item in items:
        if _campaign(item) or item.get_closest_marker("campaign"):
            item.add_marker(skipped)


def _campaign(item: pytest.Item) -> str:
    return str(getattr(item.function, "campaign", "")) if isinstance(item, pytest.Function) else ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start them at once: most tests leave a processor idle, and the campaigns are done when it is their turn."""
    wanted = {_campaign(item) for item in session.items} if os.environ.get("KVLLM_CAMPAIGN") else set()
    if not session.config.option.collectonly:
        _RUNNERS.append(Runner(wanted))


def pytest_sessionfinish() -> None:
    for each in _RUNNERS:
        each.close()


@pytest.fixture(scope="session")
def runner() -> Runner:
    return _RUNNERS[-1]


@pytest.fixture
def campaign(runner: Runner) -> Callable[[str], Outcome]:
    """Wait for a campaign by name; what it counted goes to the table."""

    def wait(name: str) -> Outcome:
        _OUTCOMES[name] = runner.outcome(name)
        return _OUTCOMES[name]

    return wait


@pytest.fixture(scope="session")
def record() -> Callable[..., None]:
    """Put counts into the table by hand: `record("migrations", kills=10)`."""

    def put(name: str, **counts: int) -> None:
        _OUTCOMES.setdefault(name, Outcome()).counts.update({key.replace("_", " "): n for key, n in counts.items()})

    return put


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _OUTCOMES:
        terminalreporter.section("campaigns on the store")
        for line in table(_OUTCOMES):
            terminalreporter.write_line(line)
