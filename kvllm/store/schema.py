"""The ledger's tables, rules and views, and how an older ledger is brought up to date.

Facts, edits and everything measured are append-only: triggers refuse UPDATE and DELETE, and `seals` chains a hash over
every edit, which finds accidents and careless hands (it is no signature). Plain SQL that SQLite 3.31 understands.
sqlite-utils runs the migrations and is imported only then. This module knows nothing of files besides ledger.db.
"""

from __future__ import annotations

from functools import cache

from kvllm.store.sqlite import sqlite3

APPLICATION_ID = 0x6B766C6D  # "kvlm", https://www.sqlite.org/pragma.html#pragma_application_id
SCHEMA_VERSION = 2

_TABLES = (
    # One row: which edit is the newest. NULL is the untouched base.
    """CREATE TABLE ledger (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  head INTEGER REFERENCES edits(id),
  created_at TEXT NOT NULL
)""",
    """CREATE TABLE base_model (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  name TEXT NOT NULL,
  source TEXT NOT NULL,
  revision TEXT,
  digest TEXT NOT NULL,
  license TEXT
)""",
    """CREATE TABLE base_files (
  name TEXT PRIMARY KEY,
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64)
)""",
    """CREATE TABLE settings (
  name TEXT PRIMARY KEY,
  value TEXT NOT NULL
)""",
    """CREATE TABLE deltas (
  sha256 TEXT PRIMARY KEY CHECK (length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'),
  bytes INTEGER NOT NULL CHECK (bytes > 0),
  norm REAL NOT NULL CHECK (norm >= 0),
  rank INTEGER NOT NULL CHECK (rank >= 0),
  modules INTEGER NOT NULL CHECK (modules >= 0),
  created_at TEXT NOT NULL
)""",
    """CREATE TABLE delta_files (
  delta TEXT NOT NULL REFERENCES deltas(sha256),
  name TEXT NOT NULL,
  bytes INTEGER NOT NULL CHECK (bytes >= 0),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
  PRIMARY KEY (delta, name)
)""",
    """CREATE TABLE edits (
  id INTEGER PRIMARY KEY CHECK (id >= 1),
  op TEXT NOT NULL CHECK (op IN ('insert', 'update', 'delete', 'rollback', 'compact')),
  parent INTEGER REFERENCES edits(id),
  target INTEGER CHECK (target >= 0 AND target < id),
  mode TEXT,
  steps INTEGER NOT NULL CHECK (steps >= 0),
  seconds REAL NOT NULL CHECK (seconds >= 0),
  seed INTEGER,
  delta TEXT REFERENCES deltas(sha256),
  weights_digest TEXT,
  warnings TEXT NOT NULL,
  report_warnings TEXT NOT NULL,
  config TEXT NOT NULL,
  created_at TEXT NOT NULL,
  CHECK ((parent IS NULL AND id = 1) OR parent = id - 1),
  CHECK ((op = 'rollback') = (target IS NOT NULL)),
  CHECK (op != 'rollback' OR delta IS NULL)
)""",
    """CREATE TABLE edit_keys (
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  position INTEGER NOT NULL,
  key TEXT NOT NULL,
  PRIMARY KEY (edit_id, position)
)""",
    # Versions of facts. `ordinal` is the id of the first version in an unbroken life: what `ls` is ordered by.
    """CREATE TABLE facts (
  id INTEGER PRIMARY KEY,
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  ordinal INTEGER NOT NULL REFERENCES facts(id),
  key TEXT NOT NULL CHECK (length(key) > 0),
  text TEXT NOT NULL,
  aliases TEXT NOT NULL,
  questions TEXT NOT NULL,
  probes TEXT NOT NULL,
  language TEXT,
  tags TEXT NOT NULL,
  trained_questions TEXT NOT NULL,
  base_answers TEXT NOT NULL,
  created_at TEXT NOT NULL,
  UNIQUE (edit_id, key),
  CHECK (ordinal <= id)
)""",
    # What each edit did to the set of live facts, rollbacks included; the state at an edit is each fact's newest event
    # up to it.
    """CREATE TABLE fact_events (
  fact_id INTEGER NOT NULL REFERENCES facts(id),
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  event TEXT NOT NULL CHECK (event IN ('begins', 'ends')),
  PRIMARY KEY (fact_id, edit_id)
)""",
    # The state at the head, kept in the same transaction, so that ls and get do not walk the history.
    """CREATE TABLE live_facts (
  fact_id INTEGER PRIMARY KEY REFERENCES facts(id),
  key TEXT NOT NULL UNIQUE
)""",
    """CREATE TABLE metrics (
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  position INTEGER NOT NULL,
  name TEXT NOT NULL,
  value REAL,
  n INTEGER NOT NULL,
  protocol TEXT NOT NULL,
  scorer TEXT,
  suite TEXT,
  seed INTEGER,
  PRIMARY KEY (edit_id, position),
  UNIQUE (edit_id, name)
)""",
    """CREATE TABLE probes (
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  position INTEGER NOT NULL,
  kind TEXT NOT NULL,
  question TEXT NOT NULL,
  answer TEXT NOT NULL,
  passed INTEGER NOT NULL CHECK (passed IN (0, 1)),
  score REAL NOT NULL,
  expected TEXT NOT NULL,
  key TEXT,
  scorer TEXT NOT NULL,
  PRIMARY KEY (edit_id, position)
)""",
    """CREATE TABLE tags (
  name TEXT PRIMARY KEY,
  edit_id INTEGER REFERENCES edits(id),
  created_at TEXT NOT NULL
)""",
    """CREATE TABLE snapshots (
  edit_id INTEGER PRIMARY KEY REFERENCES edits(id),
  bytes INTEGER NOT NULL CHECK (bytes > 0),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
  created_at TEXT NOT NULL
)""",
    """CREATE TABLE key_vectors (
  fact_id INTEGER NOT NULL REFERENCES facts(id),
  encoder TEXT NOT NULL,
  vector BLOB NOT NULL,
  PRIMARY KEY (fact_id, encoder)
)""",
    # sha256 over an edit and all its rows, chained to the edit before.
    """CREATE TABLE seals (
  edit_id INTEGER PRIMARY KEY REFERENCES edits(id),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64)
)""",
    "CREATE INDEX facts_by_key ON facts(key)",
    "CREATE INDEX fact_events_by_edit ON fact_events(edit_id)",
    "CREATE INDEX edits_by_delta ON edits(delta)",
)

