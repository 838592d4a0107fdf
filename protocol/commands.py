"""What a control plane may ask: one strict header for every command, and a closed object of arguments for each kind.

The header is judged before the arguments are looked at: a well-signed, well-addressed header always consumes its number, so a
kind from the future ends in a receipt (UNSUPPORTED_KIND) and never in a stalled stream.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError, model_validator

from protocol import strict_json
from protocol.choices import SignalName as SignalName
from protocol.errors import ProtocolError, Reason
from protocol.ids import GENESIS, Attempt, ExecutionId, FencingToken
from protocol.limits import (
    COMMAND_TTL_MS_MAX,
    GRACE_MS_MAX,
    LEASE_TTL_MS_MAX,
    LEASE_TTL_MS_MIN,
    SAFETY_TTL_MS_MAX,
)
from protocol.starts import Background as Background
from protocol.starts import EnvName as EnvName
from protocol.starts import ExecutionStart as ExecutionStart
from protocol.starts import InputKey as InputKey
from protocol.starts import Overflow as Overflow
from protocol.starts import PathCwd as PathCwd
from protocol.starts import PtyOpen as PtyOpen
from protocol.starts import SealedSecret as SealedSecret
from protocol.starts import Size as Size
from protocol.starts import SizePolicy as SizePolicy
from protocol.starts import Start as Start
from protocol.starts import WorktreeCwd as WorktreeCwd
from protocol.wire import (
    AbsolutePath,
    Closed,
    DigestText,
    FormatOne,
    Id,
    JsonObject,
    Millis,
    Positive,
    Text,
    ViewerId,
    first_error,
)

COMMAND_VERSION: Final = 1


class Stream(StrEnum):
    """`ctl` is ordered and gapless; `safety` (stop, revoke) has no number and waits for nobody."""

    CTL = "ctl"
    SAFETY = "safety"


class OnLoss(StrEnum):
    """What happens to an attempt whose lease ran out."""

    CONTINUE = "continue"
    FREEZE = "freeze"
    STOP = "stop"


class Audience(Closed):
    """Exactly one incarnation of one runner of one organisation."""

    org: Id
    runner: Id
    inc: Positive


class LeaseGrant(Closed):
    """The right to run on `res` until `ttl_ms` after the grant, under a token that only rises."""

    res: Annotated[str, Field(pattern=r"^[a-z]+:[A-Za-z0-9_-]{1,64}$")]
    token: Positive
    ttl_ms: Annotated[int, Field(ge=LEASE_TTL_MS_MIN, le=LEASE_TTL_MS_MAX)]
    on_loss: OnLoss


class Actor(Closed):
    """Who asked, as the control plane knows it; for the audit, never for a decision."""

    sub: Annotated[str, Field(max_length=200)]
    via: Annotated[str, Field(max_length=64)] = "api"


class Need(Closed):
    """Approvals this command wants beyond what the owner's policy demands; it may raise, never lower."""

    approvals: Annotated[int, Field(ge=1, le=16)]
    of: Id


