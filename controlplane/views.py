"""What the control plane shows: rows as the JSON of the REST contract. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from controlplane.rows import (
    EventRow,
    ExecutionRow,
    ExecutionState,
    IntentRow,
    LogRow,
    RunnerRow,
    StatementRow,
    WorktreeRow,
)
from protocol.commands import Size
from protocol.logproof import EMPTY, Claim, Sums, prove
from protocol.messages import InputFed

JsonObject = dict[str, Any]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class LogView(_View):
    """How far an execution's log has come."""

    end: int = 0
    complete: bool = False
    """Everything that the runner signed is here, or named as missing."""
    short_bytes: int = 0
    """How much of what was signed the runner never sent, and will not send any more."""


class Execution(_View):
    """An execution as its asker sees it."""

    id: str
    runner: str
    runner_name: str
    start_token: int
    state: str
    argv: list[str]
    cwd: str | None
    worktree: str | None
    created_ms: int
    cmd_id: str
    stop_requested: bool
    receipt: JsonObject | None
    settlement: JsonObject | None
    exit_status: int | None
    reason: str | None
    detail: str
    log: LogView
    lease_token: int = 0
    """Under which its lease runs; it rises when the lease is granted anew."""
    verdict: str | None = None
    """How it ended: what its runner signed, or `lost` where nobody will sign an end."""
    waits: str = ""
    """Why it is not sent although its runner is there."""
    retry_after_ms: int | None = None
    """When a runner that refused it for now is worth asking again."""
    pty: bool = False
    """Whether it has a terminal instead of pipes."""
    size: JsonObject | None = None
    """Of a PTY: the rows and columns it was opened with."""

    @property
    def final(self) -> bool:
        """Whether nothing more is awaited."""
        return self.state in ("settled", "refused", "cancelled")


class Worktree(_View):
    """A worktree as its asker sees it."""

    id: str
    runner: str
    runner_name: str
    state: str
    repo: str
    base: str
    branch: str | None
    path: str | None
    head: str | None
    cmd_id: str
    created_ms: int
    reason: str | None
    detail: str
    waits: str = ""
    retry_after_ms: int | None = None


class Stop(_View):
    """A stop that was signed for an attempt which is no current one here."""

    id: str
    runner: str
    runner_name: str
    start_token: int
    cmd_id: str
    state: str


class Order(_View):
    """What was asked of a runner, and what its receipt says: `state` is queued, sent, receipted, cancelled or expired."""

    cmd_id: str
    kind: str
    about: str
    runner: str
    runner_name: str
    state: str
    outcome: str | None = None
    reason: str | None = None
    detail: str = ""
    result: JsonObject = {}


class Attached(_View):
    """A viewer that is let in: the ticket opens one connection, until `expires_ms`."""

    viewer: str
    ticket: str
    expires_ms: int
    attempt: str
    mode: str


class Fed(_View):
    """How far an attempt's stdin is: `received` bytes are taken; `closed`: nobody reads any more, `reason` where that is why."""

    received: int | None
    """None: the runner has not told."""
    closed: bool
    reason: str | None


class Runner(_View):
    """A runner as its user sees it."""

    id: str
    name: str
    inc: int
    labels: dict[str, str]
    online: bool
    last_seen_ms: int
    version: str
    platform: str
    hostname: str
    policy_digest: str
    attempts: int
    key_id: str
    admission: str = ""
    """Whether it takes new work, as it told last; empty when it is not there."""
    boot_id: str = ""
    instance: str = ""
    unknown: list[JsonObject] = []
    """Attempts that live there and that nobody here started."""
    conflict: JsonObject | None = None
    """The last other machine that had its key."""


class Join(_View):
    """A join string: it holds a secret and is shown once."""

    join: str
    name: str | None
    expires_ms: int


def execution_view(
    row: ExecutionRow, runner_name: str, log: LogRow | None, waits: str = "", size: Size | None = None
) -> Execution:
    """Show an execution, or one attempt of it; `size` is that of a PTY."""
    receipt = None if row.receipt is None else json.loads(row.receipt)
    settlement = None if row.settlement is None else json.loads(row.settlement)
    refusal = receipt if row.state is ExecutionState.REFUSED else None
    return Execution(
        id=row.id,
        runner=row.runner_id,
        runner_name=runner_name,
        start_token=row.start_token,
        state=row.state,
        argv=list(row.argv),
        cwd=row.cwd,
        worktree=row.worktree_id,
        created_ms=row.created_ms,
        cmd_id=row.cmd_id,
        stop_requested=row.stop_cmd_id is not None,
        receipt=receipt,
        settlement=settlement,
        exit_status=row.exit_status,
        reason=row.reason,
        detail=row.detail,
        log=log_view(log, settlement),
        lease_token=row.token,
        verdict=settlement["verdict"] if settlement is not None else row.verdict,
        waits=waits,
        retry_after_ms=None if refusal is None else _count(refusal["result"].get("retry_after_ms")),
        pty=size is not None,
        size=None if size is None else size.model_dump(),
    )


