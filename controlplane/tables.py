"""Rows to SQL and back: runners, intents, commands, executions and their attempts, worktrees, tokens.

Each function takes a connection and runs inside the caller's transaction (`store`), or reads committed rows.
"""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from controlplane.rows import (
    CommandRow,
    ExecutionRow,
    ExecutionState,
    IntentRow,
    IntentState,
    JoinTokenRow,
    RunnerRow,
    WorktreeRow,
    WorktreeState,
)
from protocol.ids import Digest
from protocol.replay import Mark

Db = sqlite3.Connection
_ATTEMPT_TABLES: Final = ("executions", "attempts")
"""An attempt is in exactly one of them: the current one in the first."""
_EXECUTION: Final = (
    "id", "runner_id", "start_token", "state", "argv", "cwd", "worktree_id", "cmd_id", "stop_cmd_id", "created_ms",
    "receipt", "settlement", "settlement_digest", "exit_status", "reason", "detail", "lease_token", "lease_refused",
    "verdict",
)  # fmt: skip
"""Columns of both, in their order."""
_COLUMNS: Final = ", ".join(_EXECUTION)
_INTO_EXECUTIONS: Final = f"INTO executions VALUES ({','.join('?' * len(_EXECUTION))})"
_INTO_ATTEMPTS: Final = f"INTO attempts VALUES ({','.join('?' * len(_EXECUTION))})"


# --- runners -----------------------------------------------------------------------------------------------------


