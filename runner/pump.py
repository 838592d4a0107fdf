"""The one loop of the daemon: take inputs, step the engine, make durable what it must remember, then do what it says.

All inputs that wait are stepped in one turn and committed together: that is the group commit. Nothing of a turn is done before the
turn is durable. An error of the journal ends the daemon; shims live on.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from protocol.identity import Certificate
from protocol.replay import Mark
from runner.core.effects import Effect, Persist
from runner.core.engine import Engine
from runner.core.inputs import Input, Tick
from runner.ports import Clock, Journal
from runner.wakeup import Wakeup

TURN_INPUTS_MAX: Final = 256
"""Inputs of one turn: one transaction stays small enough that nobody waits long for it."""
INPUTS_MAX: Final = 4096
"""Inputs that wait; a reader of the network waits below it, ends of attempts are few by the owner's limit."""


@dataclass(frozen=True, slots=True)
class Footing:
    """Where this runner stands for good. A handshake tells this and not what the engine is about to make durable.

    Who has told a mark and forgets it looks like a machine that was set back.
    """

    certificate: Certificate
    ctl: Mark
    out_head: int


class Hands(Protocol):
    """Who performs effects. Must not block; what takes time comes back as an input."""

    def perform(self, effect: Effect) -> None:
        """Do it, or begin to."""


class Pump:
    """Feeds the engine. `put` from the event loop only."""

    def __init__(self, engine: Engine, journal: Journal, clock: Clock, hands: Hands) -> None:
        self._engine = engine
        self._journal = journal
        self._clock = clock
        self._hands = hands
        self._inputs: deque[Input] = deque()
        self._filled = Wakeup()
        self._emptied = Wakeup()
        self.footing = self._stand()

    def put(self, happened: Input) -> None:
        """Something happened."""
        self._inputs.append(happened)
        self._filled.set()

    async def room(self) -> None:
        """Wait until inputs from the network may be put."""
        while len(self._inputs) >= INPUTS_MAX:
            self._emptied.clear()
            await self._emptied.wait()

    async def perform(self, effects: list[Effect]) -> None:
        """Make durable, then do. Raises JournalBroken."""
        writes = [write for effect in effects if isinstance(effect, Persist) for write in effect.writes]
        if writes:
            await self._journal.commit(writes)
        for effect in effects:
            if not isinstance(effect, Persist):
                self._hands.perform(effect)
        # Nobody steps the engine while this waits for the disk, so all of it is durable now.
        self.footing = self._stand()

    def _stand(self) -> Footing:
        return Footing(self._engine.certificate, self._engine.ledger.ctl, self._engine.statements.out_head)

    async def run(self) -> None:
        """Pump for ever. Raises JournalBroken."""
        while True:
            await self._wait()
            now = self._clock.now()
            effects: list[Effect] = []
            for _ in range(min(len(self._inputs), TURN_INPUTS_MAX)):
                effects += self._engine.step(self._inputs.popleft(), now)
            self._emptied.set()
            await self.perform(effects)

    async def _wait(self) -> None:
        """Until there is an input, or the engine's next moment has come."""
        wake_at_ms = self._engine.wake_at_ms
        delay_s = None if wake_at_ms is None else (wake_at_ms - self._clock.now().boot_ms) / 1000
        if delay_s is not None and delay_s <= 0:
            # A moment that has come goes first: inputs that never end would else keep us from every beat and deadline.
            self._inputs.appendleft(Tick())
        if self._inputs:
            return
        self._filled.clear()
        await self._filled.wait(delay_s)
        if not self._inputs:
            self._inputs.append(Tick())
