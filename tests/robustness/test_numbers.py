"""Numbers gone wrong: NaN, infinity, exploding rates, no memory, at every step of training.

Every edit ends with the exit code of its cause (4, 10), and ledger, files and weights in memory are as before. The
test of the matrix trains a fact afterwards and compares the bits: nothing of the failed trainings is left. Real
signals and limits of memory: test_full_stack.py.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvllm import KnowledgeBase
from kvllm.cli import main
from kvllm.editing import adalora, engine
from kvllm.errors import EditFailed, KvllmError, OutOfResources
from kvllm.records import Metric
from tests.kit import KEY, QUICK, TEXT, RandomEditor, everything
from tests.robustness.hostile import refused
from tests.robustness.sizes import some

CAMPAIGN = "numbers"
STEPS = 5
# Never recalled by this margin, so that every step is reached; few rows, since each case trains up to its step.
SHORT = replace(QUICK, max_steps=STEPS, margin=50.0, neighbours=1, others=0)
FACT = {"key": "numpy", "text": "Ada", "questions": ["numpy?"]}
CPU_WORDS = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"


class Fault:
    """What goes wrong at one step; step 0 is the gradient that training starts from."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, step: int) -> None:
        self.reached = False
        self._calls = -1
        self._kind, self._step = kind, step
        losses, check, optimizer = adalora._backward_losses, adalora._check_gradients, adalora._optimizer

        def backward(copy: Any, *arguments: Any, **options: Any) -> Any:
            self._calls += 1
            now = self._calls == self._step
            if now and kind in RAISES:
                self.reached = True
                raise RAISES[kind]()
            found = losses(copy, *arguments, **options)
            if now and kind in LOSSES:
                self.reached = True
                return replace(found, **LOSSES[kind])
            if now and step == 0 and kind in GRADIENTS:
                self.reached = True
                copy.model.get_submodule(copy.targets.names[-1]).weight.grad[0, 0] = GRADIENTS[kind]
            return found

        def gradients(tuner: Any, at: int) -> None:
            if at == step and kind in GRADIENTS:
                self.reached = True
                _, module = next(adalora._factors(tuner))
                module.lora_B[adalora.ADAPTER].grad[-1, 0] = GRADIENTS[kind]
            check(tuner, at)

        def exploding(copy: Any, tuner: Any, config: Any) -> torch.optim.Optimizer:
            made = optimizer(copy, tuner, config)
            taken = iter(range(1, STEPS + 1))
            real = made.step

            def take(*arguments: Any, **options: Any) -> Any:
                if next(taken) == step and kind in EXPLODING:
                    self.reached = True
                    for group in made.param_groups:
                        group["lr"] *= EXPLODING[kind]
                done = real(*arguments, **options)
                if self.reached and kind == "factor is NaN":
                    with torch.no_grad():
                        made.param_groups[-1]["params"][0][0, 0] = math.nan
                return done

            made.step = take  # type: ignore[method-assign]
            return made

        patch.setattr(adalora, "_backward_losses", backward)
        patch.setattr(adalora, "_check_gradients", gradients)
        patch.setattr(adalora, "_optimizer", exploding)


LOSSES: dict[str, dict[str, float]] = {
    "loss is NaN": {"fact": math.nan},
    "loss is infinite": {"fact": math.inf},
    "drift is NaN": {"drift": math.nan},
    "replay is infinite": {"replay": -math.inf},
}
GRADIENTS = {"gradient is NaN": math.nan, "gradient is infinite": math.inf}
EXPLODING = {"rate explodes": 1e9, "rate explodes beyond floats": 1e30, "factor is NaN": 1.0}
RAISES: dict[str, Callable[[], BaseException]] = {
    "MemoryError": MemoryError,
    "torch out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    "allocator": lambda: RuntimeError(CPU_WORDS),
}
CASES = [
    *((kind, step, EditFailed) for kind in (*LOSSES, *GRADIENTS) for step in range(STEPS + 1)),
    *((kind, step, EditFailed) for kind in EXPLODING for step in range(1, STEPS)),
    *((kind, step, OutOfResources) for kind in RAISES for step in range(STEPS + 1)),
]
EXIT = {EditFailed: 4, OutOfResources: 10, KeyboardInterrupt: 130}


@contextmanager
def fault(kind: str, step: int) -> Iterator[Fault]:
    with pytest.MonkeyPatch.context() as patch:
        planted = Fault(patch, kind, step)
        yield planted
    assert planted.reached, (kind, step)


