"""What output streaming is measured beside: a raw pipe, a raw loopback socket, OpenSSH and asyncssh, each with the same bytes.

Every way has its ends in processes of their own, so that each has its own CPU time and peak RSS. Where the bytes go is part of a way:
thrown away, or into a file on the disk that ours writes to, made durable before the clock stops.

`bench/peers.py server` and `bench/peers.py client` are the two ends of asyncssh; `bench/output.py` starts them.
"""

import asyncio
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.meter import Meter

START_S: Final = 20.0
"""For a server to listen, on a machine that is busy."""
CIPHER: Final = "aes128-gcm@openssh.com"
"""The quickest that all of them have; their default, ChaCha20, is half as quick."""
PIPE_READ_BYTES: Final = 256 * 1024
"""asyncssh's server is left far behind by its default of 8 KiB."""
SINK: Final = """
import os, sys
to = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if sys.argv[1] else -1
buffer, got = bytearray(1 << 18), 0
view = memoryview(buffer)
os.write(1, b"+")
while count := os.readv(0, [buffer]):
    got += count
    if to >= 0:
        os.write(to, view[:count])
if to >= 0:
    os.fdatasync(to)
os.write(1, str(got).encode())
"""
"""The far end of a pipe or a socket, as small as Python is."""


class PeerMissing(Exception):
    """A peer that this machine does not have; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Source:
    """A program, what it writes in all, and the digest of that."""

    name: str
    argv: tuple[str, ...]
    size: int
    sha256: str


# --- ways without a network ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class Raw:
    """A program into a pipe or a connected loopback socket; the other end is read by a process that does nothing else."""

    name: str
    home: Path
    durable: bool
    through_socket: bool
    roots: dict[int, str] = field(default_factory=dict)

    def carry(self, source: Source, meter: Meter) -> float:
        """Seconds until everything has arrived."""
        end, start = _loopback() if self.through_socket else os.pipe()
        to = str(self.home / "sink") if self.durable else ""
        argv = [sys.executable, "-I", "-S", "-c", SINK, to]
        with subprocess.Popen(argv, stdin=end, stdout=subprocess.PIPE) as sink:
            os.close(end)
            assert sink.stdout is not None and sink.stdout.read(1) == b"+", "the sink runs"
            meter.roots[sink.pid] = "sink"
            began = time.perf_counter()
            with subprocess.Popen(source.argv, stdout=start) as program:
                meter.roots[program.pid] = "source"
                os.close(start)
                got = int(sink.stdout.read())
            took = time.perf_counter() - began
        assert got == source.size, f"{self.name}: {got} of {source.size} bytes arrived"
        return took


def _loopback() -> tuple[int, int]:
    """The two ends of a TCP connection: where to read, where to write."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _address = server.accept()
    for one in (near, far):
        one.setblocking(True)
    return far.detach(), near.detach()


# --- OpenSSH ------------------------------------------------------------------------------------------------------


class Sshd:
    """A private sshd on a loopback port, with keys of its own, and a warm connection (ControlMaster) to it."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.port = port
        self.key = home / "key"
        self._made: list[Path] = []
        self._running: list[subprocess.Popen[bytes]] = []

    @property
    def pid(self) -> int:
        """Of the listener, whose children serve."""
        return self._running[0].pid

    @property
    def master(self) -> int:
        """The `ssh` that holds the connection and carries everybody's bytes."""
        return self._running[1].pid

    def argv(self, *command: str) -> list[str]:
        """`ssh` through the warm connection."""
        return ["ssh", "-F", f"{self.home}/ssh_config", "bench", *command]

    def start(self) -> None:
        """Start it and connect. Raises PeerMissing."""
        sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", ""))
        if sshd is None or shutil.which("ssh") is None:
            raise PeerMissing("no sshd is installed (apt-get install openssh-server)")
        self.home.mkdir()
        for name in ("host", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.home / name], check=True)
        (self.home / "authorized").write_bytes((self.home / "key.pub").read_bytes())
        (self.home / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.home}/host\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"AuthorizedKeysFile {self.home}/authorized\nMaxSessions 64\n"
            # What the account's shell reads at its start is not ssh's time.
            f"SetEnv HOME={self.home}\n"
        )
        (self.home / "ssh_config").write_text(
            f"Host bench\nHostName 127.0.0.1\nPort {self.port}\nUser {getpass.getuser()}\nIdentityFile {self.key}\n"
            f"Ciphers {CIPHER}\nIdentitiesOnly yes\nUserKnownHostsFile {self.home}/known\nStrictHostKeyChecking accept-new\n"
            f"LogLevel ERROR\nBatchMode yes\nControlPath {self.home}/control\nControlMaster no\n"
        )
        separation = Path("/run/sshd")
        if os.getuid() == 0 and not separation.exists():
            separation.mkdir(mode=0o755)
            self._made.append(separation)
        self._spawn("sshd", [sshd, "-D", "-e", "-f", f"{self.home}/sshd_config"])
        wait_for(lambda: _answers(self.port), "sshd")
        self._spawn("ssh", [*self.argv()[:3], "-M", "-N", "bench"])
        wait_for(lambda: (self.home / "control").exists(), "the connection to sshd")

    def close(self) -> None:
        """End what was started."""
        _end(reversed(self._running))
        for path in self._made:
            path.rmdir()

    def _spawn(self, name: str, argv: list[str]) -> None:
        with open(self.home / f"{name}.log", "wb") as log:
            self._running.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))


