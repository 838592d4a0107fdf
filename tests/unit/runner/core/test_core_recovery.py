"""The table of recovery, walked whole: every combination, with the step that the rules in words ask for."""

from itertools import product

import pytest

from protocol.execution import AttemptState
from runner.core.plans import ExitRecord, Observed, Phase
from runner.core.recovery import RecoveryStep, decide
from tests.support.builders import an_attempt
from tests.support.engine import an_exit, an_unreleased_exit

EXITS: dict[str, ExitRecord | None] = {"none": None, "ordinary": an_exit(), "unreleased": an_unreleased_exit()}
DIRECTORIES = [
    Observed(attempt=an_attempt(), same_boot=same_boot, phase=phase, lock_held=lock_held, exit=exit_record)
    for phase, lock_held, same_boot, exit_record in product(Phase, (True, False), (True, False), EXITS.values())
]
STATES = (None, *AttemptState)
COMBINATIONS = list(product(STATES, (None, *DIRECTORIES)))


def let_go(found: Observed) -> bool:
    """The shim wrote that it was released, so something may have run."""
    return found.phase in (Phase.RELEASED, Phase.RUNNING)


def in_words(state: AttemptState | None, found: Observed | None) -> RecoveryStep:
    """The rules as a person would tell them, without a look at how they are coded."""
    # What nobody knows: nothing is nothing; what never ran is cleared; what may have run is only reported.
    if state is None:
        if found is None:
            return RecoveryStep.NOTHING
        ended_by_itself = found.exit is not None and not found.exit.unreleased
        return RecoveryStep.REPORT if let_go(found) or ended_by_itself else RecoveryStep.CLEAR
    # What is settled stays settled; a shim that lingers is told to go.
    if state is AttemptState.SETTLED:
        return RecoveryStep.COLLECT if found is not None and found.lock_held else RecoveryStep.NOTHING
    again = RecoveryStep.SETTLE_NEVER if state is AttemptState.STOPPING else RecoveryStep.START_AGAIN
    # No directory: an intent had none yet; anything later has lost its shim.
    if found is None:
        return RecoveryStep.START_AGAIN if state is AttemptState.INTENT else RecoveryStep.LOST_SHIM
    # An intent was never let go, unless the files prove that it was.
    if state is AttemptState.INTENT and not let_go(found):
        return RecoveryStep.START_AGAIN
    # An exit record is the best witness, in any boot.
    if found.exit is not None:
        return again if found.exit.unreleased else RecoveryStep.SETTLE_EXIT
    # Without one, another boot means that nothing of ours is alive, and unsynced files prove nothing.
    if not found.same_boot:
        return RecoveryStep.LOST_REBOOT
    # In this boot a held lock is a living shim; a free one is a dead shim, which ran something or did not.
    if found.lock_held:
        return RecoveryStep.ADOPT
    return RecoveryStep.LOST_SHIM if let_go(found) else again


@pytest.mark.parametrize("state", STATES)
def test_every_combination_has_the_step_the_rules_ask_for(state: AttemptState | None) -> None:
    """All directories there can be, for one journal state."""
    for found in (None, *DIRECTORIES):
        assert decide(state, found) is in_words(state, found), (state, found)


def test_no_combination_is_left_out() -> None:
    """Six states, and a directory or none, of every phase, lock, boot and exit."""
    assert len(COMBINATIONS) == 6 * (1 + 4 * 2 * 2 * 3)
    assert all(isinstance(decide(state, found), RecoveryStep) for state, found in COMBINATIONS)


def test_every_step_is_needed() -> None:
    """None is dead."""
    assert {decide(state, found) for state, found in COMBINATIONS} == set(RecoveryStep)


def test_only_what_was_provably_never_let_go_is_started_again() -> None:
    """Rule 1: no released mark in this boot, or the shim's own word that it was not released."""
    for state, found in COMBINATIONS:
        if found is None or decide(state, found) is not RecoveryStep.START_AGAIN:
            continue
        unreleased = found.exit is not None and found.exit.unreleased
        assert unreleased or not let_go(found), (state, found)


def test_nothing_of_another_boot_is_adopted_or_signalled() -> None:
    """Rule 2: its pids are somebody else's by now."""
    for state, found in COMBINATIONS:
        if found is not None and not found.same_boot:
            assert decide(state, found) not in (RecoveryStep.ADOPT, RecoveryStep.LOST_SHIM), (state, found)


def test_an_exit_record_of_its_own_is_never_overruled_once_it_was_prepared() -> None:
    """ "We lost it" is not said of what told its end."""
    begun = (AttemptState.PREPARED, AttemptState.RUNNING, AttemptState.STOPPING)
    for state, found in COMBINATIONS:
        if state in begun and found is not None and found.exit is not None and not found.exit.unreleased:
            assert decide(state, found) is RecoveryStep.SETTLE_EXIT
