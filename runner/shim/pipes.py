"""The child's pipes in the guard's poll: output that is copied or made to wait, stdin that is fed as it is read."""

from __future__ import annotations

import posix as os
import select

from runner.shim import child, feed, records, spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

    from runner.shim.output import Log

_KINDS: Final = {1: records.STDOUT, 2: records.STDERR, spec.EVENTS_FD: records.EVENT}


class Pipes:
    """Our ends of the pipes of one child; `open` is the kind of record by descriptor of its output."""

    def __init__(self, poll: select.poll) -> None:
        self.open: dict[int, int] = {}
        self.stdin = feed.Feed()
        self.held = False  # the writer waits: nothing is read
        self._poll = poll
        self._small: set[int] = set()
        self._watched = -1

    def begin(self, started: child.Child) -> None:
        """Watch the output of a child that runs."""
        for target, fd in started.outputs.items():
            self.open[fd] = _KINDS[target]
            self._small.add(fd)
            self._poll.register(fd, select.POLLIN)
        if started.stdin_fd >= 0:
            self.stdin.fd = started.stdin_fd
        else:
            self.stdin.close()
        self.watch_stdin()

    def copy(self, log: Log, fd: int, unix_ns: int, now_ms: int) -> int:
        """One read of `fd` into the log: its bytes, 0 at its end, -1 when it is empty."""
        count = log.copy(fd, self.open[fd], unix_ns, now_ms)
        if count >= records.PAYLOAD_MAX and fd in self._small:
            self._small.discard(fd)
            child.enlarge_pipe(fd)
        elif count == 0:
            self.close(fd)
        return count

    def hold(self, held: bool) -> None:
        """Let the writer wait, or read on."""
        if held == self.held:
            return
        self.held = held
        for fd in self.open:
            if held:
                self._poll.unregister(fd)
            else:
                self._poll.register(fd, select.POLLIN)

    def watch_stdin(self) -> None:
        """Look at stdin's pipe for as long as there is something for it: its descriptor may be closed by now."""
        wanted = self.stdin.fd if self.stdin.waiting else -1
        if wanted == self._watched:
            return
        if self._watched >= 0:
            self._poll.unregister(self._watched)
        self._watched = wanted
        if wanted >= 0:
            self._poll.register(wanted, select.POLLOUT)

    def feed(self) -> bool:
        """Write to stdin what it takes; whether the daemon has to be told."""
        told = self.stdin.write()
        self.watch_stdin()
        return told

    def close(self, fd: int) -> None:
        """Give one output back."""
        del self.open[fd]
        self._small.discard(fd)
        if not self.held:
            self._poll.unregister(fd)
        os.close(fd)

    def close_all(self) -> None:
        """Give all of them back."""
        for fd in list(self.open):
            self.close(fd)
        self.close_stdin()

    def close_stdin(self) -> None:
        """Nobody reads it any more."""
        self.stdin.close()
        self.watch_stdin()
