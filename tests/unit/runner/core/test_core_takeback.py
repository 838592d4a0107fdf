"""A daemon that starts on the journal of a dead one: each attempt to its one end, each command to its one receipt."""

from dataclasses import replace
from typing import Any

import pytest

from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.execution import AttemptState
from protocol.receipt import Outcome, Verdict
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    CreateWorktree,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    ScanOrphans,
    SendBeat,
    StopAttempt,
    SweepAttempt,
)
from runner.core.inputs import AttemptLost, AttemptPrepared, WorktreeFailed, WorktreeRemoved
from runner.core.plans import Observed, Phase, Swept, WorktreeGone
from tests.support.builders import an_attempt
from tests.support.engine import HEAD, SHIM, World, a_made, a_policy, an_exit, an_unreleased_exit


def seen(execution_id: str = "ex_1", token: int = 1, **over: Any) -> Observed:
    """A directory whose shim lives and runs its child, in this boot."""
    fields: dict[str, Any] = {"same_boot": True, "phase": Phase.RUNNING, "lock_held": True, "exit": None}
    return Observed(attempt=an_attempt(execution_id, token), **(fields | over))


READY = {"phase": Phase.READY, "lock_held": False}


def test_a_living_attempt_is_adopted_and_nothing_else() -> None:
    """The daemon's death is invisible to it."""
    world = World()
    world.running()
    assert list(world.crash(seen())) == [AdoptAttempt(an_attempt()), ScanOrphans()]
    assert world.exit().settlement.verdict is Verdict.EXITED


def test_an_adopted_attempt_holds_its_claims() -> None:
    """Its successor waits for its end as before."""
    world = World()
    world.running("ex_1", 1)
    world.crash(seen())
    turn = world.send(world.start("ex_1", 2))
    assert turn.has(StopAttempt) and not turn.has(PrepareAttempt)
    assert world.exit("ex_1", 1).one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 2)


def test_a_successor_that_waited_waits_again() -> None:
    """Its place in the queue is behind the adopted one."""
    world = World()
    world.running("ex_1", 1)
    world.send(world.start("ex_1", 2))
    turn = world.crash(seen())
    assert not turn.has(PrepareAttempt) and turn.has(AdoptAttempt)
    assert world.exit("ex_1", 1).one(PrepareAttempt).plan.attempt == an_attempt("ex_1", 2)


def test_an_end_that_waited_in_its_file_is_settled() -> None:
    """Also when its shim still lingers to tell it."""
    world = World()
    world.running()
    turn = world.crash(seen(exit=an_exit(code=4)))
    assert turn.settlement.code == 4 and turn.has(CollectAttempt) and not turn.has(AdoptAttempt)
    assert len(world.engine.claims) == 0


def test_an_intent_begins_again_over_what_may_be_left_of_it() -> None:
    """Its release was never due."""
    for found in ([], [seen(**READY)], [seen(phase=Phase.NONE, lock_held=True)]):
        world = World()
        world.send(world.start())
        turn = world.crash(*found)
        assert turn.one(PrepareAttempt).again and not turn.receipts
        begun = world.step(AttemptPrepared(an_attempt(), SHIM))
        assert begun.receipt.outcome is Outcome.ACCEPTED and begun.has(ReleaseAttempt)


def test_a_prepared_attempt_that_was_never_let_go_begins_again_without_a_second_receipt() -> None:
    """1. PREPARED and the receipt are durable. 2. The daemon dies before the release. 3. It is prepared anew and let go."""
    world = World()
    world.running()
    world.released.clear()
    turn = world.crash(seen(**READY))
    assert turn.one(PrepareAttempt).again and not turn.receipts and not turn.settlements
    begun = world.step(AttemptPrepared(an_attempt(), SHIM))
    assert begun.has(ReleaseAttempt) and not begun.receipts
    assert world.exit().settlement.verdict is Verdict.EXITED


def test_what_begins_again_can_be_stopped_before_it_does() -> None:
    """It was accepted, so its end is a settlement; also when the daemon dies once more."""
    for crash in (False, True):
        world = World()
        world.running()
        world.released.clear()
        world.crash(seen(**READY))
        assert world.send(world.stop()).receipt.result == {"state": "cancelled"}
        turn = world.crash(seen(**READY)) if crash else world.step(AttemptPrepared(an_attempt(), SHIM))
        assert turn.settlement.verdict is Verdict.NEVER_STARTED and turn.has(AbandonAttempt)
        assert turn.settlement.cause.reason is Reason.CANCELLED_BEFORE_START and not turn.receipts
        assert not turn.has(ReleaseAttempt) and len(world.engine.claims) == 0


def test_what_cannot_begin_again_is_settled_as_never_started() -> None:
    """Its command cannot be read any more, or its shim cannot be had."""
    world = World()
    world.running()
    for row in list(world.journal.commands.values()):
        world.journal.commands[row.digest] = replace(row, envelope=b"")
    turn = world.crash(seen(**READY))
    assert turn.settlement.verdict is Verdict.NEVER_STARTED and turn.has(AbandonAttempt) and not turn.receipts


