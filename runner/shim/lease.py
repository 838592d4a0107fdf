"""When a lease is lost, and what its loss asks of a running attempt. Pure; every time is CLOCK_BOOTTIME in ms.

Theory of operation. A lease is the right to run until a deadline. What is done at its loss is over before the
deadline, so it begins ahead of it: by LEASE_MARGIN_MS for a freeze, by grace, kill wait and margin for a stop.

    held ──lost, freeze──> frozen ──15 min──────────> given up
      ^ │                    │ ^
      │ └─lost, stop─────────│─│─after a wake only
      │                      │ │   30 s after it ───> given up
      └──a lease in time─────┘ └─ otherwise ────────> given up at once

Rule 1. A lower token changes nothing, nor does an earlier deadline under the same one: two renewals may cross on their
        way here. Else the lease is replaced whole. A deadline that is over already is a release, and counts.
Rule 2. A freeze can be taken back, giving up cannot: a lease that is in time thaws until the attempt is given up.
Rule 3. Nobody could renew while the machine slept: after a wake nothing is given up for WAKE_WAIT_MS. What is lost
        is frozen meanwhile, and a freeze lasts no longer than FROZEN_MAX_MS or that wait.
Rule 4. Where somebody may be typing (`exempt`) a loss freezes nothing: a terminal that stands still looks broken.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# Lease actions, as on the wire.
CONTINUE, ON_LOSS_FREEZE, ON_LOSS_STOP = 0, 1, 2
# What is asked for.
NOTHING, FREEZE, THAW, GIVE_UP = "", "freeze", "thaw", "give_up"

# Room between the end of the ladder and the lease's deadline: clock error and the report's way up.
LEASE_MARGIN_MS: Final = 5_000
# Long enough for a broken network or a control plane's restart; a tree that is frozen longer only holds its memory.
FROZEN_MAX_MS: Final = 900_000
# A machine that woke needs its network back, a session and one renewal.
WAKE_WAIT_MS: Final = 30_000
NEVER: Final = 1 << 62


class Lease:
    """The right to run: fencing token, deadline, what to do at its loss, and the grace of a stop then (None: the spec's)."""

    __slots__ = ("action", "deadline_ms", "grace_ms", "token")

    def __init__(self, token: int, deadline_ms: int, action: int, grace_ms: int | None = None) -> None:
        self.token = token
        self.deadline_ms = deadline_ms
        self.action = action
        self.grace_ms = grace_ms


class Tenure:
    """The lease of one attempt through its renewals, losses and sleeps; `frozen_ms` is since when it is frozen."""

    __slots__ = ("_exempt", "_grace_ms", "_kill_wait_ms", "_patient_until_ms", "frozen_ms", "lease")

    def __init__(self, lease: Lease | None, *, grace_ms: int, kill_wait_ms: int, exempt: bool = False) -> None:
        self._exempt = exempt
        self.lease: Lease | None = None
        self._hold(lease)
        self.frozen_ms: int | None = None
        self._grace_ms = grace_ms
        self._kill_wait_ms = kill_wait_ms
        self._patient_until_ms = 0

    def take(self, lease: Lease | None, now_ms: int) -> bool:
        """Replace the lease, unless the new one is older; whether it was taken."""
        if lease is None or (self.lease is not None and _older(lease, self.lease, now_ms)):
            return False
        self._hold(lease)
        return True

    def _hold(self, lease: Lease | None) -> None:
        self.lease = lease
        if lease is not None and self._exempt and lease.action == ON_LOSS_FREEZE:
            self.lease = Lease(lease.token, lease.deadline_ms, CONTINUE, lease.grace_ms)

    def woke(self, now_ms: int) -> None:
        """The machine has slept and woke up just now."""
        self._patient_until_ms = now_ms + WAKE_WAIT_MS

    def asks(self, now_ms: int) -> str:
        """What a running attempt is to do now."""
        if now_ms < self.lost_ms():
            return NOTHING if self.frozen_ms is None else THAW
        if now_ms >= self.give_up_ms():
            return GIVE_UP
        return FREEZE if self.frozen_ms is None else NOTHING

    def due_ms(self) -> int:
        """When `asks` changes by time alone."""
        return self.lost_ms() if self.frozen_ms is None else self.give_up_ms()

    def lost_ms(self) -> int:
        """From when on there is no right to run, as far as what must be done about it takes time."""
        if self.lease is None or self.lease.action == CONTINUE:
            return NEVER
        if self.lease.action == ON_LOSS_FREEZE:
            return self.lease.deadline_ms - LEASE_MARGIN_MS
        return self.kill_ms() - self.grace_ms

    def give_up_ms(self) -> int:
        """When the attempt is to be stopped for its loss."""
        if self.lease is not None and self.lease.action == ON_LOSS_STOP:
            return max(self.lost_ms(), self._patient_until_ms)
        return NEVER if self.frozen_ms is None else max(self.frozen_ms + FROZEN_MAX_MS, self._patient_until_ms)

    def kill_ms(self) -> int:
        """When the KILL of any ladder must be sent, to be over before the deadline."""
        if self.lease is None or self.lease.action == CONTINUE:
            return NEVER
        return self.lease.deadline_ms - self._kill_wait_ms - LEASE_MARGIN_MS

    @property
    def grace_ms(self) -> int:
        """TERM to KILL in a stop at loss; never longer than the spec's."""
        wanted = None if self.lease is None else self.lease.grace_ms
        return self._grace_ms if wanted is None else min(wanted, self._grace_ms)


def _older(new: Lease, held: Lease, now_ms: int) -> bool:
    if new.token != held.token or new.action != held.action:
        return new.token < held.token
    return now_ms < new.deadline_ms < held.deadline_ms
