"""Tokens only rise: who has a lower one starts nothing, takes nothing back, and its end says that it was fenced."""

from typing import Any

import pytest

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.lease import Lease, LeaseState
from protocol.messages import HeldLease
from protocol.receipt import Outcome, Verdict
from runner.core.effects import (
    AbandonAttempt,
    CreateWorktree,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    SendBeat,
    StopAttempt,
)
from runner.core.inputs import AttemptPrepared, Tick, WorktreeCreated
from runner.core.plans import LeaseAction, Observed, Phase
from tests.support.builders import an_attempt
from tests.support.engine import BOOT_MS, SHIM, Turn, World, a_made, a_policy, an_unreleased_exit


def a_grant(token: int = 1, **over: Any) -> dict[str, Any]:
    """A lease on ex_1 of a minute."""
    return {"res": "exec:ex_1", "token": token, "ttl_ms": 60_000, "on_loss": "stop"} | over


def leased(on_loss: str = "stop", token: int = 1) -> World:
    """A world in which ex_1.1 runs under a lease."""
    world = World()
    world.running(lease=a_grant(token, on_loss=on_loss))
    return world


def lease_of(world: World) -> Lease:
    """Of ex_1.1, as the journal has it."""
    lease = world.journal.attempts[an_attempt()].lease
    assert lease is not None and lease == world.row().lease
    return lease


def lost(world: World) -> World:
    """The same, after its lease was lost."""
    world.pass_time(60_000)
    world.step(Tick())
    assert lease_of(world).state is LeaseState.LOST
    return world


def stopped_by(turn: Turn) -> Any:
    """The record of an attempt that did as it was told in this turn."""
    return {
        "verdict": "stopped",
        "code": None,
        "signal": 15,
        "cause_kind": "stop",
        "cause_by": turn.one(StopAttempt).by,
    }


# --- a lease comes back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["held", "lost", "released"])
@pytest.mark.parametrize("on_loss", ["stop", "freeze", "continue"])
def test_a_higher_token_holds_again_and_is_told_to_the_shim(state: str, on_loss: str) -> None:
    """What was frozen is thawed: the shim hears a token and a deadline to come; the grant counts from when it was signed."""
    world = leased("freeze")
    if state == "lost":
        lost(world)
    elif state == "released":
        world.send(world.release_lease())
    grant = world.acquire(token=7, lease={"ttl_ms": 90_000, "on_loss": on_loss})
    world.pass_time(4_000)
    turn = world.send(grant)
    lease = lease_of(world)
    assert (lease.token, lease.ttl_ms, lease.on_loss, lease.state) == (7, 90_000, on_loss, LeaseState.HELD)
    assert lease.deadline_ms == world.now.boot_ms - 4_000 + 90_000
    push = turn.one(PushLease)
    # Also that it must enforce nothing any more: else it would act at the old deadline, or stay frozen.
    assert push == PushLease(an_attempt(), 7, lease.deadline_ms, LeaseAction(on_loss), 30_000, lease)
    assert (turn.receipt.outcome, turn.receipt.result) == (Outcome.DONE, {"state": "running"})
    assert world.session().one(SendBeat).leases == (HeldLease(res="exec:ex_1", token=7),)


def test_an_attempt_that_had_no_lease_can_be_given_one() -> None:
    """From then on it has a deadline."""
    world = World()
    world.running()
    assert world.send(world.acquire(token=1)).one(PushLease).token == 1
    assert lease_of(world).deadline_ms == BOOT_MS + 60_000


@pytest.mark.parametrize("token", [1, 2, 3])
@pytest.mark.parametrize("was_lost", [True, False])
def test_an_equal_or_a_lower_token_is_fenced_also_for_the_same_holder(token: int, was_lost: bool) -> None:
    """The plane gives a new one with each grant."""
    world = leased(token=3)
    before = lease_of(lost(world) if was_lost else world)
    turn = world.send(world.acquire(token=token))
    assert turn.receipt.reason is Reason.FENCED and not turn.has(PushLease)
    assert lease_of(world) == before


def test_a_grant_to_what_is_settled_brings_its_settlement_again() -> None:
    """The plane has not heard of its end."""
    world = leased()
    number = world.exit().items[0].out_seq
    turn = world.send(world.acquire())
    assert turn.one(ReportAgain).out_seqs == (number,) and not turn.has(PushLease)
    assert (turn.receipt.outcome, turn.receipt.result) == (Outcome.DONE, {"state": "settled"})


def test_a_grant_to_what_never_began_is_done_and_says_so() -> None:
    """There is no settlement to say again: its receipt was its end."""
    world = World()
    world.send(world.start(), world.stop())
    world.step(AttemptPrepared(an_attempt(), SHIM))
    turn = world.send(world.acquire())
    assert turn.receipt.result == {"state": "settled"} and not turn.has(ReportAgain)


