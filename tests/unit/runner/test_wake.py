"""A machine that slept is noticed, before anything is judged by the time."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from protocol.limits import WAKE_GAP_MS
from protocol.messages import Renewal
from protocol.session import BeatAnswered
from runner.adapters import wake
from runner.adapters.wake import WakeWatch, asleep_ms
from runner.core.effects import Effect, Note, Redial
from runner.core.inputs import Now, Tick
from runner.pump import Pump
from tests.support.engine import BOOT_MS, World

WAIT_S = 10.0


@dataclass
class Gap:
    """CLOCK_BOOTTIME ahead of CLOCK_MONOTONIC, as a test says."""

    ms: int = 100

    def __call__(self) -> int:
        """Read it."""
        return self.ms


# --- the watch --------------------------------------------------------------------------------------------------


def test_time_that_passes_awake_is_no_sleep() -> None:
    """The gap of this machine stays what it is."""
    watch = WakeWatch()
    assert watch.look() is None and abs(asleep_ms() - asleep_ms()) < WAKE_GAP_MS


def test_a_sleep_is_told_once_with_its_length() -> None:
    """The next one is counted from there."""
    gap = Gap()
    watch = WakeWatch(gap)
    gap.ms += 60_000
    assert (watch.look(), watch.look()) == (60_000, None)
    gap.ms += 7_000
    assert watch.look() == 7_000


def test_short_sleeps_add_up() -> None:
    """Each too short to matter, together they are what a lease lost."""
    gap = Gap()
    watch = WakeWatch(gap)
    gap.ms += WAKE_GAP_MS
    assert watch.look() is None
    gap.ms += 1
    assert watch.look() == WAKE_GAP_MS + 1


# --- the pump ---------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """A clock that a test turns."""

    now_: Now = field(default_factory=lambda: Now(1_795_000_000_000, BOOT_MS))
    boot_id: str = "boot-1"

    def now(self) -> Now:
        """Read it."""
        return self.now_

    def sleep(self, ms: int) -> None:
        """Time goes by."""
        self.now_ = Now(self.now_.wall_ms + ms, self.now_.boot_ms + ms)

    def entropy(self, count: int) -> bytes:
        """None is needed."""
        return bytes(count)


@dataclass
class Disk:
    """A journal that is always there."""

    world: World

    async def commit(self, writes: Any) -> None:
        """At once."""
        for write in writes:
            self.world.journal.apply(write)


@dataclass
class Hands:
    """What was done, in order."""

    done: list[Effect] = field(default_factory=list)

    def perform(self, effect: Effect) -> None:
        """Remember it."""
        self.done.append(effect)

    @property
    def events(self) -> list[str]:
        """What was logged."""
        return [effect.event for effect in self.done if isinstance(effect, Note)]


def leased(ttl_ms: int = 60_000) -> World:
    """A world in which ex_1 runs under a lease that stops it."""
    world = World()
    world.running(lease={"res": "exec:ex_1", "token": 1, "ttl_ms": ttl_ms, "on_loss": "stop"})
    return world


async def pumped(pump: Pump, holds: Callable[[], object]) -> None:
    """Run the pump until something holds."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        with anyio.fail_after(WAIT_S):
            while not holds():
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()


async def test_a_wake_is_told_before_the_moments_that_it_brought() -> None:
    """A lease whose deadline passed in the sleep is renewed first; without this it would be called lost by the tick."""
    world, clock, gap, hands = leased(), Clock(), Gap(), Hands()
    watch = WakeWatch(gap)
    pump = Pump(world.engine, Disk(world), clock, hands, None, watch.look)  # type: ignore[arg-type]
    clock.sleep(3_600_000)
    gap.ms += 3_600_000
    await pumped(pump, lambda: hands.events)
    assert hands.events[0] == "machine.woke" and "lease.lost" not in hands.events
    assert any(isinstance(effect, Redial) for effect in hands.done)


async def test_a_sleep_is_noticed_although_nothing_happens(monkeypatch: Any) -> None:
    """A timer of the loop stands still in suspend: it is looked at every WATCH_S, whatever else is due and when."""
    monkeypatch.setattr("runner.pump.WATCH_S", 0.05)
    world, clock, gap, hands = World(), Clock(), Gap(), Hands()
    pump = Pump(world.engine, Disk(world), clock, hands, None, WakeWatch(gap).look)  # type: ignore[arg-type]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        await anyio.sleep(0)
        gap.ms += 60_000
        with anyio.fail_after(WAIT_S):
            while "machine.woke" not in hands.events:
                await anyio.sleep(0.005)
        tasks.cancel_scope.cancel()
    assert wake.WATCH_S <= 5.0


async def test_what_was_renewed_beside_a_starved_loop_counts_as_of_then() -> None:
    """The answer came before the deadline, and the loop gets to it after: the lease was never lost."""
    world, clock, hands = leased(), Clock(), Hands()
    pump = Pump(world.engine, Disk(world), clock, hands)  # type: ignore[arg-type]
    row = world.row()
    assert row.lease is not None
    in_time = Now(clock.now_.wall_ms + 40_000, BOOT_MS + 40_000)
    clock.sleep(80_000)
    renewal = Renewal(res="exec:ex_1", token=1, ttl_ms=60_000)
    pump.put(Tick())
    pump.put_first(BeatAnswered(BOOT_MS + 39_000, clock.now_.wall_ms, 10_000, (renewal,), ()), in_time)
    await pumped(pump, lambda: hands.done)
    lease = world.row().lease
    assert lease is not None and lease.deadline_ms == BOOT_MS + 99_000
    assert "lease.lost" not in hands.events
