"""Rows to SQL and back: every statement of the control plane that touches one table.

Each function takes a connection and runs inside the caller's transaction (`store`), or reads committed rows.
"""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from controlplane.limits import EVENTS_PER_RUNNER_MAX
from controlplane.rows import (
    CommandRow,
    EventRow,
    ExecutionRow,
    ExecutionState,
    IntentRow,
    IntentState,
    JoinTokenRow,
    LogRow,
    RunnerRow,
    StatementRow,
    WorktreeRow,
    WorktreeState,
)
from protocol.ids import Digest
from protocol.replay import Mark

Db = sqlite3.Connection


# --- runners -----------------------------------------------------------------------------------------------------


def put_runner(db: Db, row: RunnerRow) -> None:
    """Write a runner whole."""
    db.execute(
        "INSERT OR REPLACE INTO runners VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.id, row.name, row.x, row.seal_x, json.dumps(row.labels), row.living, row.inc, row.certificate,
            row.session, row.ctl.hw, row.ctl.head, row.acked_hw, row.out_hw, row.keyset_version, row.enrolled_ms,
            row.last_seen_ms, row.version, row.platform, row.hostname, row.policy_digest, row.attempts,
        ),
    )  # fmt: skip


def runner(db: Db, runner_id: str) -> RunnerRow | None:
    """A runner by id."""
    found = db.execute("SELECT * FROM runners WHERE id = ?", (runner_id,)).fetchone()
    return None if found is None else _runner(found)


def living_named(db: Db, name: str) -> RunnerRow | None:
    """The living runner of a name."""
    found = db.execute("SELECT * FROM runners WHERE name = ? AND living = 1", (name,)).fetchone()
    return None if found is None else _runner(found)


def living_keyed(db: Db, x: str) -> list[RunnerRow]:
    """Living runners with a key."""
    return [_runner(found) for found in db.execute("SELECT * FROM runners WHERE x = ? AND living = 1", (x,))]


def runners(db: Db) -> list[RunnerRow]:
    """Every runner."""
    return [_runner(found) for found in db.execute("SELECT * FROM runners ORDER BY id")]


def _runner(found: sqlite3.Row) -> RunnerRow:
    fields: dict[str, Any] = dict(found)
    ctl = Mark(fields.pop("ctl_hw"), Digest(fields.pop("ctl_head")))
    labels, living = json.loads(fields.pop("labels")), bool(fields.pop("living"))
    return RunnerRow(ctl=ctl, labels=labels, living=living, **fields)


def put_join_token(db: Db, row: JoinTokenRow) -> None:
    """Write a join token whole."""
    db.execute(
        "INSERT OR REPLACE INTO join_tokens VALUES (?,?,?,?,?,?)",
        (row.hash, row.name, json.dumps(row.labels), row.expires_ms, row.used_by, row.runner_id),
    )


def join_token(db: Db, token_hash: str) -> JoinTokenRow | None:
    """A join token by its hash."""
    found = db.execute("SELECT * FROM join_tokens WHERE hash = ?", (token_hash,)).fetchone()
    if found is None:
        return None
    fields: dict[str, Any] = dict(found)
    return JoinTokenRow(labels=json.loads(fields.pop("labels")), **fields)


# --- intents and commands ----------------------------------------------------------------------------------------


def add_intent(db: Db, row: IntentRow) -> None:
    """Queue an intent behind the others."""
    db.execute(
        "INSERT INTO intents (cmd_id, runner_id, kind, subject, args, lease, state, created_ms, expires_ms, signed_times)"
        " VALUES (?,?,?,?,?,?,?,?,?,?)",
        (
            row.cmd_id, row.runner_id, row.kind, row.subject, row.args, row.lease, row.state, row.created_ms,
            row.expires_ms, row.signed_times,
        ),
    )  # fmt: skip


def put_intent_state(db: Db, row: IntentRow) -> None:
    """Write what of an intent changes."""
    db.execute(
        "UPDATE intents SET state = ?, signed_times = ? WHERE cmd_id = ?", (row.state, row.signed_times, row.cmd_id)
    )


def intent(db: Db, cmd_id: str) -> IntentRow | None:
    """An intent by its command id."""
    found = db.execute("SELECT * FROM intents WHERE cmd_id = ?", (cmd_id,)).fetchone()
    return None if found is None else _intent(found)


def queued_intents(db: Db, runner_id: str, kinds: tuple[str, ...], limit: int) -> list[IntentRow]:
    """The oldest queued intents of a runner, of these kinds."""
    marks = ",".join("?" * len(kinds))
    sql = (
        f"SELECT * FROM intents WHERE runner_id = ? AND state = 'queued' AND kind IN ({marks}) ORDER BY ordinal LIMIT ?"  # noqa: S608
    )
    return [_intent(found) for found in db.execute(sql, (runner_id, *kinds, limit))]


def overdue_intents(db: Db, now_ms: int, limit: int) -> list[IntentRow]:
    """Queued intents whose time ran out."""
    sql = "SELECT * FROM intents WHERE state = 'queued' AND expires_ms <= ? ORDER BY expires_ms LIMIT ?"
    return [_intent(found) for found in db.execute(sql, (now_ms, limit))]


