"""Rhythm: what is said when, what an unsigned answer may bring, and waking up: renewed first, judged after."""

from itertools import pairwise
from typing import Any

import pytest

from protocol.errors import Reason
from protocol.events import Event, EventKind
from protocol.lease import LeaseState
from protocol.limits import FETCH_ITEMS_MAX, WAKE_WAIT_MS
from protocol.messages import Answer, Fetch, HeldLease, Hint, ItemKind, Renewal
from protocol.session import BeatAnswered, ItemsAnswered
from runner.core.effects import (
    Note,
    Persist,
    PushLease,
    Redial,
    ReportAgain,
    Say,
    ScanOrphans,
    SendBeat,
    StopAttempt,
)
from runner.core.inputs import AttemptNotPrepared, AttemptPrepared, SessionDown, Tick, Woke
from runner.core.rhythm import RENEW_RETRY_MS
from tests.support.builders import an_attempt
from tests.support.engine import BOOT_MS, SHIM, Turn, World, a_policy


def a_grant(execution_id: str = "ex_1", **over: Any) -> dict[str, Any]:
    """A lease of a minute."""
    return {"res": f"exec:{execution_id}", "token": 1, "ttl_ms": 60_000, "on_loss": "stop"} | over


def answer(world: World, *, sent_ms: int | None = None, ttl_ms: int | None = 60_000, **over: Any) -> BeatAnswered:
    """The plane's answer to a beat of `sent_ms`: every held lease is renewed, or (None) refused."""
    leases = tuple(
        Renewal(res=held.res, token=held.token, ttl_ms=ttl_ms, reason=None if ttl_ms else Reason.FENCED)
        for held in world.engine.leases.held()
    )
    fields: dict[str, Any] = {"now_ms": world.now.wall_ms, "beat_ms": 10_000, "leases": leases, "hints": ()}
    return BeatAnswered(sent_ms=world.now.boot_ms if sent_ms is None else sent_ms, **(fields | over))


def walk(world: World, ms: int, *, answered: bool = True, beat_ms: int = 10_000) -> list[tuple[int, Turn]]:
    """Tick whenever the engine asks to be woken, for `ms`; each beat is answered at once, or never."""
    turns, end_ms = [], world.now.boot_ms + ms
    while (wake_ms := world.engine.wake_at_ms) is not None and wake_ms <= end_ms:
        assert len(turns) < 10_000, "it spins"
        world.pass_time(max(wake_ms - world.now.boot_ms, 0))
        turns.append((world.now.boot_ms, world.step(Tick())))
        if answered and turns[-1][1].has(SendBeat):
            world.step(answer(world, beat_ms=beat_ms))
    world.pass_time(end_ms - world.now.boot_ms)
    return turns


def beats(turns: list[tuple[int, Turn]]) -> list[tuple[int, SendBeat]]:
    """Of a walk, with their moments since its begin."""
    return [(at_ms - BOOT_MS, beat) for at_ms, turn in turns for beat in turn.of(SendBeat)]


# --- beats -----------------------------------------------------------------------------------------------------------


def test_lists_are_whole_every_half_minute_and_on_connecting() -> None:
    """In between a beat says that it compares nothing."""
    world = World()
    assert world.session().one(SendBeat).full
    told = beats(walk(world, 120_000))
    assert [at_ms for at_ms, _ in told] == list(range(10_000, 130_000, 10_000))
    assert [at_ms for at_ms, beat in told if beat.full] == [30_000, 60_000, 90_000, 120_000]
    world.step(SessionDown())
    assert world.session().one(SendBeat).full


def test_with_a_long_interval_every_beat_is_full() -> None:
    """What is sent less often than both lists are compared compares them."""
    world = World()
    world.session(beat_ms=45_000)
    told = beats(walk(world, 200_000, beat_ms=45_000))
    assert len(told) == 4 and all(beat.full for _, beat in told)


def test_a_beat_names_who_lives_what_is_held_what_was_lost_and_whether_new_work_is_taken() -> None:
    """All that both sides compare."""
    world = World()
    world.running("ex_1", lease=a_grant())
    world.running("ex_2", lease=a_grant("ex_2", ttl_ms=600_000))
    world.pass_time(60_000)
    world.step(Tick())
    beat = world.session().one(SendBeat)
    assert beat.attempts == (an_attempt("ex_1"), an_attempt("ex_2"))
    assert beat.leases == (HeldLease(res="exec:ex_2", token=1),) and beat.lost == (HeldLease(res="exec:ex_1", token=1),)
    assert (beat.hw, beat.full, beat.admission) == (2, True, "open")


