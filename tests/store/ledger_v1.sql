-- A ledger of version 1, as kvllm 0.1.0 wrote it: two edits of one fact, one tag. Made with sqlite3's iterdump.
PRAGMA application_id = 1802923117;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE "_sqlite_migrations" (
   "id" INTEGER PRIMARY KEY,
   "migration_set" TEXT,
   "name" TEXT,
   "applied_at" TEXT
);
INSERT INTO "_sqlite_migrations" VALUES(1,'kvllm','m001_ledger','2026-11-22 05:13:51.047697+00:00');
CREATE TABLE base_files (
  name TEXT PRIMARY KEY,
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64)
);
INSERT INTO "base_files" VALUES('model.safetensors','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa');
INSERT INTO "base_files" VALUES('tokenizer.json','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb');
CREATE TABLE base_model (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  name TEXT NOT NULL,
  source TEXT NOT NULL,
  revision TEXT,
  digest TEXT NOT NULL,
  license TEXT
);
INSERT INTO "base_model" VALUES(1,'tiny','fixture','1','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','Apache-2.0');
CREATE TABLE delta_files (
  delta TEXT NOT NULL REFERENCES deltas(sha256),
  name TEXT NOT NULL,
  bytes INTEGER NOT NULL CHECK (bytes >= 0),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
  PRIMARY KEY (delta, name)
);
CREATE TABLE deltas (
  sha256 TEXT PRIMARY KEY CHECK (length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'),
  bytes INTEGER NOT NULL CHECK (bytes > 0),
  norm REAL NOT NULL CHECK (norm >= 0),
  rank INTEGER NOT NULL CHECK (rank >= 0),
  modules INTEGER NOT NULL CHECK (modules >= 0),
  created_at TEXT NOT NULL
);
CREATE TABLE edit_keys (
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  position INTEGER NOT NULL,
  key TEXT NOT NULL,
  PRIMARY KEY (edit_id, position)
);
INSERT INTO "edit_keys" VALUES(1,0,'a');
INSERT INTO "edit_keys" VALUES(2,0,'a');
CREATE TABLE edits (
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
);
INSERT INTO "edits" VALUES(1,'insert',NULL,NULL,NULL,0,0.0,NULL,NULL,NULL,'[]','["near another key"]','{}','2026-11-22T05:13:51.050+00:00');
INSERT INTO "edits" VALUES(2,'update',1,NULL,NULL,0,0.0,NULL,NULL,NULL,'[]','["near another key"]','{}','2026-11-22T05:13:51.052+00:00');
CREATE TABLE fact_events (
  fact_id INTEGER NOT NULL REFERENCES facts(id),
  edit_id INTEGER NOT NULL REFERENCES edits(id),
  event TEXT NOT NULL CHECK (event IN ('begins', 'ends')),
  PRIMARY KEY (fact_id, edit_id)
);
INSERT INTO "fact_events" VALUES(1,1,'begins');
INSERT INTO "fact_events" VALUES(1,2,'ends');
INSERT INTO "fact_events" VALUES(2,2,'begins');
CREATE TABLE facts (
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
);
INSERT INTO "facts" VALUES(1,1,1,'a','a is a thing.','[]','[]','[]',NULL,'[]','["What is a?"]','[]','2026-11-22T05:13:51.050+00:00');
INSERT INTO "facts" VALUES(2,2,1,'a','new','[]','[]','[]',NULL,'[]','["What is a?"]','[]','2026-11-22T05:13:51.052+00:00');
CREATE TABLE key_vectors (
  fact_id INTEGER NOT NULL REFERENCES facts(id),
  encoder TEXT NOT NULL,
  vector BLOB NOT NULL,
  PRIMARY KEY (fact_id, encoder)
);
CREATE TABLE ledger (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  head INTEGER REFERENCES edits(id),
  created_at TEXT NOT NULL
);
INSERT INTO "ledger" VALUES(1,2,'2026-11-22T05:13:51.048+00:00');
CREATE TABLE live_facts (
  fact_id INTEGER PRIMARY KEY REFERENCES facts(id),
  key TEXT NOT NULL UNIQUE
);
INSERT INTO "live_facts" VALUES(2,'a');
CREATE TABLE metrics (
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
);
INSERT INTO "metrics" VALUES(1,0,'reliability',1.0,8,'live','contains','semantic-key/1',7);
INSERT INTO "metrics" VALUES(1,1,'drift_kl',NULL,0,'',NULL,NULL,NULL);
INSERT INTO "metrics" VALUES(2,0,'reliability',1.0,8,'live','contains','semantic-key/1',7);
INSERT INTO "metrics" VALUES(2,1,'drift_kl',NULL,0,'',NULL,NULL,NULL);
CREATE TABLE probes (
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
);
INSERT INTO "probes" VALUES(1,0,'trained','What is it?','It is a thing.',1,1.0,'a thing','k','contains');
INSERT INTO "probes" VALUES(2,0,'trained','What is it?','It is a thing.',1,1.0,'a thing','k','contains');
CREATE TABLE seals (
  edit_id INTEGER PRIMARY KEY REFERENCES edits(id),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64)
);
INSERT INTO "seals" VALUES(1,'1f4b6c33f9e5583435ed1b80f45343e7c15c2763534598a049f25026149cc0ca');
INSERT INTO "seals" VALUES(2,'97ad896874533d4febb077367f382016693b3fef599ac6cfec6f2acb63987383');
CREATE TABLE settings (
  name TEXT PRIMARY KEY,
  value TEXT NOT NULL
);
INSERT INTO "settings" VALUES('model','"tiny"');
CREATE TABLE snapshots (
  edit_id INTEGER PRIMARY KEY REFERENCES edits(id),
  bytes INTEGER NOT NULL CHECK (bytes > 0),
  sha256 TEXT NOT NULL CHECK (length(sha256) = 64),
  created_at TEXT NOT NULL
);
CREATE TABLE tags (
  name TEXT PRIMARY KEY,
  edit_id INTEGER REFERENCES edits(id),
  created_at TEXT NOT NULL
);
INSERT INTO "tags" VALUES('v1',2,'2026-11-22T05:13:51.054+00:00');
CREATE UNIQUE INDEX "idx__sqlite_migrations_migration_set_name"
    ON "_sqlite_migrations" ("migration_set", "name");
