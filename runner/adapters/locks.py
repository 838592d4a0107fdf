"""Locks across processes: one file each, held with flock, so that whoever holds one keeps it exactly as long as it lives.

The descriptor is what is held. A tool that inherits it keeps the lock when we die, and therefore nothing here ever says LOCK_UN:
that would open the lock for the tool as well. Lock files are never removed: a removed one could be held and made anew at once.
"""

import fcntl
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

from protocol.errors import Reason
from runner.errors import Broken

LOCK_WAIT_MS: Final = 660_000
"""Longer than any one git verb may take (ten minutes), so that a git left behind by a dead daemon is always outwaited."""
LOCK_POLL_MS: Final = 10
LOCK_POLL_MS_MAX: Final = 200
"""Two tasks that meet wait a few polls; a long checkout is asked five times a second."""
WORKTREE_LOCKS: Final = 1024
"""Worktrees share this many files, so that the directory does not grow by one file per worktree ever made."""
LOCK_MODE: Final = 0o600


class Locks:
    """The lock files in one directory. Order: a worktree's first, then its repository's; one of each at most."""

    def __init__(self, directory: Path, wait_ms: int = LOCK_WAIT_MS) -> None:
        self._dir = directory
        self._wait_ms = wait_ms

    @asynccontextmanager
    async def worktree(self, worktree_id: str) -> AsyncIterator[int]:
        """Hold the lock of a managed directory; gives its descriptor. Raises Broken(WORKTREE_BUSY)."""
        number = int.from_bytes(hashlib.sha256(worktree_id.encode()).digest()[:8], "big") % WORKTREE_LOCKS
        async with self._hold(f"w-{number:04d}", f"worktree {worktree_id}") as fd:
            yield fd

    @asynccontextmanager
    async def repository(self, git_dir: str) -> AsyncIterator[int]:
        """Hold the lock of a repository, by the real path of its common git directory. Raises Broken(WORKTREE_BUSY)."""
        name = hashlib.sha256(os.fsencode(git_dir)).hexdigest()
        async with self._hold(f"r-{name}", f"repository {git_dir}") as fd:
            yield fd

    @asynccontextmanager
    async def _hold(self, name: str, whose: str) -> AsyncIterator[int]:
        fd = await anyio.to_thread.run_sync(self._open, name)
        try:
            await self._take(fd, whose)
            yield fd
        finally:
            os.close(fd)

    def _open(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._dir / name, flags, LOCK_MODE)
        except OSError as exc:
            raise Broken(Reason.INFRA, f"the lock file {name} cannot be opened: {exc.strerror}") from exc

    async def _take(self, fd: int, whose: str) -> None:
        poll_ms = LOCK_POLL_MS
        deadline = anyio.current_time() + self._wait_ms / 1000
        # A poll that never waits, not a thread that does: a blocked flock can be neither cancelled nor bounded.
        while not _try(fd):
            if anyio.current_time() >= deadline:
                raise Broken(Reason.WORKTREE_BUSY, f"the lock of {whose} was held for {self._wait_ms} ms")
            await anyio.sleep(poll_ms / 1000)
            poll_ms = min(poll_ms * 2, LOCK_POLL_MS_MAX)


def _try(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
