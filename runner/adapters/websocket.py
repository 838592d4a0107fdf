"""The one outbound connection: dial, send, receive. No decisions, no retries; foreign exceptions become ours."""

import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

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
"""A peer that does not answer a close is dropped: nothing depends on its answer."""
PING_INTERVAL_S: Final = 20.0
PING_TIMEOUT_S: Final = 20.0
"""A half-open connection is noticed within 40 s."""
QUEUE_FRAMES: Final = (8, 2)
"""Frames received and not yet taken (high, low): beyond it the socket is not read."""
WRITE_BYTES: Final = 64 * 1024
"""Buffered in the process before a send waits: at most one bulk frame is queued ahead of a heartbeat."""
TCP_NOTSENT_LOWAT: Final = 25
"""Of Linux; the standard library has no name for it before Python 3.12."""
NOTSENT_LOWAT_BYTES: Final = 128 * 1024
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

    async def send(self, frame: str | bytes) -> None:
        """Send one frame; waits while the buffer is full. Raises ConnectionLost."""
        try:
            await self._connection.send(frame)
        except ConnectionClosed as exc:
            raise _lost(exc) from exc

    async def receive(self) -> str | bytes:
        """The next frame. Raises ConnectionLost."""
        try:
            return await self._connection.recv()
        except ConnectionClosed as exc:
            raise _lost(exc) from exc

    async def close(self, code: CloseCode, reason: str) -> None:
        """Close with a code that says why."""
        await self._connection.close(code, reason)


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
            ping_interval=PING_INTERVAL_S,
            ping_timeout=PING_TIMEOUT_S,
            proxy=proxy,
            user_agent_header=None,
        )
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI, ssl.SSLError) as exc:
        raise ConnectionLost(None, f"cannot connect: {_plain(exc)}") from exc
    try:
        if connection.subprotocol != SUBPROTOCOL:
            raise ConnectionLost(CloseCode.UNSUPPORTED_VERSION, "the other side does not speak this protocol")
        _tune(connection)
        yield PlaneConnection(connection)
    finally:
        await connection.close()


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