def test_a_lease_is_renewed_at_a_third_of_its_ttl_however_long_the_interval_is() -> None:
    """Give or take a tenth, and counted from when the last renewal was asked for."""
    world = World()
    world.running(lease=a_grant())
    world.session(beat_ms=600_000)
    told = [at_ms for at_ms, _ in beats(walk(world, 600_000, beat_ms=600_000))]
    gaps = [after - before for before, after in pairwise([0, *told])]
    assert len(told) >= 26 and all(18_000 <= gap <= 22_000 for gap in gaps), gaps
    assert world.row().lease is not None and world.row().lease.state is LeaseState.HELD  # type: ignore[union-attr]


def test_a_renewal_that_nobody_answers_is_asked_for_again_every_two_seconds_and_not_more_often() -> None:
    """Until the lease is lost; then there is nothing to ask for."""
    world = World()
    world.running(lease=a_grant(on_loss="freeze"))
    world.session(beat_ms=600_000)
    turns = walk(world, 60_000, answered=False)
    told = [at_ms for at_ms, _ in beats(turns)]
    assert 18_000 <= told[0] <= 22_000 and told[-1] <= 60_000
    assert {after - before for before, after in pairwise(told)} == {RENEW_RETRY_MS}
    turns += walk(world, 20_000, answered=False)
    assert [note.event for _, turn in turns for note in turn.of(Note)] == ["lease.lost"]
    assert len(turns) <= len(told) + 2, "nothing is asked for once it is lost"


def test_a_refused_renewal_is_asked_for_again_no_more_often_than_an_unanswered_one() -> None:
    """A plane that says no to everything does not make us spin."""
    world = World()
    world.running(lease=a_grant())
    world.session(beat_ms=600_000)
    told = []
    while world.now.boot_ms < BOOT_MS + 60_000:
        wake_ms = world.engine.wake_at_ms
        assert wake_ms is not None and len(told) < 100
        world.pass_time(wake_ms - world.now.boot_ms)
        if world.step(Tick()).has(SendBeat):
            told.append(world.now.boot_ms)
            world.step(answer(world, beat_ms=600_000, ttl_ms=None))
    assert min(after - before for before, after in pairwise(told)) >= RENEW_RETRY_MS


def test_nothing_is_renewed_without_a_session_and_nothing_wakes_for_it() -> None:
    """The deadline does, once."""
    world = World()
    world.running(lease=a_grant(on_loss="freeze"))
    assert world.engine.wake_at_ms == BOOT_MS + 60_000
    turns = walk(world, 120_000)
    assert [[note.event for note in turn.of(Note)] for _, turn in turns] == [["lease.lost"]]
    assert world.engine.wake_at_ms is None or world.engine.wake_at_ms > world.now.boot_ms


# --- hints -----------------------------------------------------------------------------------------------------------


def hint(attempt: str, cmd_id: str, want: str = "running") -> Hint:
    """One word of the plane."""
    return Hint(attempt=attempt, want=want, cmd_id=cmd_id)


def test_a_hint_that_names_a_command_nobody_saw_has_it_fetched() -> None:
    """Each once, in order, and no more at a time than a frame names."""
    world = World()
    world.session()
    turn = world.step(answer(world, hints=(hint("ex_1.1", "cmd_a"), hint("ex_2.1", "cmd_b"), hint("ex_1.1", "cmd_a"))))
    assert list(turn) == [Say(Fetch(cmd_ids=["cmd_a", "cmd_b"]))]
    many = tuple(hint(f"ex_{n}.1", f"cmd_{n}") for n in range(FETCH_ITEMS_MAX + 5))
    said = world.step(answer(world, hints=many)).one(Say).message
    assert isinstance(said, Fetch) and said.cmd_ids == [f"cmd_{n}" for n in range(FETCH_ITEMS_MAX)]


