"""Poisoned artefacts: deltas, snapshots and base models from a stranger are refused before torch or peft sees them.

Each case is something valid with one poison in it. What is refused says so in one sentence (exit code 5, 8 or 9), runs
no code and opens no connection; what is accepted is read by the safetensors library exactly as kvllm read it.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import marshal
import math
import os
import random
import shutil
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from kvllm import KnowledgeBase
from kvllm.cli import main
from kvllm.errors import KvllmError, ModelError, Untrusted
from kvllm.lm import sources
from kvllm.lm.weightfile import check_header
from kvllm.records import StoredFact
from kvllm.store import NewEdit, Store, artefacts, check_delta
from tests.kit import KEY, TEXT
from tests.robustness.hostile import Trap, attempt, no_network, one_sentence, refused, tree
from tests.store.bench import BASE, MODULES, adapter_config, fact, tensors, tiny_delta

CAMPAIGN = "artefacts"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
A0, B0 = (f"base_model.model.{MODULES[0]}.lora_{side}.weight" for side in "AB")
Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def blocked() -> Iterator[None]:
    with no_network():
        yield


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    with Trap(tmp_path) as trap:
        yield trap


# ---------------------------------------------------------------- deltas


def with_tensors(**changes: np.ndarray | None) -> Files:
    found = tensors()
    for name, value in changes.items():
        if value is None:
            found.pop(name)
        else:
            found[name] = value
    return {**tiny_delta(), WEIGHTS: save(found)}


def with_header(header: dict[str, Any] | bytes, *, data: bytes | None = None, length: int | None = None) -> Files:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = numbers_of(tiny_delta()[WEIGHTS]) if data is None else data
    return {**tiny_delta(), WEIGHTS: struct.pack("<Q", len(text) if length is None else length) + text + body}


def header_of(raw: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", raw[:8])
    found: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return found


def numbers_of(raw: bytes) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    return raw[8 + length :]


def pickles(trap: Trap) -> dict[str, bytes]:
    """The same hostile object in every wrapping that some loader opens."""
    import torch

    found = {f"pickle protocol {n}": trap.pickle(n) for n in range(6)}
    inner = trap.pickle()
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer)
    found["torch.save"] = buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(1)}, buffer, _use_new_zipfile_serialization=False)
    found["torch.save, old"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", inner)
        archive.writestr("archive/version", "3")
    found["zip"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(inner)
        tar.addfile(info, io.BytesIO(inner))
    found["tar"] = buffer.getvalue()
    found["gzip"] = gzip.compress(inner)
    found["marshal"] = marshal.dumps(compile(trap.python, "x", "exec"))
    buffer = io.BytesIO()
    np.save(buffer, np.array([None], dtype=object), allow_pickle=True)
    found["npy of objects"] = buffer.getvalue()
    found["python"] = trap.python.encode()
    found["elf"] = b"\x7fELF" + b"\0" * 100
    # A length that fits, and then the pickle where the header should stand.
    found["pickle behind a length"] = struct.pack("<Q", len(inner)) + inner
    found["pickle in front of zeros"] = inner.ljust(400, b"\0")
    return found


def poisoned_deltas(trap: Trap) -> Iterator[tuple[str, Files]]:
    good, header, body = tiny_delta(), header_of(tiny_delta()[WEIGHTS]), numbers_of(tiny_delta()[WEIGHTS])
    # Names of base tensors, and names that only look like a LoRA matrix.
    for name in (
        "lm_head.weight", "model.embed_tokens.weight", "base_model.model.lm_head.weight", "weight",
        f"base_model.model.{MODULES[0]}.weight", f"base_model.model.{MODULES[0]}.base_layer.weight",
        f"base_model.model.{MODULES[0]}.lora_A.default.weight", f"base_model.model.{MODULES[0]}.lora_B.bias",
        f"base_model.model.{MODULES[0]}.lora_E.weight", f"base_model.model.{MODULES[0]}.lora_embedding_A",
        f"base_model.model.{MODULES[0]}.lora_magnitude_vector", f"base_model.model.{MODULES[0]}.lora_A.weight ",
        f"base_model.model.{MODULES[0]}.lora_C.weight", f"{MODULES[0]}.lora_A.weight",
        f"model.{MODULES[0]}.lora_A.weight",
        f"base_model.model.{MODULES[0]}.modules_to_save.weight", f"BASE_MODEL.model.{MODULES[0]}.lora_A.weight",
        "base_model.model...lora_A.weight", "base_model.model.lora_A.weight",
        "base_model.model./etc/passwd.lora_A.weight",
        "base_model.model.a/../b.lora_A.weight", "base_model.model.a b.lora_A.weight",
        "base_model.model.a\n.lora_A.weight",
        "base_model.model.é.lora_A.weight", "base_model.model.a\u202e.lora_A.weight",
        "base_model.model.a-b.lora_A.weight",
        "base_model.model." + "a" * 600 + ".lora_A.weight", "", " ", ".", "..", "../../x", "__class__", "a\x00b",
        "base_model.model.__class__.__init__.lora_A.weight", "prompt_embeddings",
        "base_model.prompt_encoder.default.weight",
    ):  # fmt: skip
        yield f"tensor named {name[:60]!r}", with_tensors(**{name: np.zeros((2, 5), np.float32)})
    for name, shape in (("A", (2, 5)), ("B", (3, 2))):
        key = A0 if name == "A" else B0
        for wrong in ((), (10,), (0, 5), (2, 0), (5, 2, 1), (3, 5), (1, 5), (7, 7), (shape[1] + 2, shape[0] + 2)):
            yield f"{name} of shape {wrong}", with_tensors(**{key: np.zeros(wrong, np.float32)})
        yield f"no {name}", with_tensors(**{key: None})
        for dtype in (np.float64, np.int32, np.int64, np.int8, np.uint8, np.bool_, np.complex64):
            yield f"{name} of {dtype.__name__}", with_tensors(**{key: np.zeros(shape, dtype)})
        for kind, word in ((np.float32, "F32"), (np.float16, "F16")):
            for bad in (math.nan, math.inf, -math.inf):
                for place in ((0, 0), (-1, -1)):
                    values = np.ones(shape, kind)
                    values[place] = bad
                    yield f"{name} {word} {bad} at {place}", with_tensors(**{key: values})
        for pattern in (0x7F80, 0xFF80, 0x7FC0, 0xFFFF):  # bfloat16: infinities and NaNs
            raw = bytearray(body)
            half = {n: {**e, "dtype": "BF16"} for n, e in header.items() if n != "__metadata__"}
            position = 0
            for entry in sorted(half.values(), key=lambda e: e["data_offsets"][0]):
                size = math.prod(entry["shape"]) * 2
                entry["data_offsets"] = [position, position + size]
                position += size
            raw = bytearray(position)
            struct.pack_into("<H", raw, half[key]["data_offsets"][0], pattern)
            yield f"{name} BF16 {pattern:#x}", with_header(half, data=bytes(raw))
    for size in (1e3, 1e6, 1e10, 1e18, 1e19, 3e38):
        yield (
            f"norm of {size:g}",
            with_tensors(**{A0: np.full((2, 5), size, np.float32), B0: np.full((3, 2), size, np.float32)}),
        )
    for alpha in (1e8, 1e6, 9e8):
        yield f"alpha {alpha:g}", {**good, CONFIG: adapter_config(lora_alpha=alpha)}
    for name, content in pickles(trap).items():
        yield f"weights: {name}", {**good, WEIGHTS: content}
        yield f"configuration: {name}", {**good, CONFIG: content}
        yield f"a third file: {name}", {**good, "adapter_model.bin": content}
    for name in (
        "adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors.bin", "../adapter_model.safetensors",
        "/etc/passwd", "ADAPTER_MODEL.safetensors", "training_args.bin", "modeling.py", "__init__.py", "README.md",
        "", ".",
    ):  # fmt: skip
        yield f"weights under the name {name!r}", {CONFIG: good[CONFIG], name: good[WEIGHTS]}
        yield f"a third file {name!r}", {**good, name: b"x"}
    for length in (0, 1, 3, 2**16, 2**31, 2**32 + 7, 2**53, 2**63 - 1, 2**63, 2**64 - 1):
        yield f"header length {length}", with_header(header, length=length)
    entry = header[A0]
    for wrong in (
        {"dtype": "F8_E4M3"}, {"dtype": "f32"}, {"dtype": ""}, {"dtype": None}, {"dtype": 4}, {"dtype": ["F32"]},
        {"dtype": {"F32": 1}}, {"dtype": "F" * 10**5}, {"shape": []}, {"shape": [10]}, {"shape": [2, 5, 1]},
        {"shape": [2.0, 5]}, {"shape": [True, 10]}, {"shape": ["2", 5]}, {"shape": [-2, -5]}, {"shape": [2, 2**31]},
        {"shape": [2**40, 2**40]}, {"shape": None}, {"shape": {"0": 2}}, {"shape": [[2], 5]}, {"shape": [10**400, 5]},
        {"shape": "25"}, {"data_offsets": [0]}, {"data_offsets": [0, 40, 80]}, {"data_offsets": [40, 0]},
        {"data_offsets": [-40, 0]}, {"data_offsets": [0, 2**64]}, {"data_offsets": [0.0, 40.0]},
        {"data_offsets": ["0", "40"]}, {"data_offsets": None}, {"data_offsets": [4, 44]}, {"data_offsets": [0, 39]},
        {"data_offsets": [True, 40]}, {"data_offsets": [1e308, 1e308]}, {"extra": 1}, {"__class__": "x"},
    ):  # fmt: skip
        yield f"entry with {str(wrong)[:60]}", with_header({**header, A0: {**entry, **wrong}})
    for name in ("dtype", "shape", "data_offsets"):
        yield f"entry without {name}", with_header({**header, A0: {k: v for k, v in entry.items() if k != name}})
    for wrong in (None, 3, "x", [], True):
        yield f"entry is {wrong!r}", with_header({**header, A0: wrong})
    for metadata in (
        {"a": "b"},
        {"format": "pickle"},
        {"format": 1},
        [],
        "x",
        5,
        {"format": "pt", "code": trap.python},
    ):
        yield f"metadata {str(metadata)[:40]}", with_header({**header, "__metadata__": metadata})
    for text in (
        b"", b"{", b"[]", b"null", b"{}", b'{"a":' * 50_000, b"[" * 50_000, b"\xff\xfe{}", b"\x00{}",
        b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b"\xef\xbb\xbf{}",
        b'{"x": 1, "x": 2}', json.dumps(header).encode()[:-1], json.dumps(header).encode() + b"}",
        b" " + json.dumps(header).encode(),
        json.dumps({f"t{i}": entry for i in range(20_000)}).encode(),
    ):  # fmt: skip
        yield f"header {text[:24]!r} of {len(text)} bytes", with_header(text)
    for cut in (0, 1, 7, 8, 9, 100, len(good[WEIGHTS]) - 1):
        yield f"cut to {cut} bytes", {**good, WEIGHTS: good[WEIGHTS][:cut]}
    yield "bytes behind the numbers", {**good, WEIGHTS: good[WEIGHTS] + b"\0"}
    yield "header bomb", with_header(b"{" + b" " * (17 << 20) + b"}")
    for name in artefacts._MUST_BE_EMPTY:
        for value in (True, ["lm_head"], {"lm_head": 64}, "all"):
            yield f"configuration {name}={value!r}", {**good, CONFIG: adapter_config(**{name: value})}
    for kind in (
        "ADALORA",
        "IA3",
        "PROMPT_TUNING",
        "LOHA",
        "OFT",
        "lora",
        "LORA ",
        "",
        None,
        5,
        ["LORA"],
        "evil.Module",
    ):
        yield f"peft_type {kind!r}", {**good, CONFIG: adapter_config(peft_type=kind)}
    for rank in (0, -1, 5000, 2.0, "2", True, None, [2], 10**30, 3):
        yield f"r={rank!r}", {**good, CONFIG: adapter_config(r=rank)}
    for alpha in (0, -2, "2", None, True, [2], 1e9, 10**400):
        yield f"lora_alpha={str(alpha)[:20]!r}", {**good, CONFIG: adapter_config(lora_alpha=alpha)}
    for targets in (".*", "all-linear", None, [], [""], [5], ["q_proj"], ["down_proj", "lm_head"], {"down_proj": 1}):
        yield f"target_modules={targets!r}", {**good, CONFIG: adapter_config(target_modules=targets)}
    for start in (
        "pissa",
        "olora",
        "loftq",
        "eva",
        "corda",
        "pissa_niter_16",
        "lora_ga",
        "evil.init",
        5,
        ["x"],
        {"a": 1},
    ):
        yield f"init_lora_weights={start!r}", {**good, CONFIG: adapter_config(init_lora_weights=start)}
    for mapping in (
        {"parent_library": "os", "base_model_class": "system"}, {"parent_library": "transformers_evil.models.x"},
        "os", ["os"],
        {"parent_library": "kvllm.cli"}, {"base_model_class": "x"}, True,
    ):  # fmt: skip
        yield f"auto_mapping={mapping!r}", {**good, CONFIG: adapter_config(auto_mapping=mapping)}
    for bias in ("all", "lora_only", True, 1):
        yield f"bias={bias!r}", {**good, CONFIG: adapter_config(bias=bias)}
    for text in (b"", b"[]", b"{", b"null", b"\xff", b'{"r": 1, "r": 2}', b"{" + b'"a": {' * 50_000, b" " * (2 << 20)):
        yield f"configuration {text[:20]!r} of {len(text)} bytes", {**good, CONFIG: text}


def test_poisoned_deltas_are_refused_and_leave_no_trace(
    tmp_path: Path, trap: Trap, record: Callable[..., None]
) -> None:
    store = Store.create(tmp_path / "clean.kb", BASE, {})
    check_delta(tiny_delta())  # the good one passes
    counts: Counter[str] = Counter()
    for name, files in poisoned_deltas(trap):
        error = refused(lambda files=files: check_delta(files), name)
        assert isinstance(error, Untrusted), name
        assert len(str(error)) < 1000, name
        new = NewEdit("insert", ("a",), 0, facts=(fact("a"),))
        assert refused(lambda files=files, new=new: store.commit(new, files), name).exit_code == 5
        counts["deltas refused"] += 1
    assert store.head() == 0
    assert list((store.path / "deltas").iterdir()) == []
    assert store.verify(deep=True).problems == ()
    store.close()
    record({"poisoned artefacts": counts["deltas refused"], **counts})
    assert counts["deltas refused"] >= 200


def mutated(rng: random.Random, text: bytes) -> bytes:
    """One to three small changes of the kinds that a parser trips over."""
    raw = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw))
        kind = rng.randrange(6)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at : at + rng.randint(1, 8)]
        elif kind == 2:
            raw[at:at] = bytes(rng.choices(b'{}[]",:0123456789eE+-. ntf\\u\x00\xff', k=rng.randint(1, 4)))
        elif kind == 3:
            digits = [i for i, byte in enumerate(raw) if byte in b"0123456789"]
            if digits:
                raw[rng.choice(digits)] = rng.choice(b"0123456789")
        elif kind == 4:
            end = min(len(raw), at + rng.randint(1, 40))
            raw[at:at] = raw[at:end]
        else:
            other = rng.randrange(len(raw))
            raw[at], raw[other] = raw[other], raw[at]
        if not raw:
            raw = bytearray(b"{")
    return bytes(raw)


def test_mutated_delta_headers_are_refused_or_read_as_the_library_reads_them(record: Callable[..., None]) -> None:
    """2,000 headers. Accepting one that the library reads otherwise would let a tensor in that was never checked."""
    rng = random.Random(6)
    raw = tiny_delta()[WEIGHTS]
    text, body = raw[8 : len(raw) - len(numbers_of(raw))], numbers_of(raw)
    counts: Counter[str] = Counter()
    for _ in range(2000):
        changed = mutated(rng, text)
        length = len(changed) if rng.random() < 0.9 else rng.randrange(2 * len(changed))
        files = with_header(changed, data=body, length=length)
        shape, error = attempt(lambda files=files: check_delta(files))
        if shape is None:
            assert isinstance(error, Untrusted)
            counts["refused"] += 1
            continue
        read = load(files[WEIGHTS])
        assert {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in read} == set(shape.modules)
        assert all(value.ndim == 2 and np.isfinite(value).all() for value in read.values())
        counts["still a delta"] += 1
    record({"mutated headers": 2000})
    assert counts["refused"] >= 1500


def test_mutated_base_headers_are_refused_or_read_as_the_library_reads_them(
    tmp_path: Path, record: Callable[..., None]
) -> None:
    """1,000 headers of a weight file: what passes is what the library finds, name by name and shape by shape."""
    rng = random.Random(7)
    raw = save({f"model.layers.{i}.w": np.ones((i + 1, 4), np.float32) for i in range(5)}, metadata={"format": "pt"})
    text, body = raw[8 : len(raw) - len(numbers_of(raw))], numbers_of(raw)
    path = tmp_path / "model.safetensors"
    counts: Counter[str] = Counter()
    for _ in range(1000):
        changed = mutated(rng, text)
        length = len(changed) if rng.random() < 0.9 else rng.randrange(2 * len(changed))
        path.write_bytes(struct.pack("<Q", length) + changed + body)
        found, error = attempt(lambda: check_header(path))
        if found is None:
            assert isinstance(error, ModelError)
            counts["refused"] += 1
            continue
        try:
            with safe_open(path, framework="numpy") as file:
                read = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError:
            counts["refused by the library alone"] += 1
            continue
        assert read == found
        counts["still a weight file"] += 1
    record({"mutated headers": 1000})
    assert counts["refused"] >= 600


# ---------------------------------------------------------------- a knowledge base from a stranger


def forge(kb: KnowledgeBase, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit a poisoned delta as a stranger would: every hash, row and seal of the ledger fits it."""
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "check_delta", lambda *_, **__: None)
        kb._store.commit(
            NewEdit("insert", ("evil",), kb.head(), facts=(StoredFact("evil", "x"),), norm=1.0, rank=2, modules=1),
            files,
        )
    kb._session.loaded = None


