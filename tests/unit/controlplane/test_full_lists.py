"""Full lists of both sides on the wire: hints, strangers and their signed end, what went missing, what is fetched."""

import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from protocol.commands import Command, ExecutionStop, parse_args
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.limits import RECONCILE_MS
from protocol.messages import CommandFrame, Fetch
from protocol.receipt import Outcome, Verdict
from tests.support.control_plane import Running, running
from tests.support.fake_runner import FakeRunner, Line

pytestmark = pytest.mark.slow


async def begun(cp: Running, line: Line, runner: str = "laptop") -> tuple[str, str, Verified[Command]]:
    """An execution that runs: its id, its attempt, its start."""
    asked = await cp.start(runner)
    start = await line.command()
    await line.report(line.runner.accepted(start))
    return asked["id"], f"{asked['id']}.1", start


async def events(cp: Running, kind: str) -> list[str]:
    """Details of the events of a kind, newest first."""
    return [one["detail"] for one in (await cp.get("/v1/events"))["events"] if one["kind"] == kind]


async def nothing_comes(line: Line, *args: Any, **beat: Any) -> None:
    """Two beats later there is still no command."""
    await line.beat(*args, **beat)
    await anyio.sleep(0.05)
    await line.beat(*args, **beat)
    assert not [message for message in line.heard if message.t == "command"]


def stopped(command: Verified[Command]) -> tuple[str, str, str | None]:
    """Which attempt a stop is about, and who asked for it."""
    args = parse_args(command.value)
    assert isinstance(args, ExecutionStop) and args.target.type == "attempt"
    actor = command.value.actor
    return (
        args.target.execution_id,
        f"{args.target.execution_id}.{args.target.start_token}",
        None if actor is None else actor.sub,
    )


async def test_a_full_beat_gets_a_hint_for_every_attempt(tmp_path: Path) -> None:
    """Also for one that was sent and never came; an ordinary beat gets the stops alone."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            _, first, start = await begun(cp, line)
            sent = await cp.start()
            await line.expect(CommandFrame)
            answer = await line.beat([], [first], full=True)
            assert answer.full
            assert [(hint.attempt, hint.want, hint.cmd_id) for hint in answer.hints] == [
                (first, "run", start.value.cmd_id),
                (f"{sent['id']}.1", "run", sent["cmd_id"]),
            ]
            answer = await line.beat([], [first])
            assert (answer.full, answer.hints) == (False, [])


async def test_what_was_never_sent_is_in_no_list(tmp_path: Path) -> None:
    """A queued one is nobody's yet."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.beat(admission="paused")
            await cp.start()
            answer = await line.beat(full=True, admission="paused")
            assert (answer.full, answer.hints) == (True, [])


