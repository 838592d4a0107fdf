"""The daemon is told to end, paused, drained: whatever it is told, each execution ends once, rightly, and the plane hears of it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.stand import Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

WAITS = "echo begun; while ! [ -e {go} ]; do sleep 0.05; done; echo over; exit 7"
END_S = 30.0


@asynccontextmanager
async def under(on_stop: str = "leave", **limits: int) -> AsyncIterator[Stand]:
    """A stand whose owner has said what becomes of executions, and how much must be free."""
    async with stand(enrolled=False) as system:
        policy = system.home / "policy.toml"
        text = policy.read_text().replace('on_stop = "leave"', f'on_stop = "{on_stop}"')
        for name, value in limits.items():
            text = text.replace(f"\n{name} = 0\n", f"\n{name} = {value}\n")
        policy.write_text(text)
        await system.enroll()
        await system.start_daemon()
        await system.online()
        yield system


async def begin(system: Stand, name: str = "go") -> tuple[str, Path]:
    """Work that waits for a file, and runs."""
    go = system.home / name
    execution = await system.order("sh", "-c", WAITS.format(go=go))

    async def runs() -> bool:
        attempts = (await system.json("runner", "ps"))["attempts"]
        return any(
            one["execution_id"] == execution and one["state"] == "running" and one["log_end"] for one in attempts
        )

    await poll(runs, "the work to run")
    return execution, go


async def told(system: Stand, number: int) -> Any:
    """Signal the daemon; the process."""
    os.kill(system.pid("daemon"), number)
    return system._running["daemon"]


async def gone(process: Any) -> int:
    """Its exit status."""
    return int(await asyncio.wait_for(process.wait(), END_S))


async def settled_once(system: Stand, execution: str, verdict: str, status: int) -> dict[str, Any]:
    """Its settlement, of which there is one, beside one receipt."""
    ended = await system.ended(execution)
    assert (ended["settlement"]["verdict"], ended["exit_status"]) == (verdict, status), ended
    statements = (await system.get(f"/receipts/{execution}"))["statements"]
    assert sorted(one["kind"] for one in statements) == ["receipt", "settlement"]
    return ended


async def test_by_default_what_runs_is_left() -> None:
    """1. SIGTERM. 2. The daemon is gone, the work is not. 3. It ends while nobody looks. 4. The next daemon tells of it."""
    async with under() as system:
        execution, go = await begin(system)
        assert await gone(await told(system, signal.SIGTERM)) == 0
        assert len(system.carriers()) >= 1
        go.touch()

        async def over() -> bool:
            return not system.carriers()

        await poll(over, "the work to end")
        await system.start_daemon()
        await settled_once(system, execution, "exited", 7)
        assert (await system.output(execution))["stdout"] == b"begun\nover\n"


async def test_a_daemon_that_drains_waits_for_what_runs() -> None:
    """1. SIGTERM. 2. New work is not begun. 3. What runs ends by itself. 4. So does the daemon. 5. The next one takes new work."""
    async with under("drain") as system:
        execution, go = await begin(system)
        process = await told(system, signal.SIGTERM)
        await system.logged('"admission":"draining"')
        late = await system.order("true")
        assert (await system.json("runner", "status"))["admission"]["state"] == "draining"
        go.touch()
        assert await gone(process) == 0
        await settled_once(system, execution, "exited", 7)
        await system.start_daemon()
        await system.online()
        assert (await system.json("runner", "status"))["admission"]["state"] == "open"
        await settled_once(system, late, "exited", 0)


async def test_a_daemon_that_stops_ends_what_runs() -> None:
    """1. SIGTERM. 2. Everything is stopped by its ladder. 3. The settlement is there before the daemon goes."""
    async with under("stop") as system:
        execution, _ = await begin(system)
        assert await gone(await told(system, signal.SIGINT)) == 0
        assert system.carriers() == []
        ended = await settled_once(system, execution, "stopped", 143)
        assert ended["settlement"]["cause"]["kind"] == "stop"


@pytest.mark.parametrize("on_stop", ["drain", "leave"])
async def test_the_second_signal_ends_the_daemon_at_once(on_stop: str) -> None:
    """1. SIGTERM, and it waits, or goes. 2. Another one. 3. It is gone as if it had crashed; the next daemon takes everything up."""
    async with under(on_stop) as system:
        execution, go = await begin(system)
        process = await told(system, signal.SIGTERM)
        await system.logged('"event":"daemon.stopping"')
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        assert await gone(process) in ((-signal.SIGTERM,) if on_stop == "drain" else (-signal.SIGTERM, 0))
        assert system.carriers() != []
        await system.start_daemon()
        go.touch()
        await settled_once(system, execution, "exited", 7)


async def test_a_pause_outlives_the_daemon() -> None:
    """1. Paused. 2. The daemon is killed. 3. The next one is paused, too. 4. Opened again, what waited runs."""
    async with under() as system:
        running, go = await begin(system)
        assert "2 attempts" not in await system.run("runner", "pause")
        await system.kill("daemon")
        await system.start_daemon()
        await system.online()
        assert (await system.json("runner", "status"))["admission"] == {"state": "paused", "stops_in_ms": None}
        go.touch()
        await settled_once(system, running, "exited", 7)
        assert await system.run("runner", "resume") == "open for new work\n"
        assert (await system.ran("true"))["exit_status"] == 0


async def test_a_drain_goes_on_to_the_same_moment_in_the_next_daemon() -> None:
    """1. Drained with a deadline. 2. The daemon is killed. 3. The next one stops what still runs, at that deadline."""
    async with under() as system:
        execution, _ = await begin(system)
        drain = await system.pipe("drain", "runner", "drain", "--deadline", "4s")
        assert drain.stderr is not None
        assert (await drain.stderr.readline()).startswith(b"1 attempt runs")
        await system.kill("daemon")
        await drain.stderr.read()
        assert await drain.wait() == 1
        await system.start_daemon()
        await settled_once(system, execution, "stopped", 143)
        assert (await system.json("runner", "drain"))["attempts"] == 0


async def test_a_drained_daemon_can_be_ended() -> None:
    """`--exit`: nothing runs, everything was told, and the process is gone with 0."""
    async with under() as system:
        execution, go = await begin(system)
        process = system._running["daemon"]
        drain = await system.pipe("drain", "runner", "drain", "--exit", "--json")
        assert drain.stdout is not None
        await system.logged('"admission":"draining"')
        go.touch()
        await drain.stdout.read()
        assert (await drain.wait(), await gone(process)) == (0, 0)
        await settled_once(system, execution, "exited", 7)
        status, out, _ = await system.finished("runner", "explain", execution)
        assert status == 0 and "report.answered" in out and "report.waiting" not in out


async def test_a_machine_without_room_refuses_before_it_accepts() -> None:
    """1. The disk has less than its owner wants. 2. A start is refused with its reason and a time. 3. Status says so, too."""
    async with under(disk_free_mib_min=1024 * 1024) as system:
        execution = await system.order("true")

        async def refused() -> str:
            _, out, _ = await system.finished("runner", "explain", execution)
            return out if "command.receipted" in out else ""

        said = await poll(refused, "the refusal")
        assert "refused: DISK_LOW" in said and "1048576 are wanted" in said and "retry_after_ms 30000" in said
        assert "attempt.intent" not in said
        assert (await system.json("runner", "status"))["headroom"]["short"] == "DISK_LOW"