class Precondition(Closed):
    """What must hold for the effect to begin, else PRECONDITION_FAILED."""

    head: Annotated[str, Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")] | None = None


class Command(Closed):
    """The header of every command; `args` is an object that only its kind understands."""

    v: FormatOne
    cmd_id: Id
    kind: Annotated[str, Field(pattern=r"^[a-z_]{1,32}(\.[a-z_]{1,32}){1,3}$")]
    aud: Audience
    iss: Annotated[str, Field(min_length=1, max_length=200)]
    stream: Stream
    seq: Positive | None
    prev: DigestText | None
    iat: Millis
    nbf: Millis
    exp: Millis
    keyset_min: Positive
    lease: LeaseGrant | None = None
    pre: Precondition | None = None
    actor: Actor | None = None
    need: Need | None = None
    supersedes: Id | None = None
    trace: Annotated[str, Field(pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")] | None = None
    args: JsonObject

    @model_validator(mode="after")
    def _numbered_where_ordered(self) -> "Command":
        ordered = self.stream is Stream.CTL
        if ordered != (self.seq is not None) or ordered != (self.prev is not None):
            raise ValueError("ctl has seq and prev, safety has neither")
        if self.seq == 1 and self.prev != GENESIS:
            raise ValueError("the first command of a stream names the zero digest")
        return self

    @property
    def ttl_ms_max(self) -> int:
        """The longest `exp - iat` this command may have."""
        return SAFETY_TTL_MS_MAX if self.stream is Stream.SAFETY else COMMAND_TTL_MS_MAX


class AttemptTarget(Closed):
    """An attempt by name."""

    type: Literal["attempt"]
    execution_id: Id
    start_token: Positive


class CommandTarget(Closed):
    """Whatever the command `cmd_id` started or would start."""

    type: Literal["command"]
    cmd_id: Id


class ExecutionStop(Closed):
    """End an attempt by the stop ladder. Before its start it leaves a tombstone; after its end it changes nothing."""

    target: Annotated[AttemptTarget | CommandTarget, Field(discriminator="type")]
    grace_ms: Annotated[int, Field(ge=0, le=GRACE_MS_MAX)] | None = None


class PtyClose(ExecutionStop):
    """End a PTY: it is hung up, and what stays behind takes the stop ladder. As a stop in all else."""


class ViewerMode(StrEnum):
    """What a viewer of a PTY may do."""

    WRITE = "rw"
    READ = "ro"


class PtyAttach(Closed):
    """Let a viewer of a living PTY in: whoever holds `key` (Ed25519) may type there and say its size, or only look on."""

    execution_id: Id
    start_token: Positive
    viewer: ViewerId
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
    mode: ViewerMode = ViewerMode.WRITE

    @property
    def attempt(self) -> Attempt:
        """The attempt that is looked at."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))


class ExecutionSignal(Closed):
    """Send a signal to the child of a living attempt, or to every process of its tree; once."""

    execution_id: Id
    start_token: Positive
    signal: SignalName
    to: Literal["child", "tree"] = "child"

    @property
    def attempt(self) -> Attempt:
        """The attempt that is to get it."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))


class WorktreeCreate(Closed):
    """Make a worktree of the repository at `repo`, at commit `base`, on a new branch or detached (`branch` null)."""

    worktree_id: Id
    repo: AbsolutePath
    base: Annotated[Text, Field(min_length=1, max_length=256)]
    branch: Annotated[Text, Field(min_length=1, max_length=200)] | None = None


class WorktreeRemove(Closed):
    """Remove a managed worktree. A dirty one only with `force`; branches are never removed."""

    worktree_id: Id
    force: bool = False


class LeaseRelease(Closed):
    """Give up the lease on `res` up to and including `token`; its attempt is treated as at lease loss."""

    res: Annotated[str, Field(pattern=r"^[a-z]+:[A-Za-z0-9_-]{1,64}$")]
    token: Positive


class LeaseAcquire(Closed):
    """Give a living attempt the lease in the header, under a higher token than it had: it is thawed and goes on."""

    execution_id: Id
    start_token: Positive

    @property
    def attempt(self) -> Attempt:
        """The attempt that is to hold it."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))


Args = (
    ExecutionStart
    | ExecutionStop
    | ExecutionSignal
    | PtyOpen
    | PtyAttach
    | PtyClose
    | WorktreeCreate
    | WorktreeRemove
    | LeaseRelease
    | LeaseAcquire
)


class Kind(StrEnum):
    """The kinds this version knows."""

    EXECUTION_START = "execution.start"
    EXECUTION_STOP = "execution.stop"
    EXECUTION_SIGNAL = "execution.signal"
    PTY_OPEN = "pty.open"
    PTY_ATTACH = "pty.attach"
    PTY_CLOSE = "pty.close"
    WORKTREE_CREATE = "worktree.create"
    WORKTREE_REMOVE = "worktree.remove"
    LEASE_RELEASE = "lease.release"
    LEASE_ACQUIRE = "lease.acquire"


ARGS: Final[Mapping[str, type[Args]]] = MappingProxyType(
    {
        Kind.EXECUTION_START: ExecutionStart,
        Kind.EXECUTION_STOP: ExecutionStop,
        Kind.EXECUTION_SIGNAL: ExecutionSignal,
        Kind.PTY_OPEN: PtyOpen,
        Kind.PTY_ATTACH: PtyAttach,
        Kind.PTY_CLOSE: PtyClose,
        Kind.WORKTREE_CREATE: WorktreeCreate,
        Kind.WORKTREE_REMOVE: WorktreeRemove,
        Kind.LEASE_RELEASE: LeaseRelease,
        Kind.LEASE_ACQUIRE: LeaseAcquire,
    }
)
STREAM_OF: Final[Mapping[str, Stream]] = MappingProxyType(
    {
        Kind.EXECUTION_START: Stream.CTL,
        Kind.EXECUTION_STOP: Stream.SAFETY,
        Kind.EXECUTION_SIGNAL: Stream.CTL,
        Kind.PTY_OPEN: Stream.CTL,
        Kind.PTY_ATTACH: Stream.CTL,
        Kind.PTY_CLOSE: Stream.SAFETY,
        Kind.WORKTREE_CREATE: Stream.CTL,
        Kind.WORKTREE_REMOVE: Stream.CTL,
        Kind.LEASE_RELEASE: Stream.SAFETY,
        Kind.LEASE_ACQUIRE: Stream.CTL,
    }
)


class ArgsRefused(ProtocolError):
    """The arguments of a command are not what its kind takes; the number is consumed all the same."""


def parse_args(command: Command) -> Args:
    """Read `args` by kind. Raises ArgsRefused(UNSUPPORTED_KIND | WRONG_STREAM | BAD_ARGS)."""
    model = ARGS.get(command.kind)
    if model is None:
        raise ArgsRefused(Reason.UNSUPPORTED_KIND, "this version does not know the kind")
    if STREAM_OF[command.kind] is not command.stream:
        raise ArgsRefused(Reason.WRONG_STREAM, f"{command.kind} travels on {STREAM_OF[command.kind]}")
    try:
        return model.model_validate_json(strict_json.dumps(command.args))
    except ValidationError as exc:
        raise ArgsRefused(Reason.BAD_ARGS, first_error(exc)) from None
