"""Leases in the engine: forward only, from send time, and never by an unsigned no."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.lease import LeaseState
from protocol.limits import HANDSHAKE_TIMEOUT_MS
from protocol.messages import HeldLease, Renewal
from protocol.receipt import Verdict
from protocol.session import BeatAnswered
from runner.core.effects import (
    AbandonAttempt,
    Note,
    Persist,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    SendBeat,
    StopAttempt,
)
from runner.core.inputs import AttemptPrepared, Tick, Woke
from runner.core.plans import LeaseAction, Observed, Phase
from tests.support.builders import an_attempt
from tests.support.engine import BOOT_MS, SHIM, Turn, World, an_unreleased_exit


def a_grant(on_loss: str = "stop", token: int = 1, ttl_ms: int = 60_000) -> dict[str, Any]:
    """A lease on ex_1 inside a signed start."""
    return {"res": "exec:ex_1", "token": token, "ttl_ms": ttl_ms, "on_loss": on_loss}


def leased(on_loss: str = "stop") -> World:
    """A world in which ex_1 runs under a lease of 60 s."""
    world = World()
    world.running(lease=a_grant(on_loss))
    return world


def answer(world: World, sent_ms: int, ttl_ms: int | None, token: int = 1, res: str = "exec:ex_1") -> Turn:
    """The plane's word on a renewal that was asked for at `sent_ms`."""
    reason = None if ttl_ms is not None else Reason.FENCED
    renewal = Renewal(res=res, token=token, ttl_ms=ttl_ms, reason=reason)
    return world.step(BeatAnswered(sent_ms, world.now.wall_ms, 10_000, (renewal,), ()))


def deadline(world: World) -> int:
    """As the engine has it."""
    lease = world.row().lease
    assert lease is not None
    return lease.deadline_ms


def living(phase: Phase = Phase.RUNNING) -> Observed:
    """The directory of ex_1 with a shim that lives."""
    return Observed(attempt=an_attempt(), same_boot=True, phase=phase, lock_held=True, exit=None)


def test_a_lease_is_told_to_the_shim_before_it_is_let_go() -> None:
    """So no attempt ever runs without its deadline; time in transit is taken off."""
    world = World()
    start = world.start(lease=a_grant())
    world.pass_time(5_000)
    world.send(start)
    turn = world.step(AttemptPrepared(an_attempt(), SHIM))
    push = turn.one(PushLease)
    assert push == PushLease(an_attempt(), 1, BOOT_MS + 60_000, LeaseAction.STOP, 20_000, world.row().lease)
    assert turn.index(push) < turn.index(turn.one(ReleaseAttempt))


def test_a_lease_that_is_lost_without_harm_is_not_told_to_the_shim() -> None:
    """`continue` needs no lease to run on."""
    world = World()
    assert not world.running(lease=a_grant("continue")).has(PushLease)
    answer(world, BOOT_MS + 20_000, 60_000)
    assert deadline(world) == BOOT_MS + 80_000


def test_a_renewal_counts_from_when_its_beat_was_sent() -> None:
    """Not from when its answer came: the plane counts from before."""
    world = leased()
    world.pass_time(30_000)
    turn = answer(world, BOOT_MS + 20_000, 60_000)
    assert turn.one(PushLease).deadline_ms == deadline(world) == BOOT_MS + 80_000
    kept = world.journal.attempts[an_attempt()].lease
    assert kept is not None and kept.deadline_ms == BOOT_MS + 80_000


@given(st.lists(st.tuples(st.integers(0, 59_000), st.integers(1, 200_000)), max_size=8))
def test_renewals_in_any_order_never_move_a_deadline_back(answers: list[tuple[int, int]]) -> None:
    """Late, doubled and short answers included."""
    world = leased()
    reached = deadline(world)
    for sent_after_ms, ttl_ms in answers:
        answer(world, BOOT_MS + sent_after_ms, ttl_ms)
        assert deadline(world) == max(reached, BOOT_MS + sent_after_ms + ttl_ms)
        reached = deadline(world)


def test_an_unsigned_refusal_of_a_renewal_stops_nothing() -> None:
    """Only a signature or the deadline does."""
    world = leased()
    turn = answer(world, BOOT_MS + 20_000, None)
    assert [type(effect) for effect in turn] == [Note] and turn.one(Note).event == "lease.refused"
    assert world.row().state is AttemptState.RUNNING and deadline(world) == BOOT_MS + 60_000


