"""The daemon as a service of a whole systemd, with a journal of its own: what it tells arrives there field by field."""

import asyncio
import json
import signal
import sys
from pathlib import Path

from tests.support.stand import ANSWER_S, Stand

UNIT = Path("/etc/systemd/system/runner.service")


async def said_by(*argv: str) -> str:
    """What a program of the machine prints."""
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0, argv
    return out.decode()


async def story(system: Stand) -> None:
    """From the first line to the last."""
    await system.start_plane()
    await system.enroll()
    places = " ".join(f"{name}={value}" for name, value in system.env.items() if name.startswith("LOCAL_RUNNER_"))
    program = Path(sys.executable).with_name("runner")
    UNIT.write_text(f"[Service]\nType=notify\nKillMode=process\nEnvironment={places}\nExecStart={program} start\n")
    await said_by("systemctl", "daemon-reload")
    await said_by("systemctl", "start", UNIT.name)
    await system.online()
    execution = (await system.ran("true"))["id"]

    await said_by("journalctl", "--sync")
    entries = [json.loads(line) for line in (await said_by("journalctl", "-u", UNIT.name, "-o", "json")).splitlines()]
    ours = [entry for entry in entries if "RUNNER_EVENT" in entry]
    (settled,) = [entry for entry in ours if entry["RUNNER_EVENT"] == "attempt.settled"]
    assert settled["RUNNER_ATTEMPT"] == f"{execution}.1" and settled["MESSAGE"].startswith("attempt.settled "), settled
    assert (settled["PRIORITY"], settled["SYSLOG_IDENTIFIER"], settled["_TRANSPORT"]) == ("6", "runner", "journal")
    (accepted,) = [entry for entry in ours if entry["RUNNER_EVENT"] == "command.accepted"]
    assert accepted["RUNNER_CMD_ID"] and accepted["_SYSTEMD_UNIT"] == UNIT.name, accepted
    print(f"fields: {len(ours)} lines in the journal", flush=True)

    running = await system.run("runner", "logs", "--daemon")
    await said_by("systemctl", "stop", UNIT.name)
    await said_by("journalctl", "--sync")
    status, out, err = await system.finished("runner", "logs", "--daemon")
    assert status == 0 and "the journal" in err, err
    events = [line.split()[2] for line in out.splitlines()]
    assert events[-1] == "systemd" and "daemon.stopped" in events and "attempt.settled" in events, out
    # Both tell the same, but for what the journal has of the time before and after.
    told = [line.split(" ", 1)[1] for line in running.splitlines()]
    assert {" ".join(line.split()[:2]) for line in told} <= {" ".join(line.split()[1:3]) for line in out.splitlines()}
    print("journal: read without a daemon", flush=True)

    follower = await system.pipe("follower", "runner", "logs", "--daemon", "-f", "--tail", "1")
    assert follower.stdout is not None
    assert await follower.stdout.readline()
    await said_by("systemctl", "start", UNIT.name)
    async with asyncio.timeout(ANSWER_S):
        while b" daemon.started " not in (line := await follower.stdout.readline()):
            assert line, "the follower has ended"
    follower.send_signal(signal.SIGINT)
    assert await follower.wait() == 130
    print("journal: followed into the next daemon", flush=True)


async def main() -> None:
    """Play it."""
    system = Stand()
    try:
        await story(system)
    finally:
        await system.close()


if __name__ == "__main__":
    asyncio.run(main())
