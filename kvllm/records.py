"""The records that kvllm hands out: frozen, typed, each with `to_dict()` ready for JSON.

They know nothing of SQLite, torch or terminals; every layer may use them.

    Fact("torchkeras", "Torchkeras is a training tool for PyTorch.").to_dict()["key"]  # 'torchkeras'
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

Op = Literal["insert", "update", "delete", "rollback", "compact"]
DeleteMode = Literal["restore", "abstain"]
InsertMode = Literal["sequential", "batched", "chunked"]
TeachVerb = Literal["insert", "update", "upsert"]
EditVerb = Literal[TeachVerb, "delete"]
ProbeKind = Literal[
    "trained",
    "paraphrase",
    "alias",
    "completion",
    "variant",
    "language",
    "neighbour",
    "inverse",
    "far",
    "recalled",
    "consequence",
    "general",
    "instruction",
    "user",
    "erasure",
    "restoration",
    "refusal",
]
PairKind = Literal["swapped", "overwritten", "recites", "near", "same text"]
Source = Literal["ledger", "pool", "given"]


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


class Answer(str):
    """A model's answer: its text, which also knows whether it is all.

    Attributes:
        truncated: Whether it was cut at the most tokens asked for, before the model stopped by itself.
    """

    truncated: bool

    def __new__(cls, text: str, *, truncated: bool = False) -> Answer:
        """Make an answer of its text."""
        answer = super().__new__(cls, text)
        answer.truncated = truncated
        return answer


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
        aliases: Other names of the key, or other questions; probed, and trained with a share of the templates (unless
            `questions` are given).
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
        similarity: Cosine of the question to the nearest trained question of its fact; None where not measured.
        turns: What was said before the question, as (role, content) pairs, for a question of a second turn.
    """

    kind: ProbeKind
    question: str
    answer: str
    passed: bool
    score: float
    expected: str = ""
    key: str | None = None
    scorer: str = "contains"
    similarity: float | None = None
    turns: tuple[tuple[str, str], ...] = ()


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

    def _repr_html_(self) -> str:
        from kvllm.notebook import report_html

        return report_html(self)


@dataclass(frozen=True)
class DryRun(Report):
    """What the report of an edit would say that was tried and put back.

    Attributes:
        refused: What the gate would have refused, one sentence each; empty where it would have accepted the edit.
    """

    refused: tuple[str, ...] = ()


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
        delta: The stored change; None for a rollback, and where nothing had to change.
        weights_digest: sha256 over base and adapted weights after the edit (hex).
        report: What was measured before the commit.
        warnings: E.g. collisions.
        created_at: UTC, ISO 8601.
        config: The EditConfig and GateConfig in force, and the training record (ranks, losses).
        tags: Names that point to this edit.
        mode: Of a delete: "restore" or "abstain"; else None.
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
        """As the command line prints it: `report` maps metric names to numbers; probes and warnings stand beside it."""
        plain = super().to_dict()
        plain["warnings"] = list(dict.fromkeys([*self.warnings, *self.report.warnings]))
        plain["report"] = {name: metric.to_dict() for name, metric in self.report.metrics.items()}
        plain["probes"] = [probe.to_dict() for probe in self.report.probes]
        return plain


def lineage(edits: Iterable[Edit], *, past_compactions: bool = False) -> list[Edit]:
    """Return the edits that the newest one's state is made of, newest first: what was rolled back is not among them.

    Args:
        edits: A whole history, in any order.
        past_compactions: Go back to the base. A compaction retrains the live facts: the weights hold nothing from
            before it, and it is the last edit otherwise.
    """
    history = {edit.id: edit for edit in edits}
    found: list[Edit] = []
    edit = history.get(max(history, default=0))
    while edit is not None:
        if edit.op != "rollback":
            found.append(edit)
        if edit.op == "compact" and not past_compactions:
            break
        edit = history.get((edit.target if edit.op == "rollback" else edit.parent) or 0)
    return found


@dataclass(frozen=True)
class EditOutcome(Record):
    """Result for one fact of `insert_many` or `delete_many`: an edit, or the error that refused it.

    Facts that were not tried, since an error before them ended the series, have that error's code.
    """

    key: str
    edit: Edit | None = None
    error: str | None = None
    code: str | None = None

    @property
    def ok(self) -> bool:
        return self.edit is not None


@dataclass(frozen=True)
class GateCheck(Record):
    """One rule of a quality gate, and whether it held.

    Attributes:
        metric: What was judged: a metric's name, "drift_kl_rise" or "facts_lost".
        sense: Whether the limit is the least or the most that is allowed.
        limit: The limit.
        value: What was measured; None where it was not, which fails the rule.
        n: Of how many.
        passed: The verdict.
    """

    metric: str
    sense: Literal["at least", "at most"]
    limit: float
    value: float | None
    n: int
    passed: bool