@pytest.mark.parametrize(("token", "res"), [(2, "exec:ex_1"), (1, "exec:ex_2")])
def test_a_renewal_of_another_lease_changes_nothing(token: int, res: str) -> None:
    """A token names one grant."""
    world = leased()
    assert list(answer(world, BOOT_MS + 20_000, 60_000, token, res)) == []
    assert deadline(world) == BOOT_MS + 60_000


def test_a_lease_past_its_deadline_is_lost_once_and_for_good() -> None:
    """The shim acts by itself; here it is journaled, told once, and not renewed by a late answer."""
    world = leased()
    assert world.engine.wake_at_ms == BOOT_MS + 60_000
    world.pass_time(60_000)
    turn = world.step(Tick())
    assert turn.one(Note).event == "lease.lost" and not turn.has(StopAttempt)
    assert world.step(Tick()) == []
    assert list(answer(world, BOOT_MS + 59_000, 60_000)) == []
    lease = world.journal.attempts[an_attempt()].lease
    assert lease is not None and lease.state is LeaseState.LOST
    world.crash(living())
    assert world.session().one(SendBeat).leases == ()


def test_an_answer_that_comes_after_the_deadline_revives_nothing() -> None:
    """Even when no tick came in between: the shim has begun to end it."""
    world = leased()
    world.pass_time(60_000)
    turn = answer(world, BOOT_MS + 50_000, 60_000)
    assert turn.one(Note).event == "lease.lost" and not turn.has(PushLease)


def test_held_leases_are_named_in_every_beat() -> None:
    """Also of what still waits for its turn."""
    world = World()
    world.send(world.start(lease=a_grant()))
    assert world.session().one(SendBeat).leases == (HeldLease(res="exec:ex_1", token=1),)
    assert not answer(world, BOOT_MS, 90_000).has(PushLease)


def test_a_renewed_lease_outlives_a_restart() -> None:
    """1. Granted for a minute. 2. Renewed. 3. The daemon restarts after the first minute. 4. Nothing is lost.

    The shim takes the last word for its deadline, so an old one said again would end a healthy attempt.
    """
    world = leased()
    world.pass_time(50_000)
    answer(world, BOOT_MS + 50_000, 60_000)
    world.pass_time(20_000)
    turn = world.crash(living())
    assert turn.one(PushLease).deadline_ms == BOOT_MS + 110_000
    assert not turn.has(Note)
    assert world.session().one(SendBeat).leases == (HeldLease(res="exec:ex_1", token=1),)


@pytest.mark.parametrize("on_loss", ["stop", "freeze"])
@pytest.mark.parametrize("late_at", ["begin", "prepared"])
def test_nothing_begins_under_a_lease_that_is_over(on_loss: str, late_at: str) -> None:
    """Somebody else may have it by now."""
    world = World()
    if late_at == "begin":
        world.running("ex_1", 1)
        world.send(world.start("ex_1", 2, lease=a_grant(on_loss, token=2)))
        world.pass_time(60_000)
        turn = world.exit("ex_1", 1)
    else:
        world.send(world.start(lease=a_grant(on_loss)))
        world.pass_time(60_000)
        turn = world.step(AttemptPrepared(an_attempt(), SHIM))
        assert turn.has(AbandonAttempt)
    assert turn.reasons == [Reason.EXPIRED]
    assert not turn.has(ReleaseAttempt) and not turn.has(PrepareAttempt)


def test_a_signed_release_does_what_the_loss_would_do() -> None:
    """Stop, freeze or nothing, as the start was signed."""
    world = leased("stop")
    turn = world.send(world.release_lease(cmd_id="cmd_r"))
    assert turn.one(StopAttempt) == StopAttempt(an_attempt(), None, "cmd_r")
    assert turn.receipt.result == {"state": "stop"}
    world = leased("freeze")
    turn = world.send(world.release_lease())
    assert turn.one(PushLease) == PushLease(an_attempt(), 1, BOOT_MS, LeaseAction.FREEZE, 20_000)
    world = leased("continue")
    turn = world.send(world.release_lease())
    assert not turn.has(PushLease) and not turn.has(StopAttempt)
    assert world.session().one(SendBeat).leases == ()