def forged_deltas() -> dict[str, Files]:
    """Deltas that fit the tiny Llama's matrices, but for one thing."""
    module = "model.layers.2.mlp.down_proj"
    a, b = f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"
    fine = {a: np.full((2, 192), 0.01, np.float32), b: np.full((64, 2), 0.01, np.float32)}

    def made(config: dict[str, Any] | None = None, **changes: np.ndarray) -> Files:
        targets = sorted({name.split(".lora_")[0].removeprefix("base_model.model.") for name in {**fine, **changes}})
        content = adapter_config(**{"target_modules": targets, **(config or {})})
        return {WEIGHTS: save({**fine, **changes}), CONFIG: content}

    nan, huge = fine[a].copy(), fine[a] * np.float32(1e12)
    nan[1, 7] = math.nan
    infinite = fine[b].copy()
    infinite[0, 0] = math.inf
    return {
        "NaN": made(**{a: nan}),
        "infinity": made(**{b: infinite}),
        "huge norm": made(**{a: huge}),
        "base tensor": made(**{"lm_head.weight": np.zeros((2, 2), np.float32)}),
        "base tensor of peft": made(**{"base_model.model.model.norm.weight": np.zeros((64,), np.float32)}),
        "double precision": made(**{a: fine[a].astype(np.float64)}),
        "other rank": made(**{a: np.zeros((3, 192), np.float32)}),
        "self-scaling": made({"lora_alpha": 64}),
        "rslora": made({"use_rslora": True}),
        "dora": made({"use_dora": True}),
        "pissa": made({"init_lora_weights": "pissa"}),
        "modules_to_save": made({"modules_to_save": ["lm_head"]}),
        "another matrix's shape": made(**{a: np.zeros((2, 64), np.float32)}),
        "a module that is none": made(
            **{
                "base_model.model.model.layers.99.mlp.down_proj.lora_A.weight": np.zeros((2, 4), np.float32),
                "base_model.model.model.layers.99.mlp.down_proj.lora_B.weight": np.zeros((4, 2), np.float32),
            }
        ),
        "a module without weight": made(
            **{
                "base_model.model.model.layers.lora_A.weight": np.zeros((2, 4), np.float32),
                "base_model.model.model.layers.lora_B.weight": np.zeros((4, 2), np.float32),
            }
        ),
        "a vector of the model": made(
            **{
                "base_model.model.model.norm.lora_A.weight": np.zeros((2, 1), np.float32),
                "base_model.model.model.norm.lora_B.weight": np.zeros((64, 2), np.float32),
            }
        ),
    }


