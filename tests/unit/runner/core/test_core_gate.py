"""The gate: what is short is said with when to ask again, the owner's word counts and lasts, and what runs is left alone."""

from typing import Any

import pytest

from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.messages import ItemKind
from runner.core.admission import RETRY_AFTER_MS, RETRY_AFTER_MS_MAX
from runner.core.effects import CreateWorktree, Note, PrepareAttempt, RemoveWorktree, SendBeat, StopAttempt
from runner.core.inputs import AttemptPrepared, HeadroomMeasured, OwnerAdmission, Tick
from runner.core.plans import Admission, Headroom, Observed, Phase
from tests.support.builders import an_attempt
from tests.support.engine import SHIM, Turn, World, a_policy

GIB = 1024 * 1024 * 1024
WANTS: dict[str, Any] = {
    "disk_free_min": 2 * GIB,
    "disk_free_percent_min": 5,
    "inodes_free_percent_min": 5,
    "memory_available_min": GIB // 2,
    "fds_free_min": 100,
}


def plenty(**over: int | None) -> Headroom:
    """A machine that has more than anybody wants."""
    fields: dict[str, int | None] = {
        "disk_free": 100 * GIB,
        "disk_total": 500 * GIB,
        "inodes_free": 900_000,
        "inodes_total": 1_000_000,
        "memory_available": 8 * GIB,
        "fds_free": 5_000,
    }
    return Headroom(**(fields | over))


def measured(headroom: Headroom, **policy: int) -> World:
    """A world whose owner wants some room, and what it has."""
    world = World(policy=a_policy(**(WANTS | policy)))
    assert list(world.step(HeadroomMeasured(headroom))) == []
    return world


def word(admission: str, deadline_ms: int | None = None, **over: Any) -> OwnerAdmission:
    """The owner's."""
    return OwnerAdmission(Admission(admission), "uid 1000", deadline_ms, **over)


