"""Starts the campaigns that the selected tests ask for, and prints one table of their counts at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.robustness.campaigns import Outcome, Runner, table

_RUNNERS: list[Runner] = []
_OUTCOMES: dict[str, Outcome] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start them at once: most tests leave a processor idle, and the campaigns are done when it is their turn."""
    wanted = {getattr(item.function, "campaign", "") for item in session.items if isinstance(item, pytest.Function)}
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
