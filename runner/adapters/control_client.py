"""The asking side of the control socket, without an event loop: what `runner status`, `ps` and `stop` use.

One JSON line asks, one JSON line answers, and the connection ends. The socket is reached through its directory, because a socket
address holds 107 bytes and a path may be longer.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from protocol.errors import Reason
from runner.errors import Broken, Refused

REQUEST_BYTES_MAX: Final = 64 * 1024
"""One request line: a verb and a few ids; more is no request of ours."""
ANSWER_BYTES_MAX: Final = 8 * 1024 * 1024
"""One answer line: `ps` shows every attempt with its arguments, which are bounded, but not to one line of a screen."""
_READ_BYTES: Final = 64 * 1024
_PEER: Final = struct.Struct("=iII")


class ControlUnavailable(Broken):
    """Nobody answers on the control socket: the daemon is down, or stuck."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.INFRA, detail)


def call_control(path: Path, verb: str, args: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    """Ask the daemon and wait for its answer at most `timeout_s`.

    Raises:
        ControlUnavailable: nobody answered in time, or what answered is no daemon of this user.
        Refused: the daemon said no; `reason` and `detail` are its own.
    """
    request = json.dumps({"verb": verb, "args": dict(args)}).encode() + b"\n"
    if len(request) > REQUEST_BYTES_MAX:
        raise Refused(Reason.BAD_ARGS, f"a request holds at most {REQUEST_BYTES_MAX} bytes")
    try:
        answer = _ask(path, request, timeout_s)
    except FileNotFoundError:
        raise ControlUnavailable(f"no daemon listens on {path}") from None
    except OSError as exc:
        raise ControlUnavailable(f"no daemon answers on {path}: {exc.strerror or 'it took too long'}") from exc
    return _read_answer(path, answer)


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A short name for `path` while the context lasts. Raises OSError where its directory cannot be opened."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Process id and user id of the other side, as the kernel knows them."""
    pid, uid, _gid = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return pid, uid


def trusted(uid: int) -> bool:
    """Whether a peer's user may ask, or be believed: our own user, or root."""
    return uid in (0, os.geteuid())


def _ask(path: Path, request: bytes, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    with reachable(path) as name, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(name)
        if not trusted(peer_of(connection)[1]):
            raise ControlUnavailable(f"{path} belongs to another user")
        with contextlib.suppress(BrokenPipeError):  # refused before it was read: the answer is there all the same
            connection.sendall(request)
        answer = bytearray()
        while not answer.endswith(b"\n") and len(answer) <= ANSWER_BYTES_MAX:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(_READ_BYTES)
            if not piece:
                break
            answer += piece
        return bytes(answer)


def _read_answer(path: Path, line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if "error" in answer:
            error = answer["error"]
            raise Refused(_reason(error["reason"]), str(error["detail"]))
        result = answer["ok"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ControlUnavailable(f"what answered on {path} is no daemon of this version") from None
    if not isinstance(result, dict):
        raise ControlUnavailable(f"what answered on {path} is no daemon of this version")
    return result


def _reason(text: object) -> Reason:
    return Reason(text) if isinstance(text, str) and text in Reason.__members__ else Reason.INFRA
