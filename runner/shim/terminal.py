"""The terminal of a PTY: what is typed by offset and once, whose size counts, and how far ahead of its viewers it may run.

Rule 1. Each viewer has a count of its own; bytes below it are never taken twice, a piece above it never early, and a piece is
        taken whole or not at all, so two who type are not mixed within one.
Rule 2. At most QUEUE_BYTES wait for a program that does not read; a program that writes meanwhile is read all the same.
Rule 3. Of sizes the newest of each viewer counts; an older one that comes late changes nothing.
"""

from __future__ import annotations

import _struct
import errno
import fcntl
import posix as os
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.spec import Tty

# As much as the kernel takes of a paste before it makes us wait, many times over.
QUEUE_BYTES: Final = 262_144
WRITE_BYTES: Final = 16_384
# Viewers that are counted; as many as are ever let in to one PTY.
VIEWERS_MAX: Final = 256
# A window that grows for a moment makes a full-screen program draw anew; in less some do not notice.
REDRAW_MS: Final = 50
# Ahead of the foremost viewer that may type by so much, the program waits; from so much on it goes on.
AHEAD_BYTES: Final = 262_144
AHEAD_BYTES_MIN: Final = 65_536
LATEST, SMALLEST, FIXED = "latest", "smallest", "fixed"
# `termios` names it since Python 3.13 only.
_IUTF8: Final = 0o40000
_LONG_MS: Final = 1 << 30
_WINSIZE: Final = _struct.Struct("HHHH")


def open_pair(tty: Tty) -> tuple[int, int, str]:
    """A terminal of that size: `(master, slave, name of the slave)`. Raises OSError."""
    master, slave = os.openpty()
    try:
        modes = termios.tcgetattr(slave)
        # Without it a backspace takes one byte of a character of several.
        modes[0] |= _IUTF8
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        _set_size(master, tty.rows, tty.cols)
        os.set_blocking(master, False)
        return master, slave, os.ttyname(slave)
    except BaseException:
        os.close(master)
        os.close(slave)
        raise


class Terminal:
    """Our end of the terminal, `fd` (-1: closed), with what waits to be typed."""

    def __init__(self, fd: int, tty: Tty) -> None:
        self.fd = fd
        self.rows, self.cols = tty.rows, tty.cols
        self.short: set[bytes] = set()  # viewers that were told that there is no room
        self._policy = tty.size_policy
        self._queue = bytearray()
        self._taken: dict[bytes, int] = {}
        self._sizes: dict[bytes, tuple[int, int, int]] = {}  # gen, rows, cols
        self._present: dict[bytes, None] = {}  # who has a window now, the latest last
        self._redraw_at: int | None = None

    @property
    def waiting(self) -> bool:
        """Whether something is to be typed."""
        return self.fd >= 0 and bool(self._queue)

    # --- typing -------------------------------------------------------------------------------------------------

    def take(self, viewer: bytes, offset: int, data: bytes) -> None:
        """Take what is new of `data`, if there is room for it. A gap is not taken."""
        received = self._taken.get(viewer, 0)
        fresh = data[received - offset :] if offset <= received else b""
        if self.fd < 0 or not fresh or (viewer not in self._taken and len(self._taken) >= VIEWERS_MAX):
            return
        if len(self._queue) + len(fresh) > QUEUE_BYTES:
            self.short.add(viewer)
            return
        self._queue += fresh
        self._taken[viewer] = received + len(fresh)

    def counted(self, viewer: bytes) -> tuple[int, int]:
        """How much of this viewer was taken, and up to where there is room."""
        received = self._taken.get(viewer, 0)
        return received, received + QUEUE_BYTES - len(self._queue)

    def write(self) -> None:
        """Type what the terminal takes."""
        try:
            while self._queue:
                del self._queue[: os.write(self.fd, self._queue[:WRITE_BYTES])]
        except BlockingIOError:
            return
        except OSError as exc:
            if exc.errno != errno.EIO:
                raise
            # Nobody has the other end open: there is nobody to type to.
            self._queue.clear()

    def eased(self) -> list[bytes]:
        """Viewers that were short of room and have it again, once."""
        if not self.short or len(self._queue) > QUEUE_BYTES // 2:
            return []
        viewers, self.short = list(self.short), set()
        return viewers

    # --- size ---------------------------------------------------------------------------------------------------

    def resize(self, viewer: bytes, gen: int, rows: int, cols: int) -> bool:
        """A viewer told its size; whether that of the terminal changed. The first of many counts, as with typing."""
        known = self._sizes.get(viewer)
        if (known is None and len(self._sizes) >= VIEWERS_MAX) or (known is not None and gen <= known[0]):
            return False
        self._sizes[viewer] = (gen, rows, cols)
        self._present.pop(viewer, None)
        self._present[viewer] = None
        return self._fit()

    def leave(self, viewer: bytes) -> bool:
        """A viewer is gone; whether the size changed."""
        return viewer in self._present and (self._present.pop(viewer, None), self._fit())[1]

    def redraw(self, now_ms: int) -> None:
        """Make the program draw anew: the window grows, and is right again at `redraw_at`."""
        if self.fd >= 0:
            _set_size(self.fd, self.rows + 1, self.cols + 1)
            self._redraw_at = now_ms + REDRAW_MS

    def due_ms(self, now_ms: int) -> int:
        """In how many ms `tick` has something to do; a long time if nothing happens meanwhile."""
        return _LONG_MS if self._redraw_at is None else max(0, self._redraw_at - now_ms)

    def tick(self, now_ms: int) -> None:
        """The size is right again, when it is time."""
        if self._redraw_at is not None and now_ms >= self._redraw_at:
            self._redraw_at = None
            if self.fd >= 0:
                _set_size(self.fd, self.rows, self.cols)

    def close(self) -> None:
        """Nobody types any more: hangs up on whoever still has the other end."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._queue.clear()
        self._redraw_at = None

    def _fit(self) -> bool:
        sizes = [self._sizes[viewer][1:] for viewer in self._present]
        if self._policy == FIXED or not sizes or self.fd < 0:
            return False
        rows, cols = sizes[-1]
        if self._policy == SMALLEST:
            rows, cols = min(size[0] for size in sizes), min(size[1] for size in sizes)
        if (rows, cols) == (self.rows, self.cols):
            return False
        self.rows, self.cols = rows, cols
        # One that grows for a redraw is put right to this.
        _set_size(self.fd, rows, cols)
        return True


def ahead(end: int, seen: list[int], *, held: bool) -> bool:
    """Whether a program that wrote up to `end` has to wait for viewers that followed to `seen`."""
    return bool(seen) and end - max(seen) > (AHEAD_BYTES_MIN if held else AHEAD_BYTES)


def _set_size(fd: int, rows: int, cols: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _WINSIZE.pack(rows, cols, 0, 0))
