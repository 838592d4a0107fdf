"""The daemon's side of real shims: what they are told, what is made of their silence, and how they are taken back."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from protocol.errors import Reason
from protocol.ids import Attempt
from runner import failpoints
from runner.adapters.attemptdir import FENCES_DIR, raise_fence
from runner.adapters.cgroups import leaf
from runner.adapters.shimlink import STOPS_MAX, Words
from runner.adapters.shimsocket import dial
from runner.adapters.tools import ShimTools
from runner.core.inputs import AttemptExited, AttemptLost, RemainsSwept, ShimSilent
from runner.core.plans import LeaseAction, ProcessIdentity
from runner.errors import Broken, Refused
from runner.shim.system import start_time
from tests.support.shim import BOOT_ID, alive, boottime_ms
from tests.support.shims import Shims, a_plan, shims, sweep_all

EX = Attempt.parse("ex_1.1")
SLEEP = ("sleep", "300")


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[Shims]:
    """An adapter over an empty directory; nothing it started outlives the test."""
    async with shims(tmp_path) as daemon:
        yield daemon
    failpoints.arm("")
    await sweep_all(tmp_path)


async def ends(world: Shims) -> AttemptExited | AttemptLost:
    """How the attempt ended."""
    async with asyncio.timeout(20):
        while not (ends := [event for event in world.heard if isinstance(event, AttemptExited | AttemptLost)]):
            await asyncio.sleep(0.01)
    return ends[0]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shim that does not answer is given up sooner than on a machine in swap."""
    monkeypatch.setattr("runner.adapters.shims.ADOPT_TIMEOUT_S", 0.5)


# --- what a shim is told ----------------------------------------------------------------------------------------


async def test_a_spec_says_under_which_token_what_may_outlive_it_and_where_its_payload_goes(tmp_path: Path) -> None:
    """All keys of the contract, and the points that a test armed for this shim."""
    failpoints.arm("shim.spawned=kill")
    try:
        async with shims(tmp_path, cgroups=tmp_path / "cg", floor_bytes=4096) as world:
            plan = a_plan("ex_9.3", token=7, outlive=("gradle", "bazel"))
            await world.adapter.prepare(plan, "/", again=False)
            spec = json.loads((tmp_path / "x" / "ex_9.3" / "spec.json").read_text())
            await world.adapter.abandon(plan.attempt)
    finally:
        failpoints.arm("")
    told = {name: spec[name] for name in ("execution", "token", "outlive", "floor_bytes", "cgroup", "fail")}
    assert told == {
        "execution": "ex_9",
        "token": 7,
        "outlive": ["gradle", "bazel"],
        "floor_bytes": 4096,
        "cgroup": str(leaf(tmp_path / "cg", "ex_9.3")),
        "fail": {"spawned": "kill"},
    }


async def test_a_lease_is_pushed_with_its_grace(world: Shims) -> None:
    """The stop at the loss gives what the lease gives, where that is less than the attempt's own."""
    await world.start(a_plan("ex_1.1", "sh", "-c", "trap '' TERM; while :; do sleep 1; done", grace_ms=60_000))
    # Kill wait and margin are ten seconds: with no grace at all the ladder begins that long before the deadline.
    world.adapter.lease(EX, 1, boottime_ms() + 10_200, LeaseAction.STOP, 0)
    record = (await world.told(AttemptExited)).exit
    assert (record.verdict, record.cause_kind, record.signal) == ("stopped", "lease", signal.SIGKILL)


async def test_a_stop_said_while_there_is_no_connection_is_said_on_the_next(world: Shims, tmp_path: Path) -> None:
    """As after a restart, where the stop is journaled and its shim is not connected yet."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    async with shims(tmp_path) as next_daemon:
        next_daemon.adapter.stop(EX, 100, "cmd_stop")
        assert next_daemon.cut == [EX], "a stop is worth a try to connect"
        assert await next_daemon.adapter.adopt(EX)
        record = (await next_daemon.told(AttemptExited)).exit
    assert (record.verdict, record.cause_kind, record.cause_by) == ("stopped", "stop", "cmd_stop")


async def test_a_lease_said_while_there_is_no_connection_is_said_on_the_next(world: Shims, tmp_path: Path) -> None:
    """The last one, and it alone."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    async with shims(tmp_path) as next_daemon:
        next_daemon.adapter.lease(EX, 1, boottime_ms() + 600_000, LeaseAction.STOP, 0)
        next_daemon.adapter.lease(EX, 2, boottime_ms(), LeaseAction.STOP, 0)
        assert await next_daemon.adapter.adopt(EX)
        record = (await next_daemon.told(AttemptExited)).exit
    assert (record.verdict, record.cause_kind) == ("stopped", "lease")


