"""A base, a tiny valid delta as bytes, and short verbs for a store under test."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from kvllm.records import Metric, ProbeResult, Report, StoredFact
from kvllm.store import Base, NewEdit, Store, guard, rows

BASE = Base(
    name="tiny",
    source="fixture",
    revision="1",
    files={"model.safetensors": "a" * 64, "tokenizer.json": "b" * 64},
    digest="c" * 64,
    license="Apache-2.0",
)
MODULES = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


def adapter_config(**changes: Any) -> bytes:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["down_proj"],
        "bias": "none",
        "modules_to_save": None,
    }
    return json.dumps({**config, **changes}, sort_keys=True).encode()


def tensors(seed: int = 0, rank: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {}
    for module in MODULES:
        found[f"base_model.model.{module}.lora_A.weight"] = rng.normal(size=(rank, 5)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = rng.normal(size=(3, rank)).astype(np.float32)
    return found


def tiny_delta(seed: int = 0) -> dict[str, bytes]:
    """A valid LoRA folder as bytes: two modules of shape (3, 5), rank 2."""
    return {"adapter_model.safetensors": save(tensors(seed)), "adapter_config.json": adapter_config()}


def fact(key: str, text: str = "", **more: Any) -> StoredFact:
    return StoredFact(key=key, text=text or f"{key} is a thing.", trained_questions=(f"What is {key}?",), **more)


def forge_seals(db: Any) -> None:
    """Make the only edit's seal, and the one over what may change, fit what the ledger holds now."""
    db.execute("UPDATE seals SET sha256 = ?", (rows.edit_seal(db, 1, rows.base_seal(db)),))
    guard.seal_state(db)


def small_report() -> Report:
    return Report(
        {"reliability": Metric(1.0, 8, "live", "contains", "semantic-key/1", 7), "drift_kl": Metric(None, 0)},
        (ProbeResult("trained", "What is it?", "It is a thing.", True, 1.0, "a thing", "k"),),
        ("near another key",),
    )


class Bench:
    """A store and short verbs for it, so that a test says what happens and not how."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.seed = 0

    def delta(self) -> dict[str, bytes]:
        self.seed += 1
        return tiny_delta(self.seed)

    def insert(self, *keys: str, **more: Any) -> int:
        facts = tuple(fact(key) for key in keys)
        new = NewEdit("insert", keys, self.store.head(), facts=facts, norm=1.0, rank=2, modules=2, **more)
        return self.store.commit(new, self.delta()).id

    def update(self, key: str, text: str) -> int:
        new = NewEdit("update", (key,), self.store.head(), facts=(fact(key, text),))
        return self.store.commit(new, self.delta()).id

    def delete(self, key: str) -> int:
        new = NewEdit("delete", (key,), self.store.head(), retired=(key,), mode="restore")
        return self.store.commit(new, self.delta()).id

    def rollback(self, target: int) -> int:
        return self.store.commit(NewEdit("rollback", (), self.store.head(), target=target), None).id

    def compact(self) -> int:
        live = tuple(self.store.facts())
        keys = tuple(each.key for each in live)
        return self.store.commit(NewEdit("compact", keys, self.store.head(), facts=live, retired=keys), self.delta()).id

    def keys(self, at: int | None = None) -> list[str]:
        return [each.key for each in self.store.facts(at)]
