"""From where on, and behind what, the log of a PTY is shown to a terminal that has seen nothing of it (docs/terminals.md §6). Pure.

Rule 1. A cut is never within a character or a sequence.
Rule 2. What a terminal knows at the cut from bytes before it (modes, colours, scrolling region, character set, size) stands in the
        preamble; a cut is made where it knows nothing else: behind a clear with the cursor at home, else behind a line's end.
Rule 3. What is shown at the end decides: a clear of the alternate screen is no cut for a log that ends on the main one.
"""

import re
import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from protocol.limits import RECORD_HEADER_BYTES
from protocol.records import Record, RecordKind
from terminal.modes import Modes
from terminal.queries import Stripper
from terminal.sequences import unfinished, whole_from

LOOK_BACK_BYTES: Final = 256 * 1024
"""A terminal shows so much in a few milliseconds, and a screen is drawn with a tenth of it."""
ROWS: Final = 24
COLS: Final = 80
"""Of a terminal whose size nobody told."""
PEN_SEQUENCES_MAX: Final = 32
"""Changes of colour since the last reset that are set again; who has more repeats himself."""
FRESH: Final = (
    b"\x1b[?1049l\x1b[!p\x1b[?1;5;6;9;66;1000;1002;1003;1004;1005;1006;1015;1016;2004;2026l"
    b"\x1b[?7;25h\x1b[4l\x1b>\x1b[r\x1b[m\x0f\x1b(B"
)
"""Puts a terminal back to what `Modes` calls just reset, without the flash of a full one; the cursor may be anywhere then."""
CLEAR: Final = b"\x1b[H\x1b[2J"
_SIZE: Final = struct.Struct("<HH")
_PEN: Final = rb"(?:\x1b\[[0-9;:]{0,64}m){0,8}"
_HOME: Final = rb"\[[01]?(?:;[01]?)?[Hf]"
# Each begins with ESC and nothing else, which the search then looks for at memory speed.
_CLEARED: Final = re.compile(
    rb"\x1b(?:c|%(home)s%(pen)s\x1b\[[02]?J|\[2J%(pen)s(?:\x1b\[3J)?\x1b%(home)s"
    rb"|\[\?(?:[0-9]{1,5};){0,4}1049(?:;[0-9]{1,5}){0,4}h)" % {b"home": _HOME, b"pen": _PEN}
)
_SWITCHED: Final = re.compile(rb"\x1b(?:\[\?(?:[0-9]{1,5};){0,4}(?:47|1047|1049)(?:;[0-9]{1,5}){0,4}([hl])|c)")
_DRAWN_WITH: Final = re.compile(
    rb"\x1b(?:(?P<reset>c|\[!p)|(?P<region>\[[0-9]{0,4};?[0-9]{0,4}r)|(?P<insert>\[4[hl])|(?P<charset>[()][0-9A-Z]))"
)
_SHIFTS: Final = (b"\x0e", b"\x0f")
_PEN_RESETS: Final = (b"\x1b[m", b"\x1b[0m", b"\x1b[0;", b"\x1bc", b"\x1b[!p")
_PEN_CHANGE: Final = re.compile(rb"\x1b\[[0-9;:]{0,64}m")


@dataclass(frozen=True, slots=True)
class Replay:
    """What is to be shown: first `preamble`, then the output at and behind the log offset `cut`."""

    cut: int
    preamble: bytes
    rows: int
    cols: int
    """The size at the cut."""
    alternate: bool
    """Whether the log ends on the alternate screen."""