def test_of_many_stops_the_first_and_the_last_are_kept() -> None:
    """The first is the cause that the shim will keep; what lies between adds nothing."""
    words = Words()
    for number in (0, 0, 1, 2, 3, 4, 5):
        words.add_stop(number, f"cmd_{number}")
    assert [stop[0] for stop in words.stops] == [0, 3, 4, 5] and len(words.stops) == STOPS_MAX


# --- the fence --------------------------------------------------------------------------------------------------


async def test_the_fence_of_a_successor_stands_before_it_is_laid_out(world: Shims, tmp_path: Path) -> None:
    """A shim of the predecessor that still waits behind its barrier does not start any more."""
    await world.adapter.prepare(a_plan("ex_1.1"), "/", again=False)
    failpoints.arm("attempt.dir_made=error(INFRA)")
    with pytest.raises(Broken):
        await world.adapter.prepare(a_plan("ex_1.2", token=2), "/", again=False)
    assert (tmp_path / FENCES_DIR / "ex_1").read_text() == "2\n"
    await world.adapter.release(EX, {})
    record = (await world.told(AttemptExited)).exit
    assert (record.verdict, record.cause_kind, record.cause_reason) == ("never_started", "fenced", Reason.FENCED)


async def test_a_first_attempt_needs_no_fence(world: Shims, tmp_path: Path) -> None:
    """There is nobody to hold back, and a sync of the disk to save."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    assert not (tmp_path / FENCES_DIR).exists()


def test_a_fence_is_never_lowered(tmp_path: Path) -> None:
    """Whoever comes with less leaves it where it is."""
    for token in (5, 3, 5, 9):
        raise_fence(tmp_path, "ex_1", token)
    assert (tmp_path / FENCES_DIR / "ex_1").read_text() == "9\n"
    raise_fence(tmp_path, "ex_1", 2)
    assert (tmp_path / FENCES_DIR / "ex_1").read_text() == "9\n"


@pytest.mark.parametrize("content", [b"", b"7", b"seven\n", b"-1\n", b"1" * 40 + b"\n"])
async def test_what_is_no_fence_stops_the_start_and_is_left_for_its_owner(
    world: Shims, tmp_path: Path, content: bytes
) -> None:
    """Who could tell what it was meant to hold back; nothing is left of the attempt."""
    (tmp_path / FENCES_DIR).mkdir()
    (tmp_path / FENCES_DIR / "ex_1").write_bytes(content)
    with pytest.raises(Broken) as refused:
        await world.adapter.prepare(a_plan("ex_1.2", token=2), "/", again=False)
    assert refused.value.reason is Reason.INFRA
    assert (tmp_path / FENCES_DIR / "ex_1").read_bytes() == content
    assert not (tmp_path / "x" / "ex_1.2").exists()


async def test_a_fence_that_holds_nobody_back_expires(world: Shims, tmp_path: Path) -> None:
    """With the last directory of its execution, and not before; never one of an execution that has a directory."""
    raise_fence(tmp_path, "ex_old", 4)
    raise_fence(tmp_path, "ex_1", 4)
    raise_fence(tmp_path, "ex_young", 4)
    for name in ("ex_old", "ex_1"):
        os.utime(tmp_path / FENCES_DIR / name, (1000, 1000))
    await world.adapter.prepare(a_plan("ex_1.5", token=5), "/", again=False)
    os.utime(tmp_path / FENCES_DIR / "ex_1", (1000, 1000))
    await world.adapter.expire(2_000_000)
    assert {path.name for path in (tmp_path / FENCES_DIR).iterdir()} == {"ex_1", "ex_young"}


# --- disks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["attempt.dir_made", "attempt.spec_written"])
async def test_a_disk_that_fails_in_the_middle_leaves_no_attempt(world: Shims, tmp_path: Path, point: str) -> None:
    """Nothing was told of it yet; the same attempt can be asked for again."""
    failpoints.arm(f"{point}=1*error(DISK_FULL)")
    with pytest.raises(Broken) as failed:
        await world.adapter.prepare(a_plan("ex_1.1", *SLEEP), "/", again=False)
    assert failed.value.reason is Reason.DISK_FULL
    assert list((tmp_path / "x").iterdir()) == []
    await world.start(a_plan("ex_1.1", *SLEEP))


async def test_a_fork_that_fails_leaves_no_attempt(
    world: Shims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its barrier was never opened, so its directory goes with it."""
    monkeypatch.setattr("runner.adapters.forkserver._MAIN", Path("/nowhere"))
    world.adapter.close()
    async with shims(tmp_path) as broken:
        with pytest.raises(Broken):
            await broken.adapter.prepare(a_plan("ex_1.1"), "/", again=False)
    assert list((tmp_path / "x").iterdir()) == []


