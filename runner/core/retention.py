"""Which attempts' directories are not kept any longer, and in which order they go.

Rule 1: what is not settled, not durable at the control plane to its end, or alive, stays, whatever it costs. Rule 2: what is old goes;
of the rest the oldest, as long as there is more than may be kept or less room than is wanted, and not one more. Rule 3: where that is
not enough, what lives gets a lower limit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.limits import MIB

LIMIT_BYTES_MIN: Final = 16 * MIB
"""Two segments: less would be no log. A host whose bound so many living logs cannot meet is told of, not starved."""


class Why(StrEnum):
    """For what a directory goes."""

    OLD = "old"
    SPACE = "space"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spooled:
    """One attempt's directory."""

    name: str
    size_bytes: int
    """What its end gives back to the disk."""
    settled: bool
    """The journal has its last word."""
    acked: bool
    """All of its log is durable at the control plane."""
    alive: bool
    since_ms: int
    """Wall time from which on it was settled and acked; of no meaning before."""

    @property
    def may_go(self) -> bool:
        """Whether nothing is lost with it that is not elsewhere."""
        return self.settled and self.acked and not self.alive


@dataclass(frozen=True, slots=True)
class Drop:
    """A directory that goes."""

    one: Spooled
    why: Why


def to_limit(left: Iterable[Spooled], bytes_max: int) -> dict[str, int]:
    """The limit that each living log gets where everything together is above `bytes_max`: the largest give first.

    What is not above the common limit keeps its own. None is asked to be smaller than LIMIT_BYTES_MIN.
    """
    known = list(left)
    living = sorted((one for one in known if one.alive), key=lambda one: one.size_bytes)
    room = bytes_max - sum(one.size_bytes for one in known if not one.alive)
    if sum(one.size_bytes for one in living) <= room:
        return {}
    while living and living[0].size_bytes * len(living) <= room:
        room -= living.pop(0).size_bytes
    share = max(room // len(living), LIMIT_BYTES_MIN) if living else 0
    return {one.name: share for one in living if one.size_bytes > share}


def to_drop(
    found: Iterable[Spooled], *, now_ms: int, keep_ms: int, bytes_max: int, wanted_bytes: int = 0
) -> list[Drop]:
    """What goes, oldest first.

    Args:
        keep_ms: what may go stays for so long.
        bytes_max: all directories together, those that may not go among them.
        wanted_bytes: what the disk lacks.
    """
    known = list(found)
    total, freed = sum(one.size_bytes for one in known), 0
    drops: list[Drop] = []
    for one in sorted((one for one in known if one.may_go), key=lambda one: (one.since_ms, one.name)):
        # What is old comes first in this order, so it counts towards the room that is needed before anything young does.
        old = now_ms - one.since_ms >= keep_ms
        if not old and total - freed <= bytes_max and freed >= wanted_bytes:
            break
        drops.append(Drop(one, Why.OLD if old else Why.SPACE))
        freed += one.size_bytes
    return drops
