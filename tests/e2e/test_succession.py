"""A machine that becomes another runner: nothing of the former one is lost, and nothing of it is told under the new name."""

import sqlite3
import sys
from contextlib import closing

import pytest

from tests.support.stand import RUNNER, Stand, poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WAITS = "import sys; print('here', flush=True); sys.stdin.read(); import time; time.sleep(600)"


async def replace(system: Stand, other: Stand, *options: str) -> tuple[int, str, str]:
    """Enrol the machine of `system` with the control plane of `other`."""
    (system.home / "join.txt").write_text((await other.post("/join-tokens", {"name": RUNNER}))["join"])
    join = ("--token-file", f"{system.home}/join.txt")
    return await system.finished("runner", "enroll", *join, "--name", RUNNER, "--replace", *options)


async def running_here(system: Stand, execution: str) -> None:
    """Wait until its output has begun to reach the control plane."""

    async def begun() -> bool:
        return b"here" in (await system.output(execution))["stdout"]

    await poll(begun, f"{execution} to run")


async def test_a_replaced_runner_leaves_everything_behind() -> None:
    """Refused while a daemon runs, while something lives, and while something is owed; then forced, at a second plane."""
    async with stand() as system, stand(enrolled=False) as other:
        (was,) = (await system.get("/runners"))["runners"]
        first = await system.ran(sys.executable, "-c", "print('told')")
        living = await system.order(sys.executable, "-I", "-S", "-c", WAITS)
        await running_here(system, living)

        status, _, said = await replace(system, other)
        assert (status, "next: systemctl --user stop runner" in said) == (5, True), said
        assert str(system.pid("daemon")) in said

        await system.end("daemon")
        status, _, said = await replace(system, other, "--force")
        assert status == 1 and f"{living}.1" in said and "next: runner start; runner stop" in said

        # Its end is settled while nobody is there to hear of it.
        await system.kill("plane")
        await system.start_daemon()
        await system.logged("attempt.adopted")
        await system.run("runner", "stop", living, "--grace", "0ms")
        await system.logged("attempt.settled")
        await system.run("runner", "logs", "-f", living)
        await system.end("daemon")
        status, _, said = await replace(system, other)
        assert status == 1 and "1 report unanswered, 1 log not stored there" in said and "--replace --force" in said
        assert (await system.json("runner", "config", "show"))["settings"]["state_dir"]["value"] == str(system.state)

        status, out, said = await replace(system, other, "--force")
        former = system.state / "former" / was["id"]
        assert status == 0 and str(former) in out, said
        with closing(sqlite3.connect(former / "journal.db")) as journal:
            assert journal.execute("SELECT count(*) FROM outbox WHERE answered_ms IS NULL").fetchone() == (1,)
        assert sorted(path.name for path in (former / "x").iterdir()) == sorted([f"{first['id']}.1", f"{living}.1"])

        log_before = len(system.daemon_log())
        await system.start_daemon()
        await other.online()
        (now,) = (await other.get("/runners"))["runners"]
        assert now["id"] != was["id"] and now["key_id"] != was["key_id"]
        ended = await other.ran(sys.executable, "-c", "print('new')", cwd=str(system.home))
        assert ended["exit_status"] == 0
        assert (await other.output(ended["id"]))["stdout"] == b"new\n"
        statements = (await other.get(f"/receipts/{ended['id']}"))["statements"]
        assert {one["payload"]["runner"] for one in statements} == {now["id"]}
        assert [one["id"] for one in (await other.get("/executions"))["executions"]] == [ended["id"]]
        assert (await other.get(f"/receipts/{living}"))["statements"] == []
        assert "alarm.raised" not in system.daemon_log()[log_before:]
        assert [event for event in (await other.get("/events"))["events"] if event["kind"] != "session.began"] == []