# --- what is short ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({}, None),
        # 2 GiB or 5 %, whichever is more.
        ({"disk_free": 25 * GIB, "disk_total": 500 * GIB}, None),
        ({"disk_free": 25 * GIB - 1, "disk_total": 500 * GIB}, Reason.DISK_LOW),
        ({"disk_free": 2 * GIB, "disk_total": 10 * GIB}, None),
        ({"disk_free": 2 * GIB - 1, "disk_total": 10 * GIB}, Reason.DISK_LOW),
        ({"disk_free": 0}, Reason.DISK_LOW),
        ({"inodes_free": 50_000}, None),
        ({"inodes_free": 49_999}, Reason.INODES_LOW),
        # btrfs has no count of inodes: 0 of 0 is not short.
        ({"inodes_free": 0, "inodes_total": 0}, None),
        ({"memory_available": GIB // 2}, None),
        ({"memory_available": GIB // 2 - 1}, Reason.MEMORY_LOW),
        ({"fds_free": 100}, None),
        ({"fds_free": 99}, Reason.FDS_LOW),
        ({"fds_free": 0}, Reason.FDS_LOW),
        # What the system does not tell is not short.
        (
            dict.fromkeys(("disk_free", "disk_total", "inodes_free", "inodes_total", "memory_available", "fds_free")),
            None,
        ),
        ({"disk_total": None, "disk_free": 2 * GIB}, None),
    ],
)
def test_a_start_is_refused_for_each_thing_that_is_short(over: dict[str, int | None], reason: Reason | None) -> None:
    """Before it is accepted, with when to ask again; on the boundary there is enough."""
    world = measured(plenty(**over))
    turn = world.send(world.start())
    if reason is None:
        assert turn.has(PrepareAttempt) and not turn.receipts
    else:
        assert turn.reasons == [reason] and turn.receipt.result == {"retry_after_ms": RETRY_AFTER_MS}
        assert not turn.has(PrepareAttempt) and world.engine.attempts.living == 0


def test_an_owner_who_wants_no_room_is_never_short() -> None:
    """All bounds are the policy's."""
    world = World()
    world.step(HeadroomMeasured(Headroom(disk_free=0, disk_total=1, inodes_free=0, inodes_total=1, fds_free=0)))
    assert world.send(world.start()).has(PrepareAttempt)


def test_asking_again_while_it_is_short_is_answered_with_twice_the_wait_up_to_a_bound() -> None:
    """And with the first wait after there was enough once."""
    world = measured(plenty(fds_free=0))
    waits = [world.send(world.start(f"ex_{n}")).receipt.result["retry_after_ms"] for n in range(6)]
    assert waits == [30_000, 60_000, 120_000, 240_000, RETRY_AFTER_MS_MAX, RETRY_AFTER_MS_MAX]
    world.step(HeadroomMeasured(plenty()))
    assert world.send(world.start("ex_7")).has(PrepareAttempt)
    world.step(HeadroomMeasured(plenty(fds_free=0)))
    assert world.send(world.start("ex_8")).receipt.result == {"retry_after_ms": RETRY_AFTER_MS}


def test_a_new_worktree_wants_room_and_its_removal_makes_some() -> None:
    """What ends or frees something passes always."""
    world = measured(plenty())
    world.made("wt_1")
    world.running("ex_1", lease={"res": "exec:ex_1", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"})
    world.step(HeadroomMeasured(plenty(disk_free=0)))
    assert world.send(world.create("wt_2")).reasons == [Reason.DISK_LOW]
    assert world.send(world.remove("wt_1")).has(RemoveWorktree)
    assert world.send(world.acquire()).receipt.outcome == "done"
    assert world.send(world.stop()).has(StopAttempt)


def test_a_start_that_cannot_be_admitted_anyway_is_told_the_lasting_reason() -> None:
    """Asking again would change nothing."""
    world = measured(plenty(disk_free=0))
    denied = world.send(world.start(args={"cwd": {"type": "path", "path": "/etc"}})).receipt
    assert denied.reason is Reason.CWD_OUTSIDE_ROOTS and denied.result == {}


def test_the_owners_limit_of_attempts_says_when_to_ask_again() -> None:
    """One of them will end."""
    world = World(policy=a_policy(concurrent_max=1))
    world.running("ex_1")
    receipt = world.send(world.start("ex_2")).receipt
    assert (receipt.reason, receipt.result) == (Reason.CAPACITY, {"retry_after_ms": RETRY_AFTER_MS})


# --- the owner's word ------------------------------------------------------------------------------------------------


def event_of(turn: Turn) -> Event:
    """The only event that was told."""
    told = [Event.parse(item.body.encode()) for item in turn.items if item.kind is ItemKind.EVENT]
    assert len(told) == 1, told
    return told[0]


@pytest.mark.parametrize(("said", "reason"), [("paused", Reason.PAUSED), ("draining", Reason.DRAINING)])
def test_a_closed_machine_takes_no_new_work_and_lets_be_what_runs(said: str, reason: Reason) -> None:
    """Opened again, it takes it."""
    world = World()
    world.made("wt_1")
    world.running("ex_1")
    turn = world.step(word(said))
    assert not turn.has(StopAttempt) and world.row("ex_1").stop_by is None
    for env in (world.start("ex_2"), world.create("wt_2")):
        receipt = world.send(env).receipt
        assert (receipt.reason, receipt.result) == (reason, {"retry_after_ms": RETRY_AFTER_MS_MAX})
    assert world.send(world.remove("wt_1")).has(RemoveWorktree)
    assert world.send(world.stop("ex_1")).has(StopAttempt)
    world.step(word("open"))
    assert world.send(world.start("ex_3")).has(PrepareAttempt)
    assert world.send(world.create("wt_4", "/srv/repos/b")).has(CreateWorktree)


def test_a_change_is_kept_noted_told_and_said_in_a_beat_at_once() -> None:
    """The plane need not find out by refusals."""
    world = World()
    world.session()
    turn = world.step(word("paused"))
    assert world.journal.admission == (Admission.PAUSED, None)
    assert turn.one(Note).fields == {"admission": "paused", "by": "uid 1000"}
    event = event_of(turn)
    assert (event.kind, event.detail) == (EventKind.ADMISSION_CHANGED, "paused by uid 1000")
    assert turn.one(SendBeat).admission is Admission.PAUSED
    assert not World().step(word("paused")).has(SendBeat)


def test_the_same_word_twice_is_one_but_for_a_new_deadline() -> None:
    """A script may repeat itself."""
    world = World()
    assert list(world.step(word("open"))) == []
    assert world.step(word("draining", world.now.boot_ms + 5_000)).has(Note)
    assert list(world.step(word("draining", world.now.boot_ms + 5_000))) == []
    assert world.step(word("draining", world.now.boot_ms + 9_000)).has(Note)
    assert world.engine.gate.drain_deadline_ms == world.now.boot_ms + 9_000


def test_a_word_for_good_counts_also_where_the_machine_is_closed_already() -> None:
    """1. Closed for this daemon. 2. The owner says it. 3. A restart: it is still closed."""
    world = World()
    world.step(word("paused", keep=False), word("paused"))
    assert world.journal.admission == (Admission.PAUSED, None)
    world.crash()
    assert world.send(world.start()).reasons == [Reason.PAUSED]


def test_a_drain_stops_what_still_runs_at_its_deadline_once() -> None:
    """Not before, not what is being stopped already, and what waits for its shim never runs."""
    world = World()
    world.running("ex_1")
    world.running("ex_2")
    world.send(world.stop("ex_2", cmd_id="cmd_stop"))
    world.send(world.start("ex_3"))
    world.step(word("draining", world.now.boot_ms + 5_000))
    assert world.engine.wake_at_ms == world.now.boot_ms + 5_000
    world.pass_time(4_999)
    assert not world.step(Tick()).has(StopAttempt)
    world.pass_time(1)
    assert [stop.attempt for stop in world.step(Tick()).of(StopAttempt)] == [an_attempt("ex_1")]
    assert world.row("ex_1").stop_by == "uid 1000 drain" and world.row("ex_2").stop_by == "cmd_stop"
    late = world.step(AttemptPrepared(an_attempt("ex_3"), SHIM))
    assert late.reasons == [Reason.CANCELLED_BEFORE_START]
    assert not world.step(Tick()).has(StopAttempt) and world.engine.gate.drain_deadline_ms is None


def test_a_drain_that_is_over_at_once_stops_at_once() -> None:
    """`--deadline 0`."""
    world = World()
    world.running()
    assert world.step(word("draining", world.now.boot_ms)).has(StopAttempt)


def test_a_drain_without_a_deadline_waits_and_a_reopened_machine_forgets_its_deadline() -> None:
    """What runs may take its time."""
    world = World()
    world.running()
    world.step(word("draining"))
    assert world.engine.gate.drain_deadline_ms is None
    world.step(word("draining", world.now.boot_ms + 5_000), word("open"))
    world.pass_time(60_000)
    assert not world.step(Tick()).has(StopAttempt)


def test_the_owners_word_outlives_a_restart_and_a_drain_ends_at_the_same_moment() -> None:
    """Also across a reboot, where the clock of deadlines starts anew."""
    living = Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)
    for reboot in (False, True):
        world = World()
        world.running()
        world.step(word("draining", world.now.boot_ms + 100_000))
        world.pass_time(30_000)
        _ = world.reboot() if reboot else world.crash(living)  # a reboot takes 60 s more
        left_ms = 10_000 if reboot else 70_000
        assert world.engine.gate.admission is Admission.DRAINING
        assert world.engine.gate.drain_deadline_ms == world.now.boot_ms + left_ms
        assert world.send(world.start("ex_2")).reasons == [Reason.DRAINING]
        if not reboot:
            world.pass_time(left_ms)
            assert world.step(Tick()).has(StopAttempt)


def test_a_drain_whose_moment_passed_while_no_daemon_lived_is_over_at_once() -> None:
    """Not at the next beat."""
    world = World()
    world.running()
    world.step(word("draining", world.now.boot_ms + 1_000))
    living = Observed(attempt=an_attempt(), same_boot=True, phase=Phase.RUNNING, lock_held=True, exit=None)
    world.crash(living, boot_ms=500_000)
    assert world.engine.wake_at_ms == world.now.boot_ms
    assert world.step(Tick()).has(StopAttempt)


def test_a_word_for_this_daemon_only_is_not_kept() -> None:
    """A daemon that is told to end drains; the next one is open."""
    world = World()
    world.step(word("draining", keep=False))
    assert world.journal.admission == (Admission.OPEN, None)
    assert world.send(world.start()).reasons == [Reason.DRAINING]
    world.crash()
    assert world.send(world.start("ex_2")).has(PrepareAttempt)


def test_what_was_accepted_before_the_owner_closed_the_machine_begins_again_after_a_crash() -> None:
    """1. Accepted. 2. The owner pauses. 3. The daemon dies before the release. 4. It is no new work."""
    world = World()
    world.running()
    world.released.clear()
    world.step(word("paused"))
    ready = Observed(attempt=an_attempt(), same_boot=True, phase=Phase.READY, lock_held=False, exit=None)
    assert world.crash(ready).has(PrepareAttempt)
