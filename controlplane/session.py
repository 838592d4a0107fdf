"""One runner's session on the control plane's side, without a transport: what to say, what to send again, when to end.

The gateway carries what is said here over a WebSocket; another transport could carry it as well.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from controlplane.channels import Channels
from controlplane.hearing import Begun
from controlplane.limits import (
    FETCH_AGAIN_MS,
    FETCHED_MAX,
    FIRST_BEAT_MS,
    OUTBOX_PATIENCE_MS,
    SAFETY_AT_ONCE_MAX,
    SAID_MESSAGES_MAX,
)
from controlplane.logstore import LogStore
from controlplane.rows import CommandRow
from controlplane.store import Permit
from protocol.envelope import PayloadType, seal
from protocol.errors import CloseCode, Reason
from protocol.identity import HelloClaims
from protocol.keys import PrivateKey
from protocol.messages import CommandFrame, FromPlane, Need
from protocol.session import PlaneSession, SentCommand

CLOSED: Final = frozenset({"paused", "draining"})
"""Words of a beat's `admission` under which new work waits here."""


class Session:
    """A runner that has proved who it is. `clock_ms` is monotonic."""

    def __init__(
        self,
        session_id: str,
        runner_id: str,
        arrived: int,
        *,
        logs: LogStore,
        owner: Callable[[str], str | None],
        key: PrivateKey,
        clock_ms: Callable[[], int],
    ) -> None:
        self.id: Final = session_id
        self.runner_id: Final = runner_id
        self.channels: Final = Channels(runner_id, logs, owner, self.say)
        self.inc = 0
        self.keyset_version = 0
        self.scope: Final = anyio.CancelScope()
        """Cancelled when the session is to end; `ending` says why."""
        self.ending: tuple[Reason, CloseCode, str] | None = None
        self.dispatching = False
        self.arrived: Final = arrived
        """When its connection came, among all connections."""
        self.instance = ""
        self.dial = 0
        self.admission = ""
        """Whether its runner takes new work, as it told last; empty before the first beat."""
        self.unknown: dict[str, str] = {}
        """Attempts that live there and not here, as the last full beat named them, each with why."""
        self.told: set[str] = set()
        """Those that are in the events already."""
        self.missing: dict[str, int] = {}
        """Since when the full beats leave out an attempt that we count as living there."""
        self.farewell = False
        """Whether the runner itself ended it, and with a word."""
        self._fetched: dict[str, int] = {}
        self._reserved = 0
        self._machine = PlaneSession(0)
        self._key = key
        self._clock_ms = clock_ms
        self._said: deque[FromPlane] = deque()
        self._spoke = anyio.Event()
        self._out_head = 0
        self._began_ms = self._waits_since_ms = 0
        self._outbox_in = False

    # --- beginning and ending -----------------------------------------------------------------------------------

    def begin(self, begun: Begun, out_head: int) -> None:
        """Go on from what was agreed: commands wait until the runner's items up to `out_head` are stored."""
        self.inc = begun.runner.inc
        self.instance = begun.runner.instance
        self.dial = begun.runner.dial
        self.keyset_version = begun.runner.keyset_version
        self._machine = PlaneSession(begun.meeting.told.hw)
        self._out_head = out_head
        self._outbox_in = begun.meeting.out_hw >= out_head
        self._began_ms = self._waits_since_ms = self._clock_ms()
        self.queue(begun.again)

    def overtook(self, other: "Session", claims: HelloClaims) -> bool:
        """Whether `other` is an earlier connection of this very daemon, whose proof was late."""
        same = claims.instance == self.instance != ""
        return same and other.arrived < self.arrived and claims.dial < self.dial

    def end(self, reason: Reason, code: CloseCode, detail: str = "") -> None:
        """Say goodbye and close; the first reason counts."""
        if self.ending is None:
            self.ending = (reason, code, detail)
            self.scope.cancel()

    # --- speaking -----------------------------------------------------------------------------------------------

    def say(self, message: FromPlane) -> None:
        """Queue a message for the runner; one that does not listen is let go."""
        if len(self._said) >= SAID_MESSAGES_MAX:
            self.end(Reason.SLOW_PEER, CloseCode.SLOW_PEER, "too much is waiting to be sent")
            return
        self._said.append(message)
        self._spoke.set()

    async def next_said(self) -> FromPlane:
        """The next message to carry."""
        while not self._said:
            self._spoke = anyio.Event()
            await self._spoke.wait()
        return self._said.popleft()

    # --- commands -----------------------------------------------------------------------------------------------

    def permit(self, *, one: bool) -> Permit | None:
        """What may be numbered now, reserved until `repay`; None when it is ending."""
        if self.ending is not None:
            return None
        room = max(self._machine.room - self._reserved, 0) if self._outbox_in else 0
        safety_room = SAFETY_AT_ONCE_MAX
        if one:
            room, safety_room = min(room, 1), 1
        self._reserved += room
        return Permit(session=self.id, room=room, safety_room=safety_room, beginning=self._takes_work())

    def _takes_work(self) -> bool:
        """Whether new work may be sent: one that tells who it is tells that, too, with its first beat."""
        if self.admission:
            return self.admission not in CLOSED
        return not self.instance or self._clock_ms() - self._began_ms >= FIRST_BEAT_MS

    def repay(self, permit: Permit) -> None:
        """The transaction of `permit` is over."""
        self._reserved -= permit.room

    def queue(self, commands: Sequence[CommandRow]) -> None:
        """Sign and send commands of this incarnation.

        The signature is a function of the stored payload and the key, so it is not stored: after a key change the same payload is
        signed again.
        """
        for command in commands:
            if command.inc == self.inc:
                self._machine.queue(SentCommand(command.digest, command.seq, self._seal(command)))
        self.pump()

    def pump(self) -> None:
        """Send what is due, also again after a silence."""
        for frame in self._machine.outgoing(self._clock_ms()):
            self.say(frame)

    def fetch(self, commands: Sequence[CommandRow]) -> None:
        """Send again what the runner asked for by name: a stop at once, the stream from where the runner is."""
        now_ms = self._clock_ms()
        for command in commands:
            if command.seq is None and now_ms - self._fetched.get(command.cmd_id, -FETCH_AGAIN_MS) >= FETCH_AGAIN_MS:
                self._fetched[command.cmd_id] = now_ms
                self.say(CommandFrame(env=self._seal(command)))
        while len(self._fetched) > FETCHED_MAX:
            del self._fetched[next(iter(self._fetched))]
        if any(command.seq is not None and command.seq > self._machine.acked_hw for command in commands):
            self._machine.receive(Need(seq=self._machine.acked_hw + 1))
            self.pump()

    def _seal(self, command: CommandRow) -> str:
        return seal(command.payload, PayloadType.COMMAND, [self._key]).decode()

    @property
    def machine(self) -> PlaneSession:
        """What was sent and not consumed."""
        return self._machine

    # --- the runner's outbox ------------------------------------------------------------------------------------

    @property
    def outbox_in(self) -> bool:
        """Whether everything that the hello announced is stored."""
        return self._outbox_in

    def stored(self, out_seq: int) -> bool:
        """Items up to `out_seq` are stored. True when this opens the way for new commands."""
        self._waits_since_ms = self._clock_ms()
        return self._open(out_seq >= self._out_head)

    def lost_patience(self) -> bool:
        """Whether announced items do not come (they were pruned): then commands go on without them. True once."""
        waited = self._clock_ms() - self._waits_since_ms >= OUTBOX_PATIENCE_MS
        return self._open(waited)

    def _open(self, now: bool) -> bool:
        if self._outbox_in or not now:
            return False
        self._outbox_in = True
        return True
