"""Leases from the grant to the new grant, with a runner on a real socket and a clock that the test moves."""

import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest

from controlplane import store
from controlplane.limits import INTENT_TTL_MS
from protocol.commands import Command, Kind, LeaseAcquire, OnLoss, parse_args
from protocol.envelope import Verified
from protocol.errors import Reason
from protocol.limits import LEASE_TTL_MS, REGRANT_DELAY_MS
from protocol.messages import HeldLease
from protocol.receipt import Outcome
from tests.support.control_plane import Moved, Running, running
from tests.support.fake_runner import FakeRunner, Line

pytestmark = pytest.mark.slow

OVER_MS = LEASE_TTL_MS + REGRANT_DELAY_MS


async def begun(cp: Running, line: Line, **body: Any) -> tuple[str, str, Verified[Command]]:
    """An execution that runs: its id, its attempt, its start."""
    asked = await cp.post("/v1/runners/laptop/executions", {"argv": ["true"], "cwd": "/srv"} | body)
    start = await line.command()
    await line.report(line.runner.accepted(start))
    return asked.json()["id"], f"{asked.json()['id']}.1", start


async def nothing_comes(line: Line, *args: Any, **beat: Any) -> None:
    """Two beats later there is still no command: whatever was due would have come before the answers."""
    await line.beat(*args, **beat)
    await anyio.sleep(0.05)
    await line.beat(*args, **beat)
    assert not [message for message in line.heard if message.t == "command"]


def held(execution: str, token: int) -> HeldLease:
    """The lease of an execution."""
    return HeldLease(res=f"exec:{execution}", token=token)


async def test_a_lease_that_ran_out_is_granted_anew_under_a_higher_token(tmp_path: Path) -> None:
    """Story.

    1. A lease is renewed for as long as each renewal comes in time.
    2. One comes too late: it revives nothing, and nothing is granted before 15 s more are over.
    3. Then the same attempt gets it under the next token, as the start had it; the token before is fenced from that moment on.
    4. The receipt is kept, and renewals go on under the new token.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, start = await begun(cp, line, on_loss="freeze")
            for _ in range(3):
                cp.boot.ahead_ms += LEASE_TTL_MS - 1000
                (renewal,) = (await line.beat([held(execution, 1)], [attempt])).leases
                assert renewal.ttl_ms == LEASE_TTL_MS
            cp.boot.ahead_ms += LEASE_TTL_MS
            for late in ([held(execution, 1)], []):
                answer = await line.beat(late, [attempt], lost=[] if late else [held(execution, 1)])
                assert [renewal.reason for renewal in answer.leases] == [Reason.EXPIRED] * len(late)
            cp.boot.ahead_ms += REGRANT_DELAY_MS - 1000
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
            cp.boot.ahead_ms += 1000
            await line.beat([], [attempt], lost=[held(execution, 1)])
            acquire = await line.command()
            lease, args = acquire.value.lease, parse_args(acquire.value)
            assert lease is not None and isinstance(args, LeaseAcquire)
            assert (acquire.value.kind, acquire.value.seq, args.attempt.name) == (Kind.LEASE_ACQUIRE, 2, attempt)
            assert (lease.res, lease.ttl_ms) == (f"exec:{execution}", LEASE_TTL_MS)
            assert lease.token > 1
            assert lease.on_loss is OnLoss.FREEZE
            answer = await line.beat([held(execution, 1)], [attempt])
            assert answer.leases[0].reason is Reason.FENCED
            await line.report(runner.receipt(acquire, Outcome.DONE))
            cp.boot.ahead_ms += LEASE_TTL_MS - 1000
            answer = await line.beat([held(execution, lease.token)], [attempt])
            assert answer.leases[0].ttl_ms == LEASE_TTL_MS
            await nothing_comes(line, [held(execution, lease.token)], [attempt])
            shown = await cp.get(f"/v1/executions/{execution}")
            assert (shown["start_token"], shown["lease_token"]) == (1, lease.token)
            await line.report(runner.ended(start))
            assert (await cp.get(f"/v1/executions/{execution}"))["state"] == "settled"


async def test_one_new_grant_is_under_way_and_none_while_the_runner_is_away(tmp_path: Path) -> None:
    """Story.

    1. The runner is away for long: nothing is numbered for it.
    2. It comes back with its lease lost, and with items to report, and beats again and again.
    3. When its items are in, one command comes, however often it beats.
    4. It is away before it has consumed that; what comes after the handshake is the same command.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            runner.receipt(await _another(cp, line), Outcome.REFUSED, reason=Reason.CAPACITY)
        cp.boot.ahead_ms += 10 * OVER_MS
        await anyio.sleep(0.05)
        async with runner.connect(cp.port) as line:
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)], full=True)
            await line.catch_up()
            for _ in range(3):
                await line.beat([], [attempt], lost=[held(execution, 1)], full=True)
            assert [message.t for message in line.heard].count("command") == 1
        async with runner.connect(cp.port) as line:
            acquire = await line.command()
            assert acquire.value.kind == Kind.LEASE_ACQUIRE
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])