def test_a_stop_that_was_journaled_is_said_again_at_adoption() -> None:
    """1. The stop is durable. 2. The daemon dies before the shim hears it. 3. The next one says it."""
    world = World()
    world.running()
    world.send(world.stop(cmd_id="cmd_stop", grace_ms=5))
    turn = world.crash(seen())
    assert list(turn) == [AdoptAttempt(an_attempt()), StopAttempt(an_attempt(), 5, "cmd_stop"), ScanOrphans()]


def test_a_stopped_attempt_that_was_never_let_go_is_settled_and_not_begun() -> None:
    """The stop came in between."""
    world = World()
    world.running()
    world.send(world.stop())
    turn = world.crash(seen(lock_held=False, phase=Phase.READY, exit=an_unreleased_exit()))
    assert turn.settlement.verdict is Verdict.NEVER_STARTED
    assert turn.settlement.cause.reason is Reason.NOT_RELEASED and not turn.has(PrepareAttempt)


def test_a_lost_shim_is_swept_before_it_is_settled() -> None:
    """What is left of it is ended, and the settlement says what was found."""
    for found in ([], [seen(lock_held=False)]):
        world = World()
        world.running()
        turn = world.crash(*found)
        assert list(turn) == [SweepAttempt(an_attempt()), ScanOrphans()]
        assert not world.send(world.start("ex_1", 2)).has(PrepareAttempt)  # it holds its claims until then
        lost = world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, Swept(found=1, signalled=1, remaining=0)))
        assert lost.settlement.verdict is Verdict.LOST and lost.has(PrepareAttempt)


def test_a_reboot_loses_what_ran_and_signals_nothing() -> None:
    """Its pids belong to others now."""
    world = World()
    world.running()
    turn = world.crash(seen(same_boot=False, lock_held=False))
    assert (turn.settlement.verdict, turn.settlement.cause.kind) == (Verdict.LOST, "reboot")
    assert not turn.has(SweepAttempt) and not turn.has(StopAttempt) and not turn.has(AdoptAttempt)


def test_a_settled_attempt_whose_shim_lingers_is_collected() -> None:
    """The last word was durable, the shim did not hear it."""
    world = World()
    world.running()
    world.exit()
    assert list(world.crash(seen())) == [CollectAttempt(an_attempt()), ScanOrphans()]
    assert list(world.crash(seen(lock_held=False))) == [ScanOrphans()]


def test_a_directory_nobody_knows_is_cleared_or_reported() -> None:
    """What never ran is removed; what ran is left alone, and told."""
    world = World()
    turn = world.crash(seen("ex_8", **READY), seen("ex_9"))
    assert turn.one(AbandonAttempt).attempt == an_attempt("ex_8")
    note = turn.one(Note)
    assert (note.event, note.fields["attempt"]) == ("alarm.raised", "ex_9.1")
    assert world.released == []


def test_what_lives_here_and_the_journal_does_not_know_is_kept_told_and_ended_by_a_signed_word() -> None:
    """1. The journal is set back. 2. A shim of later lives. 3. It is adopted and told. 4. A stop reaches it. 5. Its end is heard."""
    world = World()
    turn = world.crash(seen("ex_9"))
    assert turn.has(AdoptAttempt) and not turn.has(SweepAttempt) and not turn.has(AbandonAttempt)
    event = Event.parse(turn.items[0].body.encode())
    assert (event.kind, event.execution_id, event.start_token) == (EventKind.ATTEMPT_UNKNOWN, "ex_9", 1)
    assert world.session().one(SendBeat).attempts == (an_attempt("ex_9"),)
    stopped = world.send(world.stop("ex_9", grace_ms=7, cmd_id="cmd_stop"))
    assert stopped.one(StopAttempt) == StopAttempt(an_attempt("ex_9"), 7, "cmd_stop")
    assert stopped.receipt.result == {"state": "tombstone"}
    ended = world.exit("ex_9")
    assert list(ended) == [CollectAttempt(an_attempt("ex_9"))]
    assert world.session().one(SendBeat).attempts == ()


@pytest.mark.parametrize("over", [{"lock_held": False}, {"same_boot": False}, {"exit": an_exit()}])
def test_what_ran_and_is_over_and_unknown_is_told_and_left_alone(over: dict[str, Any]) -> None:
    """Nobody is connected to, and nothing is removed: somebody has to look at it."""
    turn = World().crash(seen("ex_9", **over))
    assert [type(effect) for effect in turn] == [Note, Persist, Offer, ScanOrphans]


@pytest.mark.parametrize(
    ("over", "verdict"),
    [
        ({}, None),
        ({"exit": an_exit()}, Verdict.EXITED),
        ({"same_boot": False, "lock_held": False}, Verdict.LOST),
        ({"lock_held": False}, None),
    ],
)
def test_a_journal_that_was_set_back_believes_the_files(over: dict[str, Any], verdict: Verdict | None) -> None:
    """1. The journal is put back to before PREPARED. 2. The files say it was let go. 3. It was accepted, and is not begun again.

    Else the same attempt would start twice, or the daemon would stumble over its own queue at every start.
    """
    world = World()
    world.send(world.start())
    turn = world.crash(seen(**over))
    assert turn.receipt.outcome is Outcome.ACCEPTED and not turn.has(PrepareAttempt)
    assert [settlement.verdict for settlement in turn.settlements] == ([] if verdict is None else [verdict])
    if verdict is None:
        assert turn.has(SweepAttempt if over else AdoptAttempt)
        assert world.exit().settlement.verdict is Verdict.EXITED
    assert world.crash() == [ScanOrphans()]


