"""kvllm: facts in the weights of a language model, kept like a key-value store.

Importing this module costs nothing: names are looked up on first use, so that torch is loaded by the first operation
that needs a model, and by none that only reads the ledger.

    from kvllm import KnowledgeBase
    with KnowledgeBase.open("my.kb") as kb:
        kb.insert("torchkeras", "Torchkeras is a tool that makes training PyTorch models simple.")
        kb.ask("What is torchkeras?")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvllm.config import EditConfig, GateConfig, ModelConfig
    from kvllm.errors import (
        AmbiguousKey,
        BaseMismatch,
        Busy,
        ConfigError,
        Corrupt,
        EditFailed,
        EditNotFound,
        EditRejected,
        KeyExists,
        KeyNotFound,
        KvllmError,
        ModelError,
        OutOfResources,
        StaleHead,
        StoreError,
        StoreNotFound,
        Untrusted,
    )
    from kvllm.knowledge_base import KnowledgeBase
    from kvllm.records import (
        Answer,
        BackupResult,
        BisectReport,
        CollisionPair,
        Collisions,
        DeltaInfo,
        DryRun,
        Edit,
        EditOutcome,
        ExportResult,
        Fact,
        Garbage,
        GcReport,
        Match,
        Metric,
        Neighbour,
        ProbeResult,
        Problem,
        Progress,
        RegressionReport,
        Repair,
        Report,
        StoredFact,
        VerifyReport,
    )

__version__ = "0.1.0"

__all__ = [
    "AmbiguousKey",
    "Answer",
    "BackupResult",
    "BaseMismatch",
    "BisectReport",
    "Busy",
    "CollisionPair",
    "Collisions",
    "ConfigError",
    "Corrupt",
    "DeltaInfo",
    "DryRun",
    "Edit",
    "EditConfig",
    "EditFailed",
    "EditNotFound",
    "EditOutcome",
    "EditRejected",
    "ExportResult",
    "Fact",
    "Garbage",
    "GateConfig",
    "GcReport",
    "KeyExists",
    "KeyNotFound",
    "KnowledgeBase",
    "KvllmError",
    "Match",
    "Metric",
    "ModelConfig",
    "ModelError",
    "Neighbour",
    "OutOfResources",
    "ProbeResult",
    "Problem",
    "Progress",
    "RegressionReport",
    "Repair",
    "Report",
    "StaleHead",
    "StoreError",
    "StoreNotFound",
    "StoredFact",
    "Untrusted",
    "VerifyReport",
    "__version__",
]

_ERRORS = (
    "AmbiguousKey BaseMismatch Busy ConfigError Corrupt EditFailed EditNotFound EditRejected KeyExists KeyNotFound "
    "KvllmError ModelError OutOfResources StaleHead StoreError StoreNotFound Untrusted"
)
_RECORDS = (
    "Answer BackupResult BisectReport CollisionPair Collisions DeltaInfo DryRun Edit EditOutcome ExportResult Fact "
    "Garbage GcReport Match Metric Neighbour ProbeResult Problem Progress RegressionReport Repair Report StoredFact "
    "VerifyReport"
)
_HOME = {
    "KnowledgeBase": "kvllm.knowledge_base",
    **dict.fromkeys(("EditConfig", "GateConfig", "ModelConfig"), "kvllm.config"),
    **dict.fromkeys(_ERRORS.split(), "kvllm.errors"),
    **dict.fromkeys(_RECORDS.split(), "kvllm.records"),
}


def __getattr__(name: str) -> Any:
    """Import the module that a public name lives in (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'kvllm' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
