"""Another attempt of an execution: on the same runner, on another one, and what becomes of everything the earlier one still tells."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane import attempts
from controlplane.rows import ExecutionState
from protocol.commands import Command, ExecutionStop, Kind, OnLoss, parse_args
from protocol.envelope import PayloadType, Verified, seal
from protocol.errors import Reason
from protocol.ids import Attempt, Digest, ExecutionId, FencingToken
from protocol.limits import LEASE_TTL_MS, REGRANT_DELAY_MS
from protocol.messages import CommandFrame, HeldLease, ItemKind, ReportItem
from protocol.receipt import Outcome, Verdict
from protocol.replay import Mark
from protocol.secretbox import open_secret
from tests.support.control_plane import Moved, Running, running
from tests.support.fake_runner import Line, start_of
from tests.support.log_bytes import LogBytes

pytestmark = pytest.mark.slow

OVER_MS = LEASE_TTL_MS + REGRANT_DELAY_MS


async def begun(cp: Running, line: Line, runner: str = "laptop", **body: Any) -> tuple[str, Verified[Command]]:
    """An execution that runs: its id and its start."""
    asked = await cp.post(f"/v1/runners/{runner}/executions", {"argv": ["true"], "cwd": "/srv"} | body)
    start = await line.command()
    await line.report(line.runner.accepted(start))
    return asked.json()["id"], start


async def rerun(cp: Running, execution: str, **body: Any) -> dict[str, Any]:
    """Another attempt."""
    answer = await cp.post(f"/v1/executions/{execution}/attempts", body)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def every(cp: Running, execution: str) -> list[tuple[int, str, str | None]]:
    """Number, state and verdict of every attempt, oldest first."""
    found = (await cp.get(f"/v1/executions/{execution}/attempts"))["attempts"]
    return [(number, one["state"], one["verdict"]) for number, one in enumerate(found, start=1)]


async def test_a_settled_execution_runs_again_at_once(tmp_path: Path) -> None:
    """The same request under the next token; the first attempt keeps its end, the execution has the second one's."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            body: dict[str, Any] = {
                "argv": ["make", "x"],
                "env": {"A": "b"},
                "timeout_ms": 5000,
                "grace_ms": 7,
                "on_loss": "stop",
            }
            execution, first = await begun(cp, line, **body)
            await line.report(runner.ended(first, code=3))
            again = await rerun(cp, execution)
            token = again["start_token"]
            assert (again["state"], token > 1, again["settlement"]) == ("sent", True, None)
            second = await line.command()
            before, after = start_of(first), start_of(second)
            assert after == before.model_copy(update={"start_token": token})
            assert second.value.lease is not None
            assert (second.value.lease.token, second.value.lease.on_loss) == (token, OnLoss.STOP)
            assert second.value.cmd_id != first.value.cmd_id
            await line.report(runner.accepted(second), runner.ended(second, code=0))
            shown = await cp.get(f"/v1/executions/{execution}")
            assert (shown["state"], shown["exit_status"], shown["start_token"]) == ("settled", 0, token)
            assert await every(cp, execution) == [(1, "settled", "exited"), (2, "settled", "exited")]
            statements = (await cp.get(f"/v1/receipts/{execution}"))["statements"]
            assert [one["kind"] for one in statements].count("settlement") == 2


