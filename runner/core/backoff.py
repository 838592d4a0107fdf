"""How long to wait before dialing again: exponential with full jitter, reset only by a welcome."""

from dataclasses import dataclass
from typing import Final

FIRST_MS: Final = 500
CAP_MS: Final = 30_000
"""A control plane that is back is found within half a minute, and a fleet does not stampede it."""


@dataclass(slots=True)
class Backoff:
    """Delays of one connection's attempts. A successful connect does not reset it; a `welcome` does."""

    failures: int = 0

    def next_ms(self, fraction: float) -> int:
        """The next delay. `fraction` in [0, 1) is the jitter; full jitter spreads a fleet evenly."""
        ceiling = min(CAP_MS, FIRST_MS << min(self.failures, 16))
        self.failures += 1
        return int(ceiling * fraction)

    def reset(self) -> None:
        """After a welcome."""
        self.failures = 0