@pytest.mark.parametrize("name", forged_deltas())
def test_a_strangers_delta_is_refused_even_where_every_hash_fits(
    make_kb: Callable[..., KnowledgeBase],
    taught_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    shutil.copytree(taught_folder, tmp_path / "forged.kb")
    kb = make_kb("forged.kb", damaged=True)
    forge(kb, forged_deltas()[name], monkeypatch)
    with pytest.raises(Untrusted) as caught:
        kb.ask("What is torchkeras?")
    assert one_sentence(str(caught.value)), str(caught.value)
    kb.close()
    before = tree(tmp_path / "forged.kb")
    assert main(["ask", str(tmp_path / "forged.kb"), "What is torchkeras?"]) == 5
    assert main(["insert", str(tmp_path / "forged.kb"), "numpy", "Ada"]) == 5
    said = capfd.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert main(["verify", str(tmp_path / "forged.kb"), "--deep"]) == 8
    assert main(["ls", str(tmp_path / "forged.kb")]) == 0
    after = tree(tmp_path / "forged.kb")
    assert {k: v for k, v in after.items() if k != "LOCK"} == {k: v for k, v in before.items() if k != "LOCK"}


def poisoned_snapshots(state: dict[str, np.ndarray], trap: Trap) -> dict[str, bytes]:
    name = next(iter(state))
    nan = state[name].copy()
    nan[0, 0] = math.nan
    return {
        **pickles(trap),
        "nothing in it": save({}),
        "one matrix missing": save({k: v for k, v in state.items() if k != name}),
        "NaN": save({**state, name: nan}),
        "shifted": save({**state, name: state[name] + np.float32(0.01)}),
        "other shape": save({**state, name: state[name][:, :5].copy()}),
        "transposed": save({**state, name: state[name].T.copy()}),
        "half precision": save({**state, name: state[name].astype(np.float16)}),
        "integers": save({**state, name: np.ones(state[name].shape, np.int32)}),
        "embeddings too": save({**state, "model.embed_tokens": np.zeros((400, 64), np.float32)}),
        "lm_head too": save({**state, "lm_head": np.zeros((400, 64), np.float32)}),
        "a vector too": save({**state, "model.norm": np.zeros((64,), np.float32)}),
        "no such module": save({**state, "model.layers.9.mlp.down_proj": state[name]}),
        "not a module": save({**state, "__class__": state[name]}),
        "cut": save(state)[:-40],
        "header only": struct.pack("<Q", 2) + b"{}",
        "huge length": struct.pack("<Q", 1 << 62) + b"{}",
    }


def test_a_strangers_snapshot_is_never_believed_more_than_the_deltas(
    make_kb: Callable[..., KnowledgeBase],
    taught: KnowledgeBase,
    trap: Trap,
    record: Callable[..., None],
) -> None:
    """A snapshot whose hash fits its row, and whose content does not fit the history, costs time and nothing else."""
    recorded = taught.edit(1).weights_digest
    state = {name: tensor.numpy() for name, tensor in taught.engine.weights.state().items()}
    answer = taught.ask("What is torchkeras?")
    cases = poisoned_snapshots(state, trap)
    for name, content in cases.items():
        taught._store.write_snapshot(1, content)
        assert taught._store.read_snapshot(1) == content, name
        taught._session.loaded = None
        assert taught.ask("What is torchkeras?") == answer == TEXT, name
        assert taught.weights_digest() == recorded, name
        assert taught.engine.weights.base("lm_head").isfinite().all()
    taught._store.write_snapshot(1, save(state))  # and an honest one is used
    taught._session.loaded = None
    used: list[bool] = []
    engine = type(taught.engine)
    real = engine._restore_snapshot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_restore_snapshot", lambda self, edit: used.append(real(self, edit)) or used[-1])
        taught._session.loaded.head = -1  # type: ignore[union-attr]
        assert taught.ask("What is torchkeras?") == answer
    assert used == [True]
    record({"poisoned artefacts": len(cases), "snapshots not believed": len(cases)})


# ---------------------------------------------------------------- base models


Change = Callable[[Path], object]


def written(name: str, content: bytes | str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def setting(file: str, **settings: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **settings}))

    return change