async def test_a_token_that_rose_is_outdone_by_the_next_attempt(tmp_path: Path) -> None:
    """The lease had been granted anew: the start token of the successor is above that."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, _ = await begun(cp, line)
            cp.boot.ahead_ms += OVER_MS
            await line.beat([], [f"{execution}.1"], lost=[HeldLease(res=f"exec:{execution}", token=1)])
            acquire = await line.command()
            assert acquire.value.kind == Kind.LEASE_ACQUIRE and acquire.value.lease is not None
            await rerun(cp, execution)
            assert start_of(await line.command()).start_token > acquire.value.lease.token


async def test_a_living_one_is_superseded_by_its_own_runner(tmp_path: Path) -> None:
    """Story.

    1. It lives. Another attempt is asked for: its start goes at once, with no stop beside it.
    2. The old token is fenced; full lists name the successor's start as what ends the old attempt.
    3. What the old one still tells (its receipt came, log bytes, an end that is called fenced) is kept with it.
    4. The execution goes on with the second attempt, and has its end.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, first = await begun(cp, line)
            token = (await rerun(cp, execution))["start_token"]
            second = await line.command()
            assert start_of(second).start_token == token
            answer = await line.beat([HeldLease(res=f"exec:{execution}", token=1)], [f"{execution}.1"], full=True)
            assert answer.leases[0].reason is Reason.FENCED
            assert {(hint.attempt, hint.want, hint.cmd_id) for hint in answer.hints} == {
                (f"{execution}.1", "stop", second.value.cmd_id),
                (f"{execution}.{token}", "run", second.value.cmd_id),
            }
            await line.report(runner.accepted(second))
            log = LogBytes(f"{execution}.1").write(b"late\n")
            await line.upload(f"{execution}.1", log)
            await line.report(runner.ended(first, verdict=Verdict.FENCED, log=log))
            assert await every(cp, execution) == [(1, "settled", "fenced"), (2, "running", None)]
            assert (await cp.get(f"/v1/executions/{execution}"))["state"] == "running"
            lease = HeldLease(res=f"exec:{execution}", token=token)
            answer = await line.beat([lease], [f"{execution}.{token}"], full=True)
            assert (answer.leases[0].ttl_ms, len(answer.hints)) == (LEASE_TTL_MS, 1)
            await line.report(runner.ended(second, code=4))
            assert (await cp.get(f"/v1/executions/{execution}"))["exit_status"] == 4
            stored = await cp.http.get(f"/v1/executions/{execution}/log", params={"attempt": 1})
            assert b"late\n" in stored.content
            assert (await cp.http.get(f"/v1/executions/{execution}/log")).content == b""
            assert (await cp.http.get(f"/v1/executions/{execution}/log", params={"attempt": 999})).status_code == 404
            events = (await cp.get("/v1/events"))["events"]
            assert not [event for event in events if event["kind"] == "settlement.conflict"]


async def test_a_superseded_one_that_goes_on_living_gets_a_signed_stop(tmp_path: Path) -> None:
    """Its runner names it in a full list although its successor has begun: asked by nobody but us, and said so."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, first = await begun(cp, line)
            token = (await rerun(cp, execution))["start_token"]
            await line.report(runner.accepted(await line.command()))
            await line.beat([], [f"{execution}.1", f"{execution}.{token}"], full=True)
            stop = await line.command()
            args = parse_args(stop.value)
            assert isinstance(args, ExecutionStop) and args.target.type == "attempt"
            assert (args.target.start_token, stop.value.actor and stop.value.actor.sub) == (1, "reconcile")
            answer = await line.beat([], [f"{execution}.1", f"{execution}.{token}"], full=True)
            assert (answer.hints[0].attempt, answer.hints[0].cmd_id) == (f"{execution}.1", stop.value.cmd_id)
            assert not (await cp.get(f"/v1/executions/{execution}"))["stop_requested"]
            await line.report(runner.receipt(stop, Outcome.DONE), runner.ended(first, verdict=Verdict.STOPPED))
            assert await every(cp, execution) == [(1, "settled", "stopped"), (2, "running", None)]


async def test_one_that_was_never_sent_is_called_back(tmp_path: Path) -> None:
    """No runner can know it: only its successor is numbered."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        asked = await cp.start()
        token = (await rerun(cp, asked["id"]))["start_token"]
        assert await every(cp, asked["id"]) == [(1, "cancelled", None), (2, "queued", None)]
        async with runner.connect(cp.port) as line:
            command = await line.command()
            assert (start_of(command).start_token, command.value.seq) == (token, 1)


