"""Attempts in the engine: starts, stops in every state, successors, and late words."""

import pytest

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.receipt import Outcome, Verdict
from runner.core import attempts as attempts_module
from runner.core import ledger as ledger_module
from runner.core.effects import (
    AbandonAttempt,
    CollectAttempt,
    Note,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    ReportAgain,
    StopAttempt,
)
from runner.core.inputs import AttemptExited, AttemptLost, AttemptNotPrepared, AttemptPrepared, OwnerStop
from runner.core.journaling import AppendLeaf, PutTombstone
from runner.core.plans import Swept
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, World, a_policy, an_exit, an_unreleased_exit


def test_what_a_start_will_do_is_decided_by_command_and_policy_together() -> None:
    """The plan carries everything the adapter needs, and nothing it must judge by policy."""
    world = World(policy=a_policy(grace_ms_max=5_000))
    args = {"env": {"CI": "1"}, "secrets": [{"name": "APP_KEY", "sealed": "x"}], "timeout_ms": 9, "grace_ms": 8_000}
    plan = world.send(world.start(args=args)).one(PrepareAttempt).plan
    assert plan.attempt == an_attempt() and plan.argv == ("make", "test")
    assert (plan.cwd, plan.worktree_id, plan.roots) == ("/srv/work", None, ("/srv/work", "/srv/repos"))
    assert plan.env == {"PATH": "/bin", "CI": "1"} and plan.secrets == {"APP_KEY": "x"}
    assert (plan.timeout_ms, plan.grace_ms) == (9, 5_000)


@pytest.mark.parametrize(("refused", "outcome"), [(True, Outcome.REFUSED), (False, Outcome.FAILED)])
def test_a_start_that_could_not_be_prepared_is_over_with_its_receipt(refused: bool, outcome: Outcome) -> None:
    """It never ran, so there is nothing to settle; the attempt is used up all the same."""
    world = World()
    world.send(world.start())
    turn = world.step(AttemptNotPrepared(an_attempt(), Reason.CWD_MISSING, "gone", refused=refused))
    assert (turn.receipt.outcome, turn.receipt.reason, turn.receipt.detail) == (outcome, Reason.CWD_MISSING, "gone")
    assert not turn.settlements and len(world.engine.claims) == 0
    assert world.send(world.start()).receipt.reason is Reason.DUPLICATE_ATTEMPT


def test_the_detail_of_a_failure_always_fits_its_receipt() -> None:
    """Text of programs and file names is bounded and cleaned, whatever it holds."""
    world = World()
    world.send(world.start())
    turn = world.step(AttemptNotPrepared(an_attempt(), Reason.INFRA, "\udcff" + "x" * 9_000, refused=False))
    assert turn.receipt.detail == "?" + "x" * 499


def test_an_attempt_is_started_once() -> None:
    """Another command for the same attempt is a duplicate, whatever became of the first."""
    world = World()
    world.running()
    assert world.send(world.start()).receipt.reason is Reason.DUPLICATE_ATTEMPT
    world.exit()
    assert world.send(world.start()).receipt.reason is Reason.DUPLICATE_ATTEMPT


def test_a_lower_token_is_fenced() -> None:
    """Whoever holds the higher token has the execution."""
    world = World()
    world.running("ex_1", 5)
    turn = world.send(world.start("ex_1", 4))
    assert turn.receipt.reason is Reason.FENCED and not turn.has(PrepareAttempt) and not turn.has(StopAttempt)
    world.exit("ex_1", 5)
    assert world.send(world.start("ex_1", 4)).receipt.reason is Reason.FENCED


def test_a_lease_below_the_attempt_is_fenced() -> None:
    """The grant is older than the attempt it comes with."""
    lease = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}
    world = World()
    assert world.send(world.start("ex_1", 2, lease=lease)).receipt.reason is Reason.FENCED


def test_a_successor_ends_its_predecessor_and_waits_for_its_end() -> None:
    """At most one living process per execution."""
    world = World()
    world.running("ex_1", 1)
    turn = world.send(world.start("ex_1", 2))
    stopped = turn.one(StopAttempt)
    assert stopped.attempt == an_attempt("ex_1", 1) and "superseded" in stopped.by
    assert not turn.has(PrepareAttempt) and not turn.receipts
    ended = world.exit("ex_1", 1, verdict="stopped", code=None, signal=15)
    assert ended.settlement.verdict is Verdict.STOPPED
    assert ended.one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 2)
    assert ended.index(ended.one(PrepareAttempt)) > ended.index(ended.of(Persist)[0])


def test_a_superseded_attempt_that_waits_never_runs() -> None:
    """Three in a row: the second is fenced off in its turn, the third begins."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2), world.start("ex_1", 3))
    turn = world.exit("ex_1", 1)
    assert turn.reasons == [Reason.FENCED]
    assert turn.one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 3)


def test_a_late_exit_of_a_predecessor_settles_nothing_of_its_successor() -> None:
    """Every message carries both parts of the name."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2))
    world.exit("ex_1", 1)
    world.step(AttemptPrepared(an_attempt("ex_1", 2), SHIM))
    assert list(world.exit("ex_1", 1)) == [CollectAttempt(an_attempt("ex_1", 1))]
    assert world.row("ex_1", 2).state is AttemptState.RUNNING


