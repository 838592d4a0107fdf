"""Managed worktrees: made and removed so that a crash at any point ends in all of it or nothing, and never in somebody's loss.

Layout: `worktrees/<id>/` holds the ownership marker and the checkout `<name of the repository>/`; `trash/` what was removed and
waits to be deleted; `removed/` a record of each removal; `locks/` the lock files.

Rule 1: the marker is on the disk before git runs, and says "ready" after HEAD was verified; only a ready worktree is handed out.
Rule 2: what carries no marker of this runner is never touched; nothing but our own records and what is in `worktrees/` and
`trash/` is ever unlinked.
Rule 3: a cancellation is treated as a crash: what is half made stays for the same command to find.
"""

import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio

from protocol.errors import Reason
from protocol.ids import is_id
from runner.adapters.git import Git
from runner.adapters.locks import LOCK_WAIT_MS, Locks
from runner.adapters.ownership import Owner, State, look, prune_removals
from runner.adapters.repositories import read_head
from runner.adapters.trash import Trash
from runner.adapters.worktree_ground import STAGED, Ground, is_checkout
from runner.adapters.worktree_making import Making
from runner.adapters.worktree_removal import Removing
from runner.core.plans import RemovalPlan, WorktreeGone, WorktreeMade, WorktreePlan
from runner.core.refnames import base_fault, branch_fault
from runner.errors import Broken, Refused
from runner.ports import Clock, Tools

THREADS: Final = 4
"""Worker threads for file work: a slow disk must not take all threads of the process."""
DIRECTORY_MODE: Final = 0o700
TRASH_IDLE_MS: Final = 30_000
"""Deleting right before creating makes a checkout three to eight times slower on ext4, so the trash waits for a pause."""
TRASH_WAIT_MS: Final = 300_000
"""A runner that is never idle must still get its disk back."""

_T = TypeVar("_T")