class TestMoving:
    """To another runner: never while the first one may still run it."""

    async def test_it_waits_for_the_lease_of_the_first_runner(self, tmp_path: Path) -> None:
        """Story.

        1. It lives on one runner, which is away. It is asked for on another: held, and the first one has a stop to get.
        2. Its lease runs out, and 15 s more: then the start goes, and not before.
        3. The first runner comes back: its lease is fenced, it gets the stop, and the end it tells is that of the first attempt.
        """
        async with running(tmp_path) as cp:
            one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line:
                execution, first = await begun(cp, line, "one")
            moved = await rerun(cp, execution, runner="two")
            assert (moved["runner_name"], moved["start_token"] > 1) == ("two", True)
            assert moved["waits"] == f"{execution}.1 may still run elsewhere"
            async with two.connect(cp.port) as line:
                cp.boot.ahead_ms += OVER_MS - 2500
                await _nothing(line, 1.2)
                assert (await cp.get(f"/v1/executions/{execution}"))["waits"]
                cp.boot.ahead_ms += 2500
                second = await line.command()
                await line.report(two.accepted(second))
                assert (await cp.get(f"/v1/executions/{execution}"))["waits"] == ""
                async with one.connect(cp.port) as late:
                    stop = await late.command()
                    assert stop.value.kind == Kind.EXECUTION_STOP
                    lease = HeldLease(res=f"exec:{execution}", token=1)
                    answer = await late.beat([lease], [f"{execution}.1"], full=True)
                    assert answer.leases[0].reason is Reason.FENCED
                    assert [hint.want for hint in answer.hints] == ["stop"]
                    await late.upload(f"{execution}.1", LogBytes(f"{execution}.1").write(b"late\n"))
                    await late.report(one.receipt(stop, Outcome.DONE), one.ended(first, code=143))
                await line.report(two.ended(second, code=5))
            assert await every(cp, execution) == [(1, "settled", "exited"), (2, "settled", "exited")]
            assert (await cp.get(f"/v1/executions/{execution}"))["exit_status"] == 5

    async def test_a_signed_end_is_as_good_as_the_end_of_the_lease(self, tmp_path: Path) -> None:
        """The first runner stops it and says so: the second one begins a moment later."""
        async with running(tmp_path) as cp:
            one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line, two.connect(cp.port) as other:
                execution, first = await begun(cp, line, "one")
                await rerun(cp, execution, runner="two")
                stop = await line.command()
                await _nothing(other, 0.2)
                await line.report(one.receipt(stop, Outcome.DONE), one.ended(first, code=143))
                assert start_of(await other.command()).start_token > 1

    async def test_a_restart_of_the_plane_makes_nothing_earlier(self, tmp_path: Path) -> None:
        """It is held by the file, and the first lease counts as granted at the start."""
        async with running(tmp_path) as cp:
            one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line:
                execution, _ = await begun(cp, line, "one")
            await rerun(cp, execution, runner="two")
        async with running(tmp_path) as cp, two.connect(cp.port) as line:
            cp.boot.ahead_ms += OVER_MS - 3000
            await _nothing(line, 1.2)
            cp.boot.ahead_ms += 3000
            assert start_of(await line.command()).start_token > 1

    async def test_a_held_one_can_be_called_back(self, tmp_path: Path) -> None:
        """A stop before it was sent: cancelled, and never numbered."""
        async with running(tmp_path) as cp:
            one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line:
                execution, _ = await begun(cp, line, "one")
            await rerun(cp, execution, runner="two")
            assert (await cp.post(f"/v1/executions/{execution}/stop")).json()["state"] == "cancelled"
            async with two.connect(cp.port) as line:
                cp.boot.ahead_ms += OVER_MS
                await _nothing(line, 1.2)

    async def test_a_third_one_waits_for_the_first_as_well(self, tmp_path: Path) -> None:
        """Two moves in a row: the second attempt never ran, the first one may."""
        async with running(tmp_path) as cp:
            one = await cp.enrol("one", b"1" * 32)
            await cp.enrol("two", b"2" * 32)
            three = await cp.enrol("three", b"3" * 32)
            async with one.connect(cp.port) as line:
                execution, _ = await begun(cp, line, "one")
            await rerun(cp, execution, runner="two")
            third = await rerun(cp, execution, runner="three")
            assert third["waits"] == f"{execution}.1 may still run elsewhere"
            async with three.connect(cp.port) as line:
                await _nothing(line, 1.2)
                cp.boot.ahead_ms += OVER_MS
                assert start_of(await line.command()).start_token == third["start_token"]
            assert await every(cp, execution) == [(1, "running", None), (2, "cancelled", None), (3, "sent", None)]

    async def test_what_runs_in_a_worktree_stays_with_its_runner(self, tmp_path: Path) -> None:
        """Refused, and nothing has changed."""
        async with running(tmp_path) as cp:
            one = await cp.enrol("one", b"1" * 32)
            await cp.enrol("two", b"2" * 32)
            async with one.connect(cp.port) as line:
                asked = await cp.post("/v1/runners/one/executions", {"argv": ["true"], "worktree": "wt_1"})
                await line.command()
            refused = await cp.post(f"/v1/executions/{asked.json()['id']}/attempts", {"runner": "two"})
            assert (refused.status_code, refused.json()["error"]["reason"]) == (409, "NOT_MOVABLE")
            assert await every(cp, asked.json()["id"]) == [(1, "sent", None)]


