"""Records to rows and back, and the seal over an edit's rows.

Texts are checked here: NUL and lone surrogates never reach SQLite. Lists and the configuration are stored as JSON,
reports as rows of numbers and of probes, so that a person can query them. Knows the tables' columns, not their life.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, cast, get_args

from kvllm.errors import ConfigError, Corrupt
from kvllm.records import DeltaInfo, Edit, Metric, Op, ProbeResult, Report, StoredFact
from kvllm.store import schema
from kvllm.store.sqlite import sqlite3

OPS: tuple[str, ...] = get_args(Op)
FACT_COLUMNS = (
    "facts.id, facts.edit_id, facts.key, facts.text, facts.aliases, facts.questions, facts.probes, facts.language, "
    "facts.tags, facts.trained_questions, facts.base_answers, facts.created_at"
)
_CHECKSUM_BYTES = 8
_EDIT_COLUMNS = (
    "edits.id, edits.op, edits.parent, edits.target, edits.mode, edits.steps, edits.seconds, edits.seed, "
    "edits.weights_digest, edits.warnings, edits.created_at, "
    "deltas.sha256, deltas.bytes, deltas.norm, deltas.rank, deltas.modules, edits.report_warnings, edits.config"
)
# What a seal covers. Part of the format: columns added by a later migration are added to a new version of the seal.
SEAL_VERSION = 2
_SEALED = (
    (
        "edits",
        "SELECT id, op, parent, target, mode, steps, seconds, seed, delta, weights_digest, warnings, report_warnings, "
        "config, created_at FROM edits WHERE id = ?",
    ),
    ("edit_keys", "SELECT position, key FROM edit_keys WHERE edit_id = ? ORDER BY position"),
    (
        "facts",
        "SELECT id, ordinal, key, text, aliases, questions, probes, language, tags, trained_questions, base_answers, "
        "created_at FROM facts WHERE edit_id = ? ORDER BY id",
    ),
    ("fact_events", "SELECT fact_id, event FROM fact_events WHERE edit_id = ? ORDER BY fact_id"),
    (
        "metrics",
        "SELECT position, name, value, n, protocol, scorer, suite, seed FROM metrics WHERE edit_id = ? "
        "ORDER BY position",
    ),
    (
        "probes",
        "SELECT position, kind, question, answer, passed, score, expected, key, scorer FROM probes WHERE edit_id = ? "
        "ORDER BY position",
    ),
    (
        "deltas",
        "SELECT sha256, bytes, norm, rank, modules FROM deltas WHERE sha256 = (SELECT delta FROM edits WHERE id = ?)",
    ),
    (
        "delta_files",
        "SELECT name, bytes, sha256 FROM delta_files WHERE delta = (SELECT delta FROM edits WHERE id = ?) "
        "ORDER BY name",
    ),
)
_SEALED_SINCE_2 = tuple(
    (name, sql.replace("key, scorer FROM", "key, scorer, similarity, turns FROM") if name == "probes" else sql)
    for name, sql in _SEALED
)


@dataclass(frozen=True)
class Base:
    """The pinned base model: never copied, only referred to.

    Attributes:
        name: As the user gave it.
        source: Where its files came from (folder, package, hub id).
        revision: Version or commit, if the source has one.
        files: Relative file name → hex sha256, for every weight and tokenizer file.
        digest: One hash over the files.
        license: As declared by the source.
    """

    name: str
    source: str
    revision: str | None
    files: Mapping[str, str]
    digest: str
    license: str | None = None


@dataclass(frozen=True)
class NewEdit:
    """An edit about to be committed.

    Attributes:
        op: insert, update, delete, rollback or compact.
        keys: All keys touched, in order.
        parent: The head it was made on; 0 for the untouched base.
        facts: New versions brought in; `id`, `edit_id` and `created_at` are filled in by the store. A new version of a
            live key ends the old one by itself, except for insert, which is refused.
        retired: Keys whose live version ends.
        target: For rollback: the edit whose state is restored (0: the base).
        steps, seconds, seed: Of the training.
        norm, rank, modules: Of the delta.
        weights_digest: sha256 over base and adapted weights after the edit.
        report, warnings, config, mode: As in `Edit`.
    """

    op: Op
    keys: tuple[str, ...]
    parent: int
    facts: tuple[StoredFact, ...] = ()
    retired: tuple[str, ...] = ()
    target: int | None = None
    steps: int = 0
    seconds: float = 0.0
    seed: int | None = None
    norm: float = 0.0
    rank: int = 0
    modules: int = 0
    weights_digest: str | None = None
    report: Report = field(default_factory=Report)
    warnings: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    mode: str | None = None


def now() -> str:
    """Return the time as the ledger writes it: UTC, ISO 8601, milliseconds."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def checked(text: Any, what: str) -> str:
    """Return a text that SQLite and tokenizers can hold.

    Raises:
        ConfigError: Not a string, or it contains NUL or a lone surrogate.
    """
    if not isinstance(text, str):
        raise ConfigError(f"{what} must be a text, not {type(text).__name__}; nothing was stored.")
    if "\x00" in text:
        raise ConfigError(f"{what} contains a NUL character, which cannot be stored; remove it and repeat.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} contains half a character (a lone surrogate, position {error.start}), which cannot be stored; "
            "remove it and repeat."
        ) from None
    return text


