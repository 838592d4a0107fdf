"""The engine's door: sessions, beats, time, memory, and the order of what it says."""

from dataclasses import replace

import pytest

from protocol.errors import Reason
from protocol.keyset import Revocation, RevokedFor
from protocol.messages import Answer, Fetch, Hint
from protocol.receipt import Outcome
from protocol.session import BeatAnswered, ItemsAnswered
from runner.core import engine as engine_module
from runner.core import ledger as ledger_module
from runner.core.effects import (
    AbandonAttempt,
    CreateWorktree,
    KeepIdentity,
    Note,
    Offer,
    Persist,
    PrepareAttempt,
    ReleaseAttempt,
    RemoveWorktree,
    ReportAgain,
    Say,
    SendBeat,
    StopAttempt,
)
from runner.core.inputs import AttemptPrepared, PolicyChanged, SessionDown, Tick, WorktreeCreated
from runner.core.journaling import AttemptRow, PutAnswered, PutAttempt, PutCommand, PutMark, PutReceipt, PutSettlement
from tests.support.builders import NOW_MS, a_key, a_keyset, a_mark, a_verified_keyset, an_attempt
from tests.support.engine import SHIM, Turn, World, a_made, a_policy


def writes_of(turn: Turn) -> list[type]:
    """What kinds of writes a turn makes, in order."""
    return [type(write) for effect in turn.of(Persist) for write in effect.writes]


def test_a_start_is_journaled_then_prepared_then_accepted_then_released_then_settled() -> None:
    """The whole life of an attempt, each durable step before its effect."""
    world = World()
    wanted = world.send(world.start())
    assert writes_of(wanted) == [PutMark, PutCommand, PutAttempt] and not wanted.receipts
    assert isinstance(wanted[0], Persist) and isinstance(wanted[-1], PrepareAttempt)
    begun = world.step(AttemptPrepared(an_attempt(), SHIM))
    assert writes_of(begun) == [PutAttempt, PutReceipt]
    assert begun.receipt.outcome is Outcome.ACCEPTED
    assert begun.receipt.result == {"execution_id": "ex_1", "start_token": 1}
    assert isinstance(begun[-1], ReleaseAttempt)
    ended = world.exit(code=3)
    assert writes_of(ended) == [PutSettlement]
    assert (ended.settlement.verdict, ended.settlement.code) == ("exited", 3)
    assert ended.settlement.cmd_digest == begun.receipt.cmd_digest
    assert world.engine.attempts.living == 0 and len(world.engine.claims) == 0


def test_what_a_turn_must_remember_comes_before_all_else_of_the_same_decision() -> None:
    """Journal before effect, also when one input leads to several decisions."""
    world = World()
    world.running("ex_1", 1)
    for turn in (
        world.send(world.start("ex_1", 2)),
        world.exit("ex_1", 1),
        world.step(AttemptPrepared(an_attempt("ex_1", 2), SHIM)),
        world.send(world.stop("ex_1", 2)),
        world.exit("ex_1", 2),
    ):
        assert isinstance(turn[0], Persist)
        for at, effect in enumerate(turn):
            if isinstance(effect, Offer):
                assert isinstance(turn[at - 1], Persist)


def test_numbers_of_report_items_have_no_holes() -> None:
    """The plane acknowledges by number."""
    world = World()
    turns = [world.running(), world.send(world.stop()), world.exit(), world.send(world.start(kind="a.b"))]
    numbers = [item.out_seq for turn in turns for item in turn.items]
    assert numbers == [1, 2, 3, 4]


def test_a_welcome_sets_the_clock_and_begins_with_a_beat() -> None:
    """Expiry is judged by the plane's clock from then on, and by ours before."""
    world = World()
    assert world.engine.plane_ms(world.now) == world.now.wall_ms
    turn = world.session(now_ms=world.now.wall_ms + 3_600_000)
    assert turn.one(SendBeat).hw == 0
    assert world.engine.plane_ms(world.now) == world.now.wall_ms + 3_600_000
    assert world.send(world.start()).receipt.reason is Reason.EXPIRED


def test_a_beat_is_due_at_the_interval_the_plane_dictates() -> None:
    """And only while there is a session."""
    world = World()
    assert world.engine.wake_at_ms is None
    world.session()
    assert world.engine.wake_at_ms == world.now.boot_ms + 10_000
    world.pass_time(9_999)
    assert world.step(Tick()) == []
    world.pass_time(1)
    assert world.step(Tick()).has(SendBeat)
    world.step(BeatAnswered(world.now.boot_ms, world.now.wall_ms + 7, 60_000, (), ()))
    assert world.engine.plane_ms(world.now) == world.now.wall_ms + 7
    world.pass_time(10_000)
    world.step(Tick())
    assert world.engine.wake_at_ms == world.now.boot_ms + 60_000
    world.step(SessionDown())
    assert world.engine.wake_at_ms is None