def test_an_exit_nobody_knows_is_collected_and_settles_nothing() -> None:
    """Its shim need not linger for us."""
    assert list(World().exit("ex_9", 9)) == [CollectAttempt(an_attempt("ex_9", 9))]


def test_the_owner_limits_how_many_live_at_a_time() -> None:
    """The limit counts executions beside the one that asks: its own attempts run one after the other."""
    world = World(policy=a_policy(concurrent_max=1))
    world.running("ex_1", 1)
    assert world.send(world.start("ex_2")).receipt.reason is Reason.CAPACITY
    assert world.send(world.start("ex_1", 2)).has(StopAttempt)
    assert world.exit("ex_1", 1).has(PrepareAttempt)


# --- stops -----------------------------------------------------------------------------------------------------------


def test_a_stop_of_a_living_attempt_begins_the_ladder_and_is_done_at_once() -> None:
    """Its end comes as the attempt's settlement; the grace is capped by the owner."""
    world = World(policy=a_policy(grace_ms_max=2_000))
    world.running()
    turn = world.send(world.stop(grace_ms=9_000, cmd_id="cmd_stop"))
    assert turn.one(StopAttempt) == StopAttempt(an_attempt(), 2_000, "cmd_stop")
    assert turn.receipt.result == {"state": "stopping", "execution_id": "ex_1", "start_token": 1}
    row = world.journal.attempts[an_attempt()]
    assert (row.state, row.stop_by, row.stop_grace_ms) == (AttemptState.STOPPING, "cmd_stop", 2_000)


def test_the_first_to_stop_is_remembered_and_later_ones_are_passed_on() -> None:
    """A later stop may shorten the grace; the cause stays."""
    world = World()
    world.running()
    world.send(world.stop(cmd_id="one", grace_ms=7))
    again = world.send(world.stop(cmd_id="two", grace_ms=0))
    assert again.one(StopAttempt) == StopAttempt(an_attempt(), 0, "two")
    row = world.journal.attempts[an_attempt()]
    assert (row.stop_by, row.stop_grace_ms) == ("one", 7)


def test_a_stop_before_its_start_leaves_a_tombstone() -> None:
    """The late start is cancelled, also after a crash."""
    for crash in (False, True):
        world = World()
        start = world.start()
        turn = world.send(world.stop())
        assert turn.receipt.result == {"state": "tombstone"} and not turn.has(StopAttempt)
        if crash:
            world.crash()
        late = world.send(start)
        assert late.receipt.reason is Reason.CANCELLED_BEFORE_START and not late.has(PrepareAttempt)


def test_a_stop_of_a_command_that_has_not_come_cancels_it() -> None:
    """By its id, whatever it would have started."""
    world = World()
    start, create = world.start(cmd_id="cmd_a"), world.create(cmd_id="cmd_b")
    world.send(world.stop_command("cmd_a"), world.stop_command("cmd_b"))
    assert world.send(start, create).reasons == [Reason.CANCELLED_BEFORE_START] * 2


def test_a_stop_by_command_finds_the_attempt_it_started() -> None:
    """Whoever asked may know nothing but the id it was given."""
    world = World()
    world.running(cmd_id="cmd_a")
    assert world.send(world.stop_command("cmd_a")).one(StopAttempt).attempt == an_attempt()


def test_a_stop_between_intent_and_prepared_lets_nothing_run() -> None:
    """The shim that comes up is sent away behind its barrier."""
    world = World()
    world.send(world.start())
    stopped = world.send(world.stop())
    assert stopped.receipt.result == {"state": "cancelled"} and not stopped.has(StopAttempt)
    turn = world.step(AttemptPrepared(an_attempt(), SHIM))
    assert turn.one(AbandonAttempt).attempt == an_attempt() and not turn.has(ReleaseAttempt)
    assert turn.reasons == [Reason.CANCELLED_BEFORE_START] and not turn.settlements
    assert world.released == [] and len(world.engine.claims) == 0


def test_a_stop_of_a_waiting_start_cancels_it_in_its_turn() -> None:
    """It never gets as far as a shim."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2), world.stop("ex_1", 2))
    turn = world.exit("ex_1", 1)
    assert turn.reasons == [Reason.CANCELLED_BEFORE_START] and not turn.has(PrepareAttempt)


def test_a_stop_of_a_settled_attempt_reports_its_settlement_again() -> None:
    """It changes nothing; the plane seems not to have heard."""
    world = World()
    world.running()
    number = world.exit().items[0].out_seq
    turn = world.send(world.stop())
    assert turn.one(ReportAgain).out_seqs == (number,)
    assert turn.receipt.result == {"state": "settled", "execution_id": "ex_1", "start_token": 1}
    assert not turn.has(StopAttempt)


def test_a_stop_of_an_attempt_that_never_began_is_done() -> None:
    """Its receipt was its end: there is no settlement to say again."""
    world = World()
    world.send(world.start())
    world.step(AttemptNotPrepared(an_attempt(), Reason.CWD_MISSING, "", refused=True))
    turn = world.send(world.stop())
    assert turn.receipt.result["state"] == "settled" and not turn.has(ReportAgain)


def test_early_stops_are_bounded_and_beyond_the_bound_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop is never silently forgotten."""
    monkeypatch.setattr(ledger_module, "TOMBSTONES_MAX", 1)
    world = World()
    world.send(world.stop("ex_1"))
    assert world.send(world.stop("ex_2")).receipt.reason is Reason.CAPACITY