def intents_in(db: Db, runner_id: str, state: IntentState) -> list[IntentRow]:
    """Intents of a runner in a state."""
    sql = "SELECT * FROM intents WHERE runner_id = ? AND state = ? ORDER BY ordinal"
    return [_intent(found) for found in db.execute(sql, (runner_id, state))]


def queued_count(db: Db, runner_id: str) -> int:
    """How many intents of a runner are queued."""
    sql = "SELECT count(*) FROM intents WHERE runner_id = ? AND state = 'queued'"
    return int(db.execute(sql, (runner_id,)).fetchone()[0])


def _intent(found: sqlite3.Row) -> IntentRow:
    fields: dict[str, Any] = dict(found)
    del fields["ordinal"]
    return IntentRow(state=IntentState(fields.pop("state")), **fields)


def add_command(db: Db, row: CommandRow) -> None:
    """Remember a signed command."""
    db.execute(
        "INSERT INTO commands VALUES (?,?,?,?,?,?,?)",
        (row.digest, row.cmd_id, row.runner_id, row.inc, row.seq, row.payload, row.signed_ms),
    )


def command_at(db: Db, runner_id: str, inc: int, seq: int) -> CommandRow | None:
    """The command signed under a number."""
    sql = "SELECT * FROM commands WHERE runner_id = ? AND inc = ? AND seq = ?"
    found = db.execute(sql, (runner_id, inc, seq)).fetchone()
    return None if found is None else CommandRow(**dict(found))


def commands_above(db: Db, runner_id: str, inc: int, hw: int) -> list[CommandRow]:
    """Numbered commands of an incarnation above a mark, in order."""
    sql = "SELECT * FROM commands WHERE runner_id = ? AND inc = ? AND seq > ? ORDER BY seq"
    return [CommandRow(**dict(found)) for found in db.execute(sql, (runner_id, inc, hw))]


def open_safety(db: Db, runner_id: str, inc: int) -> list[CommandRow]:
    """Safety commands of an incarnation without a receipt."""
    sql = (
        "SELECT c.* FROM intents i JOIN commands c ON c.cmd_id = i.cmd_id"
        " WHERE i.runner_id = ? AND i.state = 'sent' AND c.inc = ? AND c.seq IS NULL"
    )
    return [CommandRow(**dict(found)) for found in db.execute(sql, (runner_id, inc))]


def was_sent(db: Db, runner_id: str, cmd_id: str) -> bool:
    """Whether a command of this id was signed for the runner."""
    sql = "SELECT 1 FROM commands WHERE cmd_id = ? AND runner_id = ?"
    return db.execute(sql, (cmd_id, runner_id)).fetchone() is not None


# --- executions and worktrees ------------------------------------------------------------------------------------


def put_execution(db: Db, row: ExecutionRow) -> None:
    """Write an execution whole."""
    db.execute(
        "INSERT OR REPLACE INTO executions VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.id, row.runner_id, row.start_token, row.state, json.dumps(row.argv), row.cwd, row.worktree_id, row.cmd_id,
            row.stop_cmd_id, row.created_ms, row.receipt, row.settlement, row.settlement_digest, row.exit_status,
            row.reason, row.detail,
        ),
    )  # fmt: skip


def execution(db: Db, execution_id: str) -> ExecutionRow | None:
    """An execution by id."""
    found = db.execute("SELECT * FROM executions WHERE id = ?", (execution_id,)).fetchone()
    return None if found is None else _execution(found)


def executions(db: Db, runner_id: str | None, state: str | None, limit: int) -> list[ExecutionRow]:
    """Executions, newest first."""
    sql = (
        "SELECT * FROM executions WHERE (?1 IS NULL OR runner_id = ?1) AND (?2 IS NULL OR state = ?2)"
        " ORDER BY created_ms DESC, id DESC LIMIT ?3"
    )
    return [_execution(found) for found in db.execute(sql, (runner_id, state, limit))]


def living_executions(db: Db) -> Iterator[ExecutionRow]:
    """Executions that are not final."""
    sql = "SELECT * FROM executions WHERE state IN ('queued', 'sent', 'running')"
    return (_execution(found) for found in db.execute(sql))


def _execution(found: sqlite3.Row) -> ExecutionRow:
    fields: dict[str, Any] = dict(found)
    argv, state = tuple(json.loads(fields.pop("argv"))), ExecutionState(fields.pop("state"))
    return ExecutionRow(argv=argv, state=state, **fields)


def put_worktree(db: Db, row: WorktreeRow) -> None:
    """Write a worktree whole."""
    db.execute(
        "INSERT OR REPLACE INTO worktrees VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.id, row.runner_id, row.state, row.repo, row.base, row.branch, row.path, row.head, row.cmd_id,
            row.created_ms, row.reason, row.detail,
        ),
    )  # fmt: skip


