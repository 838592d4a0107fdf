"""What the child reads and writes in the guard's poll: pipes or a terminal, copied or made to wait, fed as they are read."""

from __future__ import annotations

import posix as os
import select

from runner.shim import child, feed, files, modes, records, spec
from runner.shim.terminal import Terminal, ahead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.output import Log

_KINDS: Final = {1: records.STDOUT, 2: records.STDERR, spec.EVENTS_FD: records.EVENT}
_HUNG_UP: Final = select.POLLHUP | select.POLLERR


class Pipes:
    """Our ends of one child's pipes or terminal; `open` is the kind of record by descriptor of its output."""

    def __init__(self, poll: select.poll) -> None:
        self.open: dict[int, int] = {}
        self.stdin = feed.Feed()
        self.terminal: Terminal | None = None
        self.held = False  # the writer waits: nothing is read
        self._modes = modes.Modes()
        self._poll = poll
        self._small: set[int] = set()
        self._masks: dict[int, int] = {}

    def begin(self, started: child.Child, tty: spec.Tty | None) -> None:
        """Watch the output of a child that runs."""
        for target, fd in started.outputs.items():
            self.open[fd] = _KINDS[target]
            self._small.add(fd)
        if tty is not None:
            self.terminal = Terminal(started.master_fd, tty)
            self.open[started.master_fd] = records.PTY
        self.stdin.fd = started.stdin_fd
        if started.stdin_fd < 0:
            self.stdin.close()
        self.watch()

    def preface(self, unix_ns: int) -> bytes:
        """What each segment of a terminal's log begins with: its size, and the modes that hold."""
        assert self.terminal is not None
        size = records.resize_record(self.terminal.rows, self.terminal.cols, unix_ns)
        marker = files.encode(self._modes.told()).encode("ascii")
        return size + records.pack_record(records.MARKER, marker, unix_ns)

    def copy(self, log: Log, fd: int, unix_ns: int, now_ms: int) -> int:
        """One read of `fd` into the log: its bytes, 0 at its end, -1 when it is empty."""
        if self.terminal is not None:
            told = log.gather(fd, unix_ns, now_ms)
            if told is None:
                return -1
            self._modes.feed(told)
            count = len(told)
        else:
            count = log.copy(fd, self.open[fd], unix_ns, now_ms)
        if count >= records.PAYLOAD_MAX and fd in self._small:
            self._small.discard(fd)
            child.enlarge_pipe(fd)
        elif count == 0:
            self.close(fd)
        return count

    def hold(self, held: bool) -> None:
        """Let the writer wait, or read on."""
        self.held = held
        self.watch()

    def pace(self, end: int, seen: list[int]) -> None:
        """Let a program wait that ran ahead of those who look at its terminal."""
        if self.terminal is not None:
            self.hold(ahead(end, seen, held=self.held))

    def watch(self) -> None:
        """Look at each descriptor for what there is to do with it, and at no other; right behind whatever closed one."""
        wanted = {} if self.held else dict.fromkeys(self.open, select.POLLIN)
        if self.stdin.fd >= 0 and self.stdin.waiting:
            wanted[self.stdin.fd] = select.POLLOUT
        if self.terminal is not None and self.terminal.waiting:
            wanted[self.terminal.fd] = wanted.get(self.terminal.fd, 0) | select.POLLOUT
        if wanted == self._masks:
            return
        for fd in self._masks.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, mask in wanted.items():
            if self._masks.get(fd) != mask:
                self._poll.register(fd, mask)
        self._masks = wanted

    def feed(self) -> bool:
        """Write to stdin what it takes; whether the daemon has to be told."""
        told = self.stdin.write()
        self.watch()
        return told

    def typed(self, event: int) -> list[bytes]:
        """The terminal takes more (or is hung up); the viewers that have to be told that there is room again."""
        assert self.terminal is not None
        if event & (select.POLLOUT | _HUNG_UP) and self.terminal.waiting:
            self.terminal.write()
            self.watch()
        return self.terminal.eased()

    def close(self, fd: int) -> None:
        """Give one output back."""
        del self.open[fd]
        self._small.discard(fd)
        if self.terminal is not None:
            self.terminal.close()
        else:
            os.close(fd)
        self.watch()

    def close_all(self) -> None:
        """Give all of them back."""
        for fd in list(self.open):
            self.close(fd)
        self.close_stdin()

    def close_stdin(self) -> None:
        """Nobody reads it any more."""
        self.stdin.close()
        self.watch()
