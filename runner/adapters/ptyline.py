"""A line to a PTY of this machine, straight to the shim that holds it (docs/terminals.md §5); its output is read from its files.

Works with daemon and control plane down. A PTY that has ended, or whose shim was killed, is shown from its files alone.
"""

import asyncio
import errno
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from protocol.errors import RemoteError
from runner.adapters.attemptfiles import read_attempt
from runner.adapters.ptylog import PtyLog
from runner.adapters.shimsocket import dial
from runner.shim import wire
from terminal.attach import Line, LineLost, LineRefused
from terminal.viewing import Begin, Ended, Heard, Resizing, Said, Seen, Taken, Typing

CONNECT_S: Final = 5.0
"""A shim answers within milliseconds, on a machine that swaps within a second."""
DELAYS_S: Final = (0.05, 0.1, 0.2, 0.5, *(1.0 for _ in range(60)))
"""Between tries while a shim holds its lock and does not answer: its socket may have been deleted; it is given up after a minute."""
_FRAME_READ_BYTES: Final = 64 * 1024


_OURS: Final = (errno.EACCES, errno.EMFILE, errno.ENFILE)
"""Faults of who asks, which no other try mends."""


class ShimDialer:
    """Lines to the PTY whose attempt directory is `directory`. `status_of` makes a shell's status of `exit.json`."""

    def __init__(
        self, directory: Path, viewer: str, status_of: Callable[[dict[str, Any]], int], *, writes: bool = True
    ) -> None:
        self._directory = directory
        self._viewer = viewer.encode("ascii")
        self._status_of = status_of
        self._writes = writes

    def delays(self) -> Iterator[float]:
        """See Dialer."""
        return iter(DELAYS_S)

    @asynccontextmanager
    async def dial(self, begin: Begin) -> AsyncIterator[Line]:
        """See Dialer."""
        # Whether it lives is asked before it is dialled: one that ends in between is found dead the next time.
        alive = read_attempt(self._directory).alive
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_unix_connection(sock=dial(self._directory))
        except (OSError, TimeoutError) as exc:
            if isinstance(exc, OSError) and exc.errno in _OURS:
                raise LineRefused(f"{self._directory}: {exc.strerror}") from exc
            if alive:
                raise LineLost("its shim does not answer") from exc
            yield FilesLine(PtyLog(self._directory, begin), self._status)
            return
        line = ShimLine(
            PtyLog(self._directory, begin), reader, writer, self._viewer if self._writes else None, self._status_of
        )
        try:
            yield line
        finally:
            await line.close()

    def _status(self) -> int:
        """Of a PTY that has no shim any more."""
        return self._status_of(read_attempt(self._directory).exit or {})


class ShimLine:
    """A connection to a shim; without a `viewer` it only looks on, and has no say in how fast the PTY is read."""

    def __init__(
        self,
        log: PtyLog,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        viewer: bytes | None,
        status_of: Callable[[dict[str, Any]], int],
    ) -> None:
        self._log = log
        self._reader, self._writer = reader, writer
        self._viewer = viewer
        self._status_of = status_of
        self._inbox = bytearray()
        self._exit: bytes | None = None
        self._heard = self._listen()

    async def hear(self) -> Heard:
        """See Line."""
        try:
            return await anext(self._heard)
        except (OSError, StopAsyncIteration, TimeoutError) as exc:
            raise LineLost("its shim is gone") from exc
        except (RemoteError, wire.WireError, ValueError) as exc:
            raise LineRefused(f"what the PTY left is damaged: {exc}") from exc

    def say(self, said: Said) -> None:
        """See Line."""
        if self._viewer is None:
            return
        match said:
            case Typing(offset, data):
                self._writer.write(wire.pack_type(self._viewer, offset, data))
            case Resizing(gen, rows, cols, redraw):
                self._writer.write(wire.pack_resize(self._viewer, gen, rows, cols, redraw=redraw))
            case Seen(offset):
                self._writer.write(wire.pack_seen(offset))

    async def said(self) -> None:
        """See Line."""
        try:
            await self._writer.drain()
        except OSError as exc:
            raise LineLost("its shim is gone") from exc

    def drop(self) -> None:
        """See Line."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Leave: the size of this window counts no more."""
        await self._heard.aclose()
        self._log.close()
        if self._viewer is not None and not self._writer.is_closing():
            self._writer.write(wire.pack_leave(self._viewer))
        self._writer.close()

    async def _listen(self) -> AsyncGenerator[Heard, None]:
        received = await self._greet()
        for heard in self._log.begin(received, writes=self._viewer is not None):
            yield heard
        self._arm()
        while True:
            kind, body = await self._frame() if self._exit is None else (wire.EXIT, self._exit)
            if kind == wire.TAKEN and (taken := self._taken(body)) is not None:
                yield taken
            elif kind == wire.BELL:
                for heard in self._log.read(wire.unpack_offset(body)):
                    yield heard
                self._arm()
            elif kind == wire.EXIT:
                for heard in self._log.read_all():
                    yield heard
                yield Ended(self._status_of(json.loads(body)))

    async def _greet(self) -> int:
        """Say who we are; how much of this viewer was taken before."""
        self._writer.write(wire.pack(wire.VIEW))
        if self._viewer is None:
            return 0
        # Nothing is typed: it is the answer that is wanted.
        self._writer.write(wire.pack_type(self._viewer, 0, b""))
        async with asyncio.timeout(CONNECT_S):
            while True:
                kind, body = await self._frame()
                if kind == wire.EXIT:
                    self._exit = body
                elif kind == wire.TAKEN and (taken := self._taken(body)) is not None:
                    return taken.received

    def _taken(self, body: bytes) -> Taken | None:
        """What a TAKEN says of this viewer; None: it is about another."""
        viewer, received, credit, closed = wire.unpack_taken(body)
        return Taken(received, credit, closed) if viewer == self._viewer else None

    def _arm(self) -> None:
        """Have the shim ring when there is more: at once, where there is some already."""
        self._writer.write(wire.pack(wire.ARM, wire.OFFSET_BODY.pack(self._log.at)))

    async def _frame(self) -> tuple[int, bytes]:
        while (found := wire.take(self._inbox)) is None:
            data = await self._reader.read(_FRAME_READ_BYTES)
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, "the shim closed the connection")
            self._inbox += data
        return found


class FilesLine:
    """What a PTY left that nobody holds any more."""

    def __init__(self, log: PtyLog, status: Callable[[], int]) -> None:
        self._log = log
        self._status = status
        self._heard = self._all()

    async def hear(self) -> Heard:
        """See Line."""
        try:
            return next(self._heard)
        except RemoteError as exc:
            raise LineRefused(f"its log is damaged: {exc.detail}") from exc
        except OSError as exc:
            raise LineRefused(f"its log cannot be read: {exc.strerror}") from exc

    def say(self, said: Said) -> None:
        """See Line. There is nobody to tell."""

    async def said(self) -> None:
        """See Line."""

    def drop(self) -> None:
        """See Line. It cannot break."""

    def _all(self) -> Iterator[Heard]:
        try:
            yield from self._log.begin(0, writes=False)
            yield from self._log.read_all()
            yield Ended(self._status())
        finally:
            self._log.close()
