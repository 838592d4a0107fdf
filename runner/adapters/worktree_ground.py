"""The ground that making and removing worktrees stand on: places, locks, threads, and the writing verbs of one command."""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import anyio
import anyio.to_thread

from protocol.errors import Reason
from runner.adapters.git import ENVIRONMENT, WRITE_TIMEOUT_MS, Git
from runner.adapters.locks import Locks
from runner.adapters.ownership import Foreign, Owner, disk_errors, write_owner
from runner.adapters.repositories import registration
from runner.adapters.trash import Trash
from runner.errors import Refused
from runner.ports import Clock, Tools

STAGED: Final = ".new-"
"""Before the id of a managed directory that has no marker yet; no id begins with a dot."""
UNDO_FROM: Final = 50
"""Steps of an undoing are numbered above those of the making: a name is never used twice by one command."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """One state directory's worktrees, and what acts on them."""

    home: Path
    records: Path
    """Of removals, by command."""
    runner: str
    inc: int
    git: Git
    tools: Tools
    clock: Clock
    locks: Locks
    trash: Trash
    threads: anyio.CapacityLimiter
    thrown: Callable[[], None]
    """Called after something went into the trash."""

    async def do(self, work: Callable[..., _T], *args: object) -> _T:
        """Do file work in a worker thread. Raises Broken(DISK_FULL | INFRA) where the disk fails."""
        with disk_errors():
            return await anyio.to_thread.run_sync(partial(work, *args), limiter=self.threads)

    async def throw(self, name: str, cmd_id: str) -> None:
        """Rename an entry of the home into the trash."""
        await self.do(self.trash.throw, self.home, name, cmd_id)
        self.thrown()

    def checkout(self, owner: Owner) -> str:
        """Where the checkout of a managed directory is."""
        return str(self.home / owner.worktree_id / owner.checkout)

    def own(self, found: Owner | Foreign) -> Owner:
        """What is there, when it is this runner's. Raises Refused(WORKTREE_FOREIGN)."""
        if isinstance(found, Foreign) or found.runner != self.runner:
            raise Refused(Reason.WORKTREE_FOREIGN, "its directory is there and carries no marker of this runner")
        return found

    async def fence(self, owner: Owner, token: int) -> Owner:
        """Let a command with this fencing token (0: it has none) at a worktree, and nobody below it from now on.

        Under the worktree's lock. Raises Refused(FENCED).
        """
        if 0 < token < owner.token:
            raise Refused(Reason.FENCED, "a later holder of its lease has been here")
        if token > owner.token:
            owner = replace(owner, token=token)
            await self.do(write_owner, self.home / owner.worktree_id, owner)
        return owner


class Writing:
    """The writing verbs of one command in one repository, under its locks; numbers them for the tools."""

    def __init__(self, ground: Ground, cmd_id: str, git_dir: str, locks: Sequence[int], number: int = 0) -> None:
        self._ground, self._cmd_id, self._git_dir, self._locks = ground, cmd_id, git_dir, locks
        self._number = number

    async def run(self, verb: str, argv: list[str]) -> None:
        """Run one verb under a shim. Raises Broken(GIT_FAILED | DISK_FULL)."""
        self._number += 1
        name = f"g-{self._cmd_id}.{self._number}"
        done = await self._ground.tools.run(
            name, argv, cwd=self._git_dir, env=ENVIRONMENT, locks=self._locks, timeout_ms=WRITE_TIMEOUT_MS
        )
        if done.status:
            raise self._ground.git.failed(verb, done.status, done.stderr.decode("utf-8", "replace"))

    async def forget(self, checkout: str) -> None:
        """Drop the registration of a worktree whose directory is away, where there is one."""
        if await self._ground.do(registration, self._git_dir, checkout) is not None:
            await self.run("worktree remove", self._ground.git.forget_argv(self._git_dir, checkout))


def is_checkout(path: str) -> bool:
    """Whether there is a real directory with a `.git` in it."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode) and os.path.lexists(os.path.join(path, ".git"))
    except OSError:
        return False
