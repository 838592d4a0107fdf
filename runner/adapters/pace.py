"""How long frames may be on the line as it is: short on a slow one, so that whatever comes meanwhile does not wait long behind one.

Theory of operation. Frames leave at once while there is room in the buffers of process and kernel, and then one waits for all of them.
What is averaged is therefore time for each byte, over more bytes than the buffers hold: a mean of rates would take the many frames that
only fill buffers for the line. After a rest the buffers are empty, and what leaves at once into them says nothing.
"""

from typing import Final

from protocol.limits import DATA_SLICE_BYTES_MAX, PIECE_BYTES_MIN

PIECE_S: Final = 0.01
"""A frame is to leave within this: whatever comes meanwhile waits no longer, on a line that is not slower than PIECE_BYTES_MIN in it."""
BUFFERED_BYTES: Final = 128 * 1024
"""In the process and in the kernel together: what is taken at once after a rest, however slow the line is."""
PACE_BYTES: Final = 2 * BUFFERED_BYTES
"""Over so many the pace is a mean: one frame that waits for full buffers weighs enough, one pause of the scheduler does not."""
AT_ONCE_S: Final = 0.001
"""A frame that took less did not wait for the line."""
_SHORTEST_S: Final = 1e-6
"""A clock may show less for a frame, and none at all."""


class Pace:
    """Of one connection's data after the other. `piece` is the most data to put into the next frame."""

    def __init__(self) -> None:
        self.piece = DATA_SLICE_BYTES_MAX
        self._bytes = self._seconds = 0.0
        """What left lately, and how long it took: each frame weighs the less the more bytes followed it."""
        self._left_s = float("-inf")
        self._unfilled = 0
        """Room in the buffers, at most, that no frame waited for."""

    def left(self, size: int, seconds: float, now_s: float) -> None:
        """A frame of `size` bytes has left just now, and took so long to."""
        if now_s - seconds - self._left_s > PIECE_S:
            self._unfilled = BUFFERED_BYTES
        self._left_s = now_s
        if seconds < AT_ONCE_S and self._unfilled > 0:
            self._unfilled -= size
            return
        self._unfilled = 0
        kept = PACE_BYTES / (PACE_BYTES + size)
        self._bytes = kept * self._bytes + size
        self._seconds = kept * self._seconds + max(seconds, _SHORTEST_S)
        self.piece = min(DATA_SLICE_BYTES_MAX, max(PIECE_BYTES_MIN, int(PIECE_S * self._bytes / self._seconds)))
