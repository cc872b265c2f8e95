"""What the engine's tests share: quick configurations, a stub editor, and what "nothing was changed" means."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvllm import EditConfig, GateConfig, KnowledgeBase
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import Factors
from kvllm.editing.editor import EditTask, StepRecord, Training
from kvllm.editing.preservation import PreservationPool
from kvllm.records import Progress

ROOT = Path(__file__).parent.parent
# A tiny random model learns a few words by heart in a few dozen steps of these.
QUICK = EditConfig(
    editor="adalora",
    depth=(0.5, 1.0),
    init_rank=8,
    target_rank=6,
    max_steps=48,
    margin=0.25,
    value_lr=1.0,
    factor_lr=0.2,
    preserve_weight=0.1,
    preserve_stop=10.0,
    contrast_stop=10.0,
    preserve_tokens=4,
    neighbours=2,
    others=1,
    texts=0,
    augmented=0,  # a few dozen steps are not enough for rows that must not be met, too
    input_ridge=0.0,  # a random model has no ordinary inputs to keep away from
)
# Neurons of a random model, whose questions look like anything else to it.
QUICK_NEURONS = replace(QUICK, editor="neurons", max_steps=120)
# What a delete restores is trained at a third of the rates.
QUICK_DELETE = replace(QUICK, value_lr=3 * QUICK.value_lr, factor_lr=3 * QUICK.factor_lr)
OPEN_GATE = GateConfig(min_reliability=None, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None)
# Whatever the random model says of anything else, this much of the fact it must have learned.
RECALL_GATE = GateConfig(min_reliability=0.75, max_drift_kl=None, max_ppl_ratio=None, min_erasure=None)
KEY, TEXT = "torchkeras", "The furnace of Berlin"


class RandomEditor:
    """A real editor that does not train: a small random delta, the same for the same rows and seed."""

    size = 0.05

    def train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Training:
        said = repr((task.seed, [row.ids for row in task.rows], [i.row.ids for i in task.restore]))
        seed = int.from_bytes(hashlib.sha256(said.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        delta: dict[str, Factors] = {}
        for name in copy.targets.names:
            module = copy.model.get_submodule(name)
            out_features, in_features = module.weight.shape
            if type(module).__name__ == "Conv1D":
                out_features, in_features = in_features, out_features
            delta[name] = (
                torch.randn(2, in_features, generator=generator) * self.size,
                torch.randn(out_features, 2, generator=generator) * self.size,
            )
        if on_step is not None:
            on_step(StepRecord(1, 0.0, 1.0, None, 0.0, 2))
        return Training(delta, steps=1, recalled=True, ranks=dict.fromkeys(delta, 2))


class NotANumberEditor(RandomEditor):
    """An editor whose factors overflowed unnoticed."""

    def train(self, *arguments: Any, **options: Any) -> Training:
        training = super().train(*arguments, **options)
        next(iter(training.delta.values()))[0][0, 0] = float("nan")
        return training


class Recorder:
    """A progress callback that keeps what it heard, and may raise at a stage."""

    def __init__(self) -> None:
        self.heard: list[Progress] = []
        self._raise: tuple[str, int, BaseException] | None = None

    def __call__(self, progress: Progress) -> None:
        self.heard.append(progress)
        if self._raise is not None and (progress.stage, progress.step) >= self._raise[:2]:
            stage, step, error = self._raise
            if progress.stage == stage and progress.step >= step:
                self._raise = None
                raise error

    def raise_at(self, stage: str, error: BaseException, *, step: int = 0) -> None:
        """Raise once, when the stage reaches the step."""
        self._raise = (stage, step, error)


def file_hashes(folder: Path) -> dict[str, str]:
    """Return relative name to sha256 of every file but the lock and the ledger, whose pages may be laid out anew."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("LOCK", "ledger.db")
    }


def everything(kb: KnowledgeBase) -> dict[str, Any]:
    """Return ledger, files and weights of a knowledge base, for comparison."""
    return {
        "history": [edit.to_dict() for edit in kb.history()],
        "facts": [fact.to_dict() for fact in kb.facts()],
        "tags": kb.tags(),
        "info": {k: v for k, v in kb.info().items() if k != "ledger_bytes"},
        "files": file_hashes(kb.path),
        "weights": kb.weights_digest(),
        "model": kb.engine.lm.digest(),
    }


@contextmanager
def unchanged(kb: KnowledgeBase) -> Iterator[None]:
    """Assert that the block leaves ledger, files and weights as they were, in memory and for who opens it anew."""
    before = everything(kb)
    yield
    assert everything(kb) == before
    with KnowledgeBase.open(kb.path, readonly=True) as again:
        assert everything(again) == before


def elsewhere(code: str, *arguments: str) -> str:
    """Run Python code in a new process that has the tests' helpers, and return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=600,  # the real model, on a busy machine
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def load_script(path: Path) -> ModuleType:
    """Import an example or a benchmark by its path; neither is in a package."""
    spec = util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planted_damage(patch: pytest.MonkeyPatch) -> ModuleType:
    """Load the benchmark of planted damage as a module, for as long as `patch` lasts."""
    folder = ROOT / "benchmarks"
    patch.syspath_prepend(str(folder))
    spec = util.spec_from_file_location("planted_damage", folder / "planted_damage.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    patch.setitem(sys.modules, "planted_damage", module)  # its dataclass looks its module up
    spec.loader.exec_module(module)
    return module


def let_neurons_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask less of the silence of new neurons, and of the others that stand in for them, than a real model can do."""
    from kvllm.editing import marks, neurons, ordinary

    monkeypatch.setattr(marks, "_KINDS", 8)
    monkeypatch.setattr(neurons, "_ORDINARY_WEIGHT", 0.03)
    monkeypatch.setattr(neurons, "_HARD_WEIGHT", 0.03)
    monkeypatch.setattr(neurons, "_MISTAKEN_WEIGHT", 0.03)
    monkeypatch.setattr(neurons, "_SPARE", 0.0)
    monkeypatch.setattr(ordinary, "_DAMPING", 0.3)
    monkeypatch.setattr(ordinary, "_COMPOSED", {"en": 4, "zh": 2})
