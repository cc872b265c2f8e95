"""What a delta may contain. Each case is a valid delta with one thing changed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from kvllm.errors import Untrusted
from kvllm.store import check_delta
from kvllm.store.artefacts import address, listing
from tests.store.bench import MODULES, adapter_config, tensors, tiny_delta

A0 = f"base_model.model.{MODULES[0]}.lora_A.weight"
B0 = f"base_model.model.{MODULES[0]}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> dict[str, bytes]:
    found = tensors()
    change(found)
    return {**tiny_delta(), WEIGHTS: save(found)}


def with_header(change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes]:
    raw = tiny_delta()[WEIGHTS]
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return {**tiny_delta(), WEIGHTS: struct.pack("<Q", len(text)) + text + raw[8 + length :]}


def with_config(**changes: Any) -> dict[str, bytes]:
    return {**tiny_delta(), CONFIG: adapter_config(**changes)}


def cut(n: int) -> dict[str, bytes]:
    return {**tiny_delta(), WEIGHTS: tiny_delta()[WEIGHTS][:n]}


def test_valid_delta_is_measured() -> None:
    shape = check_delta(tiny_delta())
    found = tensors()
    expected = np.sqrt(
        sum(
            np.linalg.norm(
                found[f"base_model.model.{m}.lora_B.weight"].astype(float)
                @ found[f"base_model.model.{m}.lora_A.weight"].astype(float)
            )
            ** 2
            for m in MODULES
        )
    )
    assert (shape.rank, shape.modules, shape.scaling) == (2, MODULES, 1.0)
    assert shape.norm == pytest.approx(expected, rel=1e-9)
    assert check_delta(tiny_delta(), header_only=True).norm is None


def test_half_precision_and_metadata_of_peft_are_accepted() -> None:
    half = {name: values.astype(np.float16) for name, values in tensors().items()}
    files = {**tiny_delta(), WEIGHTS: save(half, metadata={"format": "pt"})}
    assert check_delta(files).rank == 2


def test_bfloat16_is_read_as_the_upper_half_of_float32() -> None:
    rounded = {name: (values.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, values in tensors().items()}
    raw = save({name: (values.view(np.uint32) >> 16).astype(np.uint16) for name, values in rounded.items()})
    brain = check_delta({**tiny_delta(), WEIGHTS: relabelled(raw)})
    assert brain.norm == pytest.approx(check_delta({**tiny_delta(), WEIGHTS: save(rounded)}).norm, rel=1e-12)


def relabelled(raw: bytes) -> bytes:
    """Call 16-bit integers what they stand for; numpy has no bfloat16."""
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def test_norm_bound_counts_the_scaling() -> None:
    norm = check_delta(tiny_delta()).norm
    assert norm is not None
    assert check_delta(with_config(lora_alpha=4), max_norm=2.01 * norm).norm == pytest.approx(2 * norm)
    with pytest.raises(Untrusted, match="norm"):
        check_delta(with_config(lora_alpha=4), max_norm=1.99 * norm)


def first(values: dict[str, np.ndarray], number: float) -> None:
    values[A0][0, 0] = number


REFUSED = {
    "no file": {},
    "config only": {CONFIG: adapter_config()},
    "extra file": {**tiny_delta(), "adapter_model.bin": b"pickle"},
    "config not json": {**tiny_delta(), CONFIG: b"{"},
    "config a list": {**tiny_delta(), CONFIG: b"[]"},
    "config deep": {**tiny_delta(), CONFIG: b"[" * 100_000},
    "config not utf-8": {**tiny_delta(), CONFIG: b"\xff\xfe{}"},
    "config name twice": {**tiny_delta(), CONFIG: b'{"r": 2,' + adapter_config()[1:]},
    "config nan": with_config(lora_alpha=float("nan")),
    "adalora": with_config(peft_type="ADALORA"),
    "rank differs": with_config(r=3),
    "rank zero": with_config(r=0),
    "rank true": with_config(r=True),
    "alpha zero": with_config(lora_alpha=0),
    "targets a pattern": with_config(target_modules=".*"),
    "targets incomplete": with_config(target_modules=["layers.0.mlp.down_proj"]),
    "targets too many": with_config(target_modules=["down_proj", "q_proj"]),
    "modules to save": with_config(modules_to_save=["lm_head"]),
    "bias": with_config(bias="all"),
    "dora": with_config(use_dora=True),
    "rank pattern": with_config(rank_pattern={"x": 3}),
    "imports": with_config(auto_mapping={"parent_library": "os", "base_model_class": "system"}),
    "empty weights": {**tiny_delta(), WEIGHTS: b""},
    "header cut": cut(100),
    "data cut": cut(-4),
    "data added": {**tiny_delta(), WEIGHTS: tiny_delta()[WEIGHTS] + b"\0\0\0\0"},
    "header length": {**tiny_delta(), WEIGHTS: struct.pack("<Q", 1 << 62) + tiny_delta()[WEIGHTS][8:]},
    "no tensor": {**tiny_delta(), WEIGHTS: save({})},
    "nan": with_tensors(lambda t: first(t, float("nan"))),
    "inf": with_tensors(lambda t: first(t, float("-inf"))),
    "huge": with_tensors(lambda t: first(t, 1e30)),
    "base tensor": with_tensors(lambda t: t.update({"model.embed_tokens.weight": np.zeros((2, 2), np.float32)})),
    "lora embedding": with_tensors(lambda t: t.update({A0.replace("lora_A", "lora_embedding_A"): t.pop(A0)})),
    "B missing": with_tensors(lambda t: t.pop(B0)),
    "path in name": with_tensors(lambda t: t.update({"base_model.model...lora_A.weight": t.pop(A0)})),
    "other rank": with_tensors(lambda t: t.update({A0: np.zeros((3, 5), np.float32)})),
    "float64": with_tensors(lambda t: t.update({A0: t[A0].astype(np.float64)})),
    "integers": with_tensors(lambda t: t.update({A0: t[A0].astype(np.int32)})),
    "vector": with_tensors(lambda t: t.update({A0: np.zeros(10, np.float32)})),
    "empty matrix": with_tensors(lambda t: t.update({A0: np.zeros((2, 0), np.float32)})),
    "metadata": with_header(lambda h: h.update(__metadata__={"run": "me"})),
    "overlap": with_header(lambda h: h[A0].update(data_offsets=h[B0]["data_offsets"])),
    "negative offsets": with_header(lambda h: h[A0].update(data_offsets=[-40, 0])),
    "offsets not numbers": with_header(lambda h: h[A0].update(data_offsets=["0", "40"])),
    "shape lies": with_header(lambda h: h[A0].update(shape=[2, 1 << 40])),
    "shape nested": with_header(lambda h: h[A0].update(shape=[[2], 5])),
    "dtype a list": with_header(lambda h: h[A0].update(dtype=["F32"])),
    "entry a number": with_header(lambda h: h.update({A0: 3})),
    "unknown field": with_header(lambda h: h[A0].update(more=1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(Untrusted, match=r"^The delta .*not accepted\.$"):
        check_delta(REFUSED[name])


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(tiny_delta()[WEIGHTS]) - 1), st.binary(min_size=1, max_size=4))
def test_any_damage_is_either_refused_or_still_a_delta(position: int, noise: bytes) -> None:
    raw = tiny_delta()[WEIGHTS]
    try:
        check_delta({**tiny_delta(), WEIGHTS: raw[:position] + noise + raw[position + len(noise) :]})
    except Untrusted:
        pass


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_never_crash_the_check(noise: bytes) -> None:
    for files in ({**tiny_delta(), WEIGHTS: noise}, {**tiny_delta(), CONFIG: noise}):
        with pytest.raises(Untrusted):
            check_delta(files)


def test_address_is_the_documented_hash() -> None:
    import hashlib

    files = {"b": b"2", "a": b""}
    lines = f"a\t0\t{hashlib.sha256(b'').hexdigest()}\nb\t1\t{hashlib.sha256(b'2').hexdigest()}\n"
    assert address(listing(files)) == hashlib.sha256(lines.encode()).hexdigest()
