"""The records that kvllm hands out: frozen, typed, each with `to_dict()` ready for JSON.

They know nothing of SQLite, torch or terminals; every layer may use them.

    Fact("torchkeras", "Torchkeras is a training tool for PyTorch.").to_dict()["key"]  # 'torchkeras'
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

Op = Literal["insert", "update", "delete", "rollback", "compact"]
DeleteMode = Literal["restore", "abstain"]
InsertMode = Literal["sequential", "batched", "chunked"]
ProbeKind = Literal[
    "trained",
    "paraphrase",
    "alias",
    "neighbour",
    "inverse",
    "far",
    "general",
    "instruction",
    "user",
    "erasure",
    "restoration",
]


def _plain(value: Any) -> Any:
    """Turn records, tuples and mappings into what `json.dumps` takes."""
    if isinstance(value, Record):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return value


class Record:
    """Base of the frozen records: a plain dict for JSON, a small table for notebooks."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as nested dicts, lists, strings, numbers and None."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.to_dict().items()
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


@dataclass(frozen=True)
class Fact(Record):
    """What the user stores: a key and the text that questions about the key should be answered with.

    Attributes:
        key: Unique per knowledge base, NFC-normalised; an entity ("torchkeras") or a question ("Who leads Halcyon?").
        text: What the model should answer.
        aliases: Other names of the key; probed, and trained with a share of the templates.
        questions: Questions to train on instead of the templates.
        probes: The user's own held-out questions, asked but never trained on.
        language: "en", "zh", or None to let the key's script decide.
        tags: Free labels.
    """

    key: str
    text: str
    aliases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()
    language: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredFact(Fact):
    """A fact as the ledger holds it: with the edit that taught it and the questions that edit trained.

    Attributes:
        id: Row id of this version of the fact.
        edit_id: The edit that brought this version in.
        created_at: UTC, ISO 8601.
        trained_questions: The exact questions trained on, in order.
        base_answers: What the base model answered to `trained_questions` (same order; empty where not recorded).
    """

    id: int = 0
    edit_id: int = 0
    created_at: str = ""
    trained_questions: tuple[str, ...] = ()
    base_answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric(Record):
    """One number with what is needed to read it.

    Attributes:
        value: The number, or None where it could not be measured (n = 0).
        n: How many probes or items it is the mean of.
        protocol: How it was obtained, e.g. "live greedy decoding, natural stop".
        scorer: Which scorer judged ("contains", "exact", "chrf>=0.8", "kl", …); None for plain measurements.
        suite: Name and version of the suite, e.g. "drift-basic/1".
        seed: The seed that mattered, if any.
    """

    value: float | None
    n: int
    protocol: str = ""
    scorer: str | None = None
    suite: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ProbeResult(Record):
    """One question, the live answer, and the verdict.

    Attributes:
        kind: Which rung of the ladder the question stands on.
        question: As asked, without chat template.
        answer: As generated, stop token removed.
        passed: Whether the scorer accepted the answer (for neighbours: whether it did *not* leak).
        score: The scorer's number in [0, 1].
        expected: What was looked for.
        key: The fact the probe belongs to, if any.
        scorer: Name of the scorer.
    """

    kind: ProbeKind
    question: str
    answer: str
    passed: bool
    score: float
    expected: str = ""
    key: str | None = None
    scorer: str = "contains"


@dataclass(frozen=True)
class Report(Record):
    """Metrics by name, and the probes behind them."""

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    probes: tuple[ProbeResult, ...] = ()
    warnings: tuple[str, ...] = ()

    def value(self, name: str) -> float | None:
        """Return a metric's value, or None if it was not measured."""
        metric = self.metrics.get(name)
        return None if metric is None else metric.value


@dataclass(frozen=True)
class DeltaInfo(Record):
    """The stored low-rank weight change of one edit.

    Attributes:
        sha256: Content address: the name of the folder under `deltas/`.
        bytes: Size of all its files.
        norm: Frobenius norm over all changed matrices together.
        rank: Largest rank of any module.
        modules: How many weight matrices it changes.
    """

    sha256: str
    bytes: int
    norm: float
    rank: int = 0
    modules: int = 0