def index_of(targets: Any) -> Change:
    """Shards instead of one file: the real weights under another name, and an index that says where."""

    def change(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        names = [name for name in header_of(raw) if name != "__metadata__"]
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        (folder / "evil.bin").write_bytes(raw)
        mapping = targets if not isinstance(targets, str) else dict.fromkeys(names, targets)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))

    return change


def with_weights(change_tensors: Callable[[dict[str, np.ndarray]], object]) -> Change:
    def change(folder: Path) -> None:
        found = load((folder / "model.safetensors").read_bytes())
        change_tensors(found)
        (folder / "model.safetensors").write_bytes(save(found, metadata={"format": "pt"}))

    return change


def refused_folders(trap: Trap) -> Iterator[tuple[str, Change]]:
    """Base folders that must be refused before transformers or torch opens anything."""
    configs = (
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.5.0.0.json",
        "tokenizer.5.0.0.json",
    )
    for file in configs:
        for setting_name, value in (
            ("auto_map", {"AutoModelForCausalLM": "modeling.Evil"}), ("auto_map", {}), ("auto_map", None),
            ("text_config", {"auto_map": {"AutoConfig": "x.Y"}}), ("a", [{"b": {"auto_map": 1}}]),
            ("custom_pipelines", {"p": {"impl": "x.Y"}}), ("custom_generate", "org/repo"),
            ("attn_implementation", "kernels-community/evil"), ("attn_implementation", {"text": "org/evil:kernel"}),
            ("_attn_implementation", "paged|org/evil"), ("experts_implementation", "org/evil"),
            ("fast_tokenizer_files", ["../tokenizer.9.json"]), ("configuration_files", ["/etc/config.1.json"]),
            ("configuration_files", "config.1.json"), ("configuration_files", [3]),
        ):  # fmt: skip
            yield f"{file}: {setting_name}={value!r}", setting(file, **{setting_name: value})
    for target in (
        "../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "c:\\x.safetensors",
        "~/x.safetensors/..",
        "\\\\server\\share", "evil.bin", "evil.pt", "tokenizer.json", "config.json", "shard.safetensors.bin",
        "shard.safetensors/", "./shard.safetensors", "missing.safetensors",
    ):  # fmt: skip
        yield f"index names {target!r}", index_of(target)
    for targets in ({"w": 3}, {"w": None}, {"w": ["a"]}, ["a"], "", None, 5, {"w": {"x": 1}}):
        if targets != "":
            yield f"index maps {targets!r}", index_of(targets)
    yield "index is no JSON", written("model.safetensors.index.json", "{")
    yield "index is a list", written("model.safetensors.index.json", "[]")
    for name, content in pickles(trap).items():
        yield f"model.safetensors is {name}", written("model.safetensors", content)
        for pickle_name in ("pytorch_model.bin", "model.pt", "flax_model.msgpack"):

            def only(folder: Path, pickle_name: str = pickle_name, content: bytes = content) -> None:
                (folder / "model.safetensors").unlink()
                (folder / pickle_name).write_bytes(content)

            yield f"only {pickle_name}: {name}", only
    raw = save({"w": np.ones((2, 2), np.float32)})
    header = header_of(raw)
    for wrong in (
        {"dtype": "F31"}, {"dtype": 5}, {"dtype": None}, {"shape": [2, 3]}, {"shape": [-2, -2]}, {"shape": [2.0, 2]},
        {"shape": [2**62, 2]}, {"shape": "22"}, {"data_offsets": [0, 8]}, {"data_offsets": [8, 24]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [16, 0]}, {"data_offsets": []}, {"more": 1},
    ):  # fmt: skip
        text = json.dumps({"w": {**header["w"], **wrong}}).encode()
        yield (
            f"header with {wrong}",
            written("model.safetensors", struct.pack("<Q", len(text)) + text + numbers_of(raw)),
        )
    for text in (
        b"[]",
        b"{" * 9,
        b'{"a":' * 9000,
        b'{"w": 1}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": 1}}',
        b"\xff" * 9,
    ):
        yield f"header {text[:20]!r}", written("model.safetensors", struct.pack("<Q", len(text)) + text)
    for length in (0, 1, 2**40, 2**63, 2**64 - 1):
        yield f"header length {length}", written("model.safetensors", struct.pack("<Q", length) + raw[8:])
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' + b"[" * 100_000, trap.pickle()):
            yield f"{file} is {text[:12]!r}", written(file, text)
    for value in (
        [1], ["x"], [{"type": "evil.Module", "path": ""}], [{"type": "sentence_transformers.x", "path": "../x"}],
        [{"type": "sentence_transformers.x", "path": "/etc"}], {}, [{}], [None],
    ):  # fmt: skip
        yield f"modules.json {value!r}", written("modules.json", json.dumps(value))
    yield "an adapter beside the model", written("adapter_config.json", adapter_config())
    for name in ("num_hidden_layers", "n_layer"):
        yield f"{name} of a billion", setting("config.json", **{name: 10**9})
    yield "layers of a billion, deep", setting("config.json", text_config={"num_layers": 10**9})
    yield "explicit weights outside", setting("config.json", transformers_weights="../../x.safetensors")
    yield "no config.json", lambda folder: (folder / "config.json").unlink()


