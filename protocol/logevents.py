"""What a program says on its side channel: lines of JSON about progress, annotations and artifacts, and how a person sees them. Pure.

    {"type": "progress", "value": 0.4, "label": "linking"}              value from 0 to 1, or null: not known
    {"type": "annotation", "level": "warning", "message": "…", "file": "a.c", "line": 3}
    {"type": "artifact", "name": "report", "path": "out/report.html", "bytes": 12345}

Rule 1: an event is a claim of the program and no more; a line that is none is passed over. Rule 2: what is shown obeys no terminal.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from protocol.logtext import Piece, Standard, View
from protocol.records import Record, RecordKind
from protocol.text import show_size, visible

LINE_BYTES_MAX: Final = 16 * 1024
"""One event; a longer line is passed over, whatever it is."""
TEXT_CHARS_MAX: Final = 200
"""Of a label, name or path, as it is shown."""
MESSAGE_CHARS_MAX: Final = 2000
LEVELS: Final = ("notice", "warning", "error")
BAR_CHARS: Final = 24
_ERASE: Final = b"\r\x1b[K"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is, from 0 to 1; None: it does not know."""

    value: float | None
    label: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """A remark, about a place in a file where there is one."""

    level: str
    message: str
    file: str
    line: int | None


@dataclass(frozen=True, slots=True)
class Artifact:
    """Something it made."""

    name: str
    path: str
    bytes: int | None


Told = Progress | Annotation | Artifact


class EventLines:
    """The side channel as it comes, in any pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._passing = False

    def feed(self, data: bytes) -> Iterator[Told]:
        """The events that are whole now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            told = None if self._passing else read_event(line)
            self._passing = False
            if told is not None:
                yield told
        if len(self._rest) > LINE_BYTES_MAX:
            self._rest, self._passing = b"", True


def read_event(line: bytes) -> Told | None:
    """One event, None when the line is none that we know."""
    if not line or len(line) > LINE_BYTES_MAX:
        return None
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    reader = _READERS.get(str(said.get("type"))) if isinstance(said, dict) else None
    return None if reader is None else reader(said)


def _progress(said: Mapping[str, Any]) -> Told | None:
    value = said.get("value")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        return None
    return Progress(None if value is None else float(value), _text(said.get("label"), TEXT_CHARS_MAX))


def _annotation(said: Mapping[str, Any]) -> Told | None:
    message = _text(said.get("message"), MESSAGE_CHARS_MAX)
    level, line = said.get("level", LEVELS[0]), said.get("line")
    if not message or level not in LEVELS:
        return None
    where = line if isinstance(line, int) and not isinstance(line, bool) and line > 0 else None
    return Annotation(str(level), message, _text(said.get("file"), TEXT_CHARS_MAX), where)


def _artifact(said: Mapping[str, Any]) -> Told | None:
    name, size = _text(said.get("name"), TEXT_CHARS_MAX), said.get("bytes")
    if not name:
        return None
    known = size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None
    return Artifact(name, _text(said.get("path"), TEXT_CHARS_MAX), known)


_READERS: Final = {"progress": _progress, "annotation": _annotation, "artifact": _artifact}


def _text(value: object, chars_max: int) -> str:
    return value[:chars_max] if isinstance(value, str) else ""


class WithEvents:
    """Another view, with events on stderr: remarks and artifacts as lines, progress as a bar where a person looks (`bars`)."""

    def __init__(self, view: View, *, bars: bool) -> None:
        self._view = view
        self._bars = bars
        self._lines = EventLines()
        self._bar = b""

    def show(self, record: Record) -> Iterator[Piece]:
        """What a record prints; the bar stays below."""
        if record.kind == RecordKind.EVENT:
            for told in self._lines.feed(record.payload):
                yield from self._tell(told)
        else:
            yield from self._above(self._view.show(record))

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """As of the other view."""
        yield from self._above(self._view.gap(start, end))

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """As of the other view; the bar goes."""
        yield from self._clear()
        yield from self._view.ended(fate)

    def finish(self) -> Iterator[Piece]:
        """As of the other view; the bar goes."""
        yield from self._clear()
        yield from self._view.finish()

    def _tell(self, told: Told) -> Iterator[Piece]:
        if isinstance(told, Progress):
            if self._bars:
                self._bar = bar(told)
                yield Piece(Standard.ERR, _ERASE + self._bar)
            return
        yield from self._above(iter((Piece(Standard.ERR, sentence(told) + b"\n"),)))

    def _above(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        last = b""
        for piece in pieces:
            if self._bar and not last:
                yield Piece(Standard.ERR, _ERASE)
            last = piece.data or last
            yield piece
        if self._bar and last.endswith(b"\n"):
            # In the middle of a line there is no room for it; it comes again behind the next one.
            yield Piece(Standard.ERR, self._bar)

    def _clear(self) -> Iterator[Piece]:
        if self._bar:
            self._bar = b""
            yield Piece(Standard.ERR, _ERASE)


def bar(told: Progress) -> bytes:
    """Progress on one line."""
    if told.value is None:
        drawn = "…"
    else:
        full = round(told.value * BAR_CHARS)
        drawn = f"[{'#' * full}{'-' * (BAR_CHARS - full)}] {told.value:4.0%}"
    return f"{drawn} {visible(told.label)}".rstrip().encode()


def sentence(told: Annotation | Artifact) -> bytes:
    """A remark or an artifact on one line."""
    if isinstance(told, Annotation):
        place = f"{told.file}:{told.line}: " if told.file and told.line else f"{told.file}: " if told.file else ""
        return visible(f"[{told.level}] {place}{told.message}").encode()
    size = "" if told.bytes is None else f" ({show_size(told.bytes)})"
    return visible(f"[artifact] {told.name}{': ' if told.path else ''}{told.path}{size}").encode()