def worktree(db: Db, worktree_id: str) -> WorktreeRow | None:
    """A worktree by id."""
    found = db.execute("SELECT * FROM worktrees WHERE id = ?", (worktree_id,)).fetchone()
    return None if found is None else _worktree(found)


def worktrees(db: Db, runner_id: str | None, limit: int) -> list[WorktreeRow]:
    """Worktrees, newest first."""
    sql = "SELECT * FROM worktrees WHERE (?1 IS NULL OR runner_id = ?1) ORDER BY created_ms DESC, id DESC LIMIT ?2"
    return [_worktree(found) for found in db.execute(sql, (runner_id, limit))]


def _worktree(found: sqlite3.Row) -> WorktreeRow:
    fields: dict[str, Any] = dict(found)
    return WorktreeRow(state=WorktreeState(fields.pop("state")), **fields)


def grant_token(db: Db, res: str) -> int:
    """The next lease token of a resource."""
    sql = "INSERT INTO lease_tokens VALUES (?, 1) ON CONFLICT (res) DO UPDATE SET token = token + 1 RETURNING token"
    return int(db.execute(sql, (res,)).fetchone()[0])


def raise_token(db: Db, res: str, token: int) -> None:
    """Never grant `token` or a lower one again: a runner has told of it."""
    sql = "INSERT INTO lease_tokens VALUES (?1, ?2) ON CONFLICT (res) DO UPDATE SET token = max(token, ?2)"
    db.execute(sql, (res, token))


# --- what runners tell -------------------------------------------------------------------------------------------


def answered(db: Db, runner_id: str, out_seq: int, body: str) -> tuple[bool, str | None]:
    """Whether these bytes were answered under this number, and the reason if they were refused."""
    sql = "SELECT reason FROM answered WHERE runner_id = ? AND out_seq = ? AND body = ?"
    found = db.execute(sql, (runner_id, out_seq, body)).fetchone()
    return (False, None) if found is None else (True, found[0])


def put_answered(db: Db, runner_id: str, out_seq: int, body: str, reason: str | None) -> None:
    """Remember a final answer."""
    db.execute("INSERT OR IGNORE INTO answered VALUES (?,?,?,?)", (runner_id, out_seq, body, reason))


def put_statement(db: Db, row: StatementRow) -> None:
    """Keep a statement; the same one again changes nothing."""
    db.execute(
        "INSERT OR IGNORE INTO statements VALUES (?,?,?,?,?,?,?,?)",
        (
            row.digest, row.runner_id, row.kind, row.cmd_id, row.subject, row.envelope, row.payload, row.received_ms,
        ),
    )  # fmt: skip


def statements(db: Db, about: str, limit: int) -> list[StatementRow]:
    """Statements about an execution, worktree or command, oldest first."""
    sql = (
        "SELECT * FROM (SELECT * FROM statements WHERE subject = ?1 UNION SELECT * FROM statements WHERE cmd_id = ?1)"
        " ORDER BY received_ms, kind, digest LIMIT ?2"
    )
    return [StatementRow(**dict(found)) for found in db.execute(sql, (about, limit))]


def add_event(db: Db, row: EventRow) -> None:
    """Append an event; of each runner the newest are kept."""
    added = db.execute(
        "INSERT INTO events (runner_id, at_ms, kind, reason, detail, digest) VALUES (?,?,?,?,?,?)",
        (row.runner_id, row.at_ms, row.kind, row.reason, row.detail, row.digest),
    )
    assert added.lastrowid is not None, "an ordinal is given by the table"
    sql = (
        "DELETE FROM events WHERE runner_id = ?1 AND ordinal <= (SELECT ordinal FROM events WHERE runner_id = ?1"
        " ORDER BY ordinal DESC LIMIT 1 OFFSET ?2)"
    )
    db.execute(sql, (row.runner_id, EVENTS_PER_RUNNER_MAX))


def events(db: Db, runner_id: str | None, limit: int) -> list[EventRow]:
    """Events, newest first."""
    sql = (
        "SELECT runner_id, at_ms, kind, reason, detail, digest FROM events WHERE (?1 IS NULL OR runner_id = ?1)"
        " ORDER BY ordinal DESC LIMIT ?2"
    )
    return [EventRow(**dict(found)) for found in db.execute(sql, (runner_id, limit))]


def put_log(db: Db, row: LogRow) -> None:
    """Write how much of a log is durable."""
    db.execute(
        "INSERT OR REPLACE INTO logs VALUES (?,?,?,?,?)",
        (row.attempt, row.runner_id, row.end, row.complete, json.dumps(row.gaps)),
    )


def log(db: Db, attempt: str) -> LogRow | None:
    """How much of an attempt's log is durable."""
    found = db.execute("SELECT * FROM logs WHERE attempt = ?", (attempt,)).fetchone()
    if found is None:
        return None
    fields: dict[str, Any] = dict(found)
    gaps = tuple((start, end) for start, end in json.loads(fields.pop("gaps")))
    return LogRow(gaps=gaps, complete=bool(fields.pop("complete")), **fields)
