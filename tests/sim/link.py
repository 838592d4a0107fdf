"""The network between a runner and a control plane, with a real client's and a real server's connection at its ends.

Theory of operation. A line has two channels. On a `tcp` network frames come in order and none is lost, but late, and those under way
are gone when the line is cut; on a `lossy` one each is lost, doubled or overtaken by itself. A stall holds back one direction or both:
what was sent comes when it is over, unless an end gave up first. A cut ends a line for both ends, each told in its own time.

Nothing here knows what a frame says; `taps` are shown each one that is sent.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import anyio
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.frames import Close

from protocol.messages import SUBPROTOCOL
from runner.adapters.websocket import OPEN_TIMEOUT_S, ConnectionLost, PlaneConnection
from tests.sim.story import Story
from tests.sim.timeline import MS_US, SECOND_US, Owner, Timeline

UP, DOWN = "up", "down"
DEAD_PEER_US: Final = 40 * SECOND_US
"""A server's pings: 20 s apart, 20 s patience."""
RECORDED_MAX: Final = 200
HANDSHAKE: Final = ('{"t":"hello"', '{"t":"challenge"', '{"t":"proof"', '{"t":"welcome"')
"""What opens a session comes in order on every network: a session is what a lossy one is made bearable by."""
_BROKEN: Final = 1006


@dataclass(slots=True)
class Weather:
    """How the network is; times in ms."""

    latency_ms: float = 5
    jitter_ms: float = 5
    slow_percent: int = 0
    """Of frames, that come late by up to `slow_ms`; on tcp those behind them, too."""
    slow_ms: int = 0
    loss_percent: int = 0
    double_percent: int = 0
    lossy: bool = False


class Channel:
    """One direction of a line."""

    def __init__(self, line: "Line", way: str) -> None:
        self.line = line
        self.way = way
        self.backlog: list[Any] = []
        self._last_us = 0

    def send(self, frame: Any) -> None:
        """Put a frame, or the end (a Close), on its way."""
        network = self.line.network
        if network.stalled[self.way]:
            if not network.weather.lossy or isinstance(frame, Close):
                self.backlog.append(frame)
            return
        weather, rng = network.weather, network.rng
        if weather.lossy and isinstance(frame, str) and not frame.startswith(HANDSHAKE):
            if rng.randrange(100) < weather.loss_percent:
                network.story.say(self.way, "lost a frame")
                return
            if rng.randrange(100) < weather.double_percent:
                self._under_way(frame)
        self._under_way(frame)

    def _under_way(self, frame: Any) -> None:
        network = self.line.network
        due_us = max(network.timeline.now_us + network.delay_us(), self._last_us)
        if not network.weather.lossy or (isinstance(frame, str) and frame.startswith(HANDSHAKE)):
            self._last_us = due_us
        network.timeline.after(None, due_us - network.timeline.now_us, self._arrive, frame)

    def _arrive(self, frame: Any) -> None:
        if not self.line.cut:
            self.line.end(self.way).arrive(frame)

    def flush(self) -> None:
        """The stall is over."""
        backlog, self.backlog = self.backlog, []
        for frame in backlog:
            self.send(frame)


