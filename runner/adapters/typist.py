"""What viewers of PTYs type and say, on its way from the control plane to shims: verified here, counted there (docs/terminals.md §2).

Theory of operation. A viewer's key is read once from the PTY's directory. What is refused is answered, and so is what the shim took; a
piece for a shim that is not connected has no answer, and comes again. A size is said once by its viewer, so it waits for the next
connection instead.

Rule: whoever carries a message decides nothing about it but whether it comes.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from protocol.commands import ViewerMode
from protocol.errors import Reason, RemoteError
from protocol.messages import Resized, Taken, Typed, Viewers
from protocol.terminals import check_resized, open_typed
from runner.adapters.attemptfiles import ATTEMPTS_DIR, read_attempt
from runner.adapters.viewerfiles import Admitted, admitted_names, admitted_viewer

SEATS_MAX: Final = 4096
"""Viewers whose keys are remembered: of those that were heard of late; others are read from their files again."""
AUDIENCES_MAX: Final = 1024
"""PTYs that are looked at in one session; beyond it the one that was spoken of longest ago counts as left by all."""
ASKED_MAX: Final = 1024
"""Pieces of one viewer that have no answer: more than a session's queues hold."""


class Terminals(Protocol):
    """Shims of PTYs, by the attempt's name."""

    def settled(self, name: str) -> bool:
        """Whether it is settled, and its shim answers no more."""

    def type(self, name: str, viewer: str, offset: int, data: bytes) -> object | None:
        """What a viewer types; returns the connection that it went over, None without one."""

    def resize(self, name: str, viewer: str, gen: int, rows: int, cols: int, *, redraw: bool) -> bool:
        """The size of a viewer's window; False when there is no connection to its shim."""

    def seen(self, name: str, offset: int | None) -> None:
        """How far the foremost viewer that may type has followed."""

    def leave(self, name: str, viewer: str) -> None:
        """A viewer's size counts no more."""


@dataclass(slots=True)
class _Seat:
    """A viewer that was heard in this session."""

    admitted: Admitted
    over: object | None = None
    """The connection that its last piece went over."""
    asked: deque[int] = field(default_factory=lambda: deque(maxlen=ASKED_MAX))
    """Offsets of its pieces that have no answer over that connection, in order."""
    unsaid: Resized | None = None
    """Its size, which no shim has heard."""


@dataclass(slots=True)
class _Audience:
    """Who looks at one PTY."""

    viewers: set[str]
    """All whose sizes may count at the shim."""
    seen: int | None = None


