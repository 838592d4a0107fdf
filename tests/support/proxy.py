"""A TCP proxy between a runner and its control plane whose behaviour a test changes while connections live.

async with Proxy(plane_port, seed=1) as proxy:
    ...                                     # a runner dials proxy.port
    proxy.stall(Way.DOWN)                   # nothing from the plane gets through, and nobody is told
    proxy.twice("command", "report")        # every one of these messages comes two times
    proxy.heal()                            # an honest network again

Theory of operation. A connection has two ways; each is a reader, a short queue of pieces and a writer. Behind the head of HTTP a piece
is one WebSocket frame. The `t` of text messages is read, and rules may lose, repeat, swap or delay a message; its bytes are never
changed. Gates and paces belong to the proxy, so they hold for connections that come later, too. The kernel's buffers are kept small: a
link that is slow holds little, as a real one does, and the rest waits where it was sent.

Rule 1: without a fault, what comes out of a way is byte for byte what went in, and its end comes after it. Rule 2: what was done is
counted. Rule 3: chance comes from the seed alone; the same messages in the same order meet the same faults.
"""

import asyncio
import json
import random
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple

import anyio

from examples.demo.stage import free_port

READ_BYTES: Final = 16 * 1024
QUEUE_BYTES: Final = 64 * 1024
"""In a way's queue before its reader waits; one whole frame always gets in."""
KERNEL_BYTES: Final = 32 * 1024
"""Receive buffer of either socket; the kernel doubles it."""
PACE_S: Final = 0.05
"""A slow way sends as many bytes at once as this much time allows, at least one."""
HOLD_S: Final = 0.5
"""A message to be swapped waits no longer for the next one."""
POLL_S: Final = 0.01
HEAD_BYTES_MAX: Final = 16 * 1024
_TEXT: Final = 0x81
"""First byte of an unfragmented text message."""
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Way(StrEnum):
    """A direction."""

    UP = "up"
    """From the runner to the plane."""
    DOWN = "down"


class Action(StrEnum):
    """What a rule does to a message."""

    LOSE = "lose"
    TWICE = "twice"
    SWAP = "swap"
    LATE = "late"


class Ending(StrEnum):
    """How a connection ended."""

    CLOSED = "closed"
    """Both peers were done."""
    BROKEN = "broken"
    """A peer reset it, and so was the other."""
    DROPPED = "dropped"
    RESET = "reset"
    ABANDONED = "abandoned"
    UNREACHABLE = "unreachable"
    """The plane was not there."""


@dataclass(eq=False)
class Rule:
    """One fault of messages: what, of which kinds, how often still."""

    action: Action
    kinds: frozenset[str]
    times: int | None
    """None: always."""
    chance: float
    copies_s: tuple[float, ...]
    """How late each copy that is passed on is."""

    def wants(self, kind: str, chance: random.Random) -> bool:
        """Whether this message is one of them; if so, it counts."""
        if kind not in self.kinds or self.times == 0 or chance.random() >= self.chance:
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def give_back(self) -> None:
        """The last one could not be done."""
        if self.times is not None:
            self.times += 1


class Piece(NamedTuple):
    """Bytes that are passed on together; `kind` is the `t` of a text message, None of anything else."""

    data: bytes
    kind: str | None = None


class Cutter:
    """Cuts one way of a connection: the head of HTTP, then one piece for each WebSocket frame; what is no WebSocket passes as it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._plain = False
        self._framed = False

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Take bytes, give the pieces that are whole now."""
        self._buffer += data
        if not self._framed and not self._plain:
            yield from self._head()
        if self._plain:
            yield from self.rest()
        while self._framed and (length := self._frame_length()) is not None and length <= len(self._buffer):
            raw = bytes(self._buffer[:length])
            del self._buffer[:length]
            yield Piece(raw, _kind(raw) if raw[0] == _TEXT else None)

    def rest(self) -> Iterator[Piece]:
        """What came and is not whole."""
        if self._buffer:
            yield Piece(bytes(self._buffer))
            self._buffer.clear()

    def _head(self) -> Iterator[Piece]:
        end = self._buffer.find(b"\r\n\r\n")
        if end >= 0 and (
            self._buffer.startswith(b"HTTP/1.1 101") or b"\r\nupgrade: websocket\r\n" in self._buffer.lower()
        ):
            self._framed = True
            yield Piece(bytes(self._buffer[: end + 4]))
            del self._buffer[: end + 4]
        elif end >= 0 or len(self._buffer) > HEAD_BYTES_MAX or not self._like_http():
            self._plain = True

    def _like_http(self) -> bool:
        return any(word.startswith(self._buffer[: len(word)]) for word in (b"GET ", b"HTTP/1.1 "))

    def _frame_length(self) -> int | None:
        """Of the frame that begins the buffer; None when that cannot be told yet."""
        layout = _layout(self._buffer)
        return None if layout is None else layout[0] + layout[1]


