"""Worktrees in the engine: in order per repository, one receipt each, and no start in what is not there."""

from protocol.errors import Reason
from protocol.receipt import Outcome
from runner.core.effects import CreateWorktree, PrepareAttempt, RemoveWorktree
from runner.core.inputs import AttemptPrepared, WorktreeCreated, WorktreeFailed, WorktreeRemoved
from runner.core.plans import WorktreeGone
from tests.support.builders import an_attempt
from tests.support.engine import HEAD, SHIM, Turn, World, a_made

GONE = WorktreeGone(head=HEAD, branch="topic", was_dirty=True)


def test_a_worktree_is_journaled_before_it_is_made_and_receipted_when_it_is_there() -> None:
    """The receipt says what was verified."""
    world = World()
    turn = world.send(world.create())
    assert world.journal.worktrees["wt_1"].made is None and not turn.receipts  # type: ignore[index]
    done = world.step(WorktreeCreated(turn.one(CreateWorktree).digest, a_made()))
    assert done.receipt.outcome is Outcome.DONE
    assert done.receipt.result == {
        "worktree_id": "wt_1",
        "path": "/state/wt_1/repo",
        "head": HEAD,
        "branch": "topic",
    }
    assert world.engine.trees.ready("wt_1") and len(world.engine.claims) == 0


def test_a_removal_says_what_was_removed() -> None:
    """Its head and branch are how the work is found again."""
    world = World()
    world.made()
    turn = world.send(world.remove())
    done = world.step(WorktreeRemoved(turn.one(RemoveWorktree).digest, GONE))
    assert done.receipt.result == {"worktree_id": "wt_1", "head": HEAD, "branch": "topic", "was_dirty": True}
    assert not world.journal.worktrees and not world.engine.trees.ready("wt_1")


def test_a_worktree_id_is_made_once() -> None:
    """Judged in its turn, so a removal in between makes room."""
    world = World()
    world.made()
    assert world.send(world.create()).receipt.reason is Reason.WORKTREE_EXISTS
    removal = world.send(world.remove()).one(RemoveWorktree)
    waiting = world.send(world.create())
    assert not waiting.receipts and not waiting.has(CreateWorktree)
    assert world.step(WorktreeRemoved(removal.digest, GONE)).has(CreateWorktree)


def test_worktrees_of_one_repository_are_made_one_after_the_other() -> None:
    """And those of another one meanwhile."""
    world = World()
    first = world.send(world.create("wt_1", "/srv/repos/a")).one(CreateWorktree)
    assert not world.send(world.create("wt_2", "/srv/repos/a")).has(CreateWorktree)
    assert world.send(world.create("wt_3", "/srv/repos/b")).has(CreateWorktree)
    turn = world.step(WorktreeCreated(first.digest, a_made()))
    assert turn.one(CreateWorktree).plan.worktree_id == "wt_2"


def test_a_start_waits_for_the_worktree_that_is_being_made() -> None:
    """The two commands may be sent in one breath."""
    world = World()
    create = world.send(world.create()).one(CreateWorktree)
    assert not world.send(world.start_in("wt_1")).has(PrepareAttempt)
    turn = world.step(WorktreeCreated(create.digest, a_made()))
    plan = turn.one(PrepareAttempt).plan
    assert (plan.worktree_id, plan.cwd) == ("wt_1", None)


def test_a_worktree_that_cannot_be_made_fails_the_start_that_waited() -> None:
    """Each of the two with its own reason."""
    world = World()
    create = world.send(world.create()).one(CreateWorktree)
    world.send(world.start_in("wt_1"))
    turn = world.step(WorktreeFailed(create.digest, Reason.GIT_FAILED, "disk", refused=False))
    assert [(said.outcome, said.reason) for said in turn.receipts] == [
        (Outcome.FAILED, Reason.GIT_FAILED),
        (Outcome.REFUSED, Reason.WORKTREE_UNKNOWN),
    ]
    assert not turn.has(PrepareAttempt) and not world.journal.worktrees and world.engine.attempts.living == 0


def in_use() -> tuple[World, Turn]:
    """A worktree that an attempt lives in, and what a removal of it is told."""
    world = World()
    world.made()
    world.running(env=world.start_in("wt_1"))
    return world, world.send(world.remove())


def test_a_worktree_an_attempt_lives_in_is_not_removed() -> None:
    """Refused at once: waiting would hold up the whole repository for as long as the attempt lives."""
    world, turn = in_use()
    assert turn.receipt.reason is Reason.WORKTREE_BUSY and not turn.has(RemoveWorktree)
    beside = world.send(world.create("wt_2", "/srv/repos/a")).one(CreateWorktree)
    world.step(WorktreeCreated(beside.digest, a_made("wt_2")))
    world.exit()
    assert world.send(world.remove()).has(RemoveWorktree)


def test_a_worktree_an_attempt_is_about_to_live_in_is_not_removed() -> None:
    """A start that was admitted counts, whether it runs yet or not."""
    world = World()
    world.made()
    world.send(world.start_in("wt_1"))
    assert world.send(world.remove()).receipt.reason is Reason.WORKTREE_BUSY


def test_a_start_that_comes_after_a_removal_finds_nothing() -> None:
    """Effects are in the order of the commands."""
    world = World()
    world.made()
    removal = world.send(world.remove()).one(RemoveWorktree)
    assert not world.send(world.start_in("wt_1")).receipts
    turn = world.step(WorktreeRemoved(removal.digest, GONE))
    assert turn.reasons == [None, Reason.WORKTREE_UNKNOWN] and not turn.has(PrepareAttempt)


def test_a_removal_that_was_refused_leaves_the_worktree_to_be_used() -> None:
    """Dirty, foreign or pinned: the adapter sees it, and the start that waited begins."""
    world = World()
    world.made()
    removal = world.send(world.remove()).one(RemoveWorktree)
    world.send(world.start_in("wt_1"))
    turn = world.step(WorktreeFailed(removal.digest, Reason.WORKTREE_DIRTY, "1 file", refused=True))
    assert turn.reasons == [Reason.WORKTREE_DIRTY] and turn.has(PrepareAttempt)
    assert world.engine.trees.ready("wt_1")


def test_many_attempts_share_a_worktree() -> None:
    """It is theirs to arrange."""
    world = World()
    world.made()
    assert world.send(world.start_in("wt_1", "ex_1")).has(PrepareAttempt)
    assert world.send(world.start_in("wt_1", "ex_2")).has(PrepareAttempt)
    world.step(AttemptPrepared(an_attempt("ex_1"), SHIM), AttemptPrepared(an_attempt("ex_2"), SHIM))
    world.exit("ex_1")
    assert world.send(world.remove()).receipt.reason is Reason.WORKTREE_BUSY


def test_a_removal_of_what_nobody_knows_is_for_the_adapter_to_judge() -> None:
    """The journal may be younger than the directory."""
    world = World()
    removal = world.send(world.remove("wt_9")).one(RemoveWorktree)
    turn = world.step(WorktreeFailed(removal.digest, Reason.WORKTREE_UNKNOWN, "", refused=True))
    assert turn.receipt.reason is Reason.WORKTREE_UNKNOWN