class End:
    """What both ends of a line have in common: a queue of frames and somebody who waits for the next."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._frames: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.closed: Close | None = None

    def arrive(self, frame: Any) -> None:
        """A frame, or the end."""
        if self.closed is None:
            self._frames.append(frame)
            self._wake()

    def over(self, close: Close) -> None:
        """The connection is broken at this end, now."""
        if self.closed is None:
            self.closed = close
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._waiter = None

    async def next(self) -> Any:
        """The next frame; a Close when there is none any more."""
        while True:
            if self._frames:
                frame = self._frames.popleft()
                if isinstance(frame, Close):
                    self.over(frame)
                    return frame
                return frame
            if self.closed is not None:
                return self.closed
            if self._waiter is None or self._waiter.done():
                self._waiter = self._timeline.create_future()
            await self._waiter


class ClientEnd(End):
    """A `ClientConnection` of the websockets library, as far as the adapter uses it."""

    subprotocol = SUBPROTOCOL

    def __init__(self, line: "Line") -> None:
        super().__init__(line.network.timeline)
        self.line = line
        self.transport = self
        self._pings = 0
        self._pongs: dict[int, asyncio.Future[None]] = {}

    def arrive(self, frame: Any) -> None:
        """Pongs are for who waits for them."""
        if isinstance(frame, Pong):
            waiter = self._pongs.pop(frame.number, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
            return
        super().arrive(frame)

    async def send(self, frame: str | bytes) -> None:
        """Send a frame."""
        if self.closed is not None:
            raise self._error(self.closed)
        self.line.send(UP, frame)

    async def recv(self) -> str | bytes:
        """The next frame."""
        frame = await self.next()
        if isinstance(frame, Close):
            raise self._error(frame)
        return frame  # type: ignore[no-any-return]

    async def ping(self) -> asyncio.Future[None]:
        """Ask for a sign of life."""
        if self.closed is not None:
            raise self._error(self.closed)
        waiter: asyncio.Future[None] = self._timeline.create_future()
        self._pings += 1
        self._pongs[self._pings] = waiter
        self.line.up.send(Ping(self._pings))
        return waiter

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End it on purpose."""
        if self.closed is None:
            self.over(Close(int(code), reason))
            self.line.up.send(Close(int(code), reason))

    def abort(self) -> None:
        """End it without a word."""
        self.over(Close(_BROKEN, ""))
        self.line.up.send(Close(_BROKEN, ""))

    def _error(self, close: Close) -> ConnectionClosed:
        return ConnectionClosedError(None if close.code == _BROKEN else close, None)


