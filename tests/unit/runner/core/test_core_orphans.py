"""What should not be alive: told, asked again, ended; each by what the journal says of it, and no oftener than that needs."""

import pytest

from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.execution import AttemptState
from protocol.ids import Attempt
from protocol.limits import KILL_WAIT_MS, WAKE_WAIT_MS
from protocol.messages import ItemKind
from protocol.receipt import Verdict
from runner.core.effects import (
    AdoptAttempt,
    EndHungShim,
    Note,
    Persist,
    PrepareAttempt,
    PushLease,
    ScanOrphans,
    StopAttempt,
    SweepAttempt,
    SweepRemains,
)
from runner.core.inputs import (
    AttemptExited,
    AttemptLost,
    AttemptNotPrepared,
    OrphansFound,
    OwnerStop,
    OwnerSweep,
    RemainsSwept,
    ShimSilent,
    Tick,
    Woke,
)
from runner.core.leases import LOST_END_MS
from runner.core.orphans import DRAIN_MS, HUNG_MARGIN_MS, SCAN_MS, SILENT_RETRY_MS
from runner.core.plans import Observed, Orphan, Phase, ProcessLeft, Swept
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, Turn, World, a_policy, an_exit

LADDER_MS = KILL_WAIT_MS + DRAIN_MS + HUNG_MARGIN_MS
"""What the end of a stop takes beyond its grace."""
SWEPT = Swept(found=2, signalled=2, remaining=0)
STUCK = Swept(found=2, signalled=2, remaining=1)


def found(*names: str, shim_alive: bool = False) -> OrphansFound:
    """One look at all processes: something of each of these attempts lives."""
    return OrphansFound(tuple(Orphan(name=name, processes=1, shim_alive=shim_alive) for name in names))


def events(turn: Turn) -> list[Event]:
    """What was told."""
    return [Event.parse(item.body.encode()) for item in turn.items if item.kind is ItemKind.EVENT]


def living(**over: bool) -> Observed:
    """The directory of ex_1.1 with a shim that holds its lock."""
    return Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None, **over)


# --- shims that do nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace_ms", [0, 7_000, None])
def test_a_shim_that_does_not_tell_of_an_end_in_the_time_of_its_ladder_is_ended_once_each_such_time(
    grace_ms: int | None,
) -> None:
    """By its identity; told once. Without a grace of the stop's own it may be as long as the owner allows."""
    world = World()
    world.running()
    world.send(world.stop(grace_ms=grace_ms))
    due_ms = (60_000 if grace_ms is None else grace_ms) + LADDER_MS
    assert world.engine.wake_at_ms == world.now.boot_ms + due_ms
    world.pass_time(due_ms - 1)
    assert not world.step(Tick()).has(EndHungShim)
    world.pass_time(1)
    turn = world.step(Tick())
    assert turn.one(EndHungShim) == EndHungShim(an_attempt(), SHIM)
    assert [event.kind for event in events(turn)] == [EventKind.SHIM_HUNG]
    assert not world.step(Tick()).has(EndHungShim)
    world.pass_time(LADDER_MS)
    again = world.step(Tick())
    assert again.has(EndHungShim) and not events(again)


def test_the_earlier_of_two_stops_is_expected() -> None:
    """A later stop may shorten the grace and never lengthens it."""
    for first, second in ((60_000, 0), (0, 60_000)):
        world = World()
        world.running()
        world.send(world.stop(grace_ms=first), world.stop(grace_ms=second))
        assert world.engine.wake_at_ms == world.now.boot_ms + LADDER_MS


def test_an_end_that_is_told_in_time_ends_the_watch() -> None:
    """Whatever it says."""
    for end in ("exit", "lost"):
        world = World()
        world.running()
        world.send(world.stop(grace_ms=0))
        lost = AttemptLost(an_attempt(), Reason.SHIM_LOST, SWEPT)
        assert (world.exit() if end == "exit" else world.step(lost)).settlements
        world.pass_time(10 * LADDER_MS)
        assert list(world.step(Tick())) == [] and world.engine.wake_at_ms is None


def test_a_hung_shim_that_was_ended_settles_as_lost_with_what_was_found() -> None:
    """ "We failed" is not "it failed"."""
    world = World()
    world.running()
    world.send(world.stop(grace_ms=0))
    world.pass_time(LADDER_MS)
    world.step(Tick())
    settlement = world.step(AttemptLost(an_attempt(), Reason.SHIM_HUNG, STUCK)).settlement
    assert (settlement.verdict, settlement.cause.reason, settlement.survivors) == (Verdict.LOST, Reason.SHIM_HUNG, 1)


