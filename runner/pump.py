"""The one loop of the daemon: take inputs, step the engine, make durable what it must remember, then do what it says.

All inputs that wait are stepped in one turn and committed together: that is the group commit. Nothing of a turn is done before the
turn is durable. An error of the journal ends the daemon; shims live on.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import anyio

from protocol.identity import Certificate
from protocol.replay import Mark
from runner import failpoints
from runner.adapters.wake import WATCH_S
from runner.core.effects import Effect, Persist
from runner.core.engine import Engine
from runner.core.inputs import EnvelopeReceived, HeadroomMeasured, Input, Now, Tick, Woke
from runner.core.plans import Headroom
from runner.ports import Clock, Journal
from runner.wakeup import Wakeup

TURN_INPUTS_MAX: Final = 256
"""Inputs of one turn: one transaction stays small enough that nobody waits long for it."""
INPUTS_MAX: Final = 4096
"""Inputs that wait; a reader of the network waits below it, ends of attempts are few by the owner's limit."""
HEADROOM_FRESH_MS: Final = 1000
"""What the machine has left is measured again for commands after this: it takes a fifth of a millisecond. What has gone since is
missed by the start itself, which is then refused as well."""


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
    """Feeds the engine. `put` from the event loop only.

    `measure`: what the machine has left; None: nothing is told. `slept`: for how long the machine slept since it was asked last.
    """

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        clock: Clock,
        hands: Hands,
        measure: Callable[[], Headroom] | None = None,
        slept: Callable[[], int | None] | None = None,
    ) -> None:
        self._engine = engine
        self._journal = journal
        self._clock = clock
        self._hands = hands
        self._measure = measure
        self._slept = slept
        self._first: deque[tuple[Input, Now]] = deque()
        self._measured_ms: int | None = None
        self._inputs: deque[Input] = deque()
        self._awaited: list[tuple[Input, anyio.Event]] = []
        self._filled = Wakeup()
        self._emptied = Wakeup()
        self.footing = self._stand()

    def put(self, happened: Input) -> None:
        """Something happened."""
        self._inputs.append(happened)
        self._filled.set()

    def put_first(self, happened: Input, at: Now) -> None:
        """Something happened at a moment that has passed: it is stepped as of then, before all that waits and all that came due."""
        self._first.append((happened, at))
        self._filled.set()

    async def put_and_wait(self, happened: Input) -> None:
        """Something happened: return when what follows from it is durable, and begun."""
        done = anyio.Event()
        self._awaited.append((happened, done))
        self.put(happened)
        await done.wait()

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
            # Asked after the clock: a sleep between the two must not look like time that was there to renew in.
            wakes = self._wakes()
            turn = [self._inputs.popleft() for _ in range(min(len(self._inputs), TURN_INPUTS_MAX))]
            effects: list[Effect] = []
            while self._first:
                effects += self._engine.step(*self._first.popleft())
            for happened in (*wakes, *self._headroom(turn, now), *turn):
                effects += self._engine.step(happened, now)
            self._emptied.set()
            if any(isinstance(happened, EnvelopeReceived) for happened in turn):
                failpoints.hit("command.judged")
            await self.perform(effects)
            if self._awaited:
                self._tell(turn)

    def _wakes(self) -> Sequence[Input]:
        slept_ms = None if self._slept is None else self._slept()
        return () if slept_ms is None else (Woke(slept_ms),)

    def _headroom(self, turn: Sequence[Input], now: Now) -> Sequence[Input]:
        """Commands are judged by what the machine has left now, or had a moment ago."""
        if self._measure is None or not any(isinstance(happened, EnvelopeReceived) for happened in turn):
            return ()
        if self._measured_ms is not None and now.boot_ms - self._measured_ms < HEADROOM_FRESH_MS:
            return ()
        self._measured_ms = now.boot_ms
        return (HeadroomMeasured(self._measure()),)

    def _tell(self, turn: Sequence[Input]) -> None:
        """Whoever waits for an input of this turn."""
        done = {id(happened) for happened in turn}
        for happened, event in self._awaited:
            if id(happened) in done:
                event.set()
        self._awaited = [one for one in self._awaited if id(one[0]) not in done]

    async def _wait(self) -> None:
        """Until there is an input, or the engine's next moment has come."""
        wake_at_ms = self._engine.wake_at_ms
        delay_s = None if wake_at_ms is None else (wake_at_ms - self._clock.now().boot_ms) / 1000
        if delay_s is not None and delay_s <= 0:
            # A moment that has come goes first: inputs that never end would else keep us from every beat and deadline.
            self._inputs.appendleft(Tick())
            # A loop that was held up has yet to take what another thread got meanwhile, such as a later deadline.
            await asyncio.sleep(0)
        if self._inputs or self._first:
            return
        self._filled.clear()
        if self._slept is not None:
            delay_s = WATCH_S if delay_s is None else min(delay_s, WATCH_S)
        await self._filled.wait(delay_s)
        if not self._inputs:
            self._inputs.append(Tick())
