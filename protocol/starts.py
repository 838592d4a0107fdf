"""What starts an attempt: an execution with pipes, or a PTY. What both share stands in `Start`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from protocol.choices import Background as Background
from protocol.choices import Overflow as Overflow
from protocol.choices import SizePolicy as SizePolicy
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import (
    ARGV_ITEM_BYTES_MAX,
    ARGV_ITEMS_MAX,
    ENV_ITEMS_MAX,
    ENV_VALUE_BYTES_MAX,
    GRACE_MS_MAX,
    SECRETS_ITEMS_MAX,
    TERMINAL_CELLS_MAX,
    TIMEOUT_MS_MAX,
)
from protocol.wire import AbsolutePath, Closed, Id, Positive, RelativePath, Text, at_most_bytes


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


class Start(Closed):
    """Run `argv` as one attempt. `timeout_ms` null: no limit; `grace_ms` null: the runner's default.

    `idle_timeout_ms`: it ends when it wrote nothing for so long.
    """

    execution_id: Id
    start_token: Positive
    argv: Annotated[list[Argument], Field(max_length=ARGV_ITEMS_MAX)]
    cwd: Annotated[PathCwd | WorktreeCwd, Field(discriminator="type")]
    env: Annotated[dict[EnvName, EnvValue], Field(max_length=ENV_ITEMS_MAX)] = {}
    secrets: Annotated[list[SealedSecret], Field(max_length=SECRETS_ITEMS_MAX)] = []
    timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None
    grace_ms: Annotated[int, Field(ge=0, le=GRACE_MS_MAX)] | None = None
    idle_timeout_ms: Annotated[int, Field(ge=1, le=TIMEOUT_MS_MAX)] | None = None

    @model_validator(mode="after")
    def _runnable(self) -> "Start":
        if self.argv and not self.argv[0]:
            raise ValueError("argv[0] is empty")
        names = [secret.name for secret in self.secrets]
        if len(set(names)) != len(names) or set(names) & self.env.keys():
            raise ValueError("a name is given twice among env and secrets")
        return self

    @property
    def attempt(self) -> Attempt:
        """The attempt this start makes."""
        return Attempt(ExecutionId(self.execution_id), FencingToken(self.start_token))


class ExecutionStart(Start):
    """An attempt with pipes. `stdin` null: /dev/null. `events`: a third output, for JSON lines."""

    argv: Annotated[list[Argument], Field(min_length=1, max_length=ARGV_ITEMS_MAX)]
    overflow: Overflow = Overflow.HEAD_TAIL
    stdin: InputKey | None = None
    events: bool = False


class Size(Closed):
    """Of a terminal, in characters."""

    rows: Annotated[int, Field(ge=1, le=TERMINAL_CELLS_MAX)]
    cols: Annotated[int, Field(ge=1, le=TERMINAL_CELLS_MAX)]


class PtyOpen(Start):
    """An attempt with a terminal: its log is a ring of the newest. An empty `argv` is the login shell of the runner's user."""

    size: Size
    size_policy: SizePolicy = SizePolicy.LATEST
    background: Background = Background.SWEEP