@dataclass(frozen=True)
class Edit(Record):
    """One committed change.

    Attributes:
        id: Grows by one per edit; the newest is the head.
        op: insert, update, delete, rollback or compact.
        key: The key of a single edit; None for rollback, compact and batched inserts.
        keys: All keys touched.
        parent: The head this edit was made on; None for the first.
        target: For rollback: the edit whose state was restored (0: the untouched base).
        steps, seconds, seed: Of the training; 0 / 0.0 / None where none ran.
        delta: The stored change; None for rollback.
        weights_digest: sha256 over base and adapted weights after the edit (hex).
        report: What was measured before the commit.
        warnings: E.g. collisions.
        created_at: UTC, ISO 8601.
        config: The EditConfig and GateConfig in force, and the training record (ranks, losses).
        tags: Names that point to this edit.
    """

    id: int
    op: Op
    key: str | None
    keys: tuple[str, ...] = ()
    parent: int | None = None
    target: int | None = None
    steps: int = 0
    seconds: float = 0.0
    seed: int | None = None
    delta: DeltaInfo | None = None
    weights_digest: str | None = None
    report: Report = field(default_factory=Report)
    warnings: tuple[str, ...] = ()
    created_at: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    mode: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As the command line prints it: `report` maps metric names to numbers; probes stand under `probes`."""
        plain = super().to_dict()
        plain["report"] = {name: metric.to_dict() for name, metric in self.report.metrics.items()}
        plain["probes"] = [probe.to_dict() for probe in self.report.probes]
        return plain


@dataclass(frozen=True)
class EditOutcome(Record):
    """Result for one fact of `insert_many`: an edit, or the error that refused it."""

    key: str
    edit: Edit | None = None
    error: str | None = None
    code: str | None = None

    @property
    def ok(self) -> bool:
        return self.edit is not None


@dataclass(frozen=True)
class Match(Record):
    """A live fact found by meaning; `similarity` is a cosine in [-1, 1]."""

    key: str
    text: str
    similarity: float
    encoder: str = ""


@dataclass(frozen=True)
class Problem(Record):
    """One disagreement that `verify` found: what, where, and what to do."""

    what: str
    where: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class Repair(Record):
    """One thing that `verify(repair=True)` did, or would do only with consent because it gives up committed data."""

    what: str
    where: str
    done: bool = True


@dataclass(frozen=True)
class VerifyReport(Record):
    """Whether rows, files and hashes agree, and (deep) whether a replay gives the recorded weights.

    `repairs` says what a repair did before; `problems` is then what it could not restore.
    """

    ok: bool
    problems: tuple[Problem, ...] = ()
    edits: int = 0
    facts: int = 0
    deltas: int = 0
    deep: bool = False
    repairs: tuple[Repair, ...] = ()


@dataclass(frozen=True)
class BackupResult(Record):
    """Where a copy of a knowledge base lies, and what it holds; it was verified, every byte."""

    path: str
    head: int
    edits: int
    facts: int
    deltas: int
    bytes: int


@dataclass(frozen=True)
class Garbage(Record):
    """One thing on disk that no history needs."""

    what: str
    where: str
    bytes: int = 0


@dataclass(frozen=True)
class GcReport(Record):
    """What `gc` removed, or (dry run) would remove."""

    dry_run: bool
    garbage: tuple[Garbage, ...] = ()
    bytes: int = 0


@dataclass(frozen=True)
class ExportResult(Record):
    """Where an export lies, and whether it was re-loaded and answered as the knowledge base does."""

    path: str
    format: Literal["hf", "peft"]
    verified: bool
    files: tuple[str, ...] = ()
    bytes: int = 0
    probes: int = 0
    agreement: float | None = None


@dataclass(frozen=True)
class Progress(Record):
    """One tick of a running edit, for progress bars.

    Attributes:
        stage: What is happening: "model", "preservation", "training", "probing", "commit".
        step, total: Position within the stage.
        loss: Cross-entropy per answer token (nats), without penalty.
        recall: Share of target tokens that are the greedy choice with margin.
        drift: Mean KL per preserved answer token (nats) in this step.
        note: A few words for the reader.
    """

    stage: str
    step: int = 0
    total: int | None = None
    loss: float | None = None
    recall: float | None = None
    drift: float | None = None
    note: str = ""
