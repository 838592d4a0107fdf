"""
The fork server: forks one shim for each request on a SOCK_SEQPACKET socket, and knows nothing else.

It has no threads, so a fork is safe; it freezes its heap before serving, so shims share it. Its death, restart or
upgrade does not touch a running shim. It never reads an attempt's files.
"""

from __future__ import annotations

import _signal
import _socket
import _struct
import errno
import gc
import os

from runner.shim import guard, system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

LOCKS_MAX: Final = 4
FDS_MAX: Final = 2 + LOCKS_MAX
OP_FORK: Final = 1
REQUEST_BYTES_MAX: Final = 64
_INT_BYTES: Final = 4


def serve(socket_fd: int) -> int:
    """
    Serve requests on `socket_fd` until its other end is closed; returns the exit status.

    In a forked shim this never returns: the shim leaves through `os._exit`.
    """
    system.close_all_but([socket_fd])
    # The kernel reaps shims: nobody waits for them here, their status is in their files.
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    sock = _socket.socket(fileno=socket_fd)
    warm = system.Warm()
    gc.collect()
    gc.disable()
    gc.freeze()
    while True:
        try:
            request, ancillary, _flags, _address = sock.recvmsg(
                REQUEST_BYTES_MAX, _socket.CMSG_SPACE(FDS_MAX * _INT_BYTES), _socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            return 0
        if not request:
            return 0
        fds = _descriptors(ancillary)
        reply = _answer(request, fds, warm)
        for fd in fds:
            os.close(fd)
        if reply is not None:
            try:
                sock.send(reply)
            except OSError:
                return 0


def _answer(request: bytes, fds: list[int], warm: system.Warm) -> bytes | None:
    if len(request) < 6:
        return None
    number, op, lock_count = _struct.unpack_from("<IBB", request)
    if op != OP_FORK:
        return _struct.pack("<Ii", number, -errno.EOPNOTSUPP)
    if lock_count > LOCKS_MAX or len(fds) != 2 + lock_count:
        return _struct.pack("<Ii", number, -errno.EINVAL)
    try:
        pid = os.fork()
    except OSError as exc:
        return _struct.pack("<Ii", number, -(exc.errno or errno.EAGAIN))
    if pid == 0:
        status = 1
        try:
            status = guard.main(fds[0], fds[1], fds[2:], warm)
        finally:
            os._exit(status)
    return _struct.pack("<Ii", number, pid)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            count = len(data) // _INT_BYTES
            fds.extend(_struct.unpack_from(f"<{count}i", data))
    return fds
