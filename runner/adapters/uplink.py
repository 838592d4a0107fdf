"""The logs of attempts on their way to the control plane: by offset, within the credit that was granted, until acked to the end.

A channel is the log of one attempt on one connection. What is durable at the plane is written to `ack` in the attempt's directory, so a
restart goes on there; whatever is lost on the way is simply read from the spool again.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import Reason, RemoteError
from protocol.frames import data_header
from protocol.limits import CHANNELS_MAX, DATA_SLICE_BYTES_MAX
from protocol.messages import Ack, Gap, LogClosed, LogOpen, Resume
from runner import failpoints
from runner.adapters.attemptfiles import LOG_DIR
from runner.adapters.spool import Hole, SpoolReader
from runner.errors import Broken

ACK_NAME: Final = "ack"
TRIM_STEP_BYTES: Final = 1024 * 1024
"""Between two words to a shim on what is safe at the plane: seldom enough to cost nothing, often enough for the smallest spool."""
UplinkMessage = LogOpen | Gap | LogClosed


@dataclass(slots=True)
class _Channel:
    """One log. Offsets: `acked` ≤ `cursor` ≤ `sent` ≤ `credit`."""

    name: str
    number: int
    directory: Path
    reader: SpoolReader
    acked: int = 0
    trimmed: int = 0
    """Its shim knows that everything below is safe."""
    cursor: int | None = None
    """None until the plane said where to go on."""
    sent: int = 0
    """Furthest the cursor was on this connection: the most that an ack can be about."""
    credit: int = 0
    finished: bool = False
    """Nothing will be written any more."""
    closed: bool = False
    """The plane was told so, on this connection."""
    idle: bool = False
    """Read to the end; a bell will tell of more."""
    failed: bool = False
    """It could not be read from where the plane wants it; the next `resume` tries again."""

    def go_to(self, offset: int) -> None:
        """Go on there, in whatever segment that is."""
        self.cursor = offset
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
        self._freed: set[int] = set()
        """Numbers of logs that are done, on this connection; the next logs get them."""
        self._turn: list[_Channel] = []
        self._control: list[UplinkMessage] = []
        self._connected = False

    # --- which logs ---------------------------------------------------------------------------------------------

    def track(self, name: str, directory: Path, *, finished: bool = False) -> None:
        """Bring the log of an attempt up. Raises Broken when there are too many."""
        if name in self._channels:
            return
        number = next((free for free in range(CHANNELS_MAX) if free not in self._numbers), None)
        if number is None:
            raise Broken(Reason.CAPACITY, "too many logs are on their way up")
        channel = _Channel(name, number, directory, SpoolReader(directory / LOG_DIR), finished=finished)
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

    def finish(self, name: str) -> None:
        """The attempt is over: when its log is read to the end, that is the end."""
        channel = self._channels.get(name)
        if channel is not None:
            channel.finished = True
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
        self._freed.clear()
        self._control.clear()
        self._turn.clear()
        for channel in self._channels.values():
            channel.cursor = None
            channel.closed = False
            channel.idle = False
            self._open(channel)

    def disconnected(self) -> None:
        """The session is over; nothing is sent until the next one."""
        self._connected = False
        self._turn.clear()
        self._control.clear()

    def heard(self, message: Resume | Ack) -> None:
        """What the plane says of a channel. Raises RemoteError when it claims what it cannot have."""
        channel = self._numbers.get(message.channel)
        if channel is None:
            # A word about a log that is done with.
            return
        if isinstance(message, Resume):
            if channel.cursor is None:
                channel.sent, channel.credit = message.offset, message.credit
            elif message.offset < channel.acked:
                # One that comes late or twice: what lies there is safe, and may be gone from here.
                return
            channel.go_to(message.offset)
            channel.credit = max(channel.credit, message.credit)
            channel.closed = False
            channel.failed = False
        elif channel.cursor is None and message.channel in self._freed:
            # A last word about the log that had this number before: of ours a `resume` tells first.
            return
        elif channel.cursor is None or message.offset > channel.sent:
            raise RemoteError(Reason.BAD_FRAME, "an ack for what was never sent")
        else:
            channel.credit = max(channel.credit, message.credit)
            if message.offset > channel.cursor:
                # A late `resume` had sent us back.
                channel.go_to(message.offset)
        if message.offset > channel.acked:
            channel.acked = message.offset
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
        while self._turn and not self._control:
            channel = self._turn.pop(0)
            frame = self._read(channel)
            if frame is not None:
                self._turn.append(channel)
                return frame
        return None

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
        if self._connected and channel.cursor is not None and not channel.failed and channel not in self._turn:
            self._turn.append(channel)
            self._wake()

    def _read(self, channel: _Channel) -> bytes | None:
        if channel.cursor is None or channel.credit - channel.cursor < DATA_SLICE_BYTES_MAX or channel.closed:
            return None
        try:
            found = channel.reader.read(channel.cursor, DATA_SLICE_BYTES_MAX)
        except (OSError, RemoteError) as exc:
            self._fail(channel, exc)
            return None
        if found is None:
            self._at_end(channel)
            return None
        if isinstance(found, Hole):
            self._control.append(Gap(channel=channel.number, start=found.start, end=found.end))
            channel.passed(found.end)
            self._schedule(channel)
            return None
        channel.passed(found.end)
        return b"".join((data_header(channel.number, found.offset), found.data))

    def _at_end(self, channel: _Channel) -> None:
        assert channel.cursor is not None, "only an opened channel is read"
        if channel.finished:
            channel.closed = True
            self._control.append(LogClosed(channel=channel.number, end=channel.cursor))
            if channel.acked == channel.cursor:
                self._done(channel)
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
        self._freed.add(channel.number)


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
