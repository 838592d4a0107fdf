-- From version 1 to version 2: what `schema.sql` has and version 1 had not.

ALTER TABLE runners ADD COLUMN instance TEXT NOT NULL DEFAULT '';
ALTER TABLE runners ADD COLUMN dial INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runners ADD COLUMN boot_id TEXT NOT NULL DEFAULT '';
ALTER TABLE runners ADD COLUMN retired TEXT NOT NULL DEFAULT '[]';
ALTER TABLE runners ADD COLUMN conflict TEXT;

ALTER TABLE intents ADD COLUMN actor TEXT;
ALTER TABLE intents ADD COLUMN waits_for TEXT;
CREATE INDEX intents_held ON intents (runner_id) WHERE state = 'held';
CREATE INDEX intents_subject ON intents (subject);

ALTER TABLE executions ADD COLUMN lease_token INTEGER NOT NULL DEFAULT 0;
ALTER TABLE executions ADD COLUMN lease_refused TEXT;
ALTER TABLE executions ADD COLUMN verdict TEXT;

ALTER TABLE worktrees ADD COLUMN retry_after_ms INTEGER;

-- Attempts that a later one took the place of; the columns of `executions`, and the key is the attempt.
CREATE TABLE attempts (
  id                TEXT NOT NULL,
  runner_id         TEXT NOT NULL,
  start_token       INTEGER NOT NULL,
  state             TEXT NOT NULL,
  argv              TEXT NOT NULL,
  cwd               TEXT,
  worktree_id       TEXT,
  cmd_id            TEXT NOT NULL,
  stop_cmd_id       TEXT,
  created_ms        INTEGER NOT NULL,
  receipt           TEXT,
  settlement        TEXT,
  settlement_digest TEXT,
  exit_status       INTEGER,
  reason            TEXT,
  detail            TEXT NOT NULL,
  lease_token       INTEGER NOT NULL DEFAULT 0,
  lease_refused     TEXT,
  verdict           TEXT,
  PRIMARY KEY (id, start_token)
) STRICT, WITHOUT ROWID;
CREATE INDEX attempts_living ON attempts (runner_id) WHERE state IN ('queued', 'sent', 'running');
