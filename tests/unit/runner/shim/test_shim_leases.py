"""Leases, fences and sleeps over real trees: a shim alone with the clock does what its lease says, and no more."""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.shim import lease as leases
from runner.shim import wire
from tests.support import shimclock
from tests.support.shim import Shim, alive, boottime_ms, wait_for

pytestmark = pytest.mark.slow

StartShim = Callable[..., Shim]
StartClocked = Callable[..., tuple[Shim, shimclock.Clock]]


@pytest.fixture
def start_clocked(tmp_path: Path) -> Iterator[StartClocked]:
    """Start shims whose clocks the test moves; they are ended with the test."""
    shims: list[Shim] = []

    def start(**spec: Any) -> tuple[Shim, shimclock.Clock]:
        shims.append(Shim(tmp_path, None, entry=shimclock.ENTRY, **spec))
        return shims[-1], shimclock.Clock(shims[-1].dir)

    yield start
    for shim in shims:
        shim.close()


def state(pid: int) -> str:
    """The state letter of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


def wait_state(pid: int, *, stopped: bool) -> None:
    """Wait until the process is stopped, or is no more."""
    wait_for(lambda: (state(pid) == "T") is stopped, "the freeze" if stopped else "the thaw")


def renew(shim: Shim, token: int, deadline_ms: int, action: int, grace_ms: int | None = None) -> None:
    """Send RENEW as somebody who has not said HELLO, and leave."""
    stranger = shim.connect()
    stranger.send(wire.RENEW, wire.pack_lease(token, deadline_ms, action, grace_ms))
    stranger.close()


def held(token: int, deadline_ms: int, action: str, **more: Any) -> dict[str, Any]:
    """A lease as in `spec.json`."""
    return {"token": token, "deadline_ms": deadline_ms, "action": action} | more


# --- loss and return ------------------------------------------------------------------------------------------------


def test_a_tree_frozen_without_a_daemon_is_thawed_by_a_stranger_with_a_higher_token(start_shim: StartShim) -> None:
    """Nobody is connected at the loss; a renewal needs no greeting, a lower token changes nothing."""
    shim = start_shim(argv=["sh", "-c", "sleep 60 & wait"])
    pid = shim.start()
    child = only_child(pid)
    lost_ms = boottime_ms() + 300
    lease = wire.pack_lease(3, lost_ms + leases.LEASE_MARGIN_MS, leases.ON_LOSS_FREEZE, None)
    shim.controller.send(wire.LEASE, lease)
    shim.controller.close()
    for each in (pid, child):
        wait_state(each, stopped=True)
    assert boottime_ms() >= lost_ms
    renew(shim, 2, boottime_ms() + 60_000, leases.ON_LOSS_FREEZE)
    renew(shim, 4, boottime_ms() + 60_000, leases.ON_LOSS_FREEZE)
    for each in (pid, child):
        wait_state(each, stopped=False)
    daemon = shim.connect()
    daemon.hello()
    welcome = struct.unpack_from("<HBQQQ", daemon.wait(wire.WELCOME))
    assert (welcome[1], welcome[4]) == (wire.PHASE_RUNNING, 4)
    daemon.close()


def test_a_renewal_by_a_stranger_displaces_nobody(start_shim: StartShim) -> None:
    """The daemon that was greeted keeps its connection, and the stranger gets no answer."""
    shim = start_shim(argv=["sleep", "60"], lease=held(1, boottime_ms() + 60_000, "stop"))
    shim.start()
    stranger = shim.connect()
    stranger.send(wire.RENEW, wire.pack_lease(2, boottime_ms() + 60_000, leases.ON_LOSS_STOP, 100))
    stranger.send(wire.STOP, struct.pack("<I", 0))
    assert (stranger.receive(), stranger.seen) == (None, [])
    stranger.close()
    shim.stop(grace_ms=5_000, who="the first daemon")
    assert shim.exit()["cause"]["by"] == "the first daemon"


def test_a_long_grace_does_not_lose_a_short_lease_at_once(start_shim: StartShim, tmp_path: Path) -> None:
    """The lease brings its own grace: the tree runs on, and its KILL comes before the deadline all the same."""
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); open('ready', 'w'); time.sleep(60)"
    argv = [sys.executable, "-ISc", script]
    shim = start_shim(argv=argv, cwd=str(tmp_path), grace_ms=300_000, kill_wait_ms=300)
    shim.start()
    wait_for((tmp_path / "ready").exists, "a child that ignores TERM")
    lost_ms = boottime_ms() + 1_000
    deadline_ms = lost_ms + 400 + 300 + leases.LEASE_MARGIN_MS
    shim.controller.send(wire.LEASE, wire.pack_lease(1, deadline_ms, leases.ON_LOSS_STOP, 400))
    shim.controller.close()
    record = shim.exit_file()
    assert (record["verdict"], record["cause"]["kind"], record["signal"]) == ("stopped", "lease", signal.SIGKILL)
    assert lost_ms + 400 <= boottime_ms() < deadline_ms


def test_a_tree_that_somebody_stopped_takes_the_term_of_a_lost_lease(start_shim: StartShim) -> None:
    """Leader and child are stopped by hand; TERM and CONT reach both, no KILL is needed."""
    shim = start_shim(argv=["sh", "-c", "sleep 60 & wait"], grace_ms=59_000)
    pid = shim.start()
    tree = [pid, only_child(pid)]
    for each in tree:
        os.kill(each, signal.SIGSTOP)
        wait_state(each, stopped=True)
    shim.controller.send(wire.LEASE, wire.pack_lease(1, boottime_ms() + 60_000, leases.ON_LOSS_STOP, None))
    record = shim.exit()
    assert (record["cause"]["kind"], record["signal"], record["survivors"]) == ("lease", signal.SIGTERM, 0)
    assert [each["signal"] for each in record["swept"]] == [signal.SIGTERM]
    assert not any(alive(each) for each in tree)


def only_child(pid: int) -> int:
    """The one child of a process, waited for."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text().strip(), "the child's child")
    return int(children.read_text())


