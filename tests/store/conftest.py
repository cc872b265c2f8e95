"""Fixtures of the store's tests: every knowledge base that is not damaged on purpose is verified when its test ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvllm.store import Store, failpoints, files
from tests.store.bench import BASE, Bench


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    return tmp_path / "my.kb"


@pytest.fixture
def verified() -> Iterator[Callable[[Path], None]]:
    """Register a knowledge base that must verify, deeply and without a warning, when the test is over."""
    paths: list[Path] = []
    yield paths.append
    failpoints.hook = None
    for path in paths:
        with Store.open(path) as store:
            report = store.verify(deep=True)
        assert report.problems == ()
        assert report.ok


@pytest.fixture(scope="session")
def empty_kb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty knowledge base to copy: creating one costs 0.1 s of fsync."""
    path = tmp_path_factory.mktemp("store") / "empty.kb"
    Store.create(path, BASE, {"model": "tiny"}).close()
    return path


@pytest.fixture
def damaged(kb: Path, empty_kb: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """An empty knowledge base, opened, for tests that damage it: they call verify themselves.

    Nothing is flushed to the disk here, which no test can observe and most of the time went into; that the calls are
    made, and in which order, is asserted in test_crash.py.
    """
    shutil.copytree(empty_kb, kb)
    monkeypatch.setattr(files, "fsync_fd", lambda fd: None)
    with Store.open(kb) as store:
        store._connection().execute("PRAGMA synchronous = OFF")
        yield Bench(store)


@pytest.fixture
def bench(verified: Callable[[Path], None], damaged: Bench) -> Bench:
    """An empty knowledge base, opened, which must verify at the end."""
    verified(damaged.store.path)
    return damaged


@pytest.fixture(autouse=True)
def _no_failpoint_survives() -> Iterator[None]:
    yield
    failpoints.hook = None