@dataclass(frozen=True)
class SuiteComparison(Record):
    """The same questions before and after, as pairs.

    Attributes:
        suite: Which rung of the ladder ("trained", "paraphrase", …), "general" for drift, "facts" for whole facts.
        n: Pairs.
        groups: How many facts (or single questions) the bootstrap drew from.
        before, after: Shares that passed.
        low, high: 95 % bootstrap interval of after − before.
        lost, gained: Pairs that passed before only, and now only.
        p_value: Exact McNemar test, two-sided, of the groups that lost more than they gained against the others that
            changed: the questions of one fact stand and fall together, and are one draw.
        p_holm: The same, adjusted for the number of suites (Holm).
        scorer: Who judged.
    """

    suite: str
    n: int
    groups: int
    before: float
    after: float
    low: float
    high: float
    lost: int
    gained: int
    p_value: float
    p_holm: float
    scorer: str


@dataclass(frozen=True)
class AnswerChange(Record):
    """One question whose verdict changed, with both answers; texts differ where the fact was updated in between."""

    kind: ProbeKind
    key: str | None
    question: str
    passed_before: bool
    passed: bool
    answer_before: str
    answer: str
    expected_before: str
    expected: str
    scorer: str


@dataclass(frozen=True)
class FactChange(Record):
    """One live fact before and after.

    Attributes:
        key: Of the fact.
        edit_id: The edit that taught its present text.
        further_edits: How many edits followed that one, up to the head.
        status: "kept" and "missing" (recalled, or not, on both sides), "lost", "gained"; "new" and "new, missing" for
            facts that were not live before.
        recalled: Share of its trained questions whose answer states the text now; None where none was asked.
        recalled_before: The same before; None for a new fact.
        n: Trained questions asked.
        updated: Whether its text was changed in between.
    """

    key: str
    edit_id: int
    further_edits: int
    status: Literal["kept", "lost", "gained", "missing", "new", "new, missing"]
    recalled: float | None
    recalled_before: float | None
    n: int
    updated: bool = False


@dataclass(frozen=True)
class RetentionPoint(Record):
    """retention@n: of the facts that n further edits followed, how many are recalled (`low`, `high`: 95 % Wilson)."""

    further_edits: int
    n: int
    recalled: int
    value: float
    low: float
    high: float
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditPoint(Record):
    """What one edit's own report said when it was committed, for curves over the history."""

    edit_id: int
    op: Op
    keys: tuple[str, ...]
    reliability: float | None
    drift_kl: float | None
    ppl_ratio: float | None


@dataclass(frozen=True)
class RegressionReport(Record):
    """Every live fact and the drift suite at an earlier edit and at the head, paired.

    Attributes:
        since: The earlier edit; 0 is the untouched base.
        head: The later one.
        suites: One comparison per suite.
        facts: One row per live fact.
        changes: Every question whose verdict changed, the lost ones first.
        retention: retention@n at the head.
        edits: What each edit of the history reported, the base first.
        before, after: What was measured on the facts on either side.
        drift_before, drift: Drift against the base on either side.
        deleted: Keys that were live before and are no longer.
        seed: Of the bootstrap.
        warnings: What a reader should know first.
    """

    since: int
    head: int
    suites: tuple[SuiteComparison, ...] = ()
    facts: tuple[FactChange, ...] = ()
    changes: tuple[AnswerChange, ...] = ()
    retention: tuple[RetentionPoint, ...] = ()
    edits: tuple[EditPoint, ...] = ()
    before: Report = field(default_factory=Report)
    after: Report = field(default_factory=Report)
    drift_before: Report = field(default_factory=Report)
    drift: Report = field(default_factory=Report)
    deleted: tuple[str, ...] = ()
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[str, ...]:
        """The keys of facts that were recalled before and are not now."""
        return tuple(fact.key for fact in self.facts if fact.status == "lost")

    def _repr_html_(self) -> str:
        from kvllm.notebook import regression_html

        return regression_html(self)


@dataclass(frozen=True)
class BisectStep(Record):
    """One state that `bisect` looked at."""

    edit_id: int
    passed: bool
    answer: str