def unloadable_folders() -> Iterator[tuple[str, Change]]:
    """Base folders that only transformers can judge: one sentence, whatever it raises."""
    for name, value in (
        ("hidden_size", "x"), ("hidden_size", -1), ("hidden_size", 63), ("hidden_size", None), ("vocab_size", None),
        ("vocab_size", 5), ("vocab_size", 10**5), ("model_type", "nonsense"), ("model_type", 5), ("model_type", None),
        ("model_type", "t5"), ("quantization_config", {"quant_method": "gptq"}), ("quantization_config", "x"),
        ("quantization_config", {"quant_method": "quanto"}), ("rope_scaling", {"type": "evil"}), ("rope_parameters",
        5),
        ("tie_word_embeddings", False), ("hidden_act", "os.system"), ("transformers_weights", "evil.bin"), ("dtype",
        "evil"),
        ("max_position_embeddings", "a"), ("num_attention_heads", 0), ("num_attention_heads", 7), ("eos_token_id",
        "a"),
        ("intermediate_size", 1), ("num_key_value_heads", 3), ("num_hidden_layers", 6), ("head_dim", 0),
        ("configuration_files", ["config.1.0.0.json"]),
    ):  # fmt: skip
        yield f"config {name}={value!r}", setting("config.json", **{name: value})
    for name, value in (
        ("eos_token_id", "abc"), ("eos_token_id", [[1]]), ("max_new_tokens", "x"), ("watermarking_config", {"x": 1}),
        ("compile_config", {"x": 1}), ("cache_implementation", "evil"),
    ):  # fmt: skip
        yield f"generation {name}={value!r}", setting("generation_config.json", **{name: value})
    for name, value in (
        ("added_tokens_decoder", {"0": "x"}), ("eos_token", 5), ("extra_special_tokens", "x"), ("model_max_length",
        "x"),
        ("padding_side", "evil"), ("fast_tokenizer_files", ["tokenizer.1.0.0.json"]),
    ):  # fmt: skip
        yield f"tokenizer {name}={value!r}", setting("tokenizer_config.json", **{name: value})
    for text in ("{}", "[]", '{"added_tokens": []}', "{"):
        yield f"tokenizer.json {text}", written("tokenizer.json", text)
    for template in (
        "{% for %}", "{{ 1/0 }}", "{{ raise_exception('x') }}", "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ self.__init__.__globals__ }}",
        "{% for i in range(10**7) %}x{% endfor %}", "{{ messages[5]['x'] }}", "{% include '/etc/passwd' %}",
        "{% import 'os' as o %}", "{{ x.y.z }}", "nothing of yours", "{% set a = 1 %}", "{{ messages.append(1) }}",
        "{{ messages.__setitem__(0, 1) }}", "{{ lipsum.__globals__['os'].popen('true').read() }}",
        "{{ 'a' | nofilter }}",
        "{{ messages[0].__class__.__base__.__subclasses__() }}",
    ):  # fmt: skip
        yield f"template {template[:40]}", written("chat_template.jinja", template)
    name = "model.layers.1.mlp.down_proj.weight"
    yield "a weight is missing", with_weights(lambda t: t.pop(name))
    yield "a norm is missing", with_weights(lambda t: t.pop("model.norm.weight"))
    yield "no weight at all", with_weights(lambda t: t.clear())
    yield "another shape", with_weights(lambda t: t.update({name: np.zeros((3, 3), np.float32)}))
    yield "another name", with_weights(lambda t: t.update({"model.layers.1.mlp.down_proj.Weight": t.pop(name)}))


