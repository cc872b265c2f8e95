"""What Metal lacks is worked out on the CPU. No Mac here: CPU tensors that say they were Metal's and fail so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from kvllm.editing import adalora, inputs
from kvllm.editing.delta import AdaptedWeights

METAL = torch.device("mps")
LACKING = (
    torch.linalg.cholesky,
    torch.linalg.eigh,
    torch.linalg.qr,
    torch.linalg.solve_triangular,
    torch.linalg.svd,
    torch.svd_lowrank,
)


class OnMetal(torch.Tensor):
    """A tensor whose results are on Metal, too."""


class Metal(TorchFunctionMode):
    """A Metal device without fp64 and without decompositions, as in torch 2.6."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        if any(isinstance(each, torch.device) and each.type == "mps" for each in given):
            plain = [each for each in args if each != METAL]
            options = {name: value for name, value in (kwargs or {}).items() if value != METAL}
            made = plain[0] if func is torch.Tensor.to else func(*plain, **options)
            return made.as_subclass(OnMetal)
        if any(isinstance(each, OnMetal) for each in given):
            if func == torch.Tensor.device.__get__:
                return METAL
            if func is torch.Tensor.cpu:
                return args[0].as_subclass(torch.Tensor)
            if func in LACKING:
                raise NotImplementedError(f"{func.__name__} is not currently implemented for the MPS device.")
            if func is torch.Tensor.double or torch.float64 in given:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype.")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def metal() -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    with Metal():
        yield lambda tensor: tensor.to(METAL)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_fake_device_fails_as_metal_does(metal: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = metal(random(3, 3))
    assert (tensor @ tensor.T).device == torch.ones(2, device=tensor.device).device == METAL
    assert tensor.cpu().device == torch.device("cpu")
    for refused in (tensor.double, lambda: tensor.to(torch.float64), lambda: torch.linalg.eigh(tensor)):
        with pytest.raises((TypeError, NotImplementedError)):
            refused()


def test_norms_of_changes_are_worked_out(metal: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = SimpleNamespace(weight=metal(random(4, 6)))
    weights = AdaptedWeights(SimpleNamespace(get_submodule=lambda name: module))
    weights.apply({"m": (torch.ones(1, 6), torch.ones(4, 1))})
    assert module.weight.device == METAL
    assert weights.change_norms()["m"] == pytest.approx(24**0.5, rel=1e-6)


def test_inputs_are_decomposed_as_on_the_cpu(
    metal: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    many, few = random(40, 8), random(5, 8)
    monkeypatch.setattr(inputs, "read_inputs", lambda copy, names, groups, take, but: take("m", groups[0]))

    def gathered(x: torch.Tensor) -> torch.Tensor:
        found: Any = inputs._inputs(None, ["m"], x)  # type: ignore[arg-type]
        return found["m"]  # type: ignore[no-any-return]

    found: list[tuple[torch.Tensor, ...]] = []
    for place in (lambda tensor: tensor, metal):
        wide, narrow = place(many), place(few)
        whitening = inputs._whitening(wide.T @ wide, 0.1)
        found.append(
            (
                whitening,
                *inputs._principal(wide),
                *inputs._principal(narrow),
                inputs._squeeze(narrow, 0.2),
                gathered(wide),
            )
        )
    for on_cpu, on_metal in zip(*found, strict=True):
        assert (on_cpu.device.type, on_metal.device.type) == ("cpu", "mps")
        assert torch.equal(on_cpu, on_metal.cpu())


def test_a_gradient_is_decomposed_as_on_the_cpu(metal: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gradient = random(12, 7)
    found = []
    for place in (lambda tensor: tensor, metal):
        torch.manual_seed(0)
        found.append(adalora._leading_vectors(place(gradient), 3))
    assert [tuple(factor.shape) for factor in found[0]] == [(3, 7), (12, 3)]
    for on_cpu, on_metal in zip(*found, strict=True):
        assert on_metal.device == METAL
        assert torch.equal(on_cpu, on_metal.cpu())