async def test_a_token_that_the_runner_knows_and_we_do_not_is_outdone(tmp_path: Path) -> None:
    """The runner would refuse a lower one."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            cp.boot.ahead_ms += OVER_MS
            await line.beat([], [attempt], lost=[held(execution, 500)])
            lease = (await line.command()).value.lease
            assert lease is not None and lease.token > 500


async def test_the_token_of_a_numbered_grant_survives_the_plane(tmp_path: Path) -> None:
    """Story.

    1. A new grant is numbered, and the plane dies before anything is heard of it.
    2. The next one knows the token: only that one is renewed, and it counts as granted at the start.
    3. So nothing is granted before that grant, too, is over.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            cp.boot.ahead_ms += OVER_MS
            await line.beat([], [attempt], lost=[held(execution, 1)])
            lease = (await line.command()).value.lease
            assert lease is not None
    async with running(tmp_path) as cp, runner.connect(cp.port) as line:
        cp.boot.ahead_ms += LEASE_TTL_MS - 5000
        answer = await line.beat([held(execution, 1), held(execution, lease.token)], [attempt])
        assert [renewal.reason for renewal in answer.leases] == [Reason.FENCED, None]


async def test_after_a_restart_nothing_is_granted_early(tmp_path: Path) -> None:
    """What was granted a moment before the plane died may run for its whole ttl, as far as the next one knows."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
    async with running(tmp_path) as cp, runner.connect(cp.port) as line:
        cp.boot.ahead_ms += OVER_MS - 3000
        await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
        cp.boot.ahead_ms += 3000
        await line.beat([], [attempt], lost=[held(execution, 1)])
        assert (await line.command()).value.kind == Kind.LEASE_ACQUIRE


async def test_a_new_grant_is_not_sent_for_what_is_to_be_stopped(tmp_path: Path) -> None:
    """Story.

    1. A new grant is queued and not numbered, since the runner still has items to report.
    2. Its execution is stopped, and the items come in.
    3. The stop came, the grant never does.
    """
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            runner.receipt(await _another(cp, line), Outcome.REFUSED, reason=Reason.CAPACITY)
        async with runner.connect(cp.port) as line:
            cp.boot.ahead_ms += OVER_MS
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
            await cp.post(f"/v1/executions/{execution}/stop")
            stop = await line.command()
            assert stop.value.kind == Kind.EXECUTION_STOP
            await line.report(runner.receipt(stop, Outcome.DONE, result={"state": "stopping"}))
            await line.catch_up()
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])


@pytest.mark.parametrize(
    ("reason", "again"), [(Reason.UNKNOWN_TARGET, False), (Reason.UNSUPPORTED_KIND, False), (Reason.EXPIRED, True)]
)
async def test_a_refused_grant_is_kept_in_mind(tmp_path: Path, reason: Reason, again: bool) -> None:
    """One that does not know the attempt, or the kind, is not asked for ever; one that was too late is, when that grant is over."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            cp.boot.ahead_ms += OVER_MS
            await line.beat([], [attempt], lost=[held(execution, 1)])
            acquire = await line.command()
            await line.report(runner.receipt(acquire, Outcome.REFUSED, reason=reason))
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
            cp.boot.ahead_ms += OVER_MS
            if not again:
                return await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
            await line.beat([], [attempt], lost=[held(execution, 1)])
            lease, first = (await line.command()).value.lease, acquire.value.lease
            assert lease is not None and first is not None and lease.token > first.token > 1


