"""A person at a PTY afar: a viewer across all its connections, with a terminal emulator for what it is shown.

Theory of operation. It is a viewer as docs/terminals.md §7 asks for one, and nothing of the product's own viewers: what it typed is kept
and said again from the first byte that was not taken, on each connection anew; it comes back from the offset it has. Its window has the
size that it told, whatever size the PTY has, as a person's terminal does.
"""

import asyncio
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import httpx
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from examples.demo.stage import Failure
from protocol.keys import PrivateKey
from protocol.limits import TYPED_BYTES_MAX
from protocol.records import RecordKind, records
from terminal.emulator import Emulator
from tests.support.stand import ANSWER_S, RUNNER, Stand, poll
from tests.support.viewers import Key, Seat, admit, seated

AGAIN_S: Final = 0.05
"""Before the next try of a connection that was refused or broke."""
ROWS, COLS = 24, 80


async def opened(system: Stand, *argv: str, env: dict[str, str] | None = None, **over: Any) -> str:
    """A PTY in the home of the stand, with a prompt that is known."""
    body = {
        "runner": RUNNER,
        "argv": list(argv),
        "cwd": str(system.home),
        "env": {"PS1": "ready> ", "INPUTRC": "/dev/null", **(env or {})},
        "size": {"rows": ROWS, "cols": COLS},
    }
    return str((await system.post("/ptys", body | over))["id"])


async def pty_log(system: Stand, pty: str) -> bytes:
    """What its terminal got, as the control plane stored it."""
    data = (await system.http.get(f"/executions/{pty}/log")).content
    return b"".join(each.payload for each in records(data, 0) if each.kind == RecordKind.PTY)


