"""Wall time for a person's tools, which show ages and decide nothing by them; without the imports that the daemon's clocks need."""

import time


def wall_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000
