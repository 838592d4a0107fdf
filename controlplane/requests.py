"""What may be asked over REST: closed models that become the arguments of commands. Pure."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from controlplane.errors import Fault, RequestRefused
from controlplane.limits import PAYLOAD_HEADER_BYTES_MAX
from protocol.commands import (
    Background,
    EnvName,
    ExecutionStart,
    InputKey,
    Kind,
    OnLoss,
    Overflow,
    PathCwd,
    PtyOpen,
    SealedSecret,
    SignalName,
    Size,
    SizePolicy,
    ViewerMode,
    WorktreeCwd,
)
from protocol.identity import Labels
from protocol.ids import Attempt
from protocol.limits import (
    ARGV_ITEMS_MAX,
    ENV_ITEMS_MAX,
    GRACE_MS_MAX,
    INPUT_PIECE_BYTES_MAX,
    JSON_INT_MAX,
    PAYLOAD_BYTES_MAX,
    SECRETS_ITEMS_MAX,
    TIMEOUT_MS_MAX,
)
from protocol.secretbox import seal_secret
from protocol.starts import Argument, EnvValue
from protocol.wire import AbsolutePath, Closed, Id, JsonObject, Positive, RelativePath, Text, ViewerId, first_error

GraceMs = Annotated[int, Field(ge=0, le=GRACE_MS_MAX)]


class JoinRequest(Closed):
    """Make a join token."""

    name: Id | None = None
    labels: Labels = {}


class StartRequest(Closed):
    """What is the same of all that is started on a runner, in a directory or a managed worktree."""

    argv: Annotated[list[Argument], Field(max_length=ARGV_ITEMS_MAX)]
    cwd: AbsolutePath | None = None
    worktree: Id | None = None
    subdir: RelativePath | None = None
    env: Annotated[dict[EnvName, EnvValue], Field(max_length=ENV_ITEMS_MAX)] = {}
    secrets: Annotated[dict[EnvName, Text], Field(max_length=SECRETS_ITEMS_MAX, repr=False)] = {}
    timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    grace_ms: GraceMs | None = None
    on_loss: OnLoss = OnLoss.CONTINUE
    idle_timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None

    @model_validator(mode="after")
    def _somewhere(self) -> "StartRequest":
        if (self.cwd is None) == (self.worktree is None):
            raise ValueError("exactly one of cwd and worktree says where")
        if self.subdir is not None and self.worktree is None:
            raise ValueError("subdir goes with worktree")
        return self


class ExecutionRequest(StartRequest):
    """Run `argv` with pipes."""

    argv: Annotated[list[Argument], Field(min_length=1, max_length=ARGV_ITEMS_MAX)]
    overflow: Overflow = Overflow.HEAD_TAIL
    stdin: InputKey | None = None
    events: bool = False


class PtyRequest(StartRequest):
    """Run `argv`, or the login shell of the runner's user, in a terminal."""

    runner: Id
    argv: Annotated[list[Argument], Field(max_length=ARGV_ITEMS_MAX)] = []
    size: Size
    size_policy: SizePolicy = SizePolicy.LATEST
    background: Background = Background.SWEEP


class AttachRequest(Closed):
    """Let whoever holds `key` look on, or type. Without `viewer` it is the one that was let in with this key and mode, or a new one."""

    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{43}$")]
    mode: ViewerMode = ViewerMode.WRITE
    viewer: ViewerId | None = None


class StopRequest(Closed):
    """End an execution; with `runner` or `start_token` one attempt of it, also one that is not known here."""

    grace_ms: GraceMs | None = None
    runner: Id | None = None
    start_token: Positive | None = None


class SignalRequest(Closed):
    """Send a signal to an attempt that runs; without `start_token` to the current one."""

    signal: SignalName
    to: Literal["child", "tree"] = "child"
    start_token: Positive | None = None


class InputRequest(Closed):
    """A piece of an attempt's stdin, signed by whoever started it (`protocol.stdin`)."""

    offset: Annotated[int, Field(ge=0, le=JSON_INT_MAX)]
    data: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=(INPUT_PIECE_BYTES_MAX + 2) // 3 * 4)]
    end: bool = False
    sig: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{86}$")]
    start_token: Positive | None = None

    @property
    def size(self) -> int:
        """Bytes of the piece."""
        return len(self.data) // 4 * 3 - self.data.count("=")


