"""The closed union of all that can happen to a runner."""

from dataclasses import dataclass

from protocol.errors import Reason
from protocol.handshake import Established
from protocol.ids import Attempt, Digest
from protocol.session import BeatAnswered, ItemsAnswered
from runner.core.plans import (
    Admission,
    ExitRecord,
    Headroom,
    Orphan,
    ProcessIdentity,
    Swept,
    WorktreeGone,
    WorktreeMade,
)
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
class AttemptSignalled:
    """The signal `id` reached so many processes of an attempt."""

    attempt: Attempt
    id: bytes
    count: int


@dataclass(frozen=True, slots=True)
class ViewerAdmitted:
    """The viewer that the command `digest` names is let in to its PTY, durably."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class ViewerNotAdmitted:
    """The command `digest` had no effect. `refused`: the asker's doing, not ours."""

    digest: Digest
    reason: Reason
    detail: str
    refused: bool


@dataclass(frozen=True, slots=True)
class ShimSilent:
    """The shim of an attempt holds its lock and does not answer."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class OrphansFound:
    """One look at all processes of this machine: those of ours, by attempt."""

    found: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True)
class RemainsSwept:
    """What was left of a settled or unknown attempt was ended, as far as it can be."""

    attempt: Attempt
    evidence: Swept


@dataclass(frozen=True, slots=True)
class HeadroomMeasured:
    """What the machine has left."""

    headroom: Headroom


@dataclass(frozen=True, slots=True)
class Woke:
    """The machine slept for `slept_ms`."""

    slept_ms: int


@dataclass(frozen=True, slots=True)
class OwnerAdmission:
    """The owner of the machine, or the daemon's own end (`by`), opens or closes it for new work.

    `deadline_ms` (BOOTTIME): when a drain stops what still runs; None: never. `keep`: also for the next daemon.
    """

    admission: Admission
    by: str
    deadline_ms: int | None = None
    keep: bool = True


@dataclass(frozen=True, slots=True)
class OwnerSweep:
    """The owner wants everything ended that is left of an attempt which is settled or unknown here."""

    attempt: Attempt
    by: str


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
    | AttemptSignalled
    | ViewerAdmitted
    | ViewerNotAdmitted
    | ShimSilent
    | OrphansFound
    | RemainsSwept
    | HeadroomMeasured
    | Woke
    | OwnerAdmission
    | OwnerSweep
    | WorktreeCreated
    | WorktreeRemoved
    | WorktreeFailed
    | OwnerStop
    | PolicyChanged
    | Tick
)
