"""What is to be done, decided: values that effects carry to the adapters and that the journal keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from protocol.commands import OnLoss
from protocol.ids import Attempt, CommandId, Digest, WorktreeId


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptPlan:
    """One attempt as it was admitted. `cwd` is absolute, or a worktree and a directory inside it."""

    attempt: Attempt
    cmd_id: CommandId
    argv: tuple[str, ...]
    cwd: str | None
    worktree_id: WorktreeId | None
    subdir: str | None
    pre_head: str | None
    """The commit the worktree's HEAD must be at, else PRECONDITION_FAILED."""
    env: Mapping[str, str]
    secrets: Mapping[str, str]
    """Sealed values by name; opened only on the way to the release pipe."""
    timeout_ms: int | None
    grace_ms: int
    roots: tuple[str, ...]
    """Directories one of which must hold the real path of `cwd`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessIdentity:
    """A process for ever: never a pid alone. `start` is field 22 of /proc/PID/stat."""

    boot_id: str
    pid: int
    start: int


class LeaseAction(StrEnum):
    """What the shim does by itself when the deadline it was given comes near."""

    CONTINUE = "continue"
    FREEZE = "freeze"
    STOP = "stop"

    @classmethod
    def of(cls, on_loss: OnLoss) -> "LeaseAction":
        """The action for a signed `on_loss`."""
        return cls(on_loss.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorktreePlan:
    """A worktree to be made: `branch` None means a detached HEAD at `base`."""

    worktree_id: WorktreeId
    cmd_id: CommandId
    repo: str
    base: str
    branch: str | None
    roots: tuple[str, ...]
    """Directories one of which must hold the real path of `repo`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPlan:
    """A worktree to be removed."""

    worktree_id: WorktreeId
    cmd_id: CommandId
    force: bool
    pre_head: str | None = None
    """The commit its HEAD must be at, else PRECONDITION_FAILED."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorktreeMade:
    """A worktree that is there, verified: HEAD is `head`, on `branch`."""

    path: str
    head: str
    branch: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorktreeGone:
    """A worktree that is not there any more; its branch still is."""

    head: str | None
    branch: str | None
    was_dirty: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """How an attempt ended, as its shim wrote it. A claim of another process: checked for form, never for truth."""

    verdict: str
    code: int | None
    signal: int | None
    core: bool
    cause_kind: str
    cause_by: str
    cause_reason: str | None
    cause_detail: str
    started_ms: int | None
    ended_ms: int | None
    duration_ms: int | None
    utime_us: int
    stime_us: int
    maxrss_kib: int
    streams: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 (hex) by stream name."""
    log_end: int
    log_segments: int
    log_chain: str
    drain: str
    swept: tuple[tuple[str, int, int], ...]
    """Tier, signal, count."""
    survivors: int
    boot_id: str
    unreleased: bool = False
    """It was never let go: provably nothing ran."""


class Phase(StrEnum):
    """How far the shim of an attempt got, by its files."""

    NONE = "none"
    READY = "ready"
    RELEASED = "released"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is found of an attempt on disk at start."""

    attempt: Attempt
    same_boot: bool
    phase: Phase
    lock_held: bool
    exit: ExitRecord | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep of a lost attempt found and did."""

    found: int
    signalled: int
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRow:
    """A command as the journal has it. `envelope` is empty once it was pruned."""

    digest: Digest
    cmd_id: CommandId
    kind: str
    seq: int | None
    envelope: bytes
    policy_digest: Digest
    receipt_seq: int | None
    """`out_seq` of its receipt; None while its effect is pending."""