def test_a_beat_names_the_mark_and_who_lives() -> None:
    """So the plane sees what it need not send, and what it must not forget."""
    world = World()
    world.running()
    beat = world.session().one(SendBeat)
    assert (beat.hw, beat.attempts, beat.leases) == (1, (an_attempt(),), ())


def test_a_new_incarnation_restarts_the_stream_and_keeps_living_attempts() -> None:
    """The fork is over; what runs, runs."""
    world = World()
    world.running()
    turn = world.session(reborn=True)
    kept = turn.one(KeepIdentity)
    assert kept.certificate is not None and kept.certificate.value.inc == 2
    assert turn.one(SendBeat).hw == 0 and turn.one(SendBeat).attempts == (an_attempt(),)
    assert [note.event for note in turn.of(Note)] == ["keyset.updated", "incarnation.raised"]
    old = world.fields("execution.start", {}, aud={"org": "org_1", "runner": "rnr_1", "inc": 1}, seq=1)
    assert world.send(world.seal(old)).refused.reason is Reason.STALE_INC
    world.mark = a_mark(0)
    fresh = world.send(world.start("ex_2"))
    assert fresh.has(PrepareAttempt) and PutMark in writes_of(fresh)
    assert world.journal.marks[1].hw == 1 and world.journal.marks[2].hw == 1
    ended = world.exit()
    assert ended.settlement.inc == 2


def test_an_id_of_an_earlier_incarnation_is_not_done_twice() -> None:
    """A plane that signs its whole queue anew cannot repeat what was consumed."""
    world = World()
    world.running(cmd_id="cmd_once")
    world.exit()
    world.session(reborn=True)
    turn = world.send(world.start("ex_1", 2, cmd_id="cmd_once"))
    assert turn.receipt.reason is Reason.IDEMPOTENCY_MISMATCH and not turn.has(PrepareAttempt)


def test_a_restart_in_a_new_incarnation_goes_on_at_its_own_mark() -> None:
    """Each incarnation has a mark of its own, and none is forgotten."""
    world = World()
    world.running("ex_1")
    world.session(reborn=True)
    world.send(world.start("ex_2"))
    world.crash()
    assert world.engine.ledger.ctl == world.mark


def test_answers_are_remembered_with_the_next_commit_and_not_at_once() -> None:
    """They are no promise to anybody: an fsync for each would wake the disk."""
    world = World()
    world.running()
    assert world.step(ItemsAnswered((Answer(out_seq=1, stored=True),))) == []
    turn = world.step(Tick())
    assert turn.one(Persist).writes == (PutAnswered((1,), world.now.wall_ms),)
    assert world.step(Tick()) == []


def test_a_report_that_was_refused_for_ever_is_noted() -> None:
    """Somebody has to look at it."""
    world = World()
    world.running()
    note = world.step(ItemsAnswered((Answer(out_seq=1, stored=False, reason=Reason.BAD_SIG),))).one(Note)
    assert (note.event, note.fields) == ("report.refused", {"out_seq": 1, "reason": Reason.BAD_SIG})
    assert world.step(SessionDown()).one(Persist).writes == (PutAnswered((1,), world.now.wall_ms),)


def test_a_hint_about_a_settled_attempt_brings_its_settlement_again() -> None:
    """And one about a living or unknown attempt only asks for the command it names: it is unsigned."""
    world = World()
    world.running("ex_1")
    world.running("ex_2")
    number = world.exit("ex_1").items[0].out_seq
    hints = tuple(Hint(attempt=name, want="stopped", cmd_id="cmd_x") for name in ("ex_1.1", "ex_2.1", "ex_9.1"))
    turn = world.step(BeatAnswered(0, world.now.wall_ms, 10_000, (), hints))
    assert list(turn) == [ReportAgain((number,)), Say(Fetch(cmd_ids=["cmd_x"]))]


def test_a_new_policy_counts_from_the_next_command_on() -> None:
    """And it is the one the receipts name."""
    world = World()
    world.running("ex_1")
    digest = "sha256:" + "22" * 32
    note = world.step(PolicyChanged(a_policy(digest=digest, kinds=frozenset()))).one(Note)
    assert (note.event, note.fields["policy_digest"]) == ("policy.loaded", digest)
    turn = world.send(world.start("ex_2"))
    assert (turn.receipt.reason, turn.receipt.policy_digest) == (Reason.POLICY_DENIED, digest)


