"""Records of a log as bytes for the two standard streams: what `logs` and `exec` of both command lines print."""

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from protocol.records import Record, RecordKind
from protocol.text import Visible, visible

_GAP: Final = struct.Struct("<QQ")


class Standard(IntEnum):
    """A standard stream, by its file descriptor."""

    OUT = 1
    ERR = 2

    @property
    def word(self) -> str:
        """Its name as people type it."""
        return "stdout" if self is Standard.OUT else "stderr"


class Piece(NamedTuple):
    """Bytes for one of the standard streams."""

    to: Standard
    data: bytes


STREAMS: Final[Mapping[int, Standard]] = MappingProxyType(
    {RecordKind.STDOUT: Standard.OUT, RecordKind.STDERR: Standard.ERR, RecordKind.PTY: Standard.OUT}
)
"""Kinds of records that hold output, and the stream that shows them."""


class View(Protocol):
    """One format of a log: records go in, in order, and what is to be printed comes out."""

    def show(self, record: Record) -> Iterator[Piece]:
        """What a record prints; one that stands for a hole (`gap_of`) prints what `gap` does."""
        ...

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """What stands for a hole of the log."""
        ...

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """The log is complete; `fate` is an exit object, a settlement, or as much of one as is known."""
        ...

    def finish(self) -> Iterator[Piece]:
        """Whatever was held back for more to come; the last call."""
        ...


class LogText:
    """Output as it is. `safe` names the streams that are shown to a person and must not be obeyed by a terminal."""

    def __init__(self, safe: frozenset[Standard] = frozenset()) -> None:
        self._filters = {stream: Visible() for stream in safe}

    def show(self, record: Record) -> Iterator[Piece]:
        """What a record prints; records that are no output print nothing."""
        if (hole := gap_of(record)) is not None:
            yield from self.gap(*hole)
            return
        stream = STREAMS.get(record.kind)
        if stream is not None and record.payload:
            known = self._filters.get(stream)
            yield Piece(stream, record.payload if known is None else known.feed(record.payload))

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """The note that stands for a hole of the log."""
        yield Piece(Standard.ERR, f"{gap_words(start, end)}\n".encode())

    def ended(self, fate: Mapping[str, Any]) -> Iterator[Piece]:
        """Nothing: output does not say how its program ended."""
        yield from ()

    def finish(self) -> Iterator[Piece]:
        """What was held back for its other half, at the end."""
        for stream, known in self._filters.items():
            if rest := known.feed(b"", final=True):
                yield Piece(stream, rest)


def gap_of(record: Record) -> tuple[int, int] | None:
    """The hole `[start, end)` that a record stands for, None where it is another record."""
    if record.kind != RecordKind.GAP or len(record.payload) != _GAP.size:
        return None
    start, end = _GAP.unpack(record.payload)
    return start, end


def gap_words(start: int, end: int) -> str:
    """A hole, for a person."""
    return f"[gap: {end - start} bytes missing]"


def how_it_ended(fate: Mapping[str, Any]) -> str:
    """One line about the end of an attempt, from its exit object or settlement."""
    verdict, cause = str(fate.get("verdict")), fate.get("cause")
    if verdict == "lost" and not cause:
        return "lost: its shim is gone and left no word"
    words = [verdict.replace("_", " ")]
    if fate.get("signal") is not None:
        words.append(f"by signal {fate['signal']}")
    elif fate.get("code") is not None:
        words.append(f"with status {fate['code']}")
    if isinstance(cause, Mapping) and cause.get("kind") not in (None, "none"):
        words.append(f"({cause['kind']} {cause.get('reason') or cause.get('by') or ''}".rstrip() + ")")
    return visible(" ".join(words))
