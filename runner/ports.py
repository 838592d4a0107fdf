"""The runner's ports: one interface for each outside thing. Adapters do, and only runner/daemon.py joins them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.ids import Attempt
from protocol.messages import ReportItem
from runner.core.inputs import AttemptExited, AttemptLost, Now
from runner.core.journaling import Image, Write
from runner.core.plans import (
    AttemptPlan,
    LeaseAction,
    Observed,
    ProcessIdentity,
    RemovalPlan,
    Swept,
    WorktreeGone,
    WorktreeMade,
    WorktreePlan,
)


class Clock(Protocol):
    """Wall time, BOOTTIME and entropy."""

    def now(self) -> Now:
        """Read both clocks."""

    def entropy(self, count: int) -> bytes:
        """`count` random bytes."""

    @property
    def boot_id(self) -> str:
        """This boot, as the kernel names it."""


class Journal(Protocol):
    """The durable record. Everything in one call is one transaction, and calls that meet are committed together."""

    async def commit(self, writes: Sequence[Write]) -> None:
        """Return when all of it is on the disk. Raises JournalBroken; then nothing more may be admitted."""

    async def load(self) -> Image:
        """What is known at start. Raises JournalBroken."""

    async def outbox(self, above: int, limit: int) -> list[ReportItem]:
        """Report items with a higher `out_seq`, in order, answered or not."""

    async def oldest_unanswered(self) -> int | None:
        """The lowest `out_seq` without an answer; None when all have theirs."""

    async def items(self, out_seqs: Sequence[int]) -> list[ReportItem]:
        """Stored report items by number; those that were pruned are left out."""


ShimEvent = AttemptExited | AttemptLost


class Shims(Protocol):
    """Attempts on this machine: their directories and the shims that guard them."""

    def listen(self, hear: Callable[[ShimEvent], None]) -> None:
        """Call `hear` for every end of an attempt, from the event loop."""

    async def observe(self) -> list[Observed]:
        """Every attempt directory as it is now; waits briefly for shims that are about to exit unreleased."""

    async def prepare(self, plan: AttemptPlan, cwd: str, *, again: bool) -> ProcessIdentity:
        """Make the directory, write the spec, fork a shim behind its barrier. Raises Refused or Broken."""

    async def release(self, attempt: Attempt, secrets: Mapping[str, bytes]) -> None:
        """Open the barrier."""

    async def abandon(self, attempt: Attempt) -> None:
        """Close the barrier for ever and remove the directory."""

    async def adopt(self, attempt: Attempt) -> None:
        """Connect to a living shim; its exit, also one that has already happened, is then heard. Raises Broken."""

    def stop(self, attempt: Attempt, grace_ms: int | None, by: str) -> None:
        """Begin the ladder; idempotent."""

    def lease(self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction) -> None:
        """Push a deadline."""

    def collect(self, attempt: Attempt) -> None:
        """Let the shim go; its files stay."""

    async def sweep(self, attempt: Attempt) -> Swept:
        """End what is left of an attempt whose shim is gone: identity first, then the cookie, until two scans are empty."""

    async def remove(self, attempt: Attempt) -> None:
        """Delete the directory of an attempt that never ran."""


@dataclass(frozen=True, slots=True)
class ToolExit:
    """How a tool under a shim ended; output is cut at a bound of the adapter, which `truncated` says."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class Tools(Protocol):
    """Programs of ours that write (git), each under a shim that holds the caller's locks for its whole life."""

    async def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        locks: Sequence[int],
        timeout_ms: int,
    ) -> ToolExit:
        """Run to the end. `name` is unique to the command and step: one left by an earlier daemon is waited for and removed first.

        Raises Broken when no shim could be had or the time ran out.
        """


class Worktrees(Protocol):
    """Managed worktrees on this machine."""

    async def create(self, plan: WorktreePlan) -> WorktreeMade:
        """Make it, or find it made by the same command. Raises Refused or Broken; then nothing is left of it."""

    async def remove(self, plan: RemovalPlan) -> WorktreeGone:
        """Remove it by rename into the trash; the same command again finds it done. Raises Refused or Broken."""

    def path(self, worktree_id: str) -> str | None:
        """The checkout of a worktree that is there and ours, else None."""

    def head(self, worktree_id: str) -> str | None:
        """The commit its HEAD is at now, None when it is not there."""
