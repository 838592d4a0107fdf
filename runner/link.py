"""The session with the control plane: dial, prove, then move messages between the connection, the engine and the logs.

One task reads, one task writes, one looks whether anybody is still there. The writer's order is fixed: what was said, reports, and
only then data, so a heartbeat is never behind more than one data frame.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import anyio

from protocol.errors import CloseCode, Reason, RemoteError
from protocol.handshake import Established, RunnerHandshake, Standing
from protocol.keys import b64url
from protocol.limits import BEAT_LEASES_MAX, HANDSHAKE_TIMEOUT_MS, RETRY_MS
from protocol.messages import (
    Ack,
    Beaten,
    Bye,
    CommandFrame,
    Credit,
    Fetch,
    FromPlane,
    Input,
    InputFed,
    Message,
    Need,
    Refused,
    Reported,
    ReportItem,
    Resized,
    Resume,
    Taken,
    Typed,
    Viewers,
    Watch,
    decode_from_plane,
    encode,
)
from protocol.session import ItemsAnswered, RunnerSession
from runner import failpoints
from runner.adapters.inlet import Inlet
from runner.adapters.typist import Typist
from runner.adapters.uplink import Uplink
from runner.adapters.websocket import ConnectionLost, PlaneConnection, dial
from runner.core.backoff import CAP_MS, Backoff
from runner.core.effects import SendBeat
from runner.core.inputs import EnvelopeReceived, SessionDown, SessionUp
from runner.ports import Clock, Journal
from runner.pump import Pump
from runner.wakeup import Wakeup

SAID_MAX: Final = 1024
"""Unsent `need` and `refused` messages: a flood of refused envelopes must not fill memory; the oldest go first."""
FRAMES_IN_A_ROW: Final = 16
"""Data frames before the clock is looked at: what went unanswered is late by a megabyte of output at most."""
RETRY_LOOK_S: Final = RETRY_MS / 5000
"""Between two looks for what had no answer for RETRY_MS: every wake begins the wait anew, so a whole RETRY_MS would double it."""
NONCE_BYTES: Final = 32
TWO_MACHINES: Final = "another machine uses this identity; on one of the two run: runner enroll --replace"
_JITTER_BYTES: Final = 4


class LinkStatus:
    """What `runner status` tells of the session."""

    def __init__(self, url: str) -> None:
        self.url: Final = url
        self.up = False
        self.since_ms: int | None = None
        self.reason = "not connected yet"


class Link:
    """Keeps a session with the plane as long as `run` runs."""

    def __init__(
        self,
        *,
        url: str,
        proxy: str | None,
        standing: Callable[[], Standing],
        journal: Journal,
        clock: Clock,
        uplink: Uplink,
        inlet: Inlet,
        typist: Typist,
        note: Callable[[str, dict[str, str | int | None]], None],
    ) -> None:
        self.status: Final = LinkStatus(url)
        self._proxy = proxy
        self._standing = standing
        self._journal = journal
        self._clock = clock
        self._uplink = uplink
        self._inlet = inlet
        self._typist = typist
        self._note = note
        self._session: RunnerSession | None = None
        self._said: deque[Message] = deque(maxlen=SAID_MAX)
        self._wake = Wakeup()
        self._caught_up = False
        self._behind = False
        self._again: list[int] = []
        self._backoff = Backoff()
        self._hurry = Wakeup()
        self._dialling: anyio.CancelScope | None = None
        self._connection: PlaneConnection | None = None
        self._dials = 0
        self._in_conflict = False

    @property
    def unanswered(self) -> bool:
        """Whether the control plane still owes answers, or has not been given everything."""
        return self._session is None or self._session.waiting or not self._caught_up

    # --- from the hands -----------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to send."""
        self._wake.set()

    def redial(self) -> None:
        """What is connected is dead or unsure: drop it without waiting for anybody, and dial at once."""
        self._backoff.reset()
        self._hurry.set()
        if self._dialling is not None:
            self._dialling.cancel()
        if self._connection is not None:
            self._connection.abort()

    def say(self, message: Need | Refused | Fetch | InputFed | Taken) -> None:
        """Send it if there is a session; nobody resends it."""
        if self._session is not None:
            self._said.append(message)
            self.wake()

    def beat(self, beat: SendBeat) -> None:
        """Send a heartbeat if there is a session."""
        if self._session is not None:
            now_ms = self._clock.now().boot_ms
            names = [attempt.name for attempt in beat.attempts[:BEAT_LEASES_MAX]]
            whole = max(len(beat.leases), len(beat.attempts), len(beat.lost)) <= BEAT_LEASES_MAX
            said = self._session.beat(
                now_ms,
                beat.hw,
                beat.leases[:BEAT_LEASES_MAX],
                names,
                lost=beat.lost[:BEAT_LEASES_MAX],
                full=beat.full and whole,
                admission=beat.admission,
            )
            self._said.append(said)
            self.wake()

    def offer(self, items: Sequence[ReportItem]) -> None:
        """New durable items. Beyond the session's room they wait in the journal."""
        session = self._session
        if session is None:
            return
        if self._caught_up and session.room >= len(items):
            session.feed(items)
        else:
            self._caught_up = False
            self._behind = True
        self.wake()

    def report_again(self, out_seqs: Sequence[int]) -> None:
        """Report stored items once more."""
        if self._session is not None:
            self._again.extend(out_seqs)
            self.wake()

    # --- the session --------------------------------------------------------------------------------------------

    async def run(self, pump: Pump) -> None:
        """Dial, serve a session, and again; never returns."""
        while True:
            permanent = False
            self._hurry.clear()
            try:
                await self._dial(pump)
            except ConnectionLost as exc:
                permanent = exc.permanent
                self._down(exc.detail, conflict=exc.code == CloseCode.IDENTITY_CONFLICT)
            except RemoteError as exc:
                permanent = exc.reason is Reason.IDENTITY_CONFLICT
                self._down(str(exc), conflict=permanent)
            jitter = int.from_bytes(self._clock.entropy(_JITTER_BYTES), "big") / 2 ** (8 * _JITTER_BYTES)
            # A plane that says "not you" may be mended by its operator: keep asking, as seldom as we ask anybody.
            await self._hurry.wait((CAP_MS if permanent else self._backoff.next_ms(jitter)) / 1000)

    async def _dial(self, pump: Pump) -> None:
        """One connection, from the first packet to the last."""
        with anyio.CancelScope() as dialling:
            self._dialling = dialling
            try:
                async with dial(self.status.url, self._proxy) as connection:
                    self._dialling, self._connection = None, connection
                    established = await self._handshake(connection)
                    self._backoff.reset()
                    await self._serve(connection, established, pump)
            finally:
                self._dialling = self._connection = None

    async def _handshake(self, connection: PlaneConnection) -> Established:
        # Of two handshakes the plane knows by this which is the later, and that nobody else uses our count.
        self._dials += 1
        standing = replace(self._standing(), dial=self._dials)
        handshake = RunnerHandshake(standing, b64url(self._clock.entropy(NONCE_BYTES)))
        try:
            with anyio.fail_after(HANDSHAKE_TIMEOUT_MS / 1000):
                await connection.send(encode(handshake.start()))
                while True:
                    message = _decoded(await connection.receive())
                    if isinstance(message, Bye):
                        raise RemoteError(message.reason, message.detail)
                    answer = handshake.receive(message)
                    if isinstance(answer, Established):
                        return answer
                    await connection.send(encode(answer))
        except TimeoutError as exc:
            raise ConnectionLost(CloseCode.TIMEOUT, "the control plane does not answer") from exc
        except RemoteError as exc:
            await connection.close(exc.close or CloseCode.BAD_FRAME, str(exc.reason))
            raise

    async def _serve(self, connection: PlaneConnection, established: Established, pump: Pump) -> None:
        above = established.report_above(await self._journal.oldest_unanswered())
        self._session = RunnerSession(out_hw=above, beat_ms=established.beat_ms)
        self._caught_up = False
        self._behind = True
        self._said.clear()
        self._again.clear()
        self._up(established)
        pump.put(SessionUp(established))
        self._uplink.connected()
        failure: Exception | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._write, connection)
                tasks.start_soon(connection.watch)
                try:
                    await self._read(connection, pump)
                except (ConnectionLost, RemoteError) as exc:
                    failure = exc
                    if isinstance(exc, RemoteError):
                        await connection.close(exc.close or CloseCode.BAD_FRAME, str(exc.reason))
                tasks.cancel_scope.cancel()
        finally:
            self._session = None
            self._uplink.disconnected()
            self._inlet.disconnected()
            self._typist.disconnected()
            pump.put(SessionDown())
        if failure is not None:
            raise failure

    async def _read(self, connection: PlaneConnection, pump: Pump) -> None:
        while True:
            message = _decoded(await connection.receive())
            await pump.room()
            self._take(message, pump)

    def _take(self, message: FromPlane, pump: Pump) -> None:
        assert self._session is not None, "reading goes on only within a session"
        match message:
            case CommandFrame():
                failpoints.hit("command.received")
                pump.put(EnvelopeReceived(message.env.encode("utf-8")))
            case Reported() | Beaten():
                answered = self._session.receive(message)
                if isinstance(answered, ItemsAnswered):
                    failpoints.hit("report.answered")
                if answered is not None:
                    pump.put(answered)
                self.wake()
            case Resume() | Ack() | Credit() | Watch():
                self._uplink.heard(message)
            case Input():
                self._inlet.take(message)
            case Typed() | Resized() | Viewers():
                self._typist.take(message)
            case Bye():
                conflict = message.reason is Reason.IDENTITY_CONFLICT
                code = CloseCode.IDENTITY_CONFLICT if conflict else CloseCode.GOING_AWAY
                raise ConnectionLost(code, f"the control plane says {message.reason}")
            case _:
                raise RemoteError(Reason.UNEXPECTED_MESSAGE, "not in a session", CloseCode.BAD_FRAME)

    async def _write(self, connection: PlaneConnection) -> None:
        """The only writer of the connection. A broken one is noticed by the reader, too."""
        try:
            while True:
                await self._refill()
                if not await self._send_some(connection):
                    # A silence sends again what nobody answered.
                    await self._wake.wait(RETRY_LOOK_S if self._waiting else None)
        except ConnectionLost:
            return

    @property
    def _waiting(self) -> bool:
        return self._session is not None and self._session.waiting

    async def _send_some(self, connection: PlaneConnection) -> bool:
        """Send what is due; False when there was nothing. Control first, then data until there is something to say."""
        self._wake.clear()
        session = self._session
        assert session is not None, "writing goes on only within a session"
        sent = False
        for message in self._due(session):
            await connection.send(encode(message))
            sent = True
        for _ in range(FRAMES_IN_A_ROW):
            frame = self._uplink.next_frame()
            if frame is None:
                return sent
            began_s = anyio.current_time()
            await connection.send(frame)
            self._uplink.paced(len(frame), anyio.current_time() - began_s)
            sent = True
            if self._wake.due:
                break
        return sent

    def _due(self, session: RunnerSession) -> list[Message]:
        said = list(self._said)
        self._said.clear()
        reports = session.outgoing(self._clock.now().boot_ms)
        if reports:
            failpoints.hit("report.sent")
        return [*said, *reports, *self._uplink.messages()]

    async def _refill(self) -> None:
        """Feed the session from the journal until it knows every item there is, as its room allows."""
        session = self._session
        assert session is not None, "writing goes on only within a session"
        if self._again:
            numbers, self._again = tuple(self._again), []
            session.again(await self._journal.items(numbers))
        while not self._caught_up and session.room > 0:
            self._behind = False
            items = await self._journal.outbox(session.cursor, session.room)
            session.feed(items)
            # An item that became durable while we were asking is behind the answer: ask once more.
            self._caught_up = not items and not self._behind

    def _up(self, established: Established) -> None:
        self.status.up = True
        self.status.since_ms = self._clock.now().wall_ms
        self.status.reason = ""
        self._in_conflict = False
        self._note("session.established", {"session": established.session, "out_hw": established.out_hw})

    def _down(self, reason: str, *, conflict: bool) -> None:
        if conflict:
            reason = f"{reason}: {TWO_MACHINES}"
        if self.status.up or self.status.reason != reason:
            self._note("session.lost", {"reason": reason})
            self.status.since_ms = self._clock.now().wall_ms
        if conflict and not self._in_conflict:
            self._in_conflict = True
            self._note("alarm.raised", {"reason": Reason.IDENTITY_CONFLICT, "detail": reason})
        self.status.up = False
        self.status.reason = reason


def _decoded(frame: str | bytes) -> FromPlane:
    if isinstance(frame, bytes):
        raise RemoteError(Reason.BAD_FRAME, "a control plane sends no data", CloseCode.BAD_FRAME)
    return decode_from_plane(frame)
