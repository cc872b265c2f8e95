"""Run an experiment: independent runs side by side, each step kept as soon as it is finished, resumed after any kill.

On one machine in processes (or in this one, with one job); on a Ray cluster with `ray=True`. A worker that dies is
replaced, and its run goes on where its last finished step ended.

    outcome = run_experiment(load("small.toml"), "out", jobs=2)
    outcome.rows
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from kvllm.errors import ConfigError, KvllmError, OutOfResources, StoreError
from kvllm.experiments.declared import KINDS, Declared, Run
from kvllm.experiments.desk import Desk
from kvllm.experiments.environment import environment, model_record
from kvllm.records import Progress
from kvllm.store.results import Results

RESULTS_FILE = "results.db"
# A run whose worker was killed so often without finishing a step in between is given up: it takes the machine with it.
MOST_DEATHS = 3
_POLL_SECONDS = 0.5
_PARENT_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Outcome:
    """An experiment, finished or not: with `failed` or `unfinished`, there is more to be done.

    Attributes:
        runs: All its runs.
        rows: All rows, each with run and step, in the order of the runs.
        failed: Why runs could not be finished, by run.
        seconds: Work of all finished steps together.
        noted: Environment and model, as they were noted.
        unfinished: Runs of which steps are left.
    """

    declared: Mapping[str, Any]
    runs: tuple[Run, ...]
    rows: tuple[dict[str, Any], ...]
    failed: Mapping[str, str]
    seconds: float
    noted: Mapping[str, Any]
    unfinished: tuple[str, ...]


def runs_of(declared: Declared) -> list[Run]:
    """Return the independent runs that a declaration stands for.

    Raises:
        ConfigError: a setting of its kind cannot be used.
    """
    found: list[Run] = _module(declared.kind).runs(declared)
    return found


def run_experiment(
    declared: Declared,
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    ray: bool = False,
    only: Sequence[str] = (),
    again: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Do what is left of an experiment, and return everything it found.

    Args:
        declared: What is run.
        folder: Holds the results database and the runs' own files; an earlier session's work there is kept.
        jobs: Runs at once; the processor's cores are shared among them.
        ray: Run on the Ray cluster that the environment names, or on one that is started here.
        only: Names of arms or of runs: the others wait for another time. By default all.
        again: Names of arms or of runs that begin anew: what they found is forgotten, and their folders are removed.
        progress: Called with steps done, of how many, and the time that remains.

    Raises:
        ConfigError: fewer than one job, or a name in `only` or `again` that no arm has.
        StoreError: the folder holds results of another declaration, or a run's folder cannot be removed.
        Busy: another process leads this experiment.
        KvllmError: a run failed; what the others found is kept.
    """
    if jobs < 1:
        raise ConfigError(f"An experiment needs at least one job, not {jobs}; nothing was run.")
    home = Path(folder)
    runs = runs_of(declared)
    anew = _chosen(runs, again) if again else []
    asked = _chosen(runs, only)
    chosen = [run for run in runs if run in asked or run in anew]
    with Results(home / RESULTS_FILE) as results:
        results.take()
        results.refuse_other(declared.digest)
        unfinished = _unfinished(chosen, results)
        waiting = [run for run in chosen if run in anew or run in unfinished]
        # Before the folder is this experiment's: a model that is not there takes none.
        model = model_record(declared) if waiting else None
        results.open_experiment(declared.configuration(), digest=declared.digest)
        for run in anew:
            _forget(run, home, results)
        meter = _Meter(chosen, results, progress)
        if waiting:
            _note_session(results, waiting, environment(threads=1 if ray else _threads(jobs)))
            results.note("model", model)
        meter.show()
        if not waiting:
            failed: dict[str, str] = {}
        elif ray:
            from kvllm.experiments.cluster import run_on_ray

            failed = run_on_ray(declared, waiting, home, results, jobs=jobs, look=meter.look)
        elif jobs == 1:
            failed = _run_here(declared, waiting, home, results, meter)
        else:
            failed = _run_in_processes(declared, waiting, home, results, meter, jobs)
        return _outcome(declared, runs, results, failed)


def read_outcome(declared: Declared, folder: str | os.PathLike[str]) -> Outcome:
    """Return what is there of an experiment, without running anything.

    Raises:
        StoreError: there are no results, or they are of another declaration.
    """
    with Results(Path(folder) / RESULTS_FILE, readonly=True) as results:
        results.refuse_other(declared.digest)
        return _outcome(declared, runs_of(declared), results, {})


