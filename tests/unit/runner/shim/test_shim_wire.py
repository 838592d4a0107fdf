"""The wire of a living shim: who may speak, who wins, and what a broken frame costs."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.shim import links, wire
from tests.support.shim import WAIT_S, Connection, ForkServer, Shim, alive, wait_for

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]


def test_the_first_word_is_a_welcome(start_shim: StartShim) -> None:
    """The controller hears phase, offsets and the identity of the shim before it releases."""
    shim = start_shim()
    proto, phase, first, end, token, pid, start = struct.unpack("<HBQQQIQ", shim.controller.wait(wire.WELCOME))
    assert (proto, phase, first, end, token, pid) == (1, wire.PHASE_READY, 0, 0, 0, shim.pid)
    wait_for((shim.dir / "meta.json").exists, "meta.json")
    meta = shim.meta()
    assert (meta["phase"], meta["shim"], meta["child"]) == ("ready", {"pid": pid, "start": start}, None)
    assert (shim.dir / "s").stat().st_mode & 0o777 == 0o600


def test_a_reconnect_hears_what_has_happened_and_displaces_the_older(start_shim: StartShim, tmp_path: Path) -> None:
    """HELLO on `s` gets WELCOME, STARTED and EXIT; the connection before it is closed."""
    work = tmp_path / "work"
    work.mkdir()
    os.mkfifo(work / "fifo")
    shim = start_shim(argv=["sh", "-c", "read x < fifo"], cwd=str(work))
    pid = shim.start()
    second = shim.connect()
    second.hello()
    assert struct.unpack_from("<HB", second.wait(wire.WELCOME))[1] == wire.PHASE_RUNNING
    assert struct.unpack_from("<I", second.wait(wire.STARTED))[0] == pid
    assert shim.controller.receive() is None
    (work / "fifo").write_text("go\n")
    ended = json.loads(second.wait(wire.EXIT))
    third = shim.connect()
    third.hello()
    assert struct.unpack_from("<HB", third.wait(wire.WELCOME))[1] == wire.PHASE_EXITED
    third.wait(wire.STARTED)
    assert json.loads(third.wait(wire.EXIT)) == ended == shim.exit_file()
    assert second.receive() is None
    third.send(wire.COLLECTED)
    shim.wait_gone()
    second.close()
    third.close()


def test_the_release_is_not_lost_to_a_reconnect(start_shim: StartShim) -> None:
    """Before the release a HELLO on `s` leaves the controller open, or it would end the attempt."""
    shim = start_shim(argv=["true"])
    shim.controller.wait(wire.WELCOME)
    other = shim.connect()
    other.hello()
    assert struct.unpack_from("<HB", other.wait(wire.WELCOME))[1] == wire.PHASE_READY
    other.send(wire.RELEASE, b"{}")  # only the controller releases
    assert shim.run()["code"] == 0
    other.close()


def test_a_bell_rings_once_for_each_arm(start_shim: StartShim) -> None:
    """Without ARM there is silence; an ARM behind the end rings at once."""
    shim = start_shim(
        argv=["sh", "-c", "for i in 1 2 3 4 5 6; do echo x; sleep .05; done; read x < /dev/null; sleep 60"]
    )
    shim.start()
    shim.controller.send(wire.ARM, struct.pack("<Q", 0))
    first = struct.unpack("<Q", shim.controller.wait(wire.BELL))[0]
    assert first > 0
    shim.wait_log(lambda log: len(log.stdout) == 12, "the output")
    with pytest.raises(TimeoutError):
        shim.controller.receive(0.1)
    shim.controller.send(wire.ARM, struct.pack("<Q", 0))
    assert struct.unpack("<Q", shim.controller.wait(wire.BELL))[0] > first


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\0\0\0",
        b"\0\0\0\0\x04\0\0\0\0",
        b"\xff\xff\xff\xff\x01",
        struct.pack("<IB", 70_000, wire.STOP),
        wire.pack(wire.LEASE, b"short"),
    ],
)
def test_a_broken_frame_closes_only_its_connection(start_shim: StartShim, garbage: bytes) -> None:
    """Garbage on `s` neither ends the child nor the controller."""
    shim = start_shim(argv=["sleep", "60"])
    pid = shim.start()
    stranger = shim.connect()
    stranger.sock.sendall(garbage)
    assert stranger.receive() is None
    stranger.close()
    shim.controller.send(99, b"a type of a later version")
    shim.stop(grace_ms=5_000)
    assert shim.exit()["signal"] == signal.SIGTERM
    assert not alive(pid)


def test_a_stranger_without_hello_commands_nothing(start_shim: StartShim) -> None:
    """On `s` a daemon speaks first; a STOP before HELLO closes the connection and stops nothing."""
    shim = start_shim(argv=["sleep", "60"])
    pid = shim.start()
    stranger = shim.connect()
    stranger.send(wire.STOP, struct.pack("<I", 0))
    assert stranger.receive() is None
    stranger.close()
    assert alive(pid)


def test_many_strangers_do_not_lock_a_daemon_out(start_shim: StartShim) -> None:
    """Connections that never speak are dropped, oldest first."""
    shim = start_shim(argv=["sleep", "60"])
    shim.start()
    strangers = [shim.connect() for _ in range(links.STRANGERS_MAX + 4)]
    daemon = shim.connect()
    daemon.hello()
    daemon.wait(wire.WELCOME)
    assert strangers[0].receive() is None
    for each in (*strangers, daemon):
        each.close()


def test_a_slow_daemon_is_dropped_and_never_waited_for(start_shim: StartShim) -> None:
    """Answers that nobody reads fill the buffer: the connection goes, the child's output does not wait."""
    shim = start_shim(argv=["sh", "-c", "while :; do echo line; sleep .02; done"])
    shim.start()
    slow = shim.connect()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        say_hello_often(slow)
    slow.close()
    before = len(shim.log().stdout)
    shim.wait_log(lambda log: len(log.stdout) > before, "more output")
    fresh = shim.connect()
    fresh.hello()
    fresh.wait(wire.WELCOME)
    fresh.close()