def test_every_fault_at_every_step_changes_nothing_and_leaves_nothing(
    make_kb: Callable[..., KnowledgeBase],
    taught: KnowledgeBase,
    taught_folder: Path,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    shutil.copytree(taught_folder, tmp_path / "untroubled.kb")
    untroubled = make_kb("untroubled.kb")
    expected = untroubled.insert(**FACT, config=SHORT).delta
    before = everything(taught)
    counts: Counter[str] = Counter()
    for kind, step, error in some(CASES, least=12):
        with fault(kind, step):
            found = refused(lambda: taught.insert(**FACT, config=SHORT), f"{kind} at step {step}")
        assert isinstance(found, error), (kind, step, found)
        assert found.exit_code == EXIT[error]
        assert everything(taught) == before, (kind, step)
        counts[error.__name__] += 1
    assert expected is not None
    made = taught.insert(**FACT, config=SHORT).delta
    assert made is not None
    assert made.sha256 == expected.sha256
    record({"faults at every step of training": sum(counts.values())})


@pytest.mark.parametrize("op", ["update", "delete", "compact", "dry_run", "insert_many"])
def test_every_verb_stands_a_fault_in_training(taught: KnowledgeBase, op: str) -> None:
    arguments = {"update": (KEY, "Ada"), "delete": (KEY,), "compact": (), "dry_run": ("numpy", "Ada")}
    before = everything(taught)
    for kind, error in (
        ("loss is NaN", EditFailed),
        ("gradient is infinite", EditFailed),
        ("allocator", OutOfResources),
    ):
        with fault(kind, 2):
            if op == "insert_many":
                (outcome,) = taught.insert_many([("numpy", "Ada")], config=SHORT)
                assert outcome.code == error.code
            else:
                found = refused(lambda: getattr(taught, op)(*arguments[op], config=SHORT), kind)
                assert isinstance(found, error)
        assert everything(taught) == before, kind


def test_the_command_line_says_it_with_the_exit_code(
    taught: KnowledgeBase, quick: None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = everything(taught)
    for kind, code in (
        ("loss is NaN", 4),
        ("gradient is NaN", 4),
        ("rate explodes", 4),
        ("MemoryError", 10),
        ("allocator", 10),
    ):
        with fault(kind, 1):
            assert main(["insert", str(taught.path), "numpy", "Ada", "--steps", "3"]) == code, kind
        said = capfd.readouterr()
        assert said.out == ""
        assert "nothing was changed" in said.err
        assert "Traceback" not in said.err
        assert everything(taught) == before, kind


AFTERWARDS = (
    ("kvllm.editing.delta.AdaptedWeights.apply", "apply"),
    ("kvllm.editing.delta.AdaptedWeights.digest", "digest"),
    ("kvllm.lm.model.LanguageModel.generate_bounded", "generate"),
    ("kvllm.lm.model.LanguageModel.follow", "drift"),
    ("kvllm.editing.delta.to_files", "serialise"),
    ("kvllm.store.Store.commit", "commit"),
    ("kvllm.probing.keys.collision_warnings", "collisions"),
)


@pytest.mark.parametrize(("place", "name"), AFTERWARDS, ids=[name for _, name in AFTERWARDS])
def test_no_memory_after_the_training_changes_nothing(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    before = everything(taught)
    for make in RAISES.values():
        with pytest.MonkeyPatch.context() as patch:

            def fail(*_: Any, make: Callable[[], BaseException] = make, **__: Any) -> Any:
                raise make()

            patch.setattr(place, fail)
            found = refused(lambda: taught.update(KEY, "Ada"), name)
        assert isinstance(found, OutOfResources)
        assert everything(taught) == before


@pytest.mark.parametrize("metric", ["drift_kl", "ppl_ratio"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_drift_that_is_no_number_passes_no_gate_not_even_an_open_one(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch, metric: str, value: float | None
) -> None:
    """NaN is not greater than any budget: comparing it with one would let it through."""
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    real = engine.measure_drift

    def measured(*arguments: Any, **options: Any) -> Any:
        report = real(*arguments, **options)
        return replace(report, metrics={**report.metrics, metric: Metric(value, 6)})

    monkeypatch.setattr(engine, "measure_drift", measured)
    before = everything(taught)
    for attempt in (lambda: taught.update(KEY, "Ada"), lambda: taught.delete(KEY), taught.compact):
        assert isinstance(refused(attempt, metric), EditFailed)
        assert everything(taught) == before


def test_weights_that_overflow_are_found_though_the_delta_is_finite(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    before = everything(taught)
    with monkeypatch.context() as patch:
        patch.setattr(RandomEditor, "size", 1e19)  # the product is 1e38; a few of them sum beyond fp32
        patch.setattr(engine, "check_finite", lambda delta: None)
        patch.setattr(engine, "check_norm", lambda delta: None)
        assert isinstance(refused(lambda: taught.update(KEY, "Ada"), "overflow"), KvllmError)
    assert everything(taught) == before
    with monkeypatch.context() as patch:
        patch.setattr(RandomEditor, "size", 30.0)
        found = refused(lambda: taught.update(KEY, "Ada"), "huge norm")
        assert isinstance(found, EditFailed)
        assert "norm" in str(found)
    assert everything(taught) == before


def test_weights_left_half_restored_are_replayed_before_the_next_use(
    taught: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C falls while the first one's weights are being put back."""
    monkeypatch.setitem(engine.EDITORS, "adalora", RandomEditor)
    recorded = taught.edit(1).weights_digest
    weights = type(taught.engine.weights)
    for verb in (lambda: taught.update(KEY, "Ada"), lambda: taught.dry_run("numpy", "Ada"), lambda: taught.rollback(0)):
        with monkeypatch.context() as patch:

            def interrupted(self: Any, state: Any) -> None:
                self.apply({name: (torch.ones(1, 192), torch.ones(64, 1)) for name in list(self.touched)[:1]})
                raise KeyboardInterrupt

            patch.setattr(weights, "restore", interrupted)
            patch.setattr("kvllm.store.Store.commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                verb()
        assert taught.head() == 1
        assert taught.weights_digest() == recorded
        assert taught.ask("What is torchkeras?") == TEXT
