"""The tables of the journal, as numbered migrations that are applied once each, in order.

Rule: a migration that was released is never edited; what is wrong in it is put right by the next one.
"""

import sqlite3
from typing import Final

MIGRATIONS: Final[tuple[tuple[str, ...], ...]] = (
    (
        "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "INSERT INTO meta VALUES('format', 'local-runner journal')",
        """CREATE TABLE stream_mark(
            inc INTEGER PRIMARY KEY CHECK(inc > 0),
            hw INTEGER NOT NULL CHECK(hw >= 0),
            head TEXT NOT NULL)""",
        """CREATE TRIGGER stream_mark_rises BEFORE UPDATE ON stream_mark
            WHEN NEW.inc <> OLD.inc OR NEW.hw < OLD.hw OR (NEW.hw = OLD.hw AND NEW.head <> OLD.head)
            BEGIN SELECT RAISE(ABORT, 'a stream mark never falls'); END""",
        """CREATE TRIGGER stream_mark_stays BEFORE DELETE ON stream_mark
            BEGIN SELECT RAISE(ABORT, 'a stream mark is never forgotten'); END""",
        """CREATE TABLE command(
            n INTEGER PRIMARY KEY,
            digest TEXT NOT NULL UNIQUE,
            cmd_id TEXT NOT NULL,
            kind TEXT NOT NULL,
            seq INTEGER,
            envelope BLOB NOT NULL,
            policy_digest TEXT NOT NULL,
            received_ms INTEGER NOT NULL,
            receipt_seq INTEGER UNIQUE)""",
        "CREATE INDEX command_pending ON command(n) WHERE receipt_seq IS NULL",
        "CREATE INDEX command_envelope ON command(received_ms) WHERE length(envelope) > 0",
        """CREATE TRIGGER command_receipted_once BEFORE UPDATE OF receipt_seq ON command
            WHEN OLD.receipt_seq IS NOT NULL AND NEW.receipt_seq IS NOT OLD.receipt_seq
            BEGIN SELECT RAISE(ABORT, 'a command has one receipt'); END""",
        """CREATE TRIGGER command_stays BEFORE DELETE ON command
            BEGIN SELECT RAISE(ABORT, 'a command is never forgotten'); END""",
        """CREATE TABLE attempt(
            name TEXT PRIMARY KEY,
            digest TEXT NOT NULL,
            cmd_id TEXT NOT NULL,
            state TEXT NOT NULL,
            shim_boot_id TEXT, shim_pid INTEGER, shim_start INTEGER,
            lease_res TEXT, lease_token INTEGER, lease_ttl_ms INTEGER, lease_on_loss TEXT,
            lease_deadline_ms INTEGER, lease_state TEXT,
            stop_by TEXT,
            stop_grace_ms INTEGER,
            worktree_id TEXT,
            settled_seq INTEGER UNIQUE,
            at_ms INTEGER NOT NULL,
            CHECK(settled_seq IS NULL OR state = 'settled'))""",
        "CREATE INDEX attempt_living ON attempt(digest) WHERE state != 'settled'",
        "CREATE INDEX attempt_settled ON attempt(at_ms) WHERE state = 'settled'",
        """CREATE TRIGGER attempt_settled_once BEFORE UPDATE ON attempt WHEN OLD.state = 'settled'
            BEGIN SELECT RAISE(ABORT, 'a settled attempt stays as it is'); END""",
        """CREATE TRIGGER attempt_stays BEFORE DELETE ON attempt
            BEGIN SELECT RAISE(ABORT, 'an attempt is never forgotten'); END""",
        """CREATE TABLE tombstone(target TEXT PRIMARY KEY, cmd_id TEXT NOT NULL, expires_ms INTEGER NOT NULL)
            WITHOUT ROWID""",
        """CREATE TABLE worktree(
            worktree_id TEXT PRIMARY KEY,
            digest TEXT NOT NULL,
            repo TEXT NOT NULL,
            path TEXT, head TEXT, branch TEXT) WITHOUT ROWID""",
        """CREATE TABLE outbox(
            out_seq INTEGER PRIMARY KEY CHECK(out_seq > 0),
            kind TEXT NOT NULL,
            body TEXT NOT NULL,
            at_ms INTEGER NOT NULL,
            answered_ms INTEGER)""",
        "CREATE INDEX outbox_answered ON outbox(answered_ms) WHERE length(body) > 0 AND answered_ms IS NOT NULL",
        "CREATE INDEX outbox_unanswered ON outbox(out_seq) WHERE answered_ms IS NULL",
        """CREATE TRIGGER outbox_stays BEFORE DELETE ON outbox
            BEGIN SELECT RAISE(ABORT, 'a number of the outbox is never used again'); END""",
        """CREATE TABLE leaf(
            n INTEGER PRIMARY KEY AUTOINCREMENT,
            at_ms INTEGER NOT NULL,
            kind TEXT NOT NULL,
            subject TEXT NOT NULL,
            detail TEXT NOT NULL,
            policy_digest TEXT NOT NULL)""",
        """CREATE TRIGGER leaf_is_final BEFORE UPDATE ON leaf
            BEGIN SELECT RAISE(ABORT, 'a leaf is never changed'); END""",
        """CREATE TRIGGER leaf_stays BEFORE DELETE ON leaf
            BEGIN SELECT RAISE(ABORT, 'a leaf is never removed'); END""",
    ),
    (
        "ALTER TABLE attempt ADD COLUMN lease_boot_id TEXT",
        "ALTER TABLE attempt ADD COLUMN fenced_by INTEGER",
        "ALTER TABLE worktree ADD COLUMN token INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE admission(
            only INTEGER PRIMARY KEY CHECK(only = 1),
            state TEXT NOT NULL,
            deadline_ms INTEGER)""",
        "CREATE INDEX leaf_subject ON leaf(subject)",
    ),
)
SCHEMA_VERSION: Final = len(MIGRATIONS)


class SchemaRefused(Exception):
    """The file is no journal of ours, or of a newer version; the text is a sentence for a person."""


def migrate(db: sqlite3.Connection) -> None:
    """Bring the tables to SCHEMA_VERSION, one transaction for each step. Raises SchemaRefused or sqlite3.Error."""
    tables = db.execute("SELECT count(*), coalesce(sum(name = 'migration'), 0) FROM sqlite_schema").fetchone()
    if tables[0] and not tables[1]:
        raise SchemaRefused("the file is a database, but no journal of a runner")
    db.execute("CREATE TABLE IF NOT EXISTS migration(n INTEGER PRIMARY KEY)")
    (found,) = db.execute("SELECT coalesce(max(n), 0) FROM migration").fetchone()
    if found > SCHEMA_VERSION:
        raise SchemaRefused(
            f"the journal has schema version {found}, this runner knows up to {SCHEMA_VERSION}: run a newer runner"
        )
    for number in range(found + 1, SCHEMA_VERSION + 1):
        db.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[number - 1]:
            db.execute(statement)
        db.execute("INSERT INTO migration(n) VALUES(?)", (number,))
        db.execute("COMMIT")
