"""The stop ladder over real trees: stops, timeouts, leases, and processes that do not want to go."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.shim import system, tree, wire
from tests.support.shim import Shim, alive, boottime_ms, wait_for

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note(): open(f"{os.getcwd()}/pids", "a").write(f"{os.getpid()}\\n")
def daemonise(clear):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if clear: os.execve(sys.executable, [sys.executable, "-ISc", CHILD], {})
            note()
            while True: time.sleep(1)
        os._exit(0)
CHILD = '''
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(f"{os.getcwd()}/pids", "a").write(f"{os.getpid()}\\\\n")
while True: time.sleep(1)
'''
daemonise(False)
daemonise(True)
note()
while True: time.sleep(1)
"""


def noted(folder: Path, count: int) -> list[int]:
    """The pids that the tree has written into `folder`, once there are `count`."""
    path = folder / "pids"
    wait_for(lambda: path.exists() and len(path.read_text().split()) == count, f"{count} pids")
    return [int(pid) for pid in path.read_text().split()]


def test_a_tree_that_ignores_term_is_killed_whole(start_shim: StartShim, tmp_path: Path) -> None:
    """Leader, daemon in its own session and daemon without the cookie: all are gone when EXIT comes."""
    shim = start_shim(argv=[sys.executable, "-ISc", STUBBORN], cwd=str(tmp_path))
    shim.start()
    pids = noted(tmp_path, 3)
    shim.stop(grace_ms=200)
    record = shim.exit()
    assert (record["verdict"], record["signal"], record["survivors"]) == ("stopped", signal.SIGKILL, 0)
    assert (record["cause"]["kind"], record["cause"]["by"]) == ("stop", "tester")
    assert {(each["signal"], each["count"]) for each in record["swept"]} == {(signal.SIGTERM, 2), (signal.SIGKILL, 2)}
    assert not any(alive(pid) for pid in pids)


def test_a_stopped_tree_takes_a_term(start_shim: StartShim) -> None:
    """A SIGSTOPped child ends by the TERM, long before the grace is over."""
    shim = start_shim(argv=["sleep", "60"], grace_ms=60_000)
    pid = shim.start()
    os.kill(pid, signal.SIGSTOP)
    shim.stop(grace_ms=60_000)
    record = shim.exit()
    assert (record["verdict"], record["signal"]) == ("stopped", signal.SIGTERM)


def test_a_child_may_answer_a_stop_with_its_own_code(start_shim: StartShim) -> None:
    """The verdict is the cause's, code and output are the child's."""
    script = "trap 'echo last; exit 3' TERM; echo ready; while :; do sleep .05; done"
    shim = start_shim(argv=["sh", "-c", script])
    shim.start()
    shim.controller.send(wire.ARM, struct.pack("<Q", 0))
    shim.controller.wait(wire.BELL)
    shim.stop(grace_ms=10_000)
    record = shim.exit()
    assert (record["verdict"], record["code"], record["signal"]) == ("stopped", 3, None)
    assert shim.log().stdout == b"ready\nlast\n"


def test_a_second_stop_only_shortens_the_grace(start_shim: StartShim, tmp_path: Path) -> None:
    """The first stop is the cause; a longer grace changes nothing, a shorter one does."""
    shim = start_shim(argv=[sys.executable, "-ISc", STUBBORN], cwd=str(tmp_path))
    shim.start()
    noted(tmp_path, 3)
    shim.stop(grace_ms=60_000, who="first")
    shim.stop(grace_ms=90_000, who="second")
    shim.stop(grace_ms=100, who="third")
    record = shim.exit()
    assert (record["cause"]["by"], record["survivors"]) == ("first", 0)


def test_a_timeout_ends_the_tree(start_shim: StartShim) -> None:
    """The run time limit counts from the child's start and needs nobody connected."""
    shim = start_shim(argv=["sleep", "60"], timeout_ms=200)
    shim.start()
    shim.controller.close()
    record = shim.exit_file()
    assert (record["verdict"], record["cause"]["kind"], record["signal"]) == ("timed_out", "timeout", signal.SIGTERM)
    assert record["duration_ms"] >= 200


