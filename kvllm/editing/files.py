"""Tensors in a file of their own: written whole or not at all. Knows nothing of what they mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write named tensors as safetensors, beside and renamed."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read them back."""
    from safetensors.torch import load

    return load(path.read_bytes())
