"""Signals: one receipt, one delivery, whoever dies between the two; and an owner who decides which there may be."""

import pytest

from protocol.commands import Kind
from protocol.errors import Reason
from protocol.receipt import Outcome
from runner.core.effects import AdoptAttempt, SignalAttempt
from runner.core.inputs import AttemptLost, AttemptPrepared, AttemptSignalled
from runner.core.plans import Observed, Phase
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, World, a_policy


def a_signal(world: World, name: str = "USR1", to: str = "child", token: int = 1) -> bytes:
    """A sealed signal for the first execution."""
    args = {"execution_id": "ex_1", "start_token": token, "signal": name, "to": to}
    return world.seal(world.fields(Kind.EXECUTION_SIGNAL, args))


def alive() -> Observed:
    """Its shim lives."""
    return Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)


@pytest.mark.parametrize("to", ["child", "tree"])
def test_a_signal_is_passed_on_and_receipted_when_the_shim_answers(to: str) -> None:
    """Not before: `reached` is what the shim says."""
    world = World()
    world.running()
    turn = world.send(a_signal(world, to=to))
    sent = turn.one(SignalAttempt)
    assert (sent.attempt, sent.signal, sent.tree, turn.receipts) == (an_attempt(), "USR1", to == "tree", [])
    receipt = world.step(AttemptSignalled(an_attempt(), sent.id, 3)).receipt
    assert (receipt.outcome, receipt.result) == (Outcome.DONE, {"reached": 3})
    assert list(world.step(AttemptSignalled(an_attempt(), sent.id, 3))) == [], "an answer that comes twice says nothing"


def test_the_next_daemon_asks_again_under_the_same_id() -> None:
    """The shim knows it, so it is not sent twice; however late: it may have been sent."""
    world = World()
    world.running()
    sent = world.send(a_signal(world)).one(SignalAttempt)
    turn = world.crash(alive(), boot_ms=3_600_000)
    assert turn.one(SignalAttempt) == sent and turn.has(AdoptAttempt) and not turn.receipts
    assert world.step(AttemptSignalled(an_attempt(), sent.id, 1)).receipt.outcome is Outcome.DONE


def test_an_end_before_the_answer_is_said_so() -> None:
    """Nobody knows whom it reached: that is neither done nor refused."""
    world = World()
    world.running()
    sent = world.send(a_signal(world)).one(SignalAttempt)
    receipt = world.exit().receipt
    assert (receipt.outcome, receipt.reason) == (Outcome.FAILED, Reason.NOT_RUNNING)
    assert list(world.step(AttemptSignalled(an_attempt(), sent.id, 1))) == []


def test_an_end_that_only_the_next_daemon_finds_is_said_so() -> None:
    """The shim was lost with the answer."""
    world = World()
    world.running()
    world.send(a_signal(world))
    world.crash()
    turn = world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, None))
    assert [(each.kind, each.outcome) for each in turn.receipts] == [("execution.signal", Outcome.FAILED)]


def test_who_does_not_run_gets_none() -> None:
    """Unknown, not begun, over: each has its receipt, and nothing is sent."""
    world = World()
    assert world.send(a_signal(world)).receipt.reason is Reason.UNKNOWN_TARGET
    world.send(world.start())
    early = world.send(a_signal(world))
    assert (early.receipt.reason, early.has(SignalAttempt)) == (Reason.NOT_RUNNING, False)
    world.step(AttemptPrepared(an_attempt(), SHIM))
    world.exit()
    late = world.send(a_signal(world))
    assert (late.receipt.reason, late.has(SignalAttempt)) == (Reason.NOT_RUNNING, False)
    assert world.send(a_signal(world, token=2)).receipt.reason is Reason.UNKNOWN_TARGET


@pytest.mark.parametrize("name", ["KILL", "TERM", "STOP", "usr1", "10"])
def test_what_is_no_signal_of_ours_is_refused(name: str) -> None:
    """What ends or stops an attempt is another command."""
    world = World()
    world.running()
    assert world.send(a_signal(world, name)).receipt.reason is Reason.BAD_ARGS


def test_the_owner_says_which_signals_there_are() -> None:
    """And who may not start may not signal."""
    world = World()
    world.running()
    assert world.send(a_signal(world, "WINCH")).receipt.reason is Reason.POLICY_DENIED
    closed = World(policy=a_policy(kinds=frozenset()))
    assert closed.send(a_signal(closed)).receipt.reason is Reason.POLICY_DENIED
