"""Between the journal's values and its rows: how each write is done, and how the image is read back.

Everything here runs in the journal's thread, inside a transaction of the caller's. A write that breaks a rule of
`runner/core/journaling.py` raises RuleBroken or is stopped by a constraint: it is our own mistake, never answered, always fatal.
"""

import sqlite3
from collections.abc import Sequence
from typing import Any, Final, assert_never

from protocol.commands import OnLoss
from protocol.envelope import digest_of
from protocol.execution import AttemptState
from protocol.ids import Attempt, CommandId, Digest, WorktreeId
from protocol.lease import Lease, LeaseState
from protocol.messages import ItemKind, ReportItem
from protocol.replay import Mark
from runner.adapters.journal_words import ABOUT, TOLD, attempt_words, event_words, subjects_of
from runner.core.journaling import (
    AppendLeaf,
    AttemptRow,
    DropWorktree,
    Image,
    PutAdmission,
    PutAnswered,
    PutAttempt,
    PutCommand,
    PutEvent,
    PutMark,
    PutReceipt,
    PutSettlement,
    PutTombstone,
    PutWorktree,
    WorktreeRow,
    Write,
)
from runner.core.plans import Admission, CommandRow, ProcessIdentity, WorktreeMade

COMMANDS_REMEMBERED_MAX: Final = 20_000
"""Receipted commands that the image holds: a double of an older one is caught by its number."""
SETTLED_REMEMBERED_MAX: Final = 2_000
"""Settled attempts that the image holds, for late stops and `ps --all`."""

_ATTEMPT_COLUMNS: Final = (
    "name, digest, cmd_id, state, shim_boot_id, shim_pid, shim_start, lease_res, lease_token, lease_ttl_ms, lease_on_loss,"
    " lease_deadline_ms, lease_state, lease_boot_id, stop_by, stop_grace_ms, worktree_id, settled_seq, fenced_by"
)
_PUT_ATTEMPT: Final = (
    f"INSERT INTO attempt({_ATTEMPT_COLUMNS}, at_ms) VALUES({', '.join('?' * 20)}) ON CONFLICT(name) DO UPDATE SET "
    + ", ".join(
        f"{column.strip()} = excluded.{column.strip()}" for column in f"{_ATTEMPT_COLUMNS}, at_ms".split(",")[1:]
    )
)
_LEAF: Final = "INSERT INTO leaf(at_ms, kind, subject, detail, policy_digest) VALUES(?, ?, ?, ?, ?)"
_LEAF_OF_COMMAND: Final = (
    "INSERT INTO leaf(at_ms, kind, subject, detail, policy_digest)"
    " VALUES(?, ?, ?, ?, (SELECT policy_digest FROM command WHERE digest = ?))"
)
_LAST_OF_ATTEMPT: Final = (
    "SELECT kind, detail FROM leaf WHERE subject = ? AND kind GLOB 'attempt.*' ORDER BY n DESC LIMIT 1"
)


class RuleBroken(AssertionError):
    """A write that must not be: a second receipt, a settlement of nothing. A defect of the daemon."""


