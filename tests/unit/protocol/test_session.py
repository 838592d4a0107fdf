"""The two session machines, alone."""

import pytest

from protocol import strict_json
from protocol.errors import CloseCode, RemoteError
from protocol.limits import (
    COMMANDS_UNACKED_MAX,
    FRAME_BYTES_MAX,
    REPORT_ITEMS_MAX,
    REPORTS_IN_FLIGHT_MAX,
    RETRY_MS,
)
from protocol.messages import Answer, Beat, Beaten, HeldLease, Need, Report, Reported, encode
from protocol.session import (
    BEATS_IN_FLIGHT_MAX,
    OUTBOX_ROOM,
    BeatAnswered,
    ItemsAnswered,
    PlaneSession,
    RunnerSession,
    SentCommand,
)
from tests.support.builders import an_item


def a_runner(*out_seqs: int, out_hw: int = 0) -> RunnerSession:
    """A runner's session with items fed."""
    session = RunnerSession(out_hw, 10_000)
    session.feed(an_item(n) for n in out_seqs)
    return session


def numbers(reports: list[Report]) -> list[int]:
    """The numbers in reports, in order."""
    return [item.out_seq for report in reports for item in report.items]


def stored(*out_seqs: int) -> Reported:
    """The plane's answer."""
    return Reported(answers=[Answer(out_seq=n, stored=True) for n in out_seqs])


def a_plane(*seqs: int | None, acked_hw: int = 0) -> PlaneSession:
    """A plane's session with commands queued; None is a safety command."""
    session = PlaneSession(acked_hw)
    for n, seq in enumerate(seqs):
        session.queue(SentCommand(f"d{seq or f's{n}'}", seq, f"env{seq or f's{n}'}"))
    return session


def sent(session: PlaneSession, now_ms: int) -> list[str]:
    """What goes out now."""
    return [frame.env for frame in session.outgoing(now_ms)]


def test_items_go_once_until_a_silence() -> None:
    """Fed twice they are known; after RETRY_MS without an answer they go again."""
    session = a_runner(1, 2)
    session.feed([an_item(2), an_item(3)])
    assert numbers(session.outgoing(0)) == [1, 2, 3]
    assert session.outgoing(RETRY_MS - 1) == []
    assert numbers(session.outgoing(RETRY_MS)) == [1, 2, 3]


def test_what_is_stored_is_not_sent() -> None:
    """The mark of the welcome is where it begins."""
    assert numbers(a_runner(4, 5, 6, out_hw=5).outgoing(0)) == [6]


def test_one_refused_item_blocks_no_other() -> None:
    """Each has its own final answer, in any order, once."""
    session = a_runner(1, 2, 3)
    session.outgoing(0)
    answers = [Answer(out_seq=2, stored=False), Answer(out_seq=1, stored=True), Answer(out_seq=9, stored=True)]
    assert session.receive(Reported(answers=answers)) == ItemsAnswered(tuple(answers[:2]))
    assert session.receive(stored(1)) is None
    assert numbers(session.outgoing(RETRY_MS)) == [3]


def test_a_lost_report_is_repeated_although_others_flow() -> None:
    """1. item 1 is lost. 2. other items come and are answered every 4 s. 3. item 1 still goes again after RETRY_MS."""
    session = a_runner(1)
    session.outgoing(0)
    again = []
    for step in range(2, 6):
        now_ms = (step - 1) * 4_000
        session.feed([an_item(step)])
        again += [n for n in numbers(session.outgoing(now_ms)) if n == 1]
        session.receive(stored(step))
    assert again == [1]


def test_reports_in_flight_are_bounded() -> None:
    """The fifth waits for an answer to one of four."""
    session = RunnerSession(0, 10_000)
    session.feed(an_item(n, "x" * 90_000) for n in range(1, 7))
    assert len(session.outgoing(0)) == REPORTS_IN_FLIGHT_MAX
    assert session.outgoing(1) == []
    session.receive(stored(2))
    assert numbers(session.outgoing(2)) == [5]


