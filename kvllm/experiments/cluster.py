"""An experiment's runs on a Ray cluster: one task a run; finished steps travel to one actor, which alone writes them.

A task whose worker dies is started again by Ray, perhaps elsewhere: the experiment's folder must be the same on every
machine, or a run whose files were left behind fails and says so. Steps that the actor has are not kept twice. Needs the
extra `ray`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kvllm.errors import ConfigError, KvllmError
from kvllm.experiments.declared import Declared, Run
from kvllm.store.results import Results

_RETRIES = 5


class _Writer:
    """Runs as an actor beside the leader: the only one that writes to the results database."""

    def __init__(self, path: str) -> None:
        self._path = path

    def finish(self, run: str, step: str, rows: Sequence[Mapping[str, Any]], seconds: float) -> None:
        with Results(self._path) as results:
            results.finish(run, step, rows, seconds=seconds)

    def finished(self, run: str | None = None) -> dict[str, set[str]]:
        with Results(self._path) as results:
            return results.finished(run)


class _Sender:
    """A recorder that hands steps to the actor, and waits until they are kept."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def finish(self, run: str, step: str, rows: Sequence[Mapping[str, Any]], *, seconds: float) -> None:
        import ray

        ray.get(self._actor.finish.remote(run, step, list(rows), seconds))

    def finished(self, run: str | None = None) -> dict[str, set[str]]:
        import ray

        found: dict[str, set[str]] = ray.get(self._actor.finished.remote(run))
        return found


def run_on_ray(
    declared: Declared,
    waiting: Sequence[Run],
    home: Path,
    results: Results,
    *,
    jobs: int,
    look: Callable[[], None],
) -> dict[str, str]:
    """Do what is left on the cluster that `RAY_ADDRESS` names, or on one that is started here with `jobs` processors.

    Args:
        declared: The experiment.
        waiting: Its unfinished runs.
        home: Its folder, at the same path on every machine; the runs' files are there.
        results: The leader's own connection; only its place is used.
        jobs: Processors of a cluster that is started here.
        look: Called now and then, to look for finished steps.

    Returns:
        Why runs could not be finished, by run.

    Raises:
        ConfigError: ray is not installed.
        OutOfResources: a worker wants disk or memory.
    """
    ray: Any
    try:
        ray = import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "Ray is not installed; install the extra in kvllm's folder: pip install -e '.[ray]'. Nothing was run."
        ) from error
    from kvllm.experiments.runner import attempt, keep_failure

    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        size = {} if address else {"num_cpus": jobs}
        ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False, **size)
    try:
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Writer).remote(str(results.path))
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(attempt)
        started = {task.remote(declared, run, home, threads=1, recorder=_Sender(actor)): run for run in waiting}
        failed: dict[str, str] = {}
        pending = list(started)
        while pending:
            done, pending = ray.wait(pending, timeout=1.0)
            look()
            for reference in done:
                try:
                    failure = ray.get(reference)
                except ray.exceptions.RayError as error:
                    why = f"its worker died too often ({type(error).__name__}); what was finished is kept."
                    failure = (KvllmError.code, why)
                keep_failure(failed, started[reference], failure)
        return failed
    finally:
        if own:
            ray.shutdown()
