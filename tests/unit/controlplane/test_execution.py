"""From a REST request to a settlement, with a runner on a real socket."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane.limits import INTENT_TTL_MS
from protocol.commands import ExecutionStop, Kind, OnLoss, parse_args
from protocol.errors import Reason
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import LEASE_TTL_MS
from protocol.messages import HeldLease, ItemKind, Report, Reported, ReportItem
from protocol.receipt import Outcome
from protocol.secretbox import open_secret
from tests.support.control_plane import Moved, Running, running
from tests.support.fake_runner import Line, start_of

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


async def test_an_execution_runs_from_request_to_exit_status(tmp_path: Path) -> None:
    """queued, sent, running, settled; the command is signed, addressed and leased."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        asked = await cp.start(argv=("echo", "hi"))
        assert asked["state"] == "queued"
        async with runner.connect(cp.port) as line:
            command = await line.command()
            assert await state_of(cp, asked) == "sent"
            header, start = command.value, start_of(command)
            assert (header.aud.runner, header.seq, start.argv) == (runner.id, 1, ["echo", "hi"])
            assert header.lease is not None
            assert (header.lease.res, header.lease.token) == (f"exec:{asked['id']}", start.start_token)
            assert (header.lease.ttl_ms, header.lease.on_loss) == (LEASE_TTL_MS, OnLoss.CONTINUE)
            await line.report(runner.accepted(command))
            assert await state_of(cp, asked) == "running"
            async with anyio.create_task_group() as tasks:
                waited: list[Any] = []

                async def wait() -> None:
                    waited.append(await cp.get(f"/v1/executions/{asked['id']}", wait_ms=20000))

                tasks.start_soon(wait)
                await line.report(runner.ended(command, code=3))
        (final,) = waited
        assert (final["state"], final["exit_status"], final["cmd_id"]) == ("settled", 3, header.cmd_id)
        said = (await cp.get(f"/v1/receipts/{asked['id']}"))["statements"]
        assert [row["kind"] for row in said] == ["receipt", "settlement"]
        assert said[0]["payload"]["cmd_digest"] == command.digest
        assert (await cp.get(f"/v1/receipts/{header.cmd_id}"))["statements"] == said


async def test_an_execution_costs_two_transactions(tmp_path: Path) -> None:
    """One asks, numbers and signs; one keeps receipt and settlement."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            await line.beat()
            before = cp.plane.commits
            await cp.start()
            command = await line.command()
            await line.report(runner.accepted(command), runner.ended(command))
            assert cp.plane.commits - before == 2


async def test_commands_form_a_chain_across_connections(tmp_path: Path) -> None:
    """Judged by the runner's own rules: no gap, no fork; what was sent and not consumed comes again, once."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            for _ in range(5):
                await cp.start()
            seqs = [(await line.command()).value.seq for _ in range(2)]
        await cp.start()
        async with runner.connect(cp.port) as line:
            seqs += [(await line.command()).value.seq for _ in range(4)]
            await nothing_comes(line)
        assert seqs == [1, 2, 3, 4, 5, 6]


async def test_a_stop_before_the_sending_calls_it_back(tmp_path: Path) -> None:
    """A cancelled intent is never numbered: the next one gets number one."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        first, second = await cp.start(), await cp.start()
        stopped = await cp.post(f"/v1/executions/{first['id']}/stop")
        assert (stopped.status_code, stopped.json()["state"]) == (202, "cancelled")
        assert stopped.json()["exit_status"] is None
        async with runner.connect(cp.port) as line:
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq) == (second["cmd_id"], 1)
            await nothing_comes(line)


async def test_an_intent_that_waited_a_day_is_never_sent(tmp_path: Path) -> None:
    """Cancelled with EXPIRED, and the number goes to the next."""
    clock = Moved()
    async with running(tmp_path, clock=clock) as cp:
        runner = await cp.enrol()
        late = await cp.start()
        clock.ahead_ms = INTENT_TTL_MS
        fresh = await cp.start()
        async with runner.connect(cp.port) as line:
            command = await line.command()
            assert (command.value.cmd_id, command.value.seq) == (fresh["cmd_id"], 1)
        shown = await cp.get(f"/v1/executions/{late['id']}")
        assert (shown["state"], shown["reason"]) == ("cancelled", "EXPIRED")


async def test_a_stop_of_a_running_one_is_a_signed_command_and_a_hint(tmp_path: Path) -> None:
    """On the safety stream, twice asked is once sent; the hint ends with the settlement."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            start = await line.command()
            await line.report(runner.accepted(start))
            for _ in range(2):
                answer = await cp.post(f"/v1/executions/{asked['id']}/stop", {"grace_ms": 100})
                assert (answer.status_code, answer.json()["stop_requested"]) == (202, True)
            stop = await line.command()
            args = parse_args(stop.value)
            assert isinstance(args, ExecutionStop)
            assert (stop.value.seq, args.grace_ms) == (None, 100)
            (hint,) = (await line.beat()).hints
            assert (hint.attempt, hint.cmd_id) == (f"{asked['id']}.1", stop.value.cmd_id)
            await line.report(runner.receipt(stop, Outcome.DONE), runner.ended(start, code=143))
            assert (await line.beat()).hints == []
            again = await cp.post(f"/v1/executions/{asked['id']}/stop")
            assert (again.status_code, again.json()["state"]) == (200, "settled")
            await nothing_comes(line)


