"""The knowledge base on disk: ledger, deltas, snapshots, lock.

The store keeps bytes and rows, and moves the head only when both are safe. It trains nothing, replays nothing and
imports no torch; what a tensor means is the engine's business.

    with Store.open("my.kb", readonly=True) as store:
        print([fact.key for fact in store.facts()])
"""

from kvllm.store.artefacts import Delta, DeltaShape, check_delta
from kvllm.store.rows import Base, NewEdit
from kvllm.store.store import Store

__all__ = ["Base", "Delta", "DeltaShape", "NewEdit", "Store", "check_delta"]