def apply(db: sqlite3.Connection, write: Write) -> None:
    """Do one write. Raises RuleBroken or sqlite3.Error."""
    match write:
        case PutMark(inc, mark):
            db.execute(
                "INSERT INTO stream_mark(inc, hw, head) VALUES(?, ?, ?)"
                " ON CONFLICT(inc) DO UPDATE SET hw = excluded.hw, head = excluded.head",
                (inc, mark.hw, mark.head),
            )
        case PutCommand():
            _put_command(db, write)
        case PutReceipt():
            _put_receipt(db, write)
        case PutAttempt():
            _put_attempt(db, write)
        case PutSettlement():
            _put_settlement(db, write)
        case PutEvent(item, at_ms):
            _put_event(db, item, at_ms)
        case PutTombstone(target, cmd_id, expires_ms):
            db.execute("INSERT OR REPLACE INTO tombstone VALUES(?, ?, ?)", (target, cmd_id, expires_ms))
        case PutWorktree(row):
            made = (row.made.path, row.made.head, row.made.branch) if row.made else (None, None, None)
            db.execute(
                "INSERT OR REPLACE INTO worktree VALUES(?, ?, ?, ?, ?, ?, ?)",
                (row.worktree_id, row.digest, row.repo, *made, row.token),
            )
        case DropWorktree(worktree_id):
            db.execute("DELETE FROM worktree WHERE worktree_id = ?", (worktree_id,))
        case PutAnswered(out_seqs, at_ms):
            db.executemany(
                "UPDATE outbox SET answered_ms = ? WHERE out_seq = ? AND answered_ms IS NULL",
                [(at_ms, out_seq) for out_seq in out_seqs],
            )
        case PutAdmission(admission, deadline_ms, by, at_ms):
            db.execute("INSERT OR REPLACE INTO admission VALUES(1, ?, ?)", (admission, deadline_ms))
            db.execute(_LEAF, (at_ms, f"admission.{admission}", by, str(deadline_ms or ""), ""))
        case AppendLeaf(kind, subject, detail, policy_digest, at_ms):
            db.execute(_LEAF, (at_ms, kind, subject, detail, policy_digest))
        case _:
            assert_never(write)


def _put_command(db: sqlite3.Connection, write: PutCommand) -> None:
    row = write.row
    db.execute(
        "INSERT INTO command(digest, cmd_id, kind, seq, envelope, policy_digest, received_ms, receipt_seq)"
        " VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row.digest,
            row.cmd_id,
            row.kind,
            row.seq,
            row.envelope,
            row.policy_digest,
            write.at_ms,
            row.receipt_seq,
        ),
    )
    detail = f"{row.cmd_id} {row.kind} {'-' if row.seq is None else row.seq}"
    db.execute(_LEAF, (write.at_ms, "command.received", row.digest, detail, row.policy_digest))
    for subject in subjects_of(row.kind, row.envelope):
        db.execute(_LEAF, (write.at_ms, ABOUT, subject, row.digest, row.policy_digest))


def _put_receipt(db: sqlite3.Connection, write: PutReceipt) -> None:
    _expect(write.item.kind, ItemKind.RECEIPT)
    changed = db.execute(
        "UPDATE command SET receipt_seq = ? WHERE digest = ?", (write.item.out_seq, write.digest)
    ).rowcount
    if changed != 1:
        raise RuleBroken("a receipt of a command that was never received")
    _put_item(db, write.item, write.at_ms)
    db.execute(
        _LEAF_OF_COMMAND,
        (write.at_ms, "command.receipted", write.digest, digest_of(write.item.body.encode()), write.digest),
    )


def _put_attempt(db: sqlite3.Connection, write: PutAttempt) -> None:
    row = write.row
    db.execute(_PUT_ATTEMPT, (*_attempt_columns(row), write.at_ms))
    name, leaf = row.attempt.name, (f"attempt.{row.state}", attempt_words(row))
    # A lease that was renewed is no decision: a leaf for each would be most of the table.
    if db.execute(_LAST_OF_ATTEMPT, (name,)).fetchone() != leaf:
        db.execute(_LEAF_OF_COMMAND, (write.at_ms, leaf[0], name, leaf[1], row.digest))


def _put_settlement(db: sqlite3.Connection, write: PutSettlement) -> None:
    _expect(write.item.kind, ItemKind.SETTLEMENT)
    name = write.attempt.name
    found = db.execute(
        "UPDATE attempt SET state = ?, settled_seq = ?, at_ms = ? WHERE name = ? RETURNING digest",
        (AttemptState.SETTLED, write.item.out_seq, write.at_ms, name),
    ).fetchall()
    if len(found) != 1:
        raise RuleBroken("a settlement of an attempt that was never begun")
    _put_item(db, write.item, write.at_ms)
    body = digest_of(write.item.body.encode())
    db.execute(_LEAF_OF_COMMAND, (write.at_ms, "attempt.settled", name, body, found[0][0]))


