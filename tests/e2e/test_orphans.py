"""Processes that outlive their shim, shims that hang: what a real daemon makes of them, on its own and on its owner's word."""

import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Stand]:
    """One stand for all."""
    async with stand() as running:
        yield running


def meta(system: Stand, execution: str) -> dict[str, Any]:
    """As the shim of its first attempt wrote it."""
    found: dict[str, Any] = json.loads((system.state / "x" / f"{execution}.1" / "meta.json").read_text())
    return found


async def runs(system: Stand, *argv: str, **extra: Any) -> str:
    """An execution whose child runs."""
    execution = await system.order(*argv, **extra)

    async def running() -> bool:
        try:
            return bool(meta(system, execution)["phase"] == "running")
        except FileNotFoundError:
            return False

    await poll(running, "the child")
    return execution


async def gone(pid: int) -> None:
    """Wait until a process has ended."""

    async def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return True

    await poll(ended, f"the end of {pid}")


@contextmanager
def a_process(system: Stand, runner: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says it belongs to an attempt of this runner."""
    process = subprocess.Popen(["/bin/sleep", "300"], env={"LOCAL_RUNNER_COOKIE": f"{runner}:{name}"})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def orphans(system: Stand, *args: str) -> tuple[int, dict[str, Any]]:
    """`runner orphans --json`: its status and what it says."""
    status, out, err = await system.finished("runner", "orphans", "--json", *args)
    assert out, err
    found: dict[str, Any] = json.loads(out)
    return status, found


def states(found: dict[str, Any]) -> dict[str, str]:
    """By attempt."""
    return {one["attempt"]: one["state"] for one in found["attempts"]}


async def test_what_nobody_knows_is_listed_left_and_ended_on_the_owners_word(system: Stand) -> None:
    """It is told of and not touched, until its owner says so; a guarded attempt is never touched by this."""
    execution = await runs(system, "sleep", "300")
    runner = (await system.json("runner", "status"))["runner"]
    with a_process(system, runner, "ex_nobody.1") as process:
        status, found = await orphans(system)
        assert status == 8 and states(found) == {f"{execution}.1": "guarded", "ex_nobody.1": "unknown"}
        assert process.poll() is None
        status, found = await orphans(system, "--kill")
        assert (status, found["orphans"]) == (0, 0) and process.wait() == -signal.SIGKILL
    assert [(one["attempt"], one["found"], one["remaining"]) for one in found["swept"]] == [("ex_nobody.1", 1, 0)]
    status, found = await orphans(system, "--kill")
    assert status == 0 and states(found) == {f"{execution}.1": "guarded"} and found["swept"] == []
    await system.run("runner", "stop", execution)
    assert (await system.ended(execution))["verdict"] == "stopped"


async def test_what_is_left_of_a_settled_attempt_is_ended(system: Stand) -> None:
    """Its end was told, so nothing of it may live: the owner need not wait for the daemon's next look."""
    ended = await system.ran("true")
    runner = (await system.json("runner", "status"))["runner"]
    with a_process(system, runner, f"{ended['id']}.1") as process:
        status, found = await orphans(system)
        assert status == 8 and states(found) == {f"{ended['id']}.1": "settled"}
        status, _found = await orphans(system, "--kill")
        assert status == 0 and process.wait() == -signal.SIGKILL
    await system.logged('"event":"orphan.swept"')


async def test_a_shim_that_hangs_is_ended_by_a_stop_from_the_daemon(system: Stand) -> None:
    """1. Its shim is stopped. 2. The daemon dies, and the next finds that it does not answer. 3. A stop still ends it, by identity.
    4. The attempt is lost, and says why."""
    execution = await runs(system, "sleep", "300", grace_ms=0)
    found = meta(system, execution)
    os.kill(found["shim"]["pid"], signal.SIGSTOP)
    await system.kill("daemon")
    await system.start_daemon()
    await system.online()
    await system.logged('"event":"shim.hung"')
    status, listed = await orphans(system)
    assert status == 0 and states(listed) == {f"{execution}.1": "guarded"}, "it holds its lock"
    await system.run("runner", "stop", execution, "--grace", "0s")
    ended = await system.ended(execution)
    assert (ended["verdict"], ended["settlement"]["cause"]["reason"]) == ("lost", "SHIM_HUNG")
    await gone(found["shim"]["pid"])
    await gone(found["child"]["pid"])


async def test_a_shim_that_is_silent_for_a_while_is_taken_back(system: Stand) -> None:
    """It is asked again, and the stop that was said meanwhile is said then."""
    execution = await runs(system, "sleep", "300")
    pid = meta(system, execution)["shim"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    await system.kill("daemon")
    await system.start_daemon()
    await system.online()

    async def told() -> bool:
        return f'"attempt":"{execution}.1","event":"shim.hung"' in system.daemon_log()

    await poll(told, "the shim to be missed")
    os.kill(pid, signal.SIGCONT)
    await system.run("runner", "stop", execution)
    ended = await system.ended(execution)
    assert (ended["verdict"], ended["settlement"]["cause"]["kind"]) == ("stopped", "stop")


async def test_a_stop_outlives_the_daemon_that_took_it(system: Stand) -> None:
    """1. The stop is durable. 2. The daemon dies before the shim acts on it. 3. The next says it again, and one stop comes of it."""
    await system.end("daemon")
    await system.start_daemon()
    await system.online()
    execution = await runs(system, "sleep", "300")
    pid = meta(system, execution)["shim"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    await system.run("runner", "stop", execution)
    await system.kill("daemon")
    os.kill(pid, signal.SIGCONT)
    await system.start_daemon()
    ended = await system.ended(execution)
    assert (ended["verdict"], ended["settlement"]["cause"]["kind"]) == ("stopped", "stop")
