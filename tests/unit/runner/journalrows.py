"""Rows and writes for tests of the journal, and what must hold of a journal that was written one number after the other."""

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocol.commands import OnLoss
from protocol.envelope import digest_of
from protocol.execution import AttemptState
from protocol.ids import Attempt, CommandId, ExecutionId, FencingToken
from protocol.lease import Lease, LeaseState
from protocol.messages import ItemKind, ReportItem
from protocol.replay import Mark
from runner.adapters.journal import SqliteJournal
from runner.core.journaling import AttemptRow, PutCommand, PutMark, PutReceipt, Write
from runner.core.plans import CommandRow, ProcessIdentity

POLICY = digest_of(b"a policy")
LEASE = Lease(res="workspace:w1", token=3, ttl_ms=60_000, on_loss=OnLoss.STOP, deadline_ms=5, state=LeaseState.LOST)
SHIM = ProcessIdentity(boot_id="b-1", pid=4711, start=99)


def command(number: int, **changes: Any) -> CommandRow:
    """A pending command."""
    row = CommandRow(
        digest=digest_of(b"%d" % number),
        cmd_id=CommandId(f"cmd_{number}"),
        kind="execution.start",
        seq=number,
        envelope=b"envelope %d" % number,
        policy_digest=POLICY,
        receipt_seq=None,
    )
    return replace(row, **changes)


def attempt(number: int, **changes: Any) -> AttemptRow:
    """The attempt that command `number` begins."""
    row = AttemptRow(
        attempt=Attempt(ExecutionId(f"ex_{number}"), FencingToken(1)),
        digest=digest_of(b"%d" % number),
        cmd_id=CommandId(f"cmd_{number}"),
        state=AttemptState.INTENT,
    )
    return replace(row, **changes)


def item(out_seq: int, kind: ItemKind = ItemKind.RECEIPT) -> ReportItem:
    """A report item."""
    return ReportItem(out_seq=out_seq, kind=kind, body=f'{{"n":{out_seq}}}')


def settlement(out_seq: int) -> ReportItem:
    """A report item that is a settlement."""
    return item(out_seq, ItemKind.SETTLEMENT)


def rows(path: Path, query: str) -> list[Any]:
    """What another process sees in the file."""
    db = sqlite3.connect(path)
    try:
        return db.execute(query).fetchall()
    finally:
        db.close()


def numbered(n: int) -> list[Write]:
    """Command `n` with its mark and its receipt."""
    digest = digest_of(b"%d" % n)
    return [PutCommand(command(n), n), PutMark(1, Mark(n, digest)), PutReceipt(digest, item(n), n)]


async def whole(path: Path) -> int:
    """How far the journal is; everything up to there is complete."""
    async with SqliteJournal(path) as journal:
        image = await journal.load()
        hw = image.out_head
        assert [row.seq for row in image.commands] == list(range(1, hw + 1))
        assert all(row.receipt_seq == row.seq for row in image.commands)
        assert image.marks == ({1: Mark(hw, digest_of(b"%d" % hw))} if hw else {})
        assert [found.out_seq for found in await journal.outbox(0, hw + 9)] == list(range(1, hw + 1))
    return hw
