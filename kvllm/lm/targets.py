"""Which weight matrices an edit adapts, found in the model's own structure.

No model family is named here: the decoder layers are the longest list of equal blocks, attention is the child whose
class says so, and a matrix is told by its shape and place. Knows nothing of training or stores.

    find_targets(model, depth=(0.6, 0.9), modules="mlp-out").names   # ('model.layers.18.mlp.down_proj', ...)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvllm.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

MODULE_KINDS = ("mlp-out", "mlp", "attention", "attention-out", "residual-out", "all")


@dataclass(frozen=True)
class Targets:
    """The adapted matrices.

    Attributes:
        names: Module names, in the order of the forward pass.
        layer_list: Name of the module list that holds the decoder layers.
        first_layer: Lowest adapted layer; everything below never changes.
        n_layers: Number of decoder layers.
    """

    names: tuple[str, ...]
    layer_list: str
    first_layer: int
    n_layers: int


def decoder_layers(model: torch.nn.Module) -> tuple[str, Any]:
    """Return name and module list of the decoder layers: the longest list of blocks of one class.

    Raises:
        ModelError: the model has no such list.
    """
    from torch import nn

    best: tuple[str, Any] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        equal = len({type(child) for child in module}) == 1 and any(_matrices(child) for child in module)
        if equal and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ModelError("The model has no list of decoder layers with weight matrices; kvllm cannot edit it.")
    return best


def find_targets(model: torch.nn.Module, *, depth: tuple[float, float], modules: str) -> Targets:
    """Choose the matrices of a band of layers.

    Args:
        model: A Hugging Face causal language model.
        depth: Start and end of the band as shares of the number of layers, e.g. (0.5, 0.8); at least one layer.
        modules: One of MODULE_KINDS, or comma-separated name endings such as "q_proj,v_proj".

    Raises:
        ConfigError: nothing matches.
        ModelError: the model has no decoder layers.
    """
    list_name, layers = decoder_layers(model)
    n_layers = len(layers)
    start = min(n_layers - 1, math.floor(depth[0] * n_layers + 1e-9))
    stop = max(start + 1, min(n_layers, math.ceil(depth[1] * n_layers - 1e-9)))
    endings = tuple(part.strip() for part in modules.split(",") if part.strip())
    names: list[str] = []
    for index in range(start, stop):
        for child_name, in_features, out_features, in_attention in _matrices(layers[index]):
            if modules in MODULE_KINDS:
                chosen = _is_kind(modules, in_features, out_features, in_attention, child_name)
            else:
                chosen = child_name.split(".")[-1] in endings
            if chosen:
                names.append(f"{list_name}.{index}.{child_name}")
    if not names:
        raise ConfigError(
            f"No matrix of the model's layers {start}-{stop - 1} matches modules={modules!r}; "
            f"use one of {', '.join(MODULE_KINDS)}, or endings of module names."
        )
    return Targets(names=tuple(names), layer_list=list_name, first_layer=start, n_layers=n_layers)


@dataclass(frozen=True)
class GatedMlp:
    """The matrices of one decoder layer's gated MLP, out(act(gate(x)) · up(x)), by module name.

    Attributes:
        layer: Its place in the layer list.
        gate, up: Each (inner, hidden): row j is what neuron j reads.
        out: (hidden, inner): column j is what neuron j writes.
    """

    layer: int
    gate: str
    up: str
    out: str


def gated_mlp(model: torch.nn.Module, depth: float) -> GatedMlp:
    """Find the gated MLP of the layer at a depth.

    Args:
        model: A Hugging Face causal language model.
        depth: Share of the number of layers, from 0 up to 1.

    Raises:
        ConfigError: the layer has no gated MLP of three plain matrices.
        ModelError: the model has no decoder layers.
    """
    list_name, layers = decoder_layers(model)
    index = min(len(layers) - 1, math.floor(depth * len(layers) + 1e-9))
    inner = [(name, out) for name, into, out, inside in _matrices(layers[index]) if not inside and into < out]
    outer = [(name, into) for name, into, out, inside in _matrices(layers[index]) if not inside and into > out]
    gates = [name for name, _ in inner if "gate" in name.split(".")[-1] or name.split(".")[-1] == "w1"]
    if len(inner) != 2 or len(outer) != 1 or len(gates) != 1 or {size for _, size in inner} != {outer[0][1]}:
        raise ConfigError(
            f"Layer {index} of this model has no gated MLP of three matrices; use another editor than 'neurons'."
        )
    up = next(name for name, _ in inner if name != gates[0])
    return GatedMlp(index, *(f"{list_name}.{index}.{name}" for name in (gates[0], up, outer[0][0])))


def _matrices(layer: Any) -> list[tuple[str, int, int, bool]]:
    """List (name, in, out, in_attention) of the weight matrices in one decoder layer, in module order."""
    from torch import nn

    found = []
    attention = [name for name, child in layer.named_modules() if name and "attention" in type(child).__name__.lower()]
    for name, child in layer.named_modules():
        if isinstance(child, nn.Linear):
            in_features, out_features = child.in_features, child.out_features
        elif type(child).__name__ == "Conv1D" and hasattr(child, "nf"):  # GPT-2 stores (in, out)
            in_features, out_features = int(child.weight.shape[0]), int(child.nf)
        else:
            continue
        inside = any(name.startswith(f"{prefix}.") for prefix in attention)
        found.append((name, in_features, out_features, inside))
    return found


def _is_kind(kind: str, in_features: int, out_features: int, in_attention: bool, name: str) -> bool:
    last = name.split(".")[-1]
    # Projections back into the residual stream carry it in their names in every family we know of; by shape alone a
    # square attention output cannot be told from a query.
    writes = last in ("o_proj", "out_proj", "dense", "c_proj", "wo") if in_attention else in_features > out_features
    return {
        "all": True,
        "mlp": not in_attention,
        "mlp-out": not in_attention and writes,
        "attention": in_attention,
        "attention-out": in_attention and writes,
        "residual-out": writes,
    }[kind]
