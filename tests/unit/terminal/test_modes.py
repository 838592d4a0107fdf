"""Modes: told by a marker, followed from there, set again."""

import json

import pytest

from terminal.modes import MODES_MAX, Modes


def modes_of(data: bytes) -> Modes:
    """What some output has set."""
    modes = Modes()
    modes.feed(data)
    return modes


@pytest.mark.parametrize(
    ("data", "changed"),
    [
        (b"\x1b[?25l\x1b[?25h", {}),
        (b"\x1b[?7l", {7: False}),
        (b"\x1b[?1000;1006h", {1000: True, 1006: True}),
        (b"\x1b[?1048h", {}),
        (b"\x1b[?2004h\x1b[?1h\x1b[!p", {2004: True}),
        (b"\x1b[?2004h\x1bc", {}),
        (b"\x1b[4h", {}),
        (b"\x1b]0;\x1b[?1h", {1: True}),
    ],
)
def test_what_differs_from_a_reset_terminal_is_kept(data: bytes, changed: dict[int, bool]) -> None:
    """Set, reset, soft and full reset; saving the cursor and modes that are not private are none."""
    assert modes_of(data).changed == changed


def test_they_are_set_with_the_screen_first_and_the_cursor_last() -> None:
    """A screen that is entered later would hide what was set, and a cursor that is shown early flickers."""
    said = modes_of(b"\x1b[?25l\x1b=\x1b[?2004h\x1b[?1049h").setting()
    assert said == b"\x1b[?1049h\x1b[?2004h\x1b=\x1b[?25l"


def test_the_latest_way_of_the_mouse_counts() -> None:
    """They exclude each other, so they are set again in the order in which they were set."""
    assert modes_of(b"\x1b[?1003h\x1b[?1000h").setting() == b"\x1b[?1003h\x1b[?1000h"


def test_a_marker_says_what_holds() -> None:
    """As the shim writes it."""
    modes = Modes.from_marker(json.dumps({"modes": {"1049": True, "25": False}, "keypad": True}).encode())
    assert (modes.changed, modes.keypad, modes.alternate) == ({1049: True, 25: False}, True, True)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 3000,
        b'{"modes":[1]}',
        b'{"modes":{"x":true,"-1":true,"1":1},"keypad":1}',
        b" " * 5000,
    ],
)
def test_what_is_no_marker_says_nothing(payload: bytes) -> None:
    """It stands in a file that the child's user owns."""
    modes = Modes.from_marker(payload)
    assert (modes.changed, modes.keypad) == ({}, False)


def test_there_are_so_many_and_no_more() -> None:
    """Who sets more is playing; those that are known still change."""
    modes = modes_of(b"".join(b"\x1b[?%dh" % mode for mode in range(3000, 3500)))
    assert len(modes.changed) == MODES_MAX
    modes.feed(b"\x1b[?3000l")
    assert 3000 not in modes.changed
