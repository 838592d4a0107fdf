"""The daemon as a service of systemd, run by a test where `systemctl --user` reaches a manager: every step is asserted."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.support.stand import Stand, poll

UNIT = "runner.service"
WORK = """
import pathlib, sys, time
go, n = pathlib.Path(sys.argv[1]), 0
while not go.exists():
    n += 1
    print("line", n, flush=True)
    time.sleep(0.02)
print("last", n, flush=True)
sys.exit(7)
"""


class Serviced(Stand):
    """A stand whose daemon is a service."""

    async def systemctl(self, *args: str) -> str:
        """Ask the manager; what it printed."""
        process = await asyncio.create_subprocess_exec(
            "systemctl", "--user", "--no-pager", *args, env=self.env, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        return out.decode().strip()

    async def shown(self, name: str) -> str:
        """A property of the unit."""
        return await self.systemctl("show", "--value", f"--property={name}", UNIT)

    async def service(self, verb: str, *options: str) -> tuple[int, str, str]:
        """`runner service`, with the places as flags: the service has another environment."""
        places = {"--config": "config.toml", "--state-dir": "state", "--runtime-dir": "run"}
        flags = [word for flag, name in places.items() for word in (flag, str(self.home / name))]
        return await self.finished("runner", *flags, "service", verb, "--user", *options)

    async def json_whatever(self, *argv: str) -> Any:
        """As `json`, whatever the exit status."""
        return json.loads((await self.finished(*argv, "--json"))[1])

    async def another_pid(self, before: str) -> str:
        """Wait until the service runs as another process."""

        async def changed() -> str | None:
            pid = await self.shown("MainPID")
            return pid if pid not in ("0", before) and await self.shown("ActiveState") == "active" else None

        found: str = await poll(changed, "the service to run again")
        return found


async def begin(system: Serviced, name: str) -> tuple[str, int, Path]:
    """Order work that lasts until a file is there; its id, its process, and that file."""
    go = system.home / name
    execution = await system.order(sys.executable, "-I", "-S", "-c", WORK, str(go))

    async def runs() -> int | None:
        attempts = (await system.json("runner", "ps"))["attempts"]
        pids = [one["pid"] for one in attempts if one["execution_id"] == execution and one["pid"]]
        return pids[0] if pids else None

    pid: int = await poll(runs, "the work to run")
    return execution, pid, go


async def finish(system: Serviced, execution: str, go: Path) -> None:
    """Let it end; every line is there once, and its status is its own."""
    go.touch()
    ended: dict[str, Any] = await system.ended(execution)
    assert (ended["exit_status"], ended["settlement"]["verdict"]) == (7, "exited"), ended
    *lines, last = (await system.output(execution))["stdout"].decode().splitlines()
    assert lines == [f"line {n}" for n in range(1, len(lines) + 1)] and last == f"last {len(lines)}"
    statements = (await system.get(f"/receipts/{execution}"))["statements"]
    assert sorted(one["kind"] for one in statements) == ["receipt", "settlement"]


async def outlives(system: Serviced, name: str, *order: str) -> None:
    """An execution goes on while the daemon is ended so and another one takes it up."""
    execution, work, go = await begin(system, name)
    before = await system.shown("MainPID")
    group = Path(f"/proc/{work}/cgroup").read_text()
    await system.systemctl(*order, UNIT)
    await system.another_pid(before)
    assert Path(f"/proc/{work}/cgroup").read_text() == group
    await system.online()
    listed = {one["execution_id"]: one for one in (await system.json("runner", "ps"))["attempts"]}
    assert (listed[execution]["pid"], listed[execution]["state"]) == (work, "running"), listed
    await finish(system, execution, go)
    print(f"{name}: the work outlived it", flush=True)


async def wrong_settings(system: Serviced) -> None:
    """The daemon does not start with them, and is not tried again and again."""
    config = system.home / "config.toml"
    config.write_text("colour = 1\n")
    await system.systemctl("restart", UNIT)

    async def failed() -> bool:
        return await system.shown("ActiveState") == "failed"

    await poll(failed, "the service to fail")
    assert (await system.shown("ExecMainStatus"), await system.shown("Result")) == ("3", "exit-code")
    config.write_text("")
    await system.systemctl("start", UNIT)
    await system.online()
    print("wrong settings: failed once, with 3", flush=True)


async def broken_journal(system: Serviced) -> None:
    """A daemon that cannot open its journal is tried again, in its own time, and is back when it can."""
    await system.systemctl("stop", UNIT)
    journal = system.state / "journal.db"
    aside = journal.with_suffix(".aside")
    journal.rename(aside)
    journal.write_bytes(b"\xa5" * 65536)
    await system.systemctl("start", "--no-block", UNIT)

    async def tried() -> bool:
        return int(await system.shown("NRestarts")) >= 2

    began = asyncio.get_running_loop().time()
    await poll(tried, "the service to be tried again")
    # Two pauses of two seconds lie before the second restart: it does not spin.
    assert asyncio.get_running_loop().time() - began > 3

    async def failed() -> bool:
        return await system.shown("ExecMainStatus") == "1"

    await poll(failed, "the daemon to say so by its status")
    aside.rename(journal)
    await system.online()
    print("broken journal: tried again, with pauses", flush=True)


async def drained(system: Serviced) -> None:
    """`runner drain --exit` ends the service, which stays down until somebody starts it."""
    before = await system.shown("NRestarts")
    execution, _, go = await begin(system, "drain")
    drain = await system.pipe("drain", "runner", "drain", "--exit")
    assert drain.stderr is not None
    assert (await drain.stderr.readline()).startswith(b"1 attempt runs")
    go.touch()
    await drain.stderr.read()
    assert await drain.wait() == 0

    async def down() -> bool:
        return await system.shown("ActiveState") == "inactive"

    await poll(down, "the service to be down")
    assert (await system.shown("Result"), await system.shown("NRestarts")) == ("success", before)
    await system.systemctl("start", UNIT)
    await system.online()
    (finding,) = (await system.json_whatever("runner", "doctor", "--only", "R016"))["findings"]
    assert finding["measured"].startswith("draining") and finding["fix"] == "runner resume"
    await system.run("runner", "resume")
    await finish(system, execution, go)
    print("drain --exit: stayed down", flush=True)


async def stops_with_it(system: Serviced) -> None:
    """With `on_stop = "stop"` what runs is ended with the service, and settled before it is down."""
    policy = system.home / "policy.toml"
    policy.write_text(policy.read_text().replace('on_stop = "leave"', 'on_stop = "stop"'))
    await system.systemctl("restart", UNIT)
    await system.online()
    execution, work, _ = await begin(system, "stop")
    await system.systemctl("restart", UNIT)
    assert not Path(f"/proc/{work}").exists()
    ended = await system.ended(execution)
    assert (ended["settlement"]["verdict"], ended["exit_status"]) == ("stopped", 143), ended
    policy.write_text(policy.read_text().replace('on_stop = "stop"', 'on_stop = "leave"'))
    await system.systemctl("restart", UNIT)
    await system.online()
    print("on_stop: stopped with it", flush=True)


async def story(system: Serviced) -> None:
    """From installing to removing."""
    await system.start_plane()
    await system.enroll()
    status, out, err = await system.service("install", "--now")
    assert status == 0 and "is enabled and running" in out, err
    await system.online()
    said = (await system.json("runner", "status"))["pid"]
    assert str(said) == await system.shown("MainPID")
    assert (await system.service("status"))[0] == 0
    (finding,) = (await system.json("runner", "doctor", "--only", "R015"))["findings"]
    assert finding["verdict"] == "ok" and "KillMode=process" in finding["measured"]

    await outlives(system, "restart", "restart")
    await outlives(system, "kill", "kill", "--signal=KILL", "--kill-who=main")
    await wrong_settings(system)
    await broken_journal(system)
    await drained(system)
    await stops_with_it(system)
    (finding,) = (await system.json("runner", "doctor", "--only", "R018"))["findings"]
    print(f"tiers: {finding['verdict']}, {finding['measured']}", flush=True)

    execution, work, go = await begin(system, "uninstall")
    status, out, err = await system.service("uninstall", "--now")
    assert status == 0 and out.endswith("removed\n"), err
    assert (await system.shown("ActiveState"), (await system.service("status"))[0]) == ("inactive", 1)
    os.kill(work, 0)
    await system.start_daemon()
    await system.online()
    await finish(system, execution, go)
    print("uninstall: the work outlived it", flush=True)


async def main() -> None:
    """Play it."""
    system = Serviced()
    system.env["XDG_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"]
    try:
        await story(system)
    finally:
        print(system.log_tail("plane"), flush=True)
        await system.close()


if __name__ == "__main__":
    asyncio.run(main())