# --- clocks that jump -----------------------------------------------------------------------------------------------


def test_a_frozen_attempt_is_given_up_after_a_quarter_of_an_hour(start_clocked: StartClocked) -> None:
    """Nobody came back for it: it ends with the cause of its lease."""
    shim, clock = start_clocked(argv=["sleep", "60"], lease=held(1, boottime_ms() + 60_000, "freeze"))
    pid = shim.start()
    clock.pass_by(60_000)
    wait_state(pid, stopped=True)
    clock.pass_by(leases.FROZEN_MAX_MS)
    record = shim.exit()
    assert (record["verdict"], record["cause"]["kind"], record["survivors"]) == ("stopped", "lease", 0)
    assert "did not come back" in record["cause"]["detail"]


def test_the_time_limit_of_a_frozen_attempt_goes_on(start_clocked: StartClocked) -> None:
    """Frozen time is run time: the limit ends the attempt in the middle of its freeze."""
    shim, clock = start_clocked(argv=["sleep", "60"], timeout_ms=100_000)
    pid = shim.start()
    renew(shim, 1, boottime_ms(), leases.ON_LOSS_FREEZE)
    wait_state(pid, stopped=True)
    clock.pass_by(100_000)
    record = shim.exit()
    assert (record["verdict"], record["cause"]["kind"]) == ("timed_out", "timeout")


def test_a_wake_freezes_and_a_renewal_lets_all_go_on(start_clocked: StartClocked) -> None:
    """An hour of sleep is longer than the lease: the tree is held, not ended, until the renewal is there."""
    shim, clock = start_clocked(argv=["sleep", "60"], grace_ms=100, lease=held(1, boottime_ms() + 60_000, "stop"))
    pid = shim.start()
    clock.sleep(3_600_000)
    wait_state(pid, stopped=True)
    renew(shim, 1, boottime_ms() + 3_600_000 + 60_000, leases.ON_LOSS_STOP)
    wait_state(pid, stopped=False)
    clock.pass_by(40_000)  # past the wait of the wake, short of the new deadline
    shim.stop(grace_ms=5_000)
    record = shim.exit()
    assert (record["cause"]["kind"], record["signal"]) == ("stop", signal.SIGTERM)