def test_a_pending_start_is_judged_again_by_todays_policy() -> None:
    """The owner changed the rules while the daemon was down."""
    world = World()
    world.send(world.start())
    world.policy = a_policy(kinds=frozenset())
    turn = world.crash(seen(**READY))
    assert turn.receipt.reason is Reason.POLICY_DENIED and turn.has(AbandonAttempt)
    assert world.engine.attempts.living == 0


def test_a_pending_start_does_not_count_against_itself() -> None:
    """1. The owner allows one at a time. 2. The daemon dies with that one pending. 3. It still begins."""
    world = World(policy=a_policy(concurrent_max=1))
    world.send(world.start())
    assert world.crash().one(PrepareAttempt).plan.attempt == an_attempt()


def test_a_cancelled_intent_is_receipted_after_a_crash() -> None:
    """The tombstone is durable, and so is the answer to come."""
    world = World()
    world.send(world.start(), world.stop())
    turn = world.crash(seen(**READY))
    assert turn.reasons == [Reason.CANCELLED_BEFORE_START] and turn.has(AbandonAttempt)
    assert not turn.settlements and not turn.has(PrepareAttempt)


def test_half_made_and_half_removed_worktrees_are_carried_to_their_end() -> None:
    """Under the same command, so the adapter finds its own work."""
    world = World()
    digest = world.send(world.create()).one(CreateWorktree).digest
    assert world.crash().one(CreateWorktree).digest == digest
    world = World()
    world.made()
    digest = world.send(world.remove()).one(RemoveWorktree).digest
    assert world.crash().one(RemoveWorktree).digest == digest
    gone = world.step(WorktreeRemoved(digest, WorktreeGone(head=HEAD, branch="topic", was_dirty=False)))
    assert gone.receipt.outcome is Outcome.DONE and not world.engine.trees.rows


def test_a_removal_under_way_is_finished_before_a_start_that_came_after_it() -> None:
    """1. The removal begins. 2. A start in the worktree waits. 3. Crash. 4. The removal is done, the start fails.

    Were the removal refused now, its half-removed worktree would be said to be there.
    """
    world = World()
    world.made()
    removal = world.send(world.remove()).one(RemoveWorktree)
    world.send(world.start_in("wt_1"))
    turn = world.crash()
    assert turn.one(RemoveWorktree).digest == removal.digest
    assert not turn.receipts and not turn.has(PrepareAttempt)
    done = world.step(WorktreeRemoved(removal.digest, WorktreeGone(head=HEAD, branch=None, was_dirty=False)))
    assert [(said.outcome, said.reason) for said in done.receipts] == [
        (Outcome.DONE, None),
        (Outcome.REFUSED, Reason.WORKTREE_UNKNOWN),
    ]


def test_a_start_behind_a_half_made_worktree_keeps_its_place() -> None:
    """It begins when the worktree is there, or fails with it."""
    world = World()
    digest = world.send(world.create()).one(CreateWorktree).digest
    world.send(world.start_in("wt_1"))
    turn = world.crash()
    assert turn.has(CreateWorktree) and not turn.has(PrepareAttempt)
    failed = world.step(WorktreeFailed(digest, Reason.BASE_NOT_FOUND, "", refused=True))
    assert failed.reasons == [Reason.BASE_NOT_FOUND, Reason.WORKTREE_UNKNOWN]


def test_worktrees_and_tombstones_and_settlements_outlive_a_restart() -> None:
    """The image is all there is."""
    world = World()
    world.made()
    world.running()
    number = world.exit().items[0].out_seq
    world.crash()
    assert world.engine.trees.rows["wt_1"].made == a_made()
    assert world.row().state is AttemptState.SETTLED
    assert world.send(world.stop()).one(ReportAgain).out_seqs == (number,)
    assert world.engine.statements.out_head == max(world.journal.items)


def test_two_attempts_of_one_execution_that_both_live_are_both_taken_back() -> None:
    """It must not be, and a journal that was set back can show it: each ends for itself, and nothing stumbles."""
    world = World()
    world.running("ex_1", 1)
    world.exit("ex_1", 1)
    world.running("ex_1", 2)
    first = an_attempt("ex_1", 1)
    world.journal.attempts[first] = replace(
        world.journal.attempts[first], state=AttemptState.PREPARED, settled_seq=None
    )
    world.crash(seen("ex_1", 1), seen("ex_1", 2))
    assert world.exit("ex_1", 1).settlement.start_token == 1
    assert world.exit("ex_1", 2).settlement.start_token == 2
    assert len(world.engine.claims) == 0