def test_pending_commands_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the plane hears CAPACITY, and memory stays as it is."""
    monkeypatch.setattr(engine_module, "PENDING_MAX", 2)
    world = World()
    world.running("ex_1", 1)
    queued = world.send(world.start("ex_1", 2), world.start("ex_1", 3))
    assert not queued.receipts
    turn = world.send(world.start("ex_1", 4))
    assert turn.receipt.reason is Reason.CAPACITY
    assert world.engine.attempts.rows.get(an_attempt("ex_1", 4)) is None


def test_forgetting_commands_never_forgets_those_of_living_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """1. A terminal lives for weeks. 2. Many commands come and go. 3. Its end must still be told.

    The settlement names the command's digest and policy, so the row has to be there.
    """
    for module in (engine_module, ledger_module):
        monkeypatch.setattr(module, "COMMANDS_REMEMBERED_MAX", 3)
    world = World()
    world.running("ex_1")
    for number in range(2, 12):
        world.running(f"ex_{number}")
        world.exit(f"ex_{number}")
    assert len(world.engine.ledger.commands) == 3
    assert world.exit("ex_1").settlement.execution_id == "ex_1"


def test_a_forgotten_command_is_still_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark is never forgotten."""
    for module in (engine_module, ledger_module):
        monkeypatch.setattr(module, "COMMANDS_REMEMBERED_MAX", 1)
    world = World()
    first = world.start(args={"cwd": {"type": "path", "path": "/etc"}})
    world.send(first)
    for _ in range(3):
        world.send(world.start(kind="a.b"))
    assert world.send(first).refused.reason is Reason.SEQ_REPLAY


def test_a_reopened_command_whose_key_is_gone_is_refused() -> None:
    """A key that was revoked while the daemon was down starts nothing."""
    world = World()
    world.send(world.start())
    row = next(iter(world.journal.commands.values()))
    world.journal.commands[row.digest] = replace(row, envelope=b"{}")
    turn = world.crash()
    assert turn.receipt.reason is Reason.BAD_ENVELOPE and not turn.has(PrepareAttempt)
    assert world.engine.attempts.living == 0
    assert isinstance(world.journal.attempts[an_attempt()], AttemptRow)


REVOKED = a_verified_keyset(
    keyset=a_keyset(
        version=2,
        revoked=[Revocation(kid=a_key("command").key_id, at=NOW_MS - 1, reason=RevokedFor.COMPROMISED)],
    )
)


def rekeyed(world: World) -> Turn:
    """The session brings a keyset in which the command key is compromised."""
    return world.session(keyset=REVOKED)


@pytest.mark.parametrize("waits_for", ["shim", "turn"])
def test_nothing_begins_whose_key_was_revoked_meanwhile(waits_for: str) -> None:
    """1. A start is consumed. 2. Its key is found to be compromised. 3. Its turn comes, or its shim. 4. It never runs."""
    world = World()
    if waits_for == "turn":
        world.running("ex_1", 1)
        world.send(world.start("ex_1", 2))
        rekeyed(world)
        turn = world.exit("ex_1", 1)
    else:
        world.send(world.start())
        rekeyed(world)
        turn = world.step(AttemptPrepared(an_attempt(), SHIM))
        assert turn.has(AbandonAttempt)
    assert turn.reasons == [Reason.UNKNOWN_KEY]
    assert not turn.has(PrepareAttempt) and not turn.has(ReleaseAttempt)
    assert world.engine.attempts.living == 0 and len(world.engine.claims) == 0


def test_no_worktree_is_made_or_removed_whose_command_was_revoked_while_it_waited() -> None:
    """The one under way is carried to its end."""
    world = World()
    first = world.send(world.create("wt_1")).one(CreateWorktree)
    world.send(world.create("wt_2"), world.remove("wt_1"))
    rekeyed(world)
    turn = world.step(WorktreeCreated(first.digest, a_made()))
    assert [receipt.outcome for receipt in turn.receipts] == [Outcome.DONE, Outcome.REFUSED, Outcome.REFUSED]
    assert turn.reasons[1:] == [Reason.UNKNOWN_KEY] * 2
    assert not turn.has(CreateWorktree) and not turn.has(RemoveWorktree) and len(world.engine.claims) == 0


def test_what_runs_goes_on_when_its_key_is_revoked() -> None:
    """Whether it is to end is for a signed word to say; a key that is still trusted can say it."""
    world = World()
    world.running()
    assert not rekeyed(world).has(StopAttempt)
    assert world.send(world.start("ex_2")).refused.reason is Reason.UNKNOWN_KEY
    assert world.send(world.stop(key=a_key("safety"))).has(StopAttempt)


def test_a_newer_keyset_that_still_trusts_a_key_lets_its_commands_begin() -> None:
    """What was signed is judged by the keys of today, and they are fine."""
    world = World()
    world.send(world.start())
    world.session(keyset=a_verified_keyset(keyset=a_keyset(version=2)))
    assert world.step(AttemptPrepared(an_attempt(), SHIM)).has(ReleaseAttempt)