def say_hello_often(connection: Connection) -> None:
    """Ask far more than fits into a socket buffer, reading nothing."""
    for _ in range(20_000):
        connection.hello()


def test_a_foreign_user_is_turned_away(start_shim: StartShim, tmp_path: Path) -> None:
    """The peer's uid is checked by the kernel's word, not by file modes alone."""
    if os.geteuid() != 0:
        pytest.skip("needs root to speak as another user")
    shim = start_shim(argv=["sleep", "60"])
    shim.start()
    for folder in (shim.dir, *shim.dir.parents[:-1]):
        if folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o011)
    (shim.dir / "s").chmod(0o666)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(shim.dir / "s"))
            sock.sendall(wire.pack(wire.HELLO, struct.pack("<HHQ", 1, 1, 1)))
            sock.settimeout(10)
            os._exit(0 if sock.recv(100) == b"" else 1)
        except ConnectionError:
            os._exit(0)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_shims_outlive_their_fork_server(tmp_path: Path) -> None:
    """A killed fork server takes nothing with it; the lock is held for life and free after."""
    server = ForkServer()
    shim = Shim(tmp_path, server, argv=["sh", "-c", "sleep .3; echo late; exit 6"])
    shim.start()
    server.kill()
    server.close()
    with open(shim.dir / "lock") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert shim.exit()["code"] == 6
        assert shim.log().stdout == b"late\n"
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shim.controller.send(wire.COLLECTED)
        shim.wait_gone()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shim.close()


