"""The writer thread: groups, isolation, durability."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from controlplane import tables, told
from controlplane.database import SCHEMA_VERSION, Database
from controlplane.errors import StartRefused, StoreFailed
from controlplane.rows import EventRow
from controlplane.tables import Db


def add(db: Db, kind: str = "kind") -> None:
    """One row."""
    told.add_event(db, EventRow(runner_id="rn", at_ms=1, kind=kind))


def adds(kind: str) -> Callable[[Db], None]:
    """A closure that adds one row."""
    return lambda db: add(db, kind)


def kinds(database: Database) -> list[str]:
    """Committed rows."""
    return [row.kind for row in reversed(told.events(database.reader, None, 1000))]


async def test_what_waits_is_committed_together(tmp_path: Path) -> None:
    """A hundred askers at once cost a few transactions."""
    database = Database(tmp_path / "db")
    await asyncio.gather(*[database.write(adds(f"k{n}")) for n in range(100)])
    assert kinds(database) == [f"k{n}" for n in range(100)]
    assert database.commits < 30
    await database.close()


async def test_one_failing_closure_does_not_poison_the_others(tmp_path: Path) -> None:
    """Its own rows are rolled back, its neighbours stay."""

    def broken(db: Db) -> None:
        add(db, "half")
        raise ValueError("no")

    database = Database(tmp_path / "db")
    first, bad, last = database.write(add), database.write(broken), database.write(add)
    await first
    with pytest.raises(ValueError, match="no"):
        await bad
    await last
    assert kinds(database) == ["kind", "kind"]
    await database.close()


async def test_the_consequence_happens_though_the_asker_is_gone(tmp_path: Path) -> None:
    """A cancelled request whose transaction was on its way still updates memory."""
    database, seen = Database(tmp_path / "db"), asyncio.Event()
    asked = database.write(add, lambda _: seen.set())
    asked.cancel()
    await asyncio.wait_for(seen.wait(), 5)
    await database.close()


async def test_consequences_come_in_the_order_of_the_transactions(tmp_path: Path) -> None:
    """So memory can never be older than the file."""

    def number(n: int, db: Db) -> int:
        add(db)
        return n

    database, order = Database(tmp_path / "db"), list[int]()
    await asyncio.gather(*[database.write(partial(number, n), order.append) for n in range(50)])
    assert order == list(range(50))
    await database.close()


async def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    """A process dies by KILL right after the answer; the row is there."""
    script = (
        "import asyncio, os, sys, pathlib\n"
        "from controlplane.database import Database\n"
        "from controlplane import told\n"
        "from controlplane.rows import EventRow\n"
        "async def main():\n"
        "    database = Database(pathlib.Path(sys.argv[1]))\n"
        "    await database.write(lambda db: told.add_event(db, EventRow(runner_id='rn', at_ms=1, kind='last')))\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    path = tmp_path / "db"
    died = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", script, str(path)], cwd=Path.cwd(), check=False, env=dict(os.environ)
    )
    assert died.returncode == -9
    database = Database(path)
    assert kinds(database) == ["last"]
    await database.close()


async def test_a_newer_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """An older control plane must not touch it."""
    path = tmp_path / "db"
    with sqlite3.connect(path) as made:
        made.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    made.close()
    with pytest.raises(StartRefused, match="newer version"):
        Database(path)


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    """With the file's name."""
    (tmp_path / "db").write_bytes(b"not a database, surely" * 100)
    with pytest.raises(StartRefused, match="db"):
        Database(tmp_path / "db")


async def test_a_disk_that_does_not_take_it_fails_the_askers(tmp_path: Path) -> None:
    """Nothing is answered as done, and the next one may succeed."""
    database = Database(tmp_path / "db")
    await database.write(lambda db: db.execute("PRAGMA max_page_count = 1").close())

    def large(db: Db) -> None:
        for n in range(2000):
            add(db, f"{n:0200}")

    with pytest.raises((StoreFailed, sqlite3.Error)):
        await database.write(large)
    await database.write(lambda db: db.execute("PRAGMA max_page_count = 1000000").close())
    await database.write(add)
    assert kinds(database) == ["kind"]
    await database.close()


