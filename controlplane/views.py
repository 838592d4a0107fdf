"""What the control plane shows: rows as the JSON of the REST contract. Pure."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from controlplane.rows import EventRow, ExecutionRow, LogRow, RunnerRow, StatementRow, WorktreeRow

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


class Join(_View):
    """A join string: it holds a secret and is shown once."""

    join: str
    name: str | None
    expires_ms: int


def execution_view(row: ExecutionRow, runner_name: str, log: LogRow | None) -> Execution:
    """Show an execution."""
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
        receipt=None if row.receipt is None else json.loads(row.receipt),
        settlement=None if row.settlement is None else json.loads(row.settlement),
        exit_status=row.exit_status,
        reason=row.reason,
        detail=row.detail,
        log=LogView() if log is None else LogView(end=log.end, complete=log.complete),
    )


def worktree_view(row: WorktreeRow, runner_name: str) -> Worktree:
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
    )


def runner_view(row: RunnerRow, key_id: str, *, online: bool, last_seen_ms: int) -> Runner:
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
