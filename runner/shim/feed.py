"""The child's stdin: bytes that a daemon hands over by offset, each fed once, whatever is sent again.

Rule 1. `received` counts what was taken; bytes below it are never taken twice, bytes above it never early.
Rule 2. At most WINDOW_BYTES wait here; `credit` says up to where a daemon may send.
Rule 3. A child that reads no more (`closed`) loses nothing of its own: what still comes is dropped, and the daemon is told.
"""

from __future__ import annotations

import posix as os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

# As much as four pipes hold: a child that reads is never kept waiting by a round trip on this machine.
WINDOW_BYTES: Final = 262_144
WRITE_BYTES: Final = 65_536


class Feed:
    """The pipe `fd` of a child that reads its stdin; -1: there is none yet, or no more."""

    def __init__(self) -> None:
        self.fd = -1
        self.received = 0
        self.closed = False
        self.ended = False  # the last byte was received
        self._queue = bytearray()
        self._fed = 0

    @property
    def credit(self) -> int:
        """Offset up to which bytes may be sent."""
        return self._fed + WINDOW_BYTES

    @property
    def waiting(self) -> bool:
        """Whether there is something to write, or the end to tell, to a pipe that is open."""
        return self.fd >= 0 and (self.ended or bool(self._queue))

    def take(self, offset: int, data: bytes, *, end: bool) -> None:
        """Take what is new of `data`, as far as there is room. A gap is not taken."""
        if self.ended or offset > self.received:
            return
        fresh = data[self.received - offset :]
        room = max(0, self.credit - self.received)
        kept = fresh[:room]
        self.received += len(kept)
        if self.closed:
            self._fed = self.received
        else:
            self._queue += kept
        self.ended = end and len(kept) == len(fresh) and offset + len(data) == self.received

    def write(self) -> bool:
        """Write what the pipe takes; whether `credit` or `closed` changed."""
        if self.fd < 0:
            return False
        try:
            count = os.write(self.fd, self._queue[:WRITE_BYTES]) if self._queue else 0
        except BlockingIOError:
            return False
        except OSError:
            # The other end is closed: what was queued has no reader.
            self.close()
            return True
        del self._queue[:count]
        self._fed += count
        if self.ended and not self._queue:
            self.close()
            return True
        return count > 0

    def close(self) -> None:
        """Nobody reads any more, or all was said; closing twice is harmless."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.closed = True
        self._queue.clear()
        self._fed = self.received
