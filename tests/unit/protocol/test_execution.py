"""The life of an attempt: what the table must say. (All pairs are in the property tests.)"""

from protocol.execution import TRANSITIONS, AttemptInput, AttemptState, step


def test_an_ordinary_life() -> None:
    """Intent, prepared, running, settled."""
    state = AttemptState.INTENT
    for happened in (AttemptInput.PREPARE, AttemptInput.RELEASE, AttemptInput.EXIT):
        following = step(state, happened)
        assert following is not None
        state = following
    assert state is AttemptState.SETTLED


def test_nothing_is_released_that_was_not_prepared() -> None:
    """The one way to RUNNING is a release of PREPARED."""
    ways = {pair for pair, after in TRANSITIONS.items() if after is AttemptState.RUNNING}
    assert ways == {(AttemptState.PREPARED, AttemptInput.RELEASE)}


def test_a_stop_is_never_taken_back() -> None:
    """From STOPPING there is only the end."""
    after = {target for (state, _), target in TRANSITIONS.items() if state is AttemptState.STOPPING}
    assert after == {AttemptState.STOPPING, AttemptState.SETTLED}


def test_every_life_can_be_lost_and_ends_once() -> None:
    """A reboot may come at any time; SETTLED has no way out."""
    for state in AttemptState:
        settled = state is AttemptState.SETTLED
        assert (step(state, AttemptInput.LOSE) is None) == settled
        assert not settled or all(step(state, happened) is None for happened in AttemptInput)
