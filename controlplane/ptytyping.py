"""What a viewer of a PTY typed and its runner has not taken: held, in order, until it has. Pure.

Rule 1: what is held is bounded, in bytes and in pieces, and so is what is under way. Rule 2: a piece goes again when its session is gone,
when it was refused for want of room and there is room, and when nobody answers; the shim takes each byte once, however often it comes.
"""

from collections import deque
from collections.abc import Iterator
from typing import Final

from controlplane.limits import PTY_HELD_BYTES, PTY_HELD_PIECES, PTY_PIECES_IN_FLIGHT
from protocol.errors import Reason
from protocol.messages import Taken, Typed

_FOR_GOOD: Final = frozenset({Reason.BAD_SIG, Reason.READ_ONLY})
"""A piece that was not taken for one of these never will be."""


class Typing:
    """What a viewer typed and nobody took yet, in the order of its own count."""

    def __init__(self) -> None:
        self._pieces: deque[tuple[int, Typed]] = deque()
        """Each with the offset behind it."""
        self._bytes = 0
        self._sent = 0
        self._unanswered = 0
        self._credit: int | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Typed, size: int) -> bool:
        """Hold a piece; what is held from its offset on is said anew by it. False when there is no room."""
        while self._pieces and self._pieces[-1][1].offset >= piece.offset:
            end, dropped = self._pieces.pop()
            self._bytes -= end - dropped.offset
        self._sent = min(self._sent, len(self._pieces))
        if self._bytes + size > PTY_HELD_BYTES or len(self._pieces) >= PTY_HELD_PIECES:
            return False
        self._pieces.append((piece.offset + size, piece))
        self._bytes += size
        return True

    def due(self) -> Iterator[Typed]:
        """Pieces to send now; they count as sent."""
        while self._sent < min(len(self._pieces), PTY_PIECES_IN_FLIGHT):
            end, piece = self._pieces[self._sent]
            if self._credit is not None and end > self._credit:
                return
            self._sent += 1
            self._unanswered += 1
            yield piece

    def answered(self, taken: Taken) -> None:
        """Drop what is taken; what was sent and refused for want of room goes again once there is some."""
        self._unanswered = max(0, self._unanswered - 1)
        self._credit = taken.credit
        if taken.closed or taken.reason in _FOR_GOOD:
            self._pieces.clear()
            self._bytes = self._sent = 0
            return
        while self._pieces and self._pieces[0][0] <= taken.received:
            end, piece = self._pieces.popleft()
            self._bytes -= end - piece.offset
            self._sent = max(0, self._sent - 1)
        if taken.reason is None and not self._unanswered:
            self._sent = 0

    def again(self) -> None:
        """Everything is to be sent again: the session that had it is gone, or it is silent."""
        self._sent = self._unanswered = 0
        self._credit = None