CREATE INDEX facts_by_key ON facts(key);
CREATE INDEX fact_events_by_edit ON fact_events(edit_id);
CREATE INDEX edits_by_delta ON edits(delta);
CREATE TRIGGER base_model_no_update BEFORE UPDATE ON base_model BEGIN SELECT RAISE(ABORT, 'base_model is append-only'); END;
CREATE TRIGGER base_model_no_delete BEFORE DELETE ON base_model BEGIN SELECT RAISE(ABORT, 'base_model is append-only'); END;
CREATE TRIGGER base_files_no_update BEFORE UPDATE ON base_files BEGIN SELECT RAISE(ABORT, 'base_files is append-only'); END;
CREATE TRIGGER base_files_no_delete BEFORE DELETE ON base_files BEGIN SELECT RAISE(ABORT, 'base_files is append-only'); END;
CREATE TRIGGER deltas_no_update BEFORE UPDATE ON deltas BEGIN SELECT RAISE(ABORT, 'deltas is append-only'); END;
CREATE TRIGGER deltas_no_delete BEFORE DELETE ON deltas BEGIN SELECT RAISE(ABORT, 'deltas is append-only'); END;
CREATE TRIGGER delta_files_no_update BEFORE UPDATE ON delta_files BEGIN SELECT RAISE(ABORT, 'delta_files is append-only'); END;
CREATE TRIGGER delta_files_no_delete BEFORE DELETE ON delta_files BEGIN SELECT RAISE(ABORT, 'delta_files is append-only'); END;
CREATE TRIGGER edits_no_update BEFORE UPDATE ON edits BEGIN SELECT RAISE(ABORT, 'edits is append-only'); END;
CREATE TRIGGER edits_no_delete BEFORE DELETE ON edits BEGIN SELECT RAISE(ABORT, 'edits is append-only'); END;
CREATE TRIGGER edit_keys_no_update BEFORE UPDATE ON edit_keys BEGIN SELECT RAISE(ABORT, 'edit_keys is append-only'); END;
CREATE TRIGGER edit_keys_no_delete BEFORE DELETE ON edit_keys BEGIN SELECT RAISE(ABORT, 'edit_keys is append-only'); END;
CREATE TRIGGER facts_no_update BEFORE UPDATE ON facts BEGIN SELECT RAISE(ABORT, 'facts is append-only'); END;
CREATE TRIGGER facts_no_delete BEFORE DELETE ON facts BEGIN SELECT RAISE(ABORT, 'facts is append-only'); END;
CREATE TRIGGER fact_events_no_update BEFORE UPDATE ON fact_events BEGIN SELECT RAISE(ABORT, 'fact_events is append-only'); END;
CREATE TRIGGER fact_events_no_delete BEFORE DELETE ON fact_events BEGIN SELECT RAISE(ABORT, 'fact_events is append-only'); END;
CREATE TRIGGER metrics_no_update BEFORE UPDATE ON metrics BEGIN SELECT RAISE(ABORT, 'metrics is append-only'); END;
CREATE TRIGGER metrics_no_delete BEFORE DELETE ON metrics BEGIN SELECT RAISE(ABORT, 'metrics is append-only'); END;
CREATE TRIGGER probes_no_update BEFORE UPDATE ON probes BEGIN SELECT RAISE(ABORT, 'probes is append-only'); END;
CREATE TRIGGER probes_no_delete BEFORE DELETE ON probes BEGIN SELECT RAISE(ABORT, 'probes is append-only'); END;
CREATE TRIGGER seals_no_update BEFORE UPDATE ON seals BEGIN SELECT RAISE(ABORT, 'seals is append-only'); END;
CREATE TRIGGER seals_no_delete BEFORE DELETE ON seals BEGIN SELECT RAISE(ABORT, 'seals is append-only'); END;
CREATE VIEW current_facts AS
SELECT facts.key, facts.text, facts.aliases, facts.language, facts.tags, facts.edit_id AS taught_by_edit,
  edits.op AS taught_by_op, facts.created_at AS taught_at, facts.trained_questions, facts.id AS fact_id
FROM live_facts JOIN facts ON facts.id = live_facts.fact_id JOIN edits ON edits.id = facts.edit_id
ORDER BY facts.ordinal;
CREATE VIEW edit_log AS
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
FROM edits ORDER BY edits.id;
CREATE VIEW fact_history AS
SELECT facts.key, fact_events.edit_id AS edit, edits.op, fact_events.event, facts.text, facts.id AS fact_id,
  edits.created_at
FROM fact_events JOIN facts ON facts.id = fact_events.fact_id JOIN edits ON edits.id = fact_events.edit_id
ORDER BY fact_events.edit_id, facts.id;
CREATE VIEW delta_sizes AS
SELECT deltas.sha256, (SELECT group_concat(id, ', ') FROM edits WHERE edits.delta = deltas.sha256) AS edits,
  deltas.bytes, round(deltas.bytes / 1048576.0, 3) AS mebibytes, deltas.norm, deltas.rank, deltas.modules,
  deltas.created_at
FROM deltas ORDER BY deltas.created_at;
COMMIT;
