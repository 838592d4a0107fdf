"""What is to be done, decided: values that effects carry to the adapters and that the journal keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from protocol.commands import Background, OnLoss, SizePolicy
from protocol.ids import Attempt, CommandId, Digest, WorktreeId


@dataclass(frozen=True, slots=True, kw_only=True)
class TerminalPlan:
    """The terminal that the child of a PTY gets instead of pipes. Rows and columns are those it is opened with."""

    rows: int
    cols: int
    size_policy: SizePolicy
    background: Background


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptPlan:
    """One attempt as it was admitted. `cwd` is absolute, or a worktree and a directory inside it."""

    attempt: Attempt
    cmd_id: CommandId
    argv: tuple[str, ...]
    """Empty: the login shell of the runner's user."""
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
    token: int = 1
    """The fencing token it runs under: its shim does not start it behind a higher fence."""
    outlive: tuple[str, ...] = ()
    """Names of processes that the owner lets live on."""
    idle_ms: int | None = None
    """It ends when it wrote nothing for so long."""
    overflow: str = "discard"
    """What happens to output beyond the spool's limit (`protocol.commands.Overflow`)."""
    input_key: str | None = None
    """Who may write to its stdin; None: nobody, there is none."""
    events: bool = False
    terminal: TerminalPlan | None = None
    """None: its child has pipes."""


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
    token: int = 0
    """The fencing token of the command; a lower one than the owner marker's is refused. 0: none was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalPlan:
    """A worktree to be removed."""

    worktree_id: WorktreeId
    cmd_id: CommandId
    force: bool
    pre_head: str | None = None
    """The commit its HEAD must be at, else PRECONDITION_FAILED."""
    token: int = 0
    """As of WorktreePlan."""


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
    remains: tuple["ProcessLeft", ...] = ()
    outlived: tuple["ProcessLeft", ...] = ()
    tiers: tuple[str, ...] = ()
    dropped: "DroppedMiddle | None" = None
    uploaded: "UploadedCopy | None" = None
    """What of its log goes up is not what it wrote: secrets are masked. Not the shim's word, but ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedCopy:
    """The copy of a log that goes up, where bytes of it were masked (`protocol.receipt.Uploaded`)."""

    redactor: str
    streams: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 (hex) by stream name; empty: not known any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedMiddle:
    """What of a log made room for its newest (`protocol.receipt.Dropped`)."""

    start: int
    end: int
    segments: int
    before: str
    last: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessLeft:
    """A process that was left alive, as its shim or the sweeper saw it; `why` is empty for one that was let live."""

    pid: int
    start: int
    name: str
    state: str = ""
    wchan: str = ""
    why: str = ""


class Phase(StrEnum):
    """How far the shim of an attempt got, by its files."""

    NONE = "none"
    READY = "ready"
    RELEASED = "released"
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is found of an attempt on this machine at start."""

    attempt: Attempt
    same_boot: bool
    phase: Phase
    lock_held: bool
    exit: ExitRecord | None
    spec: bool = True
    """Whether its spec is there and can be read: without one no shim was ever let go."""
    shim_answers: bool = True
    """Whether a shim that holds the lock says hello; one that does not is hung."""
    child_alive: bool = False
    """Whether something that carries its cookie is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep of a lost attempt found and did."""

    found: int
    signalled: int
    remaining: int
    tiers: tuple[tuple[str, int, int], ...] = ()
    """Tier, signal, count."""
    seen: tuple[str, ...] = ()
    """Who was found, a line for each, as many as evidence needs; likewise below."""
    remains: tuple[str, ...] = ()
    """Who could not be ended, and how it stands: `1234 sleep D wchan=folio_wait_bit d_state`."""
    outlived: tuple[str, ...] = ()
    """Who was let live on."""


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


class Admission(StrEnum):
    """Whether new work is taken; the owner's word."""

    OPEN = "open"
    PAUSED = "paused"
    """New starts are refused, or wait at the control plane; what runs goes on."""
    DRAINING = "draining"
    """As paused, and what still runs at the deadline is stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """What this machine has left, measured; None: the system does not tell."""

    disk_free: int | None = None
    disk_total: int | None = None
    """Bytes of the file system of the state directory."""
    inodes_free: int | None = None
    inodes_total: int | None = None
    memory_available: int | None = None
    fds_free: int | None = None
    """Descriptors the daemon may still open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Living processes that carry the cookie of one attempt of ours."""

    name: str
    """The attempt's, as the cookie has it; also of tools."""
    processes: int
    shim_alive: bool
    """Whether a shim holds the attempt's lock: then they are guarded, and no orphans."""
