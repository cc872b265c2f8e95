"""The shape of growth: what is constant stays so, what is linear stays linear. Times: benchmarks/growth.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvllm.store import Store, files
from tests.robustness.growth import grow, measured

SMALL, LARGE = 60, 240


def test_opening_is_constant_and_reading_linear_in_the_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    monkeypatch.setattr(files, "fsync_fd", lambda fd: None)
    found = {n: measured(tmp_path / "g.kb") for n in grow(tmp_path / "g.kb", LARGE, points={SMALL, LARGE})}
    small, large = found[SMALL], found[LARGE]
    assert large["head_statements"] == small["head_statements"]
    assert large["head_peak_bytes"] < 2 * small["head_peak_bytes"] + 100_000
    times = LARGE / SMALL
    for name in ("ls", "chain", "history"):
        assert small[f"{name}_statements"] < large[f"{name}_statements"] < 1.5 * times * small[f"{name}_statements"]
        assert large[f"{name}_peak_bytes"] < 1.5 * times * small[f"{name}_peak_bytes"]
    for size in ("ledger_bytes", "delta_bytes"):
        assert 0.5 * times < large[size] / small[size] < 1.2 * times
    record("growth", edits=LARGE)
    with Store.open(tmp_path / "g.kb") as store:
        assert store.gc(dry_run=True).garbage == ()
        assert store.verify(deep=True).problems == ()