def test_every_word_that_ends_an_attempt_is_watched() -> None:
    """A signed stop, the owner's, a successor, and the loss of a lease."""
    lease = {"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"}
    for word, due_ms in (("owner", 0), ("successor", 60_000), ("lease", 60_000 + LOST_END_MS - LADDER_MS)):
        world = World()
        world.running(lease=lease)
        if word == "owner":
            world.step(OwnerStop("ex_1", 0, "uid 1000"))
        elif word == "successor":
            world.send(world.start("ex_1", 2))
        else:
            world.pass_time(60_000)
            world.step(Tick())
            world.now = type(world.now)(world.now.wall_ms - 60_000, world.now.boot_ms - 60_000)
        world.pass_time(due_ms + LADDER_MS - 1)
        assert not world.step(Tick()).has(EndHungShim), word
        world.pass_time(1)
        assert world.step(Tick()).has(EndHungShim), word


@pytest.mark.parametrize("cause", ["stop", "lease"])
def test_the_watch_outlives_the_daemon(cause: str) -> None:
    """1. It is to end. 2. The daemon dies. 3. The shim hangs. 4. The next daemon gives it the same time, then ends it."""
    world = World()
    world.running(lease={"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"})
    if cause == "stop":
        world.send(world.stop(grace_ms=3_000))
    else:
        world.pass_time(60_000)
        world.step(Tick())
    assert world.crash(living()).has(AdoptAttempt)
    # A daemon that starts cannot know whether the machine woke a moment ago, and shims wait for a renewal.
    world.pass_time(3_000 + LADDER_MS if cause == "stop" else LOST_END_MS + WAKE_WAIT_MS)
    assert world.step(Tick()).one(EndHungShim).attempt == an_attempt()


def test_a_silent_shim_is_told_once_asked_again_and_not_ended() -> None:
    """Its child may be well: only a word that ends it does."""
    world = World()
    world.running()
    turn = world.step(ShimSilent(an_attempt()))
    assert [event.kind for event in events(turn)] == [EventKind.SHIM_HUNG] and turn.one(Note).event == "shim.hung"
    assert not turn.has(EndHungShim) and world.engine.wake_at_ms == world.now.boot_ms + SILENT_RETRY_MS
    world.pass_time(SILENT_RETRY_MS)
    assert list(world.step(Tick())) == [AdoptAttempt(an_attempt())]
    assert world.engine.wake_at_ms is None
    assert list(world.step(ShimSilent(an_attempt()))) == []
    world.pass_time(SILENT_RETRY_MS)
    assert world.step(Tick()).has(AdoptAttempt)
    assert world.row().state is AttemptState.RUNNING


def test_a_shim_that_answers_at_last_is_told_what_it_did_not_hear() -> None:
    """Its lease, and a stop: they were said to a connection that was not there."""
    world = World()
    world.running(lease={"res": "exec:ex_1", "token": 1, "ttl_ms": 600_000, "on_loss": "freeze"})
    world.crash(living(shim_answers=False))
    world.step(ShimSilent(an_attempt()))
    world.send(world.stop(cmd_id="cmd_stop", grace_ms=20_000))
    world.pass_time(SILENT_RETRY_MS)
    turn = world.step(Tick())
    assert turn.has(AdoptAttempt) and turn.one(PushLease).token == 1
    assert turn.one(StopAttempt) == StopAttempt(an_attempt(), 20_000, "cmd_stop")
    assert turn.index(turn.one(AdoptAttempt)) < turn.index(turn.one(PushLease))


def test_a_sleep_is_no_time_for_a_shim_to_end_something_in() -> None:
    """1. Told to end. 2. The lid closes for an hour. 3. Both wake. 4. The shim has what was left of its time."""
    world = World()
    world.running()
    world.send(world.stop(grace_ms=5_000))
    world.pass_time(3_600_000)
    world.step(Woke(3_600_000))
    assert not world.step(Tick()).has(EndHungShim)
    world.pass_time(5_000 + LADDER_MS)
    assert world.step(Tick()).has(EndHungShim)


