"""The pump and the journal on a real file, under the rules of test_engine.py: the daemon dies at any point and goes on from the file.

Each turn goes through `Pump.run`: several inputs share a commit, and the daemon may die before it or behind any of its effects. The next
one reads the file; what it reads is held against the model that was told the same writes, and everything still comes to its one end.

Hand mutants, each tried, and each red:
1. `Pump.perform` does before it commits.
2. `Pump.perform` commits only the first Persist of a turn.
3. `journal_rows.apply` forgets tombstones.
4. `journal_rows._put_attempt` forgets who stopped (`stop_by` stays NULL).
5. `journal_rows.read_image` gives the envelope of a living attempt away once its command has its receipt.
6. `journal_rows._put_settlement` stores no item.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from runner.adapters.journal import SqliteJournal
from runner.core.effects import Effect, Note
from runner.core.inputs import Input, Now, PolicyChanged, Woke
from runner.core.journaling import Image, Write
from runner.pump import Pump
from tests.stateful.test_engine import EngineMachine
from tests.support.engine import World

TURN_S = 20.0


class DaemonDied(Exception):
    """At the point a test chose."""


@dataclass
class FusedJournal:
    """The file, and the model beside it."""

    real: SqliteJournal
    world: World
    fused: bool = False
    committed: bool = False

    async def commit(self, writes: Sequence[Write]) -> None:
        """Raises DaemonDied before anything is written."""
        if self.fused:
            raise DaemonDied
        await self.real.commit(writes)
        self.committed = True
        for write in writes:
            self.world.journal.apply(write)


@dataclass
class FusedHands:
    """Does what the machine does, for as long as the daemon lives."""

    machine: "PumpMachine"
    left: int | None = None
    done: anyio.Event = field(default_factory=anyio.Event)

    def perform(self, effect: Effect) -> None:
        """Raises DaemonDied when its time has come."""
        if self.left is not None:
            if self.left == 0:
                raise DaemonDied
            self.left -= 1
        if isinstance(effect, Note) and effect.event == "policy.loaded":
            self.done.set()
        self.machine.perform(effect)


@dataclass
class StillClock:
    """The world's time."""

    world: World

    def now(self) -> Now:
        """As it is."""
        return self.world.now


class PumpMachine(EngineMachine):
    """The same machine with a file under it."""

    @initialize(concurrent_max=st.sampled_from([1, 2, 8]))
    def begin(self, concurrent_max: int) -> None:
        """A machine with nothing on it but an empty journal."""
        super().begin(concurrent_max)
        self.directory = tempfile.TemporaryDirectory()
        self.loop = asyncio.Runner()
        self.real = self.opened()

    def opened(self) -> SqliteJournal:
        """The journal of the next daemon."""
        real = SqliteJournal(Path(self.directory.name) / "journal.db")
        self.loop.run(real.open())
        return real

    def turn(self, *inputs: Input) -> bool:
        """One turn of the real pump; False when the daemon died before its commit."""
        # The last input changes nothing; its note tells that those before it were dealt with.
        return self.pumped([*inputs, PolicyChanged(self.world.engine.policy)], [])

    def carry_out(self, effects: list[Effect]) -> bool:
        """Effects that did not come by an input: of recovery, of a handshake."""
        return self.pumped([], effects)

    def pumped(self, inputs: list[Input], effects: list[Effect]) -> bool:
        """Everything through the pump, with the fuse that burns."""
        fuse, self.fuse = self.fuse, None
        journal = FusedJournal(self.real, self.world, fused=fuse == -1)
        hands = FusedHands(self, None if fuse in (None, -1) else fuse)
        died = self.loop.run(self.run_pump(journal, hands, inputs, effects))
        if fuse is not None:
            self.die()
        return journal.committed or not died

    async def run_pump(
        self, journal: FusedJournal, hands: FusedHands, inputs: list[Input], effects: list[Effect]
    ) -> bool:
        """True when the daemon died of it."""
        died = False
        # That the machine slept is not put: the pump asks, so that no moment that came due meanwhile goes first.
        sleeps = [happened.slept_ms for happened in inputs if isinstance(happened, Woke)]
        inputs = [happened for happened in inputs if not isinstance(happened, Woke)]
        pump = Pump(
            self.world.engine,
            journal,
            StillClock(self.world),  # type: ignore[arg-type]
            hands,
            slept=lambda: sleeps.pop() if sleeps else None,
        )
        try:
            with anyio.fail_after(TURN_S):
                await pump.perform(effects)
                for happened in inputs:
                    pump.put(happened)
                if inputs:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(pump.run)
                        await hands.done.wait()
                        tasks.cancel_scope.cancel()
        except* DaemonDied:
            died = True
        return died

    def die(self, *, reboot: bool = False, left: int = 0) -> None:
        """The next daemon reads the file; it says what the model says."""
        self.loop.run(self.real.close())
        self.real = self.opened()
        found = self.loop.run(self.real.load())
        model = type(self.world.journal).image(self.world.journal)
        assert same(found) == same(model), "the file says what was committed"
        self.world.journal.image = lambda: found  # type: ignore[method-assign]
        super().die(reboot=reboot, left=left)

    def teardown(self) -> None:
        """To the end, and then the file is closed."""
        try:
            super().teardown()
        finally:
            if hasattr(self, "real"):
                self.loop.run(self.real.close())
                self.loop.close()
                self.directory.cleanup()


def same(image: Image) -> Image:
    """An image with its rows in an order of their own."""
    return replace(
        image,
        commands=sorted(image.commands, key=lambda row: row.digest),
        attempts=sorted(image.attempts, key=lambda row: row.attempt.name),
        worktrees=sorted(image.worktrees, key=lambda row: row.worktree_id),
    )


PumpMachine.TestCase.settings = settings(EngineMachine.TestCase.settings, max_examples=30, stateful_step_count=40)
TestPump = pytest.mark.slow(PumpMachine.TestCase)