def _layout(raw: bytes | bytearray) -> tuple[int, int] | None:
    """Lengths of a frame's header and payload; None when the header is not whole."""
    if len(raw) < 2:
        return None
    length, header = raw[1] & 0x7F, 2
    extended = {126: 2, 127: 8}.get(length, 0)
    if len(raw) < header + extended:
        return None
    if extended:
        length = int.from_bytes(raw[2 : 2 + extended], "big")
    return header + extended + (4 if raw[1] & 0x80 else 0), length


def _kind(raw: bytes) -> str:
    """The `t` of a text frame's JSON object; empty for what is none."""
    layout = _layout(raw)
    assert layout is not None, "the frame is whole"
    payload = raw[layout[0] :]
    if raw[1] & 0x80:
        key = raw[layout[0] - 4 : layout[0]]
        stream = (key * (len(payload) // 4 + 1))[: len(payload)]
        payload = (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(len(payload), "big")
    try:
        return str(json.loads(payload)["t"])
    except (ValueError, KeyError, TypeError):
        return ""


class _Valve:
    """What one way of the proxy lets through, and how fast."""

    def __init__(self, seed: str) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.bytes_per_s: int | None = None
        self.changed = asyncio.Event()
        self.chance = random.Random(seed)

    def set(self, *, is_open: bool, bytes_per_s: int | None) -> None:
        (self.open.set if is_open else self.open.clear)()
        self.bytes_per_s = bytes_per_s
        self.changed.set()
        self.changed = asyncio.Event()


@dataclass(eq=False)
class _Pipe:
    """One way of one connection."""

    proxy: "Proxy"
    way: Way
    source: socket.socket
    sink: socket.socket
    _queue: deque[bytes] = field(default_factory=deque)
    _queued_bytes: int = 0
    _held: tuple[Piece, Rule] | None = None
    _ended: bool = False
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def valve(self) -> _Valve:
        return self.proxy.valves[self.way]

    async def read(self) -> None:
        """Until the source's end."""
        loop, cutter = asyncio.get_running_loop(), Cutter()
        while data := await loop.sock_recv(self.source, READ_BYTES):
            for piece in cutter.feed(data):
                self._judge(piece)
            while self._queued_bytes >= QUEUE_BYTES:
                await self._move()
        for piece in cutter.rest():
            self._put(piece.data)
        self._release()
        self._ended = True
        self._stir()

    async def write(self) -> None:
        """Until everything was passed on, and the end of it, too."""
        while True:
            while self._queue:
                data = self._queue.popleft()
                await self._send(data)
                self._queued_bytes -= len(data)
                self._stir()
            if self._ended:
                await self.valve.open.wait()
                self.sink.shutdown(socket.SHUT_WR)
                return
            await self._move()

    async def _send(self, data: bytes) -> None:
        loop, rest = asyncio.get_running_loop(), memoryview(data)
        while rest:
            await self.valve.open.wait()
            pace = self.valve.bytes_per_s
            size = len(rest) if pace is None else min(len(rest), max(1, int(pace * PACE_S)))
            await loop.sock_sendall(self.sink, rest[:size])
            self.proxy.passed_bytes[self.way] += size
            rest = rest[size:]
            if pace is not None:
                changed = self.valve.changed
                with anyio.move_on_after(size / pace):
                    await changed.wait()

    # --- messages -----------------------------------------------------------------------------------------------

    def _judge(self, piece: Piece) -> None:
        if piece.kind is None:
            self._put(piece.data)
            return
        self.proxy.seen[self.way][piece.kind] += 1
        if self._held is not None:
            held, _ = self._held
            self._put(piece.data)
            self._release()
            self.proxy.did[Action.SWAP, str(held.kind)] += 1
            return
        rule = self.proxy.rule_for(piece.kind, self.valve.chance)
        if rule is None:
            self._put(piece.data)
        elif rule.action is Action.SWAP:
            self._held = (piece, rule)
            asyncio.get_running_loop().call_later(HOLD_S, self._alone, piece)
        else:
            self.proxy.did[rule.action, piece.kind] += 1
            for late_s in rule.copies_s:
                self._put_later(piece.data, late_s)

    def _alone(self, piece: Piece) -> None:
        """Nothing followed it: it goes as it came, and another one is swapped instead."""
        if self._held is not None and self._held[0] is piece:
            self._held[1].give_back()
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            (held, _), self._held = self._held, None
            self._put(held.data)

    def _put(self, data: bytes) -> None:
        self._queue.append(data)
        self._queued_bytes += len(data)
        self._stir()

    def _put_later(self, data: bytes, late_s: float) -> None:
        if late_s > 0:
            asyncio.get_running_loop().call_later(late_s, self._put, data)
        else:
            self._put(data)

    def _stir(self) -> None:
        self._moved.set()

    async def _move(self) -> None:
        """Wait until something happened to the queue."""
        self._moved.clear()
        await self._moved.wait()


class _Connection:
    """A runner's socket and the plane's, until both are done."""

    def __init__(self, proxy: "Proxy", runner: socket.socket) -> None:
        self._proxy = proxy
        self._runner = runner
        self._plane = socket.socket()
        self._carrying = anyio.CancelScope()
        self.ending: Ending | None = None
        self.deaf = False
        self.gone = asyncio.Event()

    async def run(self) -> None:
        """Carry bytes until the end, whichever it is."""
        for sock in (self._runner, self._plane):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        try:
            with self._carrying:
                await self._carry()
                self.ending = self.ending or Ending.CLOSED
            if self.ending is Ending.ABANDONED:
                await self._swallow()
        finally:
            for sock in (self._runner, self._plane):
                if self.ending in (Ending.RESET, Ending.BROKEN):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                sock.close()
            self._proxy.endings[self.ending or Ending.DROPPED] += 1
            self.gone.set()

    def end(self, ending: Ending) -> None:
        """Carry no more."""
        self.ending = self.ending or ending
        self._carrying.cancel()

    async def _carry(self) -> None:
        try:
            await asyncio.get_running_loop().sock_connect(self._plane, ("127.0.0.1", self._proxy.upstream_port))
        except OSError:
            self.end(Ending.UNREACHABLE)
            return
        up = _Pipe(self._proxy, Way.UP, self._runner, self._plane)
        down = _Pipe(self._proxy, Way.DOWN, self._plane, self._runner)
        async with anyio.create_task_group() as tasks:
            # A reset travels like an end: away from the peer that did it, and not through a stalled way.
            for step, news in ((up.read, up), (up.write, down), (down.read, down), (down.write, up)):
                tasks.start_soon(self._guarded, step, news)

    async def _guarded(self, step: Callable[[], Awaitable[None]], news: _Pipe) -> None:
        try:
            await step()
        except OSError:
            await news.valve.open.wait()
            self.end(Ending.BROKEN)

    async def _swallow(self) -> None:
        """Nobody is behind the connection any more and nobody says so; what still comes is acknowledged, or not even that."""
        if self.deaf:
            await asyncio.Event().wait()
        async with anyio.create_task_group() as tasks:
            for sock in (self._runner, self._plane):
                tasks.start_soon(_drain, sock)


async def _drain(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    try:
        while await loop.sock_recv(sock, READ_BYTES):
            continue
    except OSError:
        return


class Proxy:
    """Listens on a loopback port and carries what comes to `upstream_port`, as honestly as it was told to."""

    def __init__(self, upstream_port: int, *, seed: int = 0) -> None:
        self.upstream_port: Final = upstream_port
        self.port: Final = free_port()
        self.accepted = 0
        """Connections ever taken."""
        self.endings: Counter[Ending] = Counter()
        """How connections ended that are over."""
        self.seen: dict[Way, Counter[str]] = {way: Counter() for way in Way}
        """Messages that came, by kind, whatever was done to them."""
        self.did: Counter[tuple[Action, str]] = Counter()
        """What was done to messages, by action and kind."""
        self.passed_bytes = dict.fromkeys(Way, 0)
        self.valves: Final = {way: _Valve(f"{seed} {way}") for way in Way}
        self._rules: list[Rule] = []
        self._connections: list[_Connection] = []
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        """Of every connection, for the fault that it may have ended with: not a group, since a fixture leaves in another task."""

    async def __aenter__(self) -> "Proxy":
        self.accept()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.refuse()
        # Every connection that was taken has begun now, so it closes what it holds.
        await asyncio.sleep(0)
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        faults = [fault for fault in ended if isinstance(fault, Exception)]
        if faults:
            raise faults[0]

    @property
    def living(self) -> int:
        """Connections that carry bytes, or would."""
        return sum(connection.ending is None for connection in self._connections)

    # --- connections --------------------------------------------------------------------------------------------

    def accept(self) -> None:
        """Take new connections (again)."""
        if self._listener is not None:
            return
        self._listener = listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        listener.bind(("127.0.0.1", self.port))
        listener.listen()
        listener.setblocking(False)
        asyncio.get_running_loop().add_reader(listener, self._take, listener)

    def refuse(self) -> None:
        """Take no new connection: whoever dials is told so by the kernel. Those that live go on."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    async def drop(self) -> None:
        """Close both ends of every connection."""
        await self._end(Ending.DROPPED)

    async def reset(self) -> None:
        """Reset both ends of every connection: what was under way is lost."""
        await self._end(Ending.RESET)

    def abandon(self, *, deaf: bool = False) -> None:
        """Both peers of every connection are gone and nobody got a word of it: no byte, no end, not even after `heal`.

        What still comes is taken and thrown away, as behind a middlebox; `deaf`: it is not taken, as behind a cut wire.
        """
        for connection in self._connections:
            if connection.ending is None:
                connection.deaf = deaf
                connection.end(Ending.ABANDONED)

    async def _end(self, ending: Ending) -> None:
        connections = [connection for connection in self._connections if connection.ending is None]
        for connection in connections:
            connection.end(ending)
        for connection in connections:
            await connection.gone.wait()

    def _take(self, listener: socket.socket) -> None:
        try:
            runner, _ = listener.accept()
        except OSError:
            # It went away again.
            return
        self.accepted += 1
        connection = _Connection(self, runner)
        self._connections.append(connection)
        self._tasks.append(asyncio.create_task(connection.run()))

    # --- bytes --------------------------------------------------------------------------------------------------

    def stall(self, *ways: Way) -> None:
        """Forward nothing: in these ways, else in both. Connections are taken, nobody is told, nothing is lost."""
        self._set(ways, is_open=False, bytes_per_s=None)

    def flow(self, *ways: Way) -> None:
        """Forward as fast as it comes: in these ways, else in both."""
        self._set(ways, is_open=True, bytes_per_s=None)

    def trickle(self, bytes_per_s: int, *ways: Way) -> None:
        """Forward this much and no more on each connection: in these ways, else in both."""
        self._set(ways, is_open=True, bytes_per_s=bytes_per_s)

    def _set(self, ways: tuple[Way, ...], *, is_open: bool, bytes_per_s: int | None) -> None:
        for way in ways or Way:
            self.valves[way].set(is_open=is_open, bytes_per_s=bytes_per_s)

    # --- messages: each of these kinds and `times`, or as chance has it ----------------------------------------------

    def lose(self, *kinds: str, times: int | None = None, chance: float = 1.0) -> None:
        """Lose them."""
        self._rules.append(Rule(Action.LOSE, frozenset(kinds), times, chance, ()))

    def twice(self, *kinds: str, times: int | None = None, chance: float = 1.0, late_s: float = 0) -> None:
        """Pass them on two times, the second time so much later."""
        self._rules.append(Rule(Action.TWICE, frozenset(kinds), times, chance, (0, late_s)))

    def swap(self, *kinds: str, times: int | None = None, chance: float = 1.0) -> None:
        """Pass them on behind the message that follows, if one does soon."""
        self._rules.append(Rule(Action.SWAP, frozenset(kinds), times, chance, (0,)))

    def delay(self, *kinds: str, late_s: float, times: int | None = None, chance: float = 1.0) -> None:
        """Pass them on so much later; what follows overtakes them."""
        self._rules.append(Rule(Action.LATE, frozenset(kinds), times, chance, (late_s,)))

    def rule_for(self, kind: str, chance: random.Random) -> Rule | None:
        """What is to be done to this message."""
        return next((rule for rule in self._rules if rule.wants(kind, chance)), None)

    # --- all of it ----------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """An honest network again; connections that live go on where they stood."""
        self.flow()
        self._rules.clear()
        self.accept()

    async def until(self, holds: Callable[["Proxy"], bool], what: str, seconds: float) -> None:
        """Wait until something was seen or done here. Raises AssertionError."""
        with anyio.move_on_after(seconds):
            while not holds(self):
                await anyio.sleep(POLL_S)
        assert holds(self), f"{what} did not happen within {seconds:.0f} s: {self}"

    def __str__(self) -> str:
        return f"{self.accepted} taken, {self.living} live, ended {dict(self.endings)}, saw {self.seen}, did {dict(self.did)}"
