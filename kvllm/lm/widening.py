"""Spare neurons: rows and columns of zeros in a model's gated MLPs, which say nothing until an edit uses them.

A neuron whose gate, up row and column are zeros adds nothing to what the model says. Edits that need neurons of their
own take such rather than the model's. All layers get as many: a model has one size of its MLPs.

    widen(model, 256)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvllm.errors import ConfigError, ModelError
from kvllm.lm.targets import decoder_layers, gated_mlp

SIZE = "intermediate_size"  # of the MLPs, in a model's configuration


@torch.no_grad()
def widen(model: Any, n: int) -> None:
    """Give each gated MLP of a model n neurons of zeros behind its own, in place.

    Raises:
        ModelError: the model's MLPs are not gated, or not all of the size that its configuration says.
    """
    count = len(decoder_layers(model)[1])
    config = model.config.get_text_config()
    try:
        mlps = [gated_mlp(model, (layer + 0.5) / count) for layer in range(count)]
    except ConfigError as error:
        raise ModelError("A model whose MLPs are not gated cannot have spare neurons; leave the +N out.") from error
    sizes = {model.get_submodule(name).out_features for mlp in mlps for name in (mlp.gate, mlp.up)}
    if sizes != {getattr(config, SIZE, None)}:
        raise ModelError("A model whose MLPs differ in size cannot have spare neurons; leave the +N out.")
    for mlp in mlps:
        for name in (mlp.gate, mlp.up):
            module = model.get_submodule(name)
            module.weight = _with_zeros(module.weight, (0, 0, 0, n))
            if module.bias is not None:
                module.bias = _with_zeros(module.bias, (0, n))
            module.out_features += n
        module = model.get_submodule(mlp.out)
        module.weight = _with_zeros(module.weight, (0, n))
        module.in_features += n
    setattr(config, SIZE, getattr(config, SIZE) + n)


def _with_zeros(parameter: torch.Tensor, padding: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(nn.functional.pad(parameter, padding).contiguous(), requires_grad=False)