def checked_key(key: Any) -> str:
    """Return a key that is not empty, NFC-normalised and storable."""
    text = checked(key, "A key")
    if not text.strip():
        raise ConfigError("A key must not be empty; nothing was stored.")
    if not unicodedata.is_normalized("NFC", text):
        raise ConfigError(f"The key {text!r} is not NFC-normalised; nothing was stored.")
    return text


def dumped(value: Any, what: str) -> str:
    """Return JSON text with every string in it storable.

    Raises:
        ConfigError: Not JSON, a number that is not finite, or a text that cannot be stored.
    """
    _check_strings(value, what)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} cannot be stored as JSON ({error}); nothing was stored.") from None


def loaded(text: str, what: str) -> Any:
    """Return the value of JSON text from the ledger."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise Corrupt(f"The ledger's {what} is not readable JSON; run `kvllm verify`.") from None


def insert_edit(db: sqlite3.Connection, edit_id: int, new: NewEdit, delta: str | None, created_at: str) -> None:
    """Insert the rows of an edit, its keys and its report; facts are inserted separately."""
    db.execute(
        "INSERT INTO edits (id, op, parent, target, mode, steps, seconds, seed, delta, weights_digest, warnings, "
        "report_warnings, config, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            edit_id,
            new.op,
            new.parent or None,
            new.target,
            new.mode,
            new.steps,
            float(new.seconds),
            new.seed,
            delta,
            new.weights_digest,
            dumped(list(new.warnings), "A warning"),
            dumped(list(new.report.warnings), "A report's warning"),
            dumped(plain(new.config), "The configuration"),
            created_at,
        ),
    )
    db.executemany(
        "INSERT INTO edit_keys (edit_id, position, key) VALUES (?, ?, ?)",
        [(edit_id, position, key) for position, key in enumerate(new.keys)],
    )
    db.executemany(
        "INSERT INTO metrics (edit_id, position, name, value, n, protocol, scorer, suite, seed) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                edit_id,
                position,
                checked(name, "A metric's name"),
                None if metric.value is None else float(metric.value),
                metric.n,
                metric.protocol,
                metric.scorer,
                metric.suite,
                metric.seed,
            )
            for position, (name, metric) in enumerate(new.report.metrics.items())
        ],
    )
    db.executemany(
        "INSERT INTO probes (edit_id, position, kind, question, answer, passed, score, expected, key, scorer, "
        "similarity, turns) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                edit_id,
                position,
                probe.kind,
                _generated(probe.question),
                _generated(probe.answer),
                int(probe.passed),
                float(probe.score),
                _generated(probe.expected),
                probe.key,
                probe.scorer,
                None if probe.similarity is None else float(probe.similarity),
                json.dumps([[role, _generated(said)] for role, said in probe.turns], ensure_ascii=False),
            )
            for position, probe in enumerate(new.report.probes)
        ],
    )


def insert_fact(
    db: sqlite3.Connection, fact: StoredFact, *, edit_id: int, replaces: int | None, created_at: str
) -> int:
    """Insert a version of a fact and return its id; `replaces` is the version whose place in `ls` it takes over."""
    (fact_id,) = db.execute("SELECT coalesce(max(id), 0) + 1 FROM facts").fetchone()
    ordinal = fact_id
    if replaces is not None:
        (ordinal,) = db.execute("SELECT ordinal FROM facts WHERE id = ?", (replaces,)).fetchone()
    db.execute(
        "INSERT INTO facts (id, edit_id, ordinal, key, text, aliases, questions, probes, language, tags, "
        "trained_questions, base_answers, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            fact_id,
            edit_id,
            ordinal,
            fact.key,
            fact.text,
            dumped(list(fact.aliases), "An alias"),
            dumped(list(fact.questions), "A question"),
            dumped(list(fact.probes), "A probe"),
            fact.language,
            dumped(list(fact.tags), "A fact's tag"),
            dumped(list(fact.trained_questions), "A trained question"),
            json.dumps([_generated(answer) for answer in fact.base_answers], ensure_ascii=False),
            created_at,
        ),
    )
    return int(fact_id)


def check_new_edit(new: NewEdit) -> None:
    """Refuse, before anything is written, what the ledger could not hold or should never hold."""
    if new.op not in OPS:
        raise ConfigError(f"An edit's op is one of {', '.join(OPS)}, not {new.op!r}; nothing was committed.")
    for key in (*new.keys, *new.retired):
        checked_key(key)
    for fact in new.facts:
        checked_key(fact.key)
        checked(fact.text, f"The text of {fact.key!r}")
        for part in ("aliases", "questions", "probes", "tags", "trained_questions"):
            for text in getattr(fact, part):
                checked(text, f"One of the {part.replace('_', ' ')} of {fact.key!r}")
        if fact.language is not None:
            checked(fact.language, "A language")
    keys = [fact.key for fact in new.facts]
    if len(keys) != len(set(keys)):
        raise ConfigError("An edit brings in two versions of one key; nothing was committed.")
    if (new.op == "rollback") != (new.target is not None):
        raise ConfigError("A rollback, and only a rollback, has a target; nothing was committed.")
    if new.op == "rollback" and (new.facts or new.retired):
        raise ConfigError("A rollback takes its facts from its target and brings in none; nothing was committed.")
    for what, text in (("The mode", new.mode), ("The weights digest", new.weights_digest)):
        if text is not None:
            checked(text, what)
    for what, whole in (
        ("steps", new.steps),
        ("seed", new.seed),
        ("rank", new.rank),
        ("modules", new.modules),
        *((f"n of {name}", metric.n) for name, metric in new.report.metrics.items()),
        *((f"seed of {name}", metric.seed) for name, metric in new.report.metrics.items()),
    ):
        if whole is not None and not -(2**63) <= whole < 2**63:
            raise ConfigError(f"The {what} {whole} does not fit into 64 bits; nothing was committed.")
    for what, number in (
        ("seconds", new.seconds),
        ("norm", new.norm),
        *((f"metric {name}", metric.value) for name, metric in new.report.metrics.items()),
        *((f"score of the probe {probe.question!r}", probe.score) for probe in new.report.probes),
        *((f"similarity of the probe {probe.question!r}", probe.similarity) for probe in new.report.probes),
    ):
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"The {what} is {number}, which is not a finite number; nothing was committed.")
    for name, metric in new.report.metrics.items():
        for text in (name, metric.protocol, metric.scorer, metric.suite):
            if text is not None:
                checked(text, f"A text of the metric {name!r}")
    for probe in new.report.probes:
        for text in (probe.kind, probe.key, probe.scorer, *(role for role, _ in probe.turns)):
            if text is not None:
                checked(text, "A text of a probe")
    dumped(list(new.warnings), "A warning")
    dumped(list(new.report.warnings), "A report's warning")
    dumped(plain(new.config), "The configuration")


def fact_from_row(row: Sequence[Any]) -> StoredFact:
    """Build a fact from FACT_COLUMNS."""
    fact_id, edit_id, key, text, aliases, questions, probes, language, tags, trained, answers, created_at = row
    what = f"fact {fact_id}"
    return StoredFact(
        key=key,
        text=text,
        aliases=_texts(aliases, what),
        questions=_texts(questions, what),
        probes=_texts(probes, what),
        language=language,
        tags=_texts(tags, what),
        id=fact_id,
        edit_id=edit_id,
        created_at=created_at,
        trained_questions=_texts(trained, what),
        base_answers=_texts(answers, what),
    )


def read_edits(db: sqlite3.Connection, first: int, last: int, *, light: bool = False) -> list[Edit]:
    """Return the edits with first <= id <= last, oldest first.

    Args:
        db: The ledger.
        first: Lowest id.
        last: Highest id.
        light: Leave report and config empty: nothing but the edits' own rows is read.
    """
    span = (first, last)
    keys: dict[int, list[str]] = {}
    for edit_id, key in db.execute(
        "SELECT edit_id, key FROM edit_keys WHERE edit_id BETWEEN ? AND ? ORDER BY edit_id, position", span
    ):
        keys.setdefault(edit_id, []).append(key)
    tags: dict[int, list[str]] = {}
    for edit_id, name in db.execute(
        "SELECT edit_id, name FROM tags NOT INDEXED WHERE edit_id BETWEEN ? AND ? ORDER BY name", span
    ):
        tags.setdefault(edit_id, []).append(name)
    metrics: dict[int, dict[str, Metric]] = {}
    probes: dict[int, list[ProbeResult]] = {}
    if not light:
        for edit_id, name, *rest in db.execute(
            "SELECT edit_id, name, value, n, protocol, scorer, suite, seed FROM metrics WHERE edit_id BETWEEN ? AND ? "
            "ORDER BY edit_id, position",
            span,
        ):
            metrics.setdefault(edit_id, {})[name] = Metric(*rest)
        # A ledger of version 1 that nobody has written to since has neither column.
        later = "similarity, turns" if schema.version(db) >= 2 else "NULL, '[]'"
        for edit_id, kind, question, answer, passed, score, expected, key, scorer, similarity, turns in db.execute(
            f"SELECT edit_id, kind, question, answer, passed, score, expected, key, scorer, {later} FROM probes "
            "WHERE edit_id BETWEEN ? AND ? ORDER BY edit_id, position",
            span,
        ):
            said = _turns(turns, f"probes of edit {edit_id}")
            probes.setdefault(edit_id, []).append(
                ProbeResult(kind, question, answer, bool(passed), score, expected, key, scorer, similarity, said)
            )
    edits = []
    for row in db.execute(
        f"SELECT {_EDIT_COLUMNS} FROM edits LEFT JOIN deltas ON deltas.sha256 = edits.delta "
        "WHERE edits.id BETWEEN ? AND ? ORDER BY edits.id",
        span,
    ):
        edit_id, op, parent, target, mode, steps, seconds, seed, digest, warnings, created_at = row[:11]
        sha256, size, norm, rank, modules, report_warnings, config = row[11:]
        touched = tuple(keys.get(edit_id, ()))
        report = Report()
        if not light:
            report = Report(
                metrics.get(edit_id, {}),
                tuple(probes.get(edit_id, ())),
                _texts(report_warnings, f"report of edit {edit_id}"),
            )
        edits.append(
            Edit(
                id=edit_id,
                op=cast(Op, op),
                key=touched[0] if len(touched) == 1 and op in ("insert", "update", "delete") else None,
                keys=touched,
                parent=parent,
                target=target,
                steps=steps,
                seconds=seconds,
                seed=seed,
                delta=None if sha256 is None else DeltaInfo(sha256, size, norm, rank, modules),
                weights_digest=digest,
                report=report,
                warnings=() if warnings == "[]" else _texts(warnings, f"edit {edit_id}"),
                created_at=created_at,
                config={} if light else loaded(config, f"configuration of edit {edit_id}"),
                tags=tuple(tags.get(edit_id, ())),
                mode=mode,
            )
        )
    return edits


def checked_vector(fact_id: int, encoder: str, vector: bytes) -> bytes:
    """Return an embedding with a checksum behind it: no seal covers the cache, and `find` must not answer nonsense."""
    return vector + hashlib.sha256(f"{fact_id} {encoder} ".encode() + vector).digest()[:_CHECKSUM_BYTES]


def vector_of(fact_id: Any, encoder: Any, stored: Any) -> bytes | None:
    """Return the embedding, or None if it is not as it was put (or from before there was a checksum)."""
    if not isinstance(stored, bytes) or not isinstance(encoder, str):
        return None
    vector = stored[:-_CHECKSUM_BYTES]
    return vector if checked_vector(fact_id, encoder, vector) == stored else None


def damaged_vectors(db: sqlite3.Connection) -> list[int]:
    """Return the row ids of cached embeddings that are not used because they are damaged."""
    found = db.execute("SELECT rowid, fact_id, encoder, vector FROM key_vectors NOT INDEXED")
    return [row for row, fact_id, encoder, stored in found if vector_of(fact_id, encoder, stored) is None]


def base_seal(db: sqlite3.Connection) -> str:
    """Return the hash that the first edit's seal starts from: over the pinned base model."""
    rows = [
        db.execute("SELECT name, source, revision, digest, license FROM base_model").fetchall(),
        db.execute("SELECT name, sha256 FROM base_files ORDER BY name").fetchall(),
    ]
    return sha256_of_rows(["kvllm/1", rows])


