"""A delta as files: what one may contain, and its content address.

A delta is a plain PEFT LoRA folder of exactly two files. PEFT itself would let such a folder replace any base tensor,
load NaNs, or fall back to pickle, so everything is checked here before anything else sees the bytes. The safetensors
header is read by hand; torch and peft are unknown here, numpy is loaded only to look at the numbers.

    check_delta({"adapter_model.safetensors": …, "adapter_config.json": …}).rank  # 8
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvllm.errors import Untrusted
from kvllm.store.files import sha256_of

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
FILE_NAMES = (CONFIG_NAME, WEIGHTS_NAME)

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_DELTA_BYTES = 16 << 30
MAX_RANK = 4096
_MAX_SAID = 500
MAX_NORM = 1e4  # the weights of a whole model have norms of hundreds to thousands; a delta near that is no edit

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_TENSOR_NAME = re.compile(r"base_model\.model\.((?:[A-Za-z0-9_]+\.)*[A-Za-z0-9_]+)\.lora_([AB])\.weight")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Settings of a PEFT LoRA configuration that change weights other than the listed modules, or the meaning of A and B.
_MUST_BE_EMPTY = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_dora",
    "lora_bias",
    "use_bdlora",
    "alora_invocation_tokens",
    "megatron_config",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "arrow_config",
    "use_qalora",
)


@dataclass(frozen=True)
class Delta:
    """The files of one delta, and their content address."""

    sha256: str
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class DeltaShape:
    """What `check_delta` found.

    Attributes:
        rank: The one rank r of all modules.
        modules: Dotted names of the changed weight matrices, sorted.
        scaling: The factor of B·A: lora_alpha / r (or / sqrt(r)).
        norm: Frobenius norm of all scaled B·A together; None if only the header was read.
    """

    rank: int
    modules: tuple[str, ...]
    scaling: float
    norm: float | None


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    shape: tuple[int, int]
    begin: int
    end: int


def address(files: Mapping[str, tuple[int, str]]) -> str:
    """Return the content address of a delta: its folder's name.

    The hex sha256 of one line per file, sorted by name, each `name<TAB>size<TAB>hex sha256 of the file<LF>`, in UTF-8.

    Args:
        files: File name to (size in bytes, hex sha256).
    """
    lines = "".join(f"{name}\t{size}\t{digest}\n" for name, (size, digest) in sorted(files.items()))
    return sha256_of(lines.encode())


def listing(files: Mapping[str, bytes]) -> dict[str, tuple[int, str]]:
    """Return size and hex sha256 of every file, as `address` takes them."""
    return {name: (len(content), sha256_of(content)) for name, content in sorted(files.items())}


def is_address(name: str) -> bool:
    """Say whether a name is a hex sha256 (and so safe as a folder name)."""
    return _SHA256.fullmatch(name) is not None


def check_delta(
    files: Mapping[str, bytes], *, max_norm: float | None = MAX_NORM, header_only: bool = False
) -> DeltaShape:
    """Accept a delta, or say in one sentence why not.

    Args:
        files: File name to content.
        max_norm: Largest Frobenius norm of the whole change; None for no bound.
        header_only: Leave the numbers themselves unread (finiteness and norm unchecked): fast, needs no numpy.

    Returns:
        Rank, modules, scaling and norm.

    Raises:
        Untrusted: The files are not exactly one plain LoRA with finite numbers.
    """
    _need(
        set(files) == set(FILE_NAMES),
        f"must consist of exactly {' and '.join(FILE_NAMES)}, not {', '.join(sorted(map(repr, files))) or 'nothing'}",
    )
    config = _check_config(files[CONFIG_NAME])
    weights = files[WEIGHTS_NAME]
    tensors, start = _read_header(weights)
    rank, modules = _check_tensors(tensors, config)
    scaling = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    norm = None
    if not header_only:
        norm = _norm(weights, tensors, start, modules) * abs(scaling)
        _need(math.isfinite(norm), "changes the weights by a norm that is not finite")
        _need(
            max_norm is None or norm <= max_norm,
            f"changes the weights by a norm of {norm:.4g}, more than the allowed {max_norm}",
        )
    return DeltaShape(rank, modules, scaling, norm)


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        shown = sentence if len(sentence) <= _MAX_SAID else f"{sentence[:_MAX_SAID]}…"  # it may quote a megabyte
        raise Untrusted(f"The delta {shown}; it was not accepted.")


def _json_object(content: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object; duplicate names and NaN are refused, since readers differ on them."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        _need(len(names) == len(set(names)), f"has a name twice in its {what}")
        return dict(pairs)

    def no_constant(name: str) -> float:
        raise Untrusted(f"The delta has {name} in its {what}; it was not accepted.")

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError):
        parsed = None
    _need(isinstance(parsed, dict), f"has no readable JSON object as its {what}")
    return dict(parsed)


def _check_config(content: bytes) -> dict[str, Any]:
    _need(
        len(content) <= MAX_CONFIG_BYTES, f"has an {CONFIG_NAME} of {len(content)} bytes, more than {MAX_CONFIG_BYTES}"
    )
    config = _json_object(content, CONFIG_NAME)
    _need(config.get("peft_type") == "LORA", f"is of type {config.get('peft_type')!r}, not LORA")
    rank = config.get("r")
    _need(type(rank) is int and 1 <= rank <= MAX_RANK, f"has the rank {rank!r}, not a number from 1 to {MAX_RANK}")
    alpha = config.get("lora_alpha")
    _need(
        isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < 1e9,
        f"has the lora_alpha {alpha!r}, not a positive number",
    )
    targets = config.get("target_modules")
    _need(
        isinstance(targets, list) and bool(targets) and all(isinstance(t, str) and t for t in targets),
        "does not list its target_modules by name",
    )
    for name in _MUST_BE_EMPTY:
        _need(not config.get(name), f"sets {name} in its configuration, which a plain LoRA does not")
    _need(config.get("bias") in (None, "none"), f"trains biases (bias={config.get('bias')!r})")
    # The other ways to start (PiSSA, OLoRA, LoftQ, …) make peft take something off the base's weights when it loads.
    start = config.get("init_lora_weights", True)
    _need(isinstance(start, bool) or start in (None, "gaussian"), f"asks for another start ({start!r}) of the weights")
    mapping = config.get("auto_mapping")  # AutoPeftModel imports the module it names
    _need(
        mapping is None
        or (isinstance(mapping, dict) and str(mapping.get("parent_library", "")).startswith("transformers.models.")),
        "names a Python module to import (auto_mapping)",
    )
    return config


def _read_header(weights: bytes) -> tuple[dict[str, _Tensor], int]:
    """Return the tensors by name, and where the data starts. Format: https://github.com/huggingface/safetensors#format"""
    _need(len(weights) <= MAX_DELTA_BYTES, f"is larger than {MAX_DELTA_BYTES} bytes")
    _need(len(weights) >= 8, "has a truncated safetensors header")
    (length,) = struct.unpack_from("<Q", weights)
    _need(
        2 <= length <= min(MAX_HEADER_BYTES, len(weights) - 8), f"has an impossible safetensors header length {length}"
    )
    header = weights[8 : 8 + length]
    _need(header[:1] == b"{", "has a malformed safetensors header")
    entries = _json_object(header, "safetensors header")
    metadata = entries.pop("__metadata__", None)
    _need(metadata is None or metadata in ({}, {"format": "pt"}, {"format": "np"}), "carries metadata it should not")
    size = len(weights) - 8 - length
    tensors: dict[str, _Tensor] = {}
    for name, entry in entries.items():
        tensors[name] = _tensor(name, entry)
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        _need(tensor.begin == position, f"has a gap or an overlap before the tensor {name[:200]!r}")
        position = tensor.end
    _need(position == size, f"holds {size} bytes of numbers where its header says {position}")
    return tensors, 8 + length


