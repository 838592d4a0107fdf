"""The WebSocket endpoint for viewers of PTYs: a ticket instead of the token, then frames in and frames out (docs/terminals.md §7).

Rule 1: a page of another origin is refused whatever it has; a command line sends no origin. Rule 2: a ticket opens one connection, once.
Rule 3: each viewer has one task that writes, bounded by what its socket takes: nobody else waits for it.
"""

import asyncio
import ipaddress
from collections.abc import Callable
from contextlib import aclosing
from typing import Final
from urllib.parse import parse_qs

import anyio
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from controlplane.errors import Fault, RequestRefused
from controlplane.limits import CLOSE_TIMEOUT_S, PTY_BEGIN_S, SEND_TIMEOUT_S
from controlplane.ptyhub import Hub, Viewer
from controlplane.ptymessages import (
    PTY_SUBPROTOCOL,
    REFUSED_CODE,
    Begin,
    FromViewer,
    SaidResized,
    SaidSeen,
    SaidTyped,
    decode_from_viewer,
    to_viewer,
)
from controlplane.rows import ExecutionRow
from controlplane.tickets import Ticket, Tickets
from protocol.errors import CloseCode, Reason, RemoteError

_TICKET_CHARS_MAX: Final = 100
_log = structlog.get_logger("controlplane.ptys")


class _Gone(Exception):
    """The viewer closed the connection, or it broke."""


class _Refused(Exception):
    """It is told why, and the connection ends."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(reason)


class PtySocket:
    """Serves connections of viewers. `find` gives the row of the attempt that a ticket names."""

    def __init__(
        self, hub: Hub, tickets: Tickets, find: Callable[[Ticket], ExecutionRow], address: Callable[[], tuple[str, int]]
    ) -> None:
        self._hub = hub
        self._tickets = tickets
        self._find = find
        self._address = address
        self.origins: frozenset[str] = frozenset()
        """Origins of pages that may connect, beside our own."""

    async def serve(self, socket: WebSocket) -> None:
        """One connection, from its ticket to its close."""
        offered = PTY_SUBPROTOCOL in socket.scope.get("subprotocols", [])
        await socket.accept(subprotocol=PTY_SUBPROTOCOL if offered else None)
        viewer: Viewer | None = None
        try:
            viewer = self._let_in(socket, offered=offered)
            await self._converse(socket, viewer)
            if viewer.replaced:
                raise _Refused(Reason.SESSION_REPLACED, "a later connection of this viewer is there")
            await _close(socket, int(CloseCode.NORMAL), "ended")
        except _Gone:
            return
        except (_Refused, RemoteError, RequestRefused) as exc:
            await _close(socket, REFUSED_CODE, str(exc.reason), str(exc.reason), exc.detail)
        except Exception:
            _log.exception("viewer.failed")
            await _close(socket, int(CloseCode.INTERNAL), "", Fault.INTERNAL, "a defect of the control plane")
        finally:
            if viewer is not None:
                self._hub.leave(viewer)

    def _let_in(self, socket: WebSocket, *, offered: bool) -> Viewer:
        origins = socket.headers.getlist("origin")
        if len(origins) > 1 or not all(map(self._admits, origins)):
            raise _Refused(Fault.FOREIGN_ORIGIN, "a page of this origin may not connect")
        if not offered:
            raise _Refused(Reason.UNSUPPORTED_VERSION, f"the subprotocol is {PTY_SUBPROTOCOL}")
        given = parse_qs(socket.url.query, max_num_fields=8).get("ticket", [""])[0]
        ticket = self._tickets.redeem(given) if len(given) <= _TICKET_CHARS_MAX else None
        if ticket is None or ticket.attempt.execution_id != socket.path_params["pty"]:
            raise _Refused(Fault.BAD_TICKET, "the ticket was used, is too old, or is for something else")
        return self._hub.join(self._find(ticket), ticket.viewer, ticket.mode)

    def _admits(self, origin: str) -> bool:
        return origin in self.origins or origin in own_origins(*self._address())

    async def _converse(self, socket: WebSocket, viewer: Viewer) -> None:
        """Until the PTY ends, the viewer goes, or another connection takes its place."""
        try:
            with anyio.fail_after(PTY_BEGIN_S):
                begin = await _receive(socket)
        except TimeoutError:
            raise _Refused(Reason.UNEXPECTED_MESSAGE, "it did not begin") from None
        if not isinstance(begin, Begin):
            raise _Refused(Reason.UNEXPECTED_MESSAGE, "the first word is begin")
        failed: Exception | None = _Gone()
        async with anyio.create_task_group() as tasks:

            async def read() -> None:
                nonlocal failed
                try:
                    while True:
                        _hear(viewer, await _receive(socket))
                except (_Gone, _Refused, RemoteError) as exc:
                    failed = exc
                    tasks.cancel_scope.cancel()

            tasks.start_soon(read)
            try:
                await _write(socket, viewer, begin, tasks.cancel_scope.cancel)
                failed = None
            except _Gone as exc:
                failed = exc
            tasks.cancel_scope.cancel()
        if failed is not None:
            raise failed


def own_origins(host: str, port: int) -> frozenset[str]:
    """The origins of what is served at this address: of a loopback one under each of its names."""
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    hosts = {host, "localhost", "127.0.0.1", "[::1]"} if loopback else {host}
    # A browser leaves the port out of an origin where it is that of the scheme.
    return frozenset(f"http://{each}" if port == 80 else f"http://{each}:{port}" for each in hosts)


def _hear(viewer: Viewer, said: FromViewer) -> None:
    match said:
        case SaidTyped():
            viewer.typed(said)
        case SaidResized():
            viewer.resize(said)
        case SaidSeen():
            viewer.shown(said.offset)
        case _:
            raise _Refused(Reason.UNEXPECTED_MESSAGE, "it has begun already")


async def _write(socket: WebSocket, viewer: Viewer, begin: Begin, give_up: Callable[[], None]) -> None:
    """Send what the viewer gets; `give_up` is called when its socket takes nothing for long."""
    loop = asyncio.get_running_loop()
    try:
        async with aclosing(viewer.frames(begin)) as frames:
            async for frame in frames:
                # Not a cancel scope, which costs more than the frame.
                impatience = loop.call_later(SEND_TIMEOUT_S, give_up)
                try:
                    await (socket.send_text(frame) if isinstance(frame, str) else socket.send_bytes(frame))
                finally:
                    impatience.cancel()
    except (WebSocketDisconnect, RuntimeError) as exc:
        raise _Gone from exc


async def _receive(socket: WebSocket) -> FromViewer:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise _Gone
    text = message.get("text")
    if not isinstance(text, str):
        raise _Refused(Reason.BAD_FRAME, "viewers send text")
    return decode_from_viewer(text)


async def _close(socket: WebSocket, code: int, word: str, reason: str = "", detail: str = "") -> None:
    """Say why, if it is refused, and close, within a bound, also when the task is being cancelled."""
    with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
        try:
            if reason:
                await socket.send_text(to_viewer("refused", reason=str(reason), detail=detail))
            await socket.close(code, word)
        except (WebSocketDisconnect, RuntimeError, OSError):
            # It is gone already: there is nobody to tell.
            return