async def test_a_closed_store_refuses(tmp_path: Path) -> None:
    """It does not hang."""
    database = Database(tmp_path / "db")
    await database.close()
    with pytest.raises(StoreFailed):
        await database.write(add)


async def test_events_of_one_runner_are_bounded(tmp_path: Path) -> None:
    """The newest thousand stay, others' are untouched."""
    database = Database(tmp_path / "db")
    await database.write(lambda db: told.add_event(db, EventRow(runner_id="other", at_ms=1, kind="kept")))
    await asyncio.gather(*[database.write(adds(f"k{n}")) for n in range(1100)])
    rows = told.events(database.reader, "rn", 5000)
    assert (len(rows), rows[0].kind, rows[-1].kind) == (1000, "k1099", "k100")
    assert len(told.events(database.reader, "other", 10)) == 1
    await database.close()


VERSION_1 = """
CREATE TABLE runners (
  id TEXT PRIMARY KEY, name TEXT NOT NULL, x TEXT NOT NULL, seal_x TEXT NOT NULL, labels TEXT NOT NULL, living INTEGER NOT NULL,
  inc INTEGER NOT NULL, certificate TEXT NOT NULL, session TEXT NOT NULL, ctl_hw INTEGER NOT NULL, ctl_head TEXT NOT NULL,
  acked_hw INTEGER NOT NULL, out_hw INTEGER NOT NULL, keyset_version INTEGER NOT NULL, enrolled_ms INTEGER NOT NULL,
  last_seen_ms INTEGER NOT NULL, version TEXT NOT NULL, platform TEXT NOT NULL, hostname TEXT NOT NULL,
  policy_digest TEXT NOT NULL, attempts INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX runners_living_name ON runners (name) WHERE living = 1;
CREATE TABLE join_tokens (
  hash TEXT PRIMARY KEY, name TEXT, labels TEXT NOT NULL, expires_ms INTEGER NOT NULL, used_by TEXT, runner_id TEXT
) STRICT, WITHOUT ROWID;
CREATE TABLE intents (
  ordinal INTEGER PRIMARY KEY, cmd_id TEXT NOT NULL UNIQUE, runner_id TEXT NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,
  args BLOB NOT NULL, lease BLOB, state TEXT NOT NULL, created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL,
  signed_times INTEGER NOT NULL
) STRICT;
CREATE INDEX intents_queued ON intents (runner_id, ordinal) WHERE state = 'queued';
CREATE INDEX intents_deadline ON intents (expires_ms) WHERE state = 'queued';
CREATE INDEX intents_sent ON intents (runner_id) WHERE state = 'sent';
CREATE TABLE commands (
  digest TEXT PRIMARY KEY, cmd_id TEXT NOT NULL, runner_id TEXT NOT NULL, inc INTEGER NOT NULL, seq INTEGER, payload BLOB NOT NULL,
  signed_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX commands_number ON commands (runner_id, inc, seq) WHERE seq IS NOT NULL;
CREATE INDEX commands_of ON commands (cmd_id);
CREATE TABLE executions (
  id TEXT PRIMARY KEY, runner_id TEXT NOT NULL, start_token INTEGER NOT NULL, state TEXT NOT NULL, argv TEXT NOT NULL, cwd TEXT,
  worktree_id TEXT, cmd_id TEXT NOT NULL, stop_cmd_id TEXT, created_ms INTEGER NOT NULL, receipt TEXT, settlement TEXT,
  settlement_digest TEXT, exit_status INTEGER, reason TEXT, detail TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX executions_newest ON executions (created_ms, id);
CREATE INDEX executions_living ON executions (runner_id) WHERE state IN ('queued', 'sent', 'running');
CREATE TABLE worktrees (
  id TEXT PRIMARY KEY, runner_id TEXT NOT NULL, state TEXT NOT NULL, repo TEXT NOT NULL, base TEXT NOT NULL, branch TEXT, path TEXT,
  head TEXT, cmd_id TEXT NOT NULL, created_ms INTEGER NOT NULL, reason TEXT, detail TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE lease_tokens (res TEXT PRIMARY KEY, token INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE answered (
  runner_id TEXT NOT NULL, out_seq INTEGER NOT NULL, body TEXT NOT NULL, reason TEXT, PRIMARY KEY (runner_id, out_seq, body)
) STRICT, WITHOUT ROWID;
CREATE TABLE statements (
  digest TEXT NOT NULL, runner_id TEXT NOT NULL, kind TEXT NOT NULL, cmd_id TEXT NOT NULL, subject TEXT NOT NULL,
  envelope TEXT NOT NULL, payload TEXT NOT NULL, received_ms INTEGER NOT NULL, PRIMARY KEY (digest, runner_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX statements_subject ON statements (subject);
CREATE INDEX statements_cmd ON statements (cmd_id);
CREATE TABLE events (
  ordinal INTEGER PRIMARY KEY, runner_id TEXT NOT NULL, at_ms INTEGER NOT NULL, kind TEXT NOT NULL, reason TEXT,
  detail TEXT NOT NULL, digest TEXT
) STRICT;
CREATE INDEX events_of ON events (runner_id, ordinal);
CREATE TABLE logs (
  attempt TEXT PRIMARY KEY, runner_id TEXT NOT NULL, "end" INTEGER NOT NULL, complete INTEGER NOT NULL, gaps TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE idempotency (
  key TEXT PRIMARY KEY, request TEXT NOT NULL, status INTEGER NOT NULL, response TEXT NOT NULL, at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (at_ms);
INSERT INTO runners VALUES ('rn', 'laptop', 'x', 's', '{}', 1, 2, 'c', '', 3, 'h', 3, 4, 1, 5, 6, 'v', 'linux', 'box', 'd', 0);
INSERT INTO executions VALUES
  ('ex_1', 'rn', 1, 'running', '["true"]', '/srv', NULL, 'cm_1', NULL, 7, '{}', NULL, NULL, NULL, NULL, '');
INSERT INTO intents VALUES (1, 'cm_1', 'rn', 'execution.start', 'ex_1', CAST('{"start_token":1}' AS BLOB), NULL, 'sent', 7, 8, 1);
INSERT INTO worktrees VALUES ('wt_1', 'rn', 'ready', '/r', 'main', NULL, '/w', 'f', 'cm_0', 7, NULL, '');
PRAGMA user_version = 1;
"""
"""The tables as the first version made them, and a row of each that changed."""