def test_a_lost_lease_stops_the_tree_without_a_controller(start_shim: StartShim) -> None:
    """Grace, kill wait and the margin come before the deadline, with the daemon dead."""
    lease = {"token": 3, "deadline_ms": boottime_ms() + 60_000, "action": "stop"}
    shim = start_shim(argv=["sleep", "60"], lease=lease, grace_ms=200, kill_wait_ms=300)
    shim.start()
    deadline_ms = boottime_ms() + 6_000
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 4, deadline_ms, wire_stop()))
    shim.controller.close()
    record = shim.exit_file()
    assert (record["verdict"], record["cause"]["kind"]) == ("stopped", "lease")
    assert boottime_ms() < deadline_ms - 4_000


def test_a_lower_token_does_not_move_the_lease(start_shim: StartShim) -> None:
    """A renewal of a predecessor is ignored; one of the holder counts."""
    lease = {"token": 3, "deadline_ms": boottime_ms() + 100_000, "action": "stop"}
    shim = start_shim(argv=["sleep", "60"], lease=lease, grace_ms=100, kill_wait_ms=100)
    shim.start()
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 2, 0, wire_stop()))
    connection = shim.connect()
    connection.hello()
    welcome = connection.wait(wire.WELCOME)
    assert struct.unpack_from("<HBQQQ", welcome)[1:5:3] == (wire.PHASE_RUNNING, 3)
    connection.send(wire.LEASE, struct.pack("<QQB", 4, 0, wire_stop()))
    connection.wait(wire.EXIT)
    connection.close()
    assert shim.exit_file()["cause"]["kind"] == "lease"


def wire_stop() -> int:
    """The lease action "stop" on the wire."""
    return 2


def test_a_freeze_stops_the_tree_until_the_lease_is_renewed(start_shim: StartShim) -> None:
    """A frozen tree goes on after a LEASE with a future deadline, and takes a stop all the same."""
    shim = start_shim(argv=["sleep", "60"])
    pid = shim.start()
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms() + 4_000, 1))
    wait_for(lambda: state(pid) == "T", "the freeze")
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms() + 60_000, 1))
    wait_for(lambda: state(pid) != "T", "the thaw")
    shim.controller.send(wire.LEASE, struct.pack("<QQB", 1, boottime_ms(), 1))
    wait_for(lambda: state(pid) == "T", "the second freeze")
    shim.stop(grace_ms=10_000)
    record = shim.exit()
    # Without a lease there is no grace: TERM and KILL come together, whichever is first.
    assert (record["verdict"], record["cause"]["kind"]) == ("stopped", "stop")
    assert record["signal"] in (signal.SIGTERM, signal.SIGKILL)