_APPEND_ONLY = (
    "base_model",
    "base_files",
    "deltas",
    "delta_files",
    "edits",
    "edit_keys",
    "facts",
    "fact_events",
    "metrics",
    "probes",
    "seals",
)

_TRIGGERS = tuple(
    f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
    f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
    for table in _APPEND_ONLY
    for verb in ("UPDATE", "DELETE")
)

_VIEWS = (
    """CREATE VIEW current_facts AS
SELECT facts.key, facts.text, facts.aliases, facts.language, facts.tags, facts.edit_id AS taught_by_edit,
  edits.op AS taught_by_op, facts.created_at AS taught_at, facts.trained_questions, facts.id AS fact_id
FROM live_facts JOIN facts ON facts.id = live_facts.fact_id JOIN edits ON edits.id = facts.edit_id
ORDER BY facts.ordinal""",
    """CREATE VIEW edit_log AS
SELECT edits.id AS edit, edits.op,
  (SELECT group_concat(key, ', ') FROM edit_keys WHERE edit_id = edits.id) AS keys,
  edits.target AS rolled_back_to, edits.mode,
  (SELECT group_concat(name, ', ') FROM tags WHERE tags.edit_id = edits.id) AS tags,
  edits.steps, round(edits.seconds, 2) AS seconds, edits.seed,
  (SELECT value FROM metrics WHERE edit_id = edits.id AND name = 'reliability') AS reliability,
  (SELECT value FROM metrics WHERE edit_id = edits.id AND name = 'generalization') AS generalization,
  (SELECT value FROM metrics WHERE edit_id = edits.id AND name = 'locality') AS locality,
  (SELECT value FROM metrics WHERE edit_id = edits.id AND name = 'drift_kl') AS drift_kl,
  (SELECT value FROM metrics WHERE edit_id = edits.id AND name = 'ppl_ratio') AS ppl_ratio,
  edits.delta, edits.warnings, edits.created_at,
  edits.id = (SELECT head FROM ledger) AS is_head
FROM edits ORDER BY edits.id""",
    """CREATE VIEW fact_history AS
SELECT facts.key, fact_events.edit_id AS edit, edits.op, fact_events.event, facts.text, facts.id AS fact_id,
  edits.created_at
FROM fact_events JOIN facts ON facts.id = fact_events.fact_id JOIN edits ON edits.id = fact_events.edit_id
ORDER BY fact_events.edit_id, facts.id""",
    """CREATE VIEW delta_sizes AS
SELECT deltas.sha256, (SELECT group_concat(id, ', ') FROM edits WHERE edits.delta = deltas.sha256) AS edits,
  deltas.bytes, round(deltas.bytes / 1048576.0, 3) AS mebibytes, deltas.norm, deltas.rank, deltas.modules,
  deltas.created_at
FROM deltas ORDER BY deltas.created_at""",
)

_FIRST = _TABLES + _TRIGGERS + _VIEWS
# Version 2: a probe's distance from what was trained, and what was said before its question. Which columns a seal
# covers is written beside it, so that those made before stay what they are.
_SECOND = (
    "ALTER TABLE probes ADD COLUMN similarity REAL",
    "ALTER TABLE probes ADD COLUMN turns TEXT NOT NULL DEFAULT '[]'",
    "ALTER TABLE seals ADD COLUMN version INTEGER NOT NULL DEFAULT 1",
)
_VERSIONS = (_FIRST, _SECOND)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring a ledger (or an empty file) to the present schema; each migration is one transaction."""
    from sqlite_utils import Database, Migrations  # 0.2-0.6 s: only here

    migrations = Migrations("kvllm")

    @migrations()
    def m001_ledger(db: Database) -> None:
        for statement in _FIRST:
            db.conn.execute(statement)
        db.conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.conn.execute("PRAGMA user_version = 1")

    @migrations()
    def m002_similarity(db: Database) -> None:
        for statement in _SECOND:
            db.conn.execute(statement)
        db.conn.execute("PRAGMA user_version = 2")

    migrations.apply(Database(connection, execute_plugins=False))


def version(connection: sqlite3.Connection) -> int:
    """Return the ledger's own schema version: an older one is read as it is, and upgraded by the first write."""
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    return int(found)


@cache
def expected_objects(at: int = SCHEMA_VERSION) -> dict[str, tuple[str, str]]:
    """Return name → (type, SQL) of every table, index, trigger and view that a schema version has."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for statements in _VERSIONS[:at]:
            for statement in statements:
                connection.execute(statement)
        return objects(connection)
    finally:
        connection.close()


def objects(connection: sqlite3.Connection) -> dict[str, tuple[str, str]]:
    """Return name → (type, SQL) of what a ledger has, SQLite's own automatic indexes left out."""
    rows = connection.execute("SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: (kind, sql) for name, kind, sql in rows}