def put_runner(db: Db, row: RunnerRow) -> None:
    """Write a runner whole."""
    db.execute(
        "INSERT OR REPLACE INTO runners VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.id, row.name, row.x, row.seal_x, json.dumps(row.labels), row.living, row.inc, row.certificate,
            row.session, row.ctl.hw, row.ctl.head, row.acked_hw, row.out_hw, row.keyset_version, row.enrolled_ms,
            row.last_seen_ms, row.version, row.platform, row.hostname, row.policy_digest, row.attempts,
            row.instance, row.dial, row.boot_id, json.dumps(row.retired), row.conflict,
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
    retired = tuple(json.loads(fields.pop("retired")))
    return RunnerRow(ctl=ctl, labels=labels, living=living, retired=retired, **fields)


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
        "INSERT INTO intents (cmd_id, runner_id, kind, subject, args, lease, state, created_ms, expires_ms, signed_times,"
        " actor, waits_for) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.cmd_id, row.runner_id, row.kind, row.subject, row.args, row.lease, row.state, row.created_ms,
            row.expires_ms, row.signed_times, row.actor, row.waits_for,
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


def is_queued(db: Db, runner_id: str, kinds: tuple[str, ...]) -> bool:
    """Whether an intent of one of these kinds is queued for a runner."""
    marks = ",".join("?" * len(kinds))
    sql = f"SELECT 1 FROM intents WHERE runner_id = ? AND state = 'queued' AND kind IN ({marks}) LIMIT 1"  # noqa: S608
    return db.execute(sql, (runner_id, *kinds)).fetchone() is not None


def held_intents(db: Db) -> list[IntentRow]:
    """Intents that wait for the lease of another attempt."""
    return [_intent(found) for found in db.execute("SELECT * FROM intents WHERE state = 'held' ORDER BY ordinal")]


def held_start(db: Db, execution_id: str) -> IntentRow | None:
    """The start of an execution's current attempt, while it waits for the lease of another."""
    sql = "SELECT i.* FROM executions e JOIN intents i ON i.cmd_id = e.cmd_id WHERE e.id = ? AND i.state = 'held'"
    found = db.execute(sql, (execution_id,)).fetchone()
    return None if found is None else _intent(found)


def open_intents(db: Db, subject: str, kind: str) -> list[IntentRow]:
    """Intents of a kind about a subject that have no answer yet."""
    sql = "SELECT * FROM intents WHERE subject = ? AND kind = ? AND state IN ('queued', 'sent') ORDER BY ordinal"
    return [_intent(found) for found in db.execute(sql, (subject, kind))]


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


def command_of(db: Db, runner_id: str, inc: int, cmd_id: str) -> CommandRow | None:
    """What was signed under a `cmd_id` for an incarnation of a runner."""
    sql = "SELECT * FROM commands WHERE cmd_id = ? AND runner_id = ? AND inc = ?"
    found = db.execute(sql, (cmd_id, runner_id, inc)).fetchone()
    return None if found is None else CommandRow(**dict(found))


def was_sent(db: Db, runner_id: str, cmd_id: str) -> bool:
    """Whether a command of this id was signed for the runner."""
    sql = "SELECT 1 FROM commands WHERE cmd_id = ? AND runner_id = ?"
    return db.execute(sql, (cmd_id, runner_id)).fetchone() is not None


# --- executions and worktrees ------------------------------------------------------------------------------------


def add_execution(db: Db, row: ExecutionRow) -> None:
    """Write a new execution."""
    db.execute(f"INSERT {_INTO_EXECUTIONS}", _values(row))


def put_execution(db: Db, row: ExecutionRow) -> None:
    """Write what of an attempt may change. How it ended is written by `settle` alone, and nothing is behind that."""
    for table in _ATTEMPT_TABLES:
        there = db.execute(
            f"UPDATE {table} SET stop_cmd_id = ?, receipt = ?, lease_token = ?, lease_refused = ?"  # noqa: S608
            " WHERE id = ? AND start_token = ?",
            (row.stop_cmd_id, row.receipt, row.lease_token, row.lease_refused, row.id, row.start_token),
        ).rowcount
        db.execute(
            f"UPDATE {table} SET state = ?, exit_status = ?, reason = ?, detail = ?, verdict = ?"  # noqa: S608
            " WHERE id = ? AND start_token = ? AND settlement IS NULL",
            (row.state, row.exit_status, row.reason, row.detail, row.verdict, row.id, row.start_token),
        )
        if there:
            return  # An attempt is in one of the tables.


def settle(db: Db, row: ExecutionRow) -> bool:
    """Write how an attempt ended, if nobody has: compare and set. False when it was settled before."""
    changed = 0
    for table in _ATTEMPT_TABLES:
        changed += db.execute(
            f"UPDATE {table} SET state = ?, settlement = ?, settlement_digest = ?, exit_status = ?, reason = ?, detail = ?,"  # noqa: S608
            " verdict = ? WHERE id = ? AND start_token = ? AND settlement IS NULL",
            (
                row.state, row.settlement, row.settlement_digest, row.exit_status, row.reason, row.detail, row.verdict,
                row.id, row.start_token,
            ),
        ).rowcount  # fmt: skip
        if changed:
            break
    return changed == 1


def add_attempt(db: Db, row: ExecutionRow) -> None:
    """Write an attempt where it belongs: as the first of its execution, as the current one, or among the earlier ones."""
    current = execution(db, row.id)
    if current is None:
        add_execution(db, row)
    elif current.start_token < row.start_token:
        supersede(db, row)
    else:
        db.execute(f"INSERT {_INTO_ATTEMPTS}", _values(row))


def supersede(db: Db, row: ExecutionRow) -> None:
    """A later attempt becomes the current one; the one before it is kept in the history."""
    db.execute(f"INSERT INTO attempts ({_COLUMNS}) SELECT {_COLUMNS} FROM executions WHERE id = ?", (row.id,))  # noqa: S608
    db.execute(f"INSERT OR REPLACE {_INTO_EXECUTIONS}", _values(row))


def execution(db: Db, execution_id: str) -> ExecutionRow | None:
    """An execution by id, as its current attempt."""
    found = db.execute("SELECT * FROM executions WHERE id = ?", (execution_id,)).fetchone()
    return None if found is None else _execution(found)


def attempt(db: Db, execution_id: str, start_token: int | None) -> ExecutionRow | None:
    """One attempt of an execution, the current one or an earlier one."""
    for table in _ATTEMPT_TABLES:
        sql = f"SELECT * FROM {table} WHERE id = ? AND start_token = ?"  # noqa: S608
        found = db.execute(sql, (execution_id, start_token)).fetchone()
        if found is not None:
            return _execution(found)
    return None


def owner(db: Db, execution_id: str, start_token: int) -> str | None:
    """The runner that an attempt belongs to."""
    for table in _ATTEMPT_TABLES:
        sql = f"SELECT runner_id FROM {table} WHERE id = ? AND start_token = ?"  # noqa: S608
        found = db.execute(sql, (execution_id, start_token)).fetchone()
        if found is not None:
            return str(found[0])
    return None


def earlier_attempts(db: Db, execution_id: str) -> list[ExecutionRow]:
    """The attempts of an execution before the current one, oldest first."""
    sql = "SELECT * FROM attempts WHERE id = ? ORDER BY start_token"
    return [_execution(found) for found in db.execute(sql, (execution_id,))]


def attempts(db: Db, execution_id: str) -> list[ExecutionRow]:
    """Every attempt of an execution, the current one last."""
    current = execution(db, execution_id)
    return [] if current is None else [*earlier_attempts(db, execution_id), current]


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


def living_earlier(db: Db) -> Iterator[ExecutionRow]:
    """Earlier attempts that are not final."""
    sql = "SELECT * FROM attempts WHERE state IN ('queued', 'sent', 'running')"
    return (_execution(found) for found in db.execute(sql))


def _values(row: ExecutionRow) -> tuple[Any, ...]:
    values = {name: getattr(row, name) for name in _EXECUTION}
    return tuple((values | {"argv": json.dumps(row.argv)}).values())


def _execution(found: sqlite3.Row) -> ExecutionRow:
    fields: dict[str, Any] = dict(found)
    argv, state = tuple(json.loads(fields.pop("argv"))), ExecutionState(fields.pop("state"))
    return ExecutionRow(argv=argv, state=state, **fields)


def put_worktree(db: Db, row: WorktreeRow) -> None:
    """Write a worktree whole."""
    db.execute(
        "INSERT OR REPLACE INTO worktrees VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            row.id, row.runner_id, row.state, row.repo, row.base, row.branch, row.path, row.head, row.cmd_id,
            row.created_ms, row.reason, row.detail, row.retry_after_ms,
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


def grant_token(db: Db, res: str, floor: int = 1) -> int:
    """The next lease token of a resource, at least `floor`."""
    sql = (
        "INSERT INTO lease_tokens VALUES (?1, ?2)"
        " ON CONFLICT (res) DO UPDATE SET token = max(token + 1, ?2) RETURNING token"
    )
    return int(db.execute(sql, (res, floor)).fetchone()[0])


def raise_token(db: Db, res: str, token: int) -> None:
    """Never grant `token` or a lower one again: a runner has told of it."""
    sql = "INSERT INTO lease_tokens VALUES (?1, ?2) ON CONFLICT (res) DO UPDATE SET token = max(token, ?2)"
    db.execute(sql, (res, token))
