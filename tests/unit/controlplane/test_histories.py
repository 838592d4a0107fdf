"""When plane and runner remember different things: forks and restored backups."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from protocol.messages import ItemKind
from protocol.replay import Mark
from tests.support.control_plane import Running, running
from tests.support.fake_runner import FakeRunner, Line


async def state_of(cp: Running, execution: dict[str, Any]) -> str:
    """The state as it is."""
    state: str = (await cp.get(f"/v1/executions/{execution['id']}"))["state"]
    return state


async def nothing_comes(line: Line) -> None:
    """Two beats later there is still no command: whatever was due would have come before the answers."""
    await line.beat()
    await anyio.sleep(0.05)
    await line.beat()
    assert not [message for message in line.heard if message.t == "command"]


async def test_a_fork_begins_a_new_incarnation_and_runs_nothing_twice(tmp_path: Path) -> None:
    """Story.

    1. Two starts are sent; the runner consumes both, receipts the first, and its receipt of the second is still to come.
    2. The runner comes back with another history: a fork.
    3. It gets a new certificate; the streams start at one; only the start without a receipt comes again, under its own `cmd_id`.
    4. The runner knows that id and refuses the new bytes, which changes nothing; the first form's receipt and settlement count.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        first, second = await cp.start(), await cp.start()
        async with runner.connect(cp.port) as line:
            one, two = await line.command(), await line.command()
            await line.report(runner.accepted(one))
        runner.seen = replace(runner.seen, ctl=Mark(1, two.digest))
        async with runner.connect(cp.port) as line:
            assert (runner.certificate.inc, line.established.ctl) == (2, Mark())
            await nothing_comes_new(line, runner, second["cmd_id"])
            refused = runner.outbox[-1]
            await line.report(refused)
            assert await state_of(cp, second) == "sent"
            assert await state_of(cp, first) == "running"
            await line.report(runner.accepted(two), runner.ended(two, code=7))
            shown = await cp.get(f"/v1/executions/{second['id']}")
            assert (shown["state"], shown["exit_status"]) == ("settled", 7)
            third = await cp.start()
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq, command.value.aud.inc) == (third["cmd_id"], 2, 2)


async def nothing_comes_new(line: Line, runner: FakeRunner, cmd_id: str) -> None:
    """The one command that comes has an id the runner knows, so it judges it a mismatch."""
    with anyio.move_on_after(0.5):
        await line.command()
        pytest.fail("a command the runner would have run")
    assert runner.outbox[-1].kind is ItemKind.RECEIPT
    assert cmd_id in runner.seen.digests


async def test_a_plane_from_a_backup_sends_nothing_twice(tmp_path: Path) -> None:
    """Story.

    1. One execution has settled, a second one waits for its runner: the database is copied.
    2. Life goes on: the second runs and settles, a third is asked for, runs and settles, a fourth runs.
    3. The copy is put back. The plane knows nothing of what came after it.
    4. The runner comes: its mark is adopted, its items come again, and the second is settled by them, not sent.
    5. The forgotten ones are back by their statements, and the stream goes on where the runner is.
    """
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    async with running(data) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await cp.start()
            command = await line.command()
            await line.report(runner.accepted(command), runner.ended(command))
        second = await cp.start()
    shutil.copy(data / "control.db", copy)
    async with running(data) as cp, runner.connect(cp.port) as line:
        two = await line.command()
        third = await cp.start()
        three = await line.command()
        await line.report(runner.accepted(two), runner.ended(two, code=2))
        await line.report(runner.accepted(three), runner.ended(three, code=3))
        fourth = await cp.start()
        await line.report(runner.accepted(await line.command()))
    for old in data.glob("control.db*"):
        old.unlink()
    shutil.copy(copy, data / "control.db")
    async with running(data) as cp:
        assert await state_of(cp, second) == "queued"
        async with runner.connect(cp.port) as line:
            await nothing_comes(line)
            assert line.established.out_hw == 2
            await line.catch_up()
            await nothing_comes(line)
            for asked, state, status in ((second, "settled", 2), (third, "settled", 3), (fourth, "running", None)):
                shown = await cp.get(f"/v1/executions/{asked['id']}")
                assert (shown["state"], shown["exit_status"]) == (state, status)
            fifth = await cp.start()
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq) == (fifth["cmd_id"], 5)
