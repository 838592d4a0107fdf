"""The terminal of the person at a viewer: raw while it shows a PTY, and always put back as it was.

Rule 1. Whatever ends this process, but a SIGKILL, the terminal's own modes are restored, and those that the PTY's program left are taken
        back. Rule 2. Its descriptors stay blocking: they are shared with the shell that started us.
"""

import asyncio
import atexit
import contextlib
import os
import select
import termios
import tty
from types import TracebackType
from typing import Any, Final, Self

from protocol.limits import TERMINAL_CELLS_MAX
from terminal.modes import Modes

ROWS: Final = 24
COLS: Final = 80
"""Of what is no terminal."""
READ_BYTES: Final = 16 * 1024
WRITE_BYTES: Final = 4 * 1024
"""Written at once, when there is room: a terminal that is slow holds the loop no longer than it takes these."""
RESTORE_S: Final = 1.0
"""A terminal that takes nothing any more is not waited for longer than this at the end."""
_LEFT: Final = b"\x1b[!p\x1b[r\x1b[m\x1b(B\x0f\x1b[?25h"
"""Soft reset, whole screen, no colours, plain characters, cursor shown."""
_KEYS_ASKED: Final = ((b"\x1b[>4;", b"\x1b[>4m"), (b"\x1b[>", b"\x1b[<99u"), (b"\x1b[=", b"\x1b[=0u"))
"""Ways of sending keys that a program may have asked for, and how each is taken back."""


class RawTerminal:
    """Standard input and output of this process, as a terminal or as what they are. `with` makes it raw."""

    def __init__(self, fd_in: int = 0, fd_out: int = 1) -> None:
        self._in, self._out = fd_in, fd_out
        self.types = os.isatty(fd_in)
        """Whether a person types."""
        self.shows = os.isatty(fd_out)
        """Whether a person looks on."""
        self.modes = Modes()
        """What the program has set on it."""
        self._saved: list[Any] | None = None
        self._keys_asked = b""
        self._drawn_on = False

    def __enter__(self) -> Self:
        if self.types:
            self._saved = termios.tcgetattr(self._in)
            # A belt: for a way out that leads past `__exit__`.
            atexit.register(self.restore)
            self.make_raw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
        atexit.unregister(self.restore)

    def make_raw(self) -> None:
        """No echo, no lines, no signals of its own: every key is a byte for the PTY."""
        if self._saved is not None:
            with contextlib.suppress(termios.error):
                # What was typed ahead is for the PTY.
                tty.setraw(self._in, termios.TCSANOW)

    def restore(self) -> None:
        """As it was before; again, it changes nothing."""
        if self._drawn_on:
            self._drawn_on = False
            asked = b"".join(off for on, off in _KEYS_ASKED if on in self._keys_asked)
            self._put(asked + _LEFT + self.modes.undoing() + b"\x1b[m\r\n")
            self.modes = Modes()
        if self._saved is not None:
            # A terminal that hung up has nothing to be restored.
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._in, termios.TCSANOW, self._saved)

    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        for fd in (self._out, self._in):
            with contextlib.suppress(OSError):
                size = os.get_terminal_size(fd)
                if size.lines and size.columns:
                    return min(size.lines, TERMINAL_CELLS_MAX), min(size.columns, TERMINAL_CELLS_MAX)
        return ROWS, COLS

    def make_room(self) -> None:
        """What stands on the screen goes up into what can be scrolled back to, instead of being cleared."""
        if self.shows:
            self._put(b"\r\n" * self.size()[0])

    async def show(self, data: bytes) -> None:
        """Write all of it. Raises BrokenPipeError when nobody reads any more."""
        if self.shows:
            self._drawn_on = True
            self.modes.feed(data)
            for on, _off in _KEYS_ASKED:
                if on in data and on not in self._keys_asked:
                    self._keys_asked += on + b" "
        view = memoryview(data)
        while view:
            if not _ready(self._out, select.POLLOUT, 0.0):
                await _until_ready(self._out, writing=True)
            view = view[os.write(self._out, view[:WRITE_BYTES]) :]

    async def read(self) -> bytes:
        """What was typed; nothing at the end."""
        if not _ready(self._in, select.POLLIN, 0.0):
            await _until_ready(self._in, writing=False)
        try:
            return os.read(self._in, READ_BYTES)
        except OSError:
            return b""  # the terminal hung up

    def tell(self, text: str) -> None:
        """A line of our own: on the last row of the screen, with the cursor left where it was; no terminal: nothing."""
        if self.shows:
            rows, cols = self.size()
            line = text[: cols - 1].encode("ascii", "replace")
            self._put(b"\x1b7\x1b[r\x1b[%dH\x1b[0;7m%b\x1b[m\x1b[K\x1b8" % (rows, line))

    def _put(self, data: bytes) -> None:
        """Write what is ours, as long as it is taken."""
        view = memoryview(data)
        with contextlib.suppress(OSError):
            while view and _ready(self._out, select.POLLOUT, RESTORE_S):
                view = view[os.write(self._out, view[:WRITE_BYTES]) :]


def _ready(fd: int, event: int, wait_s: float) -> bool:
    """Whether a read or write of a little does not wait; files are always ready."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(wait_s * 1000))


async def _until_ready(fd: int, *, writing: bool) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    (loop.add_writer if writing else loop.add_reader)(fd, set_ready)
    try:
        await ready
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(fd)
