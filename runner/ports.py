"""The runner's ports: one interface for each outside thing. Adapters do, and only runner/daemon.py joins them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.ids import Attempt
from protocol.lease import Lease
from protocol.messages import ReportItem
from runner.core.inputs import AttemptExited, AttemptLost, AttemptSignalled, Now, RemainsSwept, ShimSilent
from runner.core.journaling import Image, Write
from runner.core.plans import (
    AttemptPlan,
    LeaseAction,
    Observed,
    Orphan,
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


ShimEvent = AttemptExited | AttemptLost | AttemptSignalled | ShimSilent | RemainsSwept


class Shims(Protocol):
    """Attempts on this machine: their directories and the shims that guard them."""

    def listen(self, hear: Callable[[ShimEvent], None]) -> None:
        """Call `hear` for what becomes of attempts, from the event loop."""

    async def observe(self) -> list[Observed]:
        """Every attempt directory as it is now, and whether its shim answers and anything of it lives.

        Waits briefly for shims that are about to exit unreleased.
        """

    async def prepare(self, plan: AttemptPlan, cwd: str, *, again: bool) -> ProcessIdentity:
        """Raise the fence, make the directory, write the spec, fork a shim behind its barrier.

        Raises Refused, Broken, or OSError when the disk is full or fails; then there is no directory.
        """

    async def release(self, attempt: Attempt, secrets: Mapping[str, bytes]) -> None:
        """Open the barrier."""

    async def abandon(self, attempt: Attempt) -> None:
        """Close the barrier for ever and remove the directory."""

    async def adopt(self, attempt: Attempt) -> bool:
        """Connect to a living shim; its exit, also one that has already happened, is then heard.

        Returns whether it answered now; False also where there is a connection already. When it does not answer, what became of
        it is heard: also `ShimSilent`.
        """

    def stop(self, attempt: Attempt, grace_ms: int | None, by: str) -> None:
        """Begin the ladder; idempotent. While there is no connection it waits for the next."""

    def signal(self, attempt: Attempt, name: bytes, signal: str, *, tree: bool) -> None:
        """Pass a signal on, once for each `name`, to the child or its tree; `AttemptSignalled` answers. It waits as a stop does."""

    def lease(
        self, attempt: Attempt, token: int, deadline_ms: int, action: LeaseAction, grace_ms: int | None = None
    ) -> None:
        """Push a deadline, and the grace of a stop at the loss (None: the attempt's own). It waits as a stop does."""

    def collect(self, attempt: Attempt) -> None:
        """Let the shim go; its files stay."""

    async def lose(self, attempt: Attempt) -> ShimEvent:
        """Its shim seems to be gone: its record if it left one, else end what is left of it; `ShimSilent` when the shim lives."""

    async def end_hung(self, attempt: Attempt, shim: ProcessIdentity | None) -> ShimEvent:
        """KILL a shim that does nothing, by its identity (None: as its files say), and end what it guarded.

        `RemainsSwept` when it holds its lock all the same: then nothing is known of its end.
        """

    async def sweep(self, name: str) -> Swept:
        """End what is left of an attempt or a tool whose shim is gone, in tiers, until two scans are empty."""

    async def scan(self) -> tuple[Orphan, ...]:
        """One look at all processes of this machine: those of ours, by attempt."""

    async def remove(self, attempt: Attempt) -> None:
        """Delete the directory of an attempt that never ran."""


@dataclass(frozen=True, slots=True)
class ToolExit:
    """How a tool under a shim ended; output is cut at a bound of the adapter, which `truncated` says."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class LeaseKeeper(Protocol):
    """Renews leases when nothing else does."""

    def hold(self, attempt: Attempt, lease: Lease, action: LeaseAction, grace_ms: int | None) -> int:
        """This is the lease of an attempt now, and what is to be done at its loss.

        Returns the deadline to tell its shim (BOOTTIME): a later one where the lease was renewed here meanwhile.
        """

    def drop(self, attempt: Attempt) -> None:
        """Its lease is not wanted any more."""


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
