"""What the proxy of the network fault tests does to bytes and messages: were it wrong, every test behind it would lie."""

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from tests.support.proxy import KERNEL_BYTES, QUEUE_BYTES, READ_BYTES, Action, Cutter, Ending, Proxy, Way

WAIT_S = 10.0
"""A bound for anything that is waited for."""
SILENT_S = 0.2
"""How long nothing must come, where nothing may come."""


@dataclass
class Peers:
    """Both ends of a plain connection through a proxy."""

    proxy: Proxy
    runner: socket.socket
    plane: socket.socket
    server: socket.socket

    async def dial(self) -> tuple[socket.socket, socket.socket]:
        """One more connection."""
        return await _pair(self.proxy, self.server)


@asynccontextmanager
async def plain(seed: int = 0) -> AsyncIterator[Peers]:
    """A proxy with one connection that is no WebSocket."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        async with Proxy(server.getsockname()[1], seed=seed) as proxy:
            runner, plane = await _pair(proxy, server)
            with runner, plane:
                yield Peers(proxy, runner, plane, server)


async def _pair(proxy: Proxy, server: socket.socket) -> tuple[socket.socket, socket.socket]:
    loop = asyncio.get_running_loop()
    runner = socket.socket()
    runner.setblocking(False)
    try:
        await loop.sock_connect(runner, ("127.0.0.1", proxy.port))
    except OSError:
        runner.close()
        raise
    async with asyncio.timeout(WAIT_S):
        plane, _ = await loop.sock_accept(server)
    plane.setblocking(False)
    return runner, plane


async def send(sock: socket.socket, data: bytes) -> None:
    """Send all of it."""
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes, fewer at the end. Raises TimeoutError, ConnectionResetError."""
    got = bytearray()
    async with asyncio.timeout(WAIT_S):
        while len(got) < size:
            data = await asyncio.get_running_loop().sock_recv(sock, size - len(got))
            if not data:
                break
            got += data
    return bytes(got)


