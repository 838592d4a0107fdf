"""A small synchronous client of the shim: starts one through a real fork server or as its own process, and talks to it."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import runner
from runner.shim import records, wire
from runner.shim.system import boottime_ms as boottime_ms

ENTRY = Path(runner.__file__).parent / "shim" / "__main__.py"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
WAIT_S = 20.0
_numbers = itertools.count(1)


class ForkServer:
    """A real fork server of this interpreter."""

    def __init__(self, python: str = sys.executable) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(WAIT_S)
        actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 3)]
        argv = [python, "-I", "-S", str(ENTRY), "forkserver"]
        self.pid = os.posix_spawn(python, argv, os.environ, file_actions=actions)
        theirs.close()
        self.alive = True

    def fork(self, dirfd: int, controller: int, locks: list[int] | None = None) -> int:
        """Ask for one shim; returns its pid. Raises OSError with the server's errno."""
        locks = locks or []
        number = next(_numbers)
        socket.send_fds(self.sock, [struct.pack("<IBB", number, 1, len(locks))], [dirfd, controller, *locks])
        got, pid = struct.unpack("<Ii", self.sock.recv(64))
        assert got == number
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return int(pid)

    def kill(self) -> None:
        """Kill the server with SIGKILL and reap it."""
        if self.alive:
            self.alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        """Close the socket: the server ends by itself."""
        self.sock.close()
        if self.alive:
            self.alive = False
            os.waitpid(self.pid, 0)


class Connection:
    """One end of the shim's wire."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = bytearray()
        self.seen: list[tuple[int, bytes]] = []

    def send(self, kind: int, body: bytes = b"") -> None:
        """Send one frame."""
        self.sock.sendall(wire.pack(kind, body))

    def hello(self) -> None:
        """Say HELLO."""
        self.send(wire.HELLO, struct.pack("<HHQ", 1, 1, 7))

    def receive(self, wait_s: float = WAIT_S) -> tuple[int, bytes] | None:
        """The next frame, None at EOF. Raises TimeoutError."""
        while True:
            message = wire.take(self.inbox)
            if message is not None:
                self.seen.append(message)
                return message
            self.sock.settimeout(wait_s)
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self.inbox += data

    def wait(self, kind: int, wait_s: float = WAIT_S) -> bytes:
        """The body of the next frame of `kind`; other frames are skipped."""
        while True:
            message = self.receive(wait_s)
            assert message is not None, f"EOF before {kind}"
            if message[0] == kind:
                return message[1]

    def close(self) -> None:
        """Close this end."""
        self.sock.close()


class Shim:
    """One shim over a directory of its own, with its controller connection."""

    def __init__(
        self,
        root: Path,
        server: ForkServer | None,
        *,
        locks: list[int] | None = None,
        write_spec: bool = True,
        python: str = sys.executable,
        entry: Path = ENTRY,
        owner: int | None = None,
        **spec: Any,
    ) -> None:
        self.attempt = f"ex_{next(_numbers)}.1"
        self.dir = root / self.attempt
        self.dir.mkdir(mode=0o700)
        self.spec = default_spec(self.attempt) | spec
        if write_spec:
            (self.dir / "spec.json").write_text(json.dumps(self.spec))
        if owner is not None:
            for path in (self.dir, *self.dir.iterdir()):
                os.chown(path, owner, owner)
        ours, theirs = socket.socketpair()
        self.controller = Connection(ours)
        self._opened: list[socket.socket] = []
        dirfd = os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY)
        self.requested = time.perf_counter()
        if server is not None:
            self.pid = server.fork(dirfd, theirs.fileno(), locks)
        else:
            self.pid = self._start_alone(python, entry, [dirfd, theirs.fileno(), *(locks or [])])
        self.pidfd = os.pidfd_open(self.pid)
        os.close(dirfd)
        theirs.close()
        self._alone = server is None

    def _start_alone(self, python: str, entry: Path, fds: list[int]) -> int:
        # Moved out of the way first, or one dup2 would overwrite the source of the next.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 200) for fd in fds]
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, fd, 3 + at) for at, fd in enumerate(high)]
        argv = [python, "-I", "-S", str(entry), "shim"]
        try:
            return os.posix_spawn(python, argv, os.environ, file_actions=actions)
        finally:
            for fd in high:
                os.close(fd)

    def release(self, secrets: dict[str, bytes] | None = None) -> None:
        """Release the attempt with its secrets."""
        body = {name: base64.b64encode(value).decode() for name, value in (secrets or {}).items()}
        self.controller.send(wire.RELEASE, json.dumps(body).encode())

    def start(self, secrets: dict[str, bytes] | None = None) -> int:
        """Release and wait for STARTED; returns the child's pid."""
        self.release(secrets)
        return int(struct.unpack_from("<IQQ", self.controller.wait(wire.STARTED))[0])

    def stop(self, grace_ms: int = 300, who: str = "tester") -> None:
        """Send STOP on the controller."""
        self.controller.send(wire.STOP, struct.pack("<I", grace_ms) + who.encode())

    def exit(self, wait_s: float = WAIT_S) -> dict[str, Any]:
        """The body of EXIT from the controller."""
        return dict(json.loads(self.controller.wait(wire.EXIT, wait_s)))

    def run(self, secrets: dict[str, bytes] | None = None) -> dict[str, Any]:
        """Release and wait for the end."""
        self.release(secrets)
        return self.exit()

    def connect(self) -> Connection:
        """Connect to `s` (without HELLO)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until = time.monotonic() + WAIT_S
        while True:
            try:
                sock.connect(str(self.dir / "s"))
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < until, "nobody listens on s"
                time.sleep(0.005)
            else:
                self._opened.append(sock)
                return Connection(sock)

    def exit_file(self) -> dict[str, Any]:
        """`exit.json`, waited for."""
        wait_for(lambda: (self.dir / "exit.json").exists(), "exit.json")
        return dict(json.loads((self.dir / "exit.json").read_text()))

    def meta(self) -> dict[str, Any]:
        """`meta.json` as it is now."""
        return dict(json.loads((self.dir / "meta.json").read_text()))

    def wait_gone(self, wait_s: float = WAIT_S) -> None:
        """Wait until the shim has ended."""
        ready, _, _ = select.select([self.pidfd], [], [], wait_s)
        assert ready, "the shim still lives"

    def log(self) -> Log:
        """The log, read and checked."""
        return read_log(self.dir / "log", self.attempt.encode())

    def wait_log(self, condition: Callable[[Log], object], what: str) -> None:
        """Wait until the log, which may be growing while it is read, fulfils a condition."""

        def holds() -> object:
            try:
                return condition(self.log())
            except (AssertionError, ValueError, struct.error):
                return False  # a record was read before it was written whole

        wait_for(holds, what)

    def close(self) -> None:
        """Let the shim go; kill it, and what it guards, when it does not."""
        for sock in self._opened:
            sock.close()
        with contextlib.suppress(OSError):
            self.controller.send(wire.STOP, struct.pack("<I", 0) + b"cleanup")
            self.controller.send(wire.COLLECTED)
        self.controller.close()
        if not select.select([self.pidfd], [], [], 0.3)[0]:
            self._end()
        os.close(self.pidfd)
        if self._alone:
            os.waitpid(self.pid, 0)

    def _end(self) -> None:
        with contextlib.suppress(OSError, AssertionError, TimeoutError):
            connection = Connection(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                connection.sock.connect(str(self.dir / "s"))
                connection.hello()
                connection.send(wire.STOP, struct.pack("<I", 0) + b"cleanup")
                connection.wait(wire.EXIT, 8)
                connection.send(wire.COLLECTED)
                select.select([self.pidfd], [], [], 2)
            finally:
                connection.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


class Log:
    """A log as read back: payload of each stream, records, holes, segments."""

    def __init__(self) -> None:
        self.streams = {records.STDOUT: b"", records.STDERR: b"", records.EVENT: b"", records.PTY: b""}
        self.sizes: list[tuple[int, int]] = []
        """Rows and columns of a terminal, as they are told."""
        self.markers: list[dict[str, Any]] = []
        self.kinds: list[int] = []
        self.exit: dict[str, Any] = {}
        self.holes: list[tuple[int, int]] = []
        self.joints: list[tuple[bytes, bytes]] = []
        """At each hole that swallowed segments: the digest in front of it, and the one that the segment behind it names."""
        self.segments: list[tuple[int, int]] = []
        self.end = 0
        self.chain = ""

    @property
    def stdout(self) -> bytes:
        """What was kept of stdout."""
        return self.streams[records.STDOUT]

    @property
    def pty(self) -> bytes:
        """What was kept of a terminal's output."""
        return self.streams[records.PTY]

    @property
    def stderr(self) -> bytes:
        """What was kept of stderr."""
        return self.streams[records.STDERR]


