"""How a daemon ends: what the policy says of executions is done, every wait has a bound, and nothing of it is remembered."""

import os
import signal
from collections.abc import Callable, Iterator

import anyio
import pytest

from runner import ending as ending_module
from runner.core.effects import StopAttempt
from runner.core.inputs import AttemptExited, AttemptPrepared, EnvelopeReceived
from runner.core.plans import Admission
from runner.ending import SIGNALS, Ending
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, a_policy, an_exit
from tests.unit.runner.test_pump import WAIT_S, Clock, Stand, a_stand, running


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the service manager hears."""
    heard: list[str] = []
    monkeypatch.setattr(ending_module, "sd_notify", heard.append)
    return heard


def a_daemon(on_stop: str, owing: Callable[[], bool] = lambda: False) -> tuple[Stand, Ending]:
    """One with this policy, about to end."""
    stand = a_stand(policy=a_policy(on_daemon_stop=on_stop))
    return stand, Ending(engine=stand.world.engine, pump=stand.pump, clock=Clock(stand.world.now), owing=owing)


async def with_one_running(stand: Stand) -> None:
    """An execution that was let go."""
    stand.put(EnvelopeReceived(stand.world.start()), AttemptPrepared(an_attempt(), SHIM))
    await stand.until(lambda: an_attempt() in stand.world.journal.prepared)


@pytest.mark.parametrize("number", SIGNALS)
async def test_the_first_signal_begins_the_end_and_the_second_is_not_caught(number: int) -> None:
    """Whatever the daemon does meanwhile, the second one ends it."""
    _stand, ending = a_daemon("leave")
    before = signal.getsignal(number)
    with anyio.fail_after(WAIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ending.told)
            while signal.getsignal(number) == before:
                await anyio.lowlevel.checkpoint()
            os.kill(os.getpid(), number)
    assert [signal.getsignal(each) for each in SIGNALS] == [signal.SIG_DFL] * 2


async def test_leaving_waits_for_nobody(told: list[str]) -> None:
    """What runs goes on; the control plane hears of it from the next daemon."""
    stand, ending = a_daemon("leave", owing=lambda: True)
    async with running(stand.pump):
        await with_one_running(stand)
        with anyio.fail_after(1):
            await ending.carry_out()
    assert stand.world.engine.gate.admission is Admission.OPEN and told == ["STOPPING=1"]


async def test_a_drain_waits_until_nothing_lives_and_is_forgotten(told: list[str]) -> None:
    """1. Nothing new is taken. 2. What runs is not touched. 3. It ends by itself: so does the daemon. 4. The next one is open."""
    stand, ending = a_daemon("drain")
    async with running(stand.pump), anyio.create_task_group() as tasks:
        await with_one_running(stand)
        tasks.start_soon(ending.carry_out)
        await stand.until(lambda: "STATUS=executions are waited for: 1 left" in told)
        stand.put(EnvelopeReceived(stand.world.start("ex_2")))
        await stand.until(lambda: len(stand.world.journal.commands) == 2)
        assert stand.world.engine.attempts.living == 1
        stand.put(AttemptExited(an_attempt(), an_exit()))
    assert not [effect for effect in stand.hands.done if isinstance(effect, StopAttempt)]
    assert stand.world.journal.admission == (Admission.OPEN, None)
    assert told[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=90000000"]


async def test_stopping_ends_what_runs_and_waits_for_it(told: list[str]) -> None:
    """By the ladder of each, and its settlement is there before the daemon goes."""
    stand, ending = a_daemon("stop")
    async with running(stand.pump), anyio.create_task_group() as tasks:
        await with_one_running(stand)
        tasks.start_soon(ending.carry_out)
        await stand.until(lambda: any(isinstance(effect, StopAttempt) for effect in stand.hands.done))
        stand.put(AttemptExited(an_attempt(), an_exit(verdict="stopped")))
    assert stand.world.journal.attempts[an_attempt()].settled_seq is not None


@pytest.mark.parametrize("on_stop", ["drain", "stop"])
async def test_patience_ends(on_stop: str, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not end is left to the next daemon; nor is a silent control plane waited for long."""
    monkeypatch.setattr(ending_module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(ending_module, "TELL_S", 0.05)
    stand, ending = a_daemon(on_stop, owing=lambda: True)
    async with running(stand.pump):
        await with_one_running(stand)
        with anyio.fail_after(WAIT_S):
            await ending.carry_out()
    assert stand.world.engine.attempts.living == 1
    assert told[-1] == "STATUS=the control plane is told: 1 left"


async def test_the_owners_word_leaves_what_runs_and_tells_the_plane(told: list[str]) -> None:
    """Whatever the policy says of signals; the last reports are given a moment."""
    owed = [True, True, True]
    stand, ending = a_daemon("stop", owing=lambda: bool(owed and owed.pop()))
    async with running(stand.pump):
        await with_one_running(stand)
        ending.ask()
        with anyio.fail_after(WAIT_S):
            await ending.told()
            await ending.carry_out()
    assert not owed and stand.world.engine.attempts.living == 1
    assert stand.world.engine.gate.admission is Admission.OPEN
