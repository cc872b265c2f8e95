"""The AdaLoRA editor: an adaptive low-rank training session with contrast, on peft.

P and Q start from the singular vectors of one gradient of the adapted matrices, so that the first step already points
at the fact; the singular values start at zero. P is trained in the edit's own coordinates (`kvllm.editing.inputs`), in
which its questions stand out and ordinary text does not. Every step sees some of the fact's questions, those not yet
recalled first, a sample of the preservation set against the base's own outputs, and older facts. Training stops when
every target token leads by the margin on all questions and the preserved outputs hold; then the delta is made as small
as that rule allows. Source of the method: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning", ICLR 2023. Knows nothing of keys and stores.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch.nn import functional as F

from kvllm.config import EditConfig
from kvllm.editing.compute import WIDTHS, ComputeCopy, decomposable, padded, rounded_up
from kvllm.editing.delta import Factors, check_finite, fold_singular_values, is_transposed
from kvllm.editing.editor import EditTask, StepRecord, Training, leads, training_errors
from kvllm.editing.inputs import Coordinates, edit_coordinates
from kvllm.editing.preservation import PreservationPool, PreservedItem
from kvllm.errors import EditFailed
from kvllm.lm.decoding import MIN_OPENING, of_like_length
from kvllm.lm.model import Row, shared_length
from kvllm.memory import give_back
from kvllm.metrics import RESTORED_KL

ADAPTER = "default"
# Ranks are allocated between these steps; afterwards peft keeps the pattern.
_ALLOCATE_FROM = 2
_ALLOCATE_UNTIL = 8
_DRIFT_SMOOTHING = 0.5
_TINY = 0.02  # peft's own spread of factors that no gradient has pointed
_SCALES = (0.9, 0.8, 0.7, 0.6)  # of the trained delta, tried in turn
_ENERGY_STEPS = 20  # at full weight
# The first steps are large. From this share not yet recalled on they get smaller: rows that were in fall out again, the
# more so where there are more of them than a step takes.
_NEARLY = 0.1
_SLOWEST = 0.25
_SLOWEST_OF_MANY = 0.2
_RESTORING = 1 / 3  # of the rates: what is to come all the way back lies near, and large steps go past it
_REMEMBERED = 0.9  # of the input factors' earlier gradients, from step to step
_LEFT_OVER = 0.05  # share of many rows that need no margin, as long as they are recalled
_TOLD_APART = 64  # older rows whose inputs an edit keeps off
_REPAIR_STEPS = 16  # of an edit, for older facts that it has broken
_STEPS_PER_TRIM = 8  # what is given back has to be fetched again
_HEAD_TOKENS = 128  # answer tokens per vocabulary projection
_GROUP_TOKENS = 512  # tokens per forward and backward pass, padding included
# What a pass costs beside its tokens, in tokens: where its products are compiled, and where they are not.
_COMPILED_PASS = 200
_PASS = 40
# A step trains half of the rows, within these bounds: they are paraphrases, and a whole pass costs twice as much. All
# are looked at again before training ends, in as few steps as these bounds allow.
_MIN_ROWS = 4
_EXTRA_ROWS = 2  # recalled rows that go with the last few others, so that those keep most of the weight
_MAX_ROWS = 16
_MAX_ROW_TOKENS = 1024
# KL to the base starts a hundred times smaller than the cross-entropy of a new text: weighed alike, it would give way
# to the preserved items.
_RESTORE_WEIGHT = 8.0
# Other questions answered with the fact's own short text, against the preserved answers: heavier only costs steps.
_RECITED_WEIGHT = 0.3

# Where the answer first leaves what the model would have said, the key is recognised or not; the rest is recitation.
# So many of these turning points per row, how much more they weigh, and how much more margin they need.
_TURNS = 3
_TURN_WEIGHT = 4.0
_TURN_MARGIN = 6.0
# What comes after the last token that does not lead yet is recited as before: so many of a step's rows are trained to
# their end, the others that many tokens beyond that one. The look at all rows before training ends is at whole ones.
_WHOLE_ROWS = 2
_BEYOND = 2

Item = tuple[torch.Tensor, Row]
T = TypeVar("T")


class LowRankEditor(ABC):
    """The training session that all merged editors share; what is trained in it is the subclass's `adapter`.

    Trains one delta per call and holds no state between calls.
    """

    def coordinates(self, copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> Mapping[str, Coordinates]:
        """Return in what each module's input side is trained."""
        rows = [*task.rows, *task.augmented, *(item.row for item in task.restore)]
        contrast = [item.row for item in task.contrast]
        return edit_coordinates(copy, rows, pool, task.whitening, contrast, task.replay[:_TOLD_APART])

    @abstractmethod
    def adapter(
        self, copy: ComputeCopy, config: EditConfig, start: dict[str, Factors], coordinates: Mapping[str, Coordinates]
    ) -> AbstractContextManager[Adapter]:
        """Inject what is trained, starting from the given factors, and take it out again whatever happens."""

    def train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        *,
        on_step: Callable[[StepRecord], None] | None = None,
    ) -> Training:
        """Train on the compute copy, which is as before when this returns or raises.

        Raises:
            EditFailed: a loss or gradient was not finite.
            OutOfResources: not enough memory.
        """
        with training_errors():
            torch.manual_seed(task.seed)
            with torch.enable_grad():
                return self._train(copy, pool, task, config, on_step)

    def _train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        on_step: Callable[[StepRecord], None] | None,
    ) -> Training:
        rng = random.Random(task.seed)
        if not config.replay:
            task = replace(task, replay=())
        if not config.augmented:
            task = replace(task, augmented=())
        fact, replay, augmented = _read(copy, task.rows, task.replay, task.augmented)
        shared = _shared_ids([*task.rows, *task.replay], [*task.restore, *task.contrast, *pool.items])
        coordinates = self.coordinates(copy, pool, task)
        start = _gradient_factors(copy, _some(fact), _some(task.restore), config, coordinates, shared)
        records: list[StepRecord] = []
        recalled = False
        with self.adapter(copy, config, start, coordinates) as adapter:
            drift: float | None = None
            confusion: float | None = None  # as drift, of the fact's own contrast
            holds = True
            older = _OlderRows(replay, config.replay, rng)
            most = _RESTORING if task.restore else 1.0
            rates = [most * group["lr"] for group in adapter.optimizer.param_groups]
            stages = _RowStages(fact, task.restore, rng, augmented)
            for step in range(1, config.max_steps + 1):
                rows, restored = stages.next(check=holds)
                further, marks = stages.further(config.augmented)
                contrast, kept, recited = _choose_preserved(pool, task, config, rng, step)
                adapter.optimizer.zero_grad(set_to_none=True)
                losses = _backward_losses(
                    copy,
                    [*rows, *further],
                    restored,
                    kept,
                    older.next(),
                    recited,
                    contrast,
                    preserve_weight=config.preserve_weight,
                    turns=[*stages.turns, *marks],
                    margin=config.margin,
                    shared=shared,
                )
                penalty, energy = adapter.penalty(), adapter.energy()
                if not losses.finite:
                    raise EditFailed(f"The loss was not finite at step {step}; nothing was changed. Try lower rates.")
                drift = _smoothed(drift, losses.drift)
                confusion = _smoothed(confusion, losses.confusion)
                holds = (drift is None or drift <= config.preserve_stop) and (
                    confusion is None or confusion <= config.contrast_stop
                )
                stages.saw(losses.leads[: len(rows)], losses.restored_kl, config.margin)
                record = StepRecord(
                    step=step,
                    loss=losses.fact,
                    recall=stages.recall,
                    drift=drift,
                    penalty=0.0 if penalty is None else float(penalty.detach()),
                    energy=None if energy is None else float(energy.detach()),
                    rank=adapter.alive(),
                )
                records.append(record)
                if on_step is not None:
                    on_step(record)
                # The state that was just measured is the one to keep: stop before another step changes it.
                if stages.done and holds:
                    recalled = older.let_go(losses.replay_ok, partial(_leads_now, copy, shared=shared))
                    if recalled:
                        break
                if penalty is not None:
                    (config.orthogonality * penalty).backward()
                if energy is not None:
                    # Held the longer, the less: what has not been learned by then needs more of ordinary directions.
                    (config.energy_weight * min(1.0, _ENERGY_STEPS / step) * energy).backward()
                slowest = _SLOWEST_OF_MANY if stages.many else _SLOWEST
                pace = min(1.0, max(slowest, (1.0 - stages.recall) / _NEARLY))
                for group, rate in zip(adapter.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * pace
                adapter.step(step)
                if stages.many:
                    adapter.forget()
                if step % _STEPS_PER_TRIM == 0:
                    give_back()
            # What is restored is not shrunk: it is to come all the way back, not just within the bound.
            shrinks = recalled and not task.restore
            scale = _shrink(copy, adapter, stages, fact, older.repaired, config.margin, shared) if shrinks else 1.0
            delta, ranks = adapter.fold()
        check_finite(delta)
        return Training(
            delta=delta,
            steps=len(records),
            recalled=recalled or stages.done,
            ranks=ranks,
            records=tuple(records),
            scale=scale,
        )


class Adapter(Protocol):
    """What one session trains."""

    optimizer: torch.optim.Optimizer

    def penalty(self) -> torch.Tensor | None:
        """Return what is added to the loss, unweighted; None for nothing."""
        ...

    def energy(self) -> torch.Tensor | None:
        """Return what the change puts out on ordinary inputs, see `InputFactors.energy`; None where none are known."""
        ...

    def alive(self) -> int:
        """Count the directions that are still trained, over all modules."""
        ...

    def step(self, number: int) -> None:
        """Move along the gradients.

        Raises:
            EditFailed: one of them is not finite.
        """
        ...

    def forget(self) -> None:
        """Begin the sum of the input factors' gradients anew."""
        ...

    def linear(self) -> list[torch.nn.Parameter]:
        """Return the parameters that the delta is proportional to."""
        ...

    def fold(self) -> tuple[dict[str, Factors], dict[str, int]]:
        """Return the change as a delta, and the rank of each module."""
        ...


class AdaLoraEditor(LowRankEditor):
    """Adaptive ranks: singular values that start at zero, and a budget that is allocated during training."""

    @contextmanager
    def adapter(
        self, copy: ComputeCopy, config: EditConfig, start: dict[str, Factors], coordinates: Mapping[str, Coordinates]
    ) -> Iterator[Adapter]:
        """Inject AdaLoRA modules."""
        with _adapter(copy, config, start) as tuner:
            yield _AdaLora(tuner, copy, config, start, coordinates)


class _AdaLora:
    def __init__(
        self,
        tuner: Any,
        copy: ComputeCopy,
        config: EditConfig,
        start: Mapping[str, Factors],
        coordinates: Mapping[str, Coordinates],
    ) -> None:
        self._tuner = tuner
        self._modules = {name: copy.model.get_submodule(name) for name in copy.targets.names}
        factors = {name: module.lora_A[ADAPTER] for name, module in self._modules.items()}
        self._inputs = InputFactors(factors, coordinates, {name: a for name, (a, _) in start.items()})
        self.optimizer = _optimizer(copy, config, self._inputs)

    def penalty(self) -> torch.Tensor | None:
        return _orthogonality(self._tuner)

    def energy(self) -> torch.Tensor | None:
        # peft scales by lora_alpha / init_r, which are alike here.
        return self._inputs.energy(
            {name: module.lora_B[ADAPTER] * module.lora_E[ADAPTER].T for name, module in self._modules.items()}
        )

    def alive(self) -> int:
        return _alive(self._tuner)

    def step(self, number: int) -> None:
        _check_gradients(self._tuner, number)
        self._inputs.pull()
        self.optimizer.step()
        self._inputs.push()
        self._tuner.update_and_allocate(number)

    def forget(self) -> None:
        self._inputs.forget()

    def linear(self) -> list[torch.nn.Parameter]:
        return [module.lora_E[ADAPTER] for _, module in _factors(self._tuner)]

    def fold(self) -> tuple[dict[str, Factors], dict[str, int]]:
        return _fold(self._tuner)


class _RowStages:
    """Hands out rows, those not yet recalled first, and remembers when each was last seen recalled.

    When all are, it hands out all of them once more: `done` says that one sweep over every row, of one step as a rule,
    found all recalled. Where more rows are trained than a step takes, every step looks at those not seen for longest,
    too, and a sight is good for as long as two sweeps take: one row that fails late costs its own repair and no new
    sweep, and a few may be left without their margin.
    """

    def __init__(
        self,
        fact: list[Item],
        restore: Sequence[PreservedItem],
        rng: random.Random,
        augmented: Sequence[Item] = (),
    ) -> None:
        self._fact = fact
        self._restore = list(restore)
        self._augmented = list(augmented)
        self._rng = rng
        self._n = len(fact) + len(restore)
        self._ok = [0.0] * self._n
        self._right = [False] * self._n  # recalled when last seen, if without the margin
        self._sizes = [len(row.ids) for _, row in fact] + [len(item.row.ids) for item in restore]
        self.many = self._n > _MAX_ROWS
        sweep = max(1, math.ceil(self._n / _MAX_ROWS), math.ceil(sum(self._sizes) / _MAX_ROW_TOKENS))
        # Steps take rows as they come, and two in a row hold more than one full step: no sweep takes twice as many.
        self._good_for = 2 * sweep if self.many else min(self._n, 2 * sweep) if sweep > 1 else 1
        self._step = 0
        self._seen = [-math.inf] * self._n  # the step at which a row was last seen recalled
        self._checking = False
        self._current: list[int] = []
        self._turns: dict[int, list[int]] = {}
        self._wanting: dict[int, int] = {}  # answer tokens up to the last one that did not lead, and some beyond

    def next(self, *, check: bool) -> tuple[list[Item], list[PreservedItem]]:
        """Return the rows of the next step; with `check`, and all rows recalled, those not looked at for longest."""
        self._step += 1
        pending = [i for i in range(self._n) if self._ok[i] < 1.0]
        rest = [i for i in range(self._n) if self._ok[i] >= 1.0]
        self._rng.shuffle(pending)
        self._rng.shuffle(rest)
        self._checking = check and not pending
        most = _MAX_ROWS
        if not self._checking and not self.many:
            most = min(_MAX_ROWS, max(_MIN_ROWS, self._n // 2), len(pending) + _EXTRA_ROWS)
        if self._checking:
            everyone = sorted(range(self._n), key=lambda i: self._seen[i])
            queue = [i for i in everyone if self._step - self._seen[i] >= self._good_for] or everyone
        else:
            if self.many:  # rows of one fact are neighbours: of each fact as many as of the next
                pending = self._spread(sorted(pending), most)
                rest.sort(key=lambda i: self._seen[i])
            queue = pending + rest
        taken, tokens = 0, 0
        while taken < min(most, len(queue)):
            tokens += self._sizes[queue[taken]]
            if taken and tokens > _MAX_ROW_TOKENS:
                break
            taken += 1
        self._current = sorted(queue[:taken])
        n_fact = len(self._fact)
        whole = set(self._current)
        if not self._checking and not self.many:
            whole = set(self._rng.sample(self._current, min(len(self._current), _WHOLE_ROWS)))
        rows = [
            self._fact[i] if i in whole else _beginning(self._fact[i], self._wanting.get(i))
            for i in self._current
            if i < n_fact
        ]
        restored = [self._restore[i - n_fact] for i in self._current if i >= n_fact]
        return rows, restored

    def further(self, n: int) -> tuple[list[Item], list[list[int]]]:
        """Draw n further questions, and their turning points: both are those of the rows with the same answer."""
        items, marks = [], []
        for item in self._rng.sample(self._augmented, min(n, len(self._augmented))):
            alike = [i for i, (_, row) in enumerate(self._fact) if row.answer == item[1].answer]
            wanting = max((self._wanting[i] for i in alike if i in self._wanting), default=None)
            items.append(_beginning(item, wanting))
            marks.append(sorted({turn for i in alike for turn in self._turns.get(i, [])}))
        return items, marks

    def _spread(self, places: Sequence[int], n: int) -> list[int]:
        """Draw one place of each of n equal stretches, in random order: all of them where there are no more."""
        n = min(n, len(places))
        drawn = [places[self._rng.randrange(i * len(places) // n, (i + 1) * len(places) // n)] for i in range(n)]
        self._rng.shuffle(drawn)
        return drawn

    def saw(self, leads_per_row: list[torch.Tensor], restored_kl: list[float], margin: float) -> None:
        """Note what the rows handed out last were measured at: leads of the fact's rows, KL of the restored ones."""
        n_fact = len(self._fact)
        for i, lead in zip([i for i in self._current if i < n_fact], leads_per_row, strict=True):
            if i not in self._turns:
                # The first token is one always: it chooses the language and the form of the answer.
                wrong = (lead < 0).nonzero().view(-1)[:_TURNS].tolist()
                self._turns[i] = sorted({0, *wrong})
            n = len(self._fact[i][1].answer)
            missing = (lead < self._needed(i, n, margin, lead.device)[: len(lead)]).nonzero().view(-1).tolist()
            self._ok[i] = 1.0 - len(missing) / n
            self._right[i] = bool((lead > 0).all())
            self._wanting[i] = max(self._turns[i] + missing) + 1 + _BEYOND
        for i, kl in zip([i for i in self._current if i >= n_fact], restored_kl, strict=True):
            self._ok[i] = 1.0 if kl <= RESTORED_KL else RESTORED_KL / kl
            self._right[i] = kl <= RESTORED_KL
        for i in self._current:
            if self._ok[i] >= 1.0 and (self._checking or self.many):
                self._seen[i] = self._step
            else:
                self._seen[i] = -math.inf

    def lead(self, leads_per_row: Sequence[torch.Tensor], margin: float) -> bool:
        """Say whether all of the fact's rows, in order, meet the stop rule with these leads."""
        return all(
            bool((lead >= self._needed(i, len(lead), margin, lead.device)).all())
            for i, lead in enumerate(leads_per_row)
        )

    def _needed(self, i: int, n: int, margin: float, device: torch.device) -> torch.Tensor:
        return _needed_leads(n, self._turns[i], margin, device)

    @property
    def turns(self) -> list[list[int]]:
        """Return the turning points of the fact rows handed out last: none before a row was first measured."""
        return [self._turns.get(i, []) for i in self._current if i < len(self._fact)]

    @property
    def recall(self) -> float:
        return sum(self._ok) / max(1, self._n)

    @property
    def done(self) -> bool:
        stale = sum(self._step - seen >= self._good_for for seen in self._seen)
        return stale <= (_LEFT_OVER * self._n if self.many else 0) and all(self._right)


def _read(copy: ComputeCopy, *kinds: Sequence[Row]) -> list[list[Item]]:
    """Return rows, kind by kind, with what enters the adapted layers at the weights of now."""
    lower = iter(copy.lower_states([row.ids for rows in kinds for row in rows]))
    return [[(next(lower), row) for row in rows] for rows in kinds]


def _beginning(item: Item, n: int | None) -> Item:
    """Return an item whose answer ends after n tokens; None for the whole."""
    lower, row = item
    return item if n is None else (lower[: len(row.prompt) + n], Row(row.prompt, row.answer[:n]))


class _OlderRows:
    """Hands out older facts' rows, and those that the edit has broken until they hold again.

    An edit practises a few at every step. When its own fact is in, all are looked at, and it goes on with what is
    broken, for at most _REPAIR_STEPS steps, those included in which its own fact has to catch up.
    """

    def __init__(self, rows: Sequence[Item], n: int, rng: random.Random) -> None:
        """Take over the rows, the likeliest to collide first, of which a step practises n."""
        self._rows = list(rows)
        self._n = n
        self._rng = rng
        self._lost: list[int] = []
        self._repaired: set[int] = set()
        self._steps = 0

    def next(self) -> list[Item]:
        """Return the rows of the next step: what is broken, else half the likeliest to collide and half at random."""
        if self._lost:
            self._steps += 1
            return [self._rows[i] for i in self._lost]
        if len(self._rows) <= self._n:
            return self._rows
        near = self._rows[: max(2 * self._n, 8)]
        return self._rng.sample(near, self._n // 2) + self._rng.sample(self._rows, self._n - self._n // 2)

    @torch.no_grad()
    def let_go(self, holding: bool, leads_now: Callable[[Sequence[Item]], list[torch.Tensor]]) -> bool:
        """Say whether an edit whose own fact is in may end: nothing is broken, or its steps for that are used up.

        Args:
            holding: Whether the rows handed out last are recited; while they are not, looking at all has no use.
            leads_now: Says by how much the target tokens of rows lead, in nats.
        """
        if self._rows and (holding or not self._lost):
            found = enumerate(leads_now(self._rows))
            self._lost = [i for i, led in found if bool((led < 0).any())][:_MAX_ROWS]
            self._repaired.update(self._lost)
        return not self._lost or self._steps >= _REPAIR_STEPS

    @property
    def repaired(self) -> list[Item]:
        """Return the rows that were broken and hold again."""
        return [self._rows[i] for i in sorted(self._repaired - set(self._lost))]


@dataclass(frozen=True)
class _Part:
    """One sequence of a step: what enters the layers, its answer, and how its tokens count in the loss.

    With `output` (the base's hidden states) the loss is KL(base‖now), else cross-entropy of the answer. There each
    target starts with a `handicap` in nats: what has to lead by a margin is pushed until it does, and little beyond
    (Wang et al., "Additive Margin Softmax for Face Verification", 2018).
    """

    lower: torch.Tensor
    row: Row
    weights: torch.Tensor
    output: torch.Tensor | None = None
    handicap: torch.Tensor | None = None


@dataclass(frozen=True)
class _Measured:
    """What one sequence was measured at: loss per token in nats, and the targets' leads where it has targets."""

    losses: torch.Tensor
    leads: torch.Tensor | None


@dataclass(frozen=True)
class _Losses:
    """One step in numbers; its gradients are already in the adapters."""

    fact: float
    drift: float | None
    confusion: float | None
    replay: float
    leads: list[torch.Tensor]
    restored_kl: list[float]
    replay_ok: bool

    @property
    def finite(self) -> bool:
        return all(math.isfinite(v) for v in (self.fact, self.drift or 0.0, self.replay))


def _backward_losses(
    copy: ComputeCopy,
    rows: Sequence[Item],
    restored: Sequence[PreservedItem],
    kept: Sequence[PreservedItem],
    older: Sequence[Item],
    recited: Sequence[PreservedItem] = (),
    contrast: Sequence[PreservedItem] = (),
    *,
    preserve_weight: float = 0.0,
    turns: Sequence[Sequence[int]] = (),
    margin: float = 0.0,
    shared: Sequence[int] = (),
) -> _Losses:
    """Measure one step's loss and add its gradient to whatever requires one.

    fact: the mean over rows of the weighted mean over tokens (a long row must not drown a short one); the others: the
    mean over all tokens of their kind.
    """
    device = copy.lm.device
    marks = list(turns) or [[] for _ in rows]
    parts = [
        _Part(
            lower,
            row,
            _token_weights(len(row.answer), mark, device) / len(rows),
            handicap=_needed_leads(len(row.answer), mark, margin, device),
        )
        for (lower, row), mark in zip(rows, marks, strict=True)
    ]
    said_weight = _RECITED_WEIGHT * preserve_weight
    kept = [*contrast, *kept]
    for items, weight in ((restored, _RESTORE_WEIGHT), (kept, preserve_weight), (recited, said_weight)):
        n = sum(len(item.row.answer) for item in items)
        parts += [
            _Part(i.lower, i.row, torch.full((len(i.row.answer),), weight / n, device=device), i.output) for i in items
        ]
    n = sum(len(row.answer) for _, row in older)
    parts += [_Part(lower, row, torch.full((len(row.answer),), 1.0 / n, device=device)) for lower, row in older]

    measured = _measure(copy, parts, shared)
    ends = list(accumulate(map(len, (rows, restored, kept, recited))))
    fact, again = measured[: ends[0]], measured[ends[0] : ends[1]]
    preserved, replayed = measured[ends[1] : ends[2]], measured[ends[3] :]
    restored_kl = [float(m.losses.mean()) for m in again]
    fact_loss = [float(m.losses.mean()) for m in fact]
    return _Losses(
        fact=(sum(fact_loss) / len(fact) if fact else 0.0) + (sum(restored_kl) / len(again) if again else 0.0),
        drift=_mean_loss(preserved),
        confusion=_mean_loss(preserved[: len(contrast)]),
        replay=_mean_loss(replayed) or 0.0,
        leads=[m.leads for m in fact if m.leads is not None],
        restored_kl=restored_kl,
        replay_ok=all(bool((m.leads >= 0).all()) for m in replayed if m.leads is not None),
    )


def _mean_loss(measured: Sequence[_Measured]) -> float | None:
    """Return the mean over all tokens of some sequences, None where there are none."""
    return float(torch.cat([m.losses for m in measured]).mean()) if measured else None


def _smoothed(earlier: float | None, now: float | None) -> float | None:
    """Return a running mean that goes on with what one step measured, if it did."""
    if now is None:
        return earlier
    return _DRIFT_SMOOTHING * (now if earlier is None else earlier) + (1 - _DRIFT_SMOOTHING) * now


def _measure(copy: ComputeCopy, parts: Sequence[_Part], shared: Sequence[int]) -> list[_Measured]:
    """Run groups of like length through the layers, each forward and (where gradients are on) backward at once.

    So memory is that of one group. What chats begin with is run once, at the weights of now, and without gradient: an
    edit is not to be read there (see `edit_coordinates`).
    """
    found: list[_Measured | None] = [None] * len(parts)
    opening = copy.opening(shared)
    behind = [
        bool(shared) and part.row.ids[: len(shared)] == opening.ids and len(part.row.prompt) > len(shared)
        for part in parts
    ]
    lengths = [len(part.row.ids) - follows * len(shared) for part, follows in zip(parts, behind, strict=True)]
    for group in _groups(lengths, copy):
        # Targets first, base outputs after, so that each kind is one stretch of tokens for the vocabulary projection.
        ordered = sorted(group, key=lambda i: parts[i].output is not None)
        follows = [behind[i] for i in ordered]
        before = opening if any(follows) else None
        # (answer tokens, hidden)
        states = copy.answer_states([(parts[i].lower, parts[i].row) for i in ordered], before, follows)
        leaf = states.detach().requires_grad_(torch.is_grad_enabled())
        at = 0
        for kind in (False, True):
            stretch = [i for i in ordered if (parts[i].output is not None) is kind]
            if not stretch:
                continue
            sizes = [len(parts[i].row.answer) for i in stretch]
            head = leaf[at : at + sum(sizes)]
            measured = _measure_head(copy, head, [parts[i] for i in stretch])
            for i, one in zip(stretch, measured, strict=True):
                found[i] = one
            at += sum(sizes)
        if leaf.requires_grad:
            states.backward(leaf.grad)
    return [m for m in found if m is not None]


def _measure_head(copy: ComputeCopy, states: torch.Tensor, parts: Sequence[_Part]) -> list[_Measured]:
    """Project the answers' states (n, hidden), take the loss, and send its gradient back to the states.

    All parts are of one kind. The vocabulary is 85 times wider than the hidden state: logits are made for a few
    hundred tokens at a time, turned into a gradient at once and dropped.
    """
    sizes = [len(part.row.answer) for part in parts]
    device = states.device
    ids = torch.tensor([token for part in parts for token in part.row.answer], device=device)
    weights = torch.cat([part.weights for part in parts])
    outputs = [part.output for part in parts if part.output is not None]
    base = torch.cat(outputs).to(device) if outputs else None
    handicaps = torch.cat([torch.zeros_like(p.weights) if p.handicap is None else p.handicap for p in parts])
    losses, found = [], []
    for a in range(0, len(ids), _HEAD_TOKENS):
        n = min(_HEAD_TOKENS, len(ids) - a)
        few = partial(padded, n=rounded_up(n, _HEAD_TOKENS // 4))
        logits, targets = copy.logits(few(states[a : a + n])), few(ids[a : a + n])
        if base is None:
            found.append(leads(logits.detach()[:n], targets[:n]))
            handicap = few(handicaps[a : a + n])
            per_token = F.cross_entropy(
                logits.scatter_add(1, targets[:, None], -handicap[:, None]), targets, reduction="none"
            )
        else:
            with torch.no_grad():
                before = torch.log_softmax(copy.logits(few(base[a : a + n])), -1)
            per_token = (before.exp() * (before - torch.log_softmax(logits, -1))).sum(-1)
        if states.requires_grad:
            (per_token * few(weights[a : a + n])).sum().backward()
        per_token = per_token.detach()[:n]
        losses.append(per_token if base is not None else _without_handicap(per_token, handicaps[a : a + n]))
    split = torch.cat(losses).split(sizes)
    led = torch.cat(found).split(sizes) if found else [None] * len(parts)
    return [_Measured(loss, lead) for loss, lead in zip(split, led, strict=True)]


def _without_handicap(losses: torch.Tensor, handicaps: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropies that targets would have without what was taken off their logits, (n,), in nats.

    exp(loss) - 1 is the others' share over the target's: it falls with the target's logit.
    """
    return F.softplus(losses - handicaps + (-torch.expm1(-losses)).log())


def _shared_ids(rows: Sequence[Row], items: Sequence[PreservedItem]) -> tuple[int, ...]:
    """Return what all rows and all preserved chats begin with: nothing where that is too little to be worth a pass."""
    chats = [item.row.prompt for item in items if item.source.kind != "text"]
    prompts = [row.prompt for row in rows] + chats
    n = min(shared_length(prompts), min(map(len, prompts)) - 1) if chats else 0
    return tuple(prompts[0][:n]) if n >= MIN_OPENING else ()


def _groups(lengths: Sequence[int], copy: ComputeCopy) -> list[list[int]]:
    """Split sequences into passes that cost least in all, of at most _GROUP_TOKENS with padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    widths = [rounded_up(lengths[i], WIDTHS) for i in order]
    cost = _COMPILED_PASS if copy.compiles else _PASS
    parts = of_like_length(widths, pass_cost=cost, most=_GROUP_TOKENS)
    return [order[part] for part in parts]


def _needed_leads(n: int, turns: Sequence[int], margin: float, device: torch.device) -> torch.Tensor:
    """Return by how many nats each of n answer tokens must lead."""
    needed = torch.full((n,), margin, device=device)
    needed[list(turns)] *= _TURN_MARGIN
    return needed


def _token_weights(n: int, turns: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return the weights of n answer tokens in the loss, turning points first among them; they sum to 1."""
    weights = torch.ones(n, device=device)
    weights[list(turns)] = _TURN_WEIGHT
    return weights / weights.sum()


@torch.no_grad()
def _shrink(
    copy: ComputeCopy,
    adapter: Adapter,
    stages: _RowStages,
    fact: Sequence[Item],
    repaired: Sequence[Item],
    margin: float,
    shared: Sequence[int],
) -> float:
    """Scale the delta down as far as every row still meets the stop rule and repaired ones hold; return the factor.

    What an edit does elsewhere falls with the square of its size, and the last steps go past the margins.
    """
    values = adapter.linear()
    trained = [value.detach().clone() for value in values]

    def holds(scale: float) -> bool:
        for value, full in zip(values, trained, strict=True):
            value.copy_(full * scale)
        led = _leads_now(copy, [*fact, *repaired], shared)
        return stages.lead(led[: len(fact)], margin) and all(bool((each >= 0).all()) for each in led[len(fact) :])

    found = 1.0
    for scale in _SCALES:
        if not holds(scale):
            break
        found = scale
    for value, full in zip(values, trained, strict=True):
        value.copy_(full * found)
    return found


def _choose_preserved(
    pool: PreservationPool, task: EditTask, config: EditConfig, rng: random.Random, step: int
) -> tuple[list[PreservedItem], list[PreservedItem], list[PreservedItem]]:
    """Draw a step's own contrast, preserved items and recited questions.

    The contrast takes the places of packaged neighbours. Raw texts and recited questions are in every other step, and
    prompts in the others, too, where there is no contrast: training follows the sum of its steps, so that none has to
    have everything.
    """
    n = min(config.contrasts, config.neighbours, len(task.contrast))
    drawn = pool.sample(
        rng,
        language=task.language,
        config=replace(config, neighbours=config.neighbours - n),
        excluded=task.excluded,
    )
    contrast = rng.sample(list(task.contrast), n)
    asked = [item for item in drawn if item.source.kind != "text"]
    if step % 2:
        return contrast, asked, []
    recited = rng.sample(list(task.recited), min(config.recited, len(task.recited)))
    texts = [item for item in drawn if item.source.kind == "text"]
    return contrast, texts if contrast else asked + texts, recited


def _leads_now(copy: ComputeCopy, items: Sequence[Item], shared: Sequence[int]) -> list[torch.Tensor]:
    """Return by how much each item's target tokens lead at the weights of now, in nats: (answer tokens,) an item."""
    device = copy.lm.device
    parts = [_Part(lower, row, torch.ones(len(row.answer), device=device)) for lower, row in items]
    return [m.leads for m in _measure(copy, parts, shared) if m.leads is not None]


def _some(rows: Sequence[T]) -> Sequence[T]:
    """Return rows for one step, evenly spaced, so that every fact has a share."""
    n = min(len(rows), _MAX_ROWS)
    return [rows[i * len(rows) // n] for i in range(n)]


def _gradient_factors(
    copy: ComputeCopy,
    fact: Sequence[Item],
    restore: Sequence[PreservedItem],
    config: EditConfig,
    coordinates: Mapping[str, Coordinates],
    shared: Sequence[int],
) -> dict[str, Factors]:
    """Return orthonormal start factors per module: the leading singular vectors of the fact loss's gradient.

    Where a module has coordinates of its own, the gradient is taken in them, and so is the input factor returned.
    """
    modules = {name: copy.model.get_submodule(name) for name in copy.targets.names}
    try:
        for module in modules.values():
            module.weight.requires_grad_(True)
        losses = _backward_losses(copy, fact, restore, [], [], shared=shared)
        if not losses.finite:
            raise EditFailed("The model's loss on the new text is not finite; nothing was changed.")
        factors: dict[str, Factors] = {}
        for name, module in modules.items():
            gradient = module.weight.grad
            if gradient is None:
                raise EditFailed(f"No gradient reaches {name}; nothing was changed. Choose other modules.")
            gradient = gradient.detach().float()
            if not torch.isfinite(gradient).all():
                raise EditFailed(f"The gradient of {name} was not finite before the first step; nothing was changed.")
            if is_transposed(module):
                gradient = gradient.T
            if name in coordinates:
                gradient = gradient @ coordinates[name].directions.T
            factors[name] = _leading_vectors(gradient, config.init_rank)
        return factors
    finally:
        for module in modules.values():
            module.weight.grad = None
            module.weight.requires_grad_(False)


def _leading_vectors(gradient: torch.Tensor, rank: int) -> Factors:
    """Return the leading singular vectors of a matrix (out, in): rows of (rank, in), columns of (out, rank)."""
    u, _, v = torch.svd_lowrank(decomposable(gradient), q=min(rank, *gradient.shape), niter=2)
    return v.T.contiguous().to(gradient.device), u.contiguous().to(gradient.device)


@contextmanager
def _adapter(copy: ComputeCopy, config: EditConfig, start: dict[str, Factors]) -> Iterator[Any]:
    """Inject AdaLoRA modules that start from the given factors, and take them out again whatever happens."""
    from peft import AdaLoraConfig, AdaLoraModel

    until = min(_ALLOCATE_UNTIL, max(_ALLOCATE_FROM + 1, config.max_steps - 1))
    adalora = AdaLoraConfig(
        init_r=config.init_rank,
        target_r=config.target_rank,
        lora_alpha=config.init_rank,
        lora_dropout=config.dropout,
        target_modules=list(copy.targets.names),
        tinit=_ALLOCATE_FROM,
        tfinal=max(0, config.max_steps + 2 - until),
        deltaT=1,
        total_step=config.max_steps + 2,
        orth_reg_weight=config.orthogonality,
        init_lora_weights=True,
    )
    tuner = AdaLoraModel(copy.model, {ADAPTER: adalora}, ADAPTER)
    try:
        with torch.no_grad():
            for name, (_, b) in start.items():
                module = copy.model.get_submodule(name)
                for factor in (module.lora_A, module.lora_B, module.lora_E):
                    factor[ADAPTER].data = factor[ADAPTER].data.float()
                # Modules smaller than init_rank have fewer directions; the rest stay random and tiny.
                module.lora_B[ADAPTER].data[:, : b.shape[1]] = b
        for module in _dropouts(copy) if config.dropout else ():
            module.train()  # the rest of the copy stays in evaluation mode
        yield tuner
    finally:
        tuner.unload()
        copy.model.requires_grad_(False)


def _dropouts(copy: ComputeCopy) -> list[torch.nn.Module]:
    return [copy.model.get_submodule(name).lora_dropout[ADAPTER] for name in copy.targets.names]


class InputFactors:
    """The input factors P in the coordinates they are trained in: P = Z G per module, with G its (directions, in).

    The optimizer moves Z; `push` writes P into the adapter, `pull` brings P's gradient back to Z. G is scaled so that
    the rows of P start as long as those of Z. Modules without coordinates are trained as they are.

    P's gradient is the sum of all steps so far, fading, unless `forget` clears it: Z follows what the steps have in
    common, not each one's sample of preserved items (Xiao, "Dual Averaging Methods for Regularized Stochastic Learning
    and Online Optimization", 2010). Cleared each step, the demo's edit takes fewer steps and does twice the damage; not
    fading, what the first steps wanted outweighs what is still missing. Of many facts each step sees a few: there what
    earlier steps wanted is out of date, and is cleared.
    """

    def __init__(
        self,
        factors: Mapping[str, torch.nn.Parameter],
        coordinates: Mapping[str, Coordinates],
        start: Mapping[str, torch.Tensor],
    ) -> None:
        """Set the factors to their start.

        Args:
            factors: Each module's input factor, (rank, in).
            coordinates: Of those modules that have them.
            start: First rows of each module's Z, in its coordinates; a module without them starts at zero.
        """
        self._own: dict[str, tuple[torch.nn.Parameter, torch.Tensor, float, torch.nn.Parameter]] = {}
        self._coordinates = coordinates
        for name, p in factors.items():
            first = start[name][: len(p)] if name in start else None
            if name not in coordinates:
                if first is not None:
                    p.data[: len(first)] = first
                continue
            g = coordinates[name].directions
            # What a row of Z, one long, becomes on the average; measured where there are such rows.
            length = g.norm() / math.sqrt(len(g))
            z = torch.nn.Parameter(torch.zeros(len(p), len(g), device=p.device))
            if first is not None:
                z.data.normal_().mul_(_TINY)
                z.data[: len(first)] = first
                length = (z.detach() @ g).norm(dim=1).mean() / z.detach().norm(dim=1).mean()
            self._own[name] = (z, g, float(1.0 / length), p)
        self.push()

    def trained(self, name: str, plain: torch.nn.Parameter) -> torch.nn.Parameter:
        """Return what the optimizer moves for a module."""
        return self._own[name][0] if name in self._own else plain

    @torch.no_grad()
    def push(self) -> None:
        for z, g, scale, p in self._own.values():
            p.copy_((z @ g) * scale)

    @torch.no_grad()
    def pull(self) -> None:
        for z, g, scale, p in self._own.values():
            assert p.grad is not None  # checked to be there and finite before
            pulled = (p.grad @ g.T) * scale
            z.grad = pulled if z.grad is None else z.grad + pulled  # it may have the energy's
            p.grad.mul_(_REMEMBERED)

    @torch.no_grad()
    def forget(self) -> None:
        """Clear the sum of P's gradients."""
        for _, _, _, p in self._own.values():
            p.grad = None

    def energy(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return what the change puts out on ordinary inputs, as a share of its matrix: tr(ΔW C ΔWᵀ) / ‖W‖².

        Summed over all modules whose input factor is trained in coordinates; None where there are none. C is what those
        make alike in all directions: ordinary inputs with a mean eigenvalue of 1, the ridge, the contrast. It is what
        MEMIT's closed form keeps small (Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, section 4.2).

        Args:
            outputs: Output factor of each module, (out, rank): ΔW is this times P.
        """
        terms = []
        for name, (z, _, scale, _) in self._own.items():
            held = self._coordinates[name]
            inner = (z * held.squares) @ z.T  # P C Pᵀ, (rank, rank)
            terms.append((outputs[name].T @ outputs[name] * inner).sum() * (scale * scale / held.usual))
        return torch.stack(terms).sum() if terms else None


def _optimizer(copy: ComputeCopy, config: EditConfig, inputs: InputFactors) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for name in copy.targets.names:
        module = copy.model.get_submodule(name)
        weight = module.get_base_layer().weight
        # Root mean square of the singular values: Frobenius norm over the root of their number.
        typical = float(weight.float().norm()) / math.sqrt(min(weight.shape))
        a, b, e = inputs.trained(name, module.lora_A[ADAPTER]), module.lora_B[ADAPTER], module.lora_E[ADAPTER]
        groups.append({"params": [e], "lr": config.value_lr * typical})
        groups.append({"params": [a], "lr": config.factor_lr / math.sqrt(a.shape[1])})
        groups.append({"params": [b], "lr": config.factor_lr / math.sqrt(b.shape[0])})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _factors(tuner: Any) -> Iterator[tuple[str, Any]]:
    for name, module in tuner.model.named_modules():
        if hasattr(module, "lora_E") and ADAPTER in module.lora_E:
            yield name, module


def _orthogonality(tuner: Any) -> torch.Tensor:
    """Return AdaLoRA's penalty, which peft adds to `loss` only: the mean Frobenius norm of PᵀP - I."""
    terms = []
    for _, module in _factors(tuner):
        a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        for gram in (a @ a.T, b.T @ b):
            terms.append(((gram - torch.eye(gram.shape[0], device=gram.device)).square().sum() + 1e-12).sqrt())
    return torch.stack(terms).mean()


def _alive(tuner: Any) -> int:
    """Count the singular values that allocation has left: before its first decision, all of them."""
    pattern = tuner.peft_config[ADAPTER].rank_pattern
    if pattern:
        return int(sum(sum(mask) for mask in pattern.values()))
    return int(sum(module.lora_E[ADAPTER].numel() for _, module in _factors(tuner)))


def _check_gradients(tuner: Any, step: int) -> None:
    for name, module in _factors(tuner):
        for parameter in (module.lora_A[ADAPTER], module.lora_B[ADAPTER], module.lora_E[ADAPTER]):
            if parameter.grad is None or not torch.isfinite(parameter.grad).all():
                raise EditFailed(f"The gradient of {name} was not finite at step {step}; nothing was changed.")


def _fold(tuner: Any) -> tuple[dict[str, Factors], dict[str, int]]:
    delta: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    for name, module in _factors(tuner):
        folded = fold_singular_values(
            module.lora_A[ADAPTER].detach(),
            module.lora_E[ADAPTER].detach(),
            module.lora_B[ADAPTER].detach(),
            alpha=float(module.scaling[ADAPTER]),
            init_rank=float(module.ranknum[ADAPTER].detach()),
        )
        ranks[name] = 0 if folded is None else folded[0].shape[0]
        if folded is not None:
            delta[name] = (folded[0].cpu().clone(), folded[1].cpu().clone())
    return delta, ranks
