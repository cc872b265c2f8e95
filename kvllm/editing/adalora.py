"""The AdaLoRA editor: an adaptive low-rank training session with contrast, on peft.

P and Q start from the singular vectors of one gradient of the adapted matrices, so that the first step already points
at the fact; the singular values start at zero. Every step sees the fact's questions, a sample of the preservation set
against the base's own outputs, and older facts. Training stops when every target token leads by the margin and the
preserved outputs hold. Source of the method: Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient
Fine-Tuning", ICLR 2023. Knows nothing of keys and stores.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from kvllm.config import EditConfig
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import Factors, check_finite, fold_singular_values
from kvllm.editing.editor import EditTask, StepRecord, Training, leads
from kvllm.editing.preservation import PreservationPool, PreservedItem
from kvllm.errors import EditFailed, OutOfResources
from kvllm.lm.model import Row

ADAPTER = "default"
# Ranks are allocated between these steps; afterwards peft keeps the pattern.
_ALLOCATE_FROM = 2
_ALLOCATE_UNTIL = 8
_DRIFT_SMOOTHING = 0.5
_MAX_ROWS = 16  # fact rows per step; a larger batch is visited in turns

Item = tuple[torch.Tensor, Row]


class AdaLoraEditor:
    """Trains one delta per call; holds no state between calls."""

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
        try:
            torch.manual_seed(task.seed)
            with torch.enable_grad():
                return self._train(copy, pool, task, config, on_step)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise OutOfResources("There is not enough memory to train this edit; nothing was changed.") from error

    def _train(
        self,
        copy: ComputeCopy,
        pool: PreservationPool,
        task: EditTask,
        config: EditConfig,
        on_step: Callable[[StepRecord], None] | None,
    ) -> Training:
        rng = random.Random(task.seed)
        lower = copy.lower_states([row.ids for row in (*task.rows, *task.replay)])
        fact = list(zip(lower[: len(task.rows)], task.rows, strict=True))
        replay = list(zip(lower[len(task.rows) :], task.replay, strict=True))
        start = _gradient_factors(copy, fact[:_MAX_ROWS], task.restore[:_MAX_ROWS], config)
        records: list[StepRecord] = []
        recalled = False
        with _adapter(copy, config, start) as tuner:
            optimizer = _optimizer(copy, tuner, config)
            drift: float | None = None
            stages = _RowStages(fact, task.restore, rng)
            for step in range(1, config.max_steps + 1):
                rows, restored = stages.next()
                kept = pool.sample(rng, language=task.language, config=config, excluded=task.excluded)
                older = _choose_replay(replay, config.replay, rng)
                losses = _losses(copy, rows, restored, kept, older)
                penalty = _orthogonality(tuner)
                total = losses.fact + config.preserve_weight * losses.drift + losses.replay
                total = total + config.orthogonality * penalty
                if not torch.isfinite(total):
                    raise EditFailed(
                        f"The loss was not finite at step {step}; nothing was changed. Try a smaller rate."
                    )
                if losses.drift_value is not None:
                    drift = (
                        losses.drift_value
                        if drift is None
                        else _DRIFT_SMOOTHING * drift + (1 - _DRIFT_SMOOTHING) * losses.drift_value
                    )
                stages.saw(losses.leads, config.margin)
                record = StepRecord(
                    step=step,
                    loss=float(losses.fact_value),
                    recall=stages.recall,
                    drift=drift,
                    penalty=float(penalty),
                    rank=_alive(tuner),
                )
                records.append(record)
                if on_step is not None:
                    on_step(record)
                # The state that was just measured is the one to keep: stop before another step changes it.
                if stages.done and (drift is None or drift <= config.preserve_stop) and losses.replay_ok:
                    recalled = True
                    break
                optimizer.zero_grad(set_to_none=True)
                total.backward()
                _check_gradients(tuner, step)
                optimizer.step()
                tuner.update_and_allocate(step)
            delta, ranks = _fold(tuner)
        check_finite(delta)
        return Training(
            delta=delta, steps=len(records), recalled=recalled or stages.done, ranks=ranks, records=tuple(records)
        )


class _RowStages:
    """Walks over the rows in turns of at most _MAX_ROWS and remembers which of them were last seen recalled."""

    def __init__(self, fact: list[Item], restore: Sequence[PreservedItem], rng: random.Random) -> None:
        self._fact = fact
        self._restore = list(restore)
        self._rng = rng
        self._n = len(fact) + len(restore)
        self._ok = [0.0] * self._n
        self._queue: list[int] = []
        self._current: list[int] = []

    def next(self) -> tuple[list[Item], list[PreservedItem]]:
        if self._n <= _MAX_ROWS:
            self._current = list(range(self._n))
        else:
            if len(self._queue) < _MAX_ROWS:
                fresh = list(range(self._n))
                self._rng.shuffle(fresh)
                # Rows not yet recalled come first and the rest follow for a check.
                fresh.sort(key=lambda i: self._ok[i] >= 1.0)
                self._queue += [i for i in fresh if i not in self._queue]
            self._current, self._queue = self._queue[:_MAX_ROWS], self._queue[_MAX_ROWS:]
        n_fact = len(self._fact)
        rows = [self._fact[i] for i in self._current if i < n_fact]
        restored = [self._restore[i - n_fact] for i in self._current if i >= n_fact]
        self._current.sort(key=lambda i: i >= n_fact)
        return rows, restored

    def saw(self, leads_per_row: list[torch.Tensor], margin: float) -> None:
        n_fact = len(self._fact)
        for i, lead in zip(self._current, leads_per_row, strict=True):
            needed = margin if i < n_fact else 0.0  # a restored answer need only be greedy again
            self._ok[i] = float((lead >= needed).float().mean())

    @property
    def recall(self) -> float:
        return sum(self._ok) / max(1, self._n)

    @property
    def done(self) -> bool:
        return all(ok >= 1.0 for ok in self._ok)


class _Losses:
    """The parts of one step's loss, still attached to the graph, and what was measured on the way."""

    def __init__(self) -> None:
        self.fact: torch.Tensor = torch.zeros(())
        self.drift: torch.Tensor = torch.zeros(())
        self.replay: torch.Tensor = torch.zeros(())
        self.fact_value = 0.0
        self.drift_value: float | None = None
        self.leads: list[torch.Tensor] = []
        self.replay_ok = True


