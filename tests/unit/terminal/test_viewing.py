"""What a viewer makes of what it hears, where order and offsets do not say it all."""

from protocol.limits import TYPED_BYTES_MAX
from terminal.emulator import Emulator
from terminal.viewing import Begun, Finish, Live, Output, Resizing, Seen, Show, Sized, Taken, Typing, Viewing


def live(attach: str = "replay", *, writes: bool = True, shown: bytes = b"") -> tuple[Viewing, list[object]]:
    """A viewer whose replay is through, and what it did then."""
    viewing = Viewing(attach, 24, 80, gen=1)
    viewing.begin()
    viewing.hear(Begun("ex_1.1", writes, 0, 0))
    viewing.hear(Output(10, shown))
    return viewing, list(viewing.hear(Live(10)))


def test_who_carries_it_may_have_forgotten_what_was_taken() -> None:
    """A control plane that was restarted says 0: what was taken stays taken."""
    viewing, _ = live()
    viewing.typed(b"abc")
    viewing.hear(Taken(2, 1000))
    viewing.begin()
    viewing.hear(Begun("ex_1.1", True, 10, 0))
    assert viewing.hear(Live(10))[1:] == [Typing(2, b"c")]


def test_another_attempt_takes_nothing_that_was_taken_before() -> None:
    """Its count begins anew; what nobody took goes there."""
    viewing, _ = live()
    viewing.typed(b"abc")
    viewing.hear(Taken(2, 1000))
    viewing.begin()
    viewing.hear(Begun("ex_1.2", True, 10, 0))
    assert viewing.hear(Live(10))[1:] == [Typing(0, b"c")]


def test_the_program_draws_anew_on_the_alternate_screen_or_when_asked_for() -> None:
    """And not for one who comes back to where they were."""
    assert live()[1] == [Resizing(2, 24, 80, False), Seen(10)]
    assert live("redraw")[1] == [Resizing(2, 24, 80, True), Seen(10)]
    assert live("snapshot", shown=b"\x1b[?1049h")[1] == [Resizing(2, 24, 80, False), Seen(10)]
    viewing, first = live(shown=b"\x1b[?1049h")
    assert first == [Resizing(2, 24, 80, True), Seen(10)]
    assert viewing.begin().offset == 10
    viewing.hear(Begun("ex_1.1", True, 10, 0))
    assert viewing.hear(Live(10)) == [Resizing(3, 24, 80, False)]


def test_one_that_may_only_look_on_says_how_far_and_nothing_else() -> None:
    """Neither its size nor what it types."""
    viewing, first = live(writes=False)
    assert first == [Seen(10)]
    assert viewing.typed(b"x") == [] and viewing.resized(30, 90) == []
    assert viewing.unanswered == 0


def test_what_is_shown_is_told_every_so_often() -> None:
    """Behind the bytes that it is about."""
    viewing, _ = live()
    assert viewing.hear(Output(65_545, b"x")) == [Show(b"x")]
    assert viewing.hear(Output(65_546, b"y")) == [Show(b"y"), Seen(65_546)]


def test_what_will_never_be_taken_is_the_end() -> None:
    """A signature that does not fit will not fit the next time either; an end of the PTY is none of this."""
    viewing, _ = live()
    viewing.typed(b"abc")
    assert viewing.hear(Taken(0, 10, reason="BAD_SIG")) == [Finish(255, "nothing is taken from this viewer: BAD_SIG")]
    assert viewing.hear(Taken(0, 10, closed=True)) == [] and viewing.unanswered == 0


def test_a_paste_goes_as_far_as_there_is_room() -> None:
    """In pieces, and the rest when some is taken."""
    viewing, _ = live()
    paste = bytes(3 * TYPED_BYTES_MAX)
    assert viewing.typed(paste) == [Typing(0, paste[:TYPED_BYTES_MAX])]
    more = viewing.hear(Taken(TYPED_BYTES_MAX, TYPED_BYTES_MAX + 5))
    assert more == [Typing(TYPED_BYTES_MAX, bytes(5))]


def test_a_new_size_of_the_pty_frees_the_region_that_scrolls() -> None:
    """Programs count on it: a terminal that is really resized does so itself. The cursor stays."""
    viewing, _ = live()
    screen = Emulator(4, 10)
    screen.feed(b"\x1b[1;2r\x1b[2;3H")
    for effect in viewing.hear(Sized()):
        assert isinstance(effect, Show)
        screen.feed(effect.data)
    assert screen.cursor == (1, 2)
    screen.feed(b"a\r\nb\r\nc")
    assert [line.rstrip() for line in screen.lines] == ["", "  a", "b", "c"]
