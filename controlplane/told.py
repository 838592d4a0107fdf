"""What runners tell, to SQL and back: answers, statements, events, how far logs have come.

Each function takes a connection and runs inside the caller's transaction (`hearing`), or reads committed rows.
"""

import json
from typing import Any

from controlplane.limits import EVENTS_PER_RUNNER_MAX
from controlplane.rows import EventRow, LogRow, StatementRow
from controlplane.tables import Db


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
