"""The tree of protocol errors, and the stable reason codes that cross the wire.

A `Reason` is public text: receipts, `refused` messages, close frames and `--json` outputs carry it, and customers match on it.
Codes are added, never renamed or reused.
"""

from enum import IntEnum, StrEnum
from typing import Final


class Reason(StrEnum):
    """Why something was refused or failed. Stable for ever."""

    # the envelope: nothing was consumed
    BAD_ENVELOPE = "BAD_ENVELOPE"
    BAD_SIG = "BAD_SIG"
    UNKNOWN_KEY = "UNKNOWN_KEY"
    REVOKED_KEY = "REVOKED_KEY"
    WEAK_KEY = "WEAK_KEY"
    WRONG_TYPE = "WRONG_TYPE"
    BAD_PAYLOAD = "BAD_PAYLOAD"
    # the header: nothing was consumed
    DOWNGRADE = "DOWNGRADE"
    WRONG_AUD = "WRONG_AUD"
    STALE_INC = "STALE_INC"
    KEYSET_TOO_OLD = "KEYSET_TOO_OLD"
    SCOPE_DENIED = "SCOPE_DENIED"
    SEQ_REPLAY = "SEQ_REPLAY"
    SEQ_GAP = "SEQ_GAP"
    CHAIN_FORK = "CHAIN_FORK"
    # judged after the number was consumed: each has a receipt
    IDEMPOTENCY_MISMATCH = "IDEMPOTENCY_MISMATCH"
    EXPIRED = "EXPIRED"
    NOT_YET = "NOT_YET"
    TTL_TOO_LONG = "TTL_TOO_LONG"
    WRONG_STREAM = "WRONG_STREAM"
    UNSUPPORTED_KIND = "UNSUPPORTED_KIND"
    BAD_ARGS = "BAD_ARGS"
    POLICY_DENIED = "POLICY_DENIED"
    APPROVAL_MISSING = "APPROVAL_MISSING"
    FENCED = "FENCED"
    PRECONDITION_FAILED = "PRECONDITION_FAILED"
    RATE_LIMITED = "RATE_LIMITED"
    CAPACITY = "CAPACITY"
    DRAINING = "DRAINING"
    PAUSED = "PAUSED"
    DISK_LOW = "DISK_LOW"
    INODES_LOW = "INODES_LOW"
    MEMORY_LOW = "MEMORY_LOW"
    FDS_LOW = "FDS_LOW"
    CANCELLED_BEFORE_START = "CANCELLED_BEFORE_START"
    DUPLICATE_ATTEMPT = "DUPLICATE_ATTEMPT"
    UNKNOWN_TARGET = "UNKNOWN_TARGET"
    NOT_RUNNING = "NOT_RUNNING"
    NOT_A_PTY = "NOT_A_PTY"
    DUPLICATE_VIEWER = "DUPLICATE_VIEWER"
    ENV_DENIED = "ENV_DENIED"
    ENV_SECRET_NAME = "ENV_SECRET_NAME"  # noqa: S105 - a reason code, no secret
    SECRET_UNREADABLE = "SECRET_UNREADABLE"  # noqa: S105 - a reason code, no secret
    CWD_OUTSIDE_ROOTS = "CWD_OUTSIDE_ROOTS"
    CWD_MISSING = "CWD_MISSING"
    # executions that could not begin
    EXEC_NOT_FOUND = "EXEC_NOT_FOUND"
    EXEC_NOT_EXECUTABLE = "EXEC_NOT_EXECUTABLE"
    SPAWN_FAILED = "SPAWN_FAILED"
    NOT_RELEASED = "NOT_RELEASED"
    # worktrees
    REPO_OUTSIDE_ROOTS = "REPO_OUTSIDE_ROOTS"
    REPO_INVALID = "REPO_INVALID"
    REPO_HOSTILE = "REPO_HOSTILE"
    BASE_NOT_FOUND = "BASE_NOT_FOUND"
    BRANCH_EXISTS = "BRANCH_EXISTS"
    BRANCH_INVALID = "BRANCH_INVALID"
    WORKTREE_EXISTS = "WORKTREE_EXISTS"
    WORKTREE_UNKNOWN = "WORKTREE_UNKNOWN"
    WORKTREE_BUSY = "WORKTREE_BUSY"
    WORKTREE_DIRTY = "WORKTREE_DIRTY"
    WORKTREE_FOREIGN = "WORKTREE_FOREIGN"
    GIT_FAILED = "GIT_FAILED"
    # the machine or we ourselves
    DISK_FULL = "DISK_FULL"
    REBOOT = "REBOOT"
    SHIM_LOST = "SHIM_LOST"
    SHIM_HUNG = "SHIM_HUNG"
    INFRA = "INFRA"
    # what a viewer of a PTY says: it is not taken, and may be said again
    UNKNOWN_VIEWER = "UNKNOWN_VIEWER"
    READ_ONLY = "READ_ONLY"
    OUT_OF_ORDER = "OUT_OF_ORDER"
    # the session
    BAD_FRAME = "BAD_FRAME"
    UNEXPECTED_MESSAGE = "UNEXPECTED_MESSAGE"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    BAD_PROOF = "BAD_PROOF"
    UNKNOWN_RUNNER = "UNKNOWN_RUNNER"
    BAD_JOIN_TOKEN = "BAD_JOIN_TOKEN"  # noqa: S105 - a reason code, no secret
    SESSION_REPLACED = "SESSION_REPLACED"
    IDENTITY_CONFLICT = "IDENTITY_CONFLICT"
    SLOW_PEER = "SLOW_PEER"
    GOING_AWAY = "GOING_AWAY"


class CloseCode(IntEnum):
    """WebSocket close codes of this protocol. 44xx: do not try again unchanged; 45xx: try again with backoff."""

    NORMAL = 1000
    GOING_AWAY = 1001
    TOO_BIG = 1009
    BAD_FRAME = 4400
    BAD_PROOF = 4401
    UNSUPPORTED_VERSION = 4406
    SESSION_REPLACED = 4409
    IDENTITY_CONFLICT = 4423
    UNKNOWN_RUNNER = 4404
    TIMEOUT = 4508
    SLOW_PEER = 4513
    INTERNAL = 4500

    @property
    def retryable(self) -> bool:
        """Whether the same runner may dial again without a change on either side."""
        return self not in _PERMANENT


_PERMANENT: Final = frozenset(
    {
        CloseCode.BAD_PROOF,
        CloseCode.UNSUPPORTED_VERSION,
        CloseCode.UNKNOWN_RUNNER,
        CloseCode.SESSION_REPLACED,
        CloseCode.IDENTITY_CONFLICT,
    }
)


class ProtocolError(Exception):
    """Something broke the protocol: `reason` says what, `detail` is for a person and never holds a peer's bytes."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(f"{reason}: {detail}" if detail else str(reason))


class LocalError(ProtocolError):
    """We broke the rules: a defect on this side."""


class RemoteError(ProtocolError):
    """The peer broke the rules; nothing of its message took effect. `close` says how the connection ends, if it does."""

    def __init__(self, reason: Reason, detail: str = "", close: CloseCode | None = None) -> None:
        super().__init__(reason, detail)
        self.close = close


class EnvelopeError(RemoteError):
    """An envelope was not accepted: bad form, key, signature, type or payload."""
