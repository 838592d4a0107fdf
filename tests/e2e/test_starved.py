"""A daemon that does not get to its leases: its loop is held up, or all of it. Real processes, and a control plane in the test."""

import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from controlplane import beats, desk, leasing, ledger
from runner.shim.system import boottime_ms
from tests.support.control_plane import Running, running
from tests.support.stand import RUNNER, Stand, poll

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TTL_MS = 25_000
"""Long enough that a renewal beside the loop comes before the shim begins to stop, short enough for a test to outwait."""
GRACE_MS = 500
COUNTER = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"


class Held:
    """A daemon, a plane, and what they say of one execution."""

    def __init__(self, plane: Running, stand: Stand) -> None:
        self.plane = plane
        self.stand = stand

    async def start(self, on_loss: str) -> str:
        """A counter that runs under a lease; its id."""
        body = {
            "argv": ["sh", "-c", COUNTER],
            "cwd": str(self.stand.home),
            "on_loss": on_loss,
            "grace_ms": GRACE_MS,
        }
        answer = await self.plane.post(f"/v1/runners/{RUNNER}/executions", body)
        assert answer.status_code == 202, answer.text
        execution = str(answer.json()["id"])
        await self.until(lambda: self.meta(execution).get("phase") == "running", "the child")
        return execution

    def directory(self, execution: str) -> Path:
        """Of its attempt."""
        return self.stand.state / "x" / f"{execution}.1"

    def meta(self, execution: str) -> dict[str, Any]:
        """As its shim wrote it."""
        try:
            found: dict[str, Any] = json.loads((self.directory(execution) / "meta.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def child_state(self, execution: str) -> str:
        """The letter of its child in the process table, - when there is none."""
        try:
            stat = Path(f"/proc/{self.meta(execution)['child']['pid']}/stat").read_text()
        except FileNotFoundError:
            return "-"
        return stat.rpartition(") ")[2][0]

    async def deadline_ms(self, execution: str) -> int:
        """When its lease is over by what the daemon knows (BOOTTIME)."""
        for row in (await self.stand.json("runner", "ps"))["attempts"]:
            if row["execution_id"] == execution:
                left_ms = int(row["lease"]["deadline_in_ms"])
                assert left_ms <= TTL_MS, "the plane grants other leases than this test thinks"
                return boottime_ms() + left_ms
        raise AssertionError(f"{execution} is not there")

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait for a fact."""

        async def held() -> object:
            return holds()

        await poll(held, what)


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of TTL_MS from this plane, granted and renewed."""
    for module in (desk, leasing, ledger, beats):
        if hasattr(module, "LEASE_TTL_MS"):
            monkeypatch.setattr(module, "LEASE_TTL_MS", TTL_MS)
        if hasattr(module, "Grant"):
            monkeypatch.setattr(module, "Grant", partial(leasing.Grant, ttl_ms=TTL_MS))


@asynccontextmanager
async def held(monkeypatch: pytest.MonkeyPatch, **env: str) -> AsyncIterator[Held]:
    """A daemon with `env` that is connected to a plane that grants short leases."""
    shorten(monkeypatch)
    stand = Stand()
    async with running(stand.home / "plane") as plane:
        try:
            plane.plane.set_address("127.0.0.1", plane.port)
            await stand.enroll(join=await plane.join(RUNNER))
            await stand.start_daemon(**env)

            async def online() -> bool:
                return any(one.online for one in plane.plane.runners())

            await poll(online, "the session")
            yield Held(plane, stand)
        except BaseException:
            print(stand.daemon_log()[-4000:])
            raise
        finally:
            await stand.close()


async def test_a_loop_that_is_held_up_for_longer_than_a_lease_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """1. It runs under a lease that stops it. 2. The loop is blocked for 30 s. 3. The lease is renewed beside it, the shim told.
    4. When the loop goes on it knows, and nothing was lost, stopped or told to be."""
    gate = tmp_path / "gate"
    async with held(monkeypatch, LOCAL_RUNNER_FAILPOINTS=f"command.received=2*pause({gate})") as daemon:
        execution = await daemon.start("stop")
        before_ms = await daemon.deadline_ms(execution)
        await daemon.plane.start(RUNNER)
        await daemon.until(Path(f"{gate}.hit").exists, "the loop to be held")
        # The failpoint itself lets go after 30 s: longer than the lease.
        await daemon.until(lambda: boottime_ms() > before_ms + 1000, "the lease to be over")
        assert daemon.child_state(execution) != "-", "it was stopped"
        await daemon.stand.logged('"event":"lease.kept"')
        gate.touch()
        after_ms = await daemon.deadline_ms(execution)
        log = daemon.stand.daemon_log()
        assert after_ms > before_ms and "lease.lost" not in log and "shim.hung" not in log
        await daemon.stand.run("runner", "stop", execution)
        await daemon.until(lambda: (daemon.directory(execution) / "exit.json").exists(), "the end")
        record = json.loads((daemon.directory(execution) / "exit.json").read_text())
        assert record["cause"]["kind"] == "stop", "it lived until its owner stopped it"


async def test_a_daemon_that_is_stopped_as_a_whole_renews_nothing_and_its_shims_keep_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is to be stopped has ended, and what is to be frozen stands still, before the plane may grant anew; then it is thawed."""
    async with held(monkeypatch) as daemon:
        stopped, frozen = await daemon.start("stop"), await daemon.start("freeze")
        pid = daemon.stand.pid("daemon")
        for one in (stopped, frozen):
            assert await daemon.deadline_ms(one) > boottime_ms()
        os.kill(pid, signal.SIGSTOP)
        # A renewal may have come while we asked; none comes any more.
        latest_ms = boottime_ms() + TTL_MS
        try:
            await daemon.until(lambda: (daemon.directory(stopped) / "exit.json").exists(), "the end")
            await daemon.until(lambda: daemon.child_state(frozen) == "T", "the freeze")
            assert boottime_ms() < latest_ms
            await daemon.until(lambda: boottime_ms() > latest_ms, "the leases to be over")
            assert daemon.child_state(frozen) == "T"
        finally:
            os.kill(pid, signal.SIGCONT)
        record = json.loads((daemon.directory(stopped) / "exit.json").read_text())
        assert (record["verdict"], record["cause"]["kind"]) == ("stopped", "lease")
        child = daemon.meta(frozen)["child"]
        await daemon.until(lambda: daemon.child_state(frozen) in "SR", "the thaw, under a higher token")
        assert daemon.meta(frozen)["child"] == child

        async def settled() -> bool:
            return bool((await daemon.plane.get(f"/v1/executions/{stopped}"))["state"] == "settled")

        await poll(settled, "the settlement")
        assert '"event":"lease.acquired"' in daemon.stand.daemon_log()
