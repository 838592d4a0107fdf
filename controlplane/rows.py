"""What the control plane remembers, as values: one class for each kind of row. Pure."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.commands import STREAM_OF, Kind, Stream
from protocol.ids import GENESIS, Attempt, Digest, ExecutionId, FencingToken
from protocol.replay import Mark

_START: Final = Mark()
STARTS: Final = frozenset({Kind.EXECUTION_START, Kind.PTY_OPEN})
"""What begins an attempt."""
STOPS: Final = frozenset({Kind.EXECUTION_STOP, Kind.PTY_CLOSE})
"""What ends one."""


class ExecutionState(StrEnum):
    """Where an execution is, as its asker sees it."""

    QUEUED = "queued"
    SENT = "sent"
    RUNNING = "running"
    SETTLED = "settled"
    REFUSED = "refused"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing more is awaited."""
        return self in (ExecutionState.SETTLED, ExecutionState.REFUSED, ExecutionState.CANCELLED)


class WorktreeState(StrEnum):
    """Where a worktree is, as its asker sees it."""

    QUEUED = "queued"
    CREATING = "creating"
    READY = "ready"
    REFUSED = "refused"
    FAILED = "failed"
    REMOVING = "removing"
    REMOVED = "removed"

    @property
    def final(self) -> bool:
        """Whether its last order has been answered."""
        return self not in (WorktreeState.QUEUED, WorktreeState.CREATING, WorktreeState.REMOVING)


class IntentState(StrEnum):
    """Where an intent is: only a queued or held one can still be called back."""

    HELD = "held"
    """Not to be numbered before the lease of another attempt is over."""
    QUEUED = "queued"
    SENT = "sent"
    RECEIPTED = "receipted"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerRow:
    """A runner and how far its streams are."""

    id: str
    name: str
    x: str
    seal_x: str
    labels: dict[str, str]
    living: bool
    """False once another runner enrolled under its name."""
    inc: int
    certificate: str
    session: str = ""
    """The session that may number commands; whoever holds another one is late."""
    ctl: Mark = _START
    acked_hw: int = 0
    out_hw: int = 0
    keyset_version: int = 1
    enrolled_ms: int = 0
    last_seen_ms: int = 0
    version: str = ""
    platform: str = ""
    hostname: str = ""
    policy_digest: str = GENESIS
    attempts: int = 0
    instance: str = ""
    """The daemon that has the line; empty for a runner that does not say."""
    dial: int = 0
    """The highest count of its dials."""
    boot_id: str = ""
    retired: tuple[str, ...] = ()
    """Daemons before it, the newest last."""
    conflict: str | None = None
    """The last hello that was refused because another machine has this runner's key: JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntentRow:
    """What a user wants of a runner: unsigned, and under one `cmd_id` for life."""

    cmd_id: str
    runner_id: str
    kind: str
    subject: str
    """The execution or worktree it is about."""
    args: bytes
    lease: bytes | None
    state: IntentState
    created_ms: int
    expires_ms: int
    signed_times: int = 0
    """How often it was numbered and signed: more than once after a fork."""
    actor: str | None = None
    """Who asked, where it was not a user."""
    waits_for: str | None = None
    """Of a held intent: the attempt whose lease must be over before."""

    @property
    def stream(self) -> Stream:
        """The stream its kind travels on."""
        return STREAM_OF[self.kind]

    @property
    def start_token(self) -> int | None:
        """Of an intent about an attempt: which of the execution's."""
        args = json.loads(self.args)
        token = args.get("target", args).get("start_token")
        return token if isinstance(token, int) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRow:
    """One signed form of an intent; `seq` is None on the safety stream."""

    digest: Digest
    cmd_id: str
    runner_id: str
    inc: int
    seq: int | None
    payload: bytes
    signed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionRow:
    """An execution and its current attempt, or one of its earlier attempts."""

    id: str
    runner_id: str
    start_token: int
    state: ExecutionState
    argv: tuple[str, ...] = ()
    cwd: str | None = None
    worktree_id: str | None = None
    cmd_id: str
    stop_cmd_id: str | None = None
    created_ms: int
    receipt: str | None = None
    """The receipt's payload, as JSON text."""
    settlement: str | None = None
    settlement_digest: str | None = None
    exit_status: int | None = None
    reason: str | None = None
    detail: str = ""
    lease_token: int = 0
    """The token it was granted last; 0: that of its start."""
    lease_refused: str | None = None
    """Why its runner did not take the last grant."""
    verdict: str | None = None
    """How it ended: the settlement's word, or `lost` where nobody will sign one."""

    @property
    def attempt(self) -> Attempt:
        """Its attempt."""
        return Attempt(ExecutionId(self.id), FencingToken(self.start_token))

    @property
    def token(self) -> int:
        """The token of the lease it has now."""
        return max(self.lease_token, self.start_token)

    @property
    def over(self) -> bool:
        """Whether its runner has told that it does not live: a guess of ours is not enough."""
        told = self.settlement is not None or self.state is ExecutionState.REFUSED
        return told or (self.state is ExecutionState.CANCELLED and self.verdict is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorktreeRow:
    """A worktree of a runner."""

    id: str
    runner_id: str
    state: WorktreeState
    repo: str
    base: str
    branch: str | None = None
    path: str | None = None
    head: str | None = None
    cmd_id: str
    """The last order about it."""
    created_ms: int
    reason: str | None = None
    detail: str = ""
    retry_after_ms: int | None = None
    """When its runner, which refused the order for now, is worth asking again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRow:
    """How much of an attempt's log is durable here; bytes in `gaps` exist nowhere."""

    attempt: str
    runner_id: str
    end: int = 0
    complete: bool = False
    gaps: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinTokenRow:
    """A join token, known by its SHA-256 only."""

    hash: str
    name: str | None
    labels: dict[str, str]
    expires_ms: int
    used_by: str | None = None
    """The key that was enrolled with it."""
    runner_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something told of a runner: by it, or about what it sent."""

    runner_id: str
    at_ms: int
    kind: str
    reason: str | None = None
    detail: str = ""
    digest: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementRow:
    """A signed statement as it came: evidence, whether or not it changed anything."""

    digest: str
    runner_id: str
    kind: str
    cmd_id: str
    subject: str
    envelope: str
    payload: str
    received_ms: int
