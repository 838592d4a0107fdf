"""The loop of the daemon: durable first, in turns, and nobody's moment is missed."""

from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import pytest

from protocol.errors import Reason
from protocol.replay import Mark
from runner.core.effects import Effect, Note, Persist, PrepareAttempt, SendBeat
from runner.core.inputs import EnvelopeReceived, Input, Now, OwnerAdmission, Tick
from runner.core.journaling import Write
from runner.core.plans import Admission, Headroom
from runner.errors import JournalBroken
from runner.pump import HEADROOM_FRESH_MS, INPUTS_MAX, Pump
from tests.support.engine import World, a_policy

WAIT_S = 10.0
GARBAGE = EnvelopeReceived(b"garbage")


@dataclass
class Clock:
    """A clock that goes on by a millisecond at every look."""

    now_: Now
    step_ms: int = 0
    boot_id: str = "boot-1"

    def now(self) -> Now:
        """The next moment."""
        self.now_ = Now(self.now_.wall_ms + self.step_ms, self.now_.boot_ms + self.step_ms)
        return self.now_

    def entropy(self, count: int) -> bytes:
        """None is needed."""
        return bytes(count)


@dataclass
class Disk:
    """A journal that writes into a world's, when it is let."""

    world: World
    gate: anyio.Event = field(default_factory=anyio.Event)
    waits: anyio.Event = field(default_factory=anyio.Event)
    turns: list[int] = field(default_factory=list)
    broken: bool = False

    async def commit(self, writes: Sequence[Write]) -> None:
        """Wait for the disk."""
        self.waits.set()
        await self.gate.wait()
        if self.broken:
            raise JournalBroken(Reason.DISK_FULL, "no room")
        self.turns.append(len(writes))
        for write in writes:
            self.world.journal.apply(write)


@dataclass
class Hands:
    """What was done, in order; `then` is called with each."""

    done: list[Effect] = field(default_factory=list)
    then: Callable[[Effect], None] = lambda _: None

    def perform(self, effect: Effect) -> None:
        """Remember it."""
        self.done.append(effect)
        self.then(effect)


@dataclass
class Stand:
    """A pump with everything around it."""

    world: World
    disk: Disk
    hands: Hands
    pump: Pump

    def put(self, *inputs: Input) -> None:
        """These happen."""
        for happened in inputs:
            self.pump.put(happened)

    async def until(self, held: Callable[[], bool]) -> None:
        """Until something holds, in the turns of the event loop."""
        with anyio.fail_after(WAIT_S):
            while not held():
                await anyio.lowlevel.checkpoint()


def a_stand(step_ms: int = 0, measure: Callable[[], Headroom] | None = None, **over: Any) -> Stand:
    """One that is not running yet; the disk is quick."""
    world = World(**over)
    disk, hands = Disk(world), Hands()
    disk.gate.set()
    pump = Pump(world.engine, disk, Clock(world.now, step_ms), hands, measure)  # type: ignore[arg-type]
    return Stand(world, disk, hands, pump)


