"""One runner's session on the control plane's side, without a transport: what to say, what to send again, when to end.

The gateway carries what is said here over a WebSocket; another transport could carry it as well.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio

from controlplane.channels import Channels
from controlplane.hearing import Begun
from controlplane.limits import OUTBOX_PATIENCE_MS, SAFETY_AT_ONCE_MAX, SAID_MESSAGES_MAX
from controlplane.logstore import LogStore
from controlplane.rows import CommandRow
from controlplane.store import Permit
from protocol.envelope import PayloadType, seal
from protocol.errors import CloseCode, Reason
from protocol.keys import PrivateKey
from protocol.messages import FromPlane
from protocol.session import PlaneSession, SentCommand


class Session:
    """A runner that has proved who it is. `clock_ms` is monotonic."""

    def __init__(
        self,
        session_id: str,
        runner_id: str,
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
        self._reserved = 0
        self._machine = PlaneSession(0)
        self._key = key
        self._clock_ms = clock_ms
        self._said: deque[FromPlane] = deque()
        self._spoke = anyio.Event()
        self._out_head = 0
        self._waits_since_ms = 0
        self._outbox_in = False

    # --- beginning and ending -----------------------------------------------------------------------------------

    def begin(self, begun: Begun, out_head: int) -> None:
        """Go on from what was agreed: commands wait until the runner's items up to `out_head` are stored."""
        self.inc = begun.runner.inc
        self.keyset_version = begun.runner.keyset_version
        self._machine = PlaneSession(begun.meeting.told.hw)
        self._out_head = out_head
        self._outbox_in = begun.meeting.out_hw >= out_head
        self._waits_since_ms = self._clock_ms()
        self.queue(begun.again)

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
        return Permit(session=self.id, room=room, safety_room=safety_room)

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
                env = seal(command.payload, PayloadType.COMMAND, [self._key]).decode()
                self._machine.queue(SentCommand(command.digest, command.seq, env))
        self.pump()

    def pump(self) -> None:
        """Send what is due, also again after a silence."""
        for frame in self._machine.outgoing(self._clock_ms()):
            self.say(frame)

    @property
    def machine(self) -> PlaneSession:
        """What was sent and not consumed."""
        return self._machine

    # --- the runner's outbox ------------------------------------------------------------------------------------

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
