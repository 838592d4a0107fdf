"""The fork server: a small process without threads that forks shims, so that the daemon never forks itself (docs/shim.md §5).

Where it cannot be had, or has died in the middle of a request, the same shim is started from scratch: slower and larger, otherwise alike.
"""

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import runner.shim
from protocol.errors import Reason
from runner.errors import Broken

REPLY_TIMEOUT_S: Final = 5.0
"""A fork takes a millisecond; a server that is silent for this long is gone."""
REPLY_BYTES: Final = 8
REQUESTS_MAX: Final = 4
"""Unanswered requests: they keep the server busy, and stay below the packets a kernel takes into a socket's queue (10)."""
_FIRST_FD: Final = 3
_REQUEST: Final = struct.Struct("<IBB")
_REPLY: Final = struct.Struct("<Ii")
_OP_FORK: Final = 1
_MAIN: Final = Path(runner.shim.__file__).with_name("__main__.py")
_ENV: Final = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}


class ForkServer:
    """Forks shims on request. `start` in a running event loop, `close` at the end; shims outlive it."""

    def __init__(self, lost: Callable[[str], None] = lambda _why: None) -> None:
        """`lost` hears why a server had to be replaced: that is never normal, and each time costs a slow start."""
        self._lost = lost
        self.pid: int | None = None
        self._socket: socket.socket | None = None
        self._replies: dict[int, asyncio.Future[int]] = {}
        self._serial = 0
        self._room = asyncio.Semaphore(REQUESTS_MAX)
        self._children: list[int] = []
        """Processes we started and have not reaped yet: servers that went, and shims started without one."""

    def start(self) -> None:
        """Start the server process. Raises Broken."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self.pid = _spawn("forkserver", [theirs.fileno()])
        except OSError as exc:
            ours.close()
            raise Broken(Reason.INFRA, "the fork server does not start") from exc
        finally:
            theirs.close()
        self._children.append(self.pid)
        ours.setblocking(False)
        self._socket = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable)

    async def fork(self, dirfd: int, controller: int, locks: Sequence[int] = ()) -> None:
        """Fork a shim that owns these fds (all stay open here). Raises Broken when not even the slow way works."""
        self._reap()
        async with self._room:
            asked = self._socket
            try:
                await self._request([dirfd, controller, *locks])
            except (OSError, TimeoutError) as exc:
                self._lost(type(exc).__name__)
                if self._socket is asked:
                    self.close()
                self._fallback([dirfd, controller, *locks])
                if self._socket is None:
                    # Else another request that failed with it has started the next one already.
                    with contextlib.suppress(Broken):
                        self.start()

    def close(self) -> None:
        """Let the server go; it exits when it sees the end of its socket."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for waiting in self._replies.values():
            if not waiting.done():
                waiting.set_exception(OSError("the fork server is gone"))
        self._replies.clear()
        self.pid = None
        self._reap()

    def _reap(self) -> None:
        """Without this they would stay zombies until the daemon ends; nobody needs their status."""
        self._children = [pid for pid in self._children if not _ended(pid)]

    async def _request(self, fds: Sequence[int]) -> None:
        if self._socket is None:
            raise OSError("no fork server")
        serial = self._serial = (self._serial + 1) & 0xFFFFFFFF
        reply = asyncio.get_running_loop().create_future()
        self._replies[serial] = reply
        try:
            request = _REQUEST.pack(serial, _OP_FORK, len(fds) - 2)
            socket.send_fds(self._socket, [request], list(fds))
            result = await asyncio.wait_for(reply, REPLY_TIMEOUT_S)
        finally:
            self._replies.pop(serial, None)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _readable(self) -> None:
        assert self._socket is not None, "the reader is removed before the socket"
        try:
            message = self._socket.recv(REPLY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if len(message) != _REPLY.size:
            self.close()
            return
        serial, result = _REPLY.unpack(message)
        waiting = self._replies.get(serial)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)

    def _fallback(self, fds: Sequence[int]) -> None:
        try:
            self._children.append(_spawn("shim", fds))
        except OSError as exc:
            raise Broken(Reason.INFRA, "no shim can be started") from exc


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _spawn(role: str, fds: Sequence[int]) -> int:
    """Start the shim's file as a program of its own, with `fds` from 3 on and nothing else."""
    # The copies lie above every target, so that no DUP2 overwrites a source that is still needed.
    floor = _FIRST_FD + len(fds)
    copies = [_dup_above(fd, floor) for fd in fds]
    actions = [(os.POSIX_SPAWN_DUP2, copy, _FIRST_FD + index) for index, copy in enumerate(copies)]
    try:
        argv = [sys.executable, "-I", "-S", str(_MAIN), role]
        return os.posix_spawn(sys.executable, argv, _ENV, file_actions=actions)
    finally:
        for copy in copies:
            os.close(copy)


def _dup_above(fd: int, floor: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