@dataclass(slots=True)
class _Output:
    """What was written, as one piece, with the places where records begin in it and what they told beside it."""

    data: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Log offsets of the first byte of each piece, beside `starts`."""
    sizes: list[tuple[int, int, int]] = field(default_factory=list)
    markers: list[tuple[int, bytes]] = field(default_factory=list)
    first: int | None = None
    """Where the log begins here."""

    def offset_of(self, at: int) -> int:
        """The log offset of a byte."""
        piece = bisect_right(self.starts, at) - 1
        return self.offsets[piece] + at - self.starts[piece]

    def behind(self, offset: int) -> int:
        """The first byte at or behind a log offset."""
        piece = max(0, bisect_right(self.offsets, offset) - 1)
        if not self.starts:
            return 0
        end = self.starts[piece + 1] if piece + 1 < len(self.starts) else len(self.data)
        return min(end, self.starts[piece] + max(0, offset - self.offsets[piece]))


def output_of(record: Record, start: int = 0, end: int | None = None) -> bytes:
    """What a record shows at and behind the log offset `start`, and before `end`; nothing where it is no output."""
    if record.kind != RecordKind.PTY:
        return b""
    first = record.offset + RECORD_HEADER_BYTES
    return record.payload[max(0, start - first) : None if end is None else max(0, end - first)]


def size_of(record: Record) -> tuple[int, int] | None:
    """Rows and columns that a record tells; None where it tells none."""
    if record.kind != RecordKind.RESIZE or len(record.payload) < _SIZE.size:
        return None
    rows, cols = _SIZE.unpack_from(record.payload)
    return rows, cols


def plan(records: Iterable[Record], *, end: int) -> Replay:
    """How to show a log that ends at `end`, of which `records` are the newest.

    They should begin where a segment does, at least LOOK_BACK_BYTES before `end`: there stand the size and the modes.
    """
    out = _collect(records, end)
    data = bytes(out.data)
    low = out.behind(end - LOOK_BACK_BYTES)
    on_alternate = _modes_at(out, data, 0).alternate
    at = _cut(data, low, whole=out.first == 0 and low == 0, on_alternate=on_alternate)
    modes = _modes_at(out, data, at)
    size = next(((rows, cols) for place, rows, cols in reversed(out.sizes) if place <= at), (ROWS, COLS))
    sized_at = max((place for place, _rows, _cols in out.sizes if place <= at), default=0)
    preamble = FRESH + modes.setting() + _drawing_with(data[:at], sized_at) + CLEAR
    modes.feed(data[at:])
    cut = end if at >= len(data) else out.offset_of(at)
    return Replay(cut, preamble, *size, alternate=modes.alternate)


def preamble_at(records: Iterable[Record], *, end: int) -> bytes:
    """What brings a terminal that has seen nothing to the modes and colours that hold at `end`; what is on the screen stays."""
    out = _collect(records, end)
    data = bytes(out.data)
    sized_at = max((place for place, _rows, _cols in out.sizes), default=0)
    return FRESH + _modes_at(out, data, len(data)).setting() + _drawing_with(data, sized_at)


def _collect(records: Iterable[Record], end: int) -> _Output:
    out = _Output()
    expected: int | None = None
    for record in records:
        if record.offset >= end:
            break
        if record.kind == RecordKind.GAP or (expected is not None and record.offset != expected):
            # Nobody knows what stood there: begin behind it.
            out = _Output()
        expected = None
        if record.kind == RecordKind.GAP:
            continue
        expected = record.end
        out.first = record.offset if out.first is None else out.first
        if (text := output_of(record, 0, end)) or record.kind == RecordKind.PTY:
            out.starts.append(len(out.data))
            out.offsets.append(record.offset + RECORD_HEADER_BYTES)
            out.data += text
        elif (size := size_of(record)) is not None:
            out.sizes.append((len(out.data), *size))
        elif record.kind == RecordKind.MARKER:
            out.markers.append((len(out.data), record.payload))
    return out


def _cut(data: bytes, low: int, *, whole: bool, on_alternate: bool) -> int:
    """Where to begin in `data`, at `low` at the earliest; `whole`: it is all there ever was."""
    switches = [(match.end(), match[1] == b"h") for match in _SWITCHED.finditer(data)]
    places = [place for place, _on in switches]

    def alternate(at: int) -> bool:
        before = bisect_right(places, at)
        return switches[before - 1][1] if before else on_alternate

    shown = alternate(len(data))
    clears = [match.end() for match in _CLEARED.finditer(data, low)]
    at = next((at for at in reversed(clears) if alternate(at) == shown), None)
    if at is not None:
        return at
    return 0 if whole else _line(data, low)


def _line(data: bytes, low: int) -> int:
    """Behind the first end of a line from `low` on; where there is none, the first place between characters and sequences."""
    at = low
    while (found := data.find(b"\n", at)) >= 0:
        if not unfinished(data, found + 1):
            return found + 1
        at = whole_from(data, found + 1)
    return whole_from(data, low)


def _modes_at(out: _Output, data: bytes, at: int) -> Modes:
    known = bisect_right([place for place, _payload in out.markers], at) - 1
    place, modes = 0, Modes()
    if known >= 0:
        place, modes = out.markers[known][0], Modes.from_marker(out.markers[known][1])
    # A sequence that the marker stands in the middle of is still to be obeyed.
    modes.feed(unfinished(data[:place]) + data[place:at])
    return modes


def _drawing_with(data: bytes, sized_at: int) -> bytes:
    """Colours, scrolling region and character sets that hold behind `data`; a new size at `sized_at` undid the region."""
    held: dict[bytes, bytes] = {}
    for match in _DRAWN_WITH.finditer(data):
        if match.lastgroup == "reset":
            held.clear()
        elif match.lastgroup == "charset":
            held[match[0][:2]] = match[0]
        elif match.lastgroup != "region" or match.start() >= sized_at:
            held[str(match.lastgroup).encode()] = match[0]
    since = max(data.rfind(reset) for reset in _PEN_RESETS)
    pen = [match[0] for match in _PEN_CHANGE.finditer(data, max(0, since))]
    shift = max(_SHIFTS, key=data.rfind) if any(each in data for each in _SHIFTS) else b""
    return b"".join([*held.values(), shift, *pen[-PEN_SEQUENCES_MAX:]])


__all__ = [
    "CLEAR", "COLS", "FRESH", "LOOK_BACK_BYTES", "ROWS", "Replay", "Stripper", "output_of", "plan", "size_of",
]  # fmt: skip