@asynccontextmanager
async def running(pump: Pump) -> Any:
    """The pump pumps."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        yield
        tasks.cancel_scope.cancel()


async def test_nothing_of_a_turn_is_done_before_the_turn_is_durable() -> None:
    """1. A start arrives while the disk is slow. 2. No shim is asked for. 3. The disk answers."""
    stand = a_stand()
    stand.disk.gate = anyio.Event()
    async with running(stand.pump):
        stand.put(EnvelopeReceived(stand.world.start()))
        await stand.disk.waits.wait()
        await stand.until(lambda: True)
        assert not stand.hands.done and not stand.world.journal.commands
        stand.disk.gate.set()
        await stand.until(lambda: bool(stand.hands.done))
    assert [effect for effect in stand.hands.done if isinstance(effect, PrepareAttempt)]
    assert not [effect for effect in stand.hands.done if isinstance(effect, Persist)]


async def test_inputs_that_wait_share_one_commit() -> None:
    """That is the group commit."""
    stand = a_stand()
    stand.put(*(EnvelopeReceived(stand.world.start(f"ex_{n}")) for n in range(5)))
    async with running(stand.pump):
        await stand.until(lambda: len(stand.world.journal.commands) == 5)
    assert len(stand.disk.turns) == 1


async def test_a_handshake_tells_only_what_is_durable() -> None:
    """1. A command is consumed, and the disk is slow. 2. A hello of this moment has the old mark. 3. Then it is durable, and told.

    A daemon that told more and died would look like a machine that was set back, and get a new incarnation for nothing.
    """
    stand = a_stand()
    stand.disk.gate = anyio.Event()
    async with running(stand.pump):
        stand.put(EnvelopeReceived(stand.world.start(kind="a.b")))
        await stand.disk.waits.wait()
        assert stand.world.engine.ledger.ctl.hw == 1
        assert (stand.pump.footing.ctl, stand.pump.footing.out_head) == (Mark(), 0)
        stand.disk.gate.set()
        await stand.until(lambda: stand.pump.footing.ctl.hw == 1)
        assert stand.pump.footing.out_head == 1


async def test_inputs_that_never_end_delay_no_beat() -> None:
    """Each effect brings another input, so there is always one: the beat goes out at its time all the same."""
    stand = a_stand(step_ms=100)
    stand.world.session()

    def more(effect: Effect) -> None:
        if isinstance(effect, Note) and len(stand.hands.done) < 2000:
            stand.put(GARBAGE)

    stand.hands.then = more
    stand.put(GARBAGE)
    async with running(stand.pump):
        await stand.until(lambda: len(stand.hands.done) >= 2000)
    beats = [at for at, effect in enumerate(stand.hands.done) if isinstance(effect, SendBeat)]
    assert len(beats) > 3 and beats[0] < 500


async def test_a_broken_journal_ends_the_pump_and_nothing_is_done() -> None:
    """The daemon goes; what was not durable has not happened."""
    stand = a_stand()
    stand.disk.broken = True
    stand.put(EnvelopeReceived(stand.world.start()))
    with pytest.raises(JournalBroken), anyio.fail_after(WAIT_S):
        await stand.pump.run()
    assert not stand.hands.done


async def test_a_reader_waits_while_too_much_is_waiting() -> None:
    """Memory has a bound, whatever the network brings."""
    stand = a_stand()
    stand.put(*[GARBAGE] * INPUTS_MAX)
    with anyio.move_on_after(0) as full:
        await stand.pump.room()
    assert full.cancelled_caught
    async with running(stand.pump):
        with anyio.fail_after(WAIT_S):
            await stand.pump.room()


async def test_commands_are_judged_by_what_the_machine_has_left_now() -> None:
    """1. A start comes, and the disk is full: refused. 2. It was measured once for all commands of that moment. 3. There is room."""
    measured = [Headroom(disk_free=1, disk_total=100), Headroom(disk_free=99, disk_total=100)]
    stand = a_stand(HEADROOM_FRESH_MS // 2, lambda: measured.pop(0), policy=a_policy(disk_free_percent_min=5))

    def begun() -> list[str]:
        return [str(one.plan.attempt.execution_id) for one in stand.hands.done if isinstance(one, PrepareAttempt)]

    def judged() -> int:
        notes = [one for one in stand.hands.done if isinstance(one, Note)]
        return sum(note.event in ("command.refused", "command.accepted") for note in notes) + len(begun())

    async with running(stand.pump):
        stand.put(EnvelopeReceived(stand.world.start("ex_1")), EnvelopeReceived(stand.world.start("ex_2")))
        await stand.until(lambda: judged() == 2)
        assert (len(measured), begun()) == (1, [])
        stand.put(EnvelopeReceived(stand.world.start("ex_3")))
        await stand.until(lambda: judged() == 3)
        stand.put(EnvelopeReceived(stand.world.start("ex_4")))
        await stand.until(lambda: judged() == 4)
    assert (len(measured), begun()[-1]) == (0, "ex_4")


async def test_what_is_no_command_needs_no_measurement() -> None:
    """Nobody looks at the disk for the owner's word, or for a tick."""

    def measure() -> Headroom:
        raise AssertionError("nothing is to be measured")

    stand = a_stand(measure=measure)
    stand.put(Tick())
    async with running(stand.pump):
        with anyio.fail_after(WAIT_S):
            await stand.pump.put_and_wait(OwnerAdmission(Admission.PAUSED, "owner:0"))


async def test_the_owner_is_answered_when_the_word_is_durable() -> None:
    """1. The machine is paused, and the disk is slow. 2. Nobody is told. 3. It is on the disk: now. Others' turns answer nobody."""
    stand = a_stand()
    stand.disk.gate = anyio.Event()
    told: list[Admission] = []

    async def pause() -> None:
        await stand.pump.put_and_wait(OwnerAdmission(Admission.PAUSED, "owner:0"))
        told.append(stand.world.engine.gate.admission)

    async with running(stand.pump), anyio.create_task_group() as tasks:
        tasks.start_soon(pause)
        await stand.disk.waits.wait()
        await stand.until(lambda: True)
        assert not told and stand.world.engine.gate.admission is Admission.PAUSED
        stand.disk.gate.set()
        await stand.until(lambda: bool(told))
    assert told == [Admission.PAUSED] and stand.disk.turns