async def test_a_directory_that_is_there_is_refused_and_left(world: Shims, tmp_path: Path) -> None:
    """It may be of an attempt that runs."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    with pytest.raises(Refused) as refused:
        await world.adapter.prepare(a_plan("ex_1.1"), "/", again=False)
    assert refused.value.reason is Reason.DUPLICATE_ATTEMPT
    assert world.files().phase == "running"


# --- shims that are taken back ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
async def test_a_shim_that_does_not_answer_is_told_of_and_left(world: Shims, tmp_path: Path) -> None:
    """Its lock is held, so nothing is concluded, and nothing is signalled."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    os.kill(world.shim_pid(), signal.SIGSTOP)
    async with shims(tmp_path) as next_daemon:
        assert not await next_daemon.adapter.adopt(EX)
        assert next_daemon.heard == [ShimSilent(EX)]
        os.kill(world.shim_pid(), signal.SIGCONT)
        assert await next_daemon.adapter.adopt(EX)


def crowd(directory: Path) -> list[socket.socket]:
    """As many connections as the kernel keeps for a shim that takes none."""
    waiting: list[socket.socket] = []
    with contextlib.suppress(BlockingIOError):
        while len(waiting) < 100:
            waiting.append(dial(directory))
    assert 0 < len(waiting) < 100
    return waiting


@pytest.mark.usefixtures("hasty")
async def test_a_shim_whose_backlog_is_full_blocks_nobody(world: Shims, tmp_path: Path) -> None:
    """The loop goes on while it is asked, and it is as silent as one that takes us and says nothing."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    os.kill(world.shim_pid(), signal.SIGSTOP)
    waiting = crowd(tmp_path / "x" / "ex_1.1")
    turns = 0
    async with shims(tmp_path) as next_daemon:
        asked = asyncio.gather(next_daemon.adapter.adopt(EX))
        while not asked.done():
            turns += 1
            await asyncio.sleep(0.05)
        assert [*await asked] == [False] and next_daemon.heard == [ShimSilent(EX)]
    for one in waiting:
        one.close()
    assert turns >= 3


async def test_a_connection_that_breaks_while_the_shim_lives_is_asked_for_again(world: Shims) -> None:
    """What the shim does not know yet is said then."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    world.adapter._held["ex_1.1"].link.close()
    async with asyncio.timeout(20):
        while not world.cut:
            await asyncio.sleep(0.01)
    assert await world.adapter.adopt(EX) and world.heard == []
    world.adapter.stop(EX, 0, "cmd_stop")
    assert (await world.told(AttemptExited)).exit.cause_by == "cmd_stop"


async def test_a_shim_that_goes_before_its_end_is_swept_and_the_attempt_lost(world: Shims) -> None:
    """With evidence of what was found and done."""
    await world.start(a_plan("ex_1.1", "sh", "-c", "setsid sleep 300 & exec sleep 300"))
    await world.kill_shim()
    lost = await world.told(AttemptLost)
    assert lost.reason is Reason.SHIM_LOST and lost.evidence is not None
    assert (lost.evidence.found, lost.evidence.signalled, lost.evidence.remaining) == (2, 2, 0)


async def test_a_shim_that_goes_behind_its_record_has_told_the_end(world: Shims) -> None:
    """The files are asked before anything is called lost."""
    failpoints.arm("shim.exit_durable=kill")
    await world.adapter.prepare(a_plan("ex_1.1", "sh", "-c", "exit 3"), "/", again=False)
    await world.adapter.release(EX, {})
    end = await ends(world)
    assert isinstance(end, AttemptExited) and end.exit.code == 3


# --- hung shims -------------------------------------------------------------------------------------------------


async def hung(world: Shims, *argv: str) -> tuple[int, int]:
    """A shim that is stopped over a child that runs; both pids."""
    await world.start(a_plan("ex_1.1", *(argv or SLEEP)))
    shim, child = world.shim_pid(), world.files().child_pid
    os.kill(shim, signal.SIGSTOP)
    return shim, child