def _put_event(db: sqlite3.Connection, item: ReportItem, at_ms: int) -> None:
    _put_item(db, item, at_ms)
    if (told := event_words(item)) is not None:
        db.execute(_LEAF, (at_ms, TOLD, *told, ""))


def _put_item(db: sqlite3.Connection, item: ReportItem, at_ms: int) -> None:
    db.execute(
        "INSERT INTO outbox(out_seq, kind, body, at_ms) VALUES(?, ?, ?, ?)", (item.out_seq, item.kind, item.body, at_ms)
    )


def _expect(found: ItemKind, wanted: ItemKind) -> None:
    if found is not wanted:
        raise RuleBroken(f"a {wanted} was given as {found}")


def _attempt_columns(row: AttemptRow) -> tuple[str | int | None, ...]:
    shim, lease = row.shim, row.lease
    return (
        row.attempt.name,
        row.digest,
        row.cmd_id,
        row.state,
        *((shim.boot_id, shim.pid, shim.start) if shim else (None,) * 3),
        *(
            (lease.res, lease.token, lease.ttl_ms, lease.on_loss, lease.deadline_ms, lease.state, lease.boot_id)
            if lease
            else (None,) * 7
        ),
        row.stop_by,
        row.stop_grace_ms,
        row.worktree_id,
        row.settled_seq,
        row.fenced_by,
    )


def read_image(db: sqlite3.Connection) -> Image:
    """What the engine needs at start. Raises sqlite3.Error, or ValueError for a row that says nothing we know."""
    (out_head,) = db.execute("SELECT coalesce(max(out_seq), 0) FROM outbox").fetchone()
    return Image(
        marks={inc: Mark(hw, Digest(head)) for inc, hw, head in db.execute("SELECT inc, hw, head FROM stream_mark")},
        commands=_commands(db),
        attempts=_attempts(db),
        tombstones={
            target: (CommandId(cmd_id), expires_ms)
            for target, cmd_id, expires_ms in db.execute("SELECT target, cmd_id, expires_ms FROM tombstone")
        },
        worktrees=[
            _worktree(row)
            for row in db.execute(
                "SELECT worktree_id, digest, repo, path, head, branch, token FROM worktree ORDER BY worktree_id"
            )
        ],
        out_head=out_head,
        **_admission(db),
    )


def _admission(db: sqlite3.Connection) -> dict[str, Any]:
    found = db.execute("SELECT state, deadline_ms FROM admission").fetchone()
    return {} if found is None else {"admission": Admission(found[0]), "drain_deadline_ms": found[1]}


def read_items(db: sqlite3.Connection, out_seqs: Sequence[int]) -> list[ReportItem]:
    """Items by number, in the order of the numbers; those that were pruned are left out."""
    found = []
    for out_seq in out_seqs:
        found += db.execute(
            "SELECT out_seq, kind, body FROM outbox WHERE out_seq = ? AND length(body) > 0", (out_seq,)
        ).fetchall()
    return [_item(row) for row in found]


def read_outbox(db: sqlite3.Connection, above: int, limit: int) -> list[ReportItem]:
    """The next `limit` items with a higher number."""
    return [
        _item(row)
        for row in db.execute(
            "SELECT out_seq, kind, body FROM outbox WHERE out_seq > ? AND length(body) > 0 ORDER BY out_seq LIMIT ?",
            (above, limit),
        )
    ]


def read_oldest_unanswered(db: sqlite3.Connection) -> int | None:
    """The lowest number that has no answer."""
    oldest: int | None = db.execute("SELECT min(out_seq) FROM outbox WHERE answered_ms IS NULL").fetchone()[0]
    return oldest