def test_the_owner_stops_without_a_signature_and_leaves_a_leaf() -> None:
    """It is the owner's machine."""
    world = World()
    world.running()
    turn = world.step(OwnerStop("ex_1", None, "uid 1000"))
    assert turn.one(StopAttempt) == StopAttempt(an_attempt(), None, "uid 1000")
    leaf = world.journal.leaves[0]
    assert isinstance(leaf, AppendLeaf) and (leaf.kind, leaf.subject) == ("owner.stop", "ex_1.1")
    assert list(world.step(OwnerStop("ex_9", None, "uid 1000"))) == []


def test_the_owner_stops_what_waits_for_its_shim() -> None:
    """By a tombstone, as a signed stop does."""
    world = World()
    world.send(world.start())
    turn = world.step(OwnerStop("ex_1", None, "uid 1000"))
    assert any(isinstance(write, PutTombstone) for effect in turn.of(Persist) for write in effect.writes)
    assert world.step(AttemptPrepared(an_attempt(), SHIM)).has(AbandonAttempt)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_lost_attempt_is_settled_as_lost_with_what_was_found() -> None:
    """A missing exit record is never 0."""
    world = World()
    world.running()
    turn = world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, Swept(found=2, signalled=2, remaining=1)))
    settlement = turn.settlement
    assert (settlement.verdict, settlement.code, settlement.survivors) == (Verdict.LOST, None, 1)
    assert settlement.evidence == {"found": 2, "signalled": 2, "remaining": 1}
    assert turn.of(Note)[0].event == "attempt.lost"
    assert list(world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, None))) == []
    assert list(world.exit()) == [CollectAttempt(an_attempt())]


@pytest.mark.parametrize("unreleased", [True, False])
def test_a_shim_that_goes_before_we_heard_of_it_leaves_a_receipt_and_no_settlement(unreleased: bool) -> None:
    """1. The shim dies behind its barrier. 2. Its end overtakes the word that it was there. 3. Nothing ran.

    A settlement without an accepted receipt would be the end of something that never was.
    """
    world = World()
    world.send(world.start())
    attempt = an_attempt()
    end = AttemptExited(attempt, an_unreleased_exit()) if unreleased else AttemptLost(attempt, Reason.SHIM_LOST, None)
    turn = world.step(end)
    assert (turn.receipt.outcome, turn.receipt.reason) == (Outcome.FAILED, Reason.SHIM_LOST)
    assert not turn.settlements and len(world.engine.claims) == 0
    assert list(world.step(AttemptPrepared(attempt, SHIM))) == [AbandonAttempt(attempt)]
    assert list(world.step(AttemptNotPrepared(attempt, Reason.INFRA, "", refused=False))) == []


def test_a_released_attempt_that_never_ran_is_settled_as_its_shim_says() -> None:
    """The release was lost on the way; it was accepted, so it is settled."""
    world = World()
    world.running()
    turn = world.step(AttemptExited(an_attempt(), an_unreleased_exit()))
    assert turn.settlement.verdict is Verdict.NEVER_STARTED and turn.settlement.exit_status == 125


def test_old_settled_attempts_are_forgotten_and_living_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the living and the newest of the dead."""
    monkeypatch.setattr(attempts_module, "SETTLED_REMEMBERED_MAX", 2)
    world = World()
    world.running("ex_1")
    for number in range(2, 7):
        world.running(f"ex_{number}")
        world.exit(f"ex_{number}", code=number)
    assert [attempt.execution_id for attempt in world.engine.attempts.rows] == ["ex_1", "ex_5", "ex_6"]
    assert world.engine.attempts.living_names() == (an_attempt("ex_1"),)


def test_an_exit_of_a_stopped_attempt_says_who_stopped_it() -> None:
    """The first cause wins, and the shim keeps it."""
    world = World()
    world.running()
    world.send(world.stop(cmd_id="cmd_stop"))
    record = an_exit(verdict="stopped", code=None, signal=15, cause_kind="stop", cause_by="cmd_stop")
    settlement = world.step(AttemptExited(an_attempt(), record)).settlement
    assert (settlement.cause.kind, settlement.cause.by, settlement.exit_status) == ("stop", "cmd_stop", 143)


def test_a_command_that_is_no_start_has_no_attempt() -> None:
    """A stop of it leaves its mark and touches nothing."""
    world = World()
    world.made("wt_1")
    create = next(row for row in world.journal.commands.values() if row.kind == Kind.WORKTREE_CREATE)
    turn = world.send(world.stop_command(create.cmd_id))
    assert turn.receipt.result == {"state": "tombstone"} and world.engine.trees.ready("wt_1")