def log_view(log: LogRow | None, settlement: JsonObject | None) -> LogView:
    """Show how far a log has come: one that its runner closed before the end it signed is short, not complete."""
    if log is None:
        return LogView()
    signed = ((settlement or {}).get("log") or {}).get("end", 0)
    short = max(0, signed - log.end) if log.complete else 0
    return LogView(end=log.end, complete=log.complete and not short, short_bytes=short)


def digests_view(row: LogRow, settlement: JsonObject | None, sums: Sums, claim: Claim | None) -> JsonObject:
    """Show what a stored log adds up to, and what of it is proven.

    `chain_ok`: its segments are linked, and once it is all here the last of them is the one that was signed.
    """
    proof, shown = prove(sums, claim), log_view(row, settlement)
    streams = {**dict.fromkeys(claim.streams if claim is not None else (), EMPTY), **sums.streams}
    signed = not shown.complete or claim is None or claim.masked or sums.chain == claim.chain
    return {
        "streams": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in streams.items()},
        "log": {"end": sums.end, "segments": sums.segments, "chain": sums.chain},
        "complete": shown.complete,
        "gaps": [list(gap) for gap in row.gaps],
        "chain_ok": not sums.faults and signed and not shown.short_bytes,
        "proof": {"ok": proof.ok, "proven": proof.proven, "missing": proof.missing, "wrong": proof.wrong},
    }


def worktree_view(row: WorktreeRow, runner_name: str, waits: str = "") -> Worktree:
    """Show a worktree."""
    return Worktree(
        id=row.id,
        runner=row.runner_id,
        runner_name=runner_name,
        state=row.state,
        repo=row.repo,
        base=row.base,
        branch=row.branch,
        path=row.path,
        head=row.head,
        cmd_id=row.cmd_id,
        created_ms=row.created_ms,
        reason=row.reason,
        detail=row.detail,
        waits=waits,
        retry_after_ms=row.retry_after_ms,
    )


def runner_view(
    row: RunnerRow,
    key_id: str,
    *,
    online: bool,
    last_seen_ms: int,
    admission: str = "",
    unknown: Mapping[str, str] | None = None,
) -> Runner:
    """Show a runner."""
    return Runner(
        id=row.id,
        name=row.name,
        inc=row.inc,
        labels=row.labels,
        online=online,
        last_seen_ms=max(last_seen_ms, row.last_seen_ms),
        version=row.version,
        platform=row.platform,
        hostname=row.hostname,
        policy_digest=row.policy_digest,
        attempts=row.attempts,
        key_id=key_id,
        admission=admission,
        boot_id=row.boot_id,
        instance=row.instance,
        unknown=[{"attempt": name, "why": why} for name, why in (unknown or {}).items()],
        conflict=None if row.conflict is None else json.loads(row.conflict),
    )


def order_view(row: IntentRow, runner_name: str, answers: Sequence[StatementRow]) -> Order:
    """Show an order, with the receipt that answers it."""
    said = json.loads(answers[0].payload) if answers else {}
    return Order(
        cmd_id=row.cmd_id,
        kind=row.kind,
        about=row.subject,
        runner=row.runner_id,
        runner_name=runner_name,
        state=row.state,
        outcome=said.get("outcome"),
        reason=said.get("reason"),
        detail=said.get("detail", ""),
        result=said.get("result", {}),
    )


def fed_view(fed: InputFed | None) -> Fed:
    """Show how far a stdin is."""
    if fed is None:
        return Fed(received=None, closed=False, reason=None)
    return Fed(received=fed.received, closed=fed.closed, reason=fed.reason)


def statement_view(row: StatementRow) -> JsonObject:
    """Show a statement: the envelope as it came, and what it says."""
    return {
        "kind": row.kind,
        "digest": row.digest,
        "envelope": row.envelope,
        "payload": json.loads(row.payload),
        "received_ms": row.received_ms,
    }


def event_view(row: EventRow) -> JsonObject:
    """Show an event."""
    return {
        "at_ms": row.at_ms,
        "runner": row.runner_id,
        "kind": row.kind,
        "reason": row.reason,
        "detail": row.detail,
        "digest": row.digest,
    }


def _count(value: object) -> int | None:
    """A number that a runner told, as far as it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
