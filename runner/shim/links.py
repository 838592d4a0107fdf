"""The connections of a shim: the controller it was born with and the socket `s`.

Rule 1. The shim never waits for a daemon: a message goes out at once and whole, or its connection is dropped.
Rule 2. On `s` a daemon speaks first; the newest HELLO closes every older connection that was greeted. Only a RENEW
        needs no greeting and closes nobody: a daemon whose loop is stuck renews beside it.
Rule 3. A viewer's connection (VIEW) is no daemon's: it closes nobody, is closed for nobody, and commands nothing.
Rule 4. What a peer sends can close the peer's own connection and nothing else.
"""

from __future__ import annotations

import _socket
import _struct
import posix as os

from runner.shim import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

SOCKET_NAME: Final = "s"
SHIM_UMASK: Final = 0o077
SOCKET_UMASK: Final = 0o177
BACKLOG: Final = 8
# Connections that have not said HELLO: enough for daemons that race, too few to use up descriptors.
STRANGERS_MAX: Final = 8
# Connections of viewers on this machine; the oldest goes for a newer one.
VIEWERS_MAX: Final = 32
READ_BYTES: Final = 32_768


class Link:
    """One connection."""

    __slots__ = ("armed", "greeted", "inbox", "seen", "sock", "viewer")

    def __init__(self, sock: _socket.socket, *, greeted: bool) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.greeted = greeted
        self.viewer = False
        self.armed: int | None = None
        self.seen: int | None = None  # how far the foremost of those behind it that may type has followed
        self.inbox = bytearray()


class Links:
    """The controller, the listening socket and the connections made to it, by descriptor."""

    def __init__(self, controller_fd: int) -> None:
        self.by_fd: dict[int, Link] = {}
        self.controller: Link | None = Link(_socket.socket(fileno=controller_fd), greeted=True)
        self.by_fd[controller_fd] = self.controller
        self.listener: _socket.socket | None = None

    def listen(self, dirfd: int) -> int:
        """Bind and listen on `s` in the attempt's directory; returns the listening descriptor. Raises OSError."""
        if os.access(SOCKET_NAME, os.F_OK, dir_fd=dirfd, follow_symlinks=False):
            os.unlink(SOCKET_NAME, dir_fd=dirfd)
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK)
        os.umask(SOCKET_UMASK)
        try:
            # The path of a state directory may be longer than sun_path; the descriptor's never is.
            sock.bind(f"/proc/self/fd/{dirfd}/{SOCKET_NAME}")
        finally:
            os.umask(SHIM_UMASK)
        sock.listen(BACKLOG)
        self.listener = sock
        return sock.fileno()

    def accept(self) -> list[int]:
        """Take one waiting connection; returns the descriptors to watch (none for a peer of a foreign uid)."""
        assert self.listener is not None
        try:
            fd, _address = self.listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return []
        sock = _socket.socket(fileno=fd)
        if not allowed(sock, os.geteuid()):
            sock.close()
            return []
        strangers = [each for each in self.by_fd.values() if not (each.greeted or each.viewer)]
        if len(strangers) >= STRANGERS_MAX:
            self.close(strangers[0])
        self.by_fd[fd] = Link(sock, greeted=False)
        return [fd]

    def receive(self, link: Link) -> Iterator[tuple[int, bytes]]:
        """Yield the whole messages that have arrived; closes the link at EOF, on an error and on a broken frame."""
        try:
            data = link.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close(link)
            return
        link.inbox += data
        while self.holds(link):
            try:
                message = wire.take(link.inbox)
            except wire.WireError:
                self.close(link)
                return
            if message is None:
                return
            yield message

    def send(self, link: Link, frame: bytes) -> None:
        """Send a frame at once, or drop the link."""
        try:
            sent = link.sock.send(frame, _socket.MSG_NOSIGNAL)
        except OSError:
            sent = -1
        if sent != len(frame):
            self.close(link)

    def tell(self, frame: bytes) -> None:
        """Send a frame to everybody who was greeted, and to viewers."""
        for link in [link for link in self.by_fd.values() if link.greeted or link.viewer]:
            self.send(link, frame)

    def admit(self, link: Link) -> None:
        """From now on it is a viewer's."""
        viewers = [each for each in self.by_fd.values() if each.viewer]
        if len(viewers) >= VIEWERS_MAX:
            self.close(viewers[0])
        link.viewer = True

    def seen(self) -> list[int]:
        """How far viewers that may type have followed, as each connection told."""
        return [link.seen for link in self.by_fd.values() if link.seen is not None]

    def ring(self, end: int) -> None:
        """Ring the bell of every link that is armed below `end`, once."""
        for link in list(self.by_fd.values()):
            if link.armed is not None and end > link.armed:
                link.armed = None
                self.send(link, wire.pack_bell(end))

    def greeted(self) -> list[Link]:
        """The links whose daemon is known."""
        return [link for link in self.by_fd.values() if link.greeted]

    def displace(self, newest: Link, *, keep_controller: bool) -> None:
        """Close every greeted link but `newest`, and but the controller while it still holds the release."""
        for link in self.greeted():
            if link is not newest and not (keep_controller and link is self.controller):
                self.close(link)

    def holds(self, link: Link) -> bool:
        """Whether `link` is still open."""
        return link in self.by_fd.values()

    def close(self, link: Link) -> None:
        """Close a link; closing it twice is harmless."""
        if link is self.controller:
            self.controller = None
        if self.by_fd.pop(link.sock.fileno(), None) is not None:
            link.armed = None
            link.sock.close()


def allowed(sock: _socket.socket, uid: int) -> bool:
    """Whether the peer of `sock` runs as `uid` or root."""
    try:
        credentials = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    except OSError:
        return False
    _pid, peer, _gid = _struct.unpack("3i", credentials)
    return peer in (uid, 0)
