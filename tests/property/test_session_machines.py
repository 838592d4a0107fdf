"""Both session machines, told anything in any order: they keep their bounds, forget nothing that waits, and repeat no answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.errors import Reason, RemoteError
from protocol.limits import COMMANDS_UNACKED_MAX, REPORT_ITEMS_MAX, REPORTS_IN_FLIGHT_MAX, RETRY_MS
from protocol.messages import Answer, Beat, Beaten, Need, Reported
from protocol.session import OUTBOX_ROOM, BeatAnswered, ItemsAnswered, PlaneSession, RunnerSession, SentCommand
from tests.support.builders import an_item

pytestmark = pytest.mark.slow

NUMBERS = st.integers(0, 6)
"""Few, so that one number is met by many words."""
MOMENTS = st.sampled_from([0, 1, RETRY_MS // 2, RETRY_MS])
RUNNER_STEP = (
    st.tuples(st.just("feed"), st.sampled_from([1, 1, 2, 80]))
    | st.tuples(st.just("send"), MOMENTS)
    | st.tuples(st.sampled_from(["answer", "again", "beat", "beaten"]), NUMBERS)
)
PLANE_STEP = (
    st.tuples(st.sampled_from(["queue", "stop"]), st.integers(1, 5))
    | st.tuples(st.just("send"), MOMENTS)
    | st.tuples(st.sampled_from(["need", "beat", "receipt", "stopped"]), NUMBERS)
)


@settings(max_examples=300)
@given(st.lists(RUNNER_STEP, min_size=10, max_size=40))
def test_a_runner_tells_each_item_until_its_one_answer(steps: list[tuple[str, int]]) -> None:
    """Whatever is answered, doubled or asked for: nothing is lost, nothing is answered twice, nothing grows past its bound."""
    session, now_ms, fed, beats = RunnerSession(0, 10_000), 0, 0, 0
    answered: set[int] = set()
    again: set[int] = set()
    report_of: dict[int, str] = {}
    for step, number in steps:
        match step:
            case "feed":
                count = min(number, session.room)
                session.feed([an_item(at) for at in range(fed + 1, fed + count + 1)])
                fed += count
            case "send":
                now_ms += number
                reports = session.outgoing(now_ms)
                for report in reports:
                    report_of |= {item.out_seq: f"{now_ms} {report.items[0].out_seq}" for item in report.items}
                    assert 0 < len(report.items) <= REPORT_ITEMS_MAX
                    assert not ({item.out_seq for item in report.items} & answered - again)
            case "answer":
                told = session.receive(Reported(answers=[Answer(out_seq=number + 1, stored=True)] * 2))
                if told is not None:
                    assert isinstance(told, ItemsAnswered)
                    assert [answer.out_seq for answer in told.answers] == [number + 1] and number < fed
                    assert number + 1 not in answered - again
                    again.discard(number + 1)
                    answered.add(number + 1)
                    report_of.pop(number + 1, None)
            case "again":
                if number + 1 in answered and session.room > 0:
                    session.again([an_item(number + 1)])
                    again.add(number + 1)
            case "beat":
                beats += 1
                assert session.beat(now_ms, number).n == beats
            case _:
                heard = session.receive(Beaten(n=number + 1, now_ms=0, beat_ms=10_000))
                assert heard is None or (isinstance(heard, BeatAnswered) and number < beats)
        assert 0 <= session.room <= OUTBOX_ROOM and len(set(report_of.values())) <= REPORTS_IN_FLIGHT_MAX
    told_at_last: set[int] = set()
    for _ in range(fed + 1):
        now_ms += RETRY_MS
        for report in session.outgoing(now_ms):
            told_at_last |= {item.out_seq for item in report.items}
            session.receive(Reported(answers=[Answer(out_seq=item.out_seq, stored=True) for item in report.items]))
    assert told_at_last == (set(range(1, fed + 1)) - answered) | again
    assert not session.waiting and session.room == OUTBOX_ROOM


@settings(max_examples=300)
@given(st.lists(PLANE_STEP, max_size=40))
def test_a_plane_sends_each_command_until_it_is_consumed(steps: list[tuple[str, int]]) -> None:
    """Whatever the runner says: in order, none below the mark, none for ever; only a number from the future ends it."""
    session, now_ms, signed, sent, stops = PlaneSession(0), 0, 0, 0, 0
    stopping: set[str] = set()
    for step, number in steps:
        before = session.acked_hw
        match step:
            case "queue":
                for _ in range(min(number, session.room)):
                    signed += 1
                    session.queue(SentCommand(f"ctl {signed}", signed, f"{signed:04}"))
            case "stop":
                stops += 1
                stopping.add(f"stop {stops}")
                session.queue(SentCommand(f"stop {stops}", None, f"stop {stops}"))
            case "send":
                now_ms += number
                frames = [frame.env for frame in session.outgoing(now_ms)]
                numbers = [int(env) for env in frames if env.isdigit()]
                assert numbers == [*range(numbers[0], numbers[-1] + 1)] if numbers else True
                assert all(number > session.acked_hw for number in numbers)
                assert {env for env in frames if not env.isdigit()} <= stopping
                sent = max([sent, *numbers])
            case "need":
                try:
                    session.receive(Need(seq=number + 1))
                except RemoteError as exc:
                    assert (exc.reason, number >= max(sent, before) + 1) == (Reason.SEQ_GAP, True)  # noqa: PT017
            case "beat":
                session.receive(Beat(n=1, hw=min(number, sent)))
            case "receipt":
                session.receipted(f"ctl {number}", number)
                sent = max(sent, session.acked_hw)
            case _:
                session.receipted(f"stop {number}", None)
                stopping.discard(f"stop {number}")
        assert before <= session.acked_hw <= max(signed, before) and 0 <= session.room <= COMMANDS_UNACKED_MAX
    frames = [frame.env for frame in session.outgoing(now_ms + RETRY_MS)]
    assert {int(env) for env in frames if env.isdigit()} == set(range(session.acked_hw + 1, signed + 1))
    assert {env for env in frames if not env.isdigit()} == stopping
    session.consumed(signed)
    for stop in stopping:
        session.receipted(stop, None)
    assert session.outgoing(now_ms + 9 * RETRY_MS) == []