def test_a_wake_without_a_renewal_ends_in_the_stop_of_the_lease(start_clocked: StartClocked) -> None:
    """Half a minute after the wake the lease's own action follows."""
    shim, clock = start_clocked(argv=["sleep", "60"], grace_ms=100, lease=held(1, boottime_ms() + 60_000, "stop"))
    pid = shim.start()
    clock.sleep(3_600_000)
    wait_state(pid, stopped=True)
    clock.pass_by(leases.WAKE_WAIT_MS)
    record = shim.exit()
    assert (record["verdict"], record["cause"]["kind"], record["survivors"]) == ("stopped", "lease", 0)


def test_time_that_passes_awake_stops_at_once(start_clocked: StartClocked) -> None:
    """A lease that ran out while the machine was awake is nobody's sleep: it is stopped without a freeze."""
    shim, clock = start_clocked(argv=["sleep", "60"], grace_ms=100, lease=held(1, boottime_ms() + 60_000, "stop"))
    shim.start()
    clock.pass_by(60_000)
    record = shim.exit()
    assert (record["cause"]["kind"], record["cause"]["detail"]) == ("lease", "")


def test_a_shim_that_slept_right_after_the_end_still_makes_its_record_durable(start_clocked: StartClocked) -> None:
    """However long it was held between EXIT and the record, it tries once more."""
    shim, clock = start_clocked(argv=["true"], fail={"exit_told": "stop"})
    shim.run()
    wait_state(shim.pid, stopped=True)
    assert not (shim.dir / "exit.json").exists()
    clock.sleep(3_600_000)
    os.kill(shim.pid, signal.SIGCONT)
    assert shim.exit_file()["verdict"] == "exited"


# --- the fence ------------------------------------------------------------------------------------------------------


def fenced_root(tmp_path: Path, content: str | None) -> Path:
    """A state directory's `x`, with a fence of execution `ex_f` beside it."""
    (tmp_path / "x").mkdir()
    (tmp_path / "fences").mkdir()
    if content is not None:
        (tmp_path / "fences" / "ex_f").write_text(content)
    return tmp_path / "x"


