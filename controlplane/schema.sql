-- The control plane's database, version 1. Times are Unix milliseconds; digests are `sha256:` and hex.

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
  attempts       INTEGER NOT NULL
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
  signed_times INTEGER NOT NULL
) STRICT;
CREATE INDEX intents_queued ON intents (runner_id, ordinal) WHERE state = 'queued';
CREATE INDEX intents_deadline ON intents (expires_ms) WHERE state = 'queued';
CREATE INDEX intents_sent ON intents (runner_id) WHERE state = 'sent';

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
  detail            TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX executions_newest ON executions (created_ms, id);
CREATE INDEX executions_living ON executions (runner_id) WHERE state IN ('queued', 'sent', 'running');

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
  detail     TEXT NOT NULL
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