class TestStrangers:
    """What lives there and was not started here."""

    async def test_it_is_told_once_shown_and_left_alone(self, tmp_path: Path) -> None:
        """Story.

        1. A full list names an attempt that nobody here knows, one that is another runner's, and one that ended here.
        2. Each is one event of the session, and is shown with its runner; no command comes for any of them.
        3. What is no more in the next list is shown no more.
        """
        async with running(tmp_path) as cp:
            runner, other = await cp.enrol(), await cp.enrol("other", b"2" * 32)
            async with runner.connect(cp.port) as line, other.connect(cp.port) as theirs:
                _, mine, _ = await begun(cp, line)
                _, foreign, _ = await begun(cp, theirs, "other")
                _, ended, start = await begun(cp, line)
                await line.report(runner.ended(start))
                for _ in range(3):
                    await nothing_comes(line, [], [mine, foreign, ended, "ex_9.3"], full=True)
                assert sorted(await events(cp, "attempt.unknown")) == sorted(
                    [
                        "ex_9.3 lives there: not known here",
                        f"{foreign} lives there: it is of other",
                        f"{ended} lives there: settled here",
                    ]
                )
                shown = await cp.get("/v1/runners/laptop")
                assert {one["attempt"]: one["why"] for one in shown["unknown"]} == {
                    "ex_9.3": "not known here",
                    foreign: "it is of other",
                    ended: "settled here",
                }
                await line.beat([], [mine], full=True)
                await line.beat([], [mine])
                assert (await cp.get("/v1/runners/laptop"))["unknown"] == []

    async def test_nothing_is_strange_before_the_outbox_is_in(self, tmp_path: Path) -> None:
        """A plane from a backup learns of it from the items that are still to come."""
        data, copy = tmp_path / "data", tmp_path / "copy.db"
        async with running(data) as cp:
            runner = await cp.enrol()
        shutil.copy(data / "control.db", copy)
        async with running(data) as cp, runner.connect(cp.port) as line:
            _, attempt, _ = await begun(cp, line)
        for old in data.glob("control.db*"):
            old.unlink()
        shutil.copy(copy, data / "control.db")
        async with running(data) as cp, runner.connect(cp.port) as line:
            await line.beat([], [attempt], full=True)
            assert await events(cp, "attempt.unknown") == []
            await line.catch_up()
            answer = await line.beat([], [attempt], full=True)
            assert [hint.attempt for hint in answer.hints] == [attempt]
            await line.beat()
            assert await events(cp, "attempt.unknown") == []

    async def test_a_signed_word_ends_it(self, tmp_path: Path) -> None:
        """Story.

        1. Nobody knows the execution: without a runner a stop is refused.
        2. With a runner that names one attempt of it, that one is meant; asked twice, it is one stop.
        3. The runner settles it: the execution is known from its settlement.
        """
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                assert (await cp.post("/v1/executions/ex_9/stop")).status_code == 404
                refused = await cp.post("/v1/executions/ex_9/stop", {"runner": "laptop"})
                assert (refused.status_code, refused.json()["error"]["reason"]) == (404, "UNKNOWN_ATTEMPT")
                await line.beat([], ["ex_9.3"], full=True)
                for _ in range(2):
                    answer = await cp.post("/v1/executions/ex_9/stop", {"runner": "laptop", "grace_ms": 5})
                    said = answer.json()
                    assert (answer.status_code, said["start_token"], said["state"]) == (202, 3, "stopping")
                stop = await line.command()
                assert (stop.value.cmd_id, stopped(stop)) == (said["cmd_id"], ("ex_9", "ex_9.3", None))
                await nothing_comes(line, [], ["ex_9.3"])
                await line.report(runner.receipt(stop, Outcome.DONE, result={"state": "stopping"}))
                assert (await cp.get("/v1/receipts/ex_9"))["statements"][0]["payload"]["cmd_id"] == said["cmd_id"]

    async def test_any_attempt_can_be_named_by_its_token(self, tmp_path: Path) -> None:
        """At a runner that says nothing of it: a tombstone will be the answer."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                execution, attempt, _ = await begun(cp, line)
                await cp.post("/v1/executions/ex_7/stop", {"runner": "laptop", "start_token": 2})
                assert stopped(await line.command())[1] == "ex_7.2"
                await cp.post(f"/v1/executions/{execution}/stop", {"start_token": 9})
                assert stopped(await line.command())[1] == f"{execution}.9"
                assert not (await cp.get(f"/v1/executions/{execution}"))["stop_requested"]
                current = await cp.post(f"/v1/executions/{execution}/stop", {"runner": "laptop"})
                assert current.json()["stop_requested"]
                assert stopped(await line.command())[1] == attempt


class TestMissing:
    """What was accepted and is in no full list."""

    async def test_it_is_asked_for_and_called_lost_when_nobody_knows_it(self, tmp_path: Path) -> None:
        """Story.

        1. A full list leaves out what its runner accepted. Once proves nothing, nor does twice in a moment.
        2. Half a minute later it is still left out: a stop is signed, and says who asked.
        3. The runner knows of no such attempt: lost, 125. Its settlement, should it come all the same, outranks that.
        """
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                execution, attempt, start = await begun(cp, line)
                await nothing_comes(line, [], [], full=True)
                cp.boot.ahead_ms += RECONCILE_MS
                await line.beat([], [], full=True)
                stop = await line.command()
                assert stopped(stop) == (execution, attempt, "reconcile")
                hints = (await line.beat()).hints
                assert [(hint.attempt, hint.cmd_id) for hint in hints] == [(attempt, stop.value.cmd_id)]
                await line.report(runner.receipt(stop, Outcome.DONE, result={"state": "tombstone"}))
                shown = await cp.get(f"/v1/executions/{execution}")
                assert (shown["state"], shown["verdict"], shown["exit_status"]) == ("cancelled", "lost", 125)
                assert shown["reason"] == Reason.UNKNOWN_TARGET
                assert (await line.beat(full=True)).hints == []
                await line.report(runner.ended(start, verdict=Verdict.STOPPED))
                shown = await cp.get(f"/v1/executions/{execution}")
                assert (shown["state"], shown["verdict"]) == ("settled", "stopped")

    async def test_its_settlement_is_the_better_answer(self, tmp_path: Path) -> None:
        """It was told, and the word was lost: the stop has it told again."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                execution, _, start = await begun(cp, line)
                await line.beat(full=True)
                cp.boot.ahead_ms += RECONCILE_MS
                await line.beat(full=True)
                stop = await line.command()
                await line.report(runner.ended(start, code=3), runner.receipt(stop, Outcome.DONE))
                assert (await cp.get(f"/v1/executions/{execution}"))["exit_status"] == 3

    async def test_one_that_comes_back_is_left_alone(self, tmp_path: Path) -> None:
        """Twice in a row, or not at all; and a new session counts anew."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                _, attempt, _ = await begun(cp, line)
                for there in ([], [attempt], []):
                    await line.beat([], there, full=True)
                    cp.boot.ahead_ms += RECONCILE_MS
                await nothing_comes(line)
            async with runner.connect(cp.port) as line:
                await nothing_comes(line, full=True)

    async def test_nothing_is_missing_while_items_are_to_come(self, tmp_path: Path) -> None:
        """Its end may be among them."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                execution, _, start = await begun(cp, line)
            runner.ended(start, code=2)
            async with runner.connect(cp.port) as line:
                for _ in range(2):
                    await nothing_comes(line, full=True)
                    cp.boot.ahead_ms += RECONCILE_MS
                await line.catch_up()
                assert (await cp.get(f"/v1/executions/{execution}"))["exit_status"] == 2