def test_lock_descriptors_are_held_for_life_and_kept_from_the_child(start_shim: StartShim, tmp_path: Path) -> None:
    """A lock that was handed over is free when the shim has gone, not when the child has."""
    path = tmp_path / "repository.lock"
    handed = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handed, fcntl.LOCK_EX)
    shim = start_shim(argv=["sleep", "60"], locks=[handed])
    pid = shim.start()
    os.close(handed)
    links_of_child = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    assert str(path) not in links_of_child
    with open(path) as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shim.stop(0)
        shim.exit()
        shim.controller.send(wire.COLLECTED)
        shim.wait_gone()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_prober_may_hold_the_lock_for_a_moment(fork_server: ForkServer, tmp_path: Path) -> None:
    """The shim waits for its lock instead of failing."""
    folder = tmp_path / "probe"
    folder.mkdir()
    shim_dir = folder / "lock"
    ours, theirs = socket.socketpair()
    shim_dir.touch()
    with open(shim_dir) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dirfd = os.open(folder, os.O_RDONLY)
        fork_server.fork(dirfd, theirs.fileno())
        os.close(dirfd)
        theirs.close()
        assert select.select([ours], [], [], 0.1)[0] == []
    controller = Connection(ours)
    controller.wait(wire.WELCOME, WAIT_S)
    controller.wait(wire.EXIT)
    controller.send(wire.COLLECTED)
    assert controller.receive() is None
    controller.close()


def test_the_fork_server_answers_nonsense_with_an_errno(tmp_path: Path) -> None:
    """A wrong operation or a wrong number of descriptors forks nothing and harms nothing."""
    server = ForkServer()
    try:
        server.sock.send(struct.pack("<IBB", 5, 9, 0))
        assert struct.unpack("<Ii", server.sock.recv(64)) == (5, -95)
        server.sock.send(struct.pack("<IBB", 6, 1, 0))
        assert struct.unpack("<Ii", server.sock.recv(64)) == (6, -22)
        shim = Shim(tmp_path, server)
        assert shim.run()["code"] == 0
        shim.close()
        held = len(os.listdir(f"/proc/{server.pid}/fd"))
        assert held <= 5, "the fork server keeps descriptors of its shims"
    finally:
        server.close()


def spare_of(server: ForkServer) -> int:
    """The pid of the shim that waits for its attempt."""
    # An answer means that the rehearsal is over: its children are none of ours.
    server.sock.send(struct.pack("<IBB", 1, 0, 0))
    server.sock.recv(64)
    path = Path(f"/proc/{server.pid}/task/{server.pid}/children")
    wait_for(lambda: path.read_text().strip(), "a spare")
    return int(path.read_text().split()[-1])


def test_a_killed_spare_costs_no_attempt(tmp_path: Path) -> None:
    """The shim that is forked ahead may die at any time: the request gets a fresh one."""
    server = ForkServer()
    try:
        spare = spare_of(server)
        os.kill(spare, signal.SIGKILL)
        wait_for(lambda: not alive(spare), "the end of the spare")
        shim = Shim(tmp_path, server, argv=["sh", "-c", "exit 9"])
        assert shim.pid != spare
        assert shim.run()["code"] == 9
        shim.close()
    finally:
        server.close()


def test_a_spare_ends_with_its_fork_server() -> None:
    """Nothing is left of a fork server that never served."""
    server = ForkServer()
    spare = spare_of(server)
    server.kill()
    server.close()
    wait_for(lambda: not alive(spare), "the end of the spare")


def test_many_shims_at_once_are_all_served(tmp_path: Path) -> None:
    """Requests that come faster than spares are forked get their shims too, each its own."""
    server = ForkServer()
    try:
        shims = [Shim(tmp_path, server, argv=["sh", "-c", f"exit {code}"]) for code in range(20)]
        assert len({shim.pid for shim in shims}) == 20
        for shim in shims:
            shim.release()
        assert [shim.exit()["code"] for shim in shims] == list(range(20))
        for shim in shims:
            shim.close()
    finally:
        server.close()
