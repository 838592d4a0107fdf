"""The log of an attempt as both sides read it: records with absolute offsets, in segments whose digests form a chain.

The shim writes it with constants of its own (it may import nothing); a test holds the two together. Layout: docs/shim.md §3.
"""

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from protocol.errors import Reason, RemoteError
from protocol.limits import RECORD_HEADER_BYTES, RECORD_PAYLOAD_BYTES_MAX

_HEADER: Final = struct.Struct("<IBBHQ")
_CHECKED_HEAD: Final = struct.Struct("<IBB")
_CHECKED_TAIL: Final = struct.Struct("<Q")
_SEGMENT: Final = struct.Struct("<HQ32s")
SEGMENT_FORMAT: Final = 1
NO_SEGMENT: Final = bytes(32)
"""Digest of the segment before the first."""

assert _HEADER.size == RECORD_HEADER_BYTES


class RecordKind(IntEnum):
    """What a record holds."""

    STDOUT = 1
    STDERR = 2
    PTY = 3
    RESIZE = 4
    INPUT = 5
    GAP = 6
    SEGMENT = 7
    MARKER = 8
    EXIT = 9
    EVENT = 10
    """Lines on the side channel: JSON, if the program keeps to it."""


class Record(NamedTuple):
    """One record: `kind` is a number, since a later version may write kinds that this one only passes on."""

    offset: int
    kind: int
    unix_ns: int
    payload: bytes

    @property
    def end(self) -> int:
        """Offset of the record behind this one."""
        return self.offset + RECORD_HEADER_BYTES + len(self.payload)


class SegmentHeader(NamedTuple):
    """First record of every segment file."""

    base: int
    previous: bytes
    attempt: str


def encode_record(kind: int, payload: bytes, unix_ns: int) -> bytes:
    """One record as bytes. Raises ValueError for a payload over 64 KiB."""
    if len(payload) > RECORD_PAYLOAD_BYTES_MAX:
        raise ValueError("a record holds at most 64 KiB")
    check = _check(len(payload), kind, 0, unix_ns)
    return _HEADER.pack(len(payload), kind, 0, check, unix_ns) + payload


def _check(length: int, kind: int, flags: int, unix_ns: int) -> int:
    return zlib.crc32(_CHECKED_TAIL.pack(unix_ns), zlib.crc32(_CHECKED_HEAD.pack(length, kind, flags))) & 0xFFFF


def records(data: bytes | memoryview, offset: int) -> Iterator[Record]:
    """Whole records of `data`, which starts at a record boundary at `offset`; an incomplete tail is left out.

    Raises:
        RemoteError: BAD_FRAME when a header is damaged.
    """
    at = 0
    while (size := _size_at(data, at)) is not None:
        _length, kind, _flags, _check_sum, unix_ns = _HEADER.unpack_from(data, at)
        yield Record(offset + at, kind, unix_ns, bytes(data[at + RECORD_HEADER_BYTES : at + size]))
        at += size


def whole_prefix(data: bytes | memoryview, length_max: int) -> int:
    """Length of the longest prefix of whole records that is at most `length_max`.

    Raises:
        RemoteError: BAD_FRAME when the first header is damaged; before a later one the prefix ends.
    """
    at = 0
    try:
        while (size := _size_at(data, at)) is not None and at + size <= length_max:
            at += size
    except RemoteError:
        if at == 0:
            raise
    return at


def _size_at(data: bytes | memoryview, at: int) -> int | None:
    """Size of the record at `at`, or None when it is not all there."""
    if at + RECORD_HEADER_BYTES > len(data):
        return None
    length, kind, flags, check, unix_ns = _HEADER.unpack_from(data, at)
    if length > RECORD_PAYLOAD_BYTES_MAX or check != _check(length, kind, flags, unix_ns):
        raise RemoteError(Reason.BAD_FRAME, "a record header is damaged")
    size: int = RECORD_HEADER_BYTES + length
    return size if at + size <= len(data) else None


def encode_segment_header(header: SegmentHeader) -> bytes:
    """Payload of a segment's first record."""
    return _SEGMENT.pack(SEGMENT_FORMAT, header.base, header.previous) + header.attempt.encode("utf-8")


def decode_segment_header(payload: bytes) -> SegmentHeader:
    """Read a segment's first record. Raises RemoteError(BAD_FRAME | UNSUPPORTED_VERSION)."""
    if len(payload) < _SEGMENT.size:
        raise RemoteError(Reason.BAD_FRAME, "a segment header is too short")
    form, base, previous = _SEGMENT.unpack_from(payload)
    if form != SEGMENT_FORMAT:
        raise RemoteError(Reason.UNSUPPORTED_VERSION, "a segment of another format")
    try:
        return SegmentHeader(base, previous, payload[_SEGMENT.size :].decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise RemoteError(Reason.BAD_FRAME, "a segment header names no attempt") from exc
