"""The table of recovery through the engine: every combination, with the effects it has, taken twice, and brought to its one end."""

from copy import copy
from dataclasses import fields, replace
from functools import cache

import pytest

from protocol.errors import Reason
from protocol.execution import AttemptState
from protocol.receipt import Outcome
from runner.core.effects import (
    AbandonAttempt,
    AdoptAttempt,
    CollectAttempt,
    EndHungShim,
    PrepareAttempt,
    PushLease,
    ReleaseAttempt,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import AttemptExited, AttemptLost, AttemptPrepared
from runner.core.plans import Swept
from tests.support.builders import an_attempt
from tests.support.engine import BOOT_ID, SHIM, JournalModel, Turn, World, an_exit, opened_receipt, opened_settlement
from tests.unit.runner.core.test_core_recovery import CASES, Case, may_have_run

REASON_OF_EFFECT = {SweepAttempt: Reason.SHIM_LOST, EndHungShim: Reason.SHIM_HUNG}
TOUCHES = (StopAttempt, SweepAttempt, SweepRemains, EndHungShim, AdoptAttempt, PushLease, ReleaseAttempt)
"""What reaches a process, or a socket that may be somebody else's."""
LEASE = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}


def journal_in(state: AttemptState | None, *, receipted: bool = False) -> World:
    """A world whose journal has ex_1.1 in `state`, under a lease; `receipted`: an intent that begins again."""
    world = World()
    if state is None:
        return world
    world.send(world.start(lease=LEASE))
    if state is AttemptState.INTENT and not receipted:
        return world
    world.step(AttemptPrepared(an_attempt(), SHIM))
    if state is AttemptState.STOPPING:
        world.send(world.stop())
    elif state is AttemptState.SETTLED:
        world.exit()
    row = world.journal.attempts[an_attempt()]
    if state in (AttemptState.RUNNING, AttemptState.INTENT):
        world.journal.attempts[an_attempt()] = replace(row, state=state)
    return world


def copied(world: World) -> World:
    """Another world with the same past."""
    journal = JournalModel(**{each.name: copy(getattr(world.journal, each.name)) for each in fields(JournalModel)})
    return World(journal=journal, mark=world.mark, _ids=world._ids)


def starts(world: World, case: Case, *, same_boot: bool) -> Turn:
    """A daemon starts on it and finds what the case says."""
    found = [] if case.found is None else [case.found]
    return world.crash(*found) if same_boot else world.reboot(*found)


@cache
def looked_at(state: AttemptState | None, *, receipted: bool = False) -> list[tuple[Case, bool, Turn]]:
    """What is walked, for those that only look."""
    return [(case, same_boot, turn) for case, same_boot, _, turn in walked(state, receipted=receipted)]


def walked(state: AttemptState | None, *, receipted: bool = False) -> list[tuple[Case, bool, World, Turn]]:
    """Every combination in `state`: what was found, whether in the same boot, and what a start on it said."""
    before = journal_in(state, receipted=receipted)
    told = []
    for case in CASES:
        if case.state is not state or (case.found is not None and not case.found.spec):
            continue
        for same_boot in (True, False) if case.found is None else (case.found.same_boot,):
            world = copied(before)
            told.append((case, same_boot, world, starts(world, case, same_boot=same_boot)))
    return told


STATES = [
    pytest.param(state, receipted, id=f"{state or 'unknown'}{'-again' if receipted else ''}")
    for state, receipted in [*((state, False) for state in (None, *AttemptState)), (AttemptState.INTENT, True)]
]


@pytest.mark.parametrize(("state", "receipted"), STATES)
def test_another_boot_touches_no_process(state: AttemptState | None, receipted: bool) -> None:
    """No signal, no connection, no word to a shim: not even where there is no directory left to say so."""
    for case, same_boot, turn in looked_at(state, receipted=receipted):
        if not same_boot:
            assert not [effect for effect in turn if isinstance(effect, TOUCHES)], (case.words, turn)


@pytest.mark.parametrize(("state", "receipted"), STATES)
def test_only_what_never_ran_is_prepared_or_removed(state: AttemptState | None, receipted: bool) -> None:
    """Whatever the journal says."""
    for case, _, turn in looked_at(state, receipted=receipted):
        if case.found is not None and may_have_run(case.found):
            assert not turn.has(PrepareAttempt) and not turn.has(AbandonAttempt), case.words


