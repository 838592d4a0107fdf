"""Who looks at which PTY: what viewers say on its way to their runner, and its log on its way to them.

Theory of operation. A viewer is one connection with an offset of its own into the stored log; nothing is copied for it and nobody waits
for it. What it types goes to its runner's session at once and is held here until the runner has taken it: a session that breaks gets
it again. All of it is signed by the viewer, so nothing here is believed or judged but its shape.

Rule 1: a viewer is sent so much as it was not told to have shown, and no more; one that is far behind is shown the end instead.
Rule 2: what is held of a viewer is bounded; what does not fit is not taken, and the viewer says it again.
Rule 3: the runner is told who looks on when that changes, when the foremost has followed a good way, and on every new session.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from functools import partial
from typing import Final

import anyio
import anyio.to_process
import anyio.to_thread

from controlplane import ptytables, tables
from controlplane.errors import Fault, RequestRefused
from controlplane.ledger import Ledger
from controlplane.limits import (
    PTY_CONNECTIONS_MAX,
    PTY_HELD_BYTES,
    PTY_RESEND_S,
    PTY_SEEN_STEP_BYTES,
    PTY_SKIP_BYTES,
    PTY_TAKEN_HELD_MAX,
    PTY_UNSEEN_BYTES,
)
from controlplane.logstore import Log
from controlplane.ptyfeed import Feed, Lost, Opening, Size, Step, open_at, size_frame
from controlplane.ptymessages import Begin, SaidResized, SaidTyped, encode_output, taken_frame, to_viewer
from controlplane.ptytyping import Typing
from controlplane.rows import ExecutionRow
from controlplane.session import Session
from protocol.commands import ViewerMode
from protocol.errors import Reason
from protocol.ids import Attempt
from protocol.messages import Resized, Taken, Typed, Viewers
from protocol.wire import JsonObject

SessionOf = Callable[[str], Session | None]


class Hub:
    """Every PTY that somebody looks at."""

    def __init__(self, ledger: Ledger, session_of: SessionOf) -> None:
        self._ledger = ledger
        self._session_of = session_of
        self._rooms: dict[str, _Room] = {}
        self._snapshots = anyio.CapacityLimiter(1)
        """An emulator takes a core for a second: one at a time."""

    def join(self, row: ExecutionRow, viewer_id: str, mode: ViewerMode) -> "Viewer":
        """A connection of a viewer; an earlier one of the same viewer ends. Raises RequestRefused(BUSY)."""
        if sum(len(room.viewers) for room in self._rooms.values()) >= PTY_CONNECTIONS_MAX:
            raise RequestRefused(Fault.BUSY, "too many viewers are connected")
        name = row.attempt.name
        room = self._rooms.get(name)
        if room is None:
            self._sweep()
            size = ptytables.size_of(self._ledger.db.reader, row)
            known = Size(24, 80) if size is None else Size(size.rows, size.cols)
            room = self._rooms[name] = _Room(row.attempt, row.runner_id, known)
        before = room.viewers.get(viewer_id)
        if before is not None:
            before.replaced = True
            self.leave(before)
        log = self._ledger.logs.acquire(name, row.runner_id)
        viewer = Viewer(self, room, log, viewer_id, mode)
        room.viewers[viewer_id] = viewer
        log.watchers.add(viewer.wake)
        log.follow(1)
        return viewer

    def leave(self, viewer: "Viewer") -> None:
        """The connection is gone; again, it changes nothing."""
        room = viewer.room
        if room.viewers.get(viewer.id) is not viewer:
            viewer.wake()
            return
        del room.viewers[viewer.id]
        viewer.log.watchers.discard(viewer.wake)
        viewer.log.follow(-1)
        viewer.release()
        self._ledger.logs.give_back(viewer.log)
        viewer.wake()
        self.changed(room)

    def changed(self, room: "_Room") -> None:
        """Somebody came or went."""
        for viewer in room.viewers.values():
            viewer.presence_told = False
            viewer.wake()
        self.tell(room)

    def tell(self, room: "_Room", *, anew: bool = False) -> None:
        """Tell the runner who looks on, where that says something new."""
        session = self._session_of(room.runner_id)
        if session is None:
            return
        said = Viewers(attempt=room.attempt.name, seen=room.seen, viewers=list(room.viewers))
        if anew or _says_more(said, room.told):
            room.told = said
            session.say(said)

    def send(self, viewer: "Viewer") -> None:
        """Send what of a viewer's typing may go."""
        session = self._session_of(viewer.room.runner_id)
        if session is not None:
            for piece in viewer.typing.due():
                session.say(piece)

    def resize(self, viewer: "Viewer") -> None:
        """Send a viewer's newest size."""
        session = self._session_of(viewer.room.runner_id)
        if session is not None and viewer.resized is not None:
            session.say(viewer.resized)

    def taken(self, runner_id: str, taken: Taken) -> None:
        """A runner took a piece of what a viewer typed, or did not: of an attempt of its own."""
        room = self._rooms.get(taken.attempt)
        if room is None or room.runner_id != runner_id:
            return
        room.received[taken.viewer] = max(taken.received, room.received.get(taken.viewer, 0))
        viewer = room.viewers.get(taken.viewer)
        if viewer is not None:
            viewer.answered(taken)

    def line_changed(self, runner_id: str) -> None:
        """The session of a runner is gone, or a new one is there."""
        session = self._session_of(runner_id)
        if session is not None:
            # Whom an earlier session, or an earlier control plane, told of somebody that has left since must not wait for that one.
            for row in ptytables.living(self._ledger.db.reader, runner_id):
                if row.name not in self._rooms:
                    session.say(Viewers(attempt=row.name))
        for room in self._rooms.values():
            if room.runner_id != runner_id:
                continue
            if session is not None:
                self.tell(room, anew=True)
            for viewer in room.viewers.values():
                viewer.typing.again()
                self.resize(viewer)
                self.send(viewer)
                viewer.wake()

    def is_online(self, runner_id: str) -> bool:
        """Whether the runner has a session."""
        return self._session_of(runner_id) is not None

    def end_of(self, room: "_Room") -> tuple[ExecutionRow, bool] | None:
        """How the PTY ended, and whether it has a log that will be complete; None while it lives."""
        if self._ledger.is_living(room.runner_id, room.attempt.name):
            return None
        row = tables.attempt(self._ledger.db.reader, room.attempt.execution_id, room.attempt.start_token)
        if row is None or not row.state.final:
            return None
        return row, ptytables.has_log(row)

    async def opening(self, viewer: "Viewer", begin: Begin) -> Opening:
        """How a viewer is brought in."""
        log, room = viewer.log, viewer.room
        look = partial(open_at, log.row, log.path, begin.attach, begin.start, room.size)
        if begin.attach == "snapshot":
            return await anyio.to_process.run_sync(look, cancellable=True, limiter=self._snapshots)
        return await anyio.to_thread.run_sync(look)

    def _sweep(self) -> None:
        """Forget PTYs that have ended and that nobody looks at."""
        for name, room in list(self._rooms.items()):
            if not room.viewers and not self._ledger.is_living(room.runner_id, name):
                del self._rooms[name]