class GitWorktrees:
    """The `Worktrees` port over git. Reads run as plain processes, writes through `tools` under the locks."""

    def __init__(
        self,
        state_dir: Path,
        *,
        runner: str,
        inc: int,
        git: Git,
        tools: Tools,
        clock: Clock,
        lock_wait_ms: int = LOCK_WAIT_MS,
    ) -> None:
        state = Path(os.path.realpath(state_dir))  # git compares registered paths as text
        for name in ("worktrees", "trash", "removed", "locks"):
            (state / name).mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
        self._thrown = anyio.Event()
        self._sweeping = anyio.Lock()
        self._busy = 0
        self._idle_since_ms = 0
        self._ground = Ground(
            home=state / "worktrees",
            records=state / "removed",
            runner=runner,
            inc=inc,
            git=git,
            tools=tools,
            clock=clock,
            locks=Locks(state / "locks", lock_wait_ms),
            trash=Trash(state / "trash"),
            threads=anyio.CapacityLimiter(THREADS),
            thrown=lambda: self._thrown.set(),
        )

    def path(self, worktree_id: str) -> str | None:
        """The checkout of a worktree that is ready and ours, else None."""
        owner = look(self._ground.home / worktree_id) if is_id(worktree_id) else None
        if not isinstance(owner, Owner) or owner.runner != self._ground.runner or owner.state is not State.READY:
            return None
        checkout = self._ground.checkout(owner)
        return checkout if is_checkout(checkout) else None

    def head(self, worktree_id: str) -> str | None:
        """The commit its HEAD is at now, None when it is not there. Raises Broken(GIT_FAILED)."""
        path = self.path(worktree_id)
        return None if path is None else read_head(path)[0]

    async def create(self, plan: WorktreePlan) -> WorktreeMade:
        """Make the worktree, or find it made by the same command.

        Raises:
            Refused: BAD_ARGS, BRANCH_INVALID, BASE_NOT_FOUND, REPO_OUTSIDE_ROOTS, REPO_INVALID, REPO_HOSTILE, BRANCH_EXISTS,
                WORKTREE_EXISTS, WORKTREE_FOREIGN or FENCED. Nothing was changed.
            Broken: GIT_FAILED, DISK_FULL, INFRA, or WORKTREE_BUSY when a lock was not to be had. It is undone, or `detail` says
                what is not.
        """
        _check_names(plan)
        self._busy += 1
        try:
            async with self._ground.locks.worktree(plan.worktree_id) as lock:
                half = await self._of_this_command(plan)
                if half is not None and half.state is State.READY:
                    return await self._ground.do(self._made, half)
                return await Making(self._ground, plan, lock, half).run()
        finally:
            self._busy -= 1
            self._idle_since_ms = self._ground.clock.now().boot_ms

    async def remove(self, plan: RemovalPlan) -> WorktreeGone:
        """Rename the worktree into the trash and drop its registration; its branch stays, its files go when there is time.

        Raises:
            Refused: BAD_ARGS, WORKTREE_UNKNOWN, WORKTREE_FOREIGN, FENCED, WORKTREE_BUSY (locked with git), WORKTREE_DIRTY, or REPO_HOSTILE
                when nobody may look whether it is dirty; the last two never with `force`. Nothing was changed.
            Broken: GIT_FAILED, DISK_FULL, INFRA, or WORKTREE_BUSY when a lock was not to be had.
        """
        if not is_id(plan.worktree_id) or not is_id(plan.cmd_id):
            raise Refused(Reason.BAD_ARGS, "not an id")
        async with self._ground.locks.worktree(plan.worktree_id) as lock:
            return await Removing(self._ground, plan, lock).run()

    async def leftovers(self) -> list[str]:
        """Ids of managed directories that were never finished: their command has to be given again, or they are removed."""
        return await self._ground.do(self._unfinished)

    async def sweep_trash(self) -> list[str]:
        """Delete everything in the trash, also what an earlier daemon left; says what could not be deleted, and why."""
        ground = self._ground
        faults: list[str] = []

        async def attempt(work: Callable[..., Coroutine[Any, Any, _T]], *args: object) -> _T | None:
            try:
                return await work(*args)
            except Broken as exc:
                faults.append(exc.detail)
                return None

        async with self._sweeping:
            for name in await attempt(ground.do, self._staged) or []:
                await attempt(self._throw_staged, name)
            for entry in await attempt(ground.do, ground.trash.entries) or []:
                await attempt(ground.trash.delete, entry, ground.threads)
            await attempt(ground.do, prune_removals, ground.records)
        return faults

    async def keep_trash_empty(self, complain: Callable[[str], None]) -> None:
        """Sweep whenever something was thrown away and nothing was made for a while; runs until it is cancelled.

        The first time for what an earlier daemon left. `complain` hears of what could not be deleted.
        """
        self._thrown.set()
        while True:
            await self._thrown.wait()
            self._thrown = anyio.Event()
            with anyio.move_on_after(TRASH_WAIT_MS / 1000):
                while (left_ms := self._until_idle_ms()) > 0:  # noqa: ASYNC110 - time passing is what we wait for
                    await anyio.sleep(left_ms / 1000)
            for fault in await self.sweep_trash():
                complain(fault)

    async def _of_this_command(self, plan: WorktreePlan) -> Owner | None:
        """The marker that this very command left, if any. Raises Refused when the place is taken."""
        found = await self._ground.do(look, self._ground.home / plan.worktree_id)
        if found is None:
            return None
        owner = await self._ground.fence(self._ground.own(found), plan.token)
        if owner.cmd_id != plan.cmd_id:
            raise Refused(Reason.WORKTREE_EXISTS, "another command made a worktree of that id")
        return owner

    def _made(self, owner: Owner) -> WorktreeMade:
        path = self._ground.checkout(owner)
        if not is_checkout(path):
            raise Broken(Reason.INFRA, "its marker says ready, and its checkout is gone")
        return WorktreeMade(path=path, head=owner.head, branch=owner.branch)

    def _unfinished(self) -> list[str]:
        found = (look(self._ground.home / name) for name in sorted(os.listdir(self._ground.home)) if is_id(name))
        return [
            owner.worktree_id
            for owner in found
            if isinstance(owner, Owner) and owner.runner == self._ground.runner and owner.state is State.CREATING
        ]

    async def _throw_staged(self, name: str) -> None:
        """Throw away a managed directory that never got its marker: nobody is at it who does not hold its lock."""
        async with self._ground.locks.worktree(name.removeprefix(STAGED)):
            if await self._ground.do(os.path.lexists, self._ground.home / name):
                await self._ground.throw(name, name)

    def _staged(self) -> list[str]:
        return [name for name in os.listdir(self._ground.home) if name.startswith(STAGED)]

    def _until_idle_ms(self) -> int:
        if self._busy:
            return TRASH_IDLE_MS
        return TRASH_IDLE_MS - (self._ground.clock.now().boot_ms - self._idle_since_ms)


def _check_names(plan: WorktreePlan) -> None:
    """Refuse what no repository has to be asked about."""
    if not is_id(plan.worktree_id) or not is_id(plan.cmd_id):
        raise Refused(Reason.BAD_ARGS, "not an id")
    fault = None if plan.branch is None else branch_fault(plan.branch)
    if fault is not None:
        raise Refused(Reason.BRANCH_INVALID, f"a branch name {fault}")
    fault = base_fault(plan.base)
    if fault is not None:
        raise Refused(Reason.BASE_NOT_FOUND, f"a base {fault}")
