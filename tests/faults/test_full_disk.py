"""A full disk and a disk that fails: the journal finishes its sentences, or the daemon goes and says so; nothing is told twice."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from protocol.errors import Reason
from tests.support.full_disk import WAITING, inside
from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

END_S = 30.0
WAITS = "echo begun; while ! [ -e {go} ]; do sleep 0.05; done; exit 7"


def may_mount() -> bool:
    """Whether a private file system can be had here."""
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


small_disk = pytest.mark.skipif(not may_mount(), reason="a small file system of its own needs the right to mount")


@small_disk
def test_a_full_disk_takes_hundreds_of_settlements() -> None:
    """Also after the reserve of the start was used: it was made anew while there was room. Then DISK_FULL, and all is there."""
    found = inside(48, "tell")
    assert found["reason"] == Reason.DISK_FULL
    assert found["settlements"] == found["there"] > 700, found


@small_disk
def test_a_daemon_on_a_full_disk_refuses_and_settles() -> None:
    """1. Executions run. 2. The disk is full. 3. New work is refused. 4. Each settles with its own status. 5. Room: work is taken."""
    found = inside(96, "story")
    assert found["reasons"][-1] == "DISK_LOW" and found["ends"] == [7] * WAITING and found["broken"] == 0, found


async def begun(system: Stand) -> tuple[str, Path]:
    """Work that waits for a file, and runs."""
    go = system.home / "go"
    execution = await system.order("sh", "-c", WAITS.format(go=go))

    async def runs() -> bool:
        attempts = (await system.json("runner", "ps"))["attempts"]
        return any(one["state"] == "running" and one["log_end"] for one in attempts)

    await poll(runs, "the work to run")
    return execution, go


@pytest.mark.parametrize("reason", [Reason.INFRA, Reason.DISK_FULL])
async def test_a_journal_that_breaks_ends_the_daemon_and_nothing_else(reason: Reason) -> None:
    """1. Work runs. 2. A commit fails. 3. The daemon says so once, and is gone. 4. The work is not. 5. The next one settles it once."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        await system.start_daemon(LOCAL_RUNNER_FAILPOINTS=f"journal.before_commit=4*error({reason})")
        await system.online()
        execution, go = await begun(system)
        daemon = system._running["daemon"]
        late = await system.order("true")
        for verb in ("pause", "resume"):
            # Each is a commit: the fourth of this daemon, wherever the others went.
            await system.finished("runner", verb)
        assert await asyncio.wait_for(daemon.wait(), END_S) == 1
        said = [json.loads(line) for line in system.daemon_log().splitlines() if line.startswith("{")]
        (broken,) = [line for line in said if line["event"] == "journal.broken"]
        assert reason in broken["detail"] and "journal.db" in broken["detail"]
        assert "Traceback" not in system.daemon_log()
        assert system.carriers() != []

        await system.start_daemon()
        go.touch()
        ended = await system.ended(execution)
        assert (ended["settlement"]["verdict"], ended["exit_status"]) == ("exited", 7)
        await system.online()
        await system.run("runner", "resume")
        assert (await system.ended(late))["exit_status"] == 0
        for each in (execution, late):
            statements = (await system.get(f"/receipts/{each}"))["statements"]
            assert sorted(one["kind"] for one in statements) == ["receipt", "settlement"]


async def test_a_journal_that_cannot_be_opened_is_one_line_and_no_start() -> None:
    """Garbage, a directory in its place, of a newer version: exit status 1 at once, no traceback, and nothing was begun."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        journal = system.state / "journal.db"
        for spoil in (
            lambda: journal.write_bytes(b"\xa5" * 65536),
            lambda: (journal.unlink(), journal.mkdir()),
            lambda: (journal.rmdir(), os.mkfifo(journal)),
        ):
            spoil()
            status, out, err = await system.finished("runner", "--log-format", "json", "start")
            broken = [line for line in err.splitlines() if "journal.broken" in line]
            assert (status, out, len(broken)) == (1, "", 1), err
            assert str(journal) in broken[0] and "Traceback" not in err
            assert "daemon.started" not in err and "next: runner doctor" in err