@dataclass(slots=True)
class Ssh:
    """`ssh bench PROGRAM > FILE` over the warm connection."""

    name: str
    home: Path
    durable: bool
    sshd: Sshd

    @property
    def roots(self) -> dict[int, str]:
        """Who is on the way."""
        return {self.sshd.pid: "sshd", self.sshd.master: "ssh master"}

    def carry(self, source: Source, meter: Meter) -> float:
        """Seconds until everything has arrived."""
        with open(self.home / "sink" if self.durable else os.devnull, "wb") as to:
            began = time.perf_counter()
            with subprocess.Popen(self.sshd.argv(*source.argv), stdout=to) as client:
                meter.roots[client.pid] = "ssh"
            assert client.returncode == 0, client.returncode
            if self.durable:
                os.fdatasync(to.fileno())
            took = time.perf_counter() - began
            assert not self.durable or os.fstat(to.fileno()).st_size == source.size, "ssh lost bytes"
        return took


# --- asyncssh -----------------------------------------------------------------------------------------------------


class AsyncsshServer:
    """A process with asyncssh's server: it pipes a local program's output, as asyncssh's documentation does."""

    def __init__(self, home: Path, port: int, sshd: Sshd) -> None:
        """Raises PeerMissing."""
        if find_spec("asyncssh") is None:
            raise PeerMissing("it is not installed (make bench installs lock/peers.txt)")
        self.port = port
        argv = [sys.executable, __file__, "server", str(port), str(sshd.home / "host"), str(sshd.home / "authorized")]
        with open(home / "asyncssh.log", "wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)
        try:
            wait_for(lambda: _answers(port), "its server")
        except PeerMissing:
            self.close()
            raise

    def close(self) -> None:
        """End it."""
        _end([self.process])


class Asyncssh:
    """asyncssh's client in a process of its own, on a warm connection to a server."""

    def __init__(self, name: str, home: Path, durable: bool, sshd: Sshd, port: int, server: dict[int, str]) -> None:
        self.name = name
        self.durable = durable
        self._to = str(home / "sink") if durable else ""
        argv = [sys.executable, __file__, "client", str(port), str(sshd.key)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._in, self._out = _pipes(self.process)
        if self._out.readline() != b"connected\n":
            self.close()
            raise PeerMissing("its client did not connect")
        self.roots = {**server, self.process.pid: "client"}

    def carry(self, source: Source, meter: Meter) -> float:
        """Seconds until everything has arrived."""
        began = time.perf_counter()
        self._in.write(json.dumps({"command": " ".join(source.argv), "to": self._to}).encode() + b"\n")
        self._in.flush()
        got = int(self._out.readline())
        took = time.perf_counter() - began
        assert got == source.size, f"{self.name}: {got} of {source.size} bytes arrived"
        return took

    def close(self) -> None:
        """End it."""
        _end([self.process])


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None and process.stdout is not None, "they are pipes"
    return process.stdin, process.stdout


async def _serve(port: int, host_key: str, authorized: str) -> None:
    import asyncssh

    async def handle(process: Any) -> None:
        program = await asyncio.create_subprocess_shell(f"exec {process.command}", stdout=subprocess.PIPE)
        await process.redirect(stdout=program.stdout, bufsize=PIPE_READ_BYTES)
        await process.stdout.drain()
        process.exit(await program.wait())

    await asyncssh.listen(
        "127.0.0.1", port, server_host_keys=[host_key], authorized_client_keys=authorized, process_factory=handle,
        encoding=None, encryption_algs=[CIPHER],
    )  # fmt: skip
    await asyncio.Event().wait()


async def _ask(port: int, key: str) -> None:
    """Runs the commands that come on stdin, and tells how many bytes of output each had."""
    import asyncssh

    class Count(asyncssh.SSHClientSession[bytes]):
        def __init__(self, fd: int) -> None:
            self.fd, self.got = fd, 0

        def data_received(self, data: bytes, datatype: Any) -> None:
            self.got += len(data)
            if self.fd >= 0:
                os.write(self.fd, data)

    async with asyncssh.connect(
        "127.0.0.1", port, client_keys=[key], known_hosts=None, config=None, encryption_algs=[CIPHER]
    ) as connection:
        print("connected", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            wanted = json.loads(line)
            to = os.open(wanted["to"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if wanted["to"] else -1
            channel, session = await connection.create_session(partial(Count, to), wanted["command"], encoding=None)
            await channel.wait_closed()
            if to >= 0:
                os.fdatasync(to)
                os.close(to)
            assert isinstance(session, Count), "it is the one that was made"
            print(session.got, flush=True)


# --- processes ----------------------------------------------------------------------------------------------------


def wait_for(holds: Callable[[], bool], what: str) -> None:
    """Ask again and again. Raises PeerMissing when it does not come."""
    ends = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > ends:
            raise PeerMissing(f"{what} did not come within {START_S:.0f} s")
        time.sleep(0.01)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        asyncio.run(_serve(int(sys.argv[2]), *sys.argv[3:]))
    else:
        asyncio.run(_ask(int(sys.argv[2]), *sys.argv[3:]))
