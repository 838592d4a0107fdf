"""The formats of a log, each by example; that they do not depend on cuts is in tests/property/test_logviews.py."""

import json
import struct

import pytest

from protocol.logselect import Cut, Selection, Wish
from protocol.logtext import Piece, Standard, View, how_it_ended
from protocol.logviews import CRI_LINE_BYTES_MAX, Asciicast, Cri, Format, JsonLines, Stamped, make_view
from protocol.receipt import INFRA_STATUS
from protocol.records import Record, RecordKind

S = 1_000_000_000
T0 = 1_795_296_600 * S
OUT, ERR = RecordKind.STDOUT, RecordKind.STDERR
EXIT = b'{"v": 1, "verdict": "exited", "code": 3, "signal": null, "cause": {"kind": "none"}}'
HOLE = struct.pack("<QQ", 100, 350)


def printed(view: View, *records: tuple[int, bytes, int]) -> tuple[str, str]:
    """What goes to stdout and to stderr of records with their times since the beginning."""
    said = dict.fromkeys(Standard, b"")
    offset = 0
    for kind, payload, after_ns in records:
        record = Record(offset, kind, T0 + after_ns, payload)
        offset = record.end
        for piece in view.show(record):
            said[piece.to] += piece.data
    for piece in view.finish():
        said[piece.to] += piece.data
    return said[Standard.OUT].decode("utf-8", "surrogateescape"), said[Standard.ERR].decode("utf-8", "surrogateescape")


def test_a_line_in_pieces_has_the_time_of_its_first_byte() -> None:
    """Each stream has lines of its own; a line without an end has its stamp too."""
    out, err = printed(
        Stamped(), (OUT, b"a", 0), (ERR, b"x\n", S), (OUT, b"b\nc", 2 * S), (OUT, b"\n\n", 3 * S), (ERR, b"y", 4 * S)
    )
    stamps = [f"2026-11-21T21:30:0{n}.000000000Z " for n in range(5)]
    assert out == f"{stamps[0]}ab\n{stamps[2]}c\n{stamps[3]}\n"
    assert err == f"{stamps[1]}x\n{stamps[4]}y"


def test_json_lines_say_what_records_say() -> None:
    """Text, bytes that are none, a hole, the end; what only opens a segment is left out."""
    out, err = printed(
        JsonLines(), (RecordKind.SEGMENT, b"x" * 42, 0), (OUT, b"a\x00\x7f\x1b[1m\n", 0), (ERR, b"\xff", S),
        (RecordKind.GAP, HOLE, 0), (RecordKind.EXIT, EXIT, 2 * S), (200, b"later", 0),
    )  # fmt: skip
    lines = [json.loads(line) for line in out.splitlines()]
    time = "2026-11-21T21:30:0{}.000000000Z"
    assert err == "" and out.isascii() and "\x7f" not in out
    assert lines == [
        {"offset": 58, "kind": "stdout", "time": time.format(0), "data": "a\0\x7f\x1b[1m\n"},
        {"offset": 82, "kind": "stderr", "time": time.format(1), "data_base64": "/w=="},
        {"offset": 100, "kind": "gap", "time": None, "end": 350, "bytes": 250},
        {"offset": 131, "kind": "exit", "time": time.format(2), "exit": json.loads(EXIT)},
        {"offset": 131 + 16 + len(EXIT), "kind": "200", "time": time.format(0), "data": "later"},
    ]


def test_an_end_without_a_record_is_told_once() -> None:
    """A lost attempt has no exit record; one that has it is not told of twice."""
    assert [json.loads(piece.data)["exit"] for piece in JsonLines().ended({"verdict": "lost", "v": 1})] == [
        {"verdict": "lost", "code": None, "signal": None, "cause": None}
    ]
    view = JsonLines()
    printed(view, (RecordKind.EXIT, EXIT, 0))
    assert list(view.ended({"verdict": "exited"})) == []


