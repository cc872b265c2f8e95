"""The merged Hugging Face folder: edited weights in shards, everything else as the base model's folder has it.

export_hf(Path("out"), lm=lm, base_folder=files.path, base=base, facts=facts, head=head, weights_digest=digest)
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvllm.config import DTYPES
from kvllm.errors import BaseMismatch, ConfigError
from kvllm.export.folder import new_folder
from kvllm.export.papers import CARD, model_card, write_json, write_manifest
from kvllm.lm.model import LanguageModel
from kvllm.records import Edit, Progress, StoredFact
from kvllm.store import Base
from kvllm.store.files import copy_durably

_CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_LICENCES = re.compile(r"(licen[cs]e|notice|copying)([._-].*)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export_hf(
    out: Path,
    *,
    lm: LanguageModel,
    base_folder: Path,
    base: Base,
    facts: Sequence[StoredFact],
    head: Edit | None,
    weights_digest: str,
    max_shard_size: str = "2GB",
    dtype: str | None = None,
    apart_from: Sequence[Path] = (),
    progress: Callable[[Progress], None] | None = None,
) -> tuple[str, ...]:
    """Write a folder that loads with transformers alone; the model in memory is left as it is.

    Configuration, tokenizer files, chat template and licence are copied byte for byte from the base's folder; only
    where the dtype differs does config.json change, and then in that entry alone.

    Args:
        out: A folder that does not exist, or is empty.
        lm: The edited model.
        base_folder: Where the base model's files lie.
        base: The pinned base model; its tokenizer files are checked against it.
        facts: The live facts.
        head: The newest edit; None where nothing was edited.
        weights_digest: Of the edited weights.
        max_shard_size: Largest weight file, e.g. "2GB" or "500MB".
        dtype: float32, bfloat16 or float16; cast once. The model's own in memory by default.
        apart_from: Folders that `out` must not lie in (the knowledge base's; the base's is always one).
        progress: Called with stage "export".

    Returns:
        The names of the files written, sorted.

    Raises:
        ConfigError: `out`, `dtype` or `max_shard_size` cannot be used.
        BaseMismatch: A file of the base's folder is not the pinned one.
        OutOfResources: The disk or the memory is full. In every case nothing is left behind.
    """
    report = progress or _silent
    shard_bytes = _bytes(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}; nothing was exported.")
    kept: torch.dtype = next(p.dtype for p in lm.model.parameters() if p.is_floating_point())
    target: torch.dtype = kept if dtype is None else getattr(torch, dtype)
    dtype = str(target).removeprefix("torch.")
    needed = sum(p.numel() for p in lm.model.parameters()) * target.itemsize

    with new_folder(out, apart_from=[base_folder, *apart_from], needed=needed) as folder:
        report(Progress("export", 0, 3, note="writing the weights"))
        shipped = _in_dtype(lm.model, target)
        shipped.save_pretrained(str(folder), max_shard_size=shard_bytes)
        del shipped
        report(Progress("export", 1, 3, note="copying tokenizer and configuration"))
        _write_config(folder, base_folder, base, dtype)
        _copy_rest(folder, base_folder, base)
        report(Progress("export", 2, 3, note="hashing"))
        card = model_card(format="hf", base=base, facts=facts, head=head, weights_digest=weights_digest, dtype=dtype)
        (folder / CARD).write_bytes(card.encode())
        names = write_manifest(
            folder, format="hf", base=base, facts=facts, head=head, weights_digest=weights_digest, dtype=dtype
        )
        report(Progress("export", 3, 3, note="done"))
    return names


@torch.no_grad()
def _in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Return the model with every floating-point weight in `dtype`, sharing the tensors that have it already.

    The copy has its own configuration (saving writes into it), and ties between weights stay ties.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        cast = parameter.detach()
        if parameter.is_floating_point():
            cast = cast.to(dtype)
        memo[id(parameter)] = torch.nn.Parameter(cast, requires_grad=False)
    return copy.deepcopy(model, memo)


def _write_config(folder: Path, base_folder: Path, base: Base, dtype: str) -> None:
    _copy_pinned(_CONFIG, folder, base_folder, base)
    config = json.loads((folder / _CONFIG).read_bytes())
    stated = str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch.")
    if stated == dtype and "quantization_config" not in config:
        return
    config.pop("quantization_config", None)  # the shipped weights are plain numbers
    name = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    write_json(folder / _CONFIG, {**config, name: dtype})


def _copy_rest(folder: Path, base_folder: Path, base: Base) -> None:
    """Copy the base's other identity files and its licence."""
    for name in sorted(base.files):
        if name != _CONFIG and not name.endswith(_WEIGHTS):
            _copy_pinned(name, folder, base_folder, base)
    for path in sorted(base_folder.iterdir()):
        if path.is_file() and _LICENCES.fullmatch(path.name) and not (folder / path.name).exists():
            copy_durably(path, folder / path.name)


def _copy_pinned(name: str, folder: Path, base_folder: Path, base: Base) -> None:
    """Copy a file of the base over what save_pretrained may have written, checked against its pinned hash."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if not (base_folder / name).is_file():
        raise BaseMismatch(f"The base model's {name} is missing in {base_folder}; nothing was exported. Restore it.")
    found, _ = copy_durably(base_folder / name, target)
    if found != base.files.get(name, found):
        raise BaseMismatch(
            f"The base model's {name} in {base_folder} is not the pinned one; nothing was exported. Restore it."
        )


def _bytes(size: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", size, re.IGNORECASE)
    found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if found < 1:
        raise ConfigError(f"The shard size {size!r} is not a size such as 500MB or 2GB; nothing was exported.")
    return found


def _silent(_: Progress) -> None:
    pass