def state(pid: int) -> str:
    """The state letter of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.parametrize("told", ["the kernel tells who is younger", "everybody is asked"])
def test_a_process_that_carries_the_cookie_is_swept_wherever_it_hangs(
    start_shim: StartShim, tmp_path: Path, told: str
) -> None:
    """The second tier finds a process that is no descendant, and counts it apart; also when pids have come round."""
    go = tmp_path / "go"
    shim = start_shim(argv=["sh", "-c", f"while [ ! -e {go} ]; do sleep 0.01; done"])
    environ = {"X": "1", "LOCAL_RUNNER_COOKIE": shim.spec["cookie"]}
    if told == "everybody is asked":
        stray = os.posix_spawn("/bin/sleep", ["sleep", "60"], environ)
        _let_pids_come_round()
        shim.start()
    else:
        shim.start()
        stray = os.posix_spawn("/bin/sleep", ["sleep", "60"], environ)
    try:
        go.touch()
        record = shim.exit()
        assert record["swept"] == [{"tier": "cookie", "signal": signal.SIGTERM, "count": 1}]
        assert (record["verdict"], record["code"], record["survivors"]) == ("exited", 0, 0)
    finally:
        assert os.waitstatus_to_exitcode(os.waitpid(stray, 0)[1]) == -signal.SIGTERM


def _let_pids_come_round() -> None:
    """The next pids are so high that they must come round soon; skipped without the right to set them."""
    try:
        limit = int(Path("/proc/sys/kernel/pid_max").read_text())
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(limit - 100))
    except OSError as exc:
        pytest.skip(f"needs the right to set the last pid: {exc}")


@pytest.mark.slow
def test_a_forking_tree_is_killed(start_shim: StartShim) -> None:
    """A tree that forks faster than one scan is ended by repeated sweeps."""
    script = "trap '' TERM; f() { (trap '' TERM; sleep .01; f) & }; f; f; f; sleep 60"
    shim = start_shim(argv=["bash", "-c", script])
    shim.start()
    shim.stop(grace_ms=100)
    record = shim.exit()
    assert record["survivors"] == 0


def test_a_survivor_is_counted_and_delays_nothing_for_ever(start_shim: StartShim) -> None:
    """A process that takes no KILL is reported with its count when the kill wait is over."""
    group = Path(f"/sys/fs/cgroup/freezer/local-runner-test-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as exc:
        pytest.skip(f"needs root and a version 1 freezer to hold a process: {exc}")
    try:
        shim = start_shim(argv=["sleep", "60"], kill_wait_ms=300)
        pid = shim.start()
        (group / "tasks").write_text(str(pid))
        (group / "freezer.state").write_text("FROZEN")
        wait_for(lambda: (group / "freezer.state").read_text() == "FROZEN\n", "the freezer")
        shim.stop(grace_ms=100)
        record = shim.exit(5)
        assert (record["verdict"], record["code"], record["signal"]) == ("stopped", None, None)
        assert (record["survivors"], record["drain"]) == (1, "quiet")
    finally:
        (group / "freezer.state").write_text("THAWED")
        wait_for(lambda: not (group / "tasks").read_text(), "the end of the held process")
        group.rmdir()


def test_a_process_of_another_user_cannot_be_signalled(start_shim: StartShim) -> None:
    """A refused signal is told, not raised: the process then counts as one that lives on."""
    shim = start_shim(argv=["sleep", "60"])
    pid = shim.start()
    foreign = tree.Process(pid, system.start_time(pid), tree.DESCENDANTS)
    judged = "42"
    asking = os.fork()
    if asking == 0:
        with contextlib.suppress(BaseException):
            judged = _signal_as_nobody(foreign)
        os._exit(int(judged))
    status = os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1])
    if status == 77:
        pytest.skip("needs the right to become another user, and to lose the rights of this one")
    assert status == 0
    assert state(pid) != "T"


def _signal_as_nobody(foreign: tree.Process) -> str:
    """An exit status: 0 when the signal was refused and told so, 77 where this machine cannot show it."""
    try:
        os.setuid(65534)
        os.kill(foreign.pid, 0)
    except PermissionError:
        if os.geteuid() != 65534:
            return "77"
    except OSError:
        return "77"
    else:
        return "77"  # still allowed: the capabilities outlived the user id
    return "0" if tree.send(foreign, signal.SIGSTOP) is False else "1"


def test_a_reused_pid_is_not_signalled() -> None:
    """A process whose start time differs is another process, whatever its pid."""
    pid = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
    try:
        start = system.start_time(pid)
        assert not tree.send(tree.Process(pid, start - 1, tree.DESCENDANTS), signal.SIGKILL)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        assert tree.send(tree.Process(pid, start, tree.DESCENDANTS), signal.SIGKILL)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_pipe_held_from_outside_ends_in_quiet(start_shim: StartShim) -> None:
    """A holder of the pipe that is not of the tree delays EXIT by the quiet time only."""
    shim = start_shim(argv=["sh", "-c", "echo out; sleep 60"])
    pid = shim.start()
    fd = os.open(f"/proc/{pid}/fd/1", os.O_WRONLY)
    try:
        shim.stop(grace_ms=5_000)
        begun = time.monotonic()
        record = shim.exit()
        assert record["drain"] == "quiet"
        assert 0.2 < time.monotonic() - begun < 5
    finally:
        os.close(fd)
