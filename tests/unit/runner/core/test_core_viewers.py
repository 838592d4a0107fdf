"""PTYs in the engine: opened and closed as any attempt, looked at by whoever a signed command lets in, once."""

from dataclasses import replace
from typing import Any

import pytest

from protocol.commands import Background, Kind, SizePolicy, ViewerMode
from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.ids import Digest
from protocol.receipt import Outcome
from runner.core.effects import AdmitViewer, AdoptAttempt, PrepareAttempt, SignalAttempt, StopAttempt
from runner.core.inputs import AttemptLost, AttemptPrepared, OwnerAdmission, ViewerAdmitted, ViewerNotAdmitted
from runner.core.plans import Admission, Observed, Phase, TerminalPlan
from tests.support.builders import a_key, an_attempt
from tests.support.engine import SHIM, World, a_policy, an_exit

KEY = a_key("viewer").public.x


def a_pty(world: World, execution_id: str = "ex_1", token: int = 1, **args: Any) -> bytes:
    """A sealed pty.open."""
    fields: dict[str, Any] = {
        "execution_id": execution_id,
        "start_token": token,
        "argv": [],
        "cwd": {"type": "path", "path": "/srv/work"},
        "size": {"rows": 24, "cols": 80},
    }
    return world.seal(world.fields(Kind.PTY_OPEN, fields | args))


def an_attach(world: World, viewer: str = "v_1", *, key: str = KEY, mode: str = "rw", token: int = 1) -> bytes:
    """A sealed pty.attach to it."""
    args = {"execution_id": "ex_1", "start_token": token, "viewer": viewer, "key": key, "mode": mode}
    return world.seal(world.fields(Kind.PTY_ATTACH, args))


def a_close(world: World, token: int = 1) -> bytes:
    """A sealed pty.close of it."""
    target = {"type": "attempt", "execution_id": "ex_1", "start_token": token}
    return world.seal(world.fields(Kind.PTY_CLOSE, {"target": target, "grace_ms": 500}))


def opened(world: World) -> PrepareAttempt:
    """A PTY that runs."""
    prepared = world.send(a_pty(world)).one(PrepareAttempt)
    world.step(AttemptPrepared(an_attempt(), SHIM))
    return prepared


def alive() -> Observed:
    """Its shim lives."""
    return Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)


def test_a_pty_is_an_attempt_with_a_terminal() -> None:
    """Same receipt, same settlement; its log is a ring without a head, and it has no stdin of its own."""
    world = World()
    turn = world.send(a_pty(world, size_policy="smallest", background="leave"))
    plan = turn.one(PrepareAttempt).plan
    terminal = TerminalPlan(rows=24, cols=80, size_policy=SizePolicy.SMALLEST, background=Background.LEAVE)
    assert (plan.terminal, plan.argv, plan.overflow) == (terminal, (), "head_tail")
    assert (plan.input_key, plan.events, plan.env["TERM"]) == (None, False, "xterm-256color")
    assert world.step(AttemptPrepared(an_attempt(), SHIM)).receipt.outcome is Outcome.ACCEPTED
    assert world.exit().settlement.code == 0


def test_a_start_has_no_terminal() -> None:
    """Nor its words in the environment."""
    world = World()
    plan = world.send(world.start()).one(PrepareAttempt).plan
    assert plan.terminal is None and "TERM" not in plan.env


def test_an_attempt_is_one_thing_only() -> None:
    """A PTY under the name of a start that is known is a second start of it."""
    world = World()
    world.running()
    assert world.send(a_pty(world)).receipt.reason is Reason.DUPLICATE_ATTEMPT


def test_a_viewer_is_let_in_and_receipted_when_its_file_is_there() -> None:
    """Not before: `done` means that what it signs counts."""
    world = World()
    opened(world)
    turn = world.send(an_attach(world, mode="ro"))
    wanted = turn.one(AdmitViewer)
    assert (wanted.attempt, wanted.viewer, wanted.key, wanted.mode) == (an_attempt(), "v_1", KEY, ViewerMode.READ)
    assert turn.receipts == []
    receipt = world.step(ViewerAdmitted(wanted.digest)).receipt
    assert (receipt.outcome, receipt.result) == (Outcome.DONE, {"viewer": "v_1", "mode": "ro"})
    assert list(world.step(ViewerAdmitted(wanted.digest))) == [], "an answer that comes twice says nothing"


@pytest.mark.parametrize(("refused", "outcome"), [(True, Outcome.REFUSED), (False, Outcome.FAILED)])
def test_why_a_viewer_was_not_let_in_is_said(refused: bool, outcome: Outcome) -> None:
    """Its own doing, or the disk's."""
    world = World()
    opened(world)
    wanted = world.send(an_attach(world)).one(AdmitViewer)
    answer = ViewerNotAdmitted(wanted.digest, Reason.DUPLICATE_VIEWER, "another key", refused)
    receipt = world.step(answer).receipt
    assert (receipt.outcome, receipt.reason, receipt.detail) == (outcome, Reason.DUPLICATE_VIEWER, "another key")


def test_the_next_daemon_lets_it_in_again() -> None:
    """The file says whether it is in already, however late."""
    world = World()
    opened(world)
    wanted = world.send(an_attach(world)).one(AdmitViewer)
    turn = world.crash(alive(), boot_ms=3_600_000)
    assert turn.one(AdmitViewer) == wanted and turn.one(AdoptAttempt).terminal and not turn.receipts
    assert world.step(ViewerAdmitted(wanted.digest)).receipt.outcome is Outcome.DONE


def test_a_start_is_adopted_as_one_without_a_terminal() -> None:
    """Its log is no PTY's."""
    world = World()
    world.running()
    assert not world.crash(alive()).one(AdoptAttempt).terminal