async def _nothing(line: Line, seconds: float) -> None:
    """For so long (a tick of the session is a second) no command comes."""
    with anyio.move_on_after(seconds):
        await line.command()
        pytest.fail("a command came")


async def test_secrets_are_wanted_again(tmp_path: Path) -> None:
    """They were sealed for one attempt and kept nowhere: none, and others, are refused with the names that are wanted."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, first = await begun(cp, line, secrets={"TOKEN": "hunter2-hunter2"})
            await line.report(runner.ended(first))
            for secrets in ({}, {"OTHER": "x"}, {"TOKEN": "x", "OTHER": "x"}):
                refused = await cp.post(f"/v1/executions/{execution}/attempts", {"secrets": secrets})
                error = refused.json()["error"]
                assert (refused.status_code, error["reason"]) == (409, "SECRETS_WANTED")
                assert "TOKEN" in error["detail"]
            again = await rerun(cp, execution, secrets={"TOKEN": "hunter3-hunter3"})
            (secret,) = start_of(await line.command()).secrets
            attempt = Attempt(ExecutionId(execution), FencingToken(again["start_token"]))
            assert open_secret(secret.sealed, runner.seal_seed, runner.id, attempt, "TOKEN") == b"hunter3-hunter3"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hunter" in path.read_bytes()]


async def test_the_same_key_asks_for_one_attempt(tmp_path: Path) -> None:
    """However often it is sent; what nobody knows is refused."""
    async with running(tmp_path) as cp:
        await cp.enrol()
        asked = await cp.start()
        path = f"/v1/executions/{asked['id']}/attempts"
        answers = {(await cp.post(path, {}, key="once")).text for _ in range(3)}
        assert len(answers) == 1
        assert len(await every(cp, asked["id"])) == 2
        assert (await cp.post("/v1/executions/ex_404/attempts")).status_code == 404


async def test_late_words_about_an_earlier_attempt_are_its_own(tmp_path: Path) -> None:
    """Story.

    1. A start is sent; before its receipt comes, another attempt is asked for.
    2. The receipt of the first comes: it runs, as the first attempt. The execution is what the second one is.
    3. A stop of the execution is about the second one.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            first = await line.command()
            token = (await rerun(cp, asked["id"]))["start_token"]
            second = await line.command()
            await line.report(runner.accepted(first))
            assert await every(cp, asked["id"]) == [(1, "running", None), (2, "sent", None)]
            await cp.post(f"/v1/executions/{asked['id']}/stop")
            args = parse_args((await line.command()).value)
            assert isinstance(args, ExecutionStop) and args.target.type == "attempt"
            assert args.target.start_token == token
            await line.report(runner.receipt(second, Outcome.REFUSED, reason=Reason.CANCELLED_BEFORE_START))
            assert (await cp.get(f"/v1/executions/{asked['id']}"))["state"] == "refused"
            await line.report(runner.ended(first, code=0))
            assert (await cp.get(f"/v1/executions/{asked['id']}"))["state"] == "refused"