class RerunRequest(Closed):
    """Run an execution once more, on its runner or another one; its secrets were not kept and are wanted again.

    It has no stdin: whoever wrote to the first attempt's is gone.
    """

    runner: Id | None = None
    secrets: Annotated[dict[EnvName, Text], Field(max_length=SECRETS_ITEMS_MAX, repr=False)] = {}


class WorktreeRequest(Closed):
    """Make a worktree of the repository at `repo`."""

    repo: AbsolutePath
    base: Annotated[Text, Field(min_length=1, max_length=256)]
    branch: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    id: Id | None = None


class RemoveRequest(Closed):
    """Remove a worktree; a dirty one only with `force`."""

    force: bool = False


def start_of(request: ExecutionRequest | PtyRequest, runner_id: str, seal_x: str, attempt: Attempt) -> bytes:
    """The arguments of the start, of the kind that is asked for, with every secret sealed to the runner for this attempt and name.

    Raises:
        RequestRefused: BAD_REQUEST, or TOO_LARGE for what no command can carry.
    """
    cwd: PathCwd | WorktreeCwd
    if request.cwd is not None:
        cwd = PathCwd(type="path", path=request.cwd)
    else:
        assert request.worktree is not None, "the model wants one of the two"
        cwd = WorktreeCwd(type="worktree", worktree_id=request.worktree, subdir=request.subdir)
    start: ExecutionStart | PtyOpen
    try:
        common: JsonObject = {
            "execution_id": attempt.execution_id,
            "start_token": attempt.start_token,
            "argv": request.argv,
            "cwd": cwd,
            "env": request.env,
            "secrets": _sealed(request.secrets, runner_id, seal_x, attempt),
            "timeout_ms": request.timeout_ms,
            "grace_ms": request.grace_ms,
            "idle_timeout_ms": request.idle_timeout_ms,
        }
        if isinstance(request, PtyRequest):
            size, policy = request.size, request.size_policy
            start = PtyOpen(**common, size=size, size_policy=policy, background=request.background)
        else:
            overflow, stdin = request.overflow, request.stdin
            start = ExecutionStart(**common, overflow=overflow, stdin=stdin, events=request.events)
    except ValidationError as exc:
        raise RequestRefused(Fault.BAD_REQUEST, first_error(exc)) from None
    return fitting(start.dump())


def start_again(
    kind: str, before: bytes, secrets: Mapping[str, str], runner_id: str, seal_x: str, attempt: Attempt
) -> ExecutionStart | PtyOpen:
    """The arguments of a later attempt: those of the start `before`, which is of `kind`, with its secrets sealed anew.

    Raises:
        RequestRefused: SECRETS_WANTED when other secrets are given than the first start had, or none; TOO_LARGE.
    """
    start = PtyOpen.parse(before) if kind == Kind.PTY_OPEN else ExecutionStart.parse(before)
    wanted = sorted(secret.name for secret in start.secrets)
    if wanted != sorted(secrets):
        said = f"it wants the values of these again: {', '.join(wanted)}" if wanted else "it has no secrets"
        raise RequestRefused(Fault.SECRETS_WANTED, said)
    update = {"start_token": attempt.start_token, "secrets": _sealed(secrets, runner_id, seal_x, attempt)}
    return start.model_copy(update=update if kind == Kind.PTY_OPEN else update | {"stdin": None})


def _sealed(secrets: Mapping[str, str], runner_id: str, seal_x: str, attempt: Attempt) -> list[SealedSecret]:
    try:
        return [
            SealedSecret(name=name, sealed=seal_secret(value.encode(), seal_x, runner_id, attempt, name))
            for name, value in secrets.items()
        ]
    except ValidationError:
        raise
    except ValueError:
        raise RequestRefused(Fault.TOO_LARGE, "a secret is too long") from None


def fitting(args: bytes) -> bytes:
    """`args`, if a command can carry them. Raises RequestRefused(TOO_LARGE)."""
    if len(args) > PAYLOAD_BYTES_MAX - PAYLOAD_HEADER_BYTES_MAX:
        raise RequestRefused(Fault.TOO_LARGE, "no command can carry that much")
    return args
