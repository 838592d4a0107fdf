"""When plane and runner remember different things: forks and restored backups."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from protocol.errors import Reason
from protocol.messages import CommandFrame, ItemKind
from protocol.receipt import Outcome
from protocol.replay import Mark
from tests.support.control_plane import Running, running
from tests.support.fake_runner import FakeRunner, Line

pytestmark = pytest.mark.slow


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


async def test_a_runner_that_was_set_back_loses_no_later_item(tmp_path: Path) -> None:
    """Story.

    1. The runner begins two executions and settles the first; everything is reported. Then its machine is set back to before that.
    2. What lived in the copy ends in another way: the number of the forgotten settlement is used again, the outbox is as long as before.
    3. The plane's mark covers that number; the item that it has not answered comes all the same, and the second end is heard.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        first, second = await cp.start(), await cp.start()
        async with runner.connect(cp.port) as line:
            one, two = await line.command(), await line.command()
            await line.report(runner.accepted(one), runner.accepted(two))
            snapshot = list(runner.outbox)
            await line.report(runner.ended(one))
        runner.outbox = snapshot
        runner.ended(two, code=9)
        async with runner.connect(cp.port) as line:
            assert (line.established.out_hw, line.established.certificate) == (3, None)
            await line.catch_up()
            assert await state_of(cp, first) == await state_of(cp, second) == "settled"
        async with runner.connect(cp.port) as line:
            assert await line.catch_up() is None


async def test_a_runner_that_was_set_back_behind_its_reports_gets_a_new_incarnation(tmp_path: Path) -> None:
    """Story.

    1. Three items are stored; the machine is set back to the first, and uses the second number again.
    2. The plane sees an end below its mark: a new incarnation, and everything that is there is asked for.
    3. An execution of the forgotten history, which nobody knows any more, ends when somebody stops it.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        first, lost = await cp.start(), await cp.start()
        async with runner.connect(cp.port) as line:
            one, two = await line.command(), await line.command()
            await line.report(runner.accepted(one), runner.accepted(two))
            await line.report(runner.accepted(two))
        runner.outbox = runner.outbox[:1]
        runner.ended(one, code=4)
        async with runner.connect(cp.port) as line:
            assert (runner.certificate.inc, line.established.out_hw) == (2, 0)
            await line.catch_up()
            assert await state_of(cp, first) == "settled"
            assert await state_of(cp, lost) == "running"
            await cp.post(f"/v1/executions/{lost['id']}/stop", {})
            stop = await line.command()
            await line.report(runner.receipt(stop, Outcome.DONE, result={"state": "tombstone"}))
            assert await state_of(cp, lost) == "cancelled"


async def test_an_adopted_mark_is_no_fork_at_the_next_handshake(tmp_path: Path) -> None:
    """Story.

    1. The plane comes back from a copy that knows none of the runner's two commands, and adopts its mark.
    2. The runner dials again, with that mark still: it goes on in the same incarnation, as often as it dials.
    3. The next command is signed, and lost; now its `prev` is all that names the adopted one. It comes again.
    """
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    async with running(data) as cp:
        runner = await cp.enrol()
    shutil.copy(data / "control.db", copy)
    async with running(data) as cp, runner.connect(cp.port) as line:
        for _ in range(2):
            await cp.start()
            await line.report(runner.accepted(await line.command()))
    for old in data.glob("control.db*"):
        old.unlink()
    shutil.copy(copy, data / "control.db")
    async with running(data) as cp:
        for _ in range(2):
            async with runner.connect(cp.port) as line:
                await line.catch_up()
                assert (runner.certificate.inc, line.established.ctl.hw) == (1, 2)
        async with runner.connect(cp.port) as line:
            third = await cp.start()
            await line.expect(CommandFrame)
        async with runner.connect(cp.port) as line:
            assert runner.certificate.inc == 1
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq) == (third["cmd_id"], 3)


async def test_a_stream_that_somebody_else_continued_ends_in_a_new_incarnation(tmp_path: Path) -> None:
    """Story.

    1. The plane signs two commands that are lost on their way, and comes back from a copy that knows neither.
    2. It signs another first command; the runner gets the two old ones before it, and refuses the new one: its number is taken.
    3. The session ends. The runner's mark is now above the plane's: adopting it would leave the new command to nobody.
    4. A new incarnation: the new command comes again, and the old ones are known by their receipts.
    """
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    async with running(data) as cp:
        runner = await cp.enrol()
    shutil.copy(data / "control.db", copy)
    async with running(data) as cp, runner.connect(cp.port) as line:
        await cp.start()
        await cp.start()
        old = [await line.expect(CommandFrame) for _ in range(2)]
    for file in data.glob("control.db*"):
        file.unlink()
    shutil.copy(copy, data / "control.db")
    async with running(data) as cp:
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            new = await line.expect(CommandFrame)
            line.heard += old
            one, two = await line.command(), await line.command()
            assert runner.judged(new).reason is Reason.SEQ_REPLAY
            await line.send(runner.judged(new))
            assert (await line.closed()).code == 1001
            runner.accepted(one), runner.accepted(two)
        async with runner.connect(cp.port) as line:
            assert runner.certificate.inc == 2
            await line.catch_up()
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq) == (asked["cmd_id"], 1)