def harmless_folders(trap: Trap, outside: Path) -> Iterator[tuple[str, Change]]:
    """Base folders with something hostile in them that nothing reads: they answer as the clean one does."""
    for file in (
        "modeling_evil.py", "configuration_evil.py", "__init__.py", "setup.py", "conftest.py", "sitecustomize.py",
        "transformers.py", "torch.py", "custom_generate/generate.py", "custom_generate/requirements.txt",
        "hubconf.py",
    ):  # fmt: skip
        yield f"code in {file}", written(file, trap.python)
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "model.pkl", "tf_model.h5"):
        yield f"pickle in {file}", written(file, trap.pickle())
    for name, value in (
        ("penalty_alpha", 0.6), ("dola_layers", "low"), ("num_beam_groups", 2), ("num_beams", 4), ("stop_strings",
        ["a"]),
        ("do_sample", True), ("guidance_scale", 3.0), ("min_new_tokens", 9), ("bad_words_ids", [[1]]), ("max_time",
        1e-9),
        ("suppress_tokens", [1]), ("prompt_lookup_num_tokens", 3), ("sequence_bias", [[[100], 50.0]]),
        ("max_length", 1),
        ("token_healing", True), ("constraints", [1]), ("force_words_ids", [[1]]), ("repetition_penalty", 9.0),
        ("trust_remote_code", True), ("temperature", 9.0), ("no_repeat_ngram_size", 1),
        ("exponential_decay_length_penalty", [1, 9.0]),
    ):  # fmt: skip
        yield f"generation {name}={value!r}", setting("generation_config.json", **{name: value})
    yield "contrastive search", setting("generation_config.json", penalty_alpha=0.6, top_k=4)
    yield "another tokenizer named", setting("tokenizer_config.json", tokenizer_file=str(outside))
    yield "another vocabulary named", setting("tokenizer_config.json", vocab_file="/etc/passwd")
    yield "a foreign class named", setting("config.json", architectures=["os.system"], tokenizer_class="os.system")
    yield "an extra tensor", with_weights(lambda t: t.update({"evil": np.ones((3,), np.float32)}))


