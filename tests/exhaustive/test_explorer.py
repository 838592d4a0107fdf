"""A small bound of `make explore`, and that it sees what is wrong.

Hand mutants that were tried, each in the code as it is, found by this small bound unless a bound of `make explore` is named:
"""

from collections.abc import Callable
from typing import Any

import pytest

from runner.core.attempts import Attempts
from tests.exhaustive.explorer import QUICK, QUICK_STATES, explore
from tests.exhaustive.ground import Bound
from tests.exhaustive.moves import beginning, stories, successors
from tests.exhaustive.states import clone, state_of

NAMES = list(stories())


@pytest.mark.parametrize("name", NAMES)
def test_the_invariants_hold_in_every_state_of_a_small_bound(name: str) -> None:
    """And from each a world that heals comes to rest."""
    done = explore(stories()[name], QUICK, states_max=QUICK_STATES)
    print(done)
    assert done.path == [], "\n".join(done.path)
    assert done.states >= QUICK_STATES and done.depth >= 4


def test_a_copy_of_an_engine_is_another_engine_in_the_same_state() -> None:
    """Whatever is done to the one is not done to the other."""
    ground = beginning(stories()[NAMES[0]], QUICK)
    for _ in range(12):
        assert ground.engine is not None
        before = state_of(ground.engine)
        copied = clone(ground.engine)
        assert state_of(copied) == before
        moves = [after for name, after in successors(ground) if after.engine is not None]
        assert state_of(ground.engine) == before, "exploring a state changes nothing in it"
        ground = max(moves, key=lambda after: len(after.journal.items) + len(after.starts) + len(after.dirs))
        assert ground.engine is not None and ground.engine.attempts._engine is ground.engine


def test_the_same_events_in_two_orders_meet_in_one_state() -> None:
    """Else there would be no end of states."""
    done = explore(stories()["a lease that is taken again, and a stop"], Bound(steps=0, kills=False), states_max=1500)
    assert done.transitions > 4 * done.states


def test_a_violated_invariant_is_told_with_a_shortest_path_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that arrives, and a shim that is there: nothing shorter releases."""
    accept: Callable[..., Any] = Attempts.accept
    monkeypatch.setattr(Attempts, "accept", lambda *args: accept(*args)[1:])
    done = explore(stories()[NAMES[0]], Bound(steps=0, kills=False))
    assert done.path[:-2] == ["a daemon starts", "the session comes up", "start 1.1 arrives"]
    assert done.path[-2] == "a shim of ex_1.1 is there" and "PREPARED before release" in done.path[-1]