async def test_only_held_leases_are_renewed(tmp_path: Path) -> None:
    """By resource and token; what has settled is unknown."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            start = await line.command()
            held = HeldLease(res=f"exec:{asked['id']}", token=1)
            (renewed,) = (await line.beat([held])).leases
            assert renewed.ttl_ms == LEASE_TTL_MS
            await line.report(runner.accepted(start), runner.ended(start))
            (unknown,) = (await line.beat([held])).leases
            assert unknown.reason == Reason.UNKNOWN_TARGET


async def test_a_refusal_of_the_runner_is_the_end(tmp_path: Path) -> None:
    """125, with its reason."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            command = await line.command()
            await line.report(runner.receipt(command, Outcome.REFUSED, reason=Reason.CWD_OUTSIDE_ROOTS))
        shown = await cp.get(f"/v1/executions/{asked['id']}")
        assert (shown["state"], shown["reason"], shown["exit_status"]) == ("refused", "CWD_OUTSIDE_ROOTS", 125)


async def test_an_item_has_one_effect_however_often_it_comes(tmp_path: Path) -> None:
    """Answered stored again; the first settlement stays."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            command = await line.command()
            items = [runner.accepted(command), runner.ended(command, code=3)]
            for _ in range(3):
                assert all(answer.stored for answer in (await line.report(*items)).answers)
            other = runner.ended(command, code=0)
            assert (await line.report(other)).answers[0].stored
        shown = await cp.get(f"/v1/executions/{asked['id']}")
        assert shown["exit_status"] == 3
        assert len((await cp.get(f"/v1/receipts/{asked['id']}"))["statements"]) == 3
        assert (await cp.get("/v1/events"))["events"][0]["kind"] == "settlement.conflict"


async def test_a_statement_with_a_bad_signature_is_refused_for_ever(tmp_path: Path) -> None:
    """stored=false with the reason, an event, and the items beside it are kept."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        stranger = replace(runner, key=type(runner.key)(b"z" * 32), outbox=[])
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            command = await line.command()
            good = runner.accepted(command)
            forged = stranger.ended(command).model_copy(update={"out_seq": 2})
            body = runner.ended(command).body
            cut = body.index('"sig":"') + 10
            broken = ReportItem(
                out_seq=3,
                kind=ItemKind.SETTLEMENT,
                body=body[:cut] + ("A" if body[cut] != "A" else "B") + body[cut + 1 :],
            )
            for _ in range(2):
                answers = (await line.report(good, forged, broken)).answers
                assert [(answer.stored, answer.reason) for answer in answers] == [
                    (True, None),
                    (False, Reason.UNKNOWN_KEY),
                    (False, Reason.BAD_SIG),
                ]
            assert await state_of(cp, asked) == "running"
        events = (await cp.get("/v1/events"))["events"]
        assert [event["reason"] for event in events] == ["BAD_SIG", "UNKNOWN_KEY"]


async def test_a_runner_cannot_speak_for_another(tmp_path: Path) -> None:
    """Its receipt of somebody else's command is evidence and nothing more."""
    async with running(tmp_path) as cp:
        mine, other = await cp.enrol("mine", b"1" * 32), await cp.enrol("other", b"2" * 32)
        async with mine.connect(cp.port) as line, other.connect(cp.port) as theirs:
            asked = await cp.start("mine")
            command = await line.command()
            await theirs.report(other.receipt(command, Outcome.REFUSED, reason=Reason.INFRA))
            await theirs.report(other.ended(command, code=9))
            assert await state_of(cp, asked) == "sent"


