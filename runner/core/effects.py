"""The closed union of all a runner can do. Effects of one turn are performed in order, after what it must remember is durable."""

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.envelope import Verified
from protocol.identity import Certificate
from protocol.ids import Attempt, Digest
from protocol.keyset import Keyset
from protocol.messages import HeldLease, Need, Refused, ReportItem
from runner.core.journaling import Write
from runner.core.plans import AttemptPlan, LeaseAction, RemovalPlan, WorktreePlan


@dataclass(frozen=True, slots=True)
class Persist:
    """Make these durable, in one commit with all others of the turn, before anything else of the turn happens."""

    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the plane now, if there is a session; nobody resends it."""

    message: Need | Refused


@dataclass(frozen=True, slots=True)
class SendBeat:
    """Send a heartbeat, if there is a session."""

    hw: int
    leases: tuple[HeldLease, ...]
    attempts: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class Offer:
    """New report items that are durable now."""

    items: tuple[ReportItem, ...]


@dataclass(frozen=True, slots=True)
class ReportAgain:
    """Report stored items once more: their command came twice, or a stop met a settled attempt."""

    out_seqs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PrepareAttempt:
    """Start a shim behind its barrier. `again`: what an earlier daemon left of it, provably unreleased, is cleared first."""

    plan: AttemptPlan
    digest: Digest
    again: bool = False


@dataclass(frozen=True, slots=True)
class ReleaseAttempt:
    """Let a prepared attempt go."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class AbandonAttempt:
    """Close the barrier of a prepared attempt: it will never run."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StopAttempt:
    """Begin the stop ladder. `grace_ms` None: the attempt's own."""

    attempt: Attempt
    grace_ms: int | None
    by: str


@dataclass(frozen=True, slots=True)
class PushLease:
    """Tell a shim its deadline (BOOTTIME)."""

    attempt: Attempt
    token: int
    deadline_ms: int
    action: LeaseAction


@dataclass(frozen=True, slots=True)
class CollectAttempt:
    """The attempt is settled: its shim need not linger."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class AdoptAttempt:
    """Connect to the living shim of an attempt; its end is heard from then on."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SweepAttempt:
    """Its shim is gone and left no record: end what is left of it, and say what was found."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class CreateWorktree:
    """Make a worktree, or finish one that was half made under the same command."""

    plan: WorktreePlan
    digest: Digest


@dataclass(frozen=True, slots=True)
class RemoveWorktree:
    """Remove a worktree, or finish a removal that was begun under the same command."""

    plan: RemovalPlan
    digest: Digest


@dataclass(frozen=True, slots=True)
class KeepIdentity:
    """Persist a newer keyset, and the certificate of a new incarnation."""

    keyset: Verified[Keyset]
    certificate: Verified[Certificate] | None


@dataclass(frozen=True, slots=True)
class Note:
    """Log one fact, once. `event` is from the registry in runner/logs.py."""

    event: str
    fields: Mapping[str, str | int | None]


Effect = (
    Persist
    | Say
    | SendBeat
    | Offer
    | ReportAgain
    | PrepareAttempt
    | ReleaseAttempt
    | AbandonAttempt
    | StopAttempt
    | PushLease
    | CollectAttempt
    | AdoptAttempt
    | SweepAttempt
    | CreateWorktree
    | RemoveWorktree
    | KeepIdentity
    | Note
)