def test_a_release_of_an_older_token_or_nothing_is_done_and_does_nothing() -> None:
    """Monotone and idempotent."""
    world = leased()
    for env in (
        world.release_lease("exec:ex_9"),
        world.seal(world.fields("lease.release", {"res": "exec:ex_9", "token": 9})),
    ):
        turn = world.send(env)
        assert turn.receipt.result == {"state": "unknown"} and len(turn.of(Persist)) == 2
    world = World()
    world.running("ex_1", 1, lease=a_grant(token=5))
    assert world.send(world.release_lease(token=4)).receipt.result == {"state": "unknown"}


@pytest.mark.parametrize("on_loss", ["stop", "freeze"])
def test_a_start_whose_lease_was_released_never_runs(on_loss: str) -> None:
    """Not now and not after a crash."""
    for crash in (False, True):
        world = World()
        world.send(world.start(lease=a_grant(on_loss)))
        assert not world.send(world.release_lease()).has(PushLease)
        turn = world.crash() if crash else world.step(AttemptPrepared(an_attempt(), SHIM))
        assert len(turn.reasons) == 1 and not turn.has(ReleaseAttempt) and not turn.has(PrepareAttempt)


def test_a_release_is_said_again_at_adoption() -> None:
    """The daemon may have died before the shim heard it."""
    world = leased("freeze")
    world.send(world.release_lease())
    world.pass_time(7)
    turn = world.crash(living())
    assert turn.one(PushLease) == PushLease(an_attempt(), 1, world.now.boot_ms, LeaseAction.FREEZE, 20_000)


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("boot_ms", [1_000, 2 * BOOT_MS])
def test_a_lease_of_another_boot_is_over(accepted: bool, boot_ms: int) -> None:
    """1. Granted, never let go. 2. The machine reboots: nobody knows how long it was down. 3. Nothing begins under it."""
    world = World()
    world.send(world.start(lease=a_grant()))
    if accepted:
        world.step(AttemptPrepared(an_attempt(), SHIM))
        world.released.clear()
    found = Observed(
        attempt=an_attempt(), same_boot=False, phase=Phase.READY, lock_held=False, exit=an_unreleased_exit()
    )
    turn = world.reboot(found, boot_ms=boot_ms)
    assert not turn.has(PrepareAttempt) and not turn.has(PushLease)
    if accepted:
        assert (turn.settlement.verdict, turn.settlement.cause.reason) == (Verdict.NEVER_STARTED, Reason.EXPIRED)
    else:
        assert turn.reasons == [Reason.EXPIRED]


def test_a_lease_that_is_lost_without_harm_lets_its_attempt_begin_in_another_boot() -> None:
    """`continue` needs no lease to run on; it is told as lost, so that the plane may grant it anew."""
    world = World()
    world.send(world.start(lease=a_grant("continue")))
    assert world.reboot().has(PrepareAttempt)
    world.step(AttemptPrepared(an_attempt(), SHIM), Tick())
    beat = world.session().one(SendBeat)
    assert (beat.leases, beat.lost) == ((), (HeldLease(res="exec:ex_1", token=1),))


def test_a_grant_counts_from_the_latest_that_the_planes_clock_can_be() -> None:
    """What we know of it was said while it was on its way to us: after a handshake unsure, after a beat known by its round trip."""
    world = World()
    world.session()
    world.running("ex_1", lease=a_grant())
    assert deadline(world) == BOOT_MS + 60_000 - HANDSHAKE_TIMEOUT_MS
    world.pass_time(300)
    world.step(BeatAnswered(BOOT_MS, world.now.wall_ms, 10_000, (), ()))
    world.running("ex_2", lease=a_grant() | {"res": "exec:ex_2"})
    lease = world.row("ex_2").lease
    assert lease is not None and lease.deadline_ms == world.now.boot_ms + 60_000 - 300


def test_a_handshake_that_a_sleep_interrupted_makes_a_grant_no_longer() -> None:
    """1. The plane says its clock. 2. The lid closes for ten minutes. 3. We hear it. 4. It is ten minutes old."""
    world = World()
    said_ms = world.now.wall_ms
    world.pass_time(600_000)
    world.step(Woke(600_000))
    world.session(now_ms=said_ms)
    world.send(world.start(lease=a_grant(), iat=said_ms))
    lease = world.row().lease
    assert lease is not None and lease.deadline_ms <= world.now.boot_ms - 600_000 + 60_000
