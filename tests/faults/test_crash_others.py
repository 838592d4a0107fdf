"""What dies is not always the daemon: shims at each of their points, the control plane at each of its own, and a daemon in the middle of
taking back what another one left. One effect at most, one receipt, one settlement that tells what happened."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from typing import Final

import httpx
import pytest
import pytest_asyncio

from protocol.envelope import digest_of
from protocol.receipt import Outcome, Verdict
from tests.faults.crash import Crash, crash
from tests.support.hostile_plane import payload_of
from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SHIM_ROWS: Final = {
    "shim.ready": ({Verdict.NEVER_STARTED, None}, 0),
    "shim.released": ({Verdict.LOST}, 0),
    "shim.spawned": ({Verdict.LOST}, 1),
    "shim.child_ended": ({Verdict.LOST}, 1),
    "shim.exit_told": ({Verdict.EXITED}, 1),
    "shim.exit_durable": ({Verdict.EXITED}, 1),
}
"""Point: the verdicts there may be (None: a receipt that says it never began), and how often the program may have run at most."""
RECOVERIES: Final = ("recovery.observed", "recovery.decided", "recovery.performed", "sweep.ended")
PLANE_POINTS: Final = {"plane.before_commit": 3, "plane.after_commit": 3, "plane.numbered": 1, "plane.report_stored": 3}
"""Point: the hit at which the plane dies. Orders that wait for a session are numbered together, so the first hit is the sure one."""
STATEMENTS: Final = ["receipt", "settlement"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system() -> AsyncIterator[Crash]:
    """One state directory for all."""
    async with crash() as crashing:
        yield crashing


@pytest.mark.parametrize("point", SHIM_ROWS)
async def test_a_shim_killed_at_its_point_leaves_an_honest_end(system: Crash, point: str) -> None:
    """The daemon lives: it finds out, ends what is left, and says `lost` unless the shim had told the end."""
    verdicts, runs = SHIM_ROWS[point]
    await system.armed(f"{point}=kill")
    execution, lines = system.system.new_execution(), system.fresh("lines")
    env = system.system.start({"execution_id": execution, "argv": ["sh", "-c", f"echo ran >> {lines}"]})
    receipt = await system.system.plane.fate(env)
    if receipt.outcome is not Outcome.ACCEPTED:
        assert None in verdicts and not lines.exists()
        return
    ended = await system.settled(execution)
    assert ended.verdict in verdicts
    assert (lines.read_text() if lines.exists() else "").count("ran") <= runs
    assert ended.exit_status == (0 if ended.verdict is Verdict.EXITED else 125), "a missing record is never 0"
    assert system.alive(execution) == []


@pytest.mark.parametrize("point", RECOVERIES)
async def test_a_daemon_killed_while_it_takes_back_takes_back_again(system: Crash, point: str) -> None:
    """A shim was killed while no daemon lived; the first daemon after it dies at the point, the second one settles."""
    await system.armed("")
    execution = system.system.new_execution()
    env = system.system.start({"execution_id": execution, "argv": ["sh", "-c", "sleep 600"]})
    assert (await system.system.plane.fate(env)).outcome is Outcome.ACCEPTED

    async def sleeps() -> bool:
        return len(system.alive(execution)) > 0

    await poll(sleeps, "its child")
    await system.stopped()
    system.kill_shim(execution)
    await system.system.stand.start_daemon(LOCAL_RUNNER_FAILPOINTS=f"{point}=1*kill")
    await system.dies()
    before = system.system.plane.sessions
    await system.system.stand.start_daemon()
    await system.system.plane.online(before)
    ended = await system.settled(execution)
    assert (ended.verdict, ended.cause.kind) == (Verdict.LOST, "shim_lost")
    assert system.alive(execution) == []
    assert digest_of(payload_of(env)) in system.system.plane.receipts


@pytest.mark.parametrize("point", PLANE_POINTS)
async def test_a_plane_killed_at_its_point_sends_nothing_twice(point: str) -> None:
    """It comes back with its data: the order it took has one effect, and what runners told is there once."""
    async with stand() as system:
        lines = system.home / "lines"
        await system.kill("plane")
        system.env["LOCAL_CONTROLPLANE_FAILPOINTS"] = f"{point}={PLANE_POINTS[point]}*kill"
        await system.start_plane()
        del system.env["LOCAL_CONTROLPLANE_FAILPOINTS"]
        orders = asyncio.ensure_future(_order_until_taken(system, str(lines)))
        status = await asyncio.wait_for(system._running.pop("plane").wait(), 60)
        assert status == -signal.SIGKILL, "it was to die at its point"
        await system.start_plane()
        for execution in await orders:
            ended = await system.ended(execution)
            assert (ended["exit_status"], ended["settlement"]["verdict"]) == (0, "exited")
            kinds = [each["kind"] for each in (await system.get(f"/receipts/{execution}"))["statements"]]
            assert sorted(kinds) == STATEMENTS
        assert sorted(lines.read_text().split()) == ["0", "1", "2"]


async def _order_until_taken(system: Stand, lines: str) -> list[str]:
    """Three executions, each under a key of its own, asked for again until the plane has them."""
    taken = []
    for number in range(3):
        body = {"argv": ["sh", "-c", f"echo {number} >> {lines}"], "cwd": str(system.home)}

        async def order(body: dict[str, object] = body, key: str = f"key-{number}") -> str | None:
            try:
                answer = await system.http.post(
                    f"/runners/{RUNNER}/executions", json=body, headers={"Idempotency-Key": key}
                )
            except httpx.TransportError:
                return None
            return str(answer.json()["id"]) if answer.status_code < 300 else None

        taken.append(str(await poll(order, "the order to be taken")))
    return taken


async def test_an_ack_that_was_not_written_is_asked_for_again() -> None:
    """The daemon dies when it has written that the log is durable at the plane; the next one sends nothing twice."""
    async with stand() as system:
        await system.kill("daemon")
        await system.start_daemon(LOCAL_RUNNER_FAILPOINTS="log.acked=1*kill")
        execution = await system.order(sys.executable, "-c", "print('x' * 100000)")
        status = await asyncio.wait_for(system._running.pop("daemon").wait(), 60)
        assert status == -signal.SIGKILL
        await system.start_daemon()
        ended = await system.ended(execution)
        assert ended["log"]["complete"] and ended["exit_status"] == 0
        assert (await system.output(execution))["stdout"] == b"x" * 100000 + b"\n"