class TestFetching:
    """A hint named a command that never came."""

    async def test_a_stop_goes_again_at_once(self, tmp_path: Path) -> None:
        """Long before its own repetition, and not more often than once a second."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                execution, _, _ = await begun(cp, line)
                await cp.post(f"/v1/executions/{execution}/stop")
                first = await line.expect(CommandFrame)
                (hint,) = (await line.beat()).hints
                for _ in range(3):
                    await line.send(Fetch(cmd_ids=[hint.cmd_id, "cm_unknown"]))
                assert await line.expect(CommandFrame) == first
                await nothing_comes(line)

    async def test_the_stream_goes_again_from_where_the_runner_is(self, tmp_path: Path) -> None:
        """1. Three starts are lost on their way. 2. The last is asked for. 3. All three come, in order. 4. What was consumed does not."""
        async with running(tmp_path) as cp:
            runner = await cp.enrol()
            async with runner.connect(cp.port) as line:
                _, _, start = await begun(cp, line)
                asked = [await cp.start() for _ in range(3)]
                for _ in asked:
                    await line.expect(CommandFrame)
                await line.send(Fetch(cmd_ids=[asked[-1]["cmd_id"]]))
                assert [(await line.command()).value.cmd_id for _ in asked] == [one["cmd_id"] for one in asked]
                await line.beat()
                await line.send(Fetch(cmd_ids=[start.value.cmd_id]))
                await nothing_comes(line)

    async def test_nobody_fetches_what_is_for_another(self, tmp_path: Path) -> None:
        """An id is no key."""
        async with running(tmp_path) as cp:
            one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line, two.connect(cp.port) as other:
                execution, _, start = await begun(cp, line, "one")
                await cp.post(f"/v1/executions/{execution}/stop")
                stop = await line.command()
                await other.send(Fetch(cmd_ids=[start.value.cmd_id, stop.value.cmd_id]))
                await nothing_comes(other)


async def test_a_stop_of_what_is_over_gives_its_settlement(tmp_path: Path) -> None:
    """200, with what the runner signed, and no command; also when it is an attempt of it that was named."""
    async with running(tmp_path) as cp:
        runner: FakeRunner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, _, start = await begun(cp, line)
            await line.report(runner.ended(start, code=3))
            answer = await cp.post(f"/v1/executions/{execution}/stop")
            said = answer.json()
            assert (answer.status_code, said["state"], said["settlement"]["code"]) == (200, "settled", 3)
            assert said["settlement"]["cmd_digest"] == start.digest
            answer = await cp.post(f"/v1/executions/{execution}/stop", {"runner": "laptop"})
            assert (answer.status_code, answer.json()["settlement"]["code"]) == (200, 3)
            await nothing_comes(line)