@pytest.mark.parametrize(("state", "receipted"), STATES)
@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_known_attempt_comes_to_one_end(state: AttemptState | None, receipted: bool, twice: bool) -> None:
    """One receipt, and one settlement if it was accepted; also when the daemon dies as soon as its first turn is durable."""
    for case, same_boot, world, first in walked(state, receipted=receipted):
        turn = starts(world, case, same_boot=True) if twice else first
        asked = [e for e in turn if isinstance(e, AdoptAttempt | SweepAttempt | EndHungShim | PrepareAttempt)]
        if state is None:
            assert not world.journal.attempts, case.words
            continue
        settled = world.journal.attempts[an_attempt()].state is AttemptState.SETTLED
        pending = [effect for effect in asked if not isinstance(effect, EndHungShim) or not settled]
        assert len(pending) == (0 if settled else 1), (case.words, same_boot, turn)
        world.released.clear()
        for effect in pending:
            end(world, effect)
        assert_one_end(world, case)


def end(world: World, effect: AdoptAttempt | SweepAttempt | EndHungShim | PrepareAttempt) -> None:
    """The machine does as it was asked."""
    if isinstance(effect, SweepAttempt | EndHungShim):
        evidence = Swept(found=0, signalled=0, remaining=0)
        world.step(AttemptLost(an_attempt(), REASON_OF_EFFECT[type(effect)], evidence))
        return
    if isinstance(effect, PrepareAttempt):
        world.step(AttemptPrepared(an_attempt(), SHIM))
    world.step(AttemptExited(an_attempt(), an_exit()))


def assert_one_end(world: World, case: Case) -> None:
    """In the journal, as a plane would read it."""
    receipts = [opened_receipt(item) for item in world.journal.items.values() if item.kind == "receipt"]
    settlements = [opened_settlement(item) for item in world.journal.items.values() if item.kind == "settlement"]
    of_start = [said for said in receipts if said.kind == "execution.start"]
    assert len(of_start) == 1, case.words
    assert len(settlements) == (1 if of_start[0].outcome is Outcome.ACCEPTED else 0), case.words
    assert world.journal.attempts[an_attempt()].state is AttemptState.SETTLED, case.words
    assert world.engine.attempts.living == 0 and len(world.engine.claims) == 0, case.words


def test_a_directory_that_is_gone_is_lost_to_the_boot_its_shim_was_of() -> None:
    """1. It runs. 2. The power fails, and the directory was never on the disk. 3. Only the journal knows of which boot it was."""
    for same_boot, kind in ((True, "shim_lost"), (False, "reboot")):
        world = journal_in(AttemptState.PREPARED)
        turn = world.crash() if same_boot else world.reboot()
        if same_boot:
            assert turn.one(SweepAttempt).attempt == an_attempt()
            turn = world.step(AttemptLost(an_attempt(), Reason.SHIM_LOST, None))
        assert turn.settlement.cause.kind == kind


def test_what_begins_again_is_an_intent_again_before_its_directory_is_cleared() -> None:
    """1. Prepared, never let go. 2. A new daemon clears the directory, and dies. 3. The next one finds none, and an INTENT.

    PREPARED beside an empty directory would be no proof, and the attempt lost.
    """
    world = World()
    world.running()
    world.released.clear()
    ready = next(
        case.found
        for case in CASES
        if case.words == ("prepared", "none", "ready", "same", "free", "answers", "gone") and case.found is not None
    )
    assert world.crash(ready).one(PrepareAttempt).again
    assert world.journal.attempts[an_attempt()].state is AttemptState.INTENT
    again = world.crash().one(PrepareAttempt)
    assert again.again
    assert not world.step(AttemptPrepared(an_attempt(), SHIM)).receipts
    assert world.exit().settlement.verdict == "exited"


@pytest.mark.parametrize(
    ("found", "effect"),
    [
        (("settled", "ended", "running", "same", "held", "answers", "gone"), CollectAttempt(an_attempt())),
        (("settled", "ended", "running", "same", "held", "silent", "gone"), EndHungShim(an_attempt(), SHIM)),
        (("settled", "ended", "running", "same", "free", "answers", "alive"), SweepRemains(an_attempt())),
        (("stopping", "none", "running", "same", "held", "silent", "gone"), EndHungShim(an_attempt(), SHIM)),
    ],
)
def test_each_step_that_is_new_names_what_it_is_about(found: tuple[str, ...], effect: object) -> None:
    """A shim by its identity: never a pid alone."""
    case = next(case for case in CASES if case.words == found)
    assert SHIM.boot_id == BOOT_ID
    assert effect in starts(journal_in(case.state), case, same_boot=True)