def test_an_item_that_waits_to_go_again_can_be_answered() -> None:
    """1. four reports are out. 2. all fall silent, and a new item queues. 3. an answer to a queued one takes it out."""
    session = RunnerSession(0, 10_000)
    session.feed(an_item(n, "x" * 90_000) for n in range(1, 6))
    session.outgoing(0)
    assert session.receive(stored(5)) == ItemsAnswered((Answer(out_seq=5, stored=True),))
    assert numbers(session.outgoing(RETRY_MS)) == [1, 2, 3, 4]


def test_room_is_bounded_and_never_negative() -> None:
    """Asking for stored items again takes no more than there is."""
    session = RunnerSession(1000, 10_000)
    session.feed(an_item(1000 + n) for n in range(1, OUTBOX_ROOM))
    assert session.room == 1
    session.again(an_item(n) for n in (1, 2, 3))
    assert session.room == 0
    with pytest.raises(AssertionError):
        session.feed([an_item(5000)])


def test_an_item_asked_for_again_goes_once_more() -> None:
    """Not while it waits for an answer, not twice, and not before its turn."""
    session = a_runner(6, out_hw=5)
    session.again([an_item(3), an_item(3), an_item(6), an_item(7)])
    assert numbers(session.outgoing(0)) == [6, 3]
    session.again([an_item(3)])
    assert session.outgoing(1) == []
    session.receive(stored(3))
    session.again([an_item(3)])
    assert numbers(session.outgoing(2)) == [3]


@pytest.mark.parametrize("letter", ["x", '"', "\\", "é", "😀", "\n"])
def test_a_report_fits_a_frame_whatever_is_in_it(letter: str) -> None:
    """Escapes and UTF-8 are counted as they are sent."""
    body = strict_json.dumps({"detail": letter * 500}).decode()
    session = RunnerSession(0, 10_000)
    session.feed(an_item(n, body) for n in range(1, OUTBOX_ROOM + 1))
    reports = session.outgoing(0)
    assert reports
    for report in reports:
        assert len(encode(report).encode()) <= FRAME_BYTES_MAX
        assert len(report.items) <= REPORT_ITEMS_MAX


def test_a_beat_is_answered_once_with_its_own_moment() -> None:
    """The lease counts from when the beat was sent; an answer to an older beat tells nothing any more."""
    session = a_runner()
    assert [session.beat(at, 0).n for at in (100, 200, 300)] == [1, 2, 3]
    answer = Beaten(n=2, now_ms=5, beat_ms=7_000)
    assert session.receive(answer) == BeatAnswered(200, 5, 7_000, (), ())
    assert session.beat_ms == 7_000
    assert session.receive(answer) is None
    assert session.receive(Beaten(n=1, now_ms=5, beat_ms=9_000)) is None
    assert session.receive(Beaten(n=99, now_ms=5, beat_ms=9_000)) is None
    assert session.receive(Beaten(n=3, now_ms=5, beat_ms=7_000)) is not None


def test_a_beat_carries_what_the_plane_compares() -> None:
    """Held and lost leases, who lives, whether the lists are whole, and whether new work is taken."""
    session = a_runner()
    held, lost = HeldLease(res="exec:ex_1", token=2), HeldLease(res="exec:ex_2", token=1)
    beat = session.beat(100, 7, [held], ["ex_1.1"], lost=[lost], full=True, admission="paused")
    assert beat == Beat(n=1, hw=7, leases=[held], attempts=["ex_1.1"], lost=[lost], full=True, admission="paused")
    assert session.receive(Beaten(n=1, now_ms=5, beat_ms=7_000, full=True)) == BeatAnswered(100, 5, 7_000, (), (), True)
    assert session.beat(200, 7) == Beat(n=2, hw=7)


def test_unanswered_beats_are_forgotten() -> None:
    """A bounded number is remembered."""
    session = a_runner()
    for at in range(BEATS_IN_FLIGHT_MAX + 1):
        session.beat(at, 0)
    assert session.receive(Beaten(n=1, now_ms=0, beat_ms=1000)) is None
    assert session.receive(Beaten(n=2, now_ms=0, beat_ms=1000)) is not None


