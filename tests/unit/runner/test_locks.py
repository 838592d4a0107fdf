"""Locks hold across tasks, processes and the death of a holder."""

import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from protocol.errors import Reason
from runner.adapters.git import WRITE_TIMEOUT_MS
from runner.adapters.locks import LOCK_WAIT_MS, Locks
from runner.errors import Broken

HOLDER = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"


async def test_one_holder_at_a_time(tmp_path: Path) -> None:
    """Tasks of two daemons take turns."""
    inside = 0
    most = 0

    async def one(locks: Locks) -> None:
        nonlocal inside, most
        async with locks.repository("/r/.git"), locks.worktree("w"):
            inside += 1
            most = max(most, inside)
            await anyio.sleep(0)
            inside -= 1

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(one, Locks(tmp_path))
            group.start_soon(one, Locks(tmp_path))
    assert most == 1


async def test_waiting_for_another_process_is_bounded(tmp_path: Path) -> None:
    """It ends with a reason, and succeeds once the other lets go."""
    locks = Locks(tmp_path, wait_ms=50)
    async with locks.repository("/r/.git"):
        pass
    (file,) = tmp_path.iterdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Broken) as caught:
            async with locks.repository("/r/.git"):
                raise AssertionError("not reached")
        assert caught.value.reason is Reason.WORKTREE_BUSY
        holder.communicate()
    async with locks.repository("/r/.git"):
        pass


async def test_a_tool_that_inherited_a_lock_keeps_it(tmp_path: Path) -> None:
    """We let go, as a daemon that dies does; the lock opens when the tool ends."""
    locks = Locks(tmp_path, wait_ms=50)
    async with locks.worktree("w") as fd:
        tool = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[fd])
    with pytest.raises(Broken):
        async with locks.worktree("w"):
            raise AssertionError("not reached")
    tool.communicate()
    async with locks.worktree("w"):
        pass


async def test_a_lock_file_that_is_a_link_is_not_opened(tmp_path: Path) -> None:
    """Nobody makes us create or hold a file elsewhere."""
    async with Locks(tmp_path).worktree("w"):
        pass
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Broken):
        async with Locks(tmp_path).worktree("w"):
            raise AssertionError("not reached")
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_outwaits_every_git() -> None:
    """Else a git of a dead daemon would make its command fail instead of wait."""
    assert LOCK_WAIT_MS > WRITE_TIMEOUT_MS
