"""Making one worktree: marker, branch, checkout, proof, and the way back from each.

Theory of operation. Under the worktree's lock, then the repository's: the plan is judged; the marker (state "creating", durable) is
put in place by one rename; then git makes the branch by compare-and-set, and the checkout; HEAD is read back; the marker says
"ready". Any failure after the marker undoes all of it. A crash leaves the marker, and the same command continues from there: what
turns out to be complete is kept, anything else is thrown away and made again at the commit that was chosen first.

Rule 1: a branch is ours only where its reflog begins with our command; no other is reused or dropped.
Rule 2: undoing a half-made worktree never looks at the repository's configuration, so a hostile one cannot prevent it.
"""

import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import anyio

from protocol.errors import Reason
from runner import failpoints
from runner.adapters.git import VERSION_FLOOR, said
from runner.adapters.ownership import Owner, State, write_owner
from runner.adapters.repositories import (
    Repository,
    is_locked,
    open_repository,
    read_head,
    registration,
    was_born_as,
)
from runner.adapters.worktree_ground import STAGED, UNDO_FROM, Ground, Writing, is_checkout
from runner.core.plans import WorktreeMade, WorktreePlan
from runner.core.refnames import checkout_name
from runner.errors import Broken, Refused, RunnerError


class Making:
    """One command that makes a worktree. `half` is the marker that the same command left before a crash."""

    def __init__(self, ground: Ground, plan: WorktreePlan, lock: int, half: Owner | None) -> None:
        self._ground, self._plan, self._lock = ground, plan, lock
        self._half = half
        self._mine = half
        """What has to be undone if this fails."""

    async def run(self) -> WorktreeMade:
        """Make it. Raises Refused or Broken, with nothing left or `detail` saying what is."""
        try:
            return await self._make()
        except RunnerError as exc:
            if self._mine is not None:
                await self._undo_after(self._mine, exc)
            raise

    async def _make(self) -> WorktreeMade:
        git, plan = self._ground.git, self._plan
        if await git.version() < VERSION_FLOOR:
            raise Broken(Reason.GIT_FAILED, f"git is older than {'.'.join(map(str, VERSION_FLOOR))}")
        repo = await open_repository(git, plan.repo, plan.roots)
        async with self._ground.locks.repository(repo.git_dir) as repo_lock:
            writing = Writing(self._ground, plan.cmd_id, repo.git_dir, [self._lock, repo_lock])
            head, has_branch = await self._judge(repo)
            if self._half is not None:
                if await self._is_complete(self._half, repo):
                    return await self._ready(self._half)
                await self._ground.throw(plan.worktree_id, plan.cmd_id)
            owner = await self._mark(repo, head)
            failpoints.hit("worktree.marker_written")
            checkout = self._ground.checkout(owner)
            await writing.forget(checkout)
            if plan.branch is not None and not has_branch:
                await writing.run(
                    "update-ref", git.make_branch_argv(repo.git_dir, plan.branch, head, _why(plan.cmd_id))
                )
                failpoints.hit("worktree.branch_made")
            await writing.run("worktree add", git.add_argv(repo.git_dir, checkout, head, plan.branch))
            failpoints.hit("worktree.added")
            await self._verify(owner)
            failpoints.hit("worktree.verified")
            return await self._ready(owner)

    async def _judge(self, repo: Repository) -> tuple[str, bool]:
        """The commit to start from, and whether our branch is already there. Raises Refused."""
        git, plan = self._ground.git, self._plan
        answers: dict[str, str | None] = {}

        async def ask_key() -> None:
            answers["key"] = await git.hostile_key(repo.git_dir)

        async def ask_base() -> None:
            # A base like HEAD may have moved since the crash; the first choice is the one that was journaled in the marker.
            wanted = plan.base if self._half is None else self._half.head
            answers["head"] = await git.commit(repo.git_dir, wanted)

        async def ask_branch() -> None:
            answers["tip"] = await git.branch(repo.git_dir, plan.branch) if plan.branch is not None else None

        await _all(ask_key, ask_base, ask_branch)
        key, head, tip = answers["key"], answers["head"], answers["tip"]
        if key is not None:
            raise Refused(Reason.REPO_HOSTILE, f"its configuration sets {said(key)}")
        if head is None:
            raise Refused(Reason.BASE_NOT_FOUND, "the base names no commit of the repository")
        if tip is not None and not (tip == head and await self._is_our_branch(repo.git_dir)):
            raise Refused(Reason.BRANCH_EXISTS, "there is a branch of that name")
        return head, tip is not None

    async def _mark(self, repo: Repository, head: str) -> Owner:
        plan, ground = self._plan, self._ground
        owner = Owner(
            cmd_id=plan.cmd_id,
            worktree_id=plan.worktree_id,
            runner=ground.runner,
            inc=ground.inc,
            repo=repo.path,
            git_dir=repo.git_dir,
            checkout=checkout_name(repo.path),
            base=plan.base,
            branch=plan.branch,
            head=head,
            state=State.CREATING,
            created_ms=ground.clock.now().wall_ms,
            token=plan.token,
        )
        await ground.do(self._put_in_place, owner)
        self._mine = owner
        return owner

    def _put_in_place(self, owner: Owner) -> None:
        """Make the managed directory with its marker in it, by one rename: there is never one without."""
        staged = self._ground.home / f"{STAGED}{owner.worktree_id}"
        if os.path.lexists(staged):
            self._ground.trash.throw(staged.parent, staged.name, owner.cmd_id)
        staged.mkdir(mode=0o700)
        write_owner(staged, owner)
        os.rename(staged, self._ground.home / owner.worktree_id)
        _sync(self._ground.home)

    async def _verify(self, owner: Owner) -> None:
        head, branch = await self._ground.do(read_head, self._ground.checkout(owner))
        if (head, branch) != (owner.head, owner.branch):
            raise Broken(Reason.GIT_FAILED, "HEAD of the new worktree is not what was asked for")

    async def _ready(self, owner: Owner) -> WorktreeMade:
        managed = self._ground.home / owner.worktree_id
        await self._ground.do(write_owner, managed, replace(owner, state=State.READY))
        failpoints.hit("worktree.ready")
        return WorktreeMade(path=self._ground.checkout(owner), head=owner.head, branch=owner.branch)

    async def _is_complete(self, half: Owner, repo: Repository) -> bool:
        """Whether git had finished before the crash: registered, let go by git, HEAD right, no file missing."""
        ground, checkout = self._ground, self._ground.checkout(half)
        admin = await ground.do(registration, repo.git_dir, checkout)
        if admin is None or half.git_dir != repo.git_dir or half.branch != self._plan.branch:
            return False
        if await ground.do(is_locked, admin) or not await ground.do(is_checkout, checkout):
            return False
        if (await ground.git.commit(str(admin), "HEAD"), await ground.git.current_branch(str(admin))) != (
            half.head,
            half.branch,
        ):
            return False
        return not await ground.git.is_dirty(str(admin), checkout)

    async def _is_our_branch(self, git_dir: str) -> bool:
        assert self._plan.branch is not None
        return await self._ground.do(was_born_as, git_dir, self._plan.branch, _why(self._plan.cmd_id))

    async def _undo_after(self, owner: Owner, cause: RunnerError) -> None:
        """Undo all of it; where that fails too, say both."""
        try:
            await self._undo(owner)
        except RunnerError as exc:
            raise Broken(cause.reason, f"{cause.detail}; not undone: {exc.detail}") from cause

    async def _undo(self, owner: Owner) -> None:
        ground = self._ground
        if await ground.do(os.path.lexists, ground.home / owner.worktree_id):
            await ground.throw(owner.worktree_id, owner.cmd_id)
        if not await ground.do(os.path.isdir, owner.git_dir):
            return
        async with ground.locks.repository(owner.git_dir) as repo_lock:
            writing = Writing(ground, owner.cmd_id, owner.git_dir, [self._lock, repo_lock], UNDO_FROM)
            await writing.forget(ground.checkout(owner))
            if owner.branch is None or await ground.git.branch(owner.git_dir, owner.branch) != owner.head:
                return
            if await self._is_our_branch(owner.git_dir):
                await writing.run("update-ref", ground.git.drop_branch_argv(owner.git_dir, owner.branch, owner.head))


def _why(cmd_id: str) -> str:
    """What the reflog of a branch begins with when we made it."""
    return f"runner: made by {cmd_id}"


async def _all(*questions: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Ask all at once; the first failure is the answer of all."""
    try:
        async with anyio.create_task_group() as group:
            for question in questions:
                group.start_soon(question)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


def _sync(directory: "os.PathLike[str]") -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