def shape(path: Path) -> dict[str, object]:
    """Columns and indexes of every table."""
    with sqlite3.connect(path) as db:
        names = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")]
        found: dict[str, object] = {}
        for name in names:
            columns = db.execute(f"PRAGMA table_xinfo({name})").fetchall()
            indexes = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = ?", (name,))
            found[name] = (columns, sorted((row[0], row[1]) for row in indexes))
    db.close()
    return found


async def test_a_database_of_version_1_opens_with_what_is_in_it(tmp_path: Path) -> None:
    """Every row is there, with what it says of the new columns; a second start changes nothing."""
    path = tmp_path / "old"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1)
    old.close()
    for _ in range(2):
        database = Database(path)
        runner, execution = tables.runner(database.reader, "rn"), tables.execution(database.reader, "ex_1")
        assert runner is not None and execution is not None
        assert (runner.name, runner.ctl.hw, runner.instance, runner.retired) == ("laptop", 3, "", ())
        assert (execution.state, execution.token, execution.receipt, execution.verdict) == ("running", 1, "{}", None)
        worktree, intent = tables.worktree(database.reader, "wt_1"), tables.intent(database.reader, "cm_1")
        assert worktree is not None and intent is not None
        assert (worktree.retry_after_ms, intent.actor, intent.start_token) == (None, None, 1)
        await database.close()
    database = Database(path)
    assert execution is not None
    ended = replace(execution, settlement="{}")
    assert await database.write(lambda db: tables.settle(db, ended))
    await database.close()
    database = Database(tmp_path / "new")
    await database.close()
    assert shape(path) == shape(tmp_path / "new")


async def test_a_step_that_fails_leaves_the_old_version_as_it_was(tmp_path: Path) -> None:
    """All of a step, or nothing: the older control plane still opens it."""
    path = tmp_path / "old"
    with sqlite3.connect(path) as old:
        old.executescript(VERSION_1 + "CREATE TABLE attempts (in_the_way TEXT);")
    old.close()
    before = shape(path)
    with pytest.raises(StartRefused, match="old"):
        Database(path)
    assert shape(path) == before
    with sqlite3.connect(path) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (1,)
    old.close()