def _outcome(declared: Declared, runs: Sequence[Run], results: Results, failed: Mapping[str, str]) -> Outcome:
    noted = {"model": results.noted("model"), "sessions": _sessions(results)}
    places = {(run.id, step): (i, j) for i, run in enumerate(runs) for j, step in enumerate(run.steps)}
    rows = [row for row in results.rows() if (row["run"], row["step"]) in places]
    rows.sort(key=lambda row: places[row["run"], row["step"]])  # stable: within a step as they were written
    unfinished = tuple(run.id for run in _unfinished(runs, results))
    seconds = sum(results.seconds().values())
    return Outcome(results.declared(), tuple(runs), tuple(rows), failed, seconds, noted, unfinished)


def _forget(run: Run, home: Path, results: Results) -> None:
    """Let a run begin anew. Its folder goes first: killed in between, the run is refused, not mixed of two."""
    folder = home / "runs" / run.id
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise StoreError(f"The folder {folder} cannot be removed: {error}; nothing was run.") from error
    results.forget(run.id)


def _note_session(results: Results, runs: Sequence[Run], found: Mapping[str, Any]) -> None:
    """Keep where and at which commit these runs go on: an experiment may be finished by another version of the code."""
    sessions = _sessions(results)
    last = sessions[-1] if sessions else None
    ids = [run.id for run in runs]
    if last is not None and last["environment"] == found:
        last["runs"] = [*last["runs"], *(i for i in ids if i not in last["runs"])]
    else:
        sessions.append({"environment": dict(found), "runs": ids})
    results.note("sessions", sessions)


def _sessions(results: Results) -> list[dict[str, Any]]:
    """Return what was noted of the sessions, oldest first: of an older database the first one, of unknown runs."""
    first = results.noted("environment")
    return list(results.noted("sessions") or ([{"environment": first, "runs": []}] if first else []))


def _unfinished(runs: Sequence[Run], results: Results) -> list[Run]:
    done = results.finished()
    return [run for run in runs if not set(run.steps) <= done.get(run.id, set())]