def test_a_grant_to_what_nobody_knows_is_refused() -> None:
    """Also of another attempt of a known execution."""
    world = leased()
    for env in (world.acquire("ex_9"), world.acquire("ex_1", start_token=2)):
        assert world.send(env).receipt.reason is Reason.UNKNOWN_TARGET


def test_a_grant_to_what_waits_for_its_shim_counts_when_it_is_let_go() -> None:
    """1. The start's lease runs out while it waits. 2. It is granted anew. 3. It begins, under the new token."""
    world = World()
    world.send(world.start(lease=a_grant()))
    world.pass_time(60_000)
    world.step(Tick())
    turn = world.send(world.acquire(token=2))
    assert turn.receipt.result == {"state": "intent"} and not turn.has(PushLease)
    begun = world.step(AttemptPrepared(an_attempt(), SHIM))
    push = begun.one(PushLease)
    assert (push.token, push.deadline_ms) == (2, world.now.boot_ms + 60_000)
    assert begun.index(push) < begun.index(begun.one(ReleaseAttempt))


def test_a_shim_is_forked_under_the_token_that_counts_when_its_turn_comes() -> None:
    """It does not start its child behind a higher fence, and the lease may have been granted anew meanwhile."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2, lease=a_grant(2)), world.acquire(token=5, start_token=2))
    assert world.exit("ex_1", 1).one(PrepareAttempt).plan.token == 5
    plain = World()
    assert plain.send(plain.start("ex_2", 3)).one(PrepareAttempt).plan.token == 3


def test_a_grant_outlives_the_daemon_and_is_said_again_to_the_shim() -> None:
    """1. Frozen. 2. Granted anew, and the journal has it. 3. The daemon dies before the shim hears it. 4. The next one says it."""
    living = Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)
    for on_loss in ("freeze", "continue"):
        world = lost(leased("freeze"))
        world.send(world.acquire(lease={"on_loss": on_loss}))
        push = world.crash(living).one(PushLease)
        assert (push.token, push.action, push.deadline_ms) == (2, on_loss, world.now.boot_ms + 60_000)


def test_an_older_renewal_does_not_touch_what_was_granted_anew() -> None:
    """It was asked for under the old token."""
    world = leased()
    world.send(world.release_lease(token=1))
    world.send(world.acquire(token=2))
    assert world.send(world.release_lease(token=1)).receipt.result == {"state": "unknown"}
    assert lease_of(world).state is LeaseState.HELD


def test_who_may_start_may_give_back() -> None:
    """An owner who admits no starts is not asked for leases either, and a grant is for the attempt's own resource."""
    world = World(policy=a_policy(kinds=frozenset({"worktree.create"})))
    assert world.send(world.acquire()).receipt.reason is Reason.POLICY_DENIED
    world = leased()
    assert world.send(world.acquire(lease={"res": "exec:ex_2"})).receipt.reason is Reason.BAD_ARGS
    args = {"execution_id": "ex_1", "start_token": 1}
    bare = world.seal(world.fields("lease.acquire", args))
    assert world.send(bare).receipt.reason is Reason.BAD_ARGS


def test_every_grant_and_loss_leaves_a_leaf() -> None:
    """So the whole story of a lease can be told."""
    world = lost(leased("freeze"))
    world.send(world.acquire())
    assert [(leaf.kind, leaf.subject, leaf.detail) for leaf in world.journal.leaves] == [
        ("lease.granted", "ex_1.1", "token 1, ttl 60000 ms, on_loss stop".replace("stop", "freeze")),
        ("lease.lost", "ex_1.1", "on_loss freeze"),
        ("lease.acquired", "ex_1.1", "token 2, ttl 60000 ms, on_loss stop"),
    ]


# --- a successor -----------------------------------------------------------------------------------------------------


def test_an_attempt_that_was_ended_for_its_successor_settles_as_fenced() -> None:
    """And the successor begins after it."""
    world = World()
    world.running("ex_1", 1)
    told = world.send(world.start("ex_1", 2, cmd_id="cmd_new"))
    assert told.one(StopAttempt).by == "superseded by cmd_new"
    assert world.journal.attempts[an_attempt("ex_1", 1)].fenced_by == 2
    ended = world.exit("ex_1", 1, **stopped_by(told))
    assert (ended.settlement.verdict, ended.settlement.cause.reason) == (Verdict.FENCED, Reason.FENCED)
    assert ended.settlement.start_token == 1 and ended.one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 2)


def test_the_first_cause_of_an_end_is_its_cause() -> None:
    """1. A signed stop. 2. While it ends, a successor comes. 3. It was stopped, not fenced."""
    world = World()
    world.running("ex_1", 1)
    told = world.send(world.stop("ex_1", 1, cmd_id="cmd_stop"))
    world.send(world.start("ex_1", 2))
    settlement = world.exit("ex_1", 1, **stopped_by(told)).settlement
    assert (settlement.verdict, settlement.cause.by) == (Verdict.STOPPED, "cmd_stop")


