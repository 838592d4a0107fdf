"""What a log keeps count of: the payload of each stream, and the middle that it gave up."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _hashlib import HASH as Hash


class Stream:
    """Count and digest of one stream's payload."""

    __slots__ = ("bytes", "digest")

    def __init__(self, digest: Hash) -> None:
        self.bytes = 0
        self.digest = digest


class Dropped:
    """The middle that made room for the newest: segments from `start` to `end`, and the digests that lead in and out of it."""

    __slots__ = ("before", "end", "last", "segments", "start")

    def __init__(self, start: int, before: bytes) -> None:
        self.start = start
        self.end = start
        self.segments = 0
        self.before = before  # of the segment before the first that is gone
        self.last = before  # of the last that is gone