def test_a_hint_about_what_is_over_has_its_last_word_reported_again() -> None:
    """A settlement; or, of what never began, the receipt; also of an attempt that was forgotten."""
    world = World()
    world.running("ex_1", cmd_id="cmd_a")
    settled = world.exit("ex_1").items[0].out_seq
    world.send(world.start("ex_2", cmd_id="cmd_b"))
    failed = world.step(AttemptNotPrepared(an_attempt("ex_2"), Reason.CWD_MISSING, "", refused=True)).items[0].out_seq
    refused = world.send(world.start("ex_3", cmd_id="cmd_c", kind="execution.teleport")).items[0].out_seq
    world.step(ItemsAnswered(tuple(Answer(out_seq=n, stored=True) for n in world.journal.items)))
    hints = (hint("ex_1.1", "cmd_a"), hint("ex_2.1", "cmd_b"), hint("ex_3.1", "cmd_c"), hint("ex_1.1", "cmd_a"))
    assert world.step(answer(world, hints=hints)).one(ReportAgain).out_seqs == (settled, failed, refused)


def test_a_hint_about_what_lives_and_is_known_does_nothing() -> None:
    """Whatever the plane wants of it: the word is unsigned."""
    world = World()
    world.running("ex_1", cmd_id="cmd_a")
    world.send(world.start("ex_2", cmd_id="cmd_b"))
    for want in ("running", "stopped"):
        hints = (hint("ex_1.1", "cmd_a", want), hint("ex_2.1", "cmd_b", want))
        assert list(world.step(answer(world, hints=hints))) == []


def test_what_the_plane_does_not_count_as_ours_is_told_once_a_session_and_kept() -> None:
    """An unsigned silence ends nothing."""
    world = World()
    world.running("ex_1")
    world.running("ex_2")
    world.session()
    known = (hint("ex_2.1", "cmd_2"),)
    turn = world.step(answer(world, hints=known, full=True))
    event = Event.parse(turn.items[0].body.encode())
    assert (event.kind, event.execution_id, event.start_token) == (EventKind.ATTEMPT_UNKNOWN, "ex_1", 1)
    assert [item.kind for item in turn.items] == [ItemKind.EVENT] and not turn.has(StopAttempt)
    assert list(world.step(answer(world, hints=known, full=True))) == []
    assert world.row("ex_1").stop_by is None
    world.step(SessionDown())
    world.session()
    assert world.step(answer(world, hints=known, full=True)).one(Note).fields == {"attempt": "ex_1.1"}


def test_an_answer_that_is_not_full_says_nothing_of_what_it_does_not_name() -> None:
    """It has the hints that changed, or that had room."""
    world = World()
    world.running()
    world.session()
    assert list(world.step(answer(world, hints=(), full=False))) == []


# --- waking up -------------------------------------------------------------------------------------------------------


def slept(ms: int = 600_000, **lease: Any) -> World:
    """A machine that slept longer than its lease, with a session from before."""
    world = World()
    world.running(lease=a_grant(**lease))
    world.session()
    world.pass_time(ms)
    return world


def test_a_machine_that_wakes_dials_anew_and_looks_around() -> None:
    """What is connected is dead or unsure, and anything may have ended."""
    world = slept()
    turn = world.step(Woke(600_000))
    assert turn.has(Redial) and turn.has(ScanOrphans)
    assert turn.one(Note).event == "machine.woke" and turn.one(Note).fields == {"slept_ms": 600_000}


def test_a_lease_that_ran_out_asleep_is_renewed_first_and_then_judged() -> None:
    """1. It sleeps past its deadline. 2. It wakes. 3. The plane has not given it away. 4. Nothing was lost."""
    world = slept()
    world.step(Woke(600_000))
    assert not world.step(Tick()).has(Note)
    world.step(SessionDown())
    beat = world.session().one(SendBeat)
    assert beat.full and beat.leases == (HeldLease(res="exec:ex_1", token=1),) and not beat.lost
    turn = world.step(answer(world))
    assert turn.one(PushLease).deadline_ms == world.now.boot_ms + 60_000 and not turn.has(Note)
    assert not world.step(Tick()).has(Note)


