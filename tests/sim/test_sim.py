"""Seeded worlds: the shipped engine, pump, link, sessions, control plane and journal tables on machines, networks and clocks that fail.

`make sim SEEDS=1000` runs more of them, `SEED=42 make sim` tells the story of one. What always holds is in `witness.py`, what must be
true once everything has healed in `ends.py`, what goes wrong in `faults.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.timeline import HELD, SECOND_US, Owner, timeline
from tests.sim.world import World

HERE = Path(__file__).parent
WORLDS = 150
"""Of the short kind: some seconds of chaos each, and then rest."""


def kept() -> list[int]:
    """The seeds that were bad once."""
    lines = (HERE / "seeds.txt").read_text("utf-8").splitlines()
    return [int(line.split()[0]) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("seed", kept() or [0])
def test_a_world_that_was_bad_once_is_well(seed: int) -> None:
    """Kept seeds go first."""
    world = World(seed, tell=True)
    assert world.run().broken is None, "\n".join(world.story.lines())


def test_no_short_world_breaks_an_invariant() -> None:
    """A few hundred of them; a bad one prints its story."""
    for seed in range(WORLDS):
        world = World(seed, short=True)
        result = world.run()
        assert result.broken is None, "\n".join([f"seed {seed}, short", *world.story.lines()])


def test_the_same_seed_tells_the_same_story() -> None:
    """Here, once more, and in another process that hashes in another order."""
    seed = 7
    here = [World(seed, tell=True).run().digest for _ in range(2)]
    there = subprocess.run(
        [sys.executable, "-m", "tests.sim.run", "--seed", str(seed)],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert here[0] == here[1] and f"story {here[0]}," in there.stdout


def test_timers_of_a_machine_that_slept_are_late_by_its_sleep() -> None:
    """What was ready goes on at once, what was due in the sleep is due as much later, and others do not notice."""
    world, owner = timeline(lambda _: None), Owner("sleeper")
    heard: list[str] = []
    world.after(owner, 2 * SECOND_US, heard.append, "timer")
    world.after(None, 3 * SECOND_US, heard.append, "other")
    world.run(1 * SECOND_US)
    world.hold(owner)
    world.run(10 * SECOND_US)
    assert heard == ["other"] and owner.state == HELD
    world.wake({owner}, 9 * SECOND_US)
    world.run(int(10.9 * SECOND_US))
    assert heard == ["other"]
    world.run(11 * SECOND_US)
    assert heard == ["other", "timer"]


def test_nothing_of_a_dead_process_runs() -> None:
    """Whatever it had begun."""
    world, owner = timeline(lambda _: None), Owner("dead")
    heard: list[str] = []
    world.after(owner, SECOND_US, heard.append, "never")
    owner.die()
    world.run(2 * SECOND_US)
    assert heard == []
