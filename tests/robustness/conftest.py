"""What the campaigns' tests share: the outcome of a shard, counts for the table, and what a test took."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from tests.robustness.campaigns import Outcome, run

Record = Callable[..., None]


def _campaign(request: pytest.FixtureRequest) -> str:
    """The campaign that a test belongs to: its shard's, or its module's."""
    shard = getattr(getattr(request.node, "callspec", None), "params", {}).get("outcome")
    return str(shard.campaign if shard is not None else request.module.CAMPAIGN)


@pytest.fixture(autouse=True)
def _clock(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Note what the test takes, its child processes included."""
    begun, before = time.monotonic(), sum(os.times()[:4])
    yield
    took = (_campaign(request), time.monotonic() - begun, sum(os.times()[:4]) - before)
    record_property("took", json.dumps(took))


@pytest.fixture
def record(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Record:
    """Put counts, and lines to show below them, into the table: `record({"kills": 10})`."""

    def put(counts: Mapping[str, int], lines: Sequence[str] = ()) -> None:
        record_property("counted", json.dumps((_campaign(request), counts, lines)))

    return put


@pytest.fixture
def outcome(request: pytest.FixtureRequest, record: Record) -> Outcome:
    """Run a shard of a campaign (see `shards`)."""
    found = run(request.param)
    record({name: n for name, n in found.counts.items() if not name.startswith("at ")}, found.lines)
    return found
