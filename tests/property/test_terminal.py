"""What a shim keeps of a terminal: typing by offset, sizes, and the modes its output has set, however all of it is cut."""

from __future__ import annotations

import itertools
import os
import tty

from hypothesis import given, settings
from hypothesis import strategies as st

from runner.shim import modes, terminal
from runner.shim.spec import Tty

VIEWERS = [b"vw_1", b"vw_2", b"vw_3"]
PIECES = st.sampled_from(
    [
        b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25l", b"\x1b[?25h", b"\x1b[?1;2004h", b"\x1b[?2004l", b"\x1b[?7l", b"\x1b=",
        b"\x1b>", b"\x1bc", b"\x1b[!p", b"\x1b[31m", b"text\r\n", b"\x1b", b"\x1b[", b"\x1b[?", b"\x1b[?99999999999h", b"\x1b[?1;",
        b"\x1b]0;title\x07", b"\x1b[!", b"\x1b[?6h\x1b[?66h", b"\x1b[?1048h", "日本🚀".encode(),
    ]
)  # fmt: skip


def all_of(pieces: list[bytes]) -> modes.Modes:
    """The modes after these pieces."""
    told = modes.Modes()
    for piece in pieces:
        told.feed(piece)
    return told


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=12), st.lists(st.integers(0, 200), max_size=8))
def test_modes_are_the_same_however_the_output_is_cut(pieces: list[bytes], cuts: list[int]) -> None:
    """At any byte, also inside a sequence."""
    text = b"".join(pieces)
    places = sorted({min(cut, len(text)) for cut in [0, *cuts, len(text)]})
    parts = [text[start:end] for start, end in itertools.pairwise(places)]
    assert (
        all_of(parts).told() == all_of([text]).told() == all_of([text[at : at + 1] for at in range(len(text))]).told()
    )


def test_modes_are_those_that_differ_from_a_fresh_terminal() -> None:
    """What was set and reset again is not told; what was never a state, neither."""
    assert all_of([]).told() == {"modes": {}, "keypad": False}
    assert all_of([b"\x1b[?1049;2004h\x1b[?25l\x1b="]).told() == {
        "modes": {"1049": True, "2004": True, "25": False},
        "keypad": True,
    }
    assert all_of([b"\x1b[?1049h\x1b[?1049l\x1b[?25l\x1b[?25h\x1b[?1048h"]).told() == {"modes": {}, "keypad": False}
    assert all_of([b"\x1b[?1;1000;2004h\x1b[?25l\x1b[!p"]).told()["modes"] == {"1000": True, "2004": True}
    assert all_of([b"\x1b[?1;1000;2004h\x1bc"]).told()["modes"] == {}


def test_modes_have_a_bound() -> None:
    """A program that plays with them costs no memory."""
    told = all_of([b"\x1b[?%dh" % number for number in range(1000, 3000)])
    assert len(told.changed) == modes.MODES_MAX


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(st.sampled_from(VIEWERS), st.integers(-40, 20), st.binary(max_size=60), st.booleans()), max_size=40
    )
)
def test_each_byte_of_each_viewer_is_typed_once_and_in_order(steps: list[tuple[bytes, int, bytes, bool]]) -> None:
    """Sent again, early, overlapping, by several at once; the terminal is read now and then."""
    master, slave = os.openpty()
    tty.setraw(slave)
    os.set_blocking(master, False)
    os.set_blocking(slave, False)
    held = terminal.Terminal(master, Tty(24, 80, "latest", False))
    said = {viewer: bytes([number]) * 4000 for number, viewer in enumerate(VIEWERS, 65)}
    taken = dict.fromkeys(VIEWERS, 0)
    typed = b""
    try:
        for viewer, shift, data, drain in steps:
            offset = max(0, taken[viewer] + shift)
            piece = said[viewer][offset : offset + len(data)]
            held.take(viewer, offset, piece)
            if offset <= taken[viewer]:
                fresh = piece[taken[viewer] - offset :]
                typed += fresh
                taken[viewer] += len(fresh)
            assert held.counted(viewer)[0] == taken[viewer]
            if drain:
                held.write()
        held.write()
        read = b""
        while len(read) < len(typed):
            read += os.read(slave, 65_536)
        assert read == typed
    finally:
        held.close()
        os.close(slave)


@settings(max_examples=100)
@given(
    st.sampled_from(["latest", "smallest", "fixed"]),
    st.lists(
        st.tuples(st.sampled_from(VIEWERS), st.integers(1, 9), st.integers(1, 50), st.integers(1, 50), st.booleans()),
        max_size=30,
    ),
)
def test_the_size_is_what_its_policy_says_of_those_who_look(
    policy: str, steps: list[tuple[bytes, int, int, int, bool]]
) -> None:
    """Against the plain reading: a list of who is there with the newest size of each."""
    master, slave = os.openpty()
    held = terminal.Terminal(master, Tty(24, 80, policy, False))
    newest: dict[bytes, tuple[int, int, int]] = {}
    there: list[bytes] = []
    size = (24, 80)
    try:
        for viewer, gen, rows, cols, leaves in steps:
            if leaves:
                held.leave(viewer)
                there = [each for each in there if each != viewer]
            elif held.resize(viewer, gen, rows, cols) or gen > newest.get(viewer, (0, 0, 0))[0]:
                newest[viewer] = (gen, rows, cols)
                there = [*(each for each in there if each != viewer), viewer]
            if there and policy == "latest":
                size = newest[there[-1]][1:]
            elif there and policy == "smallest":
                size = (min(newest[each][1] for each in there), min(newest[each][2] for each in there))
            assert (held.rows, held.cols) == size
            if size != (24, 80):
                assert tuple(os.get_terminal_size(slave)) == size[::-1]
    finally:
        held.close()
        os.close(slave)


def test_nobody_counts_beyond_the_bound_of_viewers() -> None:
    """A viewer more is not taken; those that are known still are."""
    master, slave = os.openpty()
    held = terminal.Terminal(master, Tty(24, 80, "latest", False))
    try:
        for number in range(terminal.VIEWERS_MAX + 1):
            held.take(b"vw_%d" % number, 0, b"x")
        assert held.counted(b"vw_%d" % terminal.VIEWERS_MAX)[0] == 0
        held.take(b"vw_0", 1, b"y")
        assert held.counted(b"vw_0")[0] == 2
    finally:
        held.close()
        os.close(slave)


def test_who_is_ahead_waits_until_somebody_followed() -> None:
    """By the foremost of those that may type; without one nobody waits."""
    end = 10 * terminal.AHEAD_BYTES
    assert not terminal.ahead(end, [], held=True)
    assert terminal.ahead(end, [0, end - terminal.AHEAD_BYTES - 1], held=False)
    assert not terminal.ahead(end, [0, end - terminal.AHEAD_BYTES], held=False)
    assert terminal.ahead(end, [end - terminal.AHEAD_BYTES], held=True)
    assert not terminal.ahead(end, [end - terminal.AHEAD_BYTES_MIN], held=True)
