"""Whether this machine takes new work now: the owner's word, and what is left of disk, memory and descriptors.

Theory of operation. A start is refused before it is accepted, with a reason and with when to ask again, so that nothing is accepted
only to fail. What was measured last is what counts; the pump has it measured before it steps commands.

Rule 1: nothing here touches what runs, but for a drain at its deadline. Rule 2: stops, removals and renewals pass always.
"""

from typing import TYPE_CHECKING, Final

from protocol.commands import Args, Start, WorktreeCreate
from protocol.errors import Reason
from protocol.events import EventKind
from runner.core.admission import RETRY_AFTER_MS, RETRY_AFTER_MS_MAX, Refusal
from runner.core.effects import Effect, Note, Persist
from runner.core.inputs import HeadroomMeasured, Now, OwnerAdmission
from runner.core.journaling import Image, PutAdmission
from runner.core.plans import Admission, Headroom
from runner.core.policy import Policy

if TYPE_CHECKING:
    from runner.core.engine import Engine

MIB: Final = 1024 * 1024


class Gate:
    """Open, paused or draining; and the headroom measured last."""

    def __init__(self, engine: "Engine", image: Image) -> None:
        self._engine = engine
        self.admission: Admission = image.admission
        self.headroom: Headroom = Headroom()
        self.drain_deadline_ms: int | None = None
        """BOOTTIME; None: what runs may take its time."""
        self._kept = image.admission
        self._kept_deadline_ms = image.drain_deadline_ms
        self._by = "owner"
        """Whose word the last one was."""
        self._retry_after_ms = RETRY_AFTER_MS

    def refusal(self, args: Args) -> Refusal | None:
        """Why new work is not taken now; None for everything that is no new work."""
        if not isinstance(args, Start | WorktreeCreate):
            return None
        if self.admission is not Admission.OPEN:
            reason = Reason.PAUSED if self.admission is Admission.PAUSED else Reason.DRAINING
            return Refusal(reason, f"its owner has it {self.admission}", RETRY_AFTER_MS_MAX)
        short = shortage(self.headroom, self._engine.policy)
        if short is None:
            self._retry_after_ms = RETRY_AFTER_MS
            return None
        after_ms, self._retry_after_ms = self._retry_after_ms, min(2 * self._retry_after_ms, RETRY_AFTER_MS_MAX)
        return Refusal(*short, after_ms)

    def heard(self, happened: HeadroomMeasured | OwnerAdmission, now: Now) -> list[Effect]:
        """What is left was measured, or the owner's word."""
        if isinstance(happened, OwnerAdmission):
            return self.owner(happened, now)
        self.headroom = happened.headroom
        return []

    def owner(self, wanted: OwnerAdmission, now: Now) -> list[Effect]:
        """The owner opens or closes it; the same word twice is one, but for a new deadline, or when it is to be kept now."""
        same = wanted.admission is self.admission and wanted.deadline_ms == self.drain_deadline_ms
        same = same and (not wanted.keep or wanted.admission is self._kept)
        self.admission, self._by = wanted.admission, wanted.by
        self.drain_deadline_ms = wanted.deadline_ms if wanted.admission is Admission.DRAINING else None
        if same:
            return []
        self._kept = wanted.admission if wanted.keep else self._kept
        left_ms = None if self.drain_deadline_ms is None else now.wall_ms + self.drain_deadline_ms - now.boot_ms
        kept = [Persist((PutAdmission(self.admission, left_ms, wanted.by, now.wall_ms),))] if wanted.keep else []
        return [
            *kept,
            Note("admission.changed", {"admission": self.admission, "by": wanted.by}),
            *self._engine.tell(EventKind.ADMISSION_CHANGED, now, detail=f"{self.admission} by {wanted.by}"),
            *self._engine.rhythm.beat_now(now),
            *self.tick(now),
        ]

    def recover(self, now: Now) -> None:
        """A drain that an earlier daemon began goes on to the same moment."""
        if self._kept_deadline_ms is not None and self.admission is Admission.DRAINING:
            self.drain_deadline_ms = now.boot_ms + max(self._kept_deadline_ms - now.wall_ms, 0)

    def tick(self, now: Now) -> list[Effect]:
        """The deadline of a drain: what still runs is stopped, once."""
        if self.drain_deadline_ms is None or now.boot_ms < self.drain_deadline_ms:
            return []
        self.drain_deadline_ms = None
        rows = [row for row in self._engine.attempts.living_rows() if row.stop_by is None]
        return [effect for row in rows for effect in self._engine.attempts.end(row, None, f"{self._by} drain", now)]


def disk_wanted(room: Headroom, policy: Policy) -> int:
    """Bytes that the owner wants free for new work."""
    return max(policy.disk_free_min, (room.disk_total or 0) * policy.disk_free_percent_min // 100)


def shortage(room: Headroom, policy: Policy) -> tuple[Reason, str] | None:
    """What the machine has too little of for new work, by the owner's minimums; None: nothing."""
    if room.disk_free is not None:
        wanted = disk_wanted(room, policy)
        if room.disk_free < wanted:
            return Reason.DISK_LOW, f"{room.disk_free // MIB} MiB are free, {wanted // MIB} are wanted"
    if room.inodes_free is not None and room.inodes_total:
        wanted = room.inodes_total * policy.inodes_free_percent_min // 100
        if room.inodes_free < wanted:
            return Reason.INODES_LOW, f"{room.inodes_free} inodes are free, {wanted} are wanted"
    if room.memory_available is not None and room.memory_available < policy.memory_available_min:
        free, wanted = room.memory_available // MIB, policy.memory_available_min // MIB
        return Reason.MEMORY_LOW, f"{free} MiB of memory are available, {wanted} are wanted"
    if room.fds_free is not None and room.fds_free < policy.fds_free_min:
        return Reason.FDS_LOW, f"{room.fds_free} descriptors are free, {policy.fds_free_min} are wanted"
    return None