def _commands(db: sqlite3.Connection) -> list[CommandRow]:
    rows = db.execute(
        # A command whose attempt is not settled may have to be begun again, receipted or not.
        "WITH living AS (SELECT digest FROM attempt WHERE state != 'settled')"
        " SELECT digest, cmd_id, kind, seq, CASE WHEN receipt_seq IS NULL OR digest IN living THEN envelope ELSE x'' END,"
        " policy_digest, receipt_seq FROM command"
        " WHERE receipt_seq IS NULL OR digest IN living OR n > (SELECT max(n) FROM command) - ? ORDER BY n",
        (COMMANDS_REMEMBERED_MAX,),
    )
    return [
        CommandRow(
            digest=Digest(digest),
            cmd_id=CommandId(cmd_id),
            kind=kind,
            seq=seq,
            envelope=envelope,
            policy_digest=Digest(policy_digest),
            receipt_seq=receipt_seq,
        )
        for digest, cmd_id, kind, seq, envelope, policy_digest, receipt_seq in rows
    ]


def read_settled(db: sqlite3.Connection, names: Sequence[str]) -> dict[str, int]:
    """Settled attempts among `names`, and when they were."""
    found: dict[str, int] = {}
    for name in names:
        row = db.execute("SELECT at_ms FROM attempt WHERE name = ? AND state = 'settled'", (name,)).fetchone()
        if row is not None:
            found[name] = row[0]
    return found


def _attempts(db: sqlite3.Connection) -> list[AttemptRow]:
    rows = db.execute(
        f"SELECT {_ATTEMPT_COLUMNS} FROM attempt WHERE state != 'settled' OR name IN"  # noqa: S608 - constants
        " (SELECT name FROM attempt WHERE state = 'settled' ORDER BY at_ms DESC LIMIT ?)"
        " ORDER BY rowid",
        (SETTLED_REMEMBERED_MAX,),
    )
    return [_attempt(row) for row in rows]


def _attempt(row: tuple[Any, ...]) -> AttemptRow:
    name, digest, cmd_id, state = row[:4]
    shim, lease = row[4:7], row[7:14]
    stop_by, stop_grace_ms, worktree_id, settled_seq, fenced_by = row[14:]
    return AttemptRow(
        attempt=Attempt.parse(name),
        digest=Digest(digest),
        cmd_id=CommandId(cmd_id),
        state=AttemptState(state),
        shim=None if shim[0] is None else ProcessIdentity(boot_id=shim[0], pid=shim[1], start=shim[2]),
        lease=None if lease[0] is None else _lease(*lease),
        stop_by=stop_by,
        stop_grace_ms=stop_grace_ms,
        worktree_id=None if worktree_id is None else WorktreeId(worktree_id),
        settled_seq=settled_seq,
        fenced_by=fenced_by,
    )


def _lease(res: str, token: int, ttl_ms: int, on_loss: str, deadline_ms: int, state: str, boot_id: str | None) -> Lease:
    return Lease(
        res=res,
        token=token,
        ttl_ms=ttl_ms,
        on_loss=OnLoss(on_loss),
        deadline_ms=deadline_ms,
        state=LeaseState(state),
        boot_id=boot_id or "",
    )


def _worktree(row: tuple[Any, ...]) -> WorktreeRow:
    worktree_id, digest, repo, path, head, branch, token = row
    made = None if path is None else WorktreeMade(path=path, head=head, branch=branch)
    return WorktreeRow(worktree_id=WorktreeId(worktree_id), digest=Digest(digest), repo=repo, made=made, token=token)


def _item(row: tuple[Any, ...]) -> ReportItem:
    out_seq, kind, body = row
    # What is read here was checked when it was made; bodies are large, and this runs at every reconnect.
    return ReportItem.model_construct(out_seq=out_seq, kind=ItemKind(kind), body=body)