def _losses(
    copy: ComputeCopy,
    rows: list[Item],
    restored: list[PreservedItem],
    kept: list[PreservedItem],
    older: list[Item],
) -> _Losses:
    items = [*rows, *((i.lower, i.row) for i in restored), *((i.lower, i.row) for i in kept), *older]
    states = copy.answer_states(items)  # (all answer tokens, hidden)
    logits = copy.logits(states)  # (all answer tokens, vocab)
    sizes = [len(row.answer) for _, row in items]
    device = logits.device
    result = _Losses()
    parts = logits.split(sizes)
    n_rows, n_restored, n_kept = len(rows), len(restored), len(kept)

    def targets(of: Sequence[Item]) -> torch.Tensor:
        return torch.tensor([t for _, row in of for t in row.answer], device=device)

    if rows:
        mine = torch.cat(parts[:n_rows])
        ids = targets(rows)
        # Mean per row first: a long row must not drown a short one.
        per_token = F.cross_entropy(mine, ids, reduction="none")
        result.fact = torch.stack([p.mean() for p in per_token.split(sizes[:n_rows])]).mean()
        result.leads = list(leads(mine.detach(), ids).split(sizes[:n_rows]))
    if restored:
        mine = torch.cat(parts[n_rows : n_rows + n_restored])
        kl = _kl(copy, restored, mine)
        result.fact = result.fact + kl.mean()
        ids = targets([(i.lower, i.row) for i in restored])
        result.leads += list(leads(mine.detach(), ids).split([len(i.row.answer) for i in restored]))
    result.fact_value = float(result.fact.detach())
    if kept:
        mine = torch.cat(parts[n_rows + n_restored : n_rows + n_restored + n_kept])
        kl = _kl(copy, kept, mine)
        result.drift = kl.mean()
        result.drift_value = float(result.drift.detach())
    if older:
        mine = torch.cat(parts[n_rows + n_restored + n_kept :])
        ids = targets(older)
        result.replay = F.cross_entropy(mine, ids)
        result.replay_ok = bool((leads(mine.detach(), ids) >= 0).all())
    return result


def _kl(copy: ComputeCopy, items: Sequence[PreservedItem], logits: torch.Tensor) -> torch.Tensor:
    """Return KL(base‖now) per answer token (n,), in nats."""
    with torch.no_grad():
        base = torch.log_softmax(copy.logits(torch.cat([i.output for i in items]).to(logits.device)), -1)
    now = torch.log_softmax(logits, -1)
    return (base.exp() * (base - now)).sum(-1)


