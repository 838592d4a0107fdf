"""The control socket: the owner of the machine asks the daemon, and only the owner (or root) is answered.

One JSON line `{"verb", "args"}` asks, one JSON line `{"ok"}` or `{"error": {"reason", "detail"}}` answers, and the connection ends.
Everything is bounded: the line, the connections, the time of each. What a verb means is decided by the daemon, not here.
"""

import json
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio
from anyio.abc import SocketAttribute, SocketStream, TaskStatus

from protocol.errors import Reason
from protocol.limits import DETAIL_CHARS_MAX
from runner.adapters.control_client import (
    ANSWER_BYTES_MAX,
    REQUEST_BYTES_MAX,
    ControlUnavailable,
    call_control,
    peer_of,
    reachable,
    trusted,
)
from runner.errors import AnotherDaemon, ConfigError, Refused, RunnerError

CONNECTIONS_MAX: Final = 16
"""Askers at a time: a person with a few terminals and a monitor; the next one is told to come again."""
EXCHANGE_TIMEOUT_S: Final = 10.0
"""One question and its answer: longer than the daemon's slowest verb, short enough that a silent asker frees its place."""
SOCKET_MODE: Final = 0o600


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlCall:
    """A question of a process of this user, or of root."""

    verb: str
    args: Mapping[str, Any]
    uid: int
    pid: int


AnswerCall = Callable[[ControlCall], Awaitable[dict[str, Any]]]


async def serve_control(
    path: Path, answer: AnswerCall, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
) -> None:
    """Answer on `path` until cancelled; then the socket file is gone. A file left by a dead daemon is replaced.

    Raises:
        AnotherDaemon: a living process answers there.
        ConfigError: the directory is open to others.
        OSError: the directory cannot be had or the socket not be made.
    """
    _private_directory(path.parent)
    _refuse_where_answered(path)
    prepared = path.with_name(f".{path.name}.{os.getpid()}")
    with reachable(prepared) as name:
        listener = await anyio.create_unix_listener(name, mode=SOCKET_MODE, backlog=CONNECTIONS_MAX)
    async with listener:
        # Under its real name it appears complete: with its mode, and listening.
        made = prepared.stat().st_ino
        prepared.replace(path)
        slots = anyio.CapacityLimiter(CONNECTIONS_MAX)
        task_status.started()
        try:
            await listener.serve(lambda stream: _exchange(stream, answer, slots))
        finally:
            _unlink_own(path, made)


def _private_directory(directory: Path) -> None:
    """A socket's own mode counts for connecting, but only its directory keeps others from putting another one in its place."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 or not trusted(found.st_uid):
        raise ConfigError(
            str(directory), "", f"a directory of this user with mode 0700 (it has {mode:04o}): chmod 700 {directory}"
        )


def _refuse_where_answered(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(f"{path} is there and is no socket")
    with reachable(path) as name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(name)
        except OSError:
            return
        raise AnotherDaemon(peer_of(probe)[0], str(path))


def _unlink_own(path: Path, inode: int) -> None:
    """Another daemon may have put its own socket there by now."""
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        pass


async def _exchange(stream: SocketStream, answer: AnswerCall, slots: anyio.CapacityLimiter) -> None:
    async with stream:
        try:
            with anyio.move_on_after(EXCHANGE_TIMEOUT_S):
                await stream.send(await _answer(stream, answer, slots))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return  # the asker left


async def _answer(stream: SocketStream, answer: AnswerCall, slots: anyio.CapacityLimiter) -> bytes:
    pid, uid = peer_of(stream.extra(SocketAttribute.raw_socket))  # noqa: S610 - no Django here
    if not trusted(uid):
        return _error(Reason.POLICY_DENIED, "the control socket answers its owner and root")
    try:
        slots.acquire_nowait()
    except anyio.WouldBlock:
        return _error(Reason.CAPACITY, f"{CONNECTIONS_MAX} questions are being answered; ask again")
    try:
        line = await _line(stream)
        result = await answer(_call(line, uid, pid))
        encoded = json.dumps({"ok": result}).encode() + b"\n"
    except RunnerError as exc:
        return _error(exc.reason, exc.detail)
    except Exception as exc:
        # A question must not end the daemon that looks after living attempts; whoever asked sees that it failed.
        return _error(Reason.INFRA, f"the daemon could not answer: {type(exc).__name__}")
    finally:
        slots.release()
    if len(encoded) > ANSWER_BYTES_MAX:
        return _error(Reason.CAPACITY, f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
    return encoded


async def _line(stream: SocketStream) -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        try:
            line += await stream.receive(REQUEST_BYTES_MAX)
        except anyio.EndOfStream:
            raise Refused(Reason.BAD_FRAME, "the request ends without a newline") from None
        if len(line) > REQUEST_BYTES_MAX:
            raise Refused(Reason.BAD_FRAME, f"a request holds at most {REQUEST_BYTES_MAX} bytes")
    return bytes(line)


def _call(line: bytes, uid: int, pid: int) -> ControlCall:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise Refused(Reason.BAD_FRAME, "the request is not one JSON line") from None
    if not isinstance(request, dict) or request.keys() != {"verb", "args"}:
        raise Refused(Reason.BAD_FRAME, "a request is an object of verb and args")
    verb, args = request["verb"], request["args"]
    if not isinstance(verb, str) or not isinstance(args, dict):
        raise Refused(Reason.BAD_FRAME, "verb is a text and args an object")
    return ControlCall(verb=verb, args=args, uid=uid, pid=pid)


def _error(reason: Reason, detail: str) -> bytes:
    return json.dumps({"error": {"reason": reason.value, "detail": detail[:DETAIL_CHARS_MAX]}}).encode() + b"\n"


__all__ = [
    "CONNECTIONS_MAX",
    "EXCHANGE_TIMEOUT_S",
    "ControlCall",
    "ControlUnavailable",
    "call_control",
    "serve_control",
]
