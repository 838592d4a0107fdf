"""The formats of a log beside plain text: lines with their times, JSON lines, asciicast v3 and CRI.

Rule 1: what is printed depends on the bytes of each stream and on their times, not on how they were cut into records and reads
(JSON lines, which show records, excepted). Rule 2: a hole is shown as a hole in every format.
Rule 3: nothing that a terminal would obey comes out of a JSON format; the others take `safe` for that.
"""

import base64
import codecs
import json
import struct
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Final

from protocol.logtext import STREAMS, LogText, Piece, Standard, View, gap_of, gap_words
from protocol.moments import show_moment
from protocol.records import Record, RecordKind
from protocol.text import Visible

CRI_LINE_BYTES_MAX: Final = 16 * 1024
"""Longest text of one CRI line, as container runtimes have it."""
TERM_COLS: Final = 80
TERM_ROWS: Final = 24
"""The terminal that a recording names where there was none: what every player takes."""
_SIZE: Final = struct.Struct("<HH")
_US_PER_S: Final = 1_000_000
_FATE: Final = ("verdict", "code", "signal", "cause")
_KINDS: Final = {int(kind): kind.name.lower() for kind in RecordKind}
_NO_STATUS: Final = 125
"""The exit status of what came to no end of its own, as a settlement has it."""


class Format(StrEnum):
    """How a log is printed."""

    PLAIN = "plain"
    STAMPED = "stamped"
    JSON = "json"
    ASCIICAST = "asciicast"
    CRI = "cri"


def make_view(form: Format, safe: frozenset[Standard]) -> View:
    """The view for a format; `safe` names the streams that a terminal shows."""
    match form:
        case Format.PLAIN:
            return LogText(safe)
        case Format.STAMPED:
            return Stamped(safe)
        case Format.JSON:
            return JsonLines()
        case Format.ASCIICAST:
            return Asciicast()
        case Format.CRI:
            return Cri(safe=Standard.OUT in safe)


class Stamped(LogText):
    """Output with the time of its first byte before each line; every stream has lines of its own."""

    def __init__(self, safe: frozenset[Standard] = frozenset()) -> None:
        super().__init__(safe)
        self._within: set[Standard] = set()
        """Streams in the middle of a line."""

    def show(self, record: Record) -> Iterator[Piece]:
        """Lines and parts of lines, with a stamp where one begins."""
        stream = STREAMS.get(record.kind)
        if stream is None:
            yield from super().show(record)
            return
        shown, known, stamp = bytearray(), self._filters.get(stream), f"{show_moment(record.unix_ns)} ".encode()
        for line in _lines(record.payload):
            if stream not in self._within:
                shown += stamp
            shown += line if known is None else known.feed(line)
            self._within.discard(stream) if line.endswith(b"\n") else self._within.add(stream)
        if shown:
            yield Piece(stream, bytes(shown))


class JsonLines:
    """One JSON object for each record, gap and end, without loss: text where it is UTF-8, else base64."""

    def __init__(self) -> None:
        self._told_end = False

    def show(self, record: Record) -> Iterator[Piece]:
        """`offset`, `kind`, `time` and what the record holds; the records that only open a segment are left out."""
        if (hole := gap_of(record)) is not None:
            yield from self.gap(*hole)
        elif record.kind != RecordKind.SEGMENT:
            moment = show_moment(record.unix_ns) if record.unix_ns else None
            yield _json_line(
                {"offset": record.offset, "kind": kind_name(record.kind), "time": moment, **self._held(record)}
            )

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """`[offset, end)` is missing."""
        yield _json_line({"offset": start, "kind": "gap", "time": None, "end": end, "bytes": end - start})

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """The end as far as it is known, where no record of the log has told it."""
        if not self._told_end:
            known = {name: fate.get(name) for name in _FATE}
            yield _json_line({"offset": None, "kind": "exit", "time": None, "exit": known})

    def finish(self) -> Iterator[Piece]:
        """Nothing is held back."""
        yield from ()

    def _held(self, record: Record) -> dict[str, Any]:
        if record.kind == RecordKind.EXIT and (ended := _json_object(record.payload)) is not None:
            self._told_end = True
            return {"exit": ended}
        try:
            return {"data": record.payload.decode("utf-8")}
        except UnicodeDecodeError:
            return {"data_base64": base64.b64encode(record.payload).decode("ascii")}


