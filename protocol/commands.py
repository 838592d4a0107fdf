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
from protocol.errors import ProtocolError, Reason
from protocol.ids import GENESIS, Attempt, ExecutionId, FencingToken
from protocol.limits import (
    ARGV_ITEM_BYTES_MAX,
    ARGV_ITEMS_MAX,
    COMMAND_TTL_MS_MAX,
    ENV_ITEMS_MAX,
    ENV_VALUE_BYTES_MAX,
    GRACE_MS_MAX,
    LEASE_TTL_MS_MAX,
    LEASE_TTL_MS_MIN,
    SAFETY_TTL_MS_MAX,
    SECRETS_ITEMS_MAX,
    TIMEOUT_MS_MAX,
)
from protocol.wire import (
    AbsolutePath,
    Closed,
    DigestText,
    FormatOne,
    Id,
    JsonObject,
    Millis,
    Positive,
    RelativePath,
    Text,
    at_most_bytes,
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


class Overflow(StrEnum):
    """What happens to the log of an attempt that reaches its limit."""

    HEAD_TAIL = "head_tail"
    """The beginning and the newest are kept, what was between is dropped."""
    BLOCK = "block"
    """Whoever writes waits until the control plane has taken some."""
    DISCARD = "discard"
    """The newest is not kept."""


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


class PathCwd(Closed):
    """A directory of the machine, inside the roots that the owner's policy manages."""

    type: Literal["path"]
    path: AbsolutePath


class WorktreeCwd(Closed):
    """A managed worktree, or a directory inside it."""

    type: Literal["worktree"]
    worktree_id: Id
    subdir: RelativePath | None = None


EnvName = Annotated[str, Field(pattern=r"^[^=\x00]{1,256}$")]
"""Anything else cannot be a variable: the name ends at the first `=`, the entry at the first NUL."""


class SealedSecret(Closed):
    """A value sealed to the runner's key; its name becomes an environment variable of the child alone."""

    name: EnvName
    sealed: Annotated[str, Field(min_length=1, max_length=32768)]


EnvValue = Annotated[Text, at_most_bytes(ENV_VALUE_BYTES_MAX)]
Argument = Annotated[Text, at_most_bytes(ARGV_ITEM_BYTES_MAX)]


class InputKey(Closed):
    """Who may write to the attempt's stdin: an Ed25519 key, made for it, that signs every piece."""

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]


class ExecutionStart(Closed):
    """Run `argv` as one attempt. `timeout_ms` null: no limit; `grace_ms` null: the runner's default.

    `idle_timeout_ms`: it ends when it wrote nothing for so long. `stdin` null: /dev/null. `events`: a third output, for
    JSON lines.
    """

    execution_id: Id
    start_token: Positive
    argv: Annotated[list[Argument], Field(min_length=1, max_length=ARGV_ITEMS_MAX)]
    cwd: Annotated[PathCwd | WorktreeCwd, Field(discriminator="type")]
    env: Annotated[dict[EnvName, EnvValue], Field(max_length=ENV_ITEMS_MAX)] = {}
    secrets: Annotated[list[SealedSecret], Field(max_length=SECRETS_ITEMS_MAX)] = []
    timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    grace_ms: Annotated[int, Field(ge=0, le=GRACE_MS_MAX)] | None = None
    idle_timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    overflow: Overflow = Overflow.HEAD_TAIL
    stdin: InputKey | None = None
    events: bool = False

    @model_validator(mode="after")
    def _runnable(self) -> "ExecutionStart":
        if not self.argv[0]:
            raise ValueError("argv[0] is empty")
        names = [secret.name for secret in self.secrets]
        if len(set(names)) != len(names) or set(names) & self.env.keys():
            raise ValueError("a name is given twice among env and secrets")
        return self

    @property
    def attempt(self) -> Attempt:
        """The attempt this start makes."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))


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


class SignalName(StrEnum):
    """Signals that a command may send; what ends an attempt is a stop."""

    HUP = "HUP"
    INT = "INT"
    USR1 = "USR1"
    USR2 = "USR2"
    WINCH = "WINCH"


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


Args = ExecutionStart | ExecutionStop | ExecutionSignal | WorktreeCreate | WorktreeRemove | LeaseRelease | LeaseAcquire


class Kind(StrEnum):
    """The kinds this version knows."""

    EXECUTION_START = "execution.start"
    EXECUTION_STOP = "execution.stop"
    EXECUTION_SIGNAL = "execution.signal"
    WORKTREE_CREATE = "worktree.create"
    WORKTREE_REMOVE = "worktree.remove"
    LEASE_RELEASE = "lease.release"
    LEASE_ACQUIRE = "lease.acquire"


ARGS: Final[Mapping[str, type[Args]]] = MappingProxyType(
    {
        Kind.EXECUTION_START: ExecutionStart,
        Kind.EXECUTION_STOP: ExecutionStop,
        Kind.EXECUTION_SIGNAL: ExecutionSignal,
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
