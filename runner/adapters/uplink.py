"""The logs of attempts on their way to the control plane: by offset, within the credit that was granted, until acked to the end.

A channel is the log of one attempt on one connection. What is durable at the plane is written to `ack` in the attempt's directory, so a
restart goes on there; whatever is lost on the way is simply read from the spool again.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from protocol.errors import Reason, RemoteError
from protocol.frames import data_header
from protocol.limits import (
    CHANNELS_MAX,
    CONNECTION_WINDOW_BYTES,
    DATA_SLICE_BYTES_MAX,
    QUANTUM_BYTES,
)
from protocol.messages import Ack, Blocked, Credit, Gap, LogClosed, LogOpen, Resume, Watch
from runner import failpoints
from runner.adapters.attemptfiles import LOG_DIR
from runner.adapters.pace import Pace
from runner.adapters.spool import Hole, LogReader, SpoolReader
from runner.errors import Broken

ACK_NAME: Final = "ack"
TRIM_STEP_BYTES: Final = 1024 * 1024
"""Between two words to a shim on what is safe at the plane: seldom enough to cost nothing, often enough for the smallest spool."""
UplinkMessage = LogOpen | Blocked | Gap | LogClosed


@dataclass(slots=True)
class _Channel:
    """One log. Offsets: `acked` ≤ `cursor` ≤ `sent` ≤ `credit`."""

    name: str
    number: int
    directory: Path
    reader: LogReader
    acked: int = 0
    trimmed: int = 0
    """Its shim knows that everything below is safe."""
    cursor: int | None = None
    """None until the plane said where to go on."""
    sent: int = 0
    """Furthest the cursor was on this connection: the most that an ack can be about."""
    credit: int = 0
    blocked: int = -1
    """The credit of which the plane was told that it blocks."""
    pending: memoryview = field(default_factory=lambda: memoryview(b""))
    """Whole records that were read from `cursor` on and are not sent yet."""
    interactive: bool = False
    """It is a PTY's: once somebody follows it, it goes before all else that is followed."""
    live: bool = False
    """Somebody follows it: it goes before all that nobody does."""
    deficit: int = 0
    """What it may still send in this turn; below zero when its last frame was longer than that."""
    finished: bool = False
    """Nothing will be written any more."""
    signed_end: int = 0
    """Where it ends by its shim's last word; what is not on disk up to there never was."""
    closed: bool = False
    """The plane was told so, on this connection."""
    idle: bool = False
    """Read to the end; a bell will tell of more."""
    failed: bool = False
    """It could not be read from where the plane wants it; the next `resume` tries again."""

    @property
    def rank(self) -> int:
        """Its class: 0 goes first."""
        return 2 if not self.live else 0 if self.interactive else 1

    def go_to(self, offset: int) -> None:
        """Go on there, in whatever segment that is."""
        self.cursor = offset
        self.pending = memoryview(b"")
        self.reader.close()

    def passed(self, offset: int) -> None:
        """Everything up to there was sent."""
        self.cursor = offset
        self.sent = max(self.sent, offset)


