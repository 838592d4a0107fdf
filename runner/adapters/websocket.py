"""The one outbound connection: dial, send, receive. No decisions, no retries; foreign exceptions become ours."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import anyio
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.typing import Subprotocol

from protocol.errors import CloseCode, Reason
from protocol.limits import FRAME_BYTES_MAX
from protocol.messages import SUBPROTOCOL
from runner.errors import Broken

OPEN_TIMEOUT_S: Final = 10.0
"""TCP, TLS and the WebSocket handshake together."""
CLOSE_TIMEOUT_S: Final = 2.0
"""A peer that does not take or answer a close is dropped: nothing depends on its answer."""
QUIET_S: Final = 12.0
"""Nothing heard for this long: a sign of life is asked for. Longer than a beat, whose answer is one."""
SIGN_S: Final = 12.0
"""No sign for so long after it was asked for: nobody is there. With QUIET_S less than half a lease, so a lease outlives a dead line."""
QUEUE_FRAMES: Final = (8, 2)
"""Frames received and not yet taken (high, low): beyond it the socket is not read."""
WRITE_BYTES: Final = 0
"""Buffered in the process before a send waits: at most one bulk frame is queued ahead of a heartbeat, be it long or short. The kernel
has NOTSENT_LOWAT_BYTES to send meanwhile, so the line does not wait for us."""
TCP_NOTSENT_LOWAT: Final = 25
"""Of Linux; the standard library has no name for it before Python 3.12."""
NOTSENT_LOWAT_BYTES: Final = 64 * 1024
"""Unsent bytes in the kernel before the socket counts as full; without it, megabytes wait ahead of a keystroke."""


class ConnectionLost(Broken):
    """The connection ended; `code` is the WebSocket close code, or None when it just broke."""

    def __init__(self, code: int | None, detail: str) -> None:
        super().__init__(Reason.GOING_AWAY, detail)
        self.code = code

    @property
    def permanent(self) -> bool:
        """Whether dialing again unchanged is useless for now; it is still tried, at the longest delay."""
        return any(self.code == code and not code.retryable for code in CloseCode)


class PlaneConnection:
    """An open connection: text frames are messages, binary frames are data."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._heard_s = anyio.current_time()
        self._silent = False

    async def send(self, frame: str | bytes) -> None:
        """Send one frame; waits while the buffer is full. Raises ConnectionLost."""
        try:
            await self._connection.send(frame)
        except ConnectionClosed as exc:
            raise self._lost(exc) from exc

    async def receive(self) -> str | bytes:
        """The next frame. Raises ConnectionLost."""
        try:
            frame = await self._connection.recv()
        except ConnectionClosed as exc:
            raise self._lost(exc) from exc
        self._heard_s = anyio.current_time()
        return frame

    async def watch(self) -> None:
        """Break the connection when nothing is heard and nobody answers; ends when it is broken.

        The library could do this with its pings, but it waits for room to send them, without a bound when nothing is taken any more;
        and it wants the pong itself in time, whatever else is heard on a slow line.
        """
        while True:
            quiet_s = anyio.current_time() - self._heard_s
            if quiet_s < QUIET_S:
                await anyio.sleep(QUIET_S - quiet_s)
                continue
            heard_s = self._heard_s
            with anyio.move_on_after(SIGN_S):
                try:
                    await (await self._connection.ping())
                except ConnectionClosed:
                    return
                self._heard_s = anyio.current_time()
            if self._heard_s == heard_s:
                self._silent = True
                self._connection.transport.abort()
                return

    def abort(self) -> None:
        """Break it at once and without a word: whoever was there is not any more."""
        self._connection.transport.abort()

    async def close(self, code: CloseCode = CloseCode.NORMAL, reason: str = "") -> None:
        """Close with a code that says why; within CLOSE_TIMEOUT_S, whatever is still unsent."""
        with anyio.move_on_after(CLOSE_TIMEOUT_S) as patience:
            await self._connection.close(code, reason)
        if patience.cancelled_caught:
            self._connection.transport.abort()

    def _lost(self, exc: ConnectionClosed) -> ConnectionLost:
        return ConnectionLost(None, "the control plane fell silent") if self._silent else _lost(exc)


@asynccontextmanager
async def dial(url: str, proxy: str | None) -> AsyncIterator[PlaneConnection]:
    """Connect to a control plane. `proxy` None means none, whatever the environment says. Raises ConnectionLost."""
    try:
        connection = await connect(
            url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            compression=None,
            max_size=FRAME_BYTES_MAX,
            max_queue=QUEUE_FRAMES,
            write_limit=WRITE_BYTES,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,
            proxy=proxy,
            user_agent_header=None,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ssl.SSLError) as exc:
        raise ConnectionLost(None, f"cannot connect: {_plain(exc)}") from exc
    opened = PlaneConnection(connection)
    try:
        if connection.subprotocol != SUBPROTOCOL:
            raise ConnectionLost(CloseCode.UNSUPPORTED_VERSION, "the other side does not speak this protocol")
        _tune(connection)
        yield opened
    finally:
        await opened.close()


def _tune(connection: ClientConnection) -> None:
    sock = connection.transport.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)


def _lost(exc: ConnectionClosed) -> ConnectionLost:
    code = exc.rcvd.code if exc.rcvd is not None else None
    said = exc.rcvd.reason if exc.rcvd is not None else ""
    text = "".join(char for char in said if char.isascii() and char.isprintable())
    return ConnectionLost(code, text[:100] or "the connection broke")


def _plain(exc: Exception) -> str:
    """What went wrong without the peer's bytes."""
    return exc.strerror or type(exc).__name__ if isinstance(exc, OSError) else type(exc).__name__
