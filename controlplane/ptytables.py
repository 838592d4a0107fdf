"""What the rows say of PTYs: which executions are one, with what size they were opened, and who was let in.

A PTY is an execution whose start was `pty.open`; it has no rows of its own. Each function reads, inside a transaction or from committed
rows.
"""

import json
from typing import Final, NamedTuple

from controlplane import tables
from controlplane.rows import ExecutionRow, IntentRow, IntentState
from controlplane.tables import Db
from protocol.commands import Kind, PtyAttach, Size
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import VIEWERS_MAX
from protocol.receipt import Outcome
from protocol.wire import JsonObject

_UNKNOWN: Final = Size(rows=24, cols=80)
"""Of a PTY that is known from its receipt only: what every terminal takes."""
_ASKED_MAX: Final = 4 * VIEWERS_MAX
"""Orders about viewers of one attempt that are looked at: more were refused than can be let in."""


_SIZE: Final = (
    "SELECT iif(kind = ?, json_extract(CAST(args AS TEXT), '$.size'), NULL) AS size FROM intents WHERE cmd_id = ?"
)


class Admitted(NamedTuple):
    """An order to let a viewer in, and what it asked."""

    intent: IntentRow
    asked: PtyAttach


def size_of(db: Db, row: ExecutionRow) -> Size | None:
    """The size a PTY was opened with; None: it is no PTY."""
    found = db.execute(_SIZE, (Kind.PTY_OPEN, row.cmd_id)).fetchone()
    if found is None:
        kind = None if row.receipt is None else json.loads(row.receipt).get("kind")
        return _UNKNOWN if kind == Kind.PTY_OPEN else None
    return None if found["size"] is None else Size.parse(found["size"].encode())


def is_pty(db: Db, attempt: str) -> bool:
    """Whether an attempt has a terminal; not for one that we do not know."""
    named = Attempt.parse(attempt)
    row = tables.attempt(db, named.execution_id, named.start_token)
    return row is not None and size_of(db, row) is not None


def stop_kind(db: Db, row: ExecutionRow | None) -> Kind:
    """The order that ends an attempt."""
    return Kind.PTY_CLOSE if row is not None and size_of(db, row) is not None else Kind.EXECUTION_STOP


def settlement_of(row: ExecutionRow) -> JsonObject | None:
    """How it ended, as its runner signed it."""
    found: JsonObject | None = None if row.settlement is None else json.loads(row.settlement)
    return found


def has_log(row: ExecutionRow) -> bool:
    """Whether a log was signed with its end."""
    settlement = settlement_of(row)
    return settlement is not None and settlement.get("log") is not None


def living(db: Db, runner_id: str) -> list[Attempt]:
    """PTYs that live at a runner, as far as we know."""
    sql = (
        "SELECT e.id, e.start_token FROM executions e JOIN intents i ON i.cmd_id = e.cmd_id"
        " WHERE e.runner_id = ? AND e.state IN ('queued', 'sent', 'running') AND i.kind = ?"
    )
    found = db.execute(sql, (runner_id, Kind.PTY_OPEN))
    return [Attempt(ExecutionId(one["id"]), FencingToken(one["start_token"])) for one in found]


def ptys(db: Db, runner_id: str | None, *, everything: bool, limit: int) -> list[ExecutionRow]:
    """PTYs that have not ended, or all, newest first."""
    sql = (
        "SELECT e.id FROM executions e LEFT JOIN intents i ON i.cmd_id = e.cmd_id"
        " WHERE (i.kind = ?1 OR (i.kind IS NULL AND e.receipt IS NOT NULL AND json_extract(e.receipt, '$.kind') = ?1))"
        " AND (?2 IS NULL OR e.runner_id = ?2) AND (?3 OR e.state IN ('queued', 'sent', 'running'))"
        " ORDER BY e.created_ms DESC, e.id DESC LIMIT ?4"
    )
    found = db.execute(sql, (Kind.PTY_OPEN, runner_id, everything, limit)).fetchall()
    rows = (tables.execution(db, one["id"]) for one in found)
    return [row for row in rows if row is not None]


def admitted(db: Db, row: ExecutionRow) -> list[Admitted]:
    """Orders to let viewers of an attempt in that were not refused, oldest first."""
    sql = (
        "SELECT i.cmd_id FROM intents i WHERE i.subject = ? AND i.kind = ? AND i.state IN ('queued', 'sent', 'receipted')"
        " AND NOT EXISTS (SELECT 1 FROM statements s WHERE s.cmd_id = i.cmd_id AND s.kind = 'receipt'"
        " AND json_extract(s.payload, '$.outcome') <> ?) ORDER BY i.ordinal LIMIT ?"
    )
    found = db.execute(sql, (row.id, Kind.PTY_ATTACH, Outcome.DONE, _ASKED_MAX)).fetchall()
    intents = [tables.intent(db, one["cmd_id"]) for one in found]
    known = [Admitted(intent, PtyAttach.parse(intent.args)) for intent in intents if intent is not None]
    return [one for one in known if one.asked.start_token == row.start_token]


def call_back(db: Db, cmd_id: str) -> None:
    """Give up an order that was never sent."""
    db.execute(
        "UPDATE intents SET state = ? WHERE cmd_id = ? AND state = 'queued' AND signed_times = 0",
        (IntentState.CANCELLED, cmd_id),
    )
