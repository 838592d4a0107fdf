"""What ended executions left on the runner's disk goes when it is stored elsewhere, and only then."""

import pytest

from tests.support.stand import poll, stand

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


async def test_only_what_is_over_and_stored_goes_and_is_still_explained() -> None:
    """Not what runs, and not what the control plane has not got; the story of what went is in the journal."""
    async with stand(enrolled=False) as system:
        await system.enroll()
        await system.start_daemon(LOCAL_RUNNER_SPOOL_KEEP_DAYS="0")
        await system.online()
        over = (await system.ran("sh", "-c", "echo hello; exit 3"))["id"]
        go = system.home / "go"
        living = await system.order("sh", "-c", f"until [ -e {go} ]; do sleep 0.02; done; echo late")

        async def planned() -> bool:
            said = await system.json("runner", "gc", "--dry-run")
            return bool([one["attempt"] for one in said["attempts"]] == [f"{over}.1"] and said["left"]["alive"] == 1)

        await poll(planned, "one to be over and stored, and one to live")
        assert set(system.effects()[0]) == {f"{over}.1", f"{living}.1"}
        assert "1 removed" in await system.run("runner", "gc")

        async def deleted() -> bool:
            return system.effects()[0] == (f"{living}.1",)

        await poll(deleted, "its directory to be gone")
        story = await system.run("runner", "explain", over)
        assert "exited, code 3" in story and "its directory was removed" in story

        # Nobody has stored what comes now: it stays, whatever the daemon is asked.
        await system.kill("plane")
        go.touch()

        async def settled() -> bool:
            attempts = (await system.json("runner", "ps", "--all"))["attempts"]
            return any(one["execution_id"] == living and one["verdict"] == "exited" for one in attempts)

        await poll(settled, "the end of the other one")
        said = await system.json("runner", "gc")
        assert (said["count"], said["left"]["unacked"], system.effects()[0]) == (0, 1, (f"{living}.1",))
        await system.kill("daemon")
        status, _, err = await system.finished("runner", "gc")
        assert status == 1 and "next: runner start" in err
        # The next daemon brings it up first, and then it goes without being asked: it is old as soon as it is stored.
        await system.start_plane()
        await system.start_daemon(LOCAL_RUNNER_SPOOL_KEEP_DAYS="0")
        assert (await system.ended(living))["log"]["complete"]

        async def gone() -> bool:
            return (await system.json("runner", "gc"))["left"]["count"] == 0

        await poll(gone, "the last one to go")
        assert b"late\n" in (await system.output(living))["stdout"]