async def silent(sock: socket.socket) -> bool:
    """Whether neither a byte nor an end comes."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SILENT_S):
            await asyncio.get_running_loop().sock_recv(sock, 1)
            return False
    return True


# --- bytes ------------------------------------------------------------------------------------------------------------


async def test_bytes_pass_unchanged_and_their_end_after_them() -> None:
    """Both ways, more than any buffer holds; then the end of one way, while the other goes on."""
    data = random.Random(1).randbytes(1_000_000)
    async with plain() as peers:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send(peers.runner, data))
            tasks.create_task(send(peers.plane, data[::-1]))
            up = tasks.create_task(receive(peers.plane, len(data)))
            down = tasks.create_task(receive(peers.runner, len(data)))
        assert (up.result(), down.result()) == (data, data[::-1])
        peers.runner.shutdown(socket.SHUT_WR)
        assert await receive(peers.plane, 1) == b""
        await send(peers.plane, b"still here")
        assert await receive(peers.runner, 10) == b"still here"
        peers.plane.shutdown(socket.SHUT_WR)
        assert await receive(peers.runner, 1) == b""
        await peers.proxy.until(lambda proxy: proxy.endings[Ending.CLOSED] == 1, "the end", WAIT_S)
        assert peers.proxy.passed_bytes == {Way.UP: 1_000_000, Way.DOWN: 1_000_010}


async def test_a_stalled_way_forwards_nothing_and_loses_nothing() -> None:
    """Bytes and ends wait until it flows again; the other way goes on; new connections are taken and stalled, too."""
    async with plain() as peers:
        peers.proxy.stall(Way.UP)
        await send(peers.runner, b"one")
        peers.runner.shutdown(socket.SHUT_WR)
        assert await silent(peers.plane)
        await send(peers.plane, b"two")
        assert await receive(peers.runner, 3) == b"two"
        later, behind = await peers.dial()
        with later, behind:
            later.shutdown(socket.SHUT_WR)
            assert await silent(behind)
            peers.proxy.heal()
            assert await receive(behind, 1) == b""
        assert await receive(peers.plane, 4) == b"one"


async def test_a_stalled_way_fills_up() -> None:
    """A sender is stopped by its own kernel once a few buffers are full."""
    async with plain() as peers:
        peers.proxy.stall()
        peers.runner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        taken = 0
        with suppress(TimeoutError):
            while taken < 10_000_000:
                async with asyncio.timeout(SILENT_S):
                    await send(peers.runner, bytes(READ_BYTES))
                taken += READ_BYTES
        assert QUEUE_BYTES <= taken <= QUEUE_BYTES + READ_BYTES + 8 * KERNEL_BYTES
        assert await silent(peers.plane)


async def test_a_reset_does_not_get_through_a_stalled_way() -> None:
    """What one peer did to its own end, the other does not know before the way is open again."""
    async with plain() as peers:
        peers.proxy.stall()
        peers.runner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        peers.runner.close()
        assert await silent(peers.plane)
        peers.proxy.heal()
        with pytest.raises(ConnectionResetError):
            await receive(peers.plane, 1)
        assert peers.proxy.endings == {Ending.BROKEN: 1}


async def test_a_dropped_connection_ends_for_both() -> None:
    """Both see an end; the next connection is an honest one."""
    async with plain() as peers:
        await peers.proxy.drop()
        assert (await receive(peers.runner, 1), await receive(peers.plane, 1)) == (b"", b"")
        assert (peers.proxy.living, peers.proxy.endings) == (0, {Ending.DROPPED: 1})
        runner, plane = await peers.dial()
        with runner, plane:
            await send(runner, b"x")
            assert await receive(plane, 1) == b"x"
        assert peers.proxy.accepted == 2


async def test_a_reset_connection_is_reset_for_both() -> None:
    """Both see a reset, no end."""
    async with plain() as peers:
        await peers.proxy.reset()
        for sock in (peers.runner, peers.plane):
            with pytest.raises(ConnectionResetError):
                await receive(sock, 1)
        assert peers.proxy.endings == {Ending.RESET: 1}


@pytest.mark.parametrize("deaf", [False, True])
async def test_an_abandoned_connection_is_silent_for_ever(deaf: bool) -> None:
    """No byte and no end gets to either peer, not even when the network is healed; the next connection is an honest one."""
    async with plain() as peers:
        peers.proxy.abandon(deaf=deaf)
        await send(peers.runner, b"x")
        peers.proxy.heal()
        assert await silent(peers.plane)
        peers.plane.shutdown(socket.SHUT_WR)
        assert await silent(peers.runner)
        runner, plane = await peers.dial()
        with runner, plane:
            await send(runner, b"y")
            assert await receive(plane, 1) == b"y"
        assert peers.proxy.accepted == 2


@pytest.mark.parametrize(("deaf", "all_of_it"), [(False, True), (True, False)])
async def test_what_comes_on_an_abandoned_connection_is_taken_unless_it_is_deaf(deaf: bool, all_of_it: bool) -> None:
    """Taken, the sender goes on for ever; deaf, its buffers fill."""
    async with plain() as peers:
        peers.proxy.abandon(deaf=deaf)
        sent = True
        try:
            async with asyncio.timeout(5 if all_of_it else SILENT_S):
                await send(peers.runner, bytes(20_000_000))
        except TimeoutError:
            sent = False
        assert sent is all_of_it


async def test_a_refusing_proxy_takes_no_connection_and_keeps_those_it_has() -> None:
    """The kernel says no; what lives goes on; then it takes them again on the same port."""
    async with plain() as peers:
        peers.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await peers.dial()
        await send(peers.runner, b"x")
        assert await receive(peers.plane, 1) == b"x"
        peers.proxy.accept()
        runner, plane = await peers.dial()
        runner.close()
        plane.close()


async def test_a_connection_to_nobody_is_closed() -> None:
    """Without a plane a runner meets an end."""
    async with plain() as peers:
        peers.server.close()
        runner = socket.socket()
        runner.setblocking(False)
        with runner:
            await asyncio.get_running_loop().sock_connect(runner, ("127.0.0.1", peers.proxy.port))
            assert await receive(runner, 1) == b""
        assert peers.proxy.endings == {Ending.UNREACHABLE: 1}


@pytest.mark.parametrize(("bytes_per_s", "size"), [(20, 10), (200_000, 100_000)])
async def test_a_slow_way_keeps_its_pace(bytes_per_s: int, size: int) -> None:
    """Never faster than told, and not much slower; then faster at once."""
    async with plain() as peers:
        peers.proxy.trickle(bytes_per_s, Way.UP)
        begun = time.monotonic()
        sending = asyncio.create_task(send(peers.runner, bytes(size + bytes_per_s * 60)))
        await receive(peers.plane, size)
        assert 0.9 * size / bytes_per_s - 0.06 <= time.monotonic() - begun <= 2 * size / bytes_per_s + 1
        peers.proxy.flow()
        assert len(await receive(peers.plane, bytes_per_s * 60)) == bytes_per_s * 60
        await sending


async def test_one_byte_a_second_is_one_byte_a_second() -> None:
    """The slowest link there is still is one; whoever waits for more is let go when the pace changes."""
    async with plain() as peers:
        peers.proxy.trickle(1)
        await send(peers.runner, b"abc")
        assert await receive(peers.plane, 1) == b"a"
        assert await silent(peers.plane)
        begun = time.monotonic()
        peers.proxy.flow()
        assert await receive(peers.plane, 2) == b"bc"
        assert time.monotonic() - begun < 0.5


# --- messages -----------------------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """Both ends of a WebSocket through a proxy."""

    proxy: Proxy
    runner: ClientConnection
    plane: ServerConnection
    heard: list[str] = field(default_factory=list)

    async def up(self, *names: str) -> None:
        """Messages to the plane: `t` before the colon, a number behind it."""
        for name in names:
            await self.runner.send(_message(name))

    async def at_plane(self, count: int) -> list[str]:
        """The next messages at the plane."""
        async with asyncio.timeout(WAIT_S):
            return [_name(await self.plane.recv()) for _ in range(count)]

    async def at_runner(self, count: int) -> list[str]:
        """The next messages at the runner."""
        async with asyncio.timeout(WAIT_S):
            return [_name(await self.runner.recv()) for _ in range(count)]


def _message(name: str) -> str:
    kind, _, number = name.partition(":")
    return json.dumps({"t": kind, "n": number, "pad": "ü" * 100})


def _name(message: str | bytes) -> str:
    if isinstance(message, bytes):
        return f"{len(message)} bytes"
    read = json.loads(message)
    assert read["pad"] == "ü" * 100
    return f"{read['t']}:{read['n']}"


@asynccontextmanager
async def talk(seed: int = 0) -> AsyncIterator[Talk]:
    """A proxy with one WebSocket."""
    accepted: asyncio.Queue[ServerConnection] = asyncio.Queue()

    async def hold(plane: ServerConnection) -> None:
        accepted.put_nowait(plane)
        await plane.wait_closed()

    async with (
        serve(hold, "127.0.0.1", 0, compression=None) as server,
        Proxy(next(iter(server.sockets)).getsockname()[1], seed=seed) as proxy,
        connect(f"ws://127.0.0.1:{proxy.port}/v1/runner", compression=None, proxy=None) as runner,
    ):
        yield Talk(proxy, runner, await accepted.get())


async def test_messages_are_seen_and_everything_passes() -> None:
    """Texts of every length of header, data, pings, and the close with its code; texts are counted by kind, both ways."""
    async with talk() as both:
        for size in (1, 125, 126, 65535, 65536, 1_000_000):
            await both.runner.send(bytes(size))
            await both.plane.send(bytes(size))
            assert await both.at_plane(1) == await both.at_runner(1) == [f"{size} bytes"]
        await both.up("report:1", "beat:1", "report:2")
        await both.plane.send(_message("beaten:1"))
        await both.plane.send("no json")
        assert await both.at_plane(3) == ["report:1", "beat:1", "report:2"]
        assert await both.at_runner(1) == ["beaten:1"]
        await both.runner.send(json.dumps({"t": "report", "pad": "x" * 100_000}))
        assert len(await both.plane.recv()) > 100_000
        await (await both.runner.ping())
        assert both.proxy.seen == {Way.UP: {"report": 3, "beat": 1}, Way.DOWN: {"beaten": 1, "": 1}}
        assert both.proxy.did == {}
        await both.runner.close(4010, "why not")
        await both.plane.wait_closed()
        assert (both.plane.close_code, both.plane.close_reason) == (4010, "why not")
        await both.proxy.until(lambda proxy: proxy.endings[Ending.CLOSED] == 1, "the end", WAIT_S)


async def test_a_message_is_lost() -> None:
    """As often as told, and no other one."""
    async with talk() as both:
        both.proxy.lose("report", times=2)
        await both.up("report:1", "beat:1", "report:2", "report:3")
        assert await both.at_plane(2) == ["beat:1", "report:3"]
        assert both.proxy.did == {(Action.LOSE, "report"): 2}


async def test_a_message_comes_twice() -> None:
    """At once, or much later; on the way down, too."""
    async with talk() as both:
        both.proxy.twice("report", times=1)
        both.proxy.twice("report", times=1, late_s=0.3)
        await both.up("report:1", "report:2", "report:3")
        assert await both.at_plane(5) == ["report:1", "report:1", "report:2", "report:3", "report:2"]
        both.proxy.twice("command")
        await both.plane.send(_message("command:1"))
        assert await both.at_runner(2) == ["command:1", "command:1"]
        assert both.proxy.did == {(Action.TWICE, "report"): 2, (Action.TWICE, "command"): 1}


async def test_two_adjacent_messages_are_swapped() -> None:
    """The one behind goes first, whatever it is, but for data, which is no message; then order rules again."""
    async with talk() as both:
        both.proxy.swap("report", times=1)
        await both.up("report:1")
        await both.runner.send(bytes(10))
        await both.up("beat:1", "report:2", "report:3")
        assert await both.at_plane(5) == ["10 bytes", "beat:1", "report:1", "report:2", "report:3"]
        assert both.proxy.did == {(Action.SWAP, "report"): 1}


async def test_a_message_that_nothing_follows_is_not_held_back() -> None:
    """It comes a little later, and the swap is still owed."""
    async with talk() as both:
        both.proxy.swap("report", times=1)
        await both.up("report:1")
        assert await both.at_plane(1) == ["report:1"]
        assert both.proxy.did == {}
        await both.up("report:2", "beat:1")
        assert await both.at_plane(2) == ["beat:1", "report:2"]
        assert both.proxy.did == {(Action.SWAP, "report"): 1}


async def test_a_message_comes_late() -> None:
    """Everything behind it overtakes it."""
    async with talk() as both:
        both.proxy.delay("report", late_s=0.3, times=1)
        await both.up("report:1", "report:2", "beat:1")
        assert await both.at_plane(3) == ["report:2", "beat:1", "report:1"]
        assert both.proxy.did == {(Action.LATE, "report"): 1}


async def test_chance_comes_from_the_seed() -> None:
    """The same seed loses the same messages, another one others; rules end when the network is healed."""

    async def kept(seed: int) -> list[str]:
        async with talk(seed) as both:
            both.proxy.lose("report", chance=0.5)
            await both.up(*(f"report:{n}" for n in range(40)), "beat:1")
            got = await both.at_plane(1)
            while got[-1] != "beat:1":
                got += await both.at_plane(1)
            both.proxy.heal()
            await both.up("report:40")
            assert await both.at_plane(1) == ["report:40"]
            return got

    first = await kept(1)
    assert 5 < len(first) < 35
    assert first == await kept(1) != await kept(2)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_frames_are_cut_however_they_come(step: int) -> None:
    """Byte by byte or all at once: the same pieces; together they are what came."""
    head = b"GET /x HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n"
    text = b'{"t":"beat"}'
    masked = bytes([0x81, 0x80 | len(text)]) + b"abcd" + bytes(c ^ b"abcd"[n % 4] for n, c in enumerate(text))
    long = bytes([0x81, 126, 0x01, 0x00]) + b'{"t":"report"}'.ljust(256)
    frames = [head, masked, b"\x82\x03abc", b"\x89\x00", long, b"\x01\x01x", b"\x80\x01y"]
    stream = b"".join(frames)
    cutter = Cutter()
    pieces = [piece for at in range(0, len(stream), step) for piece in cutter.feed(stream[at : at + step])]
    assert [piece.data for piece in pieces] == frames
    assert [piece.kind for piece in pieces] == [None, "beat", None, None, "report", None, None]


@pytest.mark.parametrize(
    "stream", [b"GETTING", b"\x00\x01", b"GET / HTTP/1.1\r\n\r\nbody", b"HTTP/1.1 403 No\r\n\r\nx"]
)
def test_what_is_no_websocket_passes_as_it_comes(stream: bytes) -> None:
    """Other protocols, and answers that refuse the upgrade."""
    cutter = Cutter()
    pieces = [piece for at in range(len(stream)) for piece in cutter.feed(stream[at : at + 1])]
    assert b"".join(piece.data for piece in pieces) == stream
    assert {piece.kind for piece in pieces} == {None}
