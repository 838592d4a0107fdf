"""What the control plane shows: rows as the JSON of the REST contract. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from controlplane.rows import EventRow, ExecutionRow, ExecutionState, LogRow, RunnerRow, StatementRow, WorktreeRow

JsonObject = dict[str, Any]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class LogView(_View):
    """How far an execution's log has come."""

    end: int = 0
    complete: bool = False


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


def execution_view(row: ExecutionRow, runner_name: str, log: LogRow | None, waits: str = "") -> Execution:
    """Show an execution, or one attempt of it."""
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
        log=LogView() if log is None else LogView(end=log.end, complete=log.complete),
        lease_token=row.token,
        verdict=settlement["verdict"] if settlement is not None else row.verdict,
        waits=waits,
        retry_after_ms=None if refusal is None else _count(refusal["result"].get("retry_after_ms")),
    )


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
