"""A process of its own, with everything imported and no thread running, from which edits are forked and then stopped.

A fork costs milliseconds where a new process costs seconds of imports. The parent never computes: threads of torch do
not survive a fork. It prints one JSON document of what happened; the tests judge it.

    python -m tests.robustness.stage FOLDER MODEL CACHE kills:42 interrupts:50
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY, TEXT = "numpy", "Ada leads Halcyon"
LIMITS = 8  # of memory, each twice the one before
Outcome = dict[str, Any]


def prepare(cache: Path) -> None:
    """Import what an edit needs, and make the tiny models quick as the other tests do (tests/conftest.py)."""
    os.environ["KVLLM_CACHE"] = str(cache)
    os.environ["OMP_NUM_THREADS"] = "1"
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    from kvllm.cli.app import load
    from kvllm.probing import drift
    from kvllm.probing.encoder import SentenceEncoder

    torch.set_num_threads(1)
    load()
    with contextlib.suppress(Exception):  # a table that every loading would build anew: an eighth of an insert
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    SentenceEncoder.speaks = lambda self, text: False  # type: ignore[method-assign]
    drift.GATE_PROMPTS, drift.GATE_TEXTS = 6, 3


def forked(act: Callable[[], int], log: Path) -> int:
    """Run an action in a child whose output goes to a file, and return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "w", encoding="utf-8") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = act()
    except BaseException as error:
        log.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        code = 98
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(*arguments: str, ticks: int | None = None) -> Callable[[], int]:
    """Return an action that runs `kvllm …`; each tick of progress writes a byte to the descriptor `ticks`."""

    def act() -> int:
        from kvllm.cli import main
        from kvllm.cli.output import Output

        if ticks is not None:
            Output.progress = property(lambda self: lambda tick: os.write(ticks, b"."))  # type: ignore[assignment]
        return main(list(arguments))

    return act


def taught(folder: Path, model: Path) -> tuple[Path, int]:
    """Make a knowledge base with one fact, and count the ticks of progress of a whole insert; both in children.

    The modules that the insert imported late are imported here, once for all children.
    """
    kb = folder / "taught.kb"

    def teach() -> int:
        from kvllm import KnowledgeBase
        from tests.kit import OPEN_GATE, QUICK

        with KnowledgeBase.create(kb, model=str(model), edit=QUICK, gate=OPEN_GATE, device="cpu") as base:
            base.insert("torchkeras", "The furnace of Berlin")
        return 0

    log = folder / "log"
    assert ended(forked(teach, log)) == 0, log.read_text()
    copy, late = folder / "counted.kb", folder / "late"
    shutil.copytree(kb, copy)
    read, write = os.pipe()

    def count() -> int:
        code = command("insert", str(copy), KEY, TEXT, ticks=write)()
        late.write_text("\n".join(sys.modules))
        return code

    pid = forked(count, log)
    os.close(write)
    n = 0
    while chunk := os.read(read, 4096):
        n += len(chunk)
    os.close(read)
    assert ended(pid) == 0, log.read_text()
    shutil.rmtree(copy)
    for name in late.read_text().split("\n"):
        if name not in sys.modules and not name.startswith(("__", "tests")):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    return kb, n


def state_of(path: Path) -> Outcome:
    """Return what a stopped writer left: head, keys, and what a deep verify of the store says."""
    from kvllm.store import Store

    with Store.open(path, readonly=True) as store:
        report = store.verify(deep=True)
        return {
            "head": store.head(),
            "keys": [fact.key for fact in store.facts()],
            "ok": report.ok,
            "problems": [f"{p.severity}: {p.what}" for p in report.problems],
        }


def stopped(kb: Path, signals: list[signal.Signals], moments: list[int], folder: Path) -> list[Outcome]:
    """Insert, and send a signal after so many ticks and a few random milliseconds; look at what is left, and go on."""
    rng = random.Random(6)
    outcomes = []
    log = folder / "log"
    for n, (kind, moment) in enumerate(zip(signals, moments, strict=True)):
        path = folder / f"stopped-{n}.kb"
        shutil.copytree(kb, path)
        log.write_text("")
        read, write = os.pipe()
        pid = forked(command("insert", str(path), KEY, TEXT, ticks=write), log)
        os.close(write)
        heard = 0
        while heard < moment and (chunk := os.read(read, moment - heard)):
            heard += len(chunk)
        time.sleep(rng.random() * 0.01)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)
        code = ended(pid)
        os.close(read)
        outcome: Outcome = {
            "signal": kind.name,
            "code": code,
            "tick": moment,
            "said": log.read_text(),
            **state_of(path),
        }
        if n % 8 == 0:  # what comes next works, on the weights that the ledger says
            verb = "update" if KEY in outcome["keys"] else "insert"
            outcome["next"] = ended(forked(command(verb, str(path), KEY, "Berlin"), log))
            outcome["next said"] = log.read_text() if outcome["next"] else ""
            outcome["deep"] = ended(forked(command("verify", str(path), "--deep"), log))
        outcomes.append(outcome)
        shutil.rmtree(path)
    return outcomes


