"""Text frames: every message there and back, and what is refused."""

import json

import pytest

from protocol.errors import CloseCode, Reason, RemoteError
from protocol.ids import GENESIS
from protocol.limits import FETCH_ITEMS_MAX, FRAME_BYTES_MAX, HINTS_MAX, ID_LENGTH_MAX, JSON_INT_MAX
from protocol.messages import (
    Ack,
    Answer,
    Beat,
    Beaten,
    Bye,
    Challenge,
    CommandFrame,
    Enroll,
    Enrolled,
    Fetch,
    FromPlane,
    FromRunner,
    Gap,
    HeldLease,
    Hello,
    Hint,
    LogClosed,
    LogOpen,
    Need,
    Proof,
    Refused,
    Renewal,
    Report,
    Reported,
    Resized,
    Resume,
    Taken,
    Typed,
    Viewers,
    Welcome,
    decode_from_plane,
    decode_from_runner,
    encode,
)
from tests.support.builders import a_nonce, a_root, an_item

FROM_RUNNER: list[FromRunner] = [
    Hello(org="o", runner="r", nonce=a_nonce()),
    Proof(env="{}"),
    Enroll(env="{}"),
    Need(seq=1),
    Fetch(cmd_ids=["cmd_1", "cmd_2"]),
    Refused(digest=GENESIS, reason=Reason.BAD_SIG, detail="why"),
    Report(items=[an_item(1)]),
    Beat(n=1, hw=0, leases=[HeldLease(res="exec:x", token=1)], attempts=["ex_1.1"]),
    Beat(n=2, hw=0, lost=[HeldLease(res="exec:y", token=2)], full=True, admission="draining"),
    LogOpen(channel=0, attempt="ex_1.1", first=0),
    Gap(channel=0, start=0, end=1),
    LogClosed(channel=0, end=1),
    Taken(attempt="ex_1.1", viewer="vw_1", received=3, credit=9, closed=True, reason=Reason.NOT_RUNNING),
    Bye(reason=Reason.GOING_AWAY),
]
FROM_PLANE: list[FromPlane] = [
    Challenge(nonce=a_nonce(), now_ms=1),
    Welcome(env="{}"),
    Enrolled(root=a_root(), keyset="{}", certificate="{}"),
    CommandFrame(env="{}"),
    Reported(answers=[Answer(out_seq=1, stored=False, reason=Reason.BAD_SIG)]),
    Beaten(
        n=1,
        now_ms=1,
        beat_ms=1000,
        leases=[Renewal(res="exec:x", token=1, ttl_ms=1)],
        hints=[Hint(attempt="ex_1.1", want="stop", cmd_id="c")],
        full=True,
    ),
    Resume(channel=0, offset=0, credit=1),
    Ack(channel=0, offset=0, credit=1),
    Typed(attempt="ex_1.1", viewer="vw_1", offset=0, data="bHMK", sig="A" * 86),
    Resized(attempt="ex_1.1", viewer="vw_1", gen=1, rows=24, cols=80, redraw=True, sig="A" * 86),
    Viewers(attempt="ex_1.1", seen=7, viewers=["vw_1", "vw_2"]),
    Bye(reason=Reason.GOING_AWAY),
]


def test_every_message_survives_the_wire() -> None:
    """And each side has exactly the messages of its direction."""
    for said in FROM_RUNNER:
        assert decode_from_runner(encode(said)) == said
    for answer in FROM_PLANE:
        assert decode_from_plane(encode(answer)) == answer


def test_a_message_of_the_other_direction_is_refused() -> None:
    """A peer cannot speak our part."""
    for said in FROM_RUNNER:
        if not isinstance(said, Bye):
            with pytest.raises(RemoteError):
                decode_from_plane(encode(said))
    for answer in FROM_PLANE:
        if not isinstance(answer, Bye):
            with pytest.raises(RemoteError):
                decode_from_runner(encode(answer))


def test_an_unknown_field_is_ignored_and_an_absent_one_is_not_written() -> None:
    """A newer peer may say more."""
    text = encode(Need(seq=1))
    assert decode_from_runner(json.dumps(json.loads(text) | {"new": {"a": []}})) == Need(seq=1)
    assert "cmd_id" not in encode(Refused(digest=GENESIS, reason=Reason.BAD_SIG))


def test_a_peer_of_the_first_version_says_less() -> None:
    """Its hello is for a session, its beat is no full list and has lost nothing, and new work is taken."""
    hello = decode_from_runner(json.dumps({"t": "hello", "org": "o", "runner": "r", "nonce": a_nonce()}))
    assert isinstance(hello, Hello) and hello.purpose == "session"
    beat = decode_from_runner('{"t":"beat","n":1,"hw":0}')
    assert isinstance(beat, Beat) and (beat.full, beat.lost, beat.admission) == (False, [], "open")
    beaten = decode_from_plane('{"t":"beaten","n":1,"now_ms":1,"beat_ms":1000}')
    assert isinstance(beaten, Beaten) and not beaten.full


def test_the_largest_fetch_and_the_most_hints_fit_a_frame() -> None:
    """With the longest names there are."""
    name = "e" * ID_LENGTH_MAX
    fetch = Fetch(cmd_ids=[name] * FETCH_ITEMS_MAX)
    hints = [Hint(attempt=f"{name}.{JSON_INT_MAX}", want="running", cmd_id=name)] * HINTS_MAX
    beaten = Beaten(n=JSON_INT_MAX, now_ms=JSON_INT_MAX, beat_ms=1000, hints=hints, full=True)
    for message in (fetch, beaten):
        assert len(encode(message).encode()) <= FRAME_BYTES_MAX


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"t":"unknown"}',
        '{"t":1}',
        '{"t":"need"}',
        '{"t":"need","seq":0}',
        '{"t":"need","seq":1.0}',
        '{"t":"need","seq":true}',
        '{"t":"need","seq":"1"}',
        '{"t":"need","seq":1,"seq":2}',
        '{"t":"need","seq":9007199254740992}',
        '{"t":"bye","reason":"MADE_UP"}',
        '{"t":"report","items":[]}',
        '{"t":"beat","n":1,"hw":0,"attempts":["../x.1"]}',
        '{"t":"need","seq":1,"x":"\ud800"}',
    ],
)
def test_a_frame_that_is_no_message_is_refused(text: str) -> None:
    """With one reason and one close code."""
    with pytest.raises(RemoteError) as refused:
        decode_from_runner(text)
    assert refused.value.reason is Reason.BAD_FRAME
    assert refused.value.close is CloseCode.BAD_FRAME


def test_a_refusal_shows_nothing_of_the_frame() -> None:
    """Not even the tag, which the parser would quote."""
    for text in (
        '{"t":"\\u001b[31mhunter2"}',
        '{"t":"need","seq":"hunter2"}',
        '{"t":"need","seq":1,"hunter2\ud800":1}',
        '{"t":"report","items":[{"hunter2":1}]}',
    ):
        with pytest.raises(RemoteError) as refused:
            decode_from_runner(text)
        assert "hunter2" not in str(refused.value)
        assert "\x1b" not in str(refused.value)
