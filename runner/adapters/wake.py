"""Whether the machine slept: CLOCK_BOOTTIME counts while it does and CLOCK_MONOTONIC does not, so the gap between them grows.

Nothing tells a process of a wake. A timer of CLOCK_MONOTONIC, as the event loop's are, stands still in suspend and goes on where it was, so
the gap is looked at in every turn of the pump, before anything is judged by the time, and every WATCH_S in between. A loop that beats every
ten seconds hardly notices; a timer of a second would wake an idle laptop for nothing.
"""

import time
from collections.abc import Callable
from typing import Final

from protocol.limits import WAKE_GAP_MS

WATCH_S: Final = 5.0
"""A wake is noticed within this: a sixth of what shims wait for after one (WAKE_WAIT_MS), with a network to be had back meanwhile."""


def asleep_ms() -> int:
    """How long this machine has slept since it booted."""
    # In this order, being held up between the two readings makes the gap smaller: it never looks like a sleep.
    boot_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return (boot_ns - time.clock_gettime_ns(time.CLOCK_MONOTONIC)) // 1_000_000


class WakeWatch:
    """Compares the gap with the one before. `asleep` reads it, in ms."""

    def __init__(self, asleep: Callable[[], int] = asleep_ms) -> None:
        self._asleep = asleep
        self._known_ms = asleep()

    def look(self) -> int | None:
        """For how long the machine slept since the last look that found so; None when it did not, or too briefly to matter."""
        slept_ms = self._asleep() - self._known_ms
        if slept_ms <= WAKE_GAP_MS:
            return None
        self._known_ms += slept_ms
        return slept_ms
