-- The control plane's database, version 2 (`schema_1_to_2.sql` makes it of version 1). Times are Unix milliseconds; digests are `sha256:` and hex.

CREATE TABLE runners (
  id             TEXT PRIMARY KEY,
  name           TEXT NOT NULL,
  x              TEXT NOT NULL,
  seal_x         TEXT NOT NULL,
  labels         TEXT NOT NULL,
  living         INTEGER NOT NULL,
  inc            INTEGER NOT NULL,
  certificate    TEXT NOT NULL,
  session        TEXT NOT NULL,
  ctl_hw         INTEGER NOT NULL,
  ctl_head       TEXT NOT NULL,
  acked_hw       INTEGER NOT NULL,
  out_hw         INTEGER NOT NULL,
  keyset_version INTEGER NOT NULL,
  enrolled_ms    INTEGER NOT NULL,
  last_seen_ms   INTEGER NOT NULL,
  version        TEXT NOT NULL,
  platform       TEXT NOT NULL,
  hostname       TEXT NOT NULL,
  policy_digest  TEXT NOT NULL,
  attempts       INTEGER NOT NULL,
  -- The daemon that has the line: `instance` is random for each start of one. `retired` are those before it, as JSON.
  instance       TEXT NOT NULL DEFAULT '',
  dial           INTEGER NOT NULL DEFAULT 0,
  boot_id        TEXT NOT NULL DEFAULT '',
  retired        TEXT NOT NULL DEFAULT '[]',
  conflict       TEXT
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX runners_living_name ON runners (name) WHERE living = 1;

CREATE TABLE join_tokens (
  hash       TEXT PRIMARY KEY,
  name       TEXT,
  labels     TEXT NOT NULL,
  expires_ms INTEGER NOT NULL,
  used_by    TEXT,
  runner_id  TEXT
) STRICT, WITHOUT ROWID;

CREATE TABLE intents (
  ordinal      INTEGER PRIMARY KEY,
  cmd_id       TEXT NOT NULL UNIQUE,
  runner_id    TEXT NOT NULL,
  kind         TEXT NOT NULL,
  subject      TEXT NOT NULL,
  args         BLOB NOT NULL,
  lease        BLOB,
  state        TEXT NOT NULL,
  created_ms   INTEGER NOT NULL,
  expires_ms   INTEGER NOT NULL,
  signed_times INTEGER NOT NULL,
  actor        TEXT,
  -- Of a held intent: the attempt whose lease must be over before this one is queued.
  waits_for    TEXT
) STRICT;
CREATE INDEX intents_queued ON intents (runner_id, ordinal) WHERE state = 'queued';
CREATE INDEX intents_deadline ON intents (expires_ms) WHERE state = 'queued';
CREATE INDEX intents_sent ON intents (runner_id) WHERE state = 'sent';
CREATE INDEX intents_held ON intents (runner_id) WHERE state = 'held';
CREATE INDEX intents_subject ON intents (subject);

CREATE TABLE commands (
  digest    TEXT PRIMARY KEY,
  cmd_id    TEXT NOT NULL,
  runner_id TEXT NOT NULL,
  inc       INTEGER NOT NULL,
  seq       INTEGER,
  payload   BLOB NOT NULL,
  signed_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX commands_number ON commands (runner_id, inc, seq) WHERE seq IS NOT NULL;
CREATE INDEX commands_of ON commands (cmd_id);

CREATE TABLE executions (
  id                TEXT PRIMARY KEY,
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
  -- The token of the lease it has now, 0: its start's. `lease_refused` is why its runner did not take the last grant.
  lease_token       INTEGER NOT NULL DEFAULT 0,
  lease_refused     TEXT,
  verdict           TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX executions_newest ON executions (created_ms, id);
CREATE INDEX executions_living ON executions (runner_id) WHERE state IN ('queued', 'sent', 'running');

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

CREATE TABLE worktrees (
  id         TEXT PRIMARY KEY,
  runner_id  TEXT NOT NULL,
  state      TEXT NOT NULL,
  repo       TEXT NOT NULL,
  base       TEXT NOT NULL,
  branch     TEXT,
  path       TEXT,
  head       TEXT,
  cmd_id     TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  reason     TEXT,
  detail     TEXT NOT NULL,
  retry_after_ms INTEGER
) STRICT, WITHOUT ROWID;

-- The highest lease token ever granted for a resource: it only rises.
CREATE TABLE lease_tokens (
  res   TEXT PRIMARY KEY,
  token INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- What was answered, by the runner's own number. The digest is part of the key: a runner whose state was restored numbers other
-- statements with numbers it used before.
CREATE TABLE answered (
  runner_id TEXT NOT NULL,
  out_seq   INTEGER NOT NULL,
  body      TEXT NOT NULL,
  reason    TEXT,
  PRIMARY KEY (runner_id, out_seq, body)
) STRICT, WITHOUT ROWID;

CREATE TABLE statements (
  digest      TEXT NOT NULL,
  runner_id   TEXT NOT NULL,
  kind        TEXT NOT NULL,
  cmd_id      TEXT NOT NULL,
  subject     TEXT NOT NULL,
  envelope    TEXT NOT NULL,
  payload     TEXT NOT NULL,
  received_ms INTEGER NOT NULL,
  PRIMARY KEY (digest, runner_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX statements_subject ON statements (subject);
CREATE INDEX statements_cmd ON statements (cmd_id);

CREATE TABLE events (
  ordinal   INTEGER PRIMARY KEY,
  runner_id TEXT NOT NULL,
  at_ms     INTEGER NOT NULL,
  kind      TEXT NOT NULL,
  reason    TEXT,
  detail    TEXT NOT NULL,
  digest    TEXT
) STRICT;
CREATE INDEX events_of ON events (runner_id, ordinal);

CREATE TABLE logs (
  attempt   TEXT PRIMARY KEY,
  runner_id TEXT NOT NULL,
  "end"     INTEGER NOT NULL,
  complete  INTEGER NOT NULL,
  gaps      TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE idempotency (
  key      TEXT PRIMARY KEY,
  request  TEXT NOT NULL,
  status   INTEGER NOT NULL,
  response TEXT NOT NULL,
  at_ms    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (at_ms);
