"""Output of a terminal, cut anywhere: modes, queries, cuts and snapshots are the same however it comes, and nothing makes them fail."""

from hypothesis import example, given
from hypothesis import strategies as st

from runner.shim.modes import Modes as ShimModes
from terminal.emulator import Emulator
from terminal.escapes import Act, Escapes
from terminal.modes import Modes
from terminal.queries import Stripper
from terminal.replay import output_of, plan
from terminal.sequences import unfinished, whole_from
from tests.support.recordings import as_log

QUERIES = (
    b"\x05", b"\x1bZ", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[?996n", b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[>0c", b"\x1b[=c",
    b"\x1b[?2026$p", b"\x1b[4$p", b"\x1b[>q", b"\x1b[>0q", b"\x1b[14t", b"\x1b[16t", b"\x1b[18t", b"\x1b[?u", b"\x1b[?4m", b"\x1b[0x",
    b"\x1b]11;?\x07", b"\x1b]10;?\x1b\\", b"\x1b]12;?\x07", b"\x1b]4;1;?;2;?\x07", b"\x1b]52;c;?\x07", b"\x1bP$qm\x1b\\",
    b"\x1bP+q544e\x1b\\", b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\", b"\x1b]1337;ReportCellSize\x07",
)  # fmt: skip
OTHERS = (
    b"hi", "\u00e4\u6f22".encode(), b"\r\n", b"\t", b"\x1b[31m", b"\x1b[38:2::1:2:3m", b"\x1b[?25l", b"\x1b[?25h", b"\x1b[?1049h",
    b"\x1b[?1049l", b"\x1b[?2004;1006h", b"\x1b[?1000l", b"\x1b=", b"\x1b>", b"\x1b[!p", b"\x1bc", b"\x1b]0;t?\x07",
    b"\x1b]8;;http://x/?a\x1b\\", b"\x1b]52;c;AAAA\x07", b"\x1b]4;1;rgb:0/0/0\x07", b"\x1b[>4;2m", b"\x1b[22;0t", b"\x1b[2 q", b"\x1b[>1u",
    b"\x1b[<u", b"\x1bPq#0\n\x1b\\", b"\x1b[1;5r", b"\x1b_Ga=T;AAA\x1b\\", b"\x1b(0", b"\x1b(B", b"\x1b[3S", b"\x1b[2J", b"\x1b[H",
    b"\x1b[H\x1b[2J", b"\x1b[5;5H", b"\x1b7", b"\x1b8",
)  # fmt: skip
FRAGMENTS = (
    b"\x1b", b"[", b"]", b"P", b"_G", b"?", b"6", b"n", b"\x07", b"\\", b"11;", b"$q", b"\x18", b"\x05", b"c", b"a=q", b";", b"m", b"3",
    b"1049", b"25", b"h", b"l", b"!p", b"=", b"\n", b"\xc3", b"\xa4", b"J", b"H", b"2",
)  # fmt: skip
NOISE = st.one_of(
    st.lists(st.sampled_from(QUERIES + OTHERS), max_size=12).map(b"".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=14).map(b"".join),
    st.lists(st.one_of(st.sampled_from(OTHERS), st.binary(max_size=4)), max_size=10).map(b"".join),
)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=40)