@pytest.mark.parametrize(("fence", "token"), [("8\n", 7), ("8\n", None), ("18446744073709551615\n", 7)])
def test_a_higher_token_in_the_fence_refuses_the_start(
    start_shim: StartShim, tmp_path: Path, fence: str, token: int | None
) -> None:
    """The command never runs, and the record says whose time it is."""
    shim = start_shim(
        fenced_root(tmp_path, fence), argv=["touch", str(tmp_path / "ran")], execution="ex_f", token=token
    )
    record = shim.run()
    assert (record["verdict"], record["cause"]["kind"], record["cause"]["reason"]) == (
        "never_started", "fenced", "FENCED",
    )  # fmt: skip
    assert fence.strip() in record["cause"]["detail"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("fence", [None, "7\n", "0\n"])
def test_a_fence_that_is_not_higher_lets_the_start_be(start_shim: StartShim, tmp_path: Path, fence: str | None) -> None:
    """No fence, one's own, an older one."""
    shim = start_shim(fenced_root(tmp_path, fence), argv=["sh", "-c", "exit 5"], execution="ex_f", token=7)
    assert shim.run()["code"] == 5


@pytest.mark.parametrize("fence", ["", "7", "\n", "-7\n", "7\n\n", "seven\n", "1" * 22 + "\n", "7 \n"])
def test_a_fence_that_is_no_token_refuses_the_start(start_shim: StartShim, tmp_path: Path, fence: str) -> None:
    """What cannot be understood is no permission."""
    shim = start_shim(fenced_root(tmp_path, fence), execution="ex_f", token=7)
    record = shim.run()
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "fenced")
    assert "not a token" in record["cause"]["detail"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_a_fence_that_is_no_file_refuses_the_start(start_shim: StartShim, tmp_path: Path, kind: str) -> None:
    """Neither followed nor waited for."""
    root = fenced_root(tmp_path, None)
    path = tmp_path / "fences" / "ex_f"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (tmp_path / "low").write_text("1\n")
        path.symlink_to(tmp_path / "low")
    record = start_shim(root, execution="ex_f", token=7).run()
    assert (record["verdict"], record["cause"]["kind"]) == ("never_started", "fenced")
    assert "cannot be read" in record["cause"]["detail"]


def test_a_fence_counts_until_the_spawn(start_shim: StartShim, tmp_path: Path) -> None:
    """1. Released, and held right before the spawn. 2. A successor is prepared. 3. The sleeper wakes: it starts nothing."""
    root = fenced_root(tmp_path, "7\n")
    shim = start_shim(root, execution="ex_f", token=7, fail={"released": "stop"})
    shim.release()
    wait_state(shim.pid, stopped=True)
    assert shim.meta()["phase"] == "released"
    (tmp_path / "fences" / "ex_f").write_text("8\n")
    os.kill(shim.pid, signal.SIGCONT)
    assert shim.exit()["cause"]["kind"] == "fenced"


def test_a_lease_that_was_taken_again_before_the_release_passes_its_own_fence(
    start_shim: StartShim, tmp_path: Path
) -> None:
    """The token of an attempt rises with its lease."""
    shim = start_shim(
        fenced_root(tmp_path, "9\n"), argv=["sh", "-c", "exit 5"], execution="ex_f", token=7,
        lease=held(7, boottime_ms() + 60_000, "continue"),
    )  # fmt: skip
    shim.controller.send(wire.LEASE, wire.pack_lease(9, boottime_ms() + 60_000, leases.CONTINUE, None))
    assert shim.run()["code"] == 5


# --- points at which tests end a shim -------------------------------------------------------------------------------


def test_a_shim_is_held_or_dies_at_the_point_that_its_spec_names(start_shim: StartShim) -> None:
    """What is on disk and on the wire at each point is what the point's name says."""
    ready = start_shim(fail={"ready": "stop"})
    wait_state(ready.pid, stopped=True)
    assert select.select([ready.controller.sock], [], [], 0)[0] == []
    assert not (ready.dir / "meta.json").exists()
    os.kill(ready.pid, signal.SIGCONT)
    ready.controller.wait(wire.WELCOME)
    released = start_shim(fail={"released": "kill"})
    released.release()
    released.wait_gone()
    assert (released.meta()["phase"], released.meta()["child"]) == ("released", None)
    ended = start_shim(fail={"child_ended": "kill"})
    ended.start()
    ended.wait_gone()
    assert ended.meta()["phase"] == "running"
    assert not (ended.dir / "exit.json").exists()
    told = start_shim(fail={"exit_told": "kill"})
    told.run()
    told.wait_gone()
    assert not (told.dir / "exit.json").exists()
    durable = start_shim(fail={"exit_durable": "kill"})
    durable.run()
    durable.wait_gone()
    assert durable.exit_file()["verdict"] == "exited"


def test_a_shim_that_dies_right_after_the_spawn_leaves_a_child_behind(start_shim: StartShim, tmp_path: Path) -> None:
    """The files say `released`, the command runs: this is what a sweep has to find."""
    script = f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 60"
    shim = start_shim(argv=["sh", "-c", script], fail={"spawned": "kill"})
    shim.release()
    shim.wait_gone()
    wait_for((tmp_path / "pid").exists, "the orphan")
    pid = int((tmp_path / "pid").read_text())
    assert alive(pid)
    assert (shim.meta()["phase"], shim.meta()["child"]) == ("released", None)
    os.kill(pid, signal.SIGKILL)
