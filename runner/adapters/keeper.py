"""Renews leases when the event loop does not get to it: a thread with its own clock and its own connection.

Theory of operation. Whatever lease a shim has to act on is known here, with the deadline it was told last. Renewals go through the
session, and each moves a deadline; while they do, the thread sleeps. When a lease comes as near to its loss as no healthy loop lets
it come, the thread dials the plane by itself, sends one beat, tells the shims their new deadlines on their own sockets, and hands the
answer to the loop, for when that goes on. A process that is held as a whole renews nothing: then the shims keep the deadline.

Rule 1: one exchange at a time, bounded as a whole; until a lease is over it is tried again every RETRY_MS. Rule 2: with nothing to
keep, nothing wakes. Rule 3: a deadline is moved forward only, to what the plane's answer allows.
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from protocol.errors import Reason, RemoteError
from protocol.handshake import Established, RunnerHandshake, Standing
from protocol.ids import Attempt
from protocol.keys import b64url
from protocol.lease import Lease
from protocol.limits import BEAT_LEASES_MAX, FRAME_BYTES_MAX, KILL_WAIT_MS, LEASE_MARGIN_MS
from protocol.messages import SUBPROTOCOL, Beaten, Bye, FromPlane, HeldLease, Message, decode_from_plane, encode
from protocol.session import BeatAnswered, RunnerSession
from runner.adapters.attemptfiles import ATTEMPTS_DIR
from runner.adapters.shimlink import lease_body
from runner.adapters.shimsocket import dial
from runner.core.inputs import Now
from runner.core.plans import LeaseAction
from runner.errors import Broken, RunnerError
from runner.ports import Clock
from runner.shim import wire

PATIENCE_MS: Final = 2 * 1000
"""Past the moment of a renewal through the session; a healthy loop needs a round trip."""
LEAD_MS: Final = 5 * 1000
"""Before a shim begins to stop its attempt: one exchange over a slow line."""
RETRY_MS: Final = 3 * 1000
"""Between two exchanges that failed."""
EXCHANGE_S: Final = 10.0
"""Dial, handshake, beat and answer together; longer than that, and what is left of a lease is better spent on another try."""
CLOSE_S: Final = 1.0
"""For the farewell, on which nothing depends."""
JOIN_S: Final = 0.5
"""A daemon that ends does not wait for an exchange: its thread dies with it."""
NONCE_BYTES: Final = 32
Note = Callable[[str, Mapping[str, str | int | None]], None]


@dataclass(frozen=True, slots=True)
class _Kept:
    lease: Lease
    action: LeaseAction
    grace_ms: int | None

    @property
    def due_ms(self) -> int:
        """When a loop that did not renew it must be taken for starved (BOOTTIME)."""
        lease = self.lease
        stop_ms = lease.deadline_ms - KILL_WAIT_MS - LEASE_MARGIN_MS - (self.grace_ms or 0)
        late_ms = min(lease.deadline_ms - lease.ttl_ms // 2, stop_ms - LEAD_MS)
        return max(late_ms, lease.renew_at_ms + PATIENCE_MS)


class Keeper:
    """Implements the port LeaseKeeper. `hold`, `drop` and `close` from any thread.

    `standing` and `answered` are called in the keeper's thread: the one reads what the loop owns, the other hands the answer over,
    with the moment it came.
    """

    def __init__(
        self,
        *,
        url: str,
        proxy: str | None,
        state_dir: Path,
        standing: Callable[[], Standing],
        clock: Clock,
        answered: Callable[[BeatAnswered, Now], None],
        note: Note,
    ) -> None:
        self._url = url
        self._proxy = proxy
        self._root = state_dir / ATTEMPTS_DIR
        self._standing = standing
        self._clock = clock
        self._answered = answered
        self._note = note
        self._kept: dict[Attempt, _Kept] = {}
        self._changed = threading.Condition()
        self._waits_for_ms: int | None = None
        """What the thread sleeps until (BOOTTIME); None: until it is told."""
        self._again_ms = 0
        """No exchange before this."""
        self._fault = ""
        self._closed = False
        # As a daemon thread it never keeps the process from ending.
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)

    def hold(self, attempt: Attempt, lease: Lease, action: LeaseAction, grace_ms: int | None) -> int:
        """See the port."""
        with self._changed:
            known = self._kept.get(attempt)
            if known is not None and known.lease.token == lease.token:
                # A loop that comes late to one renewal must not take the next from its shim.
                lease = replace(lease, deadline_ms=max(lease.deadline_ms, known.lease.deadline_ms))
            self._kept[attempt] = kept = _Kept(lease, action, grace_ms)
            if self._waits_for_ms is None or kept.due_ms < self._waits_for_ms:
                self._changed.notify()
            return lease.deadline_ms

    def drop(self, attempt: Attempt) -> None:
        """See the port."""
        with self._changed:
            self._kept.pop(attempt, None)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (kept := self._wait()) is not None:
            try:
                self._renew(kept)
            except (RunnerError, RemoteError) as exc:
                self._complain(exc.reason, exc.detail)

    def _complain(self, reason: Reason, detail: str) -> None:
        """The same fault is told once, until it worked again."""
        if detail != self._fault:
            self._fault = detail
            self._note("lease.neglected", {"reason": reason, "detail": detail})

    def _wait(self) -> dict[Attempt, _Kept] | None:
        """Sleep until a lease is due; returns all of them, or None at the end."""
        with self._changed:
            while not self._closed:
                now_ms = self._clock.now().boot_ms
                # What is over cannot be had back without a new token.
                self._kept = {name: one for name, one in self._kept.items() if now_ms < one.lease.deadline_ms}
                dues = [max(one.due_ms, self._again_ms) for one in self._kept.values()]
                due_ms = self._waits_for_ms = min(dues, default=None)
                if due_ms is not None and due_ms <= now_ms:
                    self._again_ms = now_ms + RETRY_MS
                    return dict(self._kept)
                self._changed.wait(None if due_ms is None else (due_ms - now_ms) / 1000)
        return None

    def _renew(self, kept: Mapping[Attempt, _Kept]) -> None:
        """One exchange, and what follows from it. Raises Broken or RemoteError."""
        wanted = dict(list(kept.items())[:BEAT_LEASES_MAX])
        answered = self._exchange([HeldLease(res=one.lease.res, token=one.lease.token) for one in wanted.values()])
        got = self._clock.now()
        renewed = {(one.res, one.token): one for one in answered.leases}
        told, self._fault = 0, ""
        for attempt, one in wanted.items():
            renewal = renewed.get((one.lease.res, one.lease.token))
            if renewal is None or renewal.ttl_ms is None:
                # The plane's last word until the loop has another.
                self._replace(attempt, one, None)
                continue
            after = replace(one, lease=one.lease.renewed(one.lease.token, answered.sent_ms, renewal.ttl_ms))
            self._replace(attempt, one, after)
            told += self._tell(attempt, after)
        self._note("lease.kept", {"count": told})
        self._answered(answered, got)

    def _replace(self, attempt: Attempt, before: _Kept, after: _Kept | None) -> None:
        with self._changed:
            if self._kept.get(attempt) is not before:
                return
            if after is None:
                del self._kept[attempt]
            else:
                self._kept[attempt] = after

    def _tell(self, attempt: Attempt, kept: _Kept) -> bool:
        """Push a deadline to a shim, beside whoever is connected to it; whether there was one to take it."""
        body = lease_body(kept.lease.token, kept.lease.deadline_ms, kept.action, kept.grace_ms)
        with contextlib.suppress(OSError), dial(self._root / attempt.name) as sock:
            return sock.send(wire.pack(wire.RENEW, body)) > 0
        return False

    # --- the exchange -------------------------------------------------------------------------------------------

    def _exchange(self, leases: list[HeldLease]) -> BeatAnswered:
        """Dial, prove, beat, and hear the answer. Raises Broken or RemoteError."""
        # Hardly ever needed, and not before: the daemon's idle memory is a budget.
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect
        from websockets.typing import Subprotocol

        ends_ms = self._clock.now().boot_ms + int(EXCHANGE_S * 1000)
        try:
            with connect(
                self._url,
                subprotocols=[Subprotocol(SUBPROTOCOL)],
                compression=None,
                max_size=FRAME_BYTES_MAX,
                open_timeout=EXCHANGE_S,
                close_timeout=CLOSE_S,
                ping_interval=None,
                proxy=self._proxy,
                user_agent_header=None,
            ) as socket:

                def say(message: Message) -> None:
                    socket.send(encode(message))

                def hear() -> FromPlane:
                    left_s = (ends_ms - self._clock.now().boot_ms) / 1000
                    return _decoded(socket.recv(timeout=max(left_s, 0)))

                return self._converse(leases, say, hear)
        except (OSError, WebSocketException) as exc:
            raise Broken(Reason.GOING_AWAY, f"no renewal beside the session: {type(exc).__name__}") from exc

    def _converse(
        self, leases: list[HeldLease], say: Callable[[Message], None], hear: Callable[[], FromPlane]
    ) -> BeatAnswered:
        standing = replace(self._standing(), purpose="renew")
        handshake = RunnerHandshake(standing, b64url(self._clock.entropy(NONCE_BYTES)))
        say(handshake.start())
        while not isinstance(answer := handshake.receive(hear()), Established):
            say(answer)
        session = RunnerSession(out_hw=answer.out_hw, beat_ms=answer.beat_ms)
        say(session.beat(self._clock.now().boot_ms, standing.ctl.hw, leases))
        while True:
            message = hear()
            answered = session.receive(message) if isinstance(message, Beaten) else None
            if isinstance(answered, BeatAnswered):
                return answered


def _decoded(frame: str | bytes) -> FromPlane:
    if isinstance(frame, bytes):
        raise RemoteError(Reason.BAD_FRAME, "a control plane sends no data")
    message = decode_from_plane(frame)
    if isinstance(message, Bye):
        raise RemoteError(message.reason, message.detail)
    return message