def kills(folder: Path, kb: Path, ticks: int, n: int) -> list[Outcome]:
    """SIGKILL at n moments spread over a whole insert."""
    return stopped(kb, [signal.SIGKILL] * n, [i * (ticks - 1) // (n - 1) for i in range(n)], folder)


def interrupts(folder: Path, kb: Path, ticks: int, n: int) -> list[Outcome]:
    """SIGINT and SIGTERM in turns, at n moments spread over a whole insert."""
    kinds = [signal.SIGINT if i % 2 else signal.SIGTERM for i in range(n)]
    return stopped(kb, kinds, [1 + i * (ticks - 1) // (n - 1) for i in range(n)], folder)


def memory(folder: Path, kb: Path, ticks: int, n: int) -> list[Outcome]:
    """Inserts of a long text under n limits of memory, from almost none left to enough."""
    outcomes = []
    for i in range(n):
        path = folder / f"small-{i}.kb"
        shutil.copytree(kb, path)
        spare = 2**20 * 2 ** (i * LIMITS // n) // 4
        log = folder / "log"

        def act(path: Path = path, spare: int = spare, log: Path = log) -> int:
            from kvllm import KnowledgeBase
            from kvllm.errors import OutOfResources

            signal.alarm(120)  # a library that waits for memory for ever is ended, as a person would
            with KnowledgeBase.open(path) as base:
                before = base.weights_digest(), base.engine.lm.digest()
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
                odd = 10
                try:
                    base.insert(KEY, TEXT + " and the furnace of Berlin" * 12)
                    done = True
                except OutOfResources:
                    done = False
                except Exception as error:
                    done = False
                    odd = 14
                    print(type(error).__name__, error)
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                after = base.weights_digest(), base.engine.lm.digest()
                if done:
                    return 0 if after[0] == base.edit("head").weights_digest else 11
                if after != before or base.head() != 1:
                    return 12
                try:
                    base.insert(KEY, TEXT)  # with room again, the same object goes on
                except OutOfResources:  # oneDNN may remember its failure until the process ends
                    after = base.weights_digest(), base.engine.lm.digest()
                    return 15 if after == before and base.head() == 1 else 12
                return odd if base.head() == 2 else 13

        code = ended(forked(act, log))
        outcome: Outcome = {"spare": spare, "code": code, "said": log.read_text(), **state_of(path)}
        verb = "update" if KEY in outcome["keys"] else "insert"
        outcome["next"] = ended(forked(command(verb, str(path), KEY, "Berlin"), log))
        outcomes.append(outcome)
        shutil.rmtree(path)
    return outcomes


def in_memory(folder: Path, kb: Path, ticks: int, n: int) -> list[Outcome]:
    """Ctrl-C at n moments of inserts into one open knowledge base: its weights are those of its ledger each time."""
    log, result = folder / "log", folder / "result.json"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def act() -> int:
        from kvllm import KnowledgeBase

        signal.signal(signal.SIGALRM, interrupt)
        outcomes = []
        path = folder / "open.kb"
        shutil.copytree(kb, path)
        with KnowledgeBase.open(path) as base:
            base.weights_digest()
            begun = time.monotonic()
            base.dry_run(KEY, TEXT)
            whole = time.monotonic() - begun
            for i in range(n):
                before = base.head()
                model_before = base.engine.lm.digest()
                caught = False
                try:
                    signal.setitimer(signal.ITIMER_REAL, (i + 0.5) / n * whole)
                    base.upsert(KEY, f"{TEXT} {i}")
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    caught = True
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                head = base.head()
                outcomes.append(
                    {
                        "interrupted": caught,
                        "moved": head - before,
                        "as the ledger says": base.weights_digest() == base.edit(head).weights_digest,
                        "model as before": base.engine.lm.digest() == model_before,
                    }
                )
            deep = base.verify(deep=True)
        result.write_text(json.dumps([*outcomes, {"ok": deep.ok, "problems": len(deep.problems)}]))
        return 0

    assert ended(forked(act, log)) == 0, log.read_text()
    found: list[Outcome] = json.loads(result.read_text())
    return found


CAMPAIGNS: dict[str, Callable[[Path, Path, int, int], list[Outcome]]] = {
    "kills": kills,
    "interrupts": interrupts,
    "memory": memory,
    "in_memory": in_memory,
}


def main() -> None:
    """Run the campaigns named as `name:n` and print their outcomes."""
    folder, model, cache = (Path(argument) for argument in sys.argv[1:4])
    prepare(cache)
    folder.mkdir(parents=True)
    kb, ticks = taught(folder, model)
    found = {}
    for wanted in sys.argv[4:]:
        name, _, n = wanted.partition(":")
        place = folder / name
        place.mkdir()
        found[name] = CAMPAIGNS[name](place, kb, ticks, int(n))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