def cut(data: bytes, lengths: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    pieces, at, turn = [], 0, 0
    while at < len(data):
        length = lengths[turn % len(lengths)]
        pieces.append(data[at : at + length])
        at, turn = at + length, turn + 1
    return pieces


def stripped(pieces: list[bytes]) -> bytes:
    """What is left of them."""
    stripper = Stripper()
    return b"".join(stripper.feed(piece) for piece in pieces) + stripper.flush()


@given(st.lists(st.sampled_from(QUERIES + OTHERS + OTHERS), max_size=12), LENGTHS)
def test_queries_are_taken_out_and_nothing_else_is(parts: list[bytes], lengths: list[int]) -> None:
    """Whole sequences in any order, cut anywhere: the queries are gone, every other byte is there."""
    left = b"".join(part for part in parts if part in OTHERS)
    assert stripped([b"".join(parts)]) == left
    assert stripped(cut(b"".join(parts), lengths)) == left


@example(b"\x1b[6\x1b[5nn", [1])
@example(b"\x1b[3\x1b[6n1m", [2])
@given(NOISE, LENGTHS)
def test_where_output_is_cut_changes_nothing_of_what_is_left_of_it(data: bytes, lengths: list[int]) -> None:
    """Also of what is broken; and nothing that was taken out makes a query of what is left."""
    left = stripped([data])
    assert stripped(cut(data, lengths)) == left
    assert stripped([left]) == left


@given(NOISE, LENGTHS)
def test_modes_are_the_same_however_output_is_cut_and_as_the_shim_follows_them(data: bytes, lengths: list[int]) -> None:
    """Three that follow the same output agree."""
    whole, pieces, shim = Modes(), Modes(), ShimModes()
    whole.feed(data)
    shim.feed(data)
    for piece in cut(data, lengths):
        pieces.feed(piece)
    assert (whole.changed, whole.keypad) == (pieces.changed, pieces.keypad) == (shim.changed, shim.keypad)


@given(NOISE)
def test_modes_that_are_set_anew_are_the_modes_and_undone_they_are_none(data: bytes) -> None:
    """`setting` makes a fresh terminal have them; `undoing` makes it fresh."""
    modes, again = Modes(), Modes()
    modes.feed(data)
    again.feed(modes.setting())
    assert (again.changed, again.keypad) == (modes.changed, modes.keypad)
    again.feed(modes.undoing())
    assert (again.changed, again.keypad) == ({}, False)


@given(NOISE, st.integers(0, 60))
def test_a_place_between_sequences_is_within_none(data: bytes, at: int) -> None:
    """What `whole_from` finds is at or behind where it was asked for, and no character or sequence goes across it."""
    at = min(at, len(data))
    found = whole_from(data, at)
    assert at <= found <= len(data)
    assert found == len(data) or (not unfinished(data, found) and data[found] & 0xC0 != 0x80)


@given(NOISE, st.integers(0, 2**16), st.floats(0, 1))
def test_a_replay_begins_between_characters_and_ends_on_the_right_screen(data: bytes, seed: int, part: float) -> None:
    """Whatever was written, and wherever the log ends for now."""
    log = as_log(data, seed)
    end = log[int(part * (len(log) - 1))].end
    before = b"".join(output_of(record, 0, end) for record in log)
    begun = plan(log, end=end)
    rest = b"".join(output_of(record, begun.cut, end) for record in log)
    assert before.endswith(rest)
    at = len(before) - len(rest)
    assert not unfinished(before, at) or not rest
    assert not rest or rest[0] & 0xC0 != 0x80 or at == 0
    modes, again = Modes(), Modes()
    modes.feed(before)
    again.feed(begun.preamble + rest)
    assert (again.changed, again.keypad) == (modes.changed, modes.keypad)
    assert begun.alternate == modes.alternate


@given(NOISE, LENGTHS)
def test_an_emulator_takes_anything(data: bytes, lengths: list[int]) -> None:
    """What it draws, another one draws again."""
    emulator, again = Emulator(6, 20), Emulator(6, 20)
    for piece in cut(data, lengths):
        emulator.feed(piece)
    again.feed(emulator.draw())
    assert again.lines == emulator.lines


@given(
    st.lists(st.sampled_from([b"a", b"~", b".", b"?", b"\r", b"\n", b"~~", b"\x1a"]), max_size=12).map(b"".join),
    LENGTHS,
)
def test_what_is_typed_to_the_viewer_is_found_however_keys_come(data: bytes, lengths: list[int]) -> None:
    """The same bytes pass and the same acts come out; without a `~` everything passes."""
    one, many = Escapes(), Escapes()
    whole = [*one.feed(data), one.flush()]
    pieces = [found for piece in cut(data, lengths) for found in many.feed(piece)] + [many.flush()]
    assert _joined(whole) == _joined(pieces)
    if b"~" not in data:
        assert _joined(whole) == ([data] if data else [])


def _joined(found: list[bytes | Act]) -> list[bytes | Act]:
    joined: list[bytes | Act] = []
    for each in found:
        if isinstance(each, bytes) and joined and isinstance(joined[-1], bytes):
            joined[-1] += each
        elif each:
            joined.append(each)
    return joined
