"""The fork server: hands out one forked shim for each request on a SOCK_SEQPACKET socket, and knows nothing else.

It has no threads, so a fork is safe; it freezes its heap before serving, so shims share it. Its death, restart or
upgrade does not touch a running shim. It never reads an attempt's files.
"""

from __future__ import annotations

import _socket
import _struct
import errno
import gc
import posix as os

from runner.shim import birth, rehearsal, system
from runner.shim.system import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LOCKS_MAX: Final = 4
FDS_MAX: Final = 2 + LOCKS_MAX
OP_FORK: Final = 1
REQUEST_BYTES_MAX: Final = 64
_INT_BYTES: Final = 4
_ANCILLARY: Final = _socket.CMSG_SPACE(FDS_MAX * _INT_BYTES)
_CLOEXEC: Final = _socket.MSG_CMSG_CLOEXEC
_REQUEST: Final = _struct.Struct("<IBB")
_REPLY: Final = _struct.Struct("<Ii")


def serve(socket_fd: int) -> int:
    """Serve requests on `socket_fd` until its other end is closed; returns the exit status.

    In a forked shim this never returns: the shim leaves through `os._exit`.
    """
    system.close_all_but([socket_fd])
    warm = system.Warm()
    rehearsal.rehearse(warm, [socket_fd])
    # The kernel reaps shims: nobody waits for them here, their status is in their files.
    signals.signal(signals.SIGCHLD, signals.SIG_IGN)
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    sock = _socket.socket(fileno=socket_fd)
    gc.collect()
    gc.disable()
    gc.freeze()
    server = _Server(sock, warm)
    while True:
        try:
            request, ancillary, _flags, _address = sock.recvmsg(REQUEST_BYTES_MAX, _ANCILLARY, _CLOEXEC)
        except ConnectionError:
            return 0
        if not request:
            return 0
        fds = _descriptors(ancillary)
        reply = server.answer(request, fds)
        for fd in fds:
            os.close(fd)
        if reply is not None:
            try:
                sock.send(reply)
            except OSError:
                return 0
        # Behind the reply: the next request finds its shim already forked.
        server.keep_spare()


class _Server:
    """One shim is always forked ahead and waits for its attempt, so a request does not wait for a fork."""

    def __init__(self, sock: _socket.socket, warm: system.Warm) -> None:
        self._sock = sock
        self._warm = warm
        self._spare: tuple[int, _socket.socket] | None = None
        self.keep_spare()

    def answer(self, request: bytes, fds: list[int]) -> bytes | None:
        """The reply to one request, None for what cannot even be answered."""
        if len(request) < _REQUEST.size:
            return None
        number, op, lock_count = _REQUEST.unpack_from(request)
        if op != OP_FORK:
            return _REPLY.pack(number, -errno.EOPNOTSUPP)
        if lock_count > LOCKS_MAX or len(fds) != 2 + lock_count:
            return _REPLY.pack(number, -errno.EINVAL)
        try:
            return _REPLY.pack(number, self._hand_over(fds))
        except OSError as exc:
            return _REPLY.pack(number, -(exc.errno or errno.EAGAIN))

    def keep_spare(self) -> None:
        """Fork the next shim unless one waits; a fork that fails now is tried again for the next request."""
        if self._spare is None:
            try:
                self._spare = self._fork()
            except OSError:
                return

    def _hand_over(self, fds: list[int]) -> int:
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _struct.pack(f"<{len(fds)}i", *fds))]
        for spare in (self._spare, None):
            pid, door = spare if spare is not None else self._fork()
            self._spare = None
            try:
                door.sendmsg([b"go"], rights)
            except ConnectionError:
                continue  # somebody killed the spare: the next is fresh
            finally:
                door.close()
            return pid
        raise OSError(errno.EAGAIN, "forked shims die before they are used")

    def _fork(self) -> tuple[int, _socket.socket]:
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._sock.close()
                ours.close()
                status = _wait_for_attempt(theirs, self._warm)
            finally:
                os._exit(status)
        theirs.close()
        return pid, ours


def _wait_for_attempt(door: _socket.socket, warm: system.Warm) -> int:
    birth.settle()
    _go, ancillary, _flags, _address = door.recvmsg(REQUEST_BYTES_MAX, _ANCILLARY, _CLOEXEC)
    door.close()
    fds = _descriptors(ancillary)
    if len(fds) < 2:
        return 0  # the fork server has ended
    return birth.main(fds[0], fds[1], fds[2:], warm)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            count = len(data) // _INT_BYTES
            fds.extend(_struct.unpack_from(f"<{count}i", data))
    return fds
