"""Everything killed in an order drawn from a fixed seed, and many executions at once: nothing lost, doubled, or left behind."""

import sys

import pytest

from tests.chaos.rig import Rig
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

SEED = 20261121
KILLS = 100
LIVING = 6
MANY = 200
GATE = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.1)\nprint(sys.argv[2])\n"


async def test_a_hundred_kills_of_everything_lose_double_and_orphan_nothing() -> None:
    """Daemon, fork server, control plane, shims and children, 100 times: every end is exact, or tells what hit it."""
    async with stand() as system:
        rig = Rig(system, SEED)
        for _ in range(KILLS):
            while await rig.living() < LIVING:
                await rig.order()
            await rig.breathe(at_most_s=0.2)
            await rig.strike()
        tally = await rig.judge()
        print("\n".join(tally.lines()))
        assert tally.good, "\n".join(tally.lines())
        assert tally.kills.total() == KILLS
        assert tally.verdicts["exited"] > 0


async def _many() -> Stand:
    system = Stand()
    await system.start_plane()
    await system.enroll()
    policy = system.home / "policy.toml"
    policy.write_text(policy.read_text().replace("concurrent = 64", f"concurrent = {MANY}"))
    await system.start_daemon()
    await system.online()
    return system


async def test_two_hundred_executions_at_once_all_end_as_they_must_through_a_kill() -> None:
    """All live together behind one gate, the daemon is killed, the gate opens: each has its own output and its own end."""
    system = await _many()
    try:
        gate = system.home / "gate"
        ids = [
            await system.order(sys.executable, "-I", "-S", "-c", GATE, str(gate), f"number {number}")
            for number in range(MANY)
        ]

        async def all_run() -> bool:
            found = await system.get("/executions", runner=RUNNER, state="running", limit=MANY)
            return len(found["executions"]) == MANY

        await poll(all_run, f"{MANY} running executions")
        await system.kill("daemon")
        await system.start_daemon()
        gate.touch()
        for number, execution in enumerate(ids):
            ended = await system.ended(execution)
            assert (ended["exit_status"], ended["settlement"]["verdict"]) == (0, "exited")
            assert (await system.output(execution))["stdout"] == f"number {number}\n".encode()
        assert system.carriers() == []
    finally:
        left = await system.close()
    assert left == []