async def test_secrets_are_sealed_and_kept_nowhere_else(tmp_path: Path) -> None:
    """Only the runner's key opens them; no file of the plane holds the value."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        body = {"argv": ["true"], "cwd": "/srv", "secrets": {"TOKEN": "hunter2-hunter2"}}
        async with runner.connect(cp.port) as line:
            asked = (await cp.post("/v1/runners/laptop/executions", body)).json()
            start = start_of(await line.command())
        (secret,) = start.secrets
        attempt = Attempt(ExecutionId(asked["id"]), FencingToken(1))
        assert open_secret(secret.sealed, runner.seal_seed, runner.id, attempt, "TOKEN") == b"hunter2-hunter2"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"hunter2-hunter2" in path.read_bytes()]


async def test_a_worktree_is_made_and_removed(tmp_path: Path) -> None:
    """queued, creating, ready with its path; removing, ready again when dirty, removed."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        body = {"repo": "/srv/repo", "base": "main", "branch": "topic", "id": "wt_mine"}
        made = (await cp.post("/v1/runners/laptop/worktrees", body)).json()
        assert (made["id"], made["state"]) == ("wt_mine", "queued")
        async with runner.connect(cp.port) as line:
            create = await line.command()
            assert (create.value.kind, (await cp.get("/v1/worktrees/wt_mine"))["state"]) == (
                Kind.WORKTREE_CREATE,
                "creating",
            )
            result = {"path": "/w/repo", "head": "f" * 40, "branch": "topic"}
            await line.report(runner.receipt(create, Outcome.DONE, result=result))
            ready = await cp.get("/v1/worktrees/wt_mine", wait_ms=5000)
            assert (ready["state"], ready["path"], ready["head"]) == ("ready", "/w/repo", "f" * 40)
            assert (await cp.post("/v1/runners/laptop/worktrees", body)).status_code == 409
            for outcome, reason, state in (
                (Outcome.REFUSED, Reason.WORKTREE_DIRTY, "ready"),
                (Outcome.DONE, None, "removed"),
            ):
                asked = await cp.post("/v1/worktrees/wt_mine/remove", {"force": reason is None})
                assert (asked.status_code, asked.json()["state"]) == (202, "removing")
                remove = await line.command()
                await line.report(runner.receipt(remove, outcome, reason=reason))
                shown = await cp.get("/v1/worktrees/wt_mine", wait_ms=5000)
                assert (shown["state"], shown["reason"]) == (state, reason)


async def test_stops_do_not_wait_for_the_outbox(tmp_path: Path) -> None:
    """A runner that still has items to report gets no start, but a stop."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            command = await line.command()
            await line.report(runner.accepted(command))
        runner.ended(command)
        async with runner.connect(cp.port) as line:
            waiting = await cp.start()
            await cp.post(f"/v1/executions/{asked['id']}/stop")
            assert (await line.command()).value.kind == Kind.EXECUTION_STOP
            await nothing_comes(line)
            await line.catch_up()
            assert (await line.command()).value.cmd_id == waiting["cmd_id"]


async def test_the_window_bounds_what_is_under_way(tmp_path: Path) -> None:
    """256 unconsumed commands; a beat that consumes makes room."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        for _ in range(260):
            await cp.start()
        async with runner.connect(cp.port) as line:
            commands = [await line.command() for _ in range(256)]
            assert commands[-1].value.seq == 256
            with anyio.move_on_after(0.3):
                await line.command()
                pytest.fail("beyond the window")
            await line.beat()
            assert [(await line.command()).value.seq for _ in range(4)] == [257, 258, 259, 260]


async def test_reports_of_a_broken_line_are_kept(tmp_path: Path) -> None:
    """A runner that hangs up right after its report: stored, though nobody hears the answer."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            asked = await cp.start()
            command = await line.command()
            await line.send(Report(items=[runner.accepted(command), runner.ended(command)]))
            await line.expect(Reported)
            line.socket.transport.abort()
        assert (await cp.get(f"/v1/executions/{asked['id']}", wait_ms=5000))["state"] == "settled"