def test_a_lease_that_the_plane_does_not_renew_after_a_sleep_is_lost_at_once() -> None:
    """It has been given to somebody else: waiting longer helps nobody."""
    for over in ({"ttl_ms": None}, {"leases": ()}):
        world = slept()
        world.step(Woke(600_000), SessionDown())
        world.session()
        turn = world.step(answer(world, **over))  # type: ignore[arg-type]
        assert "lease.lost" in [note.event for note in turn.of(Note)]


def test_an_answer_from_before_the_sleep_does_not_end_the_waking() -> None:
    """1. A beat is on its way. 2. The lid closes for ten minutes. 3. The answer waits in the socket. 4. It renews too little.

    Judged by it, every lease would be lost a second before the first beat of the new session renews it.
    """
    world = slept()
    world.step(Woke(600_000))
    assert not world.step(answer(world, sent_ms=BOOT_MS)).has(Note)
    world.step(SessionDown())
    world.session()
    assert world.step(answer(world)).one(PushLease).deadline_ms == world.now.boot_ms + 60_000


def test_a_machine_that_finds_no_plane_after_waking_judges_after_a_while() -> None:
    """Half a minute, and it is woken for it once."""
    for connected in (True, False):
        world = slept()
        world.step(Woke(600_000))
        woke_ms = world.now.boot_ms
        if not connected:
            world.step(SessionDown())
        turns = walk(world, WAKE_WAIT_MS, answered=False)
        assert "lease.lost" in [note.event for note in turns[-1][1].of(Note)]
        assert turns[-1][0] == woke_ms + WAKE_WAIT_MS
        # A dead session is asked every two seconds; it never spins.
        assert len(turns) <= WAKE_WAIT_MS // RENEW_RETRY_MS + 2


def test_no_start_is_let_go_on_a_lease_that_ran_out_asleep() -> None:
    """It is renewed first, or the start is refused; whichever the plane says."""
    world = World()
    world.send(world.start(lease=a_grant()))
    world.pass_time(600_000)
    world.step(Woke(600_000))
    assert world.step(AttemptPrepared(an_attempt(), SHIM)).reasons == [Reason.EXPIRED]


def test_a_beat_that_is_not_the_first_is_not_full_for_the_sake_of_a_wake_alone() -> None:
    """Waking makes the next one full, whenever it is sent."""
    world = World()
    world.session()
    world.pass_time(10_000)
    assert not world.step(Tick()).one(SendBeat).full
    world.step(Woke(5_000))
    world.pass_time(10_000)
    assert world.step(Tick()).one(SendBeat).full
    world.pass_time(10_000)
    assert not world.step(Tick()).one(SendBeat).full


# --- idle cost -------------------------------------------------------------------------------------------------------


def test_an_idle_engine_asks_to_be_woken_seven_times_a_minute() -> None:
    """Six beats and one look at all processes; over ten minutes, from a start like any other."""
    world = World()
    world.crash()
    world.session()
    turns = walk(world, 600_000)
    assert len(turns) <= 10 * 8
    assert len(beats(turns)) == 60 and sum(turn.has(ScanOrphans) for _, turn in turns) == 10
    assert all(turn.has(SendBeat) or turn.has(ScanOrphans) for _, turn in turns), "a wake-up that does nothing"


@pytest.mark.parametrize("beat_ms", [10_000, 60_000])
def test_two_hundred_leases_cost_no_more_beats_than_the_schedule_needs(beat_ms: int) -> None:
    """Every beat renews all of them, so at most one in each eighteen seconds is sent for their sake."""
    world = World(policy=a_policy(concurrent_max=500))
    for number in range(200):
        name = f"ex_{number}"
        world.running(name, lease=a_grant(name, on_loss=("stop", "freeze", "continue")[number % 3]))
        world.pass_time(37)
    begun_ms = world.now.boot_ms
    world.session(beat_ms=beat_ms)
    world.step(answer(world, beat_ms=beat_ms))
    turns = walk(world, 300_000, beat_ms=beat_ms)
    told = len(beats(turns))
    assert told <= 300_000 // min(beat_ms, 18_000) + 1, told
    assert len(turns) <= told + 6, "a wake-up that does nothing"
    assert len(world.engine.leases.held()) == 200 and world.now.boot_ms == begun_ms + 300_000
    for _, turn in turns:
        assert not turn.has(Persist) or not turn.has(SendBeat), "a beat writes nothing"