def read_log(directory: Path, attempt: bytes) -> Log:
    """Read every segment, checking names, headers, the digest chain and that records are whole."""
    log = Log()
    previous = records.NO_DIGEST
    parts: dict[int, list[bytes]] = {kind: [] for kind in log.streams}
    for path in sorted(directory.glob("*.seg")):
        data = path.read_bytes()
        base = int(path.stem, 16)
        if base != log.end:
            log.holes.append((log.end, base))
        for at, kind, payload in split_records(data):
            if at == 0:
                assert kind == records.SEGMENT
                named = records.unpack_segment(payload)[1]
                if named != previous and base != log.end:
                    log.joints.append((previous, named))
                    previous = named
                assert records.unpack_segment(payload) == (base, previous, attempt)
            elif kind == records.EXIT:
                log.exit = json.loads(payload)
            elif kind == records.RESIZE:
                log.sizes.append(struct.unpack("<HH", payload))
            elif kind == records.MARKER:
                log.markers.append(json.loads(payload))
            else:
                parts[kind].append(payload)
            log.kinds.append(kind)
        previous = hashlib.sha256(data).digest()
        log.segments.append((base, len(data)))
        log.end = base + len(data)
    for kind, pieces in parts.items():
        log.streams[kind] = b"".join(pieces)
    log.chain = previous.hex()
    return log


def split_records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """`(position, kind, payload)` of each record; a torn one raises."""
    at = 0
    while at < len(data):
        length, kind, _unix_ns = records.unpack_header(data, at)
        payload = data[at + records.HEADER_BYTES : at + records.HEADER_BYTES + length]
        assert len(payload) == length, "torn record"
        yield at, kind, payload
        at += records.HEADER_BYTES + length


def default_spec(attempt: str) -> dict[str, Any]:
    """A spec that runs `true`."""
    return {
        "v": 1,
        "attempt": attempt,
        "cmd_id": "cmd_1",
        "argv": ["true"],
        "cwd": "/",
        "env": {"PATH": "/usr/local/bin:/usr/bin:/bin"},
        "secret_names": [],
        "cookie": f"rnr_test:{os.getpid()}:{attempt}",
        "timeout_ms": None,
        "grace_ms": 2000,
        "kill_wait_ms": 3000,
        "umask": 0o022,
        "rlimits": {},
        "segment_bytes": 8_388_608,
        "spool_bytes": 1_073_741_824,
        "boot_id": BOOT_ID,
        "lease": None,
    }


def wait_for(condition: Any, what: str, wait_s: float = WAIT_S) -> None:
    """Wait until `condition()` is true. Raises AssertionError that names `what`."""
    until = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