class Typist:
    """`say` answers the control plane."""

    def __init__(self, state_dir: Path, terminals: Terminals, say: Callable[[Taken], None]) -> None:
        self._root = state_dir / ATTEMPTS_DIR
        self._terminals = terminals
        self._say = say
        self._seats: OrderedDict[tuple[str, str], _Seat] = OrderedDict()
        self._audiences: OrderedDict[str, _Audience] = OrderedDict()

    def take(self, said: Typed | Resized | Viewers) -> None:
        """Verify what a viewer said and pass it on; or who looks on."""
        if isinstance(said, Viewers):
            self._look(said)
            return
        try:
            seat = self._seat(said.attempt, said.viewer)
            if seat.admitted.mode is not ViewerMode.WRITE:
                raise RemoteError(Reason.READ_ONLY, "it was let in to look on")
            self._type(said, seat) if isinstance(said, Typed) else self._resize(said, seat)
        except RemoteError as exc:
            self._refuse(said, exc.reason)
        except OSError:
            # No descriptors left: what is not taken comes again.
            self._refuse(said, Reason.INFRA)

    def taken(self, attempt: str, viewer: str, received: int, credit: int, closed: bool) -> None:
        """A shim told how much of a viewer's typing it took: passed on where it came from here."""
        seat = self._seats.get((attempt, viewer))
        if seat is None:
            return
        # One answer for each piece, in order; one more that tells of room is judged by a later piece, and right all the same.
        early = bool(seat.asked) and seat.asked.popleft() > received
        reason = Reason.OUT_OF_ORDER if early and not closed else None
        self._say(Taken(attempt=attempt, viewer=viewer, received=received, credit=credit, closed=closed, reason=reason))

    def adopted(self, attempt: str) -> None:
        """There is a new connection to the shim of an attempt: what belongs to a connection is said again, and what waits."""
        audience = self._audiences.get(attempt)
        if audience is not None and audience.seen is not None:
            self._terminals.seen(attempt, audience.seen)
        for (name, _viewer), seat in self._seats.items():
            if name == attempt and seat.unsaid is not None:
                self._pass_size(seat.unsaid, seat)

    def disconnected(self) -> None:
        """The session is over: nobody looks on any more, as far as can be told from here."""
        while self._audiences:
            self._leave_all(*self._audiences.popitem())
        self._seats.clear()

    # --- what one viewer says -----------------------------------------------------------------------------------

    def _type(self, typed: Typed, seat: _Seat) -> None:
        data = open_typed(typed, seat.admitted.key)
        if self._terminals.settled(typed.attempt):
            raise RemoteError(Reason.NOT_RUNNING, "it is over")
        over = self._terminals.type(typed.attempt, typed.viewer, typed.offset, data)
        if over is None:
            files = read_attempt(self._root / typed.attempt)
            if files.exit is not None or not files.alive:
                self._refuse(typed, Reason.NOT_RUNNING)
            return
        if over is not seat.over:
            # What went over another one has no answer any more.
            seat.over = over
            seat.asked.clear()
        seat.asked.append(typed.offset)

    def _resize(self, said: Resized, seat: _Seat) -> None:
        check_resized(said, seat.admitted.key)
        self._audience(said.attempt).viewers.add(said.viewer)
        self._pass_size(said, seat)

    def _pass_size(self, said: Resized, seat: _Seat) -> None:
        passed = self._terminals.resize(said.attempt, said.viewer, said.gen, said.rows, said.cols, redraw=said.redraw)
        seat.unsaid = None if passed else said

    def _refuse(self, said: Typed | Resized, reason: Reason) -> None:
        closed = reason is Reason.NOT_RUNNING
        self._say(Taken(attempt=said.attempt, viewer=said.viewer, received=0, credit=0, closed=closed, reason=reason))

    def _seat(self, attempt: str, viewer: str) -> _Seat:
        seat = self._seats.get((attempt, viewer))
        if seat is not None:
            self._seats.move_to_end((attempt, viewer))
            return seat
        admitted = admitted_viewer(self._root / attempt, viewer)
        if admitted is None:
            raise RemoteError(Reason.UNKNOWN_VIEWER, "nobody of this name was let in")
        seat = self._seats[attempt, viewer] = _Seat(admitted)
        if len(self._seats) > SEATS_MAX:
            self._seats.popitem(last=False)
        return seat

    # --- who looks on -------------------------------------------------------------------------------------------

    def _look(self, said: Viewers) -> None:
        audience = self._audience(said.attempt)
        present = set(said.viewers)
        for viewer in sorted(audience.viewers - present):
            self._terminals.leave(said.attempt, viewer)
        audience.viewers = present
        if said.seen != audience.seen:
            audience.seen = said.seen
            self._terminals.seen(said.attempt, said.seen)

    def _audience(self, attempt: str) -> _Audience:
        audience = self._audiences.get(attempt)
        if audience is not None:
            self._audiences.move_to_end(attempt)
        else:
            # Whoever was ever let in may have said a size to an earlier daemon, or in an earlier session.
            audience = self._audiences[attempt] = _Audience(set(admitted_names(self._root / attempt)))
            if len(self._audiences) > AUDIENCES_MAX:
                self._leave_all(*self._audiences.popitem(last=False))
        return audience

    def _leave_all(self, attempt: str, audience: _Audience) -> None:
        self._terminals.seen(attempt, None)
        for viewer in sorted(audience.viewers):
            self._terminals.leave(attempt, viewer)
