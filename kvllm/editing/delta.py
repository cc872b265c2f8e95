"""Low-rank weight changes: fold, serialise, apply, concatenate. Free functions on tensors; no training, no ledger.

A delta maps a module's name to the factors of its change, W + B·A with A (rank, in) and B (out, rank), both fp32. On
disk it is a plain PEFT LoRA adapter with lora_alpha = r, so that every tool that reads LoRA reads it.

    weights = AdaptedWeights(model)
    weights.apply(delta); weights.replay([])       # changed, then exactly the base again
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from kvllm.errors import Corrupt, EditFailed, ModelError, Untrusted
from kvllm.lm.model import tensors_digest
from kvllm.store.artefacts import MAX_NORM

Factors = tuple[torch.Tensor, torch.Tensor]  # A (rank, in), B (out, rank)
Delta = Mapping[str, Factors]
_Form = tuple[torch.dtype, torch.device, torch.Size]

_PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def product(factors: Factors) -> torch.Tensor:
    """Return the dense change B·A (out, in) in fp32.

    The product is taken in fp64 and rounded once, so that it does not depend on the number of threads.
    """
    a, b = factors
    return (b.double() @ a.double()).float()


def fold_singular_values(
    a: torch.Tensor, e: torch.Tensor, b: torch.Tensor, *, alpha: float, init_rank: float
) -> Factors | None:
    """Fold AdaLoRA's B·diag(E)·A·alpha/(init_r + 1e-5) into LoRA factors, pruned directions dropped.

    Args:
        a: Right singular vectors (init_r, in).
        e: Singular values (init_r, 1); those pruned by the rank allocator are exactly zero.
        b: Left singular vectors (out, init_r).
        alpha: `lora_alpha` of the AdaLoRA configuration.
        init_rank: peft's `ranknum`, a constant that stays at init_r after pruning.

    Returns:
        The factors, or None where every direction was pruned.
    """
    kept = e.view(-1) != 0
    if not bool(kept.any()):
        return None
    scale = alpha / (init_rank + 1e-5)
    return (a * e)[kept].float() * scale, b[:, kept].float().contiguous()


def norm(delta: Delta) -> float:
    """Return the Frobenius norm over all changed matrices together."""
    return math.sqrt(sum(float(product(factors).double().square().sum()) for factors in delta.values()))


def check_finite(delta: Delta) -> None:
    """Refuse a delta whose factors, or their product, hold NaN or infinity.

    Raises:
        EditFailed: naming the first such module.
    """
    for name, (a, b) in delta.items():
        # Finite factors may still have a product beyond fp32.
        if not all(torch.isfinite(t).all() for t in (a, b, product((a, b)))):
            raise EditFailed(
                f"Training produced non-finite weights in {name}; nothing was changed. Try a smaller rate."
            )


def check_norm(delta: Delta) -> None:
    """Refuse a delta that changes the weights by more than any edit may.

    Raises:
        EditFailed: naming the norm and the limit; the store would refuse it as untrusted.
    """
    size = norm(delta)
    if size > MAX_NORM:
        raise EditFailed(
            f"Training changed the weights by a norm of {size:.3g}, more than the {MAX_NORM:g} that any edit may; "
            "nothing was changed. Try lower rates."
        )


def concatenate(deltas: Sequence[Delta]) -> dict[str, Factors]:
    """Sum deltas exactly into one by concatenating ranks: [B1 B2]·[A1; A2] = B1·A1 + B2·A2."""
    names = dict.fromkeys(name for delta in deltas for name in delta)
    return {
        name: (
            torch.cat([delta[name][0] for delta in deltas if name in delta], dim=0),
            torch.cat([delta[name][1] for delta in deltas if name in delta], dim=1),
        )
        for name in names
    }


def to_files(delta: Delta, *, base_name: str) -> dict[str, bytes]:
    """Serialise as a PEFT LoRA folder: file name to bytes, the same bytes for the same delta.

    Modules of lower rank are padded with zeros to the largest, as loaders other than peft want one rank.
    """
    from safetensors.torch import save

    rank = max(a.shape[0] for a, _ in delta.values())
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(delta):
        a, b = delta[name]
        missing = rank - a.shape[0]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing)).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(delta),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    return {
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def from_files(files: Mapping[str, bytes]) -> dict[str, Factors]:
    """Read a delta back; the store has checked hashes, names and header before.

    Raises:
        Corrupt: a factor is missing.
        Untrusted: the adapter scales itself.
    """
    from safetensors.torch import load

    config = json.loads(files[CONFIG_FILE])
    if config["lora_alpha"] != config["r"] or config.get("use_rslora") or config.get("use_dora"):
        raise Untrusted(
            "The delta's adapter_config.json asks for a scaling that kvllm never writes; it was not applied."
        )
    tensors = load(files[WEIGHTS_FILE])
    delta: dict[str, Factors] = {}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            partner = f"{_PREFIX}{name}.lora_B.weight"
            if partner not in tensors:
                raise Corrupt(f"The delta has no lora_B for {name}; it was not applied.")
            delta[name] = (tensors[key].float(), tensors[partner].float())
    return delta


class AdaptedWeights:
    """The weight matrices of one model that edits change: fp32 masters, base values, replay.

    A matrix is copied when it is first changed. Where the model computes in fp32, its own parameter is the master;
    otherwise an fp32 master stands beside it and is cast once after all sums.

    With another dtype for `masters` each sum is rounded to it: what a tool without fp32 masters would hold.

    Once the model is `sealed`, a matrix that somebody else has changed is not taken for the base's.
    """

    def __init__(self, model: Any, *, base_digest: str = "", masters: torch.dtype = torch.float32) -> None:
        self._model = model
        self._base_digest = base_digest
        self._rounded_to = masters
        self._base: dict[str, torch.Tensor] = {}
        self._masters: dict[str, torch.Tensor] = {}
        self._touched: set[str] = set()
        self._seals: dict[str, tuple[_Form, int]] | None = None

    @property
    def touched(self) -> tuple[str, ...]:
        """Modules that the deltas since the base have changed, sorted."""
        return tuple(sorted(self._touched))

    @property
    def known(self) -> tuple[str, ...]:
        """Modules that were ever changed since loading, sorted; some may hold base values again."""
        return tuple(sorted(self._base))

    def base(self, name: str) -> torch.Tensor:
        """Return the module's weight as in the base model (out, in or as stored)."""
        found = self._base.get(name)
        return self._weight(name) if found is None else found

    def master(self, name: str) -> torch.Tensor:
        """Return the module's current weight in fp32, as stored by the model."""
        return self._masters.get(name, self._weight(name))

    @torch.no_grad()
    def apply(self, delta: Delta) -> None:
        """Add a delta to the masters, and to the model.

        Raises:
            Untrusted: a module is unknown or a shape does not fit; nothing was changed.
            ModelError: a matrix was changed by hand; nothing was changed.
        """
        self._check_seals(delta)
        changes = {name: self._fitted(name, factors) for name, factors in delta.items()}
        for name, change in changes.items():
            self._own(name)
            self._masters[name].add_(change)
            if self._rounded_to != torch.float32:
                self._masters[name].copy_(self._masters[name].to(self._rounded_to))
            self._touched.add(name)
            self._sync(name)

    @torch.no_grad()
    def replay(self, deltas: Iterable[Delta]) -> None:
        """Set the weights to base + deltas, summed in order: the same bits for the same history."""
        for name in self._base:
            self._masters[name].copy_(self._base[name])
            self._sync(name)
        self._touched.clear()
        for delta in deltas:
            self.apply(delta)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of the touched masters, for `restore` and for snapshots."""
        return {name: self._masters[name].detach().clone() for name in self.touched}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set the weights to a state taken earlier, bit for bit."""
        for name in state:
            if state[name].shape != self._weight(name).shape:
                raise Corrupt(f"A stored matrix does not fit the model's {name}; it was not used.")
        self._check_seals(state)
        for name in state:
            self._own(name)
        for name in self._base:
            self._masters[name].copy_(state.get(name, self._base[name]))
            self._sync(name)
        self._touched = set(state)

    def seal(self) -> None:
        """Remember every parameter as it is, before somebody gets hold of the model; later calls do nothing."""
        if self._seals is None:
            self._seals = {name: (_form(p), _checksum(p)) for name, p in self._model.named_parameters()}

    @property
    def sealed(self) -> bool:
        return self._seals is not None

    def changed_by_hand(self, *, edited: bool = True) -> list[str]:
        """Return the parameters that are not what they were when sealed, or what edits made of them.

        A change by hand of an edited fp32 matrix changes its master as well: that the digest tells.

        Args:
            edited: Whether those that edits ever changed, whose base values are kept, are read too.
        """
        if self._seals is None:
            return []
        now = dict(self._model.named_parameters())
        owned = {f"{name}.weight": name for name in self._base}

        def is_changed(name: str) -> bool:
            if name not in owned or not self._has_form(name, now):
                return not self._is_as_sealed(name, now)
            return edited and not self._has_master(owned[name])

        return [name for name in {**now, **self._seals} if is_changed(name)]

    def _check_seals(self, modules: Iterable[str]) -> None:
        """Refuse matrices that a hand has changed before any edit did: their values are about to become the base's."""
        if self._seals is None:
            return
        now = dict(self._model.named_parameters())
        fresh = [f"{name}.weight" for name in modules if name not in self._base]
        # A matrix that two modules share has the first one's name only.
        if changed := [name for name in fresh if name in self._seals and not self._is_as_sealed(name, now)]:
            raise hand_changed(changed)

    def _has_form(self, name: str, now: Mapping[str, torch.Tensor]) -> bool:
        assert self._seals is not None
        return name in now and name in self._seals and _form(now[name]) == self._seals[name][0]

    def _is_as_sealed(self, name: str, now: Mapping[str, torch.Tensor]) -> bool:
        assert self._seals is not None
        return self._has_form(name, now) and _checksum(now[name]) == self._seals[name][1]

    def _has_master(self, name: str) -> bool:
        """Say whether the model has a module's master, and an untouched master its base value."""
        weight, master = self._weight(name), self._masters[name]
        if weight.data_ptr() != master.data_ptr() and not torch.equal(weight, master.to(weight)):
            return False
        return name in self._touched or torch.equal(master, self._base[name])

    def is_finite(self) -> bool:
        """Say whether every changed matrix holds finite numbers only, in the precision that the model computes in."""
        return all(bool(torch.isfinite(self._weight(name)).all()) for name in self._touched)

    def change_norms(self) -> dict[str, float]:
        """Return the Frobenius norm of the change against the base of every touched matrix, by module."""
        changes = ((name, self._masters[name].cpu(), self._base[name].cpu()) for name in self.touched)  # Metal: no fp64
        return {name: float((master.double() - base.double()).norm()) for name, master, base in changes}

    def digest(self) -> str:
        """Return sha256 over the base digest and the touched masters (name, dtype, shape, bytes)."""
        return tensors_digest({name: self.master(name) for name in self.touched}, seed=self._base_digest)

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self._model.get_submodule(name).weight  # type: ignore[no-any-return]
        except AttributeError as error:
            raise Untrusted(f"The delta changes {name}, which this model does not have; it was not applied.") from error

    def _fitted(self, name: str, factors: Factors) -> torch.Tensor:
        weight = self._weight(name)
        change = product(factors).to(weight.device)
        if is_transposed(self._model.get_submodule(name)):
            change = change.T
        if change.shape != weight.shape:
            raise Untrusted(
                f"The delta's change of {name} has shape {tuple(change.shape)}, the model's matrix "
                f"{tuple(weight.shape)}; it was not applied."
            )
        return change

    def _own(self, name: str) -> None:
        if name not in self._base:
            weight = self._weight(name)
            base = weight.detach().float().clone()
            # The base last: whoever is interrupted here finds no name that has a base and no master.
            self._masters[name] = weight.data if weight.dtype == torch.float32 else base.clone()
            self._base[name] = base

    def _sync(self, name: str) -> None:
        weight = self._weight(name)
        if weight.data_ptr() != self._masters[name].data_ptr():
            weight.data.copy_(self._masters[name])


def hand_changed(names: Sequence[str]) -> ModelError:
    """Return the error that says that weights are not those that the ledger knows of."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ModelError(
        f"The model's weights were changed by hand ({names[0]}{more}), and no ledger would know of that; nothing was "
        "changed. Open the knowledge base again to go on."
    )


def _form(tensor: torch.Tensor) -> _Form:
    return tensor.dtype, tensor.device, tensor.shape


def _checksum(tensor: torch.Tensor) -> int:
    """Return a CRC of a tensor's bytes: nobody is kept from forging it, and it is four times as fast as a sha256."""
    return zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def is_transposed(module: Any) -> bool:
    """Say whether a module keeps its weight as (in, out): transformers' Conv1D, of GPT-2."""
    return type(module).__name__ == "Conv1D"