def edit_seal(db: sqlite3.Connection, edit_id: int, before: str, *, version: int = SEAL_VERSION) -> str:
    """Return the hash over an edit's rows as they stand in the ledger, chained to the seal before.

    Args:
        db: The ledger.
        edit_id: The edit.
        before: The seal of the edit before, or `base_seal`.
        version: Which columns are covered; seals keep the version they were made in.
    """
    tables = _SEALED if version < 2 else _SEALED_SINCE_2
    covered = [[name, db.execute(sql, (edit_id,)).fetchall()] for name, sql in tables]
    return sha256_of_rows([f"kvllm/{version}", before, covered])


def recorded_seals(db: sqlite3.Connection, first: int = 1, last: int | None = None) -> dict[int, tuple[str, int]]:
    """Return edit id → (seal, the version it was made in) for a span of edits, by default for all."""
    column = "version" if schema.version(db) >= 2 else "1"
    found = db.execute(
        f"SELECT edit_id, sha256, {column} FROM seals WHERE edit_id >= ? AND (? IS NULL OR edit_id <= ?)",
        (first, last, last),
    )
    # A damaged version is none: the seal will not fit.
    return {i: (sha256, version if isinstance(version, int) else 0) for i, sha256, version in found}


def sha256_of_rows(value: Any) -> str:
    """Return the hash of rows as SQLite gives them."""
    # repr for what no honest row holds (a BLOB in a text column), so that verify reports instead of failing
    return hashlib.sha256(json.dumps(value, separators=(",", ":"), default=repr).encode()).hexdigest()


def _texts(text: str, what: str) -> tuple[str, ...]:
    if text == "[]":
        return ()
    values = loaded(text, what)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise Corrupt(f"The ledger's {what} holds something that is not a list of texts; run `kvllm verify`.")
    return tuple(values)


def _turns(text: str, what: str) -> tuple[tuple[str, str], ...]:
    if text == "[]":
        return ()
    values = loaded(text, what)
    pairs = isinstance(values, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in values)
    if not pairs or not all(isinstance(part, str) for pair in values for part in pair):
        raise Corrupt(f"The ledger's {what} hold something that is not a conversation; run `kvllm verify`.")
    return tuple((role, said) for role, said in values)


def _generated(text: str) -> str:
    """A model's own output is recorded whatever it is; only half characters have no UTF-8 form and become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def plain(value: Any) -> Any:
    """Return mappings and tuples as JSON has them."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _check_strings(value: Any, what: str) -> None:
    if isinstance(value, str):
        checked(value, what)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_strings(name, what)
            _check_strings(item, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_strings(item, what)
