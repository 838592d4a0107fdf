"""What is held of a viewer's typing, what opens a connection, and which frames are taken: without a socket."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.errors import RequestRefused
from controlplane.limits import (
    PTY_HELD_BYTES,
    PTY_HELD_PIECES,
    PTY_PIECES_IN_FLIGHT,
    TICKET_TTL_MS,
    TICKETS_MAX,
)
from controlplane.ptymessages import decode_from_viewer, decode_output, encode_output
from controlplane.ptysocket import own_origins
from controlplane.ptytyping import Typing
from controlplane.tickets import Tickets
from protocol.commands import ViewerMode
from protocol.errors import Reason, RemoteError
from protocol.ids import Attempt, ExecutionId, FencingToken
from protocol.limits import TYPED_BYTES_MAX
from protocol.messages import Taken, Typed

ATTEMPT = Attempt(ExecutionId("ex_1"), FencingToken(1))
ROOM = 1 << 40


def piece(offset: int) -> Typed:
    """Typed at an offset; its bytes do not matter here."""
    return Typed(attempt=ATTEMPT.name, viewer="v", offset=offset, data="YQ==", sig="s" * 86)


def taken(received: int, credit: int = ROOM, reason: Reason | None = None, *, closed: bool = False) -> Taken:
    """An answer."""
    return Taken(attempt=ATTEMPT.name, viewer="v", received=received, credit=credit, reason=reason, closed=closed)


def offsets(typing: Typing) -> list[int]:
    """Where the pieces begin that are to be sent now."""
    return [each.offset for each in typing.due()]


def test_a_piece_is_sent_once_and_dropped_when_it_is_taken() -> None:
    """Nothing is due twice; what was taken is held no more."""
    typing = Typing()
    assert typing.add(piece(0), 3)
    assert typing.add(piece(3), 2)
    assert offsets(typing) == [0, 3]
    assert offsets(typing) == []
    typing.answered(taken(3))
    assert (len(typing), offsets(typing)) == (1, [])
    typing.answered(taken(5))
    assert (len(typing), offsets(typing)) == (0, [])


def test_what_had_no_room_goes_again_once_there_is_some() -> None:
    """Not at each answer: when all are in and the runner tells of room without a reason against it."""
    typing = Typing()
    for at in range(3):
        typing.add(piece(at * 10), 10)
    assert offsets(typing) == [0, 10, 20]
    typing.answered(taken(10, 10))
    typing.answered(taken(10, 10, Reason.OUT_OF_ORDER))
    typing.answered(taken(10, 10, Reason.OUT_OF_ORDER))
    assert offsets(typing) == []
    typing.answered(taken(10, 25))
    assert offsets(typing) == [10]


def test_a_new_session_gets_all_that_has_no_answer() -> None:
    """In order, from the first that was not taken."""
    typing = Typing()
    for at in range(3):
        typing.add(piece(at), 1)
    assert offsets(typing) == [0, 1, 2]
    typing.answered(taken(1))
    typing.again()
    assert offsets(typing) == [1, 2]


def test_what_a_viewer_says_again_takes_the_place_of_what_it_said() -> None:
    """A piece from an earlier offset on: what was held behind it is said anew."""
    typing = Typing()
    for at in range(3):
        typing.add(piece(at), 1)
    assert offsets(typing) == [0, 1, 2]
    typing.add(piece(1), 5)
    assert (len(typing), offsets(typing)) == (2, [1])


@pytest.mark.parametrize("answer", [taken(0, closed=True), taken(0, reason=Reason.BAD_SIG)])
def test_what_will_never_be_taken_is_not_held(answer: Taken) -> None:
    """The PTY has ended, or the piece is not signed by its viewer."""
    typing = Typing()
    typing.add(piece(0), 1)
    assert offsets(typing) == [0]
    typing.answered(answer)
    typing.again()
    assert (len(typing), offsets(typing)) == (0, [])


def test_what_is_held_and_under_way_is_bounded() -> None:
    """In bytes and in pieces; a piece beyond is not taken, and one that fits later is."""
    small, large = Typing(), Typing()
    assert [small.add(piece(at), 1) for at in range(PTY_HELD_PIECES + 1)] == [True] * PTY_HELD_PIECES + [False]
    assert len(offsets(small)) == PTY_PIECES_IN_FLIGHT
    many = PTY_HELD_BYTES // TYPED_BYTES_MAX
    size = TYPED_BYTES_MAX
    assert [large.add(piece(at * size), size) for at in range(many + 1)] == [True] * many + [False]
    assert offsets(large)
    large.answered(taken(size))
    assert large.add(piece(many * size), size)


@given(st.lists(st.tuples(st.sampled_from("tarx"), st.integers(0, 40)), max_size=60))
def test_whatever_happens_each_byte_is_taken_in_order(events: list[tuple[str, int]]) -> None:
    """A shim that takes what is next and nothing else, over sessions that break and lose answers, ends with all of it."""
    typing, typed, received = Typing(), 0, 0
    sizes: dict[int, int] = {}

    def carry(lossy: bool) -> None:
        nonlocal received
        for each in list(typing.due()):
            size = sizes[each.offset]
            if each.offset <= received < each.offset + size:
                received = each.offset + size
            if not lossy:
                typing.answered(taken(received))

    for event, number in events:
        if event == "t":
            sizes[typed] = number + 1
            if typing.add(piece(typed), number + 1):
                typed += number + 1
        elif event == "a":
            carry(lossy=False)
        elif event == "r":
            typing.again()
        else:
            carry(lossy=True)
    for _ in range(len(events) + 1):
        typing.again()
        carry(lossy=False)
    assert (received, len(typing)) == (typed, 0)


def test_a_ticket_is_good_once_and_for_a_while() -> None:
    """The second use is none; nor is one behind its time; no more than so many are out."""
    now = [0]
    numbers = iter(range(TICKETS_MAX + 10))
    tickets = Tickets(lambda: now[0], lambda size: next(numbers).to_bytes(size, "big"))
    secret = tickets.issue(ATTEMPT, "v", ViewerMode.READ)
    found = tickets.redeem(secret)
    assert found is not None
    assert (found.attempt, found.viewer, found.mode) == (ATTEMPT, "v", ViewerMode.READ)
    assert tickets.redeem(secret) is None
    late = tickets.issue(ATTEMPT, "v", ViewerMode.READ)
    now[0] = TICKET_TTL_MS
    assert tickets.redeem(late) is None
    for _ in range(TICKETS_MAX):
        tickets.issue(ATTEMPT, "v", ViewerMode.READ)
    with pytest.raises(RequestRefused):
        tickets.issue(ATTEMPT, "v", ViewerMode.READ)
    now[0] *= 2
    assert tickets.redeem(tickets.issue(ATTEMPT, "v", ViewerMode.READ))


@pytest.mark.parametrize(
    ("host", "port", "origin", "ours"),
    [
        ("127.0.0.1", 7410, "http://localhost:7410", True),
        ("localhost", 80, "http://localhost", True),
        ("[::1]", 7410, "http://[::1]:7410", True),
        ("box", 7410, "http://box:7410", True),
        ("box", 7410, "http://localhost:7410", False),
        ("127.0.0.1", 7410, "https://127.0.0.1:7410", False),
        ("127.0.0.1", 7410, "http://127.0.0.1", False),
    ],
)
def test_our_own_origin_is_where_we_are_served(host: str, port: int, origin: str, ours: bool) -> None:
    """To the letter, as a browser writes it; a loopback address has three names."""
    assert (origin in own_origins(host, port)) == ours


@given(st.text(max_size=200))
def test_any_text_is_a_frame_or_refused(text: str) -> None:
    """By the one error that ends its connection with a reason."""
    with suppress(RemoteError):
        decode_from_viewer(text)


@given(st.integers(0, 2**63), st.binary(max_size=100))
def test_output_comes_with_its_offset(offset: int, data: bytes) -> None:
    """Both come back; a frame too short for one is none."""
    assert decode_output(encode_output(offset, data)) == (offset, data)
    with pytest.raises(RemoteError):
        decode_output(b"\0" * 7)
