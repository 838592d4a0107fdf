"""Removing one worktree: what would be lost is looked at, what was decided is recorded, and the rename into the trash does it.

The record is written before the rename and never after: whoever finds the record and the directory gone knows that it was done. A
registration is dropped by its path afterwards; `git worktree remove` would delete files itself, by name, and never finds any here.
"""

import os
from pathlib import Path

from protocol.errors import Reason
from runner import failpoints
from runner.adapters.git import said
from runner.adapters.ownership import MARKER, Foreign, Owner, Removal, State, look, read_removal, write_removal
from runner.adapters.repositories import has_submodules, is_locked, registration
from runner.adapters.worktree_ground import Ground, Writing, is_checkout
from runner.core.plans import RemovalPlan, WorktreeGone
from runner.errors import Refused


class Removing:
    """One command that removes a worktree, under its lock."""

    def __init__(self, ground: Ground, plan: RemovalPlan, lock: int) -> None:
        self._ground, self._plan, self._lock = ground, plan, lock

    async def run(self) -> WorktreeGone:
        """Remove it, or find that this command had. Raises Refused or Broken."""
        ground, plan = self._ground, self._plan
        found = await ground.do(look, ground.home / plan.worktree_id)
        record = await ground.do(read_removal, ground.records, plan.cmd_id)
        if record is not None and record.worktree_id == plan.worktree_id and _is_done(record, found):
            if found is None:
                # A newer worktree of the same path has the registration now; without one it may be left from a crash.
                await self._forget(record)
            return _gone(record)
        if found is None:
            raise Refused(Reason.WORKTREE_UNKNOWN, "there is no worktree of that id")
        owner = await ground.fence(ground.own(found), plan.token)
        async with ground.locks.repository(owner.git_dir) as repo_lock:
            removal = await self._judge(owner)
            await ground.do(write_removal, ground.records, removal)
            failpoints.hit("worktree.recorded")
            await ground.throw(plan.worktree_id, plan.cmd_id)
            failpoints.hit("worktree.trashed")
            if await ground.do(os.path.isdir, owner.git_dir):
                await self._writing(removal, repo_lock).forget(removal.checkout_path)
        return _gone(removal)

    async def _judge(self, owner: Owner) -> Removal:
        """Look at what would be lost. Raises Refused when that is more than was allowed."""
        ground, plan = self._ground, self._plan
        checkout = ground.checkout(owner)
        admin = await ground.do(registration, owner.git_dir, checkout)
        head = branch = None
        if admin is not None:
            # What git itself was killed over is locked too, but was never handed out.
            if owner.state is State.READY and await ground.do(is_locked, admin):
                raise Refused(Reason.WORKTREE_BUSY, "it is locked with git worktree lock")
            head = await ground.git.commit(str(admin), "HEAD")
            branch = await ground.git.current_branch(str(admin))
        dirty = owner.state is State.READY and await self._is_dirty(owner, admin, head, branch)
        if dirty and not plan.force:
            raise Refused(Reason.WORKTREE_DIRTY, "it holds work that is on no branch")
        return Removal(
            cmd_id=plan.cmd_id,
            worktree_id=owner.worktree_id,
            made_by=owner.cmd_id,
            git_dir=owner.git_dir,
            checkout_path=checkout,
            head=head,
            branch=branch,
            was_dirty=dirty,
        )

    async def _is_dirty(self, owner: Owner, admin: Path | None, head: str | None, branch: str | None) -> bool:
        """Whether something is lost with the directory. Raises Refused(REPO_HOSTILE) when nobody may look, without force."""
        ground, checkout = self._ground, self._ground.checkout(owner)
        beside = await ground.do(_has_more_than_the_checkout, ground.home / owner.worktree_id, owner.checkout)
        if admin is None or head is None or not await ground.do(is_checkout, checkout):
            # The repository does not know it any more, so nobody can say what in it is new.
            return beside or await ground.do(os.path.lexists, checkout)
        hostile = await ground.git.hostile_key(str(admin))
        if hostile is not None:
            if self._plan.force:
                return True
            raise Refused(
                Reason.REPO_HOSTILE, f"its configuration sets {said(hostile)}, so nobody may look whether it is dirty"
            )
        if beside or await ground.do(has_submodules, admin) or await ground.git.is_dirty(str(admin), checkout):
            return True
        # Commits of a detached HEAD go with it, unless some branch has them as well.
        return branch is None and head != owner.head and not await ground.git.is_on_a_ref(owner.git_dir, head)

    async def _forget(self, record: Removal) -> None:
        """Finish a removal that crashed right after its rename."""
        if await self._ground.do(os.path.isdir, record.git_dir):
            async with self._ground.locks.repository(record.git_dir) as repo_lock:
                await self._writing(record, repo_lock).forget(record.checkout_path)

    def _writing(self, removal: Removal, repo_lock: int) -> Writing:
        return Writing(self._ground, self._plan.cmd_id, removal.git_dir, [self._lock, repo_lock])


def _is_done(record: Removal, found: Owner | Foreign | None) -> bool:
    return found is None or (isinstance(found, Owner) and found.cmd_id != record.made_by)


def _gone(removal: Removal) -> WorktreeGone:
    return WorktreeGone(head=removal.head, branch=removal.branch, was_dirty=removal.was_dirty)


def _has_more_than_the_checkout(managed: Path, checkout: str) -> bool:
    return not set(os.listdir(managed)) <= {MARKER, f"{MARKER}.tmp", checkout}
