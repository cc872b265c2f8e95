"""LoRA, and full fine-tuning of the adapted matrices: the peers of AdaLoRA in the same training session, on peft.

LoRA (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022) starts its input factors from the same
gradient's singular vectors and its output factors at zero, and moves them at rates that move the product as AdaLoRA's
first step does. Full fine-tuning is LoRA of full rank with one factor fixed to the identity: then the other factor *is*
the matrix' change, and its gradient the matrix' own. Both give deltas, so that they are merged, stored and undone as
AdaLoRA's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from kvllm.config import EditConfig
from kvllm.editing.adalora import ADAPTER, Adapter, InputFactors, LowRankEditor
from kvllm.editing.compute import ComputeCopy
from kvllm.editing.delta import Factors, is_transposed
from kvllm.editing.editor import EditTask
from kvllm.editing.inputs import Coordinates, whole_coordinates
from kvllm.editing.preservation import PreservationPool
from kvllm.errors import EditFailed

# Of the step below: of its length most lies in directions that the gradient hardly has. A fifteenth recalls a fact
# within the default's steps, at a sixth of a third's drift; half as much recalls fewer paraphrases (benchmarks/LOG.md).
_FULL_RATE = 1 / 15


class LoraEditor(LowRankEditor):
    """LoRA of rank `target_rank`."""

    full = False

    @contextmanager
    def adapter(
        self, copy: ComputeCopy, config: EditConfig, start: dict[str, Factors], coordinates: Mapping[str, Coordinates]
    ) -> Iterator[Adapter]:
        """Inject LoRA modules, and take them out again whatever happens."""
        from peft import LoraConfig, LoraModel

        names = copy.targets.names
        sides = {name: min(_shape(copy.model.get_submodule(name))) for name in names}
        ranks = {name: sides[name] if self.full else min(config.target_rank, sides[name]) for name in names}
        lora = LoraConfig(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            rank_pattern=dict(ranks),
            alpha_pattern=dict(ranks),  # a scaling of 1 everywhere
            lora_dropout=config.dropout,
            target_modules=list(names),
            fan_in_fan_out=is_transposed(copy.model.get_submodule(names[0])),
        )
        tuner = LoraModel(copy.model, {ADAPTER: lora}, ADAPTER)
        try:
            if config.dropout:
                for name in names:
                    copy.model.get_submodule(name).lora_dropout[ADAPTER].train()
            yield _Lora(copy, config, start, coordinates, full=self.full)
        finally:
            tuner.unload()
            copy.model.requires_grad_(False)


class FullEditor(LoraEditor):
    """Every entry of the adapted matrices is trained; rank settings are ignored."""

    full = True

    def coordinates(self, copy: ComputeCopy, pool: PreservationPool, task: EditTask) -> Mapping[str, Coordinates]:
        """Return the whitening alone: the edit's own directions would leave most entries out."""
        return whole_coordinates(copy, task.whitening)


class _Lora:
    """The factors of every module, fp32, and their optimizer."""

    def __init__(
        self,
        copy: ComputeCopy,
        config: EditConfig,
        start: dict[str, Factors],
        coordinates: Mapping[str, Coordinates],
        *,
        full: bool,
    ) -> None:
        self._a: dict[str, torch.nn.Parameter] = {}
        self._b: dict[str, torch.nn.Parameter] = {}
        typical: dict[str, float] = {}
        for name in copy.targets.names:
            module = copy.model.get_submodule(name)
            weight = module.get_base_layer().weight
            typical[name] = float(weight.float().norm()) / math.sqrt(min(weight.shape))
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            a.data, b.data = a.data.float(), b.data.float()
            with torch.no_grad():
                _set_start(a, b, full=full)
            # In full fine-tuning the larger side is trained, against an identity of the smaller one.
            a.requires_grad_(not full or a.shape[1] >= b.shape[0])
            b.requires_grad_(not full or a.shape[1] < b.shape[0])
            self._a[name], self._b[name] = a, b
        free = {name: a for name, a in self._a.items() if a.requires_grad}
        pointed = {} if full else {name: directions for name, (directions, _) in start.items()}
        self._inputs = InputFactors(free, coordinates, pointed)
        groups: list[dict[str, Any]] = []
        for name, a in self._a.items():
            b = self._b[name]
            if full:
                trained = self._inputs.trained(name, a) if a.requires_grad else b
                # As far in Frobenius norm as a step of `target_rank` singular values.
                whole = config.value_lr * typical[name] * math.sqrt(config.target_rank / (a.shape[1] * b.shape[0]))
                groups.append({"params": [trained], "lr": _FULL_RATE * whole})
            else:
                rate = config.factor_lr / math.sqrt(a.shape[1])
                groups.append({"params": [self._inputs.trained(name, a)], "lr": rate})
                groups.append({"params": [b], "lr": config.value_lr * typical[name] / math.sqrt(b.shape[0])})
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))

    def penalty(self) -> torch.Tensor | None:
        return None

    def energy(self) -> torch.Tensor | None:
        return self._inputs.energy(self._b)

    def alive(self) -> int:
        return sum(a.shape[0] for a in self._a.values())

    def step(self, number: int) -> None:
        for name, a in self._a.items():
            for factor in (a, self._b[name]):
                if factor.requires_grad and (factor.grad is None or not torch.isfinite(factor.grad).all()):
                    raise EditFailed(f"The gradient of {name} was not finite at step {number}; nothing was changed.")
        self._inputs.pull()
        self.optimizer.step()
        self._inputs.push()

    def forget(self) -> None:
        self._inputs.forget()

    def linear(self) -> list[torch.nn.Parameter]:
        return [self._b[name] if self._b[name].requires_grad else a for name, a in self._a.items()]

    def fold(self) -> tuple[dict[str, Factors], dict[str, int]]:
        delta = {
            name: (a.detach().cpu().clone(), self._b[name].detach().cpu().clone())
            for name, a in self._a.items()
            if bool(a.any()) and bool(self._b[name].any())
        }
        return delta, {name: a.shape[0] if name in delta else 0 for name, a in self._a.items()}


def _set_start(a: torch.nn.Parameter, b: torch.nn.Parameter, *, full: bool) -> None:
    """Set the product to zero: LoRA by its output factor, full fine-tuning with one identity."""
    b.zero_()
    if not full:
        a.copy_(a / a.norm(dim=1, keepdim=True).clamp(min=1e-12))  # directions beyond the gradient's stay random
    elif a.shape[1] >= b.shape[0]:
        a.zero_()
        b.copy_(torch.eye(len(b)))
    else:
        a.copy_(torch.eye(a.shape[1]))


def _shape(module: Any) -> tuple[int, int]:
    out, into = module.weight.shape
    return int(out), int(into)