def test_commands_go_in_order_and_safety_goes_first() -> None:
    """A number that is not there yet holds back the later ones; a stop is held back by nobody."""
    session = a_plane(2, 1, 4, None)
    assert sent(session, 0) == ["envs3", "env1", "env2"]
    session.queue(SentCommand("d3", 3, "env3"))
    assert sent(session, 1) == ["env3", "env4"]
    assert sent(session, RETRY_MS - 1) == []


def test_what_is_consumed_is_never_sent() -> None:
    """Numbers up to the mark of the hello, doubles, and numbers the beat told."""
    session = a_plane(4, 5, 6, 6, acked_hw=5)
    session.receive(Beat(n=1, hw=6))
    assert sent(session, 0) == []
    assert session.acked_hw == 6
    session.receive(Beat(n=2, hw=3))
    assert session.acked_hw == 6


def test_a_need_goes_back_once() -> None:
    """1. five commands are sent, the first is lost. 2. each of the others asks for it. 3. the stream goes back once."""
    session = a_plane(1, 2, 3, 4, 5)
    sent(session, 0)
    session.receive(Need(seq=1))
    assert sent(session, 1) == ["env1", "env2", "env3", "env4", "env5"]
    for _ in range(4):
        session.receive(Need(seq=1))
        assert sent(session, 2) == []
    assert sent(session, RETRY_MS + 1) == ["env1", "env2", "env3", "env4", "env5"]
    session.receive(Need(seq=1))
    assert sent(session, RETRY_MS + 2) == ["env1", "env2", "env3", "env4", "env5"]


def test_a_need_tells_how_far_the_runner_is() -> None:
    """Everything below is consumed; an older word changes nothing; a word from the future ends the connection."""
    session = a_plane(1, 2, 3)
    sent(session, 0)
    session.receive(Need(seq=3))
    assert session.acked_hw == 2
    assert sent(session, 1) == ["env3"]
    session.receive(Need(seq=1))
    assert sent(session, 2) == []
    with pytest.raises(RemoteError) as refused:
        session.receive(Need(seq=5))
    assert refused.value.close is CloseCode.BAD_FRAME


def test_a_lost_command_is_repeated_although_others_flow() -> None:
    """1. command 1 is lost and its resend too. 2. new commands go every 4 s. 3. the stream still goes back after RETRY_MS."""
    session = a_plane(1)
    sent(session, 0)
    again = []
    for step in range(2, 6):
        session.queue(SentCommand(f"d{step}", step, f"env{step}"))
        session.queue(SentCommand(f"s{step}", None, f"stop{step}"))
        again += [env for env in sent(session, (step - 1) * 4_000) if env == "env1"]
        session.receipted(f"s{step}", None)
    assert again == ["env1"]


def test_a_safety_command_goes_until_its_receipt() -> None:
    """Each by its own clock, whatever else is sent."""
    session = a_plane(None)
    assert sent(session, 0) == ["envs0"]
    session.queue(SentCommand("late", None, "late"))
    assert sent(session, 6_000) == ["late"]
    assert sent(session, RETRY_MS) == ["envs0"]
    session.receipted("ds0", None)
    session.receipted("unknown", None)
    assert sent(session, 100_000) == ["late"]


def test_a_receipt_of_a_numbered_command_moves_the_mark() -> None:
    """Only where number and digest agree."""
    session = a_plane(1, 2)
    sent(session, 0)
    session.receipted("other", 2)
    assert session.acked_hw == 0
    session.receipted("d2", 2)
    assert session.acked_hw == 2


def test_the_room_of_the_plane_is_bounded_and_stops_need_none() -> None:
    """Full of numbered commands it still takes and sends a stop."""
    session = a_plane(*range(1, COMMANDS_UNACKED_MAX + 1))
    assert session.room == 0
    session.queue(SentCommand("stop", None, "stop"))
    assert session.room == 0
    assert sent(session, 0)[0] == "stop"