def kind_name(kind: int) -> str:
    """A kind of record in words; one that a later version writes by its number."""
    return _KINDS.get(kind) or str(kind)


class Asciicast:
    """asciicast v3: a header, then events with the seconds since the one before. Both streams are output of one terminal."""

    def __init__(self) -> None:
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        self._last_us: int | None = None
        self._size: tuple[int, int] | None = None
        """The last rows and columns that were told; None where nobody has."""

    def show(self, record: Record) -> Iterator[Piece]:
        """Output as `o`, input as `i`, resizes as `r`, markers as `m`, the end as `x`. A size that comes first stands in the header."""
        if (hole := gap_of(record)) is not None:
            yield from self.gap(*hole)
        elif (event := self._event(record)) is not None:
            yield from self._tell(*event, record)

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """A marker."""
        yield from self._tell("m", gap_words(start, end), None)

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """Nothing: an end without a record has no time."""
        yield from ()

    def finish(self) -> Iterator[Piece]:
        """Halves of characters whose other half never came; the header, where there was nothing at all."""
        for kind, decoder in sorted(self._decoders.items()):
            if rest := _ended_lines(kind, decoder.decode(b"", True)):
                yield from self._tell("o", rest, None)
        if self._last_us is None:
            yield self._header(None)

    def _event(self, record: Record) -> tuple[str, str] | None:
        match record.kind:
            case RecordKind.STDOUT | RecordKind.STDERR | RecordKind.PTY as kind:
                decoder = self._decoders.get(kind)
                if decoder is None:
                    decoder = self._decoders[kind] = codecs.getincrementaldecoder("utf-8")("replace")
                text = _ended_lines(kind, decoder.decode(record.payload))
                return ("o", text) if text else None
            case RecordKind.RESIZE if len(record.payload) == _SIZE.size:
                before, (rows, cols) = self._size, _SIZE.unpack(record.payload)
                self._size = rows, cols
                # Each segment begins with the size as it is, which is no event.
                return None if before == self._size or self._last_us is None else ("r", f"{cols}x{rows}")
            case RecordKind.MARKER if "modes" in (_json_object(record.payload) or {}):
                return None
            case RecordKind.INPUT | RecordKind.MARKER as kind:
                return "i" if kind == RecordKind.INPUT else "m", record.payload.decode("utf-8", "replace")
            case RecordKind.EXIT:
                return "x", str(_status(_json_object(record.payload) or {}))
        return None

    def _tell(self, code: str, data: str, record: Record | None) -> Iterator[Piece]:
        now_us = None if record is None else record.unix_ns // 1000
        if self._last_us is None:
            yield self._header(now_us)
            self._last_us = now_us or 0
        elapsed_us = max(0, (now_us or 0) - self._last_us)
        self._last_us += elapsed_us
        interval = f"{elapsed_us // _US_PER_S}.{elapsed_us % _US_PER_S:06d}"
        yield Piece(Standard.OUT, f"[{interval}, {_json(code)}, {_json(data)}]\n".encode())

    def _header(self, now_us: int | None) -> Piece:
        known = {} if not now_us else {"timestamp": now_us // _US_PER_S}
        rows, cols = self._size or (TERM_ROWS, TERM_COLS)
        return _json_line({"version": 3, "term": {"cols": cols, "rows": rows}, **known})


def _ended_lines(kind: int, text: str) -> str:
    """Lines as a terminal wants them: where there was none, nobody has put the carriage returns in."""
    return text if kind == RecordKind.PTY else text.replace("\n", "\r\n")


def _status(fate: Mapping[str, Any]) -> int:
    code, signal = fate.get("code"), fate.get("signal")
    if isinstance(signal, int):
        return 128 + signal
    return code if isinstance(code, int) else _NO_STATUS


class Cri:
    """Lines as container runtimes write them: `time stream F text`, with P for a part of a line. `safe`: at a terminal."""

    def __init__(self, *, safe: bool = False) -> None:
        self._safe = safe
        self._lines: dict[int, _CriLine] = {}
        self._holes: list[tuple[int, int]] = []
        """Holes whose time is not known yet: that of the record behind them."""
        self._last_ns = 0

    def show(self, record: Record) -> Iterator[Piece]:
        """Lines that are complete, and parts of those that are too long; a line keeps the time of its first byte."""
        if (hole := gap_of(record)) is not None:
            yield from self.gap(*hole)
            return
        self._last_ns = record.unix_ns
        shown = bytearray(b"".join(self._told_holes()))
        if (to := STREAMS.get(record.kind)) is not None:
            line = self._lines.get(record.kind)
            if line is None:
                line = self._lines[record.kind] = _CriLine(to.word, safe=self._safe)
            for part in line.feed(record.payload, record.unix_ns):
                shown += part
        if shown:
            yield Piece(Standard.OUT, bytes(shown))

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """A line of stderr, behind what was begun before the hole."""
        for _, line in sorted(self._lines.items()):
            if part := line.finish():
                yield Piece(Standard.OUT, part)
        self._holes.append((start, end))

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """Nothing: the format has no word for it."""
        yield from ()

    def finish(self) -> Iterator[Piece]:
        """Lines that never ended, as parts."""
        for _, line in sorted(self._lines.items()):
            if part := line.finish():
                yield Piece(Standard.OUT, part)
        for note in self._told_holes():
            yield Piece(Standard.OUT, note)

    def _told_holes(self) -> Iterator[bytes]:
        for start, end in self._holes:
            yield f"{show_moment(self._last_ns)} stderr F {gap_words(start, end)}\n".encode()
        self._holes.clear()


class _CriLine:
    """The line that one stream is in."""

    def __init__(self, name: str, *, safe: bool) -> None:
        self._name = name
        self._filter = Visible() if safe else None
        self._text = bytearray()
        self._begun_ns = 0

    def feed(self, data: bytes, unix_ns: int) -> Iterator[bytes]:
        """What the next bytes complete."""
        for line in _lines(data):
            whole = line.endswith(b"\n")
            if not self._text:
                self._begun_ns = unix_ns
            self._text += line[:-1] if whole else line
            while len(self._text) > CRI_LINE_BYTES_MAX:
                yield self._part(bytes(self._text[:CRI_LINE_BYTES_MAX]), whole=False)
                del self._text[:CRI_LINE_BYTES_MAX]
                # The first byte past the limit is of these: with it the next part begins.
                self._begun_ns = unix_ns
            if whole:
                yield self._part(bytes(self._text), whole=True)
                self._text.clear()

    def finish(self) -> bytes:
        """What has begun and not ended, as a part; nothing where nothing has."""
        if not self._text:
            return b""
        part = self._part(bytes(self._text), whole=False, final=True)
        self._text.clear()
        return part

    def _part(self, text: bytes, *, whole: bool, final: bool = False) -> bytes:
        if self._filter is not None:
            text = self._filter.feed(text + b"\n" * whole, final=final).removesuffix(b"\n" * whole)
        return b"%s %s %s %s\n" % (
            show_moment(self._begun_ns).encode(),
            self._name.encode(),
            b"F" if whole else b"P",
            text,
        )


def _json_line(value: Mapping[str, Any]) -> Piece:
    return Piece(Standard.OUT, f"{_json(value)}\n".encode())


def _json(value: object) -> str:
    """Printable ASCII, DEL escaped as well: a terminal can obey nothing in it."""
    return json.dumps(value, allow_nan=False)


def _json_object(data: bytes) -> dict[str, Any] | None:
    """The object that a record of the shim holds, or None where it is another's: what is no JSON stays as it is."""
    try:
        found = json.loads(data, parse_constant=_refuse)
        _json(found)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _lines(data: bytes) -> Iterator[bytes]:
    """Lines with their ends; the last one may have none. Only a line feed ends a line."""
    at = 0
    while at < len(data):
        stop = data.find(b"\n", at) + 1 or len(data)
        yield data[at:stop]
        at = stop