def _says_more(said: Viewers, told: Viewers) -> bool:
    """Whether it is worth a message: somebody came or went, or the foremost has followed a good way."""
    if said.viewers != told.viewers or said.seen is None or told.seen is None:
        return said != told
    return not 0 <= said.seen - told.seen < PTY_SEEN_STEP_BYTES


class _Room:
    """One PTY. It is kept without viewers, too, while the PTY lives: it knows what of each was taken."""

    def __init__(self, attempt: Attempt, runner_id: str, size: Size) -> None:
        self.attempt: Final = attempt
        self.runner_id: Final = runner_id
        self.size: Final = size
        """With which it was opened."""
        self.viewers: dict[str, Viewer] = {}
        self.received: dict[str, int] = {}
        """What the runner took of each viewer, also of those that are gone: at most VIEWERS_MAX are ever let in."""
        self.told = Viewers(attempt=attempt.name)

    @property
    def seen(self) -> int | None:
        """How far the foremost viewer that may type has followed."""
        writers = [viewer.seen for viewer in self.viewers.values() if viewer.begun and viewer.may_type]
        return max(writers, default=None)


class Viewer:
    """One connection of a viewer: `frames` is what it gets."""

    def __init__(self, hub: Hub, room: _Room, log: Log, viewer_id: str, mode: ViewerMode) -> None:
        self.id: Final = viewer_id
        self.mode: Final = mode
        self.room: Final = room
        self.log: Final = log
        self.typing: Final = Typing()
        self.resized: Resized | None = None
        self.seen = 0
        """What it has shown, or what it was brought in behind."""
        self.begun = False
        self.replaced = False
        """A later connection of the same viewer is there."""
        self.presence_told = False
        self._hub = hub
        self._feed: Feed | None = None
        self._woken = anyio.Event()
        self._taken: deque[Taken] = deque(maxlen=PTY_TAKEN_HELD_MAX)
        self._online = True

    @property
    def may_type(self) -> bool:
        """Whether it was let in to type."""
        return self.mode is ViewerMode.WRITE

    # --- what it says -------------------------------------------------------------------------------------------

    def typed(self, said: SaidTyped) -> None:
        """It typed something."""
        name = self.room.attempt.name
        piece = Typed(attempt=name, viewer=self.id, offset=said.offset, data=said.data, sig=said.sig)
        if not self.may_type:
            self._refuse(Reason.READ_ONLY)
        elif self.typing.add(piece, said.size):
            self._hub.send(self)
            self.wake()
        else:
            self._refuse(Reason.OUT_OF_ORDER, room=PTY_HELD_BYTES)

    def resize(self, said: SaidResized) -> None:
        """It told its size."""
        if not self.may_type:
            self._refuse(Reason.READ_ONLY)
            return
        self.resized = Resized(
            attempt=self.room.attempt.name,
            viewer=self.id,
            gen=said.gen,
            rows=said.rows,
            cols=said.cols,
            redraw=said.redraw,
            sig=said.sig,
        )
        self._hub.resize(self)

    def shown(self, offset: int) -> None:
        """It told to have shown everything below `offset`: no more than it was sent."""
        sent = 0 if self._feed is None else self._feed.offset
        if self.seen < offset:
            self.seen = max(self.seen, min(offset, sent))
            self._hub.tell(self.room)
            self.wake()

    # --- what it hears ------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed that it may have to hear of."""
        self._woken.set()

    def answered(self, taken: Taken) -> None:
        """The runner answered."""
        self.typing.answered(taken)
        self._hub.send(self)
        self._answer(taken)

    def _refuse(self, reason: Reason, room: int = 0) -> None:
        received = self.room.received.get(self.id, 0)
        name, credit = self.room.attempt.name, received + room
        self._answer(Taken(attempt=name, viewer=self.id, received=received, credit=credit, reason=reason))

    def _answer(self, taken: Taken) -> None:
        if self._taken and self._taken[-1].reason == taken.reason and not self._taken[-1].closed:
            self._taken.pop()
        self._taken.append(taken)
        self.wake()

    async def frames(self, begin: Begin) -> AsyncGenerator[str | bytes, None]:
        """Everything it gets, text and binary, as it comes; the last one is how the PTY ended, or nothing for one replaced."""
        opening = await self._hub.opening(self, begin)
        yield self._begun(opening)
        for frame in self._brought(opening):
            yield frame
        self.begun = True
        self._hub.changed(self.room)
        while not self.replaced:
            self._woken = anyio.Event()
            for text in self._news():
                yield text
            try:
                step = self._step()
            except (Lost, OSError):
                async for frame in self._skip():
                    yield frame
                continue
            if step is not None:
                if step.data:
                    yield encode_output(step.end, step.data)
                if step.size is not None:
                    yield size_frame(step.size)
            elif (ended := self._ended()) is not None:
                yield ended
                return
            else:
                await self._rest()

    def release(self) -> None:
        """The connection is gone."""
        if self._feed is not None:
            self._feed.close()

    def _begun(self, opening: Opening) -> str:
        return to_viewer(
            "begun",
            attempt=self.room.attempt.name,
            viewer=self.id,
            mode=self.mode,
            rows=opening.size.rows,
            cols=opening.size.cols,
            offset=opening.offset,
            received=self.room.received.get(self.id, 0),
        )

    def _brought(self, opening: Opening) -> Iterator[str | bytes]:
        self.release()
        self._feed = Feed(self.log, opening.end)
        self.seen = max(self.seen, opening.offset)
        yield from opening.frames
        yield to_viewer("live", offset=opening.end)

    async def _skip(self) -> AsyncGenerator[str | bytes, None]:
        """It cannot follow, or what comes next is not there: its terminal is brought to what the PTY shows anew."""
        opening = await self._hub.opening(self, Begin(rows=1, cols=1))
        yield to_viewer("skipped", offset=opening.offset)
        yield size_frame(opening.size)
        for frame in self._brought(opening):
            yield frame
        self._hub.tell(self.room)

    def _step(self) -> Step | None:
        """What is next, as far as it may be sent. Raises Lost where it is too far behind to be shown all of it, too; OSError."""
        feed = self._feed
        if feed is None or feed.offset - self.seen >= PTY_UNSEEN_BYTES:
            return None
        if self.log.whole - feed.offset > PTY_SKIP_BYTES:
            raise Lost(self.log.whole)
        return feed.take()

    def _news(self) -> Iterator[str]:
        while self._taken:
            yield taken_frame(self._taken.popleft())
        if not self.presence_told:
            self.presence_told = True
            viewers: list[JsonObject] = [
                {"viewer": viewer.id, "mode": viewer.mode} for viewer in self.room.viewers.values()
            ]
            yield to_viewer("viewers", viewers=viewers)
        online = self._hub.is_online(self.room.runner_id)
        if online != self._online:
            self._online = online
            yield to_viewer("online" if online else "offline")

    def _ended(self) -> str | None:
        end = self._hub.end_of(self.room)
        if end is None or (self._feed is not None and self._feed.offset < self.log.whole):
            return None
        row, has_log = end
        if has_log and not self.log.complete:
            return None
        settlement = ptytables.settlement_of(row)
        return to_viewer("ended", state=row.state, exit_status=row.exit_status, settlement=settlement)

    async def _rest(self) -> None:
        """Until something changes; what was typed and has no answer for long goes again."""
        if not self.typing:
            await self._woken.wait()
            return
        with anyio.move_on_after(PTY_RESEND_S) as silence:
            await self._woken.wait()
        if silence.cancelled_caught:
            self.typing.again()
            self._hub.send(self)