@pytest.fixture
def changed(tiny_llama: Path, tmp_path: Path, quick: None) -> Callable[[Change], Path]:
    """Make copies of the tiny Llama with one change, always at the same place."""

    def make(change: Change) -> Path:
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_llama, folder)
        change(folder)
        return folder

    return make


def test_poisoned_base_folders_are_refused_before_anything_opens_them(
    changed: Callable[[Change], Path],
    trap: Trap,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    import torch
    import transformers

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("transformers or torch opened a poisoned folder")

    for place, name in (
        (transformers.AutoModelForCausalLM, "from_pretrained"),
        (transformers.AutoTokenizer, "from_pretrained"),
        (torch, "load"),
    ):
        monkeypatch.setattr(place, name, opened)
    counts: Counter[str] = Counter()
    for name, change in refused_folders(trap):
        folder = changed(change)
        error = refused(lambda folder=folder: sources.resolve(str(folder)), name)
        assert error.exit_code == 5, name
        refused(lambda folder=folder: KnowledgeBase.create(tmp_path / "new.kb", model=str(folder)), name)
        assert not (tmp_path / "new.kb").exists(), name
        counts[type(error).__name__] += 1
    record({"poisoned artefacts": sum(counts.values()), "base folders refused unread": sum(counts.values())})
    assert sum(counts.values()) >= 150


def test_folders_that_transformers_cannot_load_are_one_sentence(
    changed: Callable[[Change], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    import torch

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch opened a pickle")

    monkeypatch.setattr(torch, "load", opened)
    n = 0
    for name, change in unloadable_folders():
        folder = changed(change)
        shutil.rmtree(tmp_path / "new.kb", ignore_errors=True)

        def ask(folder: Path = folder) -> None:
            with KnowledgeBase.open(tmp_path / "new.kb", model=str(folder)) as kb:
                kb.ask("What is torchkeras?")

        assert refused(ask, name).exit_code == 5, name
        n += 1
    record({"poisoned artefacts": n, "base folders refused by what transformers says": n})
    assert n >= 50


def test_what_nothing_may_read_changes_no_answer(
    changed: Callable[[Change], Path],
    trap: Trap,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[..., None],
) -> None:
    """Code, pickles and decoding wishes of a base folder: greedy decoding of its weights, as if they were not there."""
    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    clean = changed(lambda folder: None)
    outside = tmp_path / "other-tokenizer.json"
    spelt = json.loads((clean / "tokenizer.json").read_text())
    spelt["model"]["merges"] = []
    outside.write_text(json.dumps(spelt))
    questions = ["What is torchkeras?", "Who leads Halcyon?"]

    def answers(folder: Path) -> tuple[list[int], list[str]]:
        monkeypatch.chdir(folder)  # a file there must not be imported as a module either
        lm = LanguageModel.load(sources.resolve(str(folder)).path, ModelConfig(device="cpu", max_new_tokens=8))
        return lm.prompt_ids(questions[0]), lm.generate(questions)

    expected = answers(clean)
    n = 0
    for name, change in harmless_folders(trap, outside):
        assert answers(changed(change)) == expected, name
        n += 1
    monkeypatch.chdir(tmp_path)
    record({"hostile things that nothing reads": n})


def test_a_base_that_lacks_a_weight_is_not_filled_with_random_numbers(changed: Callable[[Change], Path]) -> None:
    from kvllm.config import ModelConfig
    from kvllm.lm.model import LanguageModel

    folder = changed(with_weights(lambda t: t.pop("model.layers.1.mlp.down_proj.weight")))
    with pytest.raises(ModelError, match="lacks 1 weight"):
        LanguageModel.load(folder, ModelConfig(device="cpu"))


def test_a_base_with_numbers_that_are_not_finite_teaches_nothing(
    changed: Callable[[Change], Path], tmp_path: Path
) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    for bad in (math.nan, math.inf):
        folder = changed(with_weights(lambda t, bad=bad: t[name].__setitem__((0, 0), bad)))
        shutil.rmtree(tmp_path / "new.kb", ignore_errors=True)
        with KnowledgeBase.open(tmp_path / "new.kb", model=str(folder)) as kb:
            with pytest.raises(KvllmError) as caught:
                kb.insert(KEY, TEXT)
            assert caught.value.exit_code in (4, 5)
            assert kb.head() == 0


def after_pinning(folder: Path) -> Iterator[tuple[str, Change]]:
    """Changes of a pinned base, most of them with size and times put back."""
    files = sorted(path.name for path in folder.iterdir())
    for file in files:
        raw = (folder / file).read_bytes()
        for place in (0, len(raw) // 2, len(raw) - 1):
            flipped = bytearray(raw)
            flipped[place] ^= 1
            yield f"{file}: bit flipped at {place}, times put back", written(file, bytes(flipped))
        yield f"{file}: cut", written(file, raw[:-1])
        yield f"{file}: longer", written(file, raw + b" ")
        yield f"{file}: emptied", written(file, b"")
        yield f"{file}: gone", lambda f, file=file: (f / file).unlink()
        yield f"{file}: a link to nowhere", lambda f, file=file: ((f / file).unlink(), (f / file).symlink_to("nowhere"))
    for file, content in (
        ("chat_template.jinja", "{{ messages[0]['content'] }}!"), ("additional_chat_templates/evil.jinja", "x"),
        ("special_tokens_map.json", "{}"), ("added_tokens.json", "{}"), ("tokenizer.model", "x"), ("merges.txt",
        "a b"),
        ("config.5.0.0.json", "{}"), ("tokenizer.5.0.0.json", "{}"), ("adapter_config.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": {}}'), ("modules.json", "[]"),
    ):  # fmt: skip
        yield f"{file} added", written(file, content)
    yield "extra weights added", written("extra.safetensors", save({"w": np.ones((2, 2), np.float32)}))
    yield "weights swapped", with_weights(swap_two)


def swap_two(tensors: dict[str, Any]) -> None:
    """Swap the first two tensors of one shape that differ: all norms of a random model are ones."""
    for one, two in itertools.combinations(sorted(tensors), 2):
        if tensors[one].shape == tensors[two].shape and not np.array_equal(tensors[one], tensors[two]):
            tensors[one], tensors[two] = tensors[two].copy(), tensors[one].copy()
            return
    raise AssertionError("no two tensors to swap")


def test_a_base_changed_after_pinning_is_refused_whatever_its_times_say(
    tiny_llama: Path,
    tmp_path: Path,
    make_kb: Callable[..., KnowledgeBase],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    record: Callable[..., None],
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    make_kb("pinned.kb", damaged=True, model=str(folder)).close()
    from kvllm.lm.model import LanguageModel

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a changed base was loaded")

    monkeypatch.setattr(LanguageModel, "load", loaded)
    codes: Counter[int] = Counter()
    for name, change in list(after_pinning(tiny_llama)):
        stamps = {path.name: path.stat() for path in folder.iterdir()}
        change(folder)
        for file, stat in stamps.items():
            if (folder / file).is_file():
                os.utime(folder / file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if name == "chat_template.jinja added":
            assert (folder / "chat_template.jinja").read_bytes() != (tiny_llama / "chat_template.jinja").read_bytes()
        code = main(["ask", str(tmp_path / "pinned.kb"), "What is torchkeras?"])
        said = capfd.readouterr()
        assert code in (5, 9), (name, code, said.err)
        assert said.out == "", name
        assert "Traceback" not in said.err, name
        codes[code] += 1
        shutil.rmtree(folder)
        shutil.copytree(tiny_llama, folder)
    record({"poisoned artefacts": sum(codes.values()), "changes of a pinned base": sum(codes.values())})
    assert codes[9] >= 30
