"""The WebSocket endpoint for runners: frames in, frames out, and how a connection ends.

Three tasks a session: one reads, one writes, one keeps reports in order, so that a beat never waits behind a report. A connection
for renewals has one task, and carries beats. Whatever a peer sends, the worst it gets is its own connection closed, with a reason.
"""

import asyncio
import itertools
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Final

import anyio
import structlog
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from starlette.types import Message as AsgiMessage
from starlette.websockets import WebSocket, WebSocketDisconnect

from controlplane.enrolment import open_enrolment
from controlplane.errors import StoreFailed
from controlplane.limits import CLOSE_TIMEOUT_S, RENEWAL_MS_MAX, REPORTS_QUEUED_MAX, SEND_TIMEOUT_S
from controlplane.renewals import Renewals
from controlplane.session import Session
from controlplane.switchboard import Switchboard
from protocol.errors import CloseCode, Reason, RemoteError
from protocol.handshake import PlaneHandshake
from protocol.identity import HelloClaims
from protocol.limits import HANDSHAKE_TIMEOUT_MS
from protocol.messages import (
    SUBPROTOCOL,
    Beat,
    Blocked,
    Bye,
    Enroll,
    Fetch,
    FromRunner,
    Gap,
    Hello,
    InputFed,
    LogClosed,
    LogOpen,
    Message,
    Need,
    Refused,
    Report,
    Taken,
    decode_from_runner,
    encode,
)

_TICK_S: Final = 1.0
_NONCE_BYTES: Final = 32
_log = structlog.get_logger("controlplane.gateway")


_FAREWELL: Final = frozenset({1000, 1001})
"""Codes with which a peer closes on purpose; a connection that breaks has another one."""


class _Gone(Exception):
    """The peer closed the connection, or it broke."""

    def __init__(self, code: int | None = None) -> None:
        self.code = code
        super().__init__(code)