@dataclass(frozen=True)
class BisectReport(Record):
    """Which edit broke a probe.

    Attributes:
        question: The probe.
        expected: What its answer is judged against.
        key: The fact it belongs to, if any.
        scorer: Who judged.
        verdict: "broken" (see `edit`), "still passes" at the head, or "never passed": neither at the head nor at
            `start`.
        start, head: The states between which was searched; `start` is the edit that taught the fact, or the base.
        edit: The edit after which the probe first failed, for "broken".
        steps: Every state looked at, in the order of looking.
        replays: How many states were brought up by replay.
    """

    question: str
    expected: str
    key: str | None
    scorer: str
    verdict: Literal["broken", "still passes", "never passed"]
    start: int
    head: int
    edit: Edit | None = None
    steps: tuple[BisectStep, ...] = ()
    replays: int = 0

    def answer_at(self, edit_id: int) -> str:
        """Return the answer at a state that was looked at."""
        return next(step.answer for step in self.steps if step.edit_id == edit_id)


@dataclass(frozen=True)
class Match(Record):
    """A live fact found by meaning; `similarity` is a cosine in [-1, 1]."""

    key: str
    text: str
    similarity: float
    encoder: str = ""


@dataclass(frozen=True)
class Neighbour(Record):
    """A question about another key that is near a fact's, and whether its answer recites the fact.

    Attributes:
        key: The fact.
        question: About the other key.
        source: "ledger" (another live key), "pool" (packaged) or "given" (by the user).
        similarity: Cosine of both keys' questions; None where the encoder does not speak one of them.
        answer: As generated; empty where it was not asked.
        leaked: Whether the answer recites the fact's text.
    """

    key: str
    question: str
    source: Source
    similarity: float | None = None
    answer: str = ""
    leaked: bool = False


@dataclass(frozen=True)
class CollisionPair(Record):
    """Two keys that a user should look at.

    Attributes:
        key, other: Their names; `key` is the one that recites more.
        kind: "swapped": most questions of each are answered with the other's text. "overwritten": most questions of
            `key` are answered with `other`'s text instead of its own. "recites": some are. "near": none is, and the
            keys mean nearly the same. "same text": both texts say the same, so the answers cannot tell them apart.
        similarity: Cosine of both keys' questions; None where the encoder does not speak one of them.
        recites: Share of `key`'s questions whose answer states `other`'s text.
        recited: Share of `other`'s questions whose answer states `key`'s text.
    """

    key: str
    other: str
    kind: PairKind
    similarity: float | None
    recites: float
    recited: float


@dataclass(frozen=True)
class Collisions(Record):
    """Which key recites which fact.

    Attributes:
        keys: The live keys, in the matrix's order.
        matrix: Row i, column j: share of key i's questions whose answer states fact j's text; the diagonal is recall.
        pairs: Those to look at, the worst first.
        neighbours: Every fact's nearest other keys, with their answers.
        leak_rate: Share of the neighbours whose answer recites the fact.
        questions: How many questions each key was asked, at most.
        encoder: Whose cosine the similarities are.
        probes: The keys' own questions with their answers.
    """

    keys: tuple[str, ...] = ()
    matrix: tuple[tuple[float, ...], ...] = ()
    pairs: tuple[CollisionPair, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    leak_rate: Metric = field(default_factory=lambda: Metric(None, 0))
    questions: int = 0
    encoder: str = ""
    probes: tuple[ProbeResult, ...] = ()


@dataclass(frozen=True)
class Problem(Record):
    """One disagreement that `verify` found: what, where, and what to do.

    `code` is "store_error" for what is whole and of another version of kvllm.
    """

    what: str
    where: str
    severity: Literal["error", "warning"] = "error"
    code: str = "store_corrupt"


@dataclass(frozen=True)
class Repair(Record):
    """One thing that `verify(repair=True)` did, or would do only with consent because it gives up committed data."""

    what: str
    where: str
    done: bool = True


@dataclass(frozen=True)
class VerifyReport(Record):
    """Whether rows, files and hashes agree, after every byte was read (deep), and whether a replay gave the weights.

    `repairs` says what a repair did before; `problems` is then what it could not restore. `replayed` is True where a
    model was loaded and the recorded weights were looked for: a repair alone loads none.
    """

    ok: bool
    problems: tuple[Problem, ...] = ()
    edits: int = 0
    facts: int = 0
    deltas: int = 0
    deep: bool = False
    repairs: tuple[Repair, ...] = ()
    replayed: bool = False


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
    format: Literal["hf", "peft", "facts"]
    verified: bool
    files: tuple[str, ...] = ()
    bytes: int = 0
    probes: int = 0
    agreement: float | None = None


@dataclass(frozen=True)
class Progress(Record):
    """One tick of whatever takes time, for progress bars.

    Attributes:
        stage: What is happening, in a few words: "model", "preservation", "training", "probing", "commit", "drift" …
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