def test_what_was_given_back_in_time_is_not_ended_for_its_lost_lease() -> None:
    """But a stop that was signed beside it stands."""
    for stopped in (False, True):
        world = World()
        world.running(lease={"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"})
        world.pass_time(60_000)
        world.step(Tick())
        if stopped:
            world.send(world.stop(grace_ms=0))
        world.send(world.acquire())
        world.pass_time(50_000)
        assert world.step(Tick()).has(EndHungShim) is stopped


def test_a_silent_shim_of_what_is_settled_is_ended_and_of_what_nobody_knows_let_be() -> None:
    """Nobody waits for the one; nobody signed anything about the other."""
    world = World()
    world.running()
    world.exit()
    assert list(world.step(ShimSilent(an_attempt()))) == [EndHungShim(an_attempt(), SHIM)]
    assert list(world.step(ShimSilent(an_attempt("ex_9")))) == []
    assert world.engine.wake_at_ms is None


# --- processes -------------------------------------------------------------------------------------------------------


def test_all_processes_are_looked_at_at_the_start_and_every_minute() -> None:
    """With and without a session."""
    world = World()
    assert world.crash().has(ScanOrphans)
    for _ in range(3):
        assert world.engine.wake_at_ms == world.now.boot_ms + SCAN_MS
        world.pass_time(SCAN_MS)
        assert list(world.step(Tick())) == [ScanOrphans()]


def test_what_lives_of_a_settled_attempt_is_swept() -> None:
    """Also of one that never began."""
    world = World()
    world.running("ex_1")
    world.exit("ex_1")
    world.send(world.start("ex_2"))
    world.step(AttemptNotPrepared(an_attempt("ex_2"), Reason.INFRA, "", refused=False))
    turn = world.step(found("ex_1.1", "ex_2.1"))
    assert list(turn) == [SweepRemains(an_attempt("ex_1")), SweepRemains(an_attempt("ex_2"))]


def test_what_lives_without_its_shim_is_swept_and_settled() -> None:
    """The connection to its shim may have been lost unseen."""
    world = World()
    world.running("ex_1")
    world.running("ex_2")
    world.send(world.stop("ex_2"))
    turn = world.step(found("ex_1.1", "ex_2.1"))
    assert list(turn) == [SweepAttempt(an_attempt("ex_1")), SweepAttempt(an_attempt("ex_2"))]
    assert world.step(AttemptLost(an_attempt("ex_1"), Reason.SHIM_LOST, SWEPT)).settlement.verdict is Verdict.LOST


def test_what_is_guarded_and_what_is_on_its_way_is_let_be() -> None:
    """A living shim answers for its tree; an intent has a shim before it has a tree."""
    world = World()
    world.running("ex_1")
    world.send(world.start("ex_2"))
    assert list(world.step(found("ex_1.1", shim_alive=True))) == []
    assert list(world.step(found("ex_2.1"))) == []
    world.exit("ex_1")
    assert list(world.step(found("ex_1.1", shim_alive=True))) == []


def test_what_lives_of_an_attempt_nobody_knows_is_told_once_and_kept() -> None:
    """Without the journal's word nothing is ended."""
    world = World()
    turn = world.step(found("ex_9.4"))
    assert turn.one(Note).fields == {"attempt": "ex_9.4", "processes": 1}
    event = events(turn)[0]
    assert event.kind == EventKind.ALARM_RAISED and event.detail == "ex_9.4 lives"
    assert not turn.has(SweepRemains) and not turn.has(SweepAttempt)
    assert list(world.step(found("ex_9.4"))) == []


@pytest.mark.parametrize("name", ["g-cmd_1.1", "g-cmd_1.22", "", "x", "ex_1.0", "../../etc", "ex 1.1"])
def test_tools_and_cookies_of_strangers_are_no_attempts(name: str) -> None:
    """A tool's name looks like an attempt's: its caller waits for it, and nobody is alarmed."""
    assert list(World().step(found(name))) == []


def test_remains_that_were_ended_are_told_with_what_was_found() -> None:
    """And leave a leaf."""
    world = World()
    world.running()
    world.exit()
    turn = world.step(RemainsSwept(an_attempt(), SWEPT))
    event = events(turn)[0]
    assert (event.kind, event.execution_id, event.count) == (EventKind.ORPHAN_SWEPT, "ex_1", 2)
    assert event.detail == "found 2, signalled 2, remaining 0"
    assert [leaf.kind for leaf in world.journal.leaves] == ["orphan.swept"] and turn.has(Persist)
    assert list(world.step(RemainsSwept(an_attempt(), Swept(found=0, signalled=0, remaining=0)))) == []


