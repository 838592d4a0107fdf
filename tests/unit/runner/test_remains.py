"""Attempts seen from outside: what a daemon finds at its start, who of ours lives, and what is ended."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from protocol.commands import Background, SizePolicy
from protocol.ids import Attempt
from runner import failpoints
from runner.adapters import sweeper
from runner.adapters.attemptdir import Place
from runner.adapters.remains import GUARDED, UNGUARDED, Remains
from runner.core.inputs import AttemptExited
from runner.core.plans import Observed, Orphan, Phase, ProcessLeft, TerminalPlan
from runner.shim.system import start_time
from tests.support.engine import an_exit
from tests.support.shim import BOOT_ID, alive
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


async def seen(state_dir: Path) -> Observed:
    """The one attempt as the next daemon finds it."""
    async with shims(state_dir) as next_daemon:
        (found,) = await next_daemon.adapter.observe()
    return found


@contextmanager
def a_process(cookie: str | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a cookie, or with nothing at all in its environment."""
    env = {} if cookie is None else {"LOCAL_RUNNER_COOKIE": cookie}
    process = subprocess.Popen(["/bin/sleep", "300"], env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def remains_of(world: Shims, *outlive: str) -> Remains:
    """The same eyes without a daemon."""
    settings = world.adapter.settings
    return Remains(
        Place(state_dir=settings.state_dir, runner=settings.runner, boot_id=settings.boot_id), lambda: outlive
    )


# --- a daemon that starts ---------------------------------------------------------------------------------------


async def test_a_living_attempt_is_found_with_its_lock_held_and_its_child_alive(world: Shims, tmp_path: Path) -> None:
    """Everything is as it should be."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    found = await seen(tmp_path)
    assert found == Observed(
        attempt=EX,
        same_boot=True,
        phase=Phase.RUNNING,
        lock_held=True,
        exit=None,
        spec=True,
        shim_answers=True,
        child_alive=True,
    )


async def test_a_stopped_shim_is_known_not_to_answer(world: Shims, tmp_path: Path) -> None:
    """By its state in the process table, without waiting for it."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    os.kill(world.shim_pid(), signal.SIGSTOP)
    await world.until(lambda: Path(f"/proc/{world.shim_pid()}/stat").read_text().rpartition(") ")[2][0] == "T")
    found = await seen(tmp_path)
    assert (found.lock_held, found.shim_answers) == (True, False)


async def test_a_child_whose_shim_was_killed_is_found_alive(world: Shims, tmp_path: Path) -> None:
    """The lock is free, there is no record, and something carries the cookie."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    world.adapter.close()
    await world.kill_shim()
    found = await seen(tmp_path)
    assert (found.lock_held, found.exit, found.child_alive) == (False, None, True)


async def test_a_spec_that_is_not_there_is_told(world: Shims, tmp_path: Path) -> None:
    """A directory that was made right before the power went."""
    (tmp_path / "x" / "ex_1.1").mkdir(parents=True)
    found = await seen(tmp_path)
    assert (found.spec, found.phase, found.child_alive, found.same_boot) == (False, Phase.NONE, False, False)


async def test_what_the_shim_could_not_end_is_found_alive_by_its_identity(world: Shims) -> None:
    """Its environment says nothing of us; another process of the same number is none of it."""
    with a_process() as left:
        start = start_time(left.pid)
        for told, is_alive in ((start, True), (start + 1, False)):
            remains = Remains(world.adapter.settings)
            remains.watch("ex_1.1", an_exit(boot_id=BOOT_ID, survivors=1, remains=(left_of(left.pid, told),)))
            assert [stray.name for stray in remains.strays()] == (["ex_1.1"] if is_alive else [])


async def test_a_record_of_another_boot_names_nobody(world: Shims) -> None:
    """Its numbers are anybody's now."""
    remains = Remains(world.adapter.settings)
    remains.watch("ex_1.1", an_exit(boot_id="another", survivors=1, remains=(left_of(os.getpid(), 1),)))
    assert remains.strays() == []


def left_of(pid: int, start: int) -> ProcessLeft:
    """As a shim writes it down."""
    return ProcessLeft(pid=pid, start=start, name="sleep", state="D", why="d_state")


# --- looking ----------------------------------------------------------------------------------------------------


async def test_every_process_of_ours_is_found_by_its_attempt_and_whether_a_shim_guards_it(world: Shims) -> None:
    """Also those of tools; those of another runner are not ours."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    mine = world.adapter.settings
    with a_process(mine.cookie("ex_2.1")), a_process(mine.cookie("g-cmd_1.1")), a_process("rn_other:ex_3.1"):
        found = await world.adapter.scan()
    assert found == (
        Orphan(name="ex_1.1", processes=1, shim_alive=True),
        Orphan(name="ex_2.1", processes=1, shim_alive=False),
        Orphan(name="g-cmd_1.1", processes=1, shim_alive=False),
    )


@pytest.mark.parametrize("name", ["../../etc", "ex_1", "ex_1.0", "", "a/b.1", "ex 1.1"])
async def test_a_cookie_that_names_no_attempt_is_nobody(world: Shims, name: str) -> None:
    """It is what a process says of itself, and becomes no path."""
    with a_process(world.adapter.settings.cookie(name)):
        assert await world.adapter.scan() == ()


@pytest.mark.parametrize("background", list(Background))
async def test_the_background_of_a_pty_lives_on_where_it_may(world: Shims, background: Background) -> None:
    """By its spec and its shim's own word that it ended; a PTY whose shim was lost leaves nothing."""
    terminal = TerminalPlan(rows=24, cols=80, size_policy=SizePolicy.LATEST, background=background)
    for name in ("ex_1.1", "ex_2.1"):
        await world.start(a_plan(name, *SLEEP, terminal=terminal, overflow="head_tail"))
    await world.adapter.end_hung(Attempt.parse("ex_2.1"), None)
    world.adapter.stop(EX, 100, "cmd_1")
    await world.told(AttemptExited)
    await world.until(lambda: world.files("ex_1.1").exit is not None)
    world.adapter.collect(EX)
    await world.until(lambda: not world.files("ex_1.1").alive)
    remains = remains_of(world)
    with (
        a_process(world.adapter.settings.cookie("ex_1.1")) as left,
        a_process(world.adapter.settings.cookie("ex_2.1")) as lost,
    ):
        leaves = background is Background.LEAVE
        assert [each.name for each in remains.strays()] == (["ex_2.1"] if leaves else ["ex_1.1", "ex_2.1"])
        swept = remains.sweep("ex_1.1")
        assert (len(swept.outlived), swept.signalled) == ((1, 0) if leaves else (0, 1))
        assert alive(left.pid) is leaves or left.wait() == -signal.SIGKILL
        assert remains.sweep("ex_2.1").signalled == 1 and lost.wait() == -signal.SIGKILL


async def test_what_may_outlive_its_attempt_is_no_orphan(world: Shims) -> None:
    """As its spec says, or, where that is gone, as the owner says now."""
    with a_process(world.adapter.settings.cookie("ex_2.1")):
        assert remains_of(world, "sleep").strays() == []
        assert [stray.name for stray in remains_of(world, "gradle").strays()] == ["ex_2.1"]


async def test_who_ended_together_with_its_shim_is_no_orphan(world: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was listed while both lived, and the lock was free a moment later: without this an attempt that ended well is lost."""
    with a_process(world.adapter.settings.cookie("ex_2.1")) as process:
        (listed,) = sweeper.scan(world.adapter.settings.runner)
        process.kill()
        process.wait()
    monkeypatch.setattr(sweeper, "scan", lambda *_args, **_more: [listed])
    assert await world.adapter.scan() == ()


async def test_who_asks_without_a_daemon_learns_of_survivors_from_the_files(world: Shims) -> None:
    """`recall`: the records of all attempts, as a daemon has them in its memory."""
    await world.start(a_plan("ex_1.1", *SLEEP))
    remains = remains_of(world)
    remains.recall()
    (stray,) = remains.strays()
    told = stray.told(GUARDED if stray.guarded else UNGUARDED)
    assert (told["attempt"], told["state"], told["count"]) == ("ex_1.1", "guarded", 1)
    (process,) = told["processes"]
    assert (process["pid"], process["name"]) == (world.files().child_pid, "sleep")
    assert 0 <= process["age_ms"] < 60_000


# --- ending -----------------------------------------------------------------------------------------------------


async def test_a_sweep_ends_what_carries_the_cookie_and_what_is_watched(world: Shims) -> None:
    """Both are evidence; a second sweep finds nobody."""
    remains = Remains(world.adapter.settings)
    with a_process(world.adapter.settings.cookie("ex_2.1")) as carrier, a_process() as watched:
        record = an_exit(boot_id=BOOT_ID, survivors=1, remains=(left_of(watched.pid, start_time(watched.pid)),))
        remains.watch("ex_2.1", record)
        swept = remains.sweep("ex_2.1")
        assert (carrier.wait(), watched.wait()) == (-signal.SIGKILL, -signal.SIGKILL)
    assert (swept.found, swept.signalled) == (2, 2)
    assert any(line.startswith(f"{watched.pid} ") and line.endswith(" watched") for line in swept.seen)
    assert remains.sweep("ex_2.1").found == 0


async def test_a_cgroup_that_is_not_the_attempts_own_is_never_swept(world: Shims, tmp_path: Path) -> None:
    """The spec lies where the payload could have written to it."""
    directory = tmp_path / "x" / "ex_2.1"
    directory.mkdir(parents=True)
    (directory / "spec.json").write_text('{"v": 1, "cgroup": "/sys/fs/cgroup/user.slice"}')
    assert Remains(world.adapter.settings)._leaf("ex_2.1") is None
    (directory / "spec.json").write_text('{"v": 1, "cgroup": "/cg/runner-ex_2.1"}')
    assert Remains(world.adapter.settings)._leaf("ex_2.1") == Path("/cg/runner-ex_2.1")


async def test_who_lives_under_a_shim_is_not_taken_for_lost(world: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is asked first, and says that somebody is there."""
    monkeypatch.setattr("runner.adapters.remains.UNRELEASED_WAIT_S", 0.2)
    await world.start(a_plan("ex_1.1", *SLEEP))
    assert Remains(world.adapter.settings).end_by_files("ex_1.1") is None
    assert alive(world.files().child_pid)


def test_a_process_that_can_open_no_more_files_calls_nobody_dead(tmp_path: Path) -> None:
    """What cannot be asked is an error, and never an absent lock or record."""
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from runner.adapters.attemptfiles import is_alive, read_attempt\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
        "for look in (is_alive, read_attempt):\n"
        "    try:\n"
        "        print('answered', look(Path(sys.argv[1])))\n"
        "    except OSError as exc:\n"
        "        print(exc.errno)\n"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert said.stdout.split() == ["24", "24"], said.stderr
