"""Records of a log as bytes for the two standard streams: what `logs` and `exec` of both command lines print."""

import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from protocol.records import Record, RecordKind
from protocol.text import Visible

_GAP: Final = struct.Struct("<QQ")


class Standard(IntEnum):
    """A standard stream, by its file descriptor."""

    OUT = 1
    ERR = 2


class Piece(NamedTuple):
    """Bytes for one of the standard streams."""

    to: Standard
    data: bytes


_STREAMS: Final[Mapping[int, Standard]] = MappingProxyType(
    {RecordKind.STDOUT: Standard.OUT, RecordKind.STDERR: Standard.ERR, RecordKind.PTY: Standard.OUT}
)


class LogText:
    """Turns records into pieces. `safe` names the streams that are shown to a person and must not be obeyed by a terminal."""

    def __init__(self, safe: frozenset[Standard] = frozenset()) -> None:
        self._filters = {stream: Visible() for stream in safe}

    def show(self, record: Record) -> Iterator[Piece]:
        """What a record prints; records that are no output print nothing."""
        if record.kind == RecordKind.GAP and len(record.payload) == _GAP.size:
            yield from self.gap(*_GAP.unpack(record.payload))
            return
        stream = _STREAMS.get(record.kind)
        if stream is not None and record.payload:
            known = self._filters.get(stream)
            yield Piece(stream, record.payload if known is None else known.feed(record.payload))

    def gap(self, start: int, end: int) -> Iterator[Piece]:
        """The note that stands for a hole of the log."""
        yield Piece(Standard.ERR, f"[gap: {end - start} bytes missing]\n".encode())

    def finish(self) -> Iterator[Piece]:
        """What was held back for its other half, at the end."""
        for stream, known in self._filters.items():
            if rest := known.feed(b"", final=True):
                yield Piece(stream, rest)
