"""Connections for renewals alone: what they do, what they never do, and how many there are."""

from contextlib import AsyncExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from controlplane import gateway
from controlplane.limits import RENEWALS_PER_RUNNER_MAX
from protocol.errors import CloseCode, Reason
from protocol.limits import LEASE_TTL_MS, RECONCILE_MS, REGRANT_DELAY_MS
from protocol.messages import Beat, Bye, HeldLease, Need, Report, encode
from protocol.receipt import Outcome
from tests.support.control_plane import Running, running
from tests.support.fake_runner import Closed, FakeRunner, Line

pytestmark = pytest.mark.slow


async def begun(cp: Running, line: Line) -> str:
    """An execution that runs."""
    asked = await cp.start()
    await line.report(line.runner.accepted(await line.command()))
    return str(asked["id"])


async def a_runner(cp: Running) -> FakeRunner:
    """An enrolled runner that says who it is."""
    return (await cp.enrol()).started("A")


async def test_it_renews_beside_the_session(tmp_path: Path) -> None:
    """The welcome is the runner's own; the session stays, nothing is dispatched there, and no row changes."""
    async with running(tmp_path) as cp:
        runner = await a_runner(cp)
        async with runner.connect(cp.port) as line:
            execution = await begun(cp, line)
            await cp.post(f"/v1/executions/{execution}/stop")
            commits = cp.plane.commits
            async with runner.connect(cp.port, purpose="renew") as beside:
                assert beside.established.session != line.established.session
                assert (beside.established.ctl.hw, beside.established.certificate) == (1, None)
                for _ in range(3):
                    cp.boot.ahead_ms += LEASE_TTL_MS - 1000
                    answer = await beside.beat([HeldLease(res=f"exec:{execution}", token=1)], full=True)
                    assert [renewal.ttl_ms for renewal in answer.leases] == [LEASE_TTL_MS]
                    assert (answer.hints, answer.full) == ([], False)
                assert beside.heard == []
            assert cp.plane.commits == commits
            assert (await line.beat(full=True)).full


async def test_a_lease_that_ran_out_is_not_granted_there(tmp_path: Path) -> None:
    """Neither renewed nor granted anew, and a list that is sent there is compared with nothing."""
    async with running(tmp_path) as cp:
        runner = await a_runner(cp)
        async with runner.connect(cp.port) as line:
            execution = await begun(cp, line)
            async with runner.connect(cp.port, purpose="renew") as beside:
                cp.boot.ahead_ms += LEASE_TTL_MS + REGRANT_DELAY_MS
                lease = HeldLease(res=f"exec:{execution}", token=1)
                for _ in range(2):
                    answer = await beside.beat([lease], ["ex_9.1"], lost=[lease], full=True)
                    assert answer.leases[0].reason is Reason.EXPIRED
                    cp.boot.ahead_ms += RECONCILE_MS
            assert [message.t for message in line.heard] == []
            assert (await cp.get("/v1/events"))["events"] == []


async def test_anything_but_a_beat_ends_it(tmp_path: Path) -> None:
    """Reports, marks and data belong into the session, which goes on."""
    async with running(tmp_path) as cp:
        runner = await a_runner(cp)
        async with runner.connect(cp.port) as line:
            await cp.start()
            receipt = runner.receipt(await line.command(), Outcome.REFUSED, reason=Reason.CAPACITY)
            for message in (Report(items=[receipt]), Need(seq=1)):
                async with runner.connect(cp.port, purpose="renew") as beside:
                    await beside.send(message)
                    closed = await beside.closed()
                    assert (closed.code, closed.goodbyes[0].reason) == (4400, Reason.UNEXPECTED_MESSAGE)
            async with runner.connect(cp.port, purpose="renew") as beside:
                await beside.socket.send(b"\x01\x01" + bytes(40))
                assert (await beside.closed()).code == 4400
            async with runner.connect(cp.port, purpose="renew") as beside:
                await beside.socket.send(encode(Bye(reason=Reason.GOING_AWAY)))
                assert (await beside.closed()).code == 1000
            assert (await line.report(receipt)).answers[0].stored


async def test_they_are_few_and_short(tmp_path: Path) -> None:
    """Four at once; one that ends makes room; each ends by itself."""
    async with running(tmp_path) as cp:
        runner = await a_runner(cp)
        async with runner.connect(cp.port) as line:
            async with AsyncExitStack() as stack:
                for _ in range(RENEWALS_PER_RUNNER_MAX):
                    await stack.enter_async_context(runner.connect(cp.port, purpose="renew"))
                with pytest.raises(Closed) as closed:
                    await stack.enter_async_context(runner.connect(cp.port, purpose="renew"))
                assert (closed.value.code, closed.value.goodbyes[0].reason) == (1001, Reason.RATE_LIMITED)
            with patch.object(gateway, "RENEWAL_MS_MAX", 50):
                async with runner.connect(cp.port, purpose="renew") as beside:
                    assert (await beside.closed()).code == 1000
            assert (await line.beat()).n == 1


async def test_only_the_daemon_that_has_the_line_renews(tmp_path: Path) -> None:
    """One that was succeeded is a copy; one that has no session yet comes too early; another key proves nothing."""
    async with running(tmp_path) as cp:
        old = await a_runner(cp)
        async with old.connect(cp.port):
            pass
        new = old.started("B")
        early = new.started("C")
        async with new.connect(cp.port) as line:
            for runner, code, reason in (
                (old, CloseCode.IDENTITY_CONFLICT, Reason.IDENTITY_CONFLICT),
                (early, CloseCode.GOING_AWAY, Reason.GOING_AWAY),
            ):
                with pytest.raises(Closed) as closed:
                    async with runner.connect(cp.port, purpose="renew"):
                        pass
                assert (closed.value.code, closed.value.goodbyes[0].reason) == (code, reason)
            with pytest.raises(Closed) as closed:
                async with new.connect(cp.port, purpose="renew", seed=b"x" * 32):
                    pass
            assert closed.value.code == CloseCode.BAD_PROOF
            await line.send(Beat(n=1, hw=0))


async def test_it_keeps_a_copy_outside(tmp_path: Path) -> None:
    """A daemon whose session is starved still lives: its renewals say so."""
    async with running(tmp_path) as cp:
        original = await a_runner(cp)
        snapshot = original.started("B")
        async with original.connect(cp.port) as line:
            await begun(cp, line)
            await line.beat()
            async with original.connect(cp.port, purpose="renew") as beside:
                cp.boot.ahead_ms += 60_000
                await beside.beat()
            with pytest.raises(Closed) as closed:
                async with snapshot.connect(cp.port):
                    pass
            assert closed.value.code == CloseCode.IDENTITY_CONFLICT
