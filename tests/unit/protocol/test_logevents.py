"""Events of a side channel: read in any pieces, shown without harm, and no more than claims."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.logevents import (
    LINE_BYTES_MAX,
    Annotation,
    Artifact,
    EventLines,
    Progress,
    WithEvents,
    read_event,
)
from protocol.logtext import LogText, Piece, Standard
from protocol.records import Record, RecordKind

GOOD = {
    b'{"type":"progress","value":0.5,"label":"half"}': Progress(0.5, "half"),
    b'{"type":"progress"}': Progress(None, ""),
    b'{"type":"annotation","message":"odd","level":"error","file":"a.c","line":3}': Annotation(
        "error", "odd", "a.c", 3
    ),
    b'{"type":"annotation","message":"odd"}': Annotation("notice", "odd", "", None),
    b'{"type":"artifact","name":"report","path":"out.html","bytes":2048,"more":1}': Artifact(
        "report", "out.html", 2048
    ),
}
BAD = [
    b"",
    b"no json",
    b"[]",
    b"{}",
    b'{"type":"dance"}',
    b'{"type":"progress","value":2}',
    b'{"type":"progress","value":true}',
    b'{"type":"progress","value":"1"}',
    b'{"type":"annotation"}',
    b'{"type":"annotation","message":"x","level":"fatal"}',
    b'{"type":"artifact"}',
    b"\xff\xfe",
    b"[" * 10_000,
]


@pytest.mark.parametrize("line", GOOD)
def test_an_event_is_what_it_says(line: bytes) -> None:
    """Unknown fields are passed over."""
    assert read_event(line) == GOOD[line]


@pytest.mark.parametrize("line", BAD)
def test_what_is_no_event_is_passed_over(line: bytes) -> None:
    """Whatever it is."""
    assert read_event(line) is None


@given(st.lists(st.integers(1, 60), max_size=30))
def test_lines_may_be_cut_anywhere(cuts: list[int]) -> None:
    """The same events in the same order."""
    whole = b"\n".join([*GOOD, *BAD[:5]]) + b"\n"
    lines, told, at = EventLines(), list[object](), 0
    for cut in [*cuts, len(whole)]:
        told += lines.feed(whole[at : at + cut])
        at += cut
    assert told == list(GOOD.values())


def test_a_line_without_an_end_is_bounded() -> None:
    """It is passed over, with what is left of it; the next one counts."""
    lines = EventLines()
    for _ in range(10):
        assert list(lines.feed(b"x" * LINE_BYTES_MAX)) == []
    assert list(lines.feed(b'"}\n{"type":"progress"}\n')) == [Progress(None, "")]


def shown(*records: tuple[int, bytes], bars: bool) -> tuple[bytes, bytes]:
    """What these records print to stdout and stderr."""
    view = WithEvents(LogText(), bars=bars)

    def pieces() -> Iterator[Piece]:
        for at, (kind, payload) in enumerate(records):
            yield from view.show(Record(at, kind, 0, payload))
        yield from view.finish()

    told = list(pieces())
    return tuple(b"".join(piece.data for piece in told if piece.to is to) for to in (Standard.OUT, Standard.ERR))  # type: ignore[return-value]


def event(**fields: object) -> tuple[int, bytes]:
    """One on the side channel."""
    return RecordKind.EVENT, json.dumps(fields).encode() + b"\n"


def test_events_never_touch_the_output() -> None:
    """Remarks are lines on stderr; without a person there is no bar."""
    out, err = shown(
        event(type="progress", value=0.25, label="a"),
        (RecordKind.STDOUT, b"x\n"),
        event(type="annotation", message="odd \x1b[31m", level="warning", file="a.c", line=3),
        event(type="artifact", name="report", path="out", bytes=2048),
        bars=False,
    )
    assert out == b"x\n"
    assert err == b"[warning] a.c:3: odd \\x1b[31m\n[artifact] report: out (2 KiB)\n"


def test_a_bar_stands_below_the_output_and_goes_at_the_end() -> None:
    """Drawn anew behind each whole line, never inside one."""
    out, err = shown(
        event(type="progress", value=0.5, label="half"),
        (RecordKind.STDOUT, b"no end yet"),
        (RecordKind.STDOUT, b" now\n"),
        bars=True,
    )
    bar = b"[############------------]  50% half"
    assert out == b"no end yet now\n"
    assert err == b"\r\x1b[K" + bar + b"\r\x1b[K" + b"\r\x1b[K" + bar + b"\r\x1b[K"
