"""Benchmarks of the package lm-eval, asked of the base and of the edited model; only where it is installed.

Knows a loaded model and lm-eval's Python API. A task is one that lm-eval knows by name, or a YAML file that declares a
task of your own. The base's results are cached like the drift suite's; those of YAML files, whose data may change, are
measured anew.

    compare_tasks(lm, base_weights, digest, ["arc_easy"])["lm_eval/arc_easy/acc_delta"].value
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvllm.cachefile import read_checked, write_checked
from kvllm.config import cache_folder
from kvllm.errors import ConfigError
from kvllm.records import Metric

if TYPE_CHECKING:
    from kvllm.lm.model import LanguageModel

Values = dict[str, tuple[float, int]]  # "task/metric" → value, examples
BATCH = 8


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what lm-eval could not run, before anything is measured.

    Raises:
        ConfigError: lm-eval is not installed, or has no such task.
    """
    known = set(_lm_eval("tasks").TaskManager().all_tasks)
    missing = [task for task in tasks if not (Path(task).is_file() if _is_file(task) else task in known)]
    if missing:
        raise ConfigError(
            f"lm-eval has no task {', '.join(missing)}; nothing was measured. `lm_eval --tasks list` shows "
            "them; a task of your own is a YAML file."
        )


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def compare_tasks(
    lm: LanguageModel,
    base_weights: Callable[[], AbstractContextManager[Any]],
    base_digest: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
) -> dict[str, Metric]:
    """Return each task's metrics of the model as it is, of its base, and their difference.

    Args:
        lm: The model as it is now.
        base_weights: Puts the base's weights into the model for as long as it is open.
        base_digest: Identifies the base in the cache.
        tasks: Names that lm-eval knows, or YAML files.
        limit: Most examples per task.
    """
    release = metadata.version("lm_eval")
    said = "\x00".join([base_digest, release, str(limit), str(next(lm.model.parameters()).dtype), *sorted(tasks)])
    path = cache_folder() / "drift" / f"lm-eval-{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"
    own = any(_is_file(task) for task in tasks)
    cached = None if own else read_checked(path)
    if cached is not None:
        before: Values = {name: (value, n) for name, (value, n) in json.loads(cached).items()}
    else:
        with base_weights():
            before = _evaluate(lm, tasks, limit)
        if not own:
            write_checked(path, json.dumps(before).encode())
    now = _evaluate(lm, tasks, limit)
    found: dict[str, Metric] = {}
    for name, (value, n) in now.items():
        suite = f"lm-eval {release}"
        found[f"lm_eval/{name}"] = Metric(value, n, "lm-eval, without chat template", name.split("/")[1], suite)
        if name in before:
            base = before[name][0]
            found[f"lm_eval/{name}_base"] = Metric(base, n, "the base model", name.split("/")[1], suite)
            found[f"lm_eval/{name}_delta"] = Metric(value - base, n, "now less base", name.split("/")[1], suite)
    return found


def _evaluate(lm: LanguageModel, tasks: Sequence[str], limit: int | None) -> Values:
    wrapped = _lm_eval("models.huggingface").HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=BATCH)
    asked = [str(Path(task).absolute()) if _is_file(task) else task for task in tasks]
    done = _lm_eval().simple_evaluate(model=wrapped, tasks=asked, limit=limit, log_samples=False)
    found: Values = {}
    for task, values in done["results"].items():
        n = int(done.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, (int, float)) and not metric.endswith("_stderr") and filtered:
                found[f"{task}/{metric}" + ("" if filtered == "none" else f" ({filtered})")] = (float(value), n)
    return found


def _lm_eval(part: str = "") -> Any:
    try:
        return importlib.import_module(f"lm_eval.{part}" if part else "lm_eval")
    except ImportError as error:
        raise ConfigError(
            "The lm-eval tasks need the package lm-eval, which is not installed; nothing was measured. "
            "Install it with `pip install lm-eval`."
        ) from error