def _tensor(name: str, entry: Any) -> _Tensor:
    said = repr(name[:200])
    _need(
        isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
        f"describes the tensor {said} wrongly",
    )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _need(
        isinstance(dtype, str) and dtype in _ITEM_BYTES,
        f"has the tensor {said} of type {dtype!r}, not F32, F16 or BF16",
    )
    _need(
        isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape),
        f"has the tensor {said} of shape {shape!r}, not a matrix",
    )
    _need(
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and n >= 0 for n in offsets),
        f"has impossible offsets for the tensor {said}",
    )
    begin, end = offsets
    _need(end - begin == shape[0] * shape[1] * _ITEM_BYTES[dtype], f"has offsets that do not fit the shape of {said}")
    return _Tensor(dtype, (shape[0], shape[1]), begin, end)


def _check_tensors(tensors: Mapping[str, _Tensor], config: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    _need(bool(tensors), "holds no tensor")
    rank: int = config["r"]
    sides: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name) if len(name) <= 512 else None
        if match is None:
            raise Untrusted(
                f"The delta holds a tensor named {name[:200]!r}, which is no LoRA matrix; it was not accepted."
            )
        module, side = match.groups()
        sides.setdefault(module, set()).add(side)
        found = tensor.shape[0] if side == "A" else tensor.shape[1]  # A: (r, in), B: (out, r)
        _need(found == rank, f"has the rank {found} in {name!r} where its configuration says {rank}")
    for module, have in sides.items():
        _need(have == {"A", "B"}, f"has only one of the two matrices of {module!r}")
    targets: list[str] = config["target_modules"]
    exact = set(targets)
    used: set[str] = set()
    for module in sides:
        parts = module.split(".")
        matching = {suffix for i in range(len(parts)) if (suffix := ".".join(parts[i:])) in exact}
        _need(bool(matching), f"changes {module!r}, which its target_modules do not list")
        used |= matching
    _need(used == exact, f"lists {sorted(exact - used)[:1]} in target_modules without a matrix for it")
    return rank, tuple(sorted(sides))


def _norm(weights: bytes, tensors: Mapping[str, _Tensor], start: int, modules: tuple[str, ...]) -> float:
    """Return sqrt(Σ ‖B·A‖²) over the modules, refusing numbers that are not finite.

    ‖BA‖² = trace((A Aᵀ)(Bᵀ B)), two r × r matrices, so the product itself is never formed.
    """
    import numpy as np

    def matrix(name: str) -> Any:
        tensor = tensors[name]
        raw = memoryview(weights)[start + tensor.begin : start + tensor.end]
        if tensor.dtype == "BF16":  # the upper half of an F32
            values = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, dtype="<f4" if tensor.dtype == "F32" else "<f2")
        _need(bool(np.isfinite(values).all()), f"has a number that is not finite in {name!r}")
        return values.reshape(tensor.shape).astype(np.float64)

    total = 0.0
    for module in modules:
        a = matrix(f"base_model.model.{module}.lora_A.weight")  # (r, in)
        b = matrix(f"base_model.model.{module}.lora_B.weight")  # (out, r)
        total += float(np.sum((a @ a.T) * (b.T @ b)))
    return math.sqrt(max(total, 0.0))