def test_remains_that_cannot_be_ended_are_told_once() -> None:
    """They are found every minute; what is signalled again is told again."""
    world = World()
    world.running()
    world.exit()
    assert events(world.step(RemainsSwept(an_attempt(), STUCK)))
    stuck = Swept(found=1, signalled=0, remaining=1)
    assert list(world.step(RemainsSwept(an_attempt(), stuck))) == []
    assert events(world.step(RemainsSwept(an_attempt(), STUCK)))


def test_the_owner_sweeps_what_is_settled_or_unknown_and_nothing_that_is_guarded() -> None:
    """What runs is ended by a stop, which its settlement can name."""
    world = World()
    world.running("ex_1")
    world.running("ex_2")
    world.exit("ex_2")
    assert list(world.step(OwnerSweep(an_attempt("ex_1"), "uid 1000"))) == []
    for attempt in (an_attempt("ex_2"), an_attempt("ex_9")):
        turn = world.step(OwnerSweep(attempt, "uid 1000"))
        assert turn.one(SweepRemains).attempt == attempt
        assert (world.journal.leaves[-1].kind, world.journal.leaves[-1].subject) == ("owner.sweep", attempt.name)
        assert isinstance(turn[0], Persist)


# --- survivors -------------------------------------------------------------------------------------------------------


def ways_to_survive(world: World, way: str) -> None:
    """ex_1.1 is settled, and a process of it lives that could not be ended."""
    attempt: Attempt = an_attempt()
    if way == "exit":
        remains = (ProcessLeft(pid=7, start=9, name="sleep", state="D", why="d_state"),)
        world.exit(survivors=1, remains=remains)
    elif way == "lost":
        world.step(AttemptLost(attempt, Reason.SHIM_LOST, STUCK))
    elif way == "swept":
        world.exit()
        world.step(RemainsSwept(attempt, STUCK))
    else:
        record = an_exit(survivors=1)
        world.exit(survivors=1)
        settled = Observed(
            attempt=attempt, same_boot=True, phase=Phase.RUNNING, lock_held=False, exit=record, child_alive=True
        )
        assert world.crash(settled).has(SweepRemains)


@pytest.mark.parametrize("way", ["exit", "lost", "swept", "restart"])
@pytest.mark.parametrize("release", ["gone", "swept"])
def test_what_could_not_be_ended_keeps_its_place_until_it_is_gone(way: str, release: str) -> None:
    """It still uses the machine. Gone from the list of processes, or ended at last, it gives the place back."""
    world = World(policy=a_policy(concurrent_max=1))
    world.running()
    ways_to_survive(world, way)
    assert world.send(world.start("ex_2")).reasons == [Reason.CAPACITY]
    assert world.step(found("ex_1.1")).one(SweepRemains).attempt == an_attempt()
    assert world.send(world.start("ex_3")).reasons == [Reason.CAPACITY]
    world.step(found() if release == "gone" else RemainsSwept(an_attempt(), Swept(found=1, signalled=1, remaining=0)))
    assert world.send(world.start("ex_4")).has(PrepareAttempt)


def test_a_survivor_that_is_guarded_keeps_its_place_too() -> None:
    """Its shim waits for it: it is under watch, and no orphan."""
    world = World(policy=a_policy(concurrent_max=1))
    world.running()
    world.exit(survivors=1)
    assert list(world.step(found("ex_1.1", shim_alive=True))) == []
    assert world.send(world.start("ex_2")).reasons == [Reason.CAPACITY]


def test_what_outlived_its_kill_is_told_by_name_and_reason() -> None:
    """One event beside the settlement; where nothing outlived it there is none."""
    world = World()
    world.running("ex_1")
    left = ProcessLeft(pid=77, start=1, name="sudo", state="S", why="eperm")
    turn = world.step(AttemptExited(an_attempt("ex_1"), an_exit(survivors=1, remains=(left,))))
    (told,) = [item for item in turn.items if item.kind is ItemKind.EVENT]
    assert "attempt.unkillable" in told.body and "unkillable(eperm) 77 sudo S" in told.body
    world.running("ex_2")
    quiet = world.step(AttemptExited(an_attempt("ex_2"), an_exit()))
    assert not [item for item in quiet.items if item.kind is ItemKind.EVENT]
