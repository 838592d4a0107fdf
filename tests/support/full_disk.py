"""What the runner still says when its disk is full for everybody else, on a small tmpfs of its own. Wants root.

`python -m tests.support.full_disk MIB` measures the journal alone: executions run, a file takes every byte that is left, and one
execution after the other ends, each settlement in a commit of its own. What is printed is how many were durable before the journal
broke. `… MIB story` plays it with a real daemon.
"""

import asyncio
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from protocol.messages import Answer
from protocol.session import ItemsAnswered
from runner.adapters.journal import SqliteJournal
from runner.core.effects import Effect, Persist
from runner.core.inputs import AttemptExited, AttemptPrepared, EnvelopeReceived, SessionDown
from runner.core.journaling import Write
from runner.errors import JournalBroken
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, World, a_policy, an_exit
from tests.support.stand import Stand, poll

LIVING = 2560
"""Executions that run when the disk is full: more than can be told."""
WAITING = 8
"""Executions of the story."""
PIECE = bytes(4096)
ROOT = Path(__file__).parents[2]
_MOUNT = 'mount -t tmpfs -o "size=$1" none "$2" && exec "$3" -m tests.support.full_disk --inside "$2" "$4"'
WAITS = "while ! [ -e {go} ]; do sleep 0.1; done; exit 7"


def writes_of(effects: list[Effect]) -> list[Write]:
    """What a turn makes durable."""
    return [write for effect in effects if isinstance(effect, Persist) for write in effect.writes]


def fill(place: Path) -> int:
    """Take every byte that is left; how many there were."""
    taken = 0
    with open(os.open(place, os.O_WRONLY | os.O_CREAT), "wb", buffering=0) as file:
        for piece in (PIECE, b"\0"):
            try:
                while True:
                    taken += file.write(piece)
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
    return taken


async def tell(directory: Path) -> dict[str, Any]:
    """The journal alone."""
    world = World(policy=a_policy(concurrent_max=LIVING))
    told, size, reason = 0, 0, "all were told"
    async with SqliteJournal(directory / "journal.db") as journal:
        for number in range(LIVING):
            begun = [EnvelopeReceived(world.start(f"ex_{number}")), AttemptPrepared(an_attempt(f"ex_{number}"), SHIM)]
            await journal.commit(writes_of([effect for each in begun for effect in world.engine.step(each, world.now)]))
        taken = fill(directory / "filler")
        try:
            for number in range(LIVING):
                effects = world.engine.step(AttemptExited(an_attempt(f"ex_{number}"), an_exit()), world.now)
                answer = ItemsAnswered((Answer(out_seq=world.engine.statements.out_head, stored=True),))
                effects += [*world.engine.step(answer, world.now), *world.engine.step(SessionDown(), world.now)]
                await journal.commit(writes_of(effects))
                told += 1
        except JournalBroken as broken:
            reason = broken.reason
    (directory / "filler").unlink()
    async with SqliteJournal(directory / "journal.db") as journal:
        there = [row.settled_seq for row in (await journal.load()).attempts if row.settled_seq is not None]
        size = len((await journal.items(there[:1]))[0].body)
    return {"filled_bytes": taken, "settlements": told, "there": len(there), "reason": reason, "body_bytes": size}


async def story(directory: Path) -> dict[str, Any]:
    """A real daemon whose state directory is on the small disk: it refuses, settles, and takes work again when there is room."""
    system = Stand()
    try:
        (system.home / "state").symlink_to(directory)
        directory.chmod(0o700)
        policy = system.home / "policy.toml"
        policy.write_text(policy.read_text().replace("disk_free_mib_min = 0", "disk_free_mib_min = 8"))
        (system.home / "config.toml").write_text("[spool]\nfloor_mib = 1\n")
        await system.start_plane()
        await system.enroll()
        await system.start_daemon()
        await system.online()
        pid, go = system.pid("daemon"), system.home / "go"
        executions = [await system.order("sh", "-c", WAITS.format(go=go)) for _ in range(WAITING)]

        async def all_run() -> bool:
            attempts = (await system.json("runner", "ps"))["attempts"]
            return sum(one["state"] == "running" for one in attempts) == WAITING

        await poll(all_run, "the executions to run")
        taken = fill(directory / "filler")
        # What was measured a moment ago may still count: then it is the start itself that finds no room.
        reasons = [(await system.ended(await system.order("true")))["reason"]]
        while reasons[-1] == "DISK_FULL":
            reasons.append((await system.ended(await system.order("true")))["reason"])
        go.touch()
        ends = [(await system.ended(execution))["exit_status"] for execution in executions]
        (directory / "filler").unlink()

        async def takes_work() -> bool:
            return bool((await system.ran("true"))["exit_status"] == 0)

        await poll(takes_work, "new work to be taken")
        assert system.pid("daemon") == pid, "the same daemon all the time"
        broken = system.daemon_log().count("journal.broken")
        return {"filled_bytes": taken, "reasons": reasons, "ends": ends, "broken": broken}
    except BaseException:
        print(system.daemon_log()[-4000:], file=sys.stderr)
        raise
    finally:
        await system.close()


def inside(mib: int, what: str) -> dict[str, Any]:
    """Play `tell` or `story` on a tmpfs of that many MiB, which nobody else sees. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", _MOUNT, "sh", f"{mib}m", place, sys.executable, what],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            timeout=150,
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--inside":
        play = {"tell": tell, "story": story}[sys.argv[3]]
        print(json.dumps(asyncio.run(play(Path(sys.argv[2])))))
    else:
        print(json.dumps(inside(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "tell")))
