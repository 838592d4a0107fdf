"""What the journal is asked to remember: a closed union of writes, and the image it gives back at start."""

from dataclasses import dataclass
from typing import Final

from protocol.execution import AttemptState
from protocol.ids import Attempt, CommandId, Digest, WorktreeId
from protocol.lease import Lease
from protocol.messages import ReportItem
from protocol.replay import Mark
from runner.core.plans import Admission, CommandRow, ProcessIdentity, WorktreeMade

SUPERSEDED_BY: Final = "superseded by "
"""How the `stop_by` of an attempt begins whose successor ended it; no id has a space."""


@dataclass(frozen=True, slots=True)
class PutMark:
    """`ctl` of incarnation `inc` is consumed up to `mark`; the mark never falls within an incarnation."""

    inc: int
    mark: Mark


@dataclass(frozen=True, slots=True)
class PutCommand:
    """A command whose number is consumed (or that came on the safety stream)."""

    row: CommandRow
    at_ms: int


@dataclass(frozen=True, slots=True)
class PutReceipt:
    """The one receipt of a command, into the outbox."""

    digest: Digest
    item: ReportItem
    at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRow:
    """An attempt as the journal has it."""

    attempt: Attempt
    digest: Digest
    cmd_id: CommandId
    state: AttemptState
    shim: ProcessIdentity | None = None
    lease: Lease | None = None
    stop_by: str | None = None
    stop_grace_ms: int | None = None
    worktree_id: WorktreeId | None = None
    settled_seq: int | None = None
    fenced_by: int | None = None
    """The token of the later attempt that takes its place."""


@dataclass(frozen=True, slots=True)
class PutAttempt:
    """The attempt as it is now; a SETTLED row is never overwritten. SETTLED without a number: intended, and never accepted."""

    row: AttemptRow
    at_ms: int


@dataclass(frozen=True, slots=True)
class PutSettlement:
    """The one settlement of an attempt: its row turns SETTLED and the statement goes into the outbox."""

    attempt: Attempt
    item: ReportItem
    at_ms: int


@dataclass(frozen=True, slots=True)
class PutEvent:
    """An event, into the outbox."""

    item: ReportItem
    at_ms: int


@dataclass(frozen=True, slots=True)
class PutTombstone:
    """A stop that came before its start: `target` is an attempt's name or a cmd_id; forgotten after `expires_ms`."""

    target: str
    cmd_id: CommandId
    expires_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorktreeRow:
    """A managed worktree as the journal has it; `made` is None while it is being made."""

    worktree_id: WorktreeId
    digest: Digest
    repo: str
    made: WorktreeMade | None
    token: int = 0
    """The highest fencing token of a command about it."""


@dataclass(frozen=True, slots=True)
class PutWorktree:
    """A worktree that is being made, or is there."""

    row: WorktreeRow


@dataclass(frozen=True, slots=True)
class DropWorktree:
    """A worktree that is gone, or never came to be."""

    worktree_id: WorktreeId


@dataclass(frozen=True, slots=True)
class PutAnswered:
    """Outbox items that the plane answered for good; they are kept for a plane that comes back from a backup."""

    out_seqs: tuple[int, ...]
    at_ms: int


@dataclass(frozen=True, slots=True)
class PutAdmission:
    """The owner's word on new work; `deadline_ms` (wall) is when a drain stops what still runs."""

    admission: Admission
    deadline_ms: int | None
    by: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class AppendLeaf:
    """One decision for the append-only table: what was decided about what, and under which policy."""

    kind: str
    subject: str
    detail: str
    policy_digest: Digest
    at_ms: int


Write = (
    PutMark
    | PutCommand
    | PutReceipt
    | PutAttempt
    | PutSettlement
    | PutEvent
    | PutTombstone
    | PutWorktree
    | DropWorktree
    | PutAnswered
    | PutAdmission
    | AppendLeaf
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Everything the journal knows that the engine needs at start."""

    marks: dict[int, Mark]
    """`ctl` mark by incarnation."""
    commands: list[CommandRow]
    """In the order they were received: all that are pending or belong to a living attempt, those with their envelopes, and
    the newest of the others."""
    attempts: list[AttemptRow]
    tombstones: dict[str, tuple[CommandId, int]]
    worktrees: list[WorktreeRow]
    out_head: int
    """Highest `out_seq`."""
    admission: Admission = Admission.OPEN
    drain_deadline_ms: int | None = None
    """Wall time."""