class ServerEnd(End):
    """A WebSocket of starlette, as far as the gateway uses it."""

    def __init__(self, line: "Line", owner: Owner) -> None:
        super().__init__(line.network.timeline)
        self.line = line
        self.owner = owner
        self.scope = {"subprotocols": [SUBPROTOCOL]}

    def arrive(self, frame: Any) -> None:
        """Pings are answered by the server's library, in the process's own time."""
        if isinstance(frame, Ping):
            self._timeline.after(self.owner, 0, self.line.down.send, Pong(frame.number))
            return
        super().arrive(frame)

    async def accept(self, subprotocol: str | None = None) -> None:
        """The upgrade was part of dialling."""

    async def receive(self) -> dict[str, Any]:
        """The next message."""
        frame = await self.next()
        if isinstance(frame, Close):
            return {"type": "websocket.disconnect", "code": frame.code}
        return {"type": "websocket.receive", "text": frame, "bytes": None}

    async def send_text(self, text: str) -> None:
        """Send a frame."""
        if self.closed is not None:
            raise WebSocketDisconnect(self.closed.code)
        self.line.send(DOWN, text)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End it on purpose."""
        if self.closed is None:
            self.over(Close(code, reason))
            self.line.down.send(Close(code, reason))


@dataclass(frozen=True, slots=True)
class Ping:
    """A ping of the client."""

    number: int


@dataclass(frozen=True, slots=True)
class Pong:
    """Its answer."""

    number: int


class Line:
    """One connection."""

    def __init__(self, network: "Network", server: Owner) -> None:
        self.network = network
        self.cut = False
        self.up = Channel(self, UP)
        self.down = Channel(self, DOWN)
        self.client = ClientEnd(self)
        self.server = ServerEnd(self, server)

    def end(self, way: str) -> End:
        """Where frames of one way arrive."""
        return self.server if way == UP else self.client

    def send(self, way: str, frame: str | bytes) -> None:
        """A frame of one of the ends."""
        frame = self.network.shown(self, way, frame)
        if frame:
            (self.up if way == UP else self.down).send(frame)

    @property
    def over(self) -> bool:
        """Whether both ends know that it is."""
        return self.client.closed is not None and self.server.closed is not None

    def break_off(self) -> None:
        """What is under way is gone; both ends hear of it a little later."""
        self.cut = True
        for end in (self.client, self.server):
            self.network.timeline.after(None, self.network.delay_us(), end.over, Close(_BROKEN, ""))

    def client_vanished(self) -> None:
        """Its process died; the kernel says so, if it still can."""
        self.client.over(Close(_BROKEN, ""))
        self.up.send(Close(_BROKEN, ""))

    def server_vanished(self) -> None:
        """As for the client."""
        self.server.over(Close(_BROKEN, ""))
        self.down.send(Close(_BROKEN, ""))

    def server_gives_up(self) -> None:
        """Nobody answers its pings."""
        if self.server.closed is None:
            self.server.over(Close(_BROKEN, ""))
            self.down.send(Close(_BROKEN, ""))


Tap = Callable[[Line, str, str], str]
"""Is shown a frame that is sent, and returns what goes on the way: nothing, to lose it."""


@dataclass
class Network:
    """All lines there are."""

    timeline: Timeline
    rng: Random
    story: Story
    weather: Weather = field(default_factory=Weather)
    stalled: dict[str, bool] = field(default_factory=lambda: {UP: False, DOWN: False})
    lines: list[Line] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    listen: Callable[[Line], Owner | None] = lambda _line: None
    """The control plane, if it is there, takes a new line."""
    connected: Callable[[Line], None] = lambda _line: None
    """The daemon that dials takes its end."""
    reachable: Callable[[], bool] = lambda: True
    """Whether the runner's machine is on and awake."""
    frames: int = 0

    def delay_us(self) -> int:
        """How long a frame takes."""
        weather = self.weather
        delay_ms = weather.latency_ms + self.rng.random() * weather.jitter_ms
        if weather.slow_percent and self.rng.randrange(100) < weather.slow_percent:
            delay_ms += self.rng.randrange(weather.slow_ms)
        return int(delay_ms * MS_US)

    def shown(self, line: Line, way: str, frame: str | bytes) -> str:
        """Show a frame to all taps."""
        assert isinstance(frame, str), "no data is sent in a simulation"
        self.frames += 1
        for tap in list(self.taps):
            frame = tap(line, way, frame)
        return frame

    # --- what happens to it -------------------------------------------------------------------------------------

    def stall(self, *ways: str) -> None:
        """Hold back what is sent from now on."""
        for way in ways:
            self.stalled[way] = True
        self.lost_touch()

    def clear(self) -> None:
        """Whatever was held back goes."""
        self.stalled = {UP: False, DOWN: False}
        for line in list(self.lines):
            line.up.flush()
            line.down.flush()

    def cut(self) -> None:
        """Break every line."""
        for line in self.lines:
            line.break_off()
        self.lines.clear()

    def lost_touch(self) -> None:
        """Servers will notice that nobody answers, if this goes on."""
        for line in self.lines:
            self.timeline.after(None, DEAD_PEER_US, self._look_for, line, self.timeline.now_us)

    def _look_for(self, line: Line, since_us: int) -> None:
        if line.cut or line.server.closed is not None:
            return
        if any(self.stalled.values()) or not self.reachable():
            self.story.say("net", "the plane gives up a line that is silent since %.1f s", since_us / SECOND_US)
            line.server_gives_up()

    # --- dialling -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def dial(self, _url: str, _proxy: str | None) -> AsyncIterator[PlaneConnection]:
        """Stands in the place of `runner.adapters.websocket.dial`."""
        line = await self._connected()
        connection = PlaneConnection(line.client)  # type: ignore[arg-type]
        try:
            yield connection
        finally:
            await connection.close()

    async def _connected(self) -> Line:
        await self.timeline.sleep(2 * self.delay_us())
        if any(self.stalled.values()):
            await anyio.sleep(OPEN_TIMEOUT_S)
            raise ConnectionLost(None, "cannot connect: TimeoutError")
        owner = Owner("nobody")
        line = Line(self, owner)
        served = self.listen(line)
        if served is None:
            raise ConnectionLost(None, "cannot connect: refused")
        line.server.owner = served
        self.connected(line)
        self.lines = [other for other in self.lines if not other.over and not other.cut]
        self.lines.append(line)
        return line
