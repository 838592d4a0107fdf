"""The closed union of all a runner can do. Effects of one turn are performed in order, after what it must remember is durable."""

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.commands import ViewerMode
from protocol.envelope import Verified
from protocol.identity import Certificate
from protocol.ids import Attempt, Digest
from protocol.keyset import Keyset
from protocol.lease import Lease
from protocol.messages import Fetch, HeldLease, Need, Refused, ReportItem
from runner.core.journaling import Write
from runner.core.plans import Admission, AttemptPlan, LeaseAction, ProcessIdentity, RemovalPlan, WorktreePlan


@dataclass(frozen=True, slots=True)
class Persist:
    """Make these durable, in one commit with all others of the turn, before anything else of the turn happens."""

    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the plane now, if there is a session; nobody resends it."""

    message: Need | Refused | Fetch


@dataclass(frozen=True, slots=True)
class SendBeat:
    """Send a heartbeat, if there is a session."""

    hw: int
    leases: tuple[HeldLease, ...]
    attempts: tuple[Attempt, ...]
    lost: tuple[HeldLease, ...] = ()
    full: bool = False
    """Both sides compare their lists with this one."""
    admission: Admission = Admission.OPEN


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
class SignalAttempt:
    """Send a signal to its child, or to its whole `tree`; `id` is obeyed once (`AttemptSignalled`)."""

    attempt: Attempt
    id: bytes
    signal: str
    tree: bool


@dataclass(frozen=True, slots=True)
class AdmitViewer:
    """Let a viewer of a PTY in, durably: from then on what is signed with its `key` counts, as far as its `mode` goes.

    The same once more is done once; `ViewerAdmitted` or `ViewerNotAdmitted` answers the command `digest`.
    """

    attempt: Attempt
    viewer: str
    key: str
    mode: ViewerMode
    digest: Digest


@dataclass(frozen=True, slots=True)
class PushLease:
    """Tell a shim its deadline (BOOTTIME), and see to it that the lease is renewed even if this process is starved."""

    attempt: Attempt
    token: int
    deadline_ms: int
    action: LeaseAction
    grace_ms: int | None = None
    """What a stop at the loss gives; None: the attempt's own."""
    lease: Lease | None = None
    """To be renewed; None once it is given up."""


@dataclass(frozen=True, slots=True)
class CollectAttempt:
    """The attempt is settled: its shim need not linger."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class AdoptAttempt:
    """Connect to the living shim of an attempt; its end is heard from then on. `terminal`: it is a PTY."""

    attempt: Attempt
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class SweepAttempt:
    """Its shim is gone and left no record: end what is left of it, and say what was found."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class SweepRemains:
    """The attempt is settled, or unknown and its owner says so, and something of it lives: end it, and tell (`RemainsSwept`)."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class EndHungShim:
    """Its shim holds the lock and does nothing: KILL it by its identity, then sweep; the attempt is lost, with evidence."""

    attempt: Attempt
    shim: ProcessIdentity | None
    """As the journal has it; None: as the attempt's own files say."""


@dataclass(frozen=True, slots=True)
class ScanOrphans:
    """Look for living processes of ours (`OrphansFound`)."""


@dataclass(frozen=True, slots=True)
class Redial:
    """The machine slept: whatever is connected is dead or unsure, so dial anew at once."""


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
    | SignalAttempt
    | AdmitViewer
    | PushLease
    | CollectAttempt
    | AdoptAttempt
    | SweepAttempt
    | SweepRemains
    | EndHungShim
    | ScanOrphans
    | Redial
    | CreateWorktree
    | RemoveWorktree
    | KeepIdentity
    | Note
)