def _chosen(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """Return the runs that names of arms or of runs mean."""
    if isinstance(only, str):
        raise ConfigError("Give the arms to run as a list of names, not as one string; nothing was run.")
    unknown = [name for name in only if not any(name in (run.arm, run.id) for run in runs)]
    if unknown:
        raise ConfigError(
            f"There is no arm {unknown[0]!r} in this experiment, but "
            f"{', '.join(dict.fromkeys(run.arm for run in runs))}; nothing was run."
        )
    return [run for run in runs if not only or run.arm in only or run.id in only]


def execute(
    declared: Declared,
    run: Run,
    folder: Path,
    *,
    threads: int,
    recorder: Any = None,
    progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[str, float], None] | None = None,
) -> str:
    """Do what is left of one run, in this process, and return its id.

    Args:
        declared: The experiment.
        run: The run.
        folder: The experiment's.
        threads: Of torch: the same number gives the same numbers.
        recorder: Keeps finished steps; by default the results database in the folder.
        progress: Called with what the engine says.
        on_step: Called with each finished step.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _recorder(recorder, folder) as kept:
            desk = Desk(declared, run, folder / "runs" / run.id, kept, progress=progress, on_step=on_step)
            _module(declared.kind).execute(run, desk)
        return run.id
    finally:
        torch.set_num_threads(before)


def attempt(
    declared: Declared, run: Run, folder: Path, *, threads: int, recorder: Any = None
) -> tuple[str, str] | None:
    """Do what is left of a run in a worker; return what went wrong as code and sentence: errors may not travel."""
    try:
        execute(declared, run, folder, threads=threads, recorder=recorder)
    except KvllmError as error:
        return error.code, str(error)
    return None


def keep_failure(failed: dict[str, str], run: Run, failure: tuple[str, str] | None) -> None:
    """Note why a worker could not finish a run.

    Raises:
        OutOfResources: for want of disk or memory, which the other runs would want as well.
    """
    if failure is None:
        return
    code, sentence = failure
    if code == OutOfResources.code:
        raise OutOfResources(sentence)
    failed[run.id] = sentence


@contextmanager
def _recorder(given: Any, folder: Path) -> Iterator[Any]:
    if given is not None:
        yield given
        return
    with Results(folder / RESULTS_FILE) as results:
        yield results


def _module(kind: str) -> Any:
    assert kind in KINDS
    return import_module(f"kvllm.experiments.{kind}")


def _threads(jobs: int) -> int:
    return max(1, (os.cpu_count() or 1) // jobs)


# ------------------------------------------------------------------ in this process, and in several


def _run_here(
    declared: Declared, waiting: Sequence[Run], home: Path, results: Results, meter: _Meter
) -> dict[str, str]:
    failed: dict[str, str] = {}
    for run in waiting:
        try:
            execute(
                declared,
                run,
                home,
                threads=_threads(1),
                recorder=results,
                progress=meter.inside,
                on_step=lambda step, seconds, run=run: meter.step(run.id, step, seconds),  # type: ignore[misc]
            )
        except OutOfResources:
            raise
        except KvllmError as error:
            failed[run.id] = str(error)
    return failed


def _run_in_processes(
    declared: Declared, waiting: Sequence[Run], home: Path, results: Results, meter: _Meter, jobs: int
) -> dict[str, str]:
    """Keep `jobs` workers busy; a broken pool is made anew with what is left."""
    from multiprocessing import active_children, get_context

    failed: dict[str, str] = {}
    deaths = 0
    others = set(active_children())
    left = list(waiting)
    while left:
        finished = sum(map(len, results.finished().values()))
        # Spawned, not forked: torch's threads do not survive a fork.
        pool = ProcessPoolExecutor(
            jobs, mp_context=get_context("spawn"), initializer=_leave_with, initargs=(os.getpid(),)
        )
        try:
            futures: dict[Future[tuple[str, str] | None], Run] = {
                pool.submit(attempt, declared, run, home, threads=_threads(jobs)): run for run in left
            }
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                meter.look()
                for future in done:
                    failure = future.result()
                    left.remove(futures[future])
                    keep_failure(failed, futures[future], failure)
        except BrokenProcessPool as broken:
            moved = sum(map(len, results.finished().values())) > finished
            deaths = 0 if moved else deaths + 1
            if deaths >= MOST_DEATHS:
                raise OutOfResources(
                    f"Workers of the experiment were killed {deaths} times without finishing a step, perhaps for want "
                    f"of memory; what was finished is kept. Go on with fewer jobs."
                ) from broken
        except BaseException:
            # Whoever interrupts does not wait for runs of hours: a step that is cut off is worked out again.
            for worker in set(active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return failed


def _leave_with(parent: int) -> None:
    """End this worker when its leader has died, so that two do not work on one run."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Meter:
    """Tells how many steps are done and how long the rest will take: by this session's median step of each kind."""

    def __init__(self, runs: Sequence[Run], results: Results, progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._results = results
        self._steps = [(run.id, step) for run in runs for step in run.steps]
        self._seconds = {key: s for key, s in results.seconds().items() if key in set(self._steps)}
        self._begun = time.perf_counter()
        self._at_start = len(self._seconds)

    def step(self, run: str, step: str, seconds: float) -> None:
        """Note a finished step."""
        self._seconds[run, step] = seconds
        self.show(f"{run} {step}")

    def look(self) -> None:
        """Look into the database for steps that other processes finished."""
        if self._progress is None:
            return
        found = {key: s for key, s in self._results.seconds().items() if key in set(self._steps)}
        if len(found) != len(self._seconds):
            self._seconds = found
            self.show()

    def inside(self, tick: Progress) -> None:
        """Hand on what the engine says while a step runs."""
        if self._progress is not None:
            self._progress(tick)

    def show(self, note: str = "") -> None:
        """Say how far the experiment is."""
        if self._progress is not None:
            told = remaining(self._steps, self._seconds, time.perf_counter() - self._begun, self._at_start)
            words = ", ".join(word for word in (note, "" if told is None else f"about {in_words(told)} left") if word)
            self._progress(Progress("experiment", len(self._seconds), len(self._steps), note=words))


def remaining(
    steps: Sequence[tuple[str, str]], seconds: Mapping[tuple[str, str], float], elapsed: float, at_start: int
) -> float | None:
    """Return the seconds that the unfinished steps will take, or None before anything is known.

    A step is expected to take what finished ones of its kind took on average (its name up to the first digit), and runs
    go side by side as they did so far: by the work done per second of this session.
    """
    if not seconds:
        return None
    by_kind: dict[str, list[float]] = {}
    for (_, step), took in seconds.items():
        by_kind.setdefault(_kind(step), []).append(took)
    overall = sum(seconds.values()) / len(seconds)
    expected = {kind: sum(took) / len(took) for kind, took in by_kind.items()}
    left = sum(expected.get(_kind(step), overall) for key in steps if key not in seconds for step in (key[1],))
    fresh = list(seconds.values())[at_start:]
    speed = sum(fresh) / elapsed if fresh and elapsed > 0 else 1.0
    return left / max(speed, 1e-9)


def _kind(step: str) -> str:
    return step.rstrip("0123456789").rstrip("-")


def in_words(seconds: float) -> str:
    """Return a duration as a person says it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
