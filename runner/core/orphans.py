"""What should not be alive: processes whose attempt is over, and shims that do nothing.

Theory of operation. All processes of ours carry a cookie. A look at all of them is compared with what the journal says: guarded by
a living shim, fine; their attempt settled, they are ended; their attempt unknown, they are told and left for the owner to end. A
shim that was told to stop and has not told of an end in the time its ladder takes is hung, and is ended from here.

Rule 1: only what carries our cookie, or was recorded with its start time, is touched. Rule 2: what the owner's policy lets outlive an
attempt is no orphan; the adapter knows the names.
"""

from typing import TYPE_CHECKING, Final, assert_never

from protocol.errors import Reason
from protocol.events import EventKind
from protocol.execution import AttemptState
from protocol.ids import Attempt
from protocol.limits import DETAIL_CHARS_MAX, KILL_WAIT_MS
from runner.core.effects import (
    Effect,
    EndHungShim,
    Note,
    Persist,
    ScanOrphans,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import Now, OrphansFound, OwnerSweep, RemainsSwept, ShimSilent
from runner.core.journaling import AppendLeaf
from runner.core.plans import ExitRecord, Orphan
from runner.core.takeback import adopt

if TYPE_CHECKING:
    from runner.core.engine import Engine

SCAN_MS: Final = 60 * 1000
"""Between two looks at all processes: each reads the environment of every process of this user."""
DRAIN_MS: Final = 5 * 1000
"""A shim waits this long for the rest of the output."""
HUNG_MARGIN_MS: Final = 10 * 1000
"""Beyond grace, kill wait and drain: a machine in deep swap is not a hung shim."""
TOOL_PREFIX: Final = "g-"
"""How names of tools begin (docs/shim.md §1): they are no attempts, though they look like some."""
SILENT_RETRY_MS: Final = 30 * 1000
"""A shim that holds its lock and does not answer is asked again this often."""


class Orphans:
    """The watch over what is left, and over shims that ought to have ended."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._next_scan_ms: int | None = None
        self._ends: dict[Attempt, int] = {}
        """When an attempt that was told to stop must have ended (BOOTTIME)."""
        self._silent: dict[Attempt, int] = {}
        """When a silent shim is asked again (BOOTTIME)."""
        self.survivors: dict[Attempt, int] = {}
        """Settled attempts of which processes live on that could not be ended: each takes the place of one that lives."""
        self._told: set[str] = set()

    def heard(self, happened: ShimSilent | OrphansFound | RemainsSwept | OwnerSweep, now: Now) -> list[Effect]:
        """What was seen or done, and the owner's word."""
        match happened:
            case ShimSilent():
                return self.silent(happened, now)
            case OrphansFound():
                return self.found(happened, now)
            case RemainsSwept():
                return self.swept(happened, now)
            case OwnerSweep():
                return self.owner_sweep(happened, now)
            case _:
                assert_never(happened)

    # --- time ---------------------------------------------------------------------------------------------------

    def next_moment_ms(self) -> int | None:
        """When a Tick is due (BOOTTIME)."""
        moments = (self._next_scan_ms, min(self._ends.values(), default=None), min(self._silent.values(), default=None))
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self, now: Now) -> list[Effect]:
        """A look at all processes, hung shims, silent ones: what is due."""
        effects: list[Effect] = []
        if self._next_scan_ms is not None and now.boot_ms >= self._next_scan_ms:
            effects += self.scan(now)
        for attempt in [attempt for attempt, due_ms in self._ends.items() if now.boot_ms >= due_ms]:
            effects += self._overdue(attempt, now)
        for attempt in [attempt for attempt, due_ms in self._silent.items() if now.boot_ms >= due_ms]:
            del self._silent[attempt]
            effects += adopt(self._engine, attempt, now)
        return effects

    def scan(self, now: Now) -> list[Effect]:
        """Look now, and again in a while."""
        self._next_scan_ms = now.boot_ms + SCAN_MS
        return [ScanOrphans()]

    # --- shims that do nothing ----------------------------------------------------------------------------------

    def expect_stop(self, attempt: Attempt, grace_ms: int | None, now: Now) -> None:
        """A stop was said: its ladder ends in a time that is known."""
        most_ms = self._engine.policy.grace_ms_max if grace_ms is None else grace_ms
        self.expect_end(attempt, most_ms + KILL_WAIT_MS + DRAIN_MS + HUNG_MARGIN_MS, now)

    def expect_end(self, attempt: Attempt, in_ms: int, now: Now) -> None:
        """The attempt must have ended by then; the earlier of two moments counts."""
        due_ms = now.boot_ms + in_ms
        self._ends[attempt] = min(self._ends.get(attempt, due_ms), due_ms)

    def forgive(self, attempt: Attempt) -> None:
        """Its lease came back: no end is expected of it."""
        self._ends.pop(attempt, None)

    def woke(self, slept_ms: int) -> None:
        """Nothing that is expected could happen while the machine slept."""
        self._ends = {attempt: due_ms + slept_ms for attempt, due_ms in self._ends.items()}

    def ended(self, attempt: Attempt, record: ExitRecord | None) -> None:
        """The attempt is settled: nothing is expected of its shim; what its record says could not be ended is watched."""
        self._ends.pop(attempt, None)
        self._silent.pop(attempt, None)
        if record is not None and record.survivors:
            self.survivors[attempt] = record.survivors

    def unkillable(self, attempt: Attempt, record: ExitRecord, now: Now) -> list[Effect]:
        """What outlived its KILL by the kill wait is told by name and reason; it is watched from here on."""
        if not record.survivors:
            return []
        named = "; ".join(f"unkillable({left.why}) {left.pid} {left.name} {left.state}" for left in record.remains)
        # A name is a stranger's: JSON takes no lone surrogates.
        detail = named[:DETAIL_CHARS_MAX].encode("utf-8", "replace").decode("utf-8") or f"{record.survivors} processes"
        return [
            Note("attempt.unkillable", {"attempt": attempt.name, "count": record.survivors}),
            *self._engine.tell(
                EventKind.ATTEMPT_UNKILLABLE, now, attempt=attempt, count=record.survivors, detail=detail
            ),
        ]

    def silent(self, silent: ShimSilent, now: Now) -> list[Effect]:
        """A shim holds its lock and does not answer: told once, asked again, ended only if a stop says so."""
        row = self._engine.attempts.rows.get(silent.attempt)
        if row is None or row.state is AttemptState.SETTLED:
            return [EndHungShim(silent.attempt, None if row is None else row.shim)] if row is not None else []
        self._silent[silent.attempt] = now.boot_ms + SILENT_RETRY_MS
        return self._tell_hung(silent.attempt, now)

    def _overdue(self, attempt: Attempt, now: Now) -> list[Effect]:
        row = self._engine.attempts.rows.get(attempt)
        if row is None or row.state is AttemptState.SETTLED:
            self._ends.pop(attempt, None)
            return []
        # Once more should this not help, either.
        self._ends[attempt] = now.boot_ms + KILL_WAIT_MS + DRAIN_MS + HUNG_MARGIN_MS
        return [*self._tell_hung(attempt, now), EndHungShim(attempt, row.shim)]

    def _tell_hung(self, attempt: Attempt, now: Now) -> list[Effect]:
        if f"hung {attempt.name}" in self._told:
            return []
        self._told.add(f"hung {attempt.name}")
        return [
            Note("shim.hung", {"attempt": attempt.name}),
            *self._engine.tell(EventKind.SHIM_HUNG, now, attempt=attempt, reason=Reason.SHIM_HUNG),
        ]

    # --- processes ----------------------------------------------------------------------------------------------

    def found(self, found: OrphansFound, now: Now) -> list[Effect]:
        """One look: end what belongs to settled attempts, tell what belongs to none, and notice shims that went unseen."""
        effects: list[Effect] = []
        alive = {orphan.name for orphan in found.found}
        for attempt in [attempt for attempt in self.survivors if attempt.name not in alive]:
            del self.survivors[attempt]
        for orphan in found.found:
            if not orphan.shim_alive:
                effects += self._unguarded(orphan, now)
        return effects

    def _unguarded(self, orphan: Orphan, now: Now) -> list[Effect]:
        if orphan.name.startswith(TOOL_PREFIX):
            # Its caller waits for it, or finds it at the next start.
            return []
        try:
            attempt = Attempt.parse(orphan.name)
        except ValueError:
            # Another process chose this cookie: it names nothing of ours.
            return []
        row = self._engine.attempts.rows.get(attempt)
        if row is None:
            return self._tell_unknown(orphan, now)
        if row.state is AttemptState.SETTLED:
            return [SweepRemains(attempt)]
        if row.state is AttemptState.INTENT:
            # Its shim is on the way, or recovery has it in hand.
            return []
        return [SweepAttempt(attempt)]

    def _tell_unknown(self, orphan: Orphan, now: Now) -> list[Effect]:
        if orphan.name in self._told:
            return []
        self._told.add(orphan.name)
        return [
            Note("orphan.found", {"attempt": orphan.name, "processes": orphan.processes}),
            *self._engine.tell(
                EventKind.ALARM_RAISED, now, reason=Reason.UNKNOWN_TARGET, detail=f"{orphan.name} lives"
            ),
        ]

    def owner_sweep(self, wanted: OwnerSweep, now: Now) -> list[Effect]:
        """The owner's word on one attempt that is settled or unknown; what is guarded is ended by a stop, not by this."""
        row = self._engine.attempts.rows.get(wanted.attempt)
        if row is not None and row.state is not AttemptState.SETTLED:
            return []
        leaf = AppendLeaf("owner.sweep", wanted.attempt.name, wanted.by, self._engine.policy.digest, now.wall_ms)
        return [Persist((leaf,)), SweepRemains(wanted.attempt)]

    def swept(self, swept: RemainsSwept, now: Now) -> list[Effect]:
        """What was left was ended, or could not be: told, and watched."""
        evidence, attempt = swept.evidence, swept.attempt
        if evidence.found == 0:
            self.survivors.pop(attempt, None)
            return []
        if evidence.remaining:
            self.survivors[attempt] = evidence.remaining
        else:
            self.survivors.pop(attempt, None)
        if evidence.signalled == 0 and f"swept {attempt.name}" in self._told:
            return []
        self._told.add(f"swept {attempt.name}")
        detail = f"found {evidence.found}, signalled {evidence.signalled}, remaining {evidence.remaining}"
        leaf = AppendLeaf("orphan.swept", attempt.name, detail, self._engine.policy.digest, now.wall_ms)
        return [
            Persist((leaf,)),
            Note("orphan.swept", {"attempt": attempt.name, "found": evidence.found, "remaining": evidence.remaining}),
            *self._engine.tell(EventKind.ORPHAN_SWEPT, now, attempt=attempt, count=evidence.found, detail=detail),
        ]
