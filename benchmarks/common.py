"""What every benchmark shares: where it ran, what it used, and one JSON document per run.

A document says enough to repeat the run and nothing of this machine's folders. It knows no benchmark.

    given = parser("opening", __doc__).parse_args()
    finish("opening", given, results={"ratio": 1.2}, summary=["ratio 1.2"])
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvllm.process import prepare_libraries

if TYPE_CHECKING:
    from kvllm import KnowledgeBase, Progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

if str(ROOT) not in sys.path:  # for `tests.store.bench`
    sys.path.append(str(ROOT))
prepare_libraries()  # as the command line does


def parser(name: str, doc: str | None, *, seed: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark takes."""
    made = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if seed:
        made.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    made.add_argument("--out", type=Path, help="the JSON's file, or an existing folder (default: benchmarks/results/)")
    made.add_argument("--json", action="store_true", help="print the JSON document instead of the summary")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    return made


def finish(
    name: str,
    given: argparse.Namespace,
    *,
    results: Mapping[str, Any],
    summary: Sequence[str],
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
) -> Path:
    """Store and print the document of a finished run, and return its file.

    Args:
        name: The benchmark.
        given: Its parsed options: the configuration.
        results: What was measured.
        summary: The same for a person, a line each.
        model: Name, revision and digest of the base model.
        data: sha256 by name of what was fed in.
    """
    from kvllm.experiments.environment import git_state

    moment = datetime.now(timezone.utc)
    shown = {key: value for key, value in vars(given).items() if key not in ("out", "json", "quiet")}
    document = {
        "benchmark": name,
        "finished_at": moment.isoformat(timespec="seconds"),
        "config": {key: _without_folder(value) for key, value in shown.items()},
        "environment": environment(),
        "git": git_state(),
        "model": dict(model or {}),
        "data": dict(data or {}),
        "results": dict(results),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    out: Path = given.out or RESULTS
    if given.out is None or out.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        out = out / f"{name}-{moment:%Y-%m-%d-%H%M%S}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if given.json:
        sys.stdout.write(text)
    else:
        print("\n".join(summary))
        print(f"\nstored as {out.relative_to(ROOT) if out.resolve().is_relative_to(ROOT) else out.name}")
    return out


def _without_folder(value: Any) -> Any:
    """Return a path as text, an absolute one's last part: a document names no folder of this machine."""
    if isinstance(value, (str, Path)) and Path(value).is_absolute():
        return Path(value).name
    return str(value) if isinstance(value, Path) else value


# ------------------------------------------------------------------ where it ran


def environment() -> dict[str, Any]:
    """Return versions and the machine's size; no names of hosts or folders."""
    from kvllm.experiments.environment import machine

    found = machine()
    found["load_1m"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    found["omp"] = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    if "torch" in sys.modules:
        found["threads"] = sys.modules["torch"].get_num_threads()
        found["cuda"] = sys.modules["torch"].version.cuda
    return found


def model_facts(kb: KnowledgeBase) -> dict[str, Any]:
    """Return what identifies the base model of a knowledge base."""
    info = kb.info()
    name = str(info["model"])
    return {
        "name": _without_folder(name),
        "revision": info["revision"],
        "digest": info["base_digest"],
        "dtype": info["dtype"],
    }


def sha256(*parts: str) -> str:
    """Return the sha256 of texts, NUL between them."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


# ------------------------------------------------------------------ running


@contextmanager
def progress(given: argparse.Namespace, total: int, what: str) -> Iterator[Bar]:
    """Show a bar on stderr while the block runs; nothing with --quiet or off a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = Progress(
        *columns,
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
        disable=given.quiet or not console.is_terminal,
    )
    with shown:
        yield Bar(shown, shown.add_task(what, total=total, detail=""))


class Bar:
    """One progress bar; also takes the engine's own `Progress` records."""

    def __init__(self, shown: Any, task: Any) -> None:
        self._shown = shown
        self._task = task

    def step(self, detail: str = "") -> None:
        self._shown.update(self._task, advance=1, detail=detail)

    def listen(self, tick: Progress) -> None:
        numbers = f" recall {tick.recall:.2f}" if tick.recall is not None else ""
        self._shown.update(self._task, detail=f"{tick.stage} {tick.step}/{tick.total or '?'}{numbers}")


@contextmanager
def working_folder(keep: Path | None = None) -> Iterator[Path]:
    """Give a folder for knowledge bases: a temporary one, or the one that the user wants to keep."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="kvllm-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


class Journal:
    """Rows of a long run, on disk as soon as each is known; a run that is called again finds them.

    Raises:
        SystemExit: the file holds rows of another configuration.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        head = json.dumps({"config": config}, default=str, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [head, ""]
        if lines[0] != head:
            raise SystemExit(f"{path.name} holds rows of another configuration ({lines[0]}); choose another folder.")
        whole = lines[: len(lines) - 1]  # a last line without its end was cut off by a kill
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in whole[1:]]
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def child(code: str, *arguments: str, env: Mapping[str, str] | None = None) -> tuple[Any, float]:
    """Run Python code in a fresh process; return the JSON of its last line on stdout, and the wall seconds."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"the child process failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]), seconds


def spread(values: Iterable[float], digits: int = 3) -> dict[str, Any]:
    """Return median, least, largest and n."""
    listed = sorted(values)
    if not listed:
        return {"median": None, "min": None, "max": None, "n": 0}
    median = statistics.median(listed)
    return {
        "median": round(median, digits),
        "min": round(listed[0], digits),
        "max": round(listed[-1], digits),
        "n": len(listed),
    }
