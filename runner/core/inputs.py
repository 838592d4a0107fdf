"""The closed union of all that can happen to a runner."""

from dataclasses import dataclass

from protocol.errors import Reason
from protocol.handshake import Established
from protocol.ids import Attempt, Digest
from protocol.session import BeatAnswered, ItemsAnswered
from runner.core.plans import ExitRecord, ProcessIdentity, Swept, WorktreeGone, WorktreeMade
from runner.core.policy import Policy


@dataclass(frozen=True, slots=True)
class Now:
    """One reading of the clocks: wall time for people, BOOTTIME (counts while the machine sleeps) for every decision."""

    wall_ms: int
    boot_ms: int


@dataclass(frozen=True, slots=True)
class EnvelopeReceived:
    """A command frame arrived; `env` is not yet believed."""

    env: bytes


@dataclass(frozen=True, slots=True)
class SessionUp:
    """A handshake succeeded."""

    established: Established


@dataclass(frozen=True, slots=True)
class SessionDown:
    """The connection is gone."""


@dataclass(frozen=True, slots=True)
class AttemptPrepared:
    """A shim waits behind its start barrier."""

    attempt: Attempt
    shim: ProcessIdentity


@dataclass(frozen=True, slots=True)
class AttemptNotPrepared:
    """No shim could be had; nothing ran. `refused`: the command's doing, not ours."""

    attempt: Attempt
    reason: Reason
    detail: str
    refused: bool


@dataclass(frozen=True, slots=True)
class AttemptExited:
    """The shim told how its attempt ended."""

    attempt: Attempt
    exit: ExitRecord


@dataclass(frozen=True, slots=True)
class AttemptLost:
    """No living shim and no exit record."""

    attempt: Attempt
    reason: Reason
    evidence: Swept | None


@dataclass(frozen=True, slots=True)
class WorktreeCreated:
    """The effect of the command `digest` is there."""

    digest: Digest
    made: WorktreeMade


@dataclass(frozen=True, slots=True)
class WorktreeRemoved:
    """The effect of the command `digest` is there."""

    digest: Digest
    gone: WorktreeGone


@dataclass(frozen=True, slots=True)
class WorktreeFailed:
    """The command `digest` had no effect. `refused`: the asker's doing, not ours."""

    digest: Digest
    reason: Reason
    detail: str
    refused: bool


@dataclass(frozen=True, slots=True)
class OwnerStop:
    """The owner of the machine wants an execution ended."""

    execution_id: str
    grace_ms: int | None
    by: str


@dataclass(frozen=True, slots=True)
class PolicyChanged:
    """The owner's policy was read anew."""

    policy: Policy


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went on."""


Input = (
    EnvelopeReceived
    | SessionUp
    | SessionDown
    | BeatAnswered
    | ItemsAnswered
    | AttemptPrepared
    | AttemptNotPrepared
    | AttemptExited
    | AttemptLost
    | WorktreeCreated
    | WorktreeRemoved
    | WorktreeFailed
    | OwnerStop
    | PolicyChanged
    | Tick
)
