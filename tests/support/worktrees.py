"""A state directory and a repository, and plans for worktrees between the two."""

import time
from pathlib import Path

from runner.adapters.git import Git
from runner.adapters.worktrees import GitWorktrees
from runner.core.inputs import Now
from runner.core.plans import RemovalPlan, WorktreePlan
from tests.support.repositories import make_repository
from tests.support.tools import DirectTools


class RealClock:
    """The clocks as they are."""

    boot_id = "boot"

    def now(self) -> Now:
        """Read both."""
        return Now(wall_ms=time.time_ns() // 1_000_000, boot_ms=time.monotonic_ns() // 1_000_000)

    def entropy(self, count: int) -> bytes:
        """Nothing here needs any."""
        return bytes(count)


class Place:
    """Where a test works: `src/repo` is a repository, `src` the only root, `state` ours."""

    def __init__(self, tmp_path: Path, *, files: int = 3) -> None:
        self.root = tmp_path / "src"
        self.repo = make_repository(self.root / "repo", files=files)
        self.state = tmp_path / "state"
        self.tools = DirectTools()
        self.trees = self.daemon()

    def daemon(self, *, runner: str = "run_1", inc: int = 1, git: Git | None = None) -> GitWorktrees:
        """The adapter as a daemon that starts now would have it."""
        return GitWorktrees(
            self.state,
            runner=runner,
            inc=inc,
            git=git or Git(),
            tools=self.tools,
            clock=RealClock(),
            lock_wait_ms=20_000,
        )

    def plan(
        self,
        worktree_id: str = "w1",
        cmd_id: str = "c1",
        *,
        base: str = "main",
        branch: str | None = "feat/x",
        repo: Path | None = None,
    ) -> WorktreePlan:
        """A plan that works, or what a test makes of it."""
        return WorktreePlan(
            worktree_id=worktree_id,  # type: ignore[arg-type]
            cmd_id=cmd_id,  # type: ignore[arg-type]
            repo=str(repo or self.repo),
            base=base,
            branch=branch,
            roots=(str(self.root),),
        )

    def removal(self, worktree_id: str = "w1", cmd_id: str = "r1", *, force: bool = False) -> RemovalPlan:
        """A removal of the worktree that `plan` makes."""
        return RemovalPlan(worktree_id=worktree_id, cmd_id=cmd_id, force=force)  # type: ignore[arg-type]

    def managed(self, worktree_id: str = "w1") -> Path:
        """Its managed directory."""
        return self.state / "worktrees" / worktree_id
