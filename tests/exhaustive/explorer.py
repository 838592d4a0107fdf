"""Breadth first over every state that can be reached: no state twice, so the first path to a violation is a shortest one.

`python -m tests.exhaustive.explorer` (`make explore`) explores every story within every bound of FULL, nearest states first, and says how
much there was.
"""

import argparse
import sys
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from typing import Final

from tests.exhaustive.ground import BROKEN, Bound, Ground, Story
from tests.exhaustive.moves import beginning, healed, stories, successors
from tests.exhaustive.states import remembered

QUICK: Final = Bound(steps=1)
QUICK_STATES: Final = 700
"""For the test suite: of every story so many states, each of which is healed to rest; a few seconds."""
FULL: Final = {
    "the clock stands still, shims are killed": Bound(steps=0),
    "half a ttl passes": Bound(steps=1, kills=False),
    "the machine reboots": Bound(steps=0, kills=False, reboots=1),
    "the command key is revoked": Bound(steps=0, kills=False, revoke=True),
}
"""Each to its last state. Together with a ttl and a half for the stories of leases: `LONG`."""
LONG: Final = Bound(steps=3, kills=False)
STATES: Final = 10_000
"""Of each story, unless more is asked for: some minutes on two cores; all of them take hours."""


@dataclass(slots=True)
class Explored:
    """How much there was."""

    states: int = 0
    transitions: int = 0
    depth: int = 0
    seconds: float = 0.0
    closed: bool = True
    """Whether every state was reached; False: the bound on states was."""
    path: list[str] = field(default_factory=list)
    """A shortest one to a violation, and what was violated; empty: nothing was."""

    def __str__(self) -> str:
        """One line for a reader."""
        extent = "all" if self.closed else "the first"
        return (
            f"{extent} {self.states} states, {self.transitions} transitions, depth {self.depth}, {self.seconds:.0f} s"
        )


def explore(story: Story, bound: Bound, *, states_max: int | None = None) -> Explored:
    """Every state within the bound; from each one a world that heals must come to rest."""
    began, done = time.monotonic(), Explored()
    with remembered():
        try:
            _walk(beginning(story, bound), done, states_max, heal=True)
        except _Found as found:
            done.path = _shortest(story, bound, found.path)
    done.seconds = time.monotonic() - began
    return done


class _Found(Exception):
    def __init__(self, path: list[str], broken: Exception) -> None:
        super().__init__(str(broken))
        last = "".join(reversed(getattr(broken, "__notes__", ["?"])))
        self.path = [*path, last, repr(broken)]


def _shortest(story: Story, bound: Bound, path: list[str]) -> list[str]:
    """What was found on the way to rest may be found sooner where nothing is healed."""
    try:
        _walk(beginning(story, bound), Explored(), None, heal=False, depth_max=len(path) - 3)
    except _Found as found:
        return found.path
    return path


def _walk(first: Ground, done: Explored, states_max: int | None, *, heal: bool, depth_max: int | None = None) -> None:
    # Names have 64 bits: of a million states some two share one in one of forty million runs.
    known: dict[int, tuple[int, str]] = {first.state(): (0, "a daemon starts")}
    waiting: deque[tuple[Ground, int]] = deque([(first, 0)])
    at_rest: set[int] = set()
    done.states = 1
    while waiting:
        ground, depth = waiting.popleft()
        if depth == depth_max or (states_max is not None and done.states >= states_max):
            done.closed = False
            return
        here, passed = ground.state(), list[str]()
        try:
            for what, after in successors(ground):
                done.transitions += 1
                there = after.state()
                if there in known:
                    continue
                known[there] = (here, what)
                done.states, done.depth = done.states + 1, depth + 1
                waiting.append((after, depth + 1))
                if heal:
                    here, passed = there, []
                    healed(after, at_rest, passed)
                    here, passed = ground.state(), []
        except BROKEN as broken:
            raise _Found([*_path(known, here), *passed], broken) from broken


def _path(known: dict[int, tuple[int, str]], there: int) -> list[str]:
    moves: list[str] = []
    while there:
        there, move = known[there]
        moves.append(move)
    return moves[::-1]


def _one(name: str, what: str, states_max: int | None) -> tuple[str, str, Explored]:
    bound = LONG if what == "a ttl and a half passes" else FULL[what]
    return name, what, explore(stories()[name], bound, states_max=states_max)


def main() -> int:
    """Explore everything, or the first states of everything, on as many cores as there are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--states", type=int, default=STATES, help="of each story and bound no more than these, nearest first; 0: all"
    )
    states_max = parser.parse_args().states or None
    work = [*product(stories(), FULL), *((name, "a ttl and a half passes") for name in stories() if "lease" in name)]
    total, began = Explored(), time.monotonic()
    with ProcessPoolExecutor() as pool:
        exploring = [pool.submit(_one, name, what, states_max) for name, what in work]
        for each in as_completed(exploring):
            name, what, done = each.result()
            print(f"{name}; {what}:\n    {done}", flush=True)
            for number, move in enumerate(done.path, start=1):
                print(f"    {number}. {move}", flush=True)
            total.states += done.states
            total.transitions += done.transitions
            total.depth = max(total.depth, done.depth)
            total.path += done.path
            total.closed = total.closed and done.closed
    total.seconds = time.monotonic() - began
    print(f"{'VIOLATED' if total.path else 'I1 to I9 hold'}: {total}")
    return 1 if total.path else 0


if __name__ == "__main__":
    sys.exit(main())
