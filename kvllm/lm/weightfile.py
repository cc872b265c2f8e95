"""The header of a base model's safetensors file, read by hand before torch or safetensors sees the file.

A header says where every tensor lies; a damaged or hostile one is refused here in one sentence. Nothing but the header
is read, so that a file of many gigabytes costs milliseconds. Standard library only; knows no model.

    check_header(Path("model.safetensors"))   # {'model.embed_tokens.weight': (49152, 576), …}
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvllm.errors import ModelError

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
# Bits per number: https://github.com/huggingface/safetensors, `Dtype`
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def check_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in the file.

    Raises:
        ModelError: It is cut short, or its header does not describe exactly the bytes that follow.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ModelError(
                f"{path} ({size} bytes) is not a whole safetensors file; if it is a Git LFS pointer, fetch the real "
                "file."
            )
        reason = f"a header of {length} bytes" if length > MAX_HEADER_BYTES else None
        entries: dict[str, Any] = {}
        if reason is None:
            entries, reason = _entries(file.read(length))
    if reason is None:
        reason = _misfit(entries, size - 8 - length)
    if reason is not None:
        raise ModelError(f"{path} is no sound safetensors file ({reason}); nothing was loaded, download it again.")
    return {name: tuple(entry["shape"]) for name, entry in entries.items()}


def _entries(header: bytes) -> tuple[dict[str, Any], str | None]:
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(name for name in found if names.count(name) > 1)
        return found

    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return {}, "its header is not JSON"
    if header[:1] != b"{" or not isinstance(parsed, dict):
        return {}, "its header is not a JSON object"
    if twice:
        return {}, f"the name {twice[0][:100]!r} stands twice in its header"
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        return {}, "its metadata are not names and texts"
    return parsed, None


def _misfit(entries: Mapping[str, Any], size: int) -> str | None:
    """Say what is wrong with the places of the tensors within `size` bytes of numbers, if anything is."""
    places = []
    for name, entry in entries.items():
        said = f"the tensor {name[:100]!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            return f"{said} is described wrongly"
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _BITS:
            return f"{said} is of the unknown type {str(dtype)[:40]!r}"
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            return f"{said} has an impossible shape or place"
        begin, end = offsets
        bits = math.prod(shape) * _BITS[dtype]
        if bits % 8 or end - begin != bits // 8:
            return f"the place of {said} does not fit its shape"
        places.append((begin, end, said))
    position = 0
    for begin, end, said in sorted(places):
        if begin != position:
            return f"there is a gap or an overlap before {said}"
        position = end
    return None if position == size else f"it holds {size} bytes of numbers, and its header speaks of {position}"


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 16 and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