async def test_a_hung_shim_is_killed_by_its_identity_and_what_it_guarded_with_it(world: Shims) -> None:
    """The attempt is lost, and says that its shim hung."""
    shim, child = await hung(world)
    identity = ProcessIdentity(boot_id=BOOT_ID, pid=shim, start=start_time(shim))
    end = await world.adapter.end_hung(EX, identity)
    assert isinstance(end, AttemptLost) and end.reason is Reason.SHIM_HUNG
    assert end.evidence is not None and (end.evidence.found, end.evidence.remaining) == (1, 0)
    assert not alive(shim) and not alive(child)


async def test_a_hung_shim_is_known_by_its_files_where_the_journal_has_nothing(world: Shims) -> None:
    """As those of this boot say."""
    shim, _child = await hung(world)
    assert isinstance(await world.adapter.end_hung(EX, None), AttemptLost)
    assert not alive(shim)


@pytest.mark.parametrize("wrong", [{"start": 1}, {"boot_id": "another"}])
async def test_a_pid_that_was_given_to_somebody_else_is_never_signalled(world: Shims, wrong: dict[str, Any]) -> None:
    """The lock stays held, so nothing is known of the end; what it guarded is ended all the same."""
    shim, child = await hung(world)
    fields: dict[str, Any] = {"boot_id": BOOT_ID, "pid": shim, "start": start_time(shim), **wrong}
    end = await world.adapter.end_hung(EX, ProcessIdentity(**fields))
    assert isinstance(end, RemainsSwept) and end.evidence.found == 1
    assert alive(shim) and not alive(child)


async def test_files_of_another_boot_name_nobody(world: Shims, tmp_path: Path) -> None:
    """The pid in them may be anybody's by now."""
    shim, _child = await hung(world)
    meta = json.loads((tmp_path / "x" / "ex_1.1" / "meta.json").read_text())
    (tmp_path / "x" / "ex_1.1" / "meta.json").write_text(json.dumps(meta | {"boot_id": "another"}))
    assert isinstance(await world.adapter.end_hung(EX, None), RemainsSwept)
    assert alive(shim)
    os.kill(shim, signal.SIGKILL)


async def test_a_hung_shim_that_left_its_record_has_told_the_end(world: Shims) -> None:
    """It hung behind the last thing it had to do."""
    failpoints.arm("shim.exit_durable=stop")
    await world.adapter.prepare(a_plan("ex_1.1", "sh", "-c", "exit 3"), "/", again=False)
    await world.adapter.release(EX, {})
    await world.until(lambda: world.files().exit is not None)
    end = await world.adapter.end_hung(EX, None)
    assert isinstance(end, AttemptExited) and end.exit.code == 3


async def test_whatever_a_hung_shim_still_says_is_not_heard(world: Shims) -> None:
    """It was given up: its connection is closed first, so one end is told and not two."""
    await hung(world)
    await world.adapter.end_hung(EX, None)
    await world.until(lambda: not world.files().alive)
    assert world.heard == []


# --- tools ------------------------------------------------------------------------------------------------------


async def test_what_a_tool_ran_ends_before_its_caller_gives_its_locks_back(world: Shims, tmp_path: Path) -> None:
    """Its shim was killed: git would go on writing under nobody's lock."""
    tools = ShimTools(world.adapter)
    environment = {"PATH": "/usr/bin:/bin"}
    running = asyncio.gather(
        tools.run("g-cmd_1.1", ["sleep", "300"], cwd="/", env=environment, locks=(), timeout_ms=60_000),
        return_exceptions=True,
    )
    await world.until(lambda: world.files("g-cmd_1.1").phase == "running")
    child = world.files("g-cmd_1.1").child_pid
    await world.kill_shim("g-cmd_1.1")
    (failed,) = await running
    assert isinstance(failed, Broken) and failed.reason is Reason.SHIM_LOST
    assert not alive(child)


async def test_what_is_left_of_a_tool_of_an_earlier_daemon_ends_before_it_is_run_again(
    world: Shims, tmp_path: Path
) -> None:
    """Its shim is gone and left no record: whoever runs it now would run beside it."""
    environment = {"PATH": "/usr/bin:/bin"}
    tools = ShimTools(world.adapter)
    (tmp_path / "x" / "g-cmd_1.1").mkdir()
    cookie = {"LOCAL_RUNNER_COOKIE": world.adapter.settings.cookie("g-cmd_1.1")}
    left = subprocess.Popen(["/bin/sleep", "300"], env=cookie)
    done = await tools.run("g-cmd_1.1", ["echo", "ok"], cwd="/", env=environment, locks=(), timeout_ms=60_000)
    assert (done.status, done.stdout) == (0, b"ok\n")
    assert left.wait(20) == -signal.SIGKILL