async def test_a_start_whose_place_was_taken_is_not_asked_again_after_a_fork(tmp_path: Path) -> None:
    """Story.

    1. Two attempts are sent, and the runner, which has seen neither, comes back with another history.
    2. In the new incarnation only the second one comes; the first one is over, since nobody has ever taken it.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await begun(cp, line)
            asked = await cp.start()
            await line.expect(CommandFrame)
            token = (await rerun(cp, asked["id"]))["start_token"]
            await line.expect(CommandFrame)
        runner.seen = replace(runner.seen, ctl=Mark(1, Digest("sha256:" + "1" * 64)))
        async with runner.connect(cp.port) as line:
            command = await line.command()
            assert (start_of(command).start_token, command.value.seq, command.value.aud.inc) == (token, 1, 2)
            await _nothing(line, 0.3)
            assert await every(cp, asked["id"]) == [(1, "cancelled", None), (2, "sent", None)]


async def test_a_later_attempt_that_the_plane_forgot_takes_its_place_again(tmp_path: Path) -> None:
    """Story.

    1. A plane comes back from a copy that is older than the second attempt.
    2. The first one's end (fenced) and the second one's receipt come from the outbox: the second is the current one.
    3. Nothing is sent twice, and a third attempt gets a token above both.
    """
    data, copy = tmp_path / "data", tmp_path / "copy.db"
    async with running(data) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, first = await begun(cp, line)
    copy.write_bytes((data / "control.db").read_bytes())
    async with running(data) as cp, runner.connect(cp.port) as line:
        await rerun(cp, execution)
        second = await line.command()
        await line.report(runner.ended(first, verdict=Verdict.FENCED), runner.accepted(second))
    for old in data.glob("control.db*"):
        old.unlink()
    (data / "control.db").write_bytes(copy.read_bytes())
    async with running(data) as cp, runner.connect(cp.port) as line:
        assert await every(cp, execution) == [(1, "running", None)]
        await line.catch_up()
        assert await every(cp, execution) == [(1, "settled", "fenced"), (2, "running", None)]
        assert (await cp.get(f"/v1/executions/{execution}"))["argv"] == ["true"]
        refused = await cp.post(f"/v1/executions/{execution}/attempts")
        assert refused.json()["error"]["reason"] == "NOT_REPEATABLE"
        await line.report(runner.ended(second, code=6))
        assert (await cp.get(f"/v1/executions/{execution}"))["exit_status"] == 6


async def test_an_earlier_attempt_that_the_plane_forgot_joins_the_history(tmp_path: Path) -> None:
    """Story.

    1. A copy is made while the first attempt runs. After it, a second one runs and ends on the same runner.
    2. The copy is put back, and before that runner comes, another attempt is asked for on another runner.
    3. The first runner comes back with words and bytes of the second attempt: they are its own, and settle nothing.
    4. The name of the second attempt is not given to anybody else.
    """
    data, copy, clock = tmp_path / "data", tmp_path / "copy.db", Moved()
    async with running(data, clock=clock) as cp:
        one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
        async with one.connect(cp.port) as line:
            execution, first = await begun(cp, line, "one")
    copy.write_bytes((data / "control.db").read_bytes())
    async with running(data, clock=clock) as cp, one.connect(cp.port) as line:
        forgotten = (await rerun(cp, execution))["start_token"]
        second = await line.command()
        log = LogBytes(f"{execution}.{forgotten}").write(b"forgotten\n")
        await line.report(
            one.ended(first, verdict=Verdict.FENCED), one.accepted(second), one.ended(second, code=9, log=log)
        )
    for old in data.glob("control.db*"):
        old.unlink()
    (data / "control.db").write_bytes(copy.read_bytes())
    clock.ahead_ms += 60_000
    async with running(data, clock=clock) as cp:
        third = await rerun(cp, execution, runner="two")
        assert third["start_token"] > forgotten
        async with one.connect(cp.port) as line, two.connect(cp.port) as other:
            await line.upload(f"{execution}.{forgotten}", log)
            await line.catch_up()
            stop = await line.command()
            await line.report(one.receipt(stop, Outcome.DONE, result={"state": "settled"}))
            await other.report(two.accepted(await other.command()))
            assert await every(cp, execution) == [
                (1, "settled", "fenced"),
                (2, "settled", "exited"),
                (3, "running", None),
            ]
            stored = await cp.http.get(f"/v1/executions/{execution}/log", params={"attempt": forgotten})
            assert b"forgotten" in stored.content
            assert not [event for event in (await cp.get("/v1/events"))["events"] if "settlement" in event["kind"]]


async def test_a_name_that_somebody_uses_already_is_passed_over(tmp_path: Path) -> None:
    """A runner sends a log for an attempt that is not there yet: the next attempt of another one has another name."""
    async with running(tmp_path) as cp:
        one, two = await cp.enrol("one", b"1" * 32), await cp.enrol("two", b"2" * 32)
        async with one.connect(cp.port) as line, two.connect(cp.port) as other:
            execution, start = await begun(cp, line, "one")
            await line.report(one.ended(start))
            for token in range(2, 60):
                await other.upload(f"{execution}.{token}", LogBytes("x").write(b"mine\n"), channel=token)
            assert (await rerun(cp, execution))["start_token"] >= 60


async def test_another_runner_cannot_take_an_execution_over(tmp_path: Path) -> None:
    """Its word about a later attempt is evidence, and the execution stays what it is."""
    async with running(tmp_path) as cp:
        mine, other = await cp.enrol("mine", b"1" * 32), await cp.enrol("other", b"2" * 32)
        async with mine.connect(cp.port) as line, other.connect(cp.port) as theirs:
            execution, _ = await begun(cp, line, "mine")
            await cp.start("other")
            command = await theirs.command()
            settlement = json.loads(other.ended(command).body)
            said = json.loads(base64.b64decode(settlement["payload"])) | {"execution_id": execution, "start_token": 999}
            forged = seal(json.dumps(said).encode(), PayloadType.SETTLEMENT, [other.key]).decode()
            item = ReportItem(out_seq=2, kind=ItemKind.SETTLEMENT, body=forged)
            assert (await theirs.report(item)).answers[0].stored
            assert await every(cp, execution) == [(1, "running", None)]
            assert (await cp.get("/v1/events"))["events"][0]["kind"] == "settlement.conflict"


async def test_a_held_start_is_queued_once(tmp_path: Path) -> None:
    """One that was stopped meanwhile stays cancelled when its time comes."""
    async with running(tmp_path) as cp:
        one = await cp.enrol("one", b"1" * 32)
        await cp.enrol("two", b"2" * 32)
        async with one.connect(cp.port) as line:
            execution, _ = await begun(cp, line, "one")
        cmd_id = (await rerun(cp, execution, runner="two"))["cmd_id"]
        await cp.post(f"/v1/executions/{execution}/stop")
        await cp.plane._ledger.db.write(lambda db: attempts.release(db, [cmd_id, "cm_404"]))
        assert (await cp.get(f"/v1/executions/{execution}"))["state"] == ExecutionState.CANCELLED