class Uplink:
    """All channels of this daemon.

    `wake` is called when there may be something to send, `failed` with a log that cannot be read; `arm` and `trim` tell a shim how far
    its log was read and how far it is safe at the plane.
    """

    def __init__(
        self,
        *,
        wake: Callable[[], None],
        arm: Callable[[str, int], None],
        trim: Callable[[str, int], None],
        failed: Callable[[str, str], None],
    ) -> None:
        self._wake = wake
        self._arm = arm
        self._trim = trim
        self._failed = failed
        self._channels: dict[str, _Channel] = {}
        self._numbers: dict[int, _Channel] = {}
        self._turns: tuple[deque[_Channel], ...] = (deque(), deque(), deque())
        """Who has something to send, by rank: PTYs that are followed, what else is followed, and the rest."""
        self._sent = 0
        self._credit = CONNECTION_WINDOW_BYTES
        self._pace = Pace()
        self._control: list[UplinkMessage] = []
        self._connected = False

    # --- which logs ---------------------------------------------------------------------------------------------

    def track(
        self,
        name: str,
        directory: Path,
        *,
        finished: bool = False,
        end: int = 0,
        reader: Callable[[], LogReader] | None = None,
        interactive: bool = False,
    ) -> None:
        """Bring the log of an attempt up, read with a `reader` of its own if one is given. Raises Broken when there are too many.

        `interactive`: it is a PTY's.
        """
        if name in self._channels:
            return
        number = next((free for free in range(CHANNELS_MAX) if free not in self._numbers), None)
        if number is None:
            raise Broken(Reason.CAPACITY, "too many logs are on their way up")
        source = SpoolReader(directory / LOG_DIR) if reader is None else reader()
        channel = _Channel(name, number, directory, source, finished=finished, signed_end=end, interactive=interactive)
        self._channels[name] = channel
        self._numbers[number] = channel
        if self._connected:
            self._open(channel)

    def grew(self, name: str, _end: int) -> None:
        """There is more in the log."""
        channel = self._channels.get(name)
        if channel is not None:
            channel.idle = False
            self._schedule(channel)

    def finish(self, name: str, end: int = 0) -> None:
        """The attempt is over: where its log ends on disk it ends, or there is a gap up to the `end` that its shim told."""
        channel = self._channels.get(name)
        if channel is not None:
            channel.finished = True
            channel.signed_end = end
            channel.idle = False
            self._schedule(channel)

    @property
    def backlog_bytes(self) -> int:
        """Sent or known, and not yet durable at the plane: for `runner status`; an estimate from below."""
        return sum((channel.cursor or 0) - channel.acked for channel in self._channels.values() if channel.cursor)

    def acked(self, name: str) -> int | None:
        """How far the log of an attempt is durable at the plane; None when it is not on its way any more."""
        channel = self._channels.get(name)
        return None if channel is None else channel.acked

    # --- the connection -----------------------------------------------------------------------------------------

    def connected(self) -> None:
        """A new session: every log is opened again, and the plane says from where."""
        self._connected = True
        self._control.clear()
        self._rest()
        self._sent, self._credit = 0, CONNECTION_WINDOW_BYTES
        for channel in self._channels.values():
            channel.cursor = None
            channel.pending = memoryview(b"")
            channel.blocked = -1
            channel.live = channel.closed = False
            channel.idle = False
            self._open(channel)

    def disconnected(self) -> None:
        """The session is over; nothing is sent until the next one."""
        self._connected = False
        self._rest()
        self._control.clear()

    def heard(self, message: Resume | Ack | Credit | Watch) -> None:
        """What the plane says of a channel, or of all. Raises RemoteError when it claims what it cannot have."""
        if isinstance(message, Credit):
            self._credit = max(self._credit, message.total)
            self._wake()
            return
        channel = self._numbers.get(message.channel)
        # Else it is a word about a log that is done with.
        if channel is not None:
            self._watched(channel, message.on) if isinstance(message, Watch) else self._moved(channel, message)

    def _watched(self, channel: _Channel, on: bool) -> None:
        """It changes its class, with its place in the turn."""
        if channel.live == on:
            return
        waits = channel in self._turns[channel.rank]
        if waits:
            self._turns[channel.rank].remove(channel)
        channel.live, channel.deficit = on, 0
        if waits:
            self._turns[channel.rank].append(channel)

    def _moved(self, channel: _Channel, message: Resume | Ack) -> None:
        if isinstance(message, Resume):
            if channel.cursor is None:
                channel.sent, channel.credit = message.offset, message.credit
            elif message.offset < channel.acked:
                # One that comes late or twice: what lies there is safe, and may be gone from here.
                return
            # What it has is not what is safe there: only an `ack` tells that.
            channel.go_to(message.offset)
            channel.credit = max(channel.credit, message.credit)
            channel.closed = False
            channel.failed = False
        elif channel.cursor is None:
            # A last word about the log that had this number before, or one that overtook our `resume`, which tells more.
            return
        elif message.offset > channel.sent:
            raise RemoteError(Reason.BAD_FRAME, "an ack for what was never sent")
        else:
            channel.credit = max(channel.credit, message.credit)
            if message.offset > channel.cursor:
                # A late `resume` had sent us back.
                channel.go_to(message.offset)
            channel.acked = max(channel.acked, message.offset)
        if channel.acked - channel.trimmed >= TRIM_STEP_BYTES:
            channel.trimmed = channel.acked
            self._trim(channel.name, channel.acked)
        if channel.closed and channel.cursor == channel.acked:
            self._done(channel)
        else:
            channel.idle = False
            self._schedule(channel)

    def messages(self) -> Iterator[UplinkMessage]:
        """Control messages to send now; they go before any data."""
        while self._control:
            yield self._control.pop(0)

    def next_frame(self) -> bytes | None:
        """One data frame of the channel whose turn it is, or None when nothing can be sent now."""
        while not self._control and self._sent < self._credit:
            turn = next((turn for turn in self._turns if turn), None)
            if turn is None:
                return None
            channel = turn.popleft()
            if channel.deficit <= 0:
                channel.deficit += QUANTUM_BYTES
            if channel.deficit <= 0:
                # A long frame is paid for: the others of its class have their turns.
                turn.append(channel)
                continue
            frame = self._read(channel)
            if frame is None:
                channel.deficit = min(channel.deficit, 0)
                continue
            turn.appendleft(channel) if channel.deficit > 0 else turn.append(channel)
            return frame
        return None

    def paced(self, size: int, seconds: float) -> None:
        """A frame of `size` bytes left in so much time: how long the next ones may be."""
        self._pace.left(size, seconds, time.monotonic())

    def close(self) -> None:
        """Give every open file back."""
        for channel in self._channels.values():
            channel.reader.close()

    # --- one channel --------------------------------------------------------------------------------------------

    def _open(self, channel: _Channel) -> None:
        try:
            first = channel.reader.first()
        except OSError as exc:
            self._fail(channel, exc)
            return
        self._control.append(LogOpen(channel=channel.number, attempt=channel.name, first=first))
        self._wake()

    def _fail(self, channel: _Channel, fault: OSError | RemoteError) -> None:
        """One log that cannot be read must cost neither the daemon nor the other logs.

        The plane may have asked from within a record, a program of the same user may have written into its own log, the disk may lie.
        """
        channel.failed = True
        self._failed(channel.name, fault.detail if isinstance(fault, RemoteError) else fault.strerror or "unknown")

    def _schedule(self, channel: _Channel) -> None:
        turn = self._turns[channel.rank]
        if self._connected and channel.cursor is not None and not channel.failed and channel not in turn:
            turn.append(channel)
            self._wake()

    def _rest(self) -> None:
        for turn in self._turns:
            turn.clear()

    def _read(self, channel: _Channel) -> bytes | None:
        """The next frame of a channel, None when it has nothing to send now."""
        if channel.cursor is None or channel.closed or not (channel.pending or self._fetch(channel)):
            return None
        room = channel.credit - channel.cursor
        if room <= 0:
            self._say_blocked(channel)
            return None
        piece = channel.pending[: min(self._pace.piece, room, self._credit - self._sent)]
        channel.pending = channel.pending[len(piece) :]
        header = data_header(channel.number, channel.cursor, goes_on=bool(channel.pending))
        channel.passed(channel.cursor + len(piece))
        channel.deficit -= len(piece)
        self._sent += len(piece)
        return b"".join((header, piece))

    def _fetch(self, channel: _Channel) -> bool:
        """Read on from the cursor; whether there is something to send."""
        assert channel.cursor is not None, "only an opened channel is read"
        try:
            found = channel.reader.read(channel.cursor, DATA_SLICE_BYTES_MAX)
        except (OSError, RemoteError) as exc:
            self._fail(channel, exc)
            return False
        if found is None:
            self._at_end(channel)
            return False
        if isinstance(found, Hole):
            # Needs no credit, and grants past itself.
            self._control.append(Gap(channel=channel.number, start=found.start, end=found.end))
            channel.passed(found.end)
            self._schedule(channel)
            return False
        channel.pending = found.data
        return True

    def _say_blocked(self, channel: _Channel) -> None:
        """Once for each credit: the plane may be generous, or a grant is on its way."""
        if channel.blocked != channel.credit:
            channel.blocked = channel.credit
            self._control.append(Blocked(channel=channel.number, credit=channel.credit))
            self._wake()

    def _at_end(self, channel: _Channel) -> None:
        assert channel.cursor is not None, "only an opened channel is read"
        if channel.finished and channel.cursor < channel.signed_end:
            # The disk did not take the last of it: what nobody has is told, or it would be waited for.
            self._control.append(Gap(channel=channel.number, start=channel.cursor, end=channel.signed_end))
            channel.passed(channel.signed_end)
        if channel.finished:
            channel.closed = True
            # Also when all of it is durable there: until this is acked, a lost connection would leave the plane waiting for the end.
            self._control.append(LogClosed(channel=channel.number, end=channel.cursor))
            self._wake()
        elif not channel.idle:
            channel.idle = True
            self._arm(channel.name, channel.cursor)

    def _done(self, channel: _Channel) -> None:
        """Durable at the plane to the last byte."""
        write_ack(channel.directory, channel.acked)
        failpoints.hit("log.acked")
        channel.reader.close()
        del self._channels[channel.name]
        del self._numbers[channel.number]


def write_ack(directory: Path, offset: int) -> None:
    """Remember what is durable at the plane. It may lag: the worst is that bytes are sent again."""
    draft = directory / f"{ACK_NAME}.tmp"
    try:
        draft.write_text(f"{offset}\n", encoding="ascii")
        os.replace(draft, directory / ACK_NAME)
    except OSError:
        # No space, or the directory is gone: it is a shortcut for the next daemon and nothing else.
        return


def read_ack(directory: Path) -> int | None:
    """What was written there, None when there is nothing of use."""
    try:
        text = (directory / ACK_NAME).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() and len(text) <= 19 else None