def _choose_replay(replay: list[Item], n: int, rng: random.Random) -> list[Item]:
    """Half the likeliest to collide, in turns, half at random."""
    if len(replay) <= n:
        return replay
    near = replay[: max(2 * n, 8)]
    return rng.sample(near, n // 2) + rng.sample(replay, n - n // 2)


def _gradient_factors(
    copy: ComputeCopy, fact: Sequence[Item], restore: Sequence[PreservedItem], config: EditConfig
) -> dict[str, Factors]:
    """Return orthonormal start factors per module from the gradient of the fact's loss: its leading singular vectors."""
    modules = {name: copy.model.get_submodule(name) for name in copy.targets.names}
    try:
        for module in modules.values():
            module.weight.requires_grad_(True)
        losses = _losses(copy, list(fact), list(restore), [], [])
        if not torch.isfinite(losses.fact):
            raise EditFailed("The model's loss on the new text is not finite; nothing was changed.")
        losses.fact.backward()
        factors: dict[str, Factors] = {}
        for name, module in modules.items():
            gradient = module.weight.grad
            if gradient is None:
                raise EditFailed(f"No gradient reaches {name}; nothing was changed. Choose other modules.")
            gradient = gradient.detach().float()
            if type(module).__name__ == "Conv1D":
                gradient = gradient.T
            rank = min(config.init_rank, *gradient.shape)
            u, _, v = torch.svd_lowrank(gradient, q=rank, niter=2)
            factors[name] = (v.T.contiguous(), u.contiguous())
        return factors
    finally:
        for module in modules.values():
            module.weight.grad = None
            module.weight.requires_grad_(False)


@contextmanager
def _adapter(copy: ComputeCopy, config: EditConfig, start: dict[str, Factors]) -> Iterator[Any]:
    """Inject AdaLoRA modules that start from the given factors, and take them out again whatever happens."""
    from peft import AdaLoraConfig, AdaLoraModel

    until = min(_ALLOCATE_UNTIL, max(_ALLOCATE_FROM + 1, config.max_steps - 1))
    adalora = AdaLoraConfig(
        init_r=config.init_rank,
        target_r=config.target_rank,
        lora_alpha=config.init_rank,
        lora_dropout=0.0,
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
            for name, (a, b) in start.items():
                module = copy.model.get_submodule(name)
                # Modules smaller than init_rank have fewer directions; the rest stay random and tiny.
                module.lora_A[ADAPTER].data = module.lora_A[ADAPTER].data.float()
                module.lora_B[ADAPTER].data = module.lora_B[ADAPTER].data.float()
                module.lora_E[ADAPTER].data = module.lora_E[ADAPTER].data.float()
                module.lora_A[ADAPTER].data[: a.shape[0]] = a
                module.lora_B[ADAPTER].data[:, : b.shape[1]] = b
        yield tuner
    finally:
        tuner.unload()
        copy.model.requires_grad_(False)


def _optimizer(copy: ComputeCopy, tuner: Any, config: EditConfig) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = []
    for name in copy.targets.names:
        module = copy.model.get_submodule(name)
        weight = module.get_base_layer().weight
        # Root mean square of the singular values: Frobenius norm over the root of their number.
        typical = float(weight.float().norm()) / math.sqrt(min(weight.shape))
        a, b, e = module.lora_A[ADAPTER], module.lora_B[ADAPTER], module.lora_E[ADAPTER]
        groups.append({"params": [e], "lr": config.value_lr * typical})
        groups.append({"params": [a], "lr": config.factor_lr / math.sqrt(a.shape[1])})
        groups.append({"params": [b], "lr": config.factor_lr / math.sqrt(b.shape[0])})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def _factors(tuner: Any) -> Iterator[tuple[str, Any]]:
    for name, module in tuner.model.named_modules():
        if hasattr(module, "lora_E") and ADAPTER in module.lora_E:
            yield name, module


def _orthogonality(tuner: Any) -> torch.Tensor:
    """Return AdaLoRA's penalty: mean over the factors of the Frobenius norm of PᵀP − I (peft adds it to `loss` only)."""
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
            init_rank=float(module.ranknum[ADAPTER]),
        )
        ranks[name] = 0 if folded is None else folded[0].shape[0]
        if folded is not None:
            delta[name] = (folded[0].cpu().clone(), folded[1].cpu().clone())
    return delta, ranks