def test_an_attempt_that_ends_by_itself_before_its_fence_reaches_it_tells_its_own_end() -> None:
    """Evidence is never thrown away, and settles only itself."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2))
    assert world.exit("ex_1", 1, code=3).settlement.code == 3
    assert world.row("ex_1", 2).state is AttemptState.INTENT


@pytest.mark.parametrize("crash", [False, True])
def test_an_intent_that_is_superseded_is_refused_as_fenced_and_never_let_go(crash: bool) -> None:
    """Its shim is on the way; it is sent away behind its barrier."""
    world = World()
    world.send(world.start("ex_1", 1))
    assert not world.send(world.start("ex_1", 2)).has(StopAttempt)
    turn = world.crash() if crash else world.step(AttemptPrepared(an_attempt("ex_1", 1), SHIM))
    assert turn.reasons == [Reason.FENCED] and turn.has(AbandonAttempt) and not turn.has(ReleaseAttempt)
    assert [plan.plan.attempt for plan in turn.of(PrepareAttempt)] == [an_attempt("ex_1", 2)]


@pytest.mark.parametrize("crash", [False, True])
def test_a_waiting_attempt_that_is_superseded_is_refused_as_fenced_in_its_turn(crash: bool) -> None:
    """Also by a daemon that starts in between."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2), world.start("ex_1", 3))
    living = Observed(attempt=an_attempt("ex_1", 1), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)
    told = world.crash(living) if crash else Turn()
    ended = world.exit("ex_1", 1)
    assert [*told.reasons, *ended.reasons] == [Reason.FENCED]
    assert ended.one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 3)


def test_what_was_accepted_and_begins_again_after_a_crash_is_fenced_by_who_came_meanwhile() -> None:
    """1. Accepted, never let go. 2. A crash. 3. It is prepared anew. 4. A successor. 5. Its one settlement says FENCED."""
    world = World()
    world.running("ex_1", 1)
    world.released.clear()
    unreleased = Observed(
        attempt=an_attempt(), same_boot=True, phase=Phase.READY, lock_held=False, exit=an_unreleased_exit()
    )
    world.crash(unreleased)
    world.send(world.start("ex_1", 2))
    turn = world.step(AttemptPrepared(an_attempt("ex_1", 1), SHIM))
    assert turn.settlement.verdict is Verdict.FENCED and not turn.receipts and turn.has(AbandonAttempt)
    assert turn.one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 2)


def test_a_lower_attempt_that_comes_late_is_refused_whatever_became_of_the_higher_one() -> None:
    """Running, settled, or never begun."""
    for fate in ("runs", "settled", "never"):
        world = World()
        if fate == "never":
            world.send(world.start("ex_1", 5), world.stop("ex_1", 5))
            world.step(AttemptPrepared(an_attempt("ex_1", 5), SHIM))
        else:
            world.running("ex_1", 5)
        if fate == "settled":
            world.exit("ex_1", 5)
        turn = world.send(world.start("ex_1", 4))
        assert turn.reasons == [Reason.FENCED] and not turn.has(StopAttempt) and not turn.has(PrepareAttempt)


# --- worktrees -------------------------------------------------------------------------------------------------------


def tree_lease(token: int) -> dict[str, Any]:
    """A grant on the worktree."""
    return {"res": "worktree:wt_1", "token": token, "ttl_ms": 60_000, "on_loss": "continue"}


def made(token: int) -> World:
    """A world with a worktree that was made under a token."""
    world = World()
    plan = world.send(world.create(lease=tree_lease(token))).one(CreateWorktree)
    assert plan.plan.token == token
    world.step(WorktreeCreated(plan.digest, a_made()))
    return world


@pytest.mark.parametrize("crash", [False, True])
def test_a_command_about_a_worktree_under_a_lower_token_is_fenced(crash: bool) -> None:
    """The journal keeps the highest."""
    world = made(5)
    if crash:
        world.crash()
    turn = world.send(world.remove(lease=tree_lease(4)), world.create(lease=tree_lease(4)))
    assert turn.reasons == [Reason.FENCED, Reason.FENCED] and not turn.has(RemoveWorktree)
    assert world.engine.trees.ready("wt_1")


def test_an_equal_or_a_higher_token_or_none_is_let_through_and_told_to_the_edge() -> None:
    """Whose owner marker is asked again; without a lease the token is 0."""
    for lease, token in ((tree_lease(5), 5), (tree_lease(6), 6), (None, 0)):
        world = made(5)
        assert world.send(world.remove(lease=lease)).one(RemoveWorktree).plan.token == token
