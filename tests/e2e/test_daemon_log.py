"""The daemon's own log, as its owner reads and turns it: of a running daemon, over its restarts, and from the journal."""

import asyncio
import fcntl
import json
import os
import sys
from pathlib import Path

import anyio.to_thread
import pytest

from runner.adapters.control_client import call_control
from runner.logsink import REPEATS_BURST
from tests.support.booted import CANNOT, booted, why_not
from tests.support.stand import ANSWER_S, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

STORY_S = 90.0
EXECUTIONS = 40
"""Some hundred bytes of log each: together more than the pipe of a follower holds that is made as small as a page."""


async def test_the_log_is_read_and_its_level_changed_while_the_daemon_runs() -> None:
    """For a time, and back before it is over; repeats do not fill it. Without a daemon and a unit: where it went, and status 1."""
    async with stand() as system:
        pid = system.pid("daemon")
        shown = (await system.run("runner", "logs", "--daemon")).splitlines()
        assert [line.split()[2] for line in shown] == [
            json.loads(line)["event"] for line in system.daemon_log().splitlines()
        ]
        await system.run("runner", "status")
        assert "owner.asked" not in system.daemon_log()
        assert (await system.json("runner", "log-level"))["level"] == "info"
        told = await system.run("runner", "log-level", "debug", "--for", "1h")
        assert told.startswith("debug for ") and told.endswith(", then info\n")
        await system.logged("log.level_changed")
        said = await system.json("runner", "status")
        assert said["pid"] == pid and (said["log"]["level"], said["log"]["falls_back_to"]) == ("debug", "info")
        await system.logged('"verb":"status"')
        assert "log level" in await system.run("runner", "status")

        socket = system.home / "run" / "control.sock"
        for _ in range(REPEATS_BURST * 4):
            await anyio.to_thread.run_sync(call_control, socket, "status", {}, ANSWER_S)
        # Two windows at most are touched by so short a time.
        assert system.daemon_log().count("owner.asked") <= REPEATS_BURST * 2
        assert (await system.json("runner", "status"))["log"]["suppressed"] >= REPEATS_BURST * 2

        await system.run("runner", "log-level", "info")
        lines = system.daemon_log().count("owner.asked")
        await system.run("runner", "status")
        assert system.daemon_log().count("owner.asked") == lines
        status, _, err = await system.finished("runner", "log-level", "loud")
        assert status == 2 and "loud" in err

        await system.end("daemon")
        # Without a home there is no unit of ours either.
        system.env["HOME"] = str(system.home)
        status, out, err = await system.finished("runner", "logs", "--daemon", "-f")
        assert status == 1 and out == "" and "stderr of `runner start`" in err and "next: runner start" in err


async def test_a_follower_sees_every_line_however_slowly_it_reads() -> None:
    """Stuck while the daemon works on; then all of it, in order and once, and the next daemon's lines after it."""
    async with stand() as system:
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        with open(system.home / "said", "wb") as said:
            follower = await system._spawn(("runner", "logs", "--daemon", "-f"), stdout=writing, stderr=said)
        os.close(writing)
        lines = asyncio.StreamReader()
        try:
            executions = [await system.order("true") for _ in range(EXECUTIONS)]
            for execution in executions:
                await system.ended(execution)
            # Nobody has read a byte by now.
            pipe = open(reading, "rb", buffering=0)  # noqa: SIM115 - the transport closes it
            loop = asyncio.get_running_loop()
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), pipe)
            settled: list[str] = []
            async with asyncio.timeout(ANSWER_S):
                while len(settled) < EXECUTIONS:
                    words = (await lines.readline()).decode().split()
                    if words[2] == "attempt.settled":
                        settled.append(words[3].removeprefix("attempt="))
                assert sorted(settled) == sorted(f"{execution}.1" for execution in executions)

                await system.kill("daemon")
                await system.start_daemon()
                pid = f"pid={system.pid('daemon')}"
                while pid not in (line := (await lines.readline()).decode()):
                    assert line, "the follower has ended"
            assert "daemon.started" in line and follower.returncode is None
            assert "waiting for the next one" in (system.home / "said").read_text()
            transport.close()
        finally:
            follower.kill()
            await follower.wait()


def test_under_systemd_the_log_is_in_the_journal(tmp_path: Path) -> None:
    """Each line with fields that can be searched for, and read back when no daemon runs."""
    if reason := why_not():
        pytest.skip(reason)
    status, said = booted(sys.executable, "-m", "tests.support.journal_story", place=tmp_path, timeout_s=STORY_S)
    if status == CANNOT:
        pytest.skip(f"no systemd can be booted here: {said}")
    assert status == 0, said
    for part in ("fields: ", "journal: read without a daemon", "journal: followed into the next daemon"):
        assert part in said