class Gateway:
    """Serves connections of runners."""

    def __init__(
        self,
        switchboard: Switchboard,
        renewals: Renewals,
        clock_ms: Callable[[], int],
        entropy: Callable[[int], bytes],
        fed: Callable[[str, InputFed], None],
        taken: Callable[[str, Taken], None],
    ) -> None:
        self._switchboard = switchboard
        self._renewals = renewals
        self._clock_ms = clock_ms
        self._entropy = entropy
        self._fed = fed
        self._taken = taken
        self._arrivals = itertools.count(1)

    async def serve(self, socket: WebSocket) -> None:
        """One connection, from its first message to its close."""
        if SUBPROTOCOL not in socket.scope.get("subprotocols", []):
            await socket.accept()
            await _close(socket, Reason.UNSUPPORTED_VERSION, CloseCode.UNSUPPORTED_VERSION, "no subprotocol in common")
            return
        await socket.accept(subprotocol=SUBPROTOCOL)
        try:
            met = await self._meet(socket)
            if isinstance(met, Session):
                await self._hold(socket, met)
            elif met is not None:
                await self._renew(socket, met)
        except _Gone:
            return
        except RemoteError as exc:
            code = exc.close or CloseCode.BAD_FRAME
            _log.warning("connection.refused", reason=exc.reason, detail=exc.detail, code=int(code))
            await _close(socket, exc.reason, code, exc.detail)
        except StoreFailed as exc:
            _log.error("store.failed", detail=exc.detail)
            await _close(socket, Reason.INFRA, CloseCode.INTERNAL, "the control plane's disk does not take it")
        except Exception:
            _log.exception("connection.failed")
            await _close(socket, Reason.INFRA, CloseCode.INTERNAL, "")

    async def _meet(self, socket: WebSocket) -> Session | HelloClaims | None:
        """The handshake: a session, claims of a runner that only wants renewals, or None when it was an enrolment."""
        try:
            with anyio.fail_after(HANDSHAKE_TIMEOUT_MS / 1000):
                first = await _receive_text(socket)
                if isinstance(first, Enroll):
                    answer = await self._switchboard.enrol(open_enrolment(first.env))
                    await _send(socket, answer)
                    await _close(socket, Reason.GOING_AWAY, CloseCode.NORMAL, "enrolled", bye=False)
                    return None
                return await self._prove(socket, first)
        except TimeoutError:
            raise RemoteError(Reason.BAD_PROOF, "the handshake took too long", CloseCode.TIMEOUT) from None

    async def _prove(self, socket: WebSocket, first: FromRunner) -> Session | HelloClaims:
        arrived = next(self._arrivals)
        nonce = urlsafe_b64encode(self._entropy(_NONCE_BYTES)).rstrip(b"=").decode()
        handshake = PlaneHandshake(nonce)
        await _send(socket, handshake.challenge(first, self._clock_ms()))
        hello = handshake.hello
        assert isinstance(hello, Hello), "the handshake keeps what it answered"
        proof = await _receive_text(socket)
        claims = handshake.verify(proof, self._switchboard.key_of(hello.org, hello.runner))
        if claims.purpose == "renew":
            return claims
        session = self._switchboard.session(hello.runner, arrived)
        try:
            await _send(socket, await self._switchboard.begin(session, claims))
        except BaseException:
            self._switchboard.leave(session)
            raise
        return session

    async def _renew(self, socket: WebSocket, claims: HelloClaims) -> None:
        """Answer beats with renewals, one after the other, for a bounded time."""
        with self._renewals.line(claims) as welcome, anyio.move_on_after(RENEWAL_MS_MAX / 1000):
            await _send(socket, welcome)
            while True:
                message = await _receive_text(socket)
                if isinstance(message, Bye):
                    break
                if not isinstance(message, Beat):
                    raise RemoteError(Reason.UNEXPECTED_MESSAGE, "this connection is for renewals", CloseCode.BAD_FRAME)
                await _send(socket, self._renewals.answer(claims, message))
        await _close(socket, Reason.GOING_AWAY, CloseCode.NORMAL, "renewed")

    async def _hold(self, socket: WebSocket, session: Session) -> None:
        try:
            with session.scope:
                await self._converse(socket, session)
        except BaseExceptionGroup as group:
            leaves = _leaves(group)
            session.farewell = any(isinstance(cause, _Gone) and cause.code in _FAREWELL for cause in leaves)
            causes = [cause for cause in leaves if not isinstance(cause, _Gone)]
            if causes:
                raise causes[0] from None
            return
        finally:
            self._switchboard.leave(session)
        if session.ending is not None:
            reason, code, detail = session.ending
            await _close(socket, reason, code, detail)

    async def _converse(self, socket: WebSocket, session: Session) -> None:
        sender: MemoryObjectSendStream[Report]
        sender, receiver = anyio.create_memory_object_stream[Report](REPORTS_QUEUED_MAX)
        async with sender, receiver, anyio.create_task_group() as tasks:
            tasks.start_soon(self._write, socket, session)
            tasks.start_soon(self._keep_reports, session, receiver)
            tasks.start_soon(self._tick, session)
            await self._read(socket, session, sender)

    async def _read(self, socket: WebSocket, session: Session, reports: MemoryObjectSendStream[Report]) -> None:
        channels, receive = session.channels, socket.receive
        while True:
            message = await receive()
            data = message.get("bytes")
            if data is not None:
                channels.data(data)
                continue
            text = _text_of(message)
            await self._hear(session, decode_from_runner(text), reports)

    async def _hear(self, session: Session, message: FromRunner, reports: MemoryObjectSendStream[Report]) -> None:
        match message:
            case Report():
                await reports.send(message)
            case Beat():
                await self._switchboard.beat(session, message)
            case Need():
                self._switchboard.need(session, message)
            case Fetch():
                self._switchboard.fetch(session, message)
            case Refused():
                await self._switchboard.refused(session, message)
            case LogOpen():
                session.channels.open(message)
            case Blocked():
                session.channels.blocked(message)
            case Gap():
                session.channels.gap(message)
            case InputFed():
                self._fed(session.runner_id, message)
            case Taken():
                self._taken(session.runner_id, message)
            case LogClosed():
                session.channels.closed(message)
            case Bye():
                session.farewell = True
                session.end(Reason.GOING_AWAY, CloseCode.NORMAL)
            case _:
                raise RemoteError(Reason.UNEXPECTED_MESSAGE, "not inside a session", CloseCode.BAD_FRAME)

    async def _write(self, socket: WebSocket, session: Session) -> None:
        loop = asyncio.get_running_loop()
        while True:
            message = await session.next_said()
            # Not a cancel scope: that costs more than the message, and ending the session ends this wait as well.
            impatience = loop.call_later(
                SEND_TIMEOUT_S, session.end, Reason.SLOW_PEER, CloseCode.SLOW_PEER, "it takes nothing"
            )
            try:
                await _send(socket, message)
            finally:
                impatience.cancel()

    async def _keep_reports(self, session: Session, reports: MemoryObjectReceiveStream[Report]) -> None:
        async for report in reports:
            await self._switchboard.report(session, report)

    async def _tick(self, session: Session) -> None:
        while True:
            await self._switchboard.tick(session)
            await anyio.sleep(_TICK_S)


async def _receive_text(socket: WebSocket) -> FromRunner:
    return decode_from_runner(_text_of(await socket.receive()))


def _text_of(message: AsgiMessage) -> str:
    if message["type"] == "websocket.disconnect":
        raise _Gone(message.get("code"))
    text = message.get("text")
    if not isinstance(text, str):
        raise RemoteError(Reason.UNEXPECTED_MESSAGE, "a binary frame before the session", CloseCode.BAD_FRAME)
    return text


async def _send(socket: WebSocket, message: Message) -> None:
    try:
        await socket.send_text(encode(message))
    except (WebSocketDisconnect, RuntimeError, OSError) as exc:
        raise _Gone from exc


async def _close(socket: WebSocket, reason: Reason, code: CloseCode, detail: str, *, bye: bool = True) -> None:
    """Say why and close, within a bound, also when the task is being cancelled."""
    with anyio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
        try:
            if bye:
                await socket.send_text(encode(Bye(reason=reason, detail=detail[:500])))
            await socket.close(int(code), str(reason))
        except (WebSocketDisconnect, RuntimeError, OSError):
            # It is gone already: there is nobody to tell.
            return


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions of several tasks that ended together, without their groups."""
    return [
        leaf
        for found in group.exceptions
        for leaf in (_leaves(found) if isinstance(found, BaseExceptionGroup) else [found])
    ]