async def test_orders_about_a_worktree_carry_rising_tokens(tmp_path: Path) -> None:
    """Create, remove, create again: the owner's marker can tell a late order from the last one."""
    async with running(tmp_path) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            tokens = []
            for path, body in (
                ("/v1/runners/laptop/worktrees", {"repo": "/srv/r", "base": "main", "id": "wt_1"}),
                ("/v1/worktrees/wt_1/remove", {}),
                ("/v1/runners/laptop/worktrees", {"repo": "/srv/r", "base": "main", "id": "wt_1"}),
            ):
                assert (await cp.post(path, body)).status_code == 202
                order = await line.command()
                lease = order.value.lease
                assert lease is not None
                assert (lease.res, lease.on_loss) == ("worktree:wt_1", OnLoss.CONTINUE)
                tokens.append(lease.token)
                await line.report(runner.receipt(order, Outcome.DONE))
            assert tokens[0] == 1
            assert tokens == sorted(set(tokens))


async def test_a_token_outdoes_what_a_plane_from_a_backup_has_forgotten(tmp_path: Path) -> None:
    """Story.

    1. A copy is made; after it, attempts and grants use up tokens that the copy knows nothing of.
    2. The copy is put back later. What is given out now is above them all: it is at least the age in seconds.
    """
    data, copy, clock = tmp_path / "data", tmp_path / "copy.db", Moved()
    async with running(data, clock=clock) as cp:
        runner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
    shutil.copy(data / "control.db", copy)
    used = []
    async with running(data, clock=clock) as cp, runner.connect(cp.port) as line:
        for _ in range(2):
            clock.ahead_ms += 1000
            cp.boot.ahead_ms += 2 * OVER_MS
            await line.beat([], [attempt], lost=[held(execution, 1)])
            acquire = await line.command()
            await line.report(runner.receipt(acquire, Outcome.DONE))
            used.append(acquire.value.lease.token if acquire.value.lease else 0)
    for old in data.glob("control.db*"):
        old.unlink()
    shutil.copy(copy, data / "control.db")
    clock.ahead_ms += 60_000
    async with running(data, clock=clock) as cp, runner.connect(cp.port) as line:
        await line.catch_up()
        cp.boot.ahead_ms += 2 * OVER_MS
        await line.beat([], [attempt])
        lease = (await line.command()).value.lease
        assert lease is not None and lease.token > max(used)
        again = await cp.post(f"/v1/executions/{execution}/attempts")
        assert again.json()["start_token"] > lease.token


async def test_a_grant_that_was_queued_and_forgotten_is_no_hole_in_the_stream(tmp_path: Path) -> None:
    """It runs out like every intent, and the next number goes to the next order."""
    async with running(tmp_path) as cp:
        runner: FakeRunner = await cp.enrol()
        async with runner.connect(cp.port) as line:
            execution, attempt, _ = await begun(cp, line)
            runner.receipt(await _another(cp, line), Outcome.REFUSED, reason=Reason.CAPACITY)
        async with runner.connect(cp.port) as line:
            # The outbox is not in: what is due is queued and not numbered.
            cp.boot.ahead_ms += OVER_MS
            await nothing_comes(line, [], [attempt], lost=[held(execution, 1)])
            now_ms = cp.plane.now_ms + INTENT_TTL_MS
            await cp.plane._ledger.db.write(lambda db: store.expire(db, now_ms))
            await line.catch_up()
            await cp.start()
            command = await line.command()
            assert (command.value.kind, command.value.seq) == (Kind.EXECUTION_START, 3)


async def _another(cp: Running, line: Line) -> Verified[Command]:
    await cp.start()
    return await line.command()
