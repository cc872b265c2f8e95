"""What an editor is given and what it returns; one protocol, so that other methods can stand beside AdaLoRA.

An editor turns rows (questions with the tokens to answer) into a low-rank delta. It knows nothing of keys, ledgers,
gates or the weights' masters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvllm.config import EditConfig
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import Factors
from kvllm.editing.ordinary import Ordinary
from kvllm.editing.preservation import PreservationPool, PreservedItem
from kvllm.errors import EditFailed, OutOfResources, is_out_of_memory
from kvllm.lm.model import Row


@dataclass(frozen=True)
class StepRecord:
    """What one optimizer step saw, before it changed anything.

    Attributes:
        step: From 1.
        loss: Cross-entropy per target token of the fact, in nats, without penalty or preservation.
        recall: Share of target tokens that lead every other token by the margin; of the editor "neurons" that of rows
            all of whose tokens do.
        drift: Mean KL(base‖edited) per preserved answer token in this step, in nats; None where nothing is preserved.
        penalty: AdaLoRA's orthogonality penalty, unweighted.
        energy: What the change puts out on ordinary inputs, as a share of what the matrices do; None if not known.
        rank: Singular values still alive over all modules; of the editor "neurons" how many say the answer.
    """

    step: int
    loss: float
    recall: float
    drift: float | None
    penalty: float
    rank: int
    energy: float | None = None


@dataclass(frozen=True)
class EditTask:
    """One training session.

    Attributes:
        rows: What must be answered, one row per question.
        augmented: The same facts asked otherwise, with the same answers: every step trains a few, none has to be met.
        replay: Older facts' rows, the likeliest to collide first.
        begun: More questions of older facts, each with the first tokens of its answer.
        restore: For delete: preserved items whose base output is the *target*; then `rows` has nothing but questions
            that other facts keep.
        language: Language of the key, for choosing neighbours.
        excluded: Casefolded names and questions that live facts are about, or that are refused: never preserved.
        contrast: The fact's own questions about other names, to be answered as they are now.
        recited: Other questions, answered with the fact's own text, whose next tokens are to be expected as now.
        seed: Of every random choice.
        whitening: Symmetric (in, in) matrix per module, in whose coordinates ordinary inputs are alike in all
            directions; modules without one are trained in their plain coordinates.
        apart: Other questions that must not be taken for the fact's own, without answers.
        beside: Of rows in `apart` and `stated` the answer of the fact that they belong to; others in `apart` to all.
        stated: Where the fact was stated, or its name said, and something else is asked: what was stated, then all that
            follows, up to what the weights say to it now.
        ordinary: Layer to what usually enters its MLP, for editors that use it.
        taken: Layer to the neurons that hold other facts.
        named: Row to the places in it at which each of the names was said that its question is known by: of the rows
            the fact's names; of rows in `apart` another name, where they have one.
        known_by: Answer to the casefolded names that questions about its fact are known by.
        lent: Answer to the neurons that mark these names for an older fact.
        resting: Returns the questions of older facts, with their answers, whose names any of some neurons mark.
        marks: What later layers carry from a name to where an answer is given, (marks, hidden), for editors that use
            them.
        marked: Layer to what enters its MLP where the questions of `Ordinary.ends` end, marks on what they are
            about, (questions, hidden).
    """

    rows: Sequence[Row]
    augmented: Sequence[Row] = ()
    replay: Sequence[Row] = ()
    begun: Sequence[Row] = ()
    restore: Sequence[PreservedItem] = ()
    language: str = "en"
    excluded: frozenset[str] = frozenset()
    contrast: Sequence[PreservedItem] = ()
    recited: Sequence[PreservedItem] = ()
    seed: int = 0
    whitening: Mapping[str, torch.Tensor] = field(default_factory=dict)
    apart: Sequence[Row] = ()
    stated: Sequence[Row] = ()
    beside: Mapping[Row, tuple[int, ...]] = field(default_factory=dict)
    ordinary: Mapping[int, Ordinary] = field(default_factory=dict)
    taken: Mapping[int, frozenset[int]] = field(default_factory=dict)
    named: Mapping[Row, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    known_by: Mapping[tuple[int, ...], frozenset[str]] = field(default_factory=dict)
    lent: Mapping[tuple[int, ...], Sequence[int]] = field(default_factory=dict)
    resting: Callable[[frozenset[int]], Sequence[Row]] | None = None
    marks: torch.Tensor | None = None
    marked: Mapping[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """The outcome of a training session.

    Attributes:
        delta: Module name to LoRA factors; empty where nothing had to change.
        steps: Optimizer steps taken.
        recalled: Whether the stop rule was met.
        ranks: Rank per module after AdaLoRA's allocation.
        records: One per step.
        scale: What the trained delta was multiplied with in the end.
        in_force: Settings that differed from those asked for, because several facts shared them.
        kept: For editors whose outcome cannot be merged: the tensors of the adapter; then `delta` is empty.
        places: For editors that give each answer neurons of its own: answer to layer to these.
        borrowed: The same of neurons that other facts were given, and that this one rests on, too.
        neurons: `places` by the keys of facts, as the ledger keeps it.
        rests_on: `borrowed` so.
    """

    delta: Mapping[str, Factors]
    steps: int
    recalled: bool
    ranks: Mapping[str, int] = field(default_factory=dict)
    records: tuple[StepRecord, ...] = ()
    scale: float = 1.0
    in_force: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)
    places: Mapping[tuple[int, ...], Mapping[int, Sequence[int]]] = field(default_factory=dict)
    borrowed: Mapping[tuple[int, ...], Mapping[int, Sequence[int]]] = field(default_factory=dict)
    neurons: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    rests_on: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Return what the ledger keeps of a training."""
        return {
            **({"neurons": self.neurons} if self.neurons else {}),
            **({"rests_on": self.rests_on} if self.rests_on else {}),
            "steps": self.steps,
            "recalled": self.recalled,
            "ranks": dict(self.ranks),
            "scale": self.scale,
            "in_force": dict(self.in_force),
            "losses": [round(r.loss, 5) for r in self.records],
            "drifts": [None if r.drift is None else round(r.drift, 5) for r in self.records],
        }


class Editor(Protocol):
    """Turns a task into a delta."""

    def train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Training:
        """Train on the compute copy, which is as before when this returns or raises."""
        ...


@contextmanager
def training_errors() -> Iterator[None]:
    """Say in kvllm's own errors what may go wrong in a training.

    Raises:
        EditFailed: a matrix could not be decomposed.
        OutOfResources: not enough memory.
    """
    try:
        yield
    except Exception as error:
        if type(error).__name__ in ("LinAlgError", "_LinAlgError"):  # torch does not export its class
            raise EditFailed("A gradient could not be decomposed; nothing was changed. Try lower rates.") from error
        if is_out_of_memory(error):
            raise OutOfResources("There is not enough memory to train this edit; nothing was changed.") from error
        raise


def leads(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return by how many nats each target leads the best other token: (n,), negative where it is not greedy."""
    top, ids = logits.topk(2, dim=-1)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    best_other = torch.where(ids[:, 0] == targets, top[:, 1], top[:, 0])
    return chosen - best_other