def test_an_end_before_the_viewer_is_in_is_said_so() -> None:
    """There is nothing to look at any more."""
    world = World()
    opened(world)
    wanted = world.send(an_attach(world)).one(AdmitViewer)
    receipt = world.exit().receipt
    assert (receipt.kind, receipt.outcome, receipt.reason) == ("pty.attach", Outcome.FAILED, Reason.NOT_RUNNING)
    assert list(world.step(ViewerAdmitted(wanted.digest))) == []


def test_an_end_that_only_the_next_daemon_finds_is_said_so() -> None:
    """The shim was lost before the file was known to be there."""
    world = World()
    opened(world)
    world.send(an_attach(world))
    world.crash()
    turn = world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, None))
    assert [(each.kind, each.outcome) for each in turn.receipts] == [("pty.attach", Outcome.FAILED)]


def test_an_end_that_is_there_before_the_next_daemon_is_said_so() -> None:
    """An earlier daemon may have let it in: that is not refused, and not done either."""
    world = World()
    opened(world)
    world.send(an_attach(world))
    turn = world.crash(replace(alive(), lock_held=False, exit=an_exit()))
    assert [(each.kind, each.outcome) for each in turn.receipts] == [("pty.attach", Outcome.FAILED)]
    assert not turn.has(AdmitViewer)


def test_only_a_living_pty_is_looked_at() -> None:
    """Unknown, not begun, over, or no PTY: each has its receipt, and nothing is written."""
    world = World()
    assert world.send(an_attach(world)).receipt.reason is Reason.UNKNOWN_TARGET
    world.send(a_pty(world))
    early = world.send(an_attach(world))
    assert (early.receipt.reason, early.has(AdmitViewer)) == (Reason.NOT_RUNNING, False)
    world.step(AttemptPrepared(an_attempt(), SHIM))
    world.exit()
    late = world.send(an_attach(world))
    assert (late.receipt.reason, late.has(AdmitViewer)) == (Reason.NOT_RUNNING, False)
    assert world.send(an_attach(world, token=2)).receipt.reason is Reason.UNKNOWN_TARGET
    plain = World()
    plain.running()
    turn = plain.send(an_attach(plain))
    assert (turn.receipt.reason, turn.has(AdmitViewer)) == (Reason.NOT_A_PTY, False)


def test_the_owner_who_admits_no_pty_admits_no_viewer() -> None:
    """And who admits one admits its viewers, signals and leases, whatever else is denied."""
    closed = World(policy=a_policy(kinds=frozenset({"execution.start", "pty.attach"})))
    assert closed.send(a_pty(closed)).receipt.reason is Reason.POLICY_DENIED
    assert closed.send(an_attach(closed)).receipt.reason is Reason.POLICY_DENIED
    open_ = World(policy=a_policy(kinds=frozenset({"pty.open"})))
    assert open_.send(open_.start()).receipt.reason is Reason.POLICY_DENIED
    opened(open_)
    assert open_.send(an_attach(open_)).has(AdmitViewer)
    signal = {"execution_id": "ex_1", "start_token": 1, "signal": "HUP"}
    assert open_.send(open_.seal(open_.fields(Kind.EXECUTION_SIGNAL, signal))).has(SignalAttempt)


def test_a_paused_machine_opens_no_pty_and_lets_viewers_in() -> None:
    """A viewer is no new work."""
    world = World()
    opened(world)
    world.step(OwnerAdmission(Admission.PAUSED, "owner"))
    assert world.send(a_pty(world, "ex_2")).receipt.reason is Reason.PAUSED
    assert world.send(an_attach(world)).has(AdmitViewer)


def test_a_close_is_a_stop() -> None:
    """The same ladder, the same answer twice; after the end it changes nothing."""
    world = World()
    opened(world)
    turn = world.send(a_close(world))
    assert turn.one(StopAttempt).grace_ms == 500 and turn.receipt.result is not None
    assert (turn.receipt.kind, turn.receipt.result["state"]) == ("pty.close", "stopping")
    world.exit(verdict="stopped")
    late = world.send(a_close(world))
    assert late.receipt.result is not None and late.receipt.result["state"] == "settled"
    assert not late.has(StopAttempt)


def test_a_close_that_comes_first_leaves_a_tombstone() -> None:
    """The PTY is never opened."""
    world = World()
    assert world.send(a_close(world)).receipt.result == {"state": "tombstone"}
    turn = world.send(a_pty(world))
    assert (turn.receipt.reason, turn.has(PrepareAttempt)) == (Reason.CANCELLED_BEFORE_START, False)


def test_a_pty_that_was_never_let_go_is_opened_again_after_a_crash() -> None:
    """As any start, with its receipt or without."""
    world = World()
    world.send(a_pty(world))
    assert world.crash().one(PrepareAttempt).plan.terminal is not None
    world.step(AttemptPrepared(an_attempt(), SHIM))
    assert world.journal.attempts[an_attempt()].state is AttemptState.PREPARED
    unreleased = Observed(attempt=an_attempt(), same_boot=True, phase=Phase.READY, lock_held=False, exit=None)
    again = world.crash(unreleased).one(PrepareAttempt)
    assert again.again and again.plan.terminal is not None


def test_viewers_on_their_way_in_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that stands still fills no memory."""
    monkeypatch.setattr("runner.core.viewers.PENDING_MAX", 2)
    world = World()
    opened(world)
    digests: list[Digest] = [world.send(an_attach(world, f"v_{n}")).one(AdmitViewer).digest for n in range(2)]
    assert world.send(an_attach(world, "v_3")).receipt.reason is Reason.CAPACITY
    world.step(ViewerAdmitted(digests[0]))
    assert world.send(an_attach(world, "v_4")).has(AdmitViewer)
