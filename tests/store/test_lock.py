"""One writer at a time, whatever happens to the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvllm.errors import Busy, StaleHead
from kvllm.store import Store
from tests.store.bench import Bench

HOLD = """
import sys
from kvllm.store import Store
with Store.open(sys.argv[1]) as store, store.writer(timeout=5):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_busy_and_names_the_holder(bench: Bench) -> None:
    process = holder(bench.store.path)
    begun = time.monotonic()
    with pytest.raises(Busy, match=f"process {process.pid} "), bench.store.writer(timeout=0.2):
        pass
    assert time.monotonic() - begun > 0.15
    assert bench.store.head() == 0
    assert bench.keys() == []
    process.communicate("\n", timeout=60)
    with bench.store.writer(timeout=5):
        bench.insert("a")


def test_lock_is_released_when_the_holder_is_killed(bench: Bench) -> None:
    process = holder(bench.store.path)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    with bench.store.writer(timeout=5):
        bench.insert("a")


def test_lock_is_reentrant_in_one_store_and_exclusive_between_two(bench: Bench) -> None:
    with Store.open(bench.store.path) as other:
        with bench.store.writer(timeout=1):
            with bench.store.writer(timeout=1):
                bench.insert("a")
            with pytest.raises(Busy), other.writer(timeout=0.1):
                pass
        with other.writer(timeout=1), pytest.raises(Busy), bench.store.writer(timeout=0):
            pass


def test_lock_is_released_after_an_error(bench: Bench) -> None:
    with pytest.raises(StaleHead), bench.store.writer(timeout=1):
        raise StaleHead("x")
    with Store.open(bench.store.path) as other, other.writer(timeout=0):
        pass


COMMITS = """
import sys
from kvllm.errors import StaleHead
from kvllm.store import NewEdit, Store
from tests.store.bench import fact, tiny_delta
with Store.open(sys.argv[1]) as store:
    for n in range(6):
        key = f"{sys.argv[2]} {n}"
        while True:
            try:
                store.commit(NewEdit("insert", (key,), store.head(), facts=(fact(key),)), tiny_delta(hash(key) % 99))
                break
            except StaleHead:
                pass
"""


def test_two_processes_that_commit_at_once_lose_nothing(bench: Bench) -> None:
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMITS, str(bench.store.path), name],
            cwd=root,
            env={**os.environ, "PYTHONPATH": "."},
        )
        for name in ("left", "right")
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert bench.store.head() == bench.store.count() == 12


def test_two_threads_may_share_one_store(bench: Bench) -> None:
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(50):
                found = bench.store.facts()
                assert len(found) == len(bench.store.facts(len(found)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for key in "abcdef":
        bench.insert(key)
    for thread in threads:
        thread.join()
    assert errors == []
