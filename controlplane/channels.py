"""The log channels of one session: bytes in, credit and durable ends out. No database, no parsing, no copies on this path.

Rule 1: credit is absolute and counted from what was received: of each channel, and of all together. Rule 2: an ack names only what
is durable. Rule 3: after a jump ahead, or when the disk lost what came, the runner is told once where to go on; what was under way
meanwhile is dropped. Rule 4: a window doubles when the runner says that it is blocked by it, and with every FLOOD_WINDOWS of it that
came: grants stay few while much comes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from controlplane.limits import LOG_END_MAX
from controlplane.logstore import Log, LogStore
from protocol.errors import CloseCode, Reason, RemoteError
from protocol.frames import decode_data
from protocol.limits import CHANNEL_WINDOW_BYTES, CHANNEL_WINDOW_BYTES_MAX, CHANNELS_MAX, CONNECTION_WINDOW_BYTES
from protocol.messages import Ack, Blocked, Credit, Gap, LogClosed, LogOpen, Resume, Watch

FLOOD_WINDOWS: Final = 4
"""A log that came to so many windows is a flood, and nobody at its other end waits for single bytes."""
Say = Callable[[Resume | Ack | Credit | Watch], None]


@dataclass(slots=True)
class _Channel:
    number: int
    log: Log
    credit: int
    window: int = CHANNEL_WINDOW_BYTES
    received: int = 0
    jumped: bool = False

    def grow(self) -> None:
        """Double the window, up to the largest."""
        self.window = min(2 * self.window, CHANNEL_WINDOW_BYTES_MAX)


class Channels:
    """What one session writes; `say` queues a message for its runner."""

    def __init__(self, runner_id: str, store: LogStore, owner: Callable[[str], str | None], say: Say) -> None:
        """`owner` names the runner an attempt belongs to, None when nobody knows it."""
        self._runner_id = runner_id
        self._store = store
        self._owner = owner
        self._say = say
        self._channels: dict[int, _Channel] = {}
        self._received = 0
        self._granted = CONNECTION_WINDOW_BYTES

    def open(self, message: LogOpen) -> None:
        """Bind a channel to an attempt's log and say where it goes on."""
        owner = self._owner(message.attempt)
        if owner is not None and owner != self._runner_id:
            raise _broken("the attempt is another runner's")
        if message.channel >= CHANNELS_MAX:
            raise _broken("no such channel")
        self._release(message.channel)
        log = self._store.acquire(message.attempt, self._runner_id)
        if log.runner_id != self._runner_id:
            self._store.give_back(log)
            raise _broken("the log is another runner's")
        channel = _Channel(message.channel, log, log.end)
        self._channels[message.channel] = channel
        log.heard = lambda: self._ack(channel)
        log.lost = lambda: self._again(channel)
        log.on_watch = lambda on: self._say(Watch(channel=channel.number, on=on))
        self._resume(channel)
        if log.durable:
            # What a runner was never told on a lost connection may be trimmed at its side.
            self._ack(channel)
        if log.followed:
            log.on_watch(True)

    def data(self, frame: bytes) -> None:
        """Take a binary frame. Raises RemoteError for what no runner may send, StoreFailed when the disk refuses."""
        number, offset, data, goes_on = decode_data(frame)
        self._take(len(data))
        channel = self._channels.get(number)
        if channel is None:
            raise _broken("data on a channel that is not open")
        log, stop = channel.log, offset + len(data)
        if stop > channel.credit:
            raise _broken("data beyond the credit")
        if offset > log.end:
            if not channel.jumped:
                channel.jumped = True
                self._resume(channel)
            return
        if stop <= log.end:
            return
        channel.jumped = False
        view = memoryview(data)
        log.append(view[log.end - offset :] if offset < log.end else view, goes_on=goes_on)
        self._store.wrote(log)
        channel.received += len(data)
        if channel.received >= FLOOD_WINDOWS * channel.window:
            channel.grow()
        if log.end + channel.window - channel.credit >= channel.window // 2:
            self._ack(channel)

    def blocked(self, message: Blocked) -> None:
        """The runner has more than it may send: the window grows, unless a grant was on its way."""
        channel = self._known(message.channel)
        if message.credit >= channel.credit - channel.window // 2:
            channel.grow()
            self._ack(channel)

    def gap(self, message: Gap) -> None:
        """Bytes that exist nowhere: the end moves, and so does the credit."""
        channel = self._known(message.channel)
        if message.end > LOG_END_MAX:
            raise _broken("no log is that long")
        if message.start > channel.log.end:
            self._resume(channel)
            return
        channel.log.gap(message.end)
        channel.jumped = False
        self._store.wrote(channel.log)
        self._ack(channel)

    def closed(self, message: LogClosed) -> None:
        """The runner's log ends here: it is complete when everything came and is durable."""
        channel = self._known(message.channel)
        log = channel.log
        if log.complete:
            self._ack(channel)
            return
        log.close(message.end)
        self._store.wrote(log)

    def release(self) -> None:
        """The session ends: the logs go back, and nobody is told any more."""
        for number in list(self._channels):
            self._release(number)

    def _take(self, size: int) -> None:
        """Of what all channels together may send; renewed when half of it was used."""
        self._received += size
        if self._received > self._granted:
            raise _broken("data beyond the connection's credit")
        if self._granted - self._received <= CONNECTION_WINDOW_BYTES // 2:
            self._granted = self._received + CONNECTION_WINDOW_BYTES
            self._say(Credit(total=self._granted))

    def _known(self, number: int) -> _Channel:
        channel = self._channels.get(number)
        if channel is None:
            raise _broken("a channel that is not open")
        return channel

    def _resume(self, channel: _Channel) -> None:
        channel.credit = max(channel.credit, channel.log.end + channel.window)
        self._say(Resume(channel=channel.number, offset=channel.log.whole, credit=channel.credit))

    def _again(self, channel: _Channel) -> None:
        """What is under way lies ahead of where the log is now: it is dropped, as after a jump."""
        channel.jumped = True
        self._resume(channel)

    def _ack(self, channel: _Channel) -> None:
        channel.credit = max(channel.credit, channel.log.end + channel.window)
        self._say(Ack(channel=channel.number, offset=channel.log.durable, credit=channel.credit))

    def _release(self, number: int) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            channel.log.heard = channel.log.lost = channel.log.on_watch = None
            self._store.give_back(channel.log)


def _broken(detail: str) -> RemoteError:
    return RemoteError(Reason.BAD_FRAME, detail, CloseCode.BAD_FRAME)