@pytest.mark.parametrize("payload", [b"{", b"[" * 60_000, b'{"code": NaN}', b"[1]", b'{"a": "\\ud800"}', b"\xff"])
def test_an_exit_record_of_anybody_is_still_a_line(payload: bytes) -> None:
    """What is no object of JSON is shown as it is."""
    for form in Format:
        out, _ = printed(make_view(form, frozenset()), (RecordKind.EXIT, payload, 0))
        assert form in (Format.PLAIN, Format.STAMPED, Format.CRI) or out


def test_a_recording_is_asciicast_v3() -> None:
    """A header, relative times, every code; characters whole, line ends as a terminal wants them."""
    out, err = printed(
        Asciicast(), (OUT, b"a\n\xe2\x82", S), (RecordKind.RESIZE, struct.pack("<HH", 40, 120), 2 * S),
        (OUT, b"\xac", 2 * S + 500_000_000), (RecordKind.INPUT, b"q", S), (RecordKind.MARKER, b"here", 3 * S),
        (RecordKind.GAP, HOLE, 0), (RecordKind.PTY, b"x\r\n\xff", 4 * S), (ERR, b"\xf0", 4 * S),
        (RecordKind.EXIT, EXIT, 5 * S),
    )  # fmt: skip
    header, *events = map(json.loads, out.splitlines())
    assert (header, err) == ({"version": 3, "term": {"cols": 80, "rows": 24}, "timestamp": T0 // S + 1}, "")
    assert events == [
        [0, "o", "a\r\n"], [1, "r", "120x40"], [0.5, "o", "€"], [0, "i", "q"], [0.5, "m", "here"],
        [0, "m", "[gap: 250 bytes missing]"], [1, "o", "x\r\n\ufffd"], [1, "x", "3"], [0, "o", "\ufffd"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ended", "status"), [(b'{"signal": 9}', "137"), (b"{}", str(INFRA_STATUS)), (b"no", str(INFRA_STATUS))]
)
def test_a_recording_ends_with_a_status(ended: bytes, status: str) -> None:
    """As a shell would say it."""
    assert json.loads(printed(Asciicast(), (RecordKind.EXIT, ended, 0))[0].splitlines()[1]) == [0, "x", status]


def test_an_empty_recording_has_a_header() -> None:
    """And nothing else."""
    assert json.loads(printed(Asciicast())[0]) == {"version": 3, "term": {"cols": 80, "rows": 24}}


def test_cri_lines_are_full_or_parts() -> None:
    """Streams apart, bytes as they are, a hole as a line, an unfinished line as a part."""
    out, err = printed(
        Cri(), (OUT, b"a", 0), (ERR, b"\xff\x1b\n", S), (OUT, b"b\r\n\nrest", 2 * S), (RecordKind.GAP, HOLE, 0),
        (RecordKind.PTY, b"p\n", 3 * S),
    )  # fmt: skip
    stamp = [f"2026-11-21T21:30:0{n}.000000000Z" for n in range(4)]
    assert err == ""
    assert out.split("\n") == [
        f"{stamp[1]} stderr F \udcff\x1b", f"{stamp[0]} stdout F ab\r", f"{stamp[2]} stdout F ",
        f"{stamp[2]} stdout P rest", f"{stamp[3]} stderr F [gap: 250 bytes missing]", f"{stamp[3]} stdout F p", "",
    ]  # fmt: skip


def test_a_cri_line_has_at_most_16_kib() -> None:
    """Exactly so much is one line; one more byte is another part, whose time is that of its first byte."""
    full = b"x" * CRI_LINE_BYTES_MAX
    (only,) = printed(Cri(), (OUT, full, 0), (OUT, b"\n", S))[0].splitlines()
    assert only.split(" ", 3)[2:] == ["F", full.decode()]
    lines = [
        line.split(" ", 3) for line in printed(Cri(), (OUT, full, 0), (OUT, b"y" + full + b"z\n", S))[0].splitlines()
    ]
    assert [(line[0][17:19], line[2], len(line[3])) for line in lines] == [
        ("00", "P", CRI_LINE_BYTES_MAX), ("01", "P", CRI_LINE_BYTES_MAX), ("01", "F", 2),
    ]  # fmt: skip


def test_the_half_of_a_character_is_not_lost_at_a_terminal() -> None:
    """Neither at the end, nor before a hole."""
    assert "\\xe2\\x82" in printed(Cri(safe=True), (OUT, b"a\xe2\x82", 0))[0]
    assert "\\xe2\\x82" in printed(Cri(safe=True), (OUT, b"a\xe2\x82", 0), (RecordKind.GAP, HOLE, 0))[0]
    assert "\\xe2\\x82" in printed(Stamped(frozenset(Standard)), (OUT, b"a\xe2\x82", 0))[0]


@pytest.mark.parametrize("form", list(Format))
def test_a_hole_is_shown_in_every_format(form: Format) -> None:
    """With its length, also where nothing else is."""
    view = make_view(form, frozenset())
    said = b"".join(piece.data for pieces in (view.gap(100, 350), view.finish()) for piece in pieces)
    assert b"250" in said


def test_how_it_ended_in_one_line() -> None:
    """From an exit object or a settlement; nothing in it is obeyed."""
    assert (
        how_it_ended({"verdict": "timed_out", "signal": 15, "cause": {"kind": "timeout"}})
        == "timed out by signal 15 (timeout)"
    )
    assert how_it_ended({"verdict": "exited", "code": 3, "cause": {"kind": "none"}}) == "exited with status 3"
    assert how_it_ended({"verdict": "lost"}).startswith("lost: ")
    assert how_it_ended({"verdict": "lost", "cause": {"kind": "reboot", "reason": "REBOOT"}}) == "lost (reboot REBOOT)"
    assert "\x1b" not in how_it_ended({"verdict": "x\x1b"})


def test_since_begins_with_the_first_record_that_is_new_enough() -> None:
    """And goes on from there, whatever a clock does later; holes before it are not shown."""
    log = [Record(0, OUT, 5, b"old"), Record(19, OUT, 10, b"new"), Record(38, OUT, 7, b"back")]
    selection = Selection(Wish(since_ns=8))
    assert not selection.wants_gap(5)
    assert [record for record in map(selection.take, log) if record is not None] == log[1:]
    assert selection.wants_gap(100)


def test_one_stream_alone_keeps_holes_and_the_end() -> None:
    """Only output of the other one is left out."""
    log = [Record(0, OUT, 1, b"o"), Record(17, ERR, 1, b"e"), Record(34, RecordKind.EXIT, 1, EXIT)]
    selection = Selection(Wish(stream=Standard.ERR))
    assert [record for record in map(selection.take, log) if record is not None] == log[1:]
    assert selection.take(Record(400, RecordKind.GAP, 0, HOLE)) is not None


def test_a_cut_leaves_out_what_comes_before_it() -> None:
    """Within its record, for its own kind only."""
    selection = Selection(Wish(tail=1), {OUT: Cut(17, 2)})
    log = [Record(0, OUT, 1, b"a"), Record(17, OUT, 1, b"b\nc"), Record(36, OUT, 1, b"d"), Record(0, ERR, 1, b"e")]
    assert [None if taken is None else taken.payload for taken in map(selection.take, log)] == [None, b"c", b"d", b"e"]
    assert list(make_view(Format.PLAIN, frozenset()).ended({})) == []
    assert Piece(Standard.OUT, b"").to.word == "stdout"


def test_a_recording_of_a_terminal_has_its_size() -> None:
    """The first size is the header's; that of a segment's beginning is told only where it is another, and its modes never."""
    small, large = struct.pack("<HH", 24, 100), struct.pack("<HH", 50, 132)
    modes = b'{"modes":{"1049":true},"keypad":false}'
    out, _ = printed(
        Asciicast(), (RecordKind.RESIZE, small, S), (RecordKind.MARKER, modes, S), (RecordKind.PTY, b"a", S),
        (RecordKind.RESIZE, small, 2 * S), (RecordKind.MARKER, modes, 2 * S), (RecordKind.RESIZE, large, 3 * S),
        (RecordKind.PTY, b"b", 3 * S),
    )  # fmt: skip
    header, *events = map(json.loads, out.splitlines())
    assert header == {"version": 3, "term": {"cols": 100, "rows": 24}, "timestamp": T0 // S + 1}
    assert events == [[0, "o", "a"], [2, "r", "132x50"], [0, "o", "b"]]
