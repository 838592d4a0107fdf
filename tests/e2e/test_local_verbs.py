"""The owner's verbs on the machine: with the control plane gone, and without a daemon."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
print("child" if child == 0 else "parent", os.getpid(), flush=True)
print("apart", file=sys.stderr, flush=True)
time.sleep(600)
"""
"""A tree of two that a TERM does not end."""


async def tree_of(system: Stand, attempt: str) -> list[int]:
    """Process ids that the stubborn tree has printed, once it is complete."""

    async def complete() -> list[int] | None:
        _, out, _ = await system.finished("runner", "logs", attempt)
        pids = [int(line.split()[1]) for line in out.splitlines()]
        return pids if len(pids) == 2 else None

    found: list[int] = await poll(complete, "the tree")
    return found


async def nobody_left(system: Stand, pids: list[int]) -> None:
    """Wait until every one of them is gone."""

    async def gone() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids) and not system.carriers()

    await poll(gone, "the end of the tree")


async def test_the_owner_needs_no_control_plane() -> None:
    """Status, ps, logs and stop answer; what was stopped meanwhile is settled once, when the control plane is back."""
    async with stand() as system:
        execution = await system.order(sys.executable, "-I", "-S", "-c", STUBBORN)
        attempt = f"{execution}.1"
        pids = await tree_of(system, execution)
        await system.kill("plane")

        async def noticed() -> bool:
            said = await system.json("runner", "status")
            return bool(said["session"]["state"] == "down" and said["session"]["reason"])

        await poll(noticed, "the daemon to miss its control plane")
        said = await system.json("runner", "status")
        assert (said["running"], said["attempts"]) == (True, 1)
        (listed,) = (await system.json("runner", "ps"))["attempts"]
        assert (listed["attempt"], listed["state"], listed["verdict"]) == (attempt, "running", None)
        assert listed["pid"] in pids and listed["log_end"] > 0
        assert (await system.finished("runner", "logs", execution))[2] == "apart\napart\n"

        follower = await system.pipe("follower", "runner", "logs", "-f", execution)
        assert follower.stdout is not None
        assert (await follower.stdout.readline()).split()[0] in (b"parent", b"child")
        out = await system.run("runner", "stop", execution, "--grace", "300ms")
        assert out == f"{attempt} stopping\n"
        await follower.stdout.read()
        assert await follower.wait() == 0
        await nobody_left(system, pids)
        (over,) = (await system.json("runner", "ps", "--all"))["attempts"]
        assert (over["state"], over["verdict"], over["exit_status"]) == ("settled", "stopped", 137)
        assert await system.run("runner", "stop", execution) == f"{attempt} ended\n"

        await system.start_plane()
        ended = await system.ended(execution)
        settlement = ended["settlement"]
        assert (settlement["verdict"], settlement["cause"]["kind"]) == ("stopped", "stop")
        assert settlement["cause"]["by"] == f"owner:{os.getuid()}"
        statements = (await system.get(f"/receipts/{execution}"))["statements"]
        assert sorted(one["kind"] for one in statements) == ["receipt", "settlement"]


async def test_without_a_daemon_the_files_tell() -> None:
    """Every verb but stop; stop says what is needed, and what has ended already."""
    async with stand() as system:
        over = await system.ran("sh", "-c", "echo done; exit 4")
        execution = await system.order(sys.executable, "-I", "-S", "-c", STUBBORN)
        pids = await tree_of(system, execution)
        await system.kill("daemon")

        status, out, err = await system.finished("runner", "status")
        assert status == 1 and f"1 living: {execution}.1" in out and "next: runner start" in err
        status, out, err = await system.finished("runner", "status", "--json")
        said = json.loads(out)
        assert (status, err, said["running"], said["attempts"]) == (1, "", False, [f"{execution}.1"])
        assert said["identity"]["name"] == "stand" and said["identity"]["problem"] is None

        status, out, err = await system.finished("runner", "ps", "--all", "--json")
        found = {one["execution_id"]: one for one in json.loads(out)["attempts"]}
        assert (status, err) == (0, "")
        assert (found[over["id"]]["state"], found[over["id"]]["exit_status"]) == ("ended", 4)
        assert found[execution]["state"] == "running" and found[execution]["pid"] in pids
        assert "what the files say" in (await system.finished("runner", "ps"))[2]

        assert (await system.finished("runner", "logs", over["id"]))[:2] == (0, "done\n")
        status, _, err = await system.finished("runner", "stop", execution)
        assert status == 1 and "only the daemon can stop it" in err and "next: runner start" in err
        assert (await system.finished("runner", "stop", over["id"]))[:2] == (0, f"{over['id']}.1 ended\n")
        status, _, err = await system.finished("runner", "stop", "ex_nobody")
        assert status == 1 and "UNKNOWN_TARGET" in err and "next: runner ps --all" in err

        await system.start_daemon()
        await system.online()
        await system.run("runner", "stop", execution, "--grace", "0ms")
        assert (await system.ended(execution))["settlement"]["verdict"] == "stopped"
        await nobody_left(system, pids)


async def test_a_second_daemon_says_who_is_there() -> None:
    """On the same state directory, and on the same socket of another one: exit status 5 and the first one's process id."""
    async with stand() as system:
        pid = system.pid("daemon")
        status, _, err = await system.finished("runner", "start")
        assert (
            status == 5 and f"another daemon (pid {pid}) holds {system.state}" in err and "next: runner status" in err
        )

        (system.home / "b").mkdir()
        join = (await system.post("/join-tokens", {}))["join"]
        elsewhere = ("runner", "--state-dir", f"{system.home}/b")
        await system.run(*elsewhere, "enroll", join, "--name", "bee")
        status, _, err = await system.finished(*elsewhere, "start")
        assert status == 5 and f"another daemon (pid {pid}) holds {system.home}/run/control.sock" in err
        assert "Traceback" not in err
        (system.home / "open").mkdir(mode=0o755)
        status, _, err = await system.finished(*elsewhere, "--runtime-dir", f"{system.home}/open", "start")
        assert status == 3 and f"next: chmod 700 {system.home}/open" in err and "Traceback" not in err
