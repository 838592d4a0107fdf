"""What may be asked over REST: closed models that become the arguments of commands. Pure."""

from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from controlplane.errors import Fault, RequestRefused
from controlplane.limits import PAYLOAD_HEADER_BYTES_MAX
from protocol.commands import (
    Argument,
    EnvName,
    EnvValue,
    ExecutionStart,
    OnLoss,
    PathCwd,
    SealedSecret,
    WorktreeCwd,
)
from protocol.identity import Labels
from protocol.ids import Attempt
from protocol.limits import (
    ARGV_ITEMS_MAX,
    ENV_ITEMS_MAX,
    GRACE_MS_MAX,
    PAYLOAD_BYTES_MAX,
    SECRETS_ITEMS_MAX,
    TIMEOUT_MS_MAX,
)
from protocol.secretbox import seal_secret
from protocol.wire import AbsolutePath, Closed, Id, RelativePath, Text, first_error

GraceMs = Annotated[int, Field(ge=0, le=GRACE_MS_MAX)]


class JoinRequest(Closed):
    """Make a join token."""

    name: Id | None = None
    labels: Labels = {}


class ExecutionRequest(Closed):
    """Run `argv` on a runner, in a directory or a managed worktree."""

    argv: Annotated[list[Argument], Field(min_length=1, max_length=ARGV_ITEMS_MAX)]
    cwd: AbsolutePath | None = None
    worktree: Id | None = None
    subdir: RelativePath | None = None
    env: Annotated[dict[EnvName, EnvValue], Field(max_length=ENV_ITEMS_MAX)] = {}
    secrets: Annotated[dict[EnvName, Text], Field(max_length=SECRETS_ITEMS_MAX, repr=False)] = {}
    timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    grace_ms: GraceMs | None = None
    on_loss: OnLoss = OnLoss.CONTINUE

    @model_validator(mode="after")
    def _somewhere(self) -> "ExecutionRequest":
        if (self.cwd is None) == (self.worktree is None):
            raise ValueError("exactly one of cwd and worktree says where")
        if self.subdir is not None and self.worktree is None:
            raise ValueError("subdir goes with worktree")
        return self


class StopRequest(Closed):
    """End an execution."""

    grace_ms: GraceMs | None = None


class WorktreeRequest(Closed):
    """Make a worktree of the repository at `repo`."""

    repo: AbsolutePath
    base: Annotated[Text, Field(min_length=1, max_length=256)]
    branch: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    id: Id | None = None


class RemoveRequest(Closed):
    """Remove a worktree; a dirty one only with `force`."""

    force: bool = False


def start_of(request: ExecutionRequest, runner_id: str, seal_x: str, attempt: Attempt) -> bytes:
    """The arguments of the start, with every secret sealed to the runner for this attempt and name.

    Raises:
        RequestRefused: BAD_REQUEST, or TOO_LARGE for what no command can carry.
    """
    cwd: PathCwd | WorktreeCwd
    if request.cwd is not None:
        cwd = PathCwd(type="path", path=request.cwd)
    else:
        assert request.worktree is not None, "the model wants one of the two"
        cwd = WorktreeCwd(type="worktree", worktree_id=request.worktree, subdir=request.subdir)
    try:
        secrets = [
            SealedSecret(name=name, sealed=seal_secret(value.encode(), seal_x, runner_id, attempt, name))
            for name, value in request.secrets.items()
        ]
        start = ExecutionStart(
            execution_id=attempt.execution_id,
            start_token=attempt.start_token,
            argv=request.argv,
            cwd=cwd,
            env=request.env,
            secrets=secrets,
            timeout_ms=request.timeout_ms,
            grace_ms=request.grace_ms,
        )
    except ValidationError as exc:
        raise RequestRefused(Fault.BAD_REQUEST, first_error(exc)) from None
    except ValueError:
        raise RequestRefused(Fault.TOO_LARGE, "a secret is too long") from None
    return fitting(start.dump())


def fitting(args: bytes) -> bytes:
    """`args`, if a command can carry them. Raises RequestRefused(TOO_LARGE)."""
    if len(args) > PAYLOAD_BYTES_MAX - PAYLOAD_HEADER_BYTES_MAX:
        raise RequestRefused(Fault.TOO_LARGE, "no command can carry that much")
    return args