class Person:
    """One viewer of one PTY; `name` is its key. It comes first by `attach`, or from the log offset `start`."""

    def __init__(self, system: Stand, pty: str, name: str, attach: str, start: int | None, mode: str) -> None:
        self.pty = pty
        self.screen = Emulator(ROWS, COLS)
        self.offset: int | None = start
        """Of the log: everything before it was shown. None: nothing yet."""
        self.shown = bytearray()
        """All that ever came for the terminal."""
        self.typed = bytearray()
        self.taken = 0
        self.online = True
        self.live = False
        self.connections = 0
        self.skips = 0
        self.ended: dict[str, Any] | None = None
        self._system = system
        self._key = Key(PrivateKey(hashlib.sha256(f"{pty} {name}".encode()).digest()))
        self._mode = mode
        self._attach = attach
        self._size = (ROWS, COLS)
        self._seat: Seat | None = None
        self._changed = asyncio.Event()
        self._saying = asyncio.Lock()
        self._failed: BaseException | None = None

    # --- what a person does ---------------------------------------------------------------------------------------

    async def type(self, text: str | bytes) -> None:
        """Press keys: they go now, or once there is somebody to take them."""
        self.typed += text.encode() if isinstance(text, str) else text
        await self._say()

    async def resize(self, rows: int, cols: int) -> None:
        """Change the window."""
        self._size = rows, cols
        self.screen.resize(rows, cols)
        if self._seat is not None and self.live:
            await self._seat.resize(rows, cols)

    def drop(self) -> None:
        """Break the connection, in the middle of whatever is said."""
        if self._seat is not None:
            self._seat.socket.transport.abort()

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until something is so."""
        try:
            async with asyncio.timeout(ANSWER_S):
                while not holds():
                    if self._failed is not None:
                        raise self._failed
                    if self.ended is not None:
                        raise TimeoutError
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"not so: {what}\n{self}") from None

    async def sees(self, *texts: str) -> None:
        """Wait until all of this is on the screen."""
        await self.until(lambda: all(text in self.text for text in texts), f"{texts} on the screen")

    async def is_taken(self) -> None:
        """Wait until everything that was typed was taken."""
        await self.until(lambda: self.taken == len(self.typed), f"all {len(self.typed)} bytes taken")

    async def leaves_with(self) -> dict[str, Any]:
        """Wait until the PTY has ended: how."""
        await self.until(lambda: self.ended is not None, "the end")
        assert self.ended is not None
        return self.ended

    @property
    def text(self) -> str:
        """The screen, without what is blank behind its lines."""
        return "\n".join(line.rstrip() for line in self.screen.lines)

    @property
    def picture(self) -> tuple[object, ...]:
        """All that can be seen, and what of the keyboard depends on it."""
        modes = self.screen.modes
        return self.text, self.screen.cells, self.screen.cursor, modes.changed, modes.keypad

    def __str__(self) -> str:
        of = f"{self.pty}: typed {len(self.typed)} taken {self.taken} offset {self.offset} live {self.live} {self.online=}"
        return (
            f"{of} connections {self.connections} ended {self.ended}\n{self.text.rstrip()}\n--- at {self.screen.cursor}"
        )

    # --- its connections --------------------------------------------------------------------------------------------

    async def stay(self) -> None:
        """Connection after connection, until the PTY has ended."""
        try:
            while self.ended is None:
                # Whoever dies does so between any two words.
                with suppress(OSError, httpx.HTTPError, InvalidHandshake, ConnectionClosed, TimeoutError):
                    await self._connect()
                self._seat, self.live = None, False
                self._changed.set()
                if self.ended is None:
                    await asyncio.sleep(AGAIN_S)
        except Exception as exc:
            self._failed = exc
            self._changed.set()

    async def _connect(self) -> None:
        ticket = await admit(self._system.http, self.pty, self._key, self._mode)
        async with seated(self._system.port, self.pty, ticket, self._key) as seat:
            asked, came_back = self.offset, self.connections > 0
            begun = await seat.begin(self._attach, asked)
            if asked is not None:
                assert begun["offset"] == asked, "who names the offset that he has gets what comes behind it"
            self.connections += 1
            # A control plane that was started anew may have forgotten; what was taken stays taken.
            self.taken = self._key.typed = max(self.taken, begun["received"])
            self._seat = seat
            if not came_back and asked is None:
                self.offset = begun["offset"]
            while True:
                await self._hear(seat, fresh=not came_back and asked is None)

    async def _hear(self, seat: Seat, *, fresh: bool) -> None:
        frame = seat.heard.pop(0) if seat.heard else await seat.socket.recv()
        if isinstance(frame, bytes):
            (self.offset,) = struct.unpack_from("<Q", frame)
            self.shown += frame[8:]
            self.screen.feed(frame[8:])
            with suppress(ConnectionClosed):
                await seat.say({"t": "seen", "offset": self.offset})
        else:
            await self._told(seat, frame if isinstance(frame, dict) else json.loads(frame), fresh=fresh)
        self._changed.set()

    async def _told(self, seat: Seat, said: dict[str, Any], *, fresh: bool) -> None:
        match said["t"]:
            case "live":
                self.offset = max(said["offset"], self.offset or 0)
                self.live = True
                # What is closed behind its last word is read to that word all the same.
                with suppress(ConnectionClosed):
                    if self._mode == "rw":
                        full = self._attach == "replay" and self.screen.modes.alternate
                        await seat.resize(*self._size, redraw=fresh and (full or self._attach == "redraw"))
                    await seat.say({"t": "seen", "offset": self.offset})
                await self._say()
            case "taken":
                assert said["received"] <= len(self.typed), "no more is taken than was typed"
                assert said.get("reason") in (None, "OUT_OF_ORDER", "NOT_RUNNING", "INFRA"), said
                self.taken = max(self.taken, said["received"])
            case "skipped":
                self.skips += 1
            case "offline" | "online":
                self.online = said["t"] == "online"
            case "ended":
                self.ended = said

    async def _say(self) -> None:
        async with self._saying:
            seat = self._seat
            while seat is not None and self.live and self._key.typed < len(self.typed):
                at = self._key.typed
                try:
                    await seat.type(bytes(self.typed[at : at + TYPED_BYTES_MAX]))
                except ConnectionClosed:
                    return


@asynccontextmanager
async def person(
    system: Stand, pty: str, name: str = "one", *, attach: str = "replay", start: int | None = None, mode: str = "rw"
) -> AsyncIterator[Person]:
    """Somebody at a PTY, who comes back whenever the connection breaks."""
    found = Person(system, pty, name, attach, start, mode)
    staying = asyncio.create_task(found.stay())
    try:
        await found.until(lambda: found.live or found.ended, "a connection")
        yield found
    except BaseException:
        print(found)
        raise
    finally:
        staying.cancel()
        await asyncio.gather(staying, return_exceptions=True)


async def same(one: Person, other: Person, *, modes: bool = True) -> None:
    """Wait until both see the same, as far as the log goes: screen, colours and cursor, and have the same `modes`."""
    parts = 5 if modes else 3

    async def so() -> bool:
        return one.offset == other.offset and one.picture[:parts] == other.picture[:parts]

    try:
        await poll(so, "the same screen")
    except Failure:
        differ = [pair for pair in zip(_flat(one), _flat(other), strict=True) if pair[0] != pair[1]]
        raise AssertionError(f"they see different things: {differ}\n{one}\n=== and ===\n{other}") from None


def _flat(who: Person) -> list[object]:
    text, cells, *others = who.picture
    assert isinstance(cells, list)
    return [*str(text).split("\n"), *(cell for row in cells for cell in row), *others]
